"""Injected models under what torch does to models: compile, function transforms, hooks, half precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx import Policy, Rule
from lora_fx.errors import WrappedModelError
from tests.integration.small import Convs, adapted, base, batch, convs, gap, image, loss, rules, with_values

MODELS: dict[str, Callable[[], nn.Module]] = {
    "branches, tied": lambda: adapted(tied=True),
    "a weight read functionally": lambda: adapted(odd=True),
    "magnitudes": lambda: adapted(dora=True),
    "a start": lambda: adapted(init="pissa"),
    "convolutions": lambda: convs(Policy(Rule(rank=2))),
    "statistics": lambda: convs(Policy(Rule(rank=2), norm_stats="train", bias="all")),
}
each_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    model = with_values(MODELS[name]()).to(dtype)
    return model, image(0).to(dtype) if isinstance(model, Convs) else batch(0)


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach() - wanted.detach()).norm() / wanted.detach().norm())


def slopes(model: nn.Module, value: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value.square().mean(), lora_fx.parameters(model))


@pytest.mark.parametrize("name", ["branches, tied", "a weight read functionally", "magnitudes", "statistics"])
def test_compiled_in_one_graph_and_once_for_each_state(name: str) -> None:
    model, x = build(name)
    lora_fx.inject(model, Policy(Rule(rank=1)), x, adapter="second", seed=3)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def graphs() -> int:
        assert apart(compiled(x), copy.deepcopy(model)(x)) < 1e-6
        return counters["stats"]["unique_graphs"]

    seen: list[int] = []
    for _ in range(2):
        for adapter in ("default", "second"):
            lora_fx.set_adapter(model, adapter)
            seen.append(graphs())
            with lora_fx.disable_adapter(model):
                seen.append(graphs())
    assert len(set(seen[:4])) == 3, "default, disabled, second: each has its graph"
    assert len(set(seen[3:])) == 1, "and no state has two"


@each_model
def test_function_transforms(name: str) -> None:
    model, x = build(name, torch.float64)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    model.eval()

    def value(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, parameters, (row[None],)).square().sum()

    total = model(x).square().sum()
    summed = {n: g.sum(0) for n, g in vmap(grad(value), (None, 0))(trained, x).items()}
    tuned = [p for p in model.parameters() if p.requires_grad]
    wanted = dict(zip(trained, torch.autograd.grad(total, tuned), strict=True))
    assert all(apart(summed[n], wanted[n]) < 1e-10 for n in trained)
    tangents = {n: torch.ones_like(p) for n, p in trained.items()}
    _, moved = jvp(lambda p: functional_call(model, p, (x,)).square().sum(), (trained,), (tangents,))
    assert apart(moved, torch.stack([g.sum() for g in wanted.values()]).sum()) < 1e-10
    # Values of the base's weights and of the adapter's are taken alike.
    doubled = {n: 2 * p.detach() for n, p in model.named_parameters()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert apart(functional_call(model, doubled, (x,)), other(x)) < 1e-12


def test_an_ensemble_of_adapters_is_one_call() -> None:
    models = [with_values(adapted(tied=True), seed) for seed in range(3)]
    x, skeleton = batch(0), copy.deepcopy(models[0])
    together = vmap(lambda p, b: functional_call(skeleton, (p, b), (x,)))(*stack_module_state(models))
    assert all(apart(y, model(x)) < 1e-6 for y, model in zip(together, models, strict=True))


@each_model
def test_gradients_of_gradients(name: str) -> None:
    model, x = build(name, torch.float64)
    model.eval()
    parameters = lora_fx.parameters(model)
    directions = [torch.randn_like(p) for p in parameters]

    def steepness() -> Tensor:
        first = torch.autograd.grad(model(x).square().mean(), parameters, create_graph=True)
        return torch.stack([g.square().sum() for g in first]).sum()

    def moved(step: float) -> float:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
        return float(steepness().detach())

    found = torch.autograd.grad(steepness(), parameters)
    along = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True))
    up, down = moved(1e-6), moved(-2e-6)
    assert abs(along - (up - down) / 2e-6) < 1e-5 * abs(along)


@each_model
def test_offloaded_and_checkpointed_activations(name: str) -> None:
    model, x = build(name)
    wanted = slopes(model, model(x))
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        with torch.autograd.graph.save_on_cpu():
            value = run(x)
        assert all(torch.equal(f, w) for f, w in zip(slopes(model, value), wanted, strict=True))


@each_model
def test_deterministic_mode(name: str) -> None:
    runs: list[tuple[Tensor, ...]] = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            model, x = build(name)
            value = model(x)
            runs.append((value, *slopes(model, value)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["branches, tied", "magnitudes", "convolutions"])
def test_autocast_keeps_gradients_in_float32(name: str, dtype: torch.dtype) -> None:
    model, x = build(name)
    wanted = model(x)
    with torch.autocast("cpu", dtype):
        found = model(x)
    limit = 2e-2 if dtype is torch.bfloat16 else 3e-3
    assert found.dtype is dtype
    assert apart(found.float(), wanted) < limit
    # Large losses: of a mean, float16 loses the gradients that a scaler would keep.
    parameters = lora_fx.parameters(model)
    grads = [torch.autograd.grad(y.float().square().sum(), parameters) for y in (found, wanted)]
    pairs = list(zip(*grads, strict=True))
    assert all(f.dtype is torch.float32 and apart(f, w) < 2 * limit for f, w in pairs)


def test_a_float16_base_with_a_gradient_scaler_learns_and_skips_what_overflows() -> None:
    model = base().half()
    lora_fx.inject(model, Policy(Rule(rank=4)), batch(0), seed=1)
    parameters = lora_fx.parameters(model)
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    losses: list[float] = []
    for _ in range(6):
        value = loss(model, batch(0))
        losses.append(float(value))
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    before, scale = [p.detach().clone() for p in parameters], scaler.get_scale()
    scaler.scale(loss(model, batch(1)) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    assert scaler.get_scale() < scale


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}])
def test_channels_last_stays(options: dict[str, object]) -> None:
    policy = Policy(Rule(rank=2, **options))
    model, other = with_values(convs(policy)), with_values(convs(policy))
    model.to(memory_format=torch.channels_last)
    seen: list[Tensor] = []
    model.second.register_forward_hook(lambda module, args, output: seen.append(output))
    found, wanted = model(image(0).to(memory_format=torch.channels_last)), other(image(0))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert apart(found, wanted) < 1e-6
    pairs = zip(slopes(model, found), slopes(other, wanted), strict=True)
    assert all(apart(f, w) < 1e-5 for f, w in pairs)


def test_averages_keep_ties_and_can_be_saved(tmp_path: Path) -> None:
    model = adapted(tied=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    before = [p.detach().clone() for p in lora_fx.parameters(model)]
    average.update_parameters(model)  # the first one copies
    with_values(model)
    average.update_parameters(model)
    kept = lora_fx.parameters(average.module)
    for mean, old, new in zip(kept, before, lora_fx.parameters(model), strict=True):
        torch.testing.assert_close(mean, (old + new) / 2)
    assert average.module.head.lora_A__weight__default is average.module.emb.lora_A__weight__default
    lora_fx.save_adapter(average.module, tmp_path / "a.safetensors")
    assert gap(lora_fx.load_adapter(base(tied=True), tmp_path / "a.safetensors"), average.module) < 1e-6


def test_submodules_compiled_after_inject_keep_their_names(tmp_path: Path) -> None:
    model, wanted = with_values(adapted(tied=True)), with_values(adapted(tied=True))
    for index in range(2):
        model.blocks[index] = torch.compile(model.blocks[index], backend="eager")
    assert gap(model, wanted) < 1e-6
    lora_fx.save_adapter(model, tmp_path / "a.safetensors")
    assert gap(lora_fx.load_adapter(base(tied=True), tmp_path / "a.safetensors"), wanted) < 1e-6
    lora_fx.load_adapter(model, tmp_path / "a.safetensors", replace=True)
    assert lora_fx.verify(model, batch(0)).ok
    with lora_fx.folded(model):
        assert gap(model, wanted) < 1e-6
    assert gap(lora_fx.fold(model), wanted) < 1e-6
    with pytest.raises(WrappedModelError, match="Inject first"):
        lora_fx.inject(model, rules(), batch(0))


def test_synchronised_normalisations_come_before_inject(tmp_path: Path) -> None:
    policy = Policy(Rule(rank=2))
    early = nn.SyncBatchNorm.convert_sync_batchnorm(Convs.seeded())
    assert lora_fx.parameters(lora_fx.inject(early, policy, seed=1))
    late = nn.SyncBatchNorm.convert_sync_batchnorm(convs(policy))
    with pytest.raises(WrappedModelError, match="before inject"):
        lora_fx.parameters(late)
    with pytest.raises(WrappedModelError, match="before inject"):
        lora_fx.save_adapter(late, tmp_path / "never.safetensors")


def test_statistics_that_move_are_probed_in_train_mode() -> None:
    model = convs(Policy(Rule(rank=2), norm_stats="train", bias="all"))
    assert model.training
    assert lora_fx.verify(model, image(0)).ok
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(image(1))
    moved = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert moved == {n for n in before if "lora" in n}


def test_the_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        model = lora_fx.inject(base(), Policy(Rule(rank=4)), batch(0))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_checkpoints_over_a_frozen_embedding() -> None:
    """Reentrant checkpoints want an input with a gradient, where the embedding is frozen."""
    policy = Policy(Rule(module=("up", "down"), rank=4))
    model = with_values(lora_fx.inject(base(), policy, batch(0), seed=1))
    wanted = torch.autograd.grad(loss(model, batch(0)), lora_fx.parameters(model))
    for reentrant in (True, False):
        h = model.emb(batch(0)).requires_grad_(reentrant)
        for block in model.blocks:
            h = checkpoint(block, h, use_reentrant=reentrant)
        F.cross_entropy(model.head(h).flatten(0, 1), batch(0).flatten()).backward()
        found = [p.grad for p in lora_fx.parameters(model)]
        assert all(f is not None and torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
        model.zero_grad()
