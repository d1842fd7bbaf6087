"""Write the files of a bundle from converted layers that arrive one by one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvexport.build.conversion_job import ConversionJob
from kvexport.build.float16_overflow import float32_exceptions
from kvexport.build.hooks import BuildHooks
from kvexport.build.text_files import COPIED_FILES, write_text_files
from kvexport.bundle import DATA_FILE, TOKENIZER_FILE, BundleWriter
from kvexport.calibrate import PeakMeter
from kvexport.eviction.config import Eviction
from kvexport.graph import GRAPH_FILE, DecoderWriter, Float32Exceptions, write_lowered
from kvexport.model.decoder import Decoder, Layer
from kvexport.validate import ReferenceRecorder
from kvexport.validate.self_test_recorder import SelfTestRecorder
from kvexport.version import __version__

if TYPE_CHECKING:
    from kvexport.build.report import BuildReport
    from kvexport.bundle.formats import StoredWeights
    from kvexport.graph import GraphContract


class BundleExport:
    """Takes each converted layer once: it goes to the graph, the reference outputs and the self-test.

    Attributes:
        float32_parts: names of the parts of a float16 graph that are computed in float32; set by `write`.
    """

    def __init__(
        self,
        writer: BundleWriter,
        job: ConversionJob,
        decoder: Decoder,
        windows: Tensor,
        eviction: Eviction | None,
        layer_folder: Path,
        hooks: BuildHooks,
    ) -> None:
        """
        Args:
            decoder: the model whose embedding, final norm and head are written.
            windows: calibration windows [N, length] int64.
            layer_folder: an empty folder, which may be removed when `record_self_test` has returned.
        """
        dtype = job.options.dtype
        self._decoder = decoder
        self._writer, self._job, self._eviction, self._hooks = writer, job, eviction, hooks
        self._reference = ReferenceRecorder(decoder, windows, job.capacity, eviction)
        self._graph = DecoderWriter(
            writer.directory,
            dtype=dtype,
            capacity=job.capacity,
            dims=decoder.dims,
            embedding=decoder.embedding,
            eviction=eviction,
        )
        self._self_test = SelfTestRecorder(decoder, windows, job.capacity, eviction, dtype, layer_folder)
        self._peaks = PeakMeter(decoder, windows) if dtype == "float16" else None
        self.float32_parts: list[str] = []

    @property
    def weights(self) -> StoredWeights:
        """Formats of the weights, complete after `write`."""
        return self._graph.weights

    def add_layer(self, layer: Layer) -> None:
        """Run the next layer in PyTorch and write it to the graph."""
        self._reference.add_layer(layer)
        self._graph.add_layer(self._hooks.graph_layer(layer))
        self._self_test.add_layer(layer)
        if self._peaks is not None:
            self._peaks.add_layer(layer)

    def record_self_test(self) -> None:
        """Generate greedily with all layers, for the self-test."""
        with self._job.stages.timed("self-test"):
            self._self_test.record(self._job.progress)

    def write(self) -> GraphContract:
        """Write the graph, the reference outputs, the self-test and the text files."""
        job, writer, directory = self._job, self._writer, self._writer.directory
        decoder, progress = self._decoder, job.progress
        with job.stages.timed("write"), progress.stage("Writing the bundle", 4):
            self._reference.save(directory)
            progress.advance()
            exceptions = Float32Exceptions() if self._peaks is None else float32_exceptions(self._peaks)
            contract = self._graph.finish(decoder, exceptions)
            progress.advance()
            self._self_test.save(directory, writer.sha256(DATA_FILE), quantized=self.weights.is_quantized)
            progress.advance()
            write_lowered(directory / GRAPH_FILE, job.options.dtype)
            progress.advance()
            job.checkpoint.copy_tokenizer(directory, COPIED_FILES)
            if job.tokenizer is not None:
                (directory / TOKENIZER_FILE).write_bytes(job.tokenizer.encode())
            write_text_files(
                job.checkpoint.path,
                directory,
                capacity=job.capacity,
                vocab_size=decoder.dims.vocab_size,
                bos=decoder.bos_token_id,
                eos=decoder.eos_token_ids,
                progress=progress,
            )
        self.float32_parts = exceptions.names
        if exceptions.names:
            names = ", ".join(exceptions.names)
            progress.note(f"float16 would overflow in parts of this model; computed in float32: {names}")
        return contract

    def manifest(self, contract: GraphContract, report: BuildReport) -> dict[str, Any]:
        """The keys of manifest.json, without those that `BundleWriter.seal` adds."""
        job, decoder = self._job, self._decoder
        return {
            "kvexport": __version__,
            "source": {
                "name": report.source,
                "model_type": job.checkpoint.config["model_type"],
                "sha256": job.digest,
            },
            "calibration": job.calibration_record() if job.uses_text else None,
            "model": {
                "vocab_size": decoder.dims.vocab_size,
                "hidden_size": decoder.dims.hidden_size,
                "num_hidden_layers": len(report.layers),
                "max_position_embeddings": decoder.dims.max_positions,
                "bos_token_id": decoder.bos_token_id,
                "eos_token_ids": list(decoder.eos_token_ids),
                "tie_word_embeddings": decoder.head is None,
            },
            "dtype": job.options.dtype,
            "weights": self.weights.to_json(),
            "capacity": job.capacity,
            "eviction": None if self._eviction is None else self._eviction.to_json(),
            "layers": [asdict(layer) for layer in report.layers],
            "graph": contract.to_json(),
        }
