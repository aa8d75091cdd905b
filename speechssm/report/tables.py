"""One table, three forms: markdown, HTML and LaTeX."""

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from speechssm.report.rows import Comparison, Row

LATEX_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "≥": r"$\geq$", "≤": r"$\leq$", "−": "$-$", "×": r"$\times$", "–": "--",
    "…": r"\dots{}", "✓": "yes", "✗": "no",
}  # fmt: skip


# Cells that begin with these marks are set apart on the page.
VERDICTS = {"✓": ' class="holds"', "✗": ' class="fails"'}


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        columns: headings.
        cells: rows of cells, as many as there are columns each.
        caption: what the table shows; may be empty.
        numeric: which columns are numbers, and so right-aligned; None = all but the first.
    """

    columns: Sequence[str]
    cells: Sequence[Sequence[str]]
    caption: str = ""
    numeric: Sequence[bool] | None = None

    def __post_init__(self):
        for row in self.cells:
            if len(row) != len(self.columns):
                raise ValueError(f"a row has {len(row)} cells for {len(self.columns)} columns")

    def _numeric(self) -> Sequence[bool]:
        return self.numeric or [index > 0 for index in range(len(self.columns))]

    def markdown(self) -> str:
        """GitHub's pipe table; pipes in cells are escaped."""
        rule = ["---:" if number else "---" for number in self._numeric()]
        lines = [list(self.columns), rule, *self.cells]
        text = "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )
        return f"{text}\n\n{self.caption}" if self.caption else text

    def html(self) -> str:
        """A `<table>` with header row and row headers in a box that scrolls, and its caption."""
        classes = [' class="number"' if number else "" for number in self._numeric()]
        head = "".join(
            f'<th scope="col"{kind}>{html.escape(column)}</th>'
            for column, kind in zip(self.columns, classes, strict=True)
        )
        body = []
        for row in self.cells:
            first = f'<th scope="row"{classes[0]}>{html.escape(row[0])}</th>'
            rest = "".join(
                f"<td{VERDICTS.get(cell[:1], kind)}>{cell_html(cell)}</td>"
                for cell, kind in zip(row[1:], classes[1:], strict=True)
            )
            body.append(f"<tr>{first}{rest}</tr>")
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>" if self.caption else ""
        return (
            f'<figure class="table"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>{caption}</figure>"
        )

    def latex(self) -> str:
        """A booktabs `table` environment."""
        alignment = "".join("r" if number else "l" for number in self._numeric())
        lines = [r"\begin{table}", r"\centering"]
        if self.caption:
            lines.append(rf"\caption{{{escape_latex(self.caption)}}}")
        lines += [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule"]
        lines.append(" & ".join(map(escape_latex, self.columns)) + r" \\")
        lines.append(r"\midrule")
        lines += [" & ".join(map(escape_latex, row)) + r" \\" for row in self.cells]
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        return "\n".join(lines)


def cell_html(cell: str) -> str:
    """A cell's text; an interval behind a value goes below it, so that tables stay narrow."""
    text = html.escape(cell)
    return re.sub(r"^(\S+) (\[[^\]]+\])$", r'\1 <span class="interval">\2</span>', text)


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it stands."""
    return "".join(LATEX_SPECIAL.get(character, character) for character in text)


def format_number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits, integers whole, thousands apart; None is a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        text = f"{value:.2g}"
    elif float(value).is_integer():
        text = f"{value:,.0f}"
    else:
        text = f"{value:,.{max(0, digits - 1 - magnitude)}f}"
    return text.replace(",", "\u202f").replace("-", "−")


def format_interval(
    value: float | None, low: float | None, high: float | None, digits: int = 4
) -> str:
    """`3.912 [3.871, 3.954]`, or the value alone."""
    text = format_number(value, digits)
    if low is None or high is None:
        return text
    return f"{text} [{format_number(low, digits)}, {format_number(high, digits)}]"


def minutes(seconds: float) -> str:
    """`48 s`, `2 min`, `16 min 30 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    rest = whole % 60
    return f"{whole // 60} min" + (f" {rest} s" if rest else "")


def signed(value: float | None) -> str:
    """A number with its sign."""
    text = format_number(value, 2)
    return text if value is None or value <= 0 else f"+{text}"


def rows_table(rows: Iterable[Row], caption: str = "") -> Table:
    """Rows as a table: metric, system, split, value, 95% interval, unit, n."""
    cells = [
        [
            row.name.replace("_", " "),
            row.system,
            row.split,
            format_number(row.value),
            ""
            if row.low is None or row.high is None
            else f"[{format_number(row.low)}, {format_number(row.high)}]",
            row.unit,
            "" if row.n is None else str(row.n),
        ]
        for row in rows
    ]
    columns = ["metric", "system", "split", "value", "95% interval", "unit", "n"]
    return Table(columns, cells, caption, [False, False, False, True, True, False, True])


def comparisons_table(comparisons: Iterable[Comparison], caption: str = "") -> Table:
    """Comparisons as a table with a last column that says whether each holds."""
    cells = [
        [
            # Units such as nats/code name the metric well enough.
            item.system
            if item.unit.startswith("nats/")
            else f"{item.system}: {item.name.replace('_', ' ')}",
            item.baseline_name,
            format_number(item.ours),
            format_number(item.baseline),
            format_interval(item.margin, item.low, item.high, 3),
            format_number(item.required, 3),
            item.unit,
            "✓ holds" if item.holds else "✗ does not hold",
        ]
        for item in comparisons
    ]
    columns = ["what", "against", "ours", "baseline", "margin", "needed", "unit", "verdict"]
    numeric = [False, False, True, True, True, True, False, False]
    return Table(columns, cells, caption, numeric)
