"""Tiny random bundles with a byte-level tokenizer and its samples, a chat template and a self-test."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer

from kvexport.build.text_files import write_text_files
from kvexport.bundle import TOKENIZER_FILE
from kvexport.model.decoder import Decoder
from kvexport.progress import Progress
from support.chat_templates import CHATML
from support.decoders import make_decoder
from support.tiny_bundles import byte_level_tokenizer, write_bundle
from support.validated_bundles import broken

VOCAB = 320


def write_text_bundle(
    path: Path, *, seed: int = 0, layers: int = 2, capacity: int = 512, template: str = CHATML, **options: Any
) -> Path:
    """Write a bundle of a random decoder with the text files of a build; `options` are `write_bundle`'s."""
    decoder = talkative(
        make_decoder(
            "gqa", layers=layers, vocab=VOCAB, seed=seed, dtype=torch.float32, max_positions=capacity
        )
    )

    def add_text(bundle: Path) -> None:
        checkpoint = Path(folder) / "checkpoint"
        checkpoint.mkdir()
        for each in (checkpoint, bundle):
            (each / TOKENIZER_FILE).write_text(byte_level_tokenizer(VOCAB), encoding="utf-8")
        (checkpoint / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": "<|end|>", "chat_template": template})
        )
        write_text_files(
            checkpoint, bundle, capacity=capacity, vocab_size=VOCAB, bos=None, eos=(2,), progress=Progress()
        )

    with TemporaryDirectory() as folder:
        plain = write_bundle(Path(folder) / "plain", decoder, capacity=capacity, self_test=True, **options)
        return broken(plain, path, add_text)


def talkative(decoder: Decoder) -> Decoder:
    """A decoder whose likeliest token is always printable text; a random decoder gives invalid UTF-8."""
    tokenizer, head = Tokenizer.from_str(byte_level_tokenizer(VOCAB)), decoder.head
    assert head is not None
    message = [tokenizer.decode([token]) for token in range(VOCAB)]
    sayable = torch.tensor([text.isprintable() and text != "" and "\ufffd" not in text for text in message])
    return dataclasses.replace(decoder, head=dataclasses.replace(head, weight=head.weight * sayable[:, None]))
