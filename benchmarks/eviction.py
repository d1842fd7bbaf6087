"""Measure the loss from eviction: every policy, with every protection, at every budget.

Runs on the PyTorch reference, in the three kinds of the paper's tables (arXiv 2406.11430): language modelling
on text (--text), and, with a model that can retrieve (--passkey-model, made by
`examples/train_passkey_model.py`), a pass key and a sentence hidden in a long prompt. The record
(OUTPUT.json) is rewritten after every row; --resume continues it. A table (OUTPUT.md) and a chart
(OUTPUT.svg) are made from it.

    python benchmarks/eviction.py CHECKPOINT --text NAME=FILE --passkey-model FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import tasks
import torch
from eviction_measure import PROTOCOLS, Asked, asked_of, held, language_modelling, retrieval
from eviction_plot import chart
from eviction_table import markdown
from eviction_tasks import TASKS, Prompts, prompts_of
from quality_measure import Bench, digest
from quality_rows import chosen
from records import RESULTS, code_digest, fill, named, record_file, resumed, save

import kvexport
from kvexport.calibrate import recipe_for
from kvexport.errors import UsageError
from kvexport.eviction.config import POLICIES, Eviction
from kvexport.model.decoder import Decoder

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRAINED = Fraction(1)
COMBINED = (("window", "first"), ("l2-norm", "recent-first"), ("l2-norm", "half-first"))


@dataclass(frozen=True)
class Setting:
    """A policy, what it must not touch, and how much of the context it holds."""

    policy: str
    protection: str
    share: float

    def __str__(self) -> str:
        return f"{self.policy} {self.protection} {self.share:g}"


_PROTECTIONS = ("bare", "recent-first", "half-first", "recent", "recent-first-skip", "half-first-skip")


class Protections:
    """By name, what is never evicted: of a budget, how many recent and first tokens, and which layers."""

    def __init__(self, recent: int, first: int, skip: Sequence[int]) -> None:
        layers = " and ".join(map(str, skip))
        self.told = {
            "bare": "nothing protected",
            "first": f"the first {first} tokens protected",
            "recent": f"the last {recent} tokens protected",
            "recent-first": f"the last {recent} and the first {first} tokens protected",
            "half-first": f"recent tokens protected, half as many as the budget, and the first {first}",
            "...-skip": f"the same, and layers {layers} hold everything",
        }
        self._recent, self._first, self._skip = recent, first, tuple(skip)

    def eviction(self, setting: Setting, context: int) -> Eviction:
        """
        Raises:
            UsageError: the budget leaves nothing that may go.
        """
        name, budget = setting.protection, round(setting.share * context)
        recent = self._recent if "recent" in name else budget // 2 if "half" in name else 0
        first, skip = self._first if "first" in name else 0, self._skip if "skip" in name else ()
        return Eviction(setting.policy, budget, first, recent, skip)

    def of(self, policy: str) -> tuple[str, ...]:
        """Those to measure: a window keeps recent tokens by itself, and the controls are spared whole
        layers."""
        if policy == "window":
            return "bare", "first", "first-skip"
        return tuple(name for name in _PROTECTIONS if policy == "l2-norm" or not name.endswith("-skip"))

    def settings(self, shares: Sequence[float]) -> list[Setting]:
        return [
            Setting(policy, name, share)
            for share in shares
            for policy in POLICIES
            for name in self.of(policy)
        ]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="evaluation text; may be given several times",
    )
    parser.add_argument(
        "--passkey-model", type=Path, metavar="FOLDER", help="checkpoint of a model that can retrieve"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="rows to measure, by name: 'lm l2-norm*' '* 0.5'"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of the context")
    parser.add_argument("--windows", type=int, default=24, help="maximum number of windows of each text")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[0.5, 0.25, 0.1, 0.75, 0.9],
        help="budgets, as fractions of the context",
    )
    parser.add_argument(
        "--kept", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="budgets in retrieval"
    )
    parser.add_argument("--trials", type=int, default=20, help=f"prompts at each of {len(DEPTHS)} depths")
    parser.add_argument("--recent", type=int, default=32, help="recent tokens, where they are protected")
    parser.add_argument("--first", type=int, default=4, help="first tokens, where they are protected")
    parser.add_argument(
        "--skip", type=int, nargs="+", default=[0, 1], help="layers without eviction, where some are skipped"
    )
    parser.add_argument(
        "--compare-converted",
        type=Fraction,
        nargs="*",
        default=[],
        metavar="RATIO",
        help="also measure with these ratios of KV heads",
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "eviction", help="path of the output files without suffix"
    )
    parser.add_argument("--resume", action="store_true", help="continue the rows of OUTPUT.json")
    arguments = parser.parse_args(given)
    try:
        run(arguments)
    except UsageError as error:
        parser.error(str(error))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what the record does not have yet; returns the record, which is also on disk.

    Raises:
        UsageError: something given cannot be read, or --resume of a record of other settings.
    """
    subjects = Subjects(arguments)
    record = begin(subjects, arguments)
    work = dict(rows(subjects, arguments))
    fill(record, work, arguments.only, partial(write, record, arguments.output), partial(told, record))
    return record


class Subjects:
    """The models, texts and prompts that rows share, and the models with fewer heads as they are asked
    for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        recipe = recipe_for("self", None, None)
        length, texts = arguments.length, named(arguments.text)
        self.context = length
        self.protections = Protections(arguments.recent, arguments.first, arguments.skip)
        self.benches = (
            {"lm": Bench(arguments.checkpoint, recipe, texts, length, arguments.windows)} if texts else {}
        )
        self.prompts: dict[str, Prompts] = {}
        if arguments.passkey_model is not None:
            bench = self.benches["retrieval"] = Bench(arguments.passkey_model, recipe, {}, length, 0)
            encode = tasks.encoder(arguments.passkey_model)
            for task in TASKS:
                self.prompts[task] = prompts_of(
                    encode, task, length, DEPTHS, arguments.trials, seed=1, start=bench.start
                )
        self._converted: dict[tuple[str, Fraction], Decoder] = {}
        self._asked: tuple[Any, list[Asked]] | None = None

    def decoder(self, subject: str, ratio: Fraction) -> Decoder:
        """With so many of the KV numbers per token, as `kvexport build --kv-ratio` makes it."""
        bench = self.benches[subject]
        if ratio == TRAINED:
            return bench.decoder
        if (subject, ratio) not in self._converted:
            choice = chosen("auto", float(ratio))(bench, bench.calibration())
            self._converted[subject, ratio] = bench.convert(choice.layer_plans)[0]
        return self._converted[subject, ratio]

    def asked(self, task: str, ratio: Fraction) -> list[Asked]:
        """The task's prompts, read whole; those that were asked last are kept."""
        if self._asked is None or self._asked[0] != (task, ratio):
            self._asked = (
                (task, ratio),
                asked_of(self.decoder("retrieval", ratio), self.prompts[task].prompts),
            )
        return self._asked[1]

    def eviction(self, setting: Setting | None) -> Eviction | None:
        return None if setting is None else self.protections.eviction(setting, self.context)

    def lm_figures(self, setting: Setting | None, ratio: Fraction = TRAINED) -> dict[str, Any]:
        bench, decoder, eviction = self.benches["lm"], self.decoder("lm", ratio), self.eviction(setting)
        figures = self._row("lm", setting, ratio)
        return figures | {"texts": language_modelling(decoder, bench.decoder, bench.texts, eviction)}

    def retrieval_figures(
        self, task: str, protocol: str, setting: Setting | None, ratio: Fraction = TRAINED
    ) -> dict[str, Any]:
        decoder, depths = self.decoder("retrieval", ratio), self.prompts[task].depths
        eviction = self.eviction(setting)
        figures = retrieval(decoder, self.asked(task, ratio), depths, eviction, protocol)
        return self._row("retrieval", setting, ratio) | {"task": task, "protocol": protocol, **figures}

    def _row(self, subject: str, setting: Setting | None, ratio: Fraction) -> dict[str, Any]:
        eviction, decoder = self.eviction(setting), self.decoder(subject, ratio)
        for_layers = {} if eviction is None else {"eviction": eviction.to_json()}
        if eviction is not None:
            eviction.require(self.context, len(decoder.layers))
        return {
            "kind": subject,
            "heads": str(ratio),
            "policy": None if setting is None else setting.policy,
            "protection": None if setting is None else setting.protection,
            "share": 1.0 if setting is None else setting.share,
            "held": held(decoder, eviction, self.context, self.benches[subject].decoder),
            **for_layers,
        }


def rows(
    subjects: Subjects, arguments: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every row by name, in the order of the work."""
    protections = subjects.protections
    if "retrieval" in subjects.benches:
        for task in TASKS:
            for protocol in PROTOCOLS:
                for setting in protections.settings(arguments.kept):
                    yield (
                        f"{task} {protocol} {setting}",
                        partial(subjects.retrieval_figures, task, protocol, setting),
                    )
    if "lm" in subjects.benches:
        for setting in protections.settings(arguments.shares):
            yield f"lm {setting}", partial(subjects.lm_figures, setting)
    ratios = [TRAINED, *arguments.compare_converted] if arguments.compare_converted else []
    smallest = min(ratios, default=TRAINED)
    for ratio in ratios:
        for budget in combined(ratio, smallest):
            name = f"heads {ratio} {budget or 'full'}"
            if "lm" in subjects.benches:
                yield f"lm {name}", partial(subjects.lm_figures, budget, ratio)
            if "retrieval" in subjects.benches:
                for task in TASKS:
                    yield f"{task} {name}", partial(subjects.retrieval_figures, task, "once", budget, ratio)


def combined(ratio: Fraction, smallest: Fraction) -> Iterator[Setting | None]:
    """No eviction, then budgets that with this ratio come to 1/2, 1/4, ... of the numbers, down to the
    smallest ratio."""
    if ratio != TRAINED:
        yield None
    share = Fraction(1, 2)
    while ratio * share >= smallest:
        yield from (Setting(policy, protection, float(share)) for policy, protection in COMBINED)
        share /= 2


def begin(subjects: Subjects, arguments: argparse.Namespace) -> dict[str, Any]:
    """A record of what the models do with all of their cache, or the one that --resume goes on with.

    Raises:
        UsageError: nothing to measure, or a record of other settings.
    """
    if not subjects.benches:
        raise UsageError("there is nothing to measure", fix="give --text, --passkey-model or both")
    checkpoints = {name: bench.checkpoint for name, bench in subjects.benches.items()}
    texts = subjects.benches["lm"].texts if "lm" in subjects.benches else {}
    settings = {
        "models": {
            name: {"name": each.path.resolve().name, "sha256": each.digest()}
            for name, each in checkpoints.items()
        },
        "context": subjects.context,
        "texts": {
            name: {"windows": len(each.windows), "sha256": digest(each.windows)}
            for name, each in texts.items()
        },
        "prompts": {
            name: {"prompts": len(each.prompts), "sha256": told_digest(each)}
            for name, each in subjects.prompts.items()
        },
        "recent": arguments.recent,
        "first": arguments.first,
        "skip": arguments.skip,
        "kvexport": kvexport.__version__,
        "torch": torch.__version__,
        "code_sha256": source_digest(),
    }
    if arguments.resume:
        return resumed(record_file(arguments.output), settings)
    full: dict[str, Any] = {}
    if texts:
        full["lm"] = subjects.lm_figures(None)
    for task in subjects.prompts:
        full[task] = subjects.retrieval_figures(task, "once", None)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    protections = subjects.protections.told
    return {
        "settings": settings,
        "machine": machine,
        "protections": protections,
        "full": full,
        "rows": {},
        "left_out": {},
    }


def told_digest(prompts: Prompts) -> str:
    """sha256 of prompts and their answers."""
    return hashlib.sha256(json.dumps(prompts.prompts).encode()).hexdigest()


def source_digest() -> str:
    """sha256 of the code that figures depend on."""
    here, package = Path(__file__).parent, Path(kvexport.__file__).parent
    files = [
        package / f"{name}.py"
        for name in (
            "model/decoder",
            "model/divergence",
            "model/loader",
            "model/rope",
            "model/config",
            "model/reference",
            "eviction/config",
            "eviction/reference_cache",
        )
    ]
    files.append(here / "eviction_measure.py")
    return code_digest(files)


def write(record: dict[str, Any], output: Path) -> None:
    """The record, replaced whole, and what is made of it."""
    save(record, output, markdown(record), {"": chart(record)})


def told(record: dict[str, Any], key: str) -> str:
    if key in record["left_out"]:
        return f"left out: {record['left_out'][key].splitlines()[0]}"
    figures = record["rows"][key]
    if figures["kind"] == "retrieval":
        return f"{figures['accuracy']:.1%}, {figures['held']:.3f} held"
    each = (
        f"{name} {found['increase']:+.4f} ± {found['increase_standard_error'] or 0:.4f}"
        for name, found in figures["texts"].items()
    )
    return f"{', '.join(each)} nats, {figures['held']:.3f} held"


if __name__ == "__main__":
    main()
