"""Where peft and lora_fx are right, wrong, or refuse: ``python -m tests.zoo.compare_peft``, into PEFT.md.

Both are asked for everything: peft for every module of a class that it wraps, by name, tied heads too. Each
is held to its own word: the adapted model against the same model after the library's own merge.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lora_fx
from tests import conftest  # noqa: F401 - torchvision, where its operators do not load
from tests.odd_models import ODD_MODELS
from tests.zoo.catalogue import build
from tests.zoo.measure import EVERYTHING, far, outputs_of

TOLERANCE = 1e-4
ZOO = (
    "transformers/gpt2",
    "transformers/llama",
    "transformers/bert",
    "transformers/t5",
    "transformers/mixtral",
    "transformers/xlnet",
    "transformers/mamba",
    "transformers/wav2vec2",
    "transformers/segformer",
    "transformers/convnext",
    "timm/test_vit",
    "timm/test_byobnet",
)
_WRAPPED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention)


def with_lora_fx(model: nn.Module, inputs: dict[str, Any]) -> tuple[float, str]:
    """Return the share of elements adapted, and the verdict on the injected against the folded model."""
    lora_fx.inject(model, EVERYTHING, inputs, seed=0)
    fill(lora_fx.parameters(model))
    found = outputs_of(model, inputs)
    silent = without_gradient(dict(enumerate(lora_fx.parameters(model))), found)
    names = [d.name for d in lora_fx.plan(model, EVERYTHING, inputs).adapted]
    lora_fx.fold(model)
    return adapted_share(model, names), verdict(found, outputs_of(model, inputs), silent)


def with_peft(model: nn.Module, inputs: dict[str, Any]) -> tuple[float, str]:
    """The same with peft, on every module of the classes that its documentation lists."""
    import peft
    from transformers.pytorch_utils import Conv1D

    targets = [n for n, m in model.named_modules() if isinstance(m, (*_WRAPPED, Conv1D)) and n]
    config = peft.LoraConfig(r=2, target_modules=targets)
    wrapped = peft.inject_adapter_in_model(config, model)
    adapters = {n: p for n, p in wrapped.named_parameters() if "lora_" in n}
    fill(list(adapters.values()))
    found = outputs_of(wrapped, inputs)
    silent = without_gradient(adapters, found)
    for module in list(wrapped.modules()):
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.merge()
    return adapted_share(model, targets, modules=True), verdict(found, outputs_of(wrapped, inputs), silent)


def fill(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def without_gradient(parameters: dict[Any, nn.Parameter], found: list[Tensor]) -> int:
    live = [o for o in found if o.requires_grad]
    slopes = torch.autograd.grad(
        sum(o.square().sum() for o in live), list(parameters.values()), allow_unused=True
    )
    return sum(slope is None for slope in slopes)


def verdict(found: list[Tensor], merged: list[Tensor], silent: int) -> str:
    difference = far([o.detach() for o in found], [o.detach() for o in merged])
    right = difference <= TOLERANCE
    text = "right" if right else f"**wrong**: adapted and merged differ by {difference:.1g}"
    return text if not silent else f"{text}; {silent} adapters without a gradient"


def adapted_share(model: nn.Module, names: list[str], *, modules: bool = False) -> float:
    parameters = {n: p.numel() for n, p in model.named_parameters() if p.dim() >= 2 and "lora_" not in n}
    parameters = {n.replace(".base_layer", ""): size for n, size in parameters.items()}
    held = set(names)
    taken = sum(s for n, s in parameters.items() if (n.rpartition(".")[0] if modules else n) in held)
    return taken / sum(parameters.values())


def judged(method: Callable[..., tuple[float, str]], model: nn.Module, inputs: dict[str, Any]) -> str:
    """Return a table cell."""
    try:
        share, text = method(copy.deepcopy(model), inputs)
    except Exception as error:  # noqa: BLE001 - a refusal is a finding
        said = " ".join(str(error).split())[:90].replace("|", "/")
        return f"refuses: {type(error).__name__}: {said}"
    return f"{text} ({share:.0%})"


def subjects() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Return the odd models and those of the zoo, with their inputs."""
    import inspect

    found: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    for name, (make, inputs) in ODD_MODELS.items():
        torch.manual_seed(0)
        model = make().eval()
        found[f"odd: {name}"] = model, {next(iter(inspect.signature(model.forward).parameters)): inputs()}
    return {**found, **{name: build(name) for name in ZOO}}


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    import peft

    write = sys.stdout.write
    write("# peft and lora_fx on the same models\n\n")
    write(f"peft {peft.__version__}, asked for every module of a class that it wraps (tied heads too); ")
    write("lora_fx for everything. ")
    write("`right`: with random adapters the adapted model computes what the merged one does, to 1e-4. In ")
    write("brackets: the share of the elements of parameters of two or more dimensions that are adapted.\n\n")
    write("| model | peft | lora_fx |\n|---|---|---|\n")
    for name, (model, inputs) in subjects().items():
        write(f"| {name} | {judged(with_peft, model, inputs)} | {judged(with_lora_fx, model, inputs)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
