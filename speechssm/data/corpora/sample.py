"""The corpus that is embedded in the repository (data/sample), read through its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from speechssm.data.corpora.base import Recording, Split, Utterance
from speechssm.data.corpora.manifest import MANIFEST, read_table
from speechssm.errors import CorpusError


class SampleCorpus:
    """One file per document; `manifest.tsv` has one row per utterance.

    Any folder with such a manifest will do. Columns that are read: split (train or heldout),
    document, file, speaker, chapter, start_s, seconds, text (may be empty), synthetic (0 or 1).
    """

    name = "sample"
    _columns = (
        "split", "document", "file", "speaker", "chapter", "start_s", "seconds", "text",
        "synthetic",
    )  # fmt: skip

    def __init__(self, source: str | Path | None) -> None:
        """`source`: the folder that holds the manifest."""
        if source is None:
            raise CorpusError(f"corpus=sample needs source=FOLDER, a folder with {MANIFEST}")
        self.source = Path(source)

    def recordings(self, split: Split) -> Iterator[Recording]:
        """One recording per document."""
        for _, rows in groupby(self._rows(split), key=lambda row: (row["document"], row["file"])):
            yield self._recording(list(rows))

    def _rows(self, split: Split) -> Iterator[dict[str, str]]:
        path = self.source / MANIFEST
        if not path.is_file():
            raise CorpusError(
                f"{path} is missing: source must be a checkout's data/sample, or a folder with "
                f"{MANIFEST} and the sound files that it names"
            )
        for _, row in read_table(path, self._columns):
            if row["split"] == split:
                yield row

    def _recording(self, rows: list[dict[str, str]]) -> Recording:
        first = rows[0]
        try:
            utterances = tuple(
                Utterance(
                    row["text"] or None,
                    float(row["start_s"]),
                    float(row["seconds"]),
                    row["chapter"],
                )
                for row in rows
            )
        except (TypeError, ValueError) as error:
            raise CorpusError(
                f"{self.source / MANIFEST}: document {first['document']} has a row without start "
                "or length in seconds"
            ) from error
        return Recording(
            path=self.source / first["file"],
            document=first["document"],
            speaker=first["speaker"],
            chapter=first["chapter"],
            utterances=utterances,
            synthetic=first["synthetic"] == "1",
        )
