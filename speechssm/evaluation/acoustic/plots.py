"""Voice and naturalness over time, and differences at joints, as curves and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speechssm.evaluation.acoustic.listening import CODEC, RECORDINGS, STRANGERS, Listener
from speechssm.evaluation.acoustic.options import Options
from speechssm.evaluation.acoustic.seams import SeamDifference
from speechssm.evaluation.acoustic.summary import over_time
from speechssm.evaluation.statistics import Interval
from speechssm.report.plots import Line, plot_dots, plot_lines
from speechssm.report.style import save_figure

SCORES = {
    "distillmos": "DistillMOS",
    "dnsmos_overall": "DNSMOS overall",
    "dnsmos_signal": "DNSMOS signal",
    "dnsmos_background": "DNSMOS background",
    "dnsmos_p808": "DNSMOS P.808",
}
SEAM_MEASURES = {
    "distillmos": ("DistillMOS", "MOS"),
    "speaker_similarity": ("speaker similarity", "cosine"),
    "mel_flux": ("mel flux, 5 s", "nats"),
    "mel_flux_narrow": ("mel flux, 40 ms", "nats"),
}


def curves_over_time(
    listener: Listener, systems: Sequence[str], options: Options, seed: int
) -> list[dict[str, Any]]:
    """Measures over time, minute by minute where there are five or more, else span by span."""
    minutes = options.minutes >= 5
    curves = []
    for measure in ("similarity", *SCORES):
        for name in systems:
            width = 60.0 if minutes else options.span_seconds
            curve = over_time(listener.heard_of(name), measure, width, seed)
            if curve["y"]:
                curves.append({"measure": measure, "system": name, **curve})
    return curves


def draw(
    curves: Sequence[Mapping[str, Any]],
    seams: Mapping[str, Mapping[str, SeamDifference]],
    floor: Interval | None,
    out: Path,
) -> None:
    for measure, title in (
        ("similarity", "similarity to the prompt"),
        ("distillmos", "DistillMOS"),
        ("dnsmos_overall", "DNSMOS overall"),
    ):
        shown = [curve for curve in curves if curve["measure"] == measure]
        lines = []
        for place, curve in enumerate(shown):
            ours = curve["system"] not in (CODEC, RECORDINGS)
            lines.append(
                Line(
                    curve["system"], curve["second"], curve["y"],
                    curve["low"] if ours else None, curve["high"] if ours else None,
                    colour=-1 if curve["system"] == RECORDINGS else place,
                    dashed=not ours,
                )
            )  # fmt: skip
        if lines and measure == "similarity" and floor is not None:
            ends = [min(line.x[0] for line in lines), max(line.x[-1] for line in lines)]
            lines.append(Line(STRANGERS, ends, [floor.value] * 2, colour=-1, faint=True))
        if lines:
            drawing = plot_lines(lines, "seconds of speech", title)
            save_figure(drawing, out / f"{measure}_over_time.svg")
    for measure, (title, unit) in SEAM_MEASURES.items():
        shown = {name: found[measure] for name, found in seams.items() if measure in found}
        if shown:
            intervals = [found.difference for found in shown.values()]
            drawing = plot_dots(
                list(shown),
                [each.value for each in intervals],
                [each.low for each in intervals],
                [each.high for each in intervals],
                f"{title} in {unit}: joint − centre (0: cannot be heard)",
                colours=[-1 if name == RECORDINGS else 0 for name in shown],
            )
            save_figure(drawing, out / f"seam_{measure}.svg")
