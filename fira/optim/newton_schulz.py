"""Orthogonalisation of matrices by a Newton–Schulz iteration.

    X₀     = G / ‖G‖                                   singular values in [0, 1]
    A      = X Xᵀ                                      [m, m], m ≤ n
    X_i+1  = a X + (b A + c A²) X                      five times

A singular value s becomes a s + b s³ + c s⁵ in each iteration, and ends between 0.7 and 1.2. Singular vectors do not
change, so that the result is about U Vᵀ with G = U S Vᵀ. The coefficients maximise the slope at 0. Source: Jordan et
al. 2024, https://kellerjordan.github.io/posts/muon/.
"""

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
SMALLEST_NORM = 1e-7


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """U Vᵀ of each matrix G = U S Vᵀ, approximately: [m, n], or [E, m, n].

    dtype: of the products. A matrix of zeros stays zero.
    """
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = (matrices / norm.clamp(min=SMALLEST_NORM)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = add_product(gram, gram, gram, beta=B, alpha=C)
        x = add_product(x, polynomial, x, beta=A)
    return (x.mT if tall else x).to(matrices.dtype)


def flops(shape: torch.Size) -> int:
    """Floating-point operations of `orthogonalized` for matrices of a shape [..., m, n]."""
    m, n = sorted(shape[-2:])
    return ITERATIONS * (4 * m * m * n + 2 * m**3) * shape[:-2].numel()
