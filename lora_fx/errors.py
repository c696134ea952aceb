"""Named errors: each says where, what was expected, what was got, and what to do."""

from __future__ import annotations


class LoraFxError(Exception):
    """The base of every error that lora_fx raises on purpose.

    The message is built from four parts, which stay readable as attributes: ``where`` (a qualified
    name, a file, an argument), ``expected``, ``got`` and ``advice``.
    """

    def __init__(self, where: str, *, expected: str, got: str, advice: str) -> None:
        self.where = where
        self.expected = expected
        self.got = got
        self.advice = advice
        # What others said may end its own sentence.
        end = "" if got.endswith((".", "?", "!")) else "."
        super().__init__(f"{where}: expected {expected}; got {got}{end} {advice}")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by the four parts, so that the error survives a process boundary."""
        return (_rebuild, (type(self), self.where, self.expected, self.got, self.advice))


def _rebuild(cls: type[LoraFxError], where: str, expected: str, got: str, advice: str) -> LoraFxError:
    return cls(where, expected=expected, got=got, advice=advice)


class InputError(LoraFxError):
    """The example inputs do not fit the model."""


class TraceError(LoraFxError):
    """The model could not be recorded."""


class PolicyError(LoraFxError):
    """A rule cannot be read, matches nothing, or asks for what is not known."""


class PlanError(LoraFxError):
    """A plan does not fit the model, or cannot be read."""


class NoPlanFileError(PlanError, FileNotFoundError):
    """There is no such file of a plan."""


class WrappedModelError(LoraFxError):
    """The model is already wrapped for DDP, FSDP or tensor parallelism, or by peft."""


class AdapterNameError(LoraFxError):
    """An adapter's name is taken, unknown or unusable."""


class ProbeError(LoraFxError):
    """An adapter does not act as its delta on the weight would."""


class VerifyError(LoraFxError):
    """The invariant ``injected == folded`` does not hold on this model."""


class BaseMismatchError(LoraFxError):
    """An adapter was made for another base model."""


class AdapterFileError(LoraFxError):
    """An adapter file is damaged, of another version, or not an adapter file."""


class NoAdapterFileError(AdapterFileError, FileNotFoundError):
    """There is no such adapter file."""


class CheckpointError(LoraFxError):
    """A checkpoint on disk cannot be read, or must not be written where it was asked for."""


class NoCheckpointError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint."""


class AdapterValueError(LoraFxError):
    """An adapter holds NaN or infinity, or its delta does not survive the weight's precision."""


class WeightWriteError(LoraFxError):
    """A write to an adapted weight would have been lost."""


class ExportError(LoraFxError):
    """The model could not be exported to ONNX."""


class NoOnnxFileError(ExportError, FileNotFoundError):
    """There is no such ONNX file."""


class CertificateError(LoraFxError):
    """A check of a certificate failed."""


class ProviderError(LoraFxError):
    """An execution provider that was asked for is not there."""


class PeftFormatError(LoraFxError):
    """A peft adapter holds what lora_fx cannot represent, or the reverse."""
