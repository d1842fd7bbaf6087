"""Every family gives the outputs of the reference: whole prompts, chunks and steps, in a ragged batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.conversions import plain
from support.tiny_bundles import byte_level_tokenizer, decoder_with_fewer_heads, exact_logits, write_bundle
from tokenizers import Tokenizer, processors

from kvexport.model.loader import load_decoder
from kvexport.runtime import open_bundle

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"sliding_window": 7},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "bloom": {},
}
LENGTHS = (11, 4, 23)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_equals_the_reference(
    family: str, dtype: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    decoder = load_decoder(tiny_checkpoint(family, **FAMILIES[family]))
    session = open_bundle(
        write_bundle(tmp_path / "bundle", decoder, dtype=dtype, capacity=40), threads=1, chunk=8
    )
    random = np.random.default_rng(0)
    texts = [random.integers(0, 67, length + 6).tolist() for length in LENGTHS]
    expected = [exact_logits(decoder, text) for text in texts]
    close = 1e-4 if dtype == "float32" else 0.06 * max(np.abs(each).max() for each in expected)
    np.testing.assert_allclose(session.score([texts[2]])[0], expected[2], rtol=0, atol=close)
    actual = [session.prefill([text[:length] for text, length in zip(texts, LENGTHS, strict=True)])]
    actual += [
        session.step([text[length + step] for text, length in zip(texts, LENGTHS, strict=True)])
        for step in range(6)
    ]
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            [each[row] for each in actual], expected[row][length - 1 :], rtol=0, atol=close
        )


@pytest.mark.parametrize("method", ["online", "fold", "mean-pool"])
def test_compressed_heads_equal_the_reference(
    method: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Half of the KV heads, by `convert`."""
    decoder = load_decoder(tiny_checkpoint("llama", num_key_value_heads=4))
    windows = torch.randint(0, 67, (8, 16), generator=torch.Generator().manual_seed(0))
    layers = [each.layer for each in plain(decoder, windows, 2, method)]
    decoder = dataclasses.replace(decoder, layers=layers)
    session = open_bundle(write_bundle(tmp_path / "bundle", decoder, capacity=40), threads=1)
    ids = windows[0].tolist()
    expected = exact_logits(decoder, ids)
    np.testing.assert_allclose(session.score([ids])[0], expected, rtol=0, atol=2e-4)
    session.prefill(ids[:10])
    for position in range(10, 16):
        np.testing.assert_allclose(session.step([ids[position]])[0], expected[position], rtol=0, atol=2e-4)
    assert all(layer.num_key_value_heads == 2 for layer in session.bundle.layers)


def test_keeps_the_first_token_that_a_tokenizer_adds(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    decoder = decoder_with_fewer_heads(tiny_checkpoint("llama", num_key_value_heads=4, vocab_size=320))
    plain = Tokenizer.from_str(byte_level_tokenizer())
    adding = Tokenizer.from_str(plain.to_str())
    adding.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    ids = plain.encode("Once upon").ids
    with_first, without = (
        open_bundle(write_bundle(tmp_path / name, decoder, tokenizer=tokenizer.to_str()), threads=1)
        for name, tokenizer in (("adding", adding), ("plain", plain))
    )
    made = with_first.generate("Once upon", max_new_tokens=8, stop=())
    assert made.prompt_tokens == len(ids) + 1
    assert made.token_ids == without.generate([0, *ids], max_new_tokens=8, stop=()).token_ids
    assert made.token_ids != without.generate("Once upon", max_new_tokens=8, stop=()).token_ids
