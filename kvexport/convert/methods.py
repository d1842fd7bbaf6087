"""The conversion methods by name: which code each takes for keys and values, and whether W_O is refitted.

A table and how to read it; the mathematics is in `keys` and `values`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvexport.calibrate import Moments
from kvexport.convert import keys, values
from kvexport.convert.apply import LayerCode
from kvexport.convert.codes import Code
from kvexport.convert.groups import Grouping
from kvexport.decoder import Attention
from kvexport.errors import UsageError

Rule = Callable[[Moments, Attention, Grouping, int], Code]


@dataclass(frozen=True)
class Method:
    """One way to code a layer.

    Attributes:
        commutes: its key code commutes with RoPE.
        centred: what the code leaves of the mean value goes into the output bias.
        refit: W_O is fitted again to the converted layer's own head outputs.
    """

    name: str
    key: Rule
    value: Rule
    commutes: bool = False
    centred: bool = False
    refit: bool = False


METHODS = {
    method.name: method
    for method in (
        Method("online", keys.online, values.weighted, centred=True, refit=True),
        Method("fold", keys.fold, values.weighted, commutes=True, centred=True, refit=True),
        Method("svd-a", keys.svd_a, values.svd_a),
        Method("svd-w", keys.svd_w, values.svd_w),
        Method("mean-pool", keys.mean_pool, values.mean_pool, commutes=True),
    )
}
AUTO = "auto"
_AS_GOOD = 1.02  # a prediction this many times the least is as good: first-order predictions are no finer
METHOD_NAMES = (AUTO, *METHODS)


def folds(method: Method, attention: Attention) -> bool:
    """Whether the method's key code goes into the weights: no norm between W_K and the cache, and no rotation
    that it does not commute with."""
    return attention.k_norm is None and (method.commutes or attention.position != "rope")


def candidates(name: str, attention: Attention) -> list[Method]:
    """The methods that `--method NAME` may take for this layer; 'auto' leaves the choice to predicted error.

    Raises:
        UsageError: no such method, or 'fold' for keys that are normalised after W_K.
    """
    if name not in METHOD_NAMES:
        raise UsageError("no such conversion method", seen=name, allowed=", ".join(METHOD_NAMES))
    normed = attention.k_norm is not None
    if name == "fold" and normed:
        raise UsageError(
            "keys of this model are normalised between W_K and the cache (QK-norm), so no code folds into the weights",
            seen="--method fold", allowed=", ".join(m for m in METHOD_NAMES if m != "fold"), fix="use --method online",
        )  # fmt: skip
    if attention.position != "rope" and name in (AUTO, "fold"):
        return [METHODS["online"]]  # without rotation the unrestricted code folds
    if name == AUTO:
        return [METHODS["online"]] if normed else [METHODS["online"], METHODS["fold"]]
    return [METHODS[name]]


def layer_code(method: Method, moments: Moments, attention: Attention, grouping: Grouping) -> LayerCode:
    """The method's codes for all groups of one layer."""
    groups = range(grouping.kv_heads)
    return LayerCode(
        keys=tuple(method.key(moments, attention, grouping, group) for group in groups),
        values=tuple(method.value(moments, attention, grouping, group) for group in groups),
        folds=folds(method, attention),
        centred=method.centred,
    )


def least_loss(predictions: Sequence[float]) -> int:
    """Which of `candidates` to take by predicted error: the last that is as good as the best.

    Candidates stand in order of cost. An unrestricted code never predicts more loss than one that folds, which
    costs nothing at run time and makes a standard checkpoint, so the latter wins where it loses nothing.
    """
    least = min(predictions)
    return max(i for i, prediction in enumerate(predictions) if prediction <= least * _AS_GOOD + 1e-9)
