"""LoraConfig -> Policy: the same weights, ranks and scales as peft itself adapts."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_fx.errors import PeftFormatError, PolicyError
from lora_fx.matrix import columns_form, rows_form
from lora_fx.policy import Policy, Rule, Skip, Train
from lora_fx.sites import Site, Use
from tests.unit.site_builders import attention, plan, site

# --- a model with the shapes of names that the patterns are about ---


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.up = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.mha = nn.MultiheadAttention(8, 2)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.h = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Conv2d(3, 4, 3)) for _ in range(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Inner()
        self.q_proj = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)


def sites_of(model: nn.Module) -> list[Site]:
    found: list[Site] = []
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(path, recurse=False):
            if parameter.dim() < 2:
                continue
            embedding = isinstance(module, nn.Embedding)
            kind = "embedding" if embedding else "conv" if isinstance(module, nn.Conv2d) else "linear"
            shape = tuple(parameter.shape)
            found.append(
                Site(
                    attribute,
                    kind,
                    shape,
                    "float32",
                    columns_form(shape) if embedding else rows_form(shape),
                    names=(attribute,),
                    uses=(Use(kind, path, "n", branch=True),),
                    roles={"head": None} if path == "classifier" else {},
                    module=path,
                    module_class=type(module).__name__,
                )
            )
    return found


def ours(config: object, model: nn.Module) -> dict[str, tuple[int, float]]:
    policy = Policy.from_peft(config)
    assert Policy.from_json(policy.to_json()) == policy
    parameters = {n: (tuple(p.shape), "float32") for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = plan(sites_of(model), policy, parameters=parameters)
    return {d.name: (d.rank or 0, d.scale) for d in made.adapted}


def theirs(config: object, model: nn.Module) -> dict[str, tuple[int, float]]:
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import MultiheadAttention

    found: dict[str, tuple[int, float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        injected = inject_adapter_in_model(copy.deepcopy(config), copy.deepcopy(model))
    for path, module in injected.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        owner = path.replace("base_layer.", "")  # the output projection lies inside a wrapped attention
        attribute = "in_proj_weight" if isinstance(module, MultiheadAttention) else "weight"
        name = getattr(module, "parameter_name", attribute)
        found[f"{owner}.{name}"] = (module.r["default"], module.scaling["default"])
    return found


LEAVES = ["q_proj", "v_proj", "up", "embed", "mha", "classifier", "model.layers.1.q_proj", "0", "layers.2.up"]
PATTERNS = [
    "q_proj",
    r"layers\.1\..*",
    "model.layers.0.q_proj",
    ".*(up|mha)",
    r"\d+\.v_proj",
    r"[02]\..*",
    "no",
]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {
            "r": st.integers(1, 3),
            "lora_alpha": st.integers(1, 5),
            "target_modules": st.one_of(
                st.lists(st.sampled_from(LEAVES), min_size=2, max_size=5, unique=True),
                st.sampled_from([r".*\.(q|v)_proj", "q_proj", r".*\d\.mha", r"model\.layers\.[02]\..*up"]),
            ),
            "exclude_modules": st.one_of(
                st.none(), st.lists(st.sampled_from(LEAVES), max_size=1), st.sampled_from([".*1.*", "q_proj"])
            ),
            "rank_pattern": st.dictionaries(st.sampled_from(PATTERNS), st.integers(4, 7), max_size=4),
            "alpha_pattern": st.dictionaries(st.sampled_from(PATTERNS), st.integers(6, 9), max_size=4),
            "use_rslora": st.booleans(),
            "modules_to_save": st.sampled_from([None, None, ["classifier"], ["v_proj"]]),
        }
    ),
    layers=st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 2), min_size=1, max_size=2)),
    layers_pattern=st.sampled_from([None, "layers", ["h", "layers"], ["experts", "layers"]]),
)
def test_the_same_weights_ranks_and_scales_as_peft(fields, layers, layers_pattern):
    """peft's own injection on the same model is the truth, over drawn configurations."""
    peft = pytest.importorskip("peft", exc_type=ImportError)
    if not isinstance(fields["target_modules"], str) and layers is not None:
        fields |= {"layers_to_transform": layers, "layers_pattern": layers_pattern}
    config = peft.LoraConfig(**fields)
    model = Model()
    try:
        expected = theirs(config, model)
    except ValueError:  # peft refuses: nothing to compare with
        event("refused by peft")
        return
    event(f"patterns: {len({rank for rank, _ in expected.values()})} ranks")
    assert ours(config, model) == expected


@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"experts.up": 3}}])
def test_target_parameters_as_peft(options):
    peft = pytest.importorskip("peft", exc_type=ImportError)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(nn.Linear(8, 8).weight.detach().clone())
            self.down = nn.Parameter(nn.Linear(8, 8).weight.detach().clone())

    model = nn.Sequential()
    model.experts = Experts()
    config = peft.LoraConfig(target_modules=[], target_parameters=["experts.up"], r=2, **options)
    assert ours(config, model) == theirs(config, model) != {}


def test_all_linear_is_every_linear_but_the_head():
    adapted = ours({"peft_type": "LORA", "target_modules": "all-linear", "r": 2}, Model())
    linears = {f"{n}.weight" for n, m in Model().named_modules() if isinstance(m, nn.Linear)}
    assert set(adapted) == linears - {"classifier.weight"}


def test_the_policy_reads_like_one_written_by_hand():
    config = {"target_modules": ["v_proj", "q_proj"], "r": 16, "lora_alpha": 32, "lora_dropout": 0.1}
    policy = Policy.from_peft({**config, "bias": "lora_only", "use_dora": True, "init_lora_weights": "olora"})
    assert policy.bias == "lora_only"
    assert policy.rules[0] == Rule(
        module=("q_proj", "v_proj"), rank=16, alpha=32, dropout=0.1, dora=True, init="olora"
    )


def test_fresh_heads_of_classifiers_are_trained():
    sites = [*attention("a", 8), site("classifier.weight"), site("classifier.dense.weight")]
    policy = Policy.from_peft({"target_modules": ["query"], "task_type": "SEQ_CLS"})
    made = plan(sites, policy, parameters={"classifier.bias": ((8,), "float32")})
    assert [d.name for d in made.trained] == ["classifier.weight", "classifier.dense.weight"]
    assert [e.name for e in made.extras] == ["classifier.bias"]
    assert plan(attention("a", 8), policy).trained == ()  # nothing to train is no error here


def test_a_saved_module_that_is_not_there_is_an_error():
    policy = Policy.from_peft({"target_modules": ["query"], "modules_to_save": ["clasifier"]})
    with pytest.raises(PolicyError, match="clasifier"):
        plan(attention("a", 8), policy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 4]]),
        ("lora_bias", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("alora_invocation_tokens", [1]),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"x": 1}),
        ("velora_config", {"x": 1}),
        ("something_of_the_future", "on"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", False),
        ("peft_type", "LOHA"),
        ("target_modules", None),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(field, value):
    with pytest.raises(PeftFormatError, match=field):
        Policy.from_peft({"target_modules": ["q"], "init_lora_weights": True, field: value})


def test_a_config_of_pefts_own_defaults_is_read():
    peft = pytest.importorskip("peft", exc_type=ImportError)
    config = peft.LoraConfig(target_modules=["q_proj"])
    from_object, from_dict = Policy.from_peft(config), Policy.from_peft(config.to_dict())
    from_json = Policy.from_peft(json.loads(json.dumps(config.to_dict(), default=list)))
    assert from_object == from_dict == from_json
    assert from_object.rules[0] == Rule(module=("q_proj",), rank=8, alpha=8)


def test_something_else_is_refused():
    with pytest.raises(PeftFormatError, match="a LoraConfig or a mapping"):
        Policy.from_peft(3)


def test_the_order_of_the_rules():
    policy = Policy.from_peft(
        {"target_modules": ["q"], "exclude_modules": ["x.q"], "modules_to_save": ["head"]}
    )
    kinds = [type(rule) for rule in policy.rules]
    assert kinds[0] is Train
    assert kinds[1] is Skip
    assert kinds[-1] is Rule
