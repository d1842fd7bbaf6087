"""Predicted error of one converted layer's attention output, from moments alone.

To first order, with independent errors of different tokens and different groups: a logit error of variance σ²
in query head q costs σ² · gain_q, gain_q = E_m Σ_n a_mn² |W_O (v_n - o_m)|² (`Moments.key_gain`); a value
error δ costs tr(S Cov δ), S as in `kvexport.convert.values`, plus the square of its constant part, which
attention does not average out.
"""

from __future__ import annotations

import math

import torch

from kvexport.convert.apply import LayerCode
from kvexport.convert.code_moments import CodeMoments
from kvexport.convert.groups import Grouping
from kvexport.convert.keys import folding
from kvexport.convert.values import lost_constant, output_weights
from kvexport.model.decoder import Attention


def predict_error(
    code_moments: CodeMoments, attention: Attention, grouping: Grouping, code: LayerCode
) -> float:
    """Predicted relative error of the attention output before any refit, √(E|Δo|² / E|o - ō|²)."""
    moments, lost = code_moments.moments, 0.0
    for group in range(grouping.kv_heads):
        rows = grouping.rows(group)
        lost += _loss_through_keys(code_moments, attention, grouping, code, group)
        residual = code.values[group].residual
        covariance = residual @ moments.value_covariance(rows) @ residual.T
        lost += float((output_weights(moments, attention, grouping, group) * covariance).sum())
    if not code.centred:
        lost += float(lost_constant(attention, grouping, code.values, moments.value_mean).square().sum())
    return math.sqrt(max(lost, 0.0) / max(float(moments.output_power), torch.finfo(torch.float64).tiny))


def _loss_through_keys(
    code_moments: CodeMoments, attention: Attention, grouping: Grouping, code: LayerCode, group: int
) -> float:
    """E|Δo|² of the group's keys."""
    moments, rows = code_moments.moments, grouping.rows(group)
    if code_moments.distances is not None:
        problem = folding(moments, grouping, group, code.frequencies, code_moments.distances)
        return attention.scale**2 * float(problem.loss(code.keys[group]))
    residual = code.keys[group].residual
    error = residual @ moments.key_covariance(rows) @ residual.T  # Cov(k - k̂) of the stack
    total = 0.0
    for head in grouping.query_heads(group):
        block = grouping.member(head)
        variance = float((moments.query_second[head] * error[block, block]).sum()) * attention.scale**2
        total += variance * float(moments.key_gain[head])
    return total
