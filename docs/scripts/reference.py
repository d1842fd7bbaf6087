"""Write the reference pages: docs/cli.md from click, docs/api.md from signatures and docstrings.

Run it after a change of a help text or of a public docstring:   python docs/scripts/reference.py
A test compares the pages with what this script writes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click

DOCS = Path(__file__).resolve().parents[1]
_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields)(?: \(.*\))?:$")
_WIDEST = 100  # characters of a signature in one line


def main() -> None:
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """The generated pages by name."""
    return {"cli.md": commands_page(), "api.md": api_page()}


# --- the command line


def commands_page() -> str:
    """All commands with their options, as `--help` shows them."""
    group = command_group()
    context = group.context_class(group, info_name="kvexport", **group.context_settings)
    parts = [
        "# Commands",
        "This page is generated from the command line's own help (`docs/scripts/reference.py`). Exit "
        "codes are in the [tutorial](tutorial.md#in-scripts).",
    ]
    formatter = click.HelpFormatter(width=1000)
    group.format_commands(context, formatter)
    listed = re.findall(r"^  (\S+) +(.+)$", formatter.getvalue(), flags=re.MULTILINE)
    parts.append(
        table(("command", "use"), [(f"[`{name}`](#kvexport-{name})", escaped(use)) for name, use in listed])
    )
    commands = [(name, group.get_command(context, name)) for name, _ in listed]
    for name, command in commands:
        if command is not None:
            parts += command_parts(command, group.context_class(command, info_name=name, parent=context))
    return "\n\n".join(parts) + "\n"


def command_group() -> click.Group:
    """The group of kvexport's command line."""
    from kvexport import cli

    return next(value for value in vars(cli).values() if isinstance(value, click.Group))


def command_parts(command: click.Command, context: click.Context) -> Iterator[str]:
    """A command's heading, help, usage and options."""
    yield f"## {context.command_path}"
    for paragraph in inspect.cleandoc(command.help or "").replace("\b\n", "").split("\n\n"):
        yield escaped(" ".join(paragraph.split()))
    yield f"```text\n{' '.join([context.command_path, *command.collect_usage_pieces(context)])}\n```"
    records = [param.get_help_record(context) for param in command.get_params(context)]
    yield table(
        ("option", "meaning"),
        [(code(option), escaped(" ".join(text.split()))) for option, text in filter(None, records) if text],
    )


# --- the Python interface


def api_page() -> str:
    """The public classes and functions."""
    import kvexport
    from kvexport import errors
    from kvexport.runtime import Cache, DeviceMemory, Generation, Memory, Session, Stream, open_bundle
    from kvexport.runtime.generation import Timing
    from kvexport.runtime.self_test import verdict

    parts = [
        "# Python reference",
        "This page is generated from the signatures and docstrings (`docs/scripts/reference.py`). "
        "[Embedding a bundle](embedding.md) shows the calls in use; the C++ reference is "
        "[kvexport.hpp](../cpp/include/kvexport/kvexport.hpp).",
        "`import kvexport` needs numpy alone: the rest is imported when a name is first used. Public names: "
        + ", ".join(f"`{name}`" for name in kvexport.__all__)
        + ".",
        *function_parts("kvexport.open", open_bundle),
        *class_parts("kvexport.Session", Session, "session"),
        *class_parts("kvexport.Cache", Cache, "cache", constructor=False),
        *class_parts("kvexport.Generation", Generation),
        *class_parts("Stream", Stream, "stream", constructor=False),
        *class_parts("Timing", Timing),
        *class_parts("Memory", Memory),
        *class_parts("DeviceMemory", DeviceMemory),
        *function_parts("kvexport.self_test", verdict.self_test),
        *class_parts("SelfTestReport", verdict.SelfTestReport),
        *class_parts("Check", verdict.Check),
        *errors_parts(errors),
    ]
    return "\n\n".join(parts) + "\n"


def class_parts(name: str, cls: type, variable: str = "", constructor: bool = True) -> Iterator[str]:
    """A class: its attributes, constructor, properties and methods, in the order of the source."""
    yield f"## {name}"
    is_data = dataclasses.is_dataclass(cls)
    text, sections = parsed(inspect.getdoc(cls) or "")
    yield from text
    types = {field.name: str(field.type) for field in dataclasses.fields(cls)} if is_data else {}
    attributes = {
        each: text
        for each, text in sections.pop("Attributes", [])
        if "not part of the public API" not in text
    }
    if types:
        yield table(
            ("attribute", "type", "meaning"),
            [(f"`{each}`", code(kind), described(each, attributes)) for each, kind in types.items()],
        )
    elif attributes:
        yield table(("attribute", "meaning"), [(f"`{each}`", text) for each, text in attributes.items()])
    yield from section_parts(sections)
    if constructor and not is_data and "__init__" in vars(cls):
        yield from callable_parts(name, cls.__init__, skip=1)
    for member, value in vars(cls).items():
        if member.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"### {variable}.{member}"
            kind = inspect.signature(value.fget).return_annotation if value.fget else ""
            yield f"Property, {code(str(kind))}. " + " ".join(parsed(inspect.getdoc(value) or "")[0])
        elif inspect.isfunction(value) and variable:
            yield f"### {variable}.{member}()"
            yield from callable_parts(f"{variable}.{member}", value, skip=1)


def described(name: str, attributes: dict[str, str]) -> str:
    """Meaning of a field: its own entry, or one that names several fields."""
    for names, text in attributes.items():
        if name in [each.strip() for each in names.split(",")]:
            return text
    return ""


def function_parts(name: str, function: Callable[..., Any]) -> Iterator[str]:
    yield f"## {name}()"
    yield from callable_parts(name, function)


def callable_parts(name: str, function: Callable[..., Any], skip: int = 0) -> Iterator[str]:
    """Signature, text, arguments and errors."""
    signature = inspect.signature(function)
    yield f"```text\n{signature_text(name, signature, skip)}\n```"
    text, sections = parsed(inspect.getdoc(function) or "")
    yield from text
    yield from section_parts(sections)


def signature_text(name: str, signature: inspect.Signature, skip: int) -> str:
    """A signature in one line, or with an argument a line."""
    arguments, starred = list[str](), False
    for parameter in list(signature.parameters.values())[skip:]:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            arguments.append("*")
            starred = True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        arguments.append(f"{parameter.name}: {parameter.annotation}{default}")
    result = (
        ""
        if signature.return_annotation in (signature.empty, "None")
        else f" -> {signature.return_annotation}"
    )
    line = f"{name}({', '.join(arguments)}){result}"
    return line if len(line) <= _WIDEST else f"{name}(\n    " + ",\n    ".join(arguments) + f",\n){result}"


def section_parts(sections: dict[str, list[tuple[str, str]]]) -> Iterator[str]:
    titles = {"Args": "argument", "Raises": "error", "Attributes": "attribute"}
    for name, entries in sections.items():
        if name in titles:
            yield table((titles[name], "meaning"), [(f"`{each}`", text) for each, text in entries])
        else:
            yield f"**{name}**: " + " ".join(f"{each} {text}".strip() for each, text in entries)


def errors_parts(errors: ModuleType) -> Iterator[str]:
    """The errors with their exit codes."""
    yield "## Errors"
    yield (
        "Every error that is raised on purpose is a `kvexport.errors.KvexportError`. The command "
        "line prints it and exits with its code; [Troubleshooting](troubleshooting.md) lists the messages."
    )
    text, sections = parsed(inspect.getdoc(errors.KvexportError) or "")
    yield from text
    yield from section_parts(sections)
    classes = [
        cls for cls in vars(errors).values() if inspect.isclass(cls) and issubclass(cls, errors.KvexportError)
    ]
    yield table(
        ("error", "kind of", "exit code", "meaning"),
        [
            (
                code(cls.__name__),
                code(cls.__base__.__name__),
                str(cls.exit_code),
                parsed(inspect.getdoc(cls) or "")[0][0],
            )
            for cls in classes
        ],
    )


def parsed(docstring: str) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """Paragraphs of a docstring, and the entries of its sections."""
    lines, sections, current = docstring.splitlines(), dict[str, list[tuple[str, str]]](), ""
    text = list[str]()
    for line in lines:
        match = _SECTION.match(line)
        if match:
            current = match[1]
            sections[current] = []
        elif not current:
            text.append(line)
        elif line.strip():
            entry = re.match(r"^ {4}(\S[^:]*): (.*)$", line) if not line.startswith(" " * 8) else None
            entries = sections[current]
            if entry:
                entries.append((entry[1], escaped(entry[2])))
            elif entries:
                entries[-1] = (entries[-1][0], f"{entries[-1][1]} {escaped(line.strip())}")
            else:
                entries.append(("", escaped(line.strip())))
    paragraphs = "\n".join(text).strip().split("\n\n")
    return [escaped(" ".join(part.split())) for part in paragraphs if part], sections


# --- Markdown


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def code(text: str) -> str:
    return f"`{text}`".replace("|", r"\|") if text else ""


def escaped(text: str) -> str:
    """Text in which Markdown reads nothing but code between backticks."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"([*<|])", r"\\\1", parts[index])
    for index in range(1, len(parts), 2):
        parts[index] = parts[index].replace("|", r"\|")
    return "`".join(parts)


if __name__ == "__main__":
    main()
