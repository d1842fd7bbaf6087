"""`kvexport lint`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from kvexport.errors import CannotRunHere, GateFailed, UsageError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target",
    metavar="NAME|FILE",
    required=True,
    help="Target device, from `kvexport targets` or a TOML file.",
)
@click.option(
    "--jetpack", metavar="VERSION", help="JetPack version of the target, which determines its TensorRT."
)
@click.option(
    "--tensorrt",
    metavar="VERSION",
    help="TensorRT or TensorRT-RTX version of the target.  [default: that of its JetPack or TOML file]",
)
@click.option(
    "--lowering",
    help="Form of the graph to check: std24 or decomposed17.  [default: the one that `kvexport engine` "
    "would build]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object.")
def command(
    bundle: Path, target: str, jetpack: str | None, tensorrt: str | None, lowering: str | None, as_json: bool
) -> None:
    """List the nodes of BUNDLE that the TensorRT of a target does not support, before an engine is built.

    Exits with 1 if there are any. Nodes that are supported but slow, such as attention without a fused
    kernel, are listed as notes. TensorRT need not be installed.
    """
    from kvexport.bundle import GRAPH_FILE, Bundle
    from kvexport.cli.engine_tables import print_findings
    from kvexport.devices.capabilities import TENSORRT_LOWERINGS
    from kvexport.devices.targets import load_target, tensorrt_version

    device = load_target(target)
    if device.engine == "onnxruntime":
        raise UsageError(
            "--target must be a device with TensorRT: ONNX Runtime supports every bundle",
            got=device.name,
            fix="choose another target: `kvexport targets` lists them",
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
    prepared = prepare_graph(
        bundle / GRAPH_FILE, parser, batch=1, capacity=opened.capacity, budget=budget, lowering=lowering
    )
    unsupported = refusals(prepared.findings)
    if as_json:
        report = {
            "target": device.name,
            "engine": device.engine,
            "version": ".".join(map(str, version)),
            "lowering": prepared.lowering,
            "findings": [asdict(finding) for finding in prepared.findings],
            "passed_over": {
                name: [asdict(finding) for finding in findings]
                for name, findings in prepared.rejected.items()
            },
        }
        click.echo(json.dumps(report))
    else:
        print_findings(prepared, str(parser), supported=not unsupported)
    if unsupported:
        fix = unsupported[0].remedy
        if lowering is not None and lowering != TENSORRT_LOWERINGS[-1]:  # another lowering is left to try
            fix = "leave out --lowering"
        raise GateFailed(
            f"{parser} does not support {len(unsupported)} nodes of the bundle in the lowering "
            f"{prepared.lowering}",
            fix=fix,
        )
