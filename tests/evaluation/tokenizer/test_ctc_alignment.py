"""Text pieces placed by a recognition head whose scores are known."""

import numpy as np
import pytest
import sentencepiece
import torch
from torch import nn

from speechssm.errors import ConfigError
from speechssm.evaluation.corpus import RATE, Document, Utterance
from speechssm.evaluation.tokenizer.ctc_alignment import align_ids, align_text_pieces


def scores(classes, width=6, sure=8.0):
    """Log-probabilities [T, W] of a head that hears one class in each frame."""
    logits_TW = torch.zeros(len(classes), width)
    logits_TW[torch.arange(len(classes)), torch.tensor(classes)] = sure
    return logits_TW.log_softmax(-1)


def test_pieces_are_where_they_are_heard_and_gaps_go_to_the_nearer_one():
    # Ids 0, 1, 1 are classes 1, 2, 2; blanks (0) between them.
    found = align_ids(scores([0, 1, 1, 0, 0, 0, 0, 2, 0, 2, 2, 0, 0, 0, 0]), [0, 1, 1], reach=2)
    # Two frames of blank at most go to a neighbour; the eighth frame on is one run of piece 1.
    assert found == [(0, 0, 5), (1, 5, 8)]


def test_the_text_decides_where_the_scores_do_not():
    # The head hears class 3 throughout, but the text is 0, 4.
    found = align_ids(scores([3] * 6), [0, 4], reach=0)
    assert [number for number, _, _ in found] == [0, 4]


def test_a_text_that_has_no_room_is_not_aligned():
    assert align_ids(scores([1, 2]), [0, 1, 2], reach=1) is None
    assert align_ids(scores([1, 1]), [0, 0], reach=1) is None  # equal pieces need a blank between
    assert align_ids(scores([1, 1]), [], reach=1) is None


class Head(nn.Module):
    """Hears the class that the loudness of 20 ms says."""

    sample_rate = RATE
    hop_length = 320

    def __init__(self, width):
        super().__init__()
        self.width = width

    def text_log_probabilities(self, audio_BS):
        count = audio_BS.shape[1] // 320
        level_BT = audio_BS[:, : count * 320].unflatten(1, (count, 320)).mean(-1)
        return scores((level_BT[0] * 100).round().long().tolist(), self.width)[None]


@pytest.fixture
def text_model(tmp_path):
    texts = ["ABBA", "BABA", "AB BA", "BA AB"] * 20
    with open(tmp_path / "text.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=6, model_type="char",
            bos_id=-1, eos_id=-1, minloglevel=2, hard_vocab_limit=False,
        )  # fmt: skip
    return tmp_path / "text.model"


def test_labels_are_the_pieces_of_the_model(text_model, tmp_path):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(text_model))
    ids = pieces.encode("AB")
    levels = np.repeat([number + 1 for number in ids], 5) / 100  # 100 ms each
    pcm = np.rint(np.repeat(levels, 320) * 32768).astype(np.int16)
    document = Document("d", "s", pcm, (Utterance(0, len(pcm), "ab", "c"),))
    head = Head(pieces.vocab_size() + 1)
    found = align_text_pieces([document], tmp_path, model=head, text_model=text_model, identity="x")
    (labels,) = found.unit_labels([document], 50.0, [5 * len(ids)])
    names = [found.names[label] for label in labels]
    assert names == [pieces.id_to_piece(number) for number in ids for _ in range(5)]
    with pytest.raises(ConfigError, match="give the model of its training"):
        align_text_pieces(
            [document], tmp_path / "other", model=Head(9), text_model=text_model, identity="x"
        )
    with pytest.raises(ConfigError, match="does not exist"):
        align_text_pieces(
            [document], tmp_path, model=head, text_model=tmp_path / "none", identity="x"
        )
