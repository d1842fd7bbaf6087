"""Options that `build`, `compress`, `calibrate` and `analyze` share, and the settings that they stand for.

The modules that use torch are imported on first use, so that `--help` stays fast.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvexport.bundle.formats import BITS, BLOCKS, BYTES
from kvexport.cli.options import device_option
from kvexport.convert.method_names import METHOD_NAMES, method_help
from kvexport.errors import CannotRunHere, UsageError
from kvexport.eviction.config import (
    BASELINE_POLICIES,
    DEFAULT_FIRST,
    DEFAULT_POLICY,
    POLICIES,
    EvictionRequest,
)
from kvexport.quantize.method_names import DEFAULT as DEFAULT_METHOD
from kvexport.quantize.method_names import DEFAULT_BITS, METHODS

if TYPE_CHECKING:
    from kvexport.build import BuildOptions
    from kvexport.calibrate import Recipe

F = TypeVar("F", bound=Callable[..., Any])
_WEIGHT_OPTIONS = (
    "weights",
    "head_weights",
    "embedding_weights",
    "weight_method",
    "weight_block",
    "weight_bits",
    "weight_max_kl",
)
_HEAL_SAMPLES = 192  # default of --samples with --heal, when the model samples its own text


def _group(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def method_option(default: str) -> Callable[[F], F]:
    """`--method`, with the default of a command."""
    return click.option(
        "--method", type=click.Choice(METHOD_NAMES), default=default, show_default=True, help=method_help()
    )


def output_option(content: str) -> Callable[[F], F]:
    """`--output`, for a command that writes `content`."""
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        required=True,
        help=f"{content} to write; must not exist, unless --force is given.",
    )


def _calibration_options(default: str, default_samples: str) -> Callable[[F], F]:
    return _group(
        click.option(
            "--calibration",
            metavar="SOURCE",
            help="Calibration text: mixed (shipped articles, reference works, classics, dialogues, code, "
            "many languages; a quarter sampled from the model), self (sampled from the model), random "
            "(random tokens), or a FILE of text or JSON lines.  "
            f"[default: {default}]",
        ),
        click.option(
            "--samples", type=int, help=f"Number of calibration windows.  [default: {default_samples}]"
        ),
        click.option(
            "--length",
            type=int,
            help="Length of a calibration window in tokens.  [default: 256, or the model's maximum if less]",
        ),
        click.option("--seed", type=int, help="Random seed of the calibration text.  [default: 0]"),
        device_option,
    )


calibration_options = _calibration_options("mixed", "192 of mixed, else 96")

statistics_option = click.option(
    "--statistics",
    type=click.Path(path_type=Path),
    help="Statistics from `kvexport calibrate`, in place of calibration text.",
)

no_cache_option = click.option(
    "--no-cache",
    is_flag=True,
    help="Use no results of earlier builds, and keep none for later ones (see `kvexport cache`).",
)

capacity_option = click.option(
    "--capacity",
    type=int,
    help="Maximum sequence length in tokens.  [default: the model's maximum, at most 4096]",
)

kv_size_options = _group(
    click.option("--kv-ratio", type=float, help="Fraction of the KV cache to keep.  [default: 0.5]"),
    click.option(
        "--kv-heads",
        type=int,
        help="Number of KV heads in every layer; must divide the model's number of KV heads.",
    ),
)

conversion_options = _group(
    kv_size_options,
    _calibration_options("mixed; self with --heal", f"192 of mixed, else 96; {_HEAL_SAMPLES} with --heal"),
    statistics_option,
    no_cache_option,
    click.option(
        "--heal",
        type=click.IntRange(min=1),
        metavar="STEPS",
        help="Number of distillation steps after compression, which train the attention weights towards the "
        "original model's logits.  [default: no distillation]",
    ),
    click.option(
        "--heal-lora",
        type=click.IntRange(min=1),
        metavar="RANK",
        help="Rank of the LoRA adapters that --heal trains in place of whole weights; needs less memory.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(tuple(BYTES)),
        default="float32",
        show_default=True,
        help="Data type of computation and KV cache, and of weights without a format of their own.",
    ),
)


head_weights_option = click.option(
    "--head-weights",
    type=click.Choice(tuple(BITS)),
    help="Format of the weights of the head.  [default: --weights]",
)

embedding_weights_option = click.option(
    "--embedding-weights",
    type=click.Choice(tuple(BITS)),
    help="Format of the embedding.  [default: --weights; --head-weights if the head is tied to it]",
)

weight_block_option = click.option(
    "--weight-block",
    type=click.Choice(tuple(map(str, sorted(BLOCKS)))),
    help="Largest number of int4 weights that share a scale; a smaller one where it does not divide the "
    "width.  [default: 128; 64 in models less than 2048 wide]",
)

weight_options = _group(
    click.option(
        "--weights",
        type=click.Choice(tuple(BITS)),
        help="Format of the weights of the layers; int8 and int4 are quantised.  [default: --dtype]",
    ),
    head_weights_option,
    embedding_weights_option,
    click.option(
        "--weight-method",
        type=click.Choice(METHODS),
        default=DEFAULT_METHOD,
        show_default=True,
        help="How integer weights of the layers are chosen: nearest (rounding alone, which needs no "
        "calibration text), clip, gptq, awq, or awq and gptq together.",
    ),
    weight_block_option,
    click.option(
        "--weight-bits",
        type=float,
        metavar="BITS",
        help="With --weights int4, largest mean number of bits of a weight, with its scales, before "
        "compression: the most sensitive weights get 8 bits. Head and embedding count and may get them, "
        f"unless their formats are given.  [default: {DEFAULT_BITS:g}, or the least possible if that is "
        "more; with --weight-method nearest, none get 8 bits]",
    ),
    click.option(
        "--weight-max-kl",
        type=float,
        metavar="KL",
        help="With --weights int4, maximum predicted mean KL divergence caused by integer weights, in nats "
        "per token; gives 8 bits to as few weights as it allows, in place of --weight-bits.",
    ),
)


shape_options = _group(
    click.option(
        "--max-kl",
        type=float,
        help="Maximum mean KL divergence from the original model, in nats per token; takes the smallest "
        "cache below it, in place of --kv-ratio.",
    ),
    click.option(
        "--group-size",
        type=int,
        help="Number of original KV heads that share one new KV head.  [default: chosen for each layer]",
    ),
    click.option(
        "--kv-head-dim",
        type=int,
        help="Width of cached keys and values, at most 256.  [default: chosen for each layer]",
    ),
    click.option(
        "--target",
        metavar="NAME|FILE",
        help="Target device, from `kvexport targets` or a TOML file. Keys and values may then differ "
        "in width, unless the device's fused attention needs equal widths.",
    ),
)


def _policy_help() -> str:
    policies = [f"{name}: {token}" for name, token in POLICIES.items() if name not in BASELINE_POLICIES]
    baselines = [f"{name}: {POLICIES[name]}" for name in BASELINE_POLICIES]
    return (
        f"Eviction policy, by the token that it evicts. {'; '.join(policies)}. "
        f"Baselines for comparison: {'; '.join(baselines)}.  [default: {DEFAULT_POLICY}]"
    )


eviction_options = _group(
    click.option(
        "--kv-budget",
        metavar="TOKENS|FRACTION",
        help="Maximum number of tokens in the KV cache of a sequence, or a fraction of --capacity; further "
        "tokens evict older ones.  [default: no eviction]",
    ),
    click.option(
        "--evict",
        type=click.Choice(tuple(POLICIES)),
        help=_policy_help(),
    ),
    click.option(
        "--protect-first",
        type=int,
        metavar="N",
        help=f"Number of first tokens that are never evicted (attention sinks).  [default: {DEFAULT_FIRST}]",
    ),
    click.option(
        "--protect-recent",
        type=int,
        metavar="N",
        help="Number of most recent tokens that are never evicted.  [default: half of the remaining budget; "
        "0 with --evict window]",
    ),
    click.option(
        "--evict-skip-layers",
        metavar="LAYERS",
        help="Layers that do not evict, as comma-separated numbers from 0, such as 0,1.  [default: none]",
    ),
)


def eviction_request(options: dict[str, Any]) -> EvictionRequest | None:
    """The eviction that the options ask for; removes the options from `options`.

    Raises:
        UsageError: an option is out of range, or --kv-budget is missing.
    """
    budget, skipped = options.pop("kv_budget"), options.pop("evict_skip_layers")
    settings = {
        name: options.pop(option)
        for option, name in (
            ("evict", "policy"),
            ("protect_first", "protect_first"),
            ("protect_recent", "protect_recent"),
        )
    }
    if budget is None:
        if skipped is not None or any(value is not None for value in settings.values()):
            raise UsageError(
                "--evict, --protect-first, --protect-recent and --evict-skip-layers need --kv-budget",
                got="no --kv-budget",
                fix="add --kv-budget TOKENS",
            )
        return None
    try:
        layers = () if skipped is None else tuple(sorted({int(each) for each in skipped.split(",")}))
    except ValueError:
        raise UsageError(
            "--evict-skip-layers must be a list of layer numbers",
            got=skipped,
            expected="numbers from 0, separated by commas, such as 0,1",
        ) from None
    return EvictionRequest.parse(budget, **settings, skip_layers=layers)


def build_cache_folder(no_cache: bool) -> Path | None:
    """Folder of the build cache; None if it is not to be used, or the user has no home folder."""
    from kvexport.files.cache_folder import default_cache_folder

    with suppress(CannotRunHere):
        return None if no_cache else default_cache_folder()
    return None


def calibration_recipe(
    calibration: str | None, samples: int | None, length: int | None, seed: int | None
) -> Recipe:
    """The calibration recipe that the options ask for."""
    from kvexport.calibrate.recipe import DEFAULT, recipe_for

    return recipe_for(DEFAULT if calibration is None else calibration, samples, length, seed)


def build_options(options: dict[str, Any]) -> BuildOptions:
    """The build options that the conversion options ask for; removes the options from `options`.

    Raises:
        UsageError: options contradict each other or are out of range.
    """
    from kvexport.build import BuildOptions
    from kvexport.convert import CompressionRequest
    from kvexport.devices.targets import load_target, lowering_for

    calibration, samples, length, seed = (
        options.pop(name) for name in ("calibration", "samples", "length", "seed")
    )
    if options.get("statistics") is not None and (calibration, samples, length, seed) != (None,) * 4:
        raise UsageError(
            "--statistics must be given without options for calibration text, which it replaces",
            got="--statistics with --calibration, --samples, --length or --seed",
            fix="leave out --statistics, or leave out the others",
        )
    if options.get("heal_lora") is not None and options["heal"] is None:
        raise UsageError("--heal-lora needs --heal", got="no --heal", fix="add --heal STEPS")
    if options.get("heal") is not None:  # needs more text than is shipped
        calibration = "self" if calibration is None else calibration
        if calibration == "self" and samples is None:
            samples = _HEAL_SAMPLES
    target = options.pop("target", None)
    request = CompressionRequest(
        **{
            name: options.pop(name, None)
            for name in ("kv_heads", "kv_ratio", "max_kl", "group_size", "kv_head_dim")
        },
        equal_widths=target is None or lowering_for(load_target(target)) == "std24",
    )
    cache = build_cache_folder(options.pop("no_cache"))
    eviction = eviction_request(options) if "kv_budget" in options else None
    others = {
        name: options.pop(name)
        for name in ("method", "statistics", "dtype", "heal", "heal_lora", "device", *_WEIGHT_OPTIONS)
        if name in options
    }
    if others.get("weight_block") is not None:
        others["weight_block"] = int(others["weight_block"])
    assert not options, f"unused options: {options}"
    recipe = calibration_recipe(calibration, samples, length, seed)
    return BuildOptions(recipe, request, eviction=eviction, cache=cache, **others)
