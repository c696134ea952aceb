"""What the two processes of the distributed tests do; each asserts, and leaves files for the parent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lora_fx
from lora_fx.checkpoints import adapter_state, load_adapter_state, materialise, reset_adapter
from lora_fx.errors import LoraFxError, WeightWriteError, WrappedModelError
from tests.integration.small import Net, adapted, base, batch, gap, loss, rules, train

ROUNDING = 1e-5


def sharded(model: Net, **options: object) -> Net:
    """Shard a model as its makers would: block by block, tied weights in one group."""
    if model.head._parameters["weight"] is model.emb._parameters["weight"]:
        fully_shard([model.emb, model.head], **options)
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def reference(*, tied: bool, odd: bool, **options: object) -> Net:
    model = adapted(tied=tied, odd=odd, **options)
    train(model)
    return model


def ddp(rank: int, folder: Path, tied: bool, odd: bool, options: dict) -> None:
    model = adapted(tied=tied, odd=odd, **options)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    train(wrapped, model, rank=rank, of=2)
    alone = reference(tied=tied, odd=odd, **options)
    assert gap(model, alone) < ROUNDING
    if rank == 0:
        lora_fx.save_adapter(model, folder / "adapter.safetensors")
    optimizer = torch.optim.AdamW(lora_fx.parameters(model), lr=1e-2)
    first, second = batch(3).chunk(2)[rank].chunk(2)
    with wrapped.no_sync():
        (loss(wrapped, first) / 2).backward()
    (loss(wrapped, second) / 2).backward()
    optimizer.step()
    train(alone, steps=1, first=3)
    assert gap(model, alone) < ROUNDING
    with pytest.raises(WrappedModelError, match="Inject first"):
        lora_fx.inject(wrapped, rules(), batch(0), adapter="late")
    with pytest.raises(LoraFxError, match=r"\.module"):
        lora_fx.save_adapter(wrapped, folder / "wrapped.safetensors")


def fsdp2(rank: int, folder: Path, tied: bool, odd: bool, options: dict) -> None:
    model = sharded(adapted(tied=tied, odd=odd, **options))
    train(model, rank=rank, of=2)
    alone = reference(tied=tied, odd=odd, **options)
    assert gap(model, alone) < ROUNDING
    # After a forward without backward the root's parameters are still gathered: all below must not care.
    before = model(batch(9)).detach()
    lora_fx.save_adapter(model, folder / "adapter.safetensors")
    bits = {k: v.to_local().clone() for k, v in adapter_state(model).items()}
    with lora_fx.folded(model):
        assert gap(model, alone) < ROUNDING
        assert type(model).__name__ == "FSDPNet"
    assert torch.equal(model(batch(9)), before)
    assert all(torch.equal(v.to_local(), bits[k]) for k, v in adapter_state(model).items())
    with lora_fx.disable_adapter(model):
        assert gap(model, base(tied=tied, odd=odd)) < ROUNDING
    with pytest.raises(WrappedModelError, match="FSDPModule"):
        lora_fx.verify(model, batch(0))
    with pytest.raises(WrappedModelError, match="Inject first"):
        lora_fx.inject(model, rules(), batch(0), adapter="late")
    torch.distributed.barrier()
    assert torch.equal(model(batch(9)), before)
    # Back: a file into a sharded model that has other values.
    other = sharded(adapted(tied=tied, odd=odd, **options))
    assert gap(other, alone) > 1e-2
    lora_fx.load_adapter(other, folder / "adapter.safetensors", replace=True)
    assert torch.equal(other(batch(9)), before)
    train(other, rank=rank, of=2, steps=1)
    at_once = lora_fx.unload(sharded(adapted(tied=tied, odd=odd, **options)))
    assert gap(at_once, base(tied=tied, odd=odd)) < ROUNDING
    unloaded(other, rank, tied=tied, odd=odd)
    folded_for_good(model, alone, rank)


def unloaded(model: Net, rank: int, *, tied: bool, odd: bool) -> None:
    """What is left is the sharded base: its bits, and FSDP2 gathers nothing else."""
    model(batch(9))
    assert lora_fx.unload(model) is model
    plain = base(tied=tied, odd=odd)
    assert_gathers_to(model, plain.state_dict())
    assert gap(model, plain) < ROUNDING
    assert_trains_as(model, plain, rank)


def folded_for_good(model: Net, alone: Net, rank: int) -> None:
    """Folded sharded, a model is the one that is folded whole."""
    model(batch(9))
    assert lora_fx.fold(model) is model
    lora_fx.fold(alone)
    assert gap(model, alone) < ROUNDING
    assert type(model).__name__ == "FSDPNet"
    assert_gathers_to(model, alone.state_dict(), ROUNDING)
    assert_trains_as(model, alone, rank)


def assert_gathers_to(model: Net, wanted: dict[str, torch.Tensor], rounding: float = 0.0) -> None:
    """The gathered state dict has these keys and values."""
    found = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert float((found[name] - tensor).norm()) <= rounding * float(tensor.norm()), name


def assert_trains_as(model: Net, alone: Net, rank: int) -> None:
    """All of the model is trained, as on one machine."""
    model.reshard()  # after a forward without backward the root's are gathered copies
    for each, (first, last) in ((model, (rank, 2)), (alone, (0, 1))):
        assert all(parameter.requires_grad for parameter in each.parameters())
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for step in range(2):
            loss(each, batch(step).chunk(last)[first]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert gap(model, alone) < ROUNDING
    assert_gathers_to(model, alone.state_dict(), ROUNDING)


def mixed_precision(rank: int, folder: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(adapted(), mp_policy=policy)
    train(model, rank=rank, of=2)
    assert all(p.dtype == torch.float32 for p in lora_fx.parameters(model))
    alone = adapted()
    train(alone)
    assert gap(model, alone) < 3e-2
    lora_fx.save_adapter(model, folder / "adapter.safetensors")
    loaded = lora_fx.load_adapter(base(), folder / "adapter.safetensors")
    assert gap(model, loaded) < 3e-2
    whole = dict(lora_fx.AdapterFile.read(folder / "adapter.safetensors").tensors)
    assert all(t.dtype == torch.float32 for t in whole.values())


def distributed_checkpoint(rank: int, folder: Path) -> None:
    model = sharded(adapted(init="pissa"))
    train(model, rank=rank, of=2)
    before = model(batch(9)).detach()
    dcp.save({"adapter": adapter_state(model)}, checkpoint_id=folder / "dcp")
    other = sharded(adapted(init="pissa"))
    dcp.load({"adapter": adapter_state(other)}, checkpoint_id=folder / "dcp")
    assert torch.equal(other(batch(9)), before)
    # Saved from shards, loaded on one machine.
    single = adapted(init="pissa")
    dcp.load({"adapter": adapter_state(single)}, checkpoint_id=folder / "dcp")
    assert gap(single, model) < ROUNDING
    # And by names, from a plain state.
    load_adapter_state(other, adapter_state(adapted(init="pissa")))
    assert gap(other, adapted(init="pissa")) < ROUNDING


def from_meta(rank: int, folder: Path, tied: bool) -> None:
    with torch.device("meta"):
        model = Net(tied=tied)
    lora_fx.inject(model, rules(dora=True), seed=None)
    sharded(model)
    materialise(model, "cpu")
    if tied:
        assert model.head._parameters["weight"] is model.emb._parameters["weight"]
    weights = base(tied=tied).state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                full = torch.distributed.tensor.distribute_tensor(
                    weights[name], parameter.device_mesh, parameter.placements
                )
                parameter.copy_(full)
    reset_adapter(model, seed=1)
    # The same policy on the same information: without example inputs.
    alone = lora_fx.inject(base(tied=tied), rules(dora=True), seed=1)
    assert gap(model, alone) < ROUNDING
    train(model, rank=rank, of=2)
    train(alone)
    assert gap(model, alone) < ROUNDING


def wrappers(rank: int, folder: Path) -> None:
    """What is refused: each of torch's wrappers, before and after."""
    mesh = init_device_mesh("cpu", (2,))
    plan = {"blocks.0.up": ColwiseParallel(), "blocks.0.down": RowwiseParallel()}
    with pytest.raises(WrappedModelError, match=r"DTensor.*Inject first, then parallelize_module"):
        lora_fx.inject(parallelize_module(base(), mesh, plan), rules(), batch(0))


def flat_parameters(rank: int, folder: Path) -> None:
    """FSDP1 replaces weights by a flat parameter: it is refused, with what to use instead."""
    with pytest.raises(WeightWriteError, match="fully_shard"):
        FullyShardedDataParallel(adapted(), use_orig_params=True, device_id=torch.device("cpu"))
