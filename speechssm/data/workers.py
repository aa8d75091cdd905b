"""Processes that convert shards beside each other.

Each takes one shard at a time and has a network of its own, on its own device. Nothing is shared,
so the bytes of a shard do not depend on how many there are. A process whose parent has gone ends by
itself; its unfinished shard leaves nothing but a file that the next run removes.
"""

import logging
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from speechssm.data.conversion import Convert, Task, convert_one
from speechssm.data.shards import ShardRecord
from speechssm.errors import ConfigError, ShardError, SpeechSSMError

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_REPORTS = 0.2
_SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class Processes:
    """What `convert_in_processes` starts.

    Args:
        setup: called once in each process with its device; returns its `convert`. It is pickled.
        devices: one for each process, for example ("cuda:0", "cuda:1").
        threads: of torch in each process, whatever their number: rounding may depend on it.
    """

    setup: Callable[[str], Convert]
    devices: Sequence[str]
    threads: int = 1


def plan_devices(device: str | Sequence[str], workers: int | None = None) -> list[str]:
    """The device of each process.

    Args:
        device: `cpu`, `cuda`, or several such as `cuda:0,cuda:1`.
        workers: processes in all, shared out over the devices; None for one a device.

    Raises:
        ConfigError: no device, or fewer processes than devices.
    """
    names = device.split(",") if isinstance(device, str) else list(device)
    devices = [str(name).strip() for name in names if str(name).strip()]
    if not devices:
        raise ConfigError("device names none; give cpu, cuda, or several such as cuda:0,cuda:1")
    workers = len(devices) if workers is None else workers
    if not isinstance(workers, int):
        raise ConfigError(f"workers={workers} must be a whole number or null")
    if workers < len(devices):
        raise ConfigError(
            f"workers={workers} processes cannot serve {len(devices)} devices; give at least one a "
            "device, or null"
        )
    return [devices[number % len(devices)] for number in range(workers)]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads of torch inside of the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class WorkerBug(RuntimeError):
    """What went wrong in another process, with its traceback as cause."""


@dataclass
class _Worker:
    process: BaseProcess
    task: Task | None = None

    def describe(self) -> str:
        return str(self.task.path) if self.task else "its preparation"


def convert_in_processes(
    processes: Processes,
    tasks: Sequence[Task],
    metadata: Mapping[str, Any],
    advance: Callable[[float], None],
) -> Iterator[ShardRecord]:
    """Convert tasks; yields the record of each as it is finished.

    After the first failure no more shards are begun; those at work are finished before it is
    raised.

    Args:
        metadata: of the records, see `convert_one`.
        advance: called with seconds of audio as they are dealt with.

    Raises:
        SpeechSSMError: of its own class, as the process that met it raised it; or a ShardError
            where a process has died. WorkerBug: any other exception in a process.
    """
    context = multiprocessing.get_context("spawn")
    remaining = iter(tasks)
    failure: Exception | None = None
    workers: dict[Connection, _Worker] = {}
    try:
        for device in processes.devices[: len(tasks)]:
            ours, theirs = context.Pipe()
            arguments = (theirs, processes.setup, device, processes.threads, dict(metadata))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # or its end would not be seen
            workers[ours] = _Worker(process)
        while workers:
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                worker = workers[connection]
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    ended = ShardError(
                        f"a worker process ended (status {worker.process.exitcode}) at "
                        f"{worker.describe()}; finished shards are kept: run the command again, "
                        "with fewer workers= if memory ran out"
                    )
                    kind, content = "failed", ended
                if kind == "seconds":
                    advance(content)
                    continue
                if kind == "failed":
                    if failure is None:
                        failure = content
                        logger.error("failed: stopping when the shards at work are finished")
                    _dismiss(connection, workers)
                    continue
                if kind == "finished":
                    yield content
                worker.task = next(remaining, None) if failure is None else None
                if worker.task is None:
                    _dismiss(connection, workers)
                else:
                    connection.send(worker.task)
    finally:
        processes_left = [worker.process for worker in workers.values()]
        for connection in list(workers):
            connection.close()
        for process in processes_left:
            process.join(_SECONDS_TO_END)
            if process.is_alive():
                process.terminate()
                process.join()
    if failure is not None:
        raise failure


def _dismiss(connection: Connection, workers: dict[Connection, _Worker]) -> None:
    connection.close()
    workers.pop(connection).process.join()


def _serve(
    connection: Connection,
    setup: Callable[[str], Convert],
    device: str,
    threads: int,
    metadata: dict[str, Any],
) -> None:
    """The life of a process: convert what comes, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(threads)
    try:
        task = None
        try:
            convert = setup(device)
            connection.send(("ready", None))
            while True:
                task = connection.recv()
                report = _Reports(connection)
                record = convert_one(task, metadata, convert, report)
                report.flush()
                connection.send(("finished", record))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the parent has no more work, or is gone
        except SpeechSSMError as error:
            connection.send(("failed", type(error)(str(error))))
        except Exception as error:
            message = str(error)
            if task is None or str(task.path) not in message:
                where = "" if task is None else f"{task.path}: "
                message = f"{where}{type(error).__name__}: {message}"
            bug = WorkerBug(message)
            bug.add_note(traceback.format_exc())
            connection.send(("failed", bug))
    except (BrokenPipeError, ConnectionResetError):
        return
    finally:
        connection.close()


class _Reports:
    """Sends seconds of audio to the parent, a few times a second at most."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._seconds, self._sent = 0.0, time.monotonic()

    def __call__(self, seconds: float) -> None:
        self._seconds += seconds
        if time.monotonic() - self._sent > _SECONDS_BETWEEN_REPORTS:
            self.flush()

    def flush(self) -> None:
        self._connection.send(("seconds", self._seconds))
        self._seconds, self._sent = 0.0, time.monotonic()
