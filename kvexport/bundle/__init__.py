"""The bundle format: manifest, graph inputs and outputs, text and self-test files, engine records."""

from kvexport.bundle.bundle import REPORT_FILE, TOKENIZER_FILE, Bundle, BundleWriter, new_bundle
from kvexport.bundle.formats import BYTES
from kvexport.bundle.graph_io import DATA_FILE, GRAPH_FILE
from kvexport.bundle.manifest import FORMAT, MANIFEST_FILE

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
