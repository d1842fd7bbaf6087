"""`kvexport lint`: a bundle and a target in, what the target's TensorRT refuses out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from kvexport.errors import CannotRunHere, GateFailed, UsageError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="A device that `kvexport targets` lists, or a TOML file.")
@click.option("--jetpack", help="The JetPack on it, which says its TensorRT.")
@click.option(
    "--tensorrt", metavar="VERSION", help="Its TensorRT (or TensorRT-RTX) version.  [default: the target's]"
)
@click.option(
    "--lowering", help="Check this form of the graph.  [default: what `kvexport engine` would build]"
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def command(
    bundle: Path, target: str, jetpack: str | None, tensorrt: str | None, lowering: str | None, as_json: bool
) -> None:
    """Name what the TensorRT of a target cannot import or build of BUNDLE. Exit code 1 if there is such a thing.

    Needs no TensorRT. What is only slow, such as attention without a fused kernel, is a note.
    """
    from kvexport.bundle.bundle import GRAPH_FILE, Bundle
    from kvexport.cli.engine_tables import print_findings
    from kvexport.cli.report import PlainConsole
    from kvexport.devices.targets import load_target, tensorrt_version

    device = load_target(target)
    if device.engine == "onnxruntime":
        raise UsageError(
            f"target {device.name} runs on ONNX Runtime, which runs every bundle",
            fix="choose a target with TensorRT: `kvexport targets` lists them",
        )
    version = tensorrt_version(device, jetpack=jetpack, tensorrt=tensorrt)
    opened = Bundle.open(bundle)
    opened.verify((GRAPH_FILE,))
    try:
        from kvexport.engine.engine_graph import prepare_graph
        from kvexport.graph.lint import Parser, refusals
    except ModuleNotFoundError as error:
        raise CannotRunHere(f"lint needs the package {error.name}", fix="pip install onnx onnx-ir") from error

    parser = Parser(device.engine, version)
    budget = None if opened.eviction is None else opened.eviction.budget
    fitted = prepare_graph(
        bundle / GRAPH_FILE, parser, batch=1, capacity=opened.capacity, budget=budget, lowering=lowering
    )
    refused = refusals(fitted.findings)
    if as_json:
        said = {"target": device.name, "engine": device.engine, "version": ".".join(map(str, version))}
        findings = [asdict(finding) for finding in fitted.findings]
        rejected = {name: [asdict(finding) for finding in found] for name, found in fitted.rejected.items()}
        click.echo(
            json.dumps({**said, "lowering": fitted.lowering, "findings": findings, "passed_over": rejected})
        )
    else:
        if fitted.findings:
            print_findings(fitted.findings)
        for name, found in fitted.rejected.items():
            PlainConsole().say(
                f"{name} is passed over: {len(found)} findings (see them with --lowering {name})"
            )
        if not refused:
            PlainConsole().say(f"{parser} takes the bundle as {fitted.lowering}")
    if refused:
        raise GateFailed(
            f"{parser} refuses {len(refused)} things of the bundle lowered to {fitted.lowering}",
            fix="leave out --lowering" if lowering is not None and not _same(lowering) else refused[0].remedy,
        )


def _same(lowering: str) -> bool:
    """Whether no other lowering is left to try."""
    from kvexport.devices.capabilities import TENSORRT_LOWERINGS

    return lowering == TENSORRT_LOWERINGS[-1]
