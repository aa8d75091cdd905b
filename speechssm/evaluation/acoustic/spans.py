"""Which pieces of a long synthesis are measured, and how they are cut out of a stream of sound.

Times are seconds of speech, so that the same span can be cut from sound of any rate.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from speechssm.soundstorm.synthesis import WindowPlan

SEAM_SPAN_SECONDS = 5.0
LEAST_SPAN_SECONDS = 3.0


class Span(NamedTuple):
    """[start, stop) of a reading, what it is cut out for, and which one of its kind it is."""

    start: float
    stop: float
    purpose: str
    number: int = 0

    def samples(self, rate: int) -> tuple[int, int]:
        """First sample, and the one behind the last."""
        return round(self.start * rate), round(self.stop * rate)


@dataclass(frozen=True)
class SeamPair:
    """A joint of two windows and the middle between it and the next joint, both in seconds."""

    joint: float
    centre: float

    @staticmethod
    def around(moment: float) -> tuple[float, float]:
        """The 5 s around a moment."""
        return moment - SEAM_SPAN_SECONDS / 2, moment + SEAM_SPAN_SECONDS / 2


def regular_spans(seconds: float, length: float, purpose: str) -> list[Span]:
    """Spans of `length` one after the other; all of it where there is no room for one.

    Less than 3 s give none: no voice can be told from it.
    """
    count = int(round(seconds / length, 6))
    if count:
        return [
            Span(place * length, (place + 1) * length, purpose, place) for place in range(count)
        ]
    return [Span(0.0, seconds, purpose)] if seconds >= LEAST_SPAN_SECONDS else []


def seam_pairs(plan: WindowPlan, unit_seconds: float, seconds: float) -> list[SeamPair]:
    """Joints at 25 + 23 n s (paper, section 7.3), each with the middle of the window it begins.

    Only where both spans of 5 s, and the next joint, lie inside of `seconds`; a window so short
    that the two spans would overlap gives none.
    """
    pairs = []
    if plan.hop * unit_seconds < 2 * SEAM_SPAN_SECONDS:
        return pairs
    index = 0
    while plan.cut(index + 1) * unit_seconds <= seconds:
        joint = plan.cut(index) * unit_seconds
        pair = SeamPair(joint, joint + plan.hop * unit_seconds / 2)
        if pair.joint >= SEAM_SPAN_SECONDS / 2:
            pairs.append(pair)
        index += 1
    return pairs


def evenly(items: Sequence, count: int | None) -> list:
    """At most `count` items, spread evenly, with the first and the last; None: all."""
    if count is None or len(items) <= count:
        return list(items)
    if count < 1:
        return []
    places = np.unique(np.round(np.linspace(0, len(items) - 1, count)).astype(int))
    return [items[place] for place in places]


class SpanCutter:
    """Cuts spans out of sound that arrives in blocks; holds no more than open spans need.

    Args:
        spans: may overlap.
        rate: of the sound in Hz.
    """

    def __init__(self, spans: Iterable[Span], rate: int):
        self.rate = rate
        self._waiting = sorted(spans, key=lambda span: span.start, reverse=True)
        self._open: list[Span] = []
        self._buffer = np.zeros(0, np.float32)
        self._begin = 0  # sample that the buffer begins with

    def push(self, audio: np.ndarray) -> list[tuple[Span, np.ndarray]]:
        """Takes the next samples float32 [S]; returns the spans that are complete, with their own
        copies of the sound."""
        self._buffer = np.concatenate([self._buffer, np.asarray(audio, np.float32)])
        end = self._begin + len(self._buffer)
        while self._waiting and self._waiting[-1].samples(self.rate)[0] < end:
            self._open.append(self._waiting.pop())
        complete = []
        for span in list(self._open):
            start, stop = span.samples(self.rate)
            if stop <= end:
                self._open.remove(span)
                complete.append((span, self._buffer[start - self._begin : stop - self._begin]))
        complete = [(span, audio.copy()) for span, audio in complete]
        needed = min((span.samples(self.rate)[0] for span in self._open), default=end)
        self._buffer = self._buffer[needed - self._begin :].copy()
        self._begin = needed
        return complete
