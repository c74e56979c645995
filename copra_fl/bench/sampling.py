"""Sample CPU seconds and memory of a group of processes while they work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import psutil

#: seconds between two samples of CPU times, of memory, and between two searches for new processes
CPU_SECONDS, MEMORY_SECONDS, SEARCH_SECONDS = 0.05, 0.2, 1.0


@dataclass(frozen=True)
class TimedRound:
    """One round: start and end (seconds of `time.time`), and the bytes sent to the clients and back."""

    start: float
    end: float
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Sampler:
    """Samples the processes that `find_processes` returns, within a `with` block.

    Attributes:
        peak: largest sum of the processes' memory at one time, in bytes. Proportional set size, in which a page that
            k processes share counts 1/k in each; unique set size on systems without it. 0 unless `memory`, whose
            sampling costs a few percent of a core.
    """

    def __init__(self, find_processes: Callable[[], list[psutil.Process]], memory: bool) -> None:
        self._find_processes, self._memory = find_processes, memory
        self._processes: list[psutil.Process] = []
        self._cpu: dict[int, float] = {}
        self._curve: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()

    def cpu_seconds(self, rounds: list[TimedRound]) -> float:
        """Return the CPU seconds that were spent in `rounds`."""
        times, seconds = zip(*self._curve, strict=True)
        spent = [np.diff(np.interp([r.start, r.end], times, seconds)) for r in rounds]
        return float(np.sum(spent))

    def _run(self) -> None:
        last_search = last_memory = 0.0
        done = False
        while not done:
            done = self._stop.wait(CPU_SECONDS)
            now = time.time()
            if now > last_search + SEARCH_SECONDS:
                self._processes, last_search = self._find_processes(), now
            if self._memory and now > last_memory + MEMORY_SECONDS:
                self.peak, last_memory = max(self.peak, sum(map(_memory, self._processes))), now
            self._cpu |= dict(map(_cpu, self._processes))
            self._curve.append((now, sum(self._cpu.values())))


def with_descendants(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return the processes `roots` and their descendants that are still running."""
    processes = []
    for root in roots:
        with suppress(psutil.Error):
            processes += [root, *root.children(recursive=True)]
    return processes


def _cpu(process: psutil.Process) -> tuple[int, float]:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return -1, 0.0
    return process.pid, times.user + times.system


def _memory(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
    except psutil.Error:
        return 0
    return getattr(info, "pss", info.uss)
