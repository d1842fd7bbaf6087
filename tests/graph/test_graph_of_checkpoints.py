"""The graph of a transformers checkpoint gives the logits of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.graph_decoders import Caller, open_session, write

from kvexport.model.loader import load_decoder

CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "bloom": ("bloom", {}),
    "bloom-6-heads": ("bloom", {"n_head": 6, "hidden_size": 48}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_graph_gives_the_logits_of_transformers(name: str, tiny_checkpoint: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    family, config = CHECKPOINTS[name]
    checkpoint = tiny_checkpoint(family, **config)
    contract = write(load_decoder(checkpoint), tmp_path)
    caller = Caller(open_session(tmp_path), contract, 2, 14)
    tokens = torch.randint(0, contract.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    pieces = [
        caller(tokens[:, start:stop], [start] * 2)["logits"]
        for start, stop in ((0, 7), (7, 10), (10, 11), (11, 12))
    ]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        wanted = model(tokens).logits.numpy()
    assert np.abs(np.concatenate(pieces, axis=1) - wanted).max() < 2e-5 * np.abs(wanted).max()
