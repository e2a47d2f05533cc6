"""What is read from kernels: their spectra, largest eigenvalues and effective ranks."""

import torch
from torch import Tensor

EXACT = 1024  # rows of a kernel up to which its eigenvalues are computed exactly


def normalised(kernels: Tensor) -> Tensor:
    """Return kernels [U, M, M] of gradients scaled to length one: cosines; eigenvalues are then at most M."""
    length = kernels.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scale = torch.where(length > 0, 1 / length, 0)
    return kernels * scale[..., :, None] * scale[..., None, :]


def spectrum(kernels: Tensor) -> Tensor:
    """Return all eigenvalues of symmetric kernels [U, M, M]: float64 [U, M] on the CPU, the largest first.

    Those of a kernel that is not finite are NaN.
    """
    return torch.cat([_spectrum(some.double().cpu()) for some in kernels.split(256)])  # of thousands, some at a time


def _spectrum(kernels: Tensor) -> Tensor:
    finite = kernels.isfinite().flatten(-2).all(-1)
    values = torch.linalg.eigvalsh(torch.where(finite[..., None, None], kernels, 0)).flip(-1).clamp_min(0)
    return torch.where(finite[..., None], values, torch.nan)


def principal_eigenvalues(kernels: Tensor, exact: int = EXACT, tolerance: float = 1e-10) -> Tensor:
    """Return the largest eigenvalue of each kernel [U, M, M]: float64 [U] on the CPU.

    Exact up to `exact` rows, else by power iteration, until it changes by less than `tolerance` of itself.
    """
    if kernels.shape[-1] <= exact:
        return spectrum(kernels)[..., 0]
    kernels = kernels.double()
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(kernels.shape[-1], 1, generator=generator, dtype=torch.float64).to(kernels.device)
    vector = vector.expand(len(kernels), -1, -1) / vector.norm()
    value = torch.zeros(len(kernels), 1, 1, dtype=torch.float64, device=kernels.device)
    for _ in range(10_000):
        before, product = value, kernels @ vector
        value = product.norm(dim=1, keepdim=True)
        vector = product / value.clamp_min(torch.finfo(torch.float64).tiny)
        if (value - before).abs().le(tolerance * value).all():
            break
    return value.flatten().cpu()


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """Return exp of the entropy of each spectrum [U, M], from 1 to M (Roy & Vetterli, EUSIPCO 2007): [U]."""
    share = eigenvalues / eigenvalues.sum(-1, keepdim=True).clamp_min(torch.finfo(eigenvalues.dtype).tiny)
    return torch.exp(-torch.special.xlogy(share, share).sum(-1))
