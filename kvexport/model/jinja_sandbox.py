"""Render a chat template in a separate process, which reads JSON from stdin and writes JSON to stdout.

The chat template is untrusted input. It runs in Jinja's sandbox without access to files, and with limits on
memory, time and length of output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

DATE = datetime(2024, 7, 26)  # the default of Llama 3's template
_SECONDS = 20
_BYTES = 1 << 30  # memory of the process
_MAX_CHARACTERS = 1 << 20  # of one conversation
_Messages = Sequence[Mapping[str, str]]


class TemplateFailed(Exception):
    """The template is invalid or exceeds a limit; the message says which."""


@dataclass(frozen=True)
class RenderedChat:
    """The text of a conversation, or the error that the template raised for it."""

    text: str | None
    error: str | None


def render(
    template: str,
    tokens: Mapping[str, str],
    conversations: Sequence[_Messages],
    *,
    add_generation_prompt: bool = True,
) -> tuple[list[RenderedChat], bool]:
    """Render each conversation, by default up to the beginning of the assistant's answer.

    Args:
        tokens: special tokens by name, such as `bos_token`.
        add_generation_prompt: whether the text ends with the beginning of an answer.

    Returns:
        The texts, and whether the template uses the current date.

    Raises:
        TemplateFailed: the template cannot be compiled, or exceeds a limit.
    """
    request = json.dumps(
        {
            "template": template,
            "tokens": dict(tokens),
            "conversations": [list(messages) for messages in conversations],
            "add_generation_prompt": add_generation_prompt,
        }
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONIOENCODING": "utf-8",
    }
    command = [sys.executable, "-m", "kvexport.model.jinja_sandbox"]
    try:
        process = subprocess.run(
            command, input=request.encode(), capture_output=True, timeout=_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise TemplateFailed(f"it takes longer than {_SECONDS} seconds") from error
    if process.returncode:
        last_line = process.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        raise TemplateFailed(last_line[:200] or f"its process ended with exit code {process.returncode}")
    answer = json.loads(process.stdout)
    return [RenderedChat(*each) for each in answer["rendered"]], answer["uses_date"]


def _main() -> int:
    import resource

    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    limit = _BYTES if hard_limit == resource.RLIM_INFINITY else min(_BYTES, hard_limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard_limit))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    try:
        request = json.load(sys.stdin)
        json.dump(_render(**request), sys.stdout)
    except MemoryError:
        print(f"it takes more than {_BYTES >> 20} MiB", file=sys.stderr)
        return 1
    except Exception as error:  # raised by the template
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)
        return 1
    return 0


def _render(
    template: str,
    tokens: Mapping[str, str],
    conversations: Sequence[_Messages],
    add_generation_prompt: bool,
) -> dict[str, Any]:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag {% generation %}, which marks the assistant's text for training; renders its content."""

        tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    uses_date = False

    def strftime_now(date_format: str) -> str:
        nonlocal uses_date
        uses_date = True
        return DATE.strftime(date_format)

    def raise_exception(message: str) -> str:
        raise jinja2.TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    compiled = environment.from_string(template)
    rendered: list[tuple[str | None, str | None]] = []
    for messages in conversations:
        try:
            pieces = compiled.generate(
                messages=messages, add_generation_prompt=add_generation_prompt, **tokens
            )
            rendered.append((_join(pieces), None))
        except Exception as error:  # raised by the template
            rendered.append((None, f"{error}"[:200]))
    return {"rendered": rendered, "uses_date": uses_date}


def _join(pieces: Iterable[str]) -> str:
    text = ""
    for piece in pieces:
        text += piece
        if len(text) > _MAX_CHARACTERS:
            raise ValueError(f"it writes more than {_MAX_CHARACTERS} characters")
    return text


if __name__ == "__main__":
    sys.exit(_main())
