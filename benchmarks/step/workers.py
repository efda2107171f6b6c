"""Each side has a process of its own, and hears over a pipe when to step."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

from benchmarks.step.specs import Side, SideInfo, StepRecord, Workload

T = TypeVar("T")


class WorkerError(RuntimeError):
    """A side's process has failed, or the system has ended it, most likely because memory ran out."""


class _Finished(BaseException):
    """A signal that ends a trainer's own loop; it is no Exception, so that no trainer takes it for its own failure."""


class Worker:
    """One side in a process of its own; it steps when told to and is idle otherwise."""

    def __init__(self, side: Side, workload: Workload) -> None:
        self.side = side
        # The variable is set before the process loads torch, whose pools then have that many threads from the start.
        os.environ["OMP_NUM_THREADS"] = str(side.threads)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(side, workload, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.info = self._receive(SideInfo)

    def step(self) -> StepRecord:
        """Make one step from start to end, and return its report."""
        self._pipe.send("step")
        return self._receive(StepRecord)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send("finish")
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.terminate()

    def _receive(self, kind: type[T]) -> T:
        try:
            report = self._pipe.recv()
        except EOFError:
            self._process.join(timeout=30)
            raise WorkerError(
                f"The process of {self.side.label} ended without a word, exit code {self._process.exitcode}."
            ) from None
        if not isinstance(report, kind):
            raise WorkerError(f"The process of {self.side.label} failed:\n{report}")
        return report


@contextlib.contextmanager
def running(sides: Sequence[Side], workload: Workload) -> Iterator[list[Worker]]:
    """Start a worker for each side, and end all of them on leaving."""
    workers: list[Worker] = []
    try:
        for side in sides:
            workers.append(Worker(side, workload))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def _work(side: Side, workload: Workload, pipe: Connection) -> None:
    def conduct(report: SideInfo | StepRecord) -> None:
        pipe.send(report)
        if pipe.recv() != "step":
            raise _Finished

    try:
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        import torch
        from transformers.utils.logging import disable_progress_bar

        warnings.simplefilter("ignore", FutureWarning)
        disable_progress_bar()
        torch.set_num_threads(side.threads)
        trainer = importlib.import_module(f"benchmarks.step.{'ours' if side.library == 'ours' else 'peers'}")
        trainer.run(side, workload, conduct)
    except _Finished:
        return
    except Exception:
        pipe.send(traceback.format_exc())
