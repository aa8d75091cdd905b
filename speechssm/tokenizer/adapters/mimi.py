"""The semantic codebook of Mimi (Defossez et al. 2024): 12.5 units a second out of 2048.

The encoder is transformers' `MimiModel`; its decoder and acoustic codebooks are removed.
Shapes: B batch, S samples, T units.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speechssm.errors import CheckpointError, ConfigError
from speechssm.fingerprint import plain
from speechssm.tokenizer.adapters.hub import local_path

EXAMPLE = "kyutai/mimi"
# What a saved config of transformers says about itself rather than about the architecture.
NO_ARCHITECTURE = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "model_type",
}  # fmt: skip
# The decoder's parts, as older and newer versions of transformers name them.
DECODER = ("decoder", "decoder_transformer", "upsample")


def transformers() -> Any:
    """The optional package.

    Raises:
        ConfigError: it is not installed, or too old.
    """
    try:
        import transformers

        transformers.MimiModel  # noqa: B018 - classes are imported when they are first named
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the adapter mimi needs a package ({' '.join(str(error).split())[:80]}): "
            "pip install 'transformers>=5.6'"
        ) from error
    return transformers


class MimiTokenizer(nn.Module):
    """A `FrameTokenizer`. `load_mimi` brings weights.

    Args:
        architecture: of transformers' `MimiConfig`, where it differs from the published model's.

    Raises:
        ConfigError: transformers is not installed, or has no such option.
    """

    def __init__(self, architecture: Mapping[str, Any] | None = None):
        super().__init__()
        package = transformers()
        self.config = {"architecture": plain(architecture or {})}
        try:
            config = package.MimiConfig(**self.config["architecture"])
            network = package.MimiModel(config)
        except Exception as error:  # transformers raises of every kind
            raise ConfigError(f"mimi: {' '.join(str(error).split())[:160]}") from error
        for name in DECODER:
            if name in network._modules:
                setattr(network, name, None)
        network.quantizer.acoustic_residual_vector_quantizer = None
        self.network = network.eval()
        self.num_semantic = int(config.num_semantic_quantizers)
        self.sample_rate = int(config.sampling_rate)
        self.hop_length = round(config.sampling_rate / config.frame_rate)
        self.vocab_size = int(config.codebook_size)

    @torch.no_grad()
    def tokenize(self, audio_BS: Tensor) -> Tensor:
        """Audio float32 [B, S] at 24 kHz to int64 [B, S // 1920]."""
        num_units = audio_BS.shape[1] // self.hop_length
        if num_units == 0:
            return torch.zeros(len(audio_BS), 0, dtype=torch.int64, device=audio_BS.device)
        audio_B1S = audio_BS[:, None, : num_units * self.hop_length]
        codes_BQT = self.network.encode(audio_B1S, num_quantizers=self.num_semantic).audio_codes
        return codes_BQT[:, 0].long()


def load_mimi(weights: str | Path | None) -> MimiTokenizer:
    """Mimi as transformers publishes it.

    Args:
        weights: folder with `config.json` and `model.safetensors`, or a hub id such as kyutai/mimi.

    Raises:
        ConfigError: transformers is not installed, or no weights are named.
        CheckpointError: no weights there, or of another model.
    """
    package = transformers()
    path = local_path(weights, ("config.json", "model.safetensors"), EXAMPLE)
    try:
        config = package.MimiConfig.from_pretrained(path, local_files_only=True)
        whole, report = package.MimiModel.from_pretrained(
            path, config=config, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{path} holds no Mimi for transformers ({reason}); {EXAMPLE} is published in that form"
        ) from error
    tokenizer = MimiTokenizer(architecture_of(config, package.MimiConfig()))
    needed = tokenizer.network.state_dict()
    missing = sorted(set(report["missing_keys"]) & set(needed))
    if missing:
        raise CheckpointError(f"{path} lacks {missing[0]}: it is no Mimi, or not all of it")
    state = whole.state_dict()
    tokenizer.network.load_state_dict({name: state[name] for name in needed})
    return tokenizer.eval()


def architecture_of(config: Any, published: Any) -> dict[str, Any]:
    """Where a `MimiConfig` differs from the published one."""
    default = published.to_dict()
    return {
        key: value
        for key, value in sorted(config.to_dict().items())
        if key not in NO_ARCHITECTURE and key in default and value != default[key]
    }
