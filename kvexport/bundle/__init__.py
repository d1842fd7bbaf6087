"""The bundle format: manifest, graph inputs and outputs, text and self-test files, engine records."""

from kvexport.bundle.bundle import (
    BYTES,
    DATA_FILE,
    FORMAT,
    GRAPH_FILE,
    MANIFEST_FILE,
    REPORT_FILE,
    TOKENIZER_FILE,
    Bundle,
    BundleWriter,
    new_bundle,
)

__all__ = [
    "BYTES",
    "DATA_FILE",
    "FORMAT",
    "GRAPH_FILE",
    "MANIFEST_FILE",
    "REPORT_FILE",
    "TOKENIZER_FILE",
    "Bundle",
    "BundleWriter",
    "new_bundle",
]
