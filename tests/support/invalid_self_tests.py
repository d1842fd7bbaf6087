"""Changes that make a self_test.json invalid; the readers in Python and C++ must reject each."""

from __future__ import annotations

from support.tiny_bundles import put

INVALID = (
    put("format", to=2),
    put("prompt", to=[]),
    put("prompt", 0, to=40),
    put("prompt", 0, to=-1),
    put("prompt", 0, to=1.0),
    put("continuation", to=[1] * 200),
    put("continuation", to=None),
    put("first_row", to=16),
    put("first_row", to=-1),
    put("first_row", to=True),
    put("logit_indices", to=[]),
    put("logit_indices", 0, to=40),
    put("slots", to=8),
    put("rows", to=[]),
    put("rows", 3, to=None),
    put("rows", 3, "rms", to=float("nan")),
    put("rows", 3, "rms", to="1"),
    put("rows", 3, "values", to=[1.0]),
    put("rows", 3, "key_norms", to=[1.0]),
    put("rows", 3, "likeliest", to=40),
    put("rows", 3, "value_norms", 0, to=float("inf")),
    put("rows", 3, "margin", to=True),
    put("first_row", to=2**80),
    put("tolerances", "cpu", to={}),
    put("tolerances", "cuda", "float16", "norms", to=None),
    put("tolerances", to=[]),
    lambda raw: raw.pop("weights_sha256"),
    lambda raw: raw.pop("slots"),
    lambda raw: raw.clear(),
)
