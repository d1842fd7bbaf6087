"""Linear codes of a stacked vector, and the optimisation problem that the methods solve; all in float64.

A code caches r numbers c = Eᵀ z of a vector z in Rⁿ and reconstructs ẑ = U c. With S the sensitivity of the
attention output to errors of z, the optimal code of rank r minimises tr(S · Cov(z - ẑ)). With B = S^½ and the
eigenvectors P_r of B Cov(z) B that belong to its r largest eigenvalues,

    E = B P_r,    U = B⁻¹ P_r,    loss = sum of the other eigenvalues

(Eckart-Young on B Cov(z)^½). E and U are unique up to an invertible r x r matrix M: E M and U M⁻ᵀ give the
same ẑ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DAMPING = 1e-6  # of the mean diagonal, added to covariances and sensitivities


@dataclass(frozen=True)
class Code:
    """One linear code of rank r.

    Attributes:
        encode: encoder E, [n, r] float64.
        decode: decoder U, [n, r] float64.
    """

    encode: Tensor
    decode: Tensor

    @property
    def residual(self) -> Tensor:
        """P = I - U Eᵀ [n, n] float64, so that z - ẑ = P z."""
        return torch.eye(self.encode.shape[0], dtype=torch.float64) - self.decode @ self.encode.T


@dataclass(frozen=True)
class Codes:
    """The optimal codes of every rank r = 1 .. n for one stacked vector.

    Attributes:
        encode: E of rank n, [n, n] float64, columns in descending order of their eigenvalues.
        decode: U of rank n, [n, n] float64, columns in the same order.
        spectrum: eigenvalues, [n] float64, descending.
    """

    encode: Tensor
    decode: Tensor
    spectrum: Tensor

    def code(self, rank: int) -> Code:
        """The optimal code of one rank, with orthonormal decoder columns."""
        return orthonormalize(Code(self.encode[:, :rank], self.decode[:, :rank]))

    @property
    def losses(self) -> Tensor:
        """tr(S · Cov(z - ẑ)) at ranks r = 0 .. n, [n + 1] float64: sums of the other eigenvalues."""
        return torch.cat((self.spectrum, self.spectrum.new_zeros(1))).flip(0).cumsum(0).flip(0)


def optimal_codes(sensitivity: Tensor, covariance: Tensor) -> Codes:
    """Solve for the codes of all ranks that minimise tr(S · Cov(z - ẑ)).

    Args:
        sensitivity: S, [n, n] float64, symmetric and positive semidefinite.
        covariance: Cov(z), [n, n] float64, symmetric and positive semidefinite.
    """
    values, vectors = torch.linalg.eigh(add_damping(sensitivity))
    root = values.clamp_min(values.max() * 1e-12).sqrt()
    b, b_inverse = vectors * root @ vectors.T, vectors / root @ vectors.T
    solution = torch.linalg.eigh(b @ add_damping(covariance) @ b)
    vectors = solution.eigenvectors.flip(-1)
    return Codes(b @ vectors, b_inverse @ vectors, solution.eigenvalues.flip(-1).clamp_min(0))


def orthonormalize(code: Code) -> Code:
    """Change the code so that its decoder has orthonormal columns; ẑ stays the same.

    A cached vector then has the norm of the ẑ that it represents, as norm-based eviction needs, and a query
    does not grow when it passes through the decoder.
    """
    q, r = torch.linalg.qr(code.decode)
    return Code(code.encode @ r.T, q)


def subspace_code(second_moment: Tensor, rank: int) -> Code:
    """Plain SVD: E = U = the `rank` leading eigenvectors of E[z zᵀ] [n, n] (arXiv 2406.07056, eqs. 7-10)."""
    leading = leading_eigenvectors(second_moment, rank)
    return Code(leading, leading)


def leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """Eigenvectors [..., n, r] of symmetric or Hermitian matrices [..., n, n] for their r largest
    eigenvalues.
    """
    return torch.linalg.eigh(symmetric).eigenvectors[..., -rank:].flip(-1)


def add_damping(matrix: Tensor) -> Tensor:
    """Add a millionth of the mean diagonal to the diagonal, for full rank; a zero matrix becomes I."""
    scale = float(matrix.diagonal().mean())
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    return matrix + _DAMPING * scale * identity if scale > 0 else identity
