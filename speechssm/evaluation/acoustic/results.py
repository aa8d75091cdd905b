"""What an evaluation of resynthesis writes: rows, compact tables, limits, curves and plots."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechssm.evaluation.acoustic.listening import (
    CODEC,
    RECORDINGS,
    STRANGERS,
    SYSTEMS,
    Listener,
)
from speechssm.evaluation.acoustic.options import Options
from speechssm.evaluation.acoustic.plots import SCORES, SEAM_MEASURES, curves_over_time, draw
from speechssm.evaluation.acoustic.readings import OWN, Reading, Voice
from speechssm.evaluation.acoustic.seams import SeamDifference, seam_differences
from speechssm.evaluation.acoustic.summary import (
    Drift,
    drift,
    mean_over_voices,
    word_error,
)
from speechssm.evaluation.results import write_results
from speechssm.evaluation.statistics import Interval, grouped_mean
from speechssm.report.rows import Comparison, Row
from speechssm.report.tables import Table

# What a voice that is held, and a joint that cannot be heard, look like.
LEAST_SIMILARITY, MOST_DRIFT, LEAST_RANKED_FIRST = 0.80, 0.02, 0.90
SEAM_LIMITS = {"distillmos": 0.1, "speaker_similarity": 0.02}


@dataclass(frozen=True)
class Spoken:
    """What there is beside the judges' words.

    Attributes:
        skipped: how much was left out, by reason.
        missing: judges that are not there, with the reason.
    """

    voices: Sequence[Voice]
    readings: Sequence[Reading]
    skipped: Counter[str]
    missing: Mapping[str, str]


@dataclass(frozen=True)
class SystemFigures:
    """Everything that is known of one system over time."""

    name: str
    similarity: Interval | None
    similarity_drift: Drift | None
    ranked_first: Interval | None
    scores: Mapping[str, Interval]
    distillmos_drift: Drift | None
    word_error: Mapping[str, tuple[Interval, int]]


@dataclass(frozen=True)
class Limit:
    """A figure beside the most or least that it may be."""

    name: str
    system: str
    value: float
    limit: float
    at_least: bool
    scope: str

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "holds": self.holds}


@dataclass
class _Sheet:
    """Rows as they come."""

    details: Mapping[str, object]
    rows: list[Row] = field(default_factory=list)

    def add(self, name: str, system: str, unit: str, value: Interval, ours: bool) -> None:
        details = self.details if ours else {}
        self.rows.append(
            Row(name, system, "heldout", value.value, unit, value.low, value.high, value.n,
                **details)
        )  # fmt: skip


def write(
    spoken: Spoken,
    listener: Listener,
    options: Options,
    out: Path,
    seed: int,
    details: Mapping[str, object],
) -> list[Row]:
    """Write metrics.json, table.md and the plots into `out`; returns the rows."""
    ours = [
        SYSTEMS[text] for text in SYSTEMS if text in {reading.text for reading in spoken.readings}
    ]
    planned = options.minutes * 60
    figures = [_figures(name, listener, planned, seed) for name in (*ours, CODEC, RECORDINGS)]
    strangers = listener.strangers()
    floor = None
    if strangers:
        floor = grouped_mean(list(strangers.values()), list(strangers), seed=seed)
    seams = {
        name: seam_differences([entry for entry in listener.seams if entry.system == name], seed)
        for name in dict.fromkeys(entry.system for entry in listener.seams)
    }
    sheet = _Sheet(details)
    for each in figures:
        _add_figures(sheet, each, each.name in ours)
    if floor is not None:
        sheet.add("speaker_similarity", STRANGERS, "cosine", floor, False)
    for name, measures in seams.items():
        for measure, found in measures.items():
            unit = SEAM_MEASURES[measure][1]
            sheet.add(f"seam_{measure}", name, unit, found.difference, name != RECORDINGS)
    limits = _limits([each for each in figures if each.name in ours], seams, spoken, options)
    tables = [_systems_table(figures, floor).markdown()]
    if seams:
        tables.append("## Joints of windows\n\n" + _seams_table(seams).markdown())
    if limits:
        tables.append("## Against the limits\n\n" + _limits_table(limits).markdown())
    voices = _voices(spoken, listener)
    if strangers:
        tables.append("## Voices\n\n" + _voices_table(voices).markdown())
    text = "\n\n".join([tables[0], _explanation(spoken, listener, options), *tables[1:]])
    curves = curves_over_time(listener, [*ours, CODEC, RECORDINGS], options, seed)
    write_results(
        out,
        sheet.rows,
        comparisons=_comparisons(figures, ours, listener, strangers, seed),
        title="SoundStorm over minutes: held-out recordings spoken again",
        preface=f"{text}\n\n## All numbers\n\n",
        sections={
            "skipped": dict(spoken.skipped),
            "judges_missing": dict(spoken.missing),
            "limits": [limit.to_dict() for limit in limits],
            "seams": {
                name: {
                    measure: {
                        "joint": found.joint,
                        "centre": found.centre,
                        "difference": found.difference.value,
                        "low": found.difference.low,
                        "high": found.difference.high,
                        "joints": found.joints,
                        "documents": found.difference.n,
                    }
                    for measure, found in measures.items()
                }
                for name, measures in seams.items()
            },
            "voices": voices,
            "curves": curves,
            "minutes": options.minutes,
        },
    )
    draw(curves, seams, floor, out)
    return sheet.rows


def _figures(name: str, listener: Listener, planned: float, seed: int) -> SystemFigures:
    heard = listener.heard_of(name)
    scores = {score: mean_over_voices(heard, score, seed) for score in SCORES}
    words = [entry for entry in listener.words if entry.system == name]
    errors = {kind: word_error(words, kind, seed) for kind in ("to_transcript", "to_recording")}
    return SystemFigures(
        name,
        mean_over_voices(heard, "similarity", seed),
        drift(heard, "similarity", planned, seed),
        mean_over_voices(heard, "ranked_first", seed),
        {score: value for score, value in scores.items() if value is not None},
        drift(heard, "distillmos", planned, seed),
        {kind: value for kind, value in errors.items() if value is not None},
    )


def _add_figures(sheet: _Sheet, figures: SystemFigures, ours: bool) -> None:
    def add(name: str, unit: str, value: Interval) -> None:
        sheet.add(name, figures.name, unit, value, ours)

    def add_drift(name: str, unit: str, value: Drift) -> None:
        add(f"{name}_first_minute", unit, value.first)
        add(f"{name}_last_minute", unit, value.last)
        add(f"{name}_drift", unit, value.difference)

    if figures.similarity is not None:
        add("speaker_similarity", "cosine", figures.similarity)
    if figures.similarity_drift is not None:
        add_drift("speaker_similarity", "cosine", figures.similarity_drift)
    if figures.ranked_first is not None:
        add("speaker_ranked_first", "share", figures.ranked_first)
    for score, value in figures.scores.items():
        add(score, "MOS", value)
    if figures.distillmos_drift is not None:
        add_drift("distillmos", "MOS", figures.distillmos_drift)
    for kind, name in (
        ("to_transcript", "word_error"),
        ("to_recording", "word_error_to_recording"),
    ):
        if kind in figures.word_error:
            add(name, "share", figures.word_error[kind][0])


def _systems_table(figures: Sequence[SystemFigures], floor: Interval | None) -> Table:
    """One line a system; columns that nobody has are left out."""
    columns: dict[str, list[str]] = {}

    def cell(title: str, value: Interval | None, digits: int) -> None:
        text = "–" if value is None else f"{value.value:.{digits}f}"
        columns.setdefault(title, []).append(text)

    for each in figures:
        move = each.similarity_drift
        cell("similarity ↑", each.similarity, 3)
        cell("first minute", move.first if move else None, 3)
        cell("last minute", move.last if move else None, 3)
        columns.setdefault("drift", []).append(_signed(move.difference if move else None, 3))
        cell("ranked first ↑", each.ranked_first, 2)
        for score in ("distillmos", "dnsmos_overall"):
            cell(f"{SCORES[score]} ↑", each.scores.get(score), 2)
        move = each.distillmos_drift
        text = _signed(move.difference if move else None, 2)
        columns.setdefault("DistillMOS drift", []).append(text)
        for kind, title in (("to_transcript", "WER ↓"), ("to_recording", "WER to recording ↓")):
            found = each.word_error.get(kind)
            cell(title, found[0] if found else None, 3)
    names = [each.name for each in figures]
    if floor is not None:
        names.append(STRANGERS)
        for title, cells in columns.items():
            cells.append(f"{floor.value:.3f}" if title == "similarity ↑" else "–")
    kept = {title: cells for title, cells in columns.items() if set(cells) != {"–"}}
    lines = [[name, *(cells[row] for cells in kept.values())] for row, name in enumerate(names)]
    lines = [line for line in lines if set(line[1:]) - {"–"}]
    return Table(["system", *kept], lines)


def _signed(value: Interval | None, digits: int) -> str:
    """`+0.012 [-0.003, +0.027]`, or a dash."""
    if value is None:
        return "–"
    text = f"{value.value:+.{digits}f}"
    if value.low is None:
        return text
    return f"{text} [{value.low:+.{digits}f}, {value.high:+.{digits}f}]"


def _seams_table(seams: Mapping[str, Mapping[str, SeamDifference]]) -> Table:
    lines = []
    for name, measures in seams.items():
        for measure, found in measures.items():
            difference = found.difference
            lines.append(
                [
                    SEAM_MEASURES[measure][0],
                    name,
                    f"{found.joint:.3f}",
                    f"{found.centre:.3f}",
                    _signed(difference, 3),
                    str(found.joints),
                    str(difference.n),
                ]
            )
    lines.sort(key=lambda line: [title for title, _ in SEAM_MEASURES.values()].index(line[0]))
    return Table(
        ["measure", "joined by", "joint", "centre", "joint − centre", "joints", "documents"],
        lines,
        numeric=[False, False, True, True, True, True, True],
    )


def _limits(
    figures: Sequence[SystemFigures],
    seams: Mapping[str, Mapping[str, SeamDifference]],
    spoken: Spoken,
    options: Options,
) -> list[Limit]:
    """What can be said of the limits: values for voices, for joints the whole interval."""
    limits = []
    for each in figures:
        if each.similarity is not None:
            scope = f"{each.similarity.n} voices of {options.minutes:g} min"
            limits.append(Limit("mean similarity to the prompt", each.name,
                                each.similarity.value, LEAST_SIMILARITY, True, scope))  # fmt: skip
        if each.similarity_drift is not None:
            difference = each.similarity_drift.difference
            scope = f"{difference.n} voices of {options.minutes:g} min"
            limits.append(Limit("|last minute − first| of similarity", each.name,
                                abs(difference.value), MOST_DRIFT, False, scope))  # fmt: skip
        if each.ranked_first is not None:
            scope = f"{each.ranked_first.n} of {len(spoken.voices)} voices"
            limits.append(Limit("true speaker ranked first", each.name, each.ranked_first.value,
                                LEAST_RANKED_FIRST, True, scope))  # fmt: skip
    for name, measures in seams.items():
        for measure, most in SEAM_LIMITS.items():
            found = measures.get(measure)
            if name == RECORDINGS or found is None or found.difference.low is None:
                continue
            reach = max(abs(found.difference.low), abs(found.difference.high))
            title = f"{SEAM_MEASURES[measure][0]}, |joint − centre|, end of the interval"
            limits.append(Limit(title, name, reach, most, False, f"{found.joints} joints"))
    return limits


def _limits_table(limits: Sequence[Limit]) -> Table:
    lines = [
        [
            limit.name,
            limit.system,
            f"{limit.value:.3f}",
            f"{'≥' if limit.at_least else '≤'} {limit.limit:g}",
            "✓" if limit.holds else "✗",
            limit.scope,
        ]
        for limit in limits
    ]
    columns = ["figure", "system", "measured", "limit", "holds", "on"]
    return Table(columns, lines, numeric=[False, False, True, True, False, False])


def _voices(spoken: Spoken, listener: Listener) -> list[dict[str, Any]]:
    """Per voice: its own speech, how often each text was said, and the means of its spans."""
    found = []
    for voice in spoken.voices:
        entry: dict[str, Any] = {
            "voice": voice.name,
            "own_seconds": round(voice.seconds, 1),
            "rounds": {
                reading.text: round(reading.rounds, 2)
                for reading in spoken.readings
                if reading.voice is voice
            },
            "systems": {},
        }
        for name in (*SYSTEMS.values(), CODEC, RECORDINGS):
            heard = listener.heard_of(name, voice.name)
            means = {
                measure: mean_over_voices(heard, measure, 0)
                for measure in ("similarity", "ranked_first", "distillmos")
            }
            entry["systems"][name] = {
                measure: round(mean.value, 4) for measure, mean in means.items() if mean
            }
        found.append(entry)
    return found


def _voices_table(voices: Sequence[Mapping[str, Any]]) -> Table:
    shown = [*SYSTEMS.values(), RECORDINGS]
    lines = []
    for entry in voices:
        cells = []
        for name in shown:
            found = entry["systems"][name]
            cell = f"{found['similarity']:.3f}" if "similarity" in found else "–"
            if "ranked_first" in found:
                cell += f" ({found['ranked_first']:.2f})"
            cells.append(cell)
        rounds = ", ".join(f"{text} {count:g}" for text, count in entry["rounds"].items())
        lines.append([entry["voice"], f"{entry['own_seconds']:.0f}", rounds, *cells])
    columns = ["voice", "own speech, s", "times that texts are said", *shown]
    return Table(columns, lines, "Similarity, and in brackets the share of spans ranked first.")


def _explanation(spoken: Spoken, listener: Listener, options: Options) -> str:
    """What was spoken and measured, by what, and what was left out."""
    own = {reading.voice.name: reading for reading in spoken.readings if reading.text == OWN}
    again = sum(reading.rounds > 1 for reading in spoken.readings)
    seconds = sum(reading.seconds for reading in spoken.readings)
    lines = [
        f"{len(spoken.readings)} readings of {options.minutes:g} min ({seconds / 60:.0f} min in "
        f"all) with {len(spoken.voices)} held-out voices, each out of 3 s of a recording that are "
        f"spoken nowhere else; {len(own)} voices say their own recordings again."
    ]
    if again:
        lines[0] += f" {again} readings are longer than their recordings, which then begin again."
    kinds = {
        kind: sum(getattr(entry, kind)[1] for entry in listener.words
                  if entry.system == CODEC and getattr(entry, kind) is not None)
        for kind in ("to_transcript", "to_recording")
    }  # fmt: skip
    if any(kinds.values()):
        lines.append(
            f"WER: against transcripts ({kinds['to_transcript']} words), and against what the same "
            f"recogniser hears in the recordings themselves ({kinds['to_recording']} words); of "
            "voices with their own text."
        )
    for reason in spoken.missing.values():
        lines.append(f"Left out: {reason}.")
    if spoken.skipped:
        lines.append(
            "Skipped: "
            + "; ".join(f"{count} {what}" for what, count in sorted(spoken.skipped.items()))
            + "."
        )
    lines.append("Definitions: speechssm/evaluation/README.md.")
    return "\n\n".join(lines)


def _comparisons(
    figures: Sequence[SystemFigures],
    ours: Sequence[str],
    listener: Listener,
    strangers: Mapping[str, float],
    seed: int,
) -> list[Comparison]:
    """Is the voice nearer to its prompt than strangers are? Paired by voice."""
    found = []
    for each in figures:
        if each.name not in ours or each.similarity is None or not strangers:
            continue
        voices, margins = [], []
        for voice, floor in strangers.items():
            heard = listener.heard_of(each.name, voice)
            mean = mean_over_voices(heard, "similarity", seed)
            if mean is not None:
                voices.append(voice)
                margins.append(mean.value - floor)
        if not voices:
            continue
        margin = grouped_mean(margins, voices, seed=seed)
        found.append(
            Comparison.of(
                "soundstorm", "speaker_similarity", each.name, STRANGERS, each.similarity.value,
                each.similarity.value - margin.value, "cosine", higher_is_better=True,
                low=margin.low, high=margin.high, n=margin.n,
            )
        )  # fmt: skip
    return found
