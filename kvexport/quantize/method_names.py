"""Names of the methods of weight quantisation; imports no torch, for the command line."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal["nearest", "clip", "gptq", "awq", "awq+gptq"]
METHODS: tuple[Method, ...] = get_args(Method)
DEFAULT: Method = "gptq"  # the least KL at equal bytes (benchmarks/weight_quality.py)
