"""The command line: help, exit statuses, one line for each mistake, keys named like groups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from speechssm import __version__, cli
from speechssm.cli import VERBS, main, verb_config, verb_help
from speechssm.configuration import compose, conf_folder
from speechssm.errors import AudioError


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines on standard error."""
    return capsys.readouterr().err.strip().splitlines()


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "train"])
def test_the_help_of_a_verb_shows_its_command_and_its_keys(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"speechssm {verb}" in text.splitlines()[0]
    assert "Keys and their defaults" in text and "???" not in text


def test_every_verb_is_documented_by_its_config() -> None:
    for verb in VERBS:
        assert (conf_folder() / f"{verb}.yaml").is_file()
    assert set(cli.ACTIONS) | {"train"} == set(VERBS)
    assert "corpus=NAME, one of:" in verb_help("prepare")


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["tokenise"], 2, "no command 'tokenise'"),
        (["report", "--folder"], 2, "unknown flag --folder"),
        (["report"], 1, "folder is not set; add folder="),
        (["report", "extra", "folder=x"], 2, "key=value words only"),
        (["evaluate", "data=x", "out=y"], 2, "say what to evaluate"),
        (["evaluate", "codec", "lm", "data=x", "out=y"], 2, "one subject"),
        (["evaluate", "wisdom", "data=x", "out=y"], 1, "unknown subject 'wisdom'"),
        (["prepare", "vectors", "out=y"], 1, "subject=vectors is unknown"),
        (["export", "model=/nowhere", "out=y"], 1, "/nowhere: no such file"),
        (["export", "modle=x", "out=y"], 1, "modle is unknown (did you mean model?)"),
        (["tokenize", "data=/nowhere", "tokenizer=/nothing", "out=y"], 1, "/nothing"),
        (["train", "model=griffon"], 1, "model=griffon is unknown"),
        (["train", "model.widht=3"], 1, "model.widht is unknown (did you mean width?)"),
        (["train", "stage=vocoder"], 1, "stage=vocoder is unknown"),
        (["train", "experiment=none_such"], 1, "experiment=none_such is unknown"),
        (["train", "model.width=[3"], 2, "cannot read the override"),
        (["train", "colour=red"], 1, "colour is unknown"),
        (["train", "stage=lm"], 1, "data.folder is not set; add data.folder="),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_status(
    words: list[str],
    status: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == status
    errors = lines(capsys)
    assert len(errors) == 1, errors
    assert errors[0].startswith("speechssm: error: ") and line in errors[0]


def test_what_stands_for_choice_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "sequence=1h"])
    assert "choose one of: 16min, 30s, 4min" in lines(capsys)[0]


def fail_with(error: BaseException):
    def action(config: dict) -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (AudioError("a.flac: NaN at 3.2 s;\n cut it"), 1, "error: a.flac: NaN at 3.2 s; cut it"),
        (ZeroDivisionError("by\nzero"), 1, "error: ZeroDivisionError: by zero (this is a bug"),
        (OSError(28, "No space left on device", "/x/y"), 1, "error: /x/y: No space left"),
        (KeyboardInterrupt(), 130, "error: stopped"),
    ],
)
def test_every_exception_is_one_line_and_debug_adds_the_traceback(
    error: BaseException,
    status: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(cli.ACTIONS, "report", fail_with(error))
    assert main(["report", "folder=x"]) == status
    errors = lines(capsys)
    assert len(errors) == 1 and line in errors[0]
    assert main(["report", "folder=x", "--debug"]) == status
    shown = "\n".join(lines(capsys))
    assert line in shown
    if isinstance(error, Exception):
        assert "Traceback" in shown


def test_keys_named_like_a_config_group_are_plain_values() -> None:
    config = verb_config("tokenize", ["data=a b/c", "tokenizer=runs/t", "out='x=y'"])
    assert (config["data"], config["tokenizer"], config["out"]) == ("a b/c", "runs/t", "x=y")
    config = verb_config("export", ["model=runs/lm", "out=o"])
    assert config["model"] == "runs/lm"
    config = verb_config("report", ["folder=f", "format=html,latex"])
    assert config["format"] == ["html", "latex"]


def test_the_subject_is_a_word_without_equals_sign() -> None:
    config = verb_config("evaluate", ["likelihood", "data=u", "lm=runs/lm", "out=o"])
    assert config["subject"] == "likelihood" and config["lm"] == "runs/lm"


def test_paths_follow_the_current_folder_and_weights_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose("train", ["data.folder=shards"])
    assert Path(config.run_folder).resolve() == tmp_path / "runs" / "lm"
    assert Path(config.paths.weights).parent == conf_folder().parent / "data"


def test_every_command_works_from_any_folder_and_answers_fast_without_torch(
    tmp_path: Path,
) -> None:
    code = (
        "import sys; from speechssm.cli import main; "
        "status = main(['report', '--help']) or main(['train', '--help']); "
        "sys.exit(status or ('torch' in sys.modules and 7) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert "python train.py -m experiment=sequence_length" in done.stdout
    assert "model: " in done.stdout and "trainer: " in done.stdout
    assert not list(tmp_path.iterdir())


def test_generate_never_writes_over_its_prompt(tmp_path, capsys):
    prompt = tmp_path / "voice.wav"
    prompt.write_bytes(b"a recording")
    models = [f"{key}=none" for key in ("tokenizer", "lm", "soundstorm", "codec")]
    status = main(["generate", f"prompt={prompt}", f"out={prompt}", "seconds=1", *models])
    assert status == 1
    assert "would overwrite the prompt" in capsys.readouterr().err
    assert prompt.read_bytes() == b"a recording"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seconds=abc"], "seconds=abc must be a number"),
        (["seconds=1", "seed=abc"], "seed=abc must be a whole number"),
        (["seconds=1", "temperature=hot"], "temperature=hot must be a number"),
        (["seconds=1", "iterations=16"], "iterations=16 must be a list"),
        (["seconds=1", "include_prompt=maybe"], "include_prompt=maybe must be true or false"),
    ],
)
def test_a_value_of_another_kind_is_named(words, message, capsys):
    models = [f"{key}=none" for key in ("tokenizer", "lm", "soundstorm", "codec")]
    assert main(["generate", "out=long.wav", *words, *models]) == 1
    assert message in capsys.readouterr().err
