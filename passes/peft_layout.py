"""A model as peft's files see it: which wrapper each parameter would get, and why it would get none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_fx.matrix import MatrixForm, columns_form, rows_form
from lora_fx.passes.fold import base_only
from lora_fx.passes.registers import own_parameters
from lora_fx.passes.stock_forward import stock_home
from lora_fx.passes.tree import sites_from_modules
from lora_fx.peft_layers import Layer, LayerKind, Layout, stacked_or_rows

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Wrapper = tuple[LayerKind, MatrixForm, str | None]
OUT_PROJ = "peft adapts it only together with its nn.MultiheadAttention"


def layout(model: nn.Module) -> Layout:
    """Return the model as peft's files see it; adapters that it has are left out."""
    with base_only(model):
        layers: dict[str, Layer] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        paths: dict[int, list[str]] = {}
        for path, module in modules.items():
            paths.setdefault(id(module), []).append(path)
        for path, module in modules.items():
            for attribute, parameter in own_parameters(module).items():
                if parameter is not None and not is_lazy(parameter) and parameter.dim() >= 2:
                    layer = _layer(path, attribute, parameter, modules)
                    if len(paths[id(module)]) > 1:
                        layer = replace(layer, obstacle=_shared(paths[id(module)]))
                    layers[layer.name] = layer
        state = {
            name: t.detach() for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)
        }
        return Layout(
            layers,
            sites_from_modules(model),
            tuple(modules),
            state,
            frozenset(name for name, _ in model.named_parameters(remove_duplicate=False)),
            type(model).__name__,
            _origin(model),
            sum(p.numel() for p in model.parameters() if not is_lazy(p)),
        )


def _shared(paths: list[str]) -> str:
    return f"its module has several names ({', '.join(paths)}), and peft wraps it under one of them alone"


def _origin(model: nn.Module) -> str | None:
    """Return the name that the model was loaded under, unless it is a place on this machine."""
    name = getattr(model, "name_or_path", None)
    return name if isinstance(name, str) and name and not Path(name).is_absolute() else None


def _layer(path: str, attribute: str, parameter: Tensor, modules: dict[str, nn.Module]) -> Layer:
    module = modules[path]
    parent = modules.get(path.rpartition(".")[0]) if path else None
    shape = tuple(parameter.shape)
    kind, form, obstacle = _wrapper(module, attribute, shape, parent)
    branch = attribute == "weight" and kind in ("linear", "conv", "embedding") and _is_stock(module)
    if obstacle is None and path == "":
        obstacle = "it belongs to the model's top level, which peft cannot wrap"
    return Layer(path, attribute, kind, form, obstacle, branch)


def _is_stock(module: nn.Module) -> bool:
    return stock_home(type(module)) is not None


def _wrapper(module: nn.Module, attribute: str, shape: tuple[int, ...], parent: nn.Module | None) -> _Wrapper:
    """Return which wrapper peft has for a parameter, how it reads it, and what stands in the way."""
    if isinstance(parent, nn.MultiheadAttention) and attribute == "weight":
        return "attention-out", rows_form(shape), OUT_PROJ
    if isinstance(module, nn.MultiheadAttention):
        packed = attribute == "in_proj_weight"
        return "attention", rows_form(shape), None if packed else "peft adapts packed in-projections alone"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "parameter", rows_form(shape), "peft has no adapter for recurrent weights"
    if attribute == "weight" and isinstance(module, nn.Embedding):
        # peft multiplies what the lookup gives by a scale that the module has.
        fine = _is_stock(module) or hasattr(module, "embed_scale")
        return "embedding", columns_form(shape), None if fine else _own_forward(module)
    if attribute == "weight" and isinstance(module, _CONVS):
        return "conv", rows_form(shape), _conv_obstacle(module)
    home = stock_home(type(module))
    if attribute == "weight" and home is not None and home[0].__name__ in ("Linear", "Conv1D"):
        return "linear", home[1].owned(module)["weight"], None
    return _parameter(module, shape)


def _parameter(module: nn.Module, shape: tuple[int, ...]) -> _Wrapper:
    """Return how ``target_parameters`` reads a parameter: a matrix, or a stack of experts."""
    if len(shape) not in (2, 3):
        return "parameter", rows_form(shape), "peft targets parameters of two or three dimensions alone"
    turned = len(shape) == 3 and bool(getattr(module, "is_transposed", False))
    obstacle = "peft cannot add the delta of a single transposed expert" if turned and shape[0] == 1 else None
    return "parameter", stacked_or_rows(shape, transposed=turned), obstacle


def _own_forward(module: nn.Module) -> str:
    return f"{type(module).__name__} has a forward of its own, and peft adds its branch outside of it"


def _conv_obstacle(module: nn.Module) -> str | None:
    """Say why peft's branch at a convolution is no change of its weight."""
    if not isinstance(module, _CONVS):
        return None
    if not _is_stock(module):
        return _own_forward(module)
    if module.groups > 1:
        return (
            f"it has {module.groups} groups, and peft's A runs over all inputs: no grouped weight equals that"
        )
    wide = any(k > 1 for k in module.kernel_size)
    if wide and any(d > 1 for d in module.dilation):
        return f"its dilation is {module.dilation}, which peft's branch leaves out"
    padded = module.padding == "same" or (not isinstance(module.padding, str) and any(module.padding))
    if padded and module.padding_mode != "zeros":
        return f"its padding_mode is {module.padding_mode!r}, which peft's branch leaves out"
    return None
