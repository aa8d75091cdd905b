"""Document to markdown or LaTeX; figures become files beside it."""

from pathlib import Path

from speechssm.report.blocks import (
    Block,
    Chart,
    Commands,
    Document,
    Facts,
    Folded,
    Missing,
    Sound,
    Sounds,
    Text,
)
from speechssm.report.style import save_figure
from speechssm.report.tables import escape_latex


def render_markdown(document: Document, report: Path) -> str:
    """The report as markdown with SVG figures in `report/figures`."""
    parts = [f"# {document.title}", document.lead]
    parts += [markdown_block(block, report) for block in document.opening]
    for section in document.sections:
        parts.append(f"{'#' * section.level} {section.title}")
        parts += [markdown_block(block, report) for block in section.blocks]
    parts.append(f"---\n\n{document.colophon}")
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_block(block: Block, report: Path) -> str:
    """One block as markdown."""
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Missing):
        return f"*Not here: {block.what}.*" + (f" `{block.command}`" if block.command else "")
    if isinstance(block, Facts):
        return "\n".join(
            f"- {fact.label}: **{fact.value}**{f' ({fact.note})' if fact.note else ''}"
            for fact in block.facts
        )
    if isinstance(block, Chart):
        path = save_figure(block.drawing, report / "figures" / f"{block.name}.svg")
        return f"![{block.description}]({path.relative_to(report)})\n\n{block.caption}"
    if isinstance(block, Sound):
        return f"- [{block.title}]({block.path}): {block.caption}"
    if isinstance(block, Sounds):
        return "\n".join(markdown_block(sound, report) for sound in block.sounds)
    if isinstance(block, Commands):
        lines = [f"# {title}\n{command}" for title, command in block.commands]
        return "```bash\n" + "\n".join(lines) + "\n```"
    if isinstance(block, Folded):
        return f"**{block.title}**\n\n{block.table.markdown()}"
    return block.markdown()


def render_latex(document: Document, report: Path) -> str:
    """The report as a LaTeX article with PDF figures in `report/figures`; sound is left out."""
    parts = [
        r"\documentclass{article}",
        r"\usepackage[utf8]{inputenc}",
        r"\usepackage{booktabs,graphicx}",
        rf"\title{{{escape_latex(document.title)}}}",
        r"\date{}",
        r"\begin{document}",
        r"\maketitle",
        escape_latex(document.lead),
    ]
    parts += [latex_block(block, report) for block in document.opening]
    for section in document.sections:
        command = "section" if section.level == 2 else "subsection"
        parts.append(rf"\{command}{{{escape_latex(section.title)}}}")
        parts += [latex_block(block, report) for block in section.blocks]
    parts += [escape_latex(document.colophon), r"\end{document}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex_block(block: Block, report: Path) -> str:
    """One block as LaTeX."""
    if isinstance(block, Text):
        return escape_latex(block.text)
    if isinstance(block, Missing):
        return rf"\emph{{{escape_latex(f'Not here: {block.what}.')}}}"
    if isinstance(block, Facts):
        items = "\n".join(
            rf"\item {escape_latex(f'{fact.label}: {fact.value} {fact.note}'.strip())}"
            for fact in block.facts
        )
        return f"\\begin{{itemize}}\n{items}\n\\end{{itemize}}"
    if isinstance(block, Chart):
        path = save_figure(block.drawing, report / "figures" / f"{block.name}.pdf")
        return "\n".join(
            [
                r"\begin{figure}",
                r"\centering",
                rf"\includegraphics[width=\linewidth]{{{path.relative_to(report)}}}",
                rf"\caption{{{escape_latex(block.caption)}}}",
                r"\end{figure}",
            ]
        )
    if isinstance(block, Sound | Sounds):
        return ""
    if isinstance(block, Commands):
        lines = "\n".join(f"# {title}\n{command}" for title, command in block.commands)
        return f"\\begin{{verbatim}}\n{lines}\n\\end{{verbatim}}"
    table = block.table if isinstance(block, Folded) else block
    return table.latex()
