"""The models that training steps are measured on: real architectures, a few layers of their real width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Case:
    """One model: how it is built and run, and which module paths are adapted (regular expressions).

    ``saved_limit`` is what its saved activations may be, over the frozen model's, and ``time_limit`` what
    its overhead may be, over peft's. Where dispatching is all that costs (``dispatch_bound``), FLOPs and
    memory are traded for fewer operations, and are only told.
    """

    name: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor], Tensor]
    inputs: tuple[int, ...]
    every: str
    qv: str = ""
    saved_limit: float = 1.2
    time_limit: float = 0.7
    dispatch_bound: bool = False

    def forward(
        self, dtype: torch.dtype = torch.float32, autocast: bool = False, device: str = "cpu"
    ) -> Forward:
        """Return ``loss(model)`` on inputs that ask for their gradient."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(*self.inputs, generator=generator).to(device, dtype).requires_grad_()

        def loss(model: nn.Module) -> Tensor:
            x.grad = None
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                return self.run(model, x).float().square().mean()

        return loss

    def example(self, dtype: torch.dtype, device: str) -> Any:
        """Return example inputs for tracing."""
        x = torch.zeros(1, *self.inputs[1:], dtype=dtype, device=device)
        return x if self.run is _plain else {"inputs_embeds": x}


def _hidden(model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x, use_cache=False).last_hidden_state


def _encoded(model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x).last_hidden_state


def _plain(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def bert(layers: int = 2, width: int = 768, heads: int = 12) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=100,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width if width > 64 else 2 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return BertModel(config, add_pooling_layer=False)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        vocab_size=100,
        n_layer=2,
        n_positions=256,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        attn_implementation="sdpa",
    )
    return GPT2Model(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=4,
        attn_implementation="sdpa",
    )
    return LlamaModel(config)


def timm(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm import create_model

        return create_model(name, **options)

    return build


CASES = {
    case.name: case
    for case in (
        Case(
            "BERT-base-like",
            bert,
            _encoded,
            (4, 128, 768),
            r".*(query|key|value|dense)",
            r".*(query|value)",
            saved_limit=1.1,
            time_limit=0.5,
        ),
        Case("GPT-2-like", gpt2, _hidden, (4, 128, 768), r".*(c_attn|c_proj|c_fc)"),
        Case("Llama-like", llama, _hidden, (2, 128, 1024), r".*_proj", r".*(q_proj|v_proj)"),
        Case(
            "ViT-S",
            timm("vit_small_patch16_224", depth=3, num_classes=0),
            _plain,
            (4, 3, 224, 224),
            r".*(qkv|proj|fc1|fc2)",
            saved_limit=1.1,
            time_limit=0.5,
        ),
        Case(
            "ResNet-50",
            timm("resnet50", num_classes=0),
            _plain,
            (2, 3, 128, 128),
            r".*(conv\d|downsample\.0)",
        ),
        Case(
            "ConvNeXt-T",
            timm("convnext_tiny", num_classes=0),
            _plain,
            (2, 3, 128, 128),
            r".*mlp\.fc[12]",
            saved_limit=1.1,
            time_limit=0.5,
        ),
        Case(
            "BERT-12 tiny",
            lambda: bert(12, 64, 2),
            _encoded,
            (1, 16, 64),
            r".*(query|key|value|dense)",
            time_limit=0.5,
            dispatch_bound=True,
        ),
    )
}
