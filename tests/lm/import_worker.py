"""Child process of test_import: how much memory an import takes beside that of the model.

Arguments: checkpoint, width, layers. Prints the bytes of the model, and by how many the peak during
the import lies above what the process held with the model built.
"""

import sys
from pathlib import Path

import safetensors.torch  # noqa: F401  whatever is loaded at first use is loaded before

from speechssm.lm.checkpoints.initialise import initialise_from
from speechssm.lm.griffin import Griffin


def status(key: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


path, width, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = Griffin(16, width, layers, 4, window=8)
size = sum(parameter.nbytes for parameter in model.parameters())
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
initialise_from(model, path)
print(size, status("VmHWM") - before)
