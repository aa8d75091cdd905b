"""Finding runs, sweeps and results in folders."""

import json

import pytest

from speechssm.errors import ConfigError
from speechssm.report.gather import find_runs, gather, read_run, readable_command, run_labels


def test_a_run_is_read_with_its_history(run_folder):
    run = read_run(run_folder)
    assert run.stage == "tokenizer" and run.model_name == "SemanticTokenizer" and run.finished
    assert run.steps == 400
    assert run.history["val/loss"][0] == [99, 199, 299, 399]
    assert run.details == {
        "seed": 1, "scale": "demo", "config_hash": "000000000001", "model": "tokenizer",
    }  # fmt: skip
    assert run.command == "speechssm train stage=tokenizer seed=1"


def test_a_cut_off_last_line_of_metrics_is_left_out(run_folder):
    with (run_folder / "metrics.csv").open("a") as stream:
        stream.write("409,nan,,,\n41")
    assert read_run(run_folder).history["train/loss"][0][-1] == 399


def test_runs_of_a_sweep_come_by_sequence_length_and_links_count_once(sweep_folder):
    (sweep_folder / "16min").symlink_to(sweep_folder / f"{24000:08x}")
    runs = find_runs(sweep_folder)
    assert [run.sequence for run in runs] == [("30s", 750), ("4min", 5760), ("16min", 24000)]
    assert run_labels(runs) == ["30s", "4min", "16min"]


def test_labels_tell_seeds_apart(run_folder, tmp_path):
    import shutil

    import yaml

    other = shutil.copytree(run_folder, tmp_path / "other")
    config = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(config | {"seed": 2}))
    runs = [read_run(run_folder), read_run(other)]
    assert run_labels(runs) == ["SemanticTokenizer seed 1", "SemanticTokenizer seed 2"]


def test_a_demo_folder_is_found_whole(demo):
    folder = gather(demo)
    assert folder.kind == "demo"
    assert [run.stage for run in folder.runs] == ["tokenizer", "soundstream", "soundstorm"]
    assert [len(runs) for runs in folder.sweeps.values()] == [3]
    assert len(folder.results) == 5
    assert [path.name for path in folder.audio] == ["continuation.wav", "prompt.flac"]


def test_kinds_of_folders_are_told_apart(run_folder, sweep_folder):
    assert gather(run_folder).kind == "run"
    assert gather(sweep_folder).kind == "sweep"


def test_folders_without_results_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="nothing to report"):
        gather(tmp_path / "empty")
    with pytest.raises(ConfigError, match="does not exist"):
        gather(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds no run"):
        find_runs(tmp_path / "empty")


def test_an_unreadable_config_is_named(run_folder):
    (run_folder / "config.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        read_run(run_folder)


def test_a_broken_git_record_does_not_stop_the_report(run_folder):
    (run_folder / "git.json").write_text('{"commit": ')
    assert read_run(run_folder).command == ""


def test_commands_do_not_show_folders_of_programs():
    assert readable_command(["/x/bin/speechssm", "bench", "out=a b"]) == "speechssm bench 'out=a b'"
    assert readable_command(["/x/train.py", "-m"]) == "python train.py -m"
    assert readable_command(["/x/speechssm/cli.py", "report"]) == "speechssm report"
    assert json.dumps(readable_command([])) == '""'
