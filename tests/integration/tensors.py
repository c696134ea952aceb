"""What two processes do with models that tensor parallelism splits after inject."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

import lora_fx
from lora_fx import Policy, Rule, Train
from lora_fx.checkpoints import adapter_state, reset_adapter
from lora_fx.errors import WrappedModelError
from lora_fx.passes.sharded import whole
from tests.integration.small import WORDS, batch, gap, loss, train, with_values

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-10}

Plan = dict[str, ParallelStyle]


class Block(nn.Module):
    """Attention with q, k and v apart, or (``fused``) in one weight, and a feed-forward."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.fused, self.size = fused, width // 4
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        parts = self.qkv(y).chunk(3, -1) if self.fused else (self.q(y), self.k(y), self.v(y))
        q, k, v = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in parts)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    def __init__(self, fused: bool = False, width: int = 16) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS + 1, width, padding_idx=3)
        self.blocks = nn.ModuleList(Block(width, fused) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS + 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


EVERY = Policy(Rule(rank=3))
POLICIES = {
    "every weight": EVERY,
    "rows": Policy(Rule(role="qv", rank=2), Rule(role=("up", "down"), rank=3)),
    "starts": Policy(Rule(role="qkvo", rank=2, init="pissa"), Rule(role=("up", "down"), rank=2, init="olora")),
    "magnitudes": Policy(
        Train(module="head"), Train(name="blocks.0.up.weight"), Rule(kind="linear", rank=2, dora=True), bias="all"
    ),
    "biases": Policy(Rule(kind="linear", rank=2), bias="lora_only"),
}


def net(fused: bool = False, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(fused).to(dtype)


def adapted(policy: str, fused: bool = False, dtype: torch.dtype = torch.float32) -> Net:
    model = net(fused, dtype)
    lora_fx.inject(model, POLICIES[policy], batch(0), seed=1)
    return model


def by_heads(fused: bool = False) -> Plan:
    """Attention and feed-forward as pairs, the embedding by words, the head by words."""
    plan: Plan = {"emb": RowwiseParallel(input_layouts=Replicate())}
    for name in ("blocks.0", "blocks.1"):
        first = ("up",) if fused else ("q", "k", "v", "up")
        plan |= {f"{name}.{key}": ColwiseParallel() for key in first}
        plan |= {f"{name}.{key}": RowwiseParallel() for key in (("down",) if fused else ("o", "down"))}
        if fused:
            plan[f"{name}.qkv"] = ColwiseParallel(output_layouts=Replicate())
            plan[f"{name}.o"] = RowwiseParallel(input_layouts=Replicate())
    plan["head"] = ColwiseParallel(output_layouts=Replicate())
    return plan


def by_sequence() -> Plan:
    """Between attention and feed-forward every process has some of the places of the sequence."""
    plan: Plan = {
        "emb": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for name in ("blocks.0", "blocks.1"):
        plan[name] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Shard(1))
        plan |= {f"{name}.{key}": SequenceParallel() for key in ("norm", "norm2")}
        plan |= {f"{name}.{key}": ColwiseParallel(input_layouts=Shard(1)) for key in ("q", "k", "v", "up")}
        scattered = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
        plan |= {f"{name}.{key}": scattered for key in ("o", "down")}
    return plan


def by_features(fused: bool = False) -> Plan:
    """The embedding by its dimensions; every linear gathers what it computes, one takes a DTensor."""
    plan: Plan = {"emb": ColwiseParallel(output_layouts=Replicate())}
    del fused
    for name in ("blocks.0", "blocks.1"):
        plan[f"{name}.up"] = ColwiseParallel(use_local_output=False)
        plan[f"{name}.down"] = RowwiseParallel()
        plan[f"{name}.o"] = ColwiseParallel(output_layouts=Replicate())
    return plan


PLANS = {"heads": by_heads, "sequence": lambda fused: by_sequence(), "features": by_features}


def split(model: Net, plan: str = "heads", *, fused: bool = False) -> Net:
    parallelize_module(model, init_device_mesh("cpu", (2,)), PLANS[plan](fused))
    return model


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return a difference over its size; of what is exactly zero, the difference."""
    difference, size = (whole(found.detach()) - wanted).norm(), wanted.norm()
    return float(difference / size if size else difference)


def assert_same_gradients(model: nn.Module, alone: nn.Module, rounding: float) -> None:
    """Adapters alone have gradients, laid out as they are; gathered, they are the one process's."""
    for each in (model, alone):
        each.zero_grad()
        loss(each, batch(1)).backward()
    found, wanted = dict(model.named_parameters()), dict(alone.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        mine = found[name]
        assert mine.requires_grad == parameter.requires_grad, name
        assert (mine.grad is None) == (parameter.grad is None), name
        if mine.grad is None or parameter.grad is None:
            continue
        if isinstance(mine, DTensor):
            assert isinstance(mine.grad, DTensor)
            assert mine.grad.placements == mine.placements, name
        if ".k.lora_full__bias" in name:  # attention is blind to it: what there is, is rounding
            assert float(whole(mine.grad).norm()) < rounding * float(wanted[name.replace(".k.", ".q.")].grad.norm())
            continue
        assert relative(mine.grad, parameter.grad) < rounding, name
    for each in (model, alone):
        each.zero_grad()


def computes_as_one(rank: int, folder: Path, policy: str, plan: str, fused: bool, exact: bool = True) -> None:
    """Forward, gradients, training, files both ways, folding and unloading, in both precisions."""
    for dtype, rounding in ROUNDING.items():
        model, alone = adapted(policy, fused, dtype), adapted(policy, fused, dtype)
        plain = split(net(fused, dtype), plan, fused=fused)
        split(model, plan, fused=fused)
        lora_fx.parameters(model)
        assert torch.equal(model(batch(9)), plain(batch(9))) or not exact
        if policy != "starts":
            with_values(alone)
            whole_ = adapter_state(alone)
            lora_fx.checkpoints.load_adapter_state(model, whole_)
        assert gap(alone, net(fused, dtype)) > 1e-3 or policy == "starts"
        assert gap(model, alone) < rounding
        assert_same_gradients(model, alone, rounding)
        with lora_fx.disable_adapter(model):
            assert torch.equal(model(batch(9)), plain(batch(9)))
        train(model)
        train(alone)
        assert gap(model, alone) < rounding
        comes_back(rank, folder, model, alone, policy, plan, fused, dtype)


def comes_back(
    rank: int,
    folder: Path,
    model: Net,
    alone: Net,
    policy: str,
    plan: str,
    fused: bool,
    dtype: torch.dtype,
) -> None:
    rounding, name = ROUNDING[dtype], str(dtype).rpartition(".")[2]
    before = model(batch(9)).detach()
    lora_fx.save_adapter(model, folder / f"{name}.safetensors")
    one = lora_fx.load_adapter(net(fused, dtype), folder / f"{name}.safetensors")
    assert gap(one, model) < rounding
    dcp.save({"adapter": adapter_state(model)}, checkpoint_id=folder / name)
    if rank == 0:
        lora_fx.save_adapter(one, folder / f"{name}.one.safetensors")
    dist.barrier()
    other = split(adapted(policy, fused, dtype), plan, fused=fused)
    lora_fx.load_adapter(other, folder / f"{name}.one.safetensors", replace=True)
    assert torch.equal(other(batch(9)), before)
    reset_adapter(other, seed=1)
    assert gap(other, adapted(policy, fused, dtype)) < rounding
    dcp.load({"adapter": adapter_state(other)}, checkpoint_id=folder / name)
    assert torch.equal(other(batch(9)), before)
    with lora_fx.folded(model):
        assert gap(model, one) < rounding
    assert torch.equal(model(batch(9)), before)
    plain = split(net(fused, dtype), plan, fused=fused)
    assert lora_fx.unload(other) is other
    assert torch.equal(other(batch(9)), plain(batch(9)))
    assert_same(other, plain)
    lora_fx.fold(model)
    lora_fx.fold(one)
    assert gap(model, one) < rounding
    assert type(model.blocks[0].up) is nn.Linear
    for key, tensor in one.state_dict().items():
        assert relative(model.state_dict()[key], tensor) < rounding, key


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Two models are alike: classes, names, flags, layouts and bits."""
    assert [type(m) for m in model.modules()] == [type(m) for m in other.modules()]
    found, wanted = dict(model.named_parameters()), dict(other.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert found[name].requires_grad == parameter.requires_grad, name
        assert getattr(found[name], "placements", None) == getattr(parameter, "placements", None), name
        assert torch.equal(whole(found[name]), whole(parameter)), name


def drops(rank: int, folder: Path) -> None:
    """Dropout: what all processes read is masked as one process masks it; own columns have own masks."""
    mesh, policy = init_device_mesh("cpu", (2,)), Policy(Rule(rank=2, dropout=0.25))
    for style in (ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(256, 8))
            models.append(lora_fx.inject(model, policy, torch.ones(2, 256), seed=1))
        model, alone = models
        with torch.no_grad():
            for parameter in lora_fx.parameters(alone):
                parameter.fill_(0.5)
        state = adapter_state(alone)
        parallelize_module(model, mesh, {"0": style})
        lora_fx.checkpoints.load_adapter_state(model, state)
        x = torch.ones(64, 256)
        results = []
        for each in (model, alone):
            torch.manual_seed(7)
            each.train()
            each(x).square().sum().backward()
            torch.manual_seed(7)
            results.append(each(x).detach())
        grads = [whole(p.grad) for p in (model[0]._parameters["lora_A__weight__default"],)]
        if isinstance(style, ColwiseParallel):
            assert relative(results[0], results[1]) < ROUNDING[torch.float32]
            assert relative(grads[0], alone[0]._parameters["lora_A__weight__default"].grad) < 1e-5
            continue
        # Of every row of ones, h is how many are kept: not the same of one half and of the other.
        first, second = grads[0][0].chunk(2)
        assert not torch.equal(first, second)
        model.eval()
        with lora_fx.disable_adapter(model):
            plain = model(x).detach()
        share = (results[0] - plain).mean() / (model(x).detach() - plain).mean()
        assert float(share) == pytest.approx(1, abs=0.02)


def switched(rank: int, folder: Path) -> None:
    """Two adapters: switching, and taking one out, as on one process."""
    models, rounding = [net(dtype=torch.float64) for _ in range(2)], ROUNDING[torch.float64]
    for model in models:
        lora_fx.inject(model, POLICIES["every weight"], batch(0), seed=1, adapter="a")
        lora_fx.inject(model, POLICIES["biases"], batch(0), seed=2, adapter="b")
    model, alone = models
    split(model)
    for adapter in ("a", "b", "a"):
        for each in models:
            lora_fx.set_adapter(each, adapter)
            train(each, steps=2)
        assert_same_gradients(model, alone, rounding)
        assert gap(model, alone) < rounding
    for each in models:
        lora_fx.unload(each, "a")
    assert gap(model, alone) < rounding
    train(model, steps=1)
    train(alone, steps=1)
    assert gap(model, alone) < rounding


def refused(rank: int, folder: Path) -> None:
    """What is refused, each by name: at parallelize_module, or where it is asked for."""
    mesh = init_device_mesh("cpu", (2,))
    tied = net()
    tied.head.weight = tied.emb.weight
    lora_fx.inject(tied, EVERY, batch(0))
    for style in (ColwiseParallel(), RowwiseParallel()):
        with pytest.raises(WrappedModelError, match="another module holds"):
            parallelize_module(tied, mesh, {"head": style})
    convs = lora_fx.inject(nn.Sequential(nn.Conv2d(3, 4, 3)), Policy(Rule(rank=1)))
    with pytest.raises(WrappedModelError, match="adapters on Conv2d"):
        distribute_module(convs, mesh)
    counted = lora_fx.inject(
        nn.Sequential(nn.Embedding(8, 4, scale_grad_by_freq=True)), Policy(Rule(rank=1))
    )
    with pytest.raises(WrappedModelError, match="scale_grad_by_freq"):
        parallelize_module(counted, mesh, {"0": RowwiseParallel(input_layouts=Replicate())})
    plane = init_device_mesh("cpu", (2, 1))
    flat = lora_fx.inject(nn.Sequential(nn.Linear(4, 4)), Policy(Rule(rank=1)))
    with pytest.raises(WrappedModelError, match="mesh of one dimension"):
        distribute_module(flat, plane)
    half = lora_fx.inject(nn.Sequential(nn.Linear(4, 4)), Policy(Rule(rank=1)))
    spread = nn.Parameter(distribute_tensor(half[0]._parameters["weight"].detach(), mesh, [Shard(0)]))
    half[0]._parameters["weight"] = spread
    with pytest.raises(WrappedModelError, match="beside an adapter that is none"):
        half(distribute_tensor(torch.ones(2, 4), mesh, [Replicate()]))
    model = split(adapted("every weight"))
    with pytest.raises(WrappedModelError, match="DTensor"):
        lora_fx.verify(model, batch(0))
    with pytest.raises(WrappedModelError, match="DTensor"):
        lora_fx.export_onnx(model, folder / "model.onnx", batch(0))
    with pytest.raises(WrappedModelError, match="DTensor"):
        lora_fx.inject(model, EVERY, batch(0), adapter="late")
    with pytest.raises(WrappedModelError, match="Inject first"):
        lora_fx.inject(split(net()), EVERY, batch(0))


def sharded_too(rank: int, folder: Path, policy: str) -> None:
    """Four processes: split in pairs, then sharded by FSDP2 across the pairs; batches are halved."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    place = mesh.get_local_rank("dp")

    def spread() -> Net:
        model = adapted(policy)
        parallelize_module(model, mesh["tp"], by_heads())
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])

    model, alone = spread(), adapted(policy)
    train(model, rank=place, of=2)
    train(alone)
    assert gap(model, alone) < ROUNDING[torch.float32]
    before = model(batch(9)).detach()
    lora_fx.save_adapter(model, folder / "a.safetensors")
    dist.barrier()
    one = lora_fx.load_adapter(net(), folder / "a.safetensors")
    assert gap(one, model) < ROUNDING[torch.float32]
    other = spread()
    lora_fx.load_adapter(other, folder / "a.safetensors", replace=True)
    assert torch.equal(other(batch(9)), before)
    with lora_fx.folded(model):
        assert gap(model, one) < ROUNDING[torch.float32]
    assert torch.equal(model(batch(9)), before)
    lora_fx.unload(other)
    assert gap(other, net()) < ROUNDING[torch.float32]
    lora_fx.fold(model)
    assert gap(model, one) < ROUNDING[torch.float32]
