"""A bundle on disk becomes a session: its files are hashed while its weights are loaded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvexport.bundle.bundle import DATA_FILE, Bundle
from kvexport.runtime.backends.select import Provider, choose
from kvexport.runtime.session import CHUNK, Session


def open_bundle(
    path: Path | str,
    *,
    provider: str = "auto",
    threads: int | None = None,
    chunk: int = CHUNK,
    compress_once: bool = False,
    verify: bool = True,
) -> Session:
    """Open a bundle for generation.

    Args:
        provider, threads, chunk, compress_once: as in `Session`.
        verify: hash the weights too (an engine's plan, where it is that which runs), while they are loaded;
            all other files always are.

    Raises:
        BundleError: no bundle, a damaged one, one of a newer format, or an engine that is damaged or of
            another bundle.
        CannotRunHere: this machine lacks what the provider needs, or kernels for the bundle's dtype.
        UsageError: as `Session`.
    """
    bundle = Bundle.open(path)
    bundle.verify(name for name in bundle.files if name != DATA_FILE)
    chosen = choose(bundle, provider)
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(_verify_weights, bundle, chosen) if verify else pool.submit(lambda: None)
        try:
            session = Session(
                bundle, provider=chosen, threads=threads, chunk=chunk, compress_once=compress_once
            )
        finally:
            hashed.result()  # damage explains whatever else went wrong
    return session


def _verify_weights(bundle: Bundle, chosen: Provider) -> None:
    if chosen.engine is not None:
        chosen.engine.verify()
    if chosen.engine is None or not chosen.engine.has_weights:
        bundle.verify([DATA_FILE])
