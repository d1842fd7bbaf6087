"""What runs a bundle here: ONNX Runtime on the CPU or on CUDA, or one of the bundle's TensorRT engines.

The one place that chooses, and says why something else cannot be had. Each engine is imported only when it is
chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvexport.bundle.bundle import Bundle
from kvexport.errors import CannotRunHere, UsageError
from kvexport.packages import install_command
from kvexport.runtime.backends.base import Decoder
from kvexport.runtime.backends.tensorrt_select import Engine, engine_directories, find_engine
from kvexport.runtime.cache.device_arrays import Device, DeviceStorage
from kvexport.runtime.cache.kv_cache import STEP, KvCache

PROVIDERS = ("auto", "cpu", "cuda", "tensorrt")

# Tokens by which a cache on a device grows: allocating there is slow, and its attention skips unused capacity
# for the most part.
_DEVICE_STEP = 1024


@dataclass(frozen=True)
class Provider:
    """What was chosen: "cpu", "cuda" or "tensorrt", and the device and engine that it takes."""

    name: str
    device: Device | None = None
    engine: Engine | None = None

    @property
    def version(self) -> str:
        """What computes, for records: "tensorrt 10.3.0.30", "onnxruntime 1.31.1"."""
        if self.engine is not None:
            return f"{self.engine.record.engine} {self.engine.record.version}"
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"


def choose(bundle: Bundle, wanted: str) -> Provider:
    """What `wanted` is here: itself, or for "auto" tensorrt, cuda or cpu, the first of these that this machine has.

    Raises:
        UsageError: there is no such provider.
        CannotRunHere: this machine lacks what `wanted` needs; "auto" always finds something.
        BundleError: the bundle's engine for this machine is damaged, or of another bundle.
    """
    if wanted not in PROVIDERS:
        raise UsageError("there is no such provider", got=wanted, expected=", ".join(PROVIDERS))
    if wanted == "tensorrt":
        return _tensorrt(bundle)
    if wanted == "cuda":
        return _cuda()
    if wanted == "auto":
        if engine_directories(bundle):
            try:
                return _tensorrt(bundle, host_code=False)
            except CannotRunHere:
                pass
        try:
            return _cuda()
        except CannotRunHere:
            pass
    return Provider("cpu")


def open_decoder(bundle: Bundle, provider: Provider, *, threads: int | None = None) -> Decoder:
    """The bundle's graph or engine, loaded, with an empty cache for one sequence.

    Args:
        threads: of one operator on the CPU; None: one a core.

    Raises:
        CannotRunHere: this machine cannot run it after all.
        BundleError: it is not what the manifest says.
        UsageError: threads is below 1.
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
    cache = new_cache(bundle, provider, bundle.dtype)
    return OrtDecoder(graph, cache, row_by_row=graph_file(bundle, provider.name) != GRAPH_FILE, loaded=loaded)


def new_cache(
    bundle: Bundle,
    provider: Provider,
    dtype: str,
    *,
    fill: float = 0.0,
    step: int | None = None,
    slots: int | None = None,
) -> KvCache:
    """A cache for one sequence on ONNX Runtime, where the provider computes; as `KvCache`."""
    if provider.device is None:
        return KvCache(bundle, 1, dtype, fill=fill, step=step or STEP, slots=slots)
    return KvCache(
        bundle,
        1,
        dtype,
        fill=fill,
        step=step or _DEVICE_STEP,
        slots=slots,
        storage=DeviceStorage(provider.device),
    )


def require_onnxruntime() -> None:
    """
    Raises:
        CannotRunHere: it is not installed.
    """
    try:
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise CannotRunHere("onnxruntime is not installed", fix=install_command("onnxruntime")) from error


def _cuda() -> Provider:
    require_onnxruntime()
    import onnxruntime

    from kvexport.runtime.backends.cuda import Cuda
    from kvexport.runtime.backends.ort_session import CUDA

    if CUDA not in onnxruntime.get_available_providers():
        raise CannotRunHere(
            "this ONNX Runtime was built without CUDA",
            got=f"onnxruntime {onnxruntime.__version__} "
            f"with {', '.join(onnxruntime.get_available_providers())}",
            fix=f"pip uninstall onnxruntime && {install_command('onnxruntime-gpu')}; or run on the CPU with --provider cpu",
        )
    return Provider("cuda", Cuda())


def _tensorrt(bundle: Bundle, *, host_code: bool = True) -> Provider:
    from kvexport.runtime.backends.cuda import Cuda

    device = Cuda()
    return Provider("tensorrt", device, find_engine(bundle, device, host_code=host_code))
