"""Selection of a bundle's TensorRT engine for this machine, by the records of its engines; none is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kvexport.bundle import Bundle
from kvexport.bundle.engine_record import (
    ENGINES_FOLDER,
    PLAN_FILE,
    RECORD_FILE,
    BuildRecord,
    read_record,
)
from kvexport.devices.versions import release_of
from kvexport.errors import BundleError, CannotRunHere
from kvexport.files.hashing import sha256_of
from kvexport.packages import PACKAGES, install_command
from kvexport.runtime.cache.device_arrays import Device


class OtherEngine(BundleError):
    """The engine for this machine was built from another bundle."""


@dataclass(frozen=True)
class Engine:
    """An engine that this machine can run.

    Attributes:
        directory: directory of its plan and record.
        record: build.json.
        trt: the imported Python package that runs it.
    """

    directory: Path
    record: BuildRecord
    trt: Any

    @property
    def plan(self) -> Path:
        return self.directory / PLAN_FILE

    @property
    def has_weights(self) -> bool:
        """Whether the plan contains the weights; if not, the bundle's are put in when it is loaded."""
        return not self.record.options.get("refit")

    def verify(self) -> None:
        """Hash the plan.

        Raises:
            BundleError: it was changed.
        """
        if sha256_of(self.plan) != self.record.plan.sha256:
            raise BundleError(
                f"{self.plan} must be unchanged since it was built: its sha256 differs",
                fix=_rebuild(self.record),
            )


def engine_directories(bundle: Bundle) -> list[Path]:
    """Folders of the bundle's engines, sorted by target."""
    return sorted(record.parent for record in (bundle.path / ENGINES_FOLDER).glob(f"*/{RECORD_FILE}"))


def find_engine(bundle: Bundle, device: Device, *, host_code: bool = True) -> Engine:
    """The first of the bundle's engines, sorted by target, that runs on `device`.

    Args:
        bundle: the bundle.
        device: the GPU.
        host_code: accept version-compatible plans, which contain host code that TensorRT executes.

    Raises:
        OtherEngine: the first one that would run was built from another bundle.
        BundleError: its record is damaged.
        CannotRunHere: there is none, or none that runs here; with the reason for each.
    """
    reasons = []
    for directory in engine_directories(bundle):
        record = read_record(directory)
        try:
            _require_fit(record, device)
            if record.options.get("version_compatible") and not host_code:
                raise CannotRunHere("contains host code, which runs with --provider tensorrt only")
            trt = _library(record)
        except CannotRunHere as error:
            reasons.append(f"{record.target} {error.what}")
            continue
        if record.manifest_sha256 != bundle.digest:
            raise OtherEngine(f"the engine {directory} must be built from this bundle", fix=_rebuild(record))
        return Engine(directory, record, trt)
    raise CannotRunHere(
        f"the bundle {bundle.path} must have an engine that this machine can run",
        got="; ".join(reasons) or "no engine",
        fix=f"build one here: kvexport engine {bundle.path}",
    )


def _require_fit(record: BuildRecord, device: Device) -> None:
    """
    Raises:
        CannotRunHere: the plan is for other GPUs, or for several sequences at a time.
    """
    here = device.compute_capability
    later = record.options.get("hardware_compatible") and release_of(here) >= (8, 0)  # Ampere and after it
    if here not in record.compute_capability and not later:
        built = " or ".join(record.compute_capability)
        raise CannotRunHere(f"was built for compute capability {built}, and {device.name} has {here}")
    if record.batch != 1:
        raise CannotRunHere(f"was built for {record.batch} sequences at a time, and the runtime runs one")


def _library(record: BuildRecord) -> Any:
    """Import the package that runs an engine, in a version that can run it.

    Raises:
        CannotRunHere: it is not installed, cannot be imported, or has another version.
    """
    name = PACKAGES[record.engine].module
    try:
        trt = import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        problem = "is not installed" if missing else f"cannot be imported: {error}"
        raise CannotRunHere(
            f"needs {record.engine} {record.version}, which {problem}",
            fix=install_command(record.engine),
        ) from error
    if trt.__version__ != record.version and not _runs_later(record, trt.__version__):
        raise CannotRunHere(f"was built with {record.engine} {record.version}, here is {trt.__version__}")
    return trt


def _runs_later(record: BuildRecord, version: str) -> bool:
    """Whether the plan is version-compatible, and `version` is later, of the same major version."""
    built, here = release_of(record.version), release_of(version)
    return bool(record.options.get("version_compatible")) and here[:1] == built[:1] and here >= built


def _rebuild(record: BuildRecord) -> str:
    return f"build it again: kvexport engine BUNDLE --target {record.target} --force"
