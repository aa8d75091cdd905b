"""Features and tokenizers of other systems.

Features, for k-means tokenizers (`speechssm.tokenizer.kmeans`), are modules with `sample_rate`
(Hz), `hop_length` (samples per feature), `width`, `config` (constructor arguments as plain
containers) and `forward(audio_BS) -> features_BTD` float32 with T = S // hop_length. Whole
tokenizers are `FrameTokenizer`s. What needs weights has a function `load_...` that brings them; the
class alone is built with random ones, so that an exported folder can be read without the original.
"""

from speechssm.tokenizer.adapters.log_mel import LogMelFeatures
from speechssm.tokenizer.adapters.mfcc import MfccFeatures
from speechssm.tokenizer.adapters.mimi import MimiTokenizer, load_mimi
from speechssm.tokenizer.adapters.s3tokenizer import S3Tokenizer, load_s3tokenizer
from speechssm.tokenizer.adapters.self_supervised import (
    SelfSupervisedFeatures,
    load_self_supervised,
)
from speechssm.tokenizer.adapters.semantic import SemanticFeatures
from speechssm.tokenizer.adapters.whisper import WhisperFeatures
from speechssm.tokenizer.adapters.whisper_weights import load_whisper

__all__ = [
    "LogMelFeatures",
    "MfccFeatures",
    "MimiTokenizer",
    "S3Tokenizer",
    "SelfSupervisedFeatures",
    "SemanticFeatures",
    "WhisperFeatures",
    "load_mimi",
    "load_s3tokenizer",
    "load_self_supervised",
    "load_whisper",
]
