"""What an evaluation of codecs writes: rows, one compact table, margins and plots."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechssm.evaluation.codec.baselines import MEAN_SPECTRUM, SILENCE
from speechssm.evaluation.codec.findings import Findings, Measured
from speechssm.evaluation.codec.measures import MEASURES, Measure
from speechssm.evaluation.results import write_results
from speechssm.evaluation.statistics import Interval, entropy
from speechssm.report.plots import Line, plot_rate_quality
from speechssm.report.rows import Comparison, Row
from speechssm.report.style import save_figure
from speechssm.report.tables import Table

ORIGINAL = "original"
# A peer that was asked for 6 kbit/s meets our codec at 6 kbit/s, whatever rounding did to either.
_SAME_BITRATE = 1.001


def write(findings: Findings, out: Path) -> list[Row]:
    """Write metrics.json, table.md and the plots; returns the rows."""
    rows = all_rows(findings)
    margins = all_margins(findings)
    preface = "\n\n".join(
        [
            compact_table(findings).markdown(),
            explanation(findings),
            *([margin_table(margins).markdown()] if margins else []),
            "## All numbers\n\n",
        ]
    )
    write_results(
        out,
        rows,
        comparisons=comparisons(findings),
        title="Codecs on held-out speech",
        preface=preface,
        sections={
            "material": describe(findings),
            "left_out": findings.left_out,
            "delays_s": {m.setting.name: m.delay / 16_000 for m in findings.measured},
            "margins": margins,
        },
    )
    draw(findings, out)
    return rows


def interval_of(findings: Findings, values: Any) -> Interval | None:
    """The mean of `Values` over the clips; None where there is none."""
    return values.mean(findings.groups, findings.seed) if values is not None else None


def lines(findings: Findings) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(system, its values by measure, fields of its rows): the original, systems, baselines."""
    return [
        *([(ORIGINAL, findings.original, {})] if findings.original else []),
        *((m.setting.name, dict(m.values), dict(m.details)) for m in findings.measured),
        *((name, values, {}) for name, values in findings.baselines.items()),
    ]


def all_rows(findings: Findings) -> list[Row]:
    """Every measure of every system, bitrates, and the perplexity of each level's codes."""
    rows = []
    for measure in MEASURES:
        for system, values, details in lines(findings):
            if measure.name not in values:
                continue
            found = interval_of(findings, values[measure.name])
            value, low, high, n = found or (None, None, None, 0)
            rows.append(Row(measure.name, system, "heldout", value, measure.unit, low, high, n,
                            **details))  # fmt: skip
    clips = len(findings.clips)
    for each in findings.measured:
        rows.append(Row("bitrate", each.setting.name, "heldout", each.bitrate, "bit/s", n=clips,
                        **each.details))  # fmt: skip
    for codec in findings.codecs:
        for level, counts in enumerate(codec.used_QC, start=1):
            name = f"level {level}" if len(findings.codecs) == 1 else f"{codec.name}, level {level}"
            perplexity = math.exp(entropy(counts))
            rows.append(Row("codebook_perplexity", name, "heldout", perplexity, "codes",
                            n=int(counts.sum()), **codec.details))  # fmt: skip
    return rows


def compact_table(findings: Findings) -> Table:
    """One line a system; columns without numbers are left out."""
    entries = lines(findings)
    found_by_system = [
        {name: interval_of(findings, each) for name, each in values.items()}
        for _, values, _ in entries
    ]
    shown = [
        measure
        for measure in MEASURES
        if measure.in_table and any(found.get(measure.name) for found in found_by_system)
    ]
    bitrates = {m.setting.name: f"{m.bitrate:.0f}" for m in findings.measured}
    cells = []
    for (system, *_), intervals in zip(entries, found_by_system, strict=True):
        found = [intervals.get(measure.name) for measure in shown]
        cells.append(
            [system, bitrates.get(system, "–")]
            + [
                "–" if each is None else f"{each.value * measure.scale:.{measure.decimals}f}"
                for each, measure in zip(found, shown, strict=True)
            ]
        )
    titles = [f"{measure.title} {'↑' if measure.higher else '↓'}" for measure in shown]
    return Table(["system", "bit/s", *titles], cells)


def pairs(findings: Findings) -> list[tuple[Measured, str, dict[str, Any]]]:
    """(ours, the other's name, its values): each of our codecs at its highest bitrate against the
    original, and against every peer at the highest bitrate of ours that is not above the peer's."""
    found: list[tuple[Measured, str, dict[str, Any]]] = []
    for codec in findings.codecs:
        ours = sorted(
            (m for m in findings.measured if m.ours and m.setting.family == codec.name),
            key=lambda m: m.setting.bitrate,
        )
        if findings.original:
            found.append((ours[-1], ORIGINAL, findings.original))
        for peer in findings.measured:
            limit = peer.setting.bitrate * _SAME_BITRATE
            below = [m for m in ours if m.setting.bitrate <= limit]
            if not peer.ours and below:
                found.append((below[-1], peer.setting.name, dict(peer.values)))
    return found


def all_margins(findings: Findings) -> list[dict[str, Any]]:
    """Ours minus the other, paired by clip, with intervals; positive `better` where ours is."""
    margins = []
    for ours, other, values in pairs(findings):
        for measure in MEASURES:
            if measure.name not in values or measure.name not in ours.values:
                continue
            difference = ours.values[measure.name].minus(values[measure.name])
            found = interval_of(findings, difference)
            if found is None:
                continue
            margins.append(
                {
                    "system": ours.setting.name,
                    "bitrate": ours.bitrate,
                    "other": other,
                    "name": measure.name,
                    "unit": measure.unit,
                    "difference": found.value,
                    "low": found.low,
                    "high": found.high,
                    "n": found.n,
                    "better": bool((found.value > 0) == measure.higher and found.value != 0),
                }
            )
    return margins


def margin_table(margins: Sequence[dict[str, Any]]) -> Table:
    """One line a pair: ours minus the other."""
    names = {entry["name"] for entry in margins}
    shown = [measure for measure in MEASURES if measure.in_table and measure.name in names]
    by_pair: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for entry in margins:
        by_pair.setdefault((entry["system"], entry["other"]), {})[entry["name"]] = entry
    cells = [
        [f"{ours} − {other}"] + [_margin_cell(entries.get(each.name), each) for each in shown]
        for (ours, other), entries in by_pair.items()
    ]
    titles = [f"{measure.title} {'↑' if measure.higher else '↓'}" for measure in shown]
    caption = (
        "Differences on the same clips, with 95% intervals: of each codec at its highest bitrate "
        "to the original, and to each other codec at our highest bitrate that is not above that "
        "codec's."
    )
    return Table(["ours − other", *titles], cells, caption)


def _margin_cell(entry: dict[str, Any] | None, measure: Measure) -> str:
    if entry is None:
        return "–"

    def text(value: float) -> str:
        return f"{value * measure.scale:+.{measure.decimals}f}".replace("-", "−")

    if entry["low"] is None:
        return text(entry["difference"])
    return f"{text(entry['difference'])} [{text(entry['low'])}, {text(entry['high'])}]"


def comparisons(findings: Findings) -> list[Comparison]:
    """The log-mel distance of each codec at its highest bitrate against what needs no learning."""
    found = []
    name = "log_mel_distance"
    for codec in findings.codecs:
        ours = [m for m in findings.measured if m.ours and m.setting.family == codec.name][-1]
        for baseline, title in ((SILENCE, SILENCE), (MEAN_SPECTRUM, "mean training spectrum")):
            theirs = findings.baselines.get(baseline, {}).get(name)
            if theirs is None:
                continue
            margin = interval_of(findings, theirs.minus(ours.values[name]))
            found.append(
                Comparison.of(
                    "soundstream",
                    name,
                    ours.setting.name,
                    title,
                    interval_of(findings, ours.values[name]).value,
                    interval_of(findings, theirs).value,
                    "nats",
                    higher_is_better=False,
                    low=margin.low,
                    high=margin.high,
                    n=margin.n,
                )
            )
    return found


def describe(findings: Findings) -> dict[str, Any]:
    """What was measured, in numbers."""
    clips = findings.clips
    return {
        "clips": len(clips),
        "clips_with_transcript": sum(clip.text is not None for clip in clips),
        "seconds": round(sum(len(clip.audio) for clip in clips) / findings.rate, 2),
        "speakers": len({clip.speaker for clip in clips}),
        "documents": len({clip.document for clip in clips}),
        "intervals_over": findings.group_kind,
        "sample_rate": findings.rate,
        "skipped": findings.skipped,
    }


def explanation(findings: Findings) -> str:
    """What was measured, and what was left out and how to get it."""
    material = describe(findings)
    text = (
        f"{material['clips']} clips ({material['seconds'] / 60:.1f} min) of "
        f"{material['speakers']} speakers, {material['clips_with_transcript']} with a transcript; "
        f"intervals are over {findings.group_kind}. Bitrates are those of the streams. "
        "Definitions: speechssm/evaluation/README.md."
    )
    skipped = [f"{count} {what}" for what, count in findings.skipped.items()]
    skipped += [reason for _, reason in sorted(findings.left_out.items())]
    if SILENCE in findings.baselines and MEAN_SPECTRUM not in findings.baselines:
        skipped.append("mean spectrum: there is no other speech to take it from; name it with fit=")
    if "word_error" in findings.original and not material["clips_with_transcript"]:
        skipped.append("word error: no clip has a transcript")
    if skipped:
        text += "\n\nLeft out:\n\n" + "\n".join(f"- {entry}" for entry in skipped)
    return text


def draw(findings: Findings, out: Path) -> None:
    """A rate-quality plot for each measure that has values: `rate_MEASURE.svg`."""
    for measure in MEASURES:
        by_family: dict[str, list[tuple[float, Interval]]] = {}
        for each in findings.measured:
            found = interval_of(findings, each.values.get(measure.name))
            if found is not None:
                by_family.setdefault(each.setting.family, []).append((each.bitrate, found))
        if not by_family:
            continue
        curves = []
        for colour, (family, points) in enumerate(by_family.items()):
            points.sort(key=lambda point: point[0])
            scaled = [[_scaled(found, field, measure) for _, found in points]
                      for field in ("value", "low", "high")]  # fmt: skip
            rates = [bitrate / 1000 for bitrate, _ in points]
            curves.append(Line(family, rates, *scaled, colour=colour, markers=True))
        original = interval_of(findings, findings.original.get(measure.name))
        drawing = plot_rate_quality(
            curves,
            f"{measure.title} ({'higher' if measure.higher else 'lower'} is better)",
            original=None if original is None else original.value * measure.scale,
        )
        save_figure(drawing, out / f"rate_{measure.name}.svg")


def _scaled(found: Interval, field: str, measure: Measure) -> float | None:
    value = getattr(found, field)
    return None if value is None else value * measure.scale
