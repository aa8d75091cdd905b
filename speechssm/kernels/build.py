"""Compile a C kernel of this folder at first use, and keep it in the user's cache.

Plain C reached through its C ABI: no torch headers, no build step at install, and one compiled file
serves every version of torch. OpenMP is compiled in but not linked: its symbols resolve to the
runtime that torch has loaded, so that kernels and torch share one pool of threads.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # loads the OpenMP runtime whose symbols the kernels need

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
SWITCH = "SPEECHSSM_KERNELS"  # "off": use no compiled kernel
CACHE = "SPEECHSSM_KERNEL_CACHE"
# No -ffast-math: NaN and infinity must come out as they went in.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
# More of them for some kernels. Decoding: a row has the same bits in every loop that computes it.
MORE_FLAGS = {"decode": ("-ffp-contract=off",)}
OPENMP = "-fopenmp"
TIMEOUT = 120  # seconds


class BuildError(Exception):
    """A kernel cannot be compiled or loaded here; the message says why."""


@functools.cache
def load_library(name: str) -> ctypes.CDLL | None:
    """The compiled `NAME.c` of this folder; compiled now if the cache does not have it.

    Returns:
        None where it cannot be had: kernels are switched off (`SPEECHSSM_KERNELS=off`), there is no
        C compiler, or it fails. All but the first are logged once, as a warning.
    """
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "false"):
        return None
    try:
        return ctypes.CDLL(str(build(name)))
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        log.warning(
            "the kernel %s.c cannot be used (%s); slower PyTorch code runs instead. Install a C "
            "compiler, set %s to a folder that can be written, or %s=off to leave this out",
            name,
            " ".join(str(error).split())[:300],
            CACHE,
            SWITCH,
        )
        return None


def build(name: str) -> Path:
    """Path of the shared library of `NAME.c`, compiled unless the cache has it.

    Raises:
        BuildError: no compiler, or it fails, or no folder for the cache.
    """
    source = SOURCES / f"{name}.c"
    command = compiler()
    sources = [source.read_text(), *(path.read_text() for path in sorted(SOURCES.glob("*.h")))]
    flags = [*FLAGS, *MORE_FLAGS.get(name, ())]
    identity = [
        *sources,
        *command,
        *flags,
        version(command),
        cpu_capability(),
        *platform.libc_ver(),
    ]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    library = cache_folder() / f"{name}-{digest}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    # Compiled under another name and moved: other processes see the whole file or none.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects, shared = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        for openmp in ([OPENMP], []):  # without it a kernel runs on one thread
            try:
                run([*command, *flags, *openmp, "-fPIC", "-c", str(source), "-o", str(objects)])
                run([*command, "-shared", *undefined, str(objects), "-o", str(shared), "-lm"])
                ctypes.CDLL(str(shared))  # some compilers need an OpenMP runtime of their own
                break
            except (BuildError, OSError):
                if not openmp:
                    raise
        with shared.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(shared, library)
    return library


def compiler() -> list[str]:
    """The C compiler: `$CC`, or the first of cc, gcc and clang."""
    chosen = os.environ.get("CC", "").split()
    if chosen and shutil.which(chosen[0]):
        return chosen
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C compiler is on the PATH")


def version(command: list[str]) -> str:
    """First line of the compiler's own description."""
    return (run([*command, "--version"]).splitlines() or [""])[0]


def run(command: list[str]) -> str:
    """Standard output of a command; BuildError with the end of its complaints where it fails."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if result.returncode:
        raise BuildError(f"{command[0]} failed: {result.stderr.strip()[-300:]}")
    return result.stdout


def cpu_capability() -> str:
    """What -march=native depends on: code for one processor can be illegal on another."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine() + " ".join(sorted(line.partition(":")[2].split()))
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def cache_folder() -> Path:
    """`$SPEECHSSM_KERNEL_CACHE`, or `speechssm/kernels` in the user's cache folder.

    Raises:
        BuildError: neither is named, and the user has no home.
    """
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # as of a container's user that has no name
        raise BuildError(str(error)) from error
    return Path(base) / "speechssm" / "kernels"
