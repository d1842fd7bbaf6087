"""Names of the conversion methods with one line of help each; imports no torch, for the command line."""

from __future__ import annotations

BEST = "auto"
METHOD_HELP = {
    BEST: "online or fold, whichever is better for each layer",
    "online": "compress keys after RoPE, with one small matrix product per new token",
    "fold": "compress keys before RoPE, entirely inside W_Q and W_K",
    "svd-a": "SVD of cached keys and values (arXiv 2406.07056)",
    "svd-w": "SVD of W_K and W_V, without data",
    "mean-pool": "mean of each group's heads (arXiv 2305.13245)",
}
METHOD_NAMES = tuple(METHOD_HELP)
BASELINES = ("svd-a", "svd-w", "mean-pool")  # published methods, selectable for comparison


def method_help() -> str:
    """Help text of `--method`: each name with its line, the baselines marked as such."""
    methods = [f"{name}: {text}" for name, text in METHOD_HELP.items() if name not in BASELINES]
    baselines = [f"{name}: {METHOD_HELP[name]}" for name in BASELINES]
    return f"Compression method. {'; '.join(methods)}. Baselines for comparison: {'; '.join(baselines)}."
