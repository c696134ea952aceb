"""Transposed convolutions: every geometry, injected against folded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.kinds.conv_transpose import conv_transpose_form
from tests.by_hand import adapt, branched, check, distance, doubled, randomise

GEOMETRIES = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "output padding": {"stride": 2, "output_padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2, "stride": 2},
    "depthwise": {"groups": 4, "padding": 1},
    "without bias": {"bias": False},
}
MODULES = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("geometry", sorted(GEOMETRIES))
def test_invariant(dims: int, geometry: str) -> None:
    model = nn.Sequential(MODULES[dims](4, 8, 3, **GEOMETRIES[geometry]), nn.Tanh())
    model, inputs = doubled(model, torch.randn(2, 4, *[5] * dims))
    adapt(model)
    assert branched(model) == {"0.weight"}
    check(model, *inputs)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose1d(4, 4, 3, groups=4),
        nn.ConvTranspose1d(4, 8, 1, groups=2),
        nn.ConvTranspose2d(4, 2, 3, groups=2),
        nn.ConvTranspose2d(4, 8, 3, groups=4),
    ],
    ids=str,
)
def test_axes_of_one_entry_are_no_obstacle_to_a_branch(layer: nn.Module) -> None:
    model, (x,) = doubled(nn.Sequential(layer), torch.randn(2, 4, *[5] * (layer.weight.dim() - 2)))
    plain, dropped = (lora_fx.Policy(lora_fx.Rule(rank=2, dropout=p, compute="branch")) for p in (0.0, 0.5))
    lora_fx.inject(model, plain, x, seed=0)
    assert branched(model) == {"0.weight"}
    randomise(model)
    check(model, x)
    lora_fx.unload(model)
    lora_fx.inject(model.train(), dropped, x, seed=0)
    randomise(model)
    assert distance(model(x), model(x)) > 1e-6, "dropout acts on the branch's input"


def test_output_size_and_unbatched_inputs() -> None:
    layer, (x,) = doubled(nn.ConvTranspose2d(4, 3, 3, stride=2), torch.randn(2, 4, 5, 5))
    adapt(layer)
    sizes = [(11, 11), (12, 12), (11, 12)]
    for size in sizes:
        assert layer(x, size).shape[-2:] == size
        check(layer, x, output_size=size)
    check(layer, x[0])


def test_matrix_form_is_the_map_between_channels() -> None:
    # With a kernel of one tap, a transposed convolution is x -> matrix x, per group and position.
    groups, x = 2, torch.randn(1, 6, 4)
    layer = nn.ConvTranspose1d(6, 8, 1, groups=groups, bias=False)
    form = conv_transpose_form(tuple(layer.weight.shape), groups)
    stack = form.matrix(layer.weight)
    assert stack.shape == (2, 4, 3)
    wanted = torch.cat([stack[g] @ x[0, 3 * g : 3 * g + 3] for g in range(groups)])
    torch.testing.assert_close(layer(x)[0], wanted)
    torch.testing.assert_close(form.weight(stack), layer.weight)
