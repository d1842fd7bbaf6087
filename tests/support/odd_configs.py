"""Strategies for config.json files that are odd: of a supported family, with values that no model has."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from hypothesis import strategies as st

from kvexport.files.resources import resource
from support.family_cases import CASES, DEFAULTS

ODD_NUMBERS = [
    0, 1, -1, 2, 3, 7, 0.0, -0.0, 0.5, 1e-320, 1e308, 2**24, 2**31, 2**63, 10**9, 10**400, -(10**400),
    float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
ODD_TEXTS = [
    "",
    "yes",
    "true",
    "1",
    "1e400",
    "auto",
    "\x00",
    "\udc80",
    "ｆｕｌｌ",
    "x" * 100_000,
    "__class__",
]
_SCALARS = st.one_of(
    st.none(), st.booleans(), st.sampled_from(ODD_NUMBERS), st.integers(), st.floats(),
    st.sampled_from(ODD_TEXTS), st.text(max_size=5),
)  # fmt: skip
VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)
RUNS = st.builds(lambda value, count: [value] * count, _SCALARS, st.sampled_from([1, 2, 3, 64, 2000]))


@cache
def configs(family: str | None = None) -> list[str]:
    """config.json of all tiny models, or of a family's with default settings, as transformers writes it.

    Keys that no description reads are left out.
    """
    from transformers import AutoConfig

    descriptions = (path.read_text() for path in resource("graphs", "families").glob("*.toml"))
    read = set(re.findall(r"\w+", "".join(descriptions)))

    def written(family: str, changes: dict[str, Any]) -> str:
        config = AutoConfig.for_model(family, **{**DEFAULTS[family], **changes}).to_dict()
        kept = {key: value for key, value in config.items() if key in read or key.startswith("rope")}
        return json.dumps(kept, default=str)

    return [written(*case) for case in (CASES if family is None else [(family, {})])]


@st.composite
def odd_configs(draw: st.DrawFn, family: str | None = None) -> dict[str, Any]:
    """A config of `configs()` of which up to three values, nested ones included, are odd or missing.

    Args:
        family: model type of the tiny model that is changed; None: any.
    """
    config: dict[str, Any] = json.loads(draw(st.sampled_from(configs(family))))
    for _ in range(draw(st.integers(1, 3))):
        table: Any = config
        key: Any = draw(st.sampled_from(sorted(config)))
        while isinstance(table[key], (dict, list)) and table[key] and draw(st.booleans()):
            table = table[key]
            key = draw(
                st.integers(0, len(table) - 1) if isinstance(table, list) else st.sampled_from(sorted(table))
            )
        value = table[key]
        how = draw(st.sampled_from(["odd", "odd", "run", "grow", "swap", "remove"]))
        if how == "odd":
            table[key] = draw(VALUES)
        elif how == "run":
            table[key] = draw(RUNS)
        elif how == "grow":
            factor = draw(st.sampled_from([0, 2, 3, 1000]))
            table[key] = value * factor if type(value) in (int, float) else [value, value]
        elif how == "swap":
            table[key] = config[draw(st.sampled_from(sorted(config)))]
        else:
            del table[key]
        if not config:
            break
    return config
