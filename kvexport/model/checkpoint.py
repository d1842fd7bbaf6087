"""Hugging Face checkpoints on disk: config.json and safetensors, in one file or in shards.

Only safetensors is read, because reading a pickle can run code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvexport.errors import CheckpointError, reason_of
from kvexport.files.hashing import sha256_of
from kvexport.files.identity import FileIdentities
from kvexport.model.other_formats import adapter, no_config, no_safetensors, not_a_folder
from kvexport.model.quantized.formats import require_no_other_format, stored_format
from kvexport.model.quantized.weights import QuantizedWeights

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
    """A directory with `config.json` and safetensors weights, whose files must stay as they are.

    Attributes:
        path: the directory.
        config: the parsed config.json.

    Raises (on construction):
        CheckpointError: the directory is not a checkpoint, or config.json is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identities = FileIdentities(path / name for name in ("config.json", _SINGLE, _INDEX))
        self.config = read_config(path)
        self._identities.add(self.text_files())
        self._readers: dict[Path, Any] = {}

    @cached_property
    def quantized(self) -> QuantizedWeights:
        """The quantised weights, which are read inside `reading()`."""
        return QuantizedWeights(stored_format(self.config), self.files, self._stored)

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """The safetensors file of each tensor, by tensor name.

        It is read after config.json, so that an unknown family is reported before missing weights.

        Raises:
            CheckpointError: weights are missing, in another format, quantised in one that is not read, or
                truncated.
        """
        try:
            files = self._find_tensors()
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {self.path} must be readable: {reason_of(error)}",
                fix="change the permissions of the folder",
            ) from error
        require_no_other_format(sorted(files), stored_format(self.config))
        return files

    def _find_tensors(self) -> dict[str, Path]:
        single, index = self.path / _SINGLE, self.path / _INDEX
        if single.exists():  # before the index, as transformers does
            return dict.fromkeys(_open(single).keys(), single)
        if not index.exists():
            raise no_safetensors(self.path, f"{_SINGLE}, or {_INDEX} with its shards")
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
            self._identities.add([self.path / shard])
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

    def find_prefix(self, embedding_name: str, candidates: Sequence[str]) -> str:
        """The prefix of the names of the decoder's tensors, such as `model.`, found by the embedding.

        Wrappers, adapters and compiled models put their own before it (`language_model.`,
        `base_model.model.`, `_orig_mod.`), and models without a head have none.

        Args:
            embedding_name: name of the embedding without prefix, such as `embed_tokens.weight`.
            candidates: prefixes of the family; the first one that fits is preferred to others.

        Raises:
            CheckpointError: no tensor has that name after a prefix, or several have, or an adapter is not
                merged.
        """
        for name in sorted(self.files):
            if ".lora_A." in name or ".base_layer." in name:
                raise adapter(self.path)
        prefixes = sorted(
            name.removesuffix(embedding_name)
            for name in self.quantized.names
            if name == embedding_name or name.endswith(f".{embedding_name}")
        )
        for candidate in candidates:
            if candidate in prefixes:
                return candidate
        if len(prefixes) == 1:
            return prefixes[0]
        expected = f"{candidates[0] if candidates else ''}{embedding_name}"
        if prefixes:
            raise CheckpointError(
                f"the checkpoint must contain one embedding {expected}",
                got=", ".join(f"{prefix}{embedding_name}" for prefix in prefixes),
                fix="save the language model alone, and give its folder",
            )
        names = sorted(self.files)
        raise CheckpointError(
            f"the checkpoint must contain the embedding {expected}",
            got=", ".join(names[:3]) + (", ..." if len(names) > 3 else ""),
            fix=f"check that config.json's model_type ({self.config.get('model_type')!r:.60}) is that of the "
            "weights",
        )

    def head_prefix(self, head_name: str, prefix: str) -> str:
        """The prefix of the head's name, which has none unless a wrapper puts its own before all names.

        Args:
            head_name: name of the head without prefix, such as `lm_head.weight`.
            prefix: that of the decoder's other tensors, from `find_prefix`.

        Returns:
            The shortest beginning of `prefix`, up to a dot, with which the head exists; "" if there is none.
        """
        ends = [0, *(at + 1 for at, character in enumerate(prefix) if character == ".")]
        return next((prefix[:end] for end in ends if prefix[:end] + head_name in self.quantized.names), "")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep files mapped inside the block, for `tensor`; they are closed after it."""
        quantized = self.quantized
        try:
            yield
        finally:
            self._readers.clear()
            quantized.forget()

    def _stored(self, name: str) -> Tensor | None:
        """A tensor as it is stored; None: there is none."""
        path = self.files.get(name)
        return None if path is None else self._reader(path).get_tensor(name)

    def _reader(self, path: Path) -> Any:
        if path not in self._readers:
            self._readers[path] = self._open(path)
        return self._readers[path]

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Read one tensor inside `reading()`, as a copy in `dtype`; a quantised weight dequantised.

        Raises:
            CheckpointError: the tensor is missing, has another shape, is not floating point, or is not
                finite.
        """
        if name in self.quantized:
            return self.quantized.floats(name, shape, dtype)
        path = self._file_of(name, shape)
        tensor = self._reader(path).get_tensor(name).to(dtype, copy=True)
        _require_finite(name, [tensor])
        return tensor

    def table(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Read a matrix, as `tensor` does; one that is large in `dtype` is read again at each use.

        Raises:
            CheckpointError: as for `tensor`.
        """
        from kvexport.model.lazy_table import LazyTable, Rows, is_large, row_parts

        if name in self.quantized or not is_large(shape, dtype):
            return self.tensor(name, shape, dtype)
        path = self._file_of(name, shape)

        def read(rows: Rows) -> Tensor:
            mapped: Tensor = self._open(path).get_tensor(name)  # its pages are read as rows are used
            return mapped[rows].to(dtype, copy=True)

        table = LazyTable(read, shape, dtype)
        _require_finite(name, row_parts(table))
        return table

    def _file_of(self, name: str, shape: tuple[int, ...]) -> Path:
        """The opened file of a tensor, inside `reading()`; checks the tensor's data type and shape."""
        path = self.files.get(name)
        if path is None:
            raise CheckpointError(
                f"the checkpoint must contain the tensor {name}",
                got=f"{len(self.files)} tensors in {self.path}",
                fix="download the checkpoint again, or correct config.json",
            )
        view = self._reader(path).get_slice(name)
        if view.get_dtype() not in _FLOATS:
            raise CheckpointError(
                f"tensor {name} must have a data type that is supported",
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
        return path

    def require_unchanged(self) -> None:
        """Check that no file has been written, replaced, added or removed since it was read.

        Raises:
            CheckpointError: one has.
        """
        self._identities.require_unchanged(f"the checkpoint {self.path}", CheckpointError, self.text_files())

    def _open(self, path: Path) -> Any:
        self.require_unchanged()
        return _open(path)

    def digest(self) -> str:
        """sha256 over config.json and all weight files, which identifies the model."""
        total = hashlib.sha256()
        for path in [self.path / "config.json", *sorted(set(self.files.values()))]:
            total.update(sha256_of(path).encode())
        return total.hexdigest()

    def text_files(self, patterns: Iterable[str] = _TEXT_FILES) -> list[Path]:
        """Files of tokenizers, chat templates and generation settings, or of other patterns."""
        return [path for pattern in patterns for path in sorted(self.path.glob(pattern)) if path.is_file()]

    def copy_tokenizer(self, into: Path, patterns: Iterable[str] = _TEXT_FILES) -> list[str]:
        """Copy the files that exist; returns their names.

        Args:
            patterns: names with wildcards; default: those of all tokenizers, chat templates and generation
                settings.
        """
        names = [path.relative_to(self.path).as_posix() for path in self.text_files(patterns)]
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


def read_config(path: Path) -> Mapping[str, Any]:
    """config.json of the checkpoint in a folder.

    Raises:
        CheckpointError: the path is not the folder of a checkpoint, or config.json is damaged.
    """
    try:
        if not path.is_dir():
            raise not_a_folder(path)
        if not (path / "config.json").exists():
            raise no_config(path)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {path} must be readable: {reason_of(error)}",
            fix="give the folder with config.json",
        ) from error
    return read_json(path / "config.json")


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


def _require_finite(name: str, parts: Iterable[Tensor]) -> None:
    """
    Raises:
        CheckpointError: a number of the tensor, which is given in parts, is NaN or infinite.
    """
    bad = numbers = 0
    for part in parts:
        bad += int((~part.isfinite()).sum())
        numbers += part.numel()
    if bad:
        raise CheckpointError(
            f"tensor {name} must be finite",
            got=f"{bad} of {numbers} numbers are NaN or infinite",
            fix="use an undamaged checkpoint; float16 overflow in training is a usual cause",
        )


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb"):  # safetensors reports a denied permission as a missing file
            pass
        return safe_open(path, framework="pt")
    except PermissionError as error:
        raise CheckpointError(
            f"{path} must be readable: {reason_of(error)}", fix="change the permissions of the file"
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} must be a safetensors file: {reason_of(error)}",
            got=f"{path.stat().st_size} bytes" if path.is_file() else None,
            fix="download the file again; a truncated download is the usual cause",
        ) from error
