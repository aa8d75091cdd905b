"""How much of the voice is left in the units? Who speaks, told from which units occur how often.

Held-out speakers are enrolled with some of their pieces and recognised in others: of other chapters
where a speaker has several, else of the other half of the recording. Both directions are measured,
with pieces of 10 s and, since few speakers are soon told apart by those, of 3 s. The probe is
softmax regression on the square root of the piece's unit histogram (a difference of such vectors is
Hellinger's distance); its penalty is chosen by cross-validation among the enrolled pieces. Lower is
better: units should say what is said. Beside it stands the same probe on mean and deviation of the
piece's log-mel energies, which know the voice and the microphone.

Shapes: N pieces, K speakers, D features, S samples, T units.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from speechssm.audio.features import LogMel
from speechssm.evaluation.corpus import RATE, Document, Utterance
from speechssm.evaluation.statistics import Interval, bootstrap_ratio
from speechssm.evaluation.tokenizer.probes import choose_l2, fit_softmax_regression

PIECE_SECONDS = (10.0, 3.0)
_MOST_SECONDS = 300.0  # of a speaker on each side, so that none decides what the probe learns
_LEAST_PIECES = 2
_BLOCKS = 4
# Histogram features have length 1, so that they need smaller penalties than standardised ones.
HISTOGRAM_PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class SpeakerMeasure:
    """Accuracy of a probe: the mean over speakers of the share of their pieces it recognises.

    Attributes:
        accuracy: with a bootstrap interval over speakers.
        recall_K: share of each speaker's pieces.
        speakers: their names.
        pieces: how many were classified.
    """

    accuracy: Interval
    recall_K: np.ndarray
    speakers: tuple[str, ...]
    pieces: int

    @property
    def chance(self) -> float:
        """What guessing reaches."""
        return 1 / len(self.speakers)


@dataclass(frozen=True)
class _Piece:
    """Samples of a document; `side` 0 or 1: enrolled in that direction, recognised in the other."""

    document: int
    start: int
    stop: int
    speaker: int
    side: int
    block: str


class SpeakerTask:
    """Which pieces of which speakers are enrolled and recognised; the same for all systems."""

    def __init__(
        self, documents: Sequence[Document], piece_seconds: float = PIECE_SECONDS[0]
    ) -> None:
        """Speakers with fewer than two pieces on a side are left out (`left_out` of them)."""
        most = round(_MOST_SECONDS / piece_seconds)
        spoken: dict[str, dict[str, list[tuple[int, int, int]]]] = {}
        for number, document in enumerate(documents):
            chapters = spoken.setdefault(document.speaker, {})
            for chapter, group in groupby(document.utterances, key=lambda entry: entry.chapter):
                chapters.setdefault(chapter, []).extend(_cut(number, list(group), piece_seconds))
        pieces: list[_Piece] = []
        speakers: list[str] = []
        for speaker, chapters in sorted(spoken.items()):
            sides = _sides(chapters)
            if min(map(len, sides)) < _LEAST_PIECES:
                continue
            for side, places in enumerate(sides):
                chosen = np.linspace(0, len(places) - 1, min(len(places), most))
                for count, place in enumerate(chosen.round().astype(int)):
                    block = f"{speaker}-{count * _BLOCKS // len(chosen)}"
                    pieces.append(_Piece(*places[place], len(speakers), side, block))
            speakers.append(speaker)
        self.documents = documents
        self.pieces = pieces
        self.speakers = tuple(speakers)
        self.left_out = len(spoken) - len(speakers)

    @property
    def possible(self) -> bool:
        """Whether there are two speakers to tell apart."""
        return len(self.speakers) >= 2

    def of_units(
        self, units: Sequence[np.ndarray], rate: float, *, seed: int = 0
    ) -> SpeakerMeasure:
        """The probe on unit histograms.

        Args:
            units: int64 [T] of each document. rate: units per second.
        """
        # Columns of units that never occur would only cost time.
        occurring, index = np.unique(np.concatenate(units), return_inverse=True)
        edges = np.cumsum([len(unit_T) for unit_T in units])[:-1]
        per_document = np.split(index, edges)
        features_ND = np.zeros((len(self.pieces), len(occurring)), dtype=np.float32)
        for row, piece in zip(features_ND, self.pieces, strict=True):
            window = Utterance(piece.start, piece.stop, None, "").units(rate)
            counts = np.bincount(per_document[piece.document][window], minlength=len(occurring))
            row += np.sqrt(counts / max(1, counts.sum()))
        return self.measure(
            features_ND, standardise=False, penalties=HISTOGRAM_PENALTIES, seed=seed
        )

    def of_log_mel(
        self, *, seed: int = 0, advance: Callable[[], None] = lambda: None
    ) -> SpeakerMeasure:
        """The probe on mean and deviation over time of 80 log-mel energies."""
        log_mel = LogMel()
        features = []
        for piece in self.pieces:
            pcm = self.documents[piece.document].pcm[piece.start : piece.stop]
            audio_1S = torch.from_numpy(pcm.astype(np.float32) / 32768.0)[None]
            mel_TM = log_mel(audio_1S)[0].numpy()
            features.append(np.concatenate([mel_TM.mean(0), mel_TM.std(0)]))
            advance()
        return self.measure(np.array(features), seed=seed)

    def measure(
        self,
        features_ND: np.ndarray,
        *,
        standardise: bool = True,
        penalties: Sequence[float] | None = None,
        seed: int = 0,
    ) -> SpeakerMeasure:
        """Enrol and recognise in both directions.

        Args:
            features_ND: of each of `pieces`.
            standardise, penalties: of the probe.

        Raises:
            ValueError: fewer than two speakers.
        """
        if not self.possible:
            raise ValueError("to tell speakers apart takes two of them")
        speaker_N = np.array([piece.speaker for piece in self.pieces])
        side_N = np.array([piece.side for piece in self.pieces])
        blocks = np.array([piece.block for piece in self.pieces])
        options = {"standardise": standardise}
        choices = {} if penalties is None else {"penalties": penalties}
        predicted_N = np.empty_like(speaker_N)
        for side in (0, 1):
            enrolled = side_N == side
            x_ND, y_N = features_ND[enrolled], speaker_N[enrolled]
            count = len(self.speakers)
            penalty = choose_l2(x_ND, y_N, blocks[enrolled], count, seed=seed, **options, **choices)
            probe = fit_softmax_regression(x_ND, y_N, count, penalty, **options)
            predicted_N[~enrolled] = probe.predict(features_ND[~enrolled])
        recall_K = np.bincount(speaker_N, weights=predicted_N == speaker_N) / np.bincount(speaker_N)
        accuracy = bootstrap_ratio(recall_K, np.ones_like(recall_K), seed=seed)
        return SpeakerMeasure(accuracy, recall_K, self.speakers, len(self.pieces))


def accuracy_margin(ours: SpeakerMeasure, other: SpeakerMeasure, *, seed: int = 0) -> Interval:
    """By how much `ours` recognises less than `other`, paired by speaker.

    Raises:
        ValueError: they are of different speakers.
    """
    if ours.speakers != other.speakers:
        raise ValueError("margins are between systems that were measured on the same speakers")
    return bootstrap_ratio(other.recall_K - ours.recall_K, np.ones(len(ours.speakers)), seed=seed)


def _cut(
    document: int, utterances: Sequence[Utterance], seconds: float
) -> list[tuple[int, int, int]]:
    """(document, start, stop) of equal pieces of consecutive utterances; the rest is dropped."""
    length = round(seconds * RATE)
    start, stop = utterances[0].start, utterances[-1].stop
    return [(document, at, at + length) for at in range(start, stop - length + 1, length)]


def _sides(
    chapters: dict[str, list[tuple[int, int, int]]],
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Two sides of about the same size: whole chapters, or the halves of the only one."""
    spoken = {name: places for name, places in chapters.items() if places}
    if len(spoken) == 1:
        (places,) = spoken.values()
        middle = len(places) // 2
        return places[:middle], places[middle:]
    sides: tuple[list, list] = ([], [])
    sizes = Counter({name: len(places) for name, places in spoken.items()})
    for name, _ in sorted(sizes.items(), key=lambda entry: (-entry[1], entry[0])):
        min(sides, key=len).extend(spoken[name])
    return sides
