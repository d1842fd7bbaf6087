"""Tables that are not held in memory: what they compute, and how many rows are made at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.command_line import run_kvexport
from torch import Tensor
from torch.nn import functional as F

from kvexport.errors import CheckpointError
from kvexport.model import lazy_table
from kvexport.model.lazy_table import LazyTable, Rows, row_parts
from kvexport.model.loader import load_decoder
from kvexport.model.reference import embed, logits

ROWS, WIDTH = 100, 16


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table is large, and has 7 rows of `WIDTH` float64 in a part."""
    monkeypatch.setattr(lazy_table, "_HELD_BYTES", 0)
    monkeypatch.setattr(lazy_table, "_PART_BYTES", 7 * WIDTH * 8)


class Recorded:
    """A table whose reads are recorded."""

    def __init__(self) -> None:
        self.dense = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.reads: list[int] = []
        self.lazy = LazyTable(self._read, (ROWS, WIDTH), torch.float64)

    def _read(self, rows: Rows) -> Tensor:
        read = self.dense[rows].clone()
        self.reads.append(len(read))
        return read


def test_rows_and_products_are_those_of_the_table_with_few_rows_at_a_time(small_parts: None) -> None:
    table = Recorded()
    ids = torch.randint(ROWS, (2, 3))
    assert F.embedding(ids, table.lazy).equal(F.embedding(ids, table.dense))
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(ROWS, dtype=torch.float64)
    torch.testing.assert_close(F.linear(x, table.lazy, bias), F.linear(x, table.dense, bias))
    assert F.linear(input=x, weight=table.lazy).equal(F.linear(x, table.lazy))
    assert F.embedding(input=ids, weight=table.lazy).equal(F.embedding(ids, table.dense))
    assert F.embedding(ids[:0], table.lazy).shape == (0, 3, WIDTH)
    F.linear(x, table.lazy).square().sum().backward()  # type: ignore[no-untyped-call]
    found, x.grad = x.grad, None
    F.linear(x, table.dense).square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, x.grad)
    assert torch.cat(list(row_parts(table.lazy))).equal(table.dense)
    assert max(table.reads) <= 7


@pytest.mark.parametrize("index", [-1, ROWS])
def test_a_row_that_it_has_not_is_refused_as_by_a_tensor(index: int) -> None:
    table = Recorded()
    for each in (table.dense, table.lazy):
        with pytest.raises(IndexError, match="index out of range in self"):
            F.embedding(torch.tensor([0, index]), each)


def test_its_address_is_refused(tmp_path: Path) -> None:
    lazy = Recorded().lazy
    for address in (lazy.data_ptr, lazy.untyped_storage, lambda: save_file({"a": lazy}, tmp_path / "a")):
        with pytest.raises(RuntimeError, match="a LazyTable has no memory of its own"):
            address()
    save_file({"a": lazy.contiguous()}, tmp_path / "a")  # control


def test_its_shape_and_type_need_no_rows() -> None:
    table = Recorded()
    lazy = table.lazy
    assert (lazy.shape, lazy.dtype, lazy.device.type) == ((ROWS, WIDTH), torch.float64, "cpu")
    assert (len(lazy), lazy.ndim, lazy.numel(), lazy.element_size()) == (ROWS, 2, ROWS * WIDTH, 8)
    assert lazy.is_floating_point()
    assert lazy.to("cpu") is lazy and lazy.to(torch.float64) is lazy and lazy.detach() is lazy
    assert table.reads == []


def test_every_other_operation_takes_the_whole_table() -> None:
    table = Recorded()
    for found, expected in (
        (table.lazy.T, table.dense.T),
        (table.lazy.to(torch.float32), table.dense.float()),
        (2 * table.lazy, 2 * table.dense),
        (table.lazy.sum(0), table.dense.sum(0)),
        (torch.from_numpy(table.lazy.numpy()), table.dense),
        (F.embedding(torch.tensor([1]), table.lazy, max_norm=1e9), table.dense[1:2]),
    ):
        assert type(found) is Tensor and found.equal(expected)
    assert set(table.reads) == {ROWS}


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_with_lazy_tables_computes_the_same(
    tied: bool, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint("llama", tie_word_embeddings=tied)
    dense = load_decoder(checkpoint)
    monkeypatch.setattr(lazy_table, "_HELD_BYTES", 0)
    monkeypatch.setattr(lazy_table, "_PART_BYTES", 1000)
    lazy = load_decoder(checkpoint)
    assert isinstance(lazy.embedding.weight, LazyTable) and isinstance(lazy.output.weight, LazyTable)
    ids = torch.arange(10)[None]
    x = embed(dense.embedding, ids)
    assert embed(lazy.embedding, ids).equal(x)
    torch.testing.assert_close(logits(lazy, x), logits(dense, x))


def test_a_lazy_table_that_is_not_finite_is_refused(
    tiny_checkpoint: Any, edit_checkpoint: Any, small_parts: None
) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][-1, -1] = float("nan")

    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight must be finite"):
        load_decoder(edit_checkpoint(tiny_checkpoint("llama"), tensors=damage))


@pytest.mark.parametrize("new", ["rows", "nan", "gone"])
def test_a_file_that_is_replaced_while_the_table_is_used_is_refused(
    new: str, tiny_checkpoint: Any, edit_checkpoint: Any, small_parts: None
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        table = tensors.pop("model.embed_tokens.weight")
        if new != "gone":
            tensors["model.embed_tokens.weight"] = table[:3] if new == "rows" else table * float("nan")

    original = tiny_checkpoint("llama")
    source = edit_checkpoint(original)
    table = load_decoder(source).embedding.weight
    assert isinstance(table, LazyTable) and len(table[:5]) == 5  # control
    (edit_checkpoint(original, tensors=edit) / "model.safetensors").rename(source / "model.safetensors")
    with pytest.raises(CheckpointError, match="must not change while it is read"):
        table[:5]


@pytest.mark.parametrize("options", [("--kv-ratio", "0.5"), ("--kv-ratio", "1", "--weights", "int4")])
def test_a_build_with_lazy_tables_writes_the_same_weights(
    options: tuple[str, ...], tiny_checkpoint: Any, tmp_path: Path, small_parts: None
) -> None:
    checkpoint = tiny_checkpoint("llama", hidden_size=64, intermediate_size=64, head_dim=32, vocab_size=68)

    def weights(name: str) -> bytes:
        code, _, err = run_kvexport(
            *("build", checkpoint, "-o", tmp_path / name, "--calibration", "random", "--samples", "8"),
            *("--length", "32", "--no-cache", *options),
        )
        assert code == 0, err
        return (tmp_path / name / "decoder.onnx.data").read_bytes()

    lazy = weights("lazy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_table, "_HELD_BYTES", 1 << 28)
        assert weights("dense") == lazy
