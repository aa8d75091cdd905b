"""Does SoundStorm know the codes? Cross entropy and accuracy of masked codes, level by level.

Shapes: B batch, Q quantiser levels, T codec frames, U units (T = U * unit_repeat).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from speechssm.errors import ConfigError
from speechssm.evaluation.documents import iterate_samples
from speechssm.evaluation.ngrams import Unigram
from speechssm.evaluation.results import progress_bar, write_results
from speechssm.evaluation.statistics import bootstrap_ratio
from speechssm.report.plots import plot_dots
from speechssm.report.rows import Comparison, Row
from speechssm.report.style import save_figure
from speechssm.soundstorm.loss import masked_score
from speechssm.soundstorm.masking import TrainingMask, draw, training_mask

WHOLE, TRAINING = "whole level masked", "masks as in training"
PROMPT_SECONDS = 3.0


class CodePiece(NamedTuple):
    """Aligned codes int64 [Q, T] and units int64 [U] of a piece of a document."""

    codes: torch.Tensor
    units: torch.Tensor
    document: str


def iterate_codes(
    data: str | Path, split: str, *, unit_repeat: int = 2, max_units: int | None = None
) -> Iterator[CodePiece]:
    """Pieces of a code shard folder's split, cut to `max_units` units and to whole units."""
    for sample in iterate_samples(data, split):
        codes = np.asarray(sample["codes.npy"]).astype(np.int64)
        units = np.asarray(sample["units.npy"]).astype(np.int64)
        length = min(len(units), codes.shape[1] // unit_repeat, max_units or len(units))
        if length < 1:
            continue
        yield CodePiece(
            torch.from_numpy(codes[:, : length * unit_repeat]),
            torch.from_numpy(units[:length]),
            str(sample["json"].get("document", sample["__key__"])),
        )


def whole_level_mask(
    length_B: torch.Tensor, frames: int, levels: int, level: int, prompt_frames: int
) -> TrainingMask:
    """A level and all finer ones hidden after a prompt: what the first decoding pass sees.

    The prompt is at most a third of a row, so that short pieces keep something to predict.
    """
    prompt_B = torch.clamp(length_B // 3, max=prompt_frames)
    position_T = torch.arange(frames, device=length_B.device)
    target_BT = (position_T >= prompt_B[:, None]) & (position_T < length_B[:, None])
    hidden_Q = torch.arange(levels, device=length_B.device) >= level
    padding_BT = position_T >= length_B[:, None]
    hidden_BQT = (hidden_Q[None, :, None] & target_BT[:, None]) | padding_BT[:, None]
    return TrainingMask(torch.full_like(length_B, level), prompt_B, target_BT, hidden_BQT)


@torch.inference_mode()
def evaluate_codes(
    models: Mapping[str, torch.nn.Module],
    data: str | Path,
    out: str | Path,
    *,
    max_pieces: int = 24,
    max_seconds: float = 8.0,
    unit_rate: int = 25,
    seed: int = 0,
    details: Mapping[str, Mapping[str, object]] | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """Nats and accuracy per masked code of each level against the level's unigram.

    Two ways to mask, each for every level of every piece, given the true coarser levels:

    - `whole level masked`: everything after a 3 s prompt; the model has units and prompt only.
    - `masks as in training`: prompt and masked share drawn as in training, at a fixed seed.

    The unigram is add-one smoothed over the codes of the train split, per level, and is scored on
    exactly the same frames. Intervals are a 95% bootstrap over documents, margins are paired.

    Args:
        models: name to SoundStorm in eval mode; all of them for the codes of `data`.
        data: code shard folder with `train` and `heldout`.
        out: folder for metrics.json, table.md and the plot.
        max_pieces: held-out pieces to measure (a seeded choice).
        max_seconds: pieces are cut to this.
        details: of each model `seed`, `config_hash`, `model`, `scale` of its run, for the rows.

    Raises:
        ShardError: no code shards there. ConfigError: no held-out pieces, or models for codes of
            different sizes.
    """
    first = next(iter(models.values()))
    for name, model in models.items():
        for attribute in ("num_quantizers", "codebook_size", "unit_repeat"):
            values = getattr(first, attribute), getattr(model, attribute)
            if values[0] != values[1]:
                raise ConfigError(
                    f"{name} has {attribute} {values[1]}, {next(iter(models))} has {values[0]}: "
                    "compare SoundStorms that were trained on the same codes"
                )
    levels, repeat = first.num_quantizers, first.unit_repeat
    counts_QC = np.zeros((levels, first.codebook_size), dtype=np.int64)
    for piece in iterate_codes(data, "train", unit_repeat=repeat):
        for level in range(levels):
            counts_QC[level] += np.bincount(piece.codes[level], minlength=first.codebook_size)
    unigrams = [Unigram(counts) for counts in counts_QC]
    max_units = int(max_seconds * unit_rate)
    pieces = list(iterate_codes(data, "heldout", unit_repeat=repeat, max_units=max_units))
    if not pieces:
        raise ConfigError(f"{Path(data) / 'heldout'} holds no codes; encode a held-out split")
    if len(pieces) > max_pieces:
        kept = np.random.default_rng(seed).permutation(len(pieces))[:max_pieces]
        pieces = [pieces[index] for index in sorted(kept)]

    names = sorted({piece.document for piece in pieces})
    place = {name: index for index, name in enumerate(names)}
    # nats, unigram nats, right guesses, tokens; per way of masking, level and document
    sums = {name: np.zeros((2, levels, 4, len(names))) for name in models}
    prompt_frames = int(PROMPT_SECONDS * unit_rate * repeat)
    with progress_bar(show_progress) as progress:
        for name, model in models.items():
            generator = torch.Generator().manual_seed(seed)  # the same masks for each
            for piece in progress.track(pieces, description=f"{name} on held-out codes"):
                sums[name][:, :, :, place[piece.document]] += score_piece(
                    model, piece, unigrams, prompt_frames, generator
                )
    return summarize(sums, Path(out), seed, details or {})


def score_piece(
    model: torch.nn.Module,
    piece: CodePiece,
    unigrams: list[Unigram],
    prompt_frames: int,
    generator: torch.Generator,
) -> np.ndarray:
    """Sums [2, Q, 4] of one piece: nats, unigram nats, right guesses and predicted tokens."""
    levels, frames = piece.codes.shape
    device = next(model.parameters()).device
    codes_BQT = piece.codes.to(device).expand(levels, -1, -1)
    units_BU = piece.units.to(device).expand(levels, -1)
    length_B = torch.full((levels,), frames, dtype=torch.int64, device=device)
    level_B = torch.arange(levels, device=device)
    # Row b measures level b: all levels of a piece in one batch, which share prompt and mask.
    draws = draw(1, frames, generator=generator, device=device)
    draws = type(draws)(*(part.expand(levels, *part.shape[1:]) for part in draws))
    whole = [
        whole_level_mask(length_B[:1], frames, levels, level, prompt_frames)
        for level in range(levels)
    ]
    masks = [
        TrainingMask(*(torch.cat(parts) for parts in zip(*whole, strict=True))),
        training_mask(draws, length_B, levels, level_B),
    ]
    result = np.zeros((2, levels, 4))
    for way, mask in enumerate(masks):
        score = masked_score(model, codes_BQT, units_BU, length_B, mask)
        target_BT = mask.target_BT.cpu().numpy()
        for level in range(levels):
            unigram = unigrams[level].score(piece.codes[level].numpy())[target_BT[level]].sum()
            result[way, level] = (
                score.nats_B[level].item(),
                unigram,
                score.correct_B[level].item(),
                score.tokens_B[level].item(),
            )
    return result


def summarize(
    sums: Mapping[str, np.ndarray],
    out: Path,
    seed: int,
    details: Mapping[str, Mapping[str, object]],
) -> list[Row]:
    """Rows, comparisons and plot from each model's sums [2, Q, 4, documents]."""
    rows, comparisons = [], []
    shown: list[tuple[int, Row]] = []  # place of the model, -1 = the unigram
    first = next(iter(sums))
    for way, masking in enumerate((WHOLE, TRAINING)):
        for level in range(sums[first].shape[1]):
            if not sums[first][way, level, 3].sum():
                continue
            where = f"level {level + 1}, {masking}"
            for place, (name, of_model) in enumerate(sums.items()):
                nats, unigram, correct, tokens = of_model[way, level]
                ours, theirs, accuracy, margin = (
                    bootstrap_ratio(total, tokens, seed=seed)
                    for total in (nats, unigram, correct, unigram - nats)
                )
                scored = [
                    (place, "nats_per_code", f"{name}, {where}", ours, "nats/code"),
                    (place, "accuracy", f"{name}, {where}", accuracy, "share"),
                ]
                if place == 0:  # the unigram is scored on the same codes for each model
                    unigram_row = (-1, "nats_per_code", f"unigram, {where}", theirs, "nats/code")
                    scored.insert(1, unigram_row)
                for whose, metric, system, value, unit in scored:
                    extra = details.get(name, {}) if whose >= 0 else {}
                    rows.append(Row(metric, system, "heldout", value.value, unit, value.low,
                                    value.high, value.n, **extra))  # fmt: skip
                    if (masking, metric) == (WHOLE, "nats_per_code"):
                        shown.append((whose, rows[-1]))
                comparisons.append(
                    Comparison.of(
                        "soundstorm",
                        "nats_per_code",
                        f"{name}, {where}",
                        "unigram of the train split",
                        ours.value,
                        theirs.value,
                        "nats/code",
                        higher_is_better=False,
                        low=margin.low,
                        high=margin.high,
                        n=margin.n,
                    )
                )
    write_results(out, rows, comparisons=comparisons, title="SoundStorm on held-out codes")
    drawing = plot_dots(
        [row.system.removesuffix(f", {WHOLE}") for _, row in shown],
        [row.value for _, row in shown],
        [row.low for _, row in shown],
        [row.high for _, row in shown],
        "nats per code, whole level masked (lower is better)",
        colours=[whose for whose, _ in shown],
    )
    save_figure(drawing, out / "nats_per_code.svg")
    return rows
