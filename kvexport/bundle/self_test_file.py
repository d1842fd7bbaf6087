"""self_test.json of a bundle: the outputs of the PyTorch reference, recorded when the bundle was built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.bundle.bundle import Bundle
from kvexport.bundle.formats import BYTES
from kvexport.bundle.manifest import REBUILD
from kvexport.errors import BundleError, reason_of
from kvexport.eviction.config import POSITION_PLUS_ONE, SCORE
from kvexport.files.schema import Table, read_limited

FORMAT = 1
FILE = "self_test.json"
PROVIDERS = ("cpu", "cuda", "tensorrt")
RANKED_BY_NORM = ("l2-norm", "keep-high")  # policies whose evictions depend on rounding
_MAX_BYTES = 1 << 26
# Of `steady_scores`: all scores are integers that float32 represents, and those of one head differ.
_PRIMES = 7919, 104729, 65537


@dataclass(frozen=True)
class Row:
    """Outputs of one token. Row r belongs to token r of the prompt and its continuation.

    Attributes:
        rms: root mean square of its logits over the whole vocabulary.
        likeliest: the token with the largest logit.
        margin: difference between the two largest logits.
        values: logits of the tokens `ReferenceOutputs.logit_indices`.
        key_norms, value_norms: L2 norm of the token's key and value in each layer, over all KV heads.
    """

    rms: float
    likeliest: int
    margin: float
    values: tuple[float, ...]
    key_norms: tuple[float, ...]
    value_norms: tuple[float, ...]


@dataclass(frozen=True)
class Tolerance:
    """Largest deviations from the reference that a correct runtime may have.

    Attributes:
        logits: error of a logit and of the rms, in units of the row's rms.
        norms: |norm / reference norm - 1| of a key or value.
        tie: margin / rms below which another token may be the most likely one.
    """

    logits: float
    norms: float
    tie: float


@dataclass(frozen=True)
class ReferenceOutputs:
    """Outputs of the PyTorch reference for a prompt and its greedy continuation.

    Attributes:
        weights_sha256: of decoder.onnx.data at build time.
        slots: of layers that evict in this test; None if no layer evicts.
        prompt: token ids, at least one.
        continuation: token ids, each the reference's most likely one after those before it.
        first_row: token of the first row, within the prompt; the last row belongs to the last token.
        logit_indices: tokens whose logits are in `Row.values`.
        rows: one per token from `first_row` on.
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
        """Prompt and continuation, int64 [tokens]."""
        return np.array([*self.prompt, *self.continuation], np.int64)

    def to_json(self) -> dict[str, Any]:
        """Values for `json.dumps`."""
        return {"format": FORMAT, **asdict(self)}


def steady_scores(layer: int, state: NDArray[Any]) -> NDArray[Any]:
    """A copy of a layer's eviction state with scores that do not depend on rounding.

    Empty slots stay as they are.

    Engines round differently, and the norms of two keys can differ by less than that: then different tokens
    are evicted, and all later outputs differ. So the reference and every runtime under test replace scores
    that are norms by these after every call: (7919·(position + 1) + 104729·(layer·N + head)) mod 65537.

    Args:
        layer: its index.
        state: [N, slots, 2], columns SCORE and POSITION_PLUS_ONE.
    """
    stored = state[..., POSITION_PLUS_ONE].astype(np.int64)  # [N, slots]
    heads = layer * len(state) + np.arange(len(state))[:, None]  # [N, 1]
    position, head, modulus = _PRIMES
    ranked = state.copy()
    ranked[..., SCORE] = np.where(stored > 0, (position * stored + head * heads) % modulus, state[..., SCORE])
    return ranked


def write_reference_outputs(directory: Path, reference: ReferenceOutputs) -> None:
    """Write self_test.json into the directory of a bundle."""
    (directory / FILE).write_text(json.dumps(reference.to_json(), allow_nan=False) + "\n", encoding="utf-8")


def read_reference_outputs(bundle: Bundle) -> ReferenceOutputs:
    """Read and validate self_test.json.

    Raises:
        BundleError: the file is missing or damaged, its format is not supported, or it contradicts the
            manifest.
    """
    if FILE not in bundle.files:
        raise BundleError(f"the bundle {bundle.path} must contain {FILE}", fix=REBUILD)
    path = f"{FILE} of the bundle {bundle.path}"
    try:
        content = read_limited(bundle.path / FILE, _MAX_BYTES)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} must be readable: {reason_of(error)}", fix=REBUILD) from error
    table = Table.from_json(content, path, error=BundleError, fix=REBUILD)
    number = table.mapping().get("format")
    if type(number) is not int or number != FORMAT:
        raise BundleError(
            f"the format of {path} must be supported by this version of kvexport",
            got=f"format {number!r:.40}",
            expected=f"format {FORMAT}",
            fix="update kvexport (pip install --upgrade kvexport)",
        )
    return _parse(table, bundle)


def _parse(table: Table, bundle: Bundle) -> ReferenceOutputs:
    last_id = bundle.model.vocab_size - 1
    prompt = table.integers("prompt", 0, last_id)
    continuation = table.integers("continuation", 0, last_id)
    tokens = len(prompt) + len(continuation)
    if not prompt:
        table.fail("prompt", "at least one token id")
    if tokens > bundle.capacity:
        table.fail(
            "continuation", f"at most {bundle.capacity} tokens, the bundle's capacity, with the prompt"
        )
    first = table.integer("first_row", 0, len(prompt) - 1)
    indices = table.integers("logit_indices", 0, last_id)
    if not indices:
        table.fail("logit_indices", "at least one token id")
    rows = tuple(_row(each, len(indices), bundle) for each in table.tables("rows"))
    if len(rows) != tokens - first:
        table.fail("rows", f"{tokens - first} rows")
    tolerances = table.table("tolerances")
    return ReferenceOutputs(
        weights_sha256=table.string("weights_sha256"),
        slots=_slots(table, bundle, len(prompt)),
        prompt=prompt,
        continuation=continuation,
        first_row=first,
        logit_indices=indices,
        rows=rows,
        tolerances={provider: _tolerances(tolerances.table(provider)) for provider in PROVIDERS},
    )


def _slots(table: Table, bundle: Bundle, prompt: int) -> int | None:
    """Slots of layers that evict, which hold the whole prompt."""
    if bundle.eviction is None:
        if not table.is_null("slots"):
            table.fail("slots", "null, because no layer evicts")
        return None
    return table.integer("slots", max(bundle.eviction.protected + 1, prompt), bundle.eviction.budget)


def _row(table: Table, values: int, bundle: Bundle) -> Row:
    layers = len(bundle.layers)
    return Row(
        rms=table.number("rms"),
        likeliest=table.integer("likeliest", 0, bundle.model.vocab_size - 1),
        margin=table.number("margin"),
        values=_numbers(table, "values", values),
        key_norms=_numbers(table, "key_norms", layers),
        value_norms=_numbers(table, "value_norms", layers),
    )


def _numbers(table: Table, key: str, count: int) -> tuple[float, ...]:
    values = table.numbers(key)
    if len(values) != count:
        table.fail(key, f"{count} numbers")
    return values


def _tolerances(table: Table) -> dict[str, Tolerance]:
    by_dtype = {dtype: table.table(dtype) for dtype in BYTES}
    return {
        dtype: Tolerance(each.number("logits"), each.number("norms"), each.number("tie"))
        for dtype, each in by_dtype.items()
    }
