"""What an evaluation of tokenizers writes: rows, one wide table, comparisons and plots."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speechssm.evaluation.results import write_results
from speechssm.evaluation.statistics import Interval
from speechssm.evaluation.tokenizer.findings import Findings, Measured
from speechssm.evaluation.tokenizer.phones import pnmi_margin
from speechssm.evaluation.tokenizer.robustness import UNRELATED
from speechssm.evaluation.tokenizer.speakers import accuracy_margin
from speechssm.report.plots import Line, plot_dots, plot_lines
from speechssm.report.rows import Comparison, Row
from speechssm.report.style import save_figure
from speechssm.report.tables import Table

LOG_MEL = "log-mel statistics"
CHANCE = "chance"
# By seconds of the pieces.
SPEAKER_ROWS = {10.0: "speaker_accuracy", 3.0: "speaker_accuracy_3s"}


def least_perplexity(vocab_size: int) -> float:
    """Below this a tokenizer counts as collapsed: 64, or a quarter of a small vocabulary."""
    return min(64.0, vocab_size / 4)


@dataclass(frozen=True)
class Column:
    """A column of the wide table. `higher` is better: True, False, or None for neither."""

    row: str
    title: str
    higher: bool | None = None
    decimals: int = 3


COLUMNS = (
    Column("vocabulary", "V", None, 0),
    Column("unit_rate", "Hz", None, 1),
    Column("bitrate", "bit/s", None, 0),
    Column("unit_perplexity", "perplexity", None, 0),
    Column("used_units", "used", None, 2),
    Column("phone_pnmi", "PNMI", True),
    Column("phone_pnmi_shuffled", "shuffled", None),
    Column("phone_pnmi_across_speakers", "PNMI, other speakers", True),
    Column("phone_purity", "phone purity", True),
    Column("phone_cluster_purity", "cluster purity", True),
    Column("text_pnmi", "text PNMI", True),
    Column("text_pnmi_shuffled", "text shuffled", None),
    Column("speaker_accuracy", "speaker", False),
    Column("speaker_accuracy_3s", "speaker, 3 s", False),
    Column("word_error", "WER of units", False),
    Column("head_word_error", "WER of head", None),
    Column("unit_edit_distance", "edit distance", False),
    Column("window_agreement", "windows agree", True),
    Column("end_told_silence", "end told, silence", False),
    Column("end_told_repeat", "end told, repeat", False),
    Column("end_told_silence_by_histogram", "by histogram, silence", False),
    Column("end_told_repeat_by_histogram", "by histogram, repeat", False),
)


@dataclass
class Sheet:
    """Rows as they come, with what they all have in common."""

    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        system: str,
        name: str,
        unit: str,
        value: Interval | float,
        n: int | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        low = high = None
        if isinstance(value, Interval):
            value, low, high, n = value
        self.rows.append(
            Row(name, system, "heldout", float(value), unit, low, high, n, **(details or {}))
        )

    def value(self, system: str, name: str) -> Row | None:
        return next((row for row in self.rows if row.system == system and row.name == name), None)


def write(findings: Findings, out: Path) -> list[Row]:
    """Write metrics.json, table.md and the plots; returns the rows."""
    sheet = Sheet()
    for system in findings.systems:
        add_rows(sheet, system, findings)
    for seconds, measure in findings.log_mel_speakers.items():
        name = SPEAKER_ROWS[seconds]
        sheet.add(LOG_MEL, name, "share", measure.accuracy)
        sheet.add(CHANCE, name, "share", measure.chance, len(measure.speakers))
    names = [system.candidate.name for system in findings.systems]
    table = wide_table(sheet, [*names, LOG_MEL, CHANCE])
    sections: dict[str, Any] = {"material": findings.material, "notes": findings.notes}
    if findings.alignments is not None:
        sections["aligner"] = findings.alignments.aligner
        sections["alignments"] = findings.alignments.counts
    sections["unit_counts"] = {
        system.candidate.name: system.units.counts.tolist()
        for system in findings.systems
        if system.units is not None
    }
    sections["recognition"] = {
        system.candidate.name: {
            "fit_hours": system.recognition.fit_hours,
            "curve": system.recognition.curve,
            "chosen_step": system.recognition.chosen_step,
            "parameters": system.recognition.parameters,
            "utterances": system.recognition.errors.utterances,
            "words": system.recognition.errors.words,
        }
        for system in findings.systems
        if system.recognition is not None
    }
    sections["window_agreement"] = agreement_curves(findings.systems)
    write_results(
        out,
        sheet.rows,
        comparisons=comparisons(sheet, findings),
        title="Tokenizers on held-out recordings",
        sections=sections,
        preface=f"{table.markdown()}\n\n{explanation(findings)}\n\n## All numbers\n\n",
    )
    draw(findings, sheet, out)
    return sheet.rows


def add_rows(sheet: Sheet, system: Measured, findings: Findings) -> None:
    """The rows of one system."""
    candidate = system.candidate
    details = dict(candidate.details)

    def add(name: str, unit: str, value: Interval | float, n: int | None = None) -> None:
        sheet.add(candidate.name, name, unit, value, n, details)

    documents = findings.material["documents"]
    add("vocabulary", "units", candidate.tokenizer.vocab_size)
    add("unit_rate", "units/s", candidate.tokenizer.rate)
    if system.units is not None:
        found = system.units
        add("unit_perplexity", "units", found.perplexity)
        add("used_units", "share", found.used, documents)
        add("dead_codes", "units", found.dead, documents)
        add("unigram_entropy", "nats/unit", found.unigram_entropy)
        add("bigram_entropy", "nats/unit", found.bigram_entropy, documents)
        add("bitrate", "bit/s", found.bitrate)
        add("nominal_bitrate", "bit/s", found.nominal_bitrate)
    if candidate.masked_prediction is not None:
        loss, unigram = candidate.masked_prediction
        add("masked_prediction", "nats/target", loss)
        sheet.add(unigram_name(candidate.name), "masked_prediction", "nats/target", unigram)
    if system.phones is not None:
        kind, found = label_kind(findings), system.phones
        add(f"{kind}_pnmi", "share", found.pnmi)
        add(f"{kind}_pnmi_shuffled", "share", found.shuffled_pnmi)
        if found.across_speakers is not None:
            add(f"{kind}_pnmi_across_speakers", "share", found.across_speakers)
        add(f"{kind}_purity", "share", found.phone_purity)
        add(f"{kind}_purity_shuffled", "share", found.shuffled_purity)
        add(f"{kind}_cluster_purity", "share", found.cluster_purity)
        add(f"{kind}_frames", "units", found.frames, found.pnmi.n)
    for seconds, measure in system.speakers.items():
        add(SPEAKER_ROWS[seconds], "share", measure.accuracy)
    if system.recognition is not None:
        add("word_error", "share", system.recognition.errors.word_error)
        add("character_error", "share", system.recognition.errors.character_error)
    if system.head is not None:
        add("head_word_error", "share", system.head.word_error)
        add("head_character_error", "share", system.head.character_error)
    if system.robustness is not None:
        distances = system.robustness.distances
        changes = [name for name in distances if name != UNRELATED]
        if changes:
            mean = float(np.mean([distances[name].value for name in changes]))
            add("unit_edit_distance", "edits/unit", mean, distances[changes[0]].n)
        for name, interval in distances.items():
            add(f"unit_edit_distance_{name}", "edits/unit", interval)
    for found in system.window_agreement or []:
        name = "window_agreement"
        if found is not system.window_agreement[0]:
            name += f"_overlap_{found.overlap_seconds:g}s"
        add(name, "share", found.agreement)
    for found in system.end_of_recording or []:
        add(f"end_told_{found.padding}", "share", found.last_units.balanced_accuracy)
        add(f"end_told_{found.padding}_area", "share", found.last_units.area_under_curve)
        add(f"end_told_{found.padding}_by_histogram", "share", found.histogram.balanced_accuracy)
        add(f"end_units_differing_{found.padding}", "share", found.differing)


def label_kind(findings: Findings) -> str:
    """What rows call the labels: `phone`, or `text` where a recognition head aligned."""
    aligner = findings.alignments.aligner if findings.alignments else ""
    return "text" if aligner.startswith("CTC") else "phone"


def unigram_name(name: str) -> str:
    return f"{name}: targets' unigram"


def wide_table(sheet: Sheet, systems: Iterable[str]) -> Table:
    """Systems as rows, measures as columns; columns and systems without numbers are left out."""
    systems = [name for name in systems if any(row.system == name for row in sheet.rows)]
    columns = [
        column for column in COLUMNS if any(sheet.value(name, column.row) for name in systems)
    ]
    arrows = {True: " ↑", False: " ↓", None: ""}
    cells = []
    for name in systems:
        found = [sheet.value(name, column.row) for column in columns]
        cells.append(
            [name]
            + [
                "–" if row is None or row.value is None else f"{row.value:.{column.decimals}f}"
                for row, column in zip(found, columns, strict=True)
            ]
        )
    return Table(["system", *(column.title + arrows[column.higher] for column in columns)], cells)


def explanation(findings: Findings) -> str:
    """What was measured, by what, and what was left out."""
    material = findings.material
    lines = [
        f"{material['hours'] * 60:.1f} min of {material['speakers']} speakers in "
        f"{material['documents']} recordings. Definitions: speechssm/evaluation/README.md."
    ]
    frames = [system.phones.frames for system in findings.systems if system.phones]
    if findings.alignments and frames:
        counts = findings.alignments.counts
        lines.append(
            f"Labels by {findings.alignments.aligner}: "
            + ", ".join(
                f"{value:.0f} {name}"
                if name.startswith("seconds")
                else f"{value} utterances {name}"
                for name, value in counts.items()
            )
            + f"; {min(frames)} to {max(frames)} units counted. PNMI and purity err upwards, the "
            "more so the larger the vocabulary: `shuffled` is what is left of PNMI when units are "
            "permuted within their utterance."
        )
    if material["left_out"]:
        lines.append(
            "Left out: "
            + "; ".join(f"{count} {what}" for what, count in material["left_out"].items())
            + "."
        )
    return "\n\n".join([*lines, *findings.notes])


def comparisons(sheet: Sheet, findings: Findings) -> list[Comparison]:
    """Each system against what needs no learning, and against log-mel k-means where it is there."""
    found: list[Comparison] = []
    baseline = next((s for s in findings.systems if s.candidate.is_log_mel_baseline), None)

    def compare(
        name: str, system: str, other: str, ours: float, theirs: float, unit: str, higher: bool,
        margin: Interval | None = None,
    ) -> None:  # fmt: skip
        found.append(
            Comparison.of(
                "tokenizer",
                name,
                system,
                other,
                ours,
                theirs,
                unit,
                higher_is_better=higher,
                low=margin.low if margin else None,
                high=margin.high if margin else None,
                n=margin.n if margin else None,
            )
        )

    for system in findings.systems:
        name = system.candidate.name
        if system.units is not None:
            least = least_perplexity(system.candidate.tokenizer.vocab_size)
            compare(
                "unit_perplexity", name, f"no collapse (at least {least:g})",
                system.units.perplexity.value, least, "units", True,
            )  # fmt: skip
        if system.candidate.masked_prediction is not None:
            loss, unigram = system.candidate.masked_prediction
            compare("masked_prediction", name, "unigram", loss, unigram, "nats/target", False)
        if system.phones is not None:
            found_phones = system.phones
            compare(
                f"{label_kind(findings)}_pnmi", name, "units shuffled",
                found_phones.pnmi.value, found_phones.shuffled_pnmi.value, "share", True,
            )  # fmt: skip
        if baseline is None or system is baseline:
            continue
        for column in COLUMNS:
            ours = sheet.value(name, column.row)
            theirs = sheet.value(baseline.candidate.name, column.row)
            if column.higher is None or ours is None or theirs is None:
                continue
            margin = None
            if column.row.endswith("_pnmi") and system.phones and baseline.phones:
                margin = pnmi_margin(system.phones, baseline.phones)
            for seconds, row in SPEAKER_ROWS.items():
                if column.row == row:
                    margin = accuracy_margin(system.speakers[seconds], baseline.speakers[seconds])
            compare(
                column.row, name, baseline.candidate.name, ours.value, theirs.value, ours.unit,
                column.higher, margin,
            )  # fmt: skip
    return found


def agreement_curves(systems: Sequence[Measured]) -> list[dict[str, Any]]:
    """Agreement of windowed units by distance from the cut: one curve per system and overlap."""
    return [
        {
            "system": system.candidate.name,
            "overlap_seconds": found.overlap_seconds,
            "window_seconds": found.window_seconds,
            "longest_seconds": found.longest_seconds,
            "start_s": [each.start for each in found.bins],
            "stop_s": [each.stop for each in found.bins],
            "y": [each.agreement.value for each in found.bins],
            "low": [each.agreement.low for each in found.bins],
            "high": [each.agreement.high for each in found.bins],
        }
        for system in systems
        for found in system.window_agreement or []
    ]


def draw(findings: Findings, sheet: Sheet, out: Path) -> None:
    """The plots, each only where it has something to show."""
    lines = []
    for colour, system in enumerate(findings.systems):
        if system.units is not None:
            share = system.units.counts / system.units.counts.sum()
            lines.append(
                Line(system.candidate.name, np.arange(1, len(share) + 1), share, colour=colour)
            )
    if lines:
        drawing = plot_lines(lines, "units by frequency", "share of all units", log_y=True)
        save_figure(drawing, out / "units.svg")
    dots = {
        f"{label_kind(findings)}_pnmi": "I(label; unit) / H(label), higher is better",
        "speaker_accuracy": "speakers recognised in pieces of 10 s, lower is better",
        "speaker_accuracy_3s": "speakers recognised in pieces of 3 s, lower is better",
        "word_error": "word error of a recogniser trained on the units, lower is better",
        "unit_edit_distance": "edits per unit when the recording changes, lower is better",
    }
    for name, label in dots.items():
        rows = [row for row in sheet.rows if row.name == name and row.value is not None]
        if rows:
            drawing = plot_dots(
                [row.system for row in rows],
                [row.value for row in rows],
                [row.low for row in rows],
                [row.high for row in rows],
                label,
                colours=[-1 if row.system in (LOG_MEL, CHANCE) else 0 for row in rows],
            )
            save_figure(drawing, out / f"{name}.svg")
    agreement = [
        Line(
            f"{system.candidate.name}, overlap {found.overlap_seconds:g} s",
            [each.start for each in found.bins],
            [each.agreement.value for each in found.bins],
            colour=colour,
            dashed=found is not system.window_agreement[0],
            markers=True,
        )
        for colour, system in enumerate(findings.systems)
        for found in system.window_agreement or []
    ]
    if agreement:
        drawing = plot_lines(
            agreement, "seconds from the nearest cut, at least", "share of equal units"
        )
        save_figure(drawing, out / "window_agreement.svg")
