"""How late is a codec's sound? Its delay, so that all systems are compared at the same samples.

Vocoders (Codec2) keep no waveform: what can be aligned of theirs are the energies of bands. Codecs
of waveforms are aligned to the sample. So bands give the delay, and waveforms correct it by up to
1 ms; both are summed over clips, since a codec has one delay.

Shapes: S samples, D delays.
"""

import itertools
from collections.abc import Sequence

import numpy as np

_BANDS = (100, 400, 800, 1400, 2200, 3400)  # Hz: where even narrowband vocoders have speech
_SMOOTHING_SECONDS = 0.01
_FINE_SECONDS = 0.001


def band_energies(audio_S: np.ndarray, rate: int) -> list[np.ndarray]:
    """Logarithm of the smoothed energy of each band, float64 [S], with its mean removed."""
    spectrum = np.fft.rfft(audio_S)
    frequency = np.fft.rfftfreq(len(audio_S), 1 / rate)
    window = np.hanning(round(_SMOOTHING_SECONDS * rate) + 2)
    energies = []
    for low, high in itertools.pairwise(_BANDS):
        kept = spectrum * ((frequency >= low) & (frequency < high))
        band_S = np.fft.irfft(kept, len(audio_S))
        smooth_S = np.convolve(np.square(band_S), window / window.sum(), mode="same")
        log_S = np.log(smooth_S + 1e-6)
        energies.append(log_S - log_S.mean())
    return energies


def correlations(reference_S: np.ndarray, estimate_S: np.ndarray, reach: int) -> np.ndarray:
    """Normalised cross-correlation at delays of -reach ... reach samples: float64 [D]."""
    samples = min(len(reference_S), len(estimate_S))
    reference_S, estimate_S = reference_S[:samples], estimate_S[:samples]
    size = 2 * samples
    product = np.fft.rfft(estimate_S, size) * np.conj(np.fft.rfft(reference_S, size))
    circular = np.fft.irfft(product, size)
    norm = np.linalg.norm(reference_S) * np.linalg.norm(estimate_S)
    places = np.arange(-reach, reach + 1)
    return circular[places] / norm if norm else np.zeros(len(places))


def find_delay(
    references: Sequence[np.ndarray],
    estimates: Sequence[np.ndarray],
    rate: int,
    *,
    max_seconds: float = 0.05,
) -> int:
    """The delay in samples, of at most `max_seconds` either way, that fits all clips best.

    Args:
        references, estimates: pairs of float32 [S] at `rate` Hz, each longer than 2 `max_seconds`.
    """
    reach, fine = round(max_seconds * rate), round(_FINE_SECONDS * rate)
    coarse_D = np.zeros(2 * reach + 1)
    exact_D = np.zeros(2 * reach + 1)
    for reference_S, estimate_S in zip(references, estimates, strict=True):
        samples = min(len(reference_S), len(estimate_S))
        reference_S, estimate_S = reference_S[:samples], estimate_S[:samples]
        exact_D += correlations(reference_S, estimate_S, reach)
        bands = zip(
            band_energies(reference_S, rate), band_energies(estimate_S, rate), strict=True
        )  # fmt: skip
        coarse_D += sum(correlations(one, other, reach) for one, other in bands)
    if not coarse_D.any():
        return 0  # silence is never late
    place = int(np.argmax(coarse_D))
    first = max(0, place - fine)
    return first + int(np.argmax(exact_D[first : place + fine + 1])) - reach


def undo_delay(audio_S: np.ndarray, delay: int, samples: int) -> np.ndarray:
    """The audio without its delay: float32 [samples], padded with zeros where it has no samples."""
    result = np.zeros(samples, dtype=np.float32)
    kept = audio_S[max(0, delay) :]
    offset = max(0, -delay)
    length = max(0, min(len(kept), samples - offset))
    result[offset : offset + length] = kept[:length]
    return result
