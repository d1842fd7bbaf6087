"""Options of an engine build."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvexport.bundle.graph_io import CHUNK

DEFAULT_CHUNK = CHUNK  # tokens of a prefill call


@dataclass(frozen=True)
class EngineOptions:
    """Options of one build. None leaves the choice to the bundle or to TensorRT.

    Attributes:
        batch: sequences of each call.
        capacity: largest number of tokens of a sequence; None: the bundle's.
        chunk: tokens of the longest call; None: 128, or less if the capacity or the eviction budget needs it.
        workspace: largest scratch memory of a kernel, in MiB; None: TensorRT's own limit.
        refit: leave the weights out of the plan; the runtime refits the plan with the bundle's.
        version_compatible: the plan also loads in later TensorRT versions.
        hardware_compatible: the plan also runs on other desktop GPUs from Ampere on.
        optimization_level: 0 (fastest build) to 5 (longest search); None: TensorRT's default.
        lowering: the form of the graph; None: the best one that the parser imports.
    """

    batch: int = 1
    capacity: int | None = None
    chunk: int | None = None
    workspace: int | None = None
    refit: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    optimization_level: int | None = None
    lowering: str | None = None

    def to_record(self) -> dict[str, Any]:
        """The options as build.json lists them: without those that it has as keys of their own."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("batch", "capacity", "chunk", "lowering")
        }
