"""The whole evaluation: codecs that are perfect or silent, peers, folders, and mistakes."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from speechssm.audio.io import write_audio
from speechssm.configuration import compose
from speechssm.errors import ConfigError, CorpusError
from speechssm.evaluation import command
from speechssm.evaluation.codec import ffmpeg
from speechssm.evaluation.codec.evaluate import evaluate_codec
from speechssm.evaluation.codec.options import Options
from speechssm.evaluation.codec.systems import Coded, OurCodec, PeerMissing, Setting
from speechssm.report.rows import read_results


class Halving:
    """A peer that keeps the sound, delayed, at half the level; or fails."""

    details: dict = {}  # noqa: RUF012

    def __init__(self, bitrate, fails=False):
        self.settings, self.fails = [Setting(f"Halving {bitrate}", "Halving", bitrate)], fails

    def resynthesize(self, audio_S, rate):
        if self.fails:
            raise PeerMissing("Halving: it broke")
        return [Coded(np.concatenate([np.zeros(100, np.float32), audio_S / 2]), len(audio_S))]


class Level:
    """A judge of naturalness that likes loud sound, and hears every word."""

    def score(self, audio, rate):
        return {"distillmos": float(np.abs(audio).max())}


def evaluate(codecs, data, out, *, made=None, seed=0, fit=None, **options):
    chosen = {"peers": (), "min_seconds": 1.0, "synthetic": True} | options
    codecs = [OurCodec(name, codec) for name, codec in codecs.items()]
    evaluate_codec(codecs, data, out, fit=fit, options=Options(**chosen), seed=seed,
                   judges=made or {}, show_progress=False)  # fmt: skip
    results = read_results(out / "metrics.json")
    return {(row.name, row.system): row for row in results["rows"]}, results


@pytest.fixture
def folder(tmp_path, clips):
    """Recordings of four speakers without a manifest."""
    for number, clip in enumerate(clips):
        write_audio(tmp_path / "talks" / f"{number}.wav", clip.audio, 16000)
    return tmp_path / "talks"


def test_a_near_perfect_codec_beats_both_baselines(audio_shards, sample_codec, tmp_path):
    rows, results = evaluate({"codec": sample_codec()}, audio_shards, tmp_path)
    assert rows["log_mel_distance", "codec, 2 quantisers"].value < 0.05
    assert rows["si_sdr", "codec, 2 quantisers"].value > 60
    worse = rows["log_mel_distance", "codec, 1 quantiser"].value
    assert worse > rows["log_mel_distance", "codec, 2 quantisers"].value
    assert rows["si_sdr", "mean spectrum"].value < 0
    assert [entry["holds"] for entry in results["comparisons"]] == [True, True]
    assert rows["bitrate", "codec, 1 quantiser"].value == 8 * 16000
    perplexities = [rows["codebook_perplexity", f"level {level}"].value for level in (1, 2)]
    assert perplexities[1] > perplexities[0]
    assert (tmp_path / "rate_si_sdr.svg").is_file()


def test_a_silent_codec_beats_nothing(audio_shards, sample_codec, tmp_path):
    rows, results = evaluate({"codec": sample_codec(gain=0.0)}, audio_shards, tmp_path)
    ours = rows["log_mel_distance", "codec, 2 quantisers"].value
    assert ours == pytest.approx(rows["log_mel_distance", "silence"].value)
    assert rows["si_sdr", "codec, 2 quantisers"].value is None
    assert [entry["holds"] for entry in results["comparisons"]] == [False, False]


def test_several_codecs_of_different_rates_share_one_table(folder, sample_codec, tmp_path):
    codecs = {"a": sample_codec(), "b": sample_codec(gain=0.5, sample_rate=8000)}
    rows, results = evaluate(codecs, folder, tmp_path / "out", made={"distillmos": Level()})
    assert results["material"]["sample_rate"] == 16000
    best = rows["log_mel_distance", "a, 2 quantisers"].value
    assert best < rows["log_mel_distance", "b, 2 quantisers"].value  # it lost half of the band
    assert ("codebook_perplexity", "b, level 2") in rows
    table = (tmp_path / "out" / "table.md").read_text()
    compact = table.split("## All numbers")[0]
    lines = [line for line in compact.splitlines() if line.startswith("| b, 2 quantisers")]
    assert len(lines) == 2  # one in the table, one among the differences
    assert "| original | – |" in compact
    loss = [entry for entry in results["margins"] if entry["other"] == "original"]
    assert {(entry["system"], entry["better"]) for entry in loss} >= {("b, 2 quantisers", False)}


def test_peers_meet_our_codec_at_the_highest_bitrate_not_above_theirs(
    folder, sample_codec, tmp_path, monkeypatch
):
    from speechssm.evaluation.codec import evaluate as module

    peers = [Halving(128_000), Halving(200_000), Halving(300_000), Halving(100)]
    monkeypatch.setattr(module, "make_peers", lambda specs: (peers, {}))
    _, results = evaluate({"codec": sample_codec()}, folder, tmp_path / "out")
    met = {(entry["system"], entry["other"]) for entry in results["margins"]}
    assert met == {
        ("codec, 1 quantiser", "Halving 128000"),
        ("codec, 1 quantiser", "Halving 200000"),
        ("codec, 2 quantisers", "Halving 300000"),
    }
    # Its delay is undone, so that its waveform is exact; ours is not.
    assert results["delays_s"]["Halving 100"] == 100 / 16000
    (margin,) = [entry for entry in results["margins"]
                 if entry["name"] == "si_sdr" and entry["other"] == "Halving 128000"]  # fmt: skip
    assert margin["difference"] < 0 and not margin["better"]
    assert margin["high"] < 0 and margin["n"] == results["material"]["clips"]


def test_what_is_missing_is_said_with_what_to_do(folder, sample_codec, tmp_path, monkeypatch):
    from speechssm.evaluation.codec import evaluate as module
    from speechssm.evaluation.judges import naturalness

    monkeypatch.setattr(ffmpeg.shutil, "which", lambda name: None)
    monkeypatch.setattr(
        module, "available", lambda names, options: ({}, {"dnsmos": naturalness.DNSMOS.command})
    )
    codecs = [OurCodec("codec", sample_codec())]
    options = Options(min_seconds=1.0, peers=("opus:6",))
    evaluate_codec(codecs, folder, tmp_path / "out", options=options, show_progress=False)
    results = read_results(tmp_path / "out" / "metrics.json")
    assert set(results["left_out"]) == {"opus:6", "dnsmos"}
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Opus 6k: the program ffmpeg is not here" in table
    assert naturalness.DNSMOS.command in table
    assert not any(row.system == "Opus 6k" for row in results["rows"])


def test_a_peer_that_breaks_on_the_way_is_left_out(folder, sample_codec, tmp_path, monkeypatch):
    from speechssm.evaluation.codec import evaluate as module

    monkeypatch.setattr(module, "make_peers", lambda specs: ([Halving(1, fails=True)], {}))
    rows, results = evaluate({"codec": sample_codec()}, folder, tmp_path / "out")
    assert results["left_out"] == {"Halving": "Halving: it broke"}
    assert ("si_sdr", "codec, 2 quantisers") in rows


def test_examples_are_written_as_pairs(audio_shards, sample_codec, tmp_path):
    evaluate({"codec": sample_codec()}, audio_shards, tmp_path, examples=2)
    assert sorted(path.name for path in (tmp_path / "examples").iterdir()) == [
        "1-original.flac", "1-reconstruction.flac", "2-original.flac", "2-reconstruction.flac",
    ]  # fmt: skip


def test_examples_of_several_codecs_lie_beside_the_same_original(
    audio_shards, sample_codec, tmp_path
):
    codecs = {"runs/first": sample_codec(), "small": sample_codec()}
    evaluate(codecs, audio_shards, tmp_path, examples=1)
    assert sorted(path.name for path in (tmp_path / "examples").iterdir()) == [
        "1-original.flac", "1-reconstruction-runs-first.flac", "1-reconstruction-small.flac",
    ]  # fmt: skip


def test_a_folder_with_a_manifest_is_held_out_by_speaker(folder, sample_codec, tmp_path):
    lines = ["path\tspeaker\tchapter\ttranscript"]
    lines += [f"{n}.wav\t{'anna' if n < 2 else 'bert'}\tc{n}\tone two three" for n in range(4)]
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    options = {"heldout_speakers": ["bert"]}
    _, results = evaluate({"codec": sample_codec()}, folder, tmp_path / "out", **options)
    material = results["material"]
    assert (material["clips"], material["clips_with_transcript"]) == (2, 2)
    assert material["intervals_over"] == "documents"  # of one speaker alone
    _, results = evaluate({"codec": sample_codec()}, folder, tmp_path / "all", fit=folder)
    assert results["material"]["clips"] == 4 and results["material"]["intervals_over"] == "speakers"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_seconds": 9.0}, "no held-out piece of 9 s"),
        ({"min_seconds": 9.0, "max_seconds": 4.0}, "must be at least 0.5 and at most"),
        ({"max_crops": 0}, "max_crops=0: measure at least one"),
        ({"judges": ["utmos"]}, "options.codec.judges: there is no utmos; choose from: visqol"),
    ],
)
def test_impossible_options_are_refused(audio_shards, sample_codec, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate({"codec": sample_codec()}, audio_shards, tmp_path, **options)


def test_levels_that_a_codec_has_not_and_folders_without_audio(sample_codec, tmp_path):
    with pytest.raises(ConfigError, match="codec has 1 to 2"):
        OurCodec("codec", sample_codec(), numbers=[3])
    (tmp_path / "empty").mkdir()
    with pytest.raises((ConfigError, CorpusError), match="empty"):
        evaluate({"codec": sample_codec()}, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ConfigError, match="neither a folder of recordings nor of audio shards"):
        evaluate({"codec": sample_codec()}, tmp_path / "missing", tmp_path / "out")


def test_the_same_seed_gives_the_same_file(folder, sample_codec, tmp_path):
    for name in ("one", "two"):
        evaluate({"codec": sample_codec()}, folder, tmp_path / name, seed=3)
    one, two = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")
    )
    assert one["rows"] == two["rows"] and one["margins"] == two["margins"]


def test_the_command_takes_one_codec_or_a_list(folder, sample_codec, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load", lambda stage, path, device: sample_codec())
    monkeypatch.setattr(command, "run_of", lambda stage, path: None)
    options = ["options.codec.peers=[]", "options.codec.judges=[]", "options.codec.min_seconds=1"]
    for codec, names in (("some/a", {"codec"}), ("[some/a,some/b]", {"a", "b"})):
        words = ["subject=codec", f"data={folder}", f"out={tmp_path / 'out'}", f"codec={codec}"]
        command.evaluate(OmegaConf.to_container(compose("evaluate", [*words, *options])))
        rows = read_results(tmp_path / "out" / "metrics.json")["rows"]
        systems = {row.system.split(",")[0] for row in rows if row.name == "bitrate"}
        assert systems == names
        assert {row.model for row in rows if row.name == "bitrate"} <= {"a", "b"}
