"""The tables of docs/8b-on-8gb.md are what `kvexport.plan` calculates from the configs on that page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.documents import ROOT

from kvexport.devices.targets import Target, load_target
from kvexport.engine.preflight import build_memory
from kvexport.plan import Plan, plan
from kvexport.plan.sizes import trained_sizes
from kvexport.quantize.method_names import DEFAULT_BITS

PAGE = (ROOT / "docs" / "8b-on-8gb.md").read_text(encoding="utf-8")
NAMES = {
    "llama-3.1-8b": ("Llama-3.1-8B", 8_030_261_248),
    "qwen3-8b": ("Qwen3-8B", 8_190_735_360),
    "mistral-7b-v0.3": ("Mistral-7B-v0.3", 7_248_023_552),
}
CONTEXT = 4096
FEWEST, DEFAULT = ("int4", 4.2), ("int4", DEFAULT_BITS)
NANO: list[tuple[str, float | None]] = [FEWEST, DEFAULT]
NX: list[tuple[str, float | None]] = [FEWEST, DEFAULT, ("int8", None)]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `shapes` that the page's commands make."""
    folder = tmp_path_factory.mktemp("page") / "shapes"
    found = re.findall(r"^cat > shapes/(\S+)/config\.json <<'END'\n(.*?)^END$", PAGE, flags=re.M | re.S)
    assert [name for name, _ in found] == list(NAMES)
    for name, text in found:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(json.loads(text)))
    return folder


def planned(
    model: Path, target: Target, weights: str, bits: float | None = None, jetpack: str | None = None
) -> Plan:
    return plan(model, target, jetpack=jetpack, weights=[weights], weight_bits=bits, contexts=[CONTEXT])


def contexts(found: Plan) -> str:
    return " / ".join(f"{row.largest_context:,}" for row in found.rows)


def speed(found: Plan) -> str:
    seconds = found.rows[0].decode_seconds
    assert seconds is not None
    return f"{1 / seconds.typical:.0f}"


def row(model: Path, formats: tuple[str, float | None], target: Target, *others: Target) -> str:
    """A line of a table: its first target is the one whose contexts are shown."""
    old, new = (planned(model, target, *formats, version) for version in ("6.2", "7.2"))
    label = formats[0] if formats[1] is None else f"{formats[0]}, {formats[1]:g} bits"
    cells = [
        NAMES[model.name][0],
        label,
        f"{old.rows[0].weights.total / 2**30:.1f} GiB",
        contexts(old),
        contexts(new),
        *(speed(planned(model, each, *formats)) for each in (target, *others)),
    ]
    return f"| {' | '.join(cells)} |"


def own_board() -> Target:
    """The target that the page's `sed` writes."""
    assert "usable = 0.7/" in PAGE
    return replace(load_target("orin-nano-8gb"), usable=0.7)


def test_the_configs_have_the_published_parameters(shapes: Path) -> None:
    for name, (_, parameters) in NAMES.items():
        assert trained_sizes(shapes / name).with_kv_heads(8).parameters == parameters


@pytest.mark.parametrize("formats", NANO, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_orin_nano(shapes: Path, name: str, formats: tuple[str, float | None]) -> None:
    assert row(shapes / name, formats, own_board(), load_target("orin-nano-8gb-super")) in PAGE


@pytest.mark.parametrize("formats", NX, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_orin_nx(shapes: Path, name: str, formats: tuple[str, float | None]) -> None:
    assert row(shapes / name, formats, load_target("orin-nx-16gb")) in PAGE


def test_what_the_page_says_does_not_fit(shapes: Path) -> None:
    for name in NAMES:
        for target, weights in ((own_board(), "int8"), (load_target("orin-nx-16gb"), "float16")):
            for version in ("6.2", "7.2"):
                found = planned(shapes / name, target, weights, None, version)
                assert {each.largest_context for each in found.rows} == {0}, (name, target.title)
        small = planned(shapes / name, load_target("orin-nano-8gb"), *FEWEST, "7.2")
        assert {each.largest_context for each in small.rows} == {0}


def test_an_8_gb_board_needs_swap_to_build(shapes: Path) -> None:
    (found, *_) = planned(shapes / "llama-3.1-8b", own_board(), *FEWEST).rows
    needed = build_memory(found.weights.total, "tensorrt")
    assert f"{needed / 2**30:.1f} GiB for\nLlama-3.1-8B" in PAGE
    assert needed > own_board().memory
