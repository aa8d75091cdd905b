"""The decoding bench: a tiny run of everything, its ratios, and states at far positions."""

import json

import pytest
import torch
from hydra.utils import instantiate

from speechssm.benchmark.decoders import Decoding, time_generate
from speechssm.benchmark.lm_decode import run_lm_decode, weight_bytes
from speechssm.benchmark.lm_decode_results import Found, Point, decode_goals, seconds_until
from speechssm.benchmark.peers import recurrent_gemma
from speechssm.benchmark.positions import fit_state, states_at
from speechssm.errors import ConfigError
from speechssm.nn.state import state_bytes, tensors_of
from speechssm.report.bench_figures import throughput_ratio
from speechssm.report.rows import read_rows

GRIFFIN = {"_target_": "speechssm.lm.griffin.Griffin", "vocab_size": 20, "width": 16,
           "num_layers": 3, "num_heads": 2, "window": 8}  # fmt: skip
TRANSFORMER = {"_target_": "speechssm.lm.transformer.Transformer", "vocab_size": 20, "width": 16,
               "num_layers": 2, "num_heads": 2, "mlp_width": 48}  # fmt: skip


def test_a_tiny_run_measures_all_systems_and_makes_the_three_figures(tmp_path):
    pytest.importorskip("transformers", reason="extra: dev")
    rows = run_lm_decode(tmp_path, name="griffin_x", griffin=GRIFFIN, transformer=TRANSFORMER,
                         positions=[4, 12, 30], block=2, blocks=2, peer_positions=[12],
                         budget=0.0625, show_progress=False)  # fmt: skip
    assert read_rows(tmp_path / "bench.json") == rows
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"bench.json", "table.md", *(f"figure_{n}.svg" for n in (6, 7, 8))}
    content = json.loads((tmp_path / "bench.json").read_text())
    single = {(row.system.split(" (")[0], row.shape): row for row in rows
              if row.name == "decode_ms_per_token"}  # fmt: skip
    assert len(single) == 7 and single["RecurrentGemma's generate", "B1 P12"].n == 2
    floor = content["weight_bytes"]["griffin"] / content["read_bandwidth"] * 1000
    for (system, shape), row in single.items():
        ours = single["griffin_x", shape]
        assert row.value > 0 and row.ours == ours.value
        if system == "griffin_x":
            assert row.limit == pytest.approx(floor)
            assert row.ratio == pytest.approx(row.ours / row.limit)
        else:
            assert row.peer == row.value and row.ratio == pytest.approx(row.peer / row.ours)


def test_states_and_batches_follow_the_position(tmp_path):
    rows = run_lm_decode(tmp_path, name="griffin_x", griffin=GRIFFIN, transformer=TRANSFORMER,
                         positions=[4, 12, 30], block=2, blocks=2, systems=["transformer"],
                         budget=0.0625, show_progress=False)  # fmt: skip
    sizes = {(row.system, row.shape): row.value for row in rows
             if row.name == "decode_state_bytes"}  # fmt: skip
    assert sizes["griffin_x", "B1 P30"] == sizes["griffin_x", "B1 P4"]
    # 2 layers of keys and values of one head of 8 features, and an int64 position each.
    assert sizes["transformer_x", "B1 P30"] == 2 * (2 * 30 * 8 * 4 + 8)
    rates = {(row.system, row.shape.split()[1]): row for row in rows
             if row.name == "decode_tokens_per_second"}  # fmt: skip
    budget = 0.0625 * 2**20
    for (system, place), row in rates.items():
        batch = int(row.shape.split()[0][1:])
        assert batch == budget // sizes[system, f"B1 {place}"]
    ours, theirs = rates["griffin_x", "P30"], rates["transformer_x", "P30"]
    assert theirs.ratio == pytest.approx(ours.value / theirs.value)


@torch.inference_mode()
@pytest.mark.parametrize("config", [GRIFFIN, TRANSFORMER])
def test_a_state_that_has_grown_goes_on_as_if_it_had_been_large_from_the_start(config):
    torch.manual_seed(0)
    model = instantiate(config).eval()
    grown = states_at(model, [5, 9, 21], room=1)
    large = model.initial_state(1, max_positions=22)
    tokens = torch.randint(20, (1, 21), generator=torch.Generator().manual_seed(0))
    tokens[0, 0] = model.bos_id
    _, large = model(tokens, tokens == model.bos_id, large)
    assert state_bytes(grown[21]) == state_bytes(large)
    step = torch.tensor([[7]])
    torch.testing.assert_close(model(step, None, grown[21])[0], model(step, None, large)[0])
    small = model.initial_state(1, max_positions=6)
    _, small = model(tokens[:, :5], tokens[:, :5] == model.bos_id, small)
    for ours, fresh in zip(tensors_of(grown[5]), tensors_of(small), strict=True):
        torch.testing.assert_close(ours, fresh)


def test_a_state_that_fits_is_left_alone():
    model = instantiate(GRIFFIN).eval()
    state = states_at(model, [9])[9]
    fitted = fit_state(model, state, 1000)
    for before, after in zip(tensors_of(state), tensors_of(fitted), strict=True):
        assert before is after


@pytest.mark.parametrize("config", [GRIFFIN, TRANSFORMER])
def test_decoding_goes_back_to_its_position(config):
    torch.manual_seed(0)
    model = instantiate(config).eval()
    state = states_at(model, [6], room=3)[6]
    before = [tensor.clone() for tensor in tensors_of(state)]
    decoder = Decoding(model, state, 6, 3, rows=2)
    decoder.prepare()
    assert decoder().shape == (2, 3)
    assert decoder.engine.fed == [9, 9]
    assert decoder.state_bytes == 2 * state_bytes(model.initial_state(1, max_positions=9))
    decoder.prepare()
    assert decoder.engine.fed == [6, 6]
    for found, expected in zip(tensors_of(decoder.engine.state), before, strict=True):
        torch.testing.assert_close(found, expected.expand_as(found))
    # What the first pass has drawn did not change where the stream came from.
    for found, expected in zip(tensors_of(state), before, strict=True):
        assert found.equal(expected)


def test_generate_is_timed_without_its_prompt_and_its_caches_are_counted():
    pytest.importorskip("transformers", reason="extra: dev")
    peer = recurrent_gemma(instantiate(GRIFFIN).eval())[1]
    times, size = time_generate(peer, 10, block=2, blocks=3)
    assert times.shape == (3,) and (times > 0).all()
    # One attention layer sees 8 keys: its cache keeps 7 of them and adds the next. Two recurrent
    # layers of 16 channels keep 3 inputs of the convolution and a state each.
    assert size == 2 * 7 * 8 * 4 + 2 * (3 * 16 + 16) * 4


def test_weights_that_a_step_reads():
    tied, untied = (instantiate({**TRANSFORMER, "tied_embeddings": tied}) for tied in (True, False))
    total = sum(value.nbytes for value in tied.parameters())
    assert weight_bytes(tied) == total - 16 * 4  # BOS is only looked up
    assert weight_bytes(untied) == total - 21 * 16 * 4 + 20 * 16 * 4 + 16 * 4


def single(system, position, milliseconds, size=1000):
    return Point(system, position, 1, milliseconds, milliseconds, 20, size)


def found(near, far, peer, size=1000):
    result = Found({"griffin": "g", "recurrentgemma": "r"}, {"griffin": 10**9}, read=1e11)
    result.single += [single("griffin", 2048, near), single("griffin", 16_000, far, size),
                      single("recurrentgemma", 2048, peer)]  # fmt: skip
    return result


def test_goals_compare_positions_the_floor_and_the_peer():
    good = decode_goals(found(10.0, 10.4, 20.5), "griffin_small")
    assert len(good) == 5 and all(entry.holds for entry in good)
    # Time that grows, a state that grows, 1.6 times the floor twice, less than twice the peer.
    bad = decode_goals(found(16.0, 17.0, 31.0, size=1001), "griffin_small")
    assert not any(entry.holds for entry in bad)
    assert len(decode_goals(found(10.0, 10.4, 20.5), "griffin_tiny")) == 2


def test_time_until_a_position_is_the_area_under_the_times():
    points = [single("griffin", 100, 10.0), single("griffin", 200, 20.0)]
    assert seconds_until(points, points[0]) == pytest.approx(1.0)
    assert seconds_until(points, points[1]) == pytest.approx(1.0 + 1.5)


def test_throughputs_are_compared_where_both_were_measured():
    points = [
        {"system": system, "position": position, "tokens_per_second": rate}
        for system, position, rate in (("g", 1, 8.0), ("g", 2, 8.0), ("t", 1, 4.0))
    ]
    assert throughput_ratio(points) == [{"system": "ratio", "position": 1, "ratio": 2.0}]
    assert throughput_ratio(points[:2]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": []}, "positions"),
        ({"positions": [8]}, "beyond block=8"),
        ({"positions": [50], "peer_positions": [60]}, "beyond block \\* blocks / 2 = 80"),
        ({"positions": [50], "blocks": 0}, "blocks=0"),
        ({"positions": [50], "budget": 0}, "budget=0"),
        ({"positions": [50], "precision": "fp8"}, "precision=fp8 is unknown"),
        ({"positions": [50], "systems": ["mamba"]}, "systems=mamba is unknown"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run_lm_decode(tmp_path, name="griffin_x", griffin=GRIFFIN, transformer=TRANSFORMER,
                      show_progress=False, **options)  # fmt: skip
    assert not list(tmp_path.iterdir())
