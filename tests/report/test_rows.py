"""The row form: round trip, atomic writing, and errors that name the file."""

import json
import math

import pytest

from speechssm.errors import ConfigError
from speechssm.report.rows import (
    Comparison,
    Row,
    config_hash,
    hardware,
    read_results,
    read_rows,
    versions,
    write_rows,
)


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        Row(
            "nats_per_unit", "30s", "heldout", 3.5, "nats/unit", 3.4, 3.6, 24, 1, "demo", "ab", "lm"
        ),
        Row("scan_forward", "chunked", "", 1.5, "ms", shape="B1 T6000 D512", ours=1.5, limit=1.0),
    ]
    path = write_rows(tmp_path / "deep" / "metrics.json", rows)
    assert read_rows(path) == rows


def test_bench_fields_appear_only_where_they_are_used(tmp_path):
    plain = Row("a", "b", "train", 1.0, "nats").to_dict()
    assert "peer_name" not in plain
    assert list(plain) == [
        "name", "system", "split", "value", "unit", "low", "high", "n", "seed", "scale",
        "config_hash", "model", "hardware", "versions",
    ]  # fmt: skip
    assert "peer_name" in Row("a", "b", "", 1.0, "ms", backend="reference").to_dict()


def test_every_row_says_where_it_was_measured():
    row = Row("a", "b", "train", 1.0, "nats")
    assert row.hardware == hardware() and "core" in hardware()
    assert row.versions["torch"] == versions()["torch"]


def test_nan_becomes_null_in_valid_json(tmp_path):
    path = write_rows(tmp_path / "m.json", [Row("a", "b", "train", math.nan, "nats")],
                      curve=[math.inf, 1.0])  # fmt: skip
    content = json.loads(path.read_text(), parse_constant=lambda _: pytest.fail("not JSON"))
    assert content["rows"][0]["value"] is None and content["curve"] == [None, 1.0]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = write_rows(tmp_path / "m.json", [Row("a", "b", "train", 1.0, "nats")])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_rows(path, [Row("a", "b", "train", 2.0, "nats")], bad=object())
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.json"]


def test_sections_are_kept_beside_the_rows(tmp_path):
    comparison = Comparison.of("lm", "nats", "ours", "unigram", 3.0, 4.0, "nats",
                               higher_is_better=False, required=0.1)  # fmt: skip
    path = write_rows(tmp_path / "m.json", [], comparisons=[comparison], run={"finished": True})
    content = read_results(path)
    assert content["run"] == {"finished": True}
    assert Comparison(**content["comparisons"][0]) == comparison


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not a results file"),
        ("{}", "no `rows` list"),
        ('{"rows": [{"name": "a"}]}', "row 0"),
        ('{"rows": [{"name": "a", "system": "", "split": "", "value": 1, "unit": "", "x": 1}]}',
         "'x'"),
    ],
)  # fmt: skip
def test_a_broken_results_file_is_named_in_one_line(tmp_path, text, expected):
    path = tmp_path / "metrics.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_rows(path)
    assert str(path) in str(caught.value) and expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_results_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no results at"):
        read_rows(tmp_path / "none.json")


def test_config_hash_ignores_key_order_only():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": [1, 2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert len(config_hash({})) == 12


@pytest.mark.parametrize(
    ("ours", "baseline", "higher", "required", "low", "holds"),
    [
        (3.0, 3.2, False, 0.1, 0.05, True),
        (3.0, 3.05, False, 0.1, 0.01, False),  # better, but by too little
        (3.0, 3.2, False, 0.1, -0.1, False),  # better, but not certainly
        (3.2, 3.0, False, 0.0, None, False),
        (70.0, 64.0, True, 0.0, None, True),
        (3.0, 3.0, False, 0.0, None, False),  # no better
        (math.nan, 3.0, False, 0.0, None, False),
    ],
)
def test_a_comparison_holds_only_with_enough_and_certain_margin(
    ours, baseline, higher, required, low, holds
):
    comparison = Comparison.of("lm", "nats", "ours", "theirs", ours, baseline, "nats",
                               higher_is_better=higher, required=required, low=low)  # fmt: skip
    assert comparison.holds is holds
