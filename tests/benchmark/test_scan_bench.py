"""The scan's bench: rows of the contract, ratios from their parts, peers that are missing."""

import json

import numpy as np
import pytest
import torch

from speechssm.benchmark import peers, scan
from speechssm.benchmark.scan import Cell, check_states, left_out, run_scan, scan_goals, too_slow
from speechssm.errors import ConfigError
from speechssm.recurrence.scan import linear_scan
from speechssm.report.rows import read_rows

SHAPES = [[1, 12, 3], [2, 20, 4]]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    out = tmp_path_factory.mktemp("scan")
    rows = run_scan(out, shapes=SHAPES, seconds=0.01, show_progress=False,
                    details={"seed": 3})  # fmt: skip
    return out, rows


def test_it_writes_rows_of_the_contract(bench):
    out, rows = bench
    assert read_rows(out / "bench.json") == rows
    assert {path.name for path in out.iterdir()} == {"bench.json", "table.md", "scan.svg"}
    for shape, name in (("B1 T12 D3", "scan_forward"), ("B2 T20 D4", "scan_forward_backward")):
        found = [row for row in rows if (row.name, row.shape) == (name, shape)]
        default = json.loads((out / "bench.json").read_text())["default_backend"]
        assert found[0].backend == default and found[0].n >= 20
        assert {row.backend for row in found} >= {"chunked", "reference"}
        for row in found:
            assert row.value == row.ours > 0 and row.limit > 0 and row.unit == "ms"
            assert row.ratio == pytest.approx(row.ours / row.limit)
            assert row.peer is None


def test_the_limit_is_the_operands_over_the_bandwidth_of_the_copy(bench):
    _, rows = bench
    bandwidth = {row.shape: row.value * 1e9 for row in rows if row.name == "copy_bandwidth"}
    for row in rows:
        if row.name.startswith("scan_"):
            size = np.prod([int(part[1:]) for part in row.shape.split()]) * 4
            streams = 8 if row.name == "scan_forward_backward" else 3
            assert row.limit == pytest.approx(streams * size / bandwidth[row.shape] * 1000)


def test_peers_have_ours_beside_them(bench):
    _, rows = bench
    ours = {(row.name, row.shape): row.value for row in reversed(rows)}
    theirs = [row for row in rows if row.name.startswith("peer_scan_")]
    assert {row.peer_name.split(" (")[1].split()[0] for row in theirs} >= {"torch"}
    for row in theirs:
        assert row.ours == ours[row.name.removeprefix("peer_"), row.shape]
        assert row.peer == row.value and row.ratio == pytest.approx(row.peer / row.ours)


@pytest.mark.parametrize("peer", peers.SCANS)
def test_peers_compute_the_same_scan(peer):
    try:
        _, their_scan = peer()
    except peers.MissingPeer as error:
        pytest.skip(str(error))
    gate = torch.rand(2, 9, 5, requires_grad=True)
    value = torch.randn(2, 9, 5, requires_grad=True)
    weight = torch.randn(2, 9, 5)
    expected = linear_scan(gate, value, backend="reference")[0]
    torch.testing.assert_close(their_scan(gate, value), expected)
    gradients = [torch.autograd.grad((states * weight).sum(), (gate, value))
                 for states in (expected, their_scan(gate, value))]  # fmt: skip
    torch.testing.assert_close(*gradients)


def test_a_missing_peer_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    def missing():
        raise peers.MissingPeer("someone's scan: pip install 'speechssm[dev]'")

    monkeypatch.setattr(peers, "SCANS", (missing,))
    run_scan(tmp_path, shapes=[[1, 2, 2]], seconds=0.01, show_progress=False)
    notes = json.loads((tmp_path / "bench.json").read_text())["notes"]
    assert [note for note in notes if "pip install 'speechssm[dev]'" in note]


def cell(shape, value):
    found = Cell(shape, bandwidth=1e9)
    found.milliseconds["peer", "forward_backward"] = value
    found.runs["peer", "forward_backward"] = 20
    return found


def test_a_peer_is_left_out_by_its_quadratic_growth():
    earlier = [cell((1, 1000, 8), 1000.0)]
    assert not too_slow("peer", "forward_backward", (1, 4000, 8), 17.0, earlier)
    assert too_slow("peer", "forward_backward", (1, 4000, 8), 15.0, earlier)
    # The forward pass is not quadratic, and nothing is known of other systems.
    earlier[0].milliseconds["peer", "forward"] = 1000.0
    assert not too_slow("peer", "forward", (1, 4000, 8), 5.0, earlier)
    assert too_slow("peer", "forward", (1, 4000, 8), 3.0, earlier)
    assert not too_slow("other", "forward_backward", (1, 4000, 8), 15.0, earlier)


def test_what_is_left_out_is_said():
    cells = [cell((1, 1000, 8), 1000.0), cell((1, 4000, 8), 0.0), cell((1, 8000, 8), 0.0)]
    assert left_out(cells, 15.0) == []
    for skipped in cells[1:]:
        skipped.left_out.append(("peer", "forward_backward"))
    (line,) = left_out(cells, 15.0)
    assert "peer, forward and backward: left out at B1 T4000 D8, B1 T8000 D8." in line


def test_goals_are_judged_at_their_shapes_by_the_floor():
    floor = 8 * 4 * 6000 * 512 / 1e9 * 1000
    good, bad = cell((1, 6000, 512), 2.4 * floor), cell((1, 6000, 2560), 5 * 2.6 * floor)
    goals = scan_goals([good, bad, cell((1, 750, 512), 1.0)], "peer")
    assert [entry.holds for entry in goals] == [True, False]
    assert goals[0].ours == pytest.approx(2.4) and goals[1].n == 20


def test_a_scan_of_something_else_ends_the_bench():
    expected = torch.ones(1, 2, 2)
    check_states("peer", expected + 1e-5, expected, (1, 2, 2))
    for wrong in (expected + 0.01, expected * torch.nan):
        with pytest.raises(RuntimeError, match="computes other states"):
            check_states("peer", wrong, expected, (1, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": [[1, 2]]}, "each is"),
        ({"shapes": [[1, 0, 2]]}, "at least 1"),
        ({"shapes": []}, "is empty"),
        ({"shapes": SHAPES, "backends": ["xla"]}, "cannot run on cpu"),
        ({"shapes": SHAPES, "backends": ["gpu"]}, "'gpu' is unknown: choose one of"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run_scan(tmp_path, show_progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_quick_measures_small_shapes_and_judges_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "QUICK_SHAPES", ((1, 5, 2),))
    run_scan(tmp_path, shapes=SHAPES, quick=True, show_progress=False)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["comparisons"] == [] and [1, 5, 2] in [c["shape"] for c in content["cells"]]
