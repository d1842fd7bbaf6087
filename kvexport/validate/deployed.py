"""A whole bundle run as it is deployed: one session, the cache bound in place and growing, the prompt read in chunks.

Knows the runtime, and what a copy of the graph with taps needs; nothing of the twin that the result is compared with.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvexport.bundle import Bundle
from kvexport.errors import CannotRunHere
from kvexport.graph.contract import DATA_FILE, GRAPH_FILE, attention_tap, residual_tap
from kvexport.progress import Progress
from kvexport.validate.layerwise import COMPUTED_IN, GARBAGE, heads_side_by_side
from kvexport.validate.twin import array_name

if TYPE_CHECKING:
    import onnxruntime

    from kvexport.graph import GraphCopy

Array = NDArray[np.float32]

_CHUNK, _GROWTH = 24, 40  # tokens: both take several rounds in the twin's short sequence
# Memory per byte of weights, measured: ONNX Runtime packs float32 weights, widens and packs float16, and of
# bfloat16 gets a widened copy to begin with.
_MEMORY = {"float32": 1.1, "float16": 2.5, "bfloat16": 4.5}
_TAPS = {"attention": attention_tap, "residual": residual_tap}
_PACKAGES = ("onnx_ir", "onnxruntime", "psutil")


def run_deployed(bundle: Bundle, input_ids: NDArray[np.int64], prefill: int, progress: Progress) -> dict[str, Array]:
    """Feed `input_ids` [T] to the bundle: `prefill` of them in chunks, the others one by one.

    Returns:
        `logits` [T, vocab] and the four arrays a layer that `kvexport.validate.twin` names, float32.

    Raises:
        CannotRunHere: this machine lacks the memory, or a package.
    """
    _require_packages()
    _require_memory(bundle)
    from kvexport.graph import as_float32, tapped
    from kvexport.runtime.cache import KvCache
    from kvexport.runtime.decoder import OrtDecoder
    from kvexport.runtime.session import session_options

    tokens, layers = len(input_ids), range(len(bundle.layers))
    dtype = COMPUTED_IN[bundle.dtype]
    graph = bundle.path / GRAPH_FILE
    copy = tapped(graph) if dtype == bundle.dtype else as_float32(graph, taps=True)
    names = {tap(layer): array_name(layer, kind) for layer in layers for kind, tap in _TAPS.items()}
    cache = KvCache(bundle, 1, dtype, fill=GARBAGE, step=_GROWTH)
    decoder = OrtDecoder(_loaded(copy, session_options(None)), cache, extra_outputs=list(names))
    pieces: dict[str, list[Array]] = {name: [] for name in ("logits", *names.values())}
    starts = [*range(0, prefill, _CHUNK), *range(prefill, tokens)]
    with progress.stage("Running the bundle", len(starts)):
        for start, stop in zip(starts, [*starts[1:], tokens], strict=True):
            here = np.arange(stop - start)[None]
            logits = decoder.run(input_ids[None, start:stop], start + here, here)
            pieces["logits"].append(logits[0].copy())
            for tap, name in names.items():
                pieces[name].append(decoder.extra[tap][0].astype(np.float32))
            progress.advance()
    measured = {name: np.concatenate(each) for name, each in pieces.items()}
    for layer in layers:
        for which, buffer in zip(("key", "value"), cache.layer(layer), strict=True):
            measured[array_name(layer, which)] = heads_side_by_side(buffer, tokens)
    return measured


def _loaded(copy: GraphCopy, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    import onnxruntime

    try:
        return copy.session(options)
    except Exception as error:  # ONNX Runtime's own exceptions have no other base
        raise CannotRunHere(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the bundle's graph",
            seen=str(error).splitlines()[0],
            allowed="onnxruntime 1.28 or later",
            fix="pip install --upgrade onnxruntime",
        ) from error


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise CannotRunHere(
            "validation reads the graph, which needs packages that are not installed",
            seen=f"no {', '.join(missing)}",
            fix="pip install 'kvexport[convert,cpu]'",
        )


def _require_memory(bundle: Bundle) -> None:
    import psutil

    needed = _MEMORY[bundle.dtype] * bundle.files[DATA_FILE].bytes
    free = psutil.virtual_memory().available
    if needed > free:
        raise CannotRunHere(
            f"the bundle {bundle.path} does not fit in memory as a whole",
            seen=f"{free / 2**30:.2f} GiB free",
            allowed=f"{needed / 2**30:.2f} GiB or more",
            fix="validate on a machine with more memory; the build that made it proved it layer by layer",
        )
