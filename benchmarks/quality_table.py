"""Write the table of a quality record, and how well the predictions rank the measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

Record = dict[str, Any]
Figures = dict[str, Any]

_PAPER, _PLAIN = "svd-a", "fold-plain"


def predictions(record: Record) -> dict[str, Any]:
    """Spearman's rank correlation of predicted and measured loss, each with the number of points.

    Returns:
        `layers`: error of the attention output, over all converted layers of all methods (ablations predict
        from moments that were made wrong on purpose); `layers_by_ratio`, the same for each KV ratio;
        `choices`: KL to the original, by text, over all rows that a survey chose for.
    """
    found = [each for each in record["rows"].values() if "section" in each]  # the others are curves
    methods = [each for each in found if each["section"] == "methods"]
    layers = [
        (each, layer) for each in methods for layer in each.get("layers", ()) if layer["method"] != "none"
    ]
    ratios = sorted({each["ratio"] for each, _ in layers if each["ratio"]}, key=_number, reverse=True)

    def errors(ratio: str | None = None) -> dict[str, Any]:
        chosen = [layer for each, layer in layers if ratio is None or each["ratio"] == ratio]
        return _correlation([(layer["predicted_error"], layer["measured_error"]) for layer in chosen])

    choices = [each for each in found if each.get("predicted_kl") is not None]
    return {
        "layers": errors(),
        "layers_by_ratio": {ratio: errors(ratio) for ratio in ratios},
        "choices": {
            text: _correlation([(each["predicted_kl"], each["texts"][text]["mean_kl"]) for each in choices])
            for text in record["settings"]["texts"]
        },
    }


def _correlation(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    found = spearman(points) if len(points) > 2 else math.nan
    return {"spearman": None if math.isnan(found) else found, "points": len(points)}


def spearman(points: Sequence[tuple[float, float]]) -> float:
    """Correlation of the ranks, equal values sharing their mean rank; nan where one side does not vary."""
    values = torch.tensor(points, dtype=torch.float64).T
    smaller, equal = values[:, :, None] > values[:, None], values[:, :, None] == values[:, None]
    return float(torch.corrcoef(smaller.sum(-1) + equal.sum(-1) / 2)[0, 1])


def markdown(record: Record) -> str:
    """The whole report."""
    settings, texts = record["settings"], list(record["settings"]["texts"])
    calibration, original = settings["calibration"], record["original"]
    predictions_of = ", ".join(f"{name} {each['tokens']}" for name, each in original["texts"].items())
    parts = [
        f"# What conversion costs on {settings['model']['name']}",
        f"Calibration: {calibration['source']}, {calibration['samples']} windows of "
        f"{calibration['length']} tokens, seed "
        f"{calibration['seed']}; no fine-tuning unless a row says so. Evaluation: windows of "
        f"{settings['length']} tokens, "
        f"predictions: {predictions_of}. PyTorch float32; {record['machine']}. All rows were measured on "
        "the same windows.",
        "KL(original ‖ converted) and cross-entropy (CE) in nats per token, ppl = exp(CE), top-1: how "
        "often the likeliest "
        "token is the original's. MACs: multiply-adds of attention in a decode step at batch 1, mean of "
        "the layers, for each "
        "cached token (they grow with the context) and for the new one. Seconds: of processor time, to "
        "calibrate and convert.",
        _original(record, texts),
    ]
    sections = _by_section(record)
    for ratio, each in _by_ratio(sections.get("methods", [])):
        parts += [f"## {ratio} of the KV numbers", _table(each, texts, original, _PAPER)]
    for ratio, each in _by_ratio(sections.get("ablations", [])):
        base = record["rows"].get(f"{_PLAIN} {ratio}")
        title = f"## What each part is worth, {ratio} of the KV numbers"
        parts += [title, _table(([base] if base else []) + each, texts, original, _PLAIN)]
    parts += _healed(sections.get("healed", []), texts, original)
    parts += _bounds(sections.get("max-kl", []), texts)
    parts += _long(record)
    parts += _predictions(record["predictions"])
    if record["left_out"]:
        lines = [f"- `{key}`: {reason.splitlines()[0]}" for key, reason in record["left_out"].items()]
        parts += ["## Left out", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _by_section(record: Record) -> dict[str, list[Figures]]:
    found: dict[str, list[Figures]] = {}
    for each in record["rows"].values():
        found.setdefault(each.get("section", "long"), []).append(each)
    return found


def _by_ratio(found: Iterable[Figures]) -> list[tuple[str, list[Figures]]]:
    grouped: dict[str, list[Figures]] = {}
    for each in found:
        grouped.setdefault(each["ratio"], []).append(each)
    return sorted(grouped.items(), key=lambda each: -_number(each[0]))


def _number(ratio: str) -> float:
    over, _, under = ratio.partition("/")
    return float(over) / float(under or 1)


def _grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _quality(figures: Figures) -> list[str]:
    kl, ce, top1 = figures["mean_kl"], figures["cross_entropy"], figures["top1_agreement"]
    return [f"{kl:.4f}", f"{ce:.4f}", f"{figures['perplexity']:.2f}", f"{top1:.3f}"]


def _over(figures: Figures, others: Figures) -> str:
    """KL as a multiple of the other's; empty where that lost nothing."""
    return f"{figures['mean_kl'] / others['mean_kl']:.3f}" if others["mean_kl"] > 0 else ""


def _costs(figures: Figures) -> list[str]:
    return [
        f"{figures['macs_per_cached_token']:,.0f}",
        f"{figures['macs_per_new_token']:,.0f}",
        f"{figures['parameters'] / 1e6:.2f}",
    ]


def _tasks(figures: Figures) -> list[str]:
    """PIQA and passkey cells, as far as they were asked."""
    found, cells = figures.get("tasks", {}), []
    if "piqa" in found:
        cells.append(f"{found['piqa']['accuracy']:.3f} ± {found['piqa']['accuracy_standard_error']:.3f}")
    if "passkey" in found:
        accuracy = found["passkey"]["accuracy"]
        cells.append("" if accuracy is None else f"{accuracy:.2f}")
    return cells


def _task_names(original: Figures) -> list[str]:
    names = {"piqa": "PIQA", "passkey": "passkey"}
    return [label for name, label in names.items() if name in original.get("tasks", {})]


def _quality_names(texts: Sequence[str]) -> list[str]:
    return [name for text in texts for name in (f"{text}: KL", "CE", "ppl", "top-1")]


_COSTS = ["MACs per cached token", "per new token", "parameters, M"]


def _original(record: Record, texts: Sequence[str]) -> str:
    original = record["original"]
    head = [
        "",
        "KV numbers",
        *(f"{text}: {name}" for text in texts for name in ("CE", "ppl")),
        *_COSTS,
        *_task_names(original),
    ]
    figures = [each for text in texts for each in _quality(original["texts"][text])[1:3]]
    grid = _grid(
        head,
        [["the original", f"{original['kv_numbers']:,}", *figures, *_costs(original), *_tasks(original)]],
    )
    skipped = original.get("tasks", {}).get("passkey", {}).get("skipped")
    return grid + (f"\n\nPasskey retrieval: {skipped}." if skipped else "")


def _table(found: Sequence[Figures], texts: Sequence[str], original: Figures, base: str) -> str:
    """Rows of one ratio, each text's KL also as a multiple of the row called `base`."""
    yardstick = next((each for each in found if each["name"] == base), None)

    def relative(each: Figures) -> str:
        if yardstick is None:
            return ""
        return ", ".join(_over(each["texts"][text], yardstick["texts"][text]) for text in texts)

    head = ["", "KV numbers", "share", *_quality_names(texts), f"KL / {base}", *_COSTS, "seconds"]
    tasks = _task_names(original) if any("tasks" in each for each in found) else []
    lines = [
        [
            each["name"],
            f"{each['kv_numbers']:,}",
            f"{each['share']:.3f}",
            *(cell for text in texts for cell in _quality(each["texts"][text])),
            relative(each),
            *_costs(each),
            f"{each['processor_seconds']:.0f}",
            *(_tasks(each) if tasks else []),
        ]
        for each in found
    ]
    legend = "\n".join(f"- `{each['name']}`: {each['what']}" for each in found)
    return f"{_grid([*head, *tasks], lines)}\n\n{legend}"


def _healed(found: Sequence[Figures], texts: Sequence[str], original: Figures) -> list[str]:
    if not found:
        return []
    each_text = [f"{text}: {name}" for text in texts for name in ("KL before", "KL after", "after / before")]
    head, tasks = ["", "share", *each_text, "steps", "processor seconds of healing"], _task_names(original)
    lines = []
    for each in found:
        cells = []
        for text in texts:
            before, after = each["unhealed"][text], each["texts"][text]
            cells += [f"{before['mean_kl']:.4f}", f"{after['mean_kl']:.4f}", _over(after, before)]
        effort = [str(each["healing"]["steps"]), f"{each['healing']['processor_seconds']:.0f}"]
        lines.append(
            [f"{each['name']} {each['ratio']}", f"{each['share']:.3f}", *cells, *effort, *_tasks(each)]
        )
    return ["## Healing", _grid([*head, *tasks], lines)]


def _bounds(found: Sequence[Figures], texts: Sequence[str]) -> list[str]:
    if not found:
        return []
    head = [
        "bound",
        "KV numbers",
        "share",
        "predicted KL",
        *(f"{text}: KL, kept" for text in texts),
        "seconds",
    ]
    lines = []
    for each in found:
        kept = [f"{each['texts'][t]['mean_kl']:.4f}, {'yes' if each['kept'][t] else '**no**'}" for t in texts]
        predicted = "" if each["predicted_kl"] is None else f"{each['predicted_kl']:.4f}"
        cells = [f"{each['max_kl']:g}", f"{each['kv_numbers']:,}", f"{each['share']:.3f}", predicted, *kept]
        lines.append([*cells, f"{each['processor_seconds']:.0f}"])
    return ["## A bound on the loss, kept on text that calibration did not see", _grid(head, lines)]


def _long(record: Record) -> list[str]:
    found = {key: each for key, each in record["rows"].items() if "kl" in each}
    if not found:
        return []
    offsets = next(iter(found.values()))["offsets"]
    lines = [
        [key.removeprefix("long-"), text, *(f"{kl:.5f}" for kl in kls)]
        for key, each in found.items()
        for text, kls in each["kl"].items()
    ]
    note = (
        f"KL to the original at half of the KV numbers, of the same windows of "
        f"{record['settings']['length']} tokens with their "
        "first token at these positions. The first lines are the original itself: what rounding makes of "
        "an offset."
    )
    return ["## Far into the context", note, _grid(["", "text", *map(str, offsets)], lines)]


def _predictions(found: dict[str, Any]) -> list[str]:
    def told(each: dict[str, Any]) -> str:
        value = "too few to say" if each["spearman"] is None else f"{each['spearman']:.3f}"
        return f"{value} over {each['points']} points"

    if not found:
        return []
    lines = [
        f"- Error of a layer's attention output, all layers, methods and ratios: {told(found['layers'])}."
    ]
    lines += [
        f"- The same at {ratio} alone: {told(each)}." for ratio, each in found["layers_by_ratio"].items()
    ]
    lines += [f"- KL of the choices, on {text}: {told(each)}." for text, each in found["choices"].items()]
    return [
        "## Do predictions rank what is measured?",
        "Spearman's rank correlation of predicted and measured loss.\n\n" + "\n".join(lines),
    ]
