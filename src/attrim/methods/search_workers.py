"""Several processes on one machine that carry out one search."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from attrim.errors import AttrimWarning, InputError
from attrim.methods.search_job import Job
from attrim.methods.search_send import Modules, PackedAsk, pack
from attrim.search.protocol import Found

__all__ = ["run_with_workers"]

_PATIENCE = 20.0
"""Seconds that the others get to finish when the search is over."""


def run_with_workers(job: Job, workers: int, **hooks: Callable[..., None] | None) -> Found:
    """Carry ``job`` out here and in ``workers - 1`` further processes.

    They are started anew (``spawn``), so that a script that calls this needs ``if __name__ == "__main__":``, and end with
    this one. One that dies is missed by nobody but the clock: the others take up its trial.

    Args:
        job: with a storage.
        workers: processes in all, >= 1.
        hooks: ``on_trial`` and ``tick`` of :meth:`Job.run`.

    Raises:
        InputError: the network or the objective cannot be sent to another process.
    """
    if workers == 1:
        return job.run(**hooks)
    threads = max(1, (os.cpu_count() or 1) // workers)
    with _threads(threads), _started(replace(job, threads=threads, storage=[]), workers - 1):
        return job.run(**hooks)


@contextmanager
def _started(job: Job, count: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    packed = pack(job.ask)
    objective = () if isinstance(job.ask.kind, str) else (job.ask.kind,)
    modules = Modules.behind([*job.ask.model.modules(), *objective, job.ask.metric, job.algorithm, job.start])
    light = replace(job, ask=replace(packed.shell, calibration=(), holdout=()))
    task = _pickled((modules, light, packed))
    others: list[tuple[SpawnProcess, Connection]] = []
    try:
        for _ in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(os.getpid(), theirs), daemon=True)
            process.start()
            theirs.close()
            others.append((process, mine))
            threading.Thread(target=_send, args=(mine, task), daemon=True).start()  # it is read only after the imports
        yield
        for process, _ in others:
            process.join(_PATIENCE)
    finally:
        for process, _ in others:
            if process.is_alive():
                process.terminate()
            process.join()
    for process, said in others:
        _tell(process, said)


def _send(link: Connection, task: bytes) -> None:
    with suppress(OSError):  # the worker has died, which is told in the end
        link.send_bytes(task)


def _pickled(task: Any) -> bytes:
    try:
        return bytes(ForkingPickler.dumps(task))
    except (AttributeError, TypeError, ValueError, ImportError) as error:
        raise _cannot_send(error) from error
    except Exception as error:
        if type(error).__name__ != "PicklingError":
            raise
        raise _cannot_send(error) from error


def _cannot_send(error: Exception) -> InputError:
    return InputError(
        f"workers: the search cannot be sent to another process: {error}. Networks, objectives and metrics must be defined at "
        "the top of a module (no lambda, no inner function); or start the same search several times with one storage."
    )


def _tell(process: SpawnProcess, said: Connection) -> None:
    """Warn about a worker that did not come to its end."""
    if process.exitcode == 0 or process.exitcode == -signal.SIGTERM:
        return
    try:
        reason = said.recv() if said.poll() else f"exit code {process.exitcode}"
    except (EOFError, OSError):
        reason = f"exit code {process.exitcode}"
    warnings.warn(
        f"a worker process died ({reason}); the others did its work. Fewer workers need less memory.",
        AttrimWarning,
        stacklevel=4,
    )


def _work(parent: int, link: Connection) -> None:
    """What a worker process does, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    warnings.simplefilter("ignore")

    def tick(_: Any) -> None:
        if os.getppid() != parent:
            sys.exit(0)

    try:
        _, job, packed = _received(link)
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        replace(job, ask=packed.unpack()).run(tick=tick)
    except Exception as error:
        link.send(f"{type(error).__name__}: {error}")
        sys.stderr.write(traceback.format_exc())
        sys.exit(1)


def _received(link: Connection) -> tuple[Modules, Job, PackedAsk]:
    """The task; files of modules are loaded as soon as they arrive, before what needs them."""
    task: tuple[Modules, Job, PackedAsk] = link.recv()
    return task


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)
