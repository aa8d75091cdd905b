"""How good are the units of tokenizers? One file per measure, `evaluate.py` puts them together."""
