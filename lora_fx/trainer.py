"""Hugging Face's Trainer with checkpoints of the adapters alone.

Everything else (evaluation, ``resume_from_checkpoint``, ``load_best_model_at_end``, Accelerate's
wrapping) is the Trainer's own::

    model = AutoModelForCausalLM.from_pretrained(...)
    lora_fx.inject(model, policy)
    trainer = AdapterTrainer(model, args, train_dataset=...)
    trainer.train(resume_from_checkpoint=True)

A subclass of the Trainer keeps its own changes with ``class Mine(AdapterCheckpoints, MyTrainer)``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

import lora_fx
from lora_fx.errors import NoAdapterFileError
from lora_fx.passes.switch import require
from lora_fx.passes.untrained import warn_unknown

ADAPTER_FILE = "lora_fx_{adapter}.safetensors"
"""The file of each adapter in a checkpoint's folder; the name must not be one of the Trainer's own."""


class AdapterCheckpoints:
    """What makes a Trainer save and load the model's adapters, one file each, and never the base."""

    if TYPE_CHECKING:
        model: Any
        args: Any
        state: Any
        processing_class: Any
        accelerator: Any
        optimizer: Any
        push_to_hub: Any

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; warn of an optimiser that holds nothing of the adapter.

        Raises:
            AdapterNameError: the model has no adapters; nothing has been trained.
        """
        require(self._injected(), None)
        warn_unknown(self._injected(), [] if self.optimizer is None else [self.optimizer])
        trainer: Any = super()
        return trainer.train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write every adapter into the folder; what is sharded is gathered by all processes."""
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        del state_dict
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        model = self._injected()
        for adapter in self._adapters():
            if self.args.should_save or self._is_sharded():
                folder.mkdir(parents=True, exist_ok=True)
                lora_fx.save_adapter(model, folder / _file(adapter), adapter)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        del model  # the wrapped one
        self._load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load(self.state.best_model_checkpoint)

    def _load(self, folder: str) -> None:
        for adapter in self._adapters():
            path = Path(folder) / _file(adapter)
            if not path.is_file():
                raise _no_adapter(path)
            lora_fx.load_adapter(self._injected(), path, adapter=adapter, replace=True)

    def _adapters(self) -> list[str]:
        return list(require(self._injected(), None)[0].plans)

    def _injected(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    def _is_sharded(self) -> bool:
        from lora_fx.kinds.spread import is_sharded

        return any(is_sharded(p) for p in self._injected().parameters())


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """``transformers.Trainer`` with checkpoints of the adapters alone.

    Raises:
        AdapterNameError: the model has no adapters when training begins.
    """


def _no_adapter(path: Path) -> NoAdapterFileError:
    """Return the error for a checkpoint without the file: a stock Trainer's, or another adapter's."""
    others = sorted(p.name for p in path.parent.glob(_file("*")))
    whole = sorted(p.name for p in path.parent.glob("*model*.safetensors"))
    got = f"one of {', '.join(others)}" if others else "one without adapters"
    advice = "Inject under the name that was saved: inject(..., adapter=...)."
    if not others:
        got = f"a stock Trainer's, of the whole model ({', '.join(whole)})" if whole else got
        advice = (
            "Load its weights into the model yourself, write the missing file with "
            f"save_adapter(model, {str(path)!r}), and resume; or train anew from these weights."
        )
    return NoAdapterFileError(
        str(path), expected="a checkpoint that AdapterTrainer wrote", got=got, advice=advice
    )


def _file(adapter: str) -> str:
    return ADAPTER_FILE.format(adapter=adapter)
