"""Small models and subjects for the tests about ONNX: every way in which a weight is laid out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_fx.certificates import Certificate
from lora_fx.passes.changes import Change
from lora_fx.passes.export_onnx import export_subject
from lora_fx.passes.onnx_export_job import ExportOptions
from lora_fx.passes.onnx_inputs import split_inputs
from lora_fx.passes.onnx_state import with_values
from lora_fx.passes.onnx_subject import Subject


class Mixed(nn.Module):
    """Convolution and normalisation (fused at export), fused attention (transposed), a Gemm head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.o = nn.Linear(width, width)
        self.p = nn.Linear(width, width)
        self.head = nn.Linear(width, 10)
        settle(self)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(image))).flatten(2).transpose(1, 2)
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        x = x - self.p(x)
        return self.head(x.mean(1))


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 12)
        self.up = nn.Linear(12, 12)
        self.head = nn.Linear(12, 50, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(self.emb(ids))))


class Recurrent(nn.Module):
    """An LSTM, whose gates lie in another order in ONNX, and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(10, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])[0]


def settle(model: nn.Module) -> None:
    """Give every normalisation statistics and weights that are not zeros and ones."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
            for parameter in module.parameters():
                parameter.data.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a model with given random state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def subject(model: nn.Module, names: Sequence[str], *, size: float = 0.05, seed: int = 1) -> Subject:
    """A subject in which the named parameters change by a random amount; no adapter is needed for it."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    changes: dict[str, Change] = {}
    for name in names:
        before = parameters[name].detach()
        names_of = tuple(n for n, p in parameters.items() if p is parameters[name])
        step = torch.randn(before.shape, generator=generator) * size
        changes[name] = Change(names_of, before, before + step.to(before.dtype))

    @contextmanager
    def base() -> Generator[nn.Module]:
        yield model

    @contextmanager
    def folded() -> Generator[nn.Module]:
        with with_values(model, {name: change.after for name, change in changes.items()}):
            yield model

    return Subject(base, folded, folded, changes, '{"plan": "of the test"}')


def export(given: Subject, model: nn.Module, inputs: object, path: Path, **options: Any) -> Certificate:
    """Export a subject; options are those of ``export_onnx``."""
    base, least = options.pop("base", None), options.pop("min_retained", 0.25)
    return export_subject(
        given, path, split_inputs(model, inputs), ExportOptions(**options), base=base, min_retained=least
    )


def export_pair(
    model: nn.Module, names: Sequence[str], inputs: object, folder: Path, **options: Any
) -> tuple[Path, Path, Certificate]:
    """Export ``base.onnx`` and ``folded.onnx``, and return the certificate of the second."""
    base, folded = folder / "base.onnx", folder / "folded.onnx"
    return base, folded, export(subject(model, names), model, inputs, folded, base=base, **options)
