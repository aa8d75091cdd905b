"""Recognition heads whose answer is known."""

import numpy as np
import pytest
import sentencepiece
import torch
from torch import nn

from speechssm.errors import ConfigError
from speechssm.evaluation.tokenizer.recognition_head import AudioUtterance, head_word_error


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["THE CAT SAT ON A MAT"] * 20),
        model_prefix=str(folder / "text"), vocab_size=20, model_type="bpe",
        bos_id=-1, eos_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder / "text.model"


class Head(nn.Module):
    """Writes the pieces that the samples' values name, each with a repetition and a blank after."""

    sample_rate = 16_000

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def text_log_probabilities(self, audio_BS):
        ids_BT = audio_BS[:, ::640].round().long()
        classes_BT = torch.stack([ids_BT + 1, ids_BT + 1, torch.zeros_like(ids_BT)], 2).flatten(1)
        return nn.functional.one_hot(classes_BT, self.classes).float().log()


def test_the_head_is_read_with_the_sentencepiece_model(text_model):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(text_model))
    spoken = ["THE CAT SAT", "A MAT", "THE MAT"]

    def utterance(said: str, text: str, speaker: str) -> AudioUtterance:
        audio = np.repeat(np.array(pieces.encode(said), dtype=np.float32), 640)
        return AudioUtterance(audio, text, speaker)

    utterances = [utterance(text, text, str(i)) for i, text in enumerate(spoken)]
    model = Head(pieces.vocab_size() + 1)
    assert head_word_error(model, utterances, text_model).word_error.value == 0
    utterances[1] = utterance("A MAT", "The cat.", "1")
    utterances.append(utterance("A", "...", "3"))
    rates = head_word_error(model, utterances, text_model)
    assert rates.word_error.value == 2 / 7 and rates.utterances == 3


def test_wrong_text_models_and_absent_heads_are_named(text_model, tmp_path):
    utterances = [AudioUtterance(np.zeros(640, dtype=np.float32), "A", "s")]
    with pytest.raises(ConfigError, match="does not exist"):
        head_word_error(Head(21), utterances, tmp_path / "none.model")
    with pytest.raises(ConfigError, match="20 pieces"):
        head_word_error(Head(7), utterances, text_model)
    with pytest.raises(ConfigError, match="no recognition head"):
        head_word_error(nn.Linear(1, 1), utterances, text_model)
    with pytest.raises(ConfigError, match="no transcripts"):
        head_word_error(Head(21), [], text_model)
