"""Published training-free KV compression, re-implemented from the papers' equations, for benchmarks at equal
KV bytes.

    made = neighbour("palu")(decoder, windows, 0.5)
    logits = reference.logits(decoder, made.residual_stream(tokens))

Each keeps a static cache, is calibrated layer by layer on the trained model's stream over windows [N, S] of
token ids, is computed in float64 and kept in the decoder's dtype, and caches at most `kv_ratio` of the
trained numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from kvexport.errors import UsageError
from kvexport.model.decoder import Decoder

from .aligned import aligned_mean
from .fisher import palu_fisher, recalkv_fisher
from .kqsvd import kqsvd
from .palu import palu
from .recalkv import recalkv
from .result import Macs, Neighbour, NeighbourLayer, attention_macs, attention_parameters
from .transmla import transmla

__all__ = [
    "NEIGHBOURS",
    "Macs",
    "Neighbour",
    "NeighbourLayer",
    "attention_macs",
    "attention_parameters",
    "neighbour",
]

Convert = Callable[[Decoder, Tensor, float], Neighbour]

NEIGHBOURS: dict[str, Convert] = {
    "palu": palu,
    "palu-fisher": palu_fisher,
    "recalkv": recalkv,
    "recalkv-fisher": recalkv_fisher,
    "kq-svd": kqsvd,
    "transmla": transmla,
    "aligned-mean": aligned_mean,
    "aligned-mean-renorm": partial(aligned_mean, renorm=True),
}


def neighbour(name: str) -> Convert:
    """The conversion of that name: (decoder, windows [N, S], kv_ratio) -> Neighbour.

    Raises:
        UsageError: no such method; on conversion, a model that the method is not for, or a budget below one
            number.
    """
    if name not in NEIGHBOURS:
        raise UsageError("no such neighbour", got=name, expected=", ".join(NEIGHBOURS))
    return NEIGHBOURS[name]
