"""Bench of decoding: time per token, state and throughput against the position in a stream.

Our Griffin, our Transformer of the same size (a cache as large as the position needs), and the
`generate` of `transformers`' RecurrentGemma with Griffin's configuration and weights: the paper's
Figures 6 (throughput of the largest batch in a fixed memory), 7 (time of one stream) and 8 (ratio
of the throughputs) made again.

The limit of one stream is to read the weights once per token, at the fastest rate at which a large
buffer was read in the same run.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from torch.nn.functional import scaled_dot_product_attention

from speechssm.benchmark.decoders import Decoding, time_generate
from speechssm.benchmark.lm_decode_results import (
    MIB,
    SYSTEMS,
    Attention,
    Found,
    Point,
    attention_note,
    decode_goals,
    decode_notes,
    decode_rows,
    largest_table,
    points_section,
    single_table,
)
from speechssm.benchmark.peers import INSTALL, installed, named, recurrent_gemma
from speechssm.benchmark.positions import states_at
from speechssm.benchmark.results import setting_of, write_bench
from speechssm.benchmark.timing import Copy, Readers, time_in_turn
from speechssm.configuration import choose
from speechssm.errors import ConfigError
from speechssm.evaluation.results import progress_bar
from speechssm.nn.state import state_bytes
from speechssm.report.bench_figures import decode_figures
from speechssm.report.rows import Row
from speechssm.report.style import save_figure

PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
QUICK = {"positions": (128, 512, 1024), "blocks": 3, "budget": 64, "peer_positions": (128,)}
LARGEST_RUNS = 3
BURST = 5  # times taken one after the other, as a stream goes on that has the machine to itself


def run_lm_decode(
    out: str | Path,
    *,
    name: str,
    griffin: Mapping[str, Any],
    transformer: Mapping[str, Any],
    positions: Sequence[int],
    block: int = 8,
    blocks: int = 20,
    precision: str = "32-true",
    budget: float = 1024.0,
    peer_positions: Sequence[int] = (),
    systems: Sequence[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    quick: bool = False,
    details: Mapping[str, object] | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """Measure decoding.

    Args:
        out: folder for bench.json, table.md and the plots.
        name: of the Griffin, for example `griffin_small`.
        griffin, transformer: configs of the networks, with `_target_`.
        positions: tokens in the stream at the end of what is timed.
        block, blocks: tokens decoded for one time, and how many times are taken; the least counts.
        precision: of weights and states, as Lightning names it.
        budget: MiB for the states of the largest batch.
        peer_positions: positions at which RecurrentGemma's `generate` is timed.
        systems: of `griffin`, `transformer`, `recurrentgemma`; all by default. Griffin is always
            measured.
        quick: a version of a minute; no goals are judged.

    Raises:
        ConfigError: impossible arguments.
    """
    if quick:
        positions, blocks, budget, peer_positions = QUICK.values()
    check_arguments(positions, peer_positions, block, blocks, precision, budget, systems)
    positions = sorted(positions)
    wanted = [system for system in SYSTEMS if system == "griffin" or system in (systems or SYSTEMS)]
    models = {}
    for system, config in (("griffin", griffin), ("transformer", transformer)):
        if system in wanted:
            torch.manual_seed(seed)
            models[system] = instantiate(dict(config)).to(device, PRECISIONS[precision]).eval()
    found = Found(
        {"griffin": name, "transformer": name.replace("griffin", "transformer"),
         "recurrentgemma": named("transformers", "RecurrentGemma's generate"),},
        {system: weight_bytes(model) for system, model in models.items()},
    )  # fmt: skip
    with progress_bar(show_progress) as progress:
        total = len(models) * positions[-1]
        task = progress.add_task("speaking to far positions", total=total)
        states = {
            system: states_at(
                model, [position - block for position in positions], room=block, seed=seed,
                advance=lambda tokens: progress.advance(task, tokens),
            )
            for system, model in models.items()
        }  # fmt: skip
        task = progress.add_task("one stream", total=None)
        measure_single(found, models, states, block, blocks, device, lambda: progress.advance(task))
        task = progress.add_task("largest batch", total=len(models) * len(positions))
        for system, model in models.items():
            for position in positions:
                state = states[system][position - block]
                measure_largest(found, system, model, state, position, block, budget * MIB, device)
                progress.advance(task)
        if "recurrentgemma" in wanted:
            task = progress.add_task("RecurrentGemma's generate", total=len(peer_positions))
            measure_peer(
                found, models["griffin"], sorted(peer_positions), block, blocks, device,
                lambda: progress.advance(task),
            )  # fmt: skip
    rows = decode_rows(found, device, {"seed": seed, **(details or {})})
    sections = points_section(found)
    for stem, drawing in decode_figures(sections).items():
        save_figure(drawing, Path(out) / f"{stem}.svg")
    write_bench(
        out,
        f"Decoding with {name}",
        {"One stream": single_table(found, positions),
         f"Largest batch whose states fit into {budget:g} MiB": largest_table(found, positions)},
        rows,
        [] if quick else decode_goals(found, name),
        [*decode_notes(found, block), *attention_note(found), *found.left_out],
        setting_of(device, precision),
        {"points": sections, "read_bandwidth": found.read,
         "read_bandwidth_as_many_bytes": found.read_as_many, "copy_bandwidth": found.copy,
         "weight_bytes": dict(found.weight_bytes), "budget_mib": budget},
    )  # fmt: skip
    return rows


def check_arguments(positions, peer_positions, block, blocks, precision, budget, systems) -> None:
    """Raises ConfigError for what cannot be measured."""
    if block < 1 or blocks < 1:
        raise ConfigError(f"options.lm_decode: block={block}, blocks={blocks}: each at least 1")
    least = block * blocks // 2  # the peer's prompt ends so many tokens before the position
    if not positions or min(positions) <= block or min(peer_positions, default=least + 1) <= least:
        raise ConfigError(
            f"options.lm_decode: positions={list(positions)} must be beyond block={block}, and "
            f"peer_positions={list(peer_positions)} beyond block * blocks / 2 = {least}"
        )
    if budget <= 0:
        raise ConfigError(f"options.lm_decode.budget={budget}: MiB, more than 0")
    choose("options.lm_decode.precision", precision, tuple(PRECISIONS))
    for system in systems or ():
        choose("options.lm_decode.systems", system, SYSTEMS)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that a token's step reads: all, but of the input embedding one row."""
    parameters = sum(value.numel() * value.element_size() for value in model.parameters())
    embedding, output = model.embedding, model.output_weight
    if model.output_embedding is None:
        return parameters - (len(embedding) - len(output)) * model.width * embedding.element_size()
    return parameters - (len(embedding) - 1) * model.width * embedding.element_size()


def measure_single(
    found: Found,
    models: Mapping[str, torch.nn.Module],
    states: Mapping[str, Mapping[int, Any]],
    block: int,
    blocks: int,
    device: str,
    advance: Callable[[], object],
) -> None:
    """One stream of each model at all positions, in turn with reading and copying memory."""
    readers, copy = Readers(device), Copy(device)
    as_many = Readers(device, found.weight_bytes["griffin"])
    decoders = {}
    for system, model in models.items():
        for begun, state in states[system].items():
            decoder = decoders[system, begun + block] = Decoding(model, state, begun, block)
            decoder.prepare()
            decoder()
            advance()
    calls: dict[Any, Callable[[], object]] = {**decoders, "copy": copy}
    for size, reader in (("large", readers), ("as many", as_many)):
        calls |= {(size, name): call for name, call in reader.calls().items()}
    if "transformer" in models:
        last = max(states["transformer"])
        calls["attention"] = attention_alone(models["transformer"], states["transformer"][last])
        calls["attention"]()
    runs = dict.fromkeys(calls, blocks)
    taken = time_in_turn(calls, runs, device, advance, rewind, burst=BURST)
    if "transformer" in models:
        found.attention = Attention(last + block, float(taken.pop("attention").min()))
    found.copy = copy.bandwidth(taken.pop("copy").min())
    found.read, found.read_as_many = (
        reader.bandwidth(min(taken.pop((size, name)).min() for name in reader.calls()))
        for size, reader in (("large", readers), ("as many", as_many))
    )
    for (system, position), values in taken.items():
        found.single.append(
            Point(system, position, 1, values.min() / block, float(np.median(values)) / block,
                  len(values), decoders[system, position].state_bytes)
        )  # fmt: skip


def attention_alone(model: torch.nn.Module, state: Any) -> Callable[[], object]:
    """SDPA of one token over all keys and values of a state, layer after layer, nothing else.

    A step in PyTorch cannot be faster than this: it shows whether our Transformer's is a fair one.
    """
    layers = [
        (block.temporal.num_heads, part.keys_BWH.unsqueeze(1), part.values_BWH.unsqueeze(1))
        for block, part in zip(model.blocks, state.blocks, strict=True)
    ]
    heads, keys_B1WH, _ = layers[0]
    query_BN1H = torch.randn_like(keys_B1WH[:, :, :1].expand(-1, heads, -1, -1))

    @torch.inference_mode()
    def call() -> list[torch.Tensor]:
        return [
            scaled_dot_product_attention(
                query_BN1H,
                keys_B1WH.expand(-1, heads, -1, -1),
                values_B1WH.expand(-1, heads, -1, -1),
            )
            for heads, keys_B1WH, values_B1WH in layers
        ]

    return call


def rewind(call: object) -> None:
    """Before a decoder is timed it goes back to its position."""
    if isinstance(call, Decoding):
        call.prepare()


def measure_largest(
    found: Found,
    system: str,
    model: torch.nn.Module,
    state: Any,
    position: int,
    block: int,
    budget: float,
    device: str,
) -> None:
    """A step of as many streams as have room for their states."""
    batch = int(budget // state_bytes(state))
    if batch < 1:
        found.left_out.append(
            f"{found.names[system]} at position {position}: not one state fits into the budget."
        )
        return
    decoder = Decoding(model, state, position - block, block, batch)
    decoder.prepare()
    decoder()
    values = time_in_turn({"": decoder}, {"": LARGEST_RUNS}, device, prepare=rewind)[""] / block
    found.largest.append(
        Point(system, position, batch, float(values.min()), float(np.median(values)),
              len(values), decoder.state_bytes)
    )  # fmt: skip


def measure_peer(
    found: Found,
    griffin: torch.nn.Module,
    positions: Sequence[int],
    block: int,
    blocks: int,
    device: str,
    advance: Callable[[], object],
) -> None:
    """RecurrentGemma's `generate`, or the line that says why not."""
    if not installed("transformers"):
        found.left_out.append(f"transformers' RecurrentGemma: left out, not installed: {INSTALL}.")
        return
    try:
        peer = recurrent_gemma(griffin)[1].to(device)
    except ConfigError as error:
        found.left_out.append(f"{found.names['recurrentgemma']}: left out, {error}.")
        return

    for position in positions:
        prompt = position - block * blocks // 2
        values, size = time_generate(peer, prompt, block, blocks)
        found.single.append(
            Point("recurrentgemma", position, 1, float(values.min()), float(np.median(values)),
                  len(values), size)
        )  # fmt: skip
        advance()
