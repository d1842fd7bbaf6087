"""A bundle held against its reference vectors where it runs: does it compute here what its PyTorch twin computed?

Knows what a difference from the vectors means (`vectors`); how tokens are run is in `self_test_runs`. Needs
numpy and the engine alone. The C++ library does the same, line by line. The algorithm:

1. Hash what is run; a file that is not as the manifest says is damage, and no verdict. An engine of another
bundle: `engine`.
   Weights in the manifest that are not those the vectors were recorded with: `weights`.
2. Run the tokens twice, each time in an empty cache whose key and value slots hold garbage, and which grows
every `STEP` tokens
   where it can. Where layers evict, all but `vectors.slots` of their slots are blocked. An engine of a
   smaller capacity than the vectors have tokens runs as many as it takes.
   - "at once": all tokens in calls as long as the engine takes; where layers evict only the prompt, which
     fits their slots.
   - "step by step": the prompt in calls of `CHUNK`, then the continuation token by token, whatever is the
     likeliest.
   Of every row r from `first_row` on, take rms, likeliest token and chosen values of the logits, and the
   norms of token r's key
   and value in each layer: from slot r once all has run, or, where a layer evicts, after the call, from the
       slot of each head
   whose state says position r (none: not a number). Where scores are norms, compare them with those of the
   keys found there, then put those of `vectors.steady_scores` in their place, after every call.
3. Generate from the prompt, in a third such cache, each token the likeliest; count those that are the
continuation's, up to the
   first that the twin itself nearly did not choose (margin / rms below `tie`).
4. Errors of a run: `logits`, the largest of |value - the twin's| / the twin's rms and |rms / the twin's - 1|;
`norms`, the
   largest |norm / the twin's - 1|; `choice`, the largest margin / rms of a row whose likeliest token is not
   the twin's. What is not a number counts as infinite. A run is right within a tolerance if none of the three
   exceeds its own.
5. The verdict. With the tolerance of the provider and the bundle's dtype: both runs right and every token
generated: `ok`. At
   once right: `cache`. Else, if both are right with the tolerance of the next lower dtype: `precision`. Else:
       `weights` on the
   CPU, where nothing but the bundle can be wrong; `engine` on any other provider.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvexport.bundle.bundle import DATA_FILE, Bundle
from kvexport.bundle.self_test_file import ReferenceOutputs, Row, Tolerance, read_reference_outputs
from kvexport.errors import CannotRunHere
from kvexport.runtime.backends.base import Decoder
from kvexport.runtime.backends.select import Provider, choose, new_cache, open_decoder
from kvexport.runtime.backends.tensorrt_select import OtherEngine
from kvexport.runtime.self_test.runs import CHUNK, FLOOR, GARBAGE, STEP, Measured, Runs, larger, pieces_of

_LOWER = {"float32": "float16", "float16": "bfloat16"}


@dataclass(frozen=True)
class Where:
    """Where a run first went wrong: a row, and the layer and its part, or None and "logits" or "choice"."""

    row: int
    layer: int | None
    part: str

    def __str__(self) -> str:
        return f"token {self.row}, {self.part}" + ("" if self.layer is None else f" of layer {self.layer}")


@dataclass(frozen=True)
class Check:
    """One run's errors, as the module says; `first`: where one first exceeds the tolerance, None where none does."""

    name: str
    rows: int
    logits: float
    norms: float
    choice: float
    first: Where | None

    def within(self, tolerance: Tolerance) -> bool:
        return (
            self.logits <= tolerance.logits and self.norms <= tolerance.norms and self.choice <= tolerance.tie
        )


@dataclass(frozen=True)
class SelfTestReport:
    """What the self-test found.

    Attributes:
        verdict: "ok", "weights", "engine", "precision" or "cache".
        said: the same as a sentence.
        fix: what to do; None where all is well.
        provider: "cpu", "cuda" or "tensorrt"; `engine` is the library and its version.
        dtype: the bundle's; `tolerance` is what applied to it there.
        checks: the runs; empty where the verdict needed none.
        generated, continuation: tokens generated as the twin did, of so many that there was no doubt about.
    """

    verdict: str
    said: str
    fix: str | None
    provider: str
    engine: str
    dtype: str
    tolerance: Tolerance
    checks: tuple[Check, ...] = ()
    generated: int = 0
    continuation: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is not a number is null."""
        raw = asdict(self)
        raw["checks"] = [
            {key: None if value == math.inf else value for key, value in each.items()}
            for each in raw["checks"]
        ]
        return raw


def self_test(path: Path | str, provider: str = "auto") -> SelfTestReport:
    """Hold the bundle at `path` against its twin, on what "cpu", "cuda", "tensorrt" or "auto" means here.

    Raises:
        BundleError: the bundle or its engine is damaged or incomplete.
        CannotRunHere: this machine lacks what the provider needs, or kernels for the bundle's dtype.
        UsageError: there is no such provider.
    """
    bundle = Bundle.open(path)
    bundle.verify(name for name in bundle.files if name != DATA_FILE)
    vectors = read_reference_outputs(bundle)
    try:
        chosen = choose(bundle, provider)
    except OtherEngine as error:
        tolerance = vectors.tolerances["tensorrt"][bundle.dtype]
        return SelfTestReport("engine", error.what, error.fix, "tensorrt", "", bundle.dtype, tolerance)
    if chosen.engine is not None:
        chosen.engine.verify()
    if chosen.engine is None or not chosen.engine.has_weights:
        bundle.verify([DATA_FILE])
    if bundle.files[DATA_FILE].sha256 != vectors.weights_sha256:
        said = f"{DATA_FILE} is not what the self-test was recorded with: the bundle was put together of two"
        tolerance = vectors.tolerances[chosen.name][bundle.dtype]
        return SelfTestReport("weights", said, _COPY, chosen.name, chosen.version, bundle.dtype, tolerance)
    decoder = open_decoder(bundle, chosen)
    if chosen.name != "tensorrt":
        decoder.use(new_cache(bundle, chosen, bundle.dtype, fill=GARBAGE, step=STEP))
    return examine(bundle, vectors, decoder, chosen)


def examine(
    bundle: Bundle, vectors: ReferenceOutputs, decoder: Decoder, provider: Provider
) -> SelfTestReport:
    """The self-test from its second step on; `decoder` has a cache that grows, or one of a fixed size.

    Raises:
        CannotRunHere: the cache holds none of the vectors' rows.
    """
    tolerance = vectors.tolerances[provider.name][bundle.dtype]
    runs = Runs(bundle, vectors, decoder)
    if len(runs.tokens) <= vectors.first_row:
        raise CannotRunHere(
            "the engine holds too few tokens for the bundle's self-test",
            got=f"a capacity of {len(runs.tokens)}",
            expected=f"{vectors.first_row + 1} or more",
            fix=f"kvexport engine BUNDLE --capacity {len(vectors.tokens)} --force",
        )
    prompt, tokens = runs.prompt, len(runs.tokens)
    whole = tokens if vectors.slots is None else prompt
    at_once = check("at once", runs.fed(pieces_of(0, whole, decoder.max_tokens_per_call)), vectors, tolerance)
    steps = [*pieces_of(0, prompt, min(decoder.max_tokens_per_call, CHUNK)), *pieces_of(prompt, tokens, 1)]
    step_by_step = check("step by step", runs.fed(steps), vectors, tolerance)
    sure = 0
    while prompt + sure < tokens and not _nearly(
        vectors.rows[prompt + sure - 1 - vectors.first_row], tolerance
    ):
        sure += 1
    generated = runs.generated(sure)
    checks = at_once, step_by_step
    lower = vectors.tolerances[provider.name][_LOWER[bundle.dtype]] if bundle.dtype in _LOWER else tolerance
    if at_once.within(tolerance) and step_by_step.within(tolerance) and generated == sure:
        verdict = "ok"
    elif at_once.within(tolerance):
        verdict = "cache"
    elif at_once.within(lower) and step_by_step.within(lower):
        verdict = "precision"
    else:
        verdict = "weights" if provider.name == "cpu" else "engine"
    said, fix = _sentences(verdict, bundle, provider, at_once.first or step_by_step.first)
    return SelfTestReport(
        verdict, said, fix, provider.name, provider.version, bundle.dtype, tolerance, checks, generated, sure
    )


def check(name: str, rows: Sequence[Measured], vectors: ReferenceOutputs, tolerance: Tolerance) -> Check:
    """Rows from the vectors' first one on against theirs."""
    worst_logits, worst_norms, worst_choice = 0.0, 0.0, 0.0
    first: Where | None = None
    for at, (row, twin) in enumerate(zip(rows, vectors.rows, strict=False), vectors.first_row):
        for layer in range(len(twin.key_norms)):
            for part, error in (
                ("key", _apart(row.key_norms[layer], twin.key_norms[layer])),
                ("value", _apart(row.value_norms[layer], twin.value_norms[layer])),
                ("score", row.scores[layer]),
            ):
                worst_norms = larger(worst_norms, error)
                if first is None and not error <= tolerance.norms:
                    first = Where(at, layer, part)
        scale = max(twin.rms, FLOOR)
        error = _apart(row.rms, twin.rms)
        for value, other in zip(row.values, twin.values, strict=True):
            error = larger(error, abs(value - other) / scale)
        worst_logits = larger(worst_logits, error)
        if first is None and not error <= tolerance.logits:
            first = Where(at, None, "logits")
        if row.likeliest != twin.likeliest:
            worst_choice = larger(worst_choice, twin.margin / scale)
            if first is None and not _nearly(twin, tolerance):
                first = Where(at, None, "choice")
    return Check(name, len(rows), worst_logits, worst_norms, worst_choice, first)


def _nearly(twin: Row, tolerance: Tolerance) -> bool:
    """Whether another token is nearly as likely as the twin's."""
    return twin.margin / max(twin.rms, FLOOR) <= tolerance.tie


def _apart(number: float, twin: float) -> float:
    return abs(number - twin) / max(twin, FLOOR)


_COPY = "copy the bundle again as a whole, or build it again: kvexport build CHECKPOINT -o BUNDLE"


def _sentences(
    verdict: str, bundle: Bundle, provider: Provider, first: Where | None
) -> tuple[str, str | None]:
    """What is wrong, and what to do."""
    engine = provider.engine
    rebuilt = (
        ""
        if engine is None
        else f"build the engine again: kvexport engine BUNDLE --target {engine.record.target} --force"
    )
    runs, where = f"{provider.version} on {provider.name}", f"; first wrong: {first}"
    if verdict == "ok":
        return f"{runs} computes what PyTorch computed when the bundle was built", None
    if verdict == "weights":
        what = f"{runs} computes other numbers than PyTorch did: the bundle's files are of two bundles, or were changed{where}"
        return what, f"{_COPY}; to see where it is wrong: kvexport validate BUNDLE --provider cpu"
    if verdict == "engine":
        otherwise = "if that is ok, " + (rebuilt or "update ONNX Runtime, or run with --provider cpu")
        return (
            f"{runs} computes other numbers than PyTorch did{where}",
            f"see whether the bundle is sound: kvexport self-test BUNDLE --provider cpu; {otherwise}",
        )
    if verdict == "precision":
        less = f"{runs} is less exact than {bundle.dtype}, as if it computed in {_LOWER[bundle.dtype]}{where}"
        return (
            less,
            rebuilt
            or f"build the bundle again with --dtype {_LOWER[bundle.dtype]} if that will do; or else {_COPY}",
        )
    what = f"{runs} computes tokens that come at once rightly, and the same tokens one by one wrongly: it does not keep its cache"
    return what + (where if first else "; generating does not repeat itself"), (
        rebuilt or "install another version of ONNX Runtime, or run with another --provider"
    )
