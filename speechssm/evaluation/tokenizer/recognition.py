"""How much of the words is in the units? Greedy word errors of a small recogniser trained on them.

The probe is the same for every tokenizer: embedding, five convolutions, letters by CTC (Graves et
al. 2006); seed, number of steps and amount of text are fixed. It is far from what the units would
give a large recogniser; differences between tokenizers are what it is for. This is the measure of
the discrete-unit recognition track of Chang et al. (2024, "The Interspeech 2024 Challenge on Speech
Processing Using Discrete Units"), with a probe that trains in minutes on one core and no language
model.

Shapes: B batch, T units, D width, C characters with the blank, L text length.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechssm.data.text import normalise_text
from speechssm.errors import ConfigError
from speechssm.evaluation.edit_distance import edit_distance
from speechssm.evaluation.tokenizer.error_rates import ErrorRates, collapse, error_rates

# Class 0 is CTC's blank.
CHARACTERS = " 'ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CLASS_OF = {character: index for index, character in enumerate(CHARACTERS, start=1)}
# Fewer outputs a second have no room for the letters of fast speech.
LEAST_RATE = 25.0
_CHOICES = 8


class UnitUtterance(NamedTuple):
    """Units int64 [T] of an utterance, what is said in it, and by whom."""

    units_T: np.ndarray
    text: str
    speaker: str


@dataclass(frozen=True)
class Recognition:
    """Result of a probe.

    Attributes:
        errors: on the held-out utterances.
        curve: (steps, character error on the part of the fit speakers kept for the choice).
        chosen_step: whose weights are used. fit_hours: trained on, without that part.
        skipped: fit utterances without text, or with more text than outputs.
        parameters: of the probe.
    """

    errors: ErrorRates
    curve: tuple[tuple[int, float], ...]
    chosen_step: int
    fit_hours: float
    skipped: int
    parameters: int


class ConvolutionBlock(nn.Module):
    """Residual convolution over time, normalised before it; [B, T, D] to the same."""

    def __init__(self, width: int, dilation: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, inside_BT1: Tensor) -> Tensor:
        hidden_BTD = self.norm(x_BTD) * inside_BT1
        hidden_BDT = F.gelu(self.convolution(hidden_BTD.transpose(1, 2)))
        return x_BTD + self.dropout(hidden_BDT.transpose(1, 2))


class UnitRecognizer(nn.Module):
    """Units int64 [B, T] to character logits [B, T', C]; T' = `output_length(T)`.

    Units below 25 Hz are repeated until there are at least so many; above it, the first
    convolution takes strides, so that every tokenizer's probe works at 25 ... 50 Hz. A letter's
    logits see 65 outputs, about two seconds. Recurrent layers in the place of the blocks say
    nothing but blanks for long, and a probe has to be short.

    Args:
        vocab_size: V. rate: units per second. width: D.
        unit_dropout: share of units hidden in training.
    """

    DILATIONS = (1, 2, 4, 8)

    def __init__(
        self,
        vocab_size: int,
        rate: float,
        width: int = 192,
        dropout: float = 0.1,
        unit_dropout: float = 0.1,
    ):
        super().__init__()
        self.repeats = max(1, math.ceil(LEAST_RATE / rate))
        self.stride = max(1, int(rate / LEAST_RATE))
        self.hidden_unit = vocab_size
        self.unit_dropout = unit_dropout
        self.embedding = nn.Embedding(vocab_size + 1, width)
        self.first = nn.Conv1d(width, width, 5, padding=2, stride=self.stride)
        self.blocks = nn.ModuleList(
            ConvolutionBlock(width, dilation, dropout) for dilation in self.DILATIONS
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(CHARACTERS) + 1)

    def output_length(self, length: int) -> int:
        """Outputs for so many units."""
        return -(-length * self.repeats // self.stride)

    def forward(self, units_BT: Tensor, length_B: Tensor) -> Tensor:
        """Logits; what lies beyond `length_B` (units) does not change what lies before it."""
        inside_BT = torch.arange(units_BT.shape[1]) < length_B[:, None]
        if self.training:
            hidden_BT = torch.rand(units_BT.shape) < self.unit_dropout
            units_BT = torch.where(hidden_BT, self.hidden_unit, units_BT)
        x_BTD = self.embedding(units_BT) * inside_BT[..., None]
        x_BTD = x_BTD.repeat_interleave(self.repeats, dim=1)
        x_BTD = F.gelu(self.first(x_BTD.transpose(1, 2))).transpose(1, 2)
        output_length_B = -(-length_B * self.repeats // self.stride)
        inside_BT1 = (torch.arange(x_BTD.shape[1]) < output_length_B[:, None])[..., None]
        for block in self.blocks:
            x_BTD = block(x_BTD, inside_BT1)
        return self.head(self.norm(x_BTD))


class _Example(NamedTuple):
    units_T: Tensor
    classes_L: Tensor
    text: str
    speaker: str


def recognise_units(
    fit: Sequence[UnitUtterance],
    test: Sequence[UnitUtterance],
    vocab_size: int,
    rate: float,
    *,
    probe_steps: int = 1500,
    batch_seconds: float = 80.0,
    learning_rate: float = 2e-3,
    width: int = 192,
    seed: int = 0,
    advance: Callable[[], None] | None = None,
) -> Recognition:
    """Train a `UnitRecognizer` on `fit` and measure it on `test`.

    A tenth of the fit speakers (of the utterances where there are fewer than two speakers) is kept
    back; the weights of the step with the fewest character errors there are used.

    Args:
        fit, test: utterances of different speakers; those without text are left out.
        rate: units per second.
        probe_steps: batches, of about `batch_seconds` of speech; at 25 Hz a batch of 80 s takes
            0.3 s on one core.
        width: of everything in the probe.
        advance: called `probe_steps` times.

    Raises:
        ConfigError: fewer than two fit utterances or no test utterance with text.
    """
    if probe_steps < 1:
        raise ConfigError(f"probe_steps must be at least 1, not {probe_steps}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UnitRecognizer(vocab_size, rate, width)
        examples = [_example(utterance) for utterance in fit]
        usable = [each for each in examples if _fits(each, model)]
        tested = [each for each in map(_example, test) if each.text]
        if len(usable) < 2 or not tested:
            raise ConfigError(
                "recognition: needs transcripts, of two utterances to fit the probe on and one to "
                f"measure, not of {len(usable)} and {len(tested)}"
            )
        kept_back, learnt = _divide(usable, seed)
        batch_units = batch_seconds * rate
        curve, chosen_step = _train(
            model, learnt, kept_back, batch_units, probe_steps, learning_rate, seed, advance
        )
        hypotheses = _transcribe(model, tested, batch_units)
    return Recognition(
        errors=error_rates(
            [each.text for each in tested], hypotheses, [each.speaker for each in tested]
        ),
        curve=tuple(curve),
        chosen_step=chosen_step,
        fit_hours=sum(len(each.units_T) for each in learnt) / rate / 3600,
        skipped=len(examples) - len(usable),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _example(utterance: UnitUtterance) -> _Example:
    text = normalise_text(utterance.text or "")
    classes_L = torch.tensor([_CLASS_OF[character] for character in text], dtype=torch.int64)
    units_T = torch.from_numpy(np.asarray(utterance.units_T, dtype=np.int64))
    return _Example(units_T, classes_L, text, utterance.speaker)


def _fits(example: _Example, model: UnitRecognizer) -> bool:
    """CTC needs an output for each character, and a blank between equal ones."""
    classes_L = example.classes_L
    needed = len(classes_L) + int((classes_L[1:] == classes_L[:-1]).sum())
    return 0 < needed <= model.output_length(len(example.units_T))


def _divide(examples: list[_Example], seed: int) -> tuple[list[_Example], list[_Example]]:
    """A tenth of the speakers for the choice of weights, and the rest."""
    generator = np.random.default_rng(seed)
    speakers = sorted({example.speaker for example in examples})
    if len(speakers) > 1:
        count = max(1, len(speakers) // 10)
        chosen = set(generator.permutation(speakers)[:count].tolist())
        back = [example.speaker in chosen for example in examples]
    else:
        places = generator.permutation(len(examples))[: max(1, len(examples) // 10)]
        back = [place in set(places.tolist()) for place in range(len(examples))]
    pairs = list(zip(examples, back, strict=True))
    return [each for each, held in pairs if held], [each for each, held in pairs if not held]


def _batches(
    examples: Sequence[_Example], batch_units: float, generator: np.random.Generator | None
) -> Iterator[list[int]]:
    """Places of examples of similar length, so many units together; shuffled with a generator.

    Lengths get a random part before they are sorted, so that batches differ from pass to pass.
    """
    length_N = np.array([len(example.units_T) for example in examples], dtype=np.float64)
    if generator is not None:
        length_N = length_N * generator.uniform(0.9, 1.1, len(length_N))
    batches: list[list[int]] = [[]]
    for place in np.argsort(length_N, kind="stable").tolist():
        longest = len(examples[place].units_T)
        if batches[-1] and (len(batches[-1]) + 1) * longest > batch_units:
            batches.append([])
        batches[-1].append(place)
    order = range(len(batches)) if generator is None else generator.permutation(len(batches))
    for index in order:
        yield batches[index]


def _collate(examples: Sequence[_Example]) -> tuple[Tensor, Tensor]:
    """Units int64 [B, T], filled up with 0, and lengths [B]."""
    units_BT = nn.utils.rnn.pad_sequence([each.units_T for each in examples], batch_first=True)
    return units_BT, torch.tensor([len(each.units_T) for each in examples])


def _train(
    model: UnitRecognizer,
    learnt: list[_Example],
    kept_back: list[_Example],
    batch_units: float,
    steps: int,
    learning_rate: float,
    seed: int,
    advance: Callable[[], None] | None,
) -> tuple[list[tuple[int, float]], int]:
    """Train; the model is left with its best weights. Returns the curve and their step."""
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=1e-2)
    # A tenth of warm-up, then half a cosine down to nothing.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    checks = {math.ceil(steps * (index + 1) / _CHOICES) for index in range(_CHOICES)}
    curve: list[tuple[int, float]] = []
    best, best_weights = math.inf, {}
    step = 0
    while step < steps:
        for places in _batches(learnt, batch_units, generator):
            batch = [learnt[place] for place in places]
            model.train()
            units_BT, length_B = _collate(batch)
            logits_BTC = model(units_BT, length_B)
            loss = F.ctc_loss(
                logits_BTC.log_softmax(dim=-1).transpose(0, 1),
                torch.cat([each.classes_L for each in batch]),
                torch.tensor([model.output_length(len(each.units_T)) for each in batch]),
                torch.tensor([len(each.classes_L) for each in batch]),
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if advance:
                advance()
            if step in checks:
                texts = [each.text for each in kept_back]
                edits = sum(map(edit_distance, texts, _transcribe(model, kept_back, batch_units)))
                error = edits / sum(map(len, texts))
                curve.append((step, error))
                if error < best:
                    best = error
                    best_weights = {k: v.clone() for k, v in model.state_dict().items()}
            if step == steps:
                break
    model.load_state_dict(best_weights)
    return curve, min(curve, key=lambda entry: entry[1])[0]


@torch.no_grad()
def _transcribe(
    model: UnitRecognizer, examples: Sequence[_Example], batch_units: float
) -> list[str]:
    """Greedy transcripts in the order of the examples."""
    model.eval()
    texts = [""] * len(examples)
    for places in _batches(examples, batch_units, None):
        places = [place for place in places if len(examples[place].units_T)]
        if not places:
            continue
        units_BT, length_B = _collate([examples[place] for place in places])
        best_BT = model(units_BT, length_B).argmax(dim=-1).numpy()
        for place, best_T in zip(places, best_BT, strict=True):
            length = model.output_length(len(examples[place].units_T))
            classes = collapse(best_T[:length])
            texts[place] = " ".join("".join(CHARACTERS[c - 1] for c in classes).split())
    return texts
