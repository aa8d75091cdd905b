"""The committed demo results: every stage beats its trivial baseline on held-out recordings."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "experiments" / "demo"


def load_check():
    specification = importlib.util.spec_from_file_location("check", DEMO / "check.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads((DEMO / "metrics.json").read_text())


def test_every_claim_about_the_committed_run_holds(results):
    failed = [text for text, holds in load_check().claims(results) if not holds]
    assert not failed


def test_what_is_shipped_is_measured_beside_what_the_demo_trains(results):
    systems = {
        stage: {c["system"].split(",")[0] for c in results["comparisons"] if c["stage"] == stage}
        for stage in ("tokenizer", "soundstream", "soundstorm")
    }
    assert {"tokenizer", "small", "distilled"} <= systems["tokenizer"]
    assert {"soundstream", "small"} <= systems["soundstream"]
    assert {"soundstorm", "small"} <= systems["soundstorm"]


def test_the_check_sees_a_lost_comparison_a_collapse_and_a_missing_stage(results):
    claims = load_check().claims

    lost = copy.deepcopy(results)
    lost["comparisons"][0]["holds"] = False
    assert sum(not holds for _, holds in claims(lost)) == 1

    collapsed = copy.deepcopy(results)
    for row in collapsed["rows"]:
        if row["name"] == "unit_perplexity":
            row["value"] = 3.0
    assert any("unit perplexity 3" in text and not holds for text, holds in claims(collapsed))

    for stage in ("tokenizer", "soundstream", "soundstorm", "lm", "pipeline"):
        missing = copy.deepcopy(results)
        missing["comparisons"] = [c for c in missing["comparisons"] if c["stage"] != stage]
        assert any(text.startswith(stage) and not holds for text, holds in claims(missing))
