"""Features of other systems at 25 Hz, for k-means tokenizers (`speechssm.tokenizer.kmeans`).

Each is a module with `sample_rate` (Hz), `hop_length` (samples per feature), `width`, `config`, and
`forward(audio_BS) -> features_BTD` float32 with T = S // hop_length.
"""

from speechssm.tokenizer.adapters.log_mel import LogMelFeatures
from speechssm.tokenizer.adapters.self_supervised import (
    SelfSupervisedFeatures,
    load_self_supervised,
)

__all__ = ["LogMelFeatures", "SelfSupervisedFeatures", "load_self_supervised"]
