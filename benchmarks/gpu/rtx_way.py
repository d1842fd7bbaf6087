"""Build one engine with TensorRT-RTX in one way, without kvexport's checks, and try to load it on this GPU.

`kvexport engine` rejects GPUs that TensorRT-RTX has no name for; this script lets TensorRT-RTX decide, with
kvexport's graph and profiles. It is a process of its own, since the library may crash on a GPU that it does
not support. Ways:
  portable   no compute capability is given, which is TensorRT-RTX's default
  current    ComputeCapability.CURRENT
  SM89 ...   ComputeCapability.SM89 ...
The plan goes to BUNDLE/engines/WAY with a record that names this GPU, so that kvexport's runtime tries it.

    python rtx_way.py BUNDLE WAY LOWERING COMPUTE_CAPABILITY RESULT
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from kvexport import __version__
from kvexport.bundle import DATA_FILE, GRAPH_FILE, Bundle
from kvexport.bundle.engine_record import (
    PLAN_FILE,
    BuildRecord,
    PlanFile,
    Profile,
    engine_directory,
    write_record,
)
from kvexport.engine.destination import Destination
from kvexport.engine.engine_graph import prepare_graph
from kvexport.engine.library import load_library
from kvexport.engine.options import EngineOptions
from kvexport.engine.plan import count_layers, create_config, parse
from kvexport.graph.lint import Parser

_CHUNK = 128
_MESSAGES = 30


def main() -> None:
    path, way, lowering, capability, result = Path(sys.argv[1]), *sys.argv[2:5], Path(sys.argv[5])
    found: dict[str, Any] = {"way": way, "lowering": lowering, "built": False, "loads": None}

    def save() -> None:
        result.write_text(json.dumps(found) + "\n", encoding="utf-8")

    library = load_library("tensorrt-rtx")
    from polygraphy.logger import G_LOGGER

    trt, log = library.trt, full_log(library.trt)
    found["version"] = str(trt.__version__)
    found["messages"] = log.messages
    bundle = Bundle.open(path)
    chunk = min(_CHUNK, bundle.capacity)
    fitted = prepare_graph(
        path / GRAPH_FILE,
        Parser(library.engine, library.version),
        batch=1,
        capacity=bundle.capacity,
        lowering=lowering,
    )
    profiles = (Profile("decode", (1, 1, min(2, chunk))), Profile("prefill", (1, chunk, chunk)))
    begin = time.monotonic()
    builder, network, _parser = parse(
        type(library)(library.engine, trt, library.version, log), fitted.model, path / GRAPH_FILE
    )
    everywhere = Destination(way, library.engine, (), True)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        config = create_config(library, builder, network, profiles, EngineOptions(), everywhere, b"", None)
    if way != "portable":
        name = "CURRENT" if way == "current" else way
        config.num_compute_capabilities = 1
        found["capability_taken"] = bool(
            config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
        )
    save()
    serialized = builder.build_serialized_network(network, config)
    found["seconds"] = round(time.monotonic() - begin, 1)
    if serialized is None:
        save()
        sys.exit(1)
    view = memoryview(serialized)
    folder = engine_directory(path, way)
    folder.mkdir(parents=True)
    (folder / PLAN_FILE).write_bytes(view)
    record = BuildRecord(
        kvexport=__version__,
        manifest_sha256=bundle.digest,
        target=way,
        engine=library.engine,
        version=found["version"],
        lowering=lowering,
        compute_capability=(capability,),
        dtype=bundle.dtype,
        batch=1,
        capacity=bundle.capacity,
        chunk=chunk,
        profiles=profiles,
        decomposed=(),
        options=EngineOptions().to_record(),
        plan=PlanFile(hashlib.sha256(view).hexdigest(), view.nbytes),
        layers=count_layers(network),
        weights_bytes=bundle.files[DATA_FILE].bytes,
        activation_bytes=None,
        timing_cache_bytes=0,
        peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        seconds=found["seconds"],
    )
    write_record(folder, record)
    found |= {"built": True, "plan_bytes": view.nbytes}
    save()
    runtime = trt.Runtime(log)
    if hasattr(runtime, "get_engine_validity"):
        validity, why = runtime.get_engine_validity(serialized)
        found["validity"] = str(validity).rpartition(".")[2]
        found["invalid_because"] = [
            name for name, bit in trt.EngineInvalidityDiagnostics.__members__.items() if int(bit) & int(why)
        ]
    save()
    found["loads"] = runtime.deserialize_cuda_engine(serialized) is not None
    save()


def full_log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps warnings and errors word by word."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            matters = severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING)
            if matters and len(self.messages) < _MESSAGES:
                self.messages.append(f"{severity.name}: {message}")

    return Log()


if __name__ == "__main__":
    main()
