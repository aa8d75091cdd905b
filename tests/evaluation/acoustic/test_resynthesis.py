"""The whole evaluation in a world where the right answers are known."""

import json

import pytest

from speechssm.audio.io import read_audio
from speechssm.errors import ConfigError, FingerprintError
from speechssm.evaluation import command
from speechssm.evaluation.acoustic.options import Options
from speechssm.evaluation.acoustic.resynthesis import evaluate_resynthesis, join_name
from speechssm.pipeline import check_acoustic_models
from speechssm.report.rows import read_results

from .conftest import CopyingStorm, LoudnessMOS, LoudnessTokenizer, ToneCodec

OWN, OTHERS = "SoundStorm, own text", "SoundStorm, others' text"
# Joints at 13 + 11 n s.
OPTIONS = {"minutes": 1.5, "window_seconds": 17.0, "overlap_seconds": 2.0, "iterations": (1,),
           "crossfade_seconds": (0.0, 0.05), "naturalness_spans": 3, "examples": 1}  # fmt: skip


def evaluate(models, data, out, judges, **options):
    rows = evaluate_resynthesis(
        **models, data=data, out=out, judges=judges, options=Options(**(OPTIONS | options)),
        show_progress=False,
    )  # fmt: skip
    return {(row.name, row.system): row for row in rows}


@pytest.fixture
def results(models, spoken_shards, tmp_path, judges):
    return evaluate(models, spoken_shards, tmp_path, judges)


def test_a_storm_that_copies_the_prompts_voice_holds_it(results, tmp_path):
    for system in (OWN, OTHERS):
        assert results["speaker_similarity", system].value == pytest.approx(1)
        assert results["speaker_ranked_first", system].value == 1
        assert results["speaker_similarity_drift", system].value == pytest.approx(0, abs=1e-6)
        assert results["speaker_similarity", system].n == 3
    assert results["speaker_similarity", "codec alone"].value == pytest.approx(1)
    assert results["speaker_similarity", "recordings"].value == pytest.approx(1)
    assert results["speaker_similarity", "strangers' recordings"].value < 0.3
    comparisons = read_results(tmp_path / "metrics.json")["comparisons"]
    assert [entry["holds"] for entry in comparisons] == [True, True]


def test_its_words_are_those_of_the_recordings(results):
    for system in (OWN, "codec alone"):
        assert results["word_error", system].value == 0
        assert results["word_error_to_recording", system].value == 0
    assert results["word_error", "recordings"].value == 0
    assert ("word_error", OTHERS) not in results


def test_seamless_windows_show_no_seam(results, tmp_path):
    seams = read_results(tmp_path / "metrics.json")["seams"]
    assert set(seams) == {"hard cut", "cross-fade 50 ms", "recordings"}
    found = seams["hard cut"]["speaker_similarity"]
    assert found["difference"] == pytest.approx(0, abs=1e-6) and found["joints"] > 10
    narrow = seams["hard cut"]["mel_flux_narrow"]
    assert narrow["low"] <= 0 <= narrow["high"]


def test_windows_of_different_loudness_show_one_that_a_crossfade_softens(
    models, spoken_shards, tmp_path, judges
):
    models["codec"].gains = [1.0, 0.25]
    evaluate(models, spoken_shards, tmp_path, judges)
    seams = read_results(tmp_path / "metrics.json")["seams"]
    narrow, faded = (seams[name]["mel_flux_narrow"] for name in ("hard cut", "cross-fade 50 ms"))
    assert narrow["low"] > 0.02 and narrow["documents"] == 3
    assert narrow["difference"] > 1.3 * faded["difference"]
    # The louder of two windows is heard around a joint, one of them at centres.
    assert seams["hard cut"]["distillmos"]["difference"] > 0.05


def test_what_it_writes(results, tmp_path):
    table = (tmp_path / "table.md").read_text()
    assert "| ada | 35 | own 2.54, others 1.27 | 1.000 (1.00) | 1.000 (1.00) |" in table
    assert "6 readings of 1.5 min (9 min in all) with 3 held-out voices" in table
    assert "joints beside the end of a recording" in table
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["skipped"]["joints beside the end of a recording"] > 0
    limits = {(entry["name"], entry["system"]): entry for entry in content["limits"]}
    assert limits["mean similarity to the prompt", OWN]["holds"]
    curve = next(curve for curve in content["curves"] if curve["system"] == OTHERS)
    assert curve["second"] == [5 + 10 * place for place in range(9)] and set(curve["n"]) == {3}
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        "similarity_over_time.svg", "distillmos_over_time.svg", "seam_mel_flux.svg",
        "seam_mel_flux_narrow.svg", "seam_distillmos.svg", "seam_speaker_similarity.svg",
    }  # fmt: skip
    prompt, _ = read_audio(tmp_path / "examples" / "1-own-prompt.flac")
    spoken, rate = read_audio(tmp_path / "examples" / "2-others-spoken.flac")
    assert (len(prompt), len(spoken), rate) == (48_000, 320_000, 16_000)


def test_without_judges_joints_are_still_measured_and_the_rest_is_named(
    models, spoken_shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "speechssm.evaluation.acoustic.resynthesis.available",
        lambda names, options: ({}, {name: f"{name}: install it" for name in names}),
    )
    rows = evaluate(models, spoken_shards, tmp_path, None)
    assert {name for name, _ in rows} == {"seam_mel_flux", "seam_mel_flux_narrow"}
    assert "Left out: recognizer: install it." in (tmp_path / "table.md").read_text()
    missing = read_results(tmp_path / "metrics.json")["judges_missing"]
    assert set(missing) == {"speaker", "distillmos", "dnsmos", "recognizer"}


def test_only_what_is_wanted_is_measured(models, spoken_shards, tmp_path):
    rows = evaluate(
        models, spoken_shards, tmp_path, {"distillmos": LoudnessMOS()},
        measures=["naturalness"], texts=["others"], minutes=0.5, examples=0,
    )  # fmt: skip
    assert ("distillmos", OTHERS) in rows and ("distillmos", OWN) not in rows
    assert not any(name.startswith(("seam", "speaker", "word")) for name, _ in rows)
    assert not (tmp_path / "examples").exists()
    assert Options(measures="seams").judges == {"speaker": {}, "distillmos": {}}


def test_the_same_seed_gives_the_same_figures(models, spoken_shards, tmp_path, judges):
    runs = [evaluate(models, spoken_shards, tmp_path / name, judges, minutes=0.7) for name in "ab"]
    assert {key: row.value for key, row in runs[0].items()} == {
        key: row.value for key, row in runs[1].items()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ["voice"]}, "measures=.* give some of speaker, naturalness, words, seams"),
        ({"texts": ["theirs"]}, "texts=.* give some of own, others"),
        ({"minutes": 0}, "minutes=0: at least 0.1"),
        ({"joints": -1}, "joints=-1: at least 0"),
        ({"voices": 1}, "voices=1: at least 2"),
        ({"crossfade_seconds": []}, r"crossfade_seconds is empty; \[0\] is the hard cut"),
        (
            {"precision": "bf16"},
            "options.acoustic.precision=bf16 is unknown; choose one of: 32-true",
        ),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Options(**options)


def test_windows_that_do_not_fit_are_named(models, spoken_shards, tmp_path, judges):
    with pytest.raises(ConfigError, match="longer window_seconds"):
        evaluate(models, spoken_shards, tmp_path, judges, window_seconds=4.0)


class Trained(CopyingStorm):
    def __init__(self, **fingerprints):
        self.trained_on = fingerprints


@pytest.mark.parametrize(
    ("storm", "message"),
    [
        (Trained(codec_fingerprint="2" * 64), "trained on tokens of the codec 222222222222, but"),
        (Trained(tokenizer_fingerprint="2" * 64), "trained on tokens of the tokenizer 2222"),
    ],
)
def test_models_that_were_not_made_for_each_other_are_refused(storm, message):
    with pytest.raises(FingerprintError, match=message):
        check_acoustic_models(LoudnessTokenizer(), storm, ToneCodec())
    check_acoustic_models(LoudnessTokenizer(), Trained(codec_fingerprint="1" * 64), ToneCodec())


def test_the_command_tells_code_shards_from_audio(
    models, spoken_shards, code_shards, tmp_path, monkeypatch
):
    stages = {"soundstream": "codec"}
    monkeypatch.setattr(command, "run_of", lambda stage, path: None)
    monkeypatch.setattr(command, "load", lambda stage, path, **_: models[stages.get(stage, stage)])
    config = {"subject": "acoustic", "data": str(spoken_shards), "out": str(tmp_path),
              "soundstorm": "a", "codec": "b", "options": {"acoustic": dict(OPTIONS)}}  # fmt: skip
    with pytest.raises(ConfigError, match="tokenizer is not set"):
        command.evaluate(config)
    monkeypatch.setattr("speechssm.evaluation.acoustic.resynthesis.available",
                        lambda names, options: ({}, {}))  # fmt: skip
    config["tokenizer"] = "c"
    rows = command.evaluate(config)
    assert {row.name for row in rows} == {"seam_mel_flux", "seam_mel_flux_narrow"}
    config["options"] = {"acoustic": {"minuets": 3}}
    with pytest.raises(ConfigError, match=r"options\.acoustic: .*minuets"):
        command.evaluate(config)
    assert command.holds_codes(code_shards) and not command.holds_codes(spoken_shards)


def test_ways_to_join_have_names():
    assert [join_name(seconds) for seconds in (0.0, 0.02, 0.0005)] == [
        "hard cut", "cross-fade 20 ms", "cross-fade 0.5 ms"
    ]  # fmt: skip
