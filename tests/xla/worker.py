"""One training under torch_xla in a process of its own: `worker.py OUT.json OVERRIDE...`.

A backward on the CPU before XLA has started breaks XLA's backward, so no test may share a process
with it. Writes what the tests look at: compilations after each step, dtypes, sharding.
"""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from speechssm.configuration import compose
from speechssm.runtime import training

MATMULS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear"}


class MatmulDtypes(TorchDispatchMode):
    """Collects the dtypes in which matrix products are computed."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in MATMULS:
            self.seen.add(str(result.dtype))
        return result


class Recorder(L.Callback):
    def __init__(self):
        self.record = {"compiles": [], "devices": [], "sharding": ""}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        import torch_xla
        import torch_xla.debug.metrics as metrics

        if "matmuls" not in self.record:
            self.record["sharding"] = torch_xla._XLAC._get_xla_sharding_spec(batch["inputs"])
            self.record["parameters"] = sorted(
                {str(parameter.dtype) for parameter in pl_module.model.parameters()}
            )
            context = trainer.precision_plugin.forward_context()
            with torch.no_grad(), context, MatmulDtypes() as dtypes:
                hidden_BTD, _ = pl_module.model(batch["inputs"], batch["document_start"])
                pl_module.model.logits(hidden_BTD)
            self.record["matmuls"] = sorted(dtypes.seen)
            torch_xla.sync()
        self.record["devices"] = [str(next(pl_module.parameters()).device)]
        self.record["compiles"].append(metrics.counter_value("UncachedCompile") or 0)


class StopAt(L.Callback):
    """A crash right before a step: nobody gets to tidy up."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os._exit(3)


def main() -> None:
    output, *overrides = sys.argv[1:]
    recorder = Recorder()
    extra = [recorder]
    for word in list(overrides):
        if word.startswith("stop_at="):
            overrides.remove(word)
            extra.append(StopAt(int(word.removeprefix("stop_at="))))
    original = training.data_callbacks
    training.data_callbacks = lambda: [*original(), *extra]
    training.train(compose("train", overrides))
    Path(output).write_text(json.dumps(recorder.record))


if __name__ == "__main__":
    main()
