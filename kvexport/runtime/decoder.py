"""The graph on ONNX Runtime: one call after another, over a cache that is bound in place.

Knows the graph contract and ONNX Runtime; must not know what tokens mean, nor which sequence they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from kvexport.runtime.cache import KvCache

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class OrtDecoder:
    """Runs tokens through the graph; keys and values are written into the cache without being copied.

    Every buffer that a call takes or gives is bound once and used again while its shape stays the same, so that a
    decode step allocates nothing but the graph's own temporary values.

    Attributes:
        cache: the buffers in use.
        extra: the further outputs that the constructor named, from the last call.
    """

    def __init__(self, session: onnxruntime.InferenceSession, cache: KvCache, extra_outputs: Sequence[str] = ()) -> None:
        self._session, self._extra_outputs = session, tuple(extra_outputs)
        self._vocab_size = int(session.get_outputs()[0].shape[-1])
        self._shrinking = onnxruntime.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.extra: dict[str, NDArray[Any]] = {}
        self.use(cache)

    def use(self, cache: KvCache) -> None:
        """Run on this cache from now on."""
        self._unbind()
        self.cache = cache

    def run(self, input_ids: Ids, positions: Ids, logits_index: Ids, *, shrink: bool = False) -> Logits:
        """Logits [B, L, vocab] of tokens [B, S] at consecutive `positions` [B, S], for those that `logits_index` [B, L] names.

        Makes room in the cache for every position, a padded row's included. The array returned is overwritten by the
        next call.

        Args:
            shrink: afterwards, give back to the system what the graph's temporary values took.

        Raises:
            UsageError: a position is beyond the bundle's capacity.
            CannotRunHere: not enough memory for the cache.
        """
        tokens = int(positions.max()) + 1
        if tokens > self.cache.capacity:
            self._unbind()  # or else the old buffers would live as long as the binding
            self.cache.reserve(tokens)
        if not self._bound:
            self._bind_cache()
        self._input("input_ids", input_ids)
        self._input("position_ids", positions)
        self._input("write_indices", positions[:, 0])
        self._input("logits_index", logits_index)
        logits = self._buffer("logits", (*logits_index.shape, self._vocab_size), np.float32)
        for name in self._extra_outputs:  # anew each time: their shape follows the tokens
            self._binding.bind_output(name)
        self._session.run_with_iobinding(self._binding, self._shrinking if shrink else None)
        if self._extra_outputs:
            values = dict(zip(self._output_names(), self._binding.get_outputs(), strict=True))
            self.extra = {name: values[name].numpy() for name in self._extra_outputs}
        return logits

    def _unbind(self) -> None:
        self._binding = self._session.io_binding()
        self._bound: dict[str, NDArray[Any]] = {}

    def _bind_cache(self) -> None:
        for name, buffer in self.cache.buffers.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(_present(name), value)
            self._bound[name] = buffer

    def _output_names(self) -> list[str]:
        """Of the outputs, in the order in which they were bound."""
        return [*map(_present, self.cache.buffers), "logits", *self._extra_outputs]

    def _input(self, name: str, values: Ids) -> None:
        self._buffer(name, values.shape, np.int64)[...] = values

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """The bound buffer of a small input or of the logits, made anew only when its shape changes."""
        if name not in self._bound or self._bound[name].shape != shape:
            self._bound[name] = np.empty(shape, dtype)
            value = onnxruntime.OrtValue.ortvalue_from_numpy(self._bound[name])
            bind = self._binding.bind_ortvalue_output if name == "logits" else self._binding.bind_ortvalue_input
            bind(name, value)
        return self._bound[name]


def _present(past: str) -> str:
    """The output that is the same buffer as an input."""
    return past.replace("past_key_values", "present")
