"""Semantic tokenizer: speech at 16 kHz to 25 discrete units a second."""
