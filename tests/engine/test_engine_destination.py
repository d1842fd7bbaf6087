"""The destination of an engine: requested, or this machine."""

from __future__ import annotations

import pytest

from kvexport.devices.gpu import Gpu, find_gpu
from kvexport.devices.system import available_memory
from kvexport.engine.destination import Destination, choose_destination
from kvexport.errors import CannotRunHere, KvexportError, UsageError

GIB = 2**30
NANO = Gpu("Orin", "8.7", int(7.4 * GIB), True)
RTX = Gpu("NVIDIA GeForce RTX 4090", "8.9", int(23.5 * GIB), False)
BOTH, FULL, ONLY_RTX = ["tensorrt", "tensorrt-rtx"], ["tensorrt"], ["tensorrt-rtx"]


@pytest.mark.parametrize(
    ("gpu", "board", "name"),
    [
        (NANO, "NVIDIA Jetson Orin Nano Developer Kit", "orin-nano-8gb"),
        (NANO, "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "orin-nano-8gb-super"),
        (NANO, "NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "orin-nx-8gb"),
        (Gpu("Orin", "8.7", int(3.6 * GIB), True), "NVIDIA Jetson Orin Nano Developer Kit", "orin-nano-4gb"),
        (Gpu("Orin", "8.7", int(14.2 * GIB), True), "NVIDIA Jetson Orin NX", "orin-nx-16gb"),
        (Gpu("Orin", "8.7", int(29.9 * GIB), True), "Jetson AGX Orin", "agx-orin-32gb"),
        (Gpu("Orin", "8.7", int(61.4 * GIB), True), "Jetson AGX Orin Developer Kit", "agx-orin-64gb"),
        (Gpu("Thor", "11.0", int(122.8 * GIB), True), "NVIDIA Jetson AGX Thor Developer Kit", "thor-t5000"),
        (Gpu("NVIDIA H200", "9.0", int(140 * GIB), False), "", "h200"),
        (Gpu("NVIDIA H100", "9.0", int(79 * GIB), False), "", "sm90"),
    ],
)
def test_chooses_this_machine(gpu: Gpu, board: str, name: str) -> None:
    found = choose_destination(None, (), gpu=gpu, board=board, installed=BOTH)
    assert found == Destination(name, "tensorrt", (gpu.compute_capability,), False)
    assert found.jetson == (gpu.compute_capability in ("8.7", "11.0"))


@pytest.mark.parametrize(
    ("target", "capabilities", "gpu", "installed", "expected"),
    [
        (None, ("8.6",), None, ONLY_RTX, Destination("sm86", "tensorrt-rtx", ("8.6",), True)),
        (
            None,
            ("8.6", "12.0", "8.6"),
            None,
            BOTH,
            Destination("sm86-sm120", "tensorrt-rtx", ("8.6", "12.0"), True),
        ),
        (None, ("8.9",), RTX, BOTH, Destination("sm89", "tensorrt-rtx", ("8.9",), False)),
        (None, (), RTX, ONLY_RTX, Destination("rtx-4090", "tensorrt-rtx", ("8.9",), False)),
        ("rtx-4090", (), None, ONLY_RTX, Destination("rtx-4090", "tensorrt-rtx", ("8.9",), True)),
        (
            "rtx-4090",
            ("8.6", "8.9"),
            RTX,
            ONLY_RTX,
            Destination("rtx-4090", "tensorrt-rtx", ("8.6", "8.9"), False),
        ),
        ("orin-nano-8gb", (), NANO, FULL, Destination("orin-nano-8gb", "tensorrt", ("8.7",), False)),
    ],
)
def test_chooses_the_requested_target(
    target: str | None,
    capabilities: tuple[str, ...],
    gpu: Gpu | None,
    installed: list[str],
    expected: Destination,
) -> None:
    assert choose_destination(target, capabilities, gpu=gpu, board="", installed=installed) == expected


@pytest.mark.parametrize(
    ("target", "capabilities", "gpu", "installed", "error", "words"),
    [
        (None, (), NANO, [], CannotRunHere, "TensorRT or TensorRT-RTX must be installed"),
        (None, (), None, [], CannotRunHere, "TensorRT or TensorRT-RTX must be installed"),
        (None, (), None, FULL, CannotRunHere, "builds only on the GPU"),
        (None, ("8.6",), NANO, FULL, CannotRunHere, "only TensorRT-RTX builds for a --compute-capability"),
        (None, (), None, ONLY_RTX, UsageError, "--compute-capability 8.6"),
        ("orin-nano-8gb", (), None, BOTH, CannotRunHere, "copy the bundle to the device"),
        ("orin-nano-8gb", (), RTX, BOTH, CannotRunHere, "compute capability 8.9"),
        ("orin-nano-8gb", ("8.7",), NANO, BOTH, UsageError, "leave out --compute-capability"),
        ("rtx-4090", ("8.6",), None, ONLY_RTX, UsageError, "add --compute-capability 8.9"),
        ("cpu", (), NANO, BOTH, UsageError, "needs no engine"),
        ("toaster", (), NANO, BOTH, UsageError, "the target must be a shipped target"),
    ],
)
def test_rejects_destinations_that_cannot_be_built(
    target: str | None,
    capabilities: tuple[str, ...],
    gpu: Gpu | None,
    installed: list[str],
    error: type[KvexportError],
    words: str,
) -> None:
    with pytest.raises(error) as caught:
        choose_destination(target, capabilities, gpu=gpu, board="", installed=installed)
    assert words in str(caught.value)


def test_probes_this_machine() -> None:
    assert available_memory() > 2**20
    gpu = find_gpu()
    assert gpu is None or (gpu.memory > 0 and "." in gpu.compute_capability)
