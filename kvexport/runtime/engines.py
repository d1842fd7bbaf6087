"""The engines in a bundle, and which of them this machine can run; reads their records and loads none of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kvexport.bundle import Bundle
from kvexport.engine.record import ENGINES_FOLDER, PLAN_FILE, RECORD_FILE, BuildRecord, manifest_digest, read_record
from kvexport.errors import BundleError, CannotRunHere
from kvexport.hashing import sha256_of
from kvexport.runtime.arrays import Device

_MODULES = {
    "tensorrt": ("tensorrt", "pip install 'kvexport[tensorrt]'"),
    "tensorrt-rtx": ("tensorrt_rtx", "pip install 'kvexport[rtx]'"),
}


@dataclass(frozen=True)
class Engine:
    """An engine that fits this machine.

    Attributes:
        directory: of its plan and its record.
        trt: the imported Python package that runs it.
    """

    directory: Path
    record: BuildRecord
    trt: Any

    @property
    def plan(self) -> Path:
        return self.directory / PLAN_FILE

    def verify(self) -> None:
        """Hash the plan.

        Raises:
            BundleError: it is not as it was built.
        """
        if sha256_of(self.plan) != self.record.plan.sha256:
            raise BundleError(f"{self.plan} is not as it was built: its sha256 differs", fix=_rebuild(self.record))


def engine_directories(bundle: Bundle) -> list[Path]:
    """Folders of the bundle's engines, by the names of their targets."""
    return sorted(record.parent for record in (bundle.path / ENGINES_FOLDER).glob(f"*/{RECORD_FILE}"))


def find_engine(bundle: Bundle, device: Device) -> Engine:
    """The first of the bundle's engines, by name, that runs on `device`.

    Raises:
        BundleError: the first that would run was built from another bundle, or its record is damaged.
        CannotRunHere: there is none, or none that fits; says what is wrong with each.
    """
    reasons = []
    for directory in engine_directories(bundle):
        record = read_record(directory)
        if device.compute_capability not in record.compute_capability:
            built = " or ".join(record.compute_capability)
            reasons.append(
                f"{record.target} was built for compute capability {built}, {device.name} has {device.compute_capability}"
            )
            continue
        try:
            trt = _library(record)
        except CannotRunHere as error:
            reasons.append(f"{record.target} {error.what}")
            continue
        if record.manifest_sha256 != manifest_digest(bundle.path):
            raise BundleError(f"the engine {directory} was built from another bundle than this one", fix=_rebuild(record))
        return Engine(directory, record, trt)
    raise CannotRunHere(
        f"the bundle {bundle.path} has no engine that this machine can run", seen="; ".join(reasons) or "no engine",
        fix=f"build one here: kvexport engine {bundle.path}",
    )  # fmt: skip


def _library(record: BuildRecord) -> Any:
    """The package that runs an engine: plans are bound to the version that built them, unless they say otherwise.

    Raises:
        CannotRunHere: it is not installed, does not load, or is of another version.
    """
    name, install = _MODULES.get(record.engine, (record.engine, ""))
    try:
        trt = import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        raise CannotRunHere(
            f"needs {record.engine} {record.version}, which {'is not installed' if missing else f'does not load: {error}'}",
            fix=install,
        ) from error
    if trt.__version__ != record.version and not _runs_later(record, trt.__version__):
        raise CannotRunHere(f"was built with {record.engine} {record.version}, here is {trt.__version__}")
    return trt


def _runs_later(record: BuildRecord, version: str) -> bool:
    """Whether the plan was built version-compatible, and `version` is a later one of the same major."""
    if not record.options.get("version_compatible"):
        return False
    built, here = (tuple(int(part) for part in text.split(".") if part.isdigit()) for text in (record.version, version))
    return here[:1] == built[:1] and here >= built


def _rebuild(record: BuildRecord) -> str:
    return f"build it again: kvexport engine BUNDLE --target {record.target} --force"
