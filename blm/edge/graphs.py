"""The graphs of an exported policy, run by onnxruntime or by OpenVINO on the CPU."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from blm.edge.folder import SUFFIX, Precision, Runtime
from blm.errors import shorten
from blm.types import BlmError

PACKAGES: dict[Runtime, str] = {"onnx": "onnxruntime", "openvino": "openvino"}


class Graph(Protocol):
    """One graph with named inputs and one output."""

    def __call__(self, **inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Run it once."""
        ...


def default_threads() -> int:
    """Return OMP_NUM_THREADS, which worker processes set to 1, or 0: one thread per core."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return int(stated) if stated.isdecimal() else 0


def load_graph(
    folder: Path, name: str, runtime: Runtime, *, precision: Precision = "float32", threads: int = 0
) -> Graph:
    """Load a graph of an exported policy; with `threads` 0 it runs on all cores.

    Raises BlmError if the runtime is not installed, lacks the operators of the graph, or if the
    processor lacks the instructions of its precision.
    """
    library = _library(runtime)
    file = folder / f"{name}{SUFFIX[runtime]}"
    try:
        if runtime == "onnx":
            return _OnnxGraph(library, file, threads)
        return _OpenVinoGraph(library, file, precision, threads)
    except BlmError:
        raise
    except Exception as error:  # both libraries raise many kinds, such as RuntimeError and Fail
        version = getattr(library, "__version__", "of unknown version")
        raise BlmError(
            f"{PACKAGES[runtime]} {version} cannot load '{file}', whose operators it may lack: "
            f"{shorten(error, 300, quote=False)}; install a newer {PACKAGES[runtime]}, or export the "
            "checkpoint again"
        ) from error


def _library(runtime: Runtime) -> Any:
    try:
        return import_module(PACKAGES[runtime])
    except ImportError as error:
        raise BlmError(
            f"the exported policy needs the package {PACKAGES[runtime]}, which is not installed: "
            f"pip install {PACKAGES[runtime]}"
        ) from error


class _OnnxGraph:
    def __init__(self, library: Any, file: Path, threads: int) -> None:
        options = library.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors, which are raised
        # threads that spin while they wait take the cores from everything else on a robot's computer
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = library.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._run = self._session.run

    def __call__(self, **inputs: NDArray[Any]) -> NDArray[np.float32]:
        out: NDArray[np.float32] = self._run(None, inputs)[0]
        return out


class _OpenVinoGraph:
    def __init__(self, library: Any, file: Path, precision: Precision, threads: int) -> None:
        core = library.Core()
        able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bfloat16" and "BF16" not in able:
            raise BlmError(
                f"'{file}' runs in bfloat16, and this processor has no instructions for it (OpenVINO finds "
                f"{', '.join(able)}); export the checkpoint in float32"
            )
        settings = {
            "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16"}.get(precision, "f32"),
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        self._request = core.compile_model(str(file), "CPU", settings).create_infer_request()

    def __call__(self, **inputs: NDArray[Any]) -> NDArray[np.float32]:
        results = self._request.infer(inputs)
        return np.array(next(iter(results.values())), np.float32)
