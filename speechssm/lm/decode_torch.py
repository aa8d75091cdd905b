"""The step of a language model in PyTorch: any dtype, device and backbone; a CUDA graph on a GPU.

Legend: B rows, N units of a call, V vocabulary.
"""

from functools import partial

import torch

from speechssm.lm.backbone import LanguageModel, LanguageModelState
from speechssm.lm.sampling import sample
from speechssm.nn.state import copy_state, map_state


class TorchDecoder:
    """Units for all rows, those without a stream included: the shapes never change.

    Everything that a step reads and writes lies in buffers that stay where they are, its place in
    the call too. So the same function runs as it is or, on a GPU, as a graph that was captured
    once: the steps of a call are replayed one after the other, and nothing waits for the device
    before all are done.

    Args:
        model: in evaluation mode.
        state: of all rows; changed in place.
        logits_BV: float32, of the next unit; changed in place.
        most_steps: of one call.
        compiled: whether a step goes through `torch.compile`.
    """

    def __init__(
        self,
        model: LanguageModel,
        state: LanguageModelState,
        logits_BV: torch.Tensor,
        most_steps: int,
        compiled: bool = False,
    ):
        self.model = model
        self.state = state
        self.logits_BV = logits_BV
        rows, device = len(logits_BV), logits_BV.device
        self.uniforms_NB = torch.zeros(most_steps, rows, device=device)
        self.drawn_NB = torch.zeros(most_steps, rows, dtype=torch.int64, device=device)
        self.place_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.finite_B = torch.ones(rows, dtype=torch.bool, device=device)
        self.use_graph = device.type == "cuda"
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        if compiled:
            self.one = torch.compile(self.one, dynamic=False)

    def follow(self) -> None:
        """Nothing to do: the model's weights are read where they are."""

    def one(
        self,
        temperature_B: torch.Tensor,
        top_k_B: torch.Tensor | None,
        top_p_B: torch.Tensor | None,
    ) -> None:
        """Draw one unit for every row and feed it in; from buffers into buffers."""
        uniform_B = self.uniforms_NB.index_select(0, self.place_1).squeeze(0)
        drawn_B = sample(self.logits_BV, uniform_B, temperature_B, top_k_B, top_p_B)
        self.drawn_NB.index_copy_(0, self.place_1, drawn_B[None])
        self.finite_B.logical_and_(self.logits_BV.isfinite().all(-1))
        hidden_B1D, state = self.model.step(drawn_B[:, None], self.state)
        copy_state(state, self.state)
        self.logits_BV.copy_(self.model.logits(hidden_B1D[:, 0]))
        self.place_1.add_(1)

    def graph(self, limited: bool, *settings: torch.Tensor | None) -> torch.cuda.CUDAGraph:
        """The captured step. Warming up draws units, so the buffers are put back after it."""
        if limited in self.graphs:
            return self.graphs[limited]
        buffers = (self.state, self.logits_BV, self.finite_B, self.place_1)
        kept = map_state(torch.clone, buffers)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.one(*settings)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.one(*settings)
        copy_state(kept, buffers)
        return self.graphs.setdefault(limited, graph)

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
        """As `CpuDecoder.run`. `rows_B`, `uniforms_BN` and `drawn_BN` are on the CPU."""
        # Without limits nothing is sorted: a graph of its own.
        limited = bool((top_k_B > 0).any() or (top_p_B < 1).any())
        settings = (temperature_B, *((top_k_B, top_p_B) if limited else (None, None)))
        one = partial(self.one, *settings)
        if self.use_graph:
            one = self.graph(limited, *settings).replay
        self.uniforms_NB[:steps] = uniforms_BN[:, :steps].T
        self.finite_B.fill_(True)
        self.place_1.zero_()
        for _ in range(steps):
            one()
        drawn_BN[rows_B, :steps] = self.drawn_NB[:steps].T.cpu()[rows_B]
        return bool(self.finite_B.cpu()[rows_B].all())
