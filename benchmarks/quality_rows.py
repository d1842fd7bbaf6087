"""Make every row of the quality benchmark by name, in the order of the table.

A row raises UsageError when it is made if the model has no shape for it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

import torch
from neighbours import NEIGHBOURS, neighbour
from quality_measure import Bench, Made
from torch import Tensor

from kvexport.convert import (
    CompressionPlan,
    CompressionRequest,
    LayerPlan,
    Method,
    fixed_shape,
    measure_moments,
    methods_for,
    plan_compression,
    split_windows,
    uniform_shape,
)
from kvexport.convert.budget import Frontier, shapes_for
from kvexport.heal import HealOptions, heal
from kvexport.progress import Progress

HALF, QUARTER = Fraction(1, 2), Fraction(1, 4)
HEAL_SAMPLES = 192  # windows that `kvexport build --heal` samples
PAPER = ("svd-a", "svd-w", "mean-pool")
GROUPS = (2, 4, 8)
DISTANCES = (1, 16, 4096)

Make = Callable[[Bench], Made]
Plan = Callable[[Bench, Tensor], CompressionPlan]  # for a model and its calibration windows


@dataclass(frozen=True)
class Row:
    """One model to make and measure.

    Attributes:
        section: of the table: 'methods', 'ablations', 'healed' or 'max-kl'.
        ratio: share of the trained KV numbers that may be cached; None: the method finds out.
        what: a phrase for the reader.
    """

    section: str
    name: str
    ratio: Fraction | None
    what: str
    make: Make

    @property
    def key(self) -> str:
        return self.name if self.ratio is None else f"{self.name} {self.ratio}"

    @property
    def has_tasks(self) -> bool:
        """Whether PIQA and passkeys are asked of it; of neighbours not, since that takes longer than all else
        together."""
        return (
            self.section in ("methods", "healed")
            and self.ratio in (HALF, QUARTER)
            and self.name not in NEIGHBOURS
        )


def rows(
    ratios: Sequence[Fraction], long: int, heal_steps: int | None, bounds: Sequence[float]
) -> Iterator[Row]:
    """All rows.

    Args:
        long: the capacity that one of them is made for.
    """
    for ratio in ratios:
        for name, (what, make) in _methods(float(ratio), long).items():
            yield Row("methods", name, ratio, what, make)
    for ratio in ratios:
        if ratio in (HALF, QUARTER):
            for name, (what, make) in _ablations(float(ratio)).items():
                yield Row("ablations", name, ratio, what, make)
    if heal_steps is not None:
        for name, ratio, plan in (
            ("auto", QUARTER, chosen("auto", 0.25)),
            ("fold-plain", HALF, _plain("fold", 0.5)),
        ):
            what = f"{name} healed, {heal_steps} steps"
            yield Row("healed", f"{name}-healed-{heal_steps}", ratio, what, _healed(plan, heal_steps))
    for bound in bounds:
        yield Row(
            "max-kl", f"max-kl-{bound:g}", None, f"`kvexport build --max-kl {bound:g}`", _bounded(bound)
        )


def chosen(method: str, ratio: float, capacity: int | None = None, equal_widths: bool = True) -> Plan:
    """As `kvexport build --kv-ratio` chooses."""

    def plan(bench: Bench, windows: Tensor) -> CompressionPlan:
        return _choice(
            bench, windows, method, CompressionRequest(kv_ratio=ratio, equal_widths=equal_widths), capacity
        )

    return plan


def _choice(
    bench: Bench, windows: Tensor, method: str, request: CompressionRequest, capacity: int | None = None
) -> CompressionPlan:
    methods = methods_for(method, bench.attention)
    return plan_compression(
        bench.decoder, windows, request, methods, None, capacity or bench.length, Progress()
    )


def predicted_kl(choice: CompressionPlan) -> float | None:
    """Mean KL in nats per token as the survey predicts it; None where none was made."""
    if not choice.layers:
        return None
    return sum(layer.kl(way) for layer, way in zip(choice.layers, choice.layer_plans, strict=True))


def _converted(plan: Plan, capacity: int | None = None) -> Make:
    def make(bench: Bench) -> Made:
        choice = plan(bench, bench.calibration())
        return Made.of(*bench.convert(choice.layer_plans, capacity), predicted_kl=predicted_kl(choice))

    return make


# At equal KV bytes


def _methods(ratio: float, long: int) -> dict[str, tuple[str, Make]]:
    found = {
        "auto": ("`kvexport build`, its capacity one window", _converted(chosen("auto", ratio))),
        f"auto-{long}": (
            f"`kvexport build --capacity {long}`",
            _converted(chosen("auto", ratio, long), long),
        ),
        "auto-free": (
            "auto, K and V each of its own width",
            _converted(chosen("auto", ratio, equal_widths=False)),
        ),
        "fold": ("keys folded into W_K, choice of shapes", _converted(chosen("fold", ratio))),
        "fold-plain": (
            "keys folded into W_K, a standard checkpoint (`kvexport compress`)",
            _converted(_plain("fold", ratio)),
        ),
        "online-plain": (
            "keys projected after rotation, heads of the trained width",
            _converted(_plain("online", ratio)),
        ),
    }
    found |= {name: ("the paper's (arXiv 2406.07056)", _converted(_plain(name, ratio))) for name in PAPER}
    return found | {
        name: ("published, re-implemented in `neighbours`", _published(name, ratio)) for name in NEIGHBOURS
    }


def _plain(name: str, ratio: float, change: Callable[[Method], Method] = lambda method: method) -> Plan:
    """Heads as wide as trained ones, as many in every layer."""

    def plan(bench: Bench, windows: Tensor) -> CompressionPlan:
        methods = methods_for(name, bench.attention)
        shape = uniform_shape(CompressionRequest(kv_ratio=ratio), methods, bench.attention)
        method = dataclasses.replace(
            methods[0], matched=methods[0].matched and bench.attention.alibi_slopes is None
        )
        return CompressionPlan([LayerPlan(change(method), shape)] * len(bench.decoder.layers))

    return plan


def _published(name: str, ratio: float) -> Make:
    return lambda bench: Made.of_neighbour(neighbour(name)(bench.decoder, bench.calibration(), ratio))


# What each part of the method is worth


def _ablations(ratio: float) -> dict[str, tuple[str, Make]]:
    def plain(
        method: Callable[[Method], Method] = lambda method: method, **changes: Callable[[Tensor], Tensor]
    ) -> Make:
        return _transformed(_plain("fold", ratio, method), changes)

    found = {
        "plain-unweighted": (
            "fold-plain, keys not weighted by queries",
            plain(query_second=_identity, key_gain=torch.ones_like),
        ),
        "plain-no-gain": (
            "fold-plain, key_gain = 1: queries of all heads count alike",
            plain(key_gain=torch.ones_like),
        ),
        "plain-uncentred": (
            "fold-plain, values' codes not centred",
            plain(lambda method: dataclasses.replace(method, centred=False), value_mean=torch.zeros_like),
        ),
        "plain-adjacent": (
            "fold-plain, adjacent heads share",
            plain(lambda method: dataclasses.replace(method, matched=False)),
        ),
        "plain-no-refit": (
            "fold-plain, W_O not refitted",
            plain(lambda method: dataclasses.replace(method, refit=False)),
        ),
    }
    for distances in DISTANCES:
        what = f"fold-plain, made for keys up to {distances} tokens back"
        found[f"plain-near-{distances}"] = (what, _converted(_plain("fold", ratio), distances))
    for size in GROUPS:
        found[f"group-{size}"] = (
            f"fold, {size} heads share one of the same bytes",
            _converted(_grouped(size, ratio)),
        )
    return found | {
        "auto-uniform": ("auto, as many numbers in every layer", _converted(_uniform_budget(ratio)))
    }


def _identity(second: Tensor) -> Tensor:
    return torch.eye(second.shape[-1], dtype=second.dtype).expand_as(second)


def _transformed(plan: Plan, changes: dict[str, Callable[[Tensor], Tensor]]) -> Make:
    """A conversion from transformed moments."""

    def make(bench: Bench) -> Made:
        windows = bench.calibration()
        transformed = [
            dataclasses.replace(
                moments, **{name: change(getattr(moments, name)) for name, change in changes.items()}
            )
            for moments in measure_moments(bench.decoder, windows)
        ]
        return Made.of(*bench.convert(plan(bench, windows).layer_plans, moments_of=transformed.__getitem__))

    return make


def _grouped(size: int, ratio: float) -> Plan:
    def plan(bench: Bench, windows: Tensor) -> CompressionPlan:
        (method,) = methods_for("fold", bench.attention)
        request = CompressionRequest(
            group_size=size, kv_head_dim=int(ratio * size * bench.attention.head_dim)
        )
        shape = fixed_shape(request, (method,), bench.attention)
        assert shape is not None
        return CompressionPlan([LayerPlan(method, shape)] * len(bench.decoder.layers))

    return plan


def _uniform_budget(ratio: float) -> Plan:
    def plan(bench: Bench, windows: Tensor) -> CompressionPlan:
        surveyed, layer_plans = chosen("auto", ratio)(bench, windows).layers, list[LayerPlan]()
        for layer in surveyed:
            allowed = shapes_for(layer.trained, layer.sizes, CompressionRequest().widths)
            layer_plans += Frontier([layer], [allowed]).layer_plans(int(ratio * layer.trained.kv_width))
        return CompressionPlan(layer_plans, layers=surveyed)

    return plan


# Healing, bounds


def _healed(plan: Plan, steps: int) -> Make:
    def make(bench: Bench) -> Made:
        recipe = bench.recipe
        windows = bench.calibration(
            dataclasses.replace(recipe, samples=HEAL_SAMPLES) if recipe.source == "self" else recipe
        )
        choice = plan(bench, windows)
        converted, reports = bench.convert(choice.layer_plans, windows=windows)
        training, held_out = (windows[each] for each in split_windows(len(windows)))
        start = time.process_time()
        healed = heal(bench.decoder, converted, training, held_out, HealOptions(steps), Progress())
        healing = {**healed.report.to_json(), "processor_seconds": time.process_time() - start}
        return Made.of(
            healed.decoder, reports, unhealed=bench.divergences(Made.of(converted).run), healing=healing
        )

    return make


def _bounded(bound: float) -> Make:
    def make(bench: Bench) -> Made:
        choice = _choice(bench, bench.calibration(), "auto", CompressionRequest(max_kl=bound))
        points = [asdict(point) for point in choice.points]
        return Made.of(
            *bench.convert(choice.layer_plans), max_kl=bound, predicted_kl=predicted_kl(choice), points=points
        )

    return make
