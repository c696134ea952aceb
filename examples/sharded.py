"""FSDP2: train adapters over several processes, save one file, and fold it on one.

The model is made without memory on the meta device, sharded, and only then filled. Run it with
``torchrun --nproc-per-node 2 examples/sharded.py``; two processors are enough.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import lora_fx
from lora_fx.checkpoints import materialise, reset_adapter

OUT = Path("artifacts/sharded")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    """A feed-forward network with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 256), nn.Linear(256, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def build() -> nn.Sequential:
    return nn.Sequential(*(Block(32) for _ in range(4)), nn.Linear(32, 1))


def pretrained_weights() -> dict[str, Tensor]:
    """Stand in for a checkpoint."""
    torch.manual_seed(0)
    return build().state_dict()


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1000 * rank + step)).to(DEVICE)
    return x, x[:, :4].sum(1, keepdim=True).sin()


def main() -> None:
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    rank = dist.get_rank()
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    with torch.device("meta"):
        model = build()
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=8)), torch.zeros(2, 32, device="meta"))
    for block in model:
        fully_shard(block)
    fully_shard(model)
    materialise(model, DEVICE)
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, pretrained_weights(), options=options)
    reset_adapter(model, seed=0)
    optimizer = torch.optim.AdamW(lora_fx.parameters(model), lr=3e-3)
    for step in range(200):
        x, y = batch(step, rank)
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 50 == 0:
            print(f"step {step:3}: loss {loss.item():.4f}")
    OUT.mkdir(parents=True, exist_ok=True)
    lora_fx.save_adapter(model, OUT / "adapter.safetensors")  # every process calls, the first one writes
    x, _ = batch(1, 99)
    sharded = model(x).detach().cpu()
    dist.barrier()  # a process that leaves while the other still works may take it down
    dist.destroy_process_group()
    if rank == 0:
        alone = build()
        alone.load_state_dict(pretrained_weights())
        lora_fx.fold(lora_fx.load_adapter(alone, OUT / "adapter.safetensors"))
        print(lora_fx.audit(OUT / "adapter.safetensors"))
        print(f"folded on one process, against sharded: {(alone(x.cpu()) - sharded).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
