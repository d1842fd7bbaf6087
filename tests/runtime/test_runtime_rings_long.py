"""A window layer's cache does not grow in 10,000 steps, and logits stay those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.tiny_bundles import write_bundle

from kvexport.bundle import Bundle
from kvexport.bundle.formats import BYTES
from kvexport.model.loader import load_decoder
from kvexport.runtime import Session

STEPS, EVERY, WINDOW, CHUNK = 10_000, 50, 64, 16


@pytest.mark.slow
def test_ten_thousand_steps_stay_within_the_window_and_equal_transformers(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Layers of transformers attend in float64 to the last tokens on which a logit can depend."""
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = tiny_checkpoint("mistral", sliding_window=WINDOW, max_position_embeddings=16_384)
    decoder = load_decoder(checkpoint)
    path = write_bundle(tmp_path / "bundle", decoder, capacity=STEPS + 1)
    session = Session(Bundle.open(path), threads=1, chunk=CHUNK)
    text = np.random.default_rng(0).integers(0, decoder.dims.vocab_size, STEPS + 1)
    session.prefill(text[:1].tolist())
    logits = {}
    for at in range(1, STEPS + 1):
        row = session.step(text[at : at + 1])[0]
        if at % EVERY == 0:
            logits[at] = row
    slots = (WINDOW + CHUNK) * BYTES["float32"]
    assert session.memory().layers == tuple(slots * layer.attention.kv_width for layer in decoder.layers)
    assert session.lengths.tolist() == [STEPS + 1]

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager")
    reach = len(decoder.layers) * (WINDOW - 1)  # earlier tokens that a logit depends on
    with torch.no_grad():
        for at, row in logits.items():
            start = max(0, at - reach)
            ids = torch.from_numpy(text[None, start : at + 1])
            positions = torch.arange(start, at + 1)[None]
            expected = model(ids, position_ids=positions, use_cache=False).logits[0, -1].numpy()
            np.testing.assert_allclose(row, expected, rtol=0, atol=1e-4)
