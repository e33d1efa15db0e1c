"""The command line of the demo: every wrong value becomes one line that says what was wrong."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from curvopt.demo.task import default_cache

FULL = {"rank": 16, "steps": 250, "batch": 8, "length": 128, "seeds": 2}
QUICK = FULL | {"steps": 30, "length": 64}


class UsageError(Exception):
    """Something the user gave cannot be used; the message is the one line to show."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing."""
        raise UsageError(message)


def positive(kind: type) -> Callable[[str], Any]:
    """An argparse type: a number of this kind above zero."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    convert.__name__ = kind.__name__
    return convert


def parse(argv: list[str] | None, description: str, rates: dict[str, float]) -> argparse.Namespace:
    """Read and check the command line.

    Args:
        argv: the arguments; those of the process if None.
        description: for ``--help``.
        rates: the optimizers to choose from, with their learning rates.
    """
    parser = Parser(prog="python -m curvopt.demo", description=description)
    whole = positive(int)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="Hugging Face model folder with its tokenizer")
    add("--data", type=Path, metavar="FILE", help="text to fine-tune on; its last eighth is held out")
    add("--retain", type=Path, metavar="FILE", help="text on which to measure what is forgotten")
    add("--optimizer", default="adamw,grit,grit-ranks", metavar="NAME[,NAME]", help=f"of {', '.join(rates)}")
    add("--lr", default="", metavar="LR", help="one number, or one per optimizer: adamw=5e-3,grit=1e-2")
    for name, default in FULL.items():
        add(f"--{name}", type=whole, metavar="N", help=f"default {default}")
    add("--init", choices=("lora", "gora"), default="lora", help="gora: gradients decide ranks and start; default lora")
    add("--threshold", type=positive(float), default=0.99, metavar="τ", help="grit-ranks: energy to keep, 0 < τ <= 1")
    add("--device", default="cpu", help="default cpu")
    add("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default runs/demo")
    add("--cache", type=Path, default=default_cache(), metavar="DIR", help="default %(default)s")
    add("--quick", action="store_true", help="tiny sizes, seconds instead of minutes")
    args = parser.parse_args(argv)
    for name, default in (QUICK if args.quick else FULL).items():
        setattr(args, name, getattr(args, name) or default)
    args.optimizer = list(dict.fromkeys(args.optimizer.split(",")))
    unknown = [name for name in args.optimizer if name not in rates]
    if unknown:
        raise UsageError(f"--optimizer: unknown {', '.join(unknown)}; choose from {', '.join(rates)}")
    if args.threshold > 1:
        raise UsageError(f"--threshold: must be in (0, 1], got {args.threshold}")
    if args.length < 2:
        raise UsageError("--length: must be at least 2")
    args.lr = learning_rates(args.lr, args.optimizer, rates)
    check_places(args)
    return args


def learning_rates(text: str, names: list[str], rates: dict[str, float]) -> dict[str, float]:
    """The learning rate of each optimizer: the defaults, overruled by the text of ``--lr``."""
    rates = dict(rates)
    for part in filter(None, text.split(",")):
        name, _, number = part.rpartition("=")
        if name and name not in names:
            raise UsageError(f"--lr: {name} is not one of {', '.join(names)}")
        try:
            rate = positive(float)(number)
        except (ValueError, argparse.ArgumentTypeError):
            raise UsageError(f"--lr: not a number above 0: {number}") from None
        rates.update(dict.fromkeys([name] if name else names, rate))
    return rates


def check_places(args: argparse.Namespace) -> None:
    """Check the device and make the folders to write to, before the long part."""
    try:
        args.device = torch.device(args.device)
        torch.zeros(1, device=args.device).item()  # on "meta" there is nothing to compute
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    for option in ("out",) if args.model else ("out", "cache"):
        try:
            getattr(args, option).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--{option}: {error.filename}: {error.strerror}") from None


def read_text(option: str, path: Path) -> str:
    """A UTF-8 text file, or a usable complaint."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--{option}: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--{option}: {path} is not UTF-8 text") from None
