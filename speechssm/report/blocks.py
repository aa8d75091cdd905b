"""What a report is made of, before it becomes HTML, markdown or LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from speechssm.report.tables import Table


@dataclass(frozen=True)
class Text:
    """A paragraph. `quiet` sets it smaller: method, caveats."""

    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Missing:
    """A part that the folder does not have, and what makes it."""

    what: str
    command: str = ""


@dataclass(frozen=True)
class Fact:
    """One large figure with its name and a word on what it means."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """A row of facts."""

    facts: Sequence[Fact]


@dataclass(frozen=True)
class Chart:
    """A figure. `name` is unique in the report; `description` is for readers who cannot see it."""

    name: str
    drawing: Figure
    caption: str
    description: str
    title: str = ""


@dataclass(frozen=True)
class Sound:
    """A recording to play, `path` relative to the report, perhaps with its spectrogram."""

    name: str
    path: Path
    title: str
    caption: str
    spectrogram: Figure | None = None


@dataclass(frozen=True)
class Sounds:
    """Recordings that belong together, side by side where there is room."""

    sounds: Sequence[Sound]


@dataclass(frozen=True)
class Commands:
    """Command lines with what each has made."""

    commands: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Folded:
    """A table that is closed until the reader opens it."""

    title: str
    table: Table


Block = Text | Missing | Facts | Chart | Sound | Sounds | Commands | Folded | Table


@dataclass(frozen=True)
class Section:
    """A part of the report. `identifier` is its anchor; `level` 3 is a part of the one before."""

    identifier: str
    title: str
    blocks: Sequence[Block]
    level: int = 2


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    lead: str
    opening: Sequence[Block]
    sections: Sequence[Section]
    colophon: str
