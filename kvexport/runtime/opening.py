"""Opening a bundle as a session; its files are hashed while its weights are loaded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvexport.bundle import DATA_FILE, Bundle
from kvexport.bundle.graph_io import CHUNK
from kvexport.runtime.backends.select import Provider, choose
from kvexport.runtime.session import Session


def open_bundle(
    path: Path | str,
    *,
    provider: str = "auto",
    threads: int | None = None,
    chunk: int = CHUNK,
    compress_once: bool = False,
    verify: bool = True,
) -> Session:
    """Open a bundle for inference.

    With provider "auto", the logger "kvexport.runtime" warns if the bundle's engine or the GPU cannot be
    used.

    Args:
        path: the bundle directory.
        provider: "cpu", "cuda" or "tensorrt". "auto": tensorrt if the bundle has an engine that runs on this
            machine, else cuda if ONNX Runtime supports it and there is a GPU, else cpu.
        threads: CPU threads per operator; None: one per core.
        chunk: the largest number of prompt tokens per call.
        compress_once: evict a prompt's tokens down to the budget after the whole prompt was run; see
            `Session`.
        verify: also hash the weights (with an engine: its plan) while they are loaded. All other files are
            always hashed.

    Returns:
        A session; close it, or use it in a `with` statement.

    Raises:
        BundleError: there is no bundle, it is damaged, its format is not supported, or its engine is damaged
            or was built from another bundle.
        CannotRunHere: this machine lacks what the provider needs, or kernels for the bundle's dtype.
        UsageError: an argument is out of range.
    """
    bundle = Bundle.open(path)
    bundle.verify(name for name in bundle.files if name != DATA_FILE)
    chosen = choose(bundle, provider)
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(_verify_weights, bundle, chosen) if verify else pool.submit(lambda: None)
        try:
            session = Session(
                bundle, provider=chosen, threads=threads, chunk=chunk, compress_once=compress_once
            )
        finally:
            verified.result()  # damaged weights explain any other failure
    return session


def _verify_weights(bundle: Bundle, chosen: Provider) -> None:
    if chosen.engine is not None:
        chosen.engine.verify()
    if chosen.engine is None or not chosen.engine.has_weights:
        bundle.verify([DATA_FILE])
