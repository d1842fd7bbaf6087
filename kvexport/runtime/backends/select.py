"""Choice of the backend of a session: ONNX Runtime on the CPU or on CUDA, or a TensorRT engine of the bundle.

A backend is imported only when it is chosen.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

from kvexport.bundle import Bundle
from kvexport.bundle.graph_io import CHUNK
from kvexport.bundle.manifest import largest_call
from kvexport.devices.gpu import find_gpu
from kvexport.errors import CannotRunHere, UsageError
from kvexport.files.malloc import return_freed
from kvexport.packages import install_command
from kvexport.runtime.backends.base import Decoder
from kvexport.runtime.backends.tensorrt_select import Engine, engine_directories, find_engine
from kvexport.runtime.cache.device_arrays import HOST, Device, DeviceStorage, Storage
from kvexport.runtime.cache.kv_cache import STEP, KvCache

PROVIDERS = ("auto", "cpu", "cuda", "tensorrt")

# Tokens by which a cache in device memory grows: allocation is slow there, and attention skips most of the
# unused slots.
_DEVICE_STEP = 1024


@dataclass(frozen=True)
class Provider:
    """The chosen backend.

    Attributes:
        name: "cpu", "cuda" or "tensorrt".
        device: the GPU; None on the CPU.
        engine: engine of the bundle; None with ONNX Runtime.
    """

    name: str
    device: Device | None = None
    engine: Engine | None = None

    @property
    def version(self) -> str:
        """Name and version of the library that computes: "tensorrt 10.3.0.30", "onnxruntime 1.31.1"."""
        if self.engine is not None:
            return f"{self.engine.record.engine} {self.engine.record.version}"
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"


def choose(bundle: Bundle, requested: str) -> Provider:
    """Find the device and the engine of a provider.

    "auto" is the first that this machine supports of tensorrt (if the bundle has an engine), cuda and cpu. If
    a better one was to be expected, because the bundle has an engine or there is a GPU, the reason why it is
    not used is logged as a warning of the logger "kvexport.runtime", once.

    Args:
        bundle: whose engines are candidates.
        requested: one of `PROVIDERS`.

    Raises:
        UsageError: there is no such provider.
        CannotRunHere: this machine lacks what the provider needs; never with "auto".
        BundleError: the bundle's engine for this machine is damaged, or was built from another bundle.
    """
    if requested not in PROVIDERS:
        raise UsageError("the provider must be auto, cpu, cuda or tensorrt", got=requested)
    if requested == "tensorrt":
        return _tensorrt(bundle)
    if requested == "cuda":
        return cuda()
    return _best(bundle) if requested == "auto" else Provider("cpu")


def _best(bundle: Bundle) -> Provider:
    """The provider that "auto" stands for."""
    reasons = []
    if engine_directories(bundle):
        try:
            return _tensorrt(bundle, host_code=False)
        except CannotRunHere as error:
            reasons.append(f"the bundle's TensorRT engine cannot be used: {_sentence(error)}")
    try:
        provider = cuda()
    except CannotRunHere as error:
        provider = Provider("cpu")
        gpu = find_gpu()
        if gpu is not None:
            reasons.append(f"{gpu.name} cannot be used: {_sentence(error)}")
    if reasons:
        warn_once(f"provider auto: using {provider.name}: {'; '.join(reasons)}")
    return provider


def _sentence(error: CannotRunHere) -> str:
    return error.what if error.got is None else f"{error.what} ({error.got})"


@cache
def warn_once(message: str) -> None:
    """Log a warning, the first time that the process has this message."""
    logging.getLogger("kvexport.runtime").warning("%s", message)


def open_decoder(
    bundle: Bundle, provider: Provider, *, threads: int | None = None, chunk: int = CHUNK
) -> Decoder:
    """Load the bundle's graph or engine, with an empty cache for one sequence.

    Args:
        bundle: to load.
        provider: as `choose` returned it for this bundle.
        threads: CPU threads per operator; None: one per core.
        chunk: the largest number of tokens of a call, for which rings need room; an engine has its own.

    Raises:
        CannotRunHere: the library cannot run it.
        BundleError: the graph or the engine contradicts the manifest.
        UsageError: `threads` is out of range.
    """
    if provider.name == "tensorrt":
        from kvexport.runtime.backends.tensorrt import TensorRtDecoder

        assert provider.engine is not None and provider.device is not None
        return TensorRtDecoder(bundle, provider.engine, provider.device)
    require_onnxruntime()
    from kvexport.bundle.graph_io import GRAPH_FILE
    from kvexport.runtime.backends.ort import OrtDecoder
    from kvexport.runtime.backends.ort_session import graph_file, load_graph, session_options

    free = 0 if provider.device is None else provider.device.memory()[0]
    graph = load_graph(bundle, session_options(threads), provider.name)
    loaded = 0 if provider.device is None else max(0, free - provider.device.memory()[0])
    return_freed()
    cache = new_cache(bundle, provider, bundle.dtype, chunk=largest_call(bundle.eviction, chunk))
    return OrtDecoder(graph, cache, row_by_row=graph_file(bundle, provider.name) != GRAPH_FILE, loaded=loaded)


def new_cache(
    bundle: Bundle,
    provider: Provider,
    dtype: str,
    *,
    fill: float = 0.0,
    step: int | None = None,
    slots: int | None = None,
    chunk: int = CHUNK,
) -> KvCache:
    """A cache for one sequence on ONNX Runtime, in the memory of the provider; arguments as `KvCache`."""
    storage: Storage = HOST if provider.device is None else DeviceStorage(provider.device)
    step = step or (STEP if provider.device is None else _DEVICE_STEP)
    return KvCache(bundle, 1, dtype, fill=fill, step=step, slots=slots, storage=storage, chunk=chunk)


def require_onnxruntime() -> None:
    """
    Raises:
        CannotRunHere: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise CannotRunHere("onnxruntime is not installed", fix=install_command("onnxruntime")) from error


def cuda() -> Provider:
    require_onnxruntime()
    import onnxruntime

    from kvexport.runtime.backends.cuda import Cuda
    from kvexport.runtime.backends.ort_session import CUDA

    available = onnxruntime.get_available_providers()
    if CUDA not in available:
        raise CannotRunHere(
            "ONNX Runtime must be built with CUDA for --provider cuda",
            got=f"onnxruntime {onnxruntime.__version__} with {', '.join(available)}",
            fix=(
                f"pip uninstall onnxruntime && {install_command('onnxruntime-gpu')}; "
                "or run on the CPU with --provider cpu"
            ),
        )
    return Provider("cuda", Cuda())


def _tensorrt(bundle: Bundle, *, host_code: bool = True) -> Provider:
    from kvexport.runtime.backends.cuda import Cuda

    device = Cuda()
    return Provider("tensorrt", device, find_engine(bundle, device, host_code=host_code))
