"""Adapter files made by hand for the tests about ONNX, and the subject that they make of a model."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lora_fx.adapter_file import AdapterFile, tensor_key
from lora_fx.fingerprints import fingerprint
from lora_fx.matrix import MatrixForm, columns_form, rows_form
from lora_fx.passes.changes import Change
from lora_fx.passes.onnx_state import with_values
from lora_fx.passes.onnx_subject import Subject
from lora_fx.plans import Decision, Part, Plan, Reason
from lora_fx.sites import Site


def adapter(
    model: nn.Module,
    names: Sequence[str],
    *,
    full: Sequence[str] = (),
    rank: int = 2,
    dora: Sequence[str] = (),
    size: float = 0.3,
    seed: int = 7,
) -> AdapterFile:
    """A trained adapter: random A and B on ``names``, random copies of ``full``."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    decisions: list[Decision] = []
    tensors: dict[str, torch.Tensor] = {}
    for name in (*names, *full):
        weight = parameters[name].detach()
        form = form_of(model, name, tuple(weight.shape))
        tied = tuple(n for n, p in parameters.items() if p is parameters[name])
        site = Site(name, "linear", tuple(weight.shape), "float32", form, tied)
        if name in full:
            decisions.append(Decision(site, "train", Reason.RULE))
            step = torch.randn(weight.shape, generator=generator) * 0.1
            tensors[tensor_key(name, None, "full")] = weight + step
            continue
        part = (Part(rank),)
        is_dora = name in dora
        decisions.append(Decision(site, "adapt", Reason.RULE, parts=part, alpha=4.0, scale=2.0, dora=is_dora))
        a = torch.randn(rank, form.in_features, generator=generator) * size
        tensors[tensor_key(name, None, "A")] = a
        tensors[tensor_key(name, None, "B")] = (
            torch.randn(form.out_features, rank, generator=generator) * size
        )
        if is_dora:
            tensors[tensor_key(name, None, "magnitude")] = (
                torch.rand(form.out_features, generator=generator) + 0.5
            )
    prints = {name: fingerprint(parameters[name]) for name in names}
    return AdapterFile(Plan(tuple(decisions), model=type(model).__name__), prints, tensors)


def form_of(model: nn.Module, name: str, shape: tuple[int, ...]) -> MatrixForm:
    owner = model.get_submodule(name.rpartition(".")[0])
    return columns_form(shape) if isinstance(owner, nn.Embedding) else rows_form(shape)


def subject_with(model: nn.Module, file: AdapterFile) -> Subject:
    """What an injected model would be for this adapter file."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    changes: dict[str, Change] = {}
    for decision in file.plan.decisions:
        before = parameters[decision.name].detach()
        names = decision.site.names or (decision.name,)
        changes[decision.name] = Change(names, before, file.effective(decision.name, before))

    @contextmanager
    def base() -> Generator[nn.Module]:
        yield model

    @contextmanager
    def folded() -> Generator[nn.Module]:
        values: Mapping[str, torch.Tensor] = {name: change.after for name, change in changes.items()}
        with with_values(model, values):
            yield model

    return Subject(base, folded, folded, changes, file.plan.to_json())
