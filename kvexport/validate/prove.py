"""A bundle against its PyTorch twin: teacher-forced, a prefill and then single decode steps.

Every layer's keys, values, attention output and residual stream, and the logits, must be the twin's within the
gates of the bundle's dtype. The cache is filled with garbage first, so that a graph which looks beyond what was
written fails. Knows what is compared; how close is close enough is in `gates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.bundle import Bundle
from kvexport.progress import Progress
from kvexport.validate.gates import GATES, Difference, Gate, compare, greedy_agreement
from kvexport.validate.twin import FILE, STEPS, read_twin

Array = NDArray[np.float32]


@dataclass(frozen=True)
class ValidationReport:
    """What was compared, and what failed.

    Attributes:
        dtype: whose gates applied.
        computed_in: the dtype of the arithmetic here; float32 where this machine has no kernels of `dtype`.
        prefill, steps: tokens of the prefill, and single-token steps after it.
        differences: of each layer's key, value, attention and residual, and of the logits.
        greedy_agreement: share of tokens at which bundle and twin choose the same next token.
        failures: a sentence for every gate that failed; empty if the bundle is sound.
    """

    dtype: str
    computed_in: str
    prefill: int
    steps: int
    gate: Gate
    differences: tuple[Difference, ...]
    greedy_agreement: float
    failures: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as `--json` prints them."""
        return asdict(self)

    def worst(self, kind: str) -> Difference:
        """The least alike of all layers' arrays of one kind ('key', ..., 'logits')."""
        return min((d for d in self.differences if d.name.split(".")[-1] == kind), key=lambda d: d.cosine)


def validate(path: Path, progress: Progress) -> ValidationReport:
    """Compare the bundle in `path` with what its PyTorch twin computed when it was built.

    Raises:
        BundleError: the bundle is damaged (every file is hashed first) or incomplete.
        CannotRunHere: onnx is not installed, which adds the taps to a copy of the graph.
    """
    bundle = Bundle.open(path)
    bundle.verify()
    twin = read_twin(path / FILE, len(bundle.layers))
    measured, computed_in = _run(bundle, twin["input_ids"], progress)
    return judge(bundle.dtype, computed_in, measured, twin)


def judge(dtype: str, computed_in: str, measured: Mapping[str, Array], twin: Mapping[str, Array]) -> ValidationReport:
    """Compare measured arrays with the twin's of the same names, under the gates of `dtype`."""
    gate = GATES[dtype]
    names = [name for name in twin if name != "input_ids"]
    differences = tuple(compare(name, measured[name], twin[name], gate) for name in names)
    agreement = greedy_agreement(measured["logits"], twin["logits"], gate)
    failures = [
        f"{d.name}: {check} {getattr(d, check):.6g}, allowed {_allowed(gate, check)}" for d in differences for check in d.failed
    ]
    if agreement < gate.agreement:
        failures.append(f"greedy agreement {agreement:.4f}, allowed at least {gate.agreement}")
    tokens = len(twin["input_ids"])
    return ValidationReport(
        dtype, computed_in, prefill_of(tokens), tokens - prefill_of(tokens), gate, differences, agreement, tuple(failures)
    )


def prefill_of(tokens: int) -> int:
    """How many of the twin's tokens are prefilled at once; the others are decoded one by one."""
    return max(1, tokens - STEPS)


def _allowed(gate: Gate, check: str) -> str:
    bound = getattr(gate, check)
    return f"1 ± {bound:g}" if check == "norm_ratio" else f"at {'least' if check == 'cosine' else 'most'} {bound:g}"
