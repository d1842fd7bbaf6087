"""Small tokenizers like those of real families, which C++ and Python must tokenize equally."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from support import chat_templates

TEXT = [
    "Once upon a time there was a café; naïve people said: \"It's fine, we'll go, they're OK\".\n\n"
    "The end.  Two  spaces.\n",
    "def f(x):\n    return x + 1  # comment\n\tif x == 10:\n\t\tprint('hello world')\n",
    "日本語のテキスト。中文文本，你好世界！"
    "한국어 텍스트. Привет, мир! Как дела? Γειά σου Κόσμε. שלום مرحبا हिन्दी ไทย",
    "🙂🙃 👩\u200d👩\u200d👧 12345 3.14159 2024-01-02 1,000,000 <tag> </tag> "
    "{json: [1, 2]} INST SYS user system assistant",
] * 3
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
Shape = tuple[str, dict[str, Any]]  # tokenizer.json, tokenizer_config.json


def shapes() -> dict[str, Shape]:
    """tokenizer.json by family; onnxruntime-genai cannot read that of `bloom`."""
    return {
        "gpt2": _byte_level(None, ["<|endoftext|>"], "GPT2Tokenizer", "<|endoftext|>", chat_templates.ZEPHYR),
        "qwen": _byte_level(
            _QWEN,
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            "Qwen2Tokenizer",
            "<|im_end|>",
            chat_templates.CHATML,
        ),
        "llama3": _llama3(),
        "bloom": _byte_level(_BLOOM, ["<unk>", "<s>", "</s>"], "BloomTokenizerFast", "</s>", None),
        "llama2": _sentencepiece("prepend", chat_templates.LLAMA2),
        "mistral": _sentencepiece("metaspace", chat_templates.MISTRAL3),
        "gemma": _sentencepiece("none", chat_templates.GEMMA),
        "phi3": _phi3(),
    }


def _byte_level(regex: str | None, special: list[str], name: str, eos: str, chat: str | None) -> Shape:
    backend = Tokenizer(models.BPE())
    if regex is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(regex), "isolated", False)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if name == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(TEXT, trainer)
    config = {"tokenizer_class": name, "bos_token": None, "eos_token": eos, "chat_template": chat}
    return backend.to_str(), {**config, "clean_up_tokenization_spaces": True}


def _llama3() -> Shape:
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    text, config = _byte_level(_LLAMA3, names, "PreTrainedTokenizerFast", "<|eot_id|>", chat_templates.LLAMA3)
    backend = Tokenizer.from_str(text)
    around = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), around])
    return backend.to_str(), {**config, "bos_token": {"content": "<|begin_of_text|>"}}


def _sentencepiece(space: str, chat: str) -> Shape:
    """BPE with byte fallback and a mark for spaces; no token contains a line break."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, show_progress=False, limit_alphabet=90
    )
    backend.train_from_iterator(
        [line for text in TEXT for line in text.replace("\t", "\n").split("\n")], trainer
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps if space == "none" else [*steps, decoders.Strip(" ", 1, 0)])
    raw = json.loads(backend.to_str())
    raw["added_tokens"] = raw["added_tokens"][:3]
    raw["pre_tokenizer"] = None
    if space == "metaspace":
        raw["normalizer"] = None
        raw["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
    elif space == "none":
        raw["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    made = Tokenizer.from_str(json.dumps(raw))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    return made.to_str(), {**config, "add_bos_token": True, "chat_template": chat}


def _phi3() -> Shape:
    text, config = _sentencepiece("prepend", chat_templates.PHI3)
    backend = Tokenizer.from_str(text)
    backend.add_special_tokens(
        [AddedToken(f"<|{name}|>", rstrip=True) for name in ("assistant", "system", "end", "user")]
    )
    return backend.to_str(), config
