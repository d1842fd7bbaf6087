"""Devices by name, and decoders placed on one: the same numbers, one layer there at a time."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from support.decoders import STYLES, make_decoder, random_windows

from kvexport.errors import CannotRunHere, UsageError
from kvexport.model import reference
from kvexport.model.decoder import Decoder, LazyLayers, Rope, map_tensors
from kvexport.model.placement import device_computation, device_name, move, place, resolve_device


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def simulate_gpus(monkeypatch: pytest.MonkeyPatch, count: int, error: str | None = None) -> None:
    def ones(size: int, device: torch.device) -> torch.Tensor:
        assert device.type == "cuda"
        if error is not None:
            raise RuntimeError(error)
        return torch.tensor([1.0])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch, "ones", ones)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("auto", "cuda:0")],
)
def test_a_name_is_resolved(monkeypatch: pytest.MonkeyPatch, name: str, expected: str) -> None:
    simulate_gpus(monkeypatch, 2)
    assert str(resolve_device(name)) == expected


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_the_cpu_without_a_gpu() -> None:
    assert str(resolve_device("auto")) == device_name(resolve_device("auto")) == "cpu"


@pytest.mark.parametrize(
    "name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "", "CUDA", "meta", "cuda:0:1", "cuda:\u0661"]
)
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as refused:
        resolve_device(name)
    assert refused.value.exit_code == 2 and refused.value.got == name
    assert "auto, cpu, cuda" in str(refused.value)


@pytest.mark.usefixtures("no_gpu")
def test_cuda_is_refused_without_a_gpu() -> None:
    with pytest.raises(CannotRunHere, match="needs an NVIDIA GPU") as refused:
        resolve_device("cuda")
    assert refused.value.exit_code == 3
    assert torch.__version__ in str(refused.value.got) and "--device cpu" in str(refused.value.fix)


def test_a_gpu_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch, 2)
    with pytest.raises(CannotRunHere, match="indices from 0 to 1"):
        resolve_device("cuda:2")


def test_a_gpu_without_kernels_is_refused_and_not_taken_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch, 1, "CUDA error: no kernel image is available\nlong explanation")
    with pytest.raises(CannotRunHere) as refused:
        resolve_device("cuda")
    assert refused.value.got == "CUDA error: no kernel image is available"
    assert str(resolve_device("auto")) == "cpu"


def test_exhausted_memory_of_the_gpu_is_an_error_with_a_fix() -> None:
    message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"
    for raised in (torch.OutOfMemoryError(message), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")):
        with pytest.raises(CannotRunHere, match="memory of the GPU") as refused, device_computation():
            raise raised
        assert refused.value.got == str(raised).removesuffix(". GPU 0 has a total capacity of 1 GiB")
        assert "--device cpu" in str(refused.value.fix)
    with pytest.raises(RuntimeError, match="another"), device_computation():
        raise RuntimeError("another")


def test_products_are_exact_inside_and_as_before_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with device_computation():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
        with pytest.raises(ValueError, match="inside"), device_computation():
            raise ValueError("inside")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_on_the_cpu_a_decoder_stays_itself() -> None:
    decoder = make_decoder()
    assert place(decoder, torch.device("cpu")) is decoder


def learned_positions(decoder: Decoder) -> Decoder:
    table = torch.randn(64, decoder.dims.hidden_size, dtype=torch.float64)
    return replace(decoder, embedding=replace(decoder.embedding, positions=table))


@pytest.mark.parametrize("style", STYLES)
def test_a_placed_decoder_gives_the_logits_of_the_cpu(device: torch.device, style: str) -> None:
    decoder = learned_positions(make_decoder(style))
    windows = random_windows(decoder, 3, 12)
    placed = place(decoder, device)
    logits = reference.forward(placed, windows)
    assert logits.device == device
    assert torch.equal(logits.cpu(), reference.forward(decoder, windows))


@pytest.mark.parametrize("style", STYLES)
def test_a_placed_decoder_decodes_with_a_cache_on_its_device(device: torch.device, style: str) -> None:
    decoder = make_decoder(style)
    windows = random_windows(decoder, 2, 9)
    logits = []
    for each in (decoder, place(decoder, device)):
        cache = reference.new_cache(each.layers, 2, 9, torch.float64)
        reference.forward(each, windows[:, :6], cache=cache)
        for at in range(6, 9):
            last = reference.forward(each, windows[:, at : at + 1], torch.full((2, 1), at), cache)
        logits.append(last.cpu())
    assert torch.equal(*logits)


def test_a_layer_that_is_not_moved_fails(device: torch.device) -> None:
    decoder = make_decoder()
    placed = replace(place(decoder, device), layers=decoder.layers)
    with pytest.raises(RuntimeError, match="on the same device"):
        reference.forward(placed, random_windows(decoder, 1, 4))


def test_a_table_of_rope_that_is_not_moved_fails(device: torch.device) -> None:
    decoder = make_decoder()
    layers = [map_tensors(layer, lambda tensor: tensor.to(device)) for layer in decoder.layers]
    assert isinstance(layers[0].attention.rope, Rope)
    with pytest.raises(RuntimeError, match="on the same device"):
        reference.forward(replace(place(decoder, device), layers=layers), random_windows(decoder, 1, 4))


def test_one_layer_is_on_the_device_at_a_time(device: torch.device) -> None:
    decoder = make_decoder(layers=4)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for layer in place(decoder, device).layers:
        alive.append(weakref.ref(layer.attention.q.weight))
        del layer
        most = max(most, sum(each() is not None for each in alive))
    assert len(alive) == 4 and most == 0


def test_layers_are_read_when_they_are_taken(device: torch.device) -> None:
    decoder, reads = make_decoder(layers=3), []

    def read(index: int) -> object:
        reads.append(index)
        return decoder.layers[index]

    placed = place(replace(decoder, layers=LazyLayers(3, read)), device)  # type: ignore[arg-type]
    assert reads == []
    assert placed.layers[1].attention.k.weight.device == device and reads == [1]


def test_a_tensor_that_is_on_the_device_is_not_copied(device: torch.device) -> None:
    layer = move(make_decoder().layers[0], device)
    assert move(layer, device).mlp.up.weight is layer.mlp.up.weight
    back = move(layer, torch.device("cpu"))
    assert torch.equal(back.mlp.up.weight, make_decoder().layers[0].mlp.up.weight)
