"""The exported graph run in the memory of one layer: all calls through the embedding, then all through layer 0, ...

Teacher-forced, every token is known beforehand, so that the calls (a prefill, then single steps) need not pass
through the whole graph one after another. Knows how the parts of a graph are run; nothing of the twin that the
result is compared with.
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
    sized,
)
from kvexport.files.malloc import return_freed
from kvexport.progress import Progress
from kvexport.validate.reference_run import array_name
from kvexport.validate.slots import ReferenceSlots

if TYPE_CHECKING:
    import onnxruntime

Array = NDArray[np.float32]
Call = dict[str, NDArray[Any]]  # what is known of one call so far: values of the graph by name

COMPUTED_IN = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "float32",
}  # what ONNX Runtime's CPU has kernels for
GARBAGE = 100.0  # what slots of the cache hold before they are written
_SPARE = 16  # slots that no token is written to


def run_layerwise(
    directory: Path,
    contract: GraphContract,
    input_ids: NDArray[np.int64],
    prefill: int,
    progress: Progress,
    slots: Mapping[int, ReferenceSlots] | None = None,
) -> dict[str, Array]:
    """Feed `input_ids` [T] to decoder.onnx in `directory`: `prefill` of them at once, the others one by one.

    The weights of one part are in memory at a time. A bfloat16 graph computes in float32, on the same weights.

    Args:
        slots: the twin's, of layers that evict; the run has as many, and their state before each call.

    Returns:
        `logits` [T, vocab] and the arrays of each layer that `kvexport.validate.reference_run` names, float32.
    """
    from kvexport.graph.split_layers import split_layers

    tokens, slots = len(input_ids), slots or {}
    budget = next((each.slots for each in slots.values()), None)
    starts = [0, *range(prefill, tokens)]
    stops = [*starts[1:], tokens]
    calls = [_call(input_ids[start:stop], start, budget) for start, stop in zip(starts, stops, strict=True)]
    dtype = COMPUTED_IN[contract.dtype]
    caches = _caches(contract, dtype, tokens + _SPARE, budget)
    seen: dict[str, list[Array]] = {}

    def after(call: int, layer: int) -> None:
        """Take what a call left of its tokens in a layer's slots, and put the twin's state there."""
        names = {which: past(layer, which) for which in (KEY, VALUE, STATE)}
        held = {which: caches[name].numpy()[:, 0] for which, name in names.items()}
        for kind, rows in slots[layer].seen(held, starts[call], stops[call]).items():
            seen.setdefault(array_name(layer, kind), []).append(rows)
        caches[names[STATE]].update_inplace(slots[layer].state(stops[call])[:, None])

    with progress.stage("Proving the graph", contract.num_layers + 2):
        for index, part in enumerate(
            split_layers(directory / GRAPH_FILE, contract.num_layers, in_float32=dtype != contract.dtype)
        ):
            layer = index - 1  # the first part is the embedding
            look = partial(after, layer=layer) if layer in slots else None
            _run_part(part.session(_options()), calls, caches, look)
            del part  # before the next one is made
            return_freed()
            progress.advance()
    measured = {
        "logits": _joined(calls, "logits"),
        **{name: np.concatenate(rows) for name, rows in seen.items()},
    }
    for layer in range(contract.num_layers):
        if layer not in slots:
            for which in (KEY, VALUE):
                measured[array_name(layer, which)] = heads_side_by_side(
                    caches[past(layer, which)].numpy(), tokens
                )
        measured[array_name(layer, "attention")] = _joined(calls, attention_tap(layer))
        measured[array_name(layer, "residual")] = _joined(calls, residual_tap(layer))
    return measured


def heads_side_by_side(cache: NDArray[Any], tokens: int) -> Array:
    """The first `tokens` slots of a cache [1, heads, capacity, width] as float32 [tokens, heads·width]."""
    return cache[0, :, :tokens].swapaxes(0, 1).reshape(tokens, -1).astype(np.float32)


def _call(ids: NDArray[np.int64], start: int, budget: int | None) -> Call:
    """The token inputs of a call that reads `ids` [S] from position `start`, and wants the logits of all."""
    here = np.arange(len(ids))
    return {
        "input_ids": ids[None],
        "position_ids": start + here[None],
        "write_indices": np.array([start if budget is None else min(start, budget)]),
        "logits_index": here[None],
    }


def _caches(
    contract: GraphContract, dtype: str, slots: int, budget: int | None
) -> dict[str, onnxruntime.OrtValue]:
    """Buffers by the name of the input, nothing written yet."""
    from onnxruntime import OrtValue

    sizes = {BATCH: 1, CAPACITY: slots, BUDGET: budget or 0}

    def empty(spec: TensorSpec) -> NDArray[Any]:
        shape = [int(sized(size, sizes)) for size in spec.shape]
        is_state = spec.name.endswith(f".{STATE}")
        return np.full(shape, 0 if is_state else GARBAGE, spec.dtype if is_state else dtype)

    caches = [spec for spec in contract.inputs if spec.name.startswith("past_key_values.")]
    return {spec.name: OrtValue.ortvalue_from_numpy(empty(spec)) for spec in caches}


def _run_part(
    session: onnxruntime.InferenceSession,
    calls: list[Call],
    caches: dict[str, onnxruntime.OrtValue],
    after: Callable[[int], None] | None,
) -> None:
    """Run every call through one part, and `after` each; what it gives is added to the call, or written to the cache in place."""
    inputs = [value.name for value in session.get_inputs()]
    written = {
        value.name: value.name.replace("present", "past_key_values") for value in session.get_outputs()
    }
    given = [name for name, cache in written.items() if cache not in caches]
    for index, call in enumerate(calls):
        binding = session.io_binding()
        for name in inputs:
            if name in caches:
                binding.bind_ortvalue_input(name, caches[name])
            else:
                binding.bind_cpu_input(name, call[name])
        for name in given:
            binding.bind_output(name)
        for name in written.keys() - given:
            binding.bind_ortvalue_output(name, caches[written[name]])
        session.run_with_iobinding(binding)
        call.update(zip(given, (value.numpy() for value in binding.get_outputs()), strict=False))
        if after is not None:
            after(index)


def _joined(calls: list[Call], name: str) -> Array:
    """A value [1, S, width] of all calls, one after another: float32 [T, width]."""
    return np.concatenate([call[name][0] for call in calls]).astype(np.float32)


def _options() -> onnxruntime.SessionOptions:
    """Nothing but the weights as they lie on disk: no second, packed copy of them, and no memory kept for later."""
    from onnxruntime import SessionOptions

    options = SessionOptions()
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options
