"""The sections of a report, each from what was found in the folder. What is missing is said."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from speechssm.report.blocks import (
    Block,
    Chart,
    Commands,
    Fact,
    Facts,
    Folded,
    Missing,
    Section,
    Sound,
    Sounds,
    Text,
)
from speechssm.report.figures import (
    loss_figure,
)
from speechssm.report.gather import Folder, Results, Run, run_labels
from speechssm.report.listening import duration, place_sound
from speechssm.report.rows import Comparison, Row
from speechssm.report.tables import (
    Table,
    comparisons_table,
    format_number,
    minutes,
    rows_table,
    signed,
)

STAGE_TITLES = {
    "tokenizer": "Semantic tokenizer",
    "soundstream": "SoundStream codec",
    "soundstorm": "SoundStorm",
    "lm": "Language model",
}
STAGE_PURPOSE = {
    "tokenizer": "Turns sound into 25 units a second that keep what is said and little of the "
    "voice. It learns to predict masked stretches of speech, and on transcribed recordings the "
    "text, through a bottleneck of discrete units.",
    "soundstream": "Writes sound as 50 frames of codes a second and plays them back. The loss is "
    "the generator's, which trains against discriminators, so it need not fall steadily.",
    "soundstorm": "Fills in a voice's codes from units and a few seconds of that voice. It learns "
    "to predict masked codes, level by level.",
    "lm": "Continues units without end, out of a state of fixed size.",
}
METRIC_NAMES = {
    "tokenizer": "unit_perplexity",
    "soundstream": "log_mel_distance",
    "soundstorm": "nats_per_code",
}
MAKE = {
    "tokenizer": "speechssm train stage=tokenizer",
    "soundstream": "speechssm train stage=soundstream",
    "soundstorm": "speechssm train stage=soundstorm",
    "lm": "speechssm train stage=lm",
    "unit_perplexity": "speechssm evaluate tokenizer",
    "log_mel_distance": "speechssm evaluate codec",
    "nats_per_code": "speechssm evaluate acoustic",
    "nats_per_unit": "speechssm evaluate likelihood",
    "memory_slope": "speechssm bench pipeline",
    "sweep": "speechssm train -m experiment=sequence_length",
    "generate": "speechssm generate",
}


def comparisons_of(folder: Folder) -> list[Comparison]:
    """All comparisons in the folder's results, in the order of the stages."""
    order = {"tokenizer": 0, "soundstream": 1, "soundstorm": 2, "lm": 3}
    found = [
        Comparison(**entry)
        for result in folder.results
        for entry in result.sections.get("comparisons", [])
    ]
    return sorted(found, key=lambda item: order.get(item.stage, 4))


def key_facts(folder: Folder) -> Facts | None:
    """The strip of large figures under the title."""
    facts = []
    spoken = [path for path in folder.audio if not path.stem.startswith("prompt")]
    if spoken:
        facts.append(Fact("speech generated", minutes(max(map(duration, spoken)))))
    times = [run.value("training_time") for run in folder.all_runs]
    if any(times):
        facts.append(
            Fact("training, all together", minutes(sum(filter(None, times))),
                 f"{len(folder.all_runs)} run{'s' * (len(folder.all_runs) > 1)}")
        )  # fmt: skip
    comparisons = comparisons_of(folder)
    if comparisons:
        held = sum(item.holds for item in comparisons)
        facts.append(Fact("checks that hold", f"{held} of {len(comparisons)}",
                          "held-out data, trivial baselines"))  # fmt: skip
    bench = folder.first_with("memory_slope")
    if bench is not None:
        points = bench.sections["positions"]
        far = points[-1]["position"] / bench.sections["rate"]
        same = points[-1]["state_bytes"] == points[0]["state_bytes"]
        facts.append(Fact("state of the language model",
                          f"{format_number(points[-1]['state_bytes'] / 1024, 3)} KiB",
                          f"{'the same' if same else 'grown'} after {minutes(far)}"))  # fmt: skip
        row = slope_row(bench)
        if row is not None:
            facts.append(Fact("memory per window", f"{signed(row.value)} KiB",
                              f"95% interval {signed(row.low)} to {signed(row.high)}"))  # fmt: skip
    if folder.kind == "run":
        facts += run_facts(folder.runs[0])
    return Facts(facts) if facts else None


def run_facts(run: Run) -> list[Fact]:
    """Large figures of a single run."""
    facts = [Fact("steps", format_number(run.steps), "finished" if run.finished else "unfinished")]
    for label, metric in (("training loss", "train/loss"), ("held-out loss", "val/loss")):
        if run.last(metric) is not None:
            facts.append(Fact(label, format_number(run.last(metric), 4), "last logged"))
    return facts


def slope_row(bench: Results) -> Row | None:
    """The row of the slope that counts: allocated memory, else live tensors."""
    rows = {row.system: row for row in bench.rows if row.name == "memory_slope"}
    return rows.get("allocated", rows.get("tensors"))


def listening_section(folder: Folder, report: Path) -> Section:
    """Prompts, continuations, and the codec's originals beside their reconstructions."""
    blocks: list[Block] = []
    prompts = [path for path in folder.audio if path.stem.startswith("prompt")]
    spoken = [path for path in folder.audio if path not in prompts]
    for path in prompts + spoken:
        title = path.stem.replace("_", " ").replace("-", " ").capitalize()
        what = "The recording that the model was given." if path in prompts else (
            "Generated: units of the language model, spoken by SoundStorm and the codec."
        )  # fmt: skip
        blocks.append(place_sound(path, report, f"spoken-{path.stem}", title, what, wide=True))
    if not spoken:
        blocks.append(Missing("generated speech", MAKE["generate"]))
    if not prompts and folder.kind == "demo" and spoken:
        blocks.append(Missing("a prompt recording (the package's own voice speaks without one)"))
    codec = folder.first_with("log_mel_distance")
    originals = sorted((codec.path.parent / "examples").glob("*-original.*")) if codec else []
    if originals:
        blocks.append(
            Text(
                "What the codec alone does to held-out recordings: the best that any generated "
                "speech here can sound."
            )
        )
    for original in originals:
        number = original.stem.split("-")[0]
        copies = sorted(original.parent.glob(f"{number}-reconstruction*.*"))
        pair = [place_sound(original, report, f"codec-{number}-original", f"Original {number}",
                            "Held-out recording.")]  # fmt: skip
        for copy in copies:
            kind, _, name = copy.stem.removeprefix(f"{number}-").partition("-")
            codec_name = f"codec {name}".strip()
            title = f"{kind.capitalize()} {number} {name}".strip()
            pair.append(
                place_sound(copy, report, f"codec-{copy.stem}", title, f"Through the {codec_name}.")
            )
        blocks.append(Sounds(pair))
    if not originals:
        blocks.append(Missing("originals and reconstructions", MAKE["log_mel_distance"]))
    return Section("listen", "Listen", blocks)


def baselines_section(folder: Folder) -> Section:
    """Every stage against its trivial baseline."""
    comparisons = comparisons_of(folder)
    blocks: list[Block] = []
    if comparisons:
        failing = [item for item in comparisons if not item.holds]
        verdict = (
            "All hold."
            if not failing
            else f"{len(failing)} of {len(comparisons)} do not hold: they are marked, not hidden."
        )
        blocks += [
            Text(
                "A stage that has learnt something must beat what needs no learning, on recordings "
                f"that it has never seen. {verdict}"
            ),
            comparisons_table(
                comparisons,
                "Margins are positive where ours is better. In brackets: 95% bootstrap interval "
                "over documents, paired; the margin must reach what is needed and its interval "
                "must lie above zero. Memory holds where its growth is certainly less than one "
                "window's units take. Perplexity says only that the units have not collapsed: an "
                "untrained tokenizer has a higher one.",
            ),
        ]
    for name in ("unit_perplexity", "log_mel_distance", "nats_per_code", "nats_per_unit"):
        if folder.first_with(name) is None:
            title = {
                "unit_perplexity": "the tokenizer",
                "log_mel_distance": "the codec",
                "nats_per_code": "SoundStorm",
                "nats_per_unit": "the language model",
            }[name]
            blocks.append(Missing(f"held-out figures of {title}", MAKE[name]))  # fmt: skip
    return Section("baselines", "Against trivial baselines", blocks)


def stages_section(folder: Folder, report: Path) -> list[Section]:
    """One part per stage: what it does, its run, its curves, its samples."""
    sections = [
        Section(
            "stages",
            "The stages",
            [Text("Recordings become units; units become more units; those become codes, and "
                  "codes become sound. Each stage is trained on its own.")],
        )
    ]  # fmt: skip
    in_sweep = any(folder.sweeps.values())
    for stage, title in STAGE_TITLES.items():
        runs = folder.stage(stage)
        if not runs:
            if stage == "lm" and in_sweep:
                continue
            missing = [Missing(f"a run of this stage ({stage})", MAKE[stage])]
            sections.append(Section(stage, title, missing, level=3))
            continue
        for index, run in enumerate(runs):
            name = stage if len(runs) == 1 else f"{stage}-{index + 1}"
            heading = title if len(runs) == 1 else f"{title}: {run.name}"
            sections.append(Section(name, heading, run_blocks(run, name, report, folder), level=3))
    for index, run in enumerate(run for run in folder.runs if run.stage not in STAGE_TITLES):
        name = f"run-{index + 1}"
        sections.append(Section(name, run.name, run_blocks(run, name, report, folder), level=3))
    return sections


def run_blocks(run: Run, name: str, report: Path, folder: Folder) -> list[Block]:
    """A run's table, curves, samples and figures on held-out data."""
    blocks: list[Block] = []
    if run.stage in STAGE_PURPOSE:
        blocks.append(Text(STAGE_PURPOSE[run.stage]))
    blocks.append(runs_table([run], [run.model_name]))
    if not run.finished:
        blocks.append(Text("This run is not finished; the figures are those so far.", quiet=True))
    blocks += curve_blocks({run.model_name: run}, name)
    result = folder.first_with(METRIC_NAMES.get(run.stage, ""))
    if result is not None:
        blocks.append(Folded("Measured on held-out data", rows_table(result.rows)))
    sounds = sample_sounds(run, name, report)
    if sounds:
        blocks += [Text("Logged at the end of this training:", quiet=True), Sounds(sounds)]
    return blocks


def curve_blocks(runs: Mapping[str, Run], name: str) -> list[Block]:
    """Loss curves and learning rates of runs that are shown together."""
    losses = {
        label: run.history
        for label, run in runs.items()
        if "train/loss" in run.history or "val/loss" in run.history
    }
    blocks: list[Block] = []
    rates = {}
    for label, run in runs.items():
        # Codecs have two optimisers; the first column is the generator's.
        columns = [column for column in run.history if column.startswith("lr-")]
        if columns:
            rates[label] = run.history[columns[0]]
    if losses:
        ends = "; ".join(
            f"{label}: training {format_number(run.last('train/loss'))}, held-out "
            f"{format_number(run.last('val/loss'))} at the end"
            for label, run in runs.items()
        )
        blocks.append(
            Chart(
                f"{name}-loss",
                loss_figure(losses, rates),
                "Loss: solid on training batches (running mean over the faint values), dashed on "
                "held-out batches of the run's own sequence length (to compare models, see what "
                "was measured on the same held-out documents).",
                f"Loss against training steps. {ends}.",
            )
        )
    else:
        blocks.append(Missing("loss curves (metrics.csv has no losses)"))
    return blocks


def runs_table(runs: Iterable[Run], labels: Iterable[str]) -> Table:
    """Steps, time, memory and final losses of runs."""
    cells = []
    for run, label in zip(runs, labels, strict=True):
        time, memory = run.value("training_time"), run.value("peak_memory")
        cells.append(
            [
                label,
                format_number(run.steps),
                "–" if time is None else minutes(time),
                "–" if memory is None else f"{format_number(memory, 3)} MiB",
                format_number(run.last("train/loss")),
                format_number(run.last("val/loss")),
                str(run.config.get("seed", "–")),
                run.details.get("config_hash") or "–",
            ]
        )
    columns = ["model", "steps", "time", "peak memory", "train loss", "held-out loss", "seed",
               "config"]  # fmt: skip
    return Table(columns, cells)


def sample_sounds(run: Run, name: str, report: Path, most: int = 2) -> list[Sound]:
    """The latest of each kind of sample (`STEP_NAME.wav`) that a run has logged."""
    latest: dict[str, tuple[int, Path]] = {}
    for path in sorted((run.folder / "samples").glob("*.wav")):
        step, _, kind = path.stem.partition("_")
        number = int("".join(character for character in step if character.isdigit()) or 0)
        if number >= latest.get(kind, (-1, path))[0]:
            latest[kind] = (number, path)
    return [
        place_sound(path, report, f"{name}-{kind}", f"{kind.replace('_', ' ').capitalize()}",
                    f"After step {step}.")
        for kind, (step, path) in sorted(latest.items())[:most]
    ]  # fmt: skip


def other_section(folder: Folder) -> Section | None:
    """Tables of results that no other section shows."""
    known = {*METRIC_NAMES.values(), "nats_per_unit", "memory_slope"}
    rest = [result for result in folder.results if not any(map(result.has, known))]
    if not rest:
        return None
    blocks: list[Block] = [
        Folded(str(result.path.parent.relative_to(folder.path)), rows_table(result.rows))
        for result in rest
    ]
    return Section("other", "Other results", blocks)


def commands_section(folder: Folder) -> Section:
    """What was typed to get here, and what it ran on."""
    commands = [
        (f"{STAGE_TITLES.get(run.stage, run.stage)}: {run.name}", run.command)
        for run in folder.runs
        if run.command
    ]
    for runs in folder.sweeps.values():
        commands += [
            (f"Sweep, {label}", run.command)
            for label, run in zip(run_labels(runs), runs, strict=True)
            if run.command
        ]
    commands += [
        (f"{result.path.parent.name}: {result.path.name}", str(result.sections["command"]))
        for result in folder.results
        if result.sections.get("command")
    ]
    commands = list(dict.fromkeys(commands))
    blocks: list[Block] = [
        Commands(commands) if commands else Missing("a record of the commands (git.json)")
    ]
    rows = all_rows(folder)
    machines = sorted({row.hardware for row in rows if row.hardware})
    packages: dict[str, set[str]] = {}
    for row in rows:
        for package, version in (row.versions or {}).items():
            packages.setdefault(package, set()).add(version)
    commits = {
        f"{str(run.git['commit'])[:10]}{' with changes' if run.git.get('dirty') else ''}"
        for run in folder.all_runs
        if run.git.get("commit")
    }
    cells: list[list[str]] = [["hardware", "; ".join(machines) or "–"]]
    cells += [[package, ", ".join(sorted(found))] for package, found in packages.items()]
    cells.append(["commit", ", ".join(sorted(commits)) or "–"])
    blocks.append(Table(["made with", ""], cells, numeric=[False, False]))
    hashes = [
        [run.name, run.details.get("config_hash") or "–", str(run.config.get("seed", "–")),
         str(run.config.get("scale", "–"))]
        for run in folder.all_runs
    ]  # fmt: skip
    if hashes:
        columns = ["run", "config", "seed", "scale"]
        blocks.append(Table(columns, hashes, "Config: hash of all options that decide the result.",
                            [False] * 4))  # fmt: skip
    return Section("made", "How it was made", blocks)


def all_rows(folder: Folder) -> list[Row]:
    """Every row that was found: of runs, evaluations and benches."""
    rows = [row for run in folder.all_runs for row in run.rows]
    return rows + [row for result in folder.results for row in result.rows]


def all_curves(folder: Folder) -> list[dict[str, Any]]:
    """Every curve that was found."""
    return [curve for result in folder.results for curve in result.sections.get("curves", [])]
