"""The codec's bench: its chunks, its clock, its limit and its peer, and what it writes."""

import json

import numpy as np
import pytest
import torch

from speechssm.benchmark import codec as module
from speechssm.benchmark.codec import Stream, bit_rate, one_thread, run_codec
from speechssm.benchmark.command import bench
from speechssm.cli import verb_config
from speechssm.errors import ConfigError
from speechssm.report.rows import read_rows
from speechssm.soundstream.model import SoundStream


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    codec = SoundStream(channels=(2, 2, 2, 2, 2), code_width=4, num_quantizers=2, codebook_size=16,
                        dilations=(1,)).eval()  # fmt: skip
    codec.quantizer.codebook_QKD.normal_()
    return codec


@pytest.fixture
def short_memory(monkeypatch):
    """A slope over 8 seconds is enough to see that there is one."""
    monkeypatch.setattr(module, "LEAST_WINDOWS", 8)
    return {"memory_seconds": 8, "show_progress": False}


def test_a_tiny_run_writes_everything_and_compares_with_one_call(codec, tmp_path, short_memory):
    rows = run_codec(tmp_path, name="tiny", codec=codec, seconds=1.0, runs=2, peer=False, seed=3,
                     **short_memory)  # fmt: skip
    assert read_rows(tmp_path / "bench.json") == rows
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "table.md", "codec.svg"}
    speeds = {(row.system, row.shape): row for row in rows if row.name == "codec_speed"}
    assert len(speeds) == 3 * 5
    for (system, _), row in speeds.items():
        assert row.limit == speeds[system, "one call"].value and row.seed == 3
        assert row.ratio == pytest.approx(row.value / row.limit)
    latency = {row.shape: row for row in rows if row.name == "codec_latency"}
    assert set(latency) == {f"{n} samples a chunk" for n in (320, 640, 1600, 16000)}
    assert 20 < latency["320 samples a chunk"].value <= latency["320 samples a chunk"].high
    content = json.loads((tmp_path / "bench.json").read_text())
    goals = {(item["name"], item["unit"]) for item in content["comparisons"]}
    assert goals >= {("codec_speed", "× real time"), ("codec_memory_slope", "KiB/s")}
    assert content["setting"]["threads"] == 1
    page = (tmp_path / "table.md").read_text()
    assert "320 samples = 20 ms" in page and "After each second" in page


def test_the_peer_has_our_bit_rate_and_only_one_call(codec, tmp_path, short_memory):
    pytest.importorskip("transformers", reason="extra: dev")
    rows = run_codec(tmp_path, name="tiny", codec=codec, chunks=[20], quick=True,
                     **short_memory)  # fmt: skip
    ours = next(row for row in rows if (row.system, row.shape) == ("tiny, both", "one call"))
    peers = [row for row in rows if row.name == "codec_speed" and row.peer_name]
    assert [row.system.rsplit(", ", 1)[1] for row in peers] == ["encode", "decode", "both"]
    assert all("1.5 kbit/s" in row.peer_name and row.shape == "one call" for row in peers)
    assert peers[2].ours == ours.value and peers[2].ratio == pytest.approx(
        ours.value / peers[2].peer
    )
    assert "Must reach" not in (tmp_path / "table.md").read_text()


def test_a_peer_that_is_missing_is_named_with_how_to_get_it(
    codec, tmp_path, short_memory, monkeypatch
):
    monkeypatch.setattr(module, "installed", lambda package: False)
    run_codec(tmp_path, name="tiny", codec=codec, chunks=[20], quick=True, **short_memory)
    assert (
        "transformers' EnCodec is not installed: pip install" in (tmp_path / "table.md").read_text()
    )


def test_a_stream_makes_the_codes_and_the_sound_of_one_call(codec, monkeypatch):
    audio_1S = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (1, 3200)).astype("f4"))
    codes_1QT = codec.encode(audio_1S)
    stream = Stream(codec, audio_1S, codes_1QT, "both", 640)
    seen = []
    decode = codec.decode_chunk
    monkeypatch.setattr(codec, "decode_chunk",
                        lambda *given: seen.append(given[0]) or decode(*given))  # fmt: skip
    stream()
    assert torch.equal(torch.cat(seen, dim=2), codes_1QT)
    assert len(stream.milliseconds) == 5 and min(stream.milliseconds) > 0


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_the_bit_rate_is_of_all_levels(codec):
    assert bit_rate(codec) == 50 * 2 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunks": [30]}, "30 ms are 480 samples, no whole number"),
        ({"chunks": []}, "at least one"),
        ({"seconds": 0.5}, "holds the longest chunk"),
        ({"memory_seconds": 3}, "at least 50"),
    ],
)
def test_what_cannot_be_measured_is_refused(codec, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run_codec(tmp_path, name="tiny", codec=codec, **options)


def test_the_command_names_the_codecs_that_there_are():
    with pytest.raises(ConfigError, match=r"choose one of: .*soundstream_small"):
        bench(verb_config("bench", ["codec", "out=x", "model=griffin_tiny"]))
