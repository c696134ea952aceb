"""PyTorch Lightning: checkpoints of adapters alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_fx
from lora_fx.errors import AdapterNameError
from tests.integration.small import adapted, base, batch, gap, loss

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self, net: Any = None) -> None:
        super().__init__()
        self.net = net if net is not None else adapted(tied=True)

    def training_step(self, words: Tensor, index: int) -> Tensor:
        return loss(self.net, words)

    def validation_step(self, words: Tensor, index: int) -> None:
        self.log("loss", loss(self.net, words))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(lora_fx.parameters(self.net), lr=1e-2)


def fit(module: Module, folder: Path, ckpt_path: Path | None = None, **options: Any) -> None:
    from lora_fx.lightning import AdapterCheckpoints

    data = torch.utils.data.DataLoader([batch(i)[0] for i in range(12)], batch_size=4)
    keep = lightning.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[AdapterCheckpoints(), keep],
        **options,
    )
    trainer.fit(module, data, data, ckpt_path=ckpt_path)


def test_checkpoints_hold_adapters_alone_and_resume_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed = Module(), Module()
    fit(whole, tmp_path / "whole")
    first = tmp_path / "whole" / "epoch=0.ckpt"
    held = torch.load(first, weights_only=False)["state_dict"]
    assert held
    assert all("lora_" in key for key in held)
    fit(resumed, tmp_path / "resumed", ckpt_path=first)
    left, right = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(left[key], right[key]) for key in left)
    loaded = Module.load_from_checkpoint(tmp_path / "whole" / "epoch=2.ckpt", strict=False)
    assert gap(loaded.net, whole.net) == 0.0
    assert gap(whole.net, base(tied=True)) > 1e-2


def test_a_module_without_adapters_is_refused(tmp_path: Path) -> None:
    module = Module(base())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    with pytest.raises(AdapterNameError, match="LightningModule"):
        fit(module, tmp_path)


class Early(Module):
    """Makes its optimiser before the adapters."""

    def __init__(self) -> None:
        super().__init__(base(tied=True))
        self.early = [torch.optim.AdamW(self.net.parameters(), lr=1e-2)]
        lora_fx.inject(self.net, lora_fx.Policy(lora_fx.Rule(rank=2)), batch(0)[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.early[0]


@pytest.mark.parametrize("module", [Early, Module])
def test_an_optimiser_made_before_inject_is_told(tmp_path: Path, module: type[Module]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module(), tmp_path)
    told = any("the optimiser holds none of the" in str(w.message) for w in caught)
    assert told is (module is Early)
