"""kvexport: trained decoders with a smaller KV cache, exported to ONNX and validated against PyTorch.

Importing the package needs numpy alone; everything else is imported when a public name is first used.
Warnings go to the logger "kvexport".
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from kvexport.version import __version__

# ONNX Runtime's packages send usage data from version 1.29 on, unless this is set before they are imported
# (docs/Privacy.md there). ORT_DISABLE_TELEMETRY=0 in the environment allows it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
logging.getLogger("kvexport").addHandler(logging.NullHandler())  # silent until the application adds a handler

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
