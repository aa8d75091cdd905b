"""What a run was made from: the state of the checkout, and the command."""

import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from speechssm import __version__
from speechssm.configuration import PACKAGE
from speechssm.report.rows import write_text


def git(*arguments: str) -> str | None:
    """Output of a git command in the checkout; None outside of one or without git."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_state() -> dict:
    """Commit, branch, and whether tracked files differ from it (with a hash of the difference)."""
    difference = git("diff", "HEAD")
    return {
        "commit": git("rev-parse", "HEAD"),
        "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": None if difference is None else bool(difference),
        "difference": hashlib.sha256(difference.encode()).hexdigest()[:12] if difference else None,
    }


def write_provenance(path: Path) -> None:
    """Write `git.json`: the state now, and after a resume the states of earlier starts too."""
    now = git_state() | {
        "version": __version__,
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    earlier = []
    if path.is_file():
        try:
            last = json.loads(path.read_text())
            earlier = [*last.pop("earlier", []), last]
        except ValueError:
            earlier = []
    write_text(path, json.dumps(now | {"earlier": earlier}, indent=1) + "\n")
