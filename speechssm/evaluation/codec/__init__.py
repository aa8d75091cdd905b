"""How close are codecs to the original? One file per part, `evaluate.py` puts them together."""
