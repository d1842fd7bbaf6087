"""Arrays in host or device memory behind one interface, `Storage`; a GPU is behind the protocol `Device`."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]

# TensorProto.DataType of each dtype, for binding memory that is no numpy array.
ELEMENT_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}

ALL_ROWS = slice(None)


class Move(NamedTuple):
    """A copy of slots within an array [rows, heads, slots, width].

    Moves of one call are independent: none reads slots that another writes.

    Attributes:
        row, rows: first row, and number of rows.
        target, source: first slot to write, and to read.
        slots: number of slots.
    """

    row: int
    rows: int
    target: int
    source: int
    slots: int


def stored_as(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that stores values of `dtype`; uint16, the bits, for bfloat16, which numpy lacks."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def as_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """A float32 copy of values of `dtype`, stored as `stored_as` says."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def from_float(value: float, dtype: str) -> np.generic:
    """A number stored as `stored_as` says; bfloat16 is truncated."""
    if dtype == "bfloat16":
        return np.uint16(int(np.float32(value).view(np.uint32)) >> 16)
    scalar: np.generic = np.dtype(dtype).type(value)
    return scalar


class Device(Protocol):
    """A GPU. All operations but `free` and `memory` are queued on one stream, in order.

    Attributes:
        kind: ONNX Runtime's name for such devices.
        name: name of the product.
        compute_capability: such as "8.7".
        stream: handle of the stream.
    """

    kind: str
    name: str
    compute_capability: str
    stream: int

    def allocate(self, count: int) -> int:
        """Allocate `count` bytes; returns the address, a multiple of 256.

        Raises:
            MemoryError: there is not enough memory.
        """

    def free(self, address: int) -> None: ...

    def pinned(self, count: int) -> NDArray[np.uint8]:
        """Allocate page-locked host memory, for asynchronous copies to and from the device."""

    def clear(self, address: int, count: int) -> None: ...

    def upload(self, address: int, source: NDArray[Any]) -> None: ...

    def download(self, target: NDArray[Any], address: int) -> None: ...

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """Copy `rows` rows of `width` bytes from device to device. Pitch: bytes from one row to the next."""

    def synchronize(self) -> None:
        """Wait for all queued operations."""

    def capture(self, work: Callable[[], None]) -> Any | None:
        """Record what `work` queues, without running it.

        A graph for `launch`, or None if it cannot be captured.
        """

    def launch(self, graph: Any) -> None: ...

    def memory(self) -> tuple[int, int]:
        """Free and total memory in bytes."""


class DeviceArray:
    """An array in the memory of a device, freed with this object.

    Attributes:
        shape, dtype, nbytes: as in numpy.
        address: in device memory.
        host: its page-locked copy in host memory; None unless `DeviceStorage.pinned` created it.
    """

    def __init__(self, device: Device, shape: Shape, dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        self.nbytes = math.prod(shape) * stored_as(dtype).itemsize
        self.address = device.allocate(self.nbytes)
        self.host: NDArray[Any] | None = None
        weakref.finalize(self, device.free, self.address).atexit = False  # the driver may be unloaded first

    def view(self, rows: slice) -> tuple[int, Shape]:
        """Address and shape of some rows of the first dimension."""
        first, stop, _ = rows.indices(self.shape[0])
        return self.address + first * (self.nbytes // self.shape[0]), (stop - first, *self.shape[1:])


class HostStorage:
    """Arrays in host memory, as numpy arrays."""

    kind = "cpu"

    def zeros(self, shape: Shape, dtype: str) -> NDArray[Any]:
        return np.zeros(shape, stored_as(dtype))

    def pinned(self, shape: Shape, dtype: str) -> NDArray[Any]:
        return np.empty(shape, stored_as(dtype))

    def write(self, array: NDArray[Any], values: NDArray[Any]) -> None:
        array[...] = values

    def read(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array itself, without a copy."""
        return array

    def read_rows(self, array: NDArray[Any], rows: slice) -> NDArray[Any]:
        """A copy of some rows."""
        return array[rows].copy()

    def write_rows(self, array: NDArray[Any], rows: slice, values: NDArray[Any]) -> None:
        array[rows] = values

    def copy_slots(self, source: NDArray[Any], target: NDArray[Any], slots: int) -> None:
        target[:, :, :slots] = source[:, :, :slots]

    def move(self, array: NDArray[Any], moves: Sequence[Move]) -> None:
        for row, rows, target, source, count in moves:
            array[row : row + rows, :, target : target + count] = array[
                row : row + rows, :, source : source + count
            ]

    def address(self, array: NDArray[Any], rows: slice = ALL_ROWS) -> tuple[int, Shape]:
        """Address and shape of an array, or of some of its rows."""
        part = array[rows]
        return part.ctypes.data, part.shape

    def synchronize(self) -> None: ...


class DeviceStorage:
    """Arrays in the memory of a device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.kind = device.kind

    def zeros(self, shape: Shape, dtype: str) -> DeviceArray:
        array = DeviceArray(self.device, shape, dtype)
        self.device.clear(array.address, array.nbytes)
        return array

    def pinned(self, shape: Shape, dtype: str) -> DeviceArray:
        """An array that the host writes or reads in every call, with a page-locked copy in host memory."""
        array = DeviceArray(self.device, shape, dtype)
        array.host = self.device.pinned(array.nbytes).view(stored_as(dtype)).reshape(shape)
        return array

    def write(self, array: DeviceArray, values: NDArray[Any]) -> None:
        if array.host is None:
            contiguous = np.ascontiguousarray(values)
            self.device.upload(array.address, contiguous)
            self.device.synchronize()  # before `contiguous` is freed
        else:
            array.host[...] = values
            self.device.upload(array.address, array.host)

    def read(self, array: DeviceArray) -> NDArray[Any]:
        """A copy in host memory; for a pinned array, its host copy, which the next call overwrites."""
        host = np.empty(array.shape, stored_as(array.dtype)) if array.host is None else array.host
        self.device.download(host, array.address)
        self.device.synchronize()
        return host

    def read_rows(self, array: DeviceArray, rows: slice) -> NDArray[Any]:
        address, shape = array.view(rows)
        host = np.empty(shape, stored_as(array.dtype))
        self.device.download(host, address)
        self.device.synchronize()
        return host

    def write_rows(self, array: DeviceArray, rows: slice, values: NDArray[Any]) -> None:
        contiguous = np.ascontiguousarray(values, stored_as(array.dtype))
        self.device.upload(array.view(rows)[0], contiguous)
        self.device.synchronize()  # before `contiguous` is freed

    def copy_slots(self, source: DeviceArray, target: DeviceArray, slots: int) -> None:
        """Copy the first `slots` slots of a cache [batch, heads, slots, width] to a larger one."""
        batch, heads, _, width = source.shape
        slot = width * stored_as(source.dtype).itemsize
        pitches = [slot * array.shape[2] for array in (target, source)]
        self.device.copy_rows(
            target.address, pitches[0], source.address, pitches[1], slots * slot, batch * heads
        )
        self.device.synchronize()  # before the source is freed

    def move(self, array: DeviceArray, moves: Sequence[Move]) -> None:
        """Queue the moves, without waiting for them."""
        _, heads, slots, width = array.shape
        slot = width * stored_as(array.dtype).itemsize
        for row, rows, target, source, count in moves:
            first = array.address + row * heads * slots * slot
            pitch = slots * slot
            self.device.copy_rows(
                first + target * slot, pitch, first + source * slot, pitch, count * slot, rows * heads
            )

    def address(self, array: DeviceArray, rows: slice = ALL_ROWS) -> tuple[int, Shape]:
        return array.view(rows)

    def synchronize(self) -> None:
        self.device.synchronize()


HOST = HostStorage()
Storage = HostStorage | DeviceStorage
