"""Examine this machine: its hardware, installed packages, usable commands, and whether a target's engine
works here.

Packages are found by the metadata of their installation and are not imported, except ONNX Runtime, which must
be asked for its providers.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from kvexport.devices import gpu as probe
from kvexport.devices.system import board, l4t_release, total_memory
from kvexport.devices.targets import Target, lowering_for
from kvexport.devices.versions import release_of
from kvexport.packages import PACKAGES, install_command

_EXAMINED = (
    "numpy",
    "tokenizers",
    "torch",
    "safetensors",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "polygraphy",
)
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_ENGINES = ("tensorrt", "tensorrt-rtx")
_RUNNERS = (*_RUNTIMES, *_ENGINES)
_CONVERT = (("torch",), ("safetensors",))
# The packages that each command needs: one of each group.
_COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "build": (*_CONVERT, ("onnx",), ("onnx-ir",), _RUNTIMES),
    "run": (_RUNNERS,),
    "inspect": (),
    "self-test": (_RUNNERS,),
    "validate": (("torch",), ("onnx",), ("onnx-ir",), _RUNTIMES),
    "evaluate": (*_CONVERT, _RUNTIMES),
    "compress": _CONVERT,
    "calibrate": _CONVERT,
    "analyze": _CONVERT,
    "plan": (),
    "lint": (("onnx",), ("onnx-ir",)),
    "engine": (("onnx",), ("onnx-ir",), ("polygraphy",), _ENGINES),
    "bench": (_RUNNERS,),
    "cache": (),
    "targets": (),
}
_JETPACKS = {  # by L4T release
    "36.3": "6.0",
    "36.4": "6.1 to 6.2.1",
    "36.5": "6.2.2",
    "38.2": "7.0",
    "38.4": "7.1",
    "39.2": "7.2",
}
_JETSON_SM = {"orin": "8.7", "thor": "11.0"}
_JETPACK_TENSORRT = (
    "sudo apt install tensorrt python3-libnvinfer; create virtual environments with --system-site-packages"
)


@dataclass(frozen=True)
class Package:
    """A package: its installed version (None: not installed), the minimum version, and the command that
    installs it."""

    name: str
    version: str | None
    floor: str | None
    fix: str

    @property
    def usable(self) -> bool:
        """Whether it is installed and not older than the minimum version."""
        return self.version is not None and (
            self.floor is None or release_of(self.version) >= release_of(self.floor)
        )


@dataclass(frozen=True)
class Gpu:
    """A GPU: memory in bytes (None: shared with the CPU) and compute capability such as "8.9"."""

    name: str
    memory: int | None
    sm: str
    driver: str | None


@dataclass(frozen=True)
class Machine:
    """This machine. `jetson`, `l4t` and `jetpack` are None if it is not a Jetson, or if they are not
    known."""

    python: str
    architecture: str
    cpus: int
    memory: int | None
    jetson: str | None
    l4t: str | None
    jetpack: str | None
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Command:
    """A command of kvexport; `lacks` maps each missing package to the command that installs it."""

    name: str
    lacks: Mapping[str, str]


@dataclass(frozen=True)
class TargetCheck:
    """Whether a target's engine can be built and run here; `reasons` maps each obstacle to its fix."""

    target: str
    builds: bool
    runs: bool
    lowering: str
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class Diagnosis:
    """The result of `examine`. `providers` are ONNX Runtime's; empty if it is not installed or does not
    load."""

    kvexport: str
    machine: Machine
    packages: tuple[Package, ...]
    providers: tuple[str, ...]
    verbs: tuple[Command, ...]
    target: TargetCheck | None

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as JSON values."""
        packages = [{**asdict(package), "usable": package.usable} for package in self.packages]
        return {**asdict(self), "packages": packages}


def examine(
    target: Target | None = None,
    *,
    root: Path = Path("/"),
    search: Sequence[str] | None = None,
    gpus: Sequence[probe.Gpu] | None = None,
) -> Diagnosis:
    """Examine this machine.

    Args:
        target: also check whether its engine can be built and run here.
        root: folder of the system's files (`etc/nv_tegra_release`, `proc/...`).
        search: folders of installed packages; default `sys.path`.
        gpus: the GPUs of this machine; default: those that the driver reports.
    """
    from kvexport.version import __version__

    machine = _machine(root, probe.find_gpus() if gpus is None else gpus)
    packages = {
        package.name: package for package in _packages(sys.path if search is None else search, machine)
    }
    verbs = tuple(
        Command(name, _missing(_without_gpu(needs, machine), packages)) for name, needs in _COMMANDS.items()
    )
    has_runtime = any(packages[name].version is not None for name in _RUNTIMES)
    return Diagnosis(
        kvexport=__version__,
        machine=machine,
        packages=tuple(packages.values()),
        providers=_providers() if has_runtime else (),
        verbs=verbs,
        target=None if target is None else _check(target, machine, packages),
    )


def _packages(search: Sequence[str], machine: Machine) -> list[Package]:
    packages = []
    for name in _EXAMINED:
        known = PACKAGES[name]
        versions = (_version(each, search) for each in (name, *known.aliases))
        packages.append(
            Package(name, next(filter(None, versions), None), known.minimum, _install(name, machine))
        )
    return packages


def _version(name: str, search: Sequence[str]) -> str | None:
    for distribution in metadata.Distribution.discover(name=name, path=list(search)):
        try:
            return distribution.version
        except (KeyError, ValueError, OSError):  # damaged metadata
            continue
    return None


def _install(name: str, machine: Machine) -> str:
    if machine.jetson is not None and name == "tensorrt":
        return _JETPACK_TENSORRT
    if machine.jetson is not None and name == "onnxruntime-gpu":
        return "install a wheel for Jetson, from Jetson AI Lab's package index: PyPI's has no kernels for it"
    if PACKAGES[name].extra is None:
        return "pip install --force-reinstall kvexport"
    return install_command(name)


def _providers() -> tuple[str, ...]:
    try:
        import onnxruntime

        return tuple(onnxruntime.get_available_providers())
    except Exception:  # a broken installation may raise anything
        return ()


def _machine(root: Path, probed: Sequence[probe.Gpu]) -> Machine:
    jetson, l4t = board(root), l4t_release(root)
    if l4t is None and (jetson is None or "jetson" not in jetson.lower()):
        jetson = None  # another board with a device tree
    gpus = [
        Gpu(each.name, None if each.unified else each.memory, each.compute_capability, each.driver)
        for each in probed
    ]
    if not gpus and jetson is not None:
        gpus = [Gpu(jetson, None, sm, None) for name, sm in _JETSON_SM.items() if name in jetson.lower()]
    return Machine(
        python=platform.python_version(),
        architecture=platform.machine(),
        cpus=os.cpu_count() or 1,
        memory=total_memory(root),
        jetson=jetson or ("Jetson" if l4t else None),
        l4t=l4t,
        jetpack=_JETPACKS.get(".".join(l4t.split(".")[:2])) if l4t else None,
        gpus=tuple(gpus),
    )


def _without_gpu(needs: Sequence[Sequence[str]], machine: Machine) -> list[list[str]]:
    """Leave out packages that do not help here: TensorRT needs a GPU, TensorRT-RTX builds without one."""
    useless = () if machine.gpus else ("tensorrt",) if _ENGINES in needs else _ENGINES
    return [[name for name in group if name not in useless] for group in needs]


def _missing(needs: Sequence[Sequence[str]], packages: Mapping[str, Package]) -> dict[str, str]:
    """Map each group without a usable package to the command that installs its first one."""
    missing = [group for group in needs if not any(packages[name].usable for name in group)]
    return {
        " or ".join(_named(packages[name]) for name in group): packages[group[0]].fix for group in missing
    }


def _named(package: Package) -> str:
    if package.version is None:
        return package.name
    return f"{package.name} {package.floor} or later (not {package.version})"


def _check(target: Target, machine: Machine, packages: Mapping[str, Package]) -> TargetCheck:
    if target.engine == "onnxruntime":
        lacks = _missing((_RUNTIMES,), packages)
        return TargetCheck(target.name, not lacks, not lacks, lowering_for(target), lacks)
    package = packages[target.engine]
    reasons = _missing((("onnx",), ("onnx-ir",), ("polygraphy",), (target.engine,)), packages)
    builds = not reasons
    runs = package.usable
    if all(gpu.sm != target.sm for gpu in machine.gpus):
        present = ", ".join(f"{gpu.name} has {gpu.sm}" for gpu in machine.gpus) or "no NVIDIA GPU was found"
        ahead = target.engine == "tensorrt-rtx"
        reasons = reasons if ahead else {}  # no package would help
        fix = (
            "copy the bundle with its engine to a machine with that GPU"
            if ahead
            else "copy the bundle to a machine with that GPU and build there"
        )
        reasons[f"a GPU of compute capability {target.sm} ({present})"] = fix
        # TensorRT-RTX builds ahead of time; TensorRT needs the GPU itself.
        runs, builds = False, builds and ahead
    version = release_of(package.version) if package.usable and package.version else None
    return TargetCheck(target.name, builds, runs, lowering_for(target, version), reasons)
