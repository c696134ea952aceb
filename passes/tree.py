"""Sites from the module tree alone, for plans made without example inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_fx.kinds import KINDS
from lora_fx.matrix import MatrixForm, rows_form
from lora_fx.sites import Site

SCRIPTED = "its module is compiled by TorchScript: adapt the module before it is scripted"
LAZY = "not initialised yet: run the model once first"
EMPTY = "it holds no numbers"


def sites_from_modules(model: nn.Module) -> tuple[Site, ...]:
    """Return a site for every parameter of two or more dimensions, in the order of the model.

    The kind and form are those of the stock module that owns it; other weights are of kind "other":
    what they do shows in a recorded run alone.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    return tuple(
        _site(tuple(names[key]), tensor, modules)
        for key, tensor in tensors.items()
        if is_lazy(tensor) or tensor.dim() >= 2
    )


def _site(names: tuple[str, ...], parameter: Tensor, modules: dict[str, nn.Module]) -> Site:
    module = names[0].rpartition(".")[0]
    owner = modules[module]
    lazy = is_lazy(parameter)
    shape = () if lazy else tuple(parameter.shape)
    kind, form, unfit = _owned(names, modules, shape)
    if isinstance(owner, torch.jit.ScriptModule):
        unfit = SCRIPTED
    if not lazy and parameter.numel() == 0:
        unfit = EMPTY
    return Site(
        name=names[0],
        names=names,
        kind=kind,
        shape=shape,
        dtype=str(parameter.dtype).removeprefix("torch."),
        form=form,
        module=module,
        module_class=type(owner).__name__,
        unfit=LAZY if lazy else unfit,
    )


def _owned(
    names: tuple[str, ...], modules: dict[str, nn.Module], shape: tuple[int, ...]
) -> tuple[str, MatrixForm, str | None]:
    """Return the kind, form and unfitness that the first owner gives that any kind knows."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        if any(is_lazy(p) for p in modules[path].parameters(recurse=False)):
            continue  # its shapes are not known yet
        for kind in KINDS:
            form = kind.owned(modules[path]).get(attribute)
            if form is not None and form.shape == shape:
                return kind.name, form, kind.unfit(modules[path])
    return "other", rows_form(shape or (1,)), None
