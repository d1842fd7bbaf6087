"""The shipped family descriptions, `graphs/families/*.toml`, and which of them describes a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from kvexport.errors import CheckpointError, UsageError
from kvexport.files.resources import resource
from kvexport.model.config import shown
from kvexport.model.family_file import Description

_HEADS = ("ForCausalLM", "LMHeadModel")  # ends of the names of classes in transformers


@cache
def families() -> Mapping[str, Description]:
    """The shipped descriptions by `model_type`.

    Raises:
        UsageError: a description is invalid, or two cover the same `model_type`.
    """
    by_type: dict[str, Description] = {}
    files: dict[str, str] = {}
    for path in sorted(resource("graphs", "families").glob("*.toml")):
        description = Description(path.read_text(encoding="utf-8"), path.name)
        for model_type in description.models:
            if model_type in by_type:
                raise UsageError(
                    f"model_type {model_type} must be in one family file only",
                    got=f"{files[model_type]} and {path.name}",
                )
            by_type[model_type], files[model_type] = description, path.name
    return by_type


def description_of(config: Mapping[str, Any]) -> Description:
    """The description of a checkpoint's family, by `model_type` of its config.

    Raises:
        CheckpointError: no description names its `model_type`.
    """
    model_type = config.get("model_type")
    description = families().get(model_type) if isinstance(model_type, str) else None
    if description is None:
        similar = _model_type_of_class(config.get("architectures"))
        raise CheckpointError(
            "model_type in config.json must be of a supported family",
            got=f"model_type = {shown(model_type)}",
            expected=", ".join(sorted(families())),
            fix="describe the family in one new file under graphs/families/ (CONTRIBUTING.md, add a family)"
            if similar is None
            else f'set model_type to "{similar}", the family of the class that architectures names',
        )
    return description


def _model_type_of_class(architectures: Any) -> str | None:
    """The supported model type whose class in transformers has the name that config.json gives."""
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or not name.endswith(_HEADS):
        return None
    stem = next(name.removesuffix(head) for head in _HEADS if name.endswith(head)).lower()
    return next((each for each in families() if each.replace("_", "") == stem), None)
