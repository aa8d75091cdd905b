"""Data flows one way: each room of the package imports only what the design allows."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "speechssm"
EVERYWHERE = {"errors", "fingerprint"}
ALLOWED = {
    "audio": set(),
    "kernels": set(),
    "nn": {"kernels"},
    "recurrence": {"kernels", "nn"},
    "tokenizer": {"audio", "nn"},
    "lm": {"kernels", "nn", "recurrence"},
    "soundstream": {"audio", "nn"},
    "soundstorm": {"audio", "nn"},
    "data": {"audio"},
    "report": set(),
}


def imported_rooms(path: Path) -> set[str]:
    """Rooms of ours that a file imports at run time, imports inside of functions included."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [module.split(".") for module in modules]
    return {part[1] for part in parts if part[0] == "speechssm" and len(part) > 1}


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_the_rooms_it_may(room):
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        foreign = imported_rooms(path) - ALLOWED[room] - EVERYWHERE - {room}
        assert not foreign, f"{path.relative_to(PACKAGE)} imports {sorted(foreign)}"


def test_torch_xla_is_named_only_where_a_device_may_be_named():
    homes = {"runtime", "recurrence"}
    for path in sorted(PACKAGE.rglob("*.py")):
        if "torch_xla" in imported_packages(path):
            assert path.relative_to(PACKAGE).parts[0] in homes, path
    assert "torch_xla" in imported_packages(PACKAGE / "runtime" / "xla.py")


def test_nothing_imports_from_the_top_level_data_or_experiments():
    for path in sorted(PACKAGE.rglob("*.py")):
        assert not imported_packages(path) & {"data", "experiments"}, path
