"""SoundStream: a causal neural codec with a residual vector quantiser (arXiv 2107.03312)."""

from speechssm.soundstream.model import SoundStream

__all__ = ["SoundStream"]
