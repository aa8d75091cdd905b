"""Cutting documents into pieces: one utterance each where there are transcripts, else 30 s."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from speechssm.audio.io import AudioFault, iterate_audio
from speechssm.data.corpora.base import Recording

# A transcript that ends this much after the sound does not belong to what is heard.
_TOLERANCE_SECONDS = 0.1
# Sound after the last utterance that still goes with it, instead of being a piece of its own.
_TAIL_SECONDS = 1.0


@dataclass(frozen=True)
class Piece:
    """Consecutive samples of a document.

    Attributes:
        audio: float32 [S].
        part: number of the stretch without gaps that it belongs to; 0 unless something had to be
            left out in the middle of the document.
        start: first sample, counted from the beginning of that stretch.
    """

    audio: np.ndarray
    part: int
    start: int
    speaker: str
    chapter: str
    text: str | None
    synthetic: bool


@dataclass(frozen=True)
class Skip:
    """Something that was left out: a whole recording, or what follows a fault in it."""

    name: str
    reason: str
    message: str


@dataclass(frozen=True)
class _Plan:
    """The next piece as planned: `length` samples, or fewer where the recording ends before.

    `last`: the text's last piece; `open`: the text goes on to the end of the recording.
    """

    length: int
    chapter: str
    text: str | None = None
    last: bool = False
    open: bool = False


def cut_document(
    recordings: Iterable[Recording], *, sample_rate: int, segment_seconds: float,
    minimum_seconds: float,
) -> Iterator[Piece | Skip]:  # fmt: skip
    """Cut the recordings of one document, in memory independent of its length.

    The pieces of a part, joined, are the recording itself: cuts lie in the middle of the pause
    between two utterances, and nothing in between is lost.

    Args:
        recordings: of one document, in order.
        sample_rate: in Hz, of the pieces.
        segment_seconds: longest piece; a longer utterance is cut in equal parts without text.
        minimum_seconds: a shorter recording is left out.

    Yields:
        pieces, and a Skip for everything that was left out. After a fault the document goes on as
        another part, since what would be heard on both sides of the gap does not belong together.
    """
    part, position, gap = 0, 0, False
    for recording in recordings:
        cutter = _Cutter(recording, sample_rate, round(segment_seconds * sample_rate))
        try:
            for audio, chapter, text in cutter.cut(round(minimum_seconds * sample_rate)):
                if gap and position:
                    part, position = part + 1, 0
                gap = False
                yield Piece(
                    audio, part, position, recording.speaker, chapter, text,
                    recording.synthetic,
                )  # fmt: skip
                position += len(audio)
        except AudioFault as fault:
            gap = True
            done = cutter.emitted / sample_rate
            kept = f"; its first {done:.1f} s are kept" if done else ""
            reason = f"{fault.reason}, beginning kept" if done else fault.reason
            yield Skip(str(recording.path), reason, f"{fault}{kept}")


class _Cutter:
    """Cuts one recording. `emitted` counts the samples that have been handed out."""

    def __init__(self, recording: Recording, sample_rate: int, segment: int) -> None:
        self.recording = recording
        self.sample_rate = sample_rate
        self.segment = segment
        self.emitted = 0

    def cut(self, minimum: int) -> Iterator[tuple[np.ndarray, str, str | None]]:
        """Yield audio, chapter and text; an AudioFault comes after all that is good before it."""
        blocks = _without_last(
            iterate_audio(self.recording.path, self.sample_rate),
            round(self.recording.drop_last_seconds * self.sample_rate),
        )
        tail = round(_TAIL_SECONDS * self.sample_rate)
        tolerance = round(_TOLERANCE_SECONDS * self.sample_rate)
        buffer = np.zeros(0, dtype=np.float32)
        ended, fault = False, None
        for plan in self._plans():
            # What follows the piece shows whether the recording ends with it.
            while not ended and len(buffer) < max(plan.length + tail + 1, minimum):
                try:
                    block = next(blocks, None)
                except AudioFault as error:
                    block, fault = None, error
                if block is None:
                    ended = True
                else:
                    buffer = np.concatenate([buffer, block])
            length, text = plan.length, plan.text
            rest = len(buffer) - length
            if fault is not None and rest < 0:
                raise fault
            if ended and self.emitted == 0 and len(buffer) < minimum:
                raise AudioFault(
                    f"{self.recording.path} has {len(buffer) / self.sample_rate:.2f} s to use, "
                    f"fewer than the minimum of {minimum / self.sample_rate:g} s",
                    "too short",
                )
            if len(buffer) == 0:
                return
            if (plan.open and rest > 0) or (not plan.open and rest < -tolerance):
                text = None  # the transcript is of another stretch than this piece
            elif ended and fault is None and plan.last and 0 < rest <= tail:
                length = min(len(buffer), self.segment)  # the silence after the last word
            audio, buffer = buffer[:length], buffer[length:]
            self.emitted += len(audio)
            yield audio, plan.chapter, text

    def _plans(self) -> Iterator[_Plan]:
        """Cuts in the middle of the pauses between utterances, then segments without end."""
        chapter, position = self.recording.chapter, 0
        utterances = self.recording.utterances
        for number, utterance in enumerate(utterances):
            chapter = utterance.chapter or chapter
            if utterance.seconds is None:
                yield _Plan(self.segment, chapter, utterance.text, open=True)
                break
            end = utterance.start_seconds + utterance.seconds
            last = number + 1 == len(utterances)
            if not last:
                end = (end + utterances[number + 1].start_seconds) / 2
            stop = round(end * self.sample_rate)
            count = math.ceil((stop - position) / self.segment)
            for index in range(count):
                length = (stop - position) // (count - index)
                text = utterance.text if count == 1 else None
                yield _Plan(length, chapter, text, last=last and index == count - 1)
                position += length
        while True:
            yield _Plan(self.segment, chapter)


def _without_last(blocks: Iterator[np.ndarray], dropped: int) -> Iterator[np.ndarray]:
    """The stream less its last `dropped` samples."""
    if dropped == 0:
        yield from blocks
        return
    held = np.zeros(0, dtype=np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        if len(held) > dropped:
            yield held[: len(held) - dropped]
            held = held[len(held) - dropped :]
