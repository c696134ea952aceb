"""What is compared: the frozen floor, twice; peft; lora_fx; full fine-tuning."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field

import torch
from torch import nn

import lora_fx
from tests.benchmarks.models import Case, Forward

NAMES = ("floor", "floor again", "peft", "lora_fx", "full")


@dataclass(frozen=True)
class Setup:
    """One line of the table: which layers, which rank, which precision."""

    case: Case
    rank: int = 16
    layers: str = "all"
    precision: str = "float32"
    dropout: float = 0.0
    compiled: bool = False
    device: str = "cpu"

    @property
    def name(self) -> str:
        """The line's name."""
        extra = [f"r={self.rank}", self.layers, self.precision]
        extra += [f"dropout {self.dropout}"] if self.dropout else []
        extra += ["compiled"] if self.compiled else []
        return f"{self.case.name}, {', '.join(extra)}"


@dataclass
class Arm:
    """One way to train one model; ``seconds`` of CPU per step."""

    name: str
    model: nn.Module
    loss: Forward
    injection: float = 0.0
    device: str = "cpu"
    seconds: list[float] = field(default_factory=list[float])
    trained: list[nn.Parameter] = field(default_factory=list[nn.Parameter])

    def step(self) -> None:
        """One forward and backward; the gradients are dropped."""
        self.loss(self.model).backward()
        for parameter in self.trained:
            parameter.grad = None


def arms(setup: Setup, names: tuple[str, ...] = NAMES) -> list[Arm]:
    """Build every arm from copies of one model."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if setup.precision == "bfloat16" else torch.float32
    base = setup.case.build().to(setup.device, dtype)
    loss = setup.case.forward(dtype, setup.precision == "autocast", setup.device)
    return [_arm(name, copy.deepcopy(base), loss, setup) for name in names]


def _arm(name: str, model: nn.Module, loss: Forward, setup: Setup) -> Arm:
    model.requires_grad_(name == "full")
    pattern = setup.case.every if setup.layers == "all" else setup.case.qv
    started = time.process_time()
    if name == "peft":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(
                r=setup.rank, lora_alpha=setup.rank, lora_dropout=setup.dropout, target_modules=pattern
            ),
        )  # type: ignore[assignment]
    elif name == "lora_fx":
        rule = lora_fx.Rule(name=f"re:{pattern}\\.weight", rank=setup.rank, dropout=setup.dropout)
        dtype = next(model.parameters()).dtype
        lora_fx.inject(model, lora_fx.Policy(rule), setup.case.example(dtype, setup.device), seed=0)
    injection = time.process_time() - started
    model.train()
    for module in model.modules():
        # Frozen statistics everywhere: lora_fx freezes them by default, the others are made to.
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    arm = Arm(name, model, loss, injection, setup.device)
    arm.trained = [p for p in model.parameters() if p.requires_grad]
    if setup.compiled:
        compiled = torch.compile(model)
        arm.loss = lambda _: loss(compiled)
    return arm
