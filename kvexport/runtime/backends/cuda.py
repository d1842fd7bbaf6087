"""The GPU through the CUDA runtime: memory, copies, one stream, and graphs.

The only module of the package that calls `cuda.bindings`. Not yet run on a GPU; only the calls that a machine
without one answers were tested (cuda-bindings 12.9 and 13.5).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.devices.gpu import find_gpu
from kvexport.errors import CannotRunHere, KvexportError


class Cuda:
    """`kvexport.runtime.cache.device_arrays.Device` on the first CUDA device, with a stream of its own."""

    kind = "cuda"

    def __init__(self) -> None:
        """
        Raises:
            CannotRunHere: cuda-bindings is not installed, there is no driver or no GPU, or the driver is too
                old.
        """
        self.cuda = _runtime()
        _require_device(self.cuda)
        self._check(*self.cuda.cudaSetDevice(0))
        gpu = find_gpu()
        if gpu is None:
            raise _no_gpu("the driver describes no device")
        self.name, self.compute_capability = gpu.name, gpu.compute_capability
        stream = self._check(*self.cuda.cudaStreamCreateWithFlags(self.cuda.cudaStreamNonBlocking))
        self.stream = int(stream)
        weakref.finalize(self, self.cuda.cudaStreamDestroy, stream).atexit = False

    def allocate(self, count: int) -> int:
        """cudaMalloc aligns to 256 bytes or more."""
        error, address = self.cuda.cudaMalloc(max(count, 1))
        if error == self.cuda.cudaError_t.cudaErrorMemoryAllocation:
            self.cuda.cudaGetLastError()  # clears it, or the next call would fail
            raise MemoryError(f"{count} bytes on {self.name}")
        return int(self._check(error, address))

    def free(self, address: int) -> None:
        self.cuda.cudaFree(address)

    def pinned(self, count: int) -> NDArray[np.uint8]:
        address = int(self._check(*self.cuda.cudaHostAlloc(max(count, 1), self.cuda.cudaHostAllocDefault)))
        memory = (ctypes.c_uint8 * count).from_address(address)
        weakref.finalize(memory, self.cuda.cudaFreeHost, address).atexit = False
        return np.ctypeslib.as_array(memory)

    def clear(self, address: int, count: int) -> None:
        self._check(*self.cuda.cudaMemsetAsync(address, 0, count, self.stream))

    def upload(self, address: int, source: NDArray[Any]) -> None:
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._check(*self.cuda.cudaMemcpyAsync(address, source.ctypes.data, source.nbytes, kind, self.stream))

    def download(self, target: NDArray[Any], address: int) -> None:
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._check(*self.cuda.cudaMemcpyAsync(target.ctypes.data, address, target.nbytes, kind, self.stream))

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        arguments = (target, target_pitch, source, source_pitch, width, rows, kind, self.stream)
        self._check(*self.cuda.cudaMemcpy2DAsync(*arguments))

    def synchronize(self) -> None:
        self._check(*self.cuda.cudaStreamSynchronize(self.stream))

    def capture(self, work: Callable[[], None]) -> Graph | None:
        cuda, failed = self.cuda, False
        self._check(
            *cuda.cudaStreamBeginCapture(
                self.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            )
        )
        try:
            work()
        except KvexportError:
            failed = True
        finally:  # also after Ctrl-C, because a stream in capture mode runs nothing
            error, graph = cuda.cudaStreamEndCapture(self.stream)
        executable = None
        if error == cuda.cudaError_t.cudaSuccess:
            if not failed:
                error, executable = cuda.cudaGraphInstantiate(graph, 0)
            cuda.cudaGraphDestroy(graph)
        if failed or error != cuda.cudaError_t.cudaSuccess:
            cuda.cudaGetLastError()
            return None
        captured = Graph(executable)
        weakref.finalize(captured, cuda.cudaGraphExecDestroy, executable).atexit = False
        return captured

    def launch(self, graph: Graph) -> None:
        self._check(*self.cuda.cudaGraphLaunch(graph.executable, self.stream))

    def memory(self) -> tuple[int, int]:
        error, free, total = self.cuda.cudaMemGetInfo()
        self._check(error)
        return int(free), int(total)

    def _check(self, error: Any, *values: Any) -> Any:
        """Check the error code of a call; returns its value.

        Raises:
            CannotRunHere: the call failed.
        """
        if error != self.cuda.cudaError_t.cudaSuccess:
            raise CannotRunHere(
                f"CUDA failed on {getattr(self, 'name', 'device 0')}", got=error_text(self.cuda, error)
            )
        return values[0] if values else None


@dataclass(frozen=True)
class Graph:
    """A captured graph, destroyed with this object."""

    executable: Any


def error_text(cuda: Any, error: Any) -> str:
    """CUDA's name and description of an error code."""
    (_, name), (_, text) = cuda.cudaGetErrorName(error), cuda.cudaGetErrorString(error)
    return " ".join(part.decode() if isinstance(part, bytes) else str(part) for part in (name, text))


def _number(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise CannotRunHere(
            "the package cuda-bindings must be installed to use the GPU",
            fix="pip install cuda-bindings",
        ) from error
    return runtime


def _require_device(cuda: Any) -> None:
    """
    Raises:
        CannotRunHere: there is no GPU, or its driver is too old for these bindings.
    """
    error, count = cuda.cudaGetDeviceCount()
    if error == cuda.cudaError_t.cudaSuccess and count:
        return
    if error == cuda.cudaError_t.cudaErrorInsufficientDriver:
        (_, driver), (_, built) = cuda.cudaDriverGetVersion(), cuda.cudaRuntimeGetVersion()
        if driver:
            raise CannotRunHere(
                "the driver of the GPU must support the CUDA version of cuda-bindings",
                got=f"a driver for CUDA {_number(driver)}",
                expected=(
                    f"CUDA {_number(built)}; an older driver of the same major version works too, "
                    "except on some Jetsons"
                ),
                fix=f"pip install 'cuda-bindings<{_number(driver + 10)}'",
            )
        raise CannotRunHere(
            "there is no NVIDIA driver on this machine",
            fix="run on the CPU with --provider cpu, or on a machine with a GPU",
        )
    raise _no_gpu(error_text(cuda, error) if error != cuda.cudaError_t.cudaSuccess else "0 devices")


def _no_gpu(got: str) -> CannotRunHere:
    return CannotRunHere(
        "CUDA finds no GPU", got=got, fix="run on the CPU with --provider cpu, or on a machine with a GPU"
    )
