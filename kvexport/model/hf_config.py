"""config.json of a Hugging Face checkpoint of a converted decoder: the source's, with the keys that changed.

A change is made only if the family reads the new config as the old one in all other respects. No torch is
imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvexport.errors import CheckpointError
from kvexport.model.architecture import Architecture, read_architecture
from kvexport.model.expressions import evaluate
from kvexport.model.quantized.formats import KEYS as QUANTIZATION_KEYS

_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class HFConfig:
    """What a checkpoint declares.

    Attributes:
        source: architecture of the trained model.
        config: content of config.json.
        architecture: the architecture that a reader takes from it.
    """

    source: Architecture
    config: Mapping[str, Any]
    architecture: Architecture

    @classmethod
    def of_source(cls, config: Mapping[str, Any]) -> HFConfig:
        """The config of the trained model, unchanged, but for the description of quantised weights.

        Raises:
            CheckpointError: it is not of a supported decoder.
        """
        read_architecture(config)  # refuses formats of quantised weights that are not read
        config = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
        architecture = read_architecture(config)
        return cls(architecture, config, architecture)

    @property
    def has_output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.architecture.family.has_bias("o", self.architecture.config)

    def with_kv_heads(self, kv_heads: int) -> HFConfig:
        """With so many KV heads, if the family has a key for their number; else unchanged."""
        it = self.architecture
        keys = it.family.config.get("num_kv_heads", ())
        return self._changed(keys, kv_heads, replace(it, num_kv_heads=kv_heads))

    def with_output_bias(self) -> HFConfig:
        """With a bias of the output projection, if the family has a key for it; else unchanged.

        The key may switch on other biases, too.
        """
        key = self.architecture.family.bias["o"]
        changed = self._changed((key,) if isinstance(key, str) else (), True, self.architecture)
        return changed if changed.has_output_bias else self

    def with_dtype(self, dtype: str) -> HFConfig:
        """With the data type of the weights, such as "float16"."""
        keys = [key for key in _DTYPE_KEYS if key in self.config] or _DTYPE_KEYS[:1]
        return replace(self, config={**self.config, **dict.fromkeys(keys, dtype)})

    def without(self, key: str) -> HFConfig:
        """Without a key."""
        return replace(self, config={name: value for name, value in self.config.items() if name != key})

    def _changed(self, expressions: Sequence[str], value: object, wanted: Architecture) -> HFConfig:
        """With `value` under the first key that gives the wanted architecture; unchanged if none does."""
        for key in self._keys(expressions):
            config = _put(self.config, key.split("."), value)
            try:
                architecture = read_architecture(config)
            except CheckpointError:
                continue
            if replace(architecture, config={}) == replace(wanted, config={}):
                return replace(self, config=config, architecture=architecture)
        return self

    def _keys(self, expressions: Sequence[str]) -> Iterator[str]:
        """Expressions that are plain keys, those that config.json has first."""
        keys = [each for each in expressions if all(part.isidentifier() for part in each.split("."))]
        present = [key for key in keys if evaluate(key, self.config) is not None]
        yield from dict.fromkeys((*present, *keys))


def _put(config: Mapping[str, Any], path: Sequence[str], value: object) -> dict[str, Any]:
    """A copy with `value` at a path of keys."""
    if len(path) > 1:
        inner = config.get(path[0])
        value = _put(inner if isinstance(inner, Mapping) else {}, path[1:], value)
    return {**config, path[0]: value}
