"""The record of one layer after conversion: made by conversion, stored in the manifest, shown in reports."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerReport:
    """One layer after conversion. Errors are relative root mean squares over held-out calibration tokens.

    Attributes:
        method: of compression; "none" if the layer was not compressed.
        num_attention_heads: query heads.
        original_num_key_value_heads, original_head_dim: KV heads and width before conversion.
        num_key_value_heads, key_head_dim, value_head_dim: cached heads, and widths of their keys and values.
        predicted_error: error of the attention output, computed from moments alone.
        measured_error: error of the attention output, on the inputs of the trained model, before the refit.
        residual_error: error of the residual stream after this layer, with all layers before it converted.
        parameters, original_parameters: number of parameters of the attention.
        window: positions that a query attends to, its own included; None: all.
    """

    method: str
    num_attention_heads: int
    original_num_key_value_heads: int
    original_head_dim: int
    num_key_value_heads: int
    key_head_dim: int
    value_head_dim: int
    predicted_error: float
    measured_error: float
    residual_error: float
    parameters: int
    original_parameters: int
    window: int | None = None

    @property
    def original(self) -> LayerReport:
        """The layer as it was before conversion, as far as its cache is concerned."""
        return replace(
            self,
            num_key_value_heads=self.original_num_key_value_heads,
            key_head_dim=self.original_head_dim,
            value_head_dim=self.original_head_dim,
        )

    @property
    def kv_width(self) -> int:
        """Cached numbers per token."""
        return self.num_key_value_heads * (self.key_head_dim + self.value_head_dim)

    @property
    def original_kv_width(self) -> int:
        """Cached numbers per token before conversion."""
        return self.original_num_key_value_heads * 2 * self.original_head_dim
