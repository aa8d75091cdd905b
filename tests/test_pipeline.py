"""The whole chain: real SoundStream, SoundStorm and language model with random weights, and a
tokenizer and language model that are simple enough to count and to check."""

import gc
import itertools
import logging
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch

from speechssm import pipeline
from speechssm.audio.io import read_audio
from speechssm.errors import AudioError, ConfigError, FingerprintError, PromptError
from speechssm.lm.griffin import Griffin
from speechssm.pipeline import generate, generate_to_file
from speechssm.soundstorm.model import SoundStorm
from speechssm.soundstream.model import SoundStream

UNITS, RATE = 50, 16000


class LevelTokenizer:
    """A unit is how loud its 40 ms are: enough to see which audio a unit comes from."""

    sample_rate, rate, vocab_size, fingerprint = RATE, 25, UNITS, "0" * 64

    def encode(self, audio, rate):
        assert rate == RATE and audio.dtype == np.float32
        frames = audio[: len(audio) // 640 * 640].reshape(-1, 640)
        return np.minimum(np.abs(frames).max(1) * UNITS, UNITS - 1).astype(np.int64)


class CountingModel:
    """Says t mod 7 after t steps, and counts how many units it was made to say."""

    vocab_size, bos_id = UNITS, UNITS
    embedding = torch.nn.Embedding(UNITS + 1, 1).weight

    def __init__(self):
        self.fed = []

    def initial_state(self, batch_size, **_):
        return (torch.zeros(batch_size),)

    def __call__(self, tokens_BT, document_start_BT=None, state=None):
        self.fed.append(tokens_BT.clone())
        return tokens_BT[..., None].float(), state

    def step(self, tokens_B1, state):
        return self(tokens_B1, None, state)

    def position_limit(self, state):
        return None

    def logits(self, hidden_BD):
        step = sum(tokens.shape[1] for tokens in self.fed) % 7
        return 1e4 * torch.eye(UNITS)[step].expand(len(hidden_BD), -1)


@pytest.fixture(scope="module")
def acoustic():
    torch.manual_seed(0)
    soundstorm = SoundStorm(
        unit_vocab_size=UNITS, codebook_size=16, num_quantizers=2, width=16, num_layers=1,
        num_heads=2, ffn_width=16, conv_kernel=3,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(soundstorm.head_weight_QCD)  # they start at zero
    codec = SoundStream(
        channels=(2, 2, 2, 2, 2), code_width=4, num_quantizers=2, codebook_size=16, dilations=(1,)
    ).eval()
    codec.quantizer.codebook_QKD.normal_()
    return {"soundstorm": soundstorm, "codec": codec}


@pytest.fixture
def models(acoustic):
    return {"tokenizer": LevelTokenizer(), "lm": CountingModel(), **acoustic}


def speech(seconds, rate=RATE, level=0.5):
    return (level * np.sin(np.arange(round(seconds * rate)) * 0.05 * RATE / rate)).astype("f4")


def join(chunks):
    chunks = list(chunks)
    return (
        np.concatenate([chunk.audio for chunk in chunks]),
        np.concatenate([chunk.units for chunk in chunks]),
    )


def test_the_output_is_the_prompt_and_then_the_continuation(models):
    audio, units = join(generate(speech(4), RATE, 2.0, 0, **models))
    assert audio.dtype == np.float32 and len(audio) == 6 * RATE and len(units) == 150
    assert np.array_equal(units[:100], LevelTokenizer().encode(speech(4), RATE))
    # BOS and 100 units went in first, so the first unit said is 101 mod 7.
    assert np.array_equal(units[100:], np.arange(101, 151) % 7)
    first = models["lm"].fed[0]
    assert first[0, 0] == UNITS and np.array_equal(first[0, 1:].numpy(), units[:100])


def test_without_the_prompt_only_the_continuation_is_heard(models):
    audio, units = join(generate(speech(4), RATE, 2.0, 0, include_prompt=False, **models))
    assert len(audio) == 2 * RATE
    assert np.array_equal(units, np.arange(101, 151) % 7)


def test_seconds_are_rounded_up_to_whole_units(models):
    assert len(join(generate(speech(3), RATE, 0.05, 0, **models))[1]) == 75 + 2
    assert pipeline.units_in(4.04, 25) == 101 and pipeline.units_in(0.28, 25) == 7


def test_no_prompt_begins_with_bos_and_speaks_in_the_default_voice(models, monkeypatch):
    monkeypatch.setattr(pipeline, "default_voice", lambda: (speech(3), RATE))
    audio, units = join(generate(None, None, 1.0, 0, **models))
    assert len(audio) == RATE and np.array_equal(units, np.arange(1, 26) % 7)
    assert models["lm"].fed[0].tolist() == [[UNITS]]


def test_the_first_sound_comes_before_the_model_has_said_more_than_one_window(models):
    chunks = generate(speech(3), RATE, 3600.0, 0, **models)
    first = next(chunks)
    assert len(first.audio) == 25 * RATE
    said = sum(tokens.shape[1] for tokens in models["lm"].fed) - 76  # BOS and the prompt went in
    assert said < 675  # 27 s of content, of which the prompt is 3 s
    models["lm"].fed.clear()
    quick = generate(speech(3), RATE, 3600.0, 0, first_window_seconds=8.0, **models)
    assert len(next(quick).audio) == 3 * RATE
    assert sum(tokens.shape[1] for tokens in models["lm"].fed) - 76 < 125


def test_speech_without_end_keeps_coming_in_the_same_memory(models):
    chunks = generate(
        speech(3), RATE, None, 0, window_seconds=5.0, overlap_seconds=0.4, iterations=[1], **models
    )
    live, peaks = [], []
    tracemalloc.start()
    for index in range(156):  # as many windows as an hour has
        next(chunks)
        models["lm"].fed.clear()
        if index % 39 == 38:
            tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
            live.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
            del tensors
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()
    tracemalloc.stop()
    assert len(set(live)) == 1
    assert max(peaks[1:]) < peaks[0] + 50_000


def test_units_made_ahead_are_the_same_speech(models):
    plain = join(generate(speech(3), RATE, 60.0, 0, **models))
    models["lm"].fed.clear()
    ahead = join(generate(speech(3), RATE, 60.0, 0, ahead=True, **models))
    assert np.array_equal(plain[0], ahead[0]) and np.array_equal(plain[1], ahead[1])


def test_blocks_are_made_ahead_up_to_the_bound_and_no_longer_than_they_are_wanted():
    made, closed = [], threading.Event()

    def blocks():
        try:
            for index in itertools.count():
                made.append(threading.current_thread().name)
                yield np.full(1, index)
        finally:
            closed.set()

    stream = pipeline.made_ahead(blocks(), 3)
    assert not made  # nothing is made before it is asked for
    assert [int(next(stream)[0]) for _ in range(5)] == list(range(5))
    wait_until(lambda: len(made) == 8)
    assert threading.current_thread().name not in made
    stream.close()
    assert len(made) == 8
    del stream
    gc.collect()
    assert closed.wait(5)
    assert not [t for t in threading.enumerate() if t.name.startswith("language-model")]


def test_what_goes_wrong_ahead_is_raised_where_its_block_would_have_come():
    def blocks():
        yield np.zeros(1)
        yield np.ones(1)
        raise ConfigError("logits are not finite")

    stream = pipeline.made_ahead(blocks(), 5)
    assert next(stream)[0] == 0 and next(stream)[0] == 1
    with pytest.raises(ConfigError, match="not finite"):
        next(stream)
    assert len(list(pipeline.made_ahead(iter([np.zeros(2)] * 3), 9))) == 3


def wait_until(condition, seconds=5.0):
    """Until a thread has come so far."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_real_language_model_speaks_and_a_seed_repeats(models):
    torch.manual_seed(0)
    models["lm"] = Griffin(
        vocab_size=UNITS, width=16, num_layers=3, num_heads=2, window=8
    ).eval()  # fmt: skip
    first, second, other = (
        join(generate(speech(3), RATE, 2.0, seed, **models)) for seed in (3, 3, 4)
    )
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[1], other[1])
    assert np.isfinite(first[0]).all() and first[0].std() > 0


def test_another_voice_changes_the_sound_and_not_the_units(models):
    own = join(generate(speech(4), RATE, 1.0, 0, **models))
    models["lm"].fed.clear()
    noise = np.random.default_rng(0).normal(0, 0.2, 3 * RATE).astype("f4")
    other = join(generate(speech(4), RATE, 1.0, 0, voice=(noise, RATE), **models))
    assert np.array_equal(own[1], other[1]) and not np.allclose(own[0], other[0])


def test_a_short_prompt_is_repeated_to_three_seconds_and_still_ends_where_it_ended(caplog):
    audio = np.arange(1, 24001, dtype=np.float32) / 24000
    with caplog.at_level(logging.WARNING):
        longer = pipeline.prepare_prompt(audio[:20000], RATE, RATE, "voice.wav")
    assert len(longer) == 48000 and "voice.wav" in caplog.text and "repeated" in caplog.text
    assert np.array_equal(longer[-20000:], audio[:20000])
    assert np.array_equal(longer[-40000:-20000], audio[:20000])
    assert np.array_equal(longer[:8000], audio[12000:20000])


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_prompts_of_any_rate_become_16_khz(rate):
    prepared = pipeline.prepare_prompt(speech(3.5, rate), rate, RATE, "prompt")
    assert abs(len(prepared) - 3.5 * RATE) <= 1
    np.testing.assert_allclose(prepared[8000:40000], speech(3.5)[8000:40000], atol=0.02)


def test_whole_number_samples_are_scaled():
    whole = (speech(3) * 32767).astype(np.int16)
    np.testing.assert_allclose(
        pipeline.prepare_prompt(whole, RATE, RATE, "prompt"), speech(3), atol=1e-4
    )


@pytest.mark.parametrize(
    ("prompt", "rate", "error", "message"),
    [
        (speech(0.1), RATE, PromptError, "0.10 s"),
        (speech(0.99, 44100), 44100, PromptError, "0.99 s"),
        (np.zeros(0, np.float32), RATE, PromptError, "0.00 s"),
        (np.zeros(4 * RATE, np.float32), RATE, PromptError, "silent"),
        (np.zeros((2, RATE), np.float32), RATE, PromptError, "mono"),
        (speech(3), None, PromptError, "rate"),
        (np.where(np.arange(80000) < 40000, 0.1, np.nan).astype("f4"), RATE, AudioError, "2.500 s"),
        (np.where(np.arange(80000) < 40000, 0.1, np.inf).astype("f4"), RATE, AudioError, "2.500 s"),
    ],
)
def test_bad_prompts_are_refused_in_one_line_before_anything_is_made(
    models, prompt, rate, error, message
):
    with pytest.raises(error, match=message) as caught:
        generate(prompt, rate, 1.0, 0, prompt_name="voice.wav", **models)
    assert "voice.wav" in str(caught.value) and "\n" not in str(caught.value)


def test_a_clipped_prompt_at_another_rate_is_spoken_on_from_with_a_notice(models, caplog):
    with caplog.at_level(logging.WARNING):
        audio, units = join(generate(1.5 * speech(3, 44100, 1.0).clip(-1, 1), 44100, 1.0, 0,
                                     prompt_name="voice.wav", **models))  # fmt: skip
    assert "voice.wav: clipped" in caplog.text
    assert len(audio) == 4 * RATE and len(units) == 100 and np.isfinite(audio).all()


@pytest.mark.parametrize("include_prompt", [True, False])
def test_a_long_prompt_that_is_spoken_again_is_noticed(models, caplog, include_prompt):
    long = np.tile(speech(3, RATE), 21)
    with caplog.at_level(logging.WARNING):
        generate(long, RATE, 1.0, 0, prompt_name="a.wav", include_prompt=include_prompt, **models)
    assert ("a.wav: its 63 s are spoken again first" in caplog.text) == include_prompt


def test_a_prompt_whose_voice_comes_after_a_silence_is_refused(models):
    silence_then_voice = np.concatenate([np.zeros(3 * RATE, np.float32), speech(2)])
    with pytest.raises(PromptError, match="the first 3 s are silent"):
        generate(silence_then_voice, RATE, 1.0, 0, **models)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"schedule": "cubic"}, "schedule=cubic is unknown"),
        ({"acoustic_precision": "fp8"}, "precision=fp8 is unknown"),
        ({"iterations": [0]}, "iterations"),
    ],
)
def test_options_of_the_acoustic_model_reach_it_before_anything_is_made(models, option, message):
    with pytest.raises(ConfigError, match=message):
        generate(speech(3), RATE, 1.0, 0, **option, **models)


def test_another_schedule_and_precision_speak_the_same_units(models):
    plain, other = (
        join(generate(speech(3), RATE, 1.0, 0, **options, **models))
        for options in ({}, {"schedule": "linear", "acoustic_precision": "bf16-true"})
    )
    assert len(plain[0]) == len(other[0]) and not np.array_equal(plain[0], other[0])
    assert np.array_equal(plain[1][:75], other[1][:75]) and np.isfinite(other[0]).all()


def test_a_clipped_prompt_is_noticed(caplog):
    with caplog.at_level(logging.WARNING):
        pipeline.prepare_prompt(np.sign(speech(3)), RATE, RATE, "voice.wav")
    assert "clipped" in caplog.text


def test_models_of_other_vocabularies_are_refused(models):
    models["lm"].vocab_size = UNITS + 1
    with pytest.raises(FingerprintError, match="lm knows 51 units"):
        generate(speech(3), RATE, 1.0, 0, **models)
    del models["lm"].vocab_size
    models["tokenizer"].vocab_size = UNITS - 1
    with pytest.raises(FingerprintError):
        generate(speech(3), RATE, 1.0, 0, **models)


def test_models_trained_on_tokens_of_another_model_are_refused(models):
    made_by = {
        "tokenizer_fingerprint": models["tokenizer"].fingerprint,
        "codec_fingerprint": models["codec"].fingerprint,
    }
    models["lm"].trained_on = made_by
    generate(speech(3), RATE, 1.0, 0, **models)
    for maker in ("tokenizer", "codec"):
        models["lm"].trained_on = made_by | {f"{maker}_fingerprint": "f" * 64}
        with pytest.raises(FingerprintError, match=f"lm was trained on tokens of the {maker}"):
            generate(speech(3), RATE, 1.0, 0, **models)


def test_a_codec_of_another_rate_or_codebook_is_refused(models):
    small = dict(channels=(2, 2, 2), code_width=4, num_quantizers=2, dilations=(1,))
    models["codec"] = SoundStream(strides=(2, 4), codebook_size=16, **small)
    with pytest.raises(ConfigError, match="samples a second"):
        generate(speech(3), RATE, 1.0, 0, **models)
    models["codec"] = SoundStream(strides=(16, 20), codebook_size=32, **small)
    with pytest.raises(ConfigError, match="codebook_size"):
        generate(speech(3), RATE, 1.0, 0, **models)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_impossible_lengths_are_refused(models, seconds):
    with pytest.raises(ConfigError, match="seconds"):
        generate(speech(3), RATE, seconds, 0, **models)


def test_a_negative_seed_is_refused_before_anything_is_made(models):
    with pytest.raises(ConfigError, match="seed=-1"):
        generate(speech(3), RATE, 1.0, -1, **models)


def test_the_file_and_its_units_are_what_was_generated(models, tmp_path):
    audio, units = join(generate(speech(3), RATE, 1.0, 0, **models))
    models["lm"].fed.clear()
    made = generate_to_file(
        tmp_path / "deep" / "long.wav", speech(3), RATE, 1.0, 0, progress=False, **models
    )
    assert made.units_path == tmp_path / "deep" / "long.units.npy"
    stored, rate = read_audio(made.path)
    assert rate == RATE and len(stored) == 4 * RATE == made.audio_seconds * RATE
    np.testing.assert_allclose(stored, audio.clip(-1, 1), atol=1 / 32768)
    written = np.load(made.units_path)
    assert written.dtype == np.uint16 and np.array_equal(written, units)
    assert sorted(path.name for path in made.path.parent.iterdir()) == [
        "long.units.npy",
        "long.wav",
    ]
    assert 0 < made.first_audio_seconds <= made.elapsed_seconds
    assert made.real_time_factor == pytest.approx(made.elapsed_seconds / 4)


def test_an_interrupted_file_keeps_what_was_said_under_another_name(models, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        yield pipeline.Chunk(speech(1), np.full(25, 3))
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_to_file(tmp_path / "long.wav", None, None, 9.0, 0, progress=False, **models)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "long.partial.npy",
        "long.partial.wav",
    ]
    assert len(read_audio(tmp_path / "long.partial.wav")[0]) == RATE
    assert np.load(tmp_path / "long.partial.npy").tolist() == [3] * 25


def test_a_finished_file_survives_a_refused_prompt(models, tmp_path):
    (tmp_path / "long.wav").write_bytes(b"good")
    with pytest.raises(PromptError):
        generate_to_file(tmp_path / "long.wav", speech(0.1), RATE, 1.0, 0, **models)
    assert (tmp_path / "long.wav").read_bytes() == b"good"
    with pytest.raises(ConfigError, match=r"\.wav"):
        generate_to_file(tmp_path / "long.mp3", speech(3), RATE, 1.0, 0, **models)
