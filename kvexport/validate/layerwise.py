"""Run an exported graph in the memory of one layer: all calls through the embedding, then all through layer
0, ...

With teacher forcing every token is known beforehand, so that the calls (a prefill, then single steps) need
not pass through the whole graph one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvexport.bundle.graph_io import (
    BATCH,
    BUDGET,
    CAPACITY,
    GRAPH_FILE,
    KEY,
    STATE,
    VALUE,
    GraphContract,
    TensorSpec,
    attention_tap,
    past,
    residual_tap,
    ring_sizes,
    sized,
)
from kvexport.files.malloc import return_freed
from kvexport.progress import Progress
from kvexport.validate.reference_run import array_name
from kvexport.validate.reference_slots import ReferenceSlots

if TYPE_CHECKING:
    import onnxruntime

Array = NDArray[np.float32]
Call = dict[str, NDArray[Any]]  # values of the graph by name, computed so far for one call

COMPUTED_IN = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "float32",
}  # what ONNX Runtime's CPU has kernels for
GARBAGE = 100.0  # value of cache slots before they are written
_SPARE = 16  # slots that are never written


def run_layerwise(
    directory: Path,
    contract: GraphContract,
    input_ids: NDArray[np.int64],
    prefill: int,
    progress: Progress,
    slots: Mapping[int, ReferenceSlots] | None = None,
    *,
    quantized: bool = False,
) -> dict[str, Array]:
    """Run decoder.onnx in `directory` on `input_ids` [T]: `prefill` of them at once, the others one by one.

    The weights of one part are in memory at a time. A bfloat16 graph computes in float32, on the same
    weights.

    Args:
        slots: the reference's slots of each layer that evicts; the run has equally many, and gets their state
            before each call.
        quantized: whether the graph has integer weights.

    Returns:
        `logits` [T, vocab] and the arrays of each layer that `kvexport.validate.reference_run` names,
        float32.
    """
    from kvexport.graph.split_layers import split_layers

    tokens, slots = len(input_ids), slots or {}
    budget = next((each.slots for each in slots.values()), None)
    starts = [0, *range(prefill, tokens)]
    stops = [*starts[1:], tokens]
    calls = [_call(input_ids[start:stop], start, budget) for start, stop in zip(starts, stops, strict=True)]
    dtype = COMPUTED_IN[contract.dtype]
    caches = _caches(contract, dtype, tokens + _SPARE, budget, prefill)
    rows_of_slots: dict[str, list[Array]] = {}
    rings = [
        layer
        for layer in range(contract.num_layers)
        if layer not in slots and caches[past(layer, KEY)].shape()[2] < tokens + _SPARE
    ]

    def after_ring(call: int, layer: int) -> None:
        """Read a call's tokens from a layer's ring."""
        for which in (KEY, VALUE):
            cache = caches[past(layer, which)].numpy()
            in_slots = np.arange(starts[call], stops[call]) % cache.shape[2]
            rows = heads_side_by_side(cache, in_slots)
            rows_of_slots.setdefault(array_name(layer, which), []).append(rows)

    def after(call: int, layer: int) -> None:
        """Read a call's tokens from a layer's slots, and write the reference's state there."""
        names = {which: past(layer, which) for which in (KEY, VALUE, STATE)}
        arrays = {which: caches[name].numpy()[:, 0] for which, name in names.items()}
        for kind, rows in slots[layer].read(arrays, starts[call], stops[call]).items():
            rows_of_slots.setdefault(array_name(layer, kind), []).append(rows)
        caches[names[STATE]].update_inplace(slots[layer].state(stops[call])[:, None])

    with progress.stage("Validating the graph", contract.num_layers + 2):
        for index, part in enumerate(
            split_layers(directory / GRAPH_FILE, contract.num_layers, in_float32=dtype != contract.dtype)
        ):
            layer = index - 1  # the first part is the embedding
            after_call = None
            if layer in slots or layer in rings:
                after_call = partial(after if layer in slots else after_ring, layer=layer)
            _run_part(part.session(_options(quantized)), calls, caches, after_call)
            del part  # before the next one is made
            return_freed()
            progress.advance()
    measured = {
        "logits": _joined(calls, "logits"),
        **{name: np.concatenate(rows) for name, rows in rows_of_slots.items()},
    }
    for layer in range(contract.num_layers):
        if layer not in slots and layer not in rings:
            for which in (KEY, VALUE):
                measured[array_name(layer, which)] = heads_side_by_side(
                    caches[past(layer, which)].numpy(), np.arange(tokens)
                )
        measured[array_name(layer, "attention")] = _joined(calls, attention_tap(layer))
        measured[array_name(layer, "residual")] = _joined(calls, residual_tap(layer))
    return measured


def heads_side_by_side(cache: NDArray[Any], slots: NDArray[np.int64]) -> Array:
    """Some slots of a cache [1, heads, all slots, width] as float32 [slots, heads·width]."""
    return cache[0][:, slots].swapaxes(0, 1).reshape(len(slots), -1).astype(np.float32)


def _call(ids: NDArray[np.int64], start: int, budget: int | None) -> Call:
    """The token inputs of a call for `ids` [S] from position `start`, with the logits of all tokens."""
    indices = np.arange(len(ids))
    return {
        "input_ids": ids[None],
        "position_ids": start + indices[None],
        "write_indices": np.array([start if budget is None else min(start, budget)]),
        "logits_index": indices[None],
    }


def _caches(
    contract: GraphContract, dtype: str, slots: int, budget: int | None, chunk: int
) -> dict[str, onnxruntime.OrtValue]:
    """Cache buffers by the name of the input, filled with garbage; rings have room for a call of `chunk`."""
    from onnxruntime import OrtValue

    caches = [spec for spec in contract.inputs if spec.name.startswith("past_key_values.")]
    axes = [axis for spec in caches for axis in spec.shape]
    sizes = {BATCH: 1, CAPACITY: slots, BUDGET: budget or 0, **ring_sizes(axes, slots, chunk)}

    def empty(spec: TensorSpec) -> NDArray[Any]:
        shape = [int(sized(size, sizes)) for size in spec.shape]
        is_state = spec.name.endswith(f".{STATE}")
        return np.full(shape, 0 if is_state else GARBAGE, spec.dtype if is_state else dtype)

    return {spec.name: OrtValue.ortvalue_from_numpy(empty(spec)) for spec in caches}


def _run_part(
    session: onnxruntime.InferenceSession,
    calls: list[Call],
    caches: dict[str, onnxruntime.OrtValue],
    after: Callable[[int], None] | None,
) -> None:
    """Run every call through one part, then `after`; outputs are added to the call or written to the cache in
    place."""
    inputs = [value.name for value in session.get_inputs()]
    written = {
        value.name: value.name.replace("present", "past_key_values") for value in session.get_outputs()
    }
    outputs = [name for name, cache in written.items() if cache not in caches]
    for index, call in enumerate(calls):
        binding = session.io_binding()
        for name in inputs:
            if name in caches:
                binding.bind_ortvalue_input(name, caches[name])
            else:
                binding.bind_cpu_input(name, call[name])
        for name in outputs:
            binding.bind_output(name)
        for name in written.keys() - outputs:
            binding.bind_ortvalue_output(name, caches[written[name]])
        session.run_with_iobinding(binding)
        call.update(zip(outputs, (value.numpy() for value in binding.get_outputs()), strict=False))
        if after is not None:
            after(index)


def _joined(calls: list[Call], name: str) -> Array:
    """Concatenate a value [1, S, width] of all calls to float32 [T, width]."""
    return np.concatenate([call[name][0] for call in calls]).astype(np.float32)


def _options(quantized: bool) -> onnxruntime.SessionOptions:
    """Options that keep only the weights as they are on disk: no packed copy, and no memory arena.

    Integer weights are dequantised once, when the session is made.
    """
    from onnxruntime import SessionOptions

    options = SessionOptions()
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    if quantized:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options
