"""The sections of the analysis page: one function each, with figures, tables and notes on how they were
measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from kvexport.analyze.analysis import Analysis, Sensitivity
from kvexport.analyze.charts import Axis, Line, from_zero, layer_axis, legend, line_chart
from kvexport.analyze.spectra import ENERGIES, SHARES, Spectrum

_NAMES = {
    "key": "keys",
    "key_before_rope": "keys before RoPE",
    "key_after_rope": "keys after RoPE",
    "value": "values",
}
_POINTS = 96  # points drawn per spectrum
_FLOOR = 1e-5  # smallest ratio to the largest singular value that is drawn


@dataclass(frozen=True)
class Section:
    """A section: `name` is its id, `body` its HTML."""

    name: str
    title: str
    body: str


def sections(analysis: Analysis) -> Iterator[Section]:
    """The sections that the analysis has data for, in order."""
    yield Section("summary", "Summary", _summary(analysis))
    yield Section("spectra", "Spectra of the cache", _spectra(analysis))
    yield Section("similarity", "Similarity of heads", _similarity(analysis))
    if analysis.sensitivity is not None:
        yield Section("sensitivity", "Sensitivity", _sensitivity(analysis.sensitivity))
    if any(layer.tightness is not None for layer in analysis.layers):
        yield Section("prediction", "Predicted and measured error", _prediction(analysis))
    yield Section("attention", "Attention maps", _attention(analysis))
    if analysis.pairs:
        yield Section("pairs", "Attention weights of chosen pairs", _pairs(analysis))


def _summary(analysis: Analysis) -> str:
    facts, divergence = analysis.facts, analysis.divergence
    rows = [
        ("family", facts.model_type),
        ("layers", f"{facts.layers}"),
        ("attention heads", f"{facts.attention_heads}"),
        ("KV heads", f"{facts.kv_heads} of width {facts.head_dim}"),
        ("calibration tokens", f"{facts.calibration_tokens:,}"),
        ("KV cache kept, share of its numbers", f"{analysis.kv_ratio:.4g}"),
        ("method", ", ".join(dict.fromkeys(layer.report.method for layer in analysis.layers))),
        ("mean KL to the original, nats per token", f"{divergence.mean_kl:.5f}"),
        (
            "cross-entropy, nats per token",
            f"{divergence.cross_entropy_original:.4f} → {divergence.cross_entropy:.4f}",
        ),
        ("same likeliest next token", f"{divergence.top1_agreement:.1%}"),
    ]
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    calibration = ", ".join(f"{name} {value}" for name, value in facts.calibration.items())
    return f"<dl>{listed}</dl>" + _note(
        f"KL, cross-entropy and agreement are over {divergence.tokens:,} predictions on calibration "
        "windows held out from the "
        f"fit. Calibration: {escape(calibration)}."
    )


def _spectra(analysis: Analysis) -> str:
    kinds = list(analysis.layers[0].spectra.spectra)
    names = [_NAMES[kind] for kind in kinds]
    x, y = (
        Axis("share of the directions", 0, 1, percent=True),
        Axis("singular value / largest", _FLOOR, 1, log=True),
    )
    panels = []
    for slot, kind in enumerate(kinds):
        lines = [
            Line(_curve(layer.spectra.spectra[kind]), slot, marks=False, layer=index)
            for index, layer in enumerate(analysis.layers)
        ]
        title = f"Singular values of {_NAMES[kind]}, one line per layer"
        panels.append(_figure(line_chart(title, x, y, lines, width=360), _capitalize(_NAMES[kind])))
    shares = []
    for share in SHARES:
        lines = [
            Line(
                [
                    (i, layer.spectra.spectra[kind].energy_in(share))
                    for i, layer in enumerate(analysis.layers)
                ],
                slot,
            )
            for slot, kind in enumerate(kinds)
        ]
        low = min(value for line in lines for _, value in line.points)
        axis = Axis("share of the energy", max(0.0, int(low * 10 - 0.2) / 10), 1.0, percent=True)
        title = f"Energy in the first {share:.0%} of the directions, by layer"
        shares.append(
            _figure(
                line_chart(title, layer_axis(len(analysis.layers)), axis, lines),
                f"First {share:.0%} of the directions",
            )
        )
    tokens = f"{analysis.facts.calibration_tokens:,}"
    energies = [f"{share:.0%}" for share in ENERGIES]
    first = analysis.layers[0].spectra.spectra
    directions = [f"{len(first[kind].values)} for {_NAMES[kind]}" for kind in kinds]
    return (
        _select("layer", "spectra", len(analysis.layers))
        + f'<div class="panels" id="spectra-lines">{"".join(panels)}</div>'
        + _note(
            "Singular values of a layer’s whole cache, [tokens, heads·head_dim], relative to the largest; "
            "the strong line is the chosen layer, the faint lines are the others. "
            f"From float64 second moments over {tokens} calibration tokens, not "
            "centred: a mean that all tokens share is one of the directions."
        )
        + legend(names)
        + f'<div class="panels wide">{"".join(shares)}</div>'
        + _note(
            "Share of the energy (squared singular values) in the first quarter and half of the "
            "directions, by layer; "
            "compare Fig. 1 of arXiv 2406.07056."
        )
        + _rank_table(analysis, kinds)
        + _note(
            f"Effective rank: the fewest directions that hold {_list(energies)} of the energy, "
            f"of {_list(directions)}."
        )
    )


def _curve(spectrum: Spectrum) -> list[tuple[float, float]]:
    count, largest = len(spectrum.values), max(float(spectrum.values[0]), 1e-300)
    picked = sorted({round(i * (count - 1) / (_POINTS - 1)) for i in range(_POINTS)})
    points = [((i + 1) / count, float(spectrum.values[i]) / largest) for i in picked]
    return [point for point in points if point[1] >= _FLOOR]


def _rank_table(analysis: Analysis, kinds: Sequence[str]) -> str:
    groups = [(_NAMES[kind], [f"{share:.0%}" for share in ENERGIES]) for kind in kinds]
    rows = [
        [str(layer.spectra.spectra[kind].rank_for(share)) for kind in kinds for share in ENERGIES]
        for layer in analysis.layers
    ]
    return _table("Effective rank by layer", groups, rows)


def _similarity(analysis: Analysis) -> str:
    layers = analysis.layers
    rows = []
    for layer in layers:
        row = []
        for matrix in layer.spectra.similarity.values():
            heads = len(matrix)
            others = (float(matrix.sum()) - heads) / max(heads * (heads - 1), 1)
            row.append(f"{others:.3f}" if heads > 1 else "–")
        rows.append(row)
    canvases = "".join(
        _figure(
            _canvas(f"similarity-{kind}", f"Similarity of the heads of {_NAMES[kind]}"),
            _capitalize(_NAMES[kind]),
        )
        for kind in layers[0].spectra.similarity
    )
    return (
        _select("layer", "similarity", len(layers))
        + f'<div class="panels maps">{canvases}</div>'
        + '<p class="readout" id="similarity-readout" aria-live="polite"></p>'
        + _scale("0", "0.5", "1")
        + _note(
            "Linear CKA (arXiv 1905.00414) of every two KV heads of the chosen layer over the calibration "
            "tokens; keys as they "
            "are cached. It is 1 for heads that are rotated copies of each other. The cosine between heads "
            "is not shown: each "
            "head’s basis is arbitrary, and turning W_V and W_O of a head together, or the rotary pairs of "
            "its W_Q and W_K, "
            "changes that cosine and not the model."
        )
        + _table(
            "Mean similarity of different heads",
            [(_NAMES[kind], [""]) for kind in layers[0].spectra.similarity],
            rows,
        )
        + _note("Mean over all pairs of different heads of a layer.")
    )


def _sensitivity(records: Sequence[Sensitivity]) -> str:
    lines = [
        Line([(each["layer"], each["key"]) for each in records], 0),
        Line([(each["layer"], each["value"]) for each in records], 1),
    ]
    axis = from_zero("sensitivity", [value for line in lines for _, value in line.points])
    last = max(each["layer"] for each in records)
    chart = line_chart("Sensitivity of keys and values, by layer", layer_axis(last + 1), axis, lines)
    rows = [[f"{each['key']:.4g}", f"{each['value']:.4g}"] for each in records]
    return (
        legend(["keys", "values"])
        + f'<div class="panels wide">{_figure(chart, "By layer")}</div>'
        + _note(
            "Mean KL in nats per token for a unit of relative error power of a layer’s attention output, "
            "caused by its keys or its "
            "values, from trials in which only the keys, or only the values, of that layer were compressed."
        )
        + _table(
            "Sensitivity by layer",
            [("keys", [""]), ("values", [""])],
            rows,
            [str(each["layer"]) for each in records],
        )
    )


def _prediction(analysis: Analysis) -> str:
    reports, layers = [layer.report for layer in analysis.layers], layer_axis(len(analysis.layers))
    errors = [
        Line([(i, each.predicted_error) for i, each in enumerate(reports)], 0),
        Line([(i, each.measured_error) for i, each in enumerate(reports)], 1),
    ]
    ratios = Line(
        [(i, layer.tightness) for i, layer in enumerate(analysis.layers) if layer.tightness is not None], 2
    )
    error_axis = from_zero("relative error", [value for line in errors for _, value in line.points])
    ratio_axis = from_zero("predicted / measured", [1.0, *(value for _, value in ratios.points)])
    figures = _figure(
        line_chart("Predicted and measured error, by layer", layers, error_axis, errors), "Error"
    ) + _figure(
        line_chart("Predicted over measured error, by layer", layers, ratio_axis, [ratios], reference=1.0),
        "Predicted / measured",
    )
    columns = ["KV heads", "key width", "value width", "method", "predicted", "measured", "ratio", "residual"]
    rows = [
        [
            f"{each.original_num_key_value_heads} → {each.num_key_value_heads}",
            f"{each.original_head_dim} → {each.key_head_dim}",
            f"{each.original_head_dim} → {each.value_head_dim}",
            each.method,
            f"{each.predicted_error:.4f}",
            f"{each.measured_error:.4f}",
            "–" if layer.tightness is None else f"{layer.tightness:.2f}",
            f"{each.residual_error:.4f}",
        ]
        for layer, each in zip(analysis.layers, reports, strict=True)
    ]
    return (
        legend(["predicted", "measured"])
        + f'<div class="panels wide">{figures}</div>'
        + _note(
            "Relative error (root mean square) of each layer’s attention output: predicted from the "
            "calibration "
            "moments, and measured on held-out windows with the trained model’s inputs, before W_O is "
            "refitted. The ratio "
            "is 1 where the prediction is exact (dashed), above 1 where it is conservative."
        )
        + _table("Errors by layer", [(name, [""]) for name in columns], rows)
        + _note(
            "Residual: error of the residual stream after the layer, with all layers before it converted too."
        )
    )


def _attention(analysis: Analysis) -> str:
    heads, count = len(analysis.maps.original[0]), len(analysis.tokens)
    names = (("original", "Original"), ("compressed", "Compressed"), ("difference", "Compressed − original"))
    figures = "".join(
        _figure(
            _canvas(f"attention-{name}", f"Attention map, {title.lower()}; arrow keys move the chosen cell"),
            title,
        )
        for name, title in names
    )
    tokens = "".join(
        f'<li><span class="at">{i}</span>{escape(_visible(each))}</li>'
        for i, each in enumerate(analysis.tokens)
    )
    return (
        '<div class="choices">'
        + _select("layer", "attention", len(analysis.layers))
        + _select("head", "attention", heads)
        + f'</div><div class="panels maps three">{figures}</div>'
        + '<p class="readout" id="attention-readout" aria-live="polite"></p>'
        + '<p class="readout quiet" id="attention-distance"></p>'
        + '<div class="choices">'
        + _scale("0", "0.25", "1", "weight")
        + '<div class="scale"><span>difference</span><span id="difference-low"></span>'
        + '<i class="diverging"></i><span id="difference-high"></span></div></div>'
        + _note(
            "Rows are queries, columns keys. Each model ran over the same text on its own residual stream, "
            "so the compressed "
            "maps include the errors of all layers before; heads are numbered as in the trained model. "
            "Colour "
            "follows the square root of the weight. Weights are stored in one byte each, exact to 0.004."
        )
        + f'<ol class="tokens" aria-label="The {count} tokens of the text">{tokens}</ol>'
    )


def _pairs(analysis: Analysis) -> str:
    tables = []
    for query, key in analysis.pairs:
        original, compressed = analysis.maps.weights(query, key)
        heads = [(f"head {head}", [""]) for head in range(len(original[0]))]
        rows = [
            [f"{a:.3f}<br>{b:.3f}" for a, b in zip(*layer, strict=True)]
            for layer in zip(original, compressed, strict=True)
        ]
        name = f"{query} “{_visible(analysis.tokens[query])}” on {key} “{_visible(analysis.tokens[key])}”"
        tables.append(
            f"<h3>Query {escape(name)}</h3>" + _table(f"Attention weights of query {name}", heads, rows)
        )
    return "".join(tables) + _note(
        "The weight of the query on the key, by layer and head: original above, compressed below."
    )


def _table(
    label: str,
    groups: Sequence[tuple[str, Sequence[str]]],
    rows: Sequence[Sequence[str]],
    names: Sequence[str] = (),
) -> str:
    """A table with one row a layer; cells are HTML. Columns stand in groups, of one column where its own name
    is empty.
    """
    two = any(len(columns) > 1 for _, columns in groups)
    head = f'<tr><th scope="col" rowspan="{2 if two else 1}">layer</th>'
    head += (
        "".join(f'<th scope="col" colspan="{len(columns)}">{escape(name)}</th>' for name, columns in groups)
        + "</tr>"
    )
    if two:
        edge = [' class="edge"' if i == 0 else "" for _, columns in groups for i in range(len(columns))]
        each = [column for _, columns in groups for column in columns]
        head += (
            "<tr>"
            + "".join(f'<th scope="col"{a}>{escape(b)}</th>' for a, b in zip(edge, each, strict=True))
            + "</tr>"
        )
    else:
        edge = [""] * len(groups)
    body = ""
    for index, row in enumerate(rows):
        cells = "".join(f"<td{a}>{cell}</td>" for a, cell in zip(edge, row, strict=True))
        body += f'<tr><th scope="row">{names[index] if names else index}</th>{cells}</tr>'
    table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{table}</div>'


def _select(what: str, section: str, count: int) -> str:
    options = "".join(f"<option>{i}</option>" for i in range(count))
    select = f'<select id="{section}-{what}" data-choice="{what}" autocomplete="off">{options}</select>'
    return f'<label class="choice">{what} {select}</label>'


def _canvas(name: str, label: str) -> str:
    return f'<canvas id="{name}" tabindex="0" role="img" aria-label="{escape(label)}"></canvas>'


def _figure(content: str, caption: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>"


def _scale(low: str, middle: str, high: str, name: str = "") -> str:
    label = f"<span>{name}</span>" if name else ""
    bar = f'<i class="sequential"><b>{middle}</b></i>'
    return f'<div class="scale">{label}<span>{low}</span>{bar}<span>{high}</span></div>'


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def _capitalize(name: str) -> str:
    return name[0].upper() + name[1:]


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _visible(token: str) -> str:
    """A token with visible white space."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
