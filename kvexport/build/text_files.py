"""Write a bundle's text files: text.json, and the files that onnxruntime-genai's tokenizer reads.

The C++ library uses that tokenizer. text.json has samples that show whether a tokenizer encodes as the one of
the build.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvexport.build.chat_template import reduce_chat_template
from kvexport.bundle import TOKENIZER_FILE
from kvexport.bundle.text_file import TEXT_FILE, TextFile, TokenizerSample
from kvexport.model.chat_template import special_tokens
from kvexport.progress import Progress
from kvexport.runtime.tokenizer import Tokenizer, read_tokenizer

GENAI_FILE = "genai_config.json"
_CONFIG = "tokenizer_config.json"
# Files of the checkpoint that a bundle has beside tokenizer.json.
COPIED_FILES = (_CONFIG, "special_tokens_map.json", "generation_config.json", "chat_template.jinja")

# Scripts, spaces in all positions, line ends, contractions, numbers, code and characters of several bytes.
# There is no text in decomposed form (a letter and its accent apart), because onnxruntime-genai does not
# normalize it.
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
    """Write text.json, genai_config.json and tokenizer_config.json beside the tokenizer's files.

    tokenizer.json is adapted to onnxruntime-genai if that does not change its token ids. Without a
    tokenizer.json, nothing is written.
    """
    if not (directory / TOKENIZER_FILE).exists():
        return
    template = reduce_chat_template(checkpoint)
    for note in template.notes:
        progress.note(note)
    tokenizer = read_tokenizer(directory)
    texts = [*TEXTS, *(text for _, text in template.samples)]
    samples = tuple(sample for sample in (_encode(tokenizer, text) for text in texts) if sample is not None)
    if not samples:
        progress.note(
            f"{TOKENIZER_FILE} encodes none of the sample texts: the tokenizer of the bundle will not be "
            "checked"
        )
        return
    text_file = TextFile(samples, tokenizer.special_ids, template.chat, template.samples)
    original = (directory / TOKENIZER_FILE).read_bytes()
    _adapt_tokenizer(directory / TOKENIZER_FILE)
    if text_file.difference(read_tokenizer(directory)) is not None:
        (directory / TOKENIZER_FILE).write_bytes(original)
    _write(directory / TEXT_FILE, text_file.to_json())
    model = {"type": "llama", "vocab_size": vocab_size, "context_length": capacity, "decoder": {}}
    ids = {
        "bos_token_id": bos or 0,
        "eos_token_id": eos[0] if eos else 0,
        "pad_token_id": eos[0] if eos else 0,
    }
    _write(directory / GENAI_FILE, {"model": {**model, **ids}, "search": {}})
    _write(directory / _CONFIG, _tokenizer_config(checkpoint, directory))


def _encode(tokenizer: Tokenizer, text: str) -> TokenizerSample | None:
    """The token ids of a text; None if the vocabulary cannot encode it."""
    try:
        ids, plain = tokenizer.encode(text), tokenizer.encode(text, special=False)
        return TokenizerSample(text, tuple(ids), tuple(plain), tokenizer.decode(ids))
    except Exception:  # `tokenizers` raises no other class, if there is no unknown token
        return None


def _adapt_tokenizer(path: Path) -> None:
    """Change a tokenizer.json that onnxruntime-genai misreads into an equivalent one.

    If the decoder strips the first space, onnxruntime-genai adds a space before every piece of text, also
    where only the whole text begins with one. Then a pattern strips the space instead, and the C++ library
    adds it.
    """
    raw = json.loads(path.read_text(encoding="utf-8"))
    pre_tokenizer, decoder = raw.get("pre_tokenizer") or {}, raw.get("decoder") or {}
    steps = decoder.get("decoders") or [None]
    prepends_to_whole_text = (
        pre_tokenizer.get("type") == "Metaspace"
        and pre_tokenizer.get("prepend_scheme") == "first"
        and pre_tokenizer.get("split") is False
    )
    if prepends_to_whole_text and steps[-1] == {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
        steps[-1] = {"type": "Replace", "pattern": {"Regex": r"\A "}, "content": ""}
        path.write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")


def _tokenizer_config(checkpoint: Path, directory: Path) -> dict[str, Any]:
    """A minimal tokenizer_config.json, so that tokenizer.json alone determines how a text is encoded.

    onnxruntime-genai rejects classes that it does not know, removes spaces that `tokenizers` keeps, and
    splits text with a SentencePiece vocabulary as `tokenizers` does only if the class is Gemma's.
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
