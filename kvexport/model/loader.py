"""Loader: a family's description applied to a checkpoint's files gives the neutral decoder.

Fused layouts are split. The checkpoint must have exactly the tensors that its config implies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvexport.errors import CheckpointError
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.config import activation_of, number, require_unquantised, sizes_of, whole_number
from kvexport.model.decoder import (
    Attention,
    Decoder,
    Embedding,
    Layer,
    LazyLayers,
    Linear,
    Mlp,
    ModelDims,
    Norm,
)
from kvexport.model.families import Family, family_of
from kvexport.model.rope import alibi_slopes, rope_of

if TYPE_CHECKING:
    import torch

_LAYER_KINDS = ("full_attention", "sliding_attention")


def load_decoder(path: Path | str | Checkpoint, dtype: torch.dtype | None = None) -> Decoder:
    """Load a checkpoint as a decoder whose layers are loaded lazily.

    Args:
        path: directory of the checkpoint, or an opened one.
        dtype: data type of all leaves [default: float32].

    Raises:
        CheckpointError: the family is unknown, tensors are missing, unexpected or unusable, or a setting is
            not supported.
    """
    import torch

    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(Path(path))
    return _Loader(checkpoint, family_of(checkpoint.config), dtype or torch.float32).decoder()


class _Loader:
    def __init__(self, checkpoint: Checkpoint, family: Family, dtype: torch.dtype) -> None:
        self._checkpoint, self._family, self._dtype = checkpoint, family, dtype
        self._config = checkpoint.config
        require_unquantised(self._config)
        settings = family.settings(self._config)
        self._sizes = sizes_of(settings, rotated=family.position == "rope")
        self._rope = rope_of(self._config, self._sizes.head_dim) if family.position == "rope" else None
        self._windows = [self._window(index) for index in range(self._sizes.layers)]
        self._eps, self._tied = number("norm_eps", settings["norm_eps"]), bool(settings["tied"])
        self._activation = activation_of(settings["activation"])
        self._intermediate = self._intermediate_size()
        self._prefix = self._find_prefix()
        self._require_expected_tensors()

    def decoder(self) -> Decoder:
        sizes, names = self._sizes, self._family
        with self._checkpoint.reading():
            embedding = Embedding(
                self._tensor(names.embedding + ".weight", (sizes.vocab, sizes.hidden)),
                None if names.embedding_norm is None else self._norm(names.embedding_norm, sizes.hidden),
            )
            head = None
            if not self._tied:
                head = self._head()
            elif f"{names.head}.weight" in self._checkpoint.files and not self._head().weight.equal(
                embedding.weight
            ):
                raise CheckpointError(
                    f"{names.head}.weight must equal the embedding, because config.json ties them",
                    fix="set tie_word_embeddings to false in config.json, or remove the tensor",
                )
            final_norm = self._norm(names.final_norm, sizes.hidden)
        bos = self._checkpoint.token_ids("bos_token_id", sizes.vocab)
        return Decoder(
            embedding=embedding,
            layers=LazyLayers(sizes.layers, self._layer),
            final_norm=final_norm,
            head=head,
            dims=ModelDims(sizes.vocab, sizes.hidden, sizes.max_positions),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=self._checkpoint.token_ids("eos_token_id", sizes.vocab),
        )

    def _layer(self, index: int) -> Layer:
        sizes = self._sizes
        name = {key: template.format(i=index) for key, template in self._family.layer.items()}
        mlp_bias = self._family.has_bias("mlp", self._config)
        inner, heads_width = self._intermediate, sizes.heads * sizes.head_dim
        with self._checkpoint.reading():
            q, k, v = self._qkv(name)
            has_qk_norm = "q_norm" in name
            return Layer(
                attention_norm=self._norm(name["attention_norm"], sizes.hidden),
                attention=Attention(
                    q=q,
                    k=k,
                    v=v,
                    o=self._linear(
                        name["o"], sizes.hidden, heads_width, self._family.has_bias("o", self._config)
                    ),
                    num_heads=sizes.heads,
                    num_kv_heads=sizes.kv_heads,
                    head_dim=sizes.head_dim,
                    scale=1 / math.sqrt(sizes.head_dim),
                    rope=self._rope,
                    q_norm=self._norm(name["q_norm"], sizes.head_dim) if has_qk_norm else None,
                    k_norm=self._norm(name["k_norm"], sizes.head_dim) if has_qk_norm else None,
                    alibi_slopes=alibi_slopes(sizes.heads, self._dtype)
                    if self._family.position == "alibi"
                    else None,
                    window=self._windows[index],
                ),
                mlp_norm=self._norm(name["mlp_norm"], sizes.hidden),
                mlp=Mlp(
                    gate=self._linear(name["gate"], inner, sizes.hidden, mlp_bias)
                    if self._family.gated
                    else None,
                    up=self._linear(name["up"], inner, sizes.hidden, mlp_bias),
                    down=self._linear(name["down"], sizes.hidden, inner, mlp_bias),
                    activation=self._activation,
                ),
            )

    def _qkv(self, name: Mapping[str, str]) -> tuple[Linear, Linear, Linear]:
        sizes, bias = self._sizes, self._family.has_bias("qkv", self._config)
        if self._family.layout == "split":
            rows = {"q": sizes.heads, "k": sizes.kv_heads, "v": sizes.kv_heads}
            q, k, v = (self._linear(name[n], rows[n] * sizes.head_dim, sizes.hidden, bias) for n in "qkv")
            return q, k, v
        # rows are [heads, 3, head_dim]
        fused = self._linear(name["qkv"], 3 * sizes.heads * sizes.head_dim, sizes.hidden, bias)
        weight = fused.weight.view(sizes.heads, 3, sizes.head_dim, sizes.hidden)
        vector = None if fused.bias is None else fused.bias.view(sizes.heads, 3, sizes.head_dim)

        def part(which: int) -> Linear:
            rows = weight[:, which].reshape(-1, sizes.hidden)
            return Linear(rows, None if vector is None else vector[:, which].reshape(-1))

        return part(0), part(1), part(2)

    def _head(self) -> Linear:  # its name has no prefix
        name = self._family.head + ".weight"
        return Linear(self._checkpoint.tensor(name, (self._sizes.vocab, self._sizes.hidden), self._dtype))

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._checkpoint.tensor(self._prefix + name, shape, self._dtype)

    def _linear(self, name: str, out: int, into: int, bias: bool) -> Linear:
        return Linear(
            self._tensor(name + ".weight", (out, into)),
            self._tensor(name + ".bias", (out,)) if bias else None,
        )

    def _norm(self, name: str, width: int) -> Norm:
        is_layer = self._family.norm_kind == "layer"
        return Norm(
            "layer" if is_layer else "rms",
            self._tensor(name + ".weight", (width,)),
            self._tensor(name + ".bias", (width,)) if is_layer else None,
            self._eps,
        )

    def _window(self, index: int) -> int | None:
        described = self._family.window
        if described is None or self._config["model_type"] not in described.model_types:
            return None
        if described.enabled is not None and not self._config.get(described.enabled):
            return None
        size = self._required(described.size)
        if size is None:
            return None
        if described.first_layer is not None:
            kinds = self._config.get("layer_types")
            if kinds is None:
                windowed = index >= whole_number(
                    described.first_layer, self._required(described.first_layer), least=0
                )
            elif (
                isinstance(kinds, list) and len(kinds) == self._sizes.layers and kinds[index] in _LAYER_KINDS
            ):
                windowed = kinds[index] == "sliding_attention"
            else:
                raise CheckpointError(
                    "layer_types of config.json must list the kind of each layer",
                    got=repr(kinds),
                    expected=f"a list of {self._sizes.layers}, each {' or '.join(_LAYER_KINDS)}",
                )
            if not windowed:
                return None
        return whole_number(described.size, size)

    def _required(self, key: str) -> Any:
        """A value that config.json must have, because there is no safe default."""
        if key not in self._config:
            raise CheckpointError(f"config.json must have {key}", fix="restore the model's own config.json")
        return self._config[key]

    def _intermediate_size(self) -> int:
        """Width of the MLP: that of the config, or four times the hidden size if it has none."""
        size = self._config.get("intermediate_size")
        return 4 * self._sizes.hidden if size is None else whole_number("intermediate_size", size)

    def _find_prefix(self) -> str:
        for prefix in self._family.prefixes:
            if f"{prefix}{self._family.embedding}.weight" in self._checkpoint.files:
                return prefix
        raise CheckpointError(
            "the checkpoint must contain the embedding "
            f"{self._family.prefixes[0]}{self._family.embedding}.weight",
            got=", ".join(sorted(self._checkpoint.files)[:3]) + ", ...",
            fix=f"check that config.json's model_type ({self._config.get('model_type')}) is right",
        )

    def _require_expected_tensors(self) -> None:
        """Raise CheckpointError unless the checkpoint has exactly the expected tensors."""
        expected = set(self._expected())
        ignored = [self._prefix + pattern for pattern in self._family.ignored]
        if self._tied:
            ignored.append(f"{self._family.head}.weight")
        extra = [
            name
            for name in sorted(self._checkpoint.files)
            if name not in expected and not any(fnmatchcase(name, pattern) for pattern in ignored)
        ]
        if extra:
            raise CheckpointError(
                f"the checkpoint must contain only tensors of family '{self._family.name}': "
                f"{len(extra)} unknown",
                got=", ".join(extra[:5]) + (", ..." if len(extra) > 5 else ""),
                fix="correct config.json, or describe the family in one new file under graphs/families/",
            )
        missing = sorted(expected - self._checkpoint.files.keys())
        if missing:
            raise CheckpointError(
                f"the checkpoint must contain all tensors that config.json implies: {len(missing)} missing",
                got="no " + ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else ""),
                fix="download the checkpoint again, or correct config.json",
            )

    def _expected(self) -> list[str]:
        """Names of all tensors that the config implies."""
        family = self._family
        names: list[str] = [family.embedding + ".weight"]
        norms = [family.final_norm, *([family.embedding_norm] if family.embedding_norm else [])]
        for index in range(self._sizes.layers):
            for key, template in family.layer.items():
                name = template.format(i=index)
                if key.endswith("norm"):
                    norms.append(name)
                    continue
                names.append(name + ".weight")
                group = "o" if key == "o" else "qkv" if key in ("q", "k", "v", "qkv") else "mlp"
                if family.has_bias(group, self._config):
                    names.append(name + ".bias")
        for name in norms:
            names.append(name + ".weight")
            if family.norm_kind == "layer":
                names.append(name + ".bias")
        head = [] if self._tied else [family.head + ".weight"]
        return [self._prefix + name for name in names] + head
