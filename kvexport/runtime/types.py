"""Array types of the runtime, and the device memory that a backend reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a device in bytes, as the engine and the driver report it.

    Attributes:
        name: name of the device.
        free, total: free and total memory of the device, now.
        loaded: decrease of free memory while the graph or engine was loaded.
        weights: the engine's weights; None if it does not report them.
        activations: temporary values of a call, allocated once; None with ONNX Runtime, which allocates them
            on demand.
        kv: keys, values and eviction state of the cache.
    """

    name: str
    free: int
    total: int
    loaded: int
    weights: int | None
    activations: int | None
    kv: int
