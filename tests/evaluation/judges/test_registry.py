"""Judges that are not installed are reported with what installs them; spans of long audio."""

import importlib
import itertools

import numpy as np
import pytest

from speechssm.errors import ConfigError
from speechssm.evaluation import judges
from speechssm.evaluation.judges import JudgeMissing, at_judge_rate, available, equal_spans


@pytest.fixture
def nothing_installed(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

    monkeypatch.setattr(judges.importlib, "import_module", fail)
    assert importlib.import_module is fail


def test_every_missing_judge_is_one_line_with_its_command(nothing_installed):
    names = list(judges.registry())
    found, missing = available(names)
    assert found == {} and list(missing) == names
    for message in missing.values():
        assert "is not installed; `pip install" in message and "\n" not in message
    assert "`pip install distillmos" in missing["distillmos"]


def test_a_package_that_lacks_one_of_its_own_names_that(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'numba'", name="numba")

    monkeypatch.setattr(judges.importlib, "import_module", fail)
    with pytest.raises(JudgeMissing, match="ViSQOL: numba is not installed; `pip"):
        judges.load_package("visqol", "ViSQOL", "pip install visqol-python")


def test_an_unknown_judge_is_a_mistake_and_not_merely_missing():
    with pytest.raises(ConfigError, match="no judge 'utmos'; choose from: pesq") as caught:
        available(["utmos"])
    assert not isinstance(caught.value, JudgeMissing)


@pytest.mark.parametrize(
    ("samples", "lengths"),
    [(0, [0]), (99, [99]), (100, [100]), (101, [50, 51]), (299, [100, 99, 100])],
)
def test_spans_are_few_equal_and_cover_everything(samples, lengths):
    spans = equal_spans(samples, rate=10, seconds=10.0)
    assert sorted(span.stop - span.start for span in spans) == sorted(lengths)
    assert spans[0].start == 0 and spans[-1].stop == samples
    assert all(a.stop == b.start for a, b in itertools.pairwise(spans))


def test_judges_hear_16_khz_within_full_scale():
    audio_S = at_judge_rate(np.full(24000, 1.5), 24000)
    assert len(audio_S) == 16000 and audio_S.dtype == np.float32
    assert audio_S.max() == 1.0
