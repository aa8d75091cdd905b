"""What lies in a run folder decides whether a run is new, unfinished or finished."""

import pytest

from speechssm.configuration import compose
from speechssm.errors import ConfigError
from speechssm.runtime.run_folder import RunFolder, plain_config

CONFIG = {"seed": 1, "trainer": {"max_steps": 10}}


@pytest.mark.parametrize("content", [None, "", "a list\n"])
def test_checkpoints_without_their_config_are_not_overwritten(tmp_path, content):
    run = RunFolder(tmp_path)
    run.last.parent.mkdir(parents=True)
    run.last.write_bytes(b"good weights")
    if content is not None:
        run.config.write_text(content)
    with pytest.raises(ConfigError, match=r"no readable config\.yaml"):
        run.state(CONFIG)


def test_a_folder_without_checkpoints_is_new(tmp_path):
    assert RunFolder(tmp_path).state(CONFIG) == "new"


def test_a_name_may_look_like_a_number() -> None:
    config = plain_config(compose("train", ["stage=lm", "name=7", "data.folder=shards"]))
    assert config["name"] == "7" and config["callbacks"]["progress"]["name"] == "7"
