"""Matmul, attention and einsum kinds: where the weight stands, its form, and the branch of addmm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from lora_fx.kinds import BY_OP
from lora_fx.kinds.base import LivePart
from lora_fx.kinds.effective import effective_weight
from lora_fx.kinds.matmul import adapted_addmm
from lora_fx.matrix import columns_form, rows_form
from lora_fx.passes.match import match
from lora_fx.passes.trace import trace
from lora_fx.sites import Site
from tests.by_hand import check, randomise


class Product(nn.Module):
    """One parameter and a function of it and the input."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


def site_of(shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Site:
    (site,) = match(trace(Product(shape, function), x))
    return site


Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

CASES: list[tuple[str, tuple[int, ...], Callable[[Tensor, Tensor], Tensor], tuple[int, ...], Axes]] = [
    ("matmul", (4, 6), lambda x, w: x @ w, (2, 4), ((1,), (0,), ())),
    ("matmul", (6, 4), lambda x, w: w @ x.t(), (2, 4), ((0,), (1,), ())),
    ("matmul", (6, 4), lambda x, w: x @ w.t(), (2, 4), ((0,), (1,), ())),
    ("matmul", (3, 4, 6), lambda x, w: x @ w, (2, 4), ((2,), (1,), (0,))),
    ("mm", (4, 6), torch.mm, (2, 4), ((1,), (0,), ())),
    ("bmm", (3, 4, 6), torch.bmm, (3, 2, 4), ((2,), (1,), (0,))),
    ("addmm", (4, 6), lambda x, w: torch.addmm(x.new_zeros(6), x, w), (2, 4), ((1,), (0,), ())),
    ("baddbmm", (3, 4, 6), lambda x, w: torch.baddbmm(x.new_zeros(1), x, w), (3, 2, 4), ((2,), (1,), (0,))),
    ("mv", (6, 4), lambda x, w: torch.mv(w, x), (4,), ((0,), (1,), ())),
    ("tensordot", (4, 3, 2), lambda x, w: torch.tensordot(x, w, 1), (5, 4), ((1, 2), (0,), ())),
    ("tensordot", (3, 4), lambda x, w: torch.tensordot(w, x, ([1], [1])), (5, 4), ((0,), (1,), ())),
    ("einsum", (4, 6), lambda x, w: torch.einsum("bi,io->bo", x, w), (2, 4), ((1,), (0,), ())),
    ("einsum", (4, 3, 2), lambda x, w: torch.einsum("bi,ihd->bhd", x, w), (2, 4), ((1, 2), (0,), ())),
    ("einsum", (3, 6, 4), lambda x, w: torch.einsum("bhi,hoi->bho", x, w), (2, 3, 4), ((1,), (2,), (0,))),
    ("einsum", (3, 6, 4), lambda x, w: torch.einsum("...hi,hoi", x, w), (2, 3, 4), ((1,), (0, 2), ())),
    ("einsum", (4, 6), lambda x, w: torch.einsum("...i,io->...o", [x, w]), (2, 3, 4), ((1,), (0,), ())),
    ("einsum", (4, 6), lambda x, w: torch.einsum("bi,io", x, w), (2, 4), ((1,), (0,), ())),
    ("linear", (8, 4), F.linear, (2, 4), ((0,), (1,), ())),
    ("inner", (6, 4), torch.inner, (2, 4), ((0,), (1,), ())),
    ("inner", (3, 2, 4), lambda x, w: torch.inner(w, x), (5, 4), ((0, 1), (2,), ())),
    (
        "linalg_multi_dot",
        (4, 6),
        lambda x, w: torch.linalg.multi_dot([x, w]),
        (2, 4),
        ((1,), (0,), ()),
    ),
    ("linalg_multi_dot", (6, 4), lambda x, w: torch.linalg.multi_dot([w, x.t()]), (2, 4), ((0,), (1,), ())),
    (
        "einsum",
        (4, 6),
        lambda x, w: torch.einsum("bi,io,ok->bk", x, w, torch.eye(6).to(x)),
        (2, 4),
        ((1,), (0,), ()),
    ),
    ("addmm_", (4, 6), lambda x, w: x.new_zeros(2, 6).addmm_(x, w), (2, 4), ((1,), (0,), ())),
    ("sparse_mm", (4, 6), lambda x, w: torch.sparse.mm(x.to_sparse(), w), (2, 4), ((1,), (0,), ())),
]


@pytest.mark.parametrize(("op", "shape", "function", "given", "axes"), CASES)
def test_form_of_a_contraction(
    op: str,
    shape: tuple[int, ...],
    function: Callable[[Tensor, Tensor], Tensor],
    given: tuple[int, ...],
    axes: Axes,
) -> None:
    site = site_of(shape, function, torch.randn(given))
    assert [use.op for use in site.uses] == [op]
    assert site.kind == BY_OP[op].name
    assert (site.form.out, site.form.inp, site.form.batch) == axes


@pytest.mark.parametrize(("op", "shape", "function", "given", "axes"), CASES)
def test_the_result_depends_on_rows_as_the_form_says(
    op: str,
    shape: tuple[int, ...],
    function: Callable[[Tensor, Tensor], Tensor],
    given: tuple[int, ...],
    axes: Axes,
) -> None:
    """A low-rank delta through the form has a rank in the result no larger than it was made with."""
    x = torch.randn(given, dtype=torch.float64)
    model = Product(shape, function).double()
    (site,) = match(trace(model, x))
    form = site.form
    lead = () if form.experts is None else (form.experts,)
    a = torch.randn(*lead, 1, form.in_features, dtype=torch.float64)
    b = torch.zeros(*lead, form.out_features, 1, dtype=torch.float64)
    b[..., 0, 0] = 1.0
    moved = function(x, model.w + form.weight(b @ a)) - function(x, model.w)
    # One output row was moved: of the result, one entry along the output axes.
    assert 0 < int((moved.abs() > 1e-12).sum()) <= moved.numel() * (form.experts or 1) // form.out_features


def test_vectors_may_be_the_rows_of_a_weight() -> None:
    site = site_of((6, 4), lambda x, w: torch.stack([x @ row for row in w], -1), torch.randn(2, 4))
    assert (site.kind, site.form) == ("matmul", rows_form((6, 4)))
    assert [use.rows for use in site.uses] == [((i, i + 1),) for i in range(6)]
    model, x = Product((6, 4), lambda x, w: torch.stack([x @ row for row in w], -1)), torch.randn(2, 4)
    lora_fx.inject(model.double(), lora_fx.Policy(lora_fx.Rule(rank=2)), x.double(), seed=0)
    randomise(model)
    check(model, x.double())


@pytest.mark.parametrize("equation", ["bi,ii->b", "bi,oi->boi"], ids=["a diagonal", "an elementwise product"])
def test_einsum_without_a_matrix(equation: str) -> None:
    site = site_of((4, 4), lambda x, w: torch.einsum(equation, x, w), torch.randn(2, 4))
    assert site.uses == ()
    assert site.kind == "other"
    assert "read by einsum" in str(site.unfit)


def test_einsum_names_the_channel_of_its_result() -> None:
    traced = trace(Product((6, 4), lambda x, w: torch.einsum("bti,oi->bot", x, w)), torch.randn(2, 3, 4))
    node = next(n for n in traced.graph.nodes if n.meta["op"] == "einsum")
    from lora_fx.kinds import Call

    operands = BY_OP["einsum"].operands(Call("einsum", node.args, node.kwargs, node.meta["shape"]))
    assert [(o.weight.op, o.channel) for o in operands if o.weight.op == "get_attr"] == [("get_attr", -2)]


def test_roles_of_multihead_attention() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.MultiheadAttention(4, 2, batch_first=True)
            self.apart = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True)

        def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.apart(self.packed(x, x, x)[0], k, v)[0]

    model = Both()
    sites = {
        s.name: s
        for s in match(trace(model, (torch.randn(2, 3, 4), torch.randn(2, 3, 3), torch.randn(2, 3, 5))))
    }
    assert sites["packed.in_proj_weight"].roles == {"q": ((0, 4),), "k": ((4, 8),), "v": ((8, 12),)}
    assert sites["packed.out_proj.weight"].roles == {"o": None}
    assert {n: dict(s.roles) for n, s in sites.items() if "apart" in n} == {
        "apart.q_proj_weight": {"q": None},
        "apart.k_proj_weight": {"k": None},
        "apart.v_proj_weight": {"v": None},
        "apart.out_proj.weight": {"o": None},
    }
    assert {s.kind for s in sites.values()} == {"attention"}
    assert not any(use.branch for s in sites.values() for use in s.uses)


@pytest.mark.parametrize("rows", [None, ((1, 3), (5, 6))])
def test_branch_of_addmm_is_the_product_with_the_effective_weight(
    rows: tuple[tuple[int, int], ...] | None,
) -> None:
    torch.manual_seed(0)
    bias, x, w = (torch.randn(s, dtype=torch.float64) for s in ((6,), (3, 4), (4, 6)))
    b = torch.randn(6 if rows is None else 3, 2, dtype=torch.float64)
    parts = (LivePart(torch.randn(2, 4, dtype=torch.float64), b, 0.5, rows),)
    found = adapted_addmm(bias, x, w, beta=0.3, alpha=1.7, lora=parts)
    wanted = torch.addmm(bias, x, effective_weight(w, columns_form((4, 6)), parts), beta=0.3, alpha=1.7)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, torch.addmm(bias, x, w, beta=0.3, alpha=1.7))


def test_conv1d_of_transformers_is_a_stock_home() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    from lora_fx.passes.stock_forward import Branched, rewrite, trace_stock

    layer = pytorch_utils.Conv1D(6, 4)
    (site,) = match(trace(layer, torch.randn(2, 3, 4)))
    assert (site.kind, site.form) == ("matmul", columns_form((4, 6)))
    assert [(use.op, use.branch) for use in site.uses] == [("addmm", True)]
    assert rewrite(trace_stock(layer, type(layer)), {"weight": Branched(site.form)}) == {"weight"}
