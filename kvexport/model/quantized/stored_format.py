"""The interface of a format of quantised weights, and what its readers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from kvexport.errors import CheckpointError
from kvexport.model.config import shown
from kvexport.model.quantized.integers import BITS, IntegerWeight

if TYPE_CHECKING:
    from torch import Tensor

Get = Callable[[str], "Tensor | None"]  # the stored tensor of a name; None: there is none

READABLE = (
    "GPTQ, AutoRound, AWQ (GEMM) or integers of compressed-tensors, or weights in float32, float16 or "
    "bfloat16"
)
UNQUANTISED = "take the checkpoint that it was quantised from, which its model card names as base_model"


class StoredFormat(ABC):
    """How the tensors of a checkpoint stand for quantised weights.

    Attributes:
        name: of the format, with its bits and its groups, for messages.
        block: columns that share a scale, by config.json; None: it names no such number.
    """

    MARKERS: ClassVar[tuple[str, ...]]  # a module with a tensor of such a name has a quantised weight
    PARTS: ClassVar[tuple[str, ...]]  # ends of the names of the tensors of such a module
    IGNORED: ClassVar[tuple[str, ...]] = ()  # ends of the names of tensors that are not needed

    name: str
    block: int | None

    @abstractmethod
    def read(self, get: Get, module: str, shape: tuple[int, int]) -> IntegerWeight:
        """The weight of a module.

        Args:
            get: reads a stored tensor.
            module: name of the module.
            shape: [out, in] of the weight.

        Raises:
            CheckpointError: a tensor is missing, or does not fit the shape or config.json.
        """

    def modules(self, names: Iterable[str]) -> set[str]:
        """Modules with a quantised weight, from the names of all tensors."""
        return {
            name.removesuffix(marker) for name in names for marker in self.MARKERS if name.endswith(marker)
        }

    def weight_names(self, names: Iterable[str]) -> set[str]:
        """Names of all tensors, those of a quantised weight replaced by the name of the weight."""
        names = set(names)
        modules = self.modules(names)
        parts = {module + part for module in modules for part in self.PARTS}
        plain = {name for name in names - parts if not name.endswith(self.IGNORED)}
        return plain | {f"{module}.weight" for module in modules}


def format_name(program: str, bits: int, group_size: int | None, whole_row: str = "one group a row") -> str:
    """The name of a format for messages.

    Args:
        program: what wrote it.
        bits: bits of most weights.
        group_size: inputs that share a scale; None: all of them, which `whole_row` says.
    """
    return f"{program}, {bits} bits, {whole_row if group_size is None else f'groups of {group_size}'}"


def tensor(get: Get, name: str, *, integer: bool = False) -> Tensor:
    """A part of a quantised weight.

    Args:
        get: reads a stored tensor.
        name: of the tensor.
        integer: whether it must be int32; else it must be floating point.

    Raises:
        CheckpointError: it is missing, or has another data type.
    """
    import torch

    found = get(name)
    if found is None:
        raise CheckpointError(
            f"the checkpoint must contain the tensor {name}, a part of a quantised weight",
            fix="download the checkpoint again",
        )
    if not (found.dtype == torch.int32 if integer else found.is_floating_point()):
        raise CheckpointError(
            f"tensor {name} must have the data type of its format",
            got=str(found.dtype).removeprefix("torch."),
            expected="int32" if integer else "floating point",
            fix=UNQUANTISED,
        )
    return found


def require_shape(name: str, found: Tensor, expected: tuple[int, ...]) -> None:
    """
    Raises:
        CheckpointError: a part of a quantised weight has another shape.
    """
    if tuple(found.shape) != expected:
        raise CheckpointError(
            f"tensor {name} must have the shape that config.json gives",
            got=tuple(found.shape),
            expected=expected,
            fix="correct config.json, or download the checkpoint again",
        )


def packed_bits(name: str, words: int, width: int) -> int:
    """Bits of each of `width` numbers that are packed into so many words of 32 bits.

    Raises:
        CheckpointError: it is not a number of bits that is read.
    """
    bits = next((each for each in BITS if -(-width * each // 32) == words), None)
    if bits is None:
        raise CheckpointError(
            f"tensor {name} must have the shape that config.json gives, with weights of "
            f"{', '.join(map(str, BITS))} bits",
            got=f"{words} words of 32 bits for {width} weights",
            fix=f"correct config.json; or {UNQUANTISED}",
        )
    return bits


def require_groups(name: str, scales: Tensor, rows: int, width: int) -> None:
    """Check scales [out, groups].

    Raises:
        CheckpointError: they do not fit a weight of `rows` rows and `width` columns, or are not finite.
    """
    if scales.ndim != 2 or scales.shape[0] != rows or not 1 <= scales.shape[1] <= width:
        raise CheckpointError(
            f"tensor {name} must have scales for each of the {rows} outputs",
            got=f"shape {tuple(scales.shape)}",
            fix="correct config.json, or download the checkpoint again",
        )
    if not bool(scales.isfinite().all()):
        raise CheckpointError(
            f"tensor {name} must be finite",
            got="NaN or infinite numbers",
            fix="use an undamaged checkpoint",
        )


def column_groups(index: Tensor | None, name: str, width: int, count: int, size: int | None) -> Tensor | None:
    """The group of each column, as `IntegerWeight` takes it.

    Args:
        index: stored groups [in]; None, empty, or all 0 where there are several: they were not stored.
        name: of that tensor.
        width: number of columns.
        count: number of groups.
        size: columns of a group, by config.json.

    Raises:
        CheckpointError: the stored groups, or the number of groups, do not fit.
    """
    import torch

    if index is not None and index.numel() and (count == 1 or bool(index.any())):
        require_shape(name, index, (width,))
        if bool((index < 0).any()) or bool((index >= count).any()):
            raise CheckpointError(
                f"tensor {name} must name groups that have scales",
                got=f"{int(index.min())} to {int(index.max())}",
                expected=f"0 to {count - 1}",
                fix="download the checkpoint again",
            )
        return index.long()
    if width % count == 0 and size in (None, -1, width // count):
        return None
    if size is not None and size > 0 and -(-width // size) == count:  # the last group is smaller
        return torch.arange(width) // size
    if width % count == 0:
        return None
    raise CheckpointError(
        f"the groups of {name.rpartition('.')[0]} must fit its {width} columns",
        got=f"{count} groups",
        fix="correct group_size in config.json, or download the checkpoint again",
    )


class Settings:
    """Values of quantization_config, checked when they are read."""

    def __init__(self, values: Mapping[str, Any], where: str = "quantization_config") -> None:
        self._values, self._where = values, where

    def has(self, key: str) -> bool:
        """Whether a key is present."""
        return key in self._values

    def bits(self, key: str, *allowed: int) -> int:
        """A number of bits that is read, of `allowed` if any are given."""
        return self._one_of(key, self._values.get(key), allowed or BITS)

    def group_size(self, key: str) -> int | None:
        """Columns of a group; None: absent, or one group for a whole row."""
        value = self._values.get(key)
        if value is None or value == -1:
            return None
        if type(value) is not int or not 0 < value <= 2**24:
            raise self._refusal(key, value, "a positive integer, or -1")
        return value

    def boolean(self, key: str, default: bool | None = None) -> bool | None:
        """True, false, or the default where the key is absent."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._refusal(key, value, "true or false")
        return default if value is None else value

    def text(self, *keys: str) -> str:
        """The first of the keys that is present, in lower case; "" if none is."""
        for key in keys:
            value = self._values.get(key)
            if value is not None:
                if not isinstance(value, str):
                    raise self._refusal(key, value, "a text")
                return value.lower()
        return ""

    def choice(self, keys: tuple[str, ...], default: str, *allowed: str) -> str:
        """One of the allowed texts."""
        return self._one_of(keys[0], self.text(*keys) or default, allowed)

    def table(self, key: str) -> Mapping[str, Any]:
        """A JSON object; empty if the key is absent."""
        value = self._values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._refusal(key, value, "a JSON object")
        return value

    def _one_of(self, key: str, value: Any, allowed: tuple[Any, ...]) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, str)) or value not in allowed:
            raise self._refusal(key, value, ", ".join(map(str, allowed)))
        return value

    def _refusal(self, key: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{key} in {self._where} of config.json must be supported",
            got=shown(value),
            expected=expected,
            fix=UNQUANTISED,
        )
