"""A backend in processes of their own, for steps of many small operations.

Threads that step such models wait for one another's Python between the operations: two of them took cnn and vit 1.4 and
1.0 to 1.4 times as far as one, two processes 2.0 times (docs/decisions/0008-worker-processes.md). Runs are built anew
in the process from their problem and probe, so that a process gives the bits that the backend gives here.
"""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from fasttrain.backends.base import Backend, Report, Run, Setting
from fasttrain.machine import out_of_memory
from fasttrain.records import Probe, Problem, Saved
from fasttrain.spec import Variant

_SERVE = "import sys; from fasttrain.backends.apart import serve; serve(int(sys.argv[1]))"

_Made = tuple[str, Setting, Variant]  # of a backend: its name, and what it is made with
_Order = tuple[str, Any]  # ("init" or "insert", problems and probes) or ("select", positions)


class Processes:
    """Processes that hold states for ``ApartBackend``; they start when they are first needed.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._workers: list[_Worker] = []
        self._turn = itertools.cycle(range(count))

    def next(self) -> "_Worker":
        """The processes, one after the other."""
        number = next(self._turn)
        while len(self._workers) <= number:
            self._workers.append(_Worker())
        return self._workers[number]

    def close(self) -> None:
        """Ends them at once, whatever they are at: they hold nothing that is not to be dropped."""
        for worker in self._workers:
            worker.kill()


class _Worker:
    """One process, and the line to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        paths = os.pathsep.join(path for path in (*sys.path, os.getcwd()) if path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths},
            )
        self._connection = Connection(ours.detach())
        self._one = threading.Lock()
        self.numbers = itertools.count()

    def ask(self, request: tuple[Any, ...]) -> Any:
        """The answer to a request; the threads that ask take turns.

        Raises:
            MemoryError: the request failed there for want of memory; its state is gone.
        RuntimeError: it failed for another reason, or the process has ended.
        """
        try:
            with self._one:
                self._connection.send(request)
                good, answer = self._connection.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            raise RuntimeError(f"a worker process ended (status {status})") from None
        if not good:
            memory, told = answer
            raise (MemoryError if memory else RuntimeError)(f"in a worker process: {told}")
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


@dataclass(slots=True, eq=False)
class ApartState:
    """Runs whose training is elsewhere: ``orders`` have not been sent yet, ``parameters`` are of those that ended."""

    runs: list[Run]
    number: int
    orders: list[_Order]
    clock: int = 0
    parameters: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)


class ApartBackend:
    """``Backend`` that hands a bucket's runs to a process, which trains them with the backend of a name.

    ``parameters`` has those of runs that ended in the last ``run`` alone.
    """

    most_together: int | None = None
    in_threads = True

    def __init__(self, name: str, setting: Setting, variant: Variant, processes: Processes) -> None:
        self.name = name
        self.lanes = processes.count
        self.checks_a_turn = 1
        self._worker = processes.next()
        self._made = (name, setting, variant)

    def init(self, runs: Sequence[Run]) -> ApartState:
        """See ``Backend``."""
        return ApartState(list(runs), next(self._worker.numbers), [("init", _identity(runs))])

    def run(self, state: ApartState, until_step: int) -> Report:
        """See ``Backend``."""
        orders, state.orders = state.orders, []
        asked = (self._made, state.number, orders, until_step)
        report, state.clock, state.parameters = self._worker.ask(("run", *asked))
        return report

    def select(self, state: ApartState, keep: Sequence[int]) -> ApartState:
        """See ``Backend``."""
        state.orders.append(("select", list(keep)))
        state.runs = [state.runs[position] for position in keep]
        return state

    def insert(self, state: ApartState, runs: Sequence[Run]) -> ApartState:
        """See ``Backend``."""
        state.orders.append(("insert", _identity(runs)))
        state.runs = [*state.runs, *runs]
        return state

    def parameters(self, state: ApartState, position: int) -> dict[str, np.ndarray]:
        """See ``Backend``."""
        return state.parameters[position]

    def saved(self, state: ApartState) -> list[dict[str, np.ndarray]]:
        """See ``Backend``."""
        orders, state.orders = state.orders, []
        saved: list[dict[str, np.ndarray]] = self._worker.ask(("saved", self._made, state.number, orders))
        return saved


def _identity(runs: Sequence[Run]) -> list[tuple[Problem, Probe, Saved | None]]:
    return [(run.problem, run.probe, run.taken()) for run in runs]


def serve(descriptor: int) -> None:
    """What a process does: trains as it is asked to over a socket, until that is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of a terminal's processes; the first one decides
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    connection = Connection(descriptor)
    held = _Held()
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        answer: tuple[bool, object]
        try:
            what, *asked = request
            answer = True, (held.run if what == "run" else held.saved)(*asked)
        except Exception as error:  # whatever it is, it is told to who asked
            answer = False, (out_of_memory(error), traceback.format_exc())
            held.forget(request[2])
        connection.send(answer)


class _Held:
    """The backends and states of a process."""

    def __init__(self) -> None:
        self._backends: dict[tuple[str, Variant], Backend[Any]] = {}
        self._states: dict[int, Any] = {}

    def run(
        self, made: _Made, number: int, orders: Sequence[_Order], until_step: int
    ) -> tuple[Report, int, dict[int, dict[str, np.ndarray]]]:
        """Follows orders on a state and steps it: the report, the clock, and the parameters of runs that ended."""
        backend, state = self._followed(made, number, orders)
        begin = time.perf_counter()
        report = backend.run(state, until_step)
        report = Report(report.ended, report.model_steps, report.check_seconds, seconds=time.perf_counter() - begin)
        parameters = {position: backend.parameters(state, position) for position, _ in report.ended}
        if len(report.ended) == len(state.runs):
            del self._states[number]
        return report, state.clock, parameters

    def saved(self, made: _Made, number: int, orders: Sequence[_Order]) -> list[dict[str, np.ndarray]]:
        """Follows orders on a state, and gives what its runs go on from."""
        backend, state = self._followed(made, number, orders)
        return backend.saved(state)

    def forget(self, number: int) -> None:
        """Drops a state: what comes after an error has another number."""
        self._states.pop(number, None)

    def _followed(self, made: _Made, number: int, orders: Sequence[_Order]) -> tuple[Backend[Any], Any]:
        from fasttrain.backends import make_backend

        name, setting, variant = made
        if (name, variant) not in self._backends:
            self._backends[name, variant] = make_backend(name, setting, variant)
        backend = self._backends[name, variant]
        state: Any = self._states.get(number)
        for order, what in orders:
            if order == "select":
                state = backend.select(state, what)
                continue
            runs = [Run.of(setting, *one) for one in what]
            state = backend.init(runs) if order == "init" else backend.insert(state, runs)
        self._states[number] = state
        return backend, state
