"""Choose what an engine is built for: from --target and --compute-capability, or from this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvexport.devices.gpu import Gpu
from kvexport.devices.targets import Target, known_targets, load_target
from kvexport.errors import CannotRunHere, UsageError
from kvexport.packages import install_command

_JETSON = ("8.7", "11.0")  # compute capabilities
# Words of board names that distinguish targets of the same compute capability and memory.
_MODELS = {"nano", "nx", "agx", "super", "t4000", "t5000"}
_MEMORY_TOLERANCE = 0.2  # a GPU reports less memory than its board is sold with


@dataclass(frozen=True)
class Destination:
    """What an engine is built for.

    Attributes:
        name: name of the engine's folder.
        engine: "tensorrt" or "tensorrt-rtx".
        compute_capabilities: compute capabilities of the GPUs that the engine must run on, such as "8.6".
        ahead_of_time: this machine has no such GPU.
    """

    name: str
    engine: str
    compute_capabilities: tuple[str, ...]
    ahead_of_time: bool

    @property
    def jetson(self) -> bool:
        """Whether it is a Jetson."""
        return any(capability in _JETSON for capability in self.compute_capabilities)


def choose_destination(
    target: str | None, capabilities: Sequence[str], *, gpu: Gpu | None, board: str, installed: Sequence[str]
) -> Destination:
    """Choose what to build for.

    Args:
        target: name of a target, or path of its TOML file; None: this machine.
        capabilities: compute capabilities to build for ahead of time, such as "8.6"; empty: the target's.
        gpu: this machine's GPU.
        board: this machine's board name; empty if it has none.
        installed: the installed engines.

    Raises:
        UsageError: target and capabilities contradict each other, or neither is given and there is no GPU.
        CannotRunHere: no engine is installed, or the engine builds only on its own device.
    """
    capabilities = tuple(dict.fromkeys(capabilities))
    if target is not None:
        return _for_target(load_target(target), capabilities, gpu)
    if not installed:
        raise CannotRunHere(
            "TensorRT or TensorRT-RTX must be installed",
            fix=f"{install_command('tensorrt-rtx')} (Linux on x86_64, also without a GPU), "
            f"or {install_command('tensorrt')} on the device",
        )
    if capabilities or gpu is None:
        if "tensorrt-rtx" not in installed:
            raise CannotRunHere(
                "TensorRT builds only on the GPU that will run the engine, and this machine has none"
                if gpu is None
                else "only TensorRT-RTX builds for a --compute-capability, and it is not installed",
                fix=f"run this on the device, or build for a desktop GPU: {install_command('tensorrt-rtx')}",
            )
        if not capabilities:
            raise UsageError(
                "this machine has no GPU to build for",
                fix="name the GPU: --target rtx-4090, or --compute-capability 8.6 (repeat it for several)",
            )
        name = "-".join(f"sm{each.replace('.', '')}" for each in capabilities)
        return Destination(
            name, "tensorrt-rtx", capabilities, gpu is None or gpu.compute_capability not in capabilities
        )
    engine = "tensorrt" if "tensorrt" in installed else "tensorrt-rtx"
    return Destination(_machine_name(engine, gpu, board), engine, (gpu.compute_capability,), False)


def _for_target(target: Target, capabilities: tuple[str, ...], gpu: Gpu | None) -> Destination:
    if target.engine == "onnxruntime":
        raise UsageError(
            f"target {target.name} runs on ONNX Runtime, which needs no engine", fix="choose another --target"
        )
    assert target.sm is not None
    if target.engine == "tensorrt-rtx":
        requested = capabilities or (target.sm,)
        if target.sm not in requested:
            raise UsageError(
                f"the engine of target {target.name} must run on its own GPU",
                got=f"--compute-capability {', '.join(requested)}",
                expected=f"{target.sm}, alone or with others",
                fix=f"leave out --target, or add --compute-capability {target.sm}",
            )
        return Destination(
            target.name, target.engine, requested, gpu is None or gpu.compute_capability not in requested
        )
    if capabilities:
        raise UsageError(
            f"TensorRT, the engine of target {target.name}, builds only for this machine's GPU",
            fix="leave out --compute-capability, or choose a target of tensorrt-rtx",
        )
    if gpu is None or gpu.compute_capability != target.sm:
        raise CannotRunHere(
            f"TensorRT builds only on the GPU that will run the engine: {target.title}",
            got="no GPU" if gpu is None else f"{gpu.name}, compute capability {gpu.compute_capability}",
            expected=f"compute capability {target.sm}",
            fix="copy the bundle to the device and run `kvexport engine` there; `kvexport lint` checks it",
        )
    return Destination(target.name, target.engine, (target.sm,), False)


def _machine_name(engine: str, gpu: Gpu, board: str) -> str:
    """Name of the shipped target that matches this machine, or of its compute capability."""
    same_gpu = [
        target
        for target in known_targets()
        if target.engine == engine and target.sm == gpu.compute_capability
    ]
    close = [target for target in same_gpu if abs(gpu.memory / target.memory - 1) < _MEMORY_TOLERANCE]
    words = _MODELS & set(board.lower().split())
    close.sort(
        key=lambda target: (
            len(words ^ _MODELS & set(target.name.split("-"))),
            abs(gpu.memory / target.memory - 1),
        )
    )
    return close[0].name if close else f"sm{gpu.compute_capability.replace('.', '')}"
