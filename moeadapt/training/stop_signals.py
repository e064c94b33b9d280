"""SIGTERM and SIGINT while training: finish the optimizer step, save, stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import reduce

EXIT_BASE = 128
"""A shell's exit code of a process that a signal ended is this much above the signal's number."""


class StopSignals:
    """The signal that asked a run to stop.

    Attributes:
        received: its number; None: none came.
    """

    def __init__(self) -> None:
        """Start without one."""
        self.received: int | None = None
        self._interrupted = False

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after SIGINT, 0 after none."""
        return EXIT_BASE + self.received if self.received else 0

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take both signals inside the `with` block; only the main thread can."""
        self.received, self._interrupted = None, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
        # A handler that was not set by Python cannot be put back.
        taken = [one for one, handler in before.items() if handler is not None]
        for one in taken:
            signal.signal(one, self._handle)
        try:
            yield
        finally:
            for one in taken:
                signal.signal(one, before[one])

    def agreed(self, device: torch.device, world_size: int) -> bool:
        """Return whether any process was asked to stop; every process must call it."""
        if world_size > 1:
            mine = torch.tensor(float(self.received or 0), device=device)
            others = reduce(mine, reduction="sum")
            if float(others) > 0 and self.received is None:  # type: ignore[arg-type]
                self.received = signal.SIGTERM
        return self.received is not None

    def _handle(self, number: int, frame: Any) -> None:
        # A Ctrl-C after a SIGTERM is the first one, and another one is the second.
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        if self.received is None:
            self.received = number
        name = signal.Signals(number).name
        again = "; Ctrl-C again stops now, without one" if number == signal.SIGINT else ""
        # print may be interrupted by this very handler and refuses to be entered twice.
        os.write(2, f"{name}: stopping after this step, with a checkpoint{again}\n".encode())
