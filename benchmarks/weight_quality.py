"""Measure the loss from integer weights: ours beside llama.cpp's and onnxruntime-genai's formats.

The linear maps of the layers are quantised, embedding and head stay in float. Every row is compared with the
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
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from quality_measure import Bench, Made, digest, source_digest
from records import RESULTS, code_digest, fill, named, record_file, resumed, save
from torch import Tensor

import kvexport.quantize
from kvexport import __version__
from kvexport.calibrate import recipe_for
from kvexport.errors import UsageError
from kvexport.model.decoder import Decoder, Layer
from kvexport.quantize.inputs import PARTS, linears_of, with_linears
from kvexport.quantize.layers import WeightSettings
from kvexport.quantize.method_names import Method
from kvexport.quantize.model import LayerQuantizer, quantize_layers

BLOCKS = (32, 64, 128)
_PUBLISHED: tuple[Method, ...] = ("clip", "gptq", "awq", "awq+gptq")
_CORRECTED: tuple[Method, ...] = ("gptq", "awq+gptq")
_SCALE_BITS = 16
_LLAMA_CPP = {"Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5.0}  # bits of a weight
_PACKAGES = ("gguf", "onnxruntime")


@dataclass(frozen=True)
class Quantized:
    """The layers of a row, and the bits of a weight in them with its share of scales."""

    layers: list[Layer]
    bits: float


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
        "code_sha256": code_digest([*sorted(quantize.glob("*.py")), Path(__file__)]),
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
    return rows


def _ours(decoder: Decoder, windows: Tensor | None, settings: WeightSettings) -> Quantized:
    layers = [each.layer for each in quantize_layers(decoder, windows, LayerQuantizer(settings))]
    bits = weights = 0
    for layer in layers:
        for part in PARTS:
            for linear in linears_of(layer, part).values():
                assert linear.codes is not None
                weights += linear.weight.numel()
                bits += linear.codes.bits * linear.weight.numel() + _SCALE_BITS * linear.codes.scales.numel()
    return Quantized(layers, bits / weights)


def _of_llama_cpp(decoder: Decoder, name: str) -> Quantized:
    """All linear maps of the layers in a format of llama.cpp, by the gguf package.

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

    return Quantized(_mapped(decoder, restored), _LLAMA_CPP[name])


def _of_genai(decoder: Decoder, block: int) -> Quantized:
    """All linear maps of the layers as onnxruntime-genai's model builder stores them by default in int4:
    onnxruntime's MatMulNBits quantizer, symmetric, here with scales in float16.

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

    return Quantized(_mapped(decoder, restored), 4 + _SCALE_BITS / block)


def _mapped(decoder: Decoder, restored: Callable[[Tensor], Tensor]) -> list[Layer]:
    """The layers with a function of each linear map's weight."""
    layers = []
    for layer in decoder.layers:
        for part in PARTS:
            linears = linears_of(layer, part).items()
            changed = {name: replace(linear, weight=restored(linear.weight)) for name, linear in linears}
            layer = with_linears(layer, part, changed)
        layers.append(layer)
    return layers


def _row(bench: Bench, make: Callable[[], Quantized]) -> dict[str, Any]:
    """Quantise and measure; KL in nats per token."""
    start = time.perf_counter()
    made = make()
    seconds = time.perf_counter() - start
    decoder = replace(bench.decoder, layers=made.layers)
    return {
        "bits": round(made.bits, 3),
        "texts": bench.divergences(Made.of(decoder).run),
        "seconds": round(seconds, 1),
    }


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
        "token; linear maps of the layers only, embedding and head in float32. Bits of a weight include its "
        f"share of scales. Calibrated on {calibration['windows']} windows; evaluated on "
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
