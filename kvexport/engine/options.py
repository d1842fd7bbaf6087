"""What one may ask of a build, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

CHUNK = 128  # tokens per call of prefill, unless told


@dataclass(frozen=True)
class EngineOptions:
    """Of one build; None leaves a choice to the bundle or to TensorRT.

    Attributes:
        batch: sequences of each call.
        capacity: tokens that each may hold; None: the bundle's.
        chunk: tokens of the longest call; None: 128, or the capacity where that is less.
        workspace: most scratch memory of a kernel, in MiB.
        refit: leave the weights out of the plan; the runtime puts the bundle's in.
        version_compatible: the plan also loads in later TensorRT versions.
        hardware_compatible: the plan also runs on other desktop GPUs from Ampere on.
        optimization_level: 0 builds fastest, 5 searches longest.
        lowering: the form of the graph; None: the best that the parser imports.
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
        """Those that build.json does not already say."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("batch", "capacity", "chunk", "lowering")
        }
