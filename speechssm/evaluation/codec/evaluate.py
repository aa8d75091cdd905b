"""How close is the codec's sound to the original? Distances on held-out crops, for every number of
quantisers, against silence and against the mean spectrum of the training audio.

Shapes: B batch, S samples, T frames, M mel bands, Q quantiser levels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from speechssm.audio.features import LogMel
from speechssm.audio.io import read_audio, write_audio
from speechssm.errors import ConfigError
from speechssm.evaluation.documents import iterate_samples
from speechssm.evaluation.results import progress_bar, write_results
from speechssm.evaluation.statistics import entropy, grouped_mean
from speechssm.report.plots import plot_dots
from speechssm.report.rows import Comparison, Row
from speechssm.report.style import save_figure

SILENCE, MEAN_SPECTRUM = "silence", "mean spectrum"


class Crop(NamedTuple):
    """A piece of a recording: audio float32 [S] and the document it is from."""

    audio: np.ndarray
    document: str


def log_mel_distance(reference_BTM: torch.Tensor, estimate_BTM: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of natural-log mel energies, over frames and bands: float [B].

    Both are `LogMel` features at their defaults: 80 bands, windows of 25 ms every 10 ms, 1e-6
    added to the energies. 0 for identical sound; 1 means a factor of e in energy on average.
    """
    return (reference_BTM - estimate_BTM).abs().mean(dim=(1, 2))


def si_sdr(reference_BS: torch.Tensor, estimate_BS: torch.Tensor) -> torch.Tensor:
    """Scale-invariant signal-to-distortion ratio in dB, float [B] (Le Roux et al. 2019).

    10 log10(|a s|^2 / |a s - e|^2) with a = <e, s> / |s|^2, both with their mean removed. NaN
    where the reference or the estimate is constant (silence has no such ratio).
    """
    reference_BS = (reference_BS - reference_BS.mean(-1, keepdim=True)).double()
    estimate_BS = (estimate_BS - estimate_BS.mean(-1, keepdim=True)).double()
    energy_B1 = reference_BS.square().sum(-1, keepdim=True)
    scale_B1 = (reference_BS * estimate_BS).sum(-1, keepdim=True) / energy_B1
    target_BS = scale_B1 * reference_BS
    error_B = (target_BS - estimate_BS).square().sum(-1)
    ratio_B = 10 * torch.log10(target_BS.square().sum(-1) / error_B)
    silent_B = estimate_BS.square().sum(-1) == 0
    return torch.where(silent_B, torch.full_like(ratio_B, torch.nan), ratio_B)


def choose_crops(
    data: str | Path, split: str, *, count: int, seconds: float, sample_rate: int, seed: int
) -> tuple[list[Crop], int]:
    """A seeded choice of pieces from the whole split, cut to `seconds` from a seeded start.

    Returns:
        At most `count` crops, in the split's order, and how many samples were too short.
    """
    generator = np.random.default_rng(seed)
    reservoir: list[tuple[int, dict]] = []
    length, short, seen = int(seconds * sample_rate), 0, 0
    for sample in iterate_samples(data, split):
        if sample["json"].get("seconds", seconds) < seconds:
            short += 1
            continue
        if len(reservoir) < count:
            reservoir.append((seen, sample))
        elif (place := int(generator.integers(seen + 1))) < count:
            reservoir[place] = (seen, sample)
        seen += 1
    crops = []
    for _, sample in sorted(reservoir, key=lambda entry: entry[0]):
        audio, _ = read_audio(sample["flac"], sample_rate, name=sample["__key__"])
        start = int(generator.integers(max(len(audio) - length, 0) + 1))
        document = str(sample["json"].get("document", sample["__key__"]))
        crops.append(Crop(audio[start : start + length], document))
    return crops, short


class MeanSpectrum:
    """The training audio's mean: log-mel [M] as a constant, and noise of the mean power spectrum.

    Args:
        crops: of the training split.
        features: the log-mel that distances are measured with.
    """

    def __init__(self, crops: Sequence[Crop], features: LogMel):
        mels, powers = [], []
        self.window = torch.hann_window(512)
        for crop in crops:
            audio_1S = torch.from_numpy(crop.audio)[None]
            mels.append(features(audio_1S)[0].mean(0))
            powers.append(self._transform(audio_1S)[0].abs().square().mean(-1))
        self.log_mel_M = torch.stack(mels).mean(0)
        self.power_F = torch.stack(powers).mean(0)

    def _transform(self, audio_BS: torch.Tensor) -> torch.Tensor:
        return torch.stft(audio_BS, 512, 128, window=self.window, return_complex=True)

    def noise(self, samples: int, seed: int) -> torch.Tensor:
        """Gaussian noise [S] with the mean power spectrum."""
        generator = torch.Generator().manual_seed(seed)
        white_1S = torch.randn(1, samples, generator=generator)
        shaped_1FT = self._transform(white_1S) * self.power_F.sqrt()[None, :, None]
        return torch.istft(shaped_1FT, 512, 128, window=self.window, length=samples)[0]


@torch.inference_mode()
def evaluate_codec(
    codec: torch.nn.Module,
    data: str | Path,
    out: str | Path,
    *,
    num_quantizers: Sequence[int] | None = None,
    max_crops: int = 48,
    crop_seconds: float = 4.0,
    examples: int = 3,
    seed: int = 0,
    details: Mapping[str, object] | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """Log-mel distance, SI-SDR and codebook perplexity on held-out crops.

    The baselines are silence and the mean spectrum: a constant log-mel frame for the distance,
    noise of the training audio's mean power spectrum for SI-SDR. Intervals are a 95% bootstrap over
    documents; margins are paired by document.

    Args:
        codec: SoundStream in eval mode.
        data: audio shard folder with `train` and `heldout`.
        out: folder for metrics.json, table.md, the plot, and `examples/`.
        num_quantizers: how many levels to decode from; 1, 2, 4, ... and all unless given.
        max_crops: held-out crops to measure; as many training crops give the mean spectrum.
        crop_seconds: length of a crop; shorter pieces are counted and left out.
        examples: so many crops are written as originals and reconstructions, to listen to.
        details: `seed`, `config_hash`, `model`, `scale` of the codec's run, for the rows.

    Raises:
        ShardError: no audio shards there. ConfigError: no piece is long enough.
    """
    rate, levels = codec.sample_rate, codec.num_quantizers
    device = next(codec.parameters()).device
    numbers = list(num_quantizers or usual_numbers(levels))
    if min(numbers) < 1 or max(numbers) > levels:
        raise ConfigError(f"num_quantizers={numbers}: the codec has 1 to {levels}")
    hop_seconds = codec.hop_length / rate
    seconds = int(crop_seconds / hop_seconds) * hop_seconds
    options = {"count": max_crops, "seconds": seconds, "sample_rate": rate}
    crops, short = choose_crops(data, "heldout", seed=seed, **options)
    train_crops, _ = choose_crops(data, "train", seed=seed + 1, **options)
    if not crops or not train_crops:
        raise ConfigError(f"{data} has no piece of {seconds:g} s; lower crop_seconds")
    features = LogMel(sample_rate=rate)
    mean = MeanSpectrum(train_crops, features)

    distances: dict[str, list[float]] = {SILENCE: [], MEAN_SPECTRUM: []}
    ratios: dict[str, list[float]] = {MEAN_SPECTRUM: []}
    used_QC = np.zeros((levels, codec.codebook_size), dtype=np.int64)
    out = Path(out)
    listened: set[str] = set()
    with progress_bar(show_progress) as progress:
        for index, crop in enumerate(progress.track(crops, description="codec on held-out crops")):
            audio_1S = torch.from_numpy(crop.audio)[None]
            mel_1TM = features(audio_1S)
            silence_1TM = features(torch.zeros_like(audio_1S))
            distances[SILENCE].append(log_mel_distance(mel_1TM, silence_1TM).item())
            constant_1TM = mean.log_mel_M.expand_as(mel_1TM)
            distances[MEAN_SPECTRUM].append(log_mel_distance(mel_1TM, constant_1TM).item())
            noise_1S = mean.noise(audio_1S.shape[1], seed + index)[None]
            ratios[MEAN_SPECTRUM].append(si_sdr(audio_1S, noise_1S).item())
            codes_1QT = codec.encode(audio_1S.to(device))
            for level in range(levels):
                used_QC[level] += np.bincount(
                    codes_1QT[0, level].cpu().numpy(), minlength=codec.codebook_size
                )
            for number in numbers:
                estimate_1S = codec.decode(codes_1QT[:, :number]).float().cpu()
                estimate_1S = estimate_1S[:, : audio_1S.shape[1]]
                name = system_name(number)
                distance = log_mel_distance(mel_1TM, features(estimate_1S)).item()
                distances.setdefault(name, []).append(distance)
                ratios.setdefault(name, []).append(si_sdr(audio_1S, estimate_1S).item())
            if len(listened) < examples and crop.document not in listened:
                listened.add(crop.document)
                stem = out / "examples" / f"{len(listened)}"
                write_audio(f"{stem}-original.flac", crop.audio, rate)
                reconstruction = np.clip(estimate_1S[0].numpy(), -1, 1)
                write_audio(f"{stem}-reconstruction.flac", reconstruction, rate)

    documents = [crop.document for crop in crops]
    rows = measured_rows(distances, ratios, documents, used_QC, seed, details or {})
    comparisons = []
    ours = system_name(numbers[-1])
    for baseline in (SILENCE, MEAN_SPECTRUM):
        difference = np.array(distances[baseline]) - np.array(distances[ours])
        margin = grouped_mean(difference, documents, seed=seed)
        comparisons.append(
            Comparison.of(
                "soundstream",
                "log_mel_distance",
                ours,
                baseline if baseline == SILENCE else "mean training spectrum",
                float(np.mean(distances[ours])),
                float(np.mean(distances[baseline])),
                "nats",
                higher_is_better=False,
                low=margin.low,
                high=margin.high,
                n=margin.n,
            )
        )
    write_results(
        out,
        rows,
        comparisons=comparisons,
        title="Codec on held-out crops",
        sections={"skipped": {"too short": short}, "crops": len(crops)},
    )
    shown = [row for row in rows if row.name == "log_mel_distance"]
    drawing = plot_dots(
        [row.system for row in shown],
        [row.value for row in shown],
        [row.low for row in shown],
        [row.high for row in shown],
        "log-mel distance in nats on held-out crops (lower is better)",
        colours=[-1 if row.system in (SILENCE, MEAN_SPECTRUM) else 0 for row in shown],
    )
    save_figure(drawing, out / "log_mel_distance.svg")
    return rows


def measured_rows(
    distances: Mapping[str, Sequence[float]],
    ratios: Mapping[str, Sequence[float]],
    documents: list[str],
    used_QC: np.ndarray,
    seed: int,
    details: Mapping[str, object],
) -> list[Row]:
    """Rows of the distances and ratios per system and the perplexity of each level's codes."""
    rows = []
    for metric, unit, values in (
        ("log_mel_distance", "nats", distances),
        ("si_sdr", "dB", ratios),
    ):
        for system, numbers in values.items():
            baseline = system in (SILENCE, MEAN_SPECTRUM)
            finite = np.isfinite(numbers)
            kept = [name for name, keep in zip(documents, finite, strict=True) if keep]
            if not kept:
                rows.append(Row(metric, system, "heldout", None, unit, n=0))
                continue
            interval = grouped_mean(np.asarray(numbers)[finite], kept, seed=seed)
            rows.append(Row(metric, system, "heldout", interval.value, unit, interval.low,
                            interval.high, interval.n,
                            **({} if baseline else details)))  # fmt: skip
    for level, counts in enumerate(used_QC):
        perplexity = float(np.exp(entropy(counts)))
        rows.append(Row("codebook_perplexity", f"level {level + 1}", "heldout", perplexity, "codes",
                        n=int(counts.sum()), **details))  # fmt: skip
    return rows


def usual_numbers(levels: int) -> list[int]:
    """1, 2, 4, ... and all levels."""
    numbers = [1]
    while numbers[-1] * 2 < levels:
        numbers.append(numbers[-1] * 2)
    return numbers if numbers[-1] == levels else [*numbers, levels]


def system_name(number: int) -> str:
    """How rows call the codec with so many levels."""
    return f"codec, {number} quantiser{'s' if number > 1 else ''}"
