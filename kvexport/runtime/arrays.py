"""Where arrays live: in the host's memory as numpy has it, or on a device, behind one interface.

Knows shapes, dtypes by name, and how values get to a place and back; must not know what they mean. The device itself
is `Device`, a small seam that `cuda` fills; whatever needs a GPU is behind it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]

# ONNX's numbers of the types (TensorProto.DataType): how ONNX Runtime is told of memory that no numpy array holds.
ELEMENT_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}


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

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
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

    def view(self, row: int) -> tuple[int, Shape]:
        """Address and shape [1, ...] of one row of the first dimension."""
        return self.address + row * (self.nbytes // self.shape[0]), (1, *self.shape[1:])


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

    def carry(self, source: NDArray[Any], target: NDArray[Any], slots: int) -> None:
        target[:, :, :slots] = source[:, :, :slots]

    def address(self, array: NDArray[Any], row: int | None = None) -> tuple[int, Shape]:
        """Where an array, or one row of it, begins, and its shape."""
        part = array if row is None else array[row : row + 1]
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

    def carry(self, source: DeviceArray, target: DeviceArray, slots: int) -> None:
        """Copy the first `slots` slots of a cache [batch, heads, slots, width] to a roomier one."""
        batch, heads, _, width = source.shape
        slot = width * stored_as(source.dtype).itemsize
        pitches = [slot * array.shape[2] for array in (target, source)]
        self.device.copy_rows(target.address, pitches[0], source.address, pitches[1], slots * slot, batch * heads)
        self.device.synchronize()  # before the source is freed

    def address(self, array: DeviceArray, row: int | None = None) -> tuple[int, Shape]:
        return (array.address, array.shape) if row is None else array.view(row)

    def synchronize(self) -> None:
        self.device.synchronize()


HOST = Host()
Place = Host | OnDevice
