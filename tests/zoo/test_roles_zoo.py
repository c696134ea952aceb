"""Roles of real architectures against the truth, and the checks of those checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch

from lora_fx.matrix import Rows
from lora_fx.passes.match import match
from lora_fx.passes.roles import assign_roles
from lora_fx.passes.trace import Trace, trace
from lora_fx.sites import Site
from tests.zoo import presets
from tests.zoo.perturbation import perturb
from tests.zoo.roles_table import all_truths, examine
from tests.zoo.roles_truth import Truth

QUICK = {
    "bert", "bert, eager, classifier", "deberta", "xlnet", "big_bird", "nystromformer",
    "reformer (local and lsh)", "squeezebert (convolutions)", "gpt2 (Conv1D)",
    "codegen (q, v, k by partition)", "gpt_neox (by head)", "falcon (groups, interleaved)", "llama",
    "phi3 (fused, grouped)", "mixtral", "gpt_oss (sinks, interleaved experts)",
    "deepseek_v3 (latent attention)", "jetmoe (experts of attention)", "rwkv (linear attention)", "t5",
    "whisper", "wav2vec2 conformer (relative)", "cvt (convolutional projections)", "detr", "perceiver",
    "siglip", "groupvit (grouping)", "vit", "vit, one fused input", "swin v2 (cosine)",
    "cait (talking heads)", "davit (windows and channels)", "convnext", "resnet",
}  # fmt: skip
ALL = {truth.name: truth for _, truth in all_truths()}


def test_the_quick_ones_exist() -> None:
    assert set(ALL) >= QUICK
    assert len(ALL) >= 60


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.zoo if name in QUICK else pytest.mark.zoo_full) for name in ALL],
)
def test_roles_are_as_written_and_stand_perturbation(name: str) -> None:
    result = examine(ALL[name])
    assert result.mistakes == ()
    assert result.failures == ()


@pytest.fixture(scope="module")
def neox() -> tuple[Trace, tuple[Site, ...]]:
    model, inputs = ALL["gpt_neox (by head)"].build()
    traced = trace(model, inputs)
    return traced, assign_roles(traced, match(traced))


def changed(sites: tuple[Site, ...], roles: Mapping[str, Rows | None]) -> tuple[Site, ...]:
    """Give other roles to the first fused weight."""
    first = next(site for site in sites if "q" in site.roles)
    return tuple(dataclasses.replace(s, roles=roles) if s is first else s for s in sites)


@torch.no_grad()
def test_perturbation_finds_nothing_in_right_roles(neox: tuple[Trace, tuple[Site, ...]]) -> None:
    found = perturb(*neox)
    assert found.failures == ()
    assert found.attentions == 2
    assert found.perturbations > 20


@pytest.mark.parametrize(
    "roles",
    [
        {"q": ((8, 16),), "k": ((0, 8),), "v": ((16, 24),)},  # q and k of the first head swapped
        {"q": ((0, 32),), "k": ((32, 64),), "v": ((64, 96),)},  # as if they lay in blocks
        {"q": ((0, 8), (24, 32), (48, 56), (72, 79)), "k": ((8, 16),), "v": ((16, 24),)},  # one row forgotten
        {"q": None},
    ],
)
@torch.no_grad()
def test_perturbation_finds_wrong_rows(
    neox: tuple[Trace, tuple[Site, ...]], roles: Mapping[str, Rows | None]
) -> None:
    traced, sites = neox
    assert perturb(traced, changed(sites, roles)).failures


def test_the_truth_refuses_slips() -> None:
    model, inputs = ALL["gpt_neox (by head)"].build()
    traced = trace(model, inputs)
    sites = match(traced)
    site = next(s for s in sites if s.name.endswith("query_key_value.weight"))
    assert Truth("", ALL["bert"].build, "*.query_key = q").unused(sites) == ["*.query_key"]
    with pytest.raises(ValueError, match="no role"):
        Truth("", ALL["bert"].build, "*.query_key_value = query").roles(site)
    interleaved = Truth("", ALL["bert"].build, "*.query_key_value = q[0:8/24] v[90:96]").roles(site)
    assert interleaved == {"q": ((0, 8), (24, 32), (48, 56), (72, 80)), "v": ((90, 96),)}


@pytest.mark.zoo
def test_the_page_of_presets_is_what_they_adapt() -> None:
    assert list(presets.lines()) == presets.PATH.read_text().splitlines()
