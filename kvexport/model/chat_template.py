"""A checkpoint's chat template (Jinja) and the special tokens that it uses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


def read_chat_template(checkpoint: Path) -> str | None:
    """The text of the checkpoint's chat template, or None if it has none.

    Raises:
        OSError, ValueError: a file is damaged.
    """
    file = checkpoint / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = _read_json(checkpoint / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several templates with names
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError("chat_template in tokenizer_config.json must be a string")
    return template


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must contain a JSON object")
    return content


def special_tokens(checkpoint: Path) -> dict[str, str]:
    """Special tokens by name, such as `bos_token`.

    Those of tokenizer_config.json take precedence over those of special_tokens_map.json.

    Raises:
        ValueError: one of the files is damaged.
    """
    config = {
        **_read_json(checkpoint / "special_tokens_map.json"),
        **_read_json(checkpoint / "tokenizer_config.json"),
    }
    tokens = {name: _token_text(config.get(name)) for name in _SPECIAL_TOKENS}
    return {name: text for name, text in tokens.items() if text is not None}


def _token_text(token: object) -> str | None:
    """The text of a special token, which Hugging Face stores as a string or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
