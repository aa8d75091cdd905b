"""The decode engine: streams side by side, and the C kernel against the model's own forward."""

import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch

from speechssm.benchmark.memory import allocated_bytes
from speechssm.errors import ConfigError
from speechssm.kernels.build import load_library
from speechssm.lm import engine as engine_module
from speechssm.lm.decode_cpu import CpuDecoder, can_decode
from speechssm.lm.decode_torch import TorchDecoder
from speechssm.lm.engine import DecodeEngine, Stream
from speechssm.lm.generation import decode, generate_units
from speechssm.lm.griffin import Griffin
from speechssm.lm.transformer import Transformer
from speechssm.nn.state import tensors_of

UNITS = 37
# Sizes that are no multiples of the kernel's sixteen lanes, and every option of both models.
MODELS = {
    "griffin": lambda: Griffin(UNITS, 48, 4, 3, window=9),
    "griffin, rotary": lambda: Griffin(
        UNITS, 40, 4, 2, lru_width=54, window=140, positions="rotary", logits_soft_cap=None,
        tied_embeddings=False, conv_width=2, mlp_width=85,
    ),
    "griffin, attention first": lambda: Griffin(
        UNITS, 32, 2, 4, window=7, block_pattern=("attention", "recurrent")
    ),
    "transformer": lambda: Transformer(UNITS, 36, 2, 3, mlp_width=85, max_positions=400),
    "transformer, local": lambda: Transformer(
        UNITS, 32, 2, 4, window=7, bias=True, positions="none", logits_soft_cap=5.0
    ),
}  # fmt: skip

needs_kernel = pytest.mark.skipif(
    load_library("decode") is None, reason="the kernel cannot be built here"
)


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return build(request.param)


def prompt(seed, length):
    return np.random.default_rng(seed).integers(0, UNITS, length)


def streams(count, units=None):
    """Streams that differ in everything."""
    return [
        Stream(
            prompt(index, 3 * index % 23),
            seed=100 + index,
            temperature=(1.0, 0.7, 1.3, 0.0)[index % 4],
            top_k=(0, 5)[index // 2 % 2],
            top_p=(1.0, 0.8)[index // 3 % 2],
            max_units=None if units is None else units + 7 * (index % 5),
        )
        for index in range(count)
    ]


def alone(model, stream, units):
    engine = DecodeEngine(model, 1, max_positions=400)
    engine.start(0, stream)
    return engine.step(units)[0]


@needs_kernel
@torch.inference_mode()
def test_the_kernel_computes_what_the_model_does_past_the_window(model):
    assert can_decode(model)
    decoding = DecodeEngine(model, 3, max_positions=400)
    states = []
    for row, stream in enumerate(streams(3)):
        decoding.start(row, stream)
        tokens = torch.tensor([[model.bos_id, *stream.prompt]])
        hidden, state = model(
            tokens, tokens == model.bos_id, model.initial_state(1, max_positions=400)
        )
        states.append(state)
    assert isinstance(decoding.decoder, CpuDecoder)
    for _ in range(300):
        drawn = decoding.step(1)
        for row in range(3):
            hidden, states[row] = model(torch.from_numpy(drawn[row : row + 1]), None, states[row])
            torch.testing.assert_close(
                decoding.logits_BV[row], model.logits(hidden[0, 0]), atol=2e-5, rtol=1e-5
            )
    for row in range(3):
        for ours, theirs in zip(tensors_of(decoding.state), tensors_of(states[row]), strict=True):
            torch.testing.assert_close(ours[row], theirs[0], atol=2e-5, rtol=1e-4)


@needs_kernel
def test_a_stream_is_the_same_to_the_bit_alone_and_beside_fifteen_others(model):
    decoding = DecodeEngine(model, 16, max_positions=400)
    for row, stream in enumerate(streams(16)):
        decoding.start(row, stream)
    together = np.concatenate([decoding.step(count) for count in (1, 7, 100, 192)], axis=1)
    for row, stream in enumerate(streams(16)):
        assert np.array_equal(alone(model, stream, 300), together[row]), f"row {row}"


@needs_kernel
def test_rows_that_do_not_fit_into_the_cache_together_are_the_same_to_the_bit():
    torch.manual_seed(0)
    model = Griffin(UNITS, 16, 2, 2, window=4, mlp_width=16_411).eval()  # seven rows of 64 KiB fit
    decoding = DecodeEngine(model, 11)
    for row, stream in enumerate(streams(11)):
        decoding.start(row, stream)
    together = decoding.step(30)
    for row, stream in enumerate(streams(11)):
        assert np.array_equal(alone(model, stream, 30), together[row]), f"row {row}"


@needs_kernel
def test_the_number_of_threads_changes_no_bit(model):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            decoding = DecodeEngine(model, 3, max_positions=400)
            for row, stream in enumerate(streams(3)):
                decoding.start(row, stream)
            decoding.step(60)
            results.append(decoding.logits_BV.clone())
    finally:
        torch.set_num_threads(threads)
    # The prompt goes through torch, which may round in another way with other threads.
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_kernel
def test_rows_end_and_are_replaced_while_others_go_on(model):
    asked = streams(9, units=40)
    done = dict(decode(model, iter(asked), rows=4, max_positions=400))
    assert sorted(done) == list(range(9))
    for index, stream in enumerate(asked):
        assert np.array_equal(done[index], alone(model, stream, stream.max_units)), index


def test_a_stopped_row_is_free_and_idle_rows_give_minus_one():
    decoding = DecodeEngine(build("griffin"), 2)
    decoding.start(1, Stream(seed=5))
    first = decoding.step(10)
    assert (first[0] == -1).all() and (first[1] >= 0).all()
    decoding.stop(1)
    decoding.start(1, Stream(seed=5))
    assert np.array_equal(decoding.step(10), first)


@pytest.mark.parametrize("name", ["griffin", "transformer"])
def test_without_the_kernel_the_models_forward_decodes_the_same_streams(monkeypatch, name):
    model = build(name)
    expected = [alone(model, stream, 60) for stream in streams(4)]
    monkeypatch.setattr(engine_module, "can_decode", lambda model: False)
    decoding = DecodeEngine(model, 4, max_positions=400)
    assert isinstance(decoding.decoder, TorchDecoder)
    for row, stream in enumerate(streams(4)):
        decoding.start(row, stream)
    together = np.concatenate([decoding.step(20) for _ in range(3)], axis=1)
    # Rounding may in principle move a draw; with these seeds it does not.
    assert np.array_equal(together, expected)


@needs_kernel
def test_steps_allocate_nothing():
    decoding = DecodeEngine(build("griffin"), 4)
    for row, stream in enumerate(streams(4)):
        decoding.start(row, stream)
    decoding.step(64)
    tracemalloc.start()
    before, natively = tracemalloc.get_traced_memory()[0], allocated_bytes()
    for _ in range(200):
        decoding.step(64)
    grown = tracemalloc.get_traced_memory()[0] - before
    native = allocated_bytes() - natively
    tracemalloc.stop()
    # 200 calls of 64 steps and 4 rows: keeping one number of each would take 400 kB.
    assert grown < 20_000
    assert not native > 20_000  # NaN where there is no glibc


@needs_kernel
def test_a_step_makes_no_tensor():
    decoding = DecodeEngine(build("griffin"), 2)
    for row in range(2):
        decoding.start(row, Stream(seed=row))
    decoding.step(1)

    def allocations(count):
        with torch.profiler.profile(profile_memory=True) as profile:
            decoding.step(count)
        return sum(event.name == "[memory]" for event in profile.events())

    assert allocations(64) == allocations(1)


def test_prompts_are_fed_in_chunks_of_any_size_with_the_same_result(model):
    units = []
    for chunk in (512, 8, 1):
        decoding = DecodeEngine(model, 1, max_positions=400, prefill_chunk=chunk)
        decoding.start(0, Stream(prompt(1, 50), seed=3))
        units.append(decoding.step(20))
    assert np.array_equal(units[0], units[1]) and np.array_equal(units[0], units[2])


def test_a_row_of_a_batch_of_prompts_is_that_prompt_alone(model):
    prompts = np.stack([prompt(row, 12) for row in range(3)])
    together = np.concatenate(list(generate_units(model, prompts, seed=4, max_units=60)), axis=1)
    for row in range(3):
        single = generate_units(model, prompts[row : row + 1], seed=4 + row, max_units=60)
        assert np.array_equal(np.concatenate(list(single), axis=1)[0], together[row])


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (Stream(np.array([0, UNITS])), "from 0 to 37 do not fit"),
        (Stream(np.array([-1])), "from -1 to -1 do not fit"),
        (Stream(np.array([[1]])), r"not integer \[T\]"),
        (Stream(np.array([1.5])), "not integer"),
        (Stream(temperature=-0.1), "temperature=-0.1"),
        (Stream(temperature=float("nan")), "temperature=nan"),
        (Stream(temperature=1e39), r"temperature=1e\+39"),
        (Stream(seed=2**64), "seed=18446744073709551616"),
        (Stream(seed=0.5), "seed=0.5"),
        (Stream(top_k=-1), "top_k=-1"),
        (Stream(top_p=0.0), "top_p=0.0"),
        (Stream(top_p=1.1), "top_p=1.1"),
        (Stream(max_units=0), "max_units=0"),
    ],
)
def test_impossible_streams_are_named(stream, message):
    decoding = DecodeEngine(build("griffin"), 1)
    with pytest.raises(ConfigError, match=message):
        decoding.start(0, stream)
    assert not decoding.streams


def test_misuse_is_named():
    model = build("griffin")
    for options in ({"rows": 0}, {"rows": 1, "prefill_chunk": 0}):
        with pytest.raises(ConfigError, match="each at least 1"):
            DecodeEngine(model, **options)
    decoding = DecodeEngine(model, 1)
    with pytest.raises(ConfigError, match="0 streams"):
        decoding.step()
    decoding.start(0, Stream())
    with pytest.raises(ConfigError, match="row 0 is taken"):
        decoding.start(0, Stream())
    with pytest.raises(ConfigError, match="row 1 is not in 0"):
        decoding.start(1, Stream())
    with pytest.raises(ConfigError, match="has no max_units"):
        next(decode(model, [Stream()], 1))


@needs_kernel
def test_weights_may_change_in_place_between_streams():
    model, other = build("griffin"), build("griffin")
    for parameter in other.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    decoding = DecodeEngine(model, 1)
    model.load_state_dict(other.state_dict())
    decoding.start(0, Stream(seed=3))
    assert np.array_equal(decoding.step(50)[0], alone(other, Stream(seed=3), 50))


@needs_kernel
def test_weights_that_have_moved_are_named_and_a_running_stream_keeps_the_old_ones():
    model = build("griffin")
    expected = alone(model, Stream(seed=3), 200)
    decoding = DecodeEngine(model, 2)
    decoding.start(0, Stream(seed=3))
    model.double()
    # Were the old weights' memory free, these would overwrite it.
    kept = [torch.full((2**size,), torch.nan) for size in range(4, 15) for _ in range(20)]
    assert np.array_equal(decoding.step(200)[0], expected)
    del kept
    with pytest.raises(ConfigError, match="weights have moved"):
        decoding.start(1, Stream())


@pytest.mark.parametrize("change", ["logits", "layer"])
def test_a_model_that_computes_something_else_is_left_to_its_own_forward(change):
    model = build("griffin")
    if change == "logits":

        class Silent(Griffin):
            def logits(self, hidden_BTD):
                return super().logits(hidden_BTD).index_fill(-1, torch.tensor([0]), -1e9)

        model.__class__ = Silent
    else:

        class Zero(torch.nn.Linear):
            def forward(self, x):
                return 0 * super().forward(x)

        model.blocks[0].mlp.down = Zero(144, 48)
    assert not can_decode(model)


@pytest.mark.parametrize("kernel", [True, False])
@torch.inference_mode()
def test_a_broken_row_stops_all_streams_of_the_call(monkeypatch, kernel):
    if not kernel:
        monkeypatch.setattr(engine_module, "can_decode", lambda model: False)
    decoding = DecodeEngine(build("griffin"), 2)
    for row in range(2):
        decoding.start(row, Stream(seed=row))
    decoding.logits_BV[0, 3] = float("nan")
    with pytest.raises(ConfigError, match="not finite"):
        decoding.step(2)
    decoding.start(0, Stream(seed=1))
    decoding.start(1, Stream(seed=1))
    first, second = decoding.step(20)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_full_cache_and_broken_weights_are_named(monkeypatch, kernel):
    if not kernel:
        monkeypatch.setattr(engine_module, "can_decode", lambda model: False)
    decoding = DecodeEngine(build("transformer"), 1, max_positions=20)
    decoding.start(0, Stream(prompt(0, 9)))
    decoding.step(10)
    with pytest.raises(ConfigError, match="20 positions and 21 are needed"):
        decoding.step(1)
    model = build("griffin")
    model.final_norm.scale.data.fill_(float("nan"))
    decoding = DecodeEngine(model, 1)
    decoding.start(0, Stream())
    with pytest.raises(ConfigError, match="not finite"):
        decoding.step(5)


def test_logits_that_are_broken_for_one_step_are_noticed_after_the_last(monkeypatch):
    monkeypatch.setattr(engine_module, "can_decode", lambda model: False)
    model = build("griffin")
    decoding = DecodeEngine(model, 2)
    for row in range(2):
        decoding.start(row, Stream(seed=row))
    logits, calls = model.logits, []

    def broken_once(hidden):
        calls.append(1)
        return logits(hidden) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(model, "logits", broken_once)
    with pytest.raises(ConfigError, match="not finite"):
        decoding.step(10)


def test_a_stream_that_the_cache_has_no_room_for_is_named_before_it_begins():
    decoding = DecodeEngine(build("transformer"), 1, max_positions=20)
    with pytest.raises(ConfigError, match="20 positions and 21 are needed"):
        decoding.start(0, Stream(prompt(0, 9), max_units=11))
    decoding.start(0, Stream(prompt(0, 9), max_units=10))


def test_the_stream_that_cannot_be_decoded_is_named():
    with pytest.raises(ConfigError, match="stream 1: top_k=-1"):
        list(decode(build("griffin"), [Stream(max_units=3), Stream(max_units=3, top_k=-1)], 1))


@torch.inference_mode()
def test_a_step_is_forward_but_writes_into_the_rings_it_is_given(model):
    state = model.initial_state(3, max_positions=400)
    tokens = torch.randint(UNITS, (3, 20))
    _, state = model(tokens, None, state)
    rings = [tensor for tensor in tensors_of(state) if tensor.dim() == 3 and tensor.shape[1] > 5]
    addresses = [ring.data_ptr() for ring in rings]
    for _ in range(200):
        tokens = torch.randint(UNITS, (3, 1))
        expected, expected_state = model(tokens, None, state)
        hidden, state = model.step(tokens, state)
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(tensors_of(state), tensors_of(expected_state), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    known = {tensor.data_ptr() for tensor in tensors_of(state)}
    assert known.issuperset(addresses)


@torch.inference_mode()
def test_bfloat16_decodes_what_its_forward_says():
    model = build("griffin").bfloat16()
    assert not can_decode(model)
    decoding = DecodeEngine(model, 1)
    decoding.start(0, Stream(prompt(0, 12), temperature=0.0))
    units = decoding.step(100)
    tokens = torch.tensor([[model.bos_id, *prompt(0, 12)]])
    hidden, state = model(tokens, tokens == model.bos_id, model.initial_state(1))
    for unit in units[0]:
        assert unit == model.logits(hidden[0, -1]).argmax()
        hidden, state = model(torch.tensor([[unit]]), None, state)
    assert {tensor.dtype for tensor in tensors_of(decoding.state)} == {
        tensor.dtype for tensor in tensors_of(state)
    }


def test_a_compiled_step_decodes_the_same_streams(monkeypatch):
    monkeypatch.setattr(engine_module, "can_decode", lambda model: False)
    # Captured and made functional as on a GPU, but no code is generated: that takes half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    model = Griffin(UNITS, 16, 2, 2, window=7, block_pattern=("recurrent", "attention")).eval()
    results = []
    for compiled in (False, True):
        decoding = DecodeEngine(model, 2, compiled=compiled)
        for row in range(2):
            decoding.start(row, Stream(prompt(row, 5), seed=row))
        results.append(np.concatenate([decoding.step(12), decoding.step(9)], axis=1))
    assert np.array_equal(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_cuda_graph_draws_what_the_plain_step_does():
    model = build("griffin").cuda()
    results = []
    for graph in (True, False):
        decoding = DecodeEngine(model, 2)
        for row, stream in enumerate(streams(2)):
            decoding.start(row, stream)
        decoding.decoder.use_graph = graph
        results.append(np.concatenate([decoding.step(30) for _ in range(3)], axis=1))
    assert np.array_equal(*results)
