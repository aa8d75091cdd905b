"""What tests of the language model share: the libraries that it is compared with."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def transformers():
    """The library; without it the test is skipped."""
    return pytest.importorskip("transformers", reason="extra: dev")


@pytest.fixture(scope="module")
def recurrentgemma():
    """(torch, common) of the package: its `__init__` would import JAX and Flax too."""
    spec = importlib.util.find_spec("recurrentgemma")
    if spec is None:
        pytest.skip("recurrentgemma is not installed (extra: dev)")
    package = types.ModuleType("recurrentgemma")
    package.__path__ = [str(Path(spec.origin).parent)]
    sys.modules["recurrentgemma"] = package
    yield (
        importlib.import_module("recurrentgemma.torch"),
        importlib.import_module("recurrentgemma.common"),
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "recurrentgemma"]:
        del sys.modules[name]
