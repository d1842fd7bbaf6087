"""Where arrays live: in the host's memory as numpy has it, or on a device, behind one interface.

Knows shapes, dtypes by name, and how values get to a place and back; must not know what they mean. The device itself
is `Device`, a small seam that `cuda` fills; whatever needs a GPU is behind it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]

# ONNX's numbers of the types (TensorProto.DataType): how ONNX Runtime is told of memory that no numpy array holds.
ELEMENT_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}

ALL_ROWS = slice(None)


class Move(NamedTuple):
    """Slots of an array [rows, heads, slots, width] that take the place of others: `slots` of them in each of `rows` rows.

    No move of several reads what one of them has written.
    """

    row: int
    rows: int
    target: int
    source: int
    slots: int


def stored_as(dtype: str) -> np.dtype[Any]:
    """numpy's type for values of `dtype`: its own, or for bfloat16, of which numpy knows nothing, their 16 bits."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def as_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """A float32 copy of values of `dtype`, as `stored_as` says."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def from_float(value: float, dtype: str) -> np.generic:
    """One number as `stored_as` says; of a bfloat16 what does not fit is cut off."""
    if dtype == "bfloat16":
        return np.uint16(int(np.float32(value).view(np.uint32)) >> 16)
    scalar: np.generic = np.dtype(dtype).type(value)
    return scalar


class Device(Protocol):
    """What decoders need of a GPU. Every call but `free` and `memory` is queued on one stream, in order.

    Attributes:
        kind: ONNX Runtime's name for such devices.
        name: the product's.
        compute_capability: such as "8.7".
        stream: the stream's handle.
    """

    kind: str
    name: str
    compute_capability: str
    stream: int

    def allocate(self, count: int) -> int:
        """The address of `count` bytes, aligned to 256; raises MemoryError."""

    def free(self, address: int) -> None: ...

    def pinned(self, count: int) -> NDArray[np.uint8]:
        """Memory of the host that copies to and from the device need not wait for."""

    def clear(self, address: int, count: int) -> None: ...

    def upload(self, address: int, source: NDArray[Any]) -> None: ...

    def download(self, target: NDArray[Any], address: int) -> None: ...

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """Copy `rows` rows of `width` bytes, whose beginnings are `pitch` bytes apart, from device to device."""

    def synchronize(self) -> None:
        """Wait for whatever is queued."""

    def capture(self, work: Callable[[], None]) -> Any | None:
        """What `work` queues, as a graph to `launch` again and again, without doing it; None where it cannot be captured."""

    def launch(self, graph: Any) -> None: ...

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all, as the driver says now."""


class DeviceArray:
    """An array in a device's memory, which is freed with this object.

    Attributes:
        host: its copy in the host's memory, where `staged` made it one.
    """

    def __init__(self, device: Device, shape: Shape, dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        self.nbytes = math.prod(shape) * stored_as(dtype).itemsize
        self.address = device.allocate(self.nbytes)
        self.host: NDArray[Any] | None = None
        weakref.finalize(self, device.free, self.address).atexit = False  # the driver may be gone before us

    def view(self, rows: slice) -> tuple[int, Shape]:
        """Address and shape of some rows of the first dimension."""
        first, stop, _ = rows.indices(self.shape[0])
        return self.address + first * (self.nbytes // self.shape[0]), (stop - first, *self.shape[1:])


class Host:
    """Arrays of numpy."""

    kind = "cpu"

    def zeros(self, shape: Shape, dtype: str) -> NDArray[Any]:
        return np.zeros(shape, stored_as(dtype))

    def staged(self, shape: Shape, dtype: str) -> NDArray[Any]:
        return np.empty(shape, stored_as(dtype))

    def write(self, array: NDArray[Any], values: NDArray[Any]) -> None:
        array[...] = values

    def read(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array itself."""
        return array

    def read_rows(self, array: NDArray[Any], rows: slice) -> NDArray[Any]:
        """A copy of some rows."""
        return array[rows].copy()

    def write_rows(self, array: NDArray[Any], rows: slice, values: NDArray[Any]) -> None:
        array[rows] = values

    def carry(self, source: NDArray[Any], target: NDArray[Any], slots: int) -> None:
        target[:, :, :slots] = source[:, :, :slots]

    def move(self, array: NDArray[Any], moves: Sequence[Move]) -> None:
        for row, rows, target, source, count in moves:
            array[row : row + rows, :, target : target + count] = array[
                row : row + rows, :, source : source + count
            ]

    def address(self, array: NDArray[Any], rows: slice = ALL_ROWS) -> tuple[int, Shape]:
        """Where an array, or some rows of it, begin, and their shape."""
        part = array[rows]
        return part.ctypes.data, part.shape

    def synchronize(self) -> None: ...


class OnDevice:
    """Arrays in a device's memory."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.kind = device.kind

    def zeros(self, shape: Shape, dtype: str) -> DeviceArray:
        array = DeviceArray(self.device, shape, dtype)
        self.device.clear(array.address, array.nbytes)
        return array

    def staged(self, shape: Shape, dtype: str) -> DeviceArray:
        """An array that the host writes or reads again and again, with its copy there."""
        array = DeviceArray(self.device, shape, dtype)
        array.host = self.device.pinned(array.nbytes).view(stored_as(dtype)).reshape(shape)
        return array

    def write(self, array: DeviceArray, values: NDArray[Any]) -> None:
        if array.host is None:
            kept = np.ascontiguousarray(values)
            self.device.upload(array.address, kept)
            self.device.synchronize()  # before `kept` is gone
        else:
            array.host[...] = values
            self.device.upload(array.address, array.host)

    def read(self, array: DeviceArray) -> NDArray[Any]:
        """A copy in the host's memory: the same each time where the array is staged."""
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
        kept = np.ascontiguousarray(values, stored_as(array.dtype))
        self.device.upload(array.view(rows)[0], kept)
        self.device.synchronize()  # before `kept` is gone

    def carry(self, source: DeviceArray, target: DeviceArray, slots: int) -> None:
        """Copy the first `slots` slots of a cache [batch, heads, slots, width] to a roomier one."""
        batch, heads, _, width = source.shape
        slot = width * stored_as(source.dtype).itemsize
        pitches = [slot * array.shape[2] for array in (target, source)]
        self.device.copy_rows(
            target.address, pitches[0], source.address, pitches[1], slots * slot, batch * heads
        )
        self.device.synchronize()  # before the source is freed

    def move(self, array: DeviceArray, moves: Sequence[Move]) -> None:
        """Queued, and done in order with all that follows."""
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


HOST = Host()
Place = Host | OnDevice
