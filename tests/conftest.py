"""Shared fixtures: tiny random checkpoints of every family, as transformers itself writes them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

pytest.register_assert_rewrite("support")

# One thread for each worker of pytest-xdist and each process that a test starts: they would otherwise compete
# for the cores, and sums would depend on their number. Set here, before torch is imported.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

# A shell that starts pytest in the background makes it ignore these, and every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Folders whose files take longest; with `--dist loadfile --no-loadscope-reorder` files start in this order.
_LONGEST = ("docs", "cpp", "packaging", "benchmarks", "cli", "engine")

TinyCheckpoint = Callable[..., Path]
EditCheckpoint = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that all workers end at about the same time."""
    tests = Path(__file__).parent

    def order(item: pytest.Item) -> int:
        folder = item.path.relative_to(tests).parts[0]
        return _LONGEST.index(folder) if folder in _LONGEST else len(_LONGEST)

    items.sort(key=order)


@pytest.fixture(scope="session")
def shared_folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`shared_folders.get(build, *arguments) -> Path`: a folder that is built once a run for all workers."""
    from support.shared_folders import SharedFolders

    base = tmp_path_factory.getbasetemp()
    return SharedFolders((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared")


@pytest.fixture
def device() -> Iterator[Any]:
    """A torch.device of `support.torch_device`, which fails if its tensors mix with those of the CPU."""
    from support.torch_device import simulated_device

    with simulated_device() as device:
        yield device


@pytest.fixture(scope="session", autouse=True)
def session_build_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder below which builds keep their results; never the user's."""
    folder = tmp_path_factory.mktemp("build-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVEXPORT_CACHE", str(folder / "session"))
        yield folder


@pytest.fixture(autouse=True)
def build_cache(session_build_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own build cache, which does not exist yet: no test finds what another test kept."""
    path = session_build_cache / uuid4().hex
    monkeypatch.setenv("KVEXPORT_CACHE", str(path))
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(shared_folders: Any) -> TinyCheckpoint:
    """`tiny_checkpoint(family, *, dtype="float32", seed=0, max_shard_size="1GB", **config) -> Path`.

    A checkpoint written by transformers' own save_pretrained, every weight random: norm weights about one,
    biases about zero, nothing at its initial value. Equal arguments give the same folder for the whole run:
    never write into it (`edit_checkpoint` makes a copy). By default two layers, four heads, two KV heads
    (BLOOM: four), head_dim 8, 67 tokens.
    """

    def make(
        family: str, *, dtype: str = "float32", seed: int = 0, max_shard_size: str = "1GB", **config: Any
    ) -> Path:
        from support.family_cases import DEFAULTS

        config = {**DEFAULTS[family], **config}
        return shared_folders.get(_write, family, dtype, seed, max_shard_size, config) / family

    return make


def _write(
    folder: Path, family: str, dtype: str, seed: int, max_shard_size: str, config: Mapping[str, Any]
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = deepcopy(dict(config))  # transformers writes into tables of RoPE settings
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                is_embedding = "embed" in name
                parameter.copy_(noise if is_embedding else noise * 1.5 / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    model.to(getattr(torch, dtype)).save_pretrained(folder / family, max_shard_size=max_shard_size)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let transformers compute in float64 what it computes in float32."""
    from support.wide_transformers import Float64, widen

    widen(monkeypatch)
    with Float64():
        yield


@pytest.fixture
def edit_checkpoint(tmp_path: Path) -> EditCheckpoint:
    """`edit_checkpoint(source, config=None, tensors=None, without=()) -> Path`: changed copy of a checkpoint.

    `config` is merged into config.json, the keys in `without` are removed from it; `tensors` gets the dict
    of all tensors (of a checkpoint in one file) and changes it in place.
    """
    count = 0

    def edit(
        source: Path,
        config: Mapping[str, Any] | None = None,
        tensors: Callable[[dict[str, Any]], object] | None = None,
        without: tuple[str, ...] = (),
    ) -> Path:
        nonlocal count
        count += 1
        folder = tmp_path / f"edited-{count}"
        shutil.copytree(source, folder)
        merged = {**json.loads((folder / "config.json").read_text()), **(config or {})}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in merged.items() if k not in without}))
        if tensors is not None:
            from safetensors.torch import load_file, save_file

            held = load_file(folder / "model.safetensors")
            tensors(held)
            save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return edit
