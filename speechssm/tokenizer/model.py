"""The semantic tokenizer's network, after what is public about USM-v2 (paper section 3).

log-mel -> two stride-2 convolutions (100 Hz -> 25 Hz) -> Conformer -> quantiser -> Conformer
-> masked-prediction heads and a CTC head. Units are the indices at the quantiser; everything above
it exists to teach them content. Attention sees the whole window in both directions, or its chunk.

Shapes: B batch, S samples, M mel bins, T time (25 Hz units; 4T mel frames), D model width,
Q target codebooks, K codes in each, L text length, V unit vocabulary, W text vocabulary,
H units of a teacher, A random numbers a row takes for augmentation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechssm.audio.features import LogMel
from speechssm.errors import ConfigError
from speechssm.fingerprint import plain
from speechssm.nn.conformer import Conformer
from speechssm.nn.finite_scalar_quantization import FiniteScalarQuantizer
from speechssm.nn.norms import normalize_over_time
from speechssm.nn.softmax_quantization import SoftmaxQuantizer
from speechssm.nn.vector_quantization import Float32Buffers, VectorQuantizer, sum_over_ranks
from speechssm.tokenizer.masking import SpecAugment, repeat_frames, span_mask, warp_frequencies
from speechssm.tokenizer.random_projection import RandomProjectionQuantizer

FRAMES_PER_UNIT = 4
# Under mel energies of speech levelled to a root mean square of 0.1, some 37 dB below their mean:
# what is quieter is rather noise of the room than speech.
MEL_FLOOR = 1e-5
WINDOW_NORMS = ("none", "input", "output", "both")


class TokenizerOutput(NamedTuple):
    """What the losses need. `mask_BT`: frames to predict; `valid_BT`: frames that hold audio."""

    units_BT: Tensor
    logits_BTQK: Tensor
    targets_BTQ: Tensor
    mask_BT: Tensor
    valid_BT: Tensor
    commitment_loss: Tensor
    text_logits_BTW: Tensor | None
    teacher_logits_BTH: Tensor | None


def level(audio_BS: Tensor, length_B: Tensor | None) -> Tensor:
    """Scale each row to a root mean square of 0.1 (at most 60 dB up) over its valid samples.

    Before the logarithm rather than after it, because the floor under the mel energies would
    otherwise cut quiet recordings at another depth than loud ones.
    """
    count_B = audio_BS.shape[1] if length_B is None else length_B.clamp(min=1).to(audio_BS.dtype)
    rms_B = torch.sqrt(audio_BS.square().sum(dim=1) / count_B)
    return audio_BS * (0.1 / rms_B.clamp(min=1e-4))[:, None]


class FeatureNormalizer(Float32Buffers):
    """Log-mel relative to its own mean over the window, over a running deviation per bin.

    Subtracting each bin's mean over the window takes out most of the microphone and room; a fixed
    divisor (a running average over training) rather than the window's own deviation keeps a
    silent window from being blown up to the size of speech.
    """

    def __init__(self, num_mels: int, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("variance_M", torch.ones(num_mels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    def forward(self, mel_BTM: Tensor, valid_BT: Tensor) -> Tensor:
        weight_BT1 = valid_BT.unsqueeze(-1).to(mel_BTM.dtype)
        count_B11 = weight_BT1.sum(dim=1, keepdim=True).clamp(min=1.0)
        mean_B1M = (mel_BTM * weight_BT1).sum(dim=1, keepdim=True) / count_B11
        centred_BTM = (mel_BTM - mean_B1M) * weight_BT1
        if self.training:
            self._update(centred_BTM.detach(), weight_BT1)
        return centred_BTM * torch.rsqrt(self.variance_M + 1e-5)

    @torch.no_grad()
    def _update(self, centred_BTM: Tensor, weight_BT1: Tensor) -> None:
        total = sum_over_ranks(
            torch.cat([centred_BTM.square().sum(dim=(0, 1)), weight_BT1.sum()[None]])
        )
        variance_M = total[:-1] / total[-1].clamp(min=1.0)
        rate = torch.where(self.initialized, 1 - self.decay, 1.0) * (total[-1] > 0)
        self.variance_M.lerp_(variance_M, rate)
        self.initialized.logical_or_(total[-1] > 0)


class Subsampling(nn.Module):
    """Mel frames [B, 4T, M] to [B, T, D] by two stride-2 convolutions."""

    def __init__(self, num_mels: int, width: int):
        super().__init__()
        self.first = nn.Conv1d(num_mels, width, kernel_size=3, stride=2, padding=1)
        self.second = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(width)

    def forward(self, mel_BTM: Tensor) -> Tensor:
        hidden_BDT = F.silu(self.first(mel_BTM.transpose(1, 2)))
        return self.norm(self.second(hidden_BDT).transpose(1, 2))


class SemanticTokenizer(nn.Module):
    """Speech at 16 kHz to 25 units a second.

    Args:
        vocab_size: V, codes of the bottleneck.
        width, num_heads, ffn_width, conv_kernel, dropout: of both Conformers.
        lower_layers, upper_layers: blocks below and above the quantiser.
        chunk_seconds: attention stays inside chunks of this length; None for the whole window.
        num_mels: M. sample_rate: Hz; one unit is sample_rate / 25 samples.
        quantization: "moving_average" or "gradient", how the codebook is learned; "finite_scalar",
            which has none; or "softmax", the most probable class of a linear classifier, which a
            teacher's units train where there is one (see `SoftmaxQuantizer`).
        finite_scalar_levels: levels of each dimension; their product is V.
        balance: of "softmax": by how much units that a window has often are held back in it.
        codebook_width: C of the lookup; None looks up the D numbers of the encoder themselves.
            ema_decay, cosine, whiten, dead_code_threshold: see `VectorQuantizer`.
        bypass_probability: share of the rows that pass around the quantiser in training. What is
            above then teaches the encoder from the first step, when the codes say little yet.
        num_target_codebooks, target_codebook_size, target_codebook_width: Q, K and width of the
            BEST-RQ targets; target_seed: fixes their projections and codebooks.
        mask_probability: of a span starting at a unit frame; mask_span: its frames (10 = 400 ms).
        mask_noise: deviation of the normal noise that replaces masked frames in training.
        spec_augment: arguments of `SpecAugment`, in training; None switches it off.
        frequency_warp: in training the mel axis is stretched by up to this share, as another
            length of the vocal tract would; the targets are not. 0 switches it off.
        window_norm: where every channel is brought to mean 0 and deviation 1 over the window, so
            that what does not change in it, a voice above all, is hard to read off: "input" of the
            Conformer, "output" (what the quantiser sees), "both" or "none".
        text_vocab_size: pieces of the sentencepiece model, without the blank; 0 for no CTC head.
        teacher_vocab_size: H, another tokenizer's units that a head below the quantiser, or the
            classifier of a softmax quantiser, predicts; 0 for none.

    Raises:
        ConfigError: values that do not go together.
    """

    def __init__(
        self,
        vocab_size: int = 32_768,
        width: int = 1024,
        num_heads: int = 8,
        ffn_width: int = 4096,
        conv_kernel: int = 5,
        lower_layers: int = 12,
        upper_layers: int = 12,
        dropout: float = 0.0,
        chunk_seconds: float | None = None,
        num_mels: int = 128,
        sample_rate: int = 16_000,
        quantization: str = "moving_average",
        finite_scalar_levels: Sequence[int] | None = None,
        balance: float = 0.0,
        codebook_width: int | None = 16,
        ema_decay: float = 0.99,
        cosine: bool = True,
        whiten: bool = True,
        dead_code_threshold: float = 0.1,
        bypass_probability: float = 0.0,
        num_target_codebooks: int = 16,
        target_codebook_size: int = 8192,
        target_codebook_width: int = 16,
        target_seed: int = 0,
        mask_probability: float = 0.05,
        mask_span: int = 10,
        mask_noise: float = 0.1,
        spec_augment: dict | None = None,
        frequency_warp: float = 0.0,
        window_norm: str = "none",
        text_vocab_size: int = 0,
        teacher_vocab_size: int = 0,
    ):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        if sample_rate % 100:
            raise ConfigError(
                f"tokenizer: sample_rate must be a multiple of 100, not {sample_rate}"
            )
        self.config = plain(config)
        self.sample_rate = sample_rate
        self.rate = 25
        self.hop_length = sample_rate // self.rate
        self.chunk = None if chunk_seconds is None else round(chunk_seconds * self.rate)
        self.vocab_size = vocab_size
        self.text_vocab_size = text_vocab_size
        self.bypass_probability = bypass_probability
        self.mask_probability = mask_probability
        self.mask_span = mask_span
        self.mask_noise = mask_noise
        self.spec_augment = None if spec_augment is None else SpecAugment(**spec_augment)
        self.frequency_warp = frequency_warp
        if window_norm not in WINDOW_NORMS:
            raise ConfigError(
                f"tokenizer: window_norm is one of {', '.join(WINDOW_NORMS)}, not {window_norm}"
            )
        self.window_norm = window_norm
        self.num_target_codebooks = num_target_codebooks
        with torch.device("cpu"):  # torchaudio's filter bank looks at its values: not on meta
            self.log_mel = LogMel(
                sample_rate=sample_rate,
                num_mels=num_mels,
                window_length=sample_rate // 40,
                hop_length=sample_rate // 100,
                floor=MEL_FLOOR,
            )
        self.normalizer = FeatureNormalizer(num_mels)
        self.subsampling = Subsampling(num_mels, width)
        shape = (width, num_heads, ffn_width, conv_kernel, dropout)
        self.lower = Conformer(lower_layers, *shape, rotary=True)
        if quantization == "finite_scalar":
            self.quantizer = FiniteScalarQuantizer(finite_scalar_levels or (), width)
            if self.quantizer.codebook_size != vocab_size:
                raise ConfigError(
                    f"tokenizer: finite_scalar_levels={list(finite_scalar_levels or ())} make "
                    f"{self.quantizer.codebook_size} units, vocab_size says {vocab_size}"
                )
        elif quantization == "softmax":
            self.quantizer = SoftmaxQuantizer(vocab_size, width, balance)
            if teacher_vocab_size not in (0, vocab_size):
                raise ConfigError(
                    f"tokenizer: quantization=softmax takes the teacher's units for its own; "
                    f"set model.vocab_size={teacher_vocab_size}"
                )
        else:
            self.quantizer = VectorQuantizer(
                vocab_size,
                width,
                codebook_width,
                ema_decay=ema_decay,
                cosine=cosine,
                dead_code_threshold=dead_code_threshold,
                whiten=whiten,
                learning=quantization,
            )
        self.upper = Conformer(upper_layers, *shape, rotary=True)
        self.targets = RandomProjectionQuantizer(
            FRAMES_PER_UNIT * num_mels,
            num_target_codebooks,
            target_codebook_size,
            target_codebook_width,
            target_seed,
        )
        self.target_head = nn.Linear(width, num_target_codebooks * target_codebook_size)
        self.text_head = nn.Linear(width, text_vocab_size + 1) if text_vocab_size else None
        # The classes of a softmax quantiser are the teacher's units themselves.
        needs_head = teacher_vocab_size and quantization != "softmax"
        self.teacher_head = nn.Linear(width, teacher_vocab_size) if needs_head else None
        self.teacher_vocab_size = teacher_vocab_size

    @property
    def num_augment_numbers(self) -> int:
        """A: bypass, warp, then those of SpecAugment; 0 where none of them is in use."""
        if not (self.bypass_probability or self.frequency_warp or self.spec_augment):
            return 0
        return 2 + (0 if self.spec_augment is None else 2 * self.spec_augment.num_masks)

    def features(self, audio_BS: Tensor, length_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalised log-mel [B, 4T, M] with T = S // hop_length, and bool valid units [B, T]."""
        batch, samples = audio_BS.shape
        num_units = samples // self.hop_length
        with torch.no_grad():
            audio_BS = level(audio_BS.float(), length_B)
            mel_BTM = self.log_mel(audio_BS)[:, : FRAMES_PER_UNIT * num_units]
            unit_T = torch.arange(num_units, device=audio_BS.device)
            if length_B is None:
                valid_BT = torch.ones_like(unit_T, dtype=torch.bool).expand(batch, -1)
            else:
                valid_BT = unit_T < (length_B // self.hop_length)[:, None]
            mel_BTM = self.normalizer(mel_BTM, repeat_frames(valid_BT, FRAMES_PER_UNIT))
        return mel_BTM, valid_BT

    @torch.no_grad()
    def hidden(self, audio_BS: Tensor) -> Tensor:
        """What the quantiser sees: audio float32 [B, S] to [B, S // hop_length, D].

        Each row is one window, fully audio. Call it in evaluation mode.
        """
        if audio_BS.shape[1] < self.hop_length:
            return audio_BS.new_zeros(len(audio_BS), 0, self.subsampling.norm.weight.shape[0])
        mel_BTM, _ = self.features(audio_BS, None)
        return self.encode(mel_BTM, None)

    def encode(self, mel_BTM: Tensor, valid_BT: Tensor | None) -> Tensor:
        """Normalised log-mel [B, 4T, M] to what the quantiser sees, [B, T, D]."""
        hidden_BTD = self.subsampling(mel_BTM.to(self.subsampling.norm.weight.dtype))
        if self.window_norm in ("input", "both"):
            hidden_BTD = normalize_over_time(hidden_BTD, valid_BT)
        hidden_BTD = self.lower(hidden_BTD, valid_BT, self.chunk)
        if self.window_norm in ("output", "both"):
            hidden_BTD = normalize_over_time(hidden_BTD, valid_BT)
        return hidden_BTD

    @torch.no_grad()
    def tokenize(self, audio_BS: Tensor) -> Tensor:
        """Audio float32 [B, S] at `sample_rate` to units int64 [B, S // hop_length].

        Each row is one window, fully audio. Call it in evaluation mode. For whole recordings use
        `WindowedTokenizer`.
        """
        if audio_BS.shape[1] < self.hop_length:
            return torch.zeros(len(audio_BS), 0, dtype=torch.int64, device=audio_BS.device)
        return self.quantizer.quantize(self.hidden(audio_BS))

    @torch.no_grad()
    def text_log_probabilities(self, audio_BS: Tensor) -> Tensor:
        """What the recognition head hears: audio float32 [B, S] to float32 [B, T, W + 1].

        Class 0 is the blank, class i + 1 is text id i. It reads the units, not the encoder.

        Raises:
            ConfigError: the tokenizer was trained without transcripts.
        """
        if self.text_head is None:
            raise ConfigError("tokenizer: no recognition head; train it with data.text_model=FILE")
        quantized_BTD = self.quantizer.lookup(self.tokenize(audio_BS))
        upper_BTD = self.upper(quantized_BTD, chunk=self.chunk)
        return self.text_head(upper_BTD).float().log_softmax(dim=-1)

    def forward(
        self,
        audio_BS: Tensor,
        length_B: Tensor,
        uniform_BT: Tensor,
        augment_BA: Tensor | None = None,
    ) -> TokenizerOutput:
        """Masked prediction over a batch of padded utterances.

        Args:
            audio_BS: float32, zero-padded. length_B: int64 valid samples.
            uniform_BT: random numbers in [0, 1) [B, S // hop_length] that choose the masked spans.
            augment_BA: random numbers in [0, 1) of bypass and augmentation, A =
                `num_augment_numbers`; None for neither.
        """
        mel_BTM, valid_BT = self.features(audio_BS, length_B)
        targets_BTQ = self.targets(mel_BTM.unflatten(1, (-1, FRAMES_PER_UNIT)).flatten(2))
        mask_BT = span_mask(uniform_BT, self.mask_probability, self.mask_span) & valid_BT
        if augment_BA is not None:
            mel_BTM = self._augment(mel_BTM, FRAMES_PER_UNIT * valid_BT.sum(dim=1), augment_BA)
        noise_BTM = (
            self.mask_noise * torch.randn_like(mel_BTM)
            if self.training
            else torch.zeros_like(mel_BTM)
        )
        masked_BT1 = repeat_frames(mask_BT, FRAMES_PER_UNIT).unsqueeze(-1)
        mel_BTM = torch.where(masked_BT1, noise_BTM, mel_BTM)

        hidden_BTD = self.encode(mel_BTM, valid_BT)
        # Codes serve frames that were seen: at inference nothing is masked, so codes that only
        # stand for masked frames would be lost from the vocabulary.
        quantized_BTD, units_BT, commitment_loss = self.quantizer(hidden_BTD, valid_BT & ~mask_BT)
        if augment_BA is not None and self.bypass_probability:
            bypass_B11 = (augment_BA[:, 0] < self.bypass_probability)[:, None, None]
            quantized_BTD = torch.where(
                bypass_B11, hidden_BTD.to(quantized_BTD.dtype), quantized_BTD
            )
        upper_BTD = self.upper(quantized_BTD, valid_BT, self.chunk)
        logits_BTQK = self.target_head(upper_BTD).unflatten(-1, (self.num_target_codebooks, -1))
        return TokenizerOutput(
            units_BT=units_BT,
            logits_BTQK=logits_BTQK,
            targets_BTQ=targets_BTQ,
            mask_BT=mask_BT,
            valid_BT=valid_BT,
            commitment_loss=commitment_loss,
            text_logits_BTW=None if self.text_head is None else self.text_head(upper_BTD),
            teacher_logits_BTH=self._teacher_logits(hidden_BTD),
        )

    def _teacher_logits(self, hidden_BTD: Tensor) -> Tensor | None:
        if not self.teacher_vocab_size:
            return None
        if self.teacher_head is None:
            return self.quantizer.logits(hidden_BTD)
        return self.teacher_head(hidden_BTD)

    def _augment(self, mel_BTM: Tensor, length_B: Tensor, augment_BA: Tensor) -> Tensor:
        if self.frequency_warp:
            factor_B = 1 + self.frequency_warp * (2 * augment_BA[:, 1] - 1)
            mel_BTM = warp_frequencies(mel_BTM, factor_B)
        if self.spec_augment is not None:
            mel_BTM = self.spec_augment(mel_BTM, length_B, augment_BA[:, 2:].unflatten(1, (-1, 2)))
        return mel_BTM
