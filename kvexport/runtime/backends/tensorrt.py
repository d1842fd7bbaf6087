"""A bundle's TensorRT engine: execution contexts over caches, which all share one scratch memory. Prompts of every cache are
read in one context; each cache has one for its decode step, since a CUDA graph is of one context and of the
addresses that it had (as NVIDIA's documentation of CUDA graphs advises).

Knows TensorRT's runtime (10.3 to 11.x and TensorRT-RTX by one path) and the two forms that an engine's graph
has: std24 writes the cache in place, decomposed17 gives what is new, which is copied into it after the call:
to the slots that it names where layers evict, else to those of the positions.
Must not know what tokens mean. On a GPU this was never run: none was at hand; its tests run it on a simulated
device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.bundle.bundle import Bundle
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

DECODE, PREFILL = 0, 1  # profiles


class EngineCache(KvCache):
    """A cache of the engine's own capacity and batch, allocated once: its addresses never change."""

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
        )
        self._engine = engine
        self.reserve(record.capacity)

    def fresh(self, batch: int, slots: int | None = None) -> KvCache:
        """This cache, empty; it has as many slots as ever.

        Raises:
            UsageError: the engine is for another number of sequences.
        """
        self._require_batch(batch)
        self.clear()
        return self

    def another(self, batch: int, slots: int | None = None) -> KvCache:
        """Raises:
        UsageError: as `fresh`.
        CannotRunHere: not enough device memory.
        """
        self._require_batch(batch)
        assert isinstance(self.storage, DeviceStorage)
        return EngineCache(self._bundle, self._engine, self.storage, self._fill)

    def clear(self) -> None:
        assert isinstance(self.storage, DeviceStorage)
        for buffer in self.buffers.values():
            self.storage.device.clear(buffer.address, buffer.nbytes)
        self._empty()

    def _require_batch(self, batch: int) -> None:
        if batch != self.batch:
            raise UsageError(
                "the engine runs another number of sequences at a time",
                got=batch,
                expected=self.batch,
                fix="give prompts one by one, or run without the engine: --provider cuda or cpu",
            )


class TensorRtDecoder:
    """`kvexport.runtime.backends.base.Decoder` on a TensorRT engine.

    Attributes:
        cache: the one in use, of the engine's capacity.
        max_tokens_per_call: the engine's chunk.
    """

    def __init__(self, bundle: Bundle, engine: Engine, device: Device, *, fill: float = 0.0) -> None:
        """
        Args:
            fill: what slots hold until they are first written.

        Raises:
            BundleError: the engine takes or gives other tensors than its record says, or does not write in
                place.
            CannotRunHere: TensorRT cannot load it, or there is not enough device memory.
        """
        self._device, self._log = device, engine_log(engine.trt)
        storage = DeviceStorage(device)
        free = device.memory()[0]
        # Contexts need the engine, and the engine the runtime.
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
            self._prefill = self._calls(PREFILL, self.cache)
            self._decode = self.cache.bound = self._calls(DECODE, self.cache)

    def use(self, cache: KvCache) -> None:
        """Run on this cache from now on; one that is new gets a context for its decode step.

        Raises:
            CannotRunHere: not enough device memory for that.
        """
        if cache is self.cache:
            return
        if cache.bound is None:
            with _within_memory():
                cache.bound = self._calls(DECODE, cache)
        self.cache, self._decode = cache, cache.bound
        self._prefill.bind(self._addresses(cache))

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
        self.cache.reserve(stop)  # TensorRT would drop what is beyond, and say nothing
        calls = self._decode if input_ids.shape[1] == 1 else self._prefill
        tokens = input_ids, positions, self.cache.admit(positions), logits_index
        return calls.run(tokens, lambda: self._write_updates(start, stop - start))

    def device_memory(self) -> DeviceMemory:
        free, total = self._device.memory()
        weights = None
        if hasattr(self._engine, "get_engine_stat"):
            weights = int(self._engine.get_engine_stat(self._trt.EngineStat.TOTAL_WEIGHTS_SIZE))
        kv = sum(buffer.nbytes for buffer in self.cache.buffers.values())
        return DeviceMemory(self._device.name, free, total, self._loaded, weights, self._scratch.nbytes, kv)

    def _calls(self, profile: int, cache: KvCache) -> _Calls:
        """Calls of a profile on a cache."""
        context, config = self._context(profile)
        assert isinstance(cache.storage, DeviceStorage)
        return _Calls(
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
        """Of all that a context takes and gives but tokens and logits, by name."""
        bound = {name: buffer.address for name, buffer in cache.buffers.items()}
        for name, buffer in cache.buffers.items():
            layer, which = layer_and_which(name)
            if self._updates:
                bound[update(layer, which)] = self._updates[name].address
            else:
                bound[present(layer, which)] = buffer.address
        return bound | {slots_output(layer): slots.address for layer, slots in self._slots.items()}

    def _context(self, profile: int) -> tuple[Any, Any]:
        """A new execution context on one profile, over the scratch memory that all share, and its configuration.

        TensorRT-RTX compiles kernels for a size when it first comes. For the decode step it shall do so at
        once: a graph that was captured before would keep the slower ones. Prompts have many sizes, and do not
            wait.
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
            raise failure(self._log, "TensorRT cannot make an execution context")
        self._device.synchronize()
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        return context, config

    def _write_updates(self, start: int, count: int) -> None:
        """Copy what the graph gave of `count` new tokens to the cache, in the stream's order: of a layer that evicts to the
        slots that it named, head by head, of others to those from `start` on."""
        for name, new in self._updates.items():
            buffer, (layer, _) = self.cache.buffers[name], layer_and_which(name)
            rows, heads, capacity, width = buffer.shape
            slot = width * stored_as(buffer.dtype).itemsize
            for first, number, target in self._targets(layer, rows * heads, start):
                to, given = (
                    buffer.address + (first * capacity + target) * slot,
                    new.address + first * count * slot,
                )
                self._device.copy_rows(to, capacity * slot, given, count * slot, count * slot, number)

    def _targets(self, layer: int, heads: int, start: int) -> Iterator[tuple[int, int, int]]:
        """Neighbouring heads whose new tokens go to one slot: the first of them, how many, the slot."""
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
        """Where the graph says which slots it chose, of each layer that evicts."""
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
    """
    Raises:
        CannotRunHere: the device's memory did not suffice for what is done here.
    """
    try:
        yield
    except MemoryError as error:
        raise CannotRunHere(
            "there is not enough device memory for the engine's cache and activations",
            got=str(error),
            fix="build the engine again with a smaller --capacity or --chunk, or hold fewer caches",
        ) from error


class _Calls:
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
        told: Sequence[DeviceArray],
        *,
        longest: int,
        captures: bool,
        config: Any = None,
    ) -> None:
        """
        Args:
            bound: addresses of what is not made here, by name.
            told: those of them that the host reads after a call.
            config: of the context, which must live as long.
        """
        self._config = config
        self.context, self._place, self._device, self._log, self._vocab = (
            context,
            storage,
            storage.device,
            log,
            vocab,
        )
        self._captures, self._told = captures, told
        self._graph: Any | None = None
        self._counts = 0, 0  # tokens, logits
        self._inputs = {name: storage.pinned((longest,), "int64") for name in TOKEN_INPUTS}
        self._logits: DeviceArray | None = None
        self.bind(bound | {name: array.address for name, array in self._inputs.items()})

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Take and give these from now on; no graph was captured."""
        for name, address in addresses.items():
            self._address(name, address)

    def run(self, inputs: tuple[Ids, ...], after: Callable[[], None]) -> Logits:
        """One call of what `TOKEN_INPUTS` names; `after` queues what follows the engine."""
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
        if self._told:
            self._device.synchronize()
        after()
        self._device.synchronize()
        if self._captures and self._graph is None:
            self._capture()
        return self._host_logits().reshape(1, logits, self._vocab)

    def _queue(self) -> None:
        for name, array in self._inputs.items():
            assert array.host is not None
            self._device.upload(array.address, array.host[: self._count(name)])
        if not self.context.execute_async_v3(self._device.stream):
            raise failure(self._log, "TensorRT failed to run the engine")
        assert self._logits is not None
        self._device.download(self._host_logits(), self._logits.address)
        for array in self._told:
            assert array.host is not None
            self._device.download(array.host, array.address)

    def _capture(self) -> None:
        """TensorRT must have run once before; TensorRT-RTX may still be compiling kernels, and says so."""
        ready = getattr(self.context, "is_stream_capturable", None)
        if ready is None or ready(self._device.stream):
            self._graph = self._device.capture(self._queue)
            self._captures = self._graph is not None

    def _shape(self, tokens: int, logits: int) -> None:
        if self._counts == (tokens, logits):
            return
        self._counts = tokens, logits
        for name, count in (("input_ids", tokens), ("position_ids", tokens), ("logits_index", logits)):
            if not self.context.set_input_shape(name, (1, count)):
                raise failure(self._log, f"the engine refuses {count} as a size of {name}")
        if self._logits is None or self._logits.shape[0] < logits:
            self._logits = None  # before more is allocated
            self._logits = self._place.pinned((logits, self._vocab), "float32")
            self._address("logits", self._logits.address)

    def _count(self, name: str) -> int:
        tokens, logits = self._counts
        return {"write_indices": 1, "logits_index": logits}.get(name, tokens)

    def _host_logits(self) -> NDArray[np.float32]:
        assert self._logits is not None and self._logits.host is not None
        return self._logits.host[: self._counts[1]]

    def _address(self, name: str, address: int) -> None:
        if not self.context.set_tensor_address(name, address):
            raise failure(self._log, f"TensorRT refuses the address of {name}")
