"""Greedy word errors of a tokenizer's own recognition head.

Shapes: B batch, S samples, T units, W text pieces.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from torch import nn

from speechssm.audio.resample import resample
from speechssm.data.text import normalise_text
from speechssm.errors import ConfigError
from speechssm.evaluation.tokenizer.error_rates import ErrorRates, collapse, error_rates


class AudioUtterance(NamedTuple):
    """Samples float32 [S] of an utterance, what is said in it, and by whom."""

    audio_S: np.ndarray
    text: str
    speaker: str


@torch.no_grad()
def head_word_error(
    model: nn.Module,
    utterances: Sequence[AudioUtterance],
    text_model: str | Path,
    rate: int = 16_000,
    *,
    advance: Callable[[], None] | None = None,
) -> ErrorRates:
    """Greedy error rates of a tokenizer's own CTC head, each utterance by itself.

    Args:
        model: has `sample_rate` and `text_log_probabilities(audio_BS)`, float32 [B, T, W + 1]:
            class 0 is the blank, class i + 1 is id i of `text_model`.
        utterances: audio at `rate` Hz; those without words in their text are left out.
        text_model: the sentencepiece model that the head was trained with.
        advance: called for each utterance.

    Raises:
        ConfigError: the sentencepiece model is missing or of another size, the model has no head,
            or there are no transcripts.
    """
    if not hasattr(model, "text_log_probabilities"):
        raise ConfigError(f"{type(model).__name__} has no recognition head")
    if not Path(text_model).is_file():
        raise ConfigError(f"text_model={text_model} does not exist: give the sentencepiece model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(text_model))
    device = next((t.device for t in model.state_dict().values()), torch.device("cpu"))
    references, hypotheses, speakers = [], [], []
    for utterance in utterances:
        reference = normalise_text(utterance.text or "")
        if reference:
            audio_S = np.ascontiguousarray(utterance.audio_S, dtype=np.float32)
            audio_BS = torch.from_numpy(resample(audio_S, rate, model.sample_rate))[None]
            scores_TW = model.text_log_probabilities(audio_BS.to(device))[0].float().cpu()
            if scores_TW.shape[-1] != pieces.vocab_size() + 1:
                raise ConfigError(
                    f"text_model={text_model} has {pieces.vocab_size()} pieces, but the head was "
                    f"trained on {scores_TW.shape[-1] - 1}: give the model of that training"
                )
            ids = [entry - 1 for entry in collapse(scores_TW.argmax(dim=-1).numpy())]
            references.append(reference)
            hypotheses.append(normalise_text(pieces.decode(ids)))
            speakers.append(utterance.speaker)
        if advance:
            advance()
    if not references:
        raise ConfigError("recognition: there are no transcripts to measure against")
    return error_rates(references, hypotheses, speakers)
