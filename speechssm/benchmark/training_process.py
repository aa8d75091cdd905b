"""One model in a process of its own that takes training steps when it is told to.

In a process of its own, because a process's peak memory never falls: whatever ran before would
hide it. Run as `python -m speechssm.benchmark.training_process`; it reads lines from its standard
input (first the task as JSON, then "step" or "memory") and answers each with one line of JSON.

Legend: B batch, T time.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryFile
from threading import Thread
from typing import Any

from speechssm.errors import SpeechSSMError

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
SYSTEMS = ("griffin", "transformer", "recurrentgemma")
START_SECONDS = 300.0  # for imports, weights and the first answer


class TrainingFailed(SpeechSSMError):
    """The process ended, or did not answer in time; the message says which."""


class TrainingProcess:
    """The parent's end: starts the process, asks it for steps, and ends it.

    Args:
        task: `system` (one of SYSTEMS), `model` (config of our network: the Griffin's for
            `recurrentgemma`), `optimizer`, `rows`, `length`, `device`, `precision`, `compile`,
            `activation_checkpointing`, `threads`, `seed`.
    """

    def __init__(self, task: Mapping[str, Any]):
        self.errors = TemporaryFile()  # noqa: SIM115  (until `close`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "speechssm.benchmark.training_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.lines: Queue[str] = Queue()
        Thread(target=self._read, daemon=True).start()
        self._tell(json.dumps(task))

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def _tell(self, line: str) -> None:
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer that does not come says so

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=seconds)
        except Empty:
            raise TrainingFailed(f"no answer within {seconds:g} s") from None
        if not line:
            raise TrainingFailed(self._ending())
        answer = json.loads(line)
        if "error" in answer:
            raise TrainingFailed(answer["error"])
        return answer

    def _ending(self) -> str:
        status = self.process.wait()
        if status == -9:
            return "killed by the system, which is short of memory"
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"ended with status {status}: {lines[-1] if lines else 'it said nothing'}"

    def wait_until_ready(self) -> dict[str, Any]:
        """`parameters`: how many the model has."""
        return self._answer(START_SECONDS)

    def step(self, seconds: float) -> dict[str, float]:
        """`seconds` that a training step took, and its `loss`.

        Raises:
            TrainingFailed: it took longer than `seconds`, or the process is no more.
        """
        self._tell("step")
        return self._answer(seconds)

    def peak_bytes(self) -> int:
        """Most memory held so far, over what there was before the model."""
        self._tell("memory")
        return int(self._answer(START_SECONDS)["peak_bytes"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()

    def __enter__(self) -> "TrainingProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PeakMemory:
    """The most memory held since before the model, in bytes.

    On CUDA the allocator's own peak. On the CPU the peak of pages in RAM, which counts all
    libraries alike; memory that was freed and kept for the next tensor is in it.
    """

    def __init__(self, device: str):
        self.device = device
        self.before = 0 if device.startswith("cuda") else self._resident("VmRSS")

    def reset(self) -> None:
        """Forget a peak of building the model."""
        gc.collect()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            # Linux: the high-water mark becomes what is resident now.
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        if self.device.startswith("cuda"):
            import torch

            return torch.cuda.max_memory_allocated()
        return self._resident("VmHWM") - self.before

    @staticmethod
    def _resident(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise OSError(f"/proc/self/status has no {name}")


def build_step(task: Mapping[str, Any]) -> tuple[Callable[[], float], int]:
    """A function that takes one training step and returns its loss; the number of parameters."""
    import torch
    from hydra.utils import instantiate

    from speechssm.nn.optimization import build_optimizer

    torch.manual_seed(task["seed"])
    device, precision = task["device"], task["precision"]
    model = instantiate(task["model"])
    if task["system"] == "recurrentgemma":
        from speechssm.benchmark.peers import recurrent_gemma

        bos = model.bos_id
        checkpointing = model.activation_checkpointing
        model = recurrent_gemma(model)[1].train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss_of = theirs
    else:
        bos = model.bos_id
        loss_of = ours
        if task["compile"]:
            for block in model.blocks:  # as in training
                block.compile()
    model.to(device, torch.bfloat16 if precision == "bf16-true" else torch.float32)
    optimizer, _ = build_optimizer(model.parameters(), task["optimizer"])
    generator = torch.Generator().manual_seed(task["seed"])
    inputs_BT = torch.randint(bos, (task["rows"], task["length"]), generator=generator)
    inputs_BT[:, 0] = bos
    inputs_BT = inputs_BT.to(device)

    def step() -> float:
        with torch.autocast(
            torch.device(device).type, torch.bfloat16, enabled=precision == "bf16-mixed"
        ):
            loss = loss_of(model, inputs_BT)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    return step, sum(parameter.numel() for parameter in model.parameters())


def ours(model, inputs_BT):
    """Loss of one of our models; documents begin at the rows' beginnings."""
    import torch

    from speechssm.lm.loss import IGNORED, cross_entropy

    document_start_BT = torch.zeros_like(inputs_BT, dtype=torch.bool)
    document_start_BT[:, 0] = True
    hidden_BTD, _ = model(inputs_BT, document_start_BT)
    targets_BT = torch.full_like(inputs_BT, IGNORED)
    targets_BT[:, :-1] = inputs_BT[:, 1:]
    total, count = cross_entropy(hidden_BTD, targets_BT, model.output_weight, model.logits_soft_cap)
    return total / count


def theirs(model, inputs_BT):
    """Loss of a model of `transformers`, which moves the targets by one itself."""
    return model(input_ids=inputs_BT, labels=inputs_BT, use_cache=False).loss


def main() -> None:
    """Read the task, then answer questions until the input ends."""
    # Libraries may print: what they say must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    task = json.loads(sys.stdin.readline())
    import torch

    from speechssm.runtime.memory import keep_freed_memory

    try:
        keep_freed_memory()
        torch.set_num_threads(task["threads"])
        import_all(task["system"])
        memory = PeakMemory(task["device"])
        step, parameters = build_step(task)
        memory.reset()
        answer(parameters=parameters)
        for line in sys.stdin:
            if line.strip() == "memory":
                answer(peak_bytes=memory.peak())
                continue
            begun = time.perf_counter()
            loss = step()
            answer(seconds=time.perf_counter() - begun, loss=loss)
    except (SpeechSSMError, torch.cuda.OutOfMemoryError, RuntimeError) as error:
        answer(error=" ".join(str(error).split())[:300])


def import_all(system: str) -> None:
    """Load the libraries, so that their memory is not counted as the model's."""
    import hydra.utils  # noqa: F401

    if system == "recurrentgemma":
        import transformers.models.recurrent_gemma.modeling_recurrent_gemma  # noqa: F401


if __name__ == "__main__":
    main()
