"""One call of the graph on ONNX Runtime, the cache bound in place; must not know what tokens mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from kvexport.runtime.cache import KvCache

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class OrtDecoder:
    """Runs tokens through the graph; keys and values go into the cache without being copied.

    Attributes:
        cache: the buffers that are bound now.
        extra: the further outputs that the constructor named, from the last call.
    """

    def __init__(self, session: onnxruntime.InferenceSession, cache: KvCache, extra_outputs: Sequence[str] = ()) -> None:
        self._session, self._extra_outputs = session, tuple(extra_outputs)
        outputs = {output.name: output for output in session.get_outputs()}
        self._vocab_size = int(outputs["logits"].shape[-1])
        self.extra: dict[str, NDArray[np.float32]] = {}
        self.bind(cache)

    def bind(self, cache: KvCache) -> None:
        """Use these cache buffers from now on."""
        self.cache = cache
        self._binding = self._session.io_binding()
        self._fixed: dict[str, onnxruntime.OrtValue] = {}
        self._bind_cache()

    def _bind_cache(self) -> None:
        for name, buffer in self.cache.buffers.items():
            self._binding.bind_ortvalue_input(name, buffer)
            self._binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)

    def run(self, input_ids: Ids, positions: Ids, logits_index: Ids) -> Logits:
        """Logits [B, L, vocab] of tokens [B, S] at consecutive `positions` [B, S], for those that `logits_index` [B, L] names.

        Makes room in the cache for every position, a padded row's included. The array returned is overwritten
        by the next call of the same shape.

        Raises:
            UsageError: a position is beyond the bundle's capacity.
        """
        if self.cache.reserve(int(positions.max()) + 1):
            self._bind_cache()
        self._feed("input_ids", input_ids)
        self._feed("position_ids", positions)
        self._feed("write_indices", positions[:, 0])
        self._feed("logits_index", logits_index)
        logits = self._fixed.get("logits")
        if logits is None or tuple(logits.shape()[:2]) != logits_index.shape:
            empty = np.empty((*logits_index.shape, self._vocab_size), np.float32)
            logits = self._fixed["logits"] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)
            self._binding.bind_ortvalue_output("logits", logits)
        for name in self._extra_outputs:  # anew each time: their shape follows the tokens
            self._binding.bind_output(name)
        self._session.run_with_iobinding(self._binding)
        if self._extra_outputs:
            values = self._binding.get_outputs()[-len(self._extra_outputs) :]
            self.extra = {name: value.numpy() for name, value in zip(self._extra_outputs, values, strict=True)}
        found: Logits = logits.numpy()
        return found

    def _feed(self, name: str, array: Ids) -> None:
        """Copy a small input into its bound buffer, which is made again only when its shape changes."""
        value = self._fixed.get(name)
        if value is None or tuple(value.shape()) != array.shape:
            value = self._fixed[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array.astype(np.int64))
            self._binding.bind_ortvalue_input(name, value)
        else:
            value.numpy()[...] = array
