"""The fused linear against its composition: values, gradients, and everything that may look inside."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_fx.kinds import costs, fused_linear, stacked
from lora_fx.kinds.base import LivePart, LiveParts
from lora_fx.kinds.linear import adapted_linear, composed_linear

IN, OUT = 24, 36
FORMS = ("one", "scaled", "rows", "pieces", "scales", "sum")


@pytest.fixture(autouse=True)
def fused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the fused operation for small shapes too, where merging would be chosen."""
    torch.manual_seed(0)
    monkeypatch.setattr(costs, "SMALL_PRODUCT", 0)


def low_rank(rank: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(rank, IN, dtype=dtype) / 5, torch.randn(rows, rank, dtype=dtype) / 5
    return a.requires_grad_(), b.requires_grad_()


def parts_of(form: str, dtype: torch.dtype) -> LiveParts:
    if form == "one":
        return (LivePart(*low_rank(4, OUT, dtype), 1.0),)
    if form == "scaled":
        return (LivePart(*low_rank(4, OUT, dtype), 0.5),)
    if form == "rows":
        first = LivePart(*low_rank(4, 12, dtype), 0.5, ((0, 12),))
        return (first, LivePart(*low_rank(3, 12, dtype), 0.5, ((24, 36),)))
    if form == "pieces":
        return (LivePart(*low_rank(4, 18, dtype), 0.5, ((0, 6), (12, 18), (24, 30))),)
    if form == "scales":
        return (LivePart(*low_rank(4, OUT, dtype), 0.5), LivePart(*low_rank(2, 12, dtype), 2.0, ((3, 15),)))
    return (LivePart(*low_rank(4, OUT, dtype), 2.0), LivePart(*low_rank(4, OUT, dtype), 2.0))


def leaves(parts: LiveParts) -> list[Tensor]:
    return [t for part in parts for t in (part.a, part.b)]


def with_leaves(parts: LiveParts, tensors: tuple[Tensor, ...]) -> LiveParts:
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return tuple(part._replace(a=a, b=b) for part, (a, b) in zip(parts, pairs, strict=True))


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach() - wanted.detach()).norm() / wanted.detach().norm())


def inputs(dtype: torch.dtype, shape: tuple[int, ...] = (3, 7)) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(*shape, IN, dtype=dtype, requires_grad=True)
    return x, torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype)


@pytest.mark.parametrize("stride", [386, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_a_dimension_of_one_entry_keeps_the_bases_bits(stride: int, bias: bool) -> None:
    """Where its stride does not fold, F.linear without a bias multiplies in batches, with other bits."""
    torch.manual_seed(0)
    linear = nn.Linear(386, 768, bias=bias).requires_grad_(False)
    x = torch.randn(2, 386).as_strided((2, 1, 386), (386, stride, 1))
    part = LivePart(torch.randn(4, 386), torch.zeros(768, 4), 1.0)
    assert torch.equal(adapted_linear(x, linear.weight, linear.bias, lora=(part,)), linear(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (2, 3, 4), (0, 3)])
def test_values_and_gradients_are_the_compositions(
    form: str, dtype: torch.dtype, limit: float, shape: tuple[int, ...]
) -> None:
    (x, weight, bias), parts = inputs(dtype, shape), parts_of(form, dtype)
    assert fused_linear.fusable(x, weight, bias, parts)
    results = [adapted_linear(x, weight, bias, lora=parts), composed_linear(x, weight, bias, parts)]
    found, wanted = ([y, *torch.autograd.grad(y.square().sum(), [x, *leaves(parts)])] for y in results)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one, other) or distance(one, other) <= limit


def test_large_gradients_of_b_take_the_other_orientation() -> None:
    x, weight = torch.randn(2048, IN, requires_grad=True), torch.randn(OUT, IN)
    parts = parts_of("scaled", torch.float32)
    assert x.shape[0] * OUT >= stacked._LARGE_THIN
    found = torch.autograd.grad(adapted_linear(x, weight, lora=parts).square().sum(), leaves(parts))
    wanted = torch.autograd.grad(composed_linear(x, weight, None, parts).square().sum(), leaves(parts))
    assert all(distance(f, w) < 1e-6 for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_start_is_bit_equal_to_the_base(form: str) -> None:
    (x, weight, bias), parts = inputs(torch.float32), parts_of(form, torch.float32)
    parts = tuple(part._replace(b=torch.zeros_like(part.b)) for part in parts)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(adapted_linear(x, weight, bias, lora=parts), F.linear(x, weight, bias))


@pytest.mark.parametrize("many", [0, 1e9])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_twice(form: str, many: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "MANY", many)
    (_, weight, bias), parts = inputs(torch.float64), parts_of(form, torch.float64)

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return adapted_linear(x, weight, bias, lora=with_leaves(parts, tensors))

    small = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (small, *leaves(parts)), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (small, *leaves(parts)), fast_mode=True)


def test_trained_base_and_bias_get_their_gradients() -> None:
    (x, weight, bias), parts = inputs(torch.float64), parts_of("scaled", torch.float64)
    trained = [weight.requires_grad_(), bias.requires_grad_(), x]
    found = torch.autograd.grad(adapted_linear(x, weight, bias, lora=parts).square().sum(), trained)
    wanted = torch.autograd.grad(composed_linear(x, weight, bias, parts).square().sum(), trained)
    assert all(distance(f, w) < 1e-12 for f, w in zip(found, wanted, strict=True))


def test_small_products_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SMALL_PRODUCT", 1 << 20)
    (x, weight, bias), parts = inputs(torch.float32), parts_of("scaled", torch.float32)
    y = adapted_linear(x, weight, bias, lora=parts)
    assert "Fused" not in type(y.grad_fn).__name__
    found = torch.autograd.grad(y.square().sum(), [x, *leaves(parts)])
    reference = composed_linear(x, weight, bias, parts)
    wanted = torch.autograd.grad(reference.square().sum(), [x, *leaves(parts)])
    assert distance(y, reference) < 1e-6
    assert all(distance(f, w) < 1e-6 for f, w in zip(found, wanted, strict=True))


def test_many_rows_are_merged_in_both_directions() -> None:
    x, weight = torch.randn(512, IN, requires_grad=True), torch.randn(OUT, IN)
    parts = parts_of("scaled", torch.float32)
    y = adapted_linear(x, weight, lora=parts)
    assert y.grad_fn is not None
    assert y.grad_fn.call.merged  # type: ignore[attr-defined]
    found = [y, *torch.autograd.grad(y.square().sum(), [x, *leaves(parts)])]
    reference = composed_linear(x, weight, None, parts)
    wanted = [reference, *torch.autograd.grad(reference.square().sum(), [x, *leaves(parts)])]
    assert all(distance(f, w) < 1e-6 for f, w in zip(found, wanted, strict=True))
    zero = (parts[0]._replace(b=torch.zeros_like(parts[0].b)),)
    assert torch.equal(adapted_linear(x, weight, lora=zero), F.linear(x, weight))
    half = adapted_linear(x.bfloat16(), weight.bfloat16(), lora=parts)
    assert not half.grad_fn.call.merged  # type: ignore[union-attr]


def test_function_transforms_see_the_composition() -> None:
    (x, weight, bias), parts = inputs(torch.float64), parts_of("scaled", torch.float64)
    part = parts[0]

    def loss(a: Tensor, b: Tensor, row: Tensor) -> Tensor:
        return adapted_linear(row, weight, bias, lora=(part._replace(a=a, b=b),)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0))(part.a, part.b, x.detach())
    summed = [g.sum(0) for g in per_sample]
    wanted = torch.autograd.grad(loss(part.a, part.b, x.detach()), [part.a, part.b])
    assert all(distance(f, w) < 1e-12 for f, w in zip(summed, wanted, strict=True))
    tangent = torch.randn_like(part.a)
    _, moved = torch.func.jvp(lambda a: loss(a, part.b, x.detach()), (part.a.detach(),), (tangent,))
    assert distance(moved, (wanted[0] * tangent).sum()) < 1e-10


class Small(nn.Module):
    """A weight with a branch of its own, free of the passes."""

    def __init__(self, form: str = "scaled") -> None:
        super().__init__()
        self.base = nn.Linear(IN, OUT).requires_grad_(False)
        self.parts = parts_of(form, torch.float32)
        self.tensors = nn.ParameterList(leaves(self.parts))

    def forward(self, x: Tensor, branch: Callable[..., Tensor] = adapted_linear) -> Tensor:
        parts = with_leaves(self.parts, tuple(self.tensors))
        return branch(x, self.base.weight, self.base.bias, lora=parts).tanh()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, (x, _, _) = Small(), inputs(torch.float32)
    wanted = torch.autograd.grad(model(x).sum(), [x, *model.tensors])
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    found = [t.grad for t in (x, *model.tensors)]
    assert all(f is not None and torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def test_gradients_accumulate_and_graphs_can_be_kept() -> None:
    model, (x, _, _) = Small(), inputs(torch.float32)
    y = model(x).sum()
    y.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.tensors]
    y.backward()
    assert all(torch.allclose(p.grad, 2 * f) for p, f in zip(model.tensors, first, strict=True))


def test_compile_in_one_graph_matches_eager() -> None:
    model, (x, _, _) = Small(), inputs(torch.float32)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).sum(), [x, *compiled.tensors])
    wanted = torch.autograd.grad(model(x).sum(), [x, *model.tensors])
    assert all(distance(f, w) < 1e-6 for f, w in zip(found, wanted, strict=True))


def test_export_sees_plain_operations() -> None:
    model, (x, _, _) = Small(), inputs(torch.float32)
    program = torch.export.export(model, (x.detach(),))
    assert torch.allclose(program.module()(x.detach()), model(x), atol=1e-6)


def test_subclasses_meta_and_recorders_get_the_composition() -> None:
    class Mine(Tensor):
        pass

    (x, weight, bias), parts = inputs(torch.float32), parts_of("scaled", torch.float32)
    assert fused_linear.fusable(x, weight, bias, parts)
    assert not fused_linear.fusable(x.as_subclass(Mine), weight, bias, parts)
    assert not fused_linear.fusable(x.to("meta"), weight, bias, parts)
    calls: list[str] = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Recorder():
        adapted_linear(x, weight, bias, lora=parts)
    assert calls.count("linear") == 3
    with torch.device("cpu"):
        assert fused_linear.fusable(x, weight, bias, parts)


@pytest.mark.parametrize("shape", [(6, IN), (2, 3, IN)])
def test_strided_inputs_and_gradients(shape: tuple[int, ...]) -> None:
    (_, weight, bias), parts = inputs(torch.float64), parts_of("scaled", torch.float64)
    x = (
        torch.randn(*shape[::-1], dtype=torch.float64)
        .permute(*range(len(shape) - 1, -1, -1))
        .requires_grad_()
    )
    assert not x.is_contiguous()
    for branch in (adapted_linear, composed_linear):
        y = (
            branch(x, weight, bias, lora=parts)
            if branch is adapted_linear
            else branch(x, weight, bias, parts)
        )
        grads = torch.autograd.grad(y.sum(), [x, *leaves(parts)])  # an expanded gradient
        if branch is adapted_linear:
            found = [y, *grads]
        else:
            assert all(distance(f, w) < 1e-12 for f, w in zip(found, [y, *grads], strict=True))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_an_adapter_in_float32(kind: torch.dtype) -> None:
    x, weight, bias = inputs(torch.float64, (64,))
    a, b = (t.detach().float() for t in low_rank(4, OUT, torch.float64))
    exact = (LivePart(a.double().requires_grad_(), b.double().requires_grad_(), 0.5),)
    x, weight, bias = (t.detach().to(kind) for t in (x, weight, bias))

    def errors(run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[float]:
        ins = (x.clone().requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_())
        y = run(*ins)
        grads = torch.autograd.grad(y.float().square().sum(), ins)
        xd = x.double().requires_grad_()
        wanted = composed_linear(xd, weight.double(), bias.double(), exact)
        reference = torch.autograd.grad(wanted.square().sum(), [xd, exact[0].a, exact[0].b])
        return [distance(f.double(), w) for f, w in zip((y, *grads), (wanted, *reference), strict=True)]

    ours = errors(lambda x, a, b: adapted_linear(x, weight, bias, lora=(LivePart(a, b, 0.5),)))
    upcast = errors(  # what peft does: x in float32 through A and B, added to the base's result
        lambda x, a, b: F.linear(x, weight, bias) + (F.linear(F.linear(x.float(), a), b) * 0.5).to(kind)
    )
    assert all(mine <= 1.2 * theirs + 1e-4 for mine, theirs in zip(ours[:2], upcast[:2], strict=True))
    assert all(error < (0.02 if kind is torch.bfloat16 else 0.003) for error in ours)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters() -> None:
    (x, weight, bias), parts = inputs(torch.float32, (4, 16)), parts_of("scaled", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted_linear(x, weight, bias, lora=parts)
        base = F.linear(x, weight, bias)
        zero = adapted_linear(x, weight, bias, lora=(parts[0]._replace(b=torch.zeros_like(parts[0].b)),))
        assert torch.is_autocast_enabled("cpu")
    assert y.dtype is base.dtype is torch.bfloat16
    assert torch.equal(zero, base)
    grads = torch.autograd.grad(y.float().sum(), [x, *leaves(parts)])
    wanted = torch.autograd.grad(composed_linear(x, weight, bias, parts).sum(), [x, *leaves(parts)])
    assert all(g.dtype is torch.float32 for g in grads)
    assert all(distance(g, w) < 0.02 for g, w in zip(grads, wanted, strict=True))


def test_dropout_masks_come_again_in_the_backward() -> None:
    (x, weight, _), (part,) = inputs(torch.float64), parts_of("scaled", torch.float64)
    part = part._replace(dropout=0.3)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(3)
        return adapted_linear(x, weight, lora=(part._replace(a=a, b=b),))

    small = x.detach()[0, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (small, part.a, part.b), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (small, part.a, part.b), fast_mode=True)


def test_dropout_drops_as_often_as_it_says_and_keeps_the_mean() -> None:
    a, b = torch.eye(IN), torch.zeros(OUT, IN)
    b[:IN] = torch.eye(IN)
    ones, weight = torch.ones(40_000, IN), torch.zeros(OUT, IN)
    y = adapted_linear(ones, weight, lora=(LivePart(a, b, 1.0, None, 0.1),))[:, :IN]
    dropped = float((y == 0).float().mean())
    assert abs(dropped - 0.1) < 5 * (0.09 / y.numel()) ** 0.5
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.9), atol=1e-4)
    # Neighbours, near and one word apart, are independent.
    flat = (y == 0).float().flatten() - dropped
    for lag in (1, 2, 3, 4, IN):
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 5 * 0.09 / flat.numel() ** 0.5
