"""The implementations that ours is measured against. They come with the `dev` extra."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from speechssm.errors import ConfigError

# gate_BTD, input_BTD -> states_BTD, from a state of zeros.
Scan = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

INSTALL = "pip install 'speechssm[dev]'"


class MissingPeer(ConfigError):
    """A peer is not installed; the message says how to get it."""


def named(package: str, what: str) -> str:
    """`RecurrentGemma (transformers 5.23.0)`."""
    try:
        return f"{what} ({package} {importlib.metadata.version(package)})"
    except importlib.metadata.PackageNotFoundError:
        return f"{what} ({package})"


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def transformers_scan() -> tuple[str, Scan]:
    """The recurrence of `transformers`' RecurrentGemma: a Python loop over positions.

    Raises:
        MissingPeer: not installed, or of a version without it.
    """
    try:
        from transformers.models.recurrent_gemma import modeling_recurrent_gemma as code

        loop = code.RecurrentGemmaRglru._rnn_scan
    except (ImportError, AttributeError):
        raise MissingPeer(f"transformers' RecurrentGemma: {INSTALL}") from None

    def scan(gate_BTD: torch.Tensor, input_BTD: torch.Tensor) -> torch.Tensor:
        reset_BT1 = torch.zeros_like(gate_BTD[..., :1], dtype=torch.bool)
        # The method looks at nothing of the layer it belongs to.
        return loop(None, input_BTD, gate_BTD, reset_BT1, None)[0]

    return named("transformers", "RecurrentGemma's loop"), scan


def deepmind_scan() -> tuple[str, Scan]:
    """`rnn_scan` of DeepMind's PyTorch code: a Python loop over positions.

    Raises:
        MissingPeer: not installed.
    """
    if not installed("recurrentgemma"):
        raise MissingPeer(f"DeepMind's recurrentgemma: {INSTALL}")
    with torch_half_of_recurrentgemma():
        loop = importlib.import_module("recurrentgemma.torch.layers").rnn_scan

    def scan(gate_BTD: torch.Tensor, input_BTD: torch.Tensor) -> torch.Tensor:
        reset_BT = torch.zeros_like(gate_BTD[..., 0], dtype=torch.bool)
        return loop(input_BTD, gate_BTD, reset_BT, None)[0]

    return named("recurrentgemma", "DeepMind's loop"), scan


@contextlib.contextmanager
def torch_half_of_recurrentgemma() -> Iterator[None]:
    """`recurrentgemma.torch` can be imported inside: the package's `__init__` would need JAX."""
    spec = importlib.util.find_spec("recurrentgemma")
    assert spec is not None and spec.origin is not None
    before = {name: module for name, module in sys.modules.items() if is_recurrentgemma(name)}
    package = types.ModuleType("recurrentgemma")
    package.__path__ = [str(Path(spec.origin).parent)]
    sys.modules["recurrentgemma"] = package
    try:
        yield
    finally:
        for name in filter(is_recurrentgemma, list(sys.modules)):
            del sys.modules[name]
        sys.modules.update(before)


def is_recurrentgemma(name: str) -> bool:
    return name.split(".")[0] == "recurrentgemma"


def associative_scan() -> tuple[str, Scan]:
    """PyTorch's own associative scan, of logarithmic depth (a prototype, not in its public API).

    Raises:
        MissingPeer: this version of PyTorch has none.
    """
    try:
        from torch._higher_order_ops import associative_scan as prototype
    except ImportError:
        raise MissingPeer("torch's associative_scan: this version has none") from None

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def scan(gate_BTD: torch.Tensor, input_BTD: torch.Tensor) -> torch.Tensor:
        pair = (gate_BTD, input_BTD)
        return prototype(combine, pair, dim=1, combine_mode="generic")[1]

    return named("torch", "associative_scan"), scan


SCANS = (transformers_scan, deepmind_scan, associative_scan)


def installed_scans() -> tuple[dict[str, Scan], list[str]]:
    """Scans of the peers that are installed, by name, and a line for each that is missing."""
    found, missing = {}, []
    for peer in SCANS:
        try:
            name, scan = peer()
        except MissingPeer as error:
            missing.append(f"Left out, not installed: {error}.")
        else:
            found[name] = scan
    return found, missing


SOUNDSTORM_INSTALL = (
    "pip install beartype einops hyper-connections tqdm && "
    "pip install --no-deps soundstorm-pytorch==0.6.1"
)


def soundstorm_pytorch(config: Mapping[str, Any], steps: int, rate: int = 25) -> torch.nn.Module:
    """`soundstorm-pytorch`'s SoundStorm in the size of our config, with random weights.

    Layers, width, heads, feed-forward, kernel, levels and codebook are ours. Where its network has
    more than ours by default (convolutions of twice the width, four residual streams) it gets as
    much as ours: it computes less than as it comes.

    Args:
        config: of `speechssm.soundstorm.model.SoundStorm`.
        steps: passes of each level; the schedule is its default, linear.
        rate: units a second.

    Raises:
        MissingPeer: not installed.
        ConfigError: a size that it cannot have.
    """
    if not (installed("soundstorm_pytorch") and installed("hyper_connections")):
        raise MissingPeer(f"soundstorm-pytorch: {SOUNDSTORM_INSTALL}")
    width, ffn_width = int(config["width"]), int(config["ffn_width"])
    if ffn_width % width:
        raise ConfigError(f"soundstorm-pytorch: ffn_width={ffn_width} is no multiple of {width}")
    code = generating_half_of_soundstorm()
    network = code.ConformerWrapper(
        codebook_size=config["codebook_size"],
        num_quantizers=config["num_quantizers"],
        conformer={
            "dim": width,
            "depth": config["num_layers"],
            "heads": config["num_heads"],
            "dim_head": width // config["num_heads"],
            "ff_mult": ffn_width // width,
            "conv_kernel_size": config["conv_kernel"],
            "conv_expansion_factor": 1,
            "num_residual_streams": 1,
        },
    )
    return code.SoundStorm(
        network,
        steps=steps,
        num_semantic_token_ids=config["unit_vocab_size"],
        # Units and frames of one clock: only their ratio counts.
        wav2vec_target_sample_hz=rate,
        wav2vec_downsample_factor=1,
        codec_target_sample_hz=rate * config.get("unit_repeat", 2),
        codec_downsample_factor=1,
    ).eval()


def generating_half_of_soundstorm() -> types.ModuleType:
    """`soundstorm_pytorch.soundstorm`, without the packages that it needs for other things.

    Its `__init__` would need a trainer's, and its codec and text models come from packages of tens
    of dependencies; decoding uses none of them. Empty classes stand in for those that are missing.
    """
    spec = importlib.util.find_spec("soundstorm_pytorch")
    assert spec is not None and spec.origin is not None
    package = types.ModuleType("soundstorm_pytorch")
    package.__path__ = [str(Path(spec.origin).parent)]
    stands_in = {"soundstorm_pytorch": package}
    for name, classes in (
        ("audiolm_pytorch", ("SoundStream", "HubertWithKmeans", "FairseqVQWav2Vec")),
        ("spear_tts_pytorch", ("TextToSemantic",)),
    ):
        stands_in[name] = types.ModuleType(name)
        for entry in classes:
            setattr(stands_in[name], entry, type(entry, (torch.nn.Module,), {}))
    before = {name: sys.modules[name] for name in stands_in if name in sys.modules}
    sys.modules.update(stands_in)
    try:
        code = importlib.import_module("soundstorm_pytorch.soundstorm")
    finally:
        for name in stands_in:
            del sys.modules[name]
        sys.modules.update(before)
    code.tqdm = lambda passes, **_: passes  # a bar for every level
    return code


def recurrent_gemma(model: torch.nn.Module) -> tuple[str, torch.nn.Module]:
    """`transformers`' RecurrentGemma with the configuration and the weights of our Griffin.

    Raises:
        MissingPeer: `transformers` is not installed.
        ConfigError: it cannot express the configuration.
    """
    if not installed("transformers"):
        raise MissingPeer(f"transformers' RecurrentGemma: {INSTALL}")
    from speechssm.lm.checkpoints.export import to_transformers

    return named("transformers", "RecurrentGemma"), to_transformers(model)
