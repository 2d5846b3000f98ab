"""Compilation of the parts of a model with torch.compile, and the sizes that they are compiled for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import torch
import torch._dynamo.config as dynamo
from torch import Tensor
from torch.nn import functional as F

from blm.types import BlmError

CompileMode = Literal["none", "default", "cuda-graphs"]
LENGTH_STEP = 32
"""Prompts are padded to a multiple of this number of tokens, so that few lengths are compiled."""
MAX_VARIANTS = 128
"""Most batch sizes and lengths of one function that are compiled; torch's own limit is 8."""

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Compiler:
    """Compiles functions and modules as one graph, each for fixed shapes."""

    mode: CompileMode
    backend: Any = "inductor"
    """Backend of torch.compile."""

    def __call__(self, function: T) -> T:
        """Return the compiled function. It is compiled when it is called with new shapes."""
        dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_VARIANTS)
        mode = "reduce-overhead" if self.mode == "cuda-graphs" else None
        compiled: Any = torch.compile(
            function, fullgraph=True, dynamic=False, backend=self.backend, mode=mode
        )
        return compiled


def require_compiler(mode: CompileMode, device: str | torch.device) -> None:
    """Raise BlmError if torch.compile cannot work on this device of this machine."""
    kind = torch.device(device).type
    if mode == "none":
        return
    if mode == "cuda-graphs" and kind != "cuda":
        raise BlmError(f"--compile cuda-graphs needs a CUDA device, not '{device}'; give --compile default")
    if kind == "cuda":
        if find_spec("triton") is None:
            raise BlmError("--compile needs the package triton on a GPU; install it, or give --compile none")
    elif not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise BlmError(
            "--compile needs a C++ compiler on the CPU, and neither g++ nor clang++ is found, nor one that "
            "the variable CXX names; install one, or give --compile none"
        )


def batch_bucket(size: int) -> int:
    """Return the batch size that `size` samples are padded to: the next power of 2."""
    return 1 << (size - 1).bit_length()


def pad_prompts(inputs: dict[str, Tensor], pad_token: int) -> dict[str, Tensor]:
    """Pad the [B, L] inputs of prompts, which are padded on the right, to a multiple of
    LENGTH_STEP."""
    length = inputs["input_ids"].shape[1]
    missing = -length % LENGTH_STEP
    return {
        name: F.pad(value, (0, missing), value=pad_token if name == "input_ids" else 0)
        if value.shape == inputs["input_ids"].shape
        else value
        for name, value in inputs.items()
    }
