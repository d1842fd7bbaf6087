"""Where an engine will run, and so how it must be built: from --target and --compute-capability, or from this machine.

Knows targets and machines; imports no TensorRT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvexport.devices.gpu import Gpu
from kvexport.devices.targets import Target, known_targets, load_target
from kvexport.errors import CannotRunHere, UsageError
from kvexport.packages import install_command

_JETSON = ("8.7", "11.0")
_MODELS = {
    "nano",
    "nx",
    "agx",
    "super",
    "t4000",
    "t5000",
}  # words of a board's name that tell targets of one memory apart
_NEAR = 0.2  # a GPU shows some less memory than its board is sold with


@dataclass(frozen=True)
class Destination:
    """One folder of engines.

    Attributes:
        name: of the folder.
        engine: "tensorrt" or "tensorrt-rtx".
        compute_capabilities: of the GPUs that it must run on.
        ahead: built without such a GPU at hand.
    """

    name: str
    engine: str
    compute_capabilities: tuple[str, ...]
    ahead: bool

    @property
    def jetson(self) -> bool:
        return any(capability in _JETSON for capability in self.compute_capabilities)


def choose_destination(
    target: str | None, capabilities: Sequence[str], *, gpu: Gpu | None, board: str, installed: Sequence[str]
) -> Destination:
    """What was asked for, or what this machine is.

    Args:
        target: a name or a TOML file; None: this machine.
        capabilities: "8.6", ...: what to build for ahead of time; empty: the target's.
        gpu, board, installed: this machine, as `machine` and `library` see it.

    Raises:
        UsageError: the two contradict, or do not suffice.
        CannotRunHere: no engine is installed, or the engine builds on its own device only.
    """
    capabilities = tuple(dict.fromkeys(capabilities))
    if target is not None:
        return _of_target(load_target(target), capabilities, gpu)
    if not installed:
        raise CannotRunHere(
            "no TensorRT is installed",
            fix=f"{install_command('tensorrt-rtx')} (Linux on x86_64, also without a GPU), "
            f"or {install_command('tensorrt')} on the device",
        )
    if capabilities or gpu is None:
        if "tensorrt-rtx" not in installed:
            raise CannotRunHere(
                "TensorRT builds only on the GPU that will run the engine, and here is none"
                if gpu is None
                else "only TensorRT-RTX builds for a --compute-capability, and it is not installed",
                fix=f"run this on the device, or build for a desktop GPU: {install_command('tensorrt-rtx')}",
            )
        if not capabilities:
            raise UsageError(
                "there is no GPU here that says what to build for",
                fix="name it: --target rtx-4090, or --compute-capability 8.6 (more than once for several)",
            )
        name = "-".join(f"sm{each.replace('.', '')}" for each in capabilities)
        return Destination(
            name, "tensorrt-rtx", capabilities, gpu is None or gpu.compute_capability not in capabilities
        )
    engine = "tensorrt" if "tensorrt" in installed else "tensorrt-rtx"
    return Destination(_name_of(engine, gpu, board), engine, (gpu.compute_capability,), False)


def _of_target(target: Target, capabilities: tuple[str, ...], gpu: Gpu | None) -> Destination:
    if target.engine == "onnxruntime":
        raise UsageError(
            f"target {target.name} runs on ONNX Runtime, which needs no engine", fix="choose another --target"
        )
    assert target.sm is not None
    if target.engine == "tensorrt-rtx":
        wanted = capabilities or (target.sm,)
        if target.sm not in wanted:
            raise UsageError(
                f"an engine for other GPUs than its own is none for target {target.name}",
                got=f"--compute-capability {', '.join(wanted)}",
                expected=f"{target.sm}, and others beside it",
                fix=f"leave out --target, or add --compute-capability {target.sm}",
            )
        return Destination(
            target.name, target.engine, wanted, gpu is None or gpu.compute_capability not in wanted
        )
    if capabilities:
        raise UsageError(
            f"TensorRT, the engine of target {target.name}, builds for the GPU at hand only",
            fix="leave out --compute-capability, or choose a target of tensorrt-rtx",
        )
    if gpu is None or gpu.compute_capability != target.sm:
        raise CannotRunHere(
            f"TensorRT builds only on the GPU that will run the engine: {target.title}",
            got="no GPU" if gpu is None else f"{gpu.name}, compute capability {gpu.compute_capability}",
            expected=f"compute capability {target.sm}",
            fix="copy the bundle to the device, and run `kvexport engine` there; `kvexport lint` checks it here",
        )
    return Destination(target.name, target.engine, (target.sm,), False)


def _name_of(engine: str, gpu: Gpu, board: str) -> str:
    """The shipped target that this machine is, or its compute capability where it is none."""
    alike = [
        target
        for target in known_targets()
        if target.engine == engine and target.sm == gpu.compute_capability
    ]
    close = [target for target in alike if abs(gpu.memory / target.memory - 1) < _NEAR]
    said = _MODELS & set(board.lower().split())
    close.sort(
        key=lambda target: (
            len(said ^ _MODELS & set(target.name.split("-"))),
            abs(gpu.memory / target.memory - 1),
        )
    )
    return close[0].name if close else f"sm{gpu.compute_capability.replace('.', '')}"
