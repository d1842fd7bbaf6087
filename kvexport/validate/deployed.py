"""Run a whole bundle as it is deployed: one session, the cache bound in place, the prompt read in chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvexport.bundle import Bundle
from kvexport.bundle.graph_io import (
    DATA_FILE,
    GRAPH_FILE,
    KEY,
    STATE,
    VALUE,
    attention_tap,
    past,
    residual_tap,
)
from kvexport.errors import CannotRunHere
from kvexport.packages import PACKAGES, install_command
from kvexport.progress import Progress
from kvexport.validate.layerwise import COMPUTED_IN, GARBAGE, heads_side_by_side
from kvexport.validate.reference_run import array_name
from kvexport.validate.reference_slots import ReferenceSlots

if TYPE_CHECKING:
    import onnxruntime

    from kvexport.runtime.backends.base import Decoder
    from kvexport.runtime.backends.select import Provider
    from kvexport.runtime.cache.kv_cache import KvCache

Array = NDArray[np.float32]

_CHUNK, _GROWTH = 24, 40  # tokens; the short sequence of the reference takes several chunks and growths
# Memory per byte of weights, measured: ONNX Runtime packs float32 weights, converts float16 to float32 and
# packs it, and is given bfloat16 converted to float32.
_MEMORY = {"float32": 1.1, "float16": 2.5, "bfloat16": 4.5}
_QUANTIZED_MEMORY = 2.5  # integers and scales are packed, and their stored form is freed late
_TAPS = {"attention": attention_tap, "residual": residual_tap}
_MODULES = ("onnx_ir", "onnxruntime", "psutil")


def run_deployed(
    bundle: Bundle,
    input_ids: NDArray[np.int64],
    prefill: int,
    progress: Progress,
    provider: Provider | None = None,
    slots: Mapping[int, ReferenceSlots] | None = None,
    *,
    exact: bool = True,
) -> dict[str, Array]:
    """Run the bundle on `input_ids` [T]: `prefill` of them in chunks, the others one by one.

    On ONNX Runtime the graph is a copy, with taps, of the file that is deployed on `provider` (None: the
    CPU). An engine has no taps and gives logits and caches only.

    Args:
        slots: the reference's slots of each layer that evicts; the run has equally many, and gets their state
            before each call.
        exact: False: ONNX Runtime's CPU rounds activations to int8 in linear maps with integer weights, as a
            session does.

    Returns:
        `logits` [T, vocab], and those of each layer's arrays in `kvexport.validate.reference_run` that the
        provider gives, float32.

    Raises:
        CannotRunHere: this machine lacks the memory, or a package.
    """
    from kvexport.runtime.backends.select import Provider

    provider, slots = provider or Provider("cpu"), slots or {}
    budget = next((each.slots for each in slots.values()), None)
    if provider.name == "tensorrt":
        from kvexport.runtime.backends.tensorrt import TensorRtDecoder

        assert provider.engine is not None and provider.device is not None
        engine = TensorRtDecoder(bundle, provider.engine, provider.device, fill=GARBAGE)
        if budget is not None:
            engine.cache.block(budget)
        return _run(engine, input_ids, prefill, progress, min(_CHUNK, engine.max_tokens_per_call), slots)
    _require_packages()
    from kvexport.runtime.backends.ort import OrtDecoder
    from kvexport.runtime.backends.select import new_cache

    names = {
        tap(layer): array_name(layer, kind)
        for layer in range(len(bundle.layers))
        for kind, tap in _TAPS.items()
    }
    session, dtype = _tapped_session(bundle, provider, exact)
    cache = new_cache(bundle, provider, dtype, fill=GARBAGE, step=_GROWTH, slots=budget, chunk=_CHUNK)
    decoder = OrtDecoder(session, cache, extra_outputs=list(names))
    return _run(
        decoder,
        input_ids,
        prefill,
        progress,
        _CHUNK,
        slots,
        lambda: {names[tap]: decoder.extra[tap] for tap in names},
    )


def computed_in(dtype: str, provider: str) -> str:
    """The dtype of the arithmetic for a bundle of `dtype`: its own, or float32 if the CPU has no kernels of
    it."""
    return COMPUTED_IN[dtype] if provider == "cpu" else dtype


def _run(
    decoder: Decoder,
    input_ids: NDArray[np.int64],
    prefill: int,
    progress: Progress,
    chunk: int,
    slots: Mapping[int, ReferenceSlots],
    taps: Callable[[], dict[str, Array]] = dict,
) -> dict[str, Array]:
    """Run the decoder: its logits, the `taps` [1, S, hidden] after each call, and its caches.

    A ring is read after each call, and at the end again.
    """
    tokens, cache = len(input_ids), decoder.cache
    pieces: dict[str, list[Array]] = {}
    rings = {layer: cache.ring(past(layer, KEY)) for layer in range(cache.num_layers)}
    starts = _starts(cache, tokens, prefill, chunk)
    with progress.stage("Running the bundle", len(starts)):
        for start, stop in zip(starts, [*starts[1:], tokens], strict=True):
            indices = np.arange(stop - start)[None]
            logits = decoder.run(input_ids[None, start:stop], start + indices, indices)
            for name, values in {"logits": logits, **taps()}.items():
                pieces.setdefault(name, []).append(values[0].copy())
            for layer, reference in slots.items():
                key, value = (buffer[0] for buffer in cache.layer_in_float32(layer))  # [N, slots, width]
                arrays = {KEY: key, VALUE: value, STATE: cache.state(layer)}
                for kind, rows in reference.read(arrays, start, stop).items():
                    pieces.setdefault(array_name(layer, kind), []).append(rows)
                cache.set_state(layer, reference.state(stop))
            for layer in (layer for layer, ring in rings.items() if ring is not None):
                for name, rows in _rows_of(cache, layer, np.arange(start, stop)).items():
                    pieces.setdefault(name, []).append(rows)
            progress.advance()
    measured = {name: np.concatenate(each) for name, each in pieces.items()}
    for layer, ring in rings.items():
        if layer in slots:
            continue
        kept = tokens if ring is None else min(tokens, cache.rings.slots[ring])
        for name, rows in _rows_of(cache, layer, np.arange(tokens - kept, tokens)).items():
            measured[name] = (
                np.concatenate([measured[name][: tokens - kept], rows]) if name in measured else rows
            )
    return measured


def _starts(cache: KvCache, tokens: int, prefill: int, chunk: int) -> list[int]:
    """First tokens of the calls: chunks of `prefill` tokens that wrap in no ring, then one token each."""
    return [*(call.start for call in cache.rings.calls(range(prefill), chunk)), *range(prefill, tokens)]


def _rows_of(cache: KvCache, layer: int, positions: NDArray[np.int64]) -> dict[str, Array]:
    """Keys and values of positions in a layer that does not evict, [tokens, heads·width] by name."""
    slots = cache.rings.slots_of(cache.ring(past(layer, KEY)), positions)
    buffers = zip((KEY, VALUE), cache.layer_in_float32(layer), strict=True)
    return {array_name(layer, which): heads_side_by_side(buffer, slots) for which, buffer in buffers}


def _tapped_session(
    bundle: Bundle, provider: Provider, exact: bool
) -> tuple[onnxruntime.InferenceSession, str]:
    """A session on a copy, with taps, of the deployed graph, and the dtype of its arithmetic."""
    from kvexport.graph import as_float32, with_taps
    from kvexport.runtime.backends.ort_session import (
        EXACT,
        INT8_ACTIVATIONS,
        graph_file,
        session_on,
        session_options,
    )

    dtype = computed_in(bundle.dtype, provider.name)
    if provider.name == "cpu":
        _require_memory(bundle)
    if dtype != bundle.dtype:
        copy = as_float32(bundle.path / GRAPH_FILE, taps=True)
    else:
        level = int(EXACT if exact else INT8_ACTIVATIONS)
        copy = with_taps(bundle.path / graph_file(bundle, provider.name), accuracy_level=level)
    options = session_options(None, exact=exact)
    if provider.name == "cpu":
        return _load(lambda: copy.session(options)), dtype
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(copy.folder.resolve())
    )
    return _load(lambda: session_on(provider.name, copy.model, options)), dtype


def _load(load: Callable[[], onnxruntime.InferenceSession]) -> onnxruntime.InferenceSession:
    import onnxruntime

    try:
        return load()
    except CannotRunHere:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no other base class
        raise CannotRunHere(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the bundle's graph",
            got=str(error).splitlines()[0],
            expected=f"onnxruntime {PACKAGES['onnxruntime'].minimum} or later",
            fix="pip install --upgrade onnxruntime",
        ) from error


def _require_packages() -> None:
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        raise CannotRunHere(
            "validation needs packages that are not installed",
            got=f"no {', '.join(missing)}",
            fix=install_command("torch", "onnxruntime"),
        )


def _require_memory(bundle: Bundle) -> None:
    import psutil

    factor = _QUANTIZED_MEMORY if bundle.weights.is_quantized else _MEMORY[bundle.dtype]
    needed = factor * bundle.files[DATA_FILE].bytes
    free = psutil.virtual_memory().available
    if needed > free:
        raise CannotRunHere(
            f"the bundle {bundle.path} does not fit in memory as a whole",
            got=f"{free / 2**30:.2f} GiB free",
            expected=f"{needed / 2**30:.2f} GiB or more",
            fix="validate on a machine with more memory; the build has already validated it layer by layer",
        )
