"""``python -m curvopt.demo``: fine-tune a small language model with LoRA, AdamW and GritKFAC side by side.

Without arguments nothing is needed but this package: a byte-level Llama learns Python source (once; it is
then cached), adapters learn English from it, and a table, a figure and reloadable adapters come out. With
--model and --data the same comparison runs on your own model folder and text.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from curvopt.demo import report
from curvopt.demo import task as work
from curvopt.demo.options import UsageError, parse, read_text
from curvopt.demo.report import Losses, Run
from curvopt.lora import find_lora_pairs

Factory = Callable[[nn.Module, float], torch.optim.Optimizer]
# the best of benchmarks/quality.py's grid
LEARNING_RATES = {"adamw": 1e-2, "grit": 1e-2, "grit-ranks": 1e-2, "matryoshka": 1e-2}
CALIBRATION = 16  # batches that GoRA sees before the first step


@dataclass
class Task:
    """What to fine-tune and what to measure it on."""

    base: nn.Module
    train: Tensor
    heldout: Tensor
    retain: Tensor | None
    unit: str


def optimizers(threshold: float = 0.99, every: int = 50) -> dict[str, Factory]:
    """The optimizers to choose from, by name; each is built from a model and a learning rate.

    Args:
        threshold: τ of the rank adaptation, for those that adapt ranks.
        every: steps between two looks at the ranks.
    """

    def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)

    def grit(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        from curvopt import GritKFAC

        return GritKFAC(model, lr=lr)

    def grit_ranks(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        from curvopt import GritKFAC

        return GritKFAC(model, lr=lr, reproject_every=every, rank_threshold=threshold, min_rank=1)

    def matryoshka(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        from curvopt import MatryoshkaScaledAdam

        return MatryoshkaScaledAdam(model, lr=lr, nesting="stratified")

    return {"adamw": adamw, "grit": grit, "grit-ranks": grit_ranks, "matryoshka": matryoshka}


def build_task(args: argparse.Namespace, progress: work.Progress) -> Task:
    """The token streams and the base model that the options ask for; everything cheap is checked first."""
    texts = {name: read_text(name, getattr(args, name)) for name in ("data", "retain") if getattr(args, name)}
    config = work.QUICK if args.quick else work.PretrainConfig()
    if args.model:
        base, encode = load_folder(args)
        texts.setdefault("data", "\n".join(t for part in work.split_topics() for t in part.values()))
        streams = {name: encode(text) for name, text in texts.items()}
        longest = getattr(base.config, "max_position_embeddings", args.length)
    else:
        domains = work.load_text_domains()
        streams = {"retain": domains.source_heldout}
        streams |= {name: work.byte_tokens(text) for name, text in texts.items()}
        longest = work.longest_window(config)
    if args.length > longest:
        raise UsageError(f"--length: this model reads at most {longest} tokens, got {args.length}")
    if "data" in streams:
        cut = len(streams["data"]) * 7 // 8
        streams |= {"train": streams["data"][:cut], "data": streams["data"][cut:]}
    else:
        streams |= {"train": domains.topics, "data": domains.topics_heldout}
    for name, tokens in streams.items():
        if len(tokens) < args.length:
            raise UsageError(f"--{name}: too short for windows of {args.length} tokens")
    if not args.model:
        base = work.pretrained_model(args.cache, progress, config, domains)
    unit = "nats per token" if args.model else "nats per byte"
    return Task(base.to(args.device), streams["train"], streams["data"], streams.get("retain"), unit)


def load_folder(args: argparse.Namespace) -> tuple[nn.Module, Callable[[str], Tensor]]:
    """Model and text encoder of a local Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (args.model / "config.json").is_file():
        raise UsageError(f"--model: {args.model} is not a model folder (no config.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(args.model, local_files_only=True)
    except Exception as error:  # whatever a damaged or foreign folder raises is the user's answer
        raise UsageError(f"--model: cannot load {args.model}: {str(error).strip().splitlines()[0]}") from error

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return model, encode


def measure(model: nn.Module, task: Task, length: int) -> Losses:
    """The losses of a model on the task's texts."""
    retain = None if task.retain is None else work.evaluate(model, task.retain, length)
    train, heldout = (work.evaluate(model, tokens, length) for tokens in (task.train, task.heldout))
    return Losses(train, heldout, retain)


def run_one(
    task: Task, name: str, seed: int, args: argparse.Namespace, progress: work.Progress
) -> tuple[Run, nn.Module]:
    """Fine-tune a fresh adapter; the seed gives every optimizer the same start and the same batches."""
    model = work.lora_model(task.base, args.rank, seed)
    make = optimizers(args.threshold, every=max(1, args.steps // 6))[name]
    started = None
    if args.init == "gora":
        optimizer: Any = start_by_gradients(model, lambda m: make(m, args.lr[name]), task, seed, args)
        started = work.evaluate(model, task.train, args.length)
    else:
        optimizer = make(model, args.lr[name])
    data = work.batches(task.train, args.batch, args.length, args.steps, seed)
    start = time.perf_counter()
    curve = work.fine_tune(model, optimizer, data, args.steps, progress)
    seconds = time.perf_counter() - start
    ranks = optimizer.ranks() if hasattr(optimizer, "ranks") else {p.name: p.rank for p in find_lora_pairs(model)}
    rank = mean(ranks.values())
    if hasattr(optimizer, "compact"):
        optimizer.compact()
    if hasattr(optimizer, "remove_hooks"):
        optimizer.remove_hooks()
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses = measure(model, task, args.length)
    return Run(name, args.lr[name], seed, losses, seconds, rank, size, curve, start_loss=started), model


def start_by_gradients(
    model: nn.Module,
    then: Callable[[nn.Module], torch.optim.Optimizer],
    task: Task,
    seed: int,
    args: argparse.Namespace,
) -> torch.optim.Optimizer | None:
    """Calibrate on batches of their own; ranks between half and twice the uniform one, lr₀ by trial."""
    from curvopt import GoRAInit

    bounds = {"rank": args.rank, "min_rank": (args.rank + 1) // 2, "max_rank": 2 * args.rank}
    init = GoRAInit(
        model, **bounds, calibration_steps=CALIBRATION, start="gora", allocation="exact", compare="role",
        init_lr="auto", then=then,
    )  # fmt: skip
    model.train()
    for x in work.batches(task.train, args.batch, args.length, CALIBRATION, seed + 1000):
        x = x.to(args.device)

        def closure(x: Tensor = x) -> Tensor:
            init.zero_grad()
            loss: Tensor = model(input_ids=x, labels=x).loss
            loss.backward()
            return loss

        init.step(closure)
    return init.delegate


def save_and_reload(model: Any, run: Run, task: Task, args: argparse.Namespace) -> tuple[str, bool]:
    """Save the adapter, load it on the bare base, compare the losses: the line to show, and are they equal."""
    from peft import PeftModel

    folder = args.out / f"adapter-{run.optimizer}"
    model.save_pretrained(folder, save_embedding_layers=False)
    run.disk_bytes = (folder / "adapter_model.safetensors").stat().st_size
    again = PeftModel.from_pretrained(copy.deepcopy(task.base), folder)
    loss = work.evaluate(again, task.heldout, args.length)
    same = abs(loss - run.losses.heldout) <= 1e-4
    verdict = "the same held-out loss" if same else "A DIFFERENT held-out loss"
    return f"{folder}: saved and loaded again, {verdict} ({run.losses.heldout:.6f}, {loss:.6f})", same


@contextmanager
def progress_bar(title: str) -> Iterator[work.Progress]:
    """A rich progress bar, as a callback for steps; where no terminal would show it, a line per quarter."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    text = TextColumn("{task.description} loss {task.fields[loss]:.3f}")
    if not sys.stdout.isatty():

        def tell(done: int, total: int, loss: float) -> None:
            if done * 4 // total > (done - 1) * 4 // total:
                sys.stdout.write(f"{title} {done}/{total}, loss {loss:.3f}\n")
                sys.stdout.flush()

        yield tell
        return
    with Progress(text, *columns, transient=True) as bar:
        row = bar.add_task(title, total=None, loss=float("nan"), visible=False)
        yield lambda done, total, loss: bar.update(row, completed=done, total=total, loss=loss, visible=True)


def run_demo(args: argparse.Namespace) -> int:
    """The whole comparison, from the base model to the files; returns the exit code."""
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its hints on kernels concern nobody here
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
    trained: list[int] = []

    def note(done: int, total: int, loss: float) -> None:
        trained.append(done)
        progress(done, total, loss)

    with progress_bar("Pre-training the base model, once:") as progress:
        task = build_task(args, note)
    origin = f"pre-trained now for {len(trained)} steps, kept in" if trained else "loaded from"
    size = sum(p.numel() for p in task.base.parameters()) / 1e6
    console.print(f"Base model: {size:.2f} M parameters, {origin} {task.base.name_or_path}")
    before = measure(task.base, task, args.length)
    runs: list[Run] = []
    models: dict[str, nn.Module] = {}
    for seed, name in itertools.product(range(args.seeds), args.optimizer):
        with progress_bar(f"{name}, seed {seed + 1} of {args.seeds}:") as progress:
            run, models[name] = run_one(task, name, seed, args, progress)
        runs.append(run)
    reloaded = [save_and_reload(models[run.optimizer], run, task, args) for run in runs[-len(models) :]]
    console.print(report.table(runs, before, task.unit))
    for line, _ in reloaded:
        console.print(line)
    for run in runs:
        if run.start_loss is not None:
            line = f"{before.train:.4f} to {run.start_loss:.4f} before the first step, after {CALIBRATION} batches"
            console.print(f"{run.optimizer}, seed {run.seed + 1}: gradients took the loss from {line}")
    title = f"LoRA rank {args.rank}, {args.steps} steps of {args.batch} × {args.length} tokens"
    report.figure(runs, before, task.unit, f"{title}, {args.seeds} seed(s)", args.out / "curves.png")
    report.write_numbers(runs, before, {k: str(v) for k, v in vars(args).items()}, args.out)
    console.print(f"{args.out}: curves.png, results.csv, results.json")
    return 0 if all(same for _, same in reloaded) else 1


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    try:
        args = parse(argv, __doc__.split("\n\n")[1], LEARNING_RATES)
        return run_demo(args)
    except UsageError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        message = f"the demo needs {error.name}: install this package with its 'demo' extra"
    except OSError as error:  # a full disk, a folder without permission
        message = str(error).splitlines()[0]
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"curvopt.demo: {message}", file=sys.stderr)
    return 2
