"""What became of one layer: the record that conversion makes, the manifest stores and reports show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One layer after conversion. Errors are relative root mean squares over held-out calibration tokens."""

    method: str  # 'none' where the layer was left as it is
    num_attention_heads: int
    original_num_key_value_heads: int
    original_head_dim: int
    num_key_value_heads: int
    key_head_dim: int
    value_head_dim: int
    predicted_error: float  # of the attention output, from moments alone
    measured_error: float  # the same, measured: trained inputs, before the refit
    residual_error: float  # of the residual stream after this layer, all layers before it converted too
    parameters: int  # of the attention
    original_parameters: int
    window: int | None = None  # positions that a query sees, its own counted; None: all

    @property
    def kv_width(self) -> int:
        """Cached numbers per token."""
        return self.num_key_value_heads * (self.key_head_dim + self.value_head_dim)

    @property
    def original_kv_width(self) -> int:
        return self.original_num_key_value_heads * 2 * self.original_head_dim
