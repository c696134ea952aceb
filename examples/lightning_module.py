"""PyTorch Lightning: a convolutional network learns mirrored digits; checkpoints hold the adapters alone.

Run it with ``python examples/lightning_module.py``; it needs lightning and scikit-learn.
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lora_fx
from lora_fx.lightning import AdapterCheckpoints

OUT = Path("artifacts/lightning")


def digits(*, mirrored: bool) -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return (x.flip(-1) if mirrored else x), torch.tensor(labels)


def pretrained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 9, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    x, y = digits(mirrored=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


class Mirrored(pl.LightningModule):
    """A LightningModule whose network is adapted; any other would do as well."""

    def __init__(self) -> None:
        super().__init__()
        x, _ = digits(mirrored=True)
        self.net = lora_fx.inject(pretrained(), lora_fx.Policy(lora_fx.Rule(rank=8)), x[:2], seed=0)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(-1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(lora_fx.parameters(self.net, lr_ratio=4, lr=3e-3))


def main() -> None:
    x, y = digits(mirrored=True)
    train = DataLoader(TensorDataset(x[:1300], y[:1300]), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(x[1300:], y[1300:]), batch_size=500)
    keep = ModelCheckpoint(OUT, monitor="accuracy", mode="max", filename="best", enable_version_counter=False)
    trainer = pl.Trainer(
        max_epochs=5, logger=False, enable_model_summary=False, callbacks=[AdapterCheckpoints(), keep]
    )
    module = Mirrored()
    before = trainer.validate(module, test, verbose=False)[0]["accuracy"]
    trainer.fit(module, train, test)
    lora_fx.save_adapter(module.net, OUT / "mirrored.safetensors")
    print(lora_fx.audit(module.net))
    print(f"accuracy on mirrored digits: {before:.1%} before, {keep.best_model_score:.1%} after")
    for file in sorted(OUT.iterdir()):
        print(f"{file.stat().st_size:>10,}  {file}")


if __name__ == "__main__":
    main()
