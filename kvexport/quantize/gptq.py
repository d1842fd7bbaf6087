"""GPTQ: codes with error feedback through the second moments of the inputs (arXiv 2210.17323).

For H = E[x xᵀ] the error of the outputs is E|(W - Q) x|² = tr((W - Q) H (W - Q)ᵀ). Columns are rounded one
after another, those of the largest H_ii first (act-order), and each column's error is compensated in the
columns that follow. With H = U Uᵀ, U upper triangular, the loss of a row w is

    |Uᵀ (w - q)|² = Σ_i U_ii² (w_i + Σ_{j<i} (w_j - q_j) U_ji / U_ii - q_i)²,

so that q_i is the code nearest to w_i + Σ_{j<i} (w_j - q_j) U_ji / U_ii. These are the updates of eqs. 2 and
3 of the paper, whose Cholesky factor of H⁻¹ is U⁻¹ (section 3.3, step 3), without the inverse: one Cholesky
factorisation, and feedback in products of matrices by recursive halving (the paper's lazy batches).

Scales are those that clip no weight of the blocks of the given weight, at their place in the original order
(static groups), and do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.errors import KvexportError
from kvexport.model.decoder import WeightCodes
from kvexport.quantize.grid import Grid, absmax_scales, code_range, pack, require_finite

DAMPING = 0.1  # of the mean of H's diagonal; the paper has 0.01, which loses more where calibration is short
_WIDE = 8192  # columns up to which H is factorised in float64; its memory and time grow beyond
_LEAF = 8  # columns that are rounded one by one


def gptq(
    weight: Tensor,
    second: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    *,
    damping: float = DAMPING,
    scales: Tensor | None = None,
) -> WeightCodes:
    """Codes of a weight by GPTQ with act-order and static groups.

    Args:
        weight: [out, in], finite.
        second: second moments H = E[x xᵀ] of the inputs, [in, in].
        grid: bits and block.
        dtype: data type of computation, to which scales are rounded.
        damping: what is added to H's diagonal, in units of its mean.
        scales: [out, blocks], positive and representable in `dtype` [default: `absmax_scales`].

    Returns:
        Codes, with scales in the dtype of `weight`.

    Raises:
        KvexportError: weights or moments are not finite, or a weight would be infinite in `dtype`.
    """
    return Factor(second, damping).codes(weight, grid, dtype, scales)


class Factor:
    """The order of the columns, and the factor of H that carries their errors; for all weights of one input.

    Attributes:
        order: columns in the order in which they are rounded, [in] int64.
    """

    def __init__(self, second: Tensor, damping: float = DAMPING) -> None:
        """
        Args:
            second: second moments H, [in, in].
            damping: what is added to H's diagonal, in units of its mean. Columns without input get the same.

        Raises:
            KvexportError: H is not finite.
        """
        diagonal = second.diagonal()
        if not bool(second.isfinite().all()):
            raise KvexportError(
                "the second moments of a linear map's inputs must be finite",
                got="NaN or infinite numbers",
                fix="calibrate on other text (--calibration FILE)",
            )
        self.order = diagonal.argsort(descending=True, stable=True)
        self._feedback = _feedback(second, self.order, damping)

    def codes(
        self, weight: Tensor, grid: Grid, dtype: torch.dtype, scales: Tensor | None = None
    ) -> WeightCodes:
        """Codes of a weight, as `gptq` returns them."""
        require_finite(weight)
        if scales is None:
            scales = absmax_scales(weight, grid, dtype)
        work = torch.promote_types(weight.dtype, torch.float32)
        block = weight.shape[1] // scales.shape[1]
        columns = weight.T[self.order].to(work)  # [in, out]: a column of the weight is contiguous
        steps = scales.T[self.order // block].to(work)  # [in, out]
        codes = _round_columns(columns, steps, self._feedback.to(work), code_range(grid.bits))
        restored = torch.empty_like(codes)
        restored[self.order] = codes
        return pack(restored.T.contiguous(), scales, grid.bits, dtype)


def _feedback(second: Tensor, order: Tensor, damping: float) -> Tensor:
    """U_ji / U_ii of the damped moments in the given order, [in, in] upper triangular, diagonal 1.

    The damping is increased tenfold until the factorisation succeeds.
    """
    dtype = torch.float64 if len(order) <= _WIDE else torch.float32
    backwards = order.flip(0)
    permuted = second[backwards][:, backwards].to(dtype)
    mean = float(permuted.diagonal().mean())
    if mean <= 0:  # no input at all: rounding to nearest
        return torch.eye(len(order), dtype=dtype, device=second.device)
    added = damping * mean
    while True:
        permuted.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(permuted)  # H backwards = L Lᵀ, so that U is L backwards
        if not failed:
            break
        added = 9 * added if added > 0 else 1e-6 * mean
    upper = lower.flip(0, 1)
    return upper / upper.diagonal()


def _round_columns(columns: Tensor, steps: Tensor, feedback: Tensor, limits: tuple[int, int]) -> Tensor:
    """Codes [in, out] of columns [in, out] with scales `steps` of the same shape.

    Args:
        columns: the weight; it is overwritten with what remains of it, w - q.
        steps: the scale of each number.
        feedback: [in, in], as `_feedback` returns it.
        limits: the least and the largest code.
    """
    codes = torch.empty_like(columns)
    compensation = torch.zeros_like(columns)  # Σ_j (w_j - q_j) U_ji / U_ii of the columns rounded so far

    def round_range(start: int, stop: int) -> None:
        if stop - start > _LEAF:
            middle = (start + stop) // 2
            round_range(start, middle)
            compensation[middle:stop].addmm_(feedback[start:middle, middle:stop].T, columns[start:middle])
            round_range(middle, stop)
            return
        for i in range(start, stop):
            step = steps[i]
            code = ((columns[i] + compensation[i]) / step).round_().clamp_(*limits)
            codes[i] = code
            columns[i] -= code * step
            if i + 1 < stop:
                compensation[i + 1 : stop].addr_(feedback[i, i + 1 : stop], columns[i])

    round_range(0, len(columns))
    return codes
