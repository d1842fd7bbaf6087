"""A user's request for compression: KV heads, share of the cache, bound on the loss, widths; and the shapes
that it means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvexport.convert.budget import Widths, shapes_for
from kvexport.convert.groups import WIDEST, KVShape, kv_heads_for, trained_shape
from kvexport.convert.methods import Method
from kvexport.errors import UsageError
from kvexport.model.decoder import Attention

_HALF = 0.5
_LARGEST_STACK = 2048  # width of a group's stack: its eigenvalue problems have this size


@dataclass(frozen=True)
class CompressionRequest:
    """What the user requests; without any field, half of the cached numbers.

    Attributes:
        kv_heads: KV heads of every layer, as wide as trained heads unless `kv_head_dim` is given.
        kv_ratio: share of the trained model's cached numbers, 0 < kv_ratio <= 1.
        max_kl: upper bound on the mean KL to the original, nats per token; the fewest cached numbers that
            keep it.
        group_size: trained KV heads that share one cached head.
        kv_head_dim: width of cached keys and values.
        equal_widths: whether keys and values of a layer must be equally wide.
    """

    kv_heads: int | None = None
    kv_ratio: float | None = None
    max_kl: float | None = None
    group_size: int | None = None
    kv_head_dim: int | None = None
    equal_widths: bool = True

    @property
    def ratio(self) -> float:
        """`kv_ratio`, or its default of one half."""
        return _HALF if self.kv_ratio is None else self.kv_ratio

    @property
    def widths(self) -> Widths:
        """Widths that the plan may use."""
        return Widths(self.equal_widths, self.kv_head_dim)


def fixed_shape(
    request: CompressionRequest, methods: Sequence[Method], attention: Attention
) -> KVShape | None:
    """The one shape that every layer gets, or None if shapes are to be chosen per layer.

    Only methods that match heads choose shapes. The baselines get grouped-query attention with heads of the
    trained width.

    Raises:
        UsageError: options contradict each other, are out of range, or are not supported by the method.
    """
    trained = trained_shape(attention)
    _require_consistent(request, methods, attention)
    if request.kv_heads is not None or (request.group_size is not None and request.kv_head_dim is not None):
        count = request.kv_heads if request.group_size is None else trained.kv_heads // request.group_size
        heads, width = kv_heads_for(trained.kv_heads, count, None), request.kv_head_dim or attention.head_dim
        most = trained.kv_heads // heads * attention.head_dim
        if not 1 <= width <= most:
            raise UsageError(
                "--kv-head-dim must not exceed the total width of the heads that share a cached head",
                got=width,
                expected=f"1 to {most} for {trained.kv_heads // heads} heads of {attention.head_dim}",
            )
        return KVShape(heads, width, width)
    if request.ratio == 1 and request.max_kl is None:
        for name, value in (("--group-size", request.group_size), ("--kv-head-dim", request.kv_head_dim)):
            if value is not None:
                raise UsageError(
                    f"{name} must not be given with --kv-ratio 1, which leaves every head as trained",
                    got=f"{name} {value}",
                    fix=f"lower --kv-ratio, or leave {name} out",
                )
        return trained
    if not _choose_shapes(methods):
        return KVShape(
            kv_heads_for(trained.kv_heads, None, request.ratio), attention.head_dim, attention.head_dim
        )
    return None


def require_ratio(request: CompressionRequest, methods: Sequence[Method], attention: Attention) -> None:
    """Raise, before any work, if no choice of widths caches as few numbers as the requested ratio.

    Raises:
        UsageError: as `fixed_shape`, and where every choice caches more.
    """
    if fixed_shape(request, methods, attention) is not None or request.max_kl is not None:
        return
    trained = trained_shape(attention)
    fewest = min(
        shape.kv_width for shape in shapes_for(trained, group_sizes(request, attention), request.widths)
    )
    if request.ratio * trained.kv_width < fewest:
        default = "" if request.kv_ratio is not None else " (the default)"
        raise UsageError(
            "--kv-ratio must be at least the smallest cache that the widths allow",
            got=f"--kv-ratio {request.ratio:g}{default}",
            expected=f"{fewest / trained.kv_width:.4g} to 1",
            fix="raise --kv-ratio, or change --group-size or --kv-head-dim",
        )


def uniform_shape(request: CompressionRequest, methods: Sequence[Method], attention: Attention) -> KVShape:
    """The one shape of a Hugging Face checkpoint: heads of the trained width, the same number in every layer.

    Raises:
        UsageError: as `fixed_shape`, and where the request needs other shapes.
    """
    for name, value in (
        ("--max-kl", request.max_kl),
        ("--group-size", request.group_size),
        ("--kv-head-dim", request.kv_head_dim),
    ):
        if value is not None:
            raise UsageError(
                f"{name} needs cache shapes that a Hugging Face checkpoint cannot express",
                got=value,
                fix="use --kv-heads or --kv-ratio, or make a bundle: kvexport build CHECKPOINT -o BUNDLE",
            )
    shape = fixed_shape(request, methods, attention)
    if shape is None:
        return KVShape(
            kv_heads_for(attention.num_kv_heads, None, request.ratio), attention.head_dim, attention.head_dim
        )
    return shape


def group_sizes(request: CompressionRequest, attention: Attention) -> list[int]:
    """Numbers of trained heads that may share one cached head, ascending; bounded by the size of eigenvalue
    problems.
    """
    heads, width = attention.num_kv_heads, attention.head_dim
    if request.group_size is not None:
        return [request.group_size]
    return [
        size
        for size in range(1, heads + 1)
        if heads % size == 0 and (size == 1 or size * width <= _LARGEST_STACK)
    ]


def _choose_shapes(methods: Sequence[Method]) -> bool:
    """Whether these methods choose shapes per layer."""
    return all(method.matched for method in methods)


def _require_consistent(request: CompressionRequest, methods: Sequence[Method], attention: Attention) -> None:
    """Raise UsageError for options that contradict each other, are out of range, or are not supported by the
    method.
    """
    options = {
        "--kv-heads": request.kv_heads,
        "--kv-ratio": request.kv_ratio,
        "--max-kl": request.max_kl,
        "--group-size": request.group_size,
        "--kv-head-dim": request.kv_head_dim,
    }
    given = [name for name, value in options.items() if value is not None]

    def require_not_all(names: Sequence[str], reason: str) -> None:
        if all(name in given for name in names):
            raise UsageError(
                f"{' and '.join(names)} must not be given together: {reason}", fix="leave one of them out"
            )

    for pair in (("--kv-heads", "--kv-ratio"), ("--kv-heads", "--max-kl"), ("--kv-ratio", "--max-kl")):
        require_not_all(pair, "each determines the size of the cache")
    require_not_all(("--kv-heads", "--group-size"), "each determines the other")
    for name in ("--kv-ratio", "--max-kl"):
        require_not_all(
            ("--group-size", "--kv-head-dim", name),
            "group size and width together determine the size of the cache",
        )
    trained = attention.num_kv_heads
    if request.group_size is not None and (request.group_size < 1 or trained % request.group_size):
        divisors = ", ".join(str(size) for size in range(1, trained + 1) if trained % size == 0)
        raise UsageError(
            "--group-size must divide the model's KV heads", got=request.group_size, expected=divisors
        )
    if request.kv_ratio is not None and not 0 < request.kv_ratio <= 1:
        raise UsageError(
            "--kv-ratio must be a fraction of the KV cache",
            got=request.kv_ratio,
            expected="above 0, at most 1",
        )
    if request.max_kl is not None and not 0 < request.max_kl < float("inf"):
        raise UsageError(
            "--max-kl must be a positive number", got=request.max_kl, expected="above 0, in nats per token"
        )
    if request.kv_head_dim is not None and not 1 <= request.kv_head_dim <= WIDEST:
        raise UsageError(
            "--kv-head-dim must be a width that fused attention supports",
            got=request.kv_head_dim,
            expected=f"1 to {WIDEST}",
        )
    for name in ("--max-kl", "--group-size"):
        if name in given and not _choose_shapes(methods):
            raise UsageError(
                f"{name} needs a method that predicts its loss",
                got=f"--method {methods[0].name}",
                expected="--method auto, online, fold",
            )
    if any(method.before_rotation for method in methods) and (request.kv_head_dim or 0) % 2:
        raise UsageError(
            "--kv-head-dim must be even, because RoPE rotates pairs",
            got=request.kv_head_dim,
            expected="even widths",
            fix="choose an even width, or use --method online",
        )
    if (
        not _choose_shapes(methods)
        and methods[0].before_rotation
        and request.kv_head_dim not in (None, attention.head_dim)
    ):
        raise UsageError(
            f"--method {methods[0].name} needs heads of the trained width",
            got=f"--kv-head-dim {request.kv_head_dim}",
            expected=attention.head_dim,
            fix="leave --kv-head-dim out, or use --method online",
        )
    if (
        not _choose_shapes(methods)
        and request.kv_heads is None
        and request.kv_head_dim not in (None, attention.head_dim)
    ):
        raise UsageError(
            f"--method {methods[0].name} needs --kv-heads together with --kv-head-dim",
            got=f"--kv-head-dim {request.kv_head_dim}",
            fix="add --kv-heads, or use --method online",
        )
