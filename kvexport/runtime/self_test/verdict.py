"""The self-test: compare the outputs of a bundle on this machine with those of the PyTorch reference.

The reference outputs were recorded when the bundle was built (`kvexport.bundle.self_test_file`). The tokens
are run by `kvexport.runtime.self_test.runs`; this module compares. Needs numpy and the backend only. The C++
library implements the same algorithm:

1. Hash the files that run. A file that differs from the manifest is an error, not a verdict. An engine of
   another bundle: verdict `engine`. Weights that are not those of the recording: verdict `weights`.
2. Run the tokens twice, each time in an empty cache whose key and value slots hold garbage, and which grows
   every `STEP` tokens if it can. If layers evict, all but `ReferenceOutputs.slots` of their slots are
   blocked. An engine whose capacity is smaller than the number of tokens runs as many as fit.
   - "at once": all tokens in calls as long as the engine and rings allow; if layers evict, the prompt only,
     which fits their slots. With ONNX Runtime, rings hold their window and `CHUNK` tokens.
   - "step by step": the prompt in calls of `CHUNK` tokens, then the continuation token by token, even if
     another token is more likely.
   For every row r from `first_row` on, take the rms, the most likely token and the selected values of the
   logits, and the norms of the key and value of token r in each layer: from slot r after the run; in a ring
   of R slots, fewer than the tokens, from slot r mod R after the call; if the layer evicts, after the call,
   from the slot of each head whose state has position r (NaN if there is none).
   If scores are norms, compare them with the norms of those keys, and then replace them by `steady_scores`
   after every call.
3. Generate greedily from the prompt in a third such cache; count the tokens that are the continuation's, up
   to the first one where the reference was close to a tie (margin / rms at most `tie`).
4. Errors of a run. `logits`: the largest |value - reference| / rms of the reference, and
   |rms / reference rms - 1|. `norms`: the largest |norm / reference norm - 1|. `choice`: the largest
   margin / rms of a row whose most likely token is not the reference's. A NaN counts as infinite. A run is
   within a tolerance if none of the three exceeds it.
5. The verdict, with the tolerance of the provider and the bundle's dtype. Both runs within it and every token
   generated: `ok`. "at once" within it: `cache`. Else, if both are within the tolerance of the next lower
   dtype: `precision`. Else `weights` on the CPU, where only the bundle can be wrong, and `engine` with any
   other provider.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvexport.bundle import DATA_FILE, Bundle
from kvexport.bundle.self_test_file import ReferenceOutputs, Row, Tolerance, read_reference_outputs
from kvexport.errors import CannotRunHere
from kvexport.runtime.backends.base import Decoder
from kvexport.runtime.backends.select import Provider, choose, new_cache, open_decoder
from kvexport.runtime.backends.tensorrt_select import OtherEngine
from kvexport.runtime.self_test.runs import CHUNK, FLOOR, GARBAGE, STEP, Measured, Runs, larger, pieces_of

_LOWER = {"float32": "float16", "float16": "bfloat16"}
_COPY = "copy the bundle again as a whole, or build it again: kvexport build CHECKPOINT -o BUNDLE"


@dataclass(frozen=True)
class Location:
    """The place where a run first exceeds the tolerance.

    Attributes:
        row: the token.
        layer: None for logits and choice.
        part: "key", "value" or "score" of the layer; or "logits" or "choice".
    """

    row: int
    layer: int | None
    part: str

    def __str__(self) -> str:
        return f"token {self.row}, {self.part}" + ("" if self.layer is None else f" of layer {self.layer}")


@dataclass(frozen=True)
class Check:
    """The errors of one run, as step 4 defines them.

    Attributes:
        name: "at once" or "step by step".
        rows: number of rows that were compared.
        logits, norms, choice: the errors.
        first: where one first exceeds the tolerance; None if none does.
    """

    name: str
    rows: int
    logits: float
    norms: float
    choice: float
    first: Location | None

    def is_within(self, tolerance: Tolerance) -> bool:
        """Whether no error exceeds a tolerance."""
        return (
            self.logits <= tolerance.logits and self.norms <= tolerance.norms and self.choice <= tolerance.tie
        )


@dataclass(frozen=True)
class SelfTestReport:
    """The result of a self-test.

    Attributes:
        verdict: "ok", "weights", "engine", "precision" or "cache".
        message: the verdict as a sentence.
        fix: how to fix it; None if the verdict is "ok".
        provider: "cpu", "cuda" or "tensorrt".
        engine: name and version of the library that computed.
        dtype: dtype of the bundle.
        tolerance: tolerance of the provider and dtype.
        checks: the two runs; empty if the verdict needed none.
        generated: tokens of the continuation that were reproduced by greedy generation.
        continuation: tokens of the continuation up to the first one that is close to a tie.
    """

    verdict: str
    message: str
    fix: str | None
    provider: str
    engine: str
    dtype: str
    tolerance: Tolerance
    checks: tuple[Check, ...] = ()
    generated: int = 0
    continuation: int = 0

    def to_json(self) -> dict[str, Any]:
        """Values for `json.dumps`; the message is called "said", and infinity is null."""
        raw = {"said" if key == "message" else key: value for key, value in asdict(self).items()}
        raw["checks"] = [
            {key: None if value == math.inf else value for key, value in each.items()}
            for each in raw["checks"]
        ]
        return raw


def self_test(path: Path | str, provider: str = "auto") -> SelfTestReport:
    """Compare the outputs of a bundle on this machine with those recorded from PyTorch when it was built.

    Args:
        path: the bundle directory.
        provider: "cpu", "cuda", "tensorrt", or "auto", as in `kvexport.open`.

    Returns:
        The verdict, with the errors of each run. A wrong result is a verdict, not an exception.

    Raises:
        BundleError: the bundle or its engine is damaged or incomplete.
        CannotRunHere: this machine lacks what the provider needs, or kernels for the bundle's dtype.
        UsageError: there is no such provider.
    """
    bundle = Bundle.open(path)
    bundle.verify(name for name in bundle.files if name != DATA_FILE)
    reference = read_reference_outputs(bundle)
    try:
        chosen = choose(bundle, provider)
    except OtherEngine as error:
        tolerance = reference.tolerances["tensorrt"][bundle.dtype]
        return SelfTestReport("engine", error.what, error.fix, "tensorrt", "", bundle.dtype, tolerance)
    if chosen.engine is not None:
        chosen.engine.verify()
    if chosen.engine is None or not chosen.engine.has_weights:
        bundle.verify([DATA_FILE])
    if bundle.files[DATA_FILE].sha256 != reference.weights_sha256:
        message = f"{DATA_FILE} differs from that of the self-test: the bundle's files come from two builds"
        tolerance = reference.tolerances[chosen.name][bundle.dtype]
        return SelfTestReport("weights", message, _COPY, chosen.name, chosen.version, bundle.dtype, tolerance)
    decoder = open_decoder(bundle, chosen)
    if chosen.name != "tensorrt":
        decoder.use(new_cache(bundle, chosen, bundle.dtype, fill=GARBAGE, step=STEP, chunk=CHUNK))
    return compare_outputs(bundle, reference, decoder, chosen)


def compare_outputs(
    bundle: Bundle, reference: ReferenceOutputs, decoder: Decoder, provider: Provider
) -> SelfTestReport:
    """The self-test from step 2 on.

    Args:
        bundle: the bundle.
        reference: its reference outputs.
        decoder: with a cache that grows every `STEP` tokens, or one of a fixed size.
        provider: provider of the decoder.

    Raises:
        CannotRunHere: the cache holds none of the reference's rows.
    """
    tolerance = reference.tolerances[provider.name][bundle.dtype]
    runs = Runs(bundle, reference, decoder)
    if len(runs.tokens) <= reference.first_row:
        raise CannotRunHere(
            "the engine's capacity must hold the tokens of the bundle's self-test",
            got=f"a capacity of {len(runs.tokens)}",
            expected=f"{reference.first_row + 1} or more",
            fix=f"kvexport engine BUNDLE --capacity {len(reference.tokens)} --force",
        )
    prompt, tokens = runs.prompt, len(runs.tokens)
    whole = tokens if reference.slots is None else prompt
    pieces = pieces_of(0, whole, decoder.max_tokens_per_call)
    at_once = check("at once", runs.run_pieces(pieces), reference, tolerance)
    steps = [
        *pieces_of(0, prompt, min(decoder.max_tokens_per_call, CHUNK)),
        *pieces_of(prompt, tokens, 1),
    ]
    step_by_step = check("step by step", runs.run_pieces(steps), reference, tolerance)
    reproducible = 0
    while prompt + reproducible < tokens and not _is_tie(
        reference.rows[prompt + reproducible - 1 - reference.first_row], tolerance
    ):
        reproducible += 1
    generated = runs.generate(reproducible)
    checks = at_once, step_by_step
    lower = _LOWER.get(bundle.dtype, bundle.dtype)
    lower_tolerance = reference.tolerances[provider.name][lower]
    if all(each.is_within(tolerance) for each in checks) and generated == reproducible:
        verdict = "ok"
    elif at_once.is_within(tolerance):
        verdict = "cache"
    elif all(each.is_within(lower_tolerance) for each in checks):
        verdict = "precision"
    else:
        verdict = "weights" if provider.name == "cpu" else "engine"
    message, fix = _sentences(verdict, bundle, provider, at_once.first or step_by_step.first)
    return SelfTestReport(
        verdict=verdict,
        message=message,
        fix=fix,
        provider=provider.name,
        engine=provider.version,
        dtype=bundle.dtype,
        tolerance=tolerance,
        checks=checks,
        generated=generated,
        continuation=reproducible,
    )


def check(name: str, rows: Sequence[Measured], reference: ReferenceOutputs, tolerance: Tolerance) -> Check:
    """Compare measured rows, from the reference's first one on, with the reference."""
    worst_logits, worst_norms, worst_choice = 0.0, 0.0, 0.0
    first: Location | None = None
    for at, (row, expected) in enumerate(zip(rows, reference.rows, strict=False), reference.first_row):
        for layer in range(len(expected.key_norms)):
            for part, error in (
                ("key", _relative_error(row.key_norms[layer], expected.key_norms[layer])),
                ("value", _relative_error(row.value_norms[layer], expected.value_norms[layer])),
                ("score", row.scores[layer]),
            ):
                worst_norms = larger(worst_norms, error)
                if first is None and not error <= tolerance.norms:
                    first = Location(at, layer, part)
        scale = max(expected.rms, FLOOR)
        error = _relative_error(row.rms, expected.rms)
        for value, other in zip(row.values, expected.values, strict=True):
            error = larger(error, abs(value - other) / scale)
        worst_logits = larger(worst_logits, error)
        if first is None and not error <= tolerance.logits:
            first = Location(at, None, "logits")
        if row.likeliest != expected.likeliest:
            worst_choice = larger(worst_choice, expected.margin / scale)
            if first is None and not _is_tie(expected, tolerance):
                first = Location(at, None, "choice")
    return Check(name, len(rows), worst_logits, worst_norms, worst_choice, first)


def _is_tie(row: Row, tolerance: Tolerance) -> bool:
    """Whether the two most likely tokens of a reference row are too close to tell apart."""
    return row.margin / max(row.rms, FLOOR) <= tolerance.tie


def _relative_error(number: float, expected: float) -> float:
    return abs(number - expected) / max(expected, FLOOR)


def _sentences(
    verdict: str, bundle: Bundle, provider: Provider, first: Location | None
) -> tuple[str, str | None]:
    """The message of a verdict, and the fix."""
    rebuild = None
    if provider.engine is not None:
        target = provider.engine.record.target
        rebuild = f"build the engine again: kvexport engine BUNDLE --target {target} --force"
    runs, where = f"{provider.version} on {provider.name}", f"; first difference: {first}"
    if verdict == "ok":
        return f"{runs} reproduces the outputs that PyTorch computed when the bundle was built", None
    differs = f"{runs} computes other numbers than the PyTorch reference"
    if verdict == "weights":
        return (
            f"{differs}: the bundle's files come from two builds, or were changed{where}",
            f"{_COPY}; to find the difference: kvexport validate BUNDLE --provider cpu",
        )
    if verdict == "engine":
        otherwise = rebuild or "update ONNX Runtime, or run with --provider cpu"
        return (
            f"{differs}{where}",
            f"check the bundle: kvexport self-test BUNDLE --provider cpu; if that is ok, {otherwise}",
        )
    if verdict == "precision":
        lower = _LOWER[bundle.dtype]
        return (
            f"{runs} is less accurate than {bundle.dtype}, as if it computed in {lower}{where}",
            rebuild
            or f"build the bundle again with --dtype {lower} if that is sufficient; otherwise {_COPY}",
        )
    message = f"{runs}: prefill matches the reference, decode does not: the KV cache is not updated correctly"
    return (
        message + (where if first else "; greedy generation differs"),
        rebuild or "install another version of ONNX Runtime, or run with another --provider",
    )
