"""What two processes do with fused weights, odd widths, heads, biases, and several adapters of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import lora_fx
from lora_fx import Policy, Rule, Train
from lora_fx.checkpoints import adapter_state, materialise, reset_adapter
from lora_fx.errors import WrappedModelError
from tests.integration.small import WORDS, batch, gap, loss, train
from tests.integration.work import ROUNDING


class Attention(nn.Module):
    """A fused q, k, v and widths that two processes cannot halve."""

    def __init__(self, width: int = 18, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.emb = nn.Embedding(WORDS, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width + 1), nn.Linear(2 * width + 1, width)
        self.head = nn.Linear(width, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(h + self.down(F.gelu(self.up(h))))


POLICIES = {
    "rows, heads, biases": Policy(
        Train(module="head"),
        Rule(role="qv", rank=2),
        Rule(role=("up", "down"), rank=3, dora=True),
        Rule(kind="embedding", rank=2),
        bias="all",
    ),
    "rows with a start": Policy(
        Train(module="head"),
        Rule(role="qv", rank=2, init="pissa"),
        Rule(role=("up", "down"), rank=3, init="olora"),
        bias="lora_only",
    ),
}


def attention(dtype: torch.dtype = torch.float32) -> Attention:
    torch.manual_seed(0)
    return Attention().to(dtype)


def adapted_attention(policy: str, seed: int = 1, dtype: torch.dtype = torch.float32) -> nn.Module:
    return lora_fx.inject(attention(dtype), POLICIES[policy], batch(0), seed=seed)


def by_layers(model: nn.Module) -> None:
    for layer in (model.qkv, model.out, model.up, model.down, model.head):
        fully_shard(layer)
    fully_shard(model)


def unsharded_afterwards(model: nn.Module) -> None:
    fully_shard(model, reshard_after_forward=False)


def replicated_and_sharded(model: nn.Module) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))


def fused(rank: int, folder: Path, policy: str, shard: Callable[[nn.Module], None]) -> None:
    """Train, save, fold, and come back: from a file of shards, of one machine, and of dcp."""
    model, alone = adapted_attention(policy), adapted_attention(policy)
    shard(model)
    train(model, rank=rank, of=2)
    train(alone)
    assert gap(model, alone) < ROUNDING
    lora_fx.save_adapter(model, folder / "sharded.safetensors")
    assert gap(lora_fx.load_adapter(attention(), folder / "sharded.safetensors"), alone) < ROUNDING
    before = model(batch(9)).detach()
    with lora_fx.folded(model):
        assert gap(model, alone) < ROUNDING
    assert torch.equal(model(batch(9)), before)
    dcp.save({"adapter": adapter_state(model)}, checkpoint_id=folder / "dcp")
    whole = adapted_attention(policy, seed=5)
    dcp.load({"adapter": adapter_state(whole)}, checkpoint_id=folder / "dcp")
    assert gap(whole, alone) < ROUNDING
    if rank == 0:
        lora_fx.save_adapter(alone, folder / "alone.safetensors")
    torch.distributed.barrier()
    other = adapted_attention(policy, seed=5)
    shard(other)
    assert gap(other, alone) > 1e-2
    lora_fx.load_adapter(other, folder / "alone.safetensors", replace=True)
    assert gap(other, alone) < ROUNDING
    train(other, rank=rank, of=2, steps=1, first=3)
    train(alone, steps=1, first=3)
    assert gap(other, alone) < ROUNDING
    lora_fx.fold(other)
    assert gap(other, alone) < ROUNDING
    assert other.state_dict().keys() == attention().state_dict().keys()


def fused_from_meta(rank: int, folder: Path, policy: str) -> None:
    with torch.device("meta"):
        model = Attention()
        lora_fx.inject(model, POLICIES[policy], torch.zeros(2, 5, dtype=torch.long))  # all of it on meta
    by_layers(model)
    materialise(model, "cpu")
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, attention().state_dict(), options=options)
    reset_adapter(model, seed=1)
    alone = adapted_attention(policy)
    assert gap(model, alone) < ROUNDING
    train(model, rank=rank, of=2)
    train(alone)
    assert gap(model, alone) < ROUNDING


def bfloat16_base(rank: int, folder: Path) -> None:
    """Adapters in float32 beside a base in bfloat16, in one group."""
    policy = "rows, heads, biases"
    model, alone = (adapted_attention(policy, dtype=torch.bfloat16) for _ in range(2))
    fully_shard(model)
    train(model, rank=rank, of=2)
    train(alone)
    assert {p.dtype for p in lora_fx.parameters(model)} == {torch.float32}
    assert gap(model, alone) < 1e-2
    assert gap(alone, attention(torch.bfloat16)) > 2e-2
    lora_fx.fold(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert gap(model, lora_fx.fold(alone)) < 1e-2
    train_whole(model, rank)
    train_whole(alone)
    assert gap(model, alone) < 1e-2


def train_whole(model: nn.Module, rank: int | None = None) -> None:
    """One step of everything: gradients are reduced in the base's own precision now."""
    x = batch(0) if rank is None else batch(0).chunk(2)[rank]
    for parameter in model.parameters():
        parameter.requires_grad_()
    loss(model, x).backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()


def _with_two(policy: str, other: str) -> nn.Module:
    model = adapted_attention(policy)
    return lora_fx.inject(model, POLICIES[other], batch(0), adapter="second", seed=3)


def switching_sharded(rank: int, folder: Path) -> None:
    """What a switch makes trainable is trained, though the root's parameters were gathered then."""
    model, alone = _with_two(*POLICIES), _with_two(*POLICIES)
    fully_shard(model.qkv)
    fully_shard(model)
    for adapter in ("default", "second", "default"):
        for each in (model, alone):
            lora_fx.set_adapter(each, adapter)
        before = alone(batch(9)).detach()
        train(model, rank=rank, of=2)
        train(alone)
        assert gap(model, alone) < ROUNDING
        assert float((alone(batch(9)) - before).norm() / before.norm()) > 1e-2
    lora_fx.save_adapter(model, folder / "second.safetensors", "second")
    lora_fx.set_adapter(alone, "second")
    assert gap(lora_fx.load_adapter(attention(), folder / "second.safetensors"), alone) < ROUNDING


def switching_replicated(rank: int, folder: Path) -> None:
    """DDP synchronises what was trained when it was made: another adapter wants another wrapper."""
    model, alone = _with_two(*POLICIES), _with_two(*POLICIES)
    for adapter in ("default", "second", "default"):
        for each in (model, alone):
            lora_fx.set_adapter(each, adapter)
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
        train(wrapped, model, rank=rank, of=2)
        train(alone)
        assert gap(model, alone) < ROUNDING
    # A reference without adapters between steps, as preference training runs it.
    with torch.no_grad(), lora_fx.disable_adapter(model):
        wrapped(batch(0))
    train(wrapped, model, rank=rank, of=2, steps=1)
    lora_fx.set_adapter(model, "second")
    with torch.no_grad():
        wrapped(batch(0))
    with pytest.raises(WrappedModelError, match="new DistributedDataParallel"):
        loss(wrapped, batch(0))
    late = attention()
    wrapped = DistributedDataParallel(late)
    lora_fx.inject(wrapped.module, POLICIES["rows, heads, biases"], batch(0), seed=1)
    with pytest.raises(WrappedModelError, match="does not synchronise"):
        loss(wrapped, batch(0))
    lora_fx.unload(late)
    loss(wrapped, batch(0))
