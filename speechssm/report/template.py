"""Document to one HTML page: no script, no font and no picture from anywhere else."""

import html
from pathlib import Path

from speechssm.report.blocks import (
    Block,
    Chart,
    Commands,
    Document,
    Facts,
    Folded,
    Missing,
    Section,
    Sound,
    Sounds,
    Text,
)
from speechssm.report.style import inline_svg

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def escape(text: str) -> str:
    """Text for HTML; `code` in backticks becomes a code element."""
    parts = html.escape(text).split("`")
    if len(parts) % 2 == 0:
        return html.escape(text)
    return "".join(
        f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts)
    )


def render_sound(sound: Sound) -> str:
    """A recording: title, spectrogram, player, caption."""
    picture = ""
    if sound.spectrogram is not None:
        description = f"Spectrogram of {sound.title}"
        picture = inline_svg(sound.spectrogram, f"spectrogram-{sound.name}", description)
    title, source = html.escape(sound.title, quote=True), html.escape(str(sound.path), quote=True)
    return (
        f'<figure class="sound"><div class="sound-title">{title}</div>{picture}'
        f'<audio controls preload="none" src="{source}" aria-label="{title}"></audio>'
        f"<figcaption>{escape(sound.caption)}</figcaption></figure>"
    )


def render_block(block: Block) -> str:
    """One block as HTML."""
    if isinstance(block, Text):
        return f"<p{' class=quiet' if block.quiet else ''}>{escape(block.text)}</p>"
    if isinstance(block, Missing):
        command = f" <code>{html.escape(block.command)}</code> makes it." if block.command else ""
        return f'<p class="missing"><b>Not here:</b> {escape(block.what)}.{command}</p>'
    if isinstance(block, Facts):
        facts = "".join(
            f"<div><dt>{escape(fact.label)}</dt><dd>{escape(fact.value)}"
            f"<span>{escape(fact.note)}</span></dd></div>"
            for fact in block.facts
        )
        return f'<dl class="facts">{facts}</dl>'
    if isinstance(block, Chart):
        picture = inline_svg(block.drawing, block.name, block.description)
        title = f'<div class="chart-title">{escape(block.title)}</div>' if block.title else ""
        return f"<figure>{title}{picture}<figcaption>{escape(block.caption)}</figcaption></figure>"
    if isinstance(block, Sound):
        return render_sound(block)
    if isinstance(block, Sounds):
        return f'<div class="sounds">{"".join(map(render_sound, block.sounds))}</div>'
    if isinstance(block, Commands):
        lines = "".join(
            f"<dt>{escape(title)}</dt><dd><code>{html.escape(command)}</code></dd>"
            for title, command in block.commands
        )
        return f'<dl class="commands">{lines}</dl>'
    if isinstance(block, Folded):
        title = f"<summary>{escape(block.title)}</summary>"
        return f"<details>{title}{block.table.html()}</details>"
    return block.html()


def render_section(section: Section) -> str:
    """A section with its heading and anchor."""
    blocks = "\n".join(map(render_block, section.blocks))
    heading = f"<h{section.level}>{escape(section.title)}</h{section.level}>"
    return f'<section id="{section.identifier}">{heading}\n{blocks}</section>'


def render_page(document: Document) -> str:
    """The whole page."""
    contents = "".join(
        f'<a href="#{section.identifier}">{escape(section.title)}</a>'
        for section in document.sections
        if section.level == 2
    )
    opening = "\n".join(map(render_block, document.opening))
    sections = "\n".join(map(render_section, document.sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(document.title)}</title>
<style>
{CSS}</style>
</head>
<body>
<header>
<h1>{escape(document.title)}</h1>
<p class="lead">{escape(document.lead)}</p>
{opening}
<nav aria-label="Contents">{contents}</nav>
</header>
<main>
{sections}
</main>
<footer><p>{escape(document.colophon)}</p></footer>
</body>
</html>
"""
