"""An analysis as one self-contained HTML page with style, script and data.

What depends on the chosen layer or head is drawn by page.js from the data block; the rest is static HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from html import escape
from pathlib import Path

from kvexport.analyze.analysis import Analysis, similarity_json
from kvexport.analyze.sections import Section, sections
from kvexport.errors import UsageError
from kvexport.files.atomic_directory import require_path
from kvexport.files.resources import resource
from kvexport.version import __version__

_MARK = '<meta name="generator" content="kvexport analyze'


def render(analysis: Analysis) -> str:
    """The whole page."""
    style, script = (
        resource("analyze", name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = f"{analysis.facts.name}: KV cache analysis"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'{_MARK} {__version__}">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>",
            f"<h1>{escape(analysis.facts.name)} <small>KV cache analysis</small></h1>",
            *map(_section, sections(analysis)),
            f"<footer>kvexport {__version__}</footer>\n</main>",
            f'<script type="application/json" id="data">{_data(analysis)}</script>',
            f"<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def _section(section: Section) -> str:
    return f'<section id="{section.name}">\n<h2>{escape(section.title)}</h2>\n{section.body}\n</section>'


def _data(analysis: Analysis) -> str:
    """Data block of page.js; `<` is escaped, so that no token can end the block."""
    attention = analysis.attention_json()
    data = {
        "attention": {name: attention[name] for name in ("tokens", "original", "compressed", "distance")},
        "similarity": [similarity_json(layer) for layer in analysis.layers],
    }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def require_page(path: Path, *, force: bool) -> None:
    """Raise, before any work, if the output cannot be written.

    Args:
        path: the output file.
        force: whether an existing page of `kvexport analyze` may be replaced.

    Raises:
        UsageError: its directory does not exist, or the path exists and must not be replaced.
    """
    if require_path(path, force=force) and (not path.is_file() or _MARK.encode() not in _beginning(path)):
        raise UsageError(
            f"the output {path} must be a page of kvexport analyze to be replaced",
            fix="choose another --output",
        )


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1000)


def save(page: str, path: Path, *, force: bool) -> None:
    """Write the page atomically, through a temporary sibling.

    Raises:
        UsageError: as `require_page`.
    """
    require_page(path, force=force)
    path = path.resolve()  # where a link points to
    temporary = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
