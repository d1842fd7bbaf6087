"""The conversion methods: which code each makes for keys and values, and how heads are grouped.

A table of the functions in `keys`, `values` and `folding`; names and help are in `method_names`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert import keys, values
from kvexport.convert.apply import LayerCode
from kvexport.convert.code_moments import CodeMoments
from kvexport.convert.codes import Code
from kvexport.convert.groups import Grouping, KVShape
from kvexport.convert.losses import LayerLosses
from kvexport.convert.matching import order_of
from kvexport.convert.method_names import BEST, METHOD_NAMES
from kvexport.convert.threads import map_on_threads, one_thread_each
from kvexport.errors import UsageError
from kvexport.model.decoder import Attention

GroupCode = Callable[[Moments, Attention, Grouping, int, int], Code]  # arguments end with group and rank


@dataclass(frozen=True)
class Method:
    """One conversion method.

    Attributes:
        name: its name in `method_names`.
        key: makes a group's key code; None: codes before RoPE by `keys.folding`, which needs distances.
        value: makes a group's value code.
        before_rotation: whether keys are coded before RoPE.
        centred: whether what the code loses of the mean value goes into the output bias, which a refit then
            fits, too.
        matched: whether heads are grouped by predicted loss; otherwise adjacent heads share.
        refit: whether W_O is refitted to the converted layer's own head outputs.
        weighted: whether tokens are weighted by what their errors cost (`MomentsAccumulator`).
    """

    name: str
    key: GroupCode | None
    value: GroupCode
    before_rotation: bool = False
    centred: bool = False
    matched: bool = False
    refit: bool = False
    weighted: bool = False


_OURS = {"centred": True, "matched": True, "refit": True, "weighted": True}
METHODS = {
    method.name: method
    for method in (
        Method("online", keys.online, values.weighted, **_OURS),
        Method("fold", None, values.weighted, before_rotation=True, **_OURS),
        Method("svd-a", keys.svd_a, values.svd_a),
        Method("svd-w", keys.svd_w, values.svd_w),
        Method("mean-pool", keys.mean_pool, values.mean_pool, before_rotation=True),
    )
}


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is converted: the method, and the shape of the resulting cache."""

    method: Method
    shape: KVShape


def without_output_bias(method: Method) -> Method:
    """The method as it is where the output projection can have no bias beyond the trained one."""
    return replace(method, centred=False, value=values.weighted_uncentred) if method.centred else method


def folds(method: Method, attention: Attention) -> bool:
    """Whether the method's key code folds into the weights: no norm, no clip and no rotation lies between W_K
    and the code.
    """
    return attention.keys_fold and (method.before_rotation or attention.rope is None)


def in_layer(method: Method, attention: Attention) -> Method:
    """The method that a layer is converted with: without RoPE `fold` is `online`, whose codes then fold."""
    if method.key is not None or attention.rope is not None:
        return method
    return replace(method, name="online", key=keys.online, before_rotation=False)


def methods_for(name: str, attention: Attention) -> tuple[Method, ...]:
    """Methods that each layer can choose from under `--method NAME`.

    Without RoPE 'fold' means 'online', whose codes then fold entirely.

    Raises:
        UsageError: there is no such method, or 'fold' with keys that are normalised or clipped after W_K.
    """
    if name not in METHOD_NAMES:
        raise UsageError("--method must be a conversion method", got=name, expected=", ".join(METHOD_NAMES))
    if name == "fold" and not attention.keys_fold:
        reason = "--method fold needs a model without QK-norm: a norm after W_K prevents folding"
        if attention.k_norm is None:
            reason = "--method fold needs a model without clipped keys: a clip after W_K prevents folding"
        raise UsageError(
            reason,
            got="--method fold, the default of kvexport compress",
            fix="make a bundle: kvexport build --method online CHECKPOINT -o BUNDLE; or keep all heads: "
            "--kv-ratio 1",
        )
    if name not in (BEST, "fold"):
        return (METHODS[name],)
    if attention.rope is None or not attention.keys_fold:
        return (METHODS["online"],)
    return (METHODS["online"], METHODS["fold"]) if name == BEST else (METHODS["fold"],)


def head_order(method: Method, code_moments: CodeMoments, attention: Attention, shape: KVShape) -> list[int]:
    """Order of the KV heads that makes the heads of each group adjacent, for the least predicted loss of keys
    and values.
    """
    heads = attention.num_kv_heads
    if not method.matched:
        return list(range(heads))
    with one_thread_each():
        losses = LayerLosses(code_moments, attention)
        return order_of(
            losses.match(method.before_rotation, heads // shape.kv_heads, shape.key_dim, shape.value_dim)
        )


def layer_code(
    method: Method, code_moments: CodeMoments, attention: Attention, grouping: Grouping, shape: KVShape
) -> LayerCode:
    """Make the method's codes for all groups of one layer."""
    with one_thread_each():
        key_codes, frequencies = make_key_codes(method, code_moments, attention, grouping, shape.key_dim)
        value_codes = make_value_codes(method, code_moments.moments, attention, grouping, shape.value_dim)
    return LayerCode(key_codes, value_codes, folds(method, attention), method.centred, frequencies)


def make_key_codes(
    method: Method, code_moments: CodeMoments, attention: Attention, grouping: Grouping, rank: int
) -> tuple[tuple[Code, ...], Tensor | None]:
    """Make the method's key code of each group; the other result is `LayerCode.frequencies`."""
    moments, distances = code_moments.moments, code_moments.distances
    if method.key is not None:
        key = method.key
        return _of_groups(grouping, lambda group: key(moments, attention, grouping, group, rank)), None
    assert distances is not None
    frequencies = keys.cached_frequencies(moments, grouping, rank)
    return _of_groups(
        grouping, lambda group: keys.folding(moments, grouping, group, frequencies, distances).code()
    ), frequencies


def make_value_codes(
    method: Method, moments: Moments, attention: Attention, grouping: Grouping, rank: int
) -> tuple[Code, ...]:
    """Make the method's value code of each group."""
    return _of_groups(grouping, lambda group: method.value(moments, attention, grouping, group, rank))


def _of_groups(grouping: Grouping, make: Callable[[int], Code]) -> tuple[Code, ...]:
    return tuple(map_on_threads(make, range(grouping.kv_heads)))
