"""From a checkpoint to the neutral decoder: a family's description applied to a checkpoint's files.

Knows which tensors a config promises, undoes fused layouts, and fails if a tensor was not consumed;
must not know what is done with the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvexport.checkpoint import Checkpoint
from kvexport.decoder import Activation, Attention, Decoder, Embedding, Layer, LazyLayers, Limits, Linear, Mlp, Norm, Rope
from kvexport.errors import CheckpointError
from kvexport.families import Family, family_of

if TYPE_CHECKING:
    import torch

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip
_MOST = 2**24  # of any whole number in a config.json; the longest published context is 10 million tokens
_LAYER_KINDS = ("full_attention", "sliding_attention")


def load_decoder(path: Path | str | Checkpoint, dtype: torch.dtype | None = None) -> Decoder:
    """A checkpoint as a decoder whose layers are read when asked for; leaves are `dtype` (default float32).

    Raises:
        CheckpointError: unknown family, missing, unexpected or unusable tensors, unsupported settings.
    """
    import torch

    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(Path(path))
    return _Loader(checkpoint, family_of(checkpoint.config), dtype or torch.float32).decoder()


@dataclass(frozen=True)
class ConfigSizes:
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int | None


class _Loader:
    def __init__(self, checkpoint: Checkpoint, family: Family, dtype: torch.dtype) -> None:
        self._checkpoint, self._family, self._dtype = checkpoint, family, dtype
        self._config = checkpoint.config
        refuse_quantised(self._config)
        settings = family.settings(self._config)
        self._sizes = sizes_of(settings, rotated=family.position == "rope")
        self._rope = rope_of(self._config, self._sizes.head_dim) if family.position == "rope" else None
        self._windows = [self._window(index) for index in range(self._sizes.layers)]
        self._eps, self._tied = _number("norm_eps", settings["norm_eps"]), bool(settings["tied"])
        self._activation = _activation(settings["activation"])
        self._intermediate = self._intermediate_size()
        self._prefix = self._find_prefix()
        self._refuse_other_tensors()

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
            elif f"{names.head}.weight" in self._checkpoint.files and not self._head().weight.equal(embedding.weight):
                raise CheckpointError(
                    f"config.json says that the head is the embedding (tied), but {names.head}.weight holds other numbers",
                    fix="set tie_word_embeddings to false in config.json if the model has its own head, else remove the tensor",
                )
            final_norm = self._norm(names.final_norm, sizes.hidden)
        bos = self._checkpoint.token_ids("bos_token_id", sizes.vocab)
        return Decoder(
            embedding=embedding,
            layers=LazyLayers(sizes.layers, self._layer),
            final_norm=final_norm,
            head=head,
            rope=self._rope,
            limits=Limits(sizes.vocab, sizes.hidden, sizes.max_positions),
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
                    o=self._linear(name["o"], sizes.hidden, heads_width, self._family.has_bias("o", self._config)),
                    num_heads=sizes.heads,
                    num_kv_heads=sizes.kv_heads,
                    head_dim=sizes.head_dim,
                    scale=1 / math.sqrt(sizes.head_dim),
                    position="rope" if self._family.position == "rope" else "alibi",
                    q_norm=self._norm(name["q_norm"], sizes.head_dim) if has_qk_norm else None,
                    k_norm=self._norm(name["k_norm"], sizes.head_dim) if has_qk_norm else None,
                    alibi_slopes=alibi_slopes(sizes.heads, self._dtype) if self._family.position == "alibi" else None,
                    window=self._windows[index],
                ),
                mlp_norm=self._norm(name["mlp_norm"], sizes.hidden),
                mlp=Mlp(
                    gate=self._linear(name["gate"], inner, sizes.hidden, mlp_bias) if self._family.gated else None,
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
        fused = self._linear(name["qkv"], 3 * sizes.heads * sizes.head_dim, sizes.hidden, bias)  # [heads, 3, head_dim]
        weight = fused.weight.view(sizes.heads, 3, sizes.head_dim, sizes.hidden)
        vector = None if fused.bias is None else fused.bias.view(sizes.heads, 3, sizes.head_dim)

        def part(which: int) -> Linear:
            rows = weight[:, which].reshape(-1, sizes.hidden)
            return Linear(rows, None if vector is None else vector[:, which].reshape(-1))

        return part(0), part(1), part(2)

    def _head(self) -> Linear:  # never under the prefix
        name = self._family.head + ".weight"
        return Linear(self._checkpoint.tensor(name, (self._sizes.vocab, self._sizes.hidden), self._dtype))

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._checkpoint.tensor(self._prefix + name, shape, self._dtype)

    def _linear(self, name: str, out: int, into: int, bias: bool) -> Linear:
        return Linear(self._tensor(name + ".weight", (out, into)), self._tensor(name + ".bias", (out,)) if bias else None)

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
        size = self._said(described.size)
        if size is None:
            return None
        if described.first_layer is not None:
            kinds = self._config.get("layer_types")
            if kinds is None:
                windowed = index >= whole_number(described.first_layer, self._said(described.first_layer), least=0)
            elif isinstance(kinds, list) and len(kinds) == self._sizes.layers and kinds[index] in _LAYER_KINDS:
                windowed = kinds[index] == "sliding_attention"
            else:
                raise CheckpointError(
                    "config.json's layer_types is not understood",
                    seen=repr(kinds),
                    allowed=f"a list of {self._sizes.layers}, each {' or '.join(_LAYER_KINDS)}",
                )
            if not windowed:
                return None
        return whole_number(described.size, size)

    def _said(self, key: str) -> Any:
        """A value that must be in config.json, because no guess is safe."""
        if key not in self._config:
            raise CheckpointError(f"config.json lacks {key}", fix="restore the model's own config.json")
        return self._config[key]

    def _intermediate_size(self) -> int:
        """Width of the MLP: the config's, or where a family has no key for it, four times the hidden size."""
        said = self._config.get("intermediate_size")
        return 4 * self._sizes.hidden if said is None else whole_number("intermediate_size", said)

    def _find_prefix(self) -> str:
        for prefix in self._family.prefixes:
            if f"{prefix}{self._family.embedding}.weight" in self._checkpoint.files:
                return prefix
        raise CheckpointError(
            f"the checkpoint lacks its embedding, tensor {self._family.prefixes[0]}{self._family.embedding}.weight",
            seen=", ".join(sorted(self._checkpoint.files)[:3]) + ", ...",
            fix=f"check that config.json's model_type ({self._config.get('model_type')}) is right",
        )

    def _refuse_other_tensors(self) -> None:
        """Unless the checkpoint holds exactly the tensors that its config promises: found out before any is read."""
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
                f"{len(extra)} tensors of the checkpoint are not known to family '{self._family.name}', so it is not that model",
                seen=", ".join(extra[:5]) + (", ..." if len(extra) > 5 else ""),
                fix="correct config.json, or describe the family in one new file under graphs/families/",
            )
        missing = sorted(expected - self._checkpoint.files.keys())
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} tensors that config.json promises",
                seen="no " + ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else ""),
                fix="download the checkpoint again, or correct config.json",
            )

    def _expected(self) -> list[str]:
        """The name of every tensor that the config promises."""
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


def whole_number(name: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise CheckpointError(
            f"config.json gives an impossible {name}", seen=f"{value!r:.60}", allowed=f"a whole number from {least} to {_MOST}"
        )
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:  # an int may be beyond any float
        raise CheckpointError(f"config.json gives an impossible {name}", seen=repr(value), allowed="a number above 0")
    return float(value)


def _activation(said: object) -> Activation:
    if not isinstance(said, str) or said not in _ACTIVATIONS:
        raise CheckpointError(
            "config.json names an activation that is not known", seen=repr(said), allowed=", ".join(_ACTIVATIONS)
        )
    return _ACTIVATIONS[said]


def refuse_quantised(config: Mapping[str, Any]) -> None:
    said = config.get("quantization_config")
    if said:
        method = said.get("quant_method") if isinstance(said, dict) else said
        raise CheckpointError(
            "the checkpoint is quantised (config.json has quantization_config)",
            seen=f"quant_method = {method!r}",
            allowed="weights in float32, float16 or bfloat16",
            fix="start from the checkpoint that it was quantised from; kvexport compresses first and quantises after",
        )


def sizes_of(settings: Mapping[str, Any], rotated: bool) -> ConfigSizes:
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions"):
        whole_number(name, settings.get(name, 1))
    heads = settings["num_heads"]
    kv_heads = settings.get("num_kv_heads", heads)
    head_dim = settings.get("head_dim", settings["hidden_size"] // heads)
    if heads % kv_heads:
        raise CheckpointError(
            "num_key_value_heads does not divide num_attention_heads", seen=f"{kv_heads} of {heads}", fix="correct config.json"
        )
    if head_dim < 1 or (rotated and head_dim % 2):
        raise CheckpointError(
            "config.json gives an impossible head_dim", seen=head_dim, allowed="an even number" if rotated else "1 or more"
        )
    return ConfigSizes(
        settings["vocab_size"], settings["hidden_size"], settings["num_layers"], heads, kv_heads, head_dim,
        settings.get("max_positions"),
    )  # fmt: skip


def rope_of(config: Mapping[str, Any], head_dim: int) -> Rope:
    """Rotary frequencies of a config, in its old (`rope_theta`, `rope_scaling`) or new (`rope_parameters`) form.

    Raises:
        CheckpointError: a scaling other than default, linear or llama3, one for each kind of layer, or a
            part of head_dim only.
    """
    import torch

    said = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(said, dict) or any(isinstance(value, dict) for value in said.values()):
        raise CheckpointError("config.json's rotary settings are not one table for all layers", seen=repr(said))
    outside = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}  # where old configs have them
    said = {key: value for key, value in {**outside, **said}.items() if value is not None}
    theta = _number("rope_theta", said.get("rope_theta", 10000.0))
    kind = said.get("rope_type", said.get("type", "default"))
    if _number("partial_rotary_factor", said.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError(
            "config.json rotates only a part of each head",
            seen=f"partial_rotary_factor = {said['partial_rotary_factor']}",
            allowed="partial_rotary_factor = 1",
        )
    inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    try:
        if kind == "linear":
            inv_freq = inv_freq / _number("factor", said["factor"])
        elif kind == "llama3":
            inv_freq = _llama3_frequencies(inv_freq, said)
        elif kind != "default":
            raise CheckpointError(
                "config.json asks for a rotary scaling that is not known",
                seen=f"rope_type = {kind!r}",
                allowed="default, linear, llama3",
            )
    except KeyError as error:
        raise CheckpointError(f"rope_type {kind!r} needs {error.args[0]}, which config.json lacks") from error
    return Rope(inv_freq)


def _llama3_frequencies(inv_freq: torch.Tensor, said: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1's scaling: slow pairs are slowed by `factor`, fast ones kept, those between interpolated.

    The float32 operations and their order are those of transformers, so that the tables agree to the bit.
    """
    import torch

    low, high = _number("low_freq_factor", said["low_freq_factor"]), _number("high_freq_factor", said["high_freq_factor"])
    factor = _number("factor", said["factor"])
    context = whole_number("original_max_position_embeddings", said["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inv_freq  # positions per turn
    is_slow, is_fast = wavelength > context / low, wavelength < context / high
    slowed = torch.where(is_slow, inv_freq / factor, inv_freq)
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * slowed / factor + smooth * slowed
    return torch.where(is_slow | is_fast, slowed, between)


def alibi_slopes(num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """ALiBi's slope of each head (arXiv 2108.12409, section 3): 2^(-8i/n), interleaved where n is no power of two.

    Powers of a float32 base, as transformers takes them, so that the slopes agree to the bit.
    """
    import torch

    def powers(exponent: float, exponents: torch.Tensor) -> torch.Tensor:
        return torch.pow(torch.tensor(2.0**exponent, dtype=torch.float32), exponents)

    power = 2 ** math.floor(math.log2(num_heads))
    slopes = powers(-8 / power, torch.arange(1, power + 1, dtype=torch.int32))
    extra = powers(-4 / power, 1 + 2 * torch.arange(num_heads - power, dtype=torch.int32))
    return torch.cat((slopes, extra)).to(dtype)
