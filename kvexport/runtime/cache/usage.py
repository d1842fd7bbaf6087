"""What a cache takes and may take, as a caller sees it; knows sizes, and nothing of what runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvexport.bundle.bundle import Bundle
from kvexport.runtime.cache.kv_cache import KvCache
from kvexport.runtime.types import DeviceMemory


@dataclass(frozen=True)
class Memory:
    """KV bytes of a cache.

    Attributes:
        batch: sequences.
        capacity, capacity_limit: tokens that each sequence has room for now, and may ever hold.
        bytes_allocated, bytes_limit: what the cache takes now, and will take at the limit.
        bytes_per_token: what one token of one sequence takes, with its state in layers that evict.
        budget: tokens of a sequence that layers hold which evict; None: no layer does.
        layers: bytes allocated now, layer by layer.
        device: all that is known of the device's memory; None where the session runs on the CPU.
    """

    batch: int
    capacity: int
    capacity_limit: int
    bytes_allocated: int
    bytes_limit: int
    bytes_per_token: int
    budget: int | None
    layers: tuple[int, ...]
    device: DeviceMemory | None


def memory_of(kv: KvCache, bundle: Bundle, device: DeviceMemory | None) -> Memory:
    """What is allocated for `kv` now, and what it comes to at its limit."""
    allocated = kv.layer_bytes()
    return Memory(
        batch=kv.batch,
        capacity=kv.capacity,
        capacity_limit=kv.limit,
        bytes_allocated=sum(allocated),
        bytes_limit=kv.bytes(kv.limit),
        bytes_per_token=bundle.kv_bytes(1),
        budget=kv.slots,
        layers=allocated,
        device=None if device is None else replace(device, kv=sum(allocated)),
    )
