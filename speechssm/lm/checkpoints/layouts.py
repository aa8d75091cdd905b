"""Where other libraries keep the tensors of our language models: their names, shapes and order.

Griffin has its twin in RecurrentGemma, in the layout of `transformers` and in that of DeepMind's
PyTorch code; the Transformer in Gemma as `transformers` lays it out. Names below are without the
prefix (`model.`) that a file may put before all of them.

Legend: W filter width, D width, F expanded width, N blocks of a gate, K width of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from speechssm.lm.backbone import LanguageModel
from speechssm.recurrence.block import RecurrentBlock

# A module's name stands for its weight and its bias, a full name for one tensor.
RECURRENT_GEMMA = {
    "embedding": "embed_tokens.weight",
    "final_norm.scale": "final_norm.weight",
    "blocks": "layers",
    "temporal_norm.scale": "temporal_pre_norm.weight",
    "mlp_norm.scale": "channel_pre_norm.weight",
    "mlp.gate": "mlp_block.gate_proj",
    "mlp.up": "mlp_block.up_proj",
    "mlp.down": "mlp_block.down_proj",
}
RECURRENT_GEMMA_RECURRENT = {
    "temporal.gate": "temporal_block.linear_y",
    "temporal.input": "temporal_block.linear_x",
    "temporal.output": "temporal_block.linear_out",
    "temporal.conv": "temporal_block.conv_1d",
    "temporal.rg_lru.decay": "temporal_block.rg_lru.recurrent_param",
    "temporal.rg_lru.input_gate.weight": "temporal_block.rg_lru.input_gate_weight",
    "temporal.rg_lru.input_gate.bias": "temporal_block.rg_lru.input_gate_bias",
    "temporal.rg_lru.recurrence_gate.weight": "temporal_block.rg_lru.recurrent_gate_weight",
    "temporal.rg_lru.recurrence_gate.bias": "temporal_block.rg_lru.recurrent_gate_bias",
}
RECURRENT_GEMMA_ATTENTION = {
    "temporal.query": "temporal_block.q_proj",
    "temporal.key": "temporal_block.k_proj",
    "temporal.value": "temporal_block.v_proj",
    "temporal.output": "temporal_block.o_proj",
}
GEMMA = {
    "embedding": "embed_tokens.weight",
    "final_norm.scale": "norm.weight",
    "blocks": "layers",
    "temporal_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "temporal.query": "self_attn.q_proj",
    "temporal.key": "self_attn.k_proj",
    "temporal.value": "self_attn.v_proj",
    "temporal.output": "self_attn.o_proj",
}
DEEPMIND = {
    "embedding": "embedder.input_embedding",
    "final_norm.scale": "final_norm.scale",
    "blocks": "blocks",
    "temporal_norm.scale": "temporal_pre_norm.scale",
    "mlp_norm.scale": "channel_pre_norm.scale",
    "mlp.gate.weight": "mlp_block.ffw_up.w",
    "mlp.gate.bias": "mlp_block.ffw_up.b",
    "mlp.up.weight": "mlp_block.ffw_up.w",
    "mlp.up.bias": "mlp_block.ffw_up.b",
    "mlp.down": "mlp_block.ffw_down",
}
DEEPMIND_RECURRENT = {
    "temporal.gate": "recurrent_block.linear_y",
    "temporal.input": "recurrent_block.linear_x",
    "temporal.output": "recurrent_block.linear_out",
    "temporal.conv.weight": "recurrent_block.conv_1d.w",
    "temporal.conv.bias": "recurrent_block.conv_1d.b",
    "temporal.rg_lru.decay": "recurrent_block.rg_lru.a_param",
    "temporal.rg_lru.input_gate.weight": "recurrent_block.rg_lru.input_gate.w",
    "temporal.rg_lru.input_gate.bias": "recurrent_block.rg_lru.input_gate.b",
    "temporal.rg_lru.recurrence_gate.weight": "recurrent_block.rg_lru.a_gate.w",
    "temporal.rg_lru.recurrence_gate.bias": "recurrent_block.rg_lru.a_gate.b",
}
DEEPMIND_ATTENTION = {
    "temporal.query": "attention_block.proj_q",
    "temporal.key": "attention_block.proj_k",
    "temporal.value": "attention_block.proj_v",
    "temporal.output": "attention_block.proj_final",
}


# For each family: the tables for what lies outside of blocks, in recurrent ones, in attention ones.
FAMILIES = {
    "recurrent_gemma": (
        RECURRENT_GEMMA,
        RECURRENT_GEMMA | RECURRENT_GEMMA_RECURRENT,
        RECURRENT_GEMMA | RECURRENT_GEMMA_ATTENTION,
    ),
    "gemma": (GEMMA, GEMMA, GEMMA),
    "deepmind": (DEEPMIND, DEEPMIND | DEEPMIND_RECURRENT, DEEPMIND | DEEPMIND_ATTENTION),
}


def unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Counterpart:
    """Where another library keeps one of our tensors.

    Args:
        name: of their tensor; one that stacks two of ours is named by both.
        shape: of their tensor.
        read: ours as a view of theirs.
        write: theirs as a view of ours; of no use where theirs stacks two.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[torch.Tensor], torch.Tensor] = unchanged
    write: Callable[[torch.Tensor], torch.Tensor] = unchanged


Layout = dict[str, Counterpart]


def layout_of(model: LanguageModel, family: str) -> Layout:
    """A counterpart for each tensor of the model's state dict that the family knows.

    Args:
        model: on any device, the meta device too.
        family: "recurrent_gemma" or "deepmind" for a Griffin, "gemma" for a Transformer.
    """
    outside, in_recurrent, in_attention = FAMILIES[family]
    layout = {}
    for ours, tensor in model.state_dict().items():
        if ours == "output_embedding":  # they have none, or one with a row for BOS
            continue
        if not ours.startswith("blocks."):
            layout[ours] = arranged(model, ours, outside[ours], tuple(tensor.shape))
            continue
        _, index, rest = ours.split(".", 2)
        recurs = isinstance(model.blocks[int(index)].temporal, RecurrentBlock)
        table = in_recurrent if recurs else in_attention
        module, _, kind = rest.rpartition(".")
        theirs = table[rest] if rest in table else f"{table[module]}.{kind}"
        name = f"{outside['blocks']}.{index}.{theirs}"
        layout[ours] = arranged(model, ours, name, tuple(tensor.shape))
    return layout


def arranged(model: LanguageModel, ours: str, name: str, shape: tuple[int, ...]) -> Counterpart:
    """The counterpart under their name; most tensors lie there as they do here."""
    if ours.endswith("_gate.bias"):  # [N K] here, [N, K] there
        gate = model.get_submodule(ours.removesuffix(".bias"))
        blocks = (gate.num_blocks, gate.block_width)
        return Counterpart(name, blocks, torch.flatten, lambda tensor: tensor.unflatten(0, blocks))
    if name.endswith("conv_1d.weight"):  # [W, D] here, [D, 1, W] there
        return Counterpart(
            name,
            (shape[1], 1, shape[0]),
            lambda theirs: theirs.squeeze(1).mT,
            lambda tensor: tensor.mT.unsqueeze(1),
        )
    branch = 0 if "mlp.gate" in ours else 1
    if name.endswith("ffw_up.w"):  # two of [F, D] here, [2, D, F] there
        return Counterpart(name, (2, *reversed(shape)), lambda theirs: theirs[branch].mT)
    if name.endswith("ffw_up.b"):  # two of [F] here, [2, 1, 1, F] there
        return Counterpart(name, (2, 1, 1, *shape), lambda theirs: theirs[branch].flatten())
    return Counterpart(name, shape)
