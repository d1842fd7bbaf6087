"""C++, Python and the PyTorch reference generate the same 200 tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from drive import Drive
from support.decoders import make_decoder
from support.tiny_bundles import write_bundle

from kvexport.eviction.config import Eviction
from kvexport.model import reference
from kvexport.model.decoder import Decoder
from kvexport.model.loader import load_decoder
from kvexport.runtime import open_bundle

pytestmark = pytest.mark.slow
DEMO = Path(__file__).parents[2] / "models" / "demo"
PROMPT, NEW, CAPACITY = 40, 200, 512
DECODERS: dict[str, Callable[[], Decoder]] = {
    "demo": lambda: load_decoder(DEMO),
    "bloom": lambda: make_decoder("bloom", dtype=torch.float32, max_positions=1024),
    "qwen3": lambda: make_decoder("qwen3", kv_heads=2, dtype=torch.float32, max_positions=1024),
}
EVICTION = Eviction("l2-norm", 48, protect_first=4, protect_recent=16)


def greedy(decoder: Decoder, eviction: Eviction | None, prompt: Sequence[int]) -> list[int]:
    """Greedy tokens of the PyTorch reference, with the prompt in the runtime's chunks."""
    layers = list(decoder.layers)
    cache = reference.new_cache(layers, 1, CAPACITY, torch.float32, eviction)
    chunk = 128 if eviction is None else eviction.chunk
    made: list[int] = []
    parts = [list(prompt[start : start + chunk]) for start in range(0, len(prompt), chunk)]
    at = 0
    with torch.no_grad():
        while len(made) < NEW:
            part = parts.pop(0) if parts else made[-1:]
            positions = torch.arange(at, at + len(part))[None]
            at += len(part)
            logits = reference.forward(decoder, torch.tensor([part]), positions, cache)[0, -1]
            if not parts:
                made.append(int(logits.argmax()))
    return made


@pytest.mark.parametrize("eviction", [None, EVICTION], ids=["whole", "evicting"])
@pytest.mark.parametrize("name", DECODERS)
def test_cpp_python_and_pytorch_generate_the_same_tokens(
    name: str, eviction: Eviction | None, built: Callable[[str], Path], tmp_path: Path
) -> None:
    decoder = DECODERS[name]()
    bundle = write_bundle(tmp_path / "b", decoder, capacity=CAPACITY, eviction=eviction)
    prompt = torch.randint(
        0, decoder.dims.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(5)
    ).tolist()
    with open_bundle(bundle, provider="cpu", threads=1) as session:
        by_python = session.generate(prompt, max_new_tokens=NEW, stop=[]).token_ids
    with Drive(built("sanitized")) as drive:
        drive.open(bundle)
        drive.new()
        by_cpp = drive.generate(prompt, max_new_tokens=NEW, stop_tokens=[])["tokens"]
    assert by_cpp == list(by_python) == greedy(decoder, eviction, prompt)
