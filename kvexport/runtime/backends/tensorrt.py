"""TensorRT as a backend: execution contexts over caches, which share one scratch memory.

One context runs the prompts of all caches. Each cache has its own context for decode steps, because a CUDA
graph belongs to one context and to the addresses that were bound when it was captured (NVIDIA's documentation
of CUDA graphs).

Supports TensorRT 10.3 to 11.x and TensorRT-RTX by one code path, and both forms of the graph: std24 writes
the cache in place; decomposed17 returns the keys and values of the new tokens, which are copied into the
cache after the call: to the slots that it returns in layers that evict, else to those of the positions, in a
ring of R slots modulo R.

Not yet run on a GPU; the tests run it on a simulated device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.bundle import Bundle
from kvexport.bundle.graph_io import STATE, present, slots_output, update
from kvexport.errors import CannotRunHere, UsageError
from kvexport.runtime.backends.base import TOKEN_INPUTS
from kvexport.runtime.backends.tensorrt_loading import (
    engine_log,
    failure,
    layer_and_which,
    load_engine,
    refit,
    require_contract,
)
from kvexport.runtime.backends.tensorrt_select import Engine
from kvexport.runtime.cache.device_arrays import Device, DeviceArray, DeviceStorage, stored_as
from kvexport.runtime.cache.kv_cache import KvCache
from kvexport.runtime.types import DeviceMemory, Ids, Logits

DECODE, PREFILL = 0, 1  # indices of optimisation profiles


class EngineCache(KvCache):
    """A cache of the engine's capacity and batch.

    It is allocated once, so that its addresses never change.
    """

    def __init__(self, bundle: Bundle, engine: Engine, storage: DeviceStorage, fill: float) -> None:
        record = engine.record
        super().__init__(
            bundle,
            record.batch,
            record.dtype,
            fill=fill,
            step=record.capacity,
            limit=record.capacity,
            storage=storage,
            chunk=record.chunk,
        )
        self._engine = engine
        self.reserve(record.capacity)

    def fresh(self, batch: int, slots: int | None = None) -> KvCache:
        """This cache, emptied; it keeps its slots.

        Raises:
            UsageError: the engine runs another number of sequences.
        """
        self._require_batch(batch)
        self.clear()
        return self

    def another(self, batch: int, slots: int | None = None) -> KvCache:
        """Another cache for the same engine.

        Raises:
            UsageError: the engine runs another number of sequences.
            CannotRunHere: there is not enough device memory.
        """
        self._require_batch(batch)
        assert isinstance(self.storage, DeviceStorage)
        return EngineCache(self._bundle, self._engine, self.storage, self._fill)

    def clear(self) -> None:
        """Remove all tokens; the memory is kept."""
        assert isinstance(self.storage, DeviceStorage)
        for buffer in self.buffers.values():
            self.storage.device.clear(buffer.address, buffer.nbytes)
        self._empty()

    def _require_batch(self, batch: int) -> None:
        if batch != self.batch:
            raise UsageError(
                f"the number of sequences must be {self.batch} with this engine",
                got=batch,
                expected=self.batch,
                fix="run prompts one by one, or run without the engine: --provider cuda or cpu",
            )


class TensorRtDecoder:
    """`kvexport.runtime.backends.base.Decoder` on a TensorRT engine.

    Attributes:
        cache: the buffers in use, of the engine's capacity.
        max_tokens_per_call: the engine's chunk.
    """

    def __init__(self, bundle: Bundle, engine: Engine, device: Device, *, fill: float = 0.0) -> None:
        """
        Args:
            bundle: bundle of the engine.
            engine: to load.
            device: to run on.
            fill: value of unwritten slots.

        Raises:
            BundleError: the engine's inputs or outputs contradict its record, or it does not write the cache
                in place.
            CannotRunHere: TensorRT cannot load it, or there is not enough device memory.
        """
        self._device, self._log = device, engine_log(engine.trt)
        storage = DeviceStorage(device)
        free = device.memory()[0]
        # The runtime must outlive the engine, and the engine its contexts.
        self._runtime = engine.trt.Runtime(self._log)
        self._engine = load_engine(engine, self._runtime, self._log)
        if not engine.has_weights:
            refit(self._engine, engine, bundle, self._log)
        self._loaded = max(0, free - device.memory()[0])
        self._trt = engine.trt
        in_place = engine.record.lowering != "decomposed17"
        require_contract(self._engine, engine, bundle, in_place)
        self.max_tokens_per_call = engine.record.chunk
        self._vocab = bundle.model.vocab_size
        with _within_memory():
            self.cache: KvCache = EngineCache(bundle, engine, storage, fill)
            self._updates = (
                {}
                if in_place
                else {name: self._slice_of(buffer) for name, buffer in self.cache.buffers.items()}
            )
            self._slots = {} if in_place else self._slots_of_heads(storage)
            size = int(self._engine.device_memory_size_v2)  # of the profile that needs the most
            self._scratch = DeviceArray(device, (max(size, 1),), "uint8")
            self.prefill_calls = self.new_calls(PREFILL, self.cache)
            self.decode_calls = self.cache.bound = self.new_calls(DECODE, self.cache)

    def use(self, cache: KvCache) -> None:
        """Use this cache from now on; a new one gets a context for its decode steps.

        Raises:
            CannotRunHere: there is not enough device memory for it.
        """
        if cache is self.cache:
            return
        if cache.bound is None:
            with _within_memory():
                cache.bound = self.new_calls(DECODE, cache)
        self.cache, self.decode_calls = cache, cache.bound
        self.prefill_calls.bind(self._addresses(cache))

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
        start, stop = int(positions[0, 0]), int(positions[0, -1]) + 1
        self.cache.reserve(stop)  # raises beyond the capacity, where TensorRT would silently drop tokens
        calls = self.decode_calls if input_ids.shape[1] == 1 else self.prefill_calls
        tokens = input_ids, positions, self.cache.admit(positions), logits_index
        return calls.run(tokens, lambda: self.write_updates(start, stop - start))

    def device_memory(self) -> DeviceMemory:
        free, total = self._device.memory()
        weights = None
        if hasattr(self._engine, "get_engine_stat"):
            weights = int(self._engine.get_engine_stat(self._trt.EngineStat.TOTAL_WEIGHTS_SIZE))
        kv = sum(buffer.nbytes for buffer in self.cache.buffers.values())
        return DeviceMemory(self._device.name, free, total, self._loaded, weights, self._scratch.nbytes, kv)

    def new_calls(self, profile: int, cache: KvCache) -> ContextCalls:
        """A context of a profile, bound to a cache."""
        context, config = self._context(profile)
        assert isinstance(cache.storage, DeviceStorage)
        return ContextCalls(
            context,
            cache.storage,
            self._log,
            self._vocab,
            self._addresses(cache),
            tuple(self._slots.values()),
            longest=1 if profile == DECODE else self.max_tokens_per_call,
            captures=profile == DECODE,
            config=config,
        )

    def _addresses(self, cache: KvCache) -> dict[str, int]:
        """Addresses of all inputs and outputs but tokens and logits, by name."""
        bound = {name: buffer.address for name, buffer in cache.buffers.items()}
        for name, buffer in cache.buffers.items():
            layer, which = layer_and_which(name)
            if self._updates:
                bound[update(layer, which)] = self._updates[name].address
            else:
                bound[present(layer, which)] = buffer.address
        return bound | {slots_output(layer): slots.address for layer, slots in self._slots.items()}

    def _context(self, profile: int) -> tuple[Any, Any]:
        """A new execution context of a profile, over the shared scratch memory, and its configuration.

        TensorRT-RTX compiles kernels when a size first occurs. For decode steps it must compile at once,
        because a graph that was captured before would keep the slower kernels. Prompts have many sizes and do
        not wait.
        """
        how: Any = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        config = None
        if profile == DECODE and hasattr(self._trt, "DynamicShapesKernelSpecializationStrategy"):
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(how)
            config.dynamic_shapes_kernel_specialization_strategy = (
                self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
        context = self._engine.create_execution_context(how if config is None else config)
        if context is None or not context.set_optimization_profile_async(profile, self._device.stream):
            raise failure(self._log, "TensorRT cannot create an execution context")
        self._device.synchronize()
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        return context, config

    def write_updates(self, start: int, count: int) -> None:
        """Queue copies of the keys and values of `count` new tokens to the cache.

        In layers that evict they go to the slots that the graph returned for each head, else to slots from
        `start` on, modulo their number.
        """
        for name, new in self._updates.items():
            buffer, (layer, _) = self.cache.buffers[name], layer_and_which(name)
            rows, heads, capacity, width = buffer.shape
            slot = width * stored_as(buffer.dtype).itemsize
            for first, number, target in self.targets(layer, rows * heads, start % capacity):
                self._device.copy_rows(
                    buffer.address + (first * capacity + target) * slot,
                    capacity * slot,
                    new.address + first * count * slot,
                    count * slot,
                    count * slot,
                    number,
                )

    def targets(self, layer: int, heads: int, start: int) -> Iterator[tuple[int, int, int]]:
        """Runs of neighbouring heads with the same target slot: first head, number of heads, slot."""
        if layer not in self._slots:
            yield 0, heads, start
            return
        host = self._slots[layer].host
        assert host is not None
        slots = host.tolist()
        for slot, group in groupby(range(heads), lambda head: slots[head]):
            first, *more = group
            yield first, 1 + len(more), slot

    def _slots_of_heads(self, storage: DeviceStorage) -> dict[int, DeviceArray]:
        """Arrays for the slots that the graph chooses in each layer that evicts, int64 [batch·N]."""
        states = {
            layer_and_which(name)[0]: buffer
            for name, buffer in self.cache.buffers.items()
            if name.endswith(STATE)
        }
        return {layer: storage.pinned(state.shape[:1], "int64") for layer, state in states.items()}

    def _slice_of(self, buffer: DeviceArray) -> DeviceArray:
        batch, heads, _, width = buffer.shape
        return DeviceArray(self._device, (batch, heads, self.max_tokens_per_call, width), buffer.dtype)


@contextmanager
def _within_memory() -> Iterator[None]:
    """Turn a MemoryError of the block into an error message.

    Raises:
        CannotRunHere: there is not enough device memory.
    """
    try:
        yield
    except MemoryError as error:
        raise CannotRunHere(
            "there is not enough device memory for the engine's cache and activations",
            got=str(error),
            fix="build the engine again with a smaller --capacity or --chunk, or use fewer caches",
        ) from error


class ContextCalls:
    """Calls of one profile: its context, and the arrays that they take and give but the caches.

    Nothing is allocated from call to call, but for more logits than ever before. Once a decode step has run,
    the uploads, the engine and the download are one CUDA graph; copies into the cache stay outside, since
    their target changes with every step.
    """

    def __init__(
        self,
        context: Any,
        storage: DeviceStorage,
        log: Any,
        vocab: int,
        bound: dict[str, int],
        downloads: Sequence[DeviceArray],
        *,
        longest: int,
        captures: bool,
        config: Any = None,
    ) -> None:
        """
        Args:
            context: an execution context.
            storage: memory of the arrays.
            log: of TensorRT.
            vocab: vocabulary size.
            bound: addresses of the inputs and outputs that are not allocated here, by name.
            downloads: those of them that the host reads after a call.
            longest: the largest number of tokens per call.
            captures: capture a CUDA graph.
            config: configuration of the context; it must live as long.
        """
        self._config = config
        self.context, self._storage, self._device, self._log, self._vocab = (
            context,
            storage,
            storage.device,
            log,
            vocab,
        )
        self.captures, self._downloads = captures, downloads
        self._graph: Any | None = None
        self._counts = 0, 0  # tokens and logits of the bound shapes
        self._inputs = {name: storage.pinned((longest,), "int64") for name in TOKEN_INPUTS}
        self._logits: DeviceArray | None = None
        self.bind(bound | {name: array.address for name, array in self._inputs.items()})

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Set addresses of inputs and outputs; no graph must have been captured."""
        for name, address in addresses.items():
            self._address(name, address)

    def run(self, inputs: tuple[Ids, ...], after: Callable[[], None]) -> Logits:
        """Run one call.

        Args:
            inputs: values of `TOKEN_INPUTS`.
            after: queues further work behind the engine.
        """
        tokens, logits = inputs[0].shape[1], inputs[3].shape[1]
        self._shape(tokens, logits)
        for name, values in zip(TOKEN_INPUTS, inputs, strict=True):
            host = self._inputs[name].host
            assert host is not None
            host[: values.size] = values.ravel()
        if self._graph is None:
            self._queue()
        else:
            self._device.launch(self._graph)
        if self._downloads:
            self._device.synchronize()
        after()
        self._device.synchronize()
        if self.captures and self._graph is None:
            self._capture()
        return self.host_logits().reshape(1, logits, self._vocab)

    def _queue(self) -> None:
        for name, array in self._inputs.items():
            assert array.host is not None
            self._device.upload(array.address, array.host[: self._count(name)])
        if not self.context.execute_async_v3(self._device.stream):
            raise failure(self._log, "TensorRT failed to run the engine")
        assert self._logits is not None
        self._device.download(self.host_logits(), self._logits.address)
        for array in self._downloads:
            assert array.host is not None
            self._device.download(array.host, array.address)

    def _capture(self) -> None:
        """Capture a graph, after TensorRT has run once.

        TensorRT-RTX reports whether it still compiles kernels.
        """
        ready = getattr(self.context, "is_stream_capturable", None)
        if ready is None or ready(self._device.stream):
            self._graph = self._device.capture(self._queue)
            self.captures = self._graph is not None

    def _shape(self, tokens: int, logits: int) -> None:
        if self._counts == (tokens, logits):
            return
        self._counts = tokens, logits
        for name, count in (("input_ids", tokens), ("position_ids", tokens), ("logits_index", logits)):
            if not self.context.set_input_shape(name, (1, count)):
                raise failure(self._log, f"the engine rejects {count} as a size of {name}")
        if self._logits is None or self._logits.shape[0] < logits:
            self._logits = None  # freed before the larger one is allocated
            self._logits = self._storage.pinned((logits, self._vocab), "float32")
            self._address("logits", self._logits.address)

    def _count(self, name: str) -> int:
        tokens, logits = self._counts
        return {"write_indices": 1, "logits_index": logits}.get(name, tokens)

    def host_logits(self) -> NDArray[np.float32]:
        """The logits of the last call in host memory, [logits, vocab]."""
        assert self._logits is not None and self._logits.host is not None
        return self._logits.host[: self._counts[1]]

    def _address(self, name: str, address: int) -> None:
        if not self.context.set_tensor_address(name, address):
            raise failure(self._log, f"TensorRT rejects the address of {name}")
