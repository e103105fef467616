"""Ctrl-C and SIGTERM while a scan writes."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fasttrain.records import Terminated


@dataclass(slots=True)
class Interrupts:
    """Ctrl-C and SIGTERM as exceptions, but not in the middle of writing: there they wait until the write is done.

    It is remembered too: an exception that a signal raises inside a finaliser or a weak reference's callback, of
    which recording a graph makes many, is printed and lost.
    """

    _writing: bool = False
    _pending: type[BaseException] | None = None
    _previous: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _on_signal(self, number: int, _: object) -> None:
        self._pending = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if not self._writing:
            raise self._pending

    def check(self) -> None:
        """Raises what came and was held back or lost."""
        if self._pending is not None:
            raise self._pending

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Holds Ctrl-C back until the block is left."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = False
        self.check()
