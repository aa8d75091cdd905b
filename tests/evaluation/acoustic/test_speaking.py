"""Ways to join windows spoken side by side equal each spoken alone, in constant memory."""

import tracemalloc

import numpy as np
import pytest
import torch

from speechssm.evaluation.acoustic.spans import Span
from speechssm.evaluation.acoustic.speaking import joined_ways, speak, speak_spans
from speechssm.soundstorm.synthesis import VoicePrompt, synthesize

from .conftest import CopyingStorm, ToneCodec

CROSSFADES = (0.0, 0.02, 0.5)
OPTIONS = {"window_seconds": 8.0, "overlap_seconds": 2.0, "iterations": (1,), "temperature": 0.0}


class PhasedCodec(ToneCodec):
    """Every window sounds different: constant, and larger than the one before."""

    def decode(self, codes_BQT):
        self.decoded += 1
        return torch.full((len(codes_BQT), codes_BQT.shape[-1] * self.hop_length),
                          float(self.decoded))  # fmt: skip


@pytest.fixture
def prompt():
    return VoicePrompt(np.full(75, 20), np.stack([np.full(150, 20), np.full(150, 8)]))


@pytest.mark.parametrize("length", [50, 124, 125, 126, 400, 1003])
def test_each_way_to_join_is_what_it_is_alone(prompt, length):
    units = np.random.default_rng(0).integers(0, 50, length)
    blocks = [units[: length // 3], units[length // 3 :]]
    codec = PhasedCodec()
    found = {place: [] for place in range(len(CROSSFADES))}
    ways = joined_ways(CROSSFADES, prompt, CopyingStorm(), codec, **OPTIONS)
    for place, audio in speak(blocks, *ways):
        found[place].append(audio)
    for place, crossfade in enumerate(CROSSFADES):
        alone = synthesize(
            blocks, prompt, CopyingStorm(), PhasedCodec(), crossfade_seconds=crossfade, **OPTIONS
        )
        assert np.array_equal(np.concatenate(found[place]), np.concatenate(list(alone)))
    assert codec.decoded == found[0][-1].max()  # one decoding a window, whatever the ways


def test_spans_are_those_of_the_whole_speech(prompt):
    units = np.random.default_rng(1).integers(0, 50, 1000)
    whole = np.concatenate(
        list(synthesize([units], prompt, CopyingStorm(), ToneCodec(), **OPTIONS))
    )
    spans = [Span(start, start + 5.0, "voice", number) for number, start in enumerate((0, 7.3, 35))]
    ways = joined_ways([0.0], prompt, CopyingStorm(), ToneCodec(), **OPTIONS)
    heard, spoken = [], []
    for _, span, audio in speak_spans([units], *ways, {0: spans}, 16_000, spoken.append):
        heard.append(span)
        assert np.array_equal(audio, whole[slice(*span.samples(16_000))])
    assert heard == spans and sum(spoken) == pytest.approx(40.0)


def test_memory_does_not_depend_on_how_long_one_speaks(prompt):
    def peak(minutes):
        spans = [Span(second, second + 2.0, "voice") for second in range(0, 60 * minutes - 2, 2)]
        ways = joined_ways([0.0, 0.05], prompt, CopyingStorm(), ToneCodec(), **OPTIONS)
        blocks = (np.full(25, 10) for _ in range(60 * minutes))
        tracemalloc.start()
        for _ in speak_spans(blocks, *ways, {0: spans, 1: spans}, 16_000):
            pass
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(1)
    assert peak(6) < peak(2) * 1.1 + 100_000
