"""Hugging Face's Trainer and Lightning in two processes: what they wrap, save, resume."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_fx
from lora_fx.checkpoints import adapter_state
from lora_fx.passes.sharded import whole
from tests.integration import test_lightning, test_trainer
from tests.integration.small import base, batch, gap


def trainer(rank: int, folder: Path) -> None:
    """DDP by Accelerate, over reentrant checkpoints: processes agree, and resuming changes no bit."""
    options = {
        "ddp_find_unused_parameters": False,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    warnings.simplefilter("ignore")
    model, resumed = test_trainer.adapted(), test_trainer.adapted()
    run = test_trainer.trainer(model, folder / "whole", **options)
    run.train()
    assert isinstance(run.model_wrapped, DistributedDataParallel)
    mine = torch.cat([p.detach().flatten() for p in lora_fx.parameters(model)])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both)
    checkpoint = folder / "whole" / "checkpoint-4"
    held = {p.name for p in checkpoint.iterdir() if p.suffix in {".safetensors", ".bin"}}
    assert held == {"lora_fx_default.safetensors", "training_args.bin"}
    test_trainer.trainer(resumed, folder / "resumed", **options).train(resume_from_checkpoint=str(checkpoint))
    assert test_trainer.states_equal(model, resumed)
    assert not test_trainer.states_equal(model, test_trainer.adapted())


class Sharded(test_lightning.Module):
    """A LightningModule that shards its network itself."""

    def configure_model(self) -> None:
        if self.trainer is None or isinstance(self.net, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for layers in (*self.net.blocks, [self.net.emb, self.net.head], self.net):
            fully_shard(layers, mesh=mesh)


def lightning(rank: int, folder: Path, sharded: bool) -> None:
    """DDP or FSDP2 by Lightning: checkpoints of adapters alone, and resuming changes no bit."""
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    def strategy() -> Any:
        if not sharded:
            return DDPStrategy(find_unused_parameters=False, process_group_backend="gloo")
        return ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo")

    warnings.simplefilter("ignore")
    kind = Sharded if sharded else test_lightning.Module
    model, resumed = kind(), kind()
    test_lightning.fit(model, folder / "whole", devices=2, strategy=strategy())
    first = folder / "whole" / "epoch=0.ckpt"
    held = torch.load(first, weights_only=False)["state_dict"]
    assert held
    assert all("lora_" in key and type(value) is torch.Tensor for key, value in held.items())
    test_lightning.fit(resumed, folder / "resumed", devices=2, strategy=strategy(), ckpt_path=first)
    left, right = ({k: whole(t) for k, t in adapter_state(m.net).items()} for m in (model, resumed))
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert isinstance(model.net, FSDPModule) == sharded
    lora_fx.save_adapter(model.net, folder / "adapter.safetensors")
    dist.barrier()
    loaded = lora_fx.load_adapter(base(tied=True), folder / "adapter.safetensors")
    assert gap(loaded, model.net) < 1e-6
    assert gap(loaded, base(tied=True)) > 1e-2
    assert torch.isfinite(loaded(batch(0))).all()
