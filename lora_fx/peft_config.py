r"""peft's LoraConfig -> a policy's plain data. peft is not imported; a dict will do.

What peft matches against a module's path, this writes as rules over the weight's name, so that the
policy can be read, saved and changed like any other:

- ``modules_to_save`` -> ``Train``; ``exclude_modules`` -> ``Skip``; both before the adapters, as in peft;
- ``target_modules``: suffixes -> ``module=``; a regular expression -> ``name="re:..."``; ``"all-linear"``
  -> the ``weight`` of every linear but the head's (peft asks the model's class for the head, this the
  dataflow: on models that are not transformers' it takes the head too, which a Rule of its own says).
  Experts that peft finds behind linear layers' names, by a table of model types, are not among them:
  ``target_parameters`` names them. peft adapts the output projection of a targeted
  ``nn.MultiheadAttention`` too; an optional rule does the same;
- ``target_parameters`` -> ``name=``;
- ``rank_pattern``, ``alpha_pattern``, ``layers_to_transform``: conditions on the name, as lookaheads;
- ``task_type``: peft saves the fresh head of a classifier without being asked, and so does this;
- ``init_lora_weights``: true, gaussian, orthogonal, pissa (also by iterations: the result is the same up
  to the iterations' error) and olora.

Everything that changes the mathematics and is not listed is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_fx.errors import PeftFormatError

_READ = {
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "layers_pattern", "bias", "use_rslora", "use_dora", "init_lora_weights",
}  # fmt: skip
# Keys that do not change what is computed here: bookkeeping, layouts that the matrix form knows, options of
# options that are refused themselves, and tied weights, which are one weight to lora_fx in any case.
_NEUTRAL = {
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode", "fan_in_fan_out",
    "runtime_config", "megatron_core", "ensure_weight_tying", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size",
}  # fmt: skip
_FRESH_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_ANY = r"(?:.*\.)?"
_WEIGHT = r"\.(?:weight|in_proj_weight)"
_OUT_PROJ = r"\.out_proj\.weight"
_MHA_OUT_PROJ = "NonDynamicallyQuantizableLinear"


def policy_data(config: object) -> dict[str, Any]:
    """Return the data of ``Policy.from_data`` that asks for what a LoraConfig asks for.

    Raises:
        PeftFormatError: not a LoRA configuration, or a key that cannot be said as a policy.
    """
    given = _as_dict(config)
    refuse_unsupported(given)
    options = _options(given)
    rules = _saved_modules(given) + _excluded(given.get("exclude_modules"))
    if given.get("target_modules"):
        rules += _module_rules(given, options)
    if given.get("target_parameters"):
        rules += _parameter_rules(given, options)
    if not any("Rule" in rule for rule in rules):
        raise _refused(
            "target_modules",
            "the names of modules",
            given.get("target_modules"),
            "peft would look them up by the model's type; name them, or write Policy.default() or a role.",
        )
    return {"rules": rules, "bias": given.get("bias", "none")}


def _as_dict(config: object) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    to_dict = getattr(config, "to_dict", None)
    if not callable(to_dict):
        raise _refused("config", "a LoraConfig or a mapping", type(config).__name__, "Pass one of them.")
    found: Any = to_dict()
    return dict(found)


def refuse_unsupported(given: Mapping[str, Any]) -> None:
    """Refuse by name whatever a LoRA configuration asks for that lora_fx cannot do.

    Raises:
        PeftFormatError: another method than LoRA, or a key that is not known to be harmless.
    """
    kind = _plain(given.get("peft_type", "LORA"))
    if kind != "LORA":
        raise _refused("peft_type", "LORA", kind, "Other methods are not LoRA.")
    for key, value in given.items():
        if key not in _READ | _NEUTRAL and not _is_off(value):
            raise _refused(key, "nothing (lora_fx cannot do this)", value, "Remove the key.")


def _is_off(value: Any) -> bool:
    """Say whether a value asks for nothing: false, none or empty (a 0 may mean something)."""
    return value is None or value is False or (isinstance(value, (str, list, tuple, dict, set)) and not value)


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a Rule that every adapter shares."""
    options: dict[str, Any] = {}
    if given.get("lora_dropout"):
        options["dropout"] = given["lora_dropout"]
    if given.get("use_rslora"):
        options["rslora"] = True
    if given.get("use_dora"):
        options["dora"] = True
    init = given.get("init_lora_weights", True)
    if init is not True:
        options["init"] = _init(init)
    return options


def _init(value: object) -> str:
    text = value if isinstance(value, str) else ""
    if text in {"gaussian", "orthogonal", "pissa", "olora"}:
        return text
    if re.fullmatch(r"pissa_niter_\d+", text):
        return "pissa"
    if text.lower() == "true":
        return "kaiming"
    known = "true, gaussian, orthogonal, pissa, pissa_niter_N or olora"
    raise _refused("init_lora_weights", known, value, "Choose one of them; a loaded adapter needs none.")


def _saved_modules(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked: list[str] = list(given.get("modules_to_save") or ())
    heads = [h for h in _FRESH_HEADS.get(_plain(given.get("task_type")), ()) if h not in asked]
    rules: list[dict[str, Any]] = []
    for names, optional in ((asked, {}), (heads, {"optional": True})):
        if names:
            rules.append({"Train": {"name": f"re:{_suffix(names)}\\..*", **optional}})
    return rules


def _excluded(value: Any) -> list[dict[str, Any]]:
    if not value:
        return []
    path = f"(?:{value})" if isinstance(value, str) else _suffix(value)
    return [
        {"Skip": {"name": f"re:{path}{_WEIGHT}", "optional": True}},
        {"Skip": {"name": f"re:{path}{_OUT_PROJ}", "module": _MHA_OUT_PROJ, "optional": True}},
    ]


def _module_rules(given: Mapping[str, Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    targets: Any = given["target_modules"]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        skip = {"Skip": {"role": "head", "optional": True}}
        linear = {"kind": ["linear", "matmul", "attention"], **options}
        return [skip, *_with_patterns(given, linear, name=f"{_ANY}weight", tail=_WEIGHT)]
    mha = {"module": _MHA_OUT_PROJ, "optional": True, **options}
    if isinstance(targets, str):
        path = f"(?:{targets})"
        rules = _with_patterns(given, options, name=path + _WEIGHT, tail=_WEIGHT)
    else:
        path = _suffix(targets)
        own = {"module": sorted(targets), **options}
        rules = _with_patterns(given, own, name=_layers(given, _WEIGHT), tail=_WEIGHT)
        path = _layers(given, _OUT_PROJ) + path
    return rules + _with_patterns(given, mha, name=path + _OUT_PROJ, tail=_OUT_PROJ)


def _parameter_rules(given: Mapping[str, Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        rule
        for name in given["target_parameters"]
        for rule in _with_patterns(given, options, name=_ANY + re.escape(name), tail="")
    ]


def _with_patterns(
    given: Mapping[str, Any], fields: Mapping[str, Any], *, name: str, tail: str
) -> list[dict[str, Any]]:
    """Return one rule per combination of a rank pattern and an alpha pattern, then one without.

    As in peft the first pattern of each that matches the path wins, so the combinations go in the
    patterns' order. ``name`` is the expression that the rule has without patterns, and ``tail`` what
    follows a path in the weight's name.
    """
    ranks = _pattern_items(given, "rank_pattern", given.get("r", 8))
    alphas = _pattern_items(given, "alpha_pattern", given.get("lora_alpha", 8))
    rules: list[dict[str, Any]] = []
    for rank_key, rank in ranks:
        for alpha_key, alpha in alphas:
            keys = [key for key in (rank_key, alpha_key) if key is not None]
            whole = "".join(f"(?={_ANY}(?:{key}){tail}\\Z)" for key in keys) + name
            rule: dict[str, Any] = {"name": f"re:{_complete(whole)}"} if whole else {}
            rule |= {**fields, "rank": rank, "alpha": alpha}
            rules.append({"Rule": {**rule, "optional": True} if keys else rule})
    return rules


def _pattern_items(given: Mapping[str, Any], key: str, default: Any) -> list[tuple[str | None, Any]]:
    return [*(given.get(key) or {}).items(), (None, default)]


def _complete(expression: str) -> str:
    """Let an expression of lookaheads alone match the whole name."""
    return expression + ".*" if expression.endswith(")") and expression.startswith("(?=") else expression


def _layers(given: Mapping[str, Any], tail: str) -> str:
    """Return the condition that the first layer number in the path is one of those to transform.

    ``tail`` is what follows the path in the weight's name; peft asks for a component of the path
    after the number, and lets paths that are given in full pass.
    """
    value: Any = given.get("layers_to_transform")
    if value is None or value == []:
        return ""
    numbers = "|".join(str(n) for n in ([value] if isinstance(value, int) else value))
    patterns: Any = given.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    number = rf"(?=\d+\..*{tail}\Z)"
    # (?>...) keeps the first number found: an index further down the path is no layer.
    firsts = [rf"(?>(?:|.*?\.){pattern}\.{number})" for pattern in patterns]
    firsts = firsts or [rf"(?>.*?\.[^.]*\.{number})"]
    found = [rf"(?:{_either(given['target_modules'])}){tail}\Z"]
    for index, first in enumerate(firsts):
        earlier = "".join(f"(?!{other})" for other in firsts[:index])
        found.append(rf"{earlier}{first}(?:{numbers})\.")
    return f"(?={'|'.join(found)})"


def _suffix(paths: Iterable[str]) -> str:
    """Return the expression of peft's suffix match: the path, or a path that ends with it."""
    return f"{_ANY}(?:{_either(paths)})"


def _either(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names))


def _plain(value: Any) -> str:
    """Return an enumeration's value, or the text itself."""
    return str(getattr(value, "value", value))


def _refused(key: str, expected: str, got: object, advice: str) -> PeftFormatError:
    return PeftFormatError(f"LoraConfig({key}=...)", expected=expected, got=repr(got), advice=advice)
