"""kvexport: trained decoders with fewer KV heads, exported to ONNX, proved against PyTorch.

This front door knows the public names and nothing of how they work; every heavy import waits until a
name is first used, so that ``import kvexport`` needs numpy alone.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from kvexport.version import __version__

# ONNX Runtime's packages from 1.29 on send usage data to their maker, and keep some in the user's folder,
# unless the environment forbids it before they are imported (docs/Privacy.md there). ORT_DISABLE_TELEMETRY=0
# allows it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from kvexport.runtime import Cache, Generation, Session
    from kvexport.runtime import open_bundle as open
    from kvexport.runtime.self_test.verdict import self_test

__all__ = ["Cache", "Generation", "Session", "__version__", "open", "self_test"]


def __getattr__(name: str) -> Any:
    if name == "open":
        from kvexport.runtime import open_bundle

        return open_bundle
    if name == "self_test":
        from kvexport.runtime.self_test.verdict import self_test

        return self_test
    if name in ("Cache", "Generation", "Session"):
        import kvexport.runtime

        return getattr(kvexport.runtime, name)
    raise AttributeError(f"module 'kvexport' has no attribute {name!r}")
