"""The simulated device computes as the CPU does, and fails where CUDA fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


def test_tensors_are_created_copied_and_read(device: torch.device) -> None:
    x = torch.randn(3, 4)
    there = x.to(device)
    assert there.device == device and there.T.device == device
    assert torch.equal(there.cpu(), x) and there.cpu().device.type == "cpu"
    for made in (
        torch.arange(3, device=device),
        torch.zeros(2, 2, device=device),
        torch.tensor([1.0], device=device),
        torch.full((), -torch.inf, device=device),
        torch.empty_like(there),
        there.new_zeros(2),
    ):
        assert made.device == device
    assert float(there.sum()) == float(x.sum())


def test_views_share_their_numbers(device: torch.device) -> None:
    x = torch.zeros(4, 3, device=device)
    x[1:3] = torch.ones(2, 3, device=device)
    x.T[0].add_(5)
    expected = torch.tensor([5.0, 6, 6, 5])
    assert torch.equal(x[:, 0].cpu(), expected)
    assert torch.equal(
        x.unflatten(0, (2, 2)).transpose(0, 1).reshape(4, 3)[:, 0].cpu(), expected[[0, 2, 1, 3]]
    )


def test_gradients_are_those_of_the_cpu(device: torch.device) -> None:
    x, weight = torch.randn(5, 4), torch.randn(3, 4)
    gradients = []
    for place in (torch.device("cpu"), device):
        parameter = torch.nn.Parameter(weight.to(place))
        torch.softmax((x.to(place)[:, None] * parameter).sum(-1), -1).square().sum().backward()
        assert parameter.grad is not None and parameter.grad.device == place
        gradients.append(parameter.grad.cpu())
    assert torch.equal(*gradients)


def test_a_number_of_the_cpu_may_mix_with_tensors_of_the_device(device: torch.device) -> None:
    assert torch.equal((torch.ones(2, device=device) * torch.tensor(2.0)).cpu(), torch.full((2,), 2.0))


def test_float32_products_are_rounded_otherwise(device: torch.device) -> None:
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    here, there = x @ x.T, (x.to(device) @ x.to(device).T).cpu()
    assert not torch.equal(here, there) and torch.allclose(here, there, atol=1e-4)
    assert torch.equal(there, (x.double() @ x.double().T).float())


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: there @ here,
        lambda here, there: there.addmm_(here, there),
        lambda here, there: torch.cat([there, here]),
        lambda here, there: torch.where(here > 0, there, there),
        lambda here, there: there[torch.tensor([0])],
        lambda here, there: F.embedding(torch.tensor([0]), there),
        lambda here, there: F.linear(there, here),
        lambda here, there: here.sum().add_(there.sum()),
    ],
)
def test_tensors_of_two_devices_do_not_mix(
    device: torch.device, mix: Callable[[Tensor, Tensor], Tensor]
) -> None:
    here = torch.ones(2, 2)
    mix(here, here)
    with pytest.raises(RuntimeError, match="on the same device"):
        mix(here, here.to(device))


def test_a_generator_of_the_cpu_draws_nothing_on_the_device(device: torch.device) -> None:
    weights, generator = torch.ones(1, 4), torch.Generator().manual_seed(0)
    torch.multinomial(weights, 1, generator=generator)
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.multinomial(weights.to(device), 1, generator=generator)


def test_numpy_reads_no_tensor_of_the_device(device: torch.device) -> None:
    with pytest.raises((TypeError, RuntimeError), match="numpy"):
        torch.ones(2, device=device).numpy()
