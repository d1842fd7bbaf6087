"""The options that `build`, `compress` and `calibrate` share; knows option names, and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvexport.bundle.manifest import BYTES
from kvexport.errors import UsageError
from kvexport.eviction.config import DEFAULT_FIRST, DEFAULT_POLICY, POLICIES, EvictionRequest

if TYPE_CHECKING:
    from kvexport.build.pipeline import BuildOptions
    from kvexport.calibrate import Recipe

F = TypeVar("F", bound=Callable[..., Any])
_HEAL_SAMPLES = 192  # windows of its own text that a model is healed on, unless --samples says otherwise


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


calibration_options = _together(
    click.option(
        "--calibration",
        metavar="SOURCE",
        help="self (default: the model samples its own text), random, or a FILE of text or JSON lines.",
    ),
    click.option("--samples", type=int, help="Windows of calibration text [default: 96]."),
    click.option("--length", type=int, help="Tokens in a window [default: 256]."),
    click.option("--seed", type=int, help="Of sampling [default: 0]."),
)

cache_options = _together(
    click.option("--kv-ratio", type=float, help="Share of the KV cache to keep [default: 0.5]."),
    click.option(
        "--kv-heads", type=int, help="KV heads to keep in every layer; must divide the model's number."
    ),
)

conversion_options = _together(
    cache_options,
    calibration_options,
    click.option(
        "--statistics",
        type=click.Path(path_type=Path),
        help="Saved by `kvexport calibrate`, instead of --calibration.",
    ),
    click.option(
        "--heal",
        type=click.IntRange(min=1),
        metavar="STEPS",
        help="Distil the attention weights towards the original's logits.",
    ),
    click.option(
        "--heal-lora",
        type=click.IntRange(min=1),
        metavar="RANK",
        help="Heal with adapters of this rank: less memory.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(tuple(BYTES)),
        default="float32",
        show_default=True,
        help="Of weights and cache.",
    ),
)


shape_options = _together(
    click.option(
        "--max-kl",
        type=float,
        help="The smallest cache whose mean KL to the original stays below this, in nats.",
    ),
    click.option(
        "--group-size", type=int, help="Trained KV heads that share one [default: each layer's best]."
    ),
    click.option(
        "--kv-head-dim",
        type=int,
        help="Width of cached keys and values, at most 256 [default: each layer's best].",
    ),
    click.option(
        "--target",
        metavar="NAME|FILE",
        help="Use what this device's engine takes: where its attention is not fused, keys and values may differ in width.",
    ),
)


eviction_options = _together(
    click.option(
        "--kv-budget",
        metavar="TOKENS|SHARE",
        help="Hold at most so many tokens of a sequence, or that share of the capacity.",
    ),
    click.option(
        "--evict", type=click.Choice(tuple(POLICIES)), help=f"Which token goes [default: {DEFAULT_POLICY}]."
    ),
    click.option(
        "--protect-first",
        type=int,
        metavar="N",
        help=f"The first tokens never go [default: {DEFAULT_FIRST}].",
    ),
    click.option(
        "--protect-recent",
        type=int,
        metavar="N",
        help="Nor do the last ones [default: half of the budget behind the first; 0 for --evict window].",
    ),
    click.option(
        "--evict-skip-layers",
        metavar="LAYERS",
        help="Layers that hold every token, such as 0,1 [default: none].",
    ),
)


def eviction_from(options: dict[str, Any]) -> EvictionRequest | None:
    """What the eviction options mean; takes them out of `options`.

    Raises:
        UsageError: out of range, or without --kv-budget.
    """
    budget, skipped = options.pop("kv_budget"), options.pop("evict_skip_layers")
    others = {
        name: options.pop(option)
        for option, name in (
            ("evict", "policy"),
            ("protect_first", "protect_first"),
            ("protect_recent", "protect_recent"),
        )
    }
    if budget is None:
        if skipped is not None or any(value is not None for value in others.values()):
            raise UsageError(
                "nothing is evicted without a budget",
                got="--evict, --protect-first, --protect-recent or --evict-skip-layers",
                fix="add --kv-budget TOKENS",
            )
        return None
    try:
        layers = () if skipped is None else tuple(sorted({int(each) for each in skipped.split(",")}))
    except ValueError:
        raise UsageError(
            "--evict-skip-layers is no list of layers", got=skipped, expected="numbers such as 0,1"
        ) from None
    return EvictionRequest.parse(budget, **others, skip_layers=layers)


def recipe_from(calibration: str | None, samples: int | None, length: int | None, seed: int | None) -> Recipe:
    """The recipe that the calibration options mean."""
    from kvexport.calibrate import recipe_for

    return recipe_for("self" if calibration is None else calibration, samples, length, seed)


def plan_from(options: dict[str, Any]) -> BuildOptions:
    """The plan that the conversion options mean; takes them out of `options`.

    Raises:
        UsageError: options that contradict each other or are out of range.
    """
    from kvexport.build.pipeline import BuildOptions
    from kvexport.convert import CompressionRequest
    from kvexport.devices.targets import load_target, lowering_for

    sources = [options.pop(name) for name in ("calibration", "samples", "length", "seed")]
    if options.get("statistics") is not None and any(value is not None for value in sources):
        raise UsageError(
            "--statistics holds its own calibration text",
            got="--calibration, --samples, --length or --seed beside it",
            fix="leave those out, or --statistics",
        )
    wishes = {
        name: options.pop(name, None)
        for name in ("kv_heads", "kv_ratio", "max_kl", "group_size", "kv_head_dim")
    }
    target = options.pop("target", None)
    request = CompressionRequest(
        **wishes, equal_widths=target is None or lowering_for(load_target(target)) == "std24"
    )
    names = ("method", "statistics", "dtype", "heal", "heal_lora")
    rest = {name: options.pop(name) for name in names if name in options}
    if "kv_budget" in options:
        rest["eviction"] = eviction_from(options)
    if rest.get("heal_lora") is not None and rest["heal"] is None:
        raise UsageError("--heal-lora says how to heal", got="no --heal", fix="add --heal STEPS")
    if rest.get("heal") is not None and sources[0] in (None, "self") and sources[1] is None:
        sources[1] = _HEAL_SAMPLES
    assert not options, f"options that nobody took: {options}"
    return BuildOptions(recipe_from(*sources), request, **rest)
