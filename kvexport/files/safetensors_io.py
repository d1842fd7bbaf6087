"""Writing safetensors files."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
        )
    except SafetensorError as error:  # for valid tensors it has no other cause than a failed write
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
