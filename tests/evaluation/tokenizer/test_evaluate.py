"""All measures together, on recordings of which everything is known.

A "phone" is 80 ms at one of four levels; the tokenizer under test hears the level exactly, so its
units are the phones, and the same for every speaker.
"""

import json

import numpy as np
import pytest
import torch
from torch import nn

from speechssm.audio.io import write_audio
from speechssm.errors import ConfigError
from speechssm.evaluation.tokenizer import evaluate
from speechssm.evaluation.tokenizer.alignment import align_with
from speechssm.evaluation.tokenizer.evaluate import (
    Candidate,
    choose_excerpts,
    evaluate_tokenizer,
)
from speechssm.evaluation.tokenizer.forced_alignment import Segment
from speechssm.evaluation.tokenizer.results import least_perplexity
from speechssm.report.rows import read_results
from speechssm.tokenizer.adapters import LogMelFeatures
from speechssm.tokenizer.kmeans import KMeansTokenizer
from speechssm.tokenizer.windowed import WindowedTokenizer

RATE = 16_000
PHONE = 1280  # samples
LEVELS = 4


class Levels(nn.Module):
    """A `FrameTokenizer` whose unit is the loudness of its 40 ms."""

    sample_rate = RATE
    hop_length = 640
    vocab_size = 2 * LEVELS
    config = {"network": "levels"}  # noqa: RUF012

    def tokenize(self, audio_BS):
        count = audio_BS.shape[1] // 640
        mean_BT = audio_BS[:, : count * 640].abs().unflatten(1, (count, 640)).mean(-1)
        return (mean_BT * 10).round().long().clamp(0, self.vocab_size - 1)


def write_speech(folder, speakers=6, seconds=72):
    """A folder with a manifest: one recording for each speaker, levels in random order."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["path\tspeaker\tset\tchapter\ttranscript"]
    for number in range(speakers):
        levels = np.random.default_rng(number).integers(1, LEVELS + 1, seconds * RATE // PHONE)
        write_audio(folder / f"{number}.wav", np.repeat(levels / 10, PHONE), RATE)
        lines.append(f"{number}.wav\ts{number}\tx\tc{number}\twhat they say")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder


def align_levels(documents, folder, *, workers, progress):
    """The true alignment, from the samples."""

    def align(jobs):
        for job in jobs:
            pcm = np.frombuffer(job.pcm, dtype="<i2")
            levels = np.rint(pcm[PHONE // 2 :: PHONE] / 3276.8).astype(int)
            yield [Segment(f"P{level}", 8 * at, 8) for at, level in enumerate(levels)]

    return align_with(align, documents, folder / "a.json", aligner="levels", frame_seconds=0.01)


def systems():
    torch.manual_seed(0)
    baseline = KMeansTokenizer(LogMelFeatures(), 8)
    baseline.centroids_VD.normal_()
    return [
        Candidate("levels", WindowedTokenizer(Levels()), masked_prediction=(1.0, 2.0)),
        Candidate("log-mel", WindowedTokenizer(baseline)),
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    data = write_speech(folder / "speech")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "align_phones", align_levels)
        # The alignment of utterances of up to a minute only: these are longer.
        patch.setattr("speechssm.evaluation.tokenizer.alignment._LONGEST_SECONDS", 1000)
        evaluate_tokenizer(
            systems(), data, folder / "out",
            measures=[name for name in evaluate.MEASURES if name != "end_of_recording"],
            heldout_speakers=["s3", "s4", "s5"], excerpts=1,
            probe_steps=1, workers=1, show_progress=False,
        )  # fmt: skip
    return folder / "out", read_results(folder / "out" / "metrics.json")


def values(results, system):
    return {row.name: row for row in results["rows"] if row.system == system}


def test_units_that_are_the_phones_and_not_the_speaker(found):
    _, results = found
    rows = values(results, "levels")
    assert rows["phone_pnmi"].value == pytest.approx(1)
    assert rows["phone_purity"].value == pytest.approx(1)
    assert rows["phone_pnmi_across_speakers"].value == pytest.approx(1, abs=0.05)
    assert rows["phone_pnmi_shuffled"].value < 0.1
    # Three of six speakers are measured, each unit all the time.
    assert rows["phone_frames"].value == 3 * 72 * 25
    assert rows["unit_perplexity"].value == pytest.approx(LEVELS, abs=0.1)
    assert rows["used_units"].value == LEVELS / (2 * LEVELS)
    assert rows["bitrate"].value == pytest.approx(25 * 2, abs=0.5)
    assert rows["window_agreement"].value == 1
    # Gains change all units, resampling by 5% some; white noise none.
    assert rows["unit_edit_distance_white_noise_20db"].value < 0.05
    assert rows["unit_edit_distance_gain_minus_12db"].value > 0.5
    assert rows["vocabulary"].value == 2 * LEVELS
    assert {"word_error", "character_error", "speaker_accuracy"} <= set(rows)
    assert values(results, "chance")["speaker_accuracy"].value == pytest.approx(1 / 3)


def test_an_end_that_no_unit_sees_is_not_told(tmp_path):
    # Nothing beyond its own 40 ms changes a unit of this tokenizer.
    rows = evaluate_tokenizer(
        systems()[:1], write_speech(tmp_path / "speech", speakers=4), tmp_path / "out",
        heldout_speakers=["s0", "s1"], measures=["end_of_recording"], cuts=4, show_progress=False,
    )  # fmt: skip
    found = {row.name: row.value for row in rows}
    for padding in ("silence", "repeat"):
        assert found[f"end_units_differing_{padding}"] == 0
        assert found[f"end_told_{padding}"] == pytest.approx(0.5)


def test_the_table_has_a_line_for_each_system_and_the_plots_are_there(found):
    out, results = found
    text = (out / "table.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[0].startswith("| system | V | Hz | bit/s | perplexity | used | PNMI ↑ |")
    assert [line.split(" | ")[0][2:] for line in lines[2:6]] == [
        "levels", "log-mel", "log-mel statistics", "chance",
    ]  # fmt: skip
    assert "Labels by levels: 3 utterances aligned" in text
    for name in ("units", "phone_pnmi", "speaker_accuracy", "unit_edit_distance", "word_error",
                 "window_agreement"):  # fmt: skip
        assert (out / f"{name}.svg").is_file(), name
    assert results["aligner"] == "levels"
    assert results["material"]["speakers"] == 3
    assert len(results["unit_counts"]["levels"]) == LEVELS


@pytest.mark.parametrize(("vocab_size", "least"), [(4, 1), (100, 25), (256, 64), (32_768, 64)])
def test_a_small_vocabulary_need_not_have_what_a_large_one_must(vocab_size, least):
    assert least_perplexity(vocab_size) == least


def test_systems_are_compared_with_log_mel_k_means(found):
    _, results = found
    against = {
        (entry["name"], entry["baseline_name"]): entry
        for entry in results["comparisons"]
        if entry["system"] == "levels"
    }
    pnmi = against["phone_pnmi", "log-mel"]
    assert pnmi["holds"] and pnmi["low"] > 0
    assert against["phone_pnmi", "units shuffled"]["holds"]
    assert {"speaker_accuracy", "speaker_accuracy_3s"} <= {name for name, _ in against}
    assert against["masked_prediction", "unigram"]["margin"] == pytest.approx(1.0)
    # Four of eight units are in use.
    assert against["unit_perplexity", "no collapse (at least 2)"]["holds"]
    assert not any(
        entry["system"] == "log-mel" and entry["baseline_name"] == "log-mel"
        for entry in results["comparisons"]
    )


def test_what_is_not_possible_is_left_out_and_named(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        write_audio(tmp_path / "data" / f"{name}.wav", rng.uniform(-0.4, 0.4, 5 * RATE), RATE)
    rows = evaluate_tokenizer(
        systems()[:1], tmp_path / "data", tmp_path / "out", workers=1, excerpts=1,
        show_progress=False,
    )  # fmt: skip
    names = {row.name for row in rows}
    assert {"unit_perplexity", "unit_edit_distance"} <= names
    assert not {name for name in names if name.startswith(("phone", "speaker", "word", "end"))}
    text = (tmp_path / "out" / "table.md").read_text()
    assert "no manifest.tsv that names its speakers" in text
    assert "recognition: left out" in text
    assert "phones: left out" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ["phoneme"]}, "unknown phoneme; choose some of: units, phones"),
        ({"aligner": "montreal"}, "aligner=montreal is unknown; choose one of: pocketsphinx, ctc"),
    ],
)
def test_mistakes_are_named(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_tokenizer(systems(), tmp_path, tmp_path / "out", **options)


def test_tokenizers_have_different_names(tmp_path):
    with pytest.raises(ConfigError, match="different names"):
        evaluate_tokenizer(systems()[:1] * 2, tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="no tokenizer to evaluate"):
        evaluate_tokenizer([], tmp_path, tmp_path / "out")


def test_excerpts_take_speakers_in_turn(tmp_path):
    from speechssm.evaluation.corpus import Document

    lengths = (("a", 70), ("a", 70), ("b", 10), ("c", 35))
    documents = [
        Document(str(number), speaker, np.full(seconds * RATE, number + 1, np.int16), ())
        for number, (speaker, seconds) in enumerate(lengths)
    ]
    chosen = choose_excerpts(documents, 3, 30.0, seed=0)
    assert [speaker for _, speaker in chosen] == ["a", "b", "c"]
    assert [len(audio) // RATE for audio, _ in chosen] == [30, 10, 30]
    assert len(choose_excerpts(documents, 99, 30.0, seed=0)) == 6


def test_sections_are_json(found):
    out, _ = found
    assert json.loads((out / "metrics.json").read_text())["window_agreement"][0]["y"][0] == 1
