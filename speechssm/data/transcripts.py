"""What becomes of transcripts in training: counted before it begins, so that none is lost."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

# Frames a second of what reads the audio against the transcript (the tokenizer's recognition head).
FRAMES_PER_SECOND = 25
NONE = "without a transcript"
CUT = "longer than a row: cut, and their transcript is not used"
WORDLESS = "with a transcript in which no letter is left: not used"
OUTSIDE = "with characters that the text model does not know: used without these"
TOO_LONG = "with a transcript of more pieces than data.max_text_length: not used"
NO_ROOM = "with more pieces than frames: they fit no alignment and count as zero loss"
# What a corpus without faults has too.
USUAL = frozenset({NONE, CUT})


def frames_needed(ids: Sequence[int]) -> int:
    """Frames that CTC needs for a text: one for each piece, and a blank between equal pieces."""
    return len(ids) + sum(a == b for a, b in pairwise(ids))


@dataclass
class TranscriptCensus:
    """How many rows have a transcript that is used, and what is the matter with others.

    `found`: of each finding its number of rows and the key of the first one's first sample.
    """

    rows: int = 0
    used: int = 0
    found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, key: str, used: bool, found: Sequence[str]) -> None:
        """Count one more row."""
        self.rows += 1
        self.used += used
        for finding in found:
            count, first = self.found.get(finding, (0, key))
            self.found[finding] = (count + 1, first)

    @property
    def faulty(self) -> bool:
        """Whether something is the matter that a corpus need not have, or no transcript is used."""
        return not self.used or bool(self.found.keys() - USUAL)

    def describe(self) -> str:
        """One line for people."""
        text = f"{self.used} of {self.rows} rows have a transcript that is used"
        for finding, (count, key) in sorted(self.found.items()):
            text += f"; {count} {finding} (the first: {key})"
        return text
