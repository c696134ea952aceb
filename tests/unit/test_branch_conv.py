"""The merged convolution against its branch: every geometry, gradient form and memory format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from lora_fx.kinds import fused_conv
from lora_fx.kinds.base import LivePart
from lora_fx.kinds.conv import adapted_conv1d, adapted_conv2d, adapted_conv3d

CONVS = {1: (adapted_conv1d, F.conv1d), 2: (adapted_conv2d, F.conv2d), 3: (adapted_conv3d, F.conv3d)}
GEOMETRIES = [
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"dilation": 2},
    {"groups": 2, "padding": 1},
    {"groups": 4},
    {"padding": "same"},
    {"padding": "valid"},
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def setup(
    dims: int, groups: int = 1, dtype: torch.dtype = torch.float64, size: int = 7, out: int = 8, rank: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight = torch.randn(out, 4 // groups, *(3,) * dims, dtype=dtype)
    x = torch.randn(2, 4, *(size,) * dims, dtype=dtype, requires_grad=True)
    a = torch.randn(rank, weight[0].numel(), dtype=dtype, requires_grad=True)
    b = torch.randn(out, rank, dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(out, dtype=dtype), a, b


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("how", GEOMETRIES, ids=str)
@pytest.mark.parametrize("thin", [True, False])
def test_is_the_convolution_with_the_effective_weight(
    dims: int, how: dict[str, object], thin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias, a, b = setup(dims, int(str(how.get("groups", 1))), rank=1 if thin else 4)
    adapted, plain = CONVS[dims]
    y = adapted(x, weight, bias, **how, lora=(LivePart(a, b, 0.5),))
    wanted = plain(x, weight + 0.5 * (b @ a).view(weight.shape), bias, **how)
    found = torch.autograd.grad(y.square().sum(), [x, a, b])
    grads = torch.autograd.grad(wanted.square().sum(), [x, a, b])
    assert distance(y, wanted) < 1e-12
    assert all(distance(f, w) < 1e-12 for f, w in zip(found, grads, strict=True))


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("groups", [1, 4])
def test_gradcheck_twice(rank: int, groups: int) -> None:
    x, weight, bias, a, b = setup(1, groups, size=16, rank=rank)
    how = fused_conv.geometry(1, 1, 0, 1, groups)
    assert how is not None
    assert fused_conv.fusable(x, weight, bias, (LivePart(a, b, 0.5),), how)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return adapted_conv1d(x, weight, bias, groups=groups, lora=(LivePart(a, b, 0.5),))

    assert torch.autograd.gradcheck(run, (x, a, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, a, b), fast_mode=True)


@pytest.mark.parametrize("rank", [1, 8])
def test_both_gradient_forms_are_taken(rank: int) -> None:
    x, weight, bias, a, b = setup(2, rank=rank, size=16)
    y = adapted_conv2d(x, weight, bias, lora=(LivePart(a, b, 1.0),))
    assert y.grad_fn is not None
    assert y.grad_fn.call.thin == (rank == 1)  # type: ignore[attr-defined]


def test_starts_bit_equal_and_keeps_the_memory_format() -> None:
    x, weight, bias, a, _ = setup(2, dtype=torch.float32, size=16)
    zero = torch.zeros(8, 2, requires_grad=True)
    for memory in (torch.contiguous_format, torch.channels_last):
        for other in (torch.contiguous_format, torch.channels_last):
            xs, ws = x.detach().contiguous(memory_format=memory), weight.contiguous(memory_format=other)
            xs.requires_grad_()
            y = adapted_conv2d(xs, ws, bias, lora=(LivePart(a, zero, 1.0),))
            wanted = F.conv2d(xs, ws, bias)
            assert torch.equal(y, wanted)
            assert y.stride() == wanted.stride()
            grad, expected = torch.autograd.grad(y.sum(), xs)[0], torch.autograd.grad(wanted.sum(), xs)[0]
            assert torch.equal(grad, expected)
            assert grad.stride() == expected.stride()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 8, 1),
        nn.Conv2d(16, 8, 1, groups=4),
        nn.Conv2d(1, 8, 3),
        nn.Conv2d(16, 32, 3, groups=16),
        nn.ConvTranspose2d(16, 8, 1),
        nn.ConvTranspose2d(16, 8, 1, groups=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("compute", ["auto", "weight"])
def test_a_kernel_with_axes_of_one_entry_keeps_its_memory_format(layer: nn.Conv2d, compute: Any) -> None:
    model = nn.Sequential(layer).to(memory_format=torch.channels_last).requires_grad_(requires_grad=False)
    x = torch.randn(2, layer.in_channels, 10, 10)
    wanted = model(x)
    assert layer.weight.is_contiguous()
    assert wanted.is_contiguous(memory_format=torch.channels_last)
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2, compute=compute)), x)
    y = model(x)
    with lora_fx.folded(model):
        folded = model(x)
    lora_fx.unload(model)
    assert torch.equal(y, wanted)
    assert torch.equal(folded, wanted)
    assert y.stride() == folded.stride() == wanted.stride()


def test_trained_weight_and_bias_get_their_gradients() -> None:
    x, weight, bias, a, b = setup(2, size=16)
    trained = [weight.requires_grad_(), bias.requires_grad_()]
    y = adapted_conv2d(x, weight, bias, lora=(LivePart(a, b, 0.5),))
    wanted = F.conv2d(x, weight + 0.5 * (b @ a).view(weight.shape), bias)
    found = torch.autograd.grad(y.square().sum(), trained)
    grads = torch.autograd.grad(wanted.square().sum(), trained)
    assert all(distance(f, w) < 1e-12 for f, w in zip(found, grads, strict=True))


def test_half_precision_dropout_and_transforms_take_the_branch() -> None:
    x, weight, bias, a, b = setup(2, dtype=torch.float32, size=16)
    how = fused_conv.geometry(2, 1, 0, 1, 1)
    part = LivePart(a, b, 1.0)
    assert how is not None
    assert fused_conv.fusable(x, weight, bias, (part,), how)
    assert not fused_conv.fusable(x, weight, bias, (part._replace(dropout=0.1),), how)
    assert not fused_conv.fusable(x, weight, bias, (part._replace(rows=((0, 8),)),), how)
    assert not fused_conv.fusable(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), (part,), how)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused_conv.fusable(x, weight, bias, (part,), how)
    per_sample = torch.func.vmap(lambda row: adapted_conv2d(row[None], weight, bias, lora=(part,))[0])(x)
    assert distance(per_sample, adapted_conv2d(x, weight, bias, lora=(part,))) < 1e-6


def test_few_places_take_the_branch() -> None:
    x, weight, bias, a, b = setup(2, size=3, out=64)
    how = fused_conv.geometry(2, 1, 0, 1, 1)
    assert how is not None
    assert not fused_conv.fusable(x, weight, bias, (LivePart(a, b, 1.0),), how)


def test_the_branch_keeps_the_memory_format_of_a_single_place() -> None:
    weight = torch.randn(8, 4, 1, 1)
    x = torch.randn(2, 4, 1, 1).as_strided((2, 4, 1, 1), (4, 1, 4, 4))  # channels last, where strides say it
    part = LivePart(torch.randn(2, 4), torch.randn(8, 2), 1.0)
    wanted = F.conv2d(x, weight)
    assert adapted_conv2d(x, weight, lora=(part,)).stride() == wanted.stride()
