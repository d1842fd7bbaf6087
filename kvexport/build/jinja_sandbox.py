"""A chat template, rendered in a process of its own: JSON on stdin, JSON on stdout.

The template is a stranger's program. It runs in Jinja's sandbox, here, where it can have no more than its memory, its
time and its length of output; it reaches no file. Knows Jinja and what Hugging Face's templates expect of it.
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

DATE = datetime(2024, 7, 26)  # that Llama 3's own template falls back to
_SECONDS = 20
_BYTES = 1 << 30  # of the process
_LONGEST = 1 << 20  # characters of one conversation
_Messages = Sequence[Mapping[str, str]]


class TemplateFailed(Exception):
    """Says why."""


@dataclass(frozen=True)
class Rendered:
    text: str | None  # None: the template refuses the conversation
    error: str | None


def render(
    template: str, tokens: Mapping[str, str], conversations: Sequence[_Messages]
) -> tuple[list[Rendered], bool]:
    """Each conversation's text up to where the assistant answers, and whether the template asks what day it is.

    Args:
        tokens: special tokens by name, such as `bos_token`.

    Raises:
        TemplateFailed: the template cannot be compiled, or takes too much.
    """
    work = json.dumps(
        {"template": template, "tokens": dict(tokens), "conversations": [list(one) for one in conversations]}
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONIOENCODING": "utf-8",
    }
    command = [sys.executable, "-m", "kvexport.build.jinja_sandbox"]
    try:
        ran = subprocess.run(
            command, input=work.encode(), capture_output=True, timeout=_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise TemplateFailed(f"it was not done in {_SECONDS} seconds") from error
    if ran.returncode:
        last = ran.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        raise TemplateFailed(last[:200] or f"its process ended with {ran.returncode}")
    said = json.loads(ran.stdout)
    return [Rendered(*one) for one in said["rendered"]], said["dated"]


def _main() -> int:
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = _BYTES if most == resource.RLIM_INFINITY else min(_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    try:
        work = json.load(sys.stdin)
        json.dump(_render(work["template"], work["tokens"], work["conversations"]), sys.stdout)
    except MemoryError:
        print(f"it takes more than {_BYTES >> 20} MiB", file=sys.stderr)
        return 1
    except Exception as error:  # the template's; its message is all that is wanted of it
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)
        return 1
    return 0


def _render(template: str, tokens: Mapping[str, str], conversations: Sequence[_Messages]) -> dict[str, Any]:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks the assistant's words for training: what is within it is rendered."""

        tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    dated = False

    def strftime_now(form: str) -> str:
        nonlocal dated
        dated = True
        return DATE.strftime(form)

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
            rendered.append(
                (_bounded(compiled.generate(messages=messages, add_generation_prompt=True, **tokens)), None)
            )
        except Exception as error:  # whatever the template runs into
            rendered.append((None, f"{error}"[:200]))
    return {"rendered": rendered, "dated": dated}


def _bounded(pieces: Iterable[str]) -> str:
    text = ""
    for piece in pieces:
        text += piece
        if len(text) > _LONGEST:
            raise ValueError(f"it writes more than {_LONGEST} characters")
    return text


if __name__ == "__main__":
    sys.exit(_main())
