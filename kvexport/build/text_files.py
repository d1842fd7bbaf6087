"""What a bundle says of its text beside tokenizer.json: golden vectors, the reduced chat template, and what genai wants.

Knows which texts tell tokenizers apart, and the two small files that onnxruntime-genai's tokenizer, which the C++ library
uses, reads beside tokenizer.json. Must not know models.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from kvexport.build.chat_template import reduced_chat, special_tokens
from kvexport.bundle.bundle import TOKENIZER_FILE
from kvexport.bundle.text_file import TEXT_FILE, TextFile, TokenizerSample
from kvexport.progress import Progress
from kvexport.runtime.tokenizer import Tokenizer, read_tokenizer

GENAI_FILE = "genai_config.json"
_CONFIG = "tokenizer_config.json"

# Scripts, spaces at every place, line ends, contractions, numbers, code and characters of several bytes. Text in
# decomposed form (e and its accent apart) is not among them: onnxruntime-genai does not compose it, as some models want.
TEXTS = (
    "Once upon a time there was a café.",
    "Hello world",
    " spaces before and after ",
    "two  spaces   three    four",
    "a\nb\n\nc\n\n\n d\t\te\r\nf",
    "It's what we'll say: I'D rather NOT, they're done; you've won!",
    "12345 3.14 1,000 2024-01-02 ½ ①",
    "def f(x):\n    return x[0] + {1: 'a'}  # (b|c) <d/> \\ ~ ^_`\n",
    "日本語の文。中文，你好！한국어 안녕",
    "Привет, мир! Γειά σου. שלום عالم हिन्दी ไทย",
    "🙂🙃 👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈",
    "wait… “what”?! — no.",
    " ",
    "\n",
    "x",
)


def write_text_files(
    checkpoint: Path,
    directory: Path,
    *,
    capacity: int,
    vocab_size: int,
    bos: int | None,
    eos: tuple[int, ...],
    progress: Progress,
) -> None:
    """Write text.json and genai_config.json into a bundle's directory that holds the checkpoint's tokenizer files.

    Its tokenizer_config.json is written anew, as onnxruntime-genai can read it. Without a tokenizer.json nothing is.
    """
    if not (directory / TOKENIZER_FILE).exists():
        return
    found = reduced_chat(checkpoint)
    for note in found.notes:
        progress.note(note)
    tokenizer = read_tokenizer(directory)
    texts = [*TEXTS, *(text for _, text in found.golden)]
    golden = tuple(one for one in (_golden(tokenizer, text) for text in texts) if one is not None)
    if not golden:
        progress.note(
            f"{TOKENIZER_FILE} encodes none of the texts that it is checked with; the bundle will not check it"
        )
        return
    made = TextFile(golden, tokenizer.special_ids, found.chat, found.golden)
    _adapt(directory / TOKENIZER_FILE)
    if made.difference(read_tokenizer(directory)) is not None:
        shutil.copyfile(checkpoint / TOKENIZER_FILE, directory / TOKENIZER_FILE)
    _write(directory / TEXT_FILE, made.to_json())
    model = {"type": "llama", "vocab_size": vocab_size, "context_length": capacity, "decoder": {}}
    ids = {
        "bos_token_id": bos or 0,
        "eos_token_id": eos[0] if eos else 0,
        "pad_token_id": eos[0] if eos else 0,
    }
    _write(directory / GENAI_FILE, {"model": {**model, **ids}, "search": {}})
    _write(directory / _CONFIG, _tokenizer_config(checkpoint, directory))


def _golden(tokenizer: Tokenizer, text: str) -> TokenizerSample | None:
    try:
        ids, plain = tokenizer.encode(text), tokenizer.encode(text, special=False)
        return TokenizerSample(text, tuple(ids), tuple(plain), tokenizer.decode(ids))
    except (
        Exception
    ):  # the only class that tokenizers raises, for a text that a vocabulary without an unknown token lacks
        return None


def _adapt(path: Path) -> None:
    """Say a tokenizer.json in other words that mean the same to `tokenizers`, where onnxruntime-genai takes them wrongly.

    From a decoder that strips the first space it takes it that every piece of text begins with one; where only the whole
    text does, the space is taken off by a pattern instead, and the C++ library adds it.
    """
    raw = json.loads(path.read_text(encoding="utf-8"))
    before, decoder = raw.get("pre_tokenizer") or {}, raw.get("decoder") or {}
    steps = decoder.get("decoders") or [None]
    first = (
        before.get("type") == "Metaspace"
        and before.get("prepend_scheme") == "first"
        and before.get("split") is False
    )
    if first and steps[-1] == {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
        steps[-1] = {"type": "Replace", "pattern": {"Regex": r"\A "}, "content": ""}
        path.write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")


def _tokenizer_config(checkpoint: Path, directory: Path) -> dict[str, Any]:
    """The least, so that nothing but tokenizer.json says how a text is encoded.

    onnxruntime-genai refuses classes that it does not know, cleans up spaces that `tokenizers` leaves, and takes a
    sentencepiece-like vocabulary apart as `tokenizers` does under the name of Gemma's class alone.
    """
    model = json.loads((directory / TOKENIZER_FILE).read_text(encoding="utf-8"))["model"]
    return {
        "tokenizer_class": "GemmaTokenizer" if model.get("byte_fallback") else "PreTrainedTokenizerFast",
        **special_tokens(checkpoint),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
