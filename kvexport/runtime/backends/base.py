"""What a session runs on, whichever engine it is: tokens in, logits out, a cache that holds the sequences.

Knows no engine, so that a session needs none but the one it runs on.
"""

from __future__ import annotations

from typing import Protocol

from kvexport.bundle import graph_io as contract
from kvexport.runtime.cache.kv_cache import KvCache
from kvexport.runtime.types import DeviceMemory, Ids, Logits

TOKEN_INPUTS = tuple(
    spec.name for spec in contract.TOKEN_INPUTS
)  # input_ids, position_ids, write_indices, logits_index


class Decoder(Protocol):
    """What a session runs on.

    Attributes:
        cache: the buffers in use.
        max_tokens_per_call: the largest number of tokens of a sequence in one call.
    """

    cache: KvCache

    @property
    def max_tokens_per_call(self) -> int: ...

    def use(self, cache: KvCache) -> None:
        """Run on this cache from now on; it is one that `cache.fresh` or `cache.another` gave.

        Raises:
            CannotRunHere: not enough memory for what runs on it.
        """

    def run(
        self,
        input_ids: Ids,
        positions: Ids,
        logits_index: Ids,
        *,
        lengths: Ids | None = None,
        shrink: bool = False,
    ) -> Logits:
        """Logits [B, L, vocab] of tokens [B, S] at consecutive `positions` [B, S], for those that `logits_index` [B, L] names.

        Makes room in the cache for every position. The array returned is overwritten by the next call. Where layers evict,
        a sequence's tokens come one after another (its last one may come again), as many at once as there are slots.

        Args:
            lengths: how many of each row's tokens count [B]; the others pad it, and may be left out: a row of none is left as
                it is where layers evict. None: all. Padding reaches beyond no row's own tokens where rows begin at different
                positions.
            shrink: afterwards, give back to the system what the graph's temporary values took.

        Raises:
            UsageError: a position is beyond the capacity.
            CannotRunHere: not enough memory for the cache.
        """

    def device_memory(self) -> DeviceMemory | None:
        """None where no device is used."""
