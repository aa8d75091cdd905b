"""Goals, ratios and the form of what the benches of speed write."""

import json
import math
import time

import pytest

from speechssm.benchmark.results import goal, goals_table, write_bench
from speechssm.benchmark.timing import Copy, Readers, affordable_runs, time_call, time_in_turn
from speechssm.report.rows import Row, read_rows
from speechssm.report.tables import Table


@pytest.mark.parametrize(
    ("value", "bounds", "holds"),
    [
        (2.49, {"at_most": 2.5}, True),
        (2.5, {"at_most": 2.5}, True),
        (2.51, {"at_most": 2.5}, False),
        (20.0, {"at_least": 20.0}, True),
        (19.9, {"at_least": 20.0}, False),
        (math.nan, {"at_most": 2.5}, False),
        (math.nan, {"at_least": 2.5}, False),
        (math.inf, {"at_most": 2.5}, False),
    ],
)
def test_a_goal_is_met_up_to_its_bound_and_never_by_nan(value, bounds, holds):
    found = goal("scan", "scan_forward", "cpu", value, "×", **bounds)
    assert found.holds is holds
    assert ("✓ met" if holds else "✗ not met") in goals_table([found]).markdown()


def test_a_goal_has_one_bound():
    for bounds in ({}, {"at_most": 1.0, "at_least": 1.0}):
        with pytest.raises(ValueError, match="either"):
            goal("scan", "scan_forward", "cpu", 1.0, "×", **bounds)


def test_the_page_names_the_hardware_and_the_rows_are_in_the_row_form(tmp_path):
    row = Row("scan_forward", "linear_scan", "", 1.5, "ms", backend="cpu", shape="B1 T2 D3",
              ours=1.5, limit=1.0, ratio=1.5)  # fmt: skip
    goals = [goal("scan", "scan_forward", "cpu", 1.5, "× floor", at_most=2.5, n=20)]
    table = Table(["shape", "ms"], [["B1 T2 D3", "1.5"]])
    write_bench(tmp_path, "A bench", {"Times": table}, [row], goals, ["A note."],
                {"device": "cpu", "threads": 2}, {"extra": [1]})  # fmt: skip
    assert read_rows(tmp_path / "bench.json") == [row]
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["comparisons"][0]["holds"] is True and content["extra"] == [1]
    page = (tmp_path / "table.md").read_text()
    for part in (row.hardware, "threads 2", "## Times", "## Must reach", "- A note."):
        assert part in page


def test_calls_are_timed_in_turn_and_as_often_as_asked():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = time_in_turn(calls, {"a": 3, "b": 2}, "cpu")
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 2}
    assert all((values >= 0).all() for values in times.values())
    # From the second round on a short call is made once before it is timed.
    assert (order.count("a"), order.count("b")) == (5, 3)
    assert sorted(order[:2]) == ["a", "b"] and order[-2:] == ["a", "a"]


def test_the_order_of_the_calls_changes_from_round_to_round():
    order = []
    calls = {name: lambda name=name: order.append(name) or time.sleep(0.021) for name in "ab"}
    time_in_turn(calls, {"a": 12, "b": 12}, "cpu")
    firsts = {tuple(order[place : place + 2]) for place in range(0, 24, 2)}
    assert firsts == {("a", "b"), ("b", "a")}


def test_a_burst_is_timed_without_a_break():
    order = []
    calls = {name: lambda name=name: order.append(name) or time.sleep(0.021) for name in "ab"}
    times = time_in_turn(calls, {"a": 5, "b": 3}, "cpu", burst=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 5, "b": 3}
    assert "aaa" in "".join(order) and "bbb" in "".join(order) and order[-2:] == ["a", "a"]


def test_preparations_are_made_before_every_call():
    order = []
    time_in_turn({"a": lambda: order.append("call")}, {"a": 2}, "cpu",
                 prepare=lambda call: order.append("prepare"))  # fmt: skip
    assert order == ["prepare", "call"] * 3


def test_runs_fit_into_the_time_within_their_bounds():
    assert affordable_runs(10.0, 1.0, 20, 50) == 50
    assert affordable_runs(40.0, 1.0, 20, 50) == 25
    assert affordable_runs(1000.0, 1.0, 20, 50) == 20
    assert affordable_runs(0.0, 1.0, 20, 50) == 50


def test_bandwidths_are_bytes_over_time():
    copy, readers = Copy("cpu"), Readers("cpu", 2**22)
    assert copy.bytes == 2 * copy.source.nbytes and readers.bytes == 2**22
    assert copy.bandwidth(500.0) == 2 * copy.bytes
    assert readers.bandwidth(500.0) == 2 * readers.bytes
    copy()
    assert copy.target.equal(copy.source)
    for name, call in readers.calls().items():
        assert time_call(call, "cpu") > 0, name
    assert readers.calls()["read: sum"]() == readers.matrix.numel()
