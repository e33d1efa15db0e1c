"""What the examples share: options, a small language model with two kinds of text, a tokenizer, a report.

Everything comes from the Python installation, nothing is downloaded: a byte-level Llama of 0.8 M parameters learns the
standard library's source once (about a minute, then cached), and the examples fine-tune it on English.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from curvopt.demo import task


def parser(doc: str, name: str, *, steps: int = 200, lr: float = 1e-2, batch: int = 8) -> argparse.ArgumentParser:
    """The options that all examples have."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=steps, help="optimizer steps (default %(default)s)")
    options.add_argument("--lr", type=float, default=lr, help="learning rate (default %(default)s)")
    options.add_argument("--rank", type=int, default=8, help="LoRA rank (default %(default)s)")
    options.add_argument("--batch", type=int, default=batch, help="sequences or images a step (default %(default)s)")
    options.add_argument("--length", type=int, default=64, help="tokens of a sequence (default %(default)s)")
    options.add_argument("--out", type=Path, default=Path("runs") / name, help="output folder (default %(default)s)")
    options.add_argument("--cache", type=Path, default=task.default_cache(), help="base model (default %(default)s)")
    options.add_argument("--tiny", action="store_true", help="a much smaller base model, made in seconds")
    return options


def base_and_text(args: argparse.Namespace) -> tuple[nn.Module, task.TextDomains]:
    """The pre-trained base model, and the texts as token streams (1-d uint8)."""
    domains = task.load_text_domains()
    config = task.QUICK if args.tiny else task.PretrainConfig()
    from tqdm import tqdm

    with tqdm(total=config.steps, desc="pre-training the base model, once", delay=1) as bar:
        base = task.pretrained_model(args.cache, lambda done, total, loss: bar.update(), config, domains)
    return base, domains


def byte_tokenizer():
    """A transformers tokenizer whose tokens are bytes; byte 0 ends and pads a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as byte-level BPE writes bytes
    others = [b for b in range(256) if b not in printable]
    vocabulary = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = next(word for word, token in vocabulary.items() if token == 0)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def report(
    out: Path, losses: Sequence[float], before: float, after: float, what: str = "loss on held-out text"
) -> None:
    """Plot the losses of a run into ``out/loss.png`` and print what it has come to."""
    window = max(1, len(losses) // 10)
    smooth = [sum(part) / len(part) for i in range(len(losses)) if (part := losses[max(0, i + 1 - window) : i + 1])]
    plot(out / "loss.png", {"training loss": losses, f"mean of {window}": smooth}, "step", "loss")
    print(f"{what}: {before:.4f} before, {after:.4f} after {len(losses)} steps; {out}/: loss.png and the adapter")


def plot(path: Path, lines: dict[str, Sequence[float] | Tensor], x: str, y: str) -> None:
    """Plot lines over 1, 2, ... into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for label, values in lines.items():
        axes.plot(range(1, len(values) + 1), torch.as_tensor(values), label=label)
    axes.set(xlabel=x, ylabel=y)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
