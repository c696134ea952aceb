"""Matching: every parameter of two or more dimensions, its kind, its form, the rows of every use."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import lora_fx
from lora_fx.matrix import MatrixForm, columns_form, rows_form, stacked_form
from lora_fx.passes.match import match
from lora_fx.passes.trace import trace
from lora_fx.passes.tree import sites_from_modules
from lora_fx.sites import Site


class Functional(nn.Module):
    """One parameter and a function of it and the input."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, nn.Parameter], Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.w)


def sites_of(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Site]:
    return {site.name: site for site in match(trace(model, (args, kwargs)))}


def site_of(shape: tuple[int, ...], function: Callable[[Tensor, nn.Parameter], Any]) -> Site:
    (site,) = match(trace(Functional(shape, function), torch.randn(2, 4)))
    return site


def linear(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


CHAINS: list[tuple[tuple[int, ...], Callable[[Tensor], Tensor], MatrixForm]] = [
    ((6, 4), lambda w: w, rows_form((6, 4))),
    ((4, 6), lambda w: w.t(), columns_form((4, 6))),
    ((4, 6), lambda w: w.T, columns_form((4, 6))),
    ((4, 6), lambda w: w.mT.contiguous(), columns_form((4, 6))),
    ((4, 6), lambda w: w.permute(1, 0).clone().detach(), columns_form((4, 6))),
    ((4, 6), lambda w: w.transpose(0, 1).double().to(torch.float32), columns_form((4, 6))),
    ((6, 4), lambda w: w.half().float(), rows_form((6, 4))),
    ((6, 4), lambda w: w.data.type_as(w), rows_form((6, 4))),
    ((6, 4, 1, 1), lambda w: w.flatten(1), rows_form((6, 4, 1, 1))),
    ((6, 4, 1), lambda w: w.squeeze(-1), rows_form((6, 4, 1))),
    ((2, 3, 4), lambda w: w.view(-1, 4), MatrixForm((2, 3, 4), (2, 3, 4), (0, 1), (2,))),
    ((2, 3, 4), lambda w: w[1], stacked_form((2, 3, 4))),
    ((2, 4, 3), lambda w: w[1].t(), stacked_form((2, 4, 3), transposed=True)),
    ((2, 3, 4), lambda w: w.unbind()[0], stacked_form((2, 3, 4))),
    ((3, 2, 4), lambda w: w.select(1, 0), MatrixForm((3, 2, 4), (3, 2, 4), (0,), (2,), (1,))),
    ((6, 2, 2), lambda w: w.reshape(6, 4), rows_form((6, 2, 2))),
    ((2, 6, 2), lambda w: w.transpose(0, 1).reshape(6, 4), MatrixForm((2, 6, 2), (2, 6, 2), (1,), (0, 2))),
    ((24, 1), lambda w: w.view(6, 4), MatrixForm((24, 1), (6, 4, 1), (0,), (1, 2))),
    ((4, 6), lambda w: w.reshape(2, 2, 6).permute(2, 0, 1).flatten(1), columns_form((4, 6))),
    ((4, 3, 2), lambda w: w.view(4, 6).t(), MatrixForm((4, 3, 2), (4, 3, 2), (1, 2), (0,))),
    ((12, 4), lambda w: w.view(3, 4, 4)[1], rows_form((12, 4))),
    ((12, 4), lambda w: w.view(4, 3, 4)[:, 1], rows_form((12, 4))),
    ((5, 6, 4), lambda w: w.as_strided((6, 4), (4, 1), 24), stacked_form((5, 6, 4))),
    ((1, 4), lambda w: w.expand(6, 4), MatrixForm((1, 4), (1, 4), (0,), (1,))),
]


@pytest.mark.parametrize(("shape", "chain", "form"), CHAINS)
def test_form_behind_a_chain_of_views(
    shape: tuple[int, ...], chain: Callable[[Tensor], Tensor], form: MatrixForm
) -> None:
    site = site_of(shape, lambda x, w: linear(x, chain(w)))
    kind = "experts" if form.batch else "linear"
    assert (site.kind, [use.op for use in site.uses]) == (kind, ["linear"])
    assert site.form == form
    assert site.notes == ()


ROWS: list[tuple[tuple[int, ...], Callable[[Tensor], Tensor], Any]] = [
    ((12, 4), lambda w: w[:4], ((0, 4),)),
    ((12, 4), lambda w: w[4:8], ((4, 8),)),
    ((12, 4), lambda w: w.chunk(3)[2], ((8, 12),)),
    ((12, 4), lambda w: w.split([1, 5, 6])[1], ((1, 6),)),
    ((12, 4), lambda w: w.narrow(0, 3, 2), ((3, 5),)),
    ((12, 4), lambda w: w.view(3, 4, 4)[1], ((4, 8),)),
    ((12, 4), lambda w: w.view(4, 3, 4)[:, 1], ((1, 2), (4, 5), (7, 8), (10, 11))),
    ((12, 4), lambda w: w.view(2, 3, 2, 4)[:, 2].reshape(-1, 4).contiguous(), ((4, 6), (10, 12))),
    ((12, 4), lambda w: w[::5], ((0, 1), (5, 6), (10, 11))),
    ((12, 4), lambda w: w[1:2].clone(), ((1, 2),)),
    ((4, 12), lambda w: w.t()[6:], ((6, 12),)),
    ((4, 12), lambda w: w[:, 2:5].t().half().float(), ((2, 5),)),
    ((12, 8), lambda w: w[:, 4:], None),
    ((12, 8), lambda w: w[3:5, 4:], ((3, 5),)),
    ((3, 5, 4), lambda w: w[2, 1:3], ((1, 3),)),
]


@pytest.mark.parametrize(("shape", "chain", "rows"), ROWS)
def test_rows_that_a_use_reads(shape: tuple[int, ...], chain: Callable[[Tensor], Tensor], rows: Any) -> None:
    site = site_of(shape, lambda x, w: linear(x, chain(w)))
    assert [use.rows for use in site.uses] == [rows]


def random_chain(rng: random.Random, w: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """Draw views and copies that lead from a tensor to a matrix."""
    steps: list[Callable[[Tensor], Tensor]] = []
    for _ in range(rng.randrange(1, 5)):
        w = steps[-1](w) if steps else w
        steps.append(_random_step(rng, w))
    w = steps[-1](w)
    axes = list(range(w.dim()))
    rng.shuffle(axes)
    cut = rng.randrange(1, w.dim()) if w.dim() > 1 else 1
    out = math.prod(w.shape[a] for a in axes[:cut])
    steps.append(lambda t: t.permute(axes).reshape(out, -1))
    return steps


def _random_step(rng: random.Random, w: Tensor) -> Callable[[Tensor], Tensor]:
    axis = rng.randrange(w.dim())
    n = w.shape[axis]
    start = rng.randrange(n)
    stop, step = rng.randrange(start + 1, n + 1), rng.choice([1, 1, 2])
    divisor = rng.choice([d for d in range(1, n + 1) if n % d == 0])
    order = rng.sample(range(w.dim()), w.dim())
    index: list[Any] = [slice(None)] * w.dim()
    index[axis] = slice(start, stop, step)
    choices: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.permute(order),
        lambda t: t[tuple(index)],
        lambda t: t.unflatten(axis, (divisor, n // divisor)),
        lambda t: t.double().contiguous(),
        lambda t: t.unsqueeze(axis),
        lambda t: t.flatten(),
    ]
    if w.dim() > 2:
        choices.append(lambda t: t.select(axis, start))
        choices.append(lambda t: t.flatten(0, 1))
    return rng.choice(choices)


@pytest.mark.parametrize("seed", range(150))
def test_form_and_rows_of_random_chains(seed: int) -> None:
    """Elements of one operand row lie in one row of the form, of one column in one column, and back."""
    rng = random.Random(seed)
    shape = tuple(rng.choice([2, 3, 4, 6]) for _ in range(rng.randrange(2, 4)))
    steps = random_chain(rng, torch.zeros(shape))

    def chained(w: Tensor) -> Tensor:
        for step in steps:
            w = step(w)
        return w

    numbers = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    operand = chained(numbers).long()
    model = Functional(shape, lambda x, w: linear(x, chained(w)))
    model.double()
    (site,) = match(trace(model, torch.randn(1, operand.shape[1], dtype=torch.float64)))
    assert len(site.uses) == 1
    if site.notes:
        assert site.form == rows_form(shape)
        return
    matrix = site.form.matrix(numbers).long()
    stack = matrix if matrix.dim() == 3 else matrix.unsqueeze(0)
    place = {
        int(v): (e, r, c) for e, m in enumerate(stack) for r, row in enumerate(m) for c, v in enumerate(row)
    }
    for i in range(operand.shape[0]):
        assert len({place[int(v)][:2] for v in operand[i]}) == 1
    for j in range(operand.shape[1]):
        assert len({(place[int(v)][0], place[int(v)][2]) for v in operand[:, j]}) == 1
    read = sorted({place[int(v)][1] for v in operand.flatten()})
    (rows,) = [use.rows for use in site.uses]
    said = range(site.form.out_features) if rows is None else [r for a, b in rows for r in range(a, b)]
    assert list(said) == read


def test_random_chains_seldom_fall_back() -> None:
    """The property above holds of most draws by a real form, not by the fallback."""
    falls = 0
    for seed in range(60):
        rng = random.Random(seed)
        shape = tuple(rng.choice([2, 3, 4, 6]) for _ in range(rng.randrange(2, 4)))
        steps = random_chain(rng, torch.zeros(shape))

        def forward(x: Tensor, w: Tensor, steps: list[Callable[[Tensor], Tensor]] = steps) -> Tensor:
            for step in steps:
                w = step(w)
            return F.linear(w.new_ones(1, w.shape[1]), w) + x.sum()

        falls += bool(site_of(shape, forward).notes)
    assert falls <= 12


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv.chunk(3)
        return F.linear(x, q) + F.linear(x, k) * F.linear(x, v)


def test_one_site_with_the_rows_of_each_use() -> None:
    (site,) = match(trace(Sliced(), torch.randn(2, 4)))
    assert [use.rows for use in site.uses] == [((0, 4),), ((4, 8),), ((8, 12),)]
    assert [use.home for use in site.uses] == ["", "", ""]
    assert not any(use.branch for use in site.uses)
    assert (
        site.uses[0].why
        == "linear with qkv in the forward of the model (Sliced), which is not a stock forward"
    )


class Stock(nn.Module):
    """Stock modules and look-alikes."""

    def __init__(self) -> None:
        super().__init__()

        class Named(nn.Linear):
            pass

        class Own(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x, self.weight, self.bias)

        self.embed = nn.Embedding(9, 4)
        self.plain = nn.Linear(4, 4)
        self.named = Named(4, 4)
        self.own = Own(4, 4)
        self.bypassed = nn.Linear(4, 4)
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="circular")
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4)
        self.volume = nn.Conv3d(4, 2, 1)
        self.norm = nn.LayerNorm(4)

    def forward(self, ids: Tensor) -> Any:
        x = self.own(self.named(self.plain(self.embed(ids))))
        x = self.norm(F.linear(x, self.bypassed.weight))
        image = x.mT.unsqueeze(-1)
        return self.conv(image), self.depthwise(x.mT), self.volume(image.unsqueeze(-1))


def test_branches_of_stock_homes() -> None:
    sites = sites_of(Stock(), torch.tensor([[1, 2, 3]]))
    found = {name: [(use.branch, use.why) for use in site.uses] for name, site in sites.items()}
    assert found["plain.weight"] == [(True, "stock forward of Linear")]
    assert found["named.weight"] == [(True, "stock forward of Linear, inherited by Named")]
    assert found["own.weight"] == [
        (False, "linear with own.weight in the forward of 'own' (Own), which is not a stock forward")
    ]
    assert found["bypassed.weight"] == [
        (
            False,
            "linear with bypassed.weight in the forward of the model (Stock), which is not a stock forward",
        )
    ]
    assert found["embed.weight"] == [(True, "stock forward of Embedding")]
    assert [found[f"{n}.weight"][0][0] for n in ("conv", "depthwise", "volume")] == [True] * 3
    assert sites["embed.weight"].form == columns_form((9, 4))
    assert sites["conv.weight"].form == rows_form((6, 2, 3, 3))
    assert {n: s.kind for n, s in sites.items()} == {
        "embed.weight": "embedding",
        "plain.weight": "linear",
        "named.weight": "linear",
        "own.weight": "linear",
        "bypassed.weight": "linear",
        "conv.weight": "conv",
        "depthwise.weight": "conv",
        "volume.weight": "conv",
    }
    assert (sites["conv.weight"].module, sites["conv.weight"].module_class) == ("conv", "Conv2d")
    assert (sites["conv.weight"].dtype, sites["conv.weight"].shape) == ("float32", (6, 2, 3, 3))


def test_forward_on_the_instance() -> None:
    """accelerate keeps the forward that it wraps; another one hides the class's."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        held = layer.forward
        layer.forward = lambda x, held=held: held(x)  # type: ignore[method-assign, misc]
    model[0]._old_forward = nn.Linear.forward.__get__(model[0])
    sites = sites_of(model, torch.randn(2, 4))
    assert [use.branch for site in sites.values() for use in site.uses] == [True, False]
    assert "behind a forward wrapped on the instance" in sites["0.weight"].uses[0].why
    assert "hides the class's" in sites["1.weight"].uses[0].why


@pytest.mark.parametrize(
    ("wrap", "name", "by"),
    [
        (parametrizations.weight_norm, "parametrizations.weight.original1", "weight_norm"),
        (nn.utils.weight_norm, "weight_v", "weight_norm"),
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), "weight_orig", "mul"),
        (parametrizations.spectral_norm, "parametrizations.weight.original", "div"),
        (nn.utils.spectral_norm, "weight_orig", "div"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_computed(wrap: Callable[[nn.Module], nn.Module], name: str, by: str) -> None:
    site = sites_of(nn.Sequential(wrap(nn.Linear(4, 6))), torch.randn(2, 4))[f"0.{name}"]
    assert (site.kind, site.form, [use.branch for use in site.uses]) == ("linear", rows_form((6, 4)), [False])
    assert f"the weight is computed by {by}" in site.uses[0].why


def test_a_standardised_convolution() -> None:
    def standardised(x: Tensor, w: Tensor) -> Tensor:
        flat = F.batch_norm(w.reshape(1, w.shape[0], -1), None, None, training=True)
        return F.conv1d(x.unsqueeze(-1), flat.reshape_as(w))

    site = site_of((6, 4, 1), standardised)
    assert (site.kind, site.form) == ("conv", rows_form((6, 4, 1)))
    assert "computed by batch_norm" in site.uses[0].why


@pytest.mark.parametrize(
    ("shape", "compute"),
    [
        ((2, 4), lambda w: w.repeat(3, 1)),
        ((3, 6, 4), lambda w: w.mean(0)),
        ((3, 2), lambda w: torch.kron(w, torch.ones(2, 2))),
        ((9, 4), lambda w: w[torch.tensor([0, 2, 3])]),
        ((6, 1), lambda w: w * torch.ones(4)),
    ],
    ids=["repeated", "averaged", "kronecker", "rows by number", "spread"],
)
def test_what_is_computed_from_weights_alone_is_a_weight(
    shape: tuple[int, ...], compute: Callable[[Tensor], Tensor]
) -> None:
    site = site_of(shape, lambda x, w: linear(x, compute(w)))
    assert (site.kind, site.form, site.unfit) == ("linear", rows_form(shape), None)
    assert [use.branch for use in site.uses] == [False]
    assert "computed by" in site.uses[0].why


@pytest.mark.parametrize(
    "pattern",
    [
        lambda x, w: linear(x, torch.ones_like(w)),
        lambda x, w: linear(x, torch.ones(24).view_as(w)),
        lambda x, w: linear(x, w.new_ones(6, 4)),
        lambda x, w: linear(x, torch.ones(1, 4).expand_as(w)),
    ],
)
def test_a_weight_that_is_a_pattern_alone_is_not_multiplied(
    pattern: Callable[[Tensor, Tensor], Tensor],
) -> None:
    site = site_of((6, 4), lambda x, w: pattern(x, w) + w.sum())
    assert site.uses == ()
    assert "never multiplied" in str(site.unfit)


def test_shuffled_elements_keep_no_form() -> None:
    site = site_of((6, 4), lambda x, w: linear(x, w.flip(0)))
    assert site.form == rows_form((6, 4))
    assert [use.rows for use in site.uses] == [None]
    assert "cuts across the axes" in site.notes[0]


class Tied(nn.Module):
    def __init__(self, head_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.head
        self.head_first = head_first

    def forward(self, ids: Tensor) -> Any:
        if self.head_first:
            return self.embed(self.head(torch.ones(1, 4)).argmax(-1)), self.head(self.embed(ids))
        return self.again(self.embed(ids))


def test_a_tied_embedding_is_one_site() -> None:
    (site,) = match(trace(Tied(), torch.tensor([1, 2])))
    assert site.names == ("embed.weight", "head.weight", "again.weight")
    assert (site.kind, site.form) == ("linear", columns_form((9, 4)))
    assert [(use.op, use.branch) for use in site.uses] == [("embedding", True), ("linear", True)]
    assert site.notes == ("form of embedding; linear (linear) uses its transpose",)
    (site,) = match(trace(Tied(head_first=True), torch.tensor([1, 2])))
    assert site.form == rows_form((9, 4))


def test_uses_that_disagree_fall_back_to_rows() -> None:
    def both(x: Tensor, w: Tensor) -> Tensor:
        return linear(x, w[0]) + linear(x, w.flatten(0, 1)).sum()

    site = site_of((3, 4, 4), both)
    assert site.form == rows_form((3, 4, 4))
    assert site.notes == ("rows by axis 0: linear and linear_1 use it differently",)
    assert [use.rows for use in site.uses] == [((0, 1),), None]


def test_an_axis_that_would_serve_twice_falls_back_to_rows() -> None:
    site = site_of((4, 4), lambda x, w: linear(x[:, :1], w.diagonal().unsqueeze(-1)))
    assert site.form == rows_form((4, 4))
    assert "cuts across the axes" in site.notes[0]


class Router(nn.Module):
    """Three experts, of which the run reaches one; a spare layer; tables that are only added."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            [nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in "abc"]
        )
        self.by_name = nn.ModuleDict(
            {"x": nn.Conv1d(4, 4, 1), "y": nn.Conv1d(4, 4, 1), "z": nn.Conv1d(4, 4, 3)}
        )
        self.spare = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(1, 4))
        self.unread = nn.Parameter(torch.randn(2, 2))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        expert = self.experts[1]
        y = expert["down"](expert["up"](x + self.table)) * self.scale
        self.spare(y)
        return self.by_name["x"](y.unsqueeze(-1))


class ShapeOnly(nn.Module):
    """One weight's result gives another tensor its shape alone; others' are written into such tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.whole, self.part, self.fill = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        empty = self.shape(x).new_zeros((x.shape[0], 0))
        filled = torch.empty_like(self.shape(x))
        filled.copy_(self.whole(x))
        sliced = torch.zeros_like(x)
        sliced[:, 1:] = self.part(x)[:, 1:]
        full = torch.full_like(self.shape(x), 2.0) + x.new_full((1,), self.fill(x).sum())
        return torch.cat([empty, filled, full], 1), sliced.expand_as(self.shape(x)).reshape_as(x)


def test_a_result_of_which_only_the_shape_is_used_has_no_effect() -> None:
    sites = sites_of(ShapeOnly(), torch.randn(2, 4))
    assert sites["shape.weight"].unfit == "no-effect: its result reaches no output of the run"
    assert (sites["whole.weight"].unfit, sites["part.weight"].unfit) == (None, None)
    # A fill value goes over Python, where no gradient follows.
    assert "its result reaches no output" not in str(sites["fill.weight"].unfit)


def test_what_the_run_did_not_reach() -> None:
    sites = sites_of(Router(), torch.randn(2, 4))
    assert sites["experts.0.up.weight"].twin == "experts.1.up.weight"
    assert sites["experts.2.down.weight"].twin == "experts.1.down.weight"
    assert sites["experts.2.down.weight"].uses == ()
    assert sites["by_name.y.weight"].twin == "by_name.x.weight"
    assert sites["by_name.y.weight"].kind == "conv"
    assert (sites["by_name.z.weight"].twin, sites["by_name.z.weight"].kind) == (None, "conv")
    assert sites["experts.1.up.weight"].twin is None
    assert sites["spare.weight"].unfit == "no-effect: its result reaches no output of the run"
    assert sites["table"].kind == "other"
    assert sites["table"].unfit == "read by add in '(root)'; never multiplied as a weight"
    assert (sites["unread"].kind, sites["unread"].unfit, sites["unread"].uses) == ("other", None, ())
    assert "scale" not in sites


def test_siblings_of_other_names_are_no_twins() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x)

    assert sites_of(Attention(), torch.randn(2, 4))["k.weight"].twin is None


def test_dead_uses_are_put_aside() -> None:
    def half_dead(x: Tensor, w: Tensor) -> Tensor:
        linear(x, w[:2])
        return linear(x, w[2:])

    site = site_of((6, 4), half_dead)
    assert [use.rows for use in site.uses] == [((2, 6),)]
    assert site.notes == ("1 of its 2 uses reach no output of the run",)
    assert site.unfit is None


def test_no_claim_of_no_effect_where_the_dataflow_is_broken() -> None:
    """A detour through numpy is not seen: what leads there may well have an effect."""
    site = site_of((6, 4), lambda x, w: torch.from_numpy(linear(x, w).numpy() * 2))
    assert site.unfit is None


def test_a_stack_of_weights_under_vmap() -> None:
    site = site_of((3, 5, 4), lambda x, w: torch.vmap(lambda one: linear(x, one))(w))
    assert site.form == stacked_form((3, 5, 4))
    site = site_of((5, 3, 4), lambda x, w: torch.vmap(lambda one: linear(x, one), in_dims=1)(w))
    assert site.form == MatrixForm((5, 3, 4), (5, 3, 4), (0,), (2,), (1,))


def test_functional_call_with_a_computed_weight() -> None:
    layer = nn.Linear(4, 4)
    site = site_of((4, 4), lambda x, w: torch.func.functional_call(layer, {"weight": w * 2}, (x,)))
    assert [use.why.partition(": ")[2] for use in site.uses] == ["the weight is computed by mul"]


def test_embedding_with_max_norm_is_unfit() -> None:
    (site,) = match(trace(nn.Embedding(9, 4, max_norm=1.0), torch.tensor([1])))
    assert "max_norm" in str(site.unfit)


def test_a_weight_that_is_written_into_is_computed() -> None:
    def overwritten(x: Tensor, w: Tensor) -> Tensor:
        copy = w.detach().clone()
        copy[0] = 0
        return linear(x, copy) + linear(x, w.detach())

    site = site_of((6, 4), overwritten)
    assert [use.why.partition(": ")[2] for use in site.uses] == ["the weight is computed by setitem", ""]


def test_lazy_parameters_are_unfit() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    unfit = "not initialised yet: run the model once first"
    sites = match(trace(model, torch.randn(2, 5)))
    assert [(s.name, s.shape, s.unfit) for s in sites] == [
        ("0.weight", (3, 5), unfit),
        ("1.weight", (2, 3), None),
    ]
    sites = sites_from_modules(model)
    assert [(s.name, s.unfit) for s in sites] == [("0.weight", unfit), ("0.bias", unfit), ("1.weight", None)]


def test_scripted_modules_are_unfit() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 2))
    sites = sites_of(model, torch.randn(2, 4))
    assert "TorchScript" in str(sites["0.weight"].unfit)
    assert sites["1.weight"].unfit is None
    assert [use.op for use in sites["0.weight"].uses] == ["addmm"]


def test_graph_modules_take_the_branch_in_their_own_graph() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 4))
            self.inner = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(F.linear(x, self.w) + F.linear(x, self.w[:6]))

    model = fx.symbolic_trace(Custom())
    sites = sites_of(model, torch.randn(2, 4))
    assert [(use.branch, use.why) for use in sites["w"].uses] == [
        (True, "in the module's own graph"),
        (False, "linear with w in the forward of the model (Custom): the weight is a view of the parameter"),
    ]
    assert sites["inner.weight"].uses[0].branch


def test_an_exported_program() -> None:
    program = torch.export.export(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), (torch.randn(2, 3, 3, 3),)
    )
    sites = sites_of(program.module(), torch.randn(2, 3, 3, 3))
    assert {n: (s.kind, [u.branch for u in s.uses]) for n, s in sites.items()} == {
        "0.weight": ("conv", [True]),
        "2.weight": ("linear", [True]),
    }


def test_non_contiguous_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    model.append(nn.Flatten())
    model.append(nn.Linear(4, 2))
    model[2].weight = nn.Parameter(torch.randn(4, 2).t())
    assert not model[2].weight.is_contiguous()
    sites = sites_of(model, torch.randn(1, 3, 3, 3))
    assert sites["0.weight"].form == rows_form((4, 3, 3, 3))
    assert sites["2.weight"].form == rows_form((2, 4))
    (site,) = match(trace(Transposed(), torch.randn(2, 4)))
    assert (site.form, [use.rows for use in site.uses]) == (columns_form((4, 6)), [((2, 4),)])


class Transposed(nn.Module):
    """A parameter that lies transposed in memory, sliced and transposed in use."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4).t())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w[:, 2:4].t())


@pytest.mark.parametrize("device", ["cpu", "meta", "fake"])
def test_sites_are_the_same_on_meta_and_fake_tensors(device: str) -> None:
    def sites() -> dict[str, Site]:
        model, x = Stock(), torch.zeros(1, 3, dtype=torch.long)
        return sites_of(model, x)

    wanted = sites()
    if device == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            found = sites()
    else:
        with torch.device(device):
            found = sites()
    assert found == wanted


def test_sites_from_the_module_tree() -> None:
    model = nn.ModuleDict(
        {"stock": Stock(), "tied": Tied(), "router": Router(), "mha": nn.MultiheadAttention(4, 2)}
    )
    sites = {site.name: site for site in sites_from_modules(model)}
    assert sites["tied.embed.weight"].names == ("tied.embed.weight", "tied.head.weight", "tied.again.weight")
    assert sites["stock.conv.weight"].kind == "conv"
    assert sites["stock.bypassed.weight"].kind == "linear"
    assert sites["mha.in_proj_weight"].kind == "attention"
    assert sites["router.table"].kind == "other"
    assert all(site.uses == () for site in sites.values())
    assert all(site.form.shape == site.shape for site in sites.values())


def test_sites_survive_json() -> None:
    for model, x in (
        (Sliced(), torch.randn(2, 4)),
        (Router(), torch.randn(2, 4)),
        (Tied(), torch.tensor([1])),
    ):
        for site in match(trace(model, x)):
            assert Site.from_json(site.to_json()) == site


def test_tiny_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 99,
    }
    ids = torch.randint(3, 90, (2, 8))
    bert = transformers.BertModel(transformers.BertConfig(**small)).eval()
    sites = match(trace(bert, {"input_ids": ids}))
    assert len(sites) == 16
    assert all(use.branch for site in sites for use in site.uses)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2)
    ).eval()
    fused = {s.name: s for s in match(trace(gpt2, {"input_ids": ids}))}["transformer.h.0.attn.c_attn.weight"]
    assert (fused.kind, fused.form) == ("matmul", columns_form((32, 96)))
    assert [(use.op, use.branch) for use in fused.uses] == [("addmm", True)]
    vit = transformers.ViTModel(transformers.ViTConfig(**small, image_size=32, patch_size=8)).eval()
    found = {s.name: s for s in match(trace(vit, torch.randn(1, 3, 32, 32)))}
    assert found["embeddings.cls_token"].unfit == "read by cat in 'embeddings'; never multiplied as a weight"
    assert sum(1 for s in found.values() if s.uses) == 14


class _Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.rest = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.empty(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([self.w, self.rest]))


def test_a_weight_without_numbers_is_skipped() -> None:
    model, x = _Empty(), torch.randn(2, 4)
    for found in (sites_of(model, x), {site.name: site for site in sites_from_modules(model)}):
        assert found["rest"].unfit == "it holds no numbers"
        assert found["w"].unfit is None
    plan = lora_fx.plan(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x)
    assert [d.name for d in plan.adapted] == ["w"]
    assert plan["rest"].reason.value == "unfit"
