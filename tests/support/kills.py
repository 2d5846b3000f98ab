"""Kill a process before one of its system calls."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from blm.io import folders

STEPS = ("rename", "replace", "unlink", "rmdir", "mkdir", "open", "write", "fsync")
"""System calls before which a process is killed."""


def killed_at(step: int, work: Callable[[], object], *, exchange: bool = True) -> bool:
    """Run `work` in a child process that is killed just before its n-th system call.

    Returns whether the child was killed. Without `exchange`, folders cannot be exchanged atomically.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def dying(call):
            def counted(*given, **named):
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*given, **named)

            return counted

        for name in STEPS:
            setattr(os, name, dying(getattr(os, name)))
        folders._exchange = dying(folders._exchange if exchange else lambda *_: False)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
