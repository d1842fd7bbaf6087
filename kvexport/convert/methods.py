"""The conversion methods by name: which code each takes for keys and values, and whether W_O is refitted.

A table and how to read it; the mathematics is in `keys` and `values`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvexport.calibrate import Moments
from kvexport.convert import keys, values
from kvexport.convert.apply import LayerCode
from kvexport.convert.code_moments import CodeMoments
from kvexport.convert.codes import Code
from kvexport.convert.groups import Grouping, KVShape
from kvexport.convert.losses import LayerLosses
from kvexport.convert.matching import Group, match_heads, order_of
from kvexport.convert.method_names import BEST, METHOD_NAMES
from kvexport.errors import UsageError
from kvexport.model.decoder import Attention

Rule = Callable[[Moments, Attention, Grouping, int, int], Code]  # of one group, at one rank


@dataclass(frozen=True)
class Method:
    """One way to code a layer.

    Attributes:
        before_rotation: its key code is made before RoPE.
        centred: what the code leaves of the mean value goes into the output bias.
        matched: heads are grouped by predicted loss; otherwise as they are.
        refit: W_O is fitted again to the converted layer's own head outputs.
    """

    name: str
    key: Rule | None  # None: that of `keys.folding`, for which distances must be known
    value: Rule
    before_rotation: bool = False
    centred: bool = False
    matched: bool = False
    refit: bool = False


METHODS = {
    method.name: method
    for method in (
        Method("online", keys.online, values.weighted, centred=True, matched=True, refit=True),
        Method("fold", None, values.weighted, before_rotation=True, centred=True, matched=True, refit=True),
        Method("svd-a", keys.svd_a, values.svd_a),
        Method("svd-w", keys.svd_w, values.svd_w),
        Method("mean-pool", keys.mean_pool, values.mean_pool, before_rotation=True),
    )
}


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is converted."""

    method: Method
    shape: KVShape


def folds(method: Method, attention: Attention) -> bool:
    """Whether the method's key code goes into the weights: neither a norm nor a rotation is between W_K and the code."""
    return attention.k_norm is None and (method.before_rotation or attention.position != "rope")


def methods_for(name: str, attention: Attention) -> tuple[Method, ...]:
    """What `--method NAME` leaves each layer to choose from: without rotation 'fold' is 'online', whose codes all fold.

    Raises:
        UsageError: no such method, or 'fold' for keys that are normalised after W_K.
    """
    if name not in METHOD_NAMES:
        raise UsageError("no such conversion method", got=name, expected=", ".join(METHOD_NAMES))
    if name == "fold" and attention.k_norm is not None:
        raise UsageError(
            "keys of this model are normalised between W_K and the cache (QK-norm), so no code folds into the weights",
            got="--method fold",
            expected=", ".join(m for m in METHOD_NAMES if m != "fold"),
            fix="make a bundle: kvexport build --method online",
        )
    if name not in (BEST, "fold"):
        return (METHODS[name],)
    if attention.position != "rope" or attention.k_norm is not None:
        return (METHODS["online"],)
    return (METHODS["online"], METHODS["fold"]) if name == BEST else (METHODS["fold"],)


def head_order(method: Method, code_moments: CodeMoments, attention: Attention, shape: KVShape) -> list[int]:
    """The order of KV heads in which adjacent ones are to share, by the predicted loss of keys and values together."""
    heads = attention.num_kv_heads
    if not method.matched:
        return list(range(heads))
    losses, size = LayerLosses(code_moments, attention), heads // shape.kv_heads

    def loss(group: Group) -> float:
        key, value = (
            width * len(group) // size for width in (shape.key_dim, shape.value_dim)
        )  # of part of a group, its share
        return float(losses.estimate(method.before_rotation, group)[key] + losses.values(group)[value])

    return order_of(match_heads(heads, size, loss))


def layer_code(
    method: Method, code_moments: CodeMoments, attention: Attention, grouping: Grouping, shape: KVShape
) -> LayerCode:
    """The method's codes for all groups of one layer."""
    moments, groups, frequencies = code_moments.moments, range(grouping.kv_heads), None
    if method.key is None:
        assert code_moments.distances is not None
        frequencies = keys.cached_frequencies(moments, grouping, shape.key_dim)
        coded = [
            keys.folding(moments, grouping, group, frequencies, code_moments.distances).code()
            for group in groups
        ]
    else:
        coded = [method.key(moments, attention, grouping, group, shape.key_dim) for group in groups]
    return LayerCode(
        frequencies=frequencies,
        keys=tuple(coded),
        values=tuple(method.value(moments, attention, grouping, group, shape.value_dim) for group in groups),
        folds=folds(method, attention),
        centred=method.centred,
    )
