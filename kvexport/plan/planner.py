"""Plan a model on a target: memory and speed for each number of KV heads, precision and context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvexport.bundle.formats import INTEGERS, WeightFormats, require_mean_bits, resolve_formats
from kvexport.bundle.manifest import MANIFEST_FILE, read_manifest
from kvexport.devices.targets import Target, lowering_for, tensorrt_version
from kvexport.errors import UsageError
from kvexport.eviction.config import MAX_POSITIONS, Eviction, EvictionRequest
from kvexport.plan.compare import Comparison, compare
from kvexport.plan.memory import Memory, kv_bytes_per_token, largest_context, memory
from kvexport.plan.sizes import Sizes, TrainedSizes, bundle_sizes, trained_sizes
from kvexport.plan.speed import DECODE, PREFILL, Band, decode_seconds, prefill_seconds
from kvexport.plan.weights import Precision, WeightBytes, bundle_precision, least_bits
from kvexport.quantize.method_names import DEFAULT_BITS

_CONTEXTS = (2048, 8192, 32768)
_ENGINE, _LOWERING = "tensorrt", "std24"  # without a target


@dataclass(frozen=True)
class Range:
    """Predicted seconds; `low` and `high` are the bounds from published measurements."""

    low: float
    typical: float
    high: float


@dataclass(frozen=True)
class Row:
    """One number of KV heads, precision and context. A prediction is None without a target, or if its file
    has no rate."""

    kv_heads: int
    dtype: str  # of computation and cache
    formats: WeightFormats
    weight_bits: float | None  # mean number of bits of int4 weights, of which some get 8; None: all have 4
    parameters: int
    weights: WeightBytes
    memory: Memory
    kv_bytes_per_token: int
    largest_context: int | None
    short_bytes: int | None  # missing bytes of the target's usable memory; 0 if it fits
    prefill_seconds: Range | None  # for a prompt of `memory.context` tokens
    decode_seconds: Range | None  # for one step after as many tokens

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        fits = None if self.short_bytes is None else self.short_bytes == 0
        weights = {**asdict(self.weights), "total": self.weights.total}
        formats = {name: getattr(self.formats, name) for name in ("layers", "embedding", "head", "block")}
        more = {"formats": formats, "weights": weights, "total_bytes": self.memory.total, "fits": fits}
        return asdict(self) | more


@dataclass(frozen=True)
class Plan:
    """Predicted memory and speed of a model on `target` (None: memory only).

    Attributes:
        model: the name of the model's folder.
        budget: bytes that an application can use there.
        lowering: the lowering whose memory is counted.
        maps: whether rows with fewer KV heads include the online method's key and query maps.
        eviction: the eviction within a token budget; None: no layer evicts.
        rows: one for each combination.
        comparisons: predictions compared with the measurements of builds and benchmarks of a bundle.
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
        """The plan as JSON values."""
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
    jetpack: str | None = None,
    kv_heads: Sequence[int] = (),
    dtype: str | None = None,
    weights: Sequence[str] = (),
    head_weights: str | None = None,
    embedding_weights: str | None = None,
    weight_block: int | None = None,
    weight_bits: float | None = None,
    contexts: Sequence[int] = (),
    eviction: EvictionRequest | None = None,
) -> Plan:
    """Plan a checkpoint (from its config.json alone) or a bundle (from its manifest) for `target`.

    Args:
        jetpack: JetPack version of the target, which determines its TensorRT; default: the target's.
        kv_heads: numbers of KV heads; default: all, a half and a quarter of the trained number.
        dtype: of computation and cache; default: float32 with ONNX Runtime, else float16.
        weights: formats of the layers' weights; default: the dtype, int8 and int4.
        head_weights, embedding_weights, weight_block, weight_bits: as in `kvexport build`.
        contexts: context lengths in tokens; default: 2048, 8192 and 32768, up to the model's maximum.
        eviction: the eviction of a checkpoint; a fraction is one of the model's max_position_embeddings.

    Raises:
        CheckpointError: there is no config.json, or no family covers it.
        BundleError: the manifest is damaged, or the graph is missing.
        UsageError: an option is out of range, or sets what a bundle has fixed.
    """
    engine = _ENGINE if target is None else target.engine
    lowering = _lowering(target, jetpack)
    if (model / MANIFEST_FILE).is_file():
        fixed = {
            "--kv-heads": kv_heads,
            "--dtype": dtype,
            "--weights": weights,
            "--head-weights": head_weights,
            "--embedding-weights": embedding_weights,
            "--weight-block": weight_block,
            "--weight-bits": weight_bits,
        }
        for option, value in fixed.items():
            if value:
                raise UsageError(
                    f"{option} must be left out for a bundle, which has fixed it",
                    got=option,
                    fix="leave it out, or plan the checkpoint",
                )
        manifest = read_manifest(model)
        if eviction is not None:
            built = manifest.eviction
            raise UsageError(
                "--kv-budget must be left out for a bundle, which has fixed its eviction",
                got="--kv-budget",
                expected="no eviction" if built is None else f"{built.budget} tokens in each KV head",
                fix="leave it out, or build again: kvexport build CHECKPOINT -o BUNDLE --kv-budget TOKENS",
            )
        variants = [bundle_sizes(model, manifest)]
        stored = [bundle_precision(manifest)]
        comparisons = compare(model, variants[0], stored[0], target)
    else:
        trained = trained_sizes(model)
        counts = kv_heads or _shares(trained.kv_head_counts)
        variants = [_with_eviction(trained.with_kv_heads(count), eviction) for count in counts]
        dtype = dtype or ("float32" if engine == "onnxruntime" else "float16")
        stored = [
            _precision(trained, dtype, name, head_weights, embedding_weights, weight_block, weight_bits)
            for name in weights or (dtype, *INTEGERS)
        ]
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


def _with_eviction(sizes: Sizes, request: EvictionRequest | None) -> Sizes:
    """The model with the requested eviction, and the positions that eviction can count."""
    if request is None:
        return sizes
    if request.of_capacity and sizes.max_positions is None:
        raise UsageError(
            "--kv-budget must be a number of tokens for a model without a maximum length",
            got=request.budget,
            expected="an integer >= 1",
            fix="--kv-budget TOKENS",
        )
    positions = min(sizes.max_positions or MAX_POSITIONS, MAX_POSITIONS)
    try:
        windows = [cache.window for cache in sizes.caches]
        eviction = request.of(positions, sizes.layers).outside_windows(windows)
        return replace(sizes, eviction=eviction, max_positions=positions)
    except UsageError as error:  # its fix names options of `kvexport build`
        fix = "choose another --kv-budget or --evict-skip-layers, or leave them out"
        raise UsageError(error.what, got=error.got, expected=error.expected, fix=fix) from error


def _shares(counts: list[int]) -> list[int]:
    """All, a half and a quarter, as far as conversion can produce that many."""
    return [count for count in counts if count * 4 in (counts[0] * 4, counts[0] * 2, counts[0])]


def _lowering(target: Target | None, jetpack: str | None) -> str:
    """The lowering for a target, and for one of its JetPack versions."""
    if jetpack is None:
        return _LOWERING if target is None else lowering_for(target)
    if target is None:
        raise UsageError("--jetpack needs --target", got="no --target", fix="add --target NAME")
    return lowering_for(target, tensorrt_version(target, jetpack=jetpack))


def _precision(
    trained: TrainedSizes,
    dtype: str,
    weights: str,
    head: str | None,
    embedding: str | None,
    block: int | None,
    bits: float | None,
) -> Precision:
    """The precision of a checkpoint's bundle with these options of `kvexport build`."""
    architecture = trained.architecture
    formats = resolve_formats(
        dtype,
        tied=architecture.tied,
        hidden_size=architecture.hidden_size,
        weights=weights,
        head_weights=head,
        embedding_weights=embedding,
        weight_block=block or trained.stored_block,
    )
    if weights != "int4":
        return Precision(dtype, formats)
    given = {"head": head, "embedding": embedding}
    fixed = frozenset(name for name, value in given.items() if value is not None)
    stored = Precision(dtype, formats, DEFAULT_BITS if bits is None else bits, fixed)
    if bits is not None:
        require_mean_bits(bits, least_bits(stored, trained.with_kv_heads(architecture.num_kv_heads).tables))
    return stored


def _contexts(requested: Sequence[int], maximum: int | None) -> list[int]:
    for context in requested:
        if maximum is not None and context > maximum:
            raise UsageError(
                "--context must not exceed the maximum length of the model",
                got=context,
                expected=f"1 to {maximum}",
            )
    default = [context for context in _CONTEXTS if maximum is None or context <= maximum]
    return list(dict.fromkeys(requested)) or default or [maximum or 1]


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
        dtype=stored.dtype,
        formats=stored.weights,
        weight_bits=stored.bits,
        parameters=sizes.parameters,
        weights=sizes.weight_bytes(stored),
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
    """Predicted seconds of a decode step after `depth` tokens."""
    return Range(
        *(decode_seconds(sizes, stored, target, depth, efficiency) for efficiency in _fastest_first(DECODE))
    )


def predicted_prefill(sizes: Sizes, stored: Precision, target: Target, tokens: int) -> Range | None:
    """Predicted seconds of a prompt of `tokens` tokens; None if the target's file has no rate for it."""
    efficiencies = zip(_fastest_first(PREFILL), _fastest_first(DECODE), strict=True)
    predicted = [
        prefill_seconds(sizes, stored, target, tokens, efficiency, reading)
        for efficiency, reading in efficiencies
    ]
    seconds = [each for each in predicted if each is not None]
    return Range(*seconds) if seconds else None


def _fastest_first(band: Band) -> tuple[float, float, float]:
    return band.high, band.typical, band.low
