"""The scripts of the experiments: every command that they run exists, with its keys and values."""

import os
import subprocess
from pathlib import Path

import pytest

from speechssm.configuration import compose

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
# Stands for `speechssm` and `python`: writes down its words, one command after the other.
STUB = """#!/usr/bin/env bash
if [ "${0##*/}" = speechssm ]; then printf '%s\\n' "$@" '' >> "$COMMANDS"; fi
"""


def commands(script: str, words: list[str], folder: Path, **environment: str) -> list[list[str]]:
    """The words of each `speechssm` command that the script runs."""
    for name in ("speechssm", "python"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    environment = {"WHISPER": ""} | environment
    environment |= {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "COMMANDS": str(folder / "commands"),
        "FOLDER": str(folder / "out"),
    }
    subprocess.run(
        ["bash", EXPERIMENTS / script, *words],
        check=True, capture_output=True, cwd=folder, env=os.environ | environment,
    )  # fmt: skip
    blocks = (folder / "commands").read_text().rstrip("\n").split("\n\n")
    return [block.split("\n") for block in blocks]


@pytest.mark.parametrize(
    ("script", "words", "environment", "verbs"),
    [
        ("demo/run.sh", [], {}, {"prepare", "train", "tokenize", "encode", "generate", "evaluate",
                                 "bench", "report"}),
        ("throughput/cpu.sh", [], {}, {"bench"}),
        ("tokenizer/build.sh", [".", "corpus.heldout_sets=[test]", "trainer.max_steps=9",
          "second.trainer.max_steps=5", "options.tokenizer.excerpts=2"], {"WHISPER": "weights"},
         {"prepare", "train", "export", "evaluate"}),
        ("acoustic/build.sh", [".", "codec.trainer.max_steps=9", "decoder.trainer.max_steps=8",
          "soundstorm.trainer.max_steps=7", "options.codec.max_crops=4"], {"RECOGNIZER": "tiny"},
         {"prepare", "tokenize", "encode", "train", "export", "evaluate"}),
    ],
)  # fmt: skip
def test_every_command_of_a_script_exists(script, words, environment, verbs, tmp_path):
    found = commands(script, words, tmp_path, **environment)
    for verb, *rest in found:
        compose(verb, [word for word in rest if "=" in word])
    assert {verb for verb, *_ in found} == verbs


def test_the_tokenizers_are_compared_with_and_without_whisper(tmp_path):
    def systems(**environment):
        folder = tmp_path / f"{len(environment)}"
        folder.mkdir()
        *_, evaluation = commands("tokenizer/build.sh", [str(tmp_path)], folder, **environment)
        (named,) = [word for word in evaluation if word.startswith("tokenizer=")]
        paths = named.removeprefix("tokenizer=").strip("[]").split(",")
        return [str(Path(path).relative_to(folder / "out")) for path in paths]

    without = ["log_mel", "mfcc", "small_2048", "weights/small"]  # what is exported, not the run
    assert systems() == without
    with_whisper = [*without, "whisper", "distilled_2048", "weights/distilled"]
    assert systems(WHISPER="weights") == with_whisper


def test_options_go_to_the_trainings_that_they_name(tmp_path):
    words = [str(tmp_path), "trainer.max_steps=9", "second.trainer.max_steps=5"]
    found = commands("tokenizer/build.sh", words, tmp_path, WHISPER="weights")
    steps = {}
    for command in found:
        name = dict(word.split("=", 1) for word in command if "=" in word).get("name")
        if name:
            (*_, last) = [word for word in command if word.startswith("trainer.max_steps=")]
            steps[name.removeprefix("tokenizer/")] = int(last.split("=")[1])
    assert steps == {"small_first": 9, "small": 5, "distilled_first": 9, "distilled": 5}


def test_a_script_without_sources_says_what_it_wants(tmp_path):
    script = EXPERIMENTS / "tokenizer" / "build.sh"
    result = subprocess.run(["bash", script], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "SOURCE" in result.stderr
