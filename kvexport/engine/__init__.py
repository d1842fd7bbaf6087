"""The engine station: a bundle's graph, lowered, becomes a TensorRT plan beside it, built where it will run.

The front door. Knows the bundle and the graph; knows no torch and no Hugging Face, and runs nothing: running a plan is
the runtime's. TensorRT, polygraphy and the onnx packages are imported when a build begins.
"""

from __future__ import annotations

from kvexport.engine.record import BuildRecord, engine_directory, manifest_digest, read_record

__all__ = ["BuildRecord", "engine_directory", "manifest_digest", "read_record"]
