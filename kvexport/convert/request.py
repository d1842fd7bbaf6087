"""What a user asks of conversion, as shapes: KV heads, a share of the cache, a bound on the loss, widths.

Knows the options' names and which of them contradict each other; the choice among shapes is made in `budget`, from what
`analyze_sensitivity` has measured. Runs no model by itself.
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
_LARGEST_STACK = 2048  # numbers of a group: eigenvalue problems are of that size


@dataclass(frozen=True)
class CompressionRequest:
    """What is asked for; with nothing asked, half of the cached numbers.

    Attributes:
        kv_heads: KV heads of every layer, each as wide as a trained one unless `kv_head_dim` says otherwise.
        kv_ratio: share of the trained model's cached numbers.
        max_kl: mean KL to the original that is allowed, nats per token; the fewest numbers that keep it.
        group_size: trained KV heads that share one.
        kv_head_dim: width of cached keys and values.
        equal_widths: keys and values of a layer must be equally wide.
    """

    kv_heads: int | None = None
    kv_ratio: float | None = None
    max_kl: float | None = None
    group_size: int | None = None
    kv_head_dim: int | None = None
    equal_widths: bool = True

    @property
    def ratio(self) -> float:
        return _HALF if self.kv_ratio is None else self.kv_ratio

    @property
    def widths(self) -> Widths:
        """What widths the choice is free to take."""
        return Widths(self.equal_widths, self.kv_head_dim)


def fixed_shape(
    request: CompressionRequest, methods: Sequence[Method], attention: Attention
) -> KVShape | None:
    """The one shape that every layer gets, or None where the request leaves a choice.

    A choice is left to methods that match heads; others take the shape of plain grouped-query attention, heads as wide as
    trained ones.

    Raises:
        UsageError: options that contradict each other, that the method cannot keep, or that are out of range.
    """
    trained = trained_shape(attention)
    _refuse_contradictions(request, methods, attention)
    if request.kv_heads is not None or (request.group_size is not None and request.kv_head_dim is not None):
        wanted = request.kv_heads if request.group_size is None else trained.kv_heads // request.group_size
        heads, width = kv_heads_for(trained.kv_heads, wanted, None), request.kv_head_dim or attention.head_dim
        most = trained.kv_heads // heads * attention.head_dim
        if not 1 <= width <= most:
            raise UsageError(
                "--kv-head-dim is wider than the heads that share it, or no width",
                got=width,
                expected=f"1 to {most} for {trained.kv_heads // heads} heads of {attention.head_dim}",
            )
        return KVShape(heads, width, width)
    if request.ratio == 1 and request.max_kl is None:
        for name, value in (("--group-size", request.group_size), ("--kv-head-dim", request.kv_head_dim)):
            if value is not None:
                raise UsageError(
                    f"--kv-ratio 1 leaves every head as it was trained, and {name} changes them",
                    got=f"{name} {value}",
                    fix=f"lower --kv-ratio, or leave {name} out",
                )
        return trained
    if not _leave_choice(methods):
        return KVShape(
            kv_heads_for(trained.kv_heads, None, request.ratio), attention.head_dim, attention.head_dim
        )
    return None


def require_ratio(request: CompressionRequest, methods: Sequence[Method], attention: Attention) -> None:
    """Refuse, before any work, a share of the cache that no choice of widths is so small as to keep.

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
        raise UsageError(
            "no choice of widths caches so little",
            got=f"--kv-ratio {request.ratio:g}{'' if request.kv_ratio is not None else ' (what is kept unless it is given)'}",
            expected=f"{fewest / trained.kv_width:.4g} to 1",
            fix="raise --kv-ratio, or change --group-size or --kv-head-dim",
        )


def uniform_shape(request: CompressionRequest, methods: Sequence[Method], attention: Attention) -> KVShape:
    """The one shape of a standard checkpoint: heads as wide as trained ones, as many in every layer.

    Raises:
        UsageError: as `fixed_shape`, and where the request asks for other shapes.
    """
    for name, value in (
        ("--max-kl", request.max_kl),
        ("--group-size", request.group_size),
        ("--kv-head-dim", request.kv_head_dim),
    ):
        if value is not None:
            raise UsageError(
                f"{name} asks for shapes that a standard checkpoint cannot say",
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
    """How many heads may share one, ascending: no larger than eigenvalue problems of the stack allow."""
    heads, width = attention.num_kv_heads, attention.head_dim
    if request.group_size is not None:
        return [request.group_size]
    return [
        size
        for size in range(1, heads + 1)
        if heads % size == 0 and (size == 1 or size * width <= _LARGEST_STACK)
    ]


def _leave_choice(methods: Sequence[Method]) -> bool:
    return all(method.matched for method in methods)


def _refuse_contradictions(
    request: CompressionRequest, methods: Sequence[Method], attention: Attention
) -> None:
    said = {
        "--kv-heads": request.kv_heads,
        "--kv-ratio": request.kv_ratio,
        "--max-kl": request.max_kl,
        "--group-size": request.group_size,
        "--kv-head-dim": request.kv_head_dim,
    }
    given = [name for name, value in said.items() if value is not None]

    def refuse(these: Sequence[str], why: str) -> None:
        if all(name in given for name in these):
            raise UsageError(f"{' and '.join(these)} contradict each other: {why}", fix="give one of them")

    for pair in (("--kv-heads", "--kv-ratio"), ("--kv-heads", "--max-kl"), ("--kv-ratio", "--max-kl")):
        refuse(pair, "each says by itself how much is cached")
    refuse(("--kv-heads", "--group-size"), "one follows from the other")
    for name in ("--kv-ratio", "--max-kl"):
        refuse(
            ("--group-size", "--kv-head-dim", name), "group size and width together say how much is cached"
        )
    trained = attention.num_kv_heads
    if request.group_size is not None and (request.group_size < 1 or trained % request.group_size):
        divisors = ", ".join(str(size) for size in range(1, trained + 1) if trained % size == 0)
        raise UsageError(
            "--group-size must divide the model's KV heads", got=request.group_size, expected=divisors
        )
    if request.kv_ratio is not None and not 0 < request.kv_ratio <= 1:
        raise UsageError("--kv-ratio is no share", got=request.kv_ratio, expected="above 0, at most 1")
    if request.max_kl is not None and not 0 < request.max_kl < float("inf"):
        raise UsageError("--max-kl is no bound", got=request.max_kl, expected="above 0, in nats per token")
    if request.kv_head_dim is not None and not 1 <= request.kv_head_dim <= WIDEST:
        raise UsageError(
            "--kv-head-dim is out of range",
            got=request.kv_head_dim,
            expected=f"1 to {WIDEST}, what fused attention takes",
        )
    for name in ("--max-kl", "--group-size"):
        if name in given and not _leave_choice(methods):
            raise UsageError(
                f"{name} needs a method that knows its loss beforehand",
                got=f"--method {methods[0].name}",
                expected="--method auto, online, fold",
                fix="use --kv-heads or --kv-ratio",
            )
    if any(method.before_rotation for method in methods) and (request.kv_head_dim or 0) % 2:
        raise UsageError(
            "rotary pairs need an even --kv-head-dim",
            got=request.kv_head_dim,
            expected="even widths",
            fix="or use --method online",
        )
    if (
        not _leave_choice(methods)
        and methods[0].before_rotation
        and request.kv_head_dim not in (None, attention.head_dim)
    ):
        raise UsageError(
            f"--method {methods[0].name} keeps the trained width",
            got=f"--kv-head-dim {request.kv_head_dim}",
            expected=attention.head_dim,
            fix="leave --kv-head-dim out, or use --method online",
        )
    if (
        not _leave_choice(methods)
        and request.kv_heads is None
        and request.kv_head_dim not in (None, attention.head_dim)
    ):
        raise UsageError(
            f"--method {methods[0].name} does not choose how many heads of another width to keep",
            got=f"--kv-head-dim {request.kv_head_dim}",
            fix="add --kv-heads, or use --method online",
        )
