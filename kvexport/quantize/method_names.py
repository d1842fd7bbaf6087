"""Names of the methods of weight quantisation; imports no torch, for the command line."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal["nearest", "clip", "gptq", "awq", "awq+gptq"]
METHODS: tuple[Method, ...] = get_args(Method)
DEFAULT_BITS = 5.0  # mean bits of a weight with its scales, of which most have 4
DEFAULT: Method = "gptq"  # the least KL at equal bytes (benchmarks/weight_quality.py)
