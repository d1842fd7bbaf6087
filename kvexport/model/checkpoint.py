"""Hugging Face checkpoints on disk: config.json and safetensors, in one file or in shards.

Only safetensors is read, because reading a pickle can run code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvexport.errors import CheckpointError, reason_of
from kvexport.files.hashing import sha256_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FLOATS = ("F64", "F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TEXT_FILES = (
    "tokenizer*.json",  # also tokenizer_config.json
    "tokenizer.model*",  # Mistral adds the version
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)


class Checkpoint:
    """A directory with `config.json` and safetensors weights.

    Attributes:
        path: the directory.
        config: the parsed config.json.
        files: safetensors file of each tensor, by tensor name.

    Raises (on construction):
        CheckpointError: the directory is not a checkpoint, has weights as pickle only, or a shard is missing
            or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise CheckpointError(
                "the checkpoint must be a folder",
                got=path,
                fix="give the folder with config.json (to download one: hf download NAME --local-dir FOLDER)",
            )
        self.config = read_json(path / "config.json")
        self.files = self._find_tensors()
        self._readers: dict[Path, Any] = {}

    def _find_tensors(self) -> dict[str, Path]:
        single, index = self.path / _SINGLE, self.path / _INDEX
        if single.exists():  # before the index, as transformers does
            return dict.fromkeys(_open(single).keys(), single)
        if not index.exists():
            raise self._no_safetensors()
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{_INDEX} must have a weight_map", fix="download the checkpoint again")
        for shard in weight_map.values():
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".."):
                raise CheckpointError(f"{_INDEX} must name files of its own folder", got=repr(shard))
        files: dict[str, Path] = {}
        for shard in sorted(set(weight_map.values())):
            if not (self.path / shard).is_file():
                raise CheckpointError(
                    f"{self.path} must contain the shard {shard}, which {_INDEX} lists",
                    fix="download the shard",
                )
            names = set(_open(self.path / shard).keys())
            for name in sorted(
                name for name, listed in weight_map.items() if listed == shard and name not in names
            ):
                raise CheckpointError(
                    f"the shard {shard} must contain the tensor {name}, which {_INDEX} lists",
                    fix="download the checkpoint again",
                )
            files.update({name: self.path / shard for name in names if weight_map.get(name, shard) == shard})
        return files

    def _no_safetensors(self) -> CheckpointError:
        pickles = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            return CheckpointError(
                "the weights must be safetensors: reading a pickle can run code",
                got=", ".join(pickles),
                fix='convert it, if you trust it: python -c "from transformers import AutoModelForCausalLM '
                f"as M; M.from_pretrained('{self.path}').save_pretrained('{self.path}-safetensors')\"",
            )
        return CheckpointError(
            f"the checkpoint {self.path} must contain weights",
            got=", ".join(sorted(p.name for p in self.path.iterdir())),
            expected=f"{_SINGLE}, or {_INDEX} with its shards",
        )

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep files mapped inside the block, for `tensor`; they are closed after it."""
        try:
            yield
        finally:
            self._readers.clear()

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Read one tensor inside `reading()`, as a copy in `dtype`.

        Raises:
            CheckpointError: the tensor is missing, has another shape, is not floating point, or is not
                finite.
        """
        path = self.files.get(name)
        if path is None:
            raise CheckpointError(
                f"the checkpoint must contain the tensor {name}",
                got=f"{len(self.files)} tensors in {self.path}",
                fix="download the checkpoint again, or correct config.json",
            )
        if path not in self._readers:
            self._readers[path] = _open(path)
        view = self._readers[path].get_slice(name)
        if view.get_dtype() not in _FLOATS:
            raise CheckpointError(
                f"tensor {name} must be floating point",
                got=view.get_dtype(),
                expected=", ".join(_FLOATS),
                fix="start from the unquantised checkpoint",
            )
        if tuple(view.get_shape()) != shape:
            raise CheckpointError(
                f"tensor {name} must have the shape that config.json gives",
                got=tuple(view.get_shape()),
                expected=shape,
                fix="correct config.json (vocab_size, hidden_size, intermediate_size, num_attention_heads, "
                "num_key_value_heads, head_dim)",
            )
        tensor = self._readers[path].get_tensor(name).to(dtype, copy=True)
        if not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"tensor {name} must be finite",
                got=f"{bad} of {tensor.numel()} numbers are NaN or infinite",
                fix="use an undamaged checkpoint; float16 overflow in training is a usual cause",
            )
        return tensor

    def digest(self) -> str:
        """sha256 over config.json and all weight files, which identifies the model."""
        total = hashlib.sha256()
        for path in [self.path / "config.json", *sorted(set(self.files.values()))]:
            total.update(sha256_of(path).encode())
        return total.hexdigest()

    def copy_tokenizer(self, into: Path, patterns: Iterable[str] = _TEXT_FILES) -> list[str]:
        """Copy the files that exist; returns their names.

        Args:
            patterns: names with wildcards; default: those of all tokenizers, chat templates and generation
                settings.
        """
        paths = [path for pattern in patterns for path in sorted(self.path.glob(pattern)) if path.is_file()]
        names = [path.relative_to(self.path).as_posix() for path in paths]
        for name in names:
            (into / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.path / name, into / name)
        return names

    def token_ids(self, which: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids of `bos_token_id` or `eos_token_id`, from generation_config.json or else config.json.

        Args:
            which: the key.
            vocab_size: number of tokens of the model.

        Raises:
            CheckpointError: the value is not a token id of the vocabulary or a list of them.
        """
        generation = self.path / "generation_config.json"
        value = read_json(generation).get(which) if generation.exists() else None
        value = self.config.get(which) if value is None else value
        if value is None:
            return ()
        ids = tuple(value) if isinstance(value, list) else (value,)
        if not all(type(one) is int and 0 <= one < vocab_size for one in ids):
            raise CheckpointError(
                f"{which} must be a token id or a list of them",
                got=repr(value),
                expected=f"0 to {vocab_size - 1}",
                fix="correct config.json or generation_config.json",
            )
        return ids


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: the file is missing, unreadable or not a JSON object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} must be a checkpoint: it has no {path.name}",
            fix="give the folder with config.json",
        ) from error
    except (ValueError, RecursionError) as error:  # int raises ValueError for a number of 5000 digits
        raise CheckpointError(f"{path} must be JSON: {error}", fix="download the file again") from error
    except OSError as error:
        raise CheckpointError(
            f"{path} must be readable: {reason_of(error)}", fix="give the folder with config.json"
        ) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must be a JSON object", got=type(raw).__name__)
    return raw


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} must be a safetensors file: {reason_of(error)}",
            got=f"{path.stat().st_size} bytes",
            fix="download the file again; a truncated download is the usual cause",
        ) from error
