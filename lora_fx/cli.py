"""The command line: audit, certify, fold, switch, refit and compare files, without a torch model.

Exit status: 0, all is well; 1, a certificate failed or the latencies differ; 2, the question could not be
answered, with one line on the error output that says why.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, get_args

from rich.console import Console

import lora_fx
from lora_fx.errors import CertificateError, CheckpointError, LoraFxError, PeftFormatError
from lora_fx.fingerprints import BaseCheck
from lora_fx.peft_files import is_peft_folder

FINE, FAILED, UNANSWERED = 0, 1, 2


class _Shown(Protocol):
    def to_json(self) -> str:
        """Return the record as JSON text."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Raises:
        SystemExit: the arguments cannot be read (status 2), or help was asked for.
    """
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    # A note of a library is no answer; what lora_fx has to say is in the answers themselves.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return command(args)
        except CertificateError as error:
            return _fail(error, FAILED)
        except (LoraFxError, OSError, ImportError) as error:
            return _fail(error, UNANSWERED)


def _fail(error: Exception, status: int) -> int:
    print(f"lora-fx: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lora-fx", description="Audit, certify, fold and compare LoRA adapters and ONNX files."
    )
    parser.add_argument("--version", action="version", version=f"lora_fx {lora_fx.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    audit = commands.add_parser("audit", help="what was adapted, why, in which form and by how much")
    audit.add_argument("file", metavar="FILE", help="an adapter file, a peft folder or a folded ONNX file")
    _command(audit, _audit)

    certify = commands.add_parser("certify", help="prove that FOLDED is BASE with other numbers")
    _pair(certify)
    certify.add_argument(
        "--adapter", metavar="FILE", help="check every changed weight against this adapter file"
    )
    _command(certify, _certify)

    fold = commands.add_parser("fold", help="write BASE with ADAPTER folded in to OUT (ONNX: and prove it)")
    fold.add_argument(
        "base", metavar="BASE", help="the base model's ONNX file, safetensors file, or folder of the latter"
    )
    fold.add_argument("adapter", metavar="ADAPTER", help="a file that save_adapter wrote")
    fold.add_argument("out", metavar="OUT", help="the file, or the folder, to write")
    fold.add_argument("--standalone", action="store_true", help="an ONNX file that needs no other")
    fold.add_argument(
        "--base-check",
        choices=get_args(BaseCheck),
        default="exact",
        help="what makes the base the right one (default: exact, every bit)",
    )
    _command(fold, _fold)

    switch = commands.add_parser("switch", help="write BASE with ADAPTER's weights as inputs to OUT")
    switch.add_argument("base", metavar="BASE", help="the base model's ONNX file")
    switch.add_argument("adapter", metavar="ADAPTER", help="a file that save_adapter wrote")
    switch.add_argument("out", metavar="OUT", help="the ONNX file to write, the .onnx_adapter beside it")
    _command(switch, _switch)

    manifest = commands.add_parser("manifest", help="list the initializers of BASE that FOLDED changes")
    manifest.add_argument("base", metavar="BASE", help="the base model's ONNX file")
    manifest.add_argument("folded", metavar="FOLDED", help="the ONNX file with an adapter folded in")
    _command(manifest, _manifest)

    latency = commands.add_parser("compare-latency", help="time FOLDED against BASE, in pairs")
    _pair(latency)
    latency.add_argument("--threads", type=_positive(int), default=1, metavar="N", help="(default: 1)")
    latency.add_argument("--seconds", type=_positive(float), default=10.0, metavar="S", help="(default: 10)")
    _command(latency, _compare_latency)
    return parser


def _positive(number: type[int | float]) -> Callable[[str], float]:
    """Return what reads a number above zero, and refuses others in argparse's words."""

    def read(text: str) -> float:
        value = number(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
        return value

    read.__name__ = number.__name__  # argparse names it where the text is no number
    return read


def _pair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="the base model's ONNX file")
    parser.add_argument("folded", metavar="FOLDED", help="the ONNX file with an adapter folded in")
    parser.add_argument(
        "--providers",
        default="auto",
        metavar="NAME",
        help="auto, cuda, tensorrt or cpu (default: auto, the best that is there)",
    )


def _command(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(command=command)


def _audit(args: argparse.Namespace) -> int:
    _show(lora_fx.audit(args.file), args)
    return FINE


def _certify(args: argparse.Namespace) -> int:
    made = lora_fx.certify(args.base, args.folded, adapter=args.adapter, providers=args.providers)
    _show(made, args)
    return FINE if made.ok else FAILED


def _fold(args: argparse.Namespace) -> int:
    if is_peft_folder(args.adapter):
        raise PeftFormatError(
            args.adapter,
            expected="a file that save_adapter wrote",
            got="a peft folder, which says nothing about its base",
            advice="Load it into its model with load_adapter and save it with save_adapter.",
        )
    shown = sys.stderr.isatty() and not args.json
    if Path(args.base).is_dir() or Path(args.base).suffix == ".safetensors":
        if args.standalone:
            raise CheckpointError(
                args.base,
                expected="an ONNX file, with --standalone",
                got="a checkpoint, which always stands alone when it is folded",
                advice="Leave the option out.",
            )
        audit = lora_fx.fold_checkpoint(
            args.base, args.adapter, args.out, base_check=args.base_check, progress=shown
        )
        _show(audit, args)
        return FINE
    made = lora_fx.fold_onnx(
        args.base,
        args.adapter,
        args.out,
        standalone=args.standalone,
        base_check=args.base_check,
        progress=shown,
    )
    _show(made, args)
    return FINE


def _switch(args: argparse.Namespace) -> int:
    _show(lora_fx.switch_onnx(args.base, args.adapter, args.out), args)
    return FINE


def _manifest(args: argparse.Namespace) -> int:
    _show(lora_fx.refit_manifest(args.base, args.folded), args)
    return FINE


def _compare_latency(args: argparse.Namespace) -> int:
    found = lora_fx.compare_latency(
        args.base, args.folded, providers=args.providers, threads=args.threads, seconds=args.seconds
    )
    _show(found, args)
    return FAILED if found.verdict == "different" else FINE


def _show(record: _Shown, args: argparse.Namespace) -> None:
    """Print a record as JSON, as a table on a terminal, or as a table's plain text in a pipe."""
    console = Console()
    shown: Any = record
    if args.json:
        print(record.to_json())
    elif console.is_terminal:
        console.print(shown)
    else:
        print(record)


if __name__ == "__main__":
    sys.exit(main())
