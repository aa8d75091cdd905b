"""Text normalisation and lazy text models."""

import pickle

import pytest
import sentencepiece

from speechssm.data.text import TextEncoder, characters_left_out, normalise_text
from speechssm.errors import ConfigError


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("“Don’t,” she said: 'no'.", "DON'T SHE SAID NO"),
        ("already UPPER'S  case\n", "ALREADY UPPER'S CASE"),
        ("1,000 — '", ""),
        ("the dogs' bowl", "THE DOGS BOWL"),
        (
            "Mr. Brontë's naïve Mrs Weiß; Dr.Mrozek",
            "MISTER BRONTE'S NAIVE MISSUS WEISS DOCTOR MROZEK",
        ),
    ],
)
def test_normalisation_keeps_letters_and_inner_apostrophes(raw, normal):
    assert normalise_text(raw) == normal
    assert normalise_text(normal) == normal


def test_characters_outside_the_alphabet_are_counted_and_marks_are_not():
    assert not characters_left_out("“Don´t—stop,” (he said) [now]: café; it's *all* «right» ...")
    assert characters_left_out("Æsop & 2 Ж Ж 50% $5") == {
        "Æ": 1, "&": 1, "2": 1, "Ж": 2, "5": 2, "0": 1, "%": 1, "$": 1,
    }  # fmt: skip


def test_text_encoder_is_lazy_and_pickles(tmp_path):
    model = tmp_path / "text.model"
    encoder = pickle.loads(pickle.dumps(TextEncoder(model)))  # no file yet
    with pytest.raises(ConfigError, match="speechssm prepare sentencepiece"):
        encoder.encode("a")
    with open(model, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["THE CAT SAT", "ON THE MAT"] * 20),
            model_writer=file,
            vocab_size=20,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    encoder.encode("the cat")
    again = pickle.loads(pickle.dumps(encoder))
    assert again.encode("the cat!") == encoder.encode("THE CAT") != []
    assert max(again.encode("the mat sat on")) < again.vocab_size


def test_a_broken_model_is_named(tmp_path):
    (tmp_path / "text.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="is not a sentencepiece model"):
        TextEncoder(tmp_path / "text.model").encode("a")
