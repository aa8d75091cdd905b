"""Recordings that are silent or clipped: kept, and counted so that they are known of."""

import numpy as np

# Silent: the loudest sample is 60 dB below full scale. Clipped: so large a share is at full scale.
SILENT_LEVEL = 1e-3
CLIPPING_LEVEL, CLIPPING_SHARE = 0.999, 1e-3


class Level:
    """Of a recording that comes in blocks: how loud it gets, and how much of it is clipped."""

    def __init__(self) -> None:
        self._peak = 0.0
        self._clipped = self._samples = 0

    def add(self, audio: np.ndarray) -> None:
        """The next float32 [S]."""
        level = np.abs(audio)
        self._peak = max(self._peak, float(level.max(initial=0.0)))
        self._clipped += int((level > CLIPPING_LEVEL).sum())
        self._samples += len(audio)

    @property
    def silent(self) -> bool:
        return self._peak < SILENT_LEVEL

    @property
    def clipped(self) -> bool:
        return self._clipped > CLIPPING_SHARE * self._samples
