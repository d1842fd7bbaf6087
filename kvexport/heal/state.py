"""State of healing in one safetensors file, written atomically, with checksum and digest of the job."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvexport.errors import UsageError
from kvexport.files.safetensors_io import save_tensors

_FORMAT = 1
_HEADER, _CHECKSUM = "header", "sha256"


@dataclass
class Counters:
    """Progress of healing.

    Attributes:
        layers: layers healed in the first phase.
        steps: steps of the second phase.
        best_step: step of the best weights.
        curve: (step, held-out KL) of every evaluation.
        seconds: wall time.
    """

    layers: int
    steps: int
    best_step: int
    curve: list[tuple[int, float]]
    seconds: float


def save(path: Path, job: str, counters: Counters, tensors: dict[str, list[Tensor]]) -> None:
    """Write the state to `path`; a kill at any moment leaves the old file or the new one.

    Args:
        path: the state file.
        job: digest of the inputs and options.
        counters: progress.
        tensors: lists of tensors by name.

    Raises:
        OSError: the file cannot be written.
    """
    header = json.dumps({"format": _FORMAT, "job": job, "counters": asdict(counters)}).encode()
    named = {
        f"{name}.{at}": each.detach().cpu()
        for name, group in tensors.items()
        for at, each in enumerate(group)
    }
    named[_HEADER] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    named[_CHECKSUM] = _checksum(named)
    partial = path.with_name(f".{path.name}.partial")
    save_tensors(named, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path, job: str, tensors: dict[str, list[Tensor]]) -> Counters | None:
    """Copy the saved tensors into `tensors`; returns the counters, or None if there is no file.

    Raises:
        UsageError: the file is damaged, or of another job.
    """
    if not path.exists():
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        named = load_file(path)
        intact = torch.equal(named.pop(_CHECKSUM), _checksum(named))
        header = json.loads(bytes(named.pop(_HEADER).numpy())) if intact else {}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _invalid(path, "is damaged", str(error)) from error
    if not intact:
        raise _invalid(path, "is damaged", "its checksum differs")
    if (header.get("format"), header.get("job")) != (_FORMAT, job):
        raise _invalid(
            path, "belongs to another job: another checkpoint, conversion, text or options", header.get("job")
        )
    with torch.no_grad():
        for name, group in tensors.items():
            for at, each in enumerate(group):
                each.copy_(named[f"{name}.{at}"])
    counters = header["counters"]
    return Counters(**{**counters, "curve": [(int(step), float(kl)) for step, kl in counters["curve"]]})


def digest(parts: Iterable[object]) -> str:
    """sha256 over tensors and plain values in order, recursively through dataclasses and sequences."""
    total = hashlib.sha256()
    for part in parts:
        _add(total, part)
    return total.hexdigest()


def _add(total: hashlib._Hash, part: object) -> None:
    if isinstance(part, Tensor):
        total.update(f"{part.dtype}{tuple(part.shape)}".encode())
        total.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif is_dataclass(part) and not isinstance(part, type):
        for field in fields(part):
            total.update(field.name.encode())
            _add(total, getattr(part, field.name))
    elif hasattr(part, "__getitem__") and not isinstance(part, str):
        for each in part:  # type: ignore[attr-defined]
            _add(total, each)
    else:
        total.update(repr(part).encode())


def _checksum(named: dict[str, Tensor]) -> Tensor:
    total = hashlib.sha256()
    for name in sorted(named):
        total.update(name.encode())
        _add(total, named[name])
    return torch.frombuffer(bytearray(total.digest()), dtype=torch.uint8)


def _invalid(path: Path, what: str, got: object) -> UsageError:
    return UsageError(
        f"the state of healing in {path} {what}",
        got=got,
        fix="to continue, give the same inputs and options as before; to start again, delete the file",
    )
