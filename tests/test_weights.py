"""The weights that the repository ships: what is there, that it loads, and what it can do."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
from pystoi import stoi

from speechssm import load
from speechssm.evaluation.edit_distance import edit_distance
from speechssm.pipeline import check_acoustic_models
from speechssm.soundstorm.decoding import decode
from speechssm.soundstorm.loss import evaluate_levels

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "data" / "weights"
TOKENIZERS = ("small", "distilled")


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """30 s of a reader that no shipped tokenizer was trained on, 16 kHz."""
    audio, rate = soundfile.read(
        ROOT / "data/sample/heldout/2078-142845.opus", frames=30 * 16_000, dtype="float32"
    )
    assert rate == 16_000
    return audio


def weight_of(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_card(folder: Path) -> None:
    card = (folder / "CARD.md").read_text()
    assert "Data: 5.55 h" in card and "Licence of the weights: Apache-2.0" in card
    assert json.loads((folder / "config.json").read_text())["details"]["run"] is not None


def test_tokenizers_take_thirty_megabytes_at_most():
    folders = [path for path in (WEIGHTS / "tokenizer").iterdir() if path.is_dir()]
    assert sorted(path.name for path in folders) == sorted(TOKENIZERS)
    assert weight_of(WEIGHTS / "tokenizer") < 30e6
    for folder in folders:
        check_card(folder)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_shipped_tokenizer_is_named_by_its_name(name, speech):
    tokenizer = load("tokenizer", name)
    assert (tokenizer.vocab_size, tokenizer.rate) == (500, 25.0)
    units = tokenizer.encode(speech, 16_000)
    assert len(units) == 750
    _, counts = np.unique(units, return_counts=True)
    share = counts / counts.sum()
    assert np.exp(-(share * np.log(share)).sum()) > 100  # perplexity of 30 s of one reader
    quieter = tokenizer.encode(0.3 * speech, 16_000)
    assert (quieter == units).mean() > 0.95


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_recognition_head_spells_some_of_what_a_new_speaker_says(name):
    """From five hours not well: far nearer to this sentence than to the next one."""
    folder = ROOT / "data" / "sample"
    with (folder / "manifest.tsv").open() as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["split"] == "heldout"]
    said, other = rows[:2]
    audio, _ = soundfile.read(
        folder / said["file"], frames=round(float(said["seconds"]) * 16_000), dtype="float32"
    )
    heard_TW = load("tokenizer", name).model.text_log_probabilities(torch.from_numpy(audio)[None])[
        0
    ]
    best = torch.unique_consecutive(heard_TW.argmax(dim=-1))
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(WEIGHTS / "tokenizer" / name / "text.model")
    )
    spelled = pieces.decode([int(index) - 1 for index in best if index > 0]).upper()
    right, wrong = (edit_distance(spelled, row["text"]) / len(row["text"]) for row in (said, other))
    assert right < 0.6 and right < wrong - 0.15, spelled


def test_acoustic_weights_take_sixty_megabytes_at_most():
    folders = [
        path for stage in ("soundstream", "soundstorm") for path in (WEIGHTS / stage).glob("*")
    ]
    assert {path.parent.name for path in folders if path.name == "small"} == {
        "soundstream",
        "soundstorm",
    }
    assert sum(map(weight_of, folders)) < 60e6
    for folder in folders:
        check_card(folder)


def test_the_shipped_codec_is_understood_at_six_and_three_kilobits(speech):
    """Classic STOI of 10 s of a new speaker; Opus at 6 kbit/s has 0.89 on average of clips."""
    codec = load("soundstream", "small")
    assert (codec.num_quantizers, codec.codebook_size, codec.frame_rate) == (12, 1024, 50)
    audio_BS = torch.from_numpy(speech[: 10 * 16_000])[None]
    codes_BQT = codec.encode(audio_BS)
    assert codes_BQT.shape == (1, 12, 500)
    heard = {
        levels: stoi(speech[: 10 * 16_000], codec.decode(codes_BQT[:, :levels])[0].numpy(), 16_000)
        for levels in (1, 6, 12)
    }
    assert heard[12] > 0.85 and heard[6] > 0.8 and heard[1] < heard[6] < heard[12], heard


def test_the_shipped_soundstorm_speaks_units_in_the_codes_of_the_codec(speech):
    tokenizer, codec = load("tokenizer", "distilled"), load("soundstream", "small")
    soundstorm = load("soundstorm", "small")
    check_acoustic_models(tokenizer, soundstorm, codec)
    audio = speech[: 10 * 16_000]
    units_BU = torch.from_numpy(tokenizer.encode(audio, 16_000))[None]
    codes_BQT = codec.encode(torch.from_numpy(audio)[None])

    def nats(units_BU: torch.Tensor) -> float:
        """Of level 1, where what is said is not yet known from coarser codes."""
        batch = {"codes": codes_BQT, "units": units_BU, "length": torch.tensor([500])}
        return evaluate_levels(soundstorm, [batch] * 4)["nats"][0]

    assert nats(units_BU) < nats(units_BU.flip(1)) - 0.3

    made_BQT = decode(soundstorm, units_BU, codes_BQT[..., :150])
    heard = codec.decode(made_BQT)[0].numpy()[3 * 16_000 :]
    levels = [
        np.log(np.square(sound.reshape(-1, 640)).mean(1) + 1e-6)
        for sound in (heard, speech[3 * 16_000 : 10 * 16_000])
    ]
    assert np.corrcoef(levels)[0, 1] > 0.6
