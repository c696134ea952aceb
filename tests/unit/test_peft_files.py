"""peft's folders: read what peft wrote, write what peft reads, compute what peft computes."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_fx
from lora_fx import AdapterFileError, BaseMismatchError, PeftFormatError, Policy, Rule, Train
from tests.unit.peft_cases import MODELS, by_peft, gap, loaded, output, randomise, through_peft

pytest.importorskip("peft", exc_type=ImportError)
NEAR = 1e-6

IMPORTS = {
    "linear": ("bert", {"target_modules": ["query", "value"], "r": 4, "lora_alpha": 16}),
    "all-linear": ("llama", {"target_modules": "all-linear", "r": 2, "lora_dropout": 0.1}),
    "regex": ("llama", {"target_modules": r".*\.(q|v)_proj", "layers_to_transform": None}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 3, "fan_in_fan_out": True}),
    "rslora": ("gpt2", {"target_modules": ["c_attn"], "r": 3, "use_rslora": True}),
    "patterns": (
        "bert",
        {
            "target_modules": ["query", "dense"],
            "r": 4,
            "rank_pattern": {"query": 2, r"layer\.1\..*dense": 3},
            "alpha_pattern": {r".*\.0\.attention\.self\.query": 5},
        },
    ),
    "patterns, rslora": (
        "bert",
        {
            "target_modules": ["query"],
            "rank_pattern": {r"layer\.1\..*": 3},
            "use_rslora": True,
            "lora_alpha": 3,
        },
    ),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "lora_dropout": 0.1}),
    "dora, conv1d": ("gpt2", {"target_modules": ["c_fc"], "use_dora": True}),
    "dora, conv": ("convs", {"target_modules": ["three", "two", "point", "one", "head"], "use_dora": True}),
    "dora, embedding": ("lookup", {"target_modules": ["embed", "fc"], "use_dora": True}),
    "convs": ("convs", {"target_modules": ["three", "two", "point", "one", "head"], "r": 2, "lora_alpha": 3}),
    "embedding": ("lookup", {"target_modules": ["embed", "block.fc"], "r": 2, "lora_alpha": 3}),
    "embed_tokens": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "bias": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "all biases": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "saved": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "classifier": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "saved norm": ("convs", {"target_modules": ["head"], "modules_to_save": ["norm"]}),
    "parameters": (
        "mixture",
        {"target_modules": ["fc"], "target_parameters": ["experts.up", "experts.down"]},
    ),
    "matrix": ("mixture", {"target_modules": [], "target_parameters": ["gate", "fc.weight"]}),
    "attention": ("attention", {"target_modules": ["mha", "fc"], "init_lora_weights": False}),
    "gaussian": ("llama", {"target_modules": ["k_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": ["k_proj"], "init_lora_weights": "orthogonal"}),
}


@pytest.mark.parametrize("case", IMPORTS)
def test_what_peft_saved_computes_the_same_here(case, tmp_path):
    name, config = IMPORTS[case]
    model, inputs = MODELS[name]()
    theirs = by_peft(model, tmp_path, **config)
    ours = loaded(model, tmp_path)
    assert gap(output(theirs, inputs), output(model, inputs)) > 1e-3
    assert gap(output(ours, inputs), output(theirs, inputs)) < NEAR
    with lora_fx.folded(ours):
        assert gap(output(ours, inputs), output(theirs, inputs)) < NEAR
    # And back: what was read is written so that peft computes it again.
    if case != "attention":
        lora_fx.save_adapter(ours, tmp_path / "again", format="peft")
        assert gap(output(through_peft(model, tmp_path / "again"), inputs), output(theirs, inputs)) < NEAR
    lora_fx.unload(ours)
    assert torch.equal(output(ours, inputs), output(model, inputs))


EXPORTS = {
    "linear": ("bert", Policy(Rule(role="qv", rank=4, alpha=16), Rule(role="up", rank=3, alpha=12))),
    "fused rows": ("gpt2", Policy(Rule(role="q", rank=3), Rule(role="v", rank=2))),
    "all": ("gpt2", Policy(Rule(kind=("linear", "matmul"), rank=2, alpha=3))),
    "tied": ("gpt2", Policy(Rule(name="*wte.weight", rank=2), Rule(role="o", rank=2))),
    "tied lookup": ("tied", Policy(Rule(rank=2, alpha=3))),
    "rslora": ("llama", Policy(Rule(role="qkvo", rank=4, alpha=8, rslora=True))),
    "mixed scales": ("llama", Policy(Rule(role="q", rank=4, rslora=True), Rule(role="v", rank=3, alpha=1))),
    "dora": ("llama", Policy(Rule(role="qv", rank=2, dora=True))),
    "dora rows": ("gpt2", Policy(Rule(role="qv", rank=2, dora=True))),
    "dora convs": (
        "convs",
        Policy(Rule(name="two.*", rank=2, dora=True), Rule(name="one.*", rank=2, dora=True)),
    ),
    "pissa": ("llama", Policy(Rule(role="qv", rank=3, alpha=6, init="pissa"))),
    "olora rows": ("gpt2", Policy(Rule(role="v", rank=3, init="olora"))),
    "orthogonal": ("bert", Policy(Rule(role="o", rank=2, init="orthogonal", rslora=True, alpha=5))),
    "convs": ("convs", Policy(lora_fx.Skip(name="grouped.*"), Rule(kind="conv", rank=3, alpha=1))),
    "pissa convs": ("convs", Policy(Rule(name="three.*", rank=2, init="pissa"))),
    "embedding": ("lookup", Policy(Rule(kind="embedding", rank=2, alpha=3))),
    "a name that others end with": ("lookup", Policy(Rule(name="fc.weight", rank=2))),
    "saved head": ("bert", Policy(Train(module="classifier"), Rule(role="qv"))),
    "saved, and a name that others end with": ("lookup", Policy(Train(name="fc.*"), Rule(name="head.*"))),
    "saved norm": ("bert", Policy(Train(name="*.1.output.LayerNorm.*"), Rule(role="qv", rank=2))),
    "bias": ("bert", Policy(Rule(role="qv", rank=2), bias="lora_only")),
    "all biases": ("bert", Policy(Rule(role="qv", rank=2), bias="all")),
    "experts": ("mixture", Policy(Rule(name="experts.*", rank=2, alpha=3), Rule(name="fc.*", rank=2))),
    "batched experts": ("batched", Policy(Rule(name="inner.*", rank=2, alpha=3))),
    "attention": ("attention", Policy(Rule(role="qv", rank=2, alpha=3))),
    "statistics": ("convs", Policy(Rule(name="two.*", rank=2), norm_stats="train")),
    "dropout": ("llama", Policy(Rule(role="q", dropout=0.1), Rule(role="v", dropout=0.1))),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_what_is_saved_for_peft_computes_the_same_there(case, tmp_path):
    name, policy = EXPORTS[case]
    model, inputs = MODELS[name]()
    untouched = {key: value.clone() for key, value in model.state_dict().items()}
    ours = lora_fx.inject(MODELS[name]()[0], policy, inputs)
    randomise(ours)
    if policy.norm_stats == "train":
        output(ours.train(), inputs)
    ours.eval()
    lora_fx.save_adapter(ours, tmp_path, format="peft")
    theirs = through_peft(model, tmp_path)
    assert gap(output(ours, inputs), output(model, inputs)) > 1e-3
    assert gap(output(theirs, inputs), output(ours, inputs)) < NEAR
    assert gap(output(loaded(model, tmp_path), inputs), output(ours, inputs)) < NEAR
    assert all(torch.equal(value, untouched[key]) for key, value in model.state_dict().items())


def test_an_adapter_of_another_name_lies_in_a_subfolder(tmp_path):
    model, inputs = MODELS["lookup"]()
    theirs = by_peft(model, tmp_path / "a", "task", target_modules=["fc"])
    assert (tmp_path / "a" / "task" / "adapter_config.json").is_file()
    ours = loaded(model, tmp_path / "a", adapter="mine")
    assert gap(output(ours, inputs), output(theirs, inputs)) < NEAR
    lora_fx.save_adapter(ours, tmp_path / "b", "mine", format="peft")
    again = through_peft(model, tmp_path / "b" / "mine")
    assert gap(output(again, inputs), output(theirs, inputs)) < NEAR


def test_the_plan_and_a_warning_say_that_the_base_is_not_proven(tmp_path):
    model, _ = MODELS["lookup"]()
    by_peft(model, tmp_path, target_modules=["fc"], lora_dropout=0.5)
    with pytest.warns(UserWarning, match="no fingerprint"):
        ours = lora_fx.load_adapter(model, tmp_path, trainable=True)
    lora_fx.save_adapter(ours, tmp_path / "own.safetensors")
    plan = lora_fx.AdapterFile.read(tmp_path / "own.safetensors").plan
    assert "no fingerprint" in plan.notes[0]
    assert plan["fc.weight"].dropout == 0.5
    assert plan["fc.weight"].form == "branch"
    assert plan["embed.weight"].action == "skip"
    assert {id(p) for p in lora_fx.parameters(ours)} == {id(p) for p in ours.parameters() if p.requires_grad}


def test_targets_are_written_as_short_as_they_can_be(tmp_path):
    model, inputs = MODELS["llama"]()
    lora_fx.save_adapter(lora_fx.inject(model, Policy.paper(4), inputs), tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["modules_to_save"]) == (
        4,
        4,
        {},
        None,
    )


def test_a_mixture_of_dropouts_warns(tmp_path):
    model, inputs = MODELS["llama"]()
    lora_fx.inject(model, Policy(Rule(role="q", dropout=0.1), Rule(role="v")), inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora_fx.save_adapter(model, tmp_path, format="peft")
    assert any("lora_dropout" in str(w.message) for w in caught)


def test_modules_saved_whole_bring_their_buffers(tmp_path):
    model, inputs = MODELS["convs"]()
    theirs = by_peft(model, tmp_path, target_modules=["head"], modules_to_save=["norm"])
    with torch.no_grad():
        theirs.base_model.model.norm.modules_to_save["default"].running_mean += 0.5
    theirs.save_pretrained(str(tmp_path))
    ours = loaded(model, tmp_path)
    assert gap(output(ours, inputs), output(theirs, inputs)) < NEAR
    assert torch.equal(model.norm.running_mean, torch.zeros(4))
    lora_fx.save_adapter(ours, tmp_path / "own.safetensors")
    again = lora_fx.load_adapter(model, tmp_path / "own.safetensors").eval()
    assert gap(output(again, inputs), output(theirs, inputs)) < NEAR
    lora_fx.unload(again)
    assert torch.equal(again.norm.running_mean, torch.zeros(4))
    assert isinstance(again.norm, nn.BatchNorm1d)


def refused(model, folder, match, error=PeftFormatError):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        loaded(model, folder)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "config", "match"),
    [
        ("convs", {"target_modules": ["grouped"], "r": 5}, r"grouped\.weight.*5 groups"),
        ("tied", {"target_modules": ["embed"]}, r"embed\.weight alone, which is head\.weight too"),
        ("tied", {"target_modules": ["head"]}, r"head\.weight alone, which is embed\.weight too"),
        ("tied", {"target_modules": ["head", "embed"]}, "one delta for tied weights"),
        ("tied", {"target_modules": ["fc"], "modules_to_save": ["head"]}, "head.weight alone"),
        ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "pissa.*changed.*Convert"),
        ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "olora"),
        ("llama", {"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
        (
            "llama",
            {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
            "trainable_token_indices",
        ),
        ("llama", {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(name, config, match, tmp_path):
    model, _ = MODELS[name]()
    by_peft(model, tmp_path, **config)
    refused(model, tmp_path, match)


class Dilated(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same", **options)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(
    ("options", "match"), [({"dilation": 2}, "dilation"), ({"padding_mode": "circular"}, "padding_mode")]
)
def test_convolutions_that_peft_gets_wrong_are_refused_both_ways(options, match, tmp_path):
    by_peft(Dilated(**options), tmp_path, target_modules=["conv"])
    refused(Dilated(**options), tmp_path, match)
    model = lora_fx.inject(Dilated(**options), Policy(Rule()), torch.ones(1, 3, 5, 5))
    with pytest.raises(PeftFormatError, match=match):
        lora_fx.save_adapter(model, tmp_path / "x", format="peft")
    assert not (tmp_path / "x").exists()


class Elsewhere(nn.Module):
    """A weight used by its owner's neighbour, and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.c = self.b

    def forward(self, x):
        return nn.functional.linear(self.c(self.b(x)), self.a.weight)


@pytest.mark.parametrize(
    ("model", "policy", "inputs", "match"),
    [
        (
            Elsewhere,
            Policy(Rule(name="a.*")),
            torch.ones(1, 4),
            "a.weight.*a use by linear in 'the model itself'",
        ),
        (Elsewhere, Policy(Rule(name="b.*")), torch.ones(1, 4), r"several names \(b, c\)"),
        (lambda: MODELS["convs"]()[0], Policy(Rule(name="grouped.*")), torch.ones(2, 2, 3, 8, 8), "5 groups"),
        (lambda: MODELS["attention"]()[0], Policy(Rule(role="o")), torch.ones(2, 4, 8), "out_proj.*twice"),
        (
            lambda: MODELS["convs"]()[0],
            Policy(Train(name="head.*")),
            torch.ones(2, 2, 3, 8, 8),
            "at least one",
        ),
        (
            lambda: MODELS["lookup"]()[0],
            Policy(Rule(name="fc.*", dora=True), Rule(name="head.*")),
            torch.ones(1, 2, dtype=torch.long),
            "use_dora is one switch",
        ),
        (
            lambda: MODELS["tied"]()[0],
            Policy(Rule(name="embed.*", dora=True)),
            torch.ones(1, 2, dtype=torch.long),
            "DoRA along the other axis",
        ),
        (
            lambda: nn.LSTM(4, 4),
            Policy(Rule()),
            torch.ones(3, 2, 4),
            "recurrent",
        ),
        (
            lambda: MODELS["attention"]()[0],
            Policy(Rule(role="q"), Train(name="mha.in_proj_bias")),
            torch.ones(2, 4, 8),
            "mha.*a module that peft can save whole.*trained in full",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(model, policy, inputs, match, tmp_path):
    adapted = lora_fx.inject(model(), policy, inputs)
    with pytest.raises(PeftFormatError, match=match):
        lora_fx.save_adapter(adapted, tmp_path / "x", format="peft")
    assert not (tmp_path / "x").exists()


def edited(folder, config=None, tensors=None):
    """Change a saved folder: config keys, and tensors by key (None: removed)."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    held = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    held = {key: value for key, value in (held | (tensors or {})).items() if value is not None}
    safetensors.torch.save_file(held, folder / "adapter_model.safetensors")


FC = "base_model.model.fc"


@pytest.mark.parametrize(
    ("config", "tensors", "error", "match"),
    [
        ({"r": 4}, {}, AdapterFileError, "of rank 4 for a weight of the shape"),
        ({"peft_type": "LOHA"}, {}, PeftFormatError, "peft_type"),
        ({"use_qalora": True}, {}, PeftFormatError, "use_qalora"),
        ({"from_the_future": 1}, {}, PeftFormatError, "from_the_future"),
        ({"init_lora_weights": "corda"}, {}, PeftFormatError, "corda"),
        ({"init_lora_weights": "new"}, {}, PeftFormatError, "init_lora_weights"),
        ({"use_dora": True}, {}, AdapterFileError, "magnitude"),
        ({}, {f"{FC}.lora_B.weight": None}, AdapterFileError, "expected A, B; got A"),
        ({}, {f"{FC}.lora_B.weight": torch.ones(3, 2)}, AdapterFileError, "shapes"),
        ({}, {f"{FC}.lora_B.bias": torch.ones(8)}, PeftFormatError, "lora_B.bias"),
        ({}, {f"{FC}.lora_C.weight": torch.ones(8)}, PeftFormatError, "lora_C"),
        ({}, {"fc.lora_A.weight": torch.ones(2, 8)}, PeftFormatError, "base_model.model"),
        ({}, {f"{FC}x.weight": torch.ones(8)}, PeftFormatError, "The nearest is 'fc.weight'"),
        ({}, {f"{FC}.base_layer.bias": torch.ones(7)}, AdapterFileError, r"expected shape \(8,\)"),
        (
            {},
            {f"{FC}x.lora_{m}.weight": torch.ones(2, 8).view(s) for m, s in (("A", (2, 8)), ("B", (8, 2)))},
            PeftFormatError,
            "The nearest is 'fc'",
        ),
        ({}, {f"{FC}.base_layer.weight": torch.ones(8, 8)}, BaseMismatchError, "fc.weight: other values"),
    ],
)
def test_damaged_and_foreign_folders_are_refused(config, tensors, error, match, tmp_path):
    model, _ = MODELS["lookup"]()
    by_peft(model, tmp_path, target_modules=["fc"], r=2)
    edited(tmp_path, config, tensors)
    refused(model, tmp_path, match, error)


def test_the_attention_of_an_unknown_peft_is_refused(tmp_path):
    model, _ = MODELS["attention"]()
    by_peft(model, tmp_path, target_modules=["mha"])
    edited(tmp_path, {"peft_version": "9.0.0"})
    refused(model, tmp_path, "mha.out_proj.weight.*'9.0.0'.*not known")


def test_folders_that_hold_no_adapter(tmp_path):
    model, _ = MODELS["lookup"]()
    refused(model, tmp_path, "a folder with neither", AdapterFileError)
    (tmp_path / "lora_fx_default.safetensors").touch()
    refused(model, tmp_path, r"Pass the file itself: .*lora_fx_default\.safetensors", AdapterFileError)
    for name in "ab":
        by_peft(model, tmp_path, name, target_modules=["fc"])
    refused(model, tmp_path, r"adapters \['a', 'b'\]", AdapterFileError)
    assert loaded(model, tmp_path, adapter="b")
    (tmp_path / "b" / "adapter_model.safetensors").rename(tmp_path / "b" / "adapter_model.bin")
    refused(model, tmp_path / "b", "adapter_model.bin.*never unpickles")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    refused(model, tmp_path / "a", "damaged", AdapterFileError)
    (tmp_path / "a" / "adapter_config.json").write_text("[]")
    refused(model, tmp_path / "a", "damaged", AdapterFileError)


def test_tied_weights_that_peft_tied_are_read(tmp_path):
    model, inputs = MODELS["llama"]()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    config = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    theirs = by_peft(model, tmp_path, **config)
    if "lm_head" not in str(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()):
        pytest.skip("this peft does not tie")
    assert gap(output(loaded(model, tmp_path), inputs), output(theirs, inputs)) < NEAR


def test_an_output_projection_adapted_alone_is_refused(tmp_path):
    """peft wraps it, and the attention's forward reads the weight past the wrapper."""
    model, _ = MODELS["attention"]()
    by_peft(model, tmp_path, target_modules=["fc"], r=2)
    pairs = {"A": torch.ones(2, 8), "B": torch.ones(8, 2)}
    edited(tmp_path, {}, {f"base_model.model.mha.out_proj.lora_{k}.weight": v for k, v in pairs.items()})
    refused(model, tmp_path, "out_proj.*without its nn.MultiheadAttention")


def test_a_second_adapter_and_one_put_back_in_place(tmp_path):
    model, inputs = MODELS["gpt2"]()
    one = by_peft(model, tmp_path / "one", target_modules=["c_attn"], r=2)
    two = by_peft(model, tmp_path / "two", target_modules=["c_fc"], r=3)
    ours = loaded(model, tmp_path / "one", trainable=True)
    with pytest.warns(UserWarning, match="no fingerprint"):
        lora_fx.load_adapter(ours, tmp_path / "two", adapter="two")
    assert gap(output(ours, inputs), output(one, inputs)) < NEAR
    lora_fx.set_adapter(ours, "two")
    assert gap(output(ours, inputs), output(two, inputs)) < NEAR
    lora_fx.set_adapter(ours, "default")
    randomise(ours)
    assert gap(output(ours, inputs), output(one, inputs)) > NEAR
    with pytest.warns(UserWarning, match="no fingerprint"):
        lora_fx.load_adapter(ours, tmp_path / "one", replace=True)
    assert gap(output(ours, inputs), output(one, inputs)) < NEAR


def test_a_half_precision_base(tmp_path):
    model, inputs = MODELS["llama"]()
    model = model.to(torch.bfloat16)
    theirs = by_peft(model, tmp_path / "a", target_modules=["q_proj", "down_proj"], r=2)
    ours = loaded(model, tmp_path / "a")
    wide = loaded(MODELS["llama"]()[0], tmp_path / "a")
    assert gap(output(ours, inputs).float(), output(theirs, inputs).float()) < 1e-2
    lora_fx.save_adapter(ours, tmp_path / "b", format="peft")
    # The adapter's own numbers are exact, whatever the base's precision.
    again = loaded(MODELS["llama"]()[0], tmp_path / "b")
    assert torch.equal(output(again, inputs), output(wide, inputs))


def test_a_format_that_is_none_and_a_path_that_is_a_file_are_refused(tmp_path):
    model, inputs = MODELS["gpt2"]()
    model = lora_fx.inject(model, Policy(Rule(role="q", rank=2)), inputs)
    with pytest.raises(AdapterFileError, match="got 'hf'"):
        lora_fx.save_adapter(model, tmp_path / "a", format="hf")
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").write_text("kept")
    with pytest.raises(AdapterFileError, match="expected a folder's path; got a file"):
        lora_fx.save_adapter(model, tmp_path / "b", format="peft")
    assert (tmp_path / "b").read_text() == "kept"


def test_what_is_no_adapter_file_says_what_to_pass(tmp_path):
    model, inputs = MODELS["gpt2"]()
    lora_fx.save_adapter(
        lora_fx.inject(model, Policy(Rule(role="qkv", rank=2)), inputs), tmp_path / "a", format="peft"
    )
    with pytest.raises(AdapterFileError, match="load it into its model, and save it with save_adapter"):
        lora_fx.AdapterFile.read(tmp_path / "a")
    (tmp_path / "base.onnx").write_bytes(bytes(range(8, 200)))
    with pytest.raises(
        AdapterFileError, match=r"or no safetensors file .* Pass a file that save_adapter wrote"
    ):
        lora_fx.AdapterFile.read(tmp_path / "base.onnx")
