"""Tokenizers of others, and k-means ones, as folders that `load("tokenizer", ...)` takes.

The folder holds everything that tokenizing needs, the encoder below the used layer included, so
that its fingerprint covers all of it and nothing has to be downloaded again.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speechssm import __version__
from speechssm.audio.io import read_audio
from speechssm.audio.resample import resample
from speechssm.data.conversion import HoursProgress
from speechssm.data.shards import INDEX_NAME, ShardIndex, read_index
from speechssm.data.stream import SampleOrder, ShardReaders
from speechssm.errors import AudioError, CheckpointError, ConfigError
from speechssm.fingerprint import fingerprint
from speechssm.loading import Saved, build_model, find, naming_device, read, write_own
from speechssm.report.rows import write_text
from speechssm.tokenizer.adapters import SemanticFeatures
from speechssm.tokenizer.kmeans import (
    KMeansTokenizer,
    constructor,
    fit_kmeans,
    kmeans_tokenizer,
)

log = logging.getLogger(__name__)

# Features see what tokenizing will show them: windows of at most this length.
WINDOW_SECONDS = 30.0
# Shards whose samples are mixed, so that the pool holds many speakers.
MIX_SHARDS = 16
ORIGINS = {
    "LogMelFeatures": "log-mel energies, no trained weights",
    "MfccFeatures": "cepstra, no trained weights",
    "SelfSupervisedFeatures": "a pretrained pipeline of torchaudio; see its page for the licence",
    "SemanticFeatures": "the encoder of a tokenizer of this project",
    "WhisperFeatures": "the encoder of Whisper (OpenAI, MIT licence) or of a model tuned from it",
    "S3Tokenizer": "S3Tokenizer v2 of CosyVoice 2 (Apache-2.0)",
    "MimiTokenizer": "Mimi's semantic codebook (Kyutai, CC-BY-4.0)",
}


def load_semantic(
    weights: str | Path,
    checkpoint: str = "best-or-last",
    upper: bool = False,
    window_norm: bool = False,
) -> SemanticFeatures:
    """Features of a tokenizer trained by this project, below its quantiser or above it.

    Args:
        weights, checkpoint: as `name_or_path` and `checkpoint` of `speechssm.loading.load`.
        upper, window_norm: see `SemanticFeatures`.

    Raises:
        CheckpointError: see `load`; or a tokenizer that has no encoder of ours.
    """
    saved = read(find("tokenizer", weights, checkpoint))
    model = build_model(saved)
    if not hasattr(model, "hidden"):
        raise CheckpointError(
            f"{saved.path} holds {saved.model.get('_target_')}; features=semantic needs a "
            "SemanticTokenizer: name a run of `python train.py stage=tokenizer`"
        )
    return SemanticFeatures(model, upper, window_norm)


@dataclass
class Seen:
    """What a pass over the shards came by. `skipped`: samples whose audio cannot be decoded."""

    seconds: float = 0.0
    samples: int = 0
    skipped: list[str] = field(default_factory=list)


def shard_features(
    index: ShardIndex,
    features: nn.Module,
    *,
    seed: int = 0,
    max_hours: float | None = None,
    advance: Callable[[float], None] = lambda seconds: None,
    seen: Seen | None = None,
) -> Iterator[Tensor]:
    """Features [N, D] of the samples of audio shards, sample by sample in shuffled order.

    Args:
        index: of one split.
        features: a module of `speechssm.tokenizer.adapters`, on any device.
        seed: of the order. max_hours: of audio, then it ends.
        advance: called with the seconds of each sample.
        seen: is filled.
    """
    seen = Seen() if seen is None else seen
    order = SampleOrder([shard.samples for shard in index.shards], seed, MIX_SHARDS)
    readers = ShardReaders(index, keep=2 * MIX_SHARDS)
    device = next((value.device for value in features.buffers()), torch.device("cpu"))
    rate = features.sample_rate
    for number in range(index.samples):
        if max_hours is not None and seen.seconds >= 3600 * max_hours:
            return
        shard, position = order.locate(number)
        sample = readers[shard].sample(position)
        name = f"{index.shards[shard].name}: {sample['__key__']}"
        try:
            audio_S, own_rate = read_audio(sample["flac"], name=name)
        except AudioError as error:
            log.warning("skipped: %s", error)
            seen.skipped.append(name)
            continue
        seconds = len(audio_S) / own_rate
        seen.seconds += seconds
        seen.samples += 1
        audio_BS = torch.from_numpy(resample(audio_S, own_rate, rate))[None].to(device)
        for window_BS in audio_BS.split(round(WINDOW_SECONDS * rate), dim=1):
            yield features(window_BS).flatten(0, 1)
        advance(seconds)


def prepare_kmeans(
    features: nn.Module,
    data: str | Path,
    out: str | Path,
    *,
    vocab_size: int = 500,
    seed: int = 0,
    pool_size: int | None = None,
    passes: int = 1,
    max_hours: float | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Path:
    """Fit k-means on the features of the `train` split and write the tokenizer.

    Args:
        features: a module of `speechssm.tokenizer.adapters`.
        data: audio shards. out: folder of the tokenizer.
        vocab_size: V. seed: of the order of the data and of the clustering.
        pool_size, passes: see `fit_kmeans`.
        max_hours: of audio in a pass; all if None.
        device: where features and distances are computed.
        progress: draw a bar.

    Returns:
        `out`; it is left as it is if the same was made there before.

    Raises:
        ConfigError: `out` holds something else; see also `fit_kmeans`.
        ShardError: no audio shards, or damaged ones.
    """
    if max_hours is not None and max_hours <= 0:
        raise ConfigError(f"max_hours={max_hours} must be positive, or null for all")
    folder, out = Path(data) / "train", Path(out)
    index = read_index(folder, "audio")
    features = features.eval()
    request = {
        "command": "kmeans",
        "features": dict(constructor(features)),
        "weights": fingerprint({}, features.state_dict()),
        "data": sha256((folder / INDEX_NAME).read_bytes()).hexdigest(),
        "vocab_size": vocab_size,
        "seed": seed,
        "pool_size": pool_size,
        "passes": passes,
        "max_hours": max_hours,
    }
    if made_before(out, request):
        return out
    with naming_device(device):
        features = features.to(device)
    total = min(index.seconds, float("inf") if max_hours is None else 3600 * max_hours)
    of_passes: list[Seen] = []

    def batches(advance: Callable[[float], None]) -> Iterator[Tensor]:
        of_passes.append(Seen())
        options = {"seed": seed, "max_hours": max_hours, "advance": advance, "seen": of_passes[-1]}
        return shard_features(index, features, **options)

    with HoursProgress("kmeans", passes * total, progress) as advance, torch.no_grad():
        clusters = fit_kmeans(
            partial(batches, advance), vocab_size, seed=seed, pool_size=pool_size, passes=passes
        )
    seen = of_passes[0]
    tokenizer = kmeans_tokenizer(features, clusters.centroids_VD).cpu()
    text = (
        f"Clusters: fitted on {seen.seconds / 3600:.2f} h of the train split "
        f"({seen.samples} samples, {clusters.vectors} vectors, {clusters.pooled} of them by full "
        f"iterations, {passes} {'pass' if passes == 1 else 'passes'}); mean squared distance "
        f"{clusters.mean_squared_distance:.5g}"
    )
    if seen.skipped:
        text += f"; {len(seen.skipped)} samples could not be decoded and were left out"
    write_tokenizer(tokenizer, out, request, [text])
    log.info("%s", text)
    return out


def prepare_tokenizer(tokenizer: nn.Module, out: str | Path) -> Path:
    """Write a tokenizer of others, with its weights, as a folder of ours.

    Args:
        tokenizer: a `FrameTokenizer` of `speechssm.tokenizer.adapters`.

    Returns:
        `out`; it is left as it is if the same was made there before.

    Raises:
        ConfigError: `out` holds something else.
    """
    request = {
        "command": "tokenizer",
        "network": dict(constructor(tokenizer)),
        "weights": fingerprint({}, tokenizer.state_dict()),
    }
    if not made_before(Path(out), request):
        write_tokenizer(tokenizer, Path(out), request, [])
    return Path(out)


def made_before(out: Path, request: dict[str, Any]) -> bool:
    """Whether `out` holds what the same request has made.

    Raises:
        ConfigError: it holds something else.
    """
    path = out / "config.json"
    if not path.is_file():
        if out.is_dir() and any((out / name).exists() for name in ("checkpoints", "train")):
            raise ConfigError(f"{out} holds a run or shards; choose another out=FOLDER")
        return False
    try:
        before = json.loads(path.read_text())["details"]["made_by"]
        different = [key for key in request if before.get(key) != request[key]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        different = ["origin"]
    if different or not (out / "model.safetensors").is_file():
        raise ConfigError(
            f"{out} holds another tokenizer (its {', '.join(different) or 'weights'} differ): "
            "choose another out=FOLDER, or delete that folder"
        )
    log.info("%s: finished before, left as it is", out)
    return True


def write_tokenizer(
    tokenizer: nn.Module, out: Path, request: dict[str, Any], facts: list[str]
) -> None:
    """Write `CARD.md`, `model.safetensors` and, last, `config.json`."""
    config = json.loads(json.dumps(constructor(tokenizer)))
    details = {"run": out.name, "step": None, "made_by": request}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "CARD.md", card(tokenizer, out.name, facts))
    weights = tokenizer.state_dict()
    write_own(tokenizer, Saved(out, "tokenizer", config, weights, details), out)
    # safetensors writes for the owner alone; weights are for whoever may read their config.
    (out / "model.safetensors").chmod((out / "config.json").stat().st_mode)
    size = (out / "model.safetensors").stat().st_size / 2**20
    log.info("%s: %d units, %.1f MiB", out, tokenizer.vocab_size, size)


def card(tokenizer: nn.Module, name: str, facts: list[str]) -> str:
    """The text of `CARD.md`."""
    count = sum(value.numel() for value in tokenizer.state_dict().values())
    network = tokenizer.features if isinstance(tokenizer, KMeansTokenizer) else tokenizer
    what = type(network).__name__
    if network is not tokenizer:
        what += " and k-means"
    rate = tokenizer.sample_rate / tokenizer.hop_length
    lines = [
        f"# tokenizer: {name}",
        "",
        f"{what}: {tokenizer.vocab_size} units, {rate:g} a second, from speech at "
        f"{tokenizer.sample_rate} Hz; {count / 1e6:.2f} M numbers, written by speechssm "
        f"{__version__}.",
        "",
        "```python",
        "from speechssm import load",
        "",
        'tokenizer = load("tokenizer", "THIS FOLDER")',
        "```",
        "",
        f"- Encoder: {ORIGINS.get(type(network).__name__, 'not stated')}",
        f"- Config: {json.dumps(dict(constructor(network)))}",
        *(f"- {fact}" for fact in facts),
        "",
    ]
    return "\n".join(lines)
