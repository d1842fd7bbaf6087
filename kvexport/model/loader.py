"""Loader: a family's description applied to a checkpoint's files gives the neutral decoder.

The checkpoint must have exactly the tensors that its config implies.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from kvexport.errors import CheckpointError
from kvexport.model.architecture import Architecture, LayerKind, read_architecture
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.decoder import Decoder, Layer, LazyLayers, Linear, ModelDims, Rope, WeightCodes
from kvexport.model.layout import Layout
from kvexport.model.rope import alibi_slopes, make_rope

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def load_decoder(
    path: Path | str | Checkpoint,
    dtype: torch.dtype | None = None,
    context: int | None = None,
    *,
    codes: bool = False,
) -> Decoder:
    """Load a checkpoint as a decoder whose layers are loaded lazily.

    Args:
        path: directory of the checkpoint, or an opened one.
        dtype: data type of all leaves [default: float32].
        context: tokens of the longest sequence, which decides RoPE whose scaling depends on the length
            [default: all positions that the model supports].
        codes: whether linear maps of a quantised checkpoint have their codes, where these are exact; else
            they have floats alone.

    Raises:
        CheckpointError: the family is unknown, tensors are missing, unexpected or unusable, or a setting is
            not supported.
    """
    import torch

    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(Path(path))
    architecture = read_architecture(checkpoint.config)
    return _Loader(checkpoint, architecture, dtype or torch.float32, context, codes=codes).decoder()


class _Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        dtype: torch.dtype,
        context: int | None,
        *,
        codes: bool,
    ) -> None:
        self._checkpoint, self._architecture, self._dtype = checkpoint, architecture, dtype
        self._layout = Layout(architecture, self._codes if codes else None)
        self._context = context or architecture.max_positions or 1
        self._ropes: dict[LayerKind, Rope | None] = {kind: self._rope(kind) for kind in architecture.layers}
        self._slopes = self._alibi_slopes()
        names = architecture.family.names
        self._prefix = checkpoint.find_prefix(f"{names.embedding}.weight", names.prefixes)
        self._head_prefix = checkpoint.head_prefix(f"{names.head}.weight", self._prefix)
        self._require_expected_tensors()

    def decoder(self) -> Decoder:
        it, checkpoint = self._architecture, self._checkpoint
        with checkpoint.reading():
            ends = self._layout.unpack_ends(self._read_end)
            if it.tied and self._stored(f"{it.family.names.head}.weight") in checkpoint.quantized.names:
                self._require_tied(self._layout.unpack_head(self._read_end), ends.embedding.weight)
        bos = checkpoint.token_ids("bos_token_id", it.vocab_size)
        return Decoder(
            embedding=ends.embedding,
            layers=LazyLayers(len(it.layers), self._layer),
            final_norm=ends.final_norm,
            head=ends.head,
            dims=ModelDims(it.vocab_size, it.hidden_size, it.max_positions),
            output_projection=ends.output_projection,
            logit_multiplier=it.logit_multiplier,
            logit_softcap=it.logit_softcap,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=checkpoint.token_ids("eos_token_id", it.vocab_size),
        )

    def _layer(self, index: int) -> Layer:
        kind = self._architecture.layers[index]
        with self._checkpoint.reading():
            return self._layout.unpack_layer(index, self._read, self._ropes[kind], self._slopes)

    def _rope(self, kind: LayerKind) -> Rope | None:
        if kind.rope is None:
            return None
        return make_rope(kind.rope, self._architecture.head_dim, self._context)

    def _alibi_slopes(self) -> Tensor | None:
        it = self._architecture
        if it.family.position != "alibi":
            return None
        if it.family.alibi == "mpt":
            return alibi_slopes(it.num_heads, self._dtype, it.alibi_bias_max)
        slopes = alibi_slopes(it.num_heads, self._dtype)
        return slopes * it.scale if it.family.alibi == "scaled" else slopes

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored, family = self._stored(name), self._architecture.family
        transposed = family.transposed and name != f"{family.names.head}.weight"
        if transposed and stored in self._checkpoint.quantized:  # quantised weights are [out, in]
            return self._checkpoint.tensor(stored, shape[::-1], self._dtype).T
        return self._checkpoint.tensor(stored, shape, self._dtype)

    def _codes(self, name: str, shape: tuple[int, ...]) -> WeightCodes | str | None:
        return self._checkpoint.quantized.codes(self._stored(name), shape, self._dtype)

    def _read_end(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 2:
            return self._checkpoint.table(self._stored(name), shape, self._dtype)
        return self._read(name, shape)

    def _stored(self, name: str) -> str:
        return self._layout.stored(name, self._prefix, self._head_prefix)

    def _require_tied(self, head: Linear, embedding: Tensor) -> None:
        from kvexport.model.lazy_table import row_parts

        parts = zip(row_parts(head.weight), row_parts(embedding), strict=True)
        if not all(one.equal(other) for one, other in parts):
            name = self._architecture.family.names.head
            raise CheckpointError(
                f"{name}.weight must equal the embedding, because config.json ties them",
                fix="set tie_word_embeddings to false in config.json, or remove the tensor",
            )

    def _require_expected_tensors(self) -> None:
        """Raise CheckpointError unless the checkpoint has exactly the expected tensors."""
        it, found = self._architecture, self._checkpoint.quantized.names
        expected = {self._stored(name) for name in self._layout.shapes()}
        ignored = [self._prefix + pattern for pattern in it.family.names.ignored]
        if it.tied:
            ignored.append(self._stored(f"{it.family.names.head}.weight"))
        extra = [
            name
            for name in sorted(found)
            if name not in expected
            and not any(fnmatchcase(name, pattern) for pattern in ignored)
            and not self._checkpoint.quantized.is_empty_bias(name)
        ]
        if extra:
            raise CheckpointError(
                f"the checkpoint must contain only tensors of family '{it.family.name}': "
                f"{len(extra)} unknown",
                got=", ".join(extra[:5]) + (", ..." if len(extra) > 5 else ""),
                fix="correct config.json, or describe the family in one new file under graphs/families/",
            )
        missing = sorted(expected - found)
        if missing:
            raise CheckpointError(
                f"the checkpoint must contain all tensors that config.json implies: {len(missing)} missing",
                got="no " + ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else ""),
                fix="download the checkpoint again, or correct config.json",
            )
