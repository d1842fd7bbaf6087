"""Tiny bundles that the tests of the runtime share; tests must not change them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny_bundles import byte_level_tokenizer, decoder_with_fewer_heads, write_bundle

from kvexport.model.decoder import Decoder
from kvexport.runtime import Session, open_bundle


@pytest.fixture(scope="session")
def decoder(tiny_checkpoint: Callable[..., Path]) -> Decoder:
    """Two layers; the second caches half as many heads."""
    return decoder_with_fewer_heads(
        tiny_checkpoint("llama", num_key_value_heads=4, max_position_embeddings=1024)
    )


@pytest.fixture(scope="session")
def tiny_bundle(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """67 tokens, no tokenizer, a capacity of 600: three growth steps."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny", decoder, capacity=600)


@pytest.fixture(scope="session")
def text_bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 tokens of byte-level BPE, a capacity of 64; token 0 ends a text."""
    checkpoint = tiny_checkpoint(
        "llama",
        num_key_value_heads=4,
        vocab_size=320,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
    )
    made = decoder_with_fewer_heads(checkpoint)
    return write_bundle(tmp_path_factory.mktemp("bundles") / "text", made, tokenizer=byte_level_tokenizer())


@pytest.fixture(scope="session")
def opened(tiny_bundle: Path) -> Callable[..., Session]:
    """`opened(chunk=...) -> Session` on the tiny bundle, with one thread."""
    return lambda **options: open_bundle(tiny_bundle, threads=1, **options)
