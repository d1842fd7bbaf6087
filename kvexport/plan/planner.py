"""A plan: every number of KV heads, precision and context side by side, with what fits and how fast it will be.

Knows how sizes, memory and time come together for a target; must not know how a plan is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvexport.bundle.manifest import MANIFEST_FILE, read_manifest
from kvexport.devices.targets import Target, lowering_for
from kvexport.errors import UsageError
from kvexport.eviction.config import MAX_POSITIONS, Eviction, EvictionRequest
from kvexport.plan.compare import Comparison, compare
from kvexport.plan.memory import (
    PRECISIONS,
    Memory,
    Precision,
    kv_bytes_per_token,
    largest_context,
    memory,
    precision,
)
from kvexport.plan.sizes import Sizes, architecture, bundle_sizes
from kvexport.plan.speed import DECODE, PREFILL, Band, decode_seconds, prefill_seconds

_CONTEXTS = (2048, 8192, 32768)
_ENGINE, _LOWERING = "tensorrt", "std24"  # assumed where no target is named


@dataclass(frozen=True)
class Range:
    """Predicted seconds; `low` and `high` are the ends of the band that published figures give."""

    low: float
    typical: float
    high: float


@dataclass(frozen=True)
class Row:
    """One number of KV heads, precision and context. Predictions are None without a target, or a rate in its file."""

    kv_heads: int
    dtype: str
    parameters: int
    memory: Memory
    kv_bytes_per_token: int
    largest_context: int | None
    short_bytes: int | None  # by how much the target's usable memory is too small; 0 where it fits
    prefill_seconds: Range | None  # of a prompt of `memory.context` tokens
    decode_seconds: Range | None  # of one step after as many tokens

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        fits = None if self.short_bytes is None else self.short_bytes == 0
        return {**asdict(self), "total_bytes": self.memory.total, "fits": fits}


@dataclass(frozen=True)
class Plan:
    """What a model takes and how fast it is predicted to be, on `target` (None: sizes alone).

    Attributes:
        budget: bytes that an application can have there.
        lowering: the lowering whose memory is counted.
        maps: rows with fewer KV heads count the online method's key and query maps.
        eviction: how layers stay within a budget of tokens; None: they hold every token.
        comparisons: predictions beside what builds and benchmarks of a bundle measured.
    """

    model: str
    target: Target | None
    budget: int | None
    lowering: str
    maps: bool
    eviction: Eviction | None
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "model": self.model,
            "target": None if self.target is None else self.target.name,
            "budget_bytes": self.budget,
            "lowering": self.lowering,
            "maps": self.maps,
            "eviction": None if self.eviction is None else self.eviction.to_json(),
            "estimate": True,
            "rows": [row.to_json() for row in self.rows],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
        }


def plan(
    model: Path,
    target: Target | None,
    *,
    kv_heads: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    contexts: Sequence[int] = (),
    eviction: EvictionRequest | None = None,
) -> Plan:
    """Plan a checkpoint (from its config.json alone) or a bundle (from its manifest) for `target`.

    Without `kv_heads`, all, half and a quarter of the trained ones; without `dtypes`, those the target runs; without
    `contexts`, 2048, 8192 and 32768 tokens, as far as the model goes. A share that `eviction` asks for is of the model's
    max_position_embeddings; a bundle evicts as it was built to.

    Raises:
        CheckpointError: no config.json, or one that no family covers.
        BundleError: a damaged manifest, or no graph.
        UsageError: an option is out of range, or a bundle already says what it asks.
    """
    engine = _ENGINE if target is None else target.engine
    lowering = _LOWERING if target is None else lowering_for(target)
    if (model / MANIFEST_FILE).is_file():
        if kv_heads or dtypes:
            raise UsageError(
                "a bundle has its KV heads and dtype already",
                got="--kv-heads or --dtype",
                fix="leave them out, or plan for the checkpoint",
            )
        manifest = read_manifest(model)
        if eviction is not None:
            built = manifest.eviction
            raise UsageError(
                "what a bundle evicts was settled when it was built",
                got="--kv-budget",
                expected="every token is held" if built is None else f"{built.budget} tokens in each KV head",
                fix="leave it out, or make another bundle: kvexport build CHECKPOINT -o BUNDLE --kv-budget TOKENS",
            )
        variants = [bundle_sizes(model, manifest)]
        stored = [precision(manifest.dtype, engine)]
        comparisons = compare(model, variants[0], stored[0], target)
    else:
        trained = architecture(model)
        counts = kv_heads or _shares(trained.kv_head_counts)
        variants = [_within(trained.sizes(count), eviction) for count in counts]
        stored = [precision(name, engine) for name in dtypes or _dtypes(engine)]
        comparisons = ()
    budget = None if target is None else target.usable_bytes
    lengths = _contexts(contexts, variants[0].max_positions)
    rows = [
        _row(sizes, each, length, target, budget, engine=engine, lowering=lowering)
        for each in stored
        for sizes in variants
        for length in lengths
    ]
    maps = any(sizes.maps for sizes in variants)
    return Plan(
        model.resolve().name, target, budget, lowering, maps, variants[0].eviction, tuple(rows), comparisons
    )


def _within(sizes: Sizes, request: EvictionRequest | None) -> Sizes:
    """The model with a budget of tokens, and as many positions as can be counted with one."""
    if request is None:
        return sizes
    if request.of_capacity and sizes.max_positions is None:
        raise UsageError(
            "--kv-budget is a share of the model's positions, and nothing bounds those of this one",
            got=request.budget,
            expected="a number of tokens",
            fix="--kv-budget TOKENS",
        )
    most = min(sizes.max_positions or MAX_POSITIONS, MAX_POSITIONS)
    try:
        return replace(sizes, eviction=request.of(most, sizes.layers), max_positions=most)
    except UsageError as error:  # its remedies are options of `kvexport build`
        fix = "choose another --kv-budget or --evict-skip-layers, or leave them out"
        raise UsageError(error.what, got=error.got, expected=error.expected, fix=fix) from error


def _shares(counts: list[int]) -> list[int]:
    """All, half and a quarter, where conversion can keep that many."""
    return [count for count in counts if count * 4 in (counts[0] * 4, counts[0] * 2, counts[0])]


def _dtypes(engine: str) -> tuple[str, ...]:
    return (
        "float32" if engine == "onnxruntime" else "float16",
        *(name for name in PRECISIONS if name.startswith("int")),
    )


def _contexts(asked: Sequence[int], most: int | None) -> list[int]:
    for context in asked:
        if most is not None and context > most:
            raise UsageError(
                "--context is more than a sequence of this model may hold",
                got=context,
                expected=f"1 to {most}",
            )
    default = [context for context in _CONTEXTS if most is None or context <= most]
    return list(dict.fromkeys(asked)) or default or [most or 1]


def _row(
    sizes: Sizes,
    stored: Precision,
    context: int,
    target: Target | None,
    budget: int | None,
    *,
    engine: str,
    lowering: str,
) -> Row:
    needed = memory(sizes, stored, context, engine=engine, lowering=lowering)
    return Row(
        kv_heads=sizes.kv_heads,
        dtype=stored.name,
        parameters=sizes.parameters,
        memory=needed,
        kv_bytes_per_token=kv_bytes_per_token(sizes, stored),
        largest_context=None
        if budget is None
        else largest_context(sizes, stored, budget, engine=engine, lowering=lowering),
        short_bytes=None if budget is None else max(0, needed.total - budget),
        prefill_seconds=None if target is None else predicted_prefill(sizes, stored, target, context),
        decode_seconds=None if target is None else predicted_decode(sizes, stored, target, context),
    )


def predicted_decode(sizes: Sizes, stored: Precision, target: Target, depth: int) -> Range:
    """Seconds of a decode step after `depth` tokens."""
    return Range(
        *(decode_seconds(sizes, stored, target, depth, efficiency) for efficiency in _fastest_first(DECODE))
    )


def predicted_prefill(sizes: Sizes, stored: Precision, target: Target, tokens: int) -> Range | None:
    """Seconds of a prompt of `tokens`; None where the target's file has no rate for it."""
    efficiencies = zip(_fastest_first(PREFILL), _fastest_first(DECODE), strict=True)
    found = [
        prefill_seconds(sizes, stored, target, tokens, efficiency, reading)
        for efficiency, reading in efficiencies
    ]
    seconds = [each for each in found if each is not None]
    return Range(*seconds) if seconds else None


def _fastest_first(band: Band) -> tuple[float, float, float]:
    return band.high, band.typical, band.low
