"""Hooks of the documentation site: links into the repository, and formulas as MathML.

The pages can also be read in the repository, where a relative link may point to any file. The site gets a
copy of each file that a page links to, under source/. Formulas between dollar signs become MathML while the
site is built, so that a reader's browser loads no script for them.
"""

from __future__ import annotations

import html
import re
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
COPIES = "source"
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
LONG_CODE = re.compile(r"<code>([^<]{52,})</code>")
CODE = re.compile(r"`[^`\n]*`")
TABLE_ROW = re.compile(r"^\|.*$", re.MULTILINE)
BOARD = re.compile(r"^```sh board$", re.MULTILINE)  # marks blocks that the tests cannot run
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def repository_path(page: str, target: str) -> str:
    """Path in the repository of the file that a link of a page of the site points to."""
    folder = PurePosixPath(page).parent
    folder = folder.relative_to(COPIES) if folder.parts[:1] == (COPIES,) else "docs" / folder
    return (ROOT / folder / target).resolve().relative_to(ROOT).as_posix()


def site_path(path: str) -> str:
    """Path in the site of a file of the repository."""
    inside = path.removeprefix("docs/")
    return inside if inside != path else f"{COPIES}/{path}"


def on_files(files: Files, config: Any) -> Files:
    """Add the files that pages link to, and those that the added pages link to."""
    pages = [(file.src_uri, Path(str(file.abs_src_path))) for file in files.documentation_pages()]
    while pages:
        page, source = pages.pop()
        for target, _ in LINK.findall(source.read_text(encoding="utf-8")):
            path = repository_path(page, target)
            copy = site_path(path)
            if files.get_file_from_path(copy) is None and (ROOT / path).is_file():
                files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
                if copy.endswith(".md"):
                    pages.append((copy, ROOT / path))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links into the repository to the copies in the site; drop marks that are for the tests."""
    depth = len(PurePosixPath(page.file.src_uri).parent.parts)

    def rewritten(match: re.Match[str]) -> str:
        path = repository_path(page.file.src_uri, match[1])
        return "../" * depth + site_path(path) + (match[2] or "")

    markdown = BOARD.sub("```sh", LINK.sub(rewritten, markdown))
    # GitHub wants pipes in the code of a table escaped, Python-Markdown does not.
    return TABLE_ROW.sub(lambda row: CODE.sub(lambda code: code[0].replace(r"\|", "|"), row[0]), markdown)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Replace formulas by MathML; mark code that is too long for one line of a table."""
    content = FORMULA.sub(
        lambda match: convert(html.unescape(match[3]), display="inline" if match[2] == "(" else "block"),
        content,
    )
    return LONG_CODE.sub(r'<code class="long">\1</code>', content)
