"""CPU seconds and memory of a group of processes, sampled from outside while they work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import psutil

#: seconds between two looks at CPU times, at memory, and for new processes
CPU_SECONDS, MEMORY_SECONDS, SEARCH_SECONDS = 0.05, 0.2, 1.0


@dataclass(frozen=True)
class Round:
    """One round: when it began and ended (seconds of `time.time`), and the bytes that went to the clients and back."""

    start: float
    end: float
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Sampler:
    """Watches the processes that `find` returns, while its block runs.

    Attributes:
        peak: the most memory they had together at one time, in bytes: proportional set size, in which pages that k
            processes share count a k-th in each (where a system does not tell: unique set size). 0 unless `memory`,
            which costs a few percent of a core.
    """

    def __init__(self, find: Callable[[], list[psutil.Process]], memory: bool) -> None:
        self._find, self._memory = find, memory
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

    def cpu_seconds(self, rounds: list[Round]) -> float:
        """CPU seconds that were spent in `rounds`."""
        times, seconds = zip(*self._curve, strict=True)
        spent = [np.diff(np.interp([r.start, r.end], times, seconds)) for r in rounds]
        return float(np.sum(spent))

    def _run(self) -> None:
        searched = weighed = 0.0
        done = False
        while not done:
            done = self._stop.wait(CPU_SECONDS)
            now = time.time()
            if now > searched + SEARCH_SECONDS:
                self._processes, searched = self._find(), now
            if self._memory and now > weighed + MEMORY_SECONDS:
                self.peak, weighed = max(self.peak, sum(map(_memory, self._processes))), now
            self._cpu |= dict(map(_cpu, self._processes))
            self._curve.append((now, sum(self._cpu.values())))


def families(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes `roots` and all that descend from them, those that are left."""
    found = []
    for root in roots:
        with suppress(psutil.Error):
            found += [root, *root.children(recursive=True)]
    return found


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
