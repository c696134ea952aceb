"""How A and B start: every initialisation leaves the model's function bit-for-bit unchanged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fx.kinds.base import rows_index
from lora_fx.matrix import MatrixForm, row_count
from lora_fx.plans import Decision, Part


@dataclass(frozen=True)
class Start:
    """The first values of one part: ``a: (r, in)``, ``b: (rows, r)``, each stacked where E > 1.

    ``frozen`` says that ``scale * b @ a`` is not zero and is taken off by a frozen copy of both.
    """

    a: Tensor
    b: Tensor
    frozen: bool = False


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that A and B are trained in: the weight's own, half precisions in float32."""
    return torch.promote_types(dtype, torch.float32)


def start(decision: Decision, part: Part, weight: Tensor, generator: torch.Generator) -> Start:
    """Return the first values of a part.

    ``kaiming``: A uniform in +-1/sqrt(in) and B zero, as loralib and peft start; ``gaussian``: A normal
    with standard deviation 1/r, B zero (Hu et al. 2021, section 4.1); ``orthogonal``, ``pissa`` (Meng
    et al. 2024) and ``olora`` (Buyukakyuz 2024) start from a product that is not zero, so a frozen
    copy of the start is subtracted and the base stays as it is.
    """
    form = decision.site.form
    lead = () if form.experts is None else (form.experts,)
    rows = row_count(part.rows, form)
    dtype = adapter_dtype(weight.dtype)
    a = torch.empty(*lead, part.rank, form.in_features, dtype=dtype, device="cpu")
    b = torch.zeros(*lead, rows, part.rank, dtype=dtype, device=weight.device)
    if weight.device.type == "meta":
        frozen = decision.init not in {"kaiming", "gaussian"}
        return Start(a.to("meta"), b, frozen)
    if decision.init == "kaiming":
        bound = 1.0 / math.sqrt(form.in_features)
        return Start(a.uniform_(-bound, bound, generator=generator).to(weight.device), b)
    if decision.init == "gaussian":
        return Start(a.normal_(0.0, 1.0 / part.rank, generator=generator).to(weight.device), b)
    matrix = _part_matrix(weight, form, part).to(dtype)
    if decision.init == "orthogonal":
        a, b = _orthogonal(matrix, part.rank, generator)
    elif decision.init == "pissa":
        a, b = _pissa(matrix, part.rank, decision.scale)
    else:
        a, b = _olora(matrix, part.rank, decision.scale)
    # A vector is contiguous with whatever strides; a product reads other bits by other strides.
    a, b = (t.clone(memory_format=torch.contiguous_format) for t in (a, b))
    return Start(a, b, frozen=True)


def _part_matrix(weight: Tensor, form: MatrixForm, part: Part) -> Tensor:
    matrix = form.matrix(weight.detach())
    if part.rows is None:
        return matrix
    return matrix.index_select(-2, rows_index(part.rows, matrix.device))


def _orthogonal(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthonormal rows in A and orthonormal columns in B, both at a tenth of their size."""
    lead, rows, columns = matrix.shape[:-2], matrix.shape[-2], matrix.shape[-1]
    wide = torch.empty(*lead, columns, rank, dtype=matrix.dtype).normal_(generator=generator)
    tall = torch.empty(*lead, rows, rank, dtype=matrix.dtype).normal_(generator=generator)
    a = torch.linalg.qr(wide).Q.mT * 0.1
    b = torch.linalg.qr(tall).Q * 0.1
    return a.to(matrix.device), b.to(matrix.device)


def _pissa(matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """The principal singular triples of W0: ``scale * B A`` is its best rank-r approximation."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[..., :rank] / scale).sqrt()
    return root.unsqueeze(-1) * vh[..., :rank, :], u[..., :rank] * root.unsqueeze(-2)


def _olora(matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """The first columns of Q and rows of R of ``W0 = Q R``."""
    q, r = torch.linalg.qr(matrix)
    return r[..., :rank, :] / scale, q[..., :rank]


def as_parameter(tensor: Tensor, *, trainable: bool = True) -> nn.Parameter:
    """Return a Parameter that owns its memory."""
    return nn.Parameter(tensor.detach().clone(), requires_grad=trainable)
