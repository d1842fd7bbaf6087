"""Write docs/families.md from the family files, published configs and the record of the parity tests.

Run it after a change of a family:                  python docs/scripts/families.py
Measure parity again (minutes; needs transformers): python docs/scripts/families.py --measure

A test compares the page with what this script writes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.family_cases import DEFAULTS  # noqa: E402
from support.family_settings import SIZES  # noqa: E402
from support.parity import PROMPT  # noqa: E402
from support.published_models import published_configs  # noqa: E402

from kvexport.build.hf_checkpoint import require_folding  # noqa: E402
from kvexport.bundle.manifest import largest_call  # noqa: E402
from kvexport.cli.report import size  # noqa: E402
from kvexport.errors import UsageError  # noqa: E402
from kvexport.model.architecture import Architecture, read_architecture  # noqa: E402
from kvexport.model.families import families  # noqa: E402
from kvexport.model.hf_config import HFConfig  # noqa: E402
from kvexport.model.unsupported import FEATURES  # noqa: E402
from kvexport.plan.memory import kv_bytes  # noqa: E402
from kvexport.plan.sizes import TrainedSizes  # noqa: E402
from kvexport.plan.weights import precision  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
RECORD = ROOT / "benchmarks" / "results" / "families.json"
MEASURE = "python docs/scripts/families.py --measure"
TESTS = ("tests/model/test_family_parity.py", "tests/model/test_renamed_families.py")
LENGTHS = (4096, 8192, 32768)  # tokens
LONG = LENGTHS[-1]
WINDOWED = (
    "Gemma-3-1B", "Gemma-3-4B, text", "Mistral-7B-v0.1", "Phi-3-mini-4k", "OLMo-3-7B",
    "c4ai-command-r7b-12-2024",
)  # fmt: skip

TEXT = """\
# Model families

This page is generated from the [family files](../graphs/families/README.md), configs of published models
and the record of the parity tests, by `docs/scripts/families.py`. [Add a
family](../CONTRIBUTING.md#add-a-family) says how to add one.

`model_type` in `config.json` selects the family; {model_types} are supported. Another one, or a feature
that does not fit, is [refused with its reason](#refused) by `plan`, `build` and `compress` alike.

## Supported

{supported}

**Features** are read from configs of published models, or from that of the tests where none is at hand.
Norms are before attention and MLP unless the column says otherwise. *Some*: not all models have it. Kinds
of RoPE scaling are those of the parity tests.

**compress writes**: the checkpoint of the family's own class that `kvexport compress` makes. *Fewer KV
heads*: the config has a key for their number, and other programs cache less, too. *Repeated KV heads*: it
has none, and each KV head is stored for every attention head that uses it. Other programs cache as much as
before; `kvexport build` compresses the repetition without loss. *Refused*: a norm or a clip stands between
the projection and the cache, so that no map of keys can be in the weights; `kvexport build` makes a bundle.

**Window cache**: keys and values in float16 at {long} tokens, or at the model's own context if that is
shorter, and in parentheses without rings ([below](#what-windows-gain)).

### Parity

transformers saves tiny models of random weights (two layers or a few more, 32 to 88 wide), kvexport reads
them, and the logits of both are compared in float64. The **parity error** is the largest difference by the
largest logit: for all tokens at once / for {prompt} tokens at once and the others one by one with the
cache. It is the largest of all cases of a model type, {cases} in total; above 1e-9 a test fails. Cases have
MHA and GQA where the family has both. **Context tried** is their length in tokens, and the windows and
original contexts (of scaled RoPE) that it exceeds. Other tests change one setting, tensor or line of a
family file, and require that the error is seen.

Measured on {date} with {versions}: `{command}`. It runs {tests}; a family without a class in transformers
is compared with the class that has the same weights under other names.

## What windows gain

A layer with a sliding window caches the window and the tokens of one call ({call}) in a ring, without loss;
other layers cache all tokens. Keys and values of one sequence in float16, as `kvexport plan` computes them,
and in parentheses what they would be without rings:

{windows}

A dash: the model's own context is shorter. The longer Phi-3 models (128k) have a window of 262,144 tokens,
more than their context: they gain nothing.

`tests/runtime/test_runtime_rings_long.py` runs 10,000 steps of a tiny Mistral with a window of 64: the cache
has the size of the window and one call, and the logits of every 50th step are those of transformers.

## Refused

A model is refused by the first feature that does not fit; the message names the setting of `config.json`
that shows it.

{refused}

For a model for several media whose text part is of a supported family, the message has the command that
saves the text part. Quantised checkpoints, adapters and other file formats are in
[Troubleshooting](troubleshooting.md).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", action="store_true", help="run the parity tests and write the record")
    if parser.parse_args().measure:
        RECORD.write_text(json.dumps(measured(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


# --- the record


def measured() -> dict[str, Any]:
    """Run the parity tests; the largest errors and what was tried, by model type."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "junit_family=xunit1",
            "-m",
            "",
            "--junitxml",
            str(report),
        ]
        done = subprocess.run([sys.executable, "-m", "pytest", *options, *TESTS], cwd=ROOT)
        if done.returncode:
            raise SystemExit(done.returncode)
        properties = ElementTree.parse(report).iter("property")
        cases = [json.loads(each.attrib["value"]) for each in properties if each.attrib["name"] == "parity"]
    return {
        "settings": {
            "date": datetime.now(timezone.utc).date().isoformat(),
            "command": MEASURE,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "dtype": "float64",
            "prompt_tokens": PROMPT,
        },
        "rows": {
            model_type: row([case for case in cases if case["model_type"] == model_type])
            for model_type in sorted({case["model_type"] for case in cases})
        },
    }


def row(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One model type: the largest of each figure, and all that was tried."""
    largest = {
        name: max(case[name] for case in cases if name in case)
        for name in ("tokens", "at_once", "step_by_step")
        if any(name in case for case in cases)
    }
    tried = {
        name: sorted({each for case in cases for each in case[name]})
        for name in ("windows", "original_contexts", "rope_kinds")
    }
    return {"cases": len(cases), **largest, **tried}


# --- the page


def page() -> str:
    """docs/families.md."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    settings, rows = record["settings"], record["rows"]
    if families().keys() - rows.keys():
        unknown = ", ".join(sorted(families().keys() - rows.keys()))
        raise SystemExit(
            f"{RECORD.relative_to(ROOT)} must have every model type, not {unknown}; run: {MEASURE}"
        )
    versions = [f"{name} {number}" for name, number in settings["versions"].items()]
    return TEXT.format(
        model_types=len(families()),
        supported=table(
            (
                "model_type",
                "models",
                "features",
                "parity error",
                "context tried",
                "compress writes",
                "window cache",
            ),
            [supported(model_type, rows[model_type]) for model_type in sorted(families())],
        ),
        long=f"{LONG:,}",
        prompt=settings["prompt_tokens"],
        cases=sum(each["cases"] for each in rows.values()),
        date=settings["date"],
        versions=", ".join([*versions, f"Python {settings['python']}"]),
        command=settings["command"],
        tests=" and ".join(f"`{each}`" for each in TESTS),
        call=largest_call(None),
        windows=table(
            ("model", "window", "layers with it", *(f"{tokens:,} tokens" for tokens in LENGTHS)),
            [gain(name) for name in WINDOWED],
        ),
        refused=table(
            ("a model with", "reason", "what to do"),
            [(each.name, each.reason, each.advice) for each in FEATURES],
        ),
    )


def supported(model_type: str, measured: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table of families."""
    configs = configs_of(model_type)
    read = {name: read_architecture(config) for name, config in configs.items()}
    return (
        f"`{model_type}`",
        families()[model_type].models[model_type],
        ", ".join([*features(list(read.values())), *scaling(measured)]),
        f"{error(measured['at_once'])} / {error(measured['step_by_step'])}",
        context(measured),
        written({name: written_checkpoint(config) for name, config in configs.items()}),
        window_cache(read),
    )


def configs_of(model_type: str) -> dict[str, dict[str, Any]]:
    """Configs of published models by name; those of the tests' tiny model if there is none."""
    published = {
        name: config for name, config in published_configs().items() if config["model_type"] == model_type
    }
    return published or {"": {"model_type": model_type, **DEFAULTS.get(model_type, SIZES)}}


def features(models: Sequence[Architecture]) -> list[str]:
    """Features of all models, and those of some."""
    found = [feature_texts(each) for each in models]
    names = list(dict.fromkeys(name for each in found for name in each))
    texts = []
    for name in names:
        values = list(dict.fromkeys(each[name] for each in found if name in each))
        some = "" if all(name in each for each in found) else " (some)"
        texts.append(" or ".join(values) + some)
    return texts


def feature_texts(it: Architecture) -> dict[str, str]:
    """Features of a model by kind."""
    family, windows = it.family, [layer.window is not None for layer in it.layers]
    ropes = {layer.rope for layer in it.layers if layer.rope is not None}
    unrotated = family.position == "rope" and any(layer.rope is None for layer in it.layers)
    multipliers = {
        "embeddings": it.embedding_multiplier,
        "residuals": it.residual_multiplier,
        "logits": it.logit_multiplier,
    }
    multiplied = [name for name, value in multipliers.items() if value != 1]
    texts = {
        "norms": norms(it),
        "parallel": "parallel block" if family.parallel else "",
        "positions": {"rope": "RoPE", "alibi": "ALiBi", "learned": "learned positions"}[family.position],
        "pairs": "interleaved pairs" if family.position == "rope" and family.pairs == "interleaved" else "",
        "partial": f"{it.rotary_dim / it.head_dim:.0%} of a head rotates"
        if 0 < it.rotary_dim < it.head_dim
        else "",
        "unrotated": "layers without rotation" if unrotated else "",
        "theta": "own theta of window layers" if len({rope.theta for rope in ropes}) > 1 else "",
        "qk_norm": qk_norm(it),
        "windows": f"windows in {'all' if all(windows) else 'some'} layers" if any(windows) else "",
        "softcap": "attention softcap" if it.softcap else "",
        "logit_softcap": "logit softcap" if it.logit_softcap else "",
        "clip": "clipped projections" if it.clip else "",
        "scale": "own attention scale" if abs(it.scale * it.head_dim**0.5 - 1) > 1e-9 else "",
        "multipliers": f"multipliers ({', '.join(multiplied)})" if multiplied else "",
    }
    return {name: text for name, text in texts.items() if text}


def norms(it: Architecture) -> str:
    family, names = it.family, it.family.names.layer
    kind = "RMSNorm" if family.norm_kind == "rms" else "LayerNorm"
    details = []
    if not family.norm_weight:
        details.append("without weight")
    if family.norm_offset:
        details.append("weight 1 + w")
    if "attention_residual_norm" in names:
        details.append("after additions")
    if "attention_output_norm" in names:
        details.append("before and after" if "attention_norm" in names else "after")
    return f"{kind} {', '.join(details)}".strip() if len(details) < 2 else f"{kind} ({', '.join(details)})"


def qk_norm(it: Architecture) -> str:
    norm = it.family.qk_norm
    if norm is None:
        return ""
    over = {"head": "", "each": " with weights of each head", "heads": " over all heads"}[norm.over]
    return f"QK-norm{over}{' after rotation' if norm.after_rotation else ''}"


def written_checkpoint(config: Mapping[str, Any]) -> str:
    """What `kvexport compress` writes of a model."""
    form = HFConfig.of_source(config)
    counts = TrainedSizes(form.architecture).kv_head_counts
    if len(counts) == 1:
        return "nothing to reduce: one KV head (`kvexport build` narrows it)"
    try:
        require_folding(form.architecture, "fold")
    except UsageError as error:
        return f"refused: {error.what.partition('without ')[2].partition(':')[0]}"
    fewer = form.with_kv_heads(counts[1]).architecture.num_kv_heads == counts[1]
    return "fewer KV heads" if fewer else "repeated KV heads"


def written(results: Mapping[str, str]) -> str:
    """What is written of several models, with their names if it differs."""
    kinds = list(dict.fromkeys(results.values()))
    if len(kinds) == 1:
        return kinds[0]
    return "; ".join(
        f"{kind} ({', '.join(name for name, result in results.items() if result == kind)})" for kind in kinds
    )


def window_cache(models: Mapping[str, Architecture]) -> str:
    """Cache of the first published model with a window shorter than its context."""
    for name, it in models.items():
        tokens = min(LONG, it.max_positions or LONG)
        if name and any(layer.window is not None and layer.window < tokens for layer in it.layers):
            length = "" if tokens == LONG else f", {tokens:,} tokens"
            return f"{cached(it, tokens)} ({name}{length})"
    return ""


def cached(it: Architecture, tokens: int) -> str:
    """Bytes of keys and values with rings, and without in parentheses."""
    stored, sizes = precision("float16"), TrainedSizes(it).with_kv_heads(it.num_kv_heads)
    whole = replace(sizes, caches=tuple(replace(cache, window=None) for cache in sizes.caches))
    with_rings, without = (kv_bytes(each, stored, tokens) for each in (sizes, whole))
    return f"{size(with_rings)} ({size(without)})"


def gain(name: str) -> tuple[str, ...]:
    it = read_architecture(published_configs()[name])
    windows = [layer.window for layer in it.layers if layer.window is not None]
    return (
        name,
        f"{windows[0]:,}",
        f"{len(windows)} of {len(it.layers)}",
        *(cached(it, tokens) if tokens <= (it.max_positions or tokens) else "—" for tokens in LENGTHS),
    )


def scaling(measured: Mapping[str, Any]) -> list[str]:
    """Kinds of RoPE scaling that were tried."""
    kinds = [each for each in measured["rope_kinds"] if each != "default"]
    return [f"RoPE scaling ({', '.join(kinds)})"] if kinds else []


def error(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def context(measured: Mapping[str, Any]) -> str:
    """Tokens of the longest sequence, and what it is beyond."""
    beyond = [f"window {each}" for each in measured["windows"]]
    beyond += [f"original {each}" for each in measured["original_contexts"]]
    return ", ".join([f"{measured['tokens']}", *beyond])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
