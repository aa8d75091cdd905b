"""`speechssm evaluate tokenizer`: all measures of a list of tokenizers on the same recordings.

Every recording is read once, and tokenized once by each system; all measures share the units. A
measure that is not possible (no transcripts, one speaker, a missing package) is left out with a
note that says why, never with a number.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speechssm.errors import ConfigError
from speechssm.evaluation.corpus import RATE, Document, Material, choose_material
from speechssm.evaluation.results import progress_bar
from speechssm.evaluation.tokenizer import results
from speechssm.evaluation.tokenizer.alignment import (
    Alignments,
    align_phones,
    default_workers,
    has_figures,
)
from speechssm.evaluation.tokenizer.end_of_recording import end_of_recording
from speechssm.evaluation.tokenizer.findings import Candidate, Findings, Measured
from speechssm.evaluation.tokenizer.phones import measure_phones
from speechssm.evaluation.tokenizer.recognition import UnitUtterance, recognise_units
from speechssm.evaluation.tokenizer.recognition_head import AudioUtterance, head_word_error
from speechssm.evaluation.tokenizer.robustness import unit_robustness
from speechssm.evaluation.tokenizer.speakers import PIECE_SECONDS, SpeakerTask
from speechssm.evaluation.tokenizer.units import measure_units
from speechssm.evaluation.tokenizer.window_agreement import window_agreement
from speechssm.report.rows import Row

MEASURES = (
    "units", "phones", "speakers", "recognition", "robustness", "window_agreement",
    "end_of_recording",
)  # fmt: skip
ANEW = ("robustness", "window_agreement", "end_of_recording")  # these tokenize excerpts again
ALIGNERS = ("pocketsphinx", "ctc")
EXCERPT_SECONDS = 30.0

Begin = Callable[[str, int], Callable[[], None]]


def evaluate_tokenizer(
    candidates: Sequence[Candidate],
    data: str | Path,
    out: str | Path,
    *,
    fit: str | Path | None = None,
    measures: Sequence[str] | None = None,
    max_hours: float | None = 2.0,
    fit_hours: float | None = 2.0,
    heldout_speakers: Sequence[str] = (),
    heldout_sets: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    synthetic: bool = False,
    aligner: str = "pocketsphinx",
    excerpts: int = 24,
    cuts: int = 200,
    probe_steps: int = 1500,
    workers: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> list[Row]:
    """Measure tokenizers on held-out recordings and write metrics.json, table.md and plots.

    Args:
        candidates: with different names.
        data, fit, max_hours, fit_hours, synthetic: see `choose_material`.
        out: folder of the results, and of the alignments that another evaluation can use.
        measures: some of `MEASURES`; None: all.
        heldout_speakers, heldout_sets, leave_out: of a folder with a manifest, see `FolderCorpus`.
        aligner: what tells the phones: pocketsphinx; or `ctc`, the recognition head of the first
            candidate that has one, for the pieces of its text model instead of phones.
        excerpts: of 30 s, how many robustness and the agreement of windows take.
        cuts: how many ends of recordings the implicit-EOS test makes; each costs three windows.
        probe_steps: of the recogniser that is trained on the units.
        workers: processes that align; None: as many as there are cores.
        seed: of every choice.

    Raises:
        ConfigError: nothing to measure, or unknown measures.
    """
    candidates = list(candidates)
    if isinstance(measures, str):
        measures = [measures]
    wanted = tuple(measures) if measures is not None else MEASURES
    _check(candidates, wanted, aligner)
    findings = Findings([])
    with progress_bar(show_progress) as progress:

        def begin(title: str, total: int) -> Callable[[], None]:
            task = progress.add_task(title, total=total)
            return lambda: progress.advance(task)

        options = {
            "heldout_speakers": list(heldout_speakers),
            "heldout_sets": list(heldout_sets),
            "leave_out": list(leave_out),
        }
        material = choose_material(
            data, fit, max_hours=max_hours, fit_hours=fit_hours, synthetic=synthetic,
            corpus=options, seed=seed, progress=begin,
        )  # fmt: skip
        documents = material.heldout
        for candidate in candidates:
            units = _tokenize(candidate, documents, begin)
            findings.systems.append(Measured(candidate, units))
        if not any(len(unit_T) for unit_T in findings.systems[0].heldout_units):
            raise ConfigError(f"{data}: the held-out recordings are shorter than one unit")
        if "units" in wanted:
            for system in findings.systems:
                tokenizer = system.candidate.tokenizer
                system.units = measure_units(
                    system.heldout_units, tokenizer.vocab_size, tokenizer.rate
                )
        if "phones" in wanted:
            align = _align_ctc if aligner == "ctc" else _align_phones
            _measure_phones(
                findings, documents, align, Path(out), workers or default_workers(), seed, begin
            )
        if "speakers" in wanted:
            _measure_speakers(findings, material, seed, begin)
        if "recognition" in wanted:
            _measure_recognition(findings, material, probe_steps, seed, begin)
        if set(ANEW) & set(wanted):
            _measure_anew(findings, documents, wanted, excerpts, cuts, seed, begin)
    findings.material = _describe(material)
    return results.write(findings, Path(out))


def _check(candidates: Sequence[Candidate], measures: Sequence[str], aligner: str) -> None:
    if not candidates:
        raise ConfigError("no tokenizer to evaluate; add tokenizer=FOLDER or tokenizer=[A,B]")
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        raise ConfigError(f"tokenizers need different names, not {', '.join(names)}")
    unknown = [measure for measure in measures if measure not in MEASURES]
    if unknown:
        raise ConfigError(
            f"options.tokenizer.measures: unknown {', '.join(unknown)}; choose some of: "
            f"{', '.join(MEASURES)}"
        )
    if aligner not in ALIGNERS:
        raise ConfigError(
            f"options.tokenizer.aligner={aligner} is unknown; choose one of: {', '.join(ALIGNERS)}"
        )


def _tokenize(
    candidate: Candidate, documents: Sequence[Document], begin: Begin
) -> list[np.ndarray]:
    advance = begin(f"tokenizing: {candidate.name}", len(documents))
    units = []
    for document in documents:
        units.append(candidate.tokenizer.encode(document.audio, RATE))
        advance()
    return units


def _align_phones(
    findings: Findings, documents: Sequence[Document], out: Path, workers: int, begin: Begin
) -> Alignments:
    return align_phones(documents, out, workers=workers, progress=begin)


def _align_ctc(
    findings: Findings, documents: Sequence[Document], out: Path, workers: int, begin: Begin
) -> Alignments:
    from speechssm.evaluation.tokenizer.ctc_alignment import align_text_pieces

    for system in findings.systems:
        candidate = system.candidate
        if candidate.text_model is not None:
            return align_text_pieces(
                documents,
                out,
                model=candidate.tokenizer.model,
                text_model=candidate.text_model,
                identity=f"CTC head of {candidate.name}, {candidate.tokenizer.fingerprint[:12]}",
                progress=begin,
            )
    raise ConfigError(
        "aligner=ctc needs a tokenizer with a recognition head, a run folder whose text model "
        "still lies where it was"
    )


def _measure_phones(
    findings: Findings,
    documents: Sequence[Document],
    align: Callable[..., Alignments],
    out: Path,
    workers: int,
    seed: int,
    begin: Begin,
) -> None:
    try:
        alignments = align(findings, documents, out, workers, begin)
    except ConfigError as error:
        findings.note(f"phones: left out: {error}")
        return
    findings.alignments = alignments
    for system in findings.systems:
        rate = system.candidate.tokenizer.rate
        lengths = [len(unit_T) for unit_T in system.heldout_units]
        system.phones = measure_phones(
            system.heldout_units,
            alignments.unit_labels(documents, rate, lengths),
            [[entry.units(rate) for entry in document.utterances] for document in documents],
            [document.speaker for document in documents],
            seed=seed,
        )
        if system.phones is None:
            findings.note("phones: left out: no held-out utterance could be aligned")


def _measure_speakers(findings: Findings, material: Material, seed: int, begin: Begin) -> None:
    if not material.speakers_known:
        findings.note("speakers: left out: the folder has no manifest.tsv that names its speakers")
        return
    for seconds in PIECE_SECONDS:
        task = SpeakerTask(material.heldout, seconds)
        what = f"speakers, pieces of {seconds:g} s"
        if not task.possible:
            findings.note(f"{what}: left out: fewer than two held-out speakers with four pieces")
            continue
        if task.left_out:
            findings.note(f"{what}: {task.left_out} speakers have too little speech")
        advance = begin(f"log-mel, {what}", len(task.pieces))
        findings.log_mel_speakers[seconds] = task.of_log_mel(seed=seed, advance=advance)
        advance = begin(f"probes, {what}", len(findings.systems))
        for system in findings.systems:
            rate = system.candidate.tokenizer.rate
            system.speakers[seconds] = task.of_units(system.heldout_units, rate, seed=seed)
            advance()


def _measure_recognition(
    findings: Findings, material: Material, probe_steps: int, seed: int, begin: Begin
) -> None:
    """A recogniser of each system's units, and the recognition heads that systems have."""
    if not any(entry.text for document in material.fit for entry in document.utterances):
        findings.note("recognition: left out: there are no other transcripts to train probes on")
        return
    for system in findings.systems:
        candidate = system.candidate
        fit_units = _tokenize(candidate, material.fit, begin)
        rate = candidate.tokenizer.rate
        advance = begin(f"recogniser of units: {candidate.name}", probe_steps)
        try:
            system.recognition = recognise_units(
                _unit_utterances(material.fit, fit_units, rate),
                _unit_utterances(material.heldout, system.heldout_units, rate),
                candidate.tokenizer.vocab_size,
                rate,
                probe_steps=probe_steps,
                seed=seed,
                advance=advance,
            )
        except ConfigError as error:
            findings.note(f"{candidate.name}: left out: {error}")
        if candidate.text_model is not None:
            spoken = [
                AudioUtterance(document.utterance_audio(entry), entry.text, document.speaker)
                for document in material.heldout
                for entry in document.utterances
                if entry.text and not has_figures(entry.text)
            ]
            advance = begin(f"recognition head: {candidate.name}", len(spoken))
            try:
                system.head = head_word_error(
                    candidate.tokenizer.model, spoken, candidate.text_model, RATE, advance=advance
                )
            except ConfigError as error:
                findings.note(f"{candidate.name}: left out: {error}")


def _unit_utterances(
    documents: Sequence[Document], units: Sequence[np.ndarray], rate: float
) -> list[UnitUtterance]:
    """Utterances whose transcript says what was spoken."""
    return [
        UnitUtterance(unit_T[entry.units(rate)], entry.text, document.speaker)
        for document, unit_T in zip(documents, units, strict=True)
        for entry in document.utterances
        if entry.text and not has_figures(entry.text)
    ]


def _measure_anew(
    findings: Findings,
    documents: Sequence[Document],
    measures: Sequence[str],
    excerpts: int,
    cuts: int,
    seed: int,
    begin: Begin,
) -> None:
    """Measures that tokenize excerpts again, changed or cut otherwise."""
    chosen = choose_excerpts(documents, excerpts, EXCERPT_SECONDS, seed)
    # Of each speaker the longest recording first: these need more than one window.
    longest = _in_turn(sorted(documents, key=lambda entry: -len(entry.pcm)))[:excerpts]
    recordings = ([entry.audio for entry in longest], [entry.speaker for entry in longest], RATE)
    for system in findings.systems:
        name, tokenizer = system.candidate.name, system.candidate.tokenizer
        if "robustness" in measures:
            system.robustness = unit_robustness(
                tokenizer,
                [audio for audio, _ in chosen],
                [speaker for _, speaker in chosen],
                RATE,
                seed=seed,
                advance=begin(f"robustness: {name}", len(chosen)),
            )
            for change, reason in system.robustness.skipped.items():
                findings.note(f"robustness, {change}: left out: {reason}")
        if "window_agreement" in measures:
            advance = begin(f"agreement of windows: {name}", 1)
            try:
                system.window_agreement = window_agreement(tokenizer, *recordings)
            except ConfigError as error:
                findings.note(f"{name}: left out: {error}")
            advance()
        if "end_of_recording" in measures:
            advance = begin(f"ends of recordings: {name}", cuts)
            try:
                system.end_of_recording = end_of_recording(
                    tokenizer, *recordings, cuts=cuts, seed=seed, advance=advance
                )
            except ConfigError as error:
                findings.note(f"{name}: left out: {error}")


def choose_excerpts(
    documents: Sequence[Document], count: int, seconds: float, seed: int
) -> list[tuple[np.ndarray, str]]:
    """Up to `count` excerpts (audio float32 [S], speaker), speakers and documents in turn.

    A document shorter than `seconds` gives all of it, and no document the same samples twice.
    """
    length = round(seconds * RATE)
    generator = np.random.default_rng(seed)
    places: list[tuple[Document, int]] = []
    for document in documents:
        room = max(1, len(document.pcm) // length)
        spare = max(0, len(document.pcm) - room * length)
        offset = int(generator.integers(spare + 1))
        order = generator.permutation(room)
        places += [(document, offset + int(number) * length) for number in order]
    chosen = _in_turn(places, speaker=lambda place: place[0].speaker)[:count]
    return [
        (document.audio[start : start + length], document.speaker) for document, start in chosen
    ]


def _in_turn(items: Sequence[Any], speaker: Callable[[Any], str] = lambda item: item.speaker):
    """The items so that speakers take turns; of each speaker in the given order."""
    turns: dict[str, int] = {}
    keys = []
    for item in items:
        keys.append(turns.get(speaker(item), 0))
        turns[speaker(item)] = keys[-1] + 1
    return [items[place] for place in np.argsort(keys, kind="stable")]


def _describe(material: Material) -> dict[str, Any]:
    """What was measured, in numbers."""
    documents = material.heldout
    return {
        "documents": len(documents),
        "speakers": len({document.speaker for document in documents}),
        "hours": round(sum(document.seconds for document in documents) / 3600, 4),
        "synthetic_documents": sum(document.synthetic for document in documents),
        "left_out": dict(material.skipped),
    }
