"""Models and peft adapters with random values, for the tests of peft's files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.passes.onnx_state import cast_state


def drawn(*shape: int) -> Tensor:
    """Return the same random numbers each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every trained number a random value, small enough that outputs stay tame."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.empty(parameter.shape).normal_(0, 0.1, generator=generator)
                parameter.copy_(parameter.abs() + 0.3 if "magnitude" in name else parameter + noise)


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Run in float64: what two libraries compute is compared, and not how they round."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    with torch.no_grad(), cast_state(model, torch.float64):
        out = model(**wide)
    if isinstance(out, tuple):
        return out[0]
    return out if isinstance(out, Tensor) else next(v for v in out.values() if isinstance(v, Tensor))


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def by_peft(model: nn.Module, folder: Path, name: str = "default", **config) -> nn.Module:
    """Let peft adapt a copy of the model, with random values, and save it."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config), adapter_name=name)
        randomise(adapted)
        adapted.save_pretrained(str(folder))
    return adapted.eval()


def through_peft(model: nn.Module, folder: Path) -> nn.Module:
    """Let peft load a folder onto a copy of the model; what it finds missing or unknown is an error."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing.*|.*unexpected.*|.*inconsistency.*")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


def loaded(model: nn.Module, folder: Path, **options) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no fingerprint.*|.*lora_dropout.*")
        return lora_fx.load_adapter(copy.deepcopy(model), folder, **options).eval()


class Convs(nn.Module):
    """One, two and three dimensions, a stride, a 1x1, and a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.three = nn.Conv3d(2, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 5, 1)
        self.grouped = nn.Conv2d(5, 5, 3, groups=5, padding=1)
        self.one = nn.Conv1d(5, 4, 3, padding="same")
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.three(x).mean(2).relu()
        x = self.grouped(self.point(self.two(x)).relu()).flatten(2)
        return self.head(self.norm(self.one(x)).mean(-1))


class Lookup(nn.Module):
    """An embedding, two linears whose names end alike, and a head tied to the embedding or not."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.fc = nn.Linear(8, 8)
        self.block = nn.Sequential()
        self.block.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block.fc(self.fc(self.embed(ids)).relu()))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 8) / 3)
        self.down = nn.Parameter(torch.randn(3, 8, 6) / 3)
        self.gate = nn.Parameter(torch.randn(6, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,eoi->beo", x, self.up) * torch.sigmoid(x @ self.gate.t()).unsqueeze(1)
        return torch.einsum("beo,eio->bi", hidden, self.down)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.fc(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return self.mha(x, x, x, need_weights=False)[0]


def convs() -> tuple[nn.Module, dict[str, Tensor]]:
    return seeded(Convs), {"x": drawn(2, 2, 3, 8, 8)}


def lookup(*, tied: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    return seeded(lambda: Lookup(tied=tied)), {"ids": torch.tensor([[0, 1, 2], [7, 10, 3]])}


def mixture() -> tuple[nn.Module, dict[str, Tensor]]:
    return seeded(Mixture), {"x": drawn(5, 8)}


def attention() -> tuple[nn.Module, dict[str, Tensor]]:
    return seeded(Attention), {"x": drawn(2, 4, 8)}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.2,
    )
    return seeded(lambda: BertForSequenceClassification(config)), {
        "input_ids": torch.arange(12).reshape(2, 6)
    }


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.2)
    return seeded(lambda: GPT2LMHeadModel(config)), {"input_ids": torch.arange(12).reshape(2, 6)}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.2,
    )
    return seeded(lambda: LlamaForCausalLM(config)), {"input_ids": torch.arange(12).reshape(2, 6)}


def seeded(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


MODELS = {
    "convs": convs,
    "lookup": lookup,
    "tied": lambda: lookup(tied=True),
    "mixture": mixture,
    "attention": attention,
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
}


class Grouped(nn.Module):
    """Experts whose tokens come sorted, so that each expert multiplies with its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.inner = Batched()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.fc(x))


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 8, 6) / 3)
        self.second = nn.Parameter(torch.randn(3, 8, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(3, -1, 8)
        return torch.bmm(torch.bmm(x, self.first).relu(), self.second.mT).flatten(0, 1)


def batched() -> tuple[nn.Module, dict[str, Tensor]]:
    return seeded(Grouped), {"x": drawn(6, 8)}


MODELS["batched"] = batched
