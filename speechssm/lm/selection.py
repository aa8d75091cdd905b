"""Metrics that rank the checkpoints of a language model (`conf/select/`)."""

from collections.abc import Mapping

import numpy as np

from speechssm.lm.backbone import LanguageModel
from speechssm.lm.likelihood import score_all


class HeldOutLikelihood:
    """Nats per unit of the documents, each scored from its beginning through the model's state."""

    name = "nats_per_unit"
    unit = "nats/unit"
    higher_is_better = False

    def __call__(self, model: LanguageModel, documents: Mapping[str, np.ndarray]) -> float:
        losses = score_all(model, list(documents.values()))
        return float(np.concatenate(losses).mean(dtype=np.float64))
