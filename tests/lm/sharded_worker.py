"""One of two processes that share a training step: `sharded_worker.py RANK FOLDER`.

Writes the largest difference of its gradients from those of one process with both batches, each
relative to the largest entry of its tensor, for DDP and for FSDP (`fully_shard`).
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from speechssm.lm.module import LanguageModelModule

MODEL = {
    "_target_": "speechssm.lm.griffin.Griffin",
    "vocab_size": 16,
    "width": 32,
    "num_layers": 3,
    "num_heads": 4,
    "window": 8,
}


class MeanLoss(torch.nn.Module):
    """The training step's loss as a network's forward pass, which is what gets wrapped."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.module = LanguageModelModule(MODEL, {})

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        total, count = self.module.summed_loss(batch)
        return total / count


def batch_of(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    units = torch.randint(0, 16, (2, 33), generator=generator)
    document_start = torch.zeros(2, 32, dtype=torch.bool)
    document_start[:, 0] = True
    inputs = torch.where(document_start, 16, units[:, :-1])
    return {"inputs": inputs, "targets": units[:, 1:], "document_start": document_start}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    plain = MeanLoss()
    for other in range(2):
        (plain(batch_of(other)) / 2).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    worst = {}
    for kind in ("ddp", "fsdp"):
        network = MeanLoss()
        if kind == "ddp":
            network = DistributedDataParallel(network)
        else:
            fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
        network(batch_of(rank)).backward()
        differences = []
        for name, parameter in network.named_parameters():
            gradient = parameter.grad.full_tensor() if kind == "fsdp" else parameter.grad
            truth = expected[name.replace("module.module.", "module.")]  # DDP adds one
            differences.append(float((gradient - truth).abs().max() / truth.abs().max()))
        worst[kind] = max(differences)
    (folder / f"{rank}.json").write_text(json.dumps(worst))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
