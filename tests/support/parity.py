"""Logits of a checkpoint by transformers and by the reference model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from kvexport.model import reference
from kvexport.model.architecture import read_architecture
from kvexport.model.checkpoint import read_config
from kvexport.model.loader import load_decoder
from support.family_settings import VOCAB

PROMPT = 36  # tokens of the prompt in step-by-step tests; the others follow one by one


def their_model(path: Path, dtype: torch.dtype) -> Any:
    """The model that transformers loads."""
    from transformers import AutoModelForCausalLM

    # eager attention of Falcon adds ALiBi twice, in the mask and beside it
    attention = "sdpa" if json.loads((path / "config.json").read_text()).get("alibi") else "eager"
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention).eval()


@torch.no_grad()
def their_logits(
    path: Path, ids: torch.Tensor, dtype: torch.dtype, prompt: int | None = None
) -> torch.Tensor:
    """Logits [B, S, vocab]; with `prompt`, the tokens after it run one by one with the model's own cache.

    A class without a cache computes them at once.
    """
    model = their_model(path, dtype)
    if prompt is None or "past_key_values" not in signature(model.forward).parameters:
        return model(ids, use_cache=False).logits
    parts, cache = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)], None
    found = []
    for part in parts:
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, dim=1)


def our_logits(path: Path, ids: torch.Tensor, dtype: torch.dtype, prompt: int | None = None) -> torch.Tensor:
    """As `their_logits`, for sequences of this length."""
    length = ids.shape[1]
    decoder = load_decoder(path, dtype, context=length)
    if prompt is None:
        return reference.forward(decoder, ids)
    cache = reference.new_cache(decoder.layers, len(ids), length, dtype)
    steps = [slice(0, prompt), *(slice(at, at + 1) for at in range(prompt, length))]
    positions = torch.arange(length).expand(ids.shape)
    return torch.cat([reference.forward(decoder, ids[:, at], positions[:, at], cache) for at in steps], dim=1)


def token_ids(length: int = 40) -> torch.Tensor:
    """Random token ids [2, length]."""
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(7))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference by the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def parity_errors(
    path: Path, ids: torch.Tensor, source: Path | None = None, step_by_step: bool = True
) -> dict[str, float]:
    """Relative errors in float64 to transformers' logits of the checkpoint, or of one with the same weights.

    Returns:
        "at_once": for the whole sequence; "step_by_step": for tokens after the prompt that run one by one.
    """
    errors = {}
    for name, prompt in {"at_once": None, "step_by_step": PROMPT}.items():
        if prompt is None or step_by_step:
            theirs = their_logits(source or path, ids, torch.float64, prompt)
            errors[name] = relative_error(our_logits(path, ids, torch.float64, prompt), theirs)
    return errors


def parity_facts(path: Path, ids: torch.Tensor, errors: Mapping[str, float]) -> str:
    """What docs/families.md says of a case: errors, length, windows, original contexts and kinds of RoPE.

    Original contexts are those that the sequence exceeds, of scaled RoPE.
    """
    read = read_architecture(read_config(path))
    ropes = [layer.rope for layer in read.layers if layer.rope is not None]
    originals = {getattr(rope, "original", None) for rope in ropes}
    facts = {
        "model_type": read.config["model_type"],
        "tokens": ids.shape[1],
        "windows": sorted({layer.window for layer in read.layers if layer.window is not None}),
        "original_contexts": sorted(each for each in originals if each is not None and each < ids.shape[1]),
        "rope_kinds": sorted({rope.kind for rope in ropes}),
        **errors,
    }
    return json.dumps(facts)
