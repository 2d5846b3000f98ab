"""The context manager that provides pretended GPUs, and functions for tests to use in it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_map

from tests.support.pretended_gpu.functions import DispatchMode, FunctionMode
from tests.support.pretended_gpu.tensor import GpuTensor, Sync, sync_log

M = TypeVar("M", bound=nn.Module)


class PretendedGpu:
    """A machine with pretended GPUs, as a context manager; `current` is the current device."""

    def __init__(self, current: int = 0) -> None:
        self.current = current
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PretendedGpu:
        sync_log.clear()
        no_state = torch.zeros(16, dtype=torch.uint8)
        submit = concurrent.futures.ThreadPoolExecutor.submit

        def submit_active(pool: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            def call() -> Any:
                with self.active():
                    return fn(*args, **kwargs)

            return submit(pool, call)

        run_backward = torch.autograd._engine_run_backward

        def run_backward_active(*args: Any, **kwargs: Any) -> Any:
            with FunctionMode():  # off inside `backward`, which may recompute blocks
                return run_backward(*args, **kwargs)

        enter = self._stack.enter_context
        for target, name, value in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "current_device", lambda: self.current),
            (torch.cuda, "get_rng_state", lambda device=None: no_state),
            (torch.cuda, "set_rng_state", lambda state, device=None: None),
            (torch.cuda, "Event", mock.MagicMock),
            (torch.autograd, "_engine_run_backward", run_backward_active),
            (concurrent.futures.ThreadPoolExecutor, "submit", submit_active),
        ):
            enter(mock.patch.object(target, name, value))
        swap = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        self._stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        enter(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".* Disabling autocast", UserWarning)
        enter(self.active())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Enable the devices in this thread; threads of ThreadPoolExecutor do it themselves."""
        with FunctionMode(), DispatchMode():
            yield

    @property
    def syncs(self) -> list[Sync]:
        return list(sync_log)

    @contextlib.contextmanager
    def counting(self) -> Iterator[list[Sync]]:
        """Collect the synchronisations that this thread causes in a `with` block."""
        found: list[Sync] = []
        begin, name = len(sync_log), threading.current_thread().name
        yield found
        found += [sync for sync in sync_log[begin:] if sync.thread == name]

    @contextlib.contextmanager
    def training_steps(self) -> Iterator[list[list[Sync]]]:
        """Collect the synchronisations of this thread between consecutive steps of AdamW.

        They exclude the first step, which fills caches, and the checkpoint after the last step.
        """
        found: list[list[Sync]] = []
        marks, name = list[int](), threading.current_thread().name

        def mark(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if isinstance(optimizer, torch.optim.AdamW):
                marks.append(len(sync_log))

        handle = register_optimizer_step_post_hook(mark)
        try:
            yield found
        finally:
            handle.remove()
        found += [[s for s in sync_log[a:b] if s.thread == name] for a, b in itertools.pairwise(marks)]


def on_gpu(module: M, device: str = "cuda") -> M:
    """Move a module. Its parameters stay the same objects, so tied parameters stay tied."""
    return module.to(torch.device(device))


def table(syncs: list[Sync]) -> str:
    """Return a table of synchronisations by place, the most frequent first."""
    counts = Counter((sync.kind, sync.where, sync.via) for sync in syncs)
    return "\n".join(
        f"{count:4}  {kind:20} {where}" + (f"  via {via}" if via.split(":")[0] not in where else "")
        for (kind, where, via), count in counts.most_common()
    )


def values(x: Any) -> Any:
    """Return nested tensors on the CPU, without recording synchronisations."""
    return tree_map(lambda t: t.elem.detach() if isinstance(t, GpuTensor) else t, x)
