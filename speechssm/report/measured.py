"""The sections on what was measured: the sweep, loss against position, and constant memory."""

from pathlib import Path

from speechssm.report.blocks import Block, Chart, Folded, Missing, Section, Sound, Sounds, Text
from speechssm.report.figures import (
    BOTH,
    REAL,
    likelihood_figure,
    memory_figure,
    position_figure,
    state_figure,
)
from speechssm.report.gather import Folder, Results, Run, run_labels
from speechssm.report.sections import MAKE, curve_blocks, runs_table, sample_sounds, slope_row
from speechssm.report.tables import (
    Table,
    format_interval,
    format_number,
    minutes,
    rows_table,
    signed,
)


def sweep_section(folder: Folder, report: Path) -> list[Section]:
    """The sweep over sequence lengths: its table, its losses, its samples."""
    likelihood = folder.first_with("nats_per_unit")
    sections = []
    for index, (place, runs) in enumerate(folder.sweeps.items()):
        name = "sweep" if index == 0 else f"sweep-{index + 1}"
        title = "Sweep over sequence lengths"
        if len(folder.sweeps) > 1:
            title += f": {place.name}"
        if not runs:
            missing = Missing(f"runs of the sweep in {place.name}", MAKE["sweep"])
            sections.append(Section(name, title, [missing]))
            continue
        labels = run_labels(runs)
        blocks: list[Block] = [
            Text(
                "The same model and the same number of training tokens, in sequences of different "
                "lengths. Longer sequences give more tokens a long true context, and fewer "
                "sequences a step."
            ),
            sweep_table(runs, labels, likelihood),
        ]
        if likelihood is None:
            blocks.append(Missing("likelihood on held-out documents", MAKE["nats_per_unit"]))
        elif (drawing := likelihood_figure(likelihood.rows)) is not None:
            values = "; ".join(
                f"{row.system} {format_interval(row.value, row.low, row.high)}"
                for row in likelihood.rows
                if row.name == "nats_per_unit"
            )
            blocks.append(
                Chart(f"{name}-likelihood", drawing,
                      "Nats per unit on held-out real documents, with 95% bootstrap intervals over "
                      "documents. Intervals of systems overlap more than their paired differences, "
                      "which the table gives.",
                      f"Nats per unit on held-out documents: {values}.")
            )  # fmt: skip
        blocks += curve_blocks(dict(zip(labels, runs, strict=True)), name)
        blocks.append(runs_table(runs, labels))
        sounds = []
        for number, (label, run) in enumerate(zip(labels, runs, strict=True)):
            for sound in sample_sounds(run, f"{name}-{number + 1}", report, most=1):
                sounds.append(Sound(sound.name, sound.path, f"{label}: {sound.title.lower()}",
                                    sound.caption, sound.spectrogram))  # fmt: skip
        if sounds:
            blocks.append(Sounds(sounds))
        sections.append(Section(name, title, blocks))
    if not sections:
        missing = [Missing("a sweep over sequence lengths", MAKE["sweep"])]
        sections.append(Section("sweep", "Sweep over sequence lengths", missing))
    return sections


def sweep_table(runs: list[Run], labels: list[str], likelihood: Results | None) -> Table:
    """One line per sequence length, then unigram and bigram."""

    def measured(name: str, system: str) -> str:
        rows = likelihood.rows if likelihood else []
        for row in rows:
            if row.name == name and row.system == system:
                return format_interval(row.value, row.low, row.high, 3)
        return "–"

    def share(run: Run, name: str) -> str:
        value = run.value(f"context_{name}")
        value = run.last(f"train/context_{name}") if value is None else value
        return "–" if value is None else f"{100 * value:.0f}%"

    cells = []
    for run, label in zip(runs, labels, strict=True):
        tokens = run.value("tokens") or run.last("train/tokens")
        cells.append(
            [
                label,
                format_number(run.sequence[1]) if run.sequence else "–",
                format_number(run.steps),
                "–" if tokens is None else f"{tokens / 1e6:.2f} M",
                *(share(run, name) for name in ("30s", "4min", "16min")),
                measured("nats_per_unit", label),
                measured("nats_per_unit_below_unigram", label),
                measured("nats_per_unit_below_bigram", label),
            ]
        )
    for baseline in ("unigram", "bigram"):
        value = measured("nats_per_unit", baseline)
        if value != "–":
            cells.append([baseline, *[""] * 6, value, "", ""])
    columns = ["trained on", "units per sequence", "steps", "tokens", "≥ 30 s", "≥ 4 min",
               "≥ 16 min", "held-out nats/unit", "below unigram", "below bigram"]  # fmt: skip
    return Table(
        columns,
        cells,
        "≥ 30 s, 4 min, 16 min: share of training tokens with at least so much true context before "
        "them. Nats per unit on held-out real documents; in brackets 95% intervals over documents; "
        "“below” is paired by document, and negative where the model is worse.",
    )


def position_section(folder: Folder) -> Section:
    """Held-out loss against position in the document."""
    blocks: list[Block] = []
    result = folder.first_with("nats_per_unit")
    curves = list(result.sections.get("curves", [])) if result else []
    for scope, name in ((REAL, "position"), (BOTH, "position-both")):
        drawing = position_figure(curves, scope)
        if drawing is None:
            continue
        points = max((curve["points"] for curve in curves if curve["scope"] == scope), key=len)
        end = points[-1]
        blocks.append(
            Chart(
                name,
                drawing,
                f"Held-out loss against position, {scope}. Bands: 95% bootstrap intervals over "
                "documents. Dotted uprights mark each model's training length; its curve goes to "
                "four times that length, and all stop where fewer than three documents reach. "
                f"Here that leaves {end['n']} documents at "
                f"{minutes(end['stop'] / curves[0]['rate'])}.",
                f"Nats per unit against position in the document, {scope}, with the number of "
                "documents behind each point.",
                title=scope.capitalize(),
            )
        )
    if blocks:
        blocks.insert(
            0,
            Text(
                "Does a model keep its footing beyond the length it was trained on? A flat or "
                "falling line means yes. Which documents are long enough changes along the axis, "
                "so compare lines with each other and with the grey baselines, which see the same "
                "documents."
            ),
        )
        if not any(curve["scope"] == BOTH for curve in curves):
            blocks.append(Text("There are no synthetic documents in this split.", quiet=True))
    else:
        blocks.append(Missing("loss against position", MAKE["nats_per_unit"]))
    return Section("position", "Loss against position", blocks)


def memory_section(folder: Folder) -> Section:
    """State, time and memory while speech goes on."""
    bench = folder.first_with("memory_slope")
    if bench is None:
        missing = Missing("state, time and memory while speaking", MAKE["memory_slope"])
        return Section("memory", "Constant memory", [missing])
    sections = bench.sections
    first, last = sections["positions"][0], sections["positions"][-1]
    where = minutes(last["position"] / sections["rate"])
    row = slope_row(bench)
    blocks: list[Block] = [
        Chart(
            "state",
            state_figure({"": sections}),
            f"Left: memory that the language model needs to go on, "
            f"{first['state_bytes'] / 1024:.0f} KiB at the start and "
            f"{last['state_bytes'] / 1024:.0f} KiB after {where}. Right: time per token at batch "
            f"1, median and middle half of the steps, "
            f"{first['milliseconds']:.2f} ms at the start and {last['milliseconds']:.2f} ms after "
            f"{where}; a unit lasts {1000 / sections['rate']:.0f} ms.",
            "State memory and milliseconds per token against position in the generated speech.",
        ),
        Chart(
            "memory-windows",
            memory_figure(sections),
            f"Memory after each of {len(sections['windows'])} windows of generated speech."
            + (f" Slope of allocated memory: {signed(row.value)} KiB per window, 95% interval "
               f"{signed(row.low)} to {signed(row.high)}." if row else ""),
            "Memory of the whole pipeline after each generated window.",
        ),
        Text(
            "Allocated: what the C library has handed out, all tensors included. Tensors: those "
            "made since generation began. Resident: pages in RAM, which the allocator may keep "
            f"after freeing. Slopes leave out the first {sections['warm_up_windows']} windows; "
            "their intervals allow for drift (Newey–West).",
            quiet=True,
        ),
        Folded("All figures of this bench", rows_table(bench.rows)),
    ]  # fmt: skip
    return Section("memory", "Constant memory", blocks)
