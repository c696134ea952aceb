"""The main job, end to end, on real data: adapt a small vision network to a new domain and ship it.

A network with convolutions, batch normalisation and fused-q/k/v attention learns to read scikit-learn's
handwritten digits. Then the camera changes (turned, mirrored, dim, noisy images) and it fails. As a user
would, this script loads the pretrained network, looks at the plan, injects adapters, trains them, saves
them, exports ONNX, and runs the file in onnxruntime. A second adapter with a fresh head learns another
task on the same base. Run it with ``make demo``; everything it makes lies in ``artifacts/demo``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx

OUT = Path("artifacts/demo")
console = Console()


class Attention(nn.Module):
    """Self-attention over the image's patches, with one fused weight for query, key and value."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """Attention and a feed-forward network, each with a residual connection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads=4)
        self.norm2 = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then transform each token."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class DigitNet(nn.Module):
    """8x8 images -> convolutions -> sixteen tokens -> two transformer blocks -> ten classes."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(32, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim), nn.ReLU())
        self.position = nn.Parameter(torch.zeros(1, 16, dim))
        self.blocks = nn.ModuleList([Block(dim) for _ in range(2)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return a score for each class."""
        x = self.down(self.stem(image)).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


Data = tuple[Tensor, Tensor]


def digits() -> tuple[Data, Data]:
    """Return (training, held-out) digits as (images, labels)."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, labels, test_size=0.3, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = (torch.from_numpy(part) for part in parts)
    return (x_train, y_train), (x_test, y_test)


def new_camera(data: Data, seed: int) -> Data:
    """The same digits as another camera sees them: turned by 90 degrees, mirrored, dim and noisy."""
    images, labels = data
    noise = 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return 0.6 * images.rot90(1, (2, 3)).flip(3) + noise, labels


def which_way_up(data: Data, seed: int) -> Data:
    """Another task on the same images: by how many quarter turns was the digit turned?"""
    images, _ = data
    turns = torch.randint(0, 4, (len(images),), generator=torch.Generator().manual_seed(seed))
    turned = torch.stack([x.rot90(int(k), (1, 2)) for x, k in zip(images, turns, strict=True)])
    return turned, turns


def train(model: nn.Module, data: Data, *, epochs: int, lr: float, label: str) -> None:
    """An ordinary training loop: it knows nothing of adapters."""
    images, labels = data
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, epochs * (len(images) // 128 + 1))
    for _ in track(range(epochs), label, console=console):
        for index in torch.randperm(len(images)).split(128):
            optimiser.zero_grad()
            F.cross_entropy(model(images[index]), labels[index]).backward()
            optimiser.step()
            schedule.step()
    model.eval()


def accuracy(predict: Callable[[Tensor], Tensor], data: Data) -> float:
    """Return the share of held-out images that are classified right."""
    with torch.no_grad():
        return float((predict(data[0]).argmax(dim=1) == data[1]).float().mean())


def in_onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the ONNX file as a function of a batch of images."""
    session = lora_fx.session(path)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def pretrain(data: Data, held_out: Data) -> Path:
    """Make the checkpoint that everything below starts from."""
    path = OUT / "digits.pt"
    model = DigitNet()
    train(model, data, epochs=20, lr=3e-3, label="pretraining the base     ")
    torch.save(model.state_dict(), path)
    console.print(f"base on its own domain: {accuracy(model, held_out):.1%} right\n")
    return path


def load(path: Path) -> DigitNet:
    """Load the base, as a user would."""
    model = DigitNet()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def main() -> None:
    """Run the whole story and show what came of it."""
    torch.manual_seed(0)
    OUT.mkdir(parents=True, exist_ok=True)
    train_data, test_data = digits()
    checkpoint = pretrain(train_data, test_data)
    shifted, shifted_test = new_camera(train_data, seed=1), new_camera(test_data, seed=2)
    turned, turned_test = which_way_up(train_data, seed=3), which_way_up(test_data, seed=4)
    example = test_data[0][:4]

    # 1. Load the base and look at what would be adapted, and why.
    model = load(checkpoint)
    base_accuracy = accuracy(model, shifted_test)
    base_certificate = lora_fx.export_onnx(model, OUT / "base.onnx", example)
    traced = lora_fx.trace(model, example)
    policy = lora_fx.Policy.default(rank=8)
    console.print(lora_fx.plan(traced, policy))

    # 2. Inject, train on the new camera, save, export with proof.
    lora_fx.inject(traced, policy, seed=0)
    train(model, shifted, epochs=30, lr=8e-3, label="adapting to the new camera")
    lora_fx.save_adapter(model, OUT / "camera.safetensors")
    certificate = lora_fx.export_onnx(model, OUT / "camera.onnx", example, base=OUT / "base.onnx")
    adapted_accuracy = accuracy(model, shifted_test)

    # 3. A second task on the same base: its own adapter, and a fresh head trained in full.
    second = lora_fx.Policy(lora_fx.Train(module="head"), lora_fx.Rule(role="qkvo", rank=4))
    lora_fx.inject(model, second, example, adapter="turns", seed=0)
    lora_fx.set_adapter(model, "turns")
    train(model, turned, epochs=30, lr=8e-3, label="learning a second task    ")
    lora_fx.save_adapter(model, OUT / "turns.safetensors", adapter="turns")
    turns_accuracy = accuracy(model, turned_test)
    turns_certificate = lora_fx.export_onnx(model, OUT / "turns.onnx", example, base=OUT / "base.onnx")
    lora_fx.set_adapter(model, "default")
    switched_back = accuracy(model, shifted_test)

    # 4. What came of it.
    batch = {"image": test_data[0][:16].numpy()}
    latency = lora_fx.compare_latency(OUT / "base.onnx", OUT / "camera.onnx", inputs=batch)
    audit = lora_fx.audit(OUT / "camera.onnx")
    console.print("\nThe audit, read back from camera.onnx:", style="bold")
    console.print(audit)
    console.print(certificate)
    table = Table(title="Held-out accuracy", title_style="bold")
    for column in ("task", "model", "torch", "onnxruntime"):
        table.add_column(column)
    rows = [
        ("new camera", "base", base_accuracy, OUT / "base.onnx", shifted_test),
        ("new camera", "adapted", adapted_accuracy, OUT / "camera.onnx", shifted_test),
        ("which way up", "second adapter", turns_accuracy, OUT / "turns.onnx", turned_test),
    ]
    for task, name, in_torch, path, data in rows:
        table.add_row(task, name, f"{in_torch:.2%}", f"{accuracy(in_onnxruntime(path), data):.2%}")
    console.print(table)
    console.print(f"switched back to the first adapter: {switched_back:.2%}")
    report_sizes(model, checkpoint)
    console.print(latency)
    for each in (base_certificate, certificate, turns_certificate):
        each.raise_for_failure()
    console.print(f"[bold green]Certificate holds.[/] Everything lies in {OUT}/")


def report_sizes(model: nn.Module, checkpoint: Path) -> None:
    """Say how small the adapter is."""
    trained = sum(p.numel() for p in lora_fx.parameters(model))
    everything = sum(p.numel() for p in load(checkpoint).parameters())
    adapter, base = (OUT / "camera.safetensors").stat().st_size, checkpoint.stat().st_size
    console.print(
        f"trained: {trained:,} of {everything:,} parameters ({trained / everything:.1%}); "
        f"adapter file {adapter / 1024:.0f} KiB, checkpoint {base / 1024:.0f} KiB"
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    main()
