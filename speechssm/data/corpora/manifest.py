"""Tab-separated tables with a header, as corpora of one's own are described by."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator
from pathlib import Path

from speechssm.errors import CorpusError

MANIFEST = "manifest.tsv"


def read_table(path: Path, columns: Collection[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a table: UTF-8, tabs between fields, no quoting.

    Args:
        path: of the table.
        columns: that must be there; others are handed out as well.

    Yields:
        the number of the line, from 1, and its fields by column; blank lines are passed over.

    Raises:
        CorpusError: the table is missing or not UTF-8, lacks a column, or a line has another
            number of fields than the header.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            missing = set(columns) - set(reader.fieldnames or ())
            if missing:
                raise CorpusError(f"{path} lacks the column(s) {', '.join(sorted(missing))}")
            for row in reader:
                if None in row or None in row.values():
                    raise CorpusError(
                        f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} "
                        "fields with tabs between them, as in the header"
                    )
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"{path} cannot be read as a table ({error})") from error
