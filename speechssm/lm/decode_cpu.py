"""The single-token step of a language model as one C call: all layers, all rows, the draw included.

Legend: B rows, V vocabulary.
"""

import ctypes

import torch
from torch import nn

from speechssm.errors import ConfigError
from speechssm.kernels.build import load_library
from speechssm.lm.backbone import LanguageModel, LanguageModelState, ResidualBlock
from speechssm.nn.attention import AttentionState, MultiQueryAttention
from speechssm.nn.linear import BlockDiagonalLinear, Linear
from speechssm.nn.mlp import GatedMLP
from speechssm.nn.norms import RMSNorm
from speechssm.nn.rotary import rotary_frequencies
from speechssm.recurrence.block import RecurrentBlock, RecurrentState
from speechssm.recurrence.conv import CausalConv1d
from speechssm.recurrence.rg_lru import GATE_SCALE, RGLRU

# What the kernel computes by itself. Their subclasses, and layers that were put in their place
# (compiled, quantised, with adapters), may compute something else.
KNOWN_MODULES = {
    ResidualBlock,
    RMSNorm,
    GatedMLP,
    Linear,
    MultiQueryAttention,
    RecurrentBlock,
    CausalConv1d,
    RGLRU,
    BlockDiagonalLinear,
}

POINTER, INTEGER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def struct(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    """A C struct; "a b c" names several fields of one type."""
    flat = [(part, kind) for names, kind in fields for part in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": flat})


LinearMap = struct("LinearMap", ("weight bias", POINTER), ("outputs inputs", INTEGER))
Norm = struct("Norm", ("scale", POINTER), ("epsilon", REAL))
Mlp = struct("Mlp", ("before", Norm), ("gate up down", LinearMap))
Recurrent = struct(
    "Recurrent",
    ("gate input output", LinearMap),
    ("filter filter_bias", POINTER),
    ("input_gate input_gate_bias recurrence_gate recurrence_gate_bias rate", POINTER),
    ("history hidden", POINTER),
    ("filter_width block_width", INTEGER),
)
Attention = struct(
    "Attention",
    ("query key value output", LinearMap),
    ("frequencies keys values position", POINTER),
    ("heads head_width slots rotated", INTEGER),
)
Layer = struct(
    "Layer",
    ("before", Norm),
    ("is_attention", INTEGER),
    ("recurrent", Recurrent),
    ("attention", Attention),
    ("mlp", Mlp),
)
Network = struct(
    "Network",
    ("embedding", POINTER),
    ("output", LinearMap),
    ("layers", POINTER),
    ("last", Norm),
    ("embedding_scale soft_cap", REAL),
    ("num_layers width widest", INTEGER),
)
Call = struct(
    "Call",
    ("rows logits uniforms drawn temperature top_p top_k work", POINTER),
    ("batch steps most_steps threads", INTEGER),
)


def library() -> ctypes.CDLL | None:
    """The kernel with its signatures; None where it cannot be had."""
    kernel = load_library("decode")
    if kernel is not None:
        kernel.decode.restype = kernel.decode_work.restype = INTEGER
        kernel.decode.argtypes = [POINTER, POINTER]
        kernel.decode_work.argtypes = [POINTER, INTEGER, INTEGER]
    return kernel


def can_decode(model: LanguageModel) -> bool:
    """Whether the kernel knows this network: float32 on the CPU, layers of this package alone."""
    known = (
        isinstance(model, LanguageModel)
        and type(model).step is LanguageModel.step
        and type(model).logits is LanguageModel.logits
        and type(model.final_norm) is RMSNorm
        and all(
            type(module) in KNOWN_MODULES
            for module in model.blocks.modules()
            if module is not model.blocks
        )
    )
    plain = known and all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
        for tensor in model.parameters()
    )
    return plain and library() is not None


class CpuDecoder:
    """A model and a state as the kernel sees them. Weights are read where they are, not copied.

    Args:
        model: for which `can_decode` is true. Its weights may change in place between streams
            (see `follow`), but not move.
        state: of all rows, float32; the kernel changes it in place.
        logits_BV: float32, of the next unit; changed in place.
    """

    def __init__(self, model: LanguageModel, state: LanguageModelState, logits_BV: torch.Tensor):
        # Whatever the kernel has a pointer to is kept alive in here.
        self.kept: list[object] = [model, state, logits_BV]
        self.kernel = library()
        self.logits_BV = logits_BV
        self.rates: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.layers = (Layer * len(model.blocks))(
            *(
                self.layer(block, part)
                for block, part in zip(model.blocks, state.blocks, strict=True)
            )
        )
        output = LinearMap(self.pointer(model.output_weight), None, *model.output_weight.shape)
        self.network = Network(
            self.pointer(model.embedding),
            output,
            ctypes.addressof(self.layers),
            self.norm(model.final_norm),
            model.embedding_scale,
            model.logits_soft_cap or 0.0,
            len(model.blocks),
            model.width,
            max(max(module.weight.shape) for module in model.modules() if is_linear(module)),
        )
        self.work = torch.empty(0)
        self.parameters = tuple(model.parameters())
        self.addresses = [parameter.data_ptr() for parameter in self.parameters]

    @torch.inference_mode()
    def follow(self) -> None:
        """Take up weights that have changed in place, as `load_state_dict` changes them.

        Raises:
            ConfigError: they have moved, as `model.to` moves them.
        """
        if self.addresses != [parameter.data_ptr() for parameter in self.parameters]:
            raise ConfigError(
                "the model's weights have moved to another dtype or device since the engine was "
                "made: make a new DecodeEngine"
            )
        for decay_D, rate_D in self.rates:
            rate_D.copy_(decay_rate(decay_D))

    def pointer(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.kept.append(tensor.detach())  # the memory itself: `tensor` may come to have another
        return tensor.data_ptr()

    def linear(self, module: nn.Linear) -> ctypes.Structure:
        return LinearMap(
            self.pointer(module.weight), self.pointer(module.bias), *module.weight.shape
        )

    def norm(self, module: nn.Module) -> ctypes.Structure:
        return Norm(self.pointer(module.scale), module.eps)

    def layer(
        self, block: ResidualBlock, state: RecurrentState | AttentionState
    ) -> ctypes.Structure:
        mlp = Mlp(
            self.norm(block.mlp_norm),
            *(self.linear(part) for part in (block.mlp.gate, block.mlp.up, block.mlp.down)),
        )
        recurrent, attention = Recurrent(), Attention()
        if isinstance(block.temporal, RecurrentBlock):
            recurrent = self.recurrent(block.temporal, state)
        else:
            attention = self.attention(block.temporal, state)
        is_attention = isinstance(block.temporal, MultiQueryAttention)
        return Layer(self.norm(block.temporal_norm), is_attention, recurrent, attention, mlp)

    def recurrent(self, block: RecurrentBlock, state: RecurrentState) -> ctypes.Structure:
        gates = block.rg_lru
        rate_D = decay_rate(gates.decay)
        self.rates.append((gates.decay, rate_D))
        tensors = (
            block.conv.weight,
            block.conv.bias,
            gates.input_gate.weight,
            gates.input_gate.bias,
            gates.recurrence_gate.weight,
            gates.recurrence_gate.bias,
            rate_D,
            state.conv.inputs_BWD,
            state.rg_lru.hidden_BD,
        )
        return Recurrent(
            *(self.linear(part) for part in (block.gate, block.input, block.output)),
            *map(self.pointer, tensors),
            block.conv.filter_width,
            gates.input_gate.block_width,
        )

    def attention(self, block: MultiQueryAttention, state: AttentionState) -> ctypes.Structure:
        frequencies = None
        if block.positions == "rotary":
            frequencies = rotary_frequencies(block.head_width, block.rotary_fraction)
        return Attention(
            *(self.linear(part) for part in (block.query, block.key, block.value, block.output)),
            *map(self.pointer, (frequencies, *state)),
            block.num_heads,
            block.head_width,
            state.keys_BWH.shape[1],
            0 if frequencies is None else 2 * len(frequencies),
        )

    def run(
        self,
        rows_B: torch.Tensor,
        steps: int,
        uniforms_BN: torch.Tensor,
        drawn_BN: torch.Tensor,
        temperature_B: torch.Tensor,
        top_k_B: torch.Tensor,
        top_p_B: torch.Tensor,
    ) -> bool:
        """Draw `steps` units for each of the rows named, and feed them in.

        Args:
            rows_B: int64, distinct; the other rows of the state stay as they are. All other
                tensors have a place for every row of the state.
            uniforms_BN: float32 in [0, 1), at least `steps` in a row.
            drawn_BN: int64, of the same shape; what was drawn is written here.
            temperature_B, top_p_B: float32. top_k_B: int64, 0 for no limit.

        Returns:
            False where a row's logits were not finite; the row's units end with a -1 then.
        """
        threads = torch.get_num_threads()
        needed = self.kernel.decode_work(ctypes.byref(self.network), len(rows_B), threads)
        if needed > self.work.numel():
            self.work = torch.empty(needed)
        tensors = (
            rows_B,
            self.logits_BV,
            uniforms_BN,
            drawn_BN,
            temperature_B,
            top_p_B,
            top_k_B,
            self.work,
        )
        call = Call(
            *(tensor.data_ptr() for tensor in tensors),
            len(rows_B),
            steps,
            uniforms_BN.shape[1],
            threads,
        )
        return self.kernel.decode(ctypes.byref(self.network), ctypes.byref(call)) == steps


def decay_rate(decay_D: torch.Tensor) -> torch.Tensor:
    """Log of the decay at a wide-open recurrence gate."""
    return -GATE_SCALE * nn.functional.softplus(decay_D)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
