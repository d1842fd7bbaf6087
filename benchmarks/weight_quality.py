"""Measure the loss from integer weights: ours beside llama.cpp's and onnxruntime-genai's formats.

In the rows "whole: ..." all weights of the model are quantised, and ours by the code of a build. In the
others the linear maps of the layers are, and embedding and head stay in float. Every row is compared with the
same float32 logits of the same evaluation windows, in PyTorch. Scales are in float16 in all rows. The record
(OUTPUT.json) and its table (OUTPUT.md) are rewritten after every row; --resume continues them.

    python benchmarks/weight_quality.py CHECKPOINT --text wikitext2=test.txt --calibration train.txt

Weights that were dequantised from 4 bits lie on a grid, and a format that contains it looks lossless: measure
a rotation of such a checkpoint, which computes the same function.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from quality_measure import Bench, Made, digest, source_digest
from records import RESULTS, code_digest, fill, named, record_file, resumed, save
from torch import Tensor

import kvexport.quantize
from kvexport import __version__
from kvexport.build.options import BuildOptions
from kvexport.build.quantization import WeightQuantization, requested_formats, weight_settings
from kvexport.build.report import WeightBits
from kvexport.build.weight_analysis import choose_bits
from kvexport.bundle.formats import default_block
from kvexport.calibrate import recipe_for
from kvexport.errors import UsageError
from kvexport.model.decoder import Decoder, Linear
from kvexport.quantize.inputs import PARTS, all_linears, linears_of, with_linears
from kvexport.quantize.layers import WeightSettings
from kvexport.quantize.method_names import DEFAULT_BITS, Method
from kvexport.quantize.model import LayerQuantizer, quantize_layers
from kvexport.quantize.sensitivity import EMBEDDING, HEAD, WeightAnalysis, analyze_weights

BLOCKS = (32, 64, 128)
_PUBLISHED: tuple[Method, ...] = ("clip", "gptq", "awq", "awq+gptq")
_CORRECTED: tuple[Method, ...] = ("gptq", "awq+gptq")
_SCALE_BITS = 16
_BUDGET = 5.0  # bits of a weight in Q4_1
_LLAMA_CPP = {"Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5.0}  # bits of a weight
_PACKAGES = ("gguf", "onnxruntime")


@dataclass(frozen=True)
class Quantized:
    """The model of a row, the bits of a weight in what is quantised with its share of scales, and the choice
    of bits."""

    decoder: Decoder
    bits: float
    chosen: WeightBits | None = None


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--text",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="evaluation text; may be given several times",
    )
    parser.add_argument(
        "--calibration", default="mixed", help="calibration text: mixed, self, random or a file"
    )
    parser.add_argument("--samples", type=int, default=24, help="calibration windows")
    parser.add_argument("--length", type=int, default=256, help="tokens in an evaluation window")
    parser.add_argument(
        "--windows", type=int, default=20, help="maximum number of evaluation windows of each text"
    )
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="rows to measure")
    parser.add_argument(
        "--output", type=Path, help="path of the output files without suffix [results/weight_quality-MODEL]"
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
    recipe = recipe_for(arguments.calibration, arguments.samples)
    bench = Bench(arguments.checkpoint, recipe, named(arguments.text), arguments.length, arguments.windows)
    windows = bench.calibration()
    name = bench.checkpoint.path.resolve().name
    output = arguments.output or RESULTS / f"weight_quality-{name}"
    quantize = Path(kvexport.quantize.__file__).parent
    settings = {
        **bench.settings(),
        "calibration": recipe.to_json() | {"windows": len(windows), "tokens_sha256": digest(windows)},
        "kvexport": __version__,
        "torch": torch.__version__,
        "packages": {package: _version(package) for package in _PACKAGES},
        "code_sha256": code_digest(
            [
                *sorted(quantize.glob("*.py")),
                *(quantize.parent / "build" / f"{name}.py" for name in ("quantization", "weight_analysis")),
                Path(__file__),
            ]
        ),
        "conversion_code_sha256": source_digest(),
    }
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    record: dict[str, Any] = {"settings": settings, "machine": machine, "rows": {}, "left_out": {}}
    if arguments.resume:
        record = resumed(record_file(output), settings)
    fill(
        record,
        {key: partial(_row, bench, make) for key, make in _rows(bench.decoder, windows).items()},
        arguments.only,
        lambda: save(record, output, markdown(record), {}),
        lambda key: json.dumps(record["rows"].get(key, record["left_out"].get(key))),
    )
    return record


def _rows(decoder: Decoder, windows: Tensor) -> dict[str, Callable[[], Quantized]]:
    """What makes the layers of each row, by its name."""
    rows: dict[str, Callable[[], Quantized]] = {
        f"llama.cpp {name}": partial(_of_llama_cpp, decoder, name) for name in _LLAMA_CPP
    }
    rows["onnxruntime-genai int4, block 32"] = partial(_of_genai, decoder, 32)
    half = WeightSettings(dtype=torch.float16, ridge=None)
    rows["int8 a row"] = partial(_ours, decoder, None, replace(half, bits=8, method="nearest"))
    rows["int8 a row, gptq, corrected"] = partial(
        _ours, decoder, windows, WeightSettings(bits=8, dtype=torch.float16)
    )
    for block in (32, 128, 64):
        of_block = replace(half, block=block)
        rows[f"nearest, block {block}"] = partial(_ours, decoder, None, replace(of_block, method="nearest"))
        for method in _PUBLISHED:
            rows[f"{method}, block {block}"] = partial(
                _ours, decoder, windows, replace(of_block, method=method)
            )
        corrected = WeightSettings(dtype=torch.float16, block=block)
        for method in _CORRECTED:
            rows[f"{method}, corrected, block {block}"] = partial(
                _ours, decoder, windows, replace(corrected, method=method)
            )
    return rows | _whole_rows(decoder, windows)


def _whole_rows(decoder: Decoder, windows: Tensor) -> dict[str, Callable[[], Quantized]]:
    """The rows in which embedding and head are quantised, too."""
    build = partial(_built, decoder, windows, cache(partial(analyze_weights, decoder, windows)))
    rows: dict[str, Callable[[], Quantized]] = {}
    rows["whole: default"] = build
    for name in _LLAMA_CPP:
        rows[f"whole: llama.cpp {name}"] = partial(_of_llama_cpp, decoder, name, whole=True)
    rows["whole: onnxruntime-genai int4, block 32"] = partial(_of_genai, decoder, 32, whole=True)
    for tables in ("head", "embedding"):
        options = {f"{tables}_weights": "int8"}
        rows[f"whole: {tables} int8, {_BUDGET:g} bits"] = partial(build, **options)
    for block in (64, 32, 128):
        for bits in (5.0, 4.75, 4.5):
            if (bits, block) != (DEFAULT_BITS, default_block(decoder.dims.hidden_size)):
                name = f"whole: {bits:g} bits, block {block}"
                rows[name] = partial(build, weight_bits=bits, weight_block=block)
    for method in ("awq+gptq", "awq", "clip"):
        rows[f"whole: {_BUDGET:g} bits, {method}"] = partial(build, weight_method=method, weight_bits=_BUDGET)
    rows["whole: int8"] = partial(build, weights="int8")
    return rows


def _built(
    decoder: Decoder, windows: Tensor, analyze: Callable[[WeightSettings], WeightAnalysis], **given: Any
) -> Quantized:
    """The model as a build stores it. If the format of a table is given, the mean of all weights is that of
    the budget.
    """
    options = BuildOptions(recipe_for("random"), **{"dtype": "float16", "weights": "int4"} | given)
    formats = requested_formats(options, decoder)
    settings = weight_settings(options, formats)
    chosen = head_inputs = None
    if options.mixes_bits:
        analysis = analyze(settings)
        if options.head_weights or options.embedding_weights:
            options = replace(options, weight_bits=_remaining_bits(decoder, options, analysis))
        formats, chosen = choose_bits(decoder, options, analysis.losses)
        head_inputs = analysis.head_inputs
    quantization = WeightQuantization(decoder, formats, windows, settings, head_inputs=head_inputs)
    layers = [quantization.quantize(layer) for layer in decoder.layers]
    made = replace(quantization.decoder, layers=layers)
    return Quantized(made, _bits(made), chosen)


def _remaining_bits(decoder: Decoder, options: BuildOptions, analysis: WeightAnalysis) -> float:
    """Bits of the weights whose format is not given, if all weights together have the budget."""
    fixed = {HEAD, EMBEDDING} if decoder.head is None else {HEAD if options.head_weights else EMBEDDING}
    losses = analysis.losses
    left = _BUDGET * sum(each.weights for each in losses.values())
    left -= sum(8 * losses[key].bytes_eight for key in fixed if key in losses)
    return left / sum(each.weights for key, each in losses.items() if key not in fixed)


def _bits(decoder: Decoder) -> float:
    """Mean bits of all weights that have codes."""
    bits = weights = 0
    codes_of_all = [decoder.embedding.codes, None if decoder.head is None else decoder.head.codes]
    for layer in decoder.layers:
        codes_of_all += [each.codes for each in all_linears(layer).values()]
    for codes in codes_of_all:
        if codes is not None:
            weights += codes.codes.numel()
            bits += codes.bits * codes.codes.numel() + _SCALE_BITS * codes.scales.numel()
    return bits / weights


def _ours(decoder: Decoder, windows: Tensor | None, settings: WeightSettings) -> Quantized:
    layers = [each.layer for each in quantize_layers(decoder, windows, LayerQuantizer(settings))]
    made = replace(decoder, layers=layers)
    return Quantized(made, _bits(made))


def _of_llama_cpp(decoder: Decoder, name: str, *, whole: bool = False) -> Quantized:
    """All linear maps of the layers in a format of llama.cpp, by the gguf package; `whole`: the tables, too.

    Raises:
        UsageError: the package is not installed.
    """
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise UsageError("the gguf package must be installed", fix="pip install gguf") from error
    kind = GGMLQuantizationType[name]

    def restored(weight: Tensor) -> Tensor:
        return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))

    made = _mapped(decoder, restored)
    if whole:
        embedding = replace(decoder.embedding, weight=restored(decoder.embedding.weight))
        head = None if decoder.head is None else _with_weight(decoder.head, restored)
        made = replace(made, embedding=embedding, head=head)
    return Quantized(made, _LLAMA_CPP[name])


def _of_genai(decoder: Decoder, block: int, *, whole: bool = False) -> Quantized:
    """All linear maps of the layers as onnxruntime-genai's model builder stores them by default in int4:
    onnxruntime's MatMulNBits quantizer, symmetric, here with scales in float16. `whole`: the head, too; the
    embedding is in float16, which counts.

    Raises:
        UsageError: onnxruntime is not installed, or its quantizer has another interface.
    """
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )
    except ImportError as error:
        raise UsageError(
            "onnxruntime must be installed", got=str(error), fix="pip install onnxruntime"
        ) from error
    quantizer = DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True))

    def restored(weight: Tensor) -> Tensor:
        packed, scales, _ = quantizer.qbits_block_quant(
            weight.T.contiguous().numpy()
        )  # [N, K/block, block/2]
        pairs = torch.from_numpy(packed)
        codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(2).float() - 8  # [N, K/block, block]
        steps = torch.from_numpy(scales).reshape(len(weight), -1, 1).half().float()
        return (codes * steps).flatten(1)[:, : weight.shape[1]]

    made, bits = _mapped(decoder, restored), 4 + _SCALE_BITS / block
    if not whole:
        return Quantized(made, bits)
    made = replace(made, head=_with_weight(decoder.output, restored))
    others = decoder.embedding.weight.numel()
    weights = sum(tensor.numel() for tensor in _matrices(decoder)) + made.output.weight.numel()
    return Quantized(made, (bits * weights + 16 * others) / (weights + others))


def _mapped(decoder: Decoder, restored: Callable[[Tensor], Tensor]) -> Decoder:
    """The decoder with a function of the weight of each linear map of its layers."""
    layers = []
    for layer in decoder.layers:
        for part in PARTS:
            linears = linears_of(layer, part).items()
            changed = {name: _with_weight(linear, restored) for name, linear in linears}
            layer = with_linears(layer, part, changed)
        layers.append(layer)
    return replace(decoder, layers=layers)


def _with_weight(linear: Linear, restored: Callable[[Tensor], Tensor]) -> Linear:
    return replace(linear, weight=restored(linear.weight))


def _matrices(decoder: Decoder) -> list[Tensor]:
    """Weights of the linear maps of the layers."""
    return [linear.weight for layer in decoder.layers for linear in all_linears(layer).values()]


def _row(bench: Bench, make: Callable[[], Quantized]) -> dict[str, Any]:
    """Quantise and measure; KL in nats per token."""
    start = time.perf_counter()
    made = make()
    seconds = time.perf_counter() - start
    figures = {
        "bits": round(made.bits, 3),
        "texts": bench.divergences(Made.of(made.decoder).run, decoder=made.decoder),
        "seconds": round(seconds, 1),
    }
    if made.chosen is not None:
        figures |= {
            "predicted_kl": made.chosen.predicted_kl,
            "eight_bits": list(made.chosen.eight_bits),
        }
    return figures


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def markdown(record: dict[str, Any]) -> str:
    """The table of a record."""
    settings, texts = record["settings"], list(record["settings"]["texts"])
    calibration = settings["calibration"]
    lines = [
        f"# Integer weights: {settings['model']['name']}",
        "",
        "Mean KL to the float32 model in nats per token, and share of predictions with the same most likely "
        "token. Bits of a weight include its share of scales. Rows of the whole model have all weights "
        "quantised; the others have the linear maps of the layers quantised, embedding and head in float32. "
        f"Calibrated on {calibration['windows']} windows; evaluated on "
        + ", ".join(f"{each['windows']} windows of {name}" for name, each in settings["texts"].items())
        + f" of {settings['length']} tokens.",
        "",
        f"| weights | bits | {' | '.join(f'{text}: KL | same top' for text in texts)} | quantising, s |",
        f"|---|---:|{'---:|' * (2 * len(texts) + 1)}",
    ]
    for name, row in record["rows"].items():
        figures = " | ".join(
            f"{row['texts'][text]['mean_kl']:.4f} | {100 * row['texts'][text]['top1_agreement']:.1f} %"
            for text in texts
        )
        lines.append(f"| {name} | {row['bits']:.2f} | {figures} | {row['seconds']:.0f} |")
    if record["left_out"]:
        lines += ["", "Left out:", ""]
        lines += [f"- {name}: {reason}" for name, reason in record["left_out"].items()]
    lines += ["", f"Machine: {record['machine']}, shared with other work: the times are upper bounds.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
