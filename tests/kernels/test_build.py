"""Compiling kernels: the cache, its key, and what happens where nothing can be compiled."""

import ctypes
import logging

import pytest

from speechssm.kernels import build

SOURCE = """
#include <omp.h>
int twice(int x) { int sum = 0;
  #pragma omp parallel for reduction(+:sum) num_threads(2)
  for (int i = 0; i < 2; ++i) sum += x;
  return sum; }
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of sources and an empty cache."""
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(build.SWITCH, raising=False)
    (tmp_path / "small.c").write_text(SOURCE)
    build.load_library.cache_clear()
    yield tmp_path
    build.load_library.cache_clear()


def test_a_kernel_is_compiled_once_and_called_through_its_c_abi(folder, monkeypatch):
    library = build.load_library("small")
    library.twice.argtypes, library.twice.restype = [ctypes.c_int], ctypes.c_int
    assert library.twice(21) == 42
    (built,) = (folder / "cache").iterdir()  # and no temporary beside it
    before = built.stat().st_mtime_ns
    assert build.build("small") == built
    assert built.stat().st_mtime_ns == before


def test_another_processor_or_source_gets_a_library_of_its_own(folder, monkeypatch):
    first = build.build("small")
    monkeypatch.setattr(build, "cpu_capability", lambda: "another processor")
    second = build.build("small")
    (folder / "small.c").write_text(SOURCE + "int more(void) { return 1; }")
    third = build.build("small")
    assert len({first, second, third}) == 3


def test_flags_of_the_compiler_get_a_library_of_their_own(folder, monkeypatch):
    monkeypatch.setenv("CC", "cc -O1")
    first = build.build("small")
    monkeypatch.setenv("CC", "cc -O2")
    assert build.build("small") != first


@pytest.mark.parametrize("broken", ["source", "compiler", "home", "cache"])
def test_where_nothing_can_be_compiled_one_warning_says_so(folder, monkeypatch, caplog, broken):
    if broken == "source":
        (folder / "small.c").write_text("this is no C")
    elif broken == "home":  # a user id without a name, and no HOME
        for variable in ("HOME", "XDG_CACHE_HOME", build.CACHE):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    elif broken == "cache":
        monkeypatch.setenv(build.CACHE, str(folder / "small.c" / "cache"))
    else:
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        assert build.load_library("small") is None
        assert build.load_library("small") is None
    (record,) = caplog.records
    assert "small.c cannot be used" in record.message
    assert "Install a C compiler" in record.message


def test_kernels_can_be_switched_off_in_silence(folder, monkeypatch, caplog):
    monkeypatch.setenv(build.SWITCH, "off")
    assert build.load_library("small") is None
    assert not caplog.records
    assert not (folder / "cache").exists()
