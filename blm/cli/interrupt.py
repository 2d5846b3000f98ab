"""Ctrl-C while libraries are imported or weights are loaded: one line instead of a traceback."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exit_on_interrupt(message: str) -> Iterator[None]:
    """Exit with status 130 and one line on stderr at Ctrl-C, at once and without clean-up.

    Libraries that are being imported may turn KeyboardInterrupt into another error. Use
    this only while nothing has been started that would have to be ended. Outside the main thread,
    which alone may set a signal handler, it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        os.write(2, f"{message}\n".encode())
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
