"""When was each piece of text said? Forced alignment with a tokenizer's own recognition head.

An alternative to phones that needs no other package. The labels are pieces of the head's
sentencepiece model, placed by the head itself.

Shapes: B batch, S samples, T frames, W text pieces and the blank, L pieces of a text.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor, nn
from torchaudio.functional import forced_align

from speechssm.audio.resample import resample
from speechssm.errors import ConfigError
from speechssm.evaluation.corpus import RATE, Document
from speechssm.evaluation.tokenizer.alignment import Alignments, Job, Segments, align_with
from speechssm.evaluation.tokenizer.forced_alignment import Segment

CACHE = "alignments-ctc.json"
# A frame without a piece of its own takes the nearest piece, if that is so near.
_REACH_SECONDS = 0.1


def align_text_pieces(
    documents: Sequence[Document],
    folder: str | Path,
    *,
    model: nn.Module,
    text_model: str | Path,
    identity: str,
    progress: Callable[[str, int], Callable[[], None]] | None = None,
) -> Alignments:
    """Pieces of text of all transcribed utterances.

    Args:
        folder: where `alignments-ctc.json` is kept.
        model: has sample_rate, hop_length and `text_log_probabilities(audio_BS)` -> [B, T, W] with
            the blank as class 0 and piece i as class i + 1.
        text_model: its sentencepiece model.
        identity: what names the model and its weights; alignments of another one are not reused.
        progress: as in `align_phones`.

    Raises:
        ConfigError: the sentencepiece model is missing or of another size.
    """
    if not Path(text_model).is_file():
        raise ConfigError(f"{text_model} does not exist: give the head's sentencepiece model")
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(text_model))
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))

    def align(jobs: Sequence[Job]) -> Iterator[Segments]:
        for job in jobs:
            audio_S = np.frombuffer(job.pcm, dtype="<i2").astype(np.float32) / 32768.0
            audio_BS = torch.from_numpy(resample(audio_S, RATE, model.sample_rate))[None]
            if audio_BS.shape[1] < model.hop_length:
                yield None
                continue
            with torch.no_grad():
                scores_TW = model.text_log_probabilities(audio_BS.to(device))[0].float().cpu()
            if scores_TW.shape[1] != encoder.vocab_size() + 1:
                raise ConfigError(
                    f"{text_model} has {encoder.vocab_size()} pieces, the head "
                    f"{scores_TW.shape[1] - 1}: give the model of its training"
                )
            reach = _REACH_SECONDS * model.sample_rate / model.hop_length
            found = align_ids(scores_TW, encoder.encode(job.text), reach)
            yield found and [
                Segment(encoder.id_to_piece(number), start, frames)
                for number, start, frames in found
            ]

    return align_with(
        align,
        documents,
        Path(folder) / CACHE,
        aligner=identity,
        frame_seconds=model.hop_length / model.sample_rate,
        progress=progress,
    )


def align_ids(
    scores_TW: Tensor, ids: Sequence[int], reach: float
) -> list[tuple[int, int, int]] | None:
    """The most likely path of a text through CTC scores (Graves et al. 2006).

    Args:
        scores_TW: log-probabilities, class 0 the blank.
        ids: of the pieces, without the blank: piece i is class i + 1.
        reach: frames without a piece take the nearest one that is at most so many frames away.

    Returns:
        (id, first frame, frames) of runs of frames; None where the text is longer than the sound.
    """
    repeats = sum(one == other for one, other in itertools.pairwise(ids))
    if not ids or len(ids) + repeats > len(scores_TW):
        return None
    targets_1L = torch.tensor([[number + 1 for number in ids]], dtype=torch.int32)
    path_1T, _ = forced_align(scores_TW[None], targets_1L, blank=0)
    path_T = path_1T[0].numpy()
    spoken = np.flatnonzero(path_T)
    places = np.arange(len(path_T))
    after = np.searchsorted(spoken, places).clip(max=len(spoken) - 1)
    before = (np.searchsorted(spoken, places, side="right") - 1).clip(min=0)
    nearer = np.abs(spoken[before] - places) <= np.abs(spoken[after] - places)
    nearest = np.where(nearer, spoken[before], spoken[after])
    label_T = np.where(np.abs(nearest - places) <= reach, path_T[nearest], 0)
    edges = np.flatnonzero(np.diff(label_T)) + 1
    starts = np.concatenate([[0], edges])
    stops = np.concatenate([edges, [len(label_T)]])
    return [
        (int(label_T[start]) - 1, int(start), int(stop - start))
        for start, stop in zip(starts, stops, strict=True)
        if label_T[start]
    ]
