"""Language models that begin with the weights of a text model, as the paper's do (section 5).

RecurrentGemma's layers go into a Griffin, Gemma's into a Transformer. The embedding stays as it
is: theirs is of text, ours of units. Each tensor of theirs is accounted for by its name.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from speechssm.errors import CheckpointError
from speechssm.lm.backbone import LanguageModel
from speechssm.lm.checkpoints.configs import differences, family_of, positions_there
from speechssm.lm.checkpoints.files import Checkpoint, Stored
from speechssm.lm.checkpoints.layouts import Layout, layout_of

log = logging.getLogger(__name__)

FRESH = ("embedding", "output_embedding")
# What a checkpoint may hold besides: copies of the embedding, and tables computed from nothing.
IGNORED = re.compile(r"lm_head\.weight|.*rotary_emb\.inv_freq|(.*\.)?normalizer")
# How a name within a block tells the family, and what to call it.
MARKS = {
    "recurrent_gemma": (".temporal_block.", "RecurrentGemma (transformers)"),
    "deepmind": (".recurrent_block.", "RecurrentGemma (DeepMind)"),
    "gemma": (".self_attn.", "Gemma (transformers)"),
}
TWINS = {"recurrent_gemma": ("recurrent_gemma", "deepmind"), "gemma": ("gemma",)}
BLOCK = re.compile(r"(.*?)(?:layers|blocks)\.\d+\.")


@dataclass(frozen=True)
class ImportReport:
    """What became of every tensor, on both sides.

    Args:
        source: folder or file.
        family: "recurrent_gemma", "deepmind" or "gemma".
        loaded: tensors of theirs that went into the model.
        numbers: how many numbers of the model they fill.
        fresh: tensors of ours that were left as they were.
        ignored: tensors of theirs that have no place here.
        notes: what differs by design, one sentence each.
    """

    source: Path
    family: str
    loaded: int
    numbers: int
    fresh: tuple[str, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]

    def describe(self) -> str:
        """All of it in one line."""
        parts = [
            f"{self.source}: {self.loaded} tensors of {MARKS[self.family][1]} fill "
            f"{self.numbers:,} numbers",
            f"left fresh: {', '.join(self.fresh) or 'nothing'}",
            f"ignored: {', '.join(self.ignored) or 'nothing'}",
            *self.notes,
        ]
        return "; ".join(parts)


@torch.no_grad()
def initialise_from(model: LanguageModel, path: str | Path) -> ImportReport:
    """Fill a language model with the weights of a text model, all but the embedding.

    The weights are copied tensor by tensor out of the mapped file, and take the model's dtype and
    device. Positions may differ: SpeechSSM drops RecurrentGemma's rotation.

    Args:
        model: a Griffin for RecurrentGemma, in the layout of `transformers` or of DeepMind's
            PyTorch code; a Transformer for Gemma in the layout of `transformers`. Not on the meta
            device.
        path: a folder with `model.safetensors` or its shards and their index, and `config.json`;
            or with one `.pt` file; or such a file itself.

    Returns:
        What was loaded, left fresh and ignored; it is logged too, in one line.

    Raises:
        CheckpointError: nothing there, damaged, of another architecture or size, or with a tensor
            too many, too few, of another shape or not finite: the first is named. Only the last
            leaves the model half filled.
    """
    checkpoint = Checkpoint(path)
    family, prefix = recognise(checkpoint)
    check_family(model, checkpoint, family)
    layout = layout_of(model, family)
    ignored = check_tensors(layout, checkpoint.tensors, prefix, checkpoint.path)

    parameters = {ours: tensor for ours, tensor in model.state_dict().items() if ours not in FRESH}
    stored = checkpoint.tensors
    used = set()
    numbers = 0
    # Shard by shard, so that each is opened once.
    for ours in sorted(parameters, key=lambda ours: stored[prefix + layout[ours].name].file):
        name = prefix + layout[ours].name
        parameter = parameters[ours]
        parameter.copy_(layout[ours].read(checkpoint.read(name)))
        if not parameter.sum().isfinite():
            raise CheckpointError(f"{checkpoint.path}: {name} holds NaN or infinite numbers")
        used.add(name)
        numbers += parameter.numel()
    notes = []
    if checkpoint.config is None:
        notes.append("no config.json beside it, so window and soft cap were not compared")
    elif (difference := positions_there(model, checkpoint.config)) is not None:
        notes.append(difference)
    fresh = tuple(name for name in FRESH if name in model.state_dict())
    report = ImportReport(
        checkpoint.path, family, len(used), numbers, fresh, tuple(ignored), tuple(notes)
    )
    log.info("%s", report.describe())
    return report


def recognise(checkpoint: Checkpoint) -> tuple[str, str]:
    """The family by the names of its blocks' tensors, and the prefix that stands before them."""
    for name in sorted(checkpoint.tensors):
        begin = BLOCK.match(name)
        for family, (mark, _) in MARKS.items():
            if begin and mark in name:
                return family, begin.group(1)
    example = next(iter(sorted(checkpoint.tensors)), "nothing")
    raise CheckpointError(
        f"{checkpoint.path} holds neither RecurrentGemma nor Gemma: its tensors are named like "
        f"{example}"
    )


def check_family(model: LanguageModel, checkpoint: Checkpoint, family: str) -> None:
    """Raises CheckpointError for another architecture, or a config of another size."""
    wanted = family_of(model)
    config = checkpoint.config
    kind = (config or {}).get("model_type", family)
    if family not in TWINS[wanted] or kind not in TWINS[wanted]:
        other = family if family not in TWINS[wanted] else kind
        found = MARKS[other][1] if other in MARKS else other
        raise CheckpointError(
            f"{checkpoint.path} holds {found}, but a {type(model).__name__} takes "
            f"{MARKS[wanted][1].split()[0]}: choose another folder or another model="
        )
    if config is None:
        return
    if options := differences(model, config):
        raise CheckpointError(
            f"{checkpoint.path} is a model of another size: its config.json needs "
            + ", ".join(options)
        )


def check_tensors(layout: Layout, stored: dict[str, Stored], prefix: str, path: Path) -> list[str]:
    """Raises CheckpointError unless every tensor of either side has its place.

    Returns:
        Names of theirs that are ignored on purpose.
    """
    embedding = prefix + layout["embedding"].name
    expected = {
        prefix + there.name: there.shape for ours, there in layout.items() if ours not in FRESH
    }
    ignored = [name for name in stored if name == embedding or IGNORED.fullmatch(name)]
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected and name not in ignored]
    if missing or unexpected:
        problem = f"lacks {missing[0]}" if missing else f"holds {unexpected[0]}, which has no place"
        raise CheckpointError(
            f"{path} {problem} ({len(missing)} tensors missing, {len(unexpected)} "
            "unexpected): the model= and this checkpoint do not belong together"
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{path}: {name} is {list(stored[name].shape)}, the model needs "
                f"{list(shape)}: choose the model= of that size"
            )
        if stored[name].dtype is None:
            raise CheckpointError(
                f"{path}: {name} is quantised or no floating-point tensor: use the original weights"
            )
    return ignored
