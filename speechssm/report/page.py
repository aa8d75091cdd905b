"""`speechssm report`: one folder of runs and results to one page that opens from disk."""

from collections.abc import Sequence
from pathlib import Path

from speechssm.errors import ConfigError
from speechssm.report import measured
from speechssm.report import sections as parts
from speechssm.report.blocks import Block, Document, Section
from speechssm.report.gather import STAGES, Folder, gather
from speechssm.report.rows import write_rows, write_text
from speechssm.report.template import render_page
from speechssm.report.text import render_latex, render_markdown

FORMATS = {"html": "index.html", "markdown": "report.md", "latex": "report.tex"}

DEMO_LEAD = (
    "All four stages of a spoken language model, from recordings to speech that could go on for "
    "ever, each trained for minutes on two CPU cores. What is heard comes by default from shipped "
    "models and these language models. Trainings this short cannot give good speech: expect a "
    "voice's sound and rhythm at best, not words. {verdict} Nothing on this page is chosen by hand."
)
PROVEN = (
    "What it shows is that every part works; that each of codec, SoundStorm and language model "
    "beats what needs no learning on recordings that it has never seen; and that speech goes on "
    "in a fixed amount of memory."
)
UNPROVEN = (
    "It is meant to show that every part works and beats what needs no learning; here not every "
    "check holds, or some are missing, and the page says which."
)
LEADS = {
    "demo": "All stages of a spoken language model, from recordings to speech that can go on for "
    "ever: how each was trained, and what it is worth on recordings that it has never seen.",
    "run": "One training run: its losses, its figures, and how it was made.",
    "sweep": "One model trained several times, each run in a folder of its own.",
}


def write_report(folder: str | Path, formats: Sequence[str] = ("html",)) -> dict[str, Path]:
    """Write FOLDER/report/ and, unless the folder is a single run, FOLDER/metrics.json.

    Args:
        folder: a run folder, a sweep folder, or one with all stages' runs below it.
        formats: of `html`, `markdown`, `latex`.

    Returns:
        The files written, by format; `metrics` is the merged results file.

    Raises:
        ConfigError: an unknown format, no such folder, nothing in it, or broken results.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ConfigError(
            f"format={','.join(unknown)} is unknown; choose among: {', '.join(FORMATS)}"
        )
    found = gather(folder)
    report = found.path / "report"
    document = build(found, report)
    written = {}
    for name in formats:
        path = report / FORMATS[name]
        if name == "html":
            text = render_page(document)
        elif name == "markdown":
            text = render_markdown(document, report)
        else:
            text = render_latex(document, report)
        written[name] = write_text(path, text)
    if found.kind != "run":
        # A run's own metrics.json stays as the training left it.
        written["metrics"] = write_rows(
            found.path / "metrics.json",
            parts.all_rows(found),
            comparisons=parts.comparisons_of(found),
            curves=parts.all_curves(found),
        )
    return written


def build(folder: Folder, report: Path) -> Document:
    """The document of a folder; recordings are copied into `report`."""
    made: list[Section | None] = []
    if folder.kind == "demo":
        made += [
            parts.listening_section(folder, report),
            parts.baselines_section(folder),
            *parts.stages_section(folder, report),
            *measured.sweep_section(folder, report),
            measured.position_section(folder),
            measured.memory_section(folder),
        ]
    elif folder.kind == "sweep":
        made += [*measured.sweep_section(folder, report), measured.position_section(folder)]
        if folder.first_with("memory_slope"):
            made.append(measured.memory_section(folder))
    else:
        run = folder.runs[0]
        blocks = parts.run_blocks(run, run.stage, report, folder)
        made.append(Section("run", parts.STAGE_TITLES.get(run.stage, "Training"), blocks))
        if run.rows:
            made.append(Section("figures", "Final figures", [parts.rows_table(run.rows)]))
    made += [parts.other_section(folder), parts.commands_section(folder)]
    facts = parts.key_facts(folder)
    opening: list[Block] = [facts] if facts else []
    return Document(
        title_of(folder),
        lead_of(folder),
        opening,
        [section for section in made if section is not None],
        "Written by `speechssm report` from the files in this folder alone. Every figure is also "
        "in metrics.json, one row each, with its interval, seed, config, hardware and versions.",
    )


def lead_of(folder: Folder) -> str:
    """The paragraph below the title. It claims only what the checks in the folder bear out."""
    if folder.kind != "demo" or not is_small(folder):
        return LEADS[folder.kind]
    comparisons = parts.comparisons_of(folder)
    stages = {item.stage for item in comparisons}
    proven = stages >= {*STAGES, "pipeline"} and all(item.holds for item in comparisons)
    return DEMO_LEAD.format(verdict=PROVEN if proven else UNPROVEN)


def is_small(folder: Folder) -> bool:
    """Whether every run here is of the demo scale, or none is known to be of another."""
    return all(run.config.get("scale") in ("demo", None) for run in folder.all_runs)


def title_of(folder: Folder) -> str:
    """The page's title."""
    if folder.kind == "demo":
        return "From recordings to endless speech"
    if folder.kind == "sweep":
        return f"Sweep: {folder.path.resolve().name.replace('_', ' ')}"
    return f"Run: {folder.runs[0].name}"


def report(config) -> dict[str, Path]:
    """`speechssm report` with the config of `conf/report.yaml`."""
    formats = config.get("format") or "html"
    if isinstance(formats, str):
        formats = [name.strip() for name in formats.split(",") if name.strip()]
    if not config.get("folder"):
        raise ConfigError("folder is not set; add folder=FOLDER")
    return write_report(config["folder"], [str(name) for name in formats])
