"""The architecture that a config.json describes: sizes, features and the kind of each layer, without weights.

`kvexport build` and `kvexport plan` both read a config through `read_architecture`. No torch is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvexport.errors import CheckpointError
from kvexport.model.config import activation_of, flag, number, shown, whole_number
from kvexport.model.decoder import Activation
from kvexport.model.expressions import evaluate
from kvexport.model.families import description_of
from kvexport.model.family import Family, LayerRules
from kvexport.model.quantized.formats import stored_format
from kvexport.model.rope import LAYER_TYPES, RopeConfig, rope_configs
from kvexport.model.unsupported import require_dense_decoder

# Largest sizes that are read, several times those of published models.
_MOST = {"num_layers": 1024, "num_heads": 1024, "num_kv_heads": 1024, "head_dim": 4096, "hidden_size": 2**17}
_HAS_WINDOW = {"full_attention": False, "sliding_attention": True, "global": False, "local": True}


@dataclass(frozen=True)
class LayerKind:
    """What distinguishes a layer from the others.

    Attributes:
        window: sliding window in tokens; None: full attention.
        rope: None: the layer does not rotate.
    """

    window: int | None
    rope: RopeConfig | None


@dataclass(frozen=True)
class Architecture:
    """A decoder without its weights.

    Attributes:
        family: the description of its tensors.
        config: config.json, with the values that the model's class assumes for absent keys.
        vocab_size, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size: as in config.json.
        embedding_size: width of the token embedding; `hidden_size` without a projection.
        max_positions: tokens of a sequence that the model supports, scaled RoPE included; None: unbounded.
        layers: kind of each layer.
        tied: whether the head shares the embedding's weight.
        scale: factor of the products of queries and keys.
        rotary_dim: rotated numbers of each head; 0 without RoPE.
    """

    family: Family
    config: Mapping[str, Any]
    vocab_size: int
    hidden_size: int
    embedding_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int | None
    layers: tuple[LayerKind, ...]
    tied: bool
    norm_eps: float
    activation: Activation
    scale: float
    softcap: float | None
    clip: float | None
    alibi_bias_max: float
    embedding_multiplier: float
    residual_multiplier: float
    logit_multiplier: float
    logit_softcap: float | None
    rotary_dim: int


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a checkpoint from its config.json.

    Raises:
        CheckpointError: the model has a feature that is not supported, the family is unknown, weights are
            quantised in a format that is not read, or a setting is missing, impossible or not supported.
    """
    require_dense_decoder(config)
    description = description_of(config)
    stored_format(config)  # refuses those that are not read
    family, complete = description.resolve(config), description.complete(config)
    settings = _Settings(family.settings(complete), family)
    hidden, heads = settings.whole("hidden_size"), settings.whole("num_heads")
    kv_heads, head_dim = settings.whole("num_kv_heads", heads), settings.whole("head_dim", hidden // heads)
    if not head_dim:
        raise CheckpointError(
            "hidden_size in config.json must be at least num_attention_heads",
            got=f"{hidden} and {heads}",
            fix="correct config.json",
        )
    for which in family.bias:
        family.has_bias(which, complete)  # raises if it is not known
    if heads % kv_heads:
        raise CheckpointError(
            "num_key_value_heads must divide num_attention_heads",
            got=f"{kv_heads} of {heads}",
            fix="correct config.json",
        )
    if family.fused == "four_blocks" and heads % 4:
        raise CheckpointError(
            f"heads of family '{family.name}' must be a multiple of 4, because its fused matrix has 4 blocks",
            got=heads,
            fix="correct config.json",
        )
    positions = settings.whole("max_positions", None if family.position == "learned" else 0) or None
    ropes: Mapping[str, RopeConfig] = {}
    if family.position == "rope":
        if head_dim % 2:
            raise CheckpointError(
                "head_dim in config.json must be possible", got=head_dim, expected="an even number"
            )
        ropes = rope_configs(
            complete,
            head_dim,
            theta=settings.positive("rope_theta") or 10000.0,
            fraction=settings.positive("rotary_fraction"),
            local_theta=settings.positive("local_rope_theta"),
            max_positions=positions,
        )
        if len({rope.rotary_dim for rope in ropes.values()}) > 1:
            raise CheckpointError(
                "partial_rotary_factor in config.json must be the same for all types of layers",
                got=", ".join(f"{rope.rotary_dim} of {head_dim} in {kind}" for kind, rope in ropes.items()),
            )
        rotated = ropes["full_attention"].rotary_dim
        if rotated != head_dim and "rotary_fraction" not in {**family.config, **family.defaults}:
            raise CheckpointError(
                f"partial_rotary_factor in config.json must be absent or 1, because family '{family.name}' "
                "rotates whole heads",
                got=f"{rotated} of {head_dim} numbers of a head",
            )
    layers = _layers(family, complete, settings.whole("num_layers"), ropes)
    reaches = [each.rope.reach(positions) for each in set(layers) if each.rope is not None]
    bounded = [each for each in reaches if each is not None]
    positions = min(bounded) if bounded else positions
    scale = settings.positive("attention_scale")
    return Architecture(
        family=family,
        config=complete,
        vocab_size=settings.whole("vocab_size"),
        hidden_size=hidden,
        embedding_size=settings.whole("embedding_size", hidden),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=settings.whole("intermediate_size", 4 * hidden),
        max_positions=positions,
        layers=layers,
        tied=settings.boolean("tied"),
        norm_eps=number("the epsilon of norms", settings.value("norm_eps")),
        activation=activation_of(settings.value("activation")),
        scale=1 / math.sqrt(head_dim) if scale is None else scale,
        softcap=settings.positive("softcap"),
        clip=settings.positive("clip"),
        alibi_bias_max=settings.positive("alibi_bias_max") or 8.0,
        embedding_multiplier=settings.positive("embedding_multiplier") or 1.0,
        residual_multiplier=settings.positive("residual_multiplier") or 1.0,
        logit_multiplier=settings.positive("logit_multiplier") or 1.0,
        logit_softcap=settings.positive("logit_softcap"),
        rotary_dim=ropes["full_attention"].rotary_dim if ropes else 0,
    )


class _Settings:
    """A family's settings, checked when they are read; errors name the keys of config.json."""

    def __init__(self, values: Mapping[str, Any], family: Family) -> None:
        self._values, self._family = values, family

    def value(self, name: str) -> Any:
        return self._values.get(name)

    def whole(self, name: str, default: int | None = None) -> int:
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, float) and value.is_integer() and not self._is_plain(name):
            value = int(value)  # of an expression
        return whole_number(self._key(name), value, most=_MOST.get(name))

    def positive(self, name: str) -> float | None:
        """A positive number, or None."""
        value = self._values.get(name)
        return None if value is None else number(self._key(name), value)

    def boolean(self, name: str) -> bool:
        value = self._values.get(name)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self._key(name)} in config.json must be true or false", got=shown(value))
        return value

    def _key(self, name: str) -> str:
        return " or ".join(self._family.config.get(name, (name,)))

    def _is_plain(self, name: str) -> bool:
        return all(each.isidentifier() for each in self._family.config.get(name, ()))


def _layers(
    family: Family, config: Mapping[str, Any], count: int, ropes: Mapping[str, RopeConfig]
) -> tuple[LayerKind, ...]:
    rules = family.layers
    window = _window(rules, config)
    sliding = [False] * count if window is None else _sliding(rules, config, count)
    rotating = _rotating(rules, config, count, sliding, has_window=window is not None)

    def kind(index: int) -> LayerKind:
        layer_type = LAYER_TYPES[sliding[index]]
        return LayerKind(window if sliding[index] else None, ropes[layer_type] if rotating[index] else None)

    return tuple(kind(index) for index in range(count))


def _window(rules: LayerRules, config: Mapping[str, Any]) -> int | None:
    if rules.window is None or (rules.switch is not None and not _is_on(rules.switch, config)):
        return None
    if rules.window.isidentifier() and rules.window not in config:
        raise CheckpointError(
            f"config.json must have {rules.window}", fix="restore the model's own config.json"
        )
    size = evaluate(rules.window, config)
    return None if size is None else whole_number(rules.window, size)


def _is_on(switch: str, config: Mapping[str, Any]) -> bool:
    """Whether windows are on: true, or a number that is not 0."""
    value = evaluate(switch, config)
    return value > 0 if type(value) in (int, float) else flag(switch, value)


def _sliding(rules: LayerRules, config: Mapping[str, Any], count: int) -> list[bool]:
    """Whether each layer has the window."""
    types = None if rules.types is None else evaluate(rules.types, config)
    if types is not None:
        if (
            not isinstance(types, list)
            or len(types) != count
            or any(not isinstance(each, str) or each not in _HAS_WINDOW for each in types)
        ):
            raise CheckpointError(
                f"{rules.types} of config.json must list the kind of each layer",
                got=shown(types),
                expected=f"a list of {count}, each one of {', '.join(_HAS_WINDOW)}",
            )
        return [_HAS_WINDOW[each] for each in types]
    if rules.pattern is not None:
        every = evaluate(rules.pattern, config)
        if isinstance(every, str) and every and set(every) <= set("LG"):  # EXAONE 4: local and global
            return [every[index % len(every)] == "L" for index in range(count)]
        if every is not None:
            period = whole_number(rules.pattern, every)
            return [bool((index + 1) % period) for index in range(count)]
    needed = rules.first or rules.pattern or rules.types
    if needed is None:
        return [True] * count
    if rules.first is None or (rules.first.isidentifier() and rules.first not in config):
        raise CheckpointError(f"config.json must have {needed}", fix="restore the model's own config.json")
    first = whole_number(rules.first, evaluate(rules.first, config), least=0)
    return [index >= first for index in range(count)]


def _rotating(
    rules: LayerRules, config: Mapping[str, Any], count: int, sliding: list[bool], *, has_window: bool
) -> list[bool]:
    """Whether each layer rotates."""
    if rules.rotated is None:
        return [False] * count
    if rules.rotation is not None:
        listed = evaluate(rules.rotation, config)
        if listed is not None:
            if (
                not isinstance(listed, list)
                or len(listed) != count
                or any(each not in (0, 1) for each in listed)
            ):
                raise CheckpointError(
                    f"{rules.rotation} of config.json must have a number for each layer",
                    got=shown(listed),
                    expected=f"a list of {count}, 1 where a layer rotates and 0 elsewhere",
                )
            return [bool(each) for each in listed]
    if rules.rotation_interval is not None:
        every = whole_number(rules.rotation_interval, evaluate(rules.rotation_interval, config))
        return [bool((index + 1) % every) for index in range(count)]
    return list(sliding) if rules.rotated == "sliding" and has_window else [True] * count
