"""Optimal codes: no linear code of the same rank loses less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layer_codes import loss
from torch import Tensor

from kvexport.convert.codes import (
    Code,
    add_damping,
    leading_eigenvectors,
    optimal_codes,
    orthonormalize,
    subspace_code,
)

sizes = st.tuples(st.integers(2, 12), st.integers(1, 12), st.integers(0, 10**6)).filter(
    lambda each: each[1] <= each[0]
)


def random_second_moment(
    n: int, generator: torch.Generator, rank: int | None = None, decay: float = 2.0
) -> Tensor:
    """Positive semidefinite [n, n], its eigenvalues spread over `decay` powers of ten."""
    rank = n if rank is None else rank
    factor = torch.randn(n, rank, generator=generator, dtype=torch.float64) * torch.logspace(
        0, -decay / 2, rank, dtype=torch.float64
    )
    return factor @ factor.T


def optimal_code(sensitivity: Tensor, covariance: Tensor, rank: int) -> Code:
    return optimal_codes(sensitivity, covariance).code(rank)


def bound(sensitivity: Tensor, covariance: Tensor, rank: int) -> float:
    """Eckart-Young: the sum of all but the r largest eigenvalues of S^½ C S^½."""
    values, vectors = torch.linalg.eigh(sensitivity)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return float(torch.linalg.eigvalsh(root @ covariance @ root).clamp_min(0).flip(0)[rank:].sum())


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_optimal_code_reaches_the_eckart_young_bound(drawn: tuple[int, int, int]) -> None:
    n, rank, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    sensitivity, covariance = random_second_moment(n, generator), random_second_moment(n, generator)
    code = optimal_code(sensitivity, covariance, rank)
    least = bound(sensitivity, covariance, rank)
    everything = float((sensitivity * covariance).sum())
    assert least - 1e-12 * everything <= loss(code, sensitivity, covariance) <= least + 1e-6 * everything


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_no_other_code_loses_less(drawn: tuple[int, int, int]) -> None:
    n, rank, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    sensitivity, covariance = random_second_moment(n, generator), random_second_moment(n, generator)
    code = optimal_code(sensitivity, covariance, rank)
    least = loss(code, sensitivity, covariance) - 1e-6 * float((sensitivity * covariance).sum())

    def noise() -> Tensor:
        return torch.randn(n, rank, generator=generator, dtype=torch.float64)

    encoder = noise()
    best_decoder = covariance @ encoder @ torch.linalg.pinv(encoder.T @ covariance @ encoder)
    for other in (
        Code(encoder, best_decoder),
        Code(code.encode + 0.1 * noise(), code.decode),
        Code(code.encode, code.decode + 0.1 * noise()),
        subspace_code(covariance, rank),
        subspace_code(sensitivity, rank),
    ):
        assert least <= loss(other, sensitivity, covariance)


def test_optimal_code_beats_plain_svd_under_unequal_sensitivity() -> None:
    sensitivity = torch.diag(torch.tensor([1e-3, 1.0, 1.0], dtype=torch.float64))
    covariance = torch.diag(torch.tensor([10.0, 1.0, 0.5], dtype=torch.float64))
    code = optimal_code(sensitivity, covariance, 1)
    assert loss(code, sensitivity, covariance) == pytest.approx(0.51, rel=1e-5)
    assert loss(subspace_code(covariance, 1), sensitivity, covariance) == pytest.approx(1.5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_full_rank_loses_nothing(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    code = optimal_code(random_second_moment(n, generator), random_second_moment(n, generator), n)
    torch.testing.assert_close(code.residual, torch.zeros(n, n, dtype=torch.float64), rtol=0, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_orthonormal_decoder_keeps_the_reconstruction(drawn: tuple[int, int, int]) -> None:
    n, rank, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    encode, decode = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for _ in range(2))
    orthonormal = orthonormalize(Code(encode, decode))
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(orthonormal.decode.T @ orthonormal.decode, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        orthonormal.decode @ orthonormal.encode.T, decode @ encode.T, rtol=1e-10, atol=1e-10
    )
    code = optimal_code(random_second_moment(n, generator), random_second_moment(n, generator), rank)
    torch.testing.assert_close(code.decode.T @ code.decode, identity, rtol=0, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_low_rank_covariance_is_kept_without_loss(drawn: tuple[int, int, int]) -> None:
    n, rank, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    sensitivity, covariance = (
        random_second_moment(n, generator),
        random_second_moment(n, generator, rank=rank, decay=1.0),
    )
    code = optimal_code(sensitivity, covariance, rank)
    assert loss(code, sensitivity, covariance) <= 1e-8 * float((sensitivity * covariance).sum())


@pytest.mark.parametrize("sensitivity", ["zero", "rank one", "negative by rounding", "full"])
@pytest.mark.parametrize("covariance", ["zero", "rank one", "full"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_degenerate_moments_give_finite_codes(sensitivity: str, covariance: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    moments = {
        "zero": torch.zeros(6, 6, dtype=torch.float64),
        "rank one": random_second_moment(6, generator, rank=1),
        "full": random_second_moment(6, generator),
    }
    moments["negative by rounding"] = moments["rank one"] - 1e-5 * torch.eye(6, dtype=torch.float64)
    code = optimal_code(scale * moments[sensitivity], moments[covariance] / scale, 2)
    for part in (code.encode, code.decode):
        assert bool(part.isfinite().all())
    assert float(code.decode.abs().max()) <= 1 + 1e-9
    assert float(code.encode.abs().max()) < 1e4
    assert loss(code, moments["full"], moments[covariance]) < 100


def test_damping_gives_full_rank_and_changes_little() -> None:
    matrix = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert torch.linalg.matrix_rank(add_damping(matrix)) == 2
    torch.testing.assert_close(add_damping(matrix), matrix, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        add_damping(torch.zeros(2, 2, dtype=torch.float64)), torch.eye(2, dtype=torch.float64)
    )


def test_leading_eigenvectors_of_many_hermitian_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(5, 3, 3, generator=generator, dtype=torch.complex128)
    matrices = factor @ factor.mH
    leading = leading_eigenvectors(matrices, 2)
    assert leading.shape == (5, 3, 2)
    for matrix, vectors in zip(matrices, leading, strict=True):
        top = torch.linalg.eigvalsh(matrix).flip(0)[:2]
        torch.testing.assert_close(matrix @ vectors, vectors * top, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_spectrum_gives_the_loss_of_every_rank(drawn: tuple[int, int, int]) -> None:
    n, rank, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    sensitivity, covariance = random_second_moment(n, generator), random_second_moment(n, generator)
    codes = optimal_codes(sensitivity, covariance)
    everything = float((sensitivity * covariance).sum())
    assert float(codes.losses[0]) == pytest.approx(everything, rel=1e-4)
    assert float(codes.losses[n]) == 0
    assert loss(codes.code(rank), sensitivity, covariance) == pytest.approx(
        float(codes.losses[rank]),
        abs=5e-5 * everything,  # damping changes small eigenvalues
    )


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_cached_vector_has_the_norm_of_its_reconstruction(drawn: tuple[int, int, int]) -> None:
    n, rank, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    code = optimal_code(random_second_moment(n, generator), random_second_moment(n, generator), rank)
    cached = torch.randn(7, n, generator=generator, dtype=torch.float64) @ code.encode
    torch.testing.assert_close((cached @ code.decode.T).norm(dim=1), cached.norm(dim=1), rtol=1e-9, atol=0)
