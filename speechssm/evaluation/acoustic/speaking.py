"""Speaking a reading with several ways to join windows at once, and cutting out what is measured.

Sound leaves window by window and only spans that are being measured are held, so memory does not
depend on how long a reading is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from speechssm.evaluation.acoustic.spans import Span, SpanCutter
from speechssm.soundstorm.synthesis import Synthesizer, VoicePrompt


class _SharedWindows(Synthesizer):
    """A synthesizer that takes windows from others with the same prompt, seed and units.

    How windows are joined does not change what is in them, and they are what costs time.
    """

    def __init__(self, windows: dict[int, np.ndarray], *arguments, **options):
        super().__init__(*arguments, **options)
        self._shared = windows

    def _windows(self, index: int, contents: Sequence[np.ndarray]) -> np.ndarray:
        numbers = range(index, index + len(contents))
        if not all(number in self._shared for number in numbers):
            self._shared.update(zip(numbers, super()._windows(index, contents), strict=True))
        return np.stack([self._shared[number] for number in numbers])


def joined_ways(
    crossfades: Sequence[float], prompt: VoicePrompt, soundstorm, codec, **options
) -> tuple[list[Synthesizer], dict[int, np.ndarray]]:
    """A synthesizer for each crossfade in seconds, and the windows that they share."""
    windows: dict[int, np.ndarray] = {}
    synthesizers = [
        _SharedWindows(windows, prompt, soundstorm, codec, crossfade_seconds=seconds, **options)
        for seconds in crossfades
    ]
    return synthesizers, windows


def speak(
    blocks: Iterable[np.ndarray],
    synthesizers: Sequence[Synthesizer],
    windows: dict[int, np.ndarray],
) -> Iterator[tuple[int, np.ndarray]]:
    """Sound of a stream of units, as (which synthesizer, float32 [S]).

    Args:
        blocks: int64 [U] of any lengths.
        synthesizers, windows: of `joined_ways`.
    """
    states = [synthesizer.initial_state() for synthesizer in synthesizers]
    for block in blocks:
        hop = synthesizers[0].plan.hop
        for start in range(0, len(block), hop):
            for place, synthesizer in enumerate(synthesizers):
                chunks, states[place] = synthesizer.push(block[start : start + hop], states[place])
                for chunk in chunks:
                    yield place, chunk.audio
            windows.clear()  # the next units begin new ones
    for place, synthesizer in enumerate(synthesizers):
        for chunk in synthesizer.finish(states[place]):
            yield place, chunk.audio
    windows.clear()


def speak_spans(
    blocks: Iterable[np.ndarray],
    synthesizers: Sequence[Synthesizer],
    windows: dict[int, np.ndarray],
    spans: Mapping[int, Sequence[Span]],
    rate: int,
    advance: Callable[[float], None] = lambda seconds: None,
) -> Iterator[tuple[int, Span, np.ndarray]]:
    """The spans of each synthesizer's speech, as (which, span, float32 [S]), when they are spoken.

    Args:
        spans: by synthesizer.
        advance: called with the seconds that the first synthesizer has spoken, piece by piece.
    """
    cutters = [SpanCutter(spans.get(place, ()), rate) for place in range(len(synthesizers))]
    for place, audio in speak(blocks, synthesizers, windows):
        for span, piece in cutters[place].push(audio):
            yield place, span, piece
        if place == 0:
            advance(len(audio) / rate)
