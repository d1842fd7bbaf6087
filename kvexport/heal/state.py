"""Where healing stands, in one safetensors file that is replaced whole; refuses one that is damaged or of another job.

Knows lists of tensors and numbers about them; must not know what they are the weights of.
"""

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
    """What is done: layers healed one by one, then steps end to end; every evaluation; the time it took."""

    layers: int
    steps: int
    best_step: int
    curve: list[tuple[int, float]]
    seconds: float


def save(path: Path, job: str, counters: Counters, tensors: dict[str, list[Tensor]]) -> None:
    """Replace the file at `path`; a kill at any moment leaves the old one or the new one.

    Raises:
        OSError: the disk is full, or will not be written.
    """
    header = json.dumps({"format": _FORMAT, "job": job, "counters": asdict(counters)}).encode()
    named = {
        f"{name}.{at}": each.detach() for name, group in tensors.items() for at, each in enumerate(group)
    }
    named[_HEADER] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    named[_CHECKSUM] = _checksum(named)
    partial = path.with_name(f".{path.name}.partial")
    save_tensors(named, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path, job: str, tensors: dict[str, list[Tensor]]) -> Counters | None:
    """Fill `tensors` from the file and return its counters; None where there is no file.

    Raises:
        UsageError: the file is damaged, or of another job.
    """
    if not path.exists():
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        named = load_file(path)
        sound = torch.equal(named.pop(_CHECKSUM), _checksum(named))
        header = json.loads(bytes(named.pop(_HEADER).numpy())) if sound else {}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _refused(path, "is damaged", str(error)) from error
    if not sound:
        raise _refused(path, "is damaged", "its checksum differs")
    if (header.get("format"), header.get("job")) != (_FORMAT, job):
        raise _refused(
            path, "belongs to another job: another checkpoint, conversion, text or options", header.get("job")
        )
    with torch.no_grad():
        for name, group in tensors.items():
            for at, each in enumerate(group):
                each.copy_(named[f"{name}.{at}"])
    found = header["counters"]
    return Counters(**{**found, "curve": [(int(step), float(kl)) for step, kl in found["curve"]]})


def digest(parts: Iterable[object]) -> str:
    """sha256 over tensors and plain values, in order; dataclasses and sequences are taken apart."""
    total = hashlib.sha256()
    for part in parts:
        _add(total, part)
    return total.hexdigest()


def _add(total: hashlib._Hash, part: object) -> None:
    if isinstance(part, Tensor):
        total.update(f"{part.dtype}{tuple(part.shape)}".encode())
        total.update(part.detach().contiguous().flatten().view(torch.uint8).numpy().data)
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


def _refused(path: Path, what: str, seen: object) -> UsageError:
    return UsageError(
        f"the state of healing in {path} {what}",
        got=seen,
        fix="to go on with it, give the same inputs and options as before; to start over, delete the file",
    )
