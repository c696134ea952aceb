"""The zoo: names of models and how to build each, small and with random weights."""

from __future__ import annotations

import importlib
import re
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tests.zoo.diffusion import build_diffusion, diffusers_names
from tests.zoo.hints import HINTS
from tests.zoo.inputs import BATCH, dummy_inputs, part_with
from tests.zoo.tiny_configs import tiny

Built = tuple[nn.Module, dict[str, Any]]
"""A model in eval mode and the keyword arguments of one forward."""

_SMALL = (
    "test",
    "atto",
    "femto",
    "pico",
    "nano",
    "xxt",
    "xxs",
    "micro",
    "zepto",
    "tiny",
    "xt",
    "xs",
    "mini",
    "_s",
    "small",
    "050",
    "18",
    "b0",
    "_n",
)
_HEADS = (
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "OBJECT_DETECTION",
    "DEPTH_ESTIMATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "TIME_SERIES_PREDICTION",
)


def names() -> list[str]:
    """Return every name of the zoo: ``timm/…``, ``torchvision/…``, ``diffusers/…``, ``transformers/…``."""
    return [*timm_names(), *torchvision_names(), *diffusers_names(), *transformers_names()]


def build(name: str) -> Built:
    """Build one model of the zoo, on the CPU, in eval mode but for those that learn in train mode alone."""
    torch.manual_seed(0)
    library, _, rest = name.partition("/")
    builders = {
        "timm": _timm,
        "torchvision": _torchvision,
        "diffusers": build_diffusion,
        "transformers": _transformers,
    }
    model, inputs = builders[library](rest)
    training = library == "transformers" and HINTS.get(rest, {}).get("train", False)
    return awake(model.eval(), inputs).train(training), inputs


def awake(model: nn.Module, inputs: dict[str, Any]) -> nn.Module:
    """Let a fresh model's weights matter, as a trained one's do.

    Normalisations take their running statistics from the inputs, so that a deep network's signal does not
    vanish; and branches that start at nothing (a last normalisation or a layer scale of zero) are opened.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for parameter in model.parameters():
        if parameter.dim() <= 3 and parameter.numel() > 1 and _is_scale(model, parameter):
            nn.init.uniform_(parameter, 0.5, 1.0)
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        with torch.no_grad():
            model(**inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model


def _is_scale(model: nn.Module, parameter: nn.Parameter) -> bool:
    name = next(n for n, p in model.named_parameters() if p is parameter)
    known = name.rpartition(".")[2] in ("weight", "gamma", "gamma_1", "gamma_2", "lambda1")
    return known and parameter.squeeze().dim() == 1 and float(parameter.detach().abs().max()) < 1e-3


def timm_names() -> list[str]:
    """Return one name per timm family: a small member, by its name."""
    import timm

    found = []
    for family in timm.list_modules():
        members = timm.list_models(module=family)
        if members:
            found.append(f"timm/{min(members, key=lambda n: (_rank(n), len(n), n))}")
    return sorted(found)


def _rank(name: str) -> int:
    return next((i for i, word in enumerate(_SMALL) if word in name), len(_SMALL))


def _timm(name: str) -> Built:
    import timm

    refusal: Exception | None = None
    for size in (64, 96, 128, 112, None):
        try:
            options = {} if size is None else {"img_size": size}
            try:
                model = timm.create_model(name, num_classes=10, **options)
            except TypeError:
                model = timm.create_model(name, num_classes=10)
            shape = model.default_cfg["input_size"]
            image = torch.randn(BATCH, shape[0], size or shape[1], size or shape[2])
            with torch.no_grad():
                model.eval()(image)
        except Exception as error:  # noqa: BLE001 - a size that a family does not take: the next is tried
            refusal = error
            continue
        return model, {next(iter(_forward_names(model))): image}
    raise RuntimeError(f"no input size suits {name}") from refusal


def _forward_names(model: nn.Module) -> Iterator[str]:
    import inspect

    yield from inspect.signature(model.forward).parameters


def torchvision_names() -> list[str]:
    """Return one name per torchvision family of classifiers and of segmenters."""
    from torchvision import models

    families: dict[tuple[str, str, bool], list[str]] = {}
    for group in (models, models.segmentation):
        for name in models.list_models(module=group):
            word = re.match("[a-z]+", name)
            assert word is not None
            family = models.get_model_builder(name).__module__, word[0], "v2" in name
            families.setdefault(family, []).append(name)
    return sorted(f"torchvision/{min(members, key=_torchvision_size)}" for members in families.values())


def _torchvision_size(name: str) -> int:
    from torchvision import models

    return min(weights.meta["num_params"] for weights in models.get_model_weights(name))


def _torchvision(name: str) -> Built:
    from torchvision import models

    options: dict[str, Any] = {"weights": None}
    if "googlenet" in name or "inception" in name:
        options["init_weights"] = False
    if models.get_model_builder(name).__module__.startswith("torchvision.models.segmentation"):
        options["weights_backbone"] = None
    size = {"inception_v3": 96, "maxvit_t": 224}.get(name, 64)
    if name.startswith("vit_"):
        options["image_size"] = size
    model = models.get_model(name, num_classes=10, **options)
    return model, {next(iter(_forward_names(model))): torch.randn(BATCH, 3, size, size)}


def transformers_names() -> list[str]:
    """Return every model type of transformers that has a base model."""
    from transformers.models.auto import modeling_auto

    types_ = modeling_auto.MODEL_MAPPING_NAMES
    return [f"transformers/{name}" for name in sorted(types_)]


def _transformers(name: str) -> Built:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    hints = HINTS.get(name, {})
    if "skip" in hints:
        raise NotImplementedError(hints["skip"])
    config_class = CONFIG_MAPPING[name]
    refusal: Exception | None = None
    for head in candidates(name, hints):
        try:
            config = tiny(config_class, dict(hints.get("config", {})))
            config._attn_implementation = hints.get("attention", "eager")
            for part in parts_of(config):
                if getattr(part, "use_cache", None):
                    part.use_cache = False
            model = head(config).eval()
            return model, _first_fitting(model, hints)
        except Exception as error:  # noqa: BLE001 - a head that does not suit: the next is tried
            refusal = refusal or error
    raise refusal or RuntimeError(f"no class of {name}")


def parts_of(config: Any) -> Iterator[Any]:
    """Yield a configuration and those inside it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from parts_of(value)


def candidates(name: str, hints: dict[str, Any]) -> Iterator[type[nn.Module]]:
    """Yield the classes to try for one model type, heads first, the bare model last."""
    import transformers
    from transformers.models.auto import modeling_auto

    if "head" in hints:
        yield getattr(transformers, hints["head"])
        return
    for head in _HEADS:
        found = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES").get(name)
        if found is not None:
            yield _class(name, found[0] if isinstance(found, tuple) else found)
            break
    base = modeling_auto.MODEL_MAPPING_NAMES.get(name)
    if base is not None:
        yield _class(name, base[0] if isinstance(base, tuple) else base)


def _class(model_type: str, name: str) -> type[nn.Module]:
    import transformers

    if hasattr(transformers, name):
        found: type[nn.Module] = getattr(transformers, name)
        return found
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    written = CONFIG_MAPPING[model_type].__module__.replace(".configuration_", ".modeling_")
    module: types.ModuleType = importlib.import_module(written)
    return getattr(module, name)


def _first_fitting(model: nn.Module, hints: dict[str, Any]) -> dict[str, Any]:
    """Return the first kind of inputs that the model takes: films for images, other axes for sounds."""
    refusal: Exception | None = None
    kinds: list[dict[str, Any]] = [
        {},
        {"frames": (_frames(model),)},
        {"bins_first": True},
        {"channels": (1,)},
    ]
    if _image_token(model) is not None:
        kinds.insert(0, {"also": ("pixel_values",)})
    for kind in kinds:
        try:
            return _fitting_inputs(model, {**kind, **hints})
        except Exception as error:  # noqa: BLE001 - as for the heads
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _image_token(model: nn.Module) -> int | None:
    config: Any = model.config
    return getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)


def _frames(model: nn.Module) -> int:
    config: Any = model.config
    return getattr(part_with(config, "num_frames"), "num_frames", None) or 2


def _fitting_inputs(model: nn.Module, hints: dict[str, Any]) -> dict[str, Any]:
    """Return inputs that run; image tokens are added where the model says how many it wants."""
    inputs = dummy_inputs(model, hints)
    with torch.no_grad():
        try:
            model(**inputs)
        except ValueError as error:
            told = re.search(r"tokens: *(\d+).*features:? *(?:torch.Size\(\[)?(\d+)", str(error))
            token = _image_token(model)
            if told is None or token is None or "input_ids" not in inputs:
                raise
            each = int(told[2]) // BATCH
            ids = torch.cat([inputs["input_ids"], torch.full((BATCH, each), token)], dim=1)
            inputs["input_ids"], inputs["attention_mask"] = ids, torch.ones_like(ids)
            model(**inputs)
    return inputs
