"""The conversion methods by name: which code each takes for keys and values, and whether W_O is refitted.

A table and how to read it; the mathematics is in `keys` and `values`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kvexport.calibrate import Moments, over_distances, over_positions
from kvexport.convert import keys, values
from kvexport.convert.apply import LayerCode
from kvexport.convert.codes import Code
from kvexport.convert.groups import Grouping, Shape
from kvexport.convert.losses import LayerLosses
from kvexport.convert.matching import Group, matched_groups, order_of
from kvexport.decoder import Attention, Rope
from kvexport.errors import UsageError

_NEAR = 16  # distances between query and key that codes which commute with RoPE are made for: most attention is near

Rule = Callable[[Moments, Attention, Grouping, int, int], Code]  # of one group, at one rank


@dataclass(frozen=True)
class Method:
    """One way to code a layer.

    Attributes:
        commutes: its key code commutes with RoPE.
        centred: what the code leaves of the mean value goes into the output bias.
        matched: heads are grouped by predicted loss; otherwise as they are.
        refit: W_O is fitted again to the converted layer's own head outputs.
    """

    name: str
    key: Rule
    value: Rule
    commutes: bool = False
    centred: bool = False
    matched: bool = False
    refit: bool = False


METHODS = {
    method.name: method
    for method in (
        Method("online", keys.online, values.weighted, centred=True, matched=True, refit=True),
        Method("fold", keys.fold, values.weighted, commutes=True, centred=True, matched=True, refit=True),
        Method("svd-a", keys.svd_a, values.svd_a),
        Method("svd-w", keys.svd_w, values.svd_w),
        Method("mean-pool", keys.mean_pool, values.mean_pool, commutes=True),
    )
}
BEST = "auto"  # each layer's better one of `online` and `fold`
METHOD_NAMES = (BEST, *METHODS)


@dataclass(frozen=True)
class Way:
    """How one layer is converted."""

    method: Method
    shape: Shape


def folds(method: Method, attention: Attention) -> bool:
    """Whether the method's key code goes into the weights: no norm between W_K and the cache, and no rotation
    that it does not commute with."""
    return attention.k_norm is None and (method.commutes or attention.position != "rope")


def methods_for(name: str, attention: Attention) -> tuple[Method, ...]:
    """What `--method NAME` leaves to choose from in this model: without rotation 'fold' is 'online', whose codes all fold.

    Raises:
        UsageError: no such method, or 'fold' for keys that are normalised after W_K.
    """
    if name not in METHOD_NAMES:
        raise UsageError("no such conversion method", seen=name, allowed=", ".join(METHOD_NAMES))
    if name == "fold" and attention.k_norm is not None:
        raise UsageError(
            "keys of this model are normalised between W_K and the cache (QK-norm), so no code folds into the weights",
            seen="--method fold", allowed=", ".join(m for m in METHOD_NAMES if m != "fold"), fix="make a bundle: kvexport build --method online",
        )  # fmt: skip
    if name not in (BEST, "fold"):
        return (METHODS[name],)
    if attention.position != "rope" or attention.k_norm is not None:
        return (METHODS["online"],)
    return (METHODS["online"], METHODS["fold"]) if name == BEST else (METHODS["fold"],)


def as_met(method: Method, moments: Moments, rope: Rope | None, positions: int) -> Moments:
    """Moments of unrotated keys and queries as the method's codes are to meet them, at any of so many positions."""
    if rope is None:
        return moments
    return over_distances(moments, rope, _NEAR) if method.commutes else over_positions(moments, rope, positions)


def head_order(method: Method, moments: Moments, attention: Attention, shape: Shape) -> list[int]:
    """The order of KV heads in which adjacent ones are to share, by the predicted loss of keys and values together."""
    heads = attention.num_kv_heads
    if not method.matched:
        return list(range(heads))
    losses, size = LayerLosses(moments, attention), heads // shape.kv_heads

    def loss(group: Group) -> float:
        key, value = (width * len(group) // size for width in (shape.key_dim, shape.value_dim))  # of part of a group, its share
        return float(losses.of_keys(method.commutes, group)[key] + losses.values(group)[value])

    return order_of(matched_groups(heads, size, loss))


def layer_code(method: Method, moments: Moments, attention: Attention, grouping: Grouping, shape: Shape) -> LayerCode:
    """The method's codes for all groups of one layer."""
    groups, rule, frequencies = range(grouping.kv_heads), method.key, None
    if rule is keys.fold and attention.position == "rope":
        frequencies = keys.cached_frequencies(moments, grouping, shape.key_dim)
        rule = partial(keys.fold, frequencies=frequencies)
    return LayerCode(
        frequencies=frequencies,
        keys=tuple(rule(moments, attention, grouping, group, shape.key_dim) for group in groups),
        values=tuple(method.value(moments, attention, grouping, group, shape.value_dim) for group in groups),
        folds=folds(method, attention),
        centred=method.centred,
    )
