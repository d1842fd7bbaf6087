"""ONNX Runtime as a backend.

Calls of the graph, over a cache that is bound to its inputs and outputs in place.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from kvexport.runtime.backends.base import TOKEN_INPUTS
from kvexport.runtime.cache.device_arrays import (
    ALL_ROWS,
    ELEMENT_TYPES,
    HOST,
    DeviceStorage,
    Storage,
    as_float32,
)
from kvexport.runtime.cache.kv_cache import KvCache
from kvexport.runtime.types import DeviceMemory, Ids, Logits

_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}


class OrtDecoder:
    """Runs tokens through the graph, which writes keys and values directly into the cache.

    Arrays of a call are reused while their shapes stay the same: a decode step allocates nothing but the
    temporary values of the graph. On a device, token ids and logits pass through arrays that are allocated
    once, and everything else stays in device memory. Not yet run on CUDA.

    Attributes:
        cache: the buffers in use.
        max_tokens_per_call: the largest number of tokens of a sequence in one call.
        extra: the `extra_outputs` of the last call, float32 [B, S, width].
    """

    max_tokens_per_call = sys.maxsize

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        cache: KvCache,
        extra_outputs: Sequence[str] = (),
        *,
        row_by_row: bool = False,
        loaded: int = 0,
    ) -> None:
        """
        Args:
            session: with the graph loaded.
            cache: to use first.
            extra_outputs: names of further outputs to return.
            row_by_row: run calls of several tokens one row of the batch after another, because
                GroupQueryAttention does not support a batch of them with a past. Layers that evict always do,
                or padding would evict tokens; so do rings if there is padding, which would overwrite tokens.
            loaded: decrease of free device memory in bytes while the graph was loaded.
        """
        self.session, self.row_by_row, self._loaded = session, row_by_row, loaded
        outputs = {value.name: value for value in session.get_outputs()}
        self._vocab_size = int(outputs["logits"].shape[-1])
        self._extra = {
            name: (int(outputs[name].shape[-1]), _TYPES[outputs[name].type]) for name in extra_outputs
        }
        self._shrinking = onnxruntime.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.extra: dict[str, NDArray[np.float32]] = {}
        self.use(cache)

    def use(self, cache: KvCache) -> None:
        """Use this cache from now on."""
        self.cache = cache

    def run(
        self,
        input_ids: Ids,
        positions: Ids,
        logits_index: Ids,
        *,
        lengths: Ids | None = None,
        shrink: bool = False,
    ) -> Logits:
        """As `Decoder.run`."""
        if len(input_ids) > 1:
            apart, reach = self._apart(positions, lengths)
        else:
            apart, reach = lengths is not None and self.cache.slots is not None, int(positions[0, -1])
        if reach >= self.cache.capacity:
            self.cache.reserve(reach + 1)
        if apart:
            return self._run_rows(input_ids, positions, logits_index, lengths, shrink)
        return self.call(self.binding_of_cache(), input_ids, positions, logits_index, shrink)

    def _apart(self, positions: Ids, lengths: Ids | None) -> tuple[bool, int]:
        """Whether rows are run one after another, and the last position that is written."""
        several = positions.shape[1] > 1
        apart = several and self.row_by_row if self.cache.slots is None else several or lengths is not None
        if (
            lengths is not None
            and (lengths < positions.shape[1]).any()
            and (self.cache.rings.slots or (positions[:, 0] != positions[0, 0]).any())
        ):
            return True, int(np.where(lengths, positions[:, 0] + lengths, 0).max()) - 1
        return apart, int(positions.max())

    def device_memory(self) -> DeviceMemory | None:
        storage = self.cache.storage
        if not isinstance(storage, DeviceStorage):
            return None
        free, total = storage.device.memory()
        kv = sum(buffer.nbytes for buffer in self.cache.buffers.values())
        return DeviceMemory(storage.device.name, free, total, self._loaded, None, None, kv)

    def _run_rows(
        self, input_ids: Ids, positions: Ids, logits_index: Ids, lengths: Ids | None, shrink: bool
    ) -> Logits:
        logits = np.zeros((*logits_index.shape, self._vocab_size), np.float32)
        for row in range(len(input_ids)):
            count = input_ids.shape[1] if lengths is None else int(lengths[row])
            if count:
                rows = slice(row, row + 1)
                parts = (input_ids[rows, :count], positions[rows, :count], logits_index[rows])
                binding = (
                    self.binding_of_cache() if len(input_ids) == 1 else Binding(self.session, self.cache, row)
                )
                logits[rows] = self.call(binding, *parts, shrink, row)
        return logits

    def binding_of_cache(self) -> Binding:
        """The binding of the cache in use, created on the first call."""
        if self.cache.bound is None:
            self.cache.bound = Binding(self.session, self.cache)
        bound: Binding = self.cache.bound
        return bound

    def call(
        self,
        binding: Binding,
        input_ids: Ids,
        positions: Ids,
        logits_index: Ids,
        shrink: bool,
        row: int | None = None,
    ) -> Logits:
        """Run the graph once on a binding; `row`: of the only sequence, None: all."""
        indices = self.cache.admit(positions, row)
        binding.set_inputs((input_ids, positions, indices, logits_index))
        logits = binding.output("logits", (*logits_index.shape, self._vocab_size), "float32")
        for name, (width, dtype) in self._extra.items():
            binding.output(name, (*input_ids.shape, width), dtype, HOST)
        on_host = self.cache.storage is HOST
        self.session.run_with_iobinding(binding.binding, self._shrinking if shrink and on_host else None)
        if self._extra:
            self.extra = {
                name: as_float32(binding.arrays[name], dtype) for name, (_, dtype) in self._extra.items()
            }
        if on_host:
            return logits
        binding.binding.synchronize_outputs()
        return self.cache.storage.read(logits)


class Binding:
    """Inputs and outputs of the graph, bound to a cache or to one row of it, and to further arrays."""

    def __init__(self, session: onnxruntime.InferenceSession, cache: KvCache, row: int | None = None) -> None:
        self.binding = session.io_binding()
        self.arrays: dict[str, Any] = dict(cache.buffers)  # bound memory must stay alive
        self._storage = cache.storage
        for name, buffer in cache.buffers.items():
            rows, dtype = ALL_ROWS if row is None else cache.rows_of(name, row), cache.dtype_of(name)
            self.bind_array(name, buffer, dtype, self._storage, rows)
            self.bind_array(_present(name), buffer, dtype, self._storage, rows)

    def set_inputs(self, inputs: tuple[Ids, ...]) -> None:
        """Copy the values of `TOKEN_INPUTS` into the bound arrays.

        On a device they are bound again for every call: if an operator needs a value in host memory, as
        GroupQueryAttention needs write_indices, ONNX Runtime copies it when it is bound, and not again.
        """
        storage, arrays = self._storage, self.arrays
        for name, values in zip(TOKEN_INPUTS, inputs, strict=True):
            array = arrays.get(name)
            if array is None or array.shape != values.shape:
                array = self._array(name, values.shape, "int64", storage)
            storage.write(array, values)
        if storage is not HOST:
            storage.synchronize()  # ONNX Runtime uses streams of its own
            for name in TOKEN_INPUTS:
                self.bind_array(name, self.arrays[name], "int64", storage)
            self.binding.synchronize_inputs()

    def output(self, name: str, shape: tuple[int, ...], dtype: str, storage: Storage | None = None) -> Any:
        """The array of an output, in the cache's storage unless another is given."""
        return self._array(name, shape, dtype, storage or self._storage)

    def _array(self, name: str, shape: tuple[int, ...], dtype: str, storage: Storage) -> Any:
        """The array that is bound under `name`; replaced when its shape changes."""
        array = self.arrays.get(name)
        if array is None or array.shape != shape:
            array = self.arrays[name] = storage.pinned(shape, dtype)
            self.bind_array(name, array, dtype, storage)
        return array

    def bind_array(self, name: str, array: Any, dtype: str, storage: Storage, rows: slice = ALL_ROWS) -> None:
        """Bind an array, or some of its rows, to an input or output."""
        address, shape = storage.address(array, rows)
        is_input = name in TOKEN_INPUTS or name.startswith("past_key_values.")
        bind = self.binding.bind_input if is_input else self.binding.bind_output
        bind(name, storage.kind, 0, ELEMENT_TYPES[dtype], shape, address)


def _present(past: str) -> str:
    """Name of the output that shares the buffer of an input."""
    return past.replace("past_key_values", "present")
