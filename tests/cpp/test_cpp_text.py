"""Compare text handling in C++ (cpp/tests/test_text.cpp) and Python for each kind of tokenizer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from builds import build, environment, require
from genai import genai_library
from support.tokenizer_shapes import shapes

from kvexport.build.text_files import write_text_files
from kvexport.bundle.text_file import parse_text
from kvexport.files.schema import Table
from kvexport.progress import Progress
from kvexport.runtime.tokenizer import TextStream, read_tokenizer

pytestmark = pytest.mark.slow

WORDS = [
    "Once",
    " upon",
    "the ",
    "HELLO",
    " it's",
    "12 3",
    "日本",
    "é",
    "🙂👩\u200d👧",
    "\n",
    "  ",
    "x=[1];",
    "▁",
    "\t",
    "\u3000",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each kind of tokenizer, with Python's results for sample texts in vectors.json."""
    top = tmp_path_factory.mktemp("text")
    for name, (tokenizer, config) in shapes().items():
        checkpoint, folder = top / "checkpoints" / name, top / name
        for each in (checkpoint, folder):
            each.mkdir(parents=True)
            (each / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        write_text_files(
            checkpoint, folder, capacity=64, vocab_size=1000, bos=None, eos=(0,), progress=Progress()
        )
        (folder / "vectors.json").write_text(json.dumps(vectors(folder)), encoding="utf-8")
    return top


def vectors(folder: Path) -> list[dict[str, object]]:
    tokenizer, made = read_tokenizer(folder), []
    texts = ["".join(words) for words in itertools.permutations(WORDS, 2)]
    texts += ["".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text)
        stream = TextStream(tokenizer, ids[:1])
        pieces = [*map(stream.add, ids[1:]), stream.end()]
        if "\ufffd" in tokenizer.decode(ids[:1]):  # the prompt ends within a character
            continue
        made.append(
            {
                "text": text,
                "ids": ids,
                "plain": tokenizer.encode(text, special=False),
                "pieces": pieces,
                "number": number,
            }
        )
    return made


def test_tokenizer_samples_hold_for_checkpoint_and_bundle(folders: Path) -> None:
    """The bundle's tokenizer.json may differ from the checkpoint's, but gives the same tokens."""
    for name in shapes():
        found = parse_text(Table.from_json((folders / name / "text.json").read_bytes(), "text.json"))
        assert found.difference(read_tokenizer(folders / name)) is None
        assert found.difference(read_tokenizer(folders / "checkpoints" / name)) is None
    assert (folders / "mistral" / "tokenizer.json").read_text() != (
        folders / "checkpoints/mistral/tokenizer.json"
    ).read_text()


def test_cpp_and_python_give_equal_tokens_and_text(folders: Path) -> None:
    given = environment(KVEXPORT_TEST_TEXT=str(folders), KVEXPORT_TEST_GENAI=str(genai_library()))
    assert " 0 failed, 0 skipped" in require(build("sanitized") / "tests" / "test_text", env=given)
