"""A bundle's reference vectors, self_test.json, as typed data: read and checked, or written by the build.

Knows the file's keys, and what the twin that records them and a runtime that is held against them must do alike; must not know
how either computes. Needs numpy alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.bundle.bundle import Bundle
from kvexport.bundle.manifest import BYTES, REBUILD
from kvexport.errors import BundleError
from kvexport.eviction.config import POSITION_PLUS_ONE, SCORE

FORMAT = 1
FILE = "self_test.json"
RANKED_BY_NORM = ("l2-norm", "keep-high")  # policies whose choices rounding can change
_LARGEST = 1 << 26  # bytes of the file
_PRIMES = (
    7919,
    104729,
    65537,
)  # every score below is a whole number that float32 holds, and no two of one head are alike


@dataclass(frozen=True)
class Row:
    """What one token leaves: row r, after token r of prompt and continuation was fed.

    Attributes:
        rms: root mean square of its logits over the whole vocabulary.
        likeliest: the token of the largest.
        margin: by which that is larger than the second.
        values: logits of the tokens that the vectors name.
        key_norms, value_norms: L2 norm of the token's key and value in each layer, all KV heads together.
    """

    rms: float
    likeliest: int
    margin: float
    values: tuple[float, ...]
    key_norms: tuple[float, ...]
    value_norms: tuple[float, ...]


@dataclass(frozen=True)
class Tolerance:
    """How far a sound runtime may be from the twin.

    Attributes:
        logits: largest error of a logit, and of the root mean square of all, in units of the row's rms.
        norms: largest |norm / the twin's - 1| of a key or value.
        tie: margin / rms below which another token may be the likeliest.
    """

    logits: float
    norms: float
    tie: float


@dataclass(frozen=True)
class ReferenceOutputs:
    """What the PyTorch twin computed.

    Attributes:
        weights_sha256: of decoder.onnx.data as built.
        slots: that layers which evict have in this test; None: no layer evicts.
        prompt: token ids, one at least.
        continuation: those that the twin chose after it, each the likeliest.
        first_row: the row that `rows` begin with; they end with that of the last token.
        logit_indices: which logits `Row.values` are.
        tolerances: by provider ("cpu", "cuda", "tensorrt") and dtype.
    """

    weights_sha256: str
    slots: int | None
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    first_row: int
    logit_indices: tuple[int, ...]
    rows: tuple[Row, ...]
    tolerances: Mapping[str, Mapping[str, Tolerance]]

    @property
    def tokens(self) -> NDArray[np.int64]:
        return np.array([*self.prompt, *self.continuation], np.int64)

    def to_json(self) -> dict[str, Any]:
        """As what `json.dumps` takes."""
        return {"format": FORMAT, **asdict(self)}


def steady(layer: int, state: NDArray[Any]) -> NDArray[Any]:
    """A layer's `state` [N, slots, 2] with scores that no rounding changes; empty slots stay as they are.

    Norms of keys differ by less than engines round, and a token that goes in one place and stays in another changes all that
    follows. So where they rank tokens, the twin and whatever is held against it put these scores in place of theirs after
    every call: which slot is taken is then the same for all. (7919·(position + 1) + 104729·(layer·N + head)) mod 65537.
    """
    stored = state[..., POSITION_PLUS_ONE].astype(np.int64)
    heads = layer * len(state) + np.arange(len(state))[:, None]
    position, head, modulus = _PRIMES
    ranked = state.copy()
    ranked[..., SCORE] = np.where(stored > 0, (position * stored + head * heads) % modulus, state[..., SCORE])
    return ranked


def write_reference_outputs(directory: Path, vectors: ReferenceOutputs) -> None:
    (directory / FILE).write_text(json.dumps(vectors.to_json(), allow_nan=False) + "\n", encoding="utf-8")


def read_reference_outputs(bundle: Bundle) -> ReferenceOutputs:
    """
    Raises:
        BundleError: none, or they are damaged, of another format, or contradict the manifest.
    """
    path = bundle.path / FILE
    if FILE not in bundle.files:
        raise BundleError(f"the bundle {bundle.path} has no {FILE}", fix=REBUILD)
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is larger than any")
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise BundleError(
                f"{path} is of a format that this version of kvexport does not read",
                got=f"format {raw['format']!r}",
                expected=f"format {FORMAT}",
                fix="update kvexport (pip install --upgrade kvexport)",
            )
        return _parsed(raw, bundle)
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}", fix=REBUILD) from error


def _parsed(raw: Mapping[str, Any], bundle: Bundle) -> ReferenceOutputs:
    vocab, layers = bundle.model.vocab_size, len(bundle.layers)
    prompt, continuation = _ids(raw["prompt"], vocab), _ids(raw["continuation"], vocab)
    indices, first, slots = _ids(raw["logit_indices"], vocab), _whole(raw["first_row"]), raw["slots"]
    tokens = len(prompt) + len(continuation)
    if not prompt or not first < len(prompt) or tokens > bundle.capacity or not indices:
        raise ValueError("there is no prompt, no row of it, no logit, or more tokens than the capacity")
    if (slots is None) != (bundle.eviction is None):
        raise ValueError(f"slots is {slots!r}")
    if (
        bundle.eviction is not None
        and not bundle.eviction.protected < _whole(slots) <= bundle.eviction.budget
    ):
        raise ValueError(f"slots is {slots}")
    if slots is not None and len(prompt) > slots:
        raise ValueError("the prompt is longer than the slots")
    rows = tuple(_row(each, len(indices), layers, vocab) for each in raw["rows"])
    if len(rows) != tokens - first:
        raise ValueError(f"there are {len(rows)} rows of {tokens - first}")
    tolerances = {
        provider: {dtype: _tolerance(raw["tolerances"][provider][dtype]) for dtype in BYTES}
        for provider in ("cpu", "cuda", "tensorrt")
    }
    return ReferenceOutputs(
        str(raw["weights_sha256"]), slots, prompt, continuation, first, indices, rows, tolerances
    )


def _row(raw: Mapping[str, Any], values: int, layers: int, vocab: int) -> Row:
    (likeliest,) = _ids([raw["likeliest"]], vocab)
    parts = [
        _numbers(raw[name], count)
        for name, count in (("values", values), ("key_norms", layers), ("value_norms", layers))
    ]
    rms, margin = _numbers([raw["rms"], raw["margin"]], 2)
    return Row(rms, likeliest, margin, *parts)


def _tolerance(raw: Mapping[str, Any]) -> Tolerance:
    return Tolerance(*_numbers([raw["logits"], raw["norms"], raw["tie"]], 3))


def _numbers(raw: Any, count: int) -> tuple[float, ...]:
    if len(raw) != count or not all(type(each) in (int, float) and math.isfinite(each) for each in raw):
        raise ValueError(f"not {count} numbers: {str(raw)[:80]}")
    return tuple(map(float, raw))


def _ids(raw: Any, vocab: int) -> tuple[int, ...]:
    if type(raw) is not list or not all(type(each) is int and 0 <= each < vocab for each in raw):
        raise ValueError(f"not token ids: {str(raw)[:80]}")
    return tuple(raw)


def _whole(raw: Any) -> int:
    if type(raw) is not int or raw < 0:
        raise ValueError(f"not a whole number: {str(raw)[:80]}")
    return raw
