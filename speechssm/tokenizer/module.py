"""Training of the semantic tokenizer: masked prediction, CTC where there is text, commitment, and
where a teacher is named, prediction of its features.

Shapes: B batch, S samples, T time (25 Hz), L text length, V unit vocabulary, Q target codebooks,
K codes in each, H width of the teacher's features, A random numbers of augmentation in a row.
"""

from typing import Any

import hydra.utils
import lightning
import torch
from torch import Tensor, nn

from speechssm.errors import ConfigError
from speechssm.nn.optimization import build_optimizer
from speechssm.nn.vector_quantization import sum_over_ranks
from speechssm.tokenizer.losses import ctc_loss, histogram, mean_where, perplexity, prediction_loss
from speechssm.tokenizer.model import FeatureNormalizer


class Teacher(nn.Module):
    """Frozen features of another encoder, each relative to its window's mean and running spread.

    The mean over the window holds much of the voice and the microphone; what is left changes with
    what is said.
    """

    def __init__(self, features: nn.Module):
        super().__init__()
        # In a list, so that its weights are no part of checkpoints.
        self._features = [features.eval().requires_grad_(False)]
        self.normalizer = FeatureNormalizer(features.width)

    @property
    def features(self) -> nn.Module:
        return self._features[0]

    def _apply(self, fn, recurse=True):
        self.features._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, audio_BS: Tensor, valid_BT: Tensor) -> Tensor:
        """Audio float32 [B, S] to float32 [B, S // hop_length, H]."""
        return self.normalizer(self.features(audio_BS).float(), valid_BT)


class TokenizerModule(lightning.LightningModule):
    """LightningModule of the tokenizer stage.

    Batch: `audio` float32 [B, S], `audio_length` int64 [B], `text` int64 [B, L] zero-padded,
    `text_length` int64 [B] with 0 for no transcript.

    Args:
        model: `_target_` and arguments of a `SemanticTokenizer`.
        optimizer: see `build_optimizer`.
        ctc_weight, commitment_weight: of those losses; masked prediction counts 1.
        unmasked_weight: of predicting the targets at frames that are not masked, as HuBERT may.
            There the units have to carry what the frame itself holds, which teaches them faster.
        teacher: `_target_` and arguments of features at 25 Hz (`speechssm.tokenizer.adapters`)
            that a head below the quantiser predicts; None for no distillation. The teacher is
            not saved with the run.
        teacher_weight: of the mean squared error to the teacher's normalised features.
        seed: of the masks in validation, which are the same every time.

    Raises:
        ConfigError: the teacher's rate is not the tokenizer's.
    """

    def __init__(
        self,
        model: dict,
        optimizer: dict,
        ctc_weight: float = 0.3,
        commitment_weight: float = 0.25,
        unmasked_weight: float = 0.0,
        teacher: dict | None = None,
        teacher_weight: float = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        self.teacher = None
        if teacher is not None:
            self.teacher = Teacher(hydra.utils.instantiate(teacher))
            model = {**model, "teacher_width": self.teacher.features.width}
        self.save_hyperparameters()
        self.model = hydra.utils.instantiate(model)
        if self.teacher is not None and (
            self.teacher.features.sample_rate,
            self.teacher.features.hop_length,
        ) != (self.model.sample_rate, self.model.hop_length):
            raise ConfigError(
                f"stage.teacher has {self.teacher.features.hop_length} samples a frame at "
                f"{self.teacher.features.sample_rate} Hz, the tokenizer {self.model.hop_length} at "
                f"{self.model.sample_rate} Hz; choose features at {self.model.rate} Hz"
            )
        self.teacher_weight = teacher_weight
        self.ctc_weight = ctc_weight
        self.commitment_weight = commitment_weight
        self.unmasked_weight = unmasked_weight
        self.seed = seed
        self.optimizer_config = optimizer
        self.register_buffer("unit_counts_V", torch.zeros(self.model.vocab_size), persistent=False)
        target_counts_QK = torch.zeros(self.model.targets.codebook_QKC.shape[:2])
        self.register_buffer("target_counts_QK", target_counts_QK, persistent=False)

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
            figures["mlm_loss"]
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
            teacher_BTH = self.teacher(batch["audio"], output.valid_BT)
            error_BT = (output.teacher_BTH.float() - teacher_BTH).square().mean(dim=-1)
            figures["teacher_loss"] = mean_where(error_BT, output.valid_BT)
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
