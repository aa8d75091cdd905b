"""Training of the semantic tokenizer: masked prediction, CTC where there is text, commitment, and
where a teacher is named, prediction of its units.

Shapes: B batch, S samples, T time (25 Hz), L text length, V unit vocabulary, Q target codebooks,
K codes in each, H units of the teacher, A random numbers of augmentation in a row.
"""

import logging
from typing import Any

import hydra.utils
import lightning
import torch
from torch import Tensor, nn

from speechssm.errors import ConfigError
from speechssm.nn.initial_weights import other_network
from speechssm.nn.optimization import build_optimizer
from speechssm.nn.vector_quantization import sum_over_ranks
from speechssm.tokenizer.losses import ctc_loss, histogram, mean_where, perplexity, prediction_loss

log = logging.getLogger(__name__)


class TokenizerModule(lightning.LightningModule):
    """LightningModule of the tokenizer stage.

    Batch: `audio` float32 [B, S], `audio_length` int64 [B], `text` int64 [B, L] zero-padded,
    `text_length` int64 [B] with 0 for no transcript.

    Args:
        model: `_target_` and arguments of a `SemanticTokenizer`.
        optimizer: see `build_optimizer`.
        masked_weight, ctc_weight, commitment_weight: of those losses. Of a softmax quantiser the
            commitment is by how much the entropy of average use falls short of its most.
        unmasked_weight: of predicting the targets at frames that are not masked, as HuBERT may.
            There the units have to carry what the frame itself holds, which teaches them faster.
        teacher: another tokenizer, by what `speechssm.loading.load` takes, whose units a head below
            the quantiser, or the classifier of a softmax quantiser, predicts at every frame, as
            HuBERT does those of k-means; None for no distillation. The teacher is not saved with
            the run.
        teacher_weight: of that cross entropy.
        initial_weights: another tokenizer, named as the teacher is, that a new run begins with:
            every tensor that has the same name and shape in both (see `begin_with`). A codebook of
            another size, or heads that one of them lacks, begin anew.
        seed: of the masks in validation, which are the same every time.

    Raises:
        ConfigError: the teacher's rate is not the tokenizer's; a softmax quantiser without a
            teacher and without commitment; at the beginning of training,
            initial weights of another kind or size.
    """

    def __init__(
        self,
        model: dict,
        optimizer: dict,
        masked_weight: float = 1.0,
        ctc_weight: float = 0.3,
        commitment_weight: float = 0.25,
        unmasked_weight: float = 0.0,
        teacher: str | None = None,
        teacher_weight: float = 2.0,
        initial_weights: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        # In a list, so that its weights are no part of checkpoints.
        self._teacher: list[nn.Module] = []
        if teacher is not None:
            self._teacher = [other_network("tokenizer", teacher).eval().requires_grad_(False)]
            model = {**model, "teacher_vocab_size": self.teacher.vocab_size}
        self.save_hyperparameters()
        self.model = hydra.utils.instantiate(model)
        if self.teacher is not None:
            check_teacher(self.teacher, self.model)
        elif model.get("quantization") == "softmax" and not commitment_weight:
            raise ConfigError(
                "a softmax quantiser without stage.teacher has nothing that keeps its units in "
                "use: name a teacher, or set stage.commitment_weight above 0"
            )
        self.teacher_weight = teacher_weight
        self.masked_weight = masked_weight
        self.ctc_weight = ctc_weight
        self.commitment_weight = commitment_weight
        self.unmasked_weight = unmasked_weight
        self.seed = seed
        self.optimizer_config = optimizer
        self.register_buffer("unit_counts_V", torch.zeros(self.model.vocab_size), persistent=False)
        target_counts_QK = torch.zeros(self.model.targets.codebook_QKC.shape[:2])
        self.register_buffer("target_counts_QK", target_counts_QK, persistent=False)

    def setup(self, stage: str) -> None:
        """A new run takes over its initial weights; one that is resumed has its own."""
        if stage == "fit" and self.hparams.initial_weights and not self.trainer.ckpt_path:
            begin_with(self.model, other_network("tokenizer", self.hparams.initial_weights))

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0] if self._teacher else None

    def _apply(self, fn, recurse=True):
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def losses(
        self, batch: dict[str, Tensor], uniform_BT: Tensor, augment_BA: Tensor | None = None
    ) -> dict[str, Tensor]:
        """All figures of one batch; `loss` is what is minimised; histograms of the units seen [V]
        and of the targets at all valid frames [Q, K]."""
        output = self.model(batch["audio"], batch["audio_length"], uniform_BT, augment_BA)
        seen_BT = output.valid_BT & ~output.mask_BT
        loss_BT, correct_BT = prediction_loss(output.logits_BTQK, output.targets_BTQ)
        figures = {
            "mlm_loss": mean_where(loss_BT, output.mask_BT),
            "mlm_accuracy": mean_where(correct_BT, output.mask_BT),
            "unmasked_loss": mean_where(loss_BT, seen_BT),
            "commitment": output.commitment_loss,
        }
        loss = (
            self.masked_weight * figures["mlm_loss"]
            + self.unmasked_weight * figures["unmasked_loss"]
            + self.commitment_weight * output.commitment_loss
        )
        if output.text_logits_BTW is not None:
            figures["ctc_loss"] = ctc_loss(
                output.text_logits_BTW,
                output.valid_BT.sum(dim=1),
                batch["text"],
                batch["text_length"],
            )
            loss = loss + self.ctc_weight * figures["ctc_loss"]
        if self.teacher is not None:
            # As windowed tokenizing fills a window: the teacher takes a row for audio throughout.
            audio_BS = repeat_to_the_end(batch["audio"], batch["audio_length"])
            teacher_BT = self.teacher.tokenize(audio_BS)
            loss_BT, correct_BT = prediction_loss(
                output.teacher_logits_BTH[:, :, None], teacher_BT[:, :, None]
            )
            figures["teacher_loss"] = mean_where(loss_BT, output.valid_BT)
            figures["teacher_accuracy"] = mean_where(correct_BT, output.valid_BT)
            loss = loss + self.teacher_weight * figures["teacher_loss"]
        figures["target_counts"] = torch.stack(
            [
                histogram(targets_BT, output.valid_BT, self.target_counts_QK.shape[1])
                for targets_BT in output.targets_BTQ.unbind(-1)
            ]
        )
        figures["unit_counts"] = histogram(output.units_BT, seen_BT, self.model.vocab_size)
        return {"loss": loss, **figures}

    def mask_numbers(self, audio_BS: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform numbers [B, T] that choose the masks; a CPU generator makes them repeatable."""
        shape = (audio_BS.shape[0], audio_BS.shape[1] // self.model.hop_length)
        if generator is None:
            return torch.rand(shape, device=audio_BS.device)
        return torch.rand(shape, generator=generator).to(audio_BS.device)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        audio_BS = batch["audio"]
        augment_BA = None
        if self.model.num_augment_numbers:
            shape = (len(audio_BS), self.model.num_augment_numbers)
            augment_BA = torch.rand(shape, device=audio_BS.device)
        figures = self.losses(batch, self.mask_numbers(audio_BS, None), augment_BA)
        figures["unit_perplexity"] = perplexity(figures.pop("unit_counts").detach())
        del figures["target_counts"]
        self.log("train/loss", figures["loss"], prog_bar=True)
        self.log_dict({f"train/{k}": v for k, v in figures.items() if k != "loss"})
        return figures["loss"]

    def on_validation_epoch_start(self) -> None:
        self.unit_counts_V.zero_()
        self.target_counts_QK.zero_()

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        generator = torch.Generator("cpu").manual_seed(self.seed + batch_index)
        figures = self.losses(batch, self.mask_numbers(batch["audio"], generator))
        self.unit_counts_V += figures.pop("unit_counts")
        self.target_counts_QK += figures.pop("target_counts")
        self.log_dict(
            {f"val/{k}": v for k, v in figures.items()},
            batch_size=len(batch["audio"]),
            sync_dist=True,
        )

    def on_validation_epoch_end(self) -> None:
        counts_V = sum_over_ranks(self.unit_counts_V.clone())
        self.log("val/unit_perplexity", perplexity(counts_V), prog_bar=True)
        # What a predictor would reach that knows how often each target occurs, and nothing else.
        counts_QK = sum_over_ranks(self.target_counts_QK.clone())
        unigram = torch.stack([perplexity(counts_K).log() for counts_K in counts_QK]).mean()
        self.log("val/mlm_unigram_loss", unigram)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer, scheduler = build_optimizer(
            self.model.parameters(),
            self.optimizer_config,
            self.trainer.max_steps if self.trainer.max_steps > 0 else None,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def repeat_to_the_end(audio_BS: Tensor, length_B: Tensor) -> Tensor:
    """Rows that go on from their beginning where their audio ends; empty ones stay as they are."""
    place_S = torch.arange(audio_BS.shape[1], device=audio_BS.device)
    return audio_BS.gather(1, place_S % length_B.clamp(min=1)[:, None])


@torch.no_grad()
def begin_with(model: nn.Module, other: nn.Module) -> None:
    """Copy every tensor that both have, by name and shape; one line says what began anew.

    A codebook is taken over whole or not at all: its averages belong to its codes. The classifier
    of a softmax quantiser goes on from the other's teacher head, where that has as many units: let
    both have the same teacher. The frozen targets stay those of the model's own seed.

    Raises:
        ConfigError: the encoders are not of the same kind and size.
    """
    ours, theirs = model.state_dict(), other.state_dict()
    if hasattr(model.quantizer, "classifier"):
        for kind in ("weight", "bias"):
            if f"teacher_head.{kind}" in theirs:
                theirs[f"quantizer.classifier.{kind}"] = theirs[f"teacher_head.{kind}"]
    same = {name for name in ours if name in theirs and ours[name].shape == theirs[name].shape}
    codes = {name for name in ours if name.startswith("quantizer.") and "classifier" not in name}
    if not codes <= same:
        same -= codes
    same -= {name for name in ours if name.startswith("targets.")}
    encoder = {name for name in ours if name.startswith(("subsampling.", "lower."))}
    if not encoder <= same:
        raise ConfigError("stage.initial_weights names a tokenizer of another kind or size")
    for name in same:
        ours[name].copy_(theirs[name])
    anew = {name.rsplit(".", 1)[0] for name in ours.keys() - same}
    anew = sorted(name for name in anew if not name.startswith("targets"))
    if anew:
        log.info("stage.initial_weights: begun anew: %s", ", ".join(anew))
    if "quantizer.classifier.weight" in same:
        log.info("stage.initial_weights: the classifier goes on; it must be of the same teacher")


def check_teacher(teacher: nn.Module, model: nn.Module) -> None:
    """Raises ConfigError unless both make the same number of units of the same audio."""
    theirs, ours = ((network.sample_rate, network.hop_length) for network in (teacher, model))
    if theirs != ours:
        raise ConfigError(
            f"stage.teacher has a unit for {theirs[1]} samples at {theirs[0]} Hz, the tokenizer "
            f"for {ours[1]} at {ours[0]} Hz; choose a teacher of {model.rate} units a second"
        )
