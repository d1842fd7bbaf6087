"""Linear codes for a group of heads: the one template that every method fills in.

A code keeps r numbers c = Eᵀ z of a stacked vector z in Rⁿ and returns ẑ = U c. Knows linear algebra in
float64; nothing of keys, values or layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DAMPING = 1e-6  # of the mean diagonal, added to covariances and sensitivities


@dataclass(frozen=True)
class Code:
    """Encoder E and decoder U, each [n, r] float64."""

    encode: Tensor
    decode: Tensor

    @property
    def residual(self) -> Tensor:
        """P = I - U Eᵀ [n, n], so that z - ẑ = P z."""
        return torch.eye(self.encode.shape[0], dtype=torch.float64) - self.decode @ self.encode.T


@dataclass(frozen=True)
class Codes:
    """The optimal codes of every rank for one stack of n numbers.

    Attributes:
        encode, decode: E and U of rank n, [n, n], best column first.
        spectrum: [n] float64, descending; what rank r loses is the sum of all but the r first.
    """

    encode: Tensor
    decode: Tensor
    spectrum: Tensor

    def code(self, rank: int) -> Code:
        """The code of one rank, in the orthonormal gauge."""
        return orthonormalize(Code(self.encode[:, :rank], self.decode[:, :rank]))

    @property
    def losses(self) -> Tensor:
        """tr(S · Cov(z - ẑ)) for ranks 0 to n, [n + 1]."""
        return torch.cat((self.spectrum, self.spectrum.new_zeros(1))).flip(0).cumsum(0).flip(0)


def optimal_codes(sensitivity: Tensor, covariance: Tensor) -> Codes:
    """The codes of each rank r that minimise tr(S · Cov(z - ẑ)).

    With B = S^½ and the eigenvectors P_r of B C B to its r largest eigenvalues, E = B P_r and U = B⁻¹ P_r
    (Eckart-Young on B C^½). E and U are unique up to an invertible r x r.
    """
    values, vectors = torch.linalg.eigh(add_damping(sensitivity))
    root = values.clamp_min(values.max() * 1e-12).sqrt()
    b, b_inverse = vectors * root @ vectors.T, vectors / root @ vectors.T
    found = torch.linalg.eigh(b @ add_damping(covariance) @ b)
    vectors = found.eigenvectors.flip(-1)
    return Codes(b @ vectors, b_inverse @ vectors, found.eigenvalues.flip(-1).clamp_min(0))


def orthonormalize(code: Code) -> Code:
    """The same ẑ from a decoder with orthonormal columns.

    What is cached then has the norm of the ẑ that it stands for, and queries pass through the decoder without growing.
    """
    q, r = torch.linalg.qr(code.decode)
    return Code(code.encode @ r.T, q)


def subspace_code(second_moment: Tensor, rank: int) -> Code:
    """Plain SVD: E = U = the r leading eigenvectors of a second moment (arXiv 2406.07056, eqs. 7-10)."""
    leading = leading_eigenvectors(second_moment, rank)
    return Code(leading, leading)


def leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """Eigenvectors [..., n, r] of symmetric or Hermitian matrices [..., n, n] to their r largest eigenvalues."""
    return torch.linalg.eigh(symmetric).eigenvectors[..., -rank:].flip(-1)


def add_damping(matrix: Tensor) -> Tensor:
    """The matrix with a millionth of its mean diagonal added, so that it has full rank; zero becomes the identity."""
    scale = float(matrix.diagonal().mean())
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    return matrix + _DAMPING * scale * identity if scale > 0 else identity
