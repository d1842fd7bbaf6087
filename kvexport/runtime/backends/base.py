"""The interface of all backends: token ids in, logits out, and a cache that holds the sequences."""

from __future__ import annotations

from typing import Protocol

from kvexport.bundle import graph_io
from kvexport.runtime.cache.kv_cache import KvCache
from kvexport.runtime.types import DeviceMemory, Ids, Logits

# input_ids, position_ids, write_indices, logits_index
TOKEN_INPUTS = tuple(spec.name for spec in graph_io.TOKEN_INPUTS)


class Decoder(Protocol):
    """Runs tokens of a batch of sequences.

    Attributes:
        cache: the buffers in use.
        max_tokens_per_call: the largest number of tokens of a sequence in one call.
    """

    cache: KvCache

    @property
    def max_tokens_per_call(self) -> int: ...

    def use(self, cache: KvCache) -> None:
        """Use this cache from now on; it must come from `cache.fresh` or `cache.another`.

        Raises:
            CannotRunHere: there is not enough memory to bind it.
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
        """Run tokens and write their keys and values into the cache, which grows as needed.

        Args:
            input_ids: [B, S].
            positions: positions of the tokens, consecutive [B, S]. If layers evict, they continue the
                sequence (its last token may be run again), and there are at most as many as slots.
            logits_index: the tokens of each row that get logits [B, L].
            lengths: the number of tokens of each row [B]; the rest is padding, which may be skipped. A row of
                length 0 is left as it is if layers evict. None: no padding. Padding is never run if rows
                start at different positions.
            shrink: release memory of temporary values after the call.

        Returns:
            Logits, float32 [B, L, vocab]; overwritten by the next call.

        Raises:
            UsageError: a position is beyond the capacity.
            CannotRunHere: there is not enough memory for the cache.
        """

    def device_memory(self) -> DeviceMemory | None:
        """Memory of the device; None on the CPU."""
