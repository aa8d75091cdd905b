"""S3Tokenizer v2 of CosyVoice 2 (Du et al. 2024): 25 units a second out of 6561 = 3^8.

The network and the reading of its weights are those of the optional package `s3tokenizer`.
Shapes: B batch, S samples, M mel bins, F mel frames (100 Hz), T units.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from speechssm.errors import CheckpointError, ConfigError
from speechssm.tokenizer.adapters.hub import local_path
from speechssm.tokenizer.adapters.whisper_mel import WhisperLogMel

SAMPLE_RATE, RATE = 16_000, 25
# Of an attention head; the package fixes it.
HEAD_WIDTH = 64
# The positions that the package's rotary embedding has.
MAX_UNITS = 2048
WEIGHT_FILES = ("speech_tokenizer_v2.onnx", "speech_tokenizer_v2_25hz.onnx")
EXAMPLE = "FunAudioLLM/CosyVoice2-0.5B"


class S3Tokenizer(nn.Module):
    """A `FrameTokenizer`. `load_s3tokenizer` brings weights.

    Args:
        num_layers, num_heads: of the encoder, whose width is 64 * num_heads; the defaults are the
            published ones.
        num_mels: M.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, num_layers: int = 6, num_heads: int = 20, num_mels: int = 128):
        super().__init__()
        try:
            from s3tokenizer.model_v2 import ModelConfig, S3TokenizerV2
        except ImportError as error:
            raise ConfigError(
                f"the adapter s3tokenizer needs a package ({error}): pip install s3tokenizer, or "
                "this project with its extra `adapters`"
            ) from error
        self.config = {"num_layers": num_layers, "num_heads": num_heads, "num_mels": num_mels}
        self.network = S3TokenizerV2(
            "speech_tokenizer_v2_25hz",
            ModelConfig(
                n_mels=num_mels,
                n_audio_state=HEAD_WIDTH * num_heads,
                n_audio_head=num_heads,
                n_audio_layer=num_layers,
            ),
        )
        with torch.device("cpu"):
            self.log_mel = WhisperLogMel(num_mels)
        self.sample_rate = SAMPLE_RATE
        self.hop_length = SAMPLE_RATE // RATE
        self.vocab_size = int(self.network.config.n_codebook_size)

    @torch.no_grad()
    def tokenize(self, audio_BS: Tensor) -> Tensor:
        """Audio float32 [B, S] at 16 kHz to int64 [B, S // 640].

        Raises:
            ConfigError: a window longer than the encoder has positions for.
        """
        num_units = audio_BS.shape[1] // self.hop_length
        if num_units > MAX_UNITS:
            raise ConfigError(
                f"S3Tokenizer takes windows of at most {MAX_UNITS / RATE:g} s, not "
                f"{num_units / RATE:g} s; choose shorter windows"
            )
        if num_units == 0:
            return torch.zeros(len(audio_BS), 0, dtype=torch.int64, device=audio_BS.device)
        mel_BMF = self.log_mel(audio_BS[:, : num_units * self.hop_length])
        length_B = torch.full((len(audio_BS),), mel_BMF.shape[2], device=audio_BS.device)
        # Not `network.quantize`, which beyond 30 s makes windows of its own.
        hidden_BTD, _ = self.network.encoder(mel_BMF, length_B)
        units_BT = self.network.quantizer.encode(hidden_BTD)
        return units_BT.clone().long()  # a clone, because the package's are inference tensors


def load_s3tokenizer(weights: str | Path | None) -> S3Tokenizer:
    """The published S3Tokenizer v2.

    Args:
        weights: `speech_tokenizer_v2.onnx`, a state dict of the package (`.pt`), a folder that
            holds the former, or a hub id such as FunAudioLLM/CosyVoice2-0.5B.

    Raises:
        ConfigError: the package is not installed, or no weights are named.
        CheckpointError: no weights there, or of another model.
    """
    network = S3Tokenizer()
    path = local_path(weights, WEIGHT_FILES, EXAMPLE)
    if path.is_dir():
        found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path} holds no {WEIGHT_FILES[0]}; name the file or its folder")
        path = found[0]
    read_weights(network, path)
    return network.eval()


def read_weights(tokenizer: S3Tokenizer, path: Path) -> None:
    """Fill a tokenizer from an `.onnx` or `.pt` file.

    Raises:
        CheckpointError: unreadable, or of another model.
    """
    from s3tokenizer.utils import onnx2torch

    try:
        if path.suffix == ".onnx":
            state = onnx2torch(str(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        tokenizer.network.load_state_dict(state)
    except Exception as error:  # of protobuf, pickle or torch
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{path} are no weights of S3Tokenizer v2 ({reason}); it is published as "
            f"{WEIGHT_FILES[0]} of {EXAMPLE}"
        ) from error
