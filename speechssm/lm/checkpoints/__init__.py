"""Weights in the layouts of other libraries: RecurrentGemma and Gemma in, `transformers` out."""
