"""How good are the units of tokenizers? One file per measure, `evaluate.py` puts them together."""

from speechssm.evaluation.tokenizer.units import evaluate_tokenizer

__all__ = ["evaluate_tokenizer"]
