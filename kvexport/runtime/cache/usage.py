"""Sizes of a cache, as `Session.memory` reports them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvexport.bundle import Bundle
from kvexport.runtime.cache.kv_cache import KvCache
from kvexport.runtime.types import DeviceMemory


@dataclass(frozen=True)
class Memory:
    """Sizes of a KV cache in tokens and bytes.

    Attributes:
        batch: number of sequences.
        capacity: tokens per sequence that memory is allocated for now.
        capacity_limit: the largest number of tokens per sequence.
        bytes_allocated: allocated now.
        bytes_limit: allocated when the sequences reach `capacity_limit`.
        bytes_per_token: size of one token of one sequence, with its state in layers that evict.
        budget: tokens of a sequence in layers that evict; None if no layer evicts.
        layers: bytes allocated now, per layer.
        device: memory of the device; None on the CPU.
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
    """The sizes of a cache of a bundle."""
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
