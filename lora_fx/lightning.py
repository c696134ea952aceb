"""Lightning checkpoints of adapters alone.

The model may be an attribute of the LightningModule, or the LightningModule itself::

    trainer = Trainer(callbacks=[AdapterCheckpoints(), ModelCheckpoint(...)])
    trainer.fit(module, data)                            # checkpoints hold the adapters, not the base
    trainer.fit(module, data, ckpt_path="last.ckpt")     # resumes, the base as it was injected
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lora_fx.checkpoints import adapter_state
from lora_fx.errors import AdapterNameError
from lora_fx.passes.registers import plain
from lora_fx.passes.runtime import injected
from lora_fx.passes.untrained import warn_unknown


class AdapterCheckpoints(Callback):
    """Keeps in every checkpoint, of each injected model, the adapters alone.

    What is not an injected model's (a metric's state, a second network) stays in the checkpoint.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let checkpoints be loaded that lack the base."""
        del trainer, stage
        pl_module.strict_loading = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of optimisers that hold nothing of an injected model's adapter."""
        for model in _injected_models(pl_module).values():
            warn_unknown(model, trainer.optimizers)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the base of every injected model out of the checkpoint.

        Raises:
            AdapterNameError: the LightningModule holds no injected model.
        """
        del trainer
        models = _injected_models(pl_module)
        if not models:
            raise AdapterNameError(
                type(pl_module).__name__,
                expected="a LightningModule that is, or holds, a model with adapters",
                got="no adapters",
                advice="Call lora_fx.inject in its __init__ or configure_model.",
            )
        for path, model in models.items():
            prefix = f"{path}." if path else ""  # Lightning's own names, as in its state dict
            kept = {f"{prefix}{key}" for name in _adapters(model) for key in adapter_state(model, name)}
            base = {f"{prefix}{key}" for key, _ in model.named_parameters(remove_duplicate=False)}
            base |= {f"{prefix}{key}" for key, _ in model.named_buffers(remove_duplicate=False)}
            dropped = {plain(key) for key in base} - kept
            for key in [key for key in checkpoint["state_dict"] if plain(key) in dropped]:
                del checkpoint["state_dict"][key]


def _injected_models(module: LightningModule) -> dict[str, Any]:
    return {path: model for path, model in module.named_modules() if injected(model) is not None}


def _adapters(model: Any) -> list[str]:
    record = injected(model)
    return [] if record is None else list(record.plans)
