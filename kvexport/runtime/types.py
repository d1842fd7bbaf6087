"""Array types of the runtime, and the device memory that a backend reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device, as far as the engine and the driver tell.

    Attributes:
        name: of the device.
        free, total: of all its memory, as the driver says now.
        loaded: by how much less was free once the graph or engine was loaded.
        weights: of the engine; None where it does not tell.
        activations: temporary values of a call, allocated once; None where ONNX Runtime allocates them as it goes.
        kv: the cache.
    """

    name: str
    free: int
    total: int
    loaded: int
    weights: int | None
    activations: int | None
    kv: int
