"""Settings of a run: its sizes and its work folder, for a GPU and for a rehearsal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_FILE = "settings.json"
_REAL: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "max_position_embeddings": 33024,
}
_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        work: folder of checkpoints, bundles, engines and logs, shared by the parts.
        rehearsal: tiny, on the CPU.
        shape: of config.json, but for the KV heads; heads are 64 wide.
        kv_heads: of the model without compression, and of the one with.
        depths: tokens in the cache when decoding begins.
        memory_depths: those at which device memory is measured, each in a process of its own.
        steps: tokens decoded at each depth.
        repetitions: of a prefill.
        provider, device: as kvexport and as PyTorch name them.
        compute_capability: of the GPU, "9.0"; of a rehearsal the one that it builds for.
    """

    work: Path
    rehearsal: bool
    shape: dict[str, Any]
    kv_heads: tuple[int, int]
    depths: tuple[int, ...]
    memory_depths: tuple[int, ...]
    steps: int
    repetitions: int
    provider: str
    device: str
    compute_capability: str

    def checkpoint(self, kv_heads: int) -> Path:
        return self.work / f"checkpoint-{kv_heads}"

    def bundle(self, kv_heads: int) -> Path:
        return self.work / f"bundle-{kv_heads}"

    def result(self, part: str) -> Path:
        """What a part found, for the others."""
        return self.work / f"{part}.result.json"

    def write(self) -> Path:
        """Into the work folder, for the parts."""
        path = self.work / _FILE
        path.write_text(
            json.dumps({**asdict(self), "work": str(self.work)}, indent=1) + "\n", encoding="utf-8"
        )
        return path

    @classmethod
    def read(cls, path: Path) -> Settings:
        raw = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(value) for name, value in raw.items() if isinstance(value, list)}
        return cls(**{**raw, **lists, "work": Path(raw["work"])})

    def described(self) -> dict[str, Any]:
        """Of a record: all but the folder."""
        return {name: value for name, value in asdict(self).items() if name != "work"}


def real(work: Path, compute_capability: str) -> Settings:
    """A llama of 1.26 (without compression) and 1.12 (with) billion numbers, float16: decoding is bound by
    memory."""
    depths = (512, 2048, 8192, 32768)
    return Settings(
        work, False, _REAL, (32, 8), depths, (2048, 32768), 64, 5, "cuda", "cuda", compute_capability
    )


def rehearsal(work: Path) -> Settings:
    """The same run in small, for ONNX Runtime's and PyTorch's CPU; engines are built for a GPU that is not
    there."""
    return Settings(work, True, _TINY, (4, 1), (16, 64), (64,), 4, 2, "cpu", "cpu", "8.9")
