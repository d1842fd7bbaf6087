"""Write the table of an eviction record, and which policy is best for which task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from eviction_tasks import TASKS
from quality_table import _grid as grid

from kvexport.eviction.config import POLICIES

Record = dict[str, Any]
Figures = dict[str, Any]
PROTOCOLS = ("once", "chunked")
CLEAR = 2.0  # standard errors that make a difference


def markdown(record: Record) -> str:
    """The whole report."""
    settings, found = record["settings"], list(record["rows"].values())
    models = ", ".join(f"{each['name']} ({what})" for what, each in settings["models"].items())
    parts = [
        "# What a cache of fewer tokens costs",
        f"Models: {models}; PyTorch float32, {record['machine']}. The context is {settings['context']} "
        "tokens; budgets are "
        "shares of it, alike in every layer and KV head. Keys keep the rotation of their true position.",
        _full(record),
        "Policies: which token goes.\n\n"
        + "\n".join(f"- `{name}`: {what}." for name, what in POLICIES.items()),
        "Protections.\n\n"
        + "\n".join(f"- `{name}`: {what}." for name, what in record["protections"].items()),
        *_held(found),
    ]
    trained = _once_each(each for each in found if each["heads"] == "1")
    for text in settings["texts"]:
        rows = [each for each in trained if each["kind"] == "lm"]
        parts += _section(f"## Language modelling: {text}", rows, partial(_text_nats, text))
    if settings["texts"]:
        parts.append(
            "Nats per token by which cross-entropy rises over the model with its whole cache, on the "
            "second half of every "
            "window, one token at a time; ± the standard error over windows."
        )
    for task, what in TASKS.items():
        for protocol in PROTOCOLS:
            rows = [each for each in trained if each.get("task") == task and each["protocol"] == protocol]
            parts += _section(f"## {task}, {protocol}: {what}", rows, lambda each: f"{each['accuracy']:.0%}")
    trials = min((each["prompts"] for each in settings["prompts"].values()), default=0)
    if trials:
        parts.append(
            "Answers that greedy decoding writes without a mistake. `once`: the prompt is read whole, its "
            "question with it, then "
            "the cache is compressed once, as in the paper. `chunked`: the prompt is read in chunks "
            "within the budget, so that "
            "tokens go before the question is known. The standard error is at most "
            f"{0.5 / math.sqrt(trials):.1%}, of {trials} prompts."
        )
    parts += _winners(record, trained) + _defaults(trained) + _combined(record, found)
    if record["left_out"]:
        lines = [f"- `{key}`: {reason.splitlines()[0]}" for key, reason in record["left_out"].items()]
        parts += ["## Left out", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _full(record: Record) -> str:
    full, lines = record["full"], []
    for text, figures in full.get("lm", {}).get("texts", {}).items():
        windows = record["settings"]["texts"][text]["windows"]
        lines.append(
            [
                text,
                f"cross-entropy {figures['cross_entropy']:.4f} nats",
                f"{windows} windows, {figures['tokens']} predictions",
            ]
        )
    for task in TASKS:
        if task in full:
            lines.append([task, f"accuracy {full[task]['accuracy']:.1%}", f"{full[task]['trials']} prompts"])
    return "With the whole cache:\n\n" + grid(["", "", "of"], lines)


def _held(found: Sequence[Figures]) -> list[str]:
    """The share of the KV numbers where some layers hold everything."""
    shares = sorted({each["share"] for each in found if _skips(each) and each["heads"] == "1"}, reverse=True)
    lines = []
    for kind in ("lm", "retrieval"):
        by_share = {
            each["share"]: each["held"]
            for each in found
            if each["kind"] == kind and _skips(each) and each["heads"] == "1"
        }
        if by_share:
            lines.append([kind, *(f"{by_share[share]:.3f}" if share in by_share else "" for share in shares)])
    if not lines:
        return []
    note = "Where layers hold everything, the cache holds more than the budget's share of the KV numbers:"
    return [note, grid(["budget", *(f"{share:g}" for share in shares)], lines)]


def _once_each(rows: Iterable[Figures]) -> list[Figures]:
    """Without the settings that were measured again to compare heads."""
    return list(
        {
            (each["kind"], each.get("task"), each.get("protocol"), _name(each), each["share"]): each
            for each in rows
        }.values()
    )


def _skips(figures: Figures) -> bool:
    return str(figures["protection"]).endswith("-skip")


def _section(title: str, rows: Sequence[Figures], cell: Callable[[Figures], str]) -> list[str]:
    """A grid of settings by budgets; rows whose layers all evict first."""
    rows = [each for each in rows if each["policy"] is not None]
    if not rows:
        return []
    shares = sorted({each["share"] for each in rows}, reverse=True)
    lines = []
    for policy, protection in sorted(
        dict.fromkeys(_name(each) for each in rows), key=lambda name: name[1].endswith("-skip")
    ):
        by_share = {each["share"]: cell(each) for each in rows if _name(each) == (policy, protection)}
        lines.append([policy, protection, *(by_share.get(share, "") for share in shares)])
    return [title, grid(["policy", "protection", *(f"{share:g}" for share in shares)], lines)]


def _name(figures: Figures) -> tuple[str, str]:
    return figures["policy"], figures["protection"]


def _nats(figures: Figures) -> str:
    error = figures["increase_standard_error"]
    return f"{figures['increase']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


# Who wins


def _increase(text: str, row: Figures) -> float:
    return float(row["texts"][text]["increase"])


def _text_nats(text: str, row: Figures) -> str:
    return _nats(row["texts"][text])


def measures(record: Record) -> list[tuple[str, Callable[[Figures], bool], Callable[[Figures], float]]]:
    """Everything that is measured: its name, whether a row is of it, and the row's loss (the lower the
    better)."""
    found: list[tuple[str, Callable[[Figures], bool], Callable[[Figures], float]]] = []
    for text in record["settings"]["texts"]:
        found.append((text, lambda each: each["kind"] == "lm", partial(_increase, text)))
    for task in TASKS:
        for protocol in PROTOCOLS:
            found.append(
                (f"{task}, {protocol}", partial(_is_of, task, protocol), lambda each: -each["accuracy"])
            )
    return found


def _is_of(task: str, protocol: str, figures: Figures) -> bool:
    return figures.get("task") == task and figures["protocol"] == protocol and figures["heads"] == "1"


def difference(record: Record, name: str, better: Figures, worse: Figures) -> tuple[float, float]:
    """How much less a row loses than another, and the standard error of that: paired over windows, or of two
    shares."""
    if name in record["settings"]["texts"]:
        ours, theirs = (each["texts"][name]["increases"] for each in (better, worse))
        gaps = [b - a for a, b in zip(ours, theirs, strict=True)]
        mean = sum(gaps) / len(gaps)
        spread = sum((gap - mean) ** 2 for gap in gaps) / max(1, len(gaps) - 1)
        return mean, math.sqrt(spread / len(gaps))
    return better["accuracy"] - worse["accuracy"], math.hypot(
        better["standard_error"], worse["standard_error"]
    )


def winners(record: Record, rows: Sequence[Figures]) -> list[dict[str, Any]]:
    """By measure and budget, each policy with the protection that serves it best, where all layers evict; the
    best first."""
    found = []
    for name, of, loss in measures(record):
        mine = [each for each in rows if of(each) and each["policy"] is not None and not _skips(each)]
        for share in sorted({each["share"] for each in mine}, reverse=True):
            best: dict[str, Figures] = {}
            for each in mine:
                if each["share"] == share and (
                    each["policy"] not in best or loss(each) < loss(best[each["policy"]])
                ):
                    best[each["policy"]] = each
            ranked = sorted(best.values(), key=loss)
            if len(ranked) > 1:
                gap, error = difference(record, name, ranked[0], ranked[1])
                clear = gap > CLEAR * error
                found.append(
                    {
                        "measure": name,
                        "share": share,
                        "ranked": ranked,
                        "gap": gap,
                        "error": error,
                        "clear": clear,
                    }
                )
    return found


def _winners(record: Record, rows: Sequence[Figures]) -> list[str]:
    found = winners(record, rows)
    if not found:
        return []
    texts, lines = record["settings"]["texts"], []

    def told(name: str, each: Figures) -> str:
        value = f"{each['texts'][name]['increase']:+.4f}" if name in texts else f"{each['accuracy']:.0%}"
        return f"{each['policy']} ({each['protection']}) {value}"

    for each in found:
        gap = (
            f"{each['gap']:.4f} ± {each['error']:.4f}"
            if each["measure"] in texts
            else f"{each['gap']:.0%} ± {each['error']:.0%}"
        )
        verdict = f"**{each['ranked'][0]['policy']}**, by {gap}" if each["clear"] else f"none: {gap}"
        lines.append(
            [
                each["measure"],
                f"{each['share']:g}",
                verdict,
                *(told(each["measure"], row) for row in each["ranked"]),
            ]
        )
    counts = {
        policy: (
            sum(e["clear"] and e["ranked"][0]["policy"] == policy for e in found),
            sum(e["ranked"][-1]["policy"] == policy for e in found),
        )
        for policy in POLICIES
    }
    summary = "; ".join(
        f"{policy} wins {won} and is last in {lost}" for policy, (won, lost) in counts.items()
    )
    head = [
        "",
        "budget",
        "wins",
        *(["best", "second", "third", "fourth"][: max(len(e["ranked"]) for e in found)]),
    ]
    note = (
        "Each policy with the protection that serves it best, no layer left whole, so that all hold the "
        "same bytes. A win is a "
        f"difference to the second of more than {CLEAR:g} standard errors (of the differences window by "
        "window, or of two "
        f"shares). Of {len(found)} comparisons: {summary}."
    )
    return [
        "## Where each policy wins and loses",
        note,
        grid(head, [[*line, *[""] * (len(head) - len(line))] for line in lines]),
    ]


# One setting for everything


def _defaults(rows: Sequence[Figures]) -> list[str]:
    """Every policy with every protection, over all texts and over all tasks."""
    rows = [each for each in rows if each["policy"] is not None]
    kinds: list[tuple[str, Callable[[Figures], bool], Callable[[Figures], float], str]] = [
        (
            "nats",
            lambda e: e["kind"] == "lm",
            lambda e: _mean(t["increase"] for t in e["texts"].values()),
            "+.4f",
        ),
        *((p, lambda e, p=p: e.get("protocol") == p, lambda e: e["accuracy"], ".0%") for p in PROTOCOLS),
    ]
    names = sorted(dict.fromkeys(_name(each) for each in rows), key=lambda name: name[1].endswith("-skip"))
    columns = [
        (f"{kind} {share:g}", [e for e in rows if of(e) and e["share"] == share], value, form)
        for kind, of, value, form in kinds
        for share in sorted({e["share"] for e in rows if of(e)}, reverse=True)
    ]
    if not columns:
        return []
    cells = {
        name: [[value(e) for e in mine if _name(e) == name] for _, mine, value, _ in columns]
        for name in names
    }
    whole = [
        max(len(cells[name][at]) for name in names) for at in range(len(columns))
    ]  # tasks that any setting was asked
    lines = []
    for name in names:
        means = [
            format(_mean(c), column[3]) if len(c) == n else ""
            for c, column, n in zip(cells[name], columns, whole, strict=True)
        ]
        lines.append([*name, *means])
    note = (
        "Mean over the texts (nats over the whole cache), and over the tasks (accuracy, by protocol), at "
        "each budget; empty "
        "where some are missing."
    )
    return [
        "## One setting for everything",
        note,
        grid(["policy", "protection", *(column[0] for column in columns)], lines),
    ]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


# Fewer heads and fewer tokens


def _combined(record: Record, found: Sequence[Figures]) -> list[str]:
    """Rows with fewer heads and the rows of all heads that hold as much, by what they hold."""
    if all(each["heads"] == "1" for each in found):
        return []
    texts = list(record["settings"]["texts"])
    full = [each | {"held": 1.0} for each in record["full"].values()]
    named = [
        f"`{each['policy']} {each['protection']}`"
        for each in found
        if each["heads"] != "1" and each["policy"] is not None
    ]
    wanted = {name.strip("`") for name in named}
    subjects = [
        each
        for each in [*full, *found]
        if each["policy"] is None or f"{each['policy']} {each['protection']}" in wanted
    ]
    shares = {each["share"] for each in subjects if each["heads"] != "1"} | {0.5, 0.25, 0.125}
    by_name: dict[tuple[str, str, float], dict[str, str]] = {}
    for each in subjects:
        if each["share"] not in shares or each.get("protocol", "once") != "once":
            continue
        name = each["heads"], "full" if each["policy"] is None else " ".join(_name(each)), each["share"]
        cells = by_name.setdefault(name, {})
        if each["kind"] == "lm":
            cells |= {text: _nats(each["texts"][text]) for text in texts} | {"held": f"{each['held']:.3f}"}
        else:
            cells |= {each["task"]: f"{each['accuracy']:.0%}", "held by the retriever": f"{each['held']:.3f}"}
    order = sorted(by_name, key=lambda name: (-_ratio(name[0]) * name[2], -_ratio(name[0]), name[1]))
    columns = [
        c
        for c in ("held", *texts, "held by the retriever", *TASKS)
        if any(c in cells for cells in by_name.values())
    ]
    lines = [
        [heads, what, f"{share:g}", *(by_name[heads, what, share].get(c, "") for c in columns)]
        for heads, what, share in order
    ]
    note = (
        "Heads: the share of the KV numbers per token that `kvexport build --kv-ratio` leaves (calibrated "
        "on the model's own "
        "text, no fine-tuning); held: the share of the trained model's KV numbers at this context. "
        "Retrieval by the protocol "
        "`once`."
    )
    return [
        "## Fewer heads and fewer tokens, at equal bytes",
        note,
        grid(["heads", "eviction", "budget", *columns], lines),
    ]


def _ratio(text: str) -> float:
    over, _, under = text.partition("/")
    return float(over) / float(under or 1)
