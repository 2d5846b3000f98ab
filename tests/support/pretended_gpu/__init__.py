"""A pretended GPU: tensors that report a CUDA device and behave as on CUDA, but compute on the CPU.

    with PretendedGpu() as gpu:
        on_gpu(module)
        module(batch.to("cuda"))
    gpu.syncs      # host synchronisations, each with the line of the package that caused it

As on CUDA, operators refuse to combine their tensors with CPU tensors or with tensors of another
GPU. Host synchronisations (the host waits for the device) are recorded: reading a value (`item`,
`tolist`, `bool`), results whose size depends on data (`nonzero`, boolean masks), and copies between
host and device, except from pinned memory with `non_blocking=True`. This is the list of
`torch.cuda.set_sync_debug_mode`, with asynchronous copies from pageable memory, for which CUDA
waits too.

In C++ the tensors are on torch's "meta" device, the only device besides the CPU that a CPU build
can differentiate on; Python sees `cuda:<index>`. Leaving the context undoes everything. Not
covered: bfloat16 autocast (a CPU build switches it off, so results can be compared exactly),
several streams, and operators that CUDA lacks.
"""

from tests.support.pretended_gpu.machine import PretendedGpu, on_gpu, table, values
from tests.support.pretended_gpu.tensor import DeviceMismatchError, GpuTensor, Sync

__all__ = ["DeviceMismatchError", "GpuTensor", "PretendedGpu", "Sync", "on_gpu", "table", "values"]
