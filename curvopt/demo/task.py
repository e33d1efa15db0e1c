"""The demo's task: a small byte-level language model and two kinds of text that every Python has.

A Llama of about 0.8 M parameters learns the standard library's Python source (domain P) for a minute or
so; a LoRA adapter then learns the English of ``pydoc_data.topics`` (domain F). What fine-tuning gains shows
on held-out topics, and what it forgets shows on held-out source files. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

log = logging.getLogger(__name__)

Progress = Callable[[int, int, float], None]  # told after every step: steps done, steps in all, loss
VOCABULARY = 256
TOPIC_STRIDE, TOPIC_OFFSET, SOURCE_STRIDE = 8, 4, 16
# Folders of the standard library that are tests, third-party code, character tables, or domain F itself.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)


@dataclass(frozen=True)
class TextDomains:
    """Byte tokens (1-d, uint8) of both domains, each split into a part to train on and a part held out.

    Attributes:
        source: Python source for pre-training (domain P).
        source_heldout: other source files, to measure what was retained.
        topics: English documents for fine-tuning (domain F).
        topics_heldout: other topics, to measure what was learnt.
    """

    source: Tensor
    source_heldout: Tensor
    topics: Tensor
    topics_heldout: Tensor

    def digest(self) -> str:
        """Hash of the pre-training text: part of the cache key."""
        return hashlib.sha256(self.source.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class PretrainConfig:
    """Size and training of the base model; every field is part of the cache key."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 344
    length: int = 128
    batch: int = 8
    steps: int = 1100
    warmup: int = 55
    lr: float = 4e-3
    weight_decay: float = 0.1
    initial_range: float = 0.09
    seed: int = 0


QUICK = PretrainConfig(hidden=32, layers=2, heads=2, intermediate=88, length=64, steps=150, warmup=15, lr=1e-2)
"""Seconds instead of a minute; for tests."""


def byte_tokens(text: str | bytes) -> Tensor:
    """The bytes of a text as a 1-d uint8 tensor: token = byte."""
    data = text.encode("utf-8") if isinstance(text, str) else text
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def source_files() -> list[Path]:
    """The standard library's own Python files, in the order of their path below its folder."""
    root = Path(sysconfig.get_path("stdlib"))
    below = [path.relative_to(root) for path in root.rglob("*.py")]
    kept = [path for path in below if not SKIPPED_FOLDERS & set(path.parts)]
    return [root / path for path in sorted(kept, key=Path.as_posix)]


def split_topics() -> tuple[dict[str, str], dict[str, str]]:
    """Documents to train on and held-out documents of ``pydoc_data.topics``, by topic name.

    Topics quote one another at length, so a paragraph that a held-out document contains is taken out of the
    documents to train on.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held = {name: topics[name] for name in names[TOPIC_OFFSET::TOPIC_STRIDE]}
    seen = {paragraph.strip() for text in held.values() for paragraph in text.split("\n\n")}
    own = {name: [p for p in topics[name].split("\n\n") if p.strip() not in seen] for name in names}
    return {name: "\n\n".join(parts) for name, parts in own.items() if name not in held}, held


def load_text_domains() -> TextDomains:
    """Read both domains from this Python installation (some 10 MB; the same order every time)."""
    files = source_files()
    train, held = split_topics()
    return TextDomains(
        source=byte_tokens(b"\n".join(path.read_bytes() for i, path in enumerate(files) if i % SOURCE_STRIDE)),
        source_heldout=byte_tokens(b"\n".join(path.read_bytes() for path in files[::SOURCE_STRIDE])),
        topics=byte_tokens("\n".join(train.values())),
        topics_heldout=byte_tokens("\n".join(held.values())),
    )


def batches(tokens: Tensor, batch: int, length: int, steps: int, seed: int) -> Iterator[Tensor]:
    """``steps`` batches of random windows, [batch, length] int64; the seed alone decides which."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - length + 1, (batch, 1), generator=generator)
        yield tokens[starts + offsets].long()


def evaluate(model: nn.Module, tokens: Tensor, length: int = 128, windows: int = 256, batch: int = 32) -> float:
    """Mean next-token loss in nats (per byte for byte tokens) over evenly spaced windows of the stream."""
    device = next(model.parameters()).device
    count = max(1, min(windows, len(tokens) // length))
    starts = torch.linspace(0, len(tokens) - length, count, dtype=torch.float64).long()
    total, training = 0.0, model.training
    model.eval()
    with torch.no_grad():
        for some in starts.split(batch):
            x = tokens[some[:, None] + torch.arange(length)].long().to(device)
            total += model(input_ids=x, labels=x).loss.item() * len(some)
    model.train(training)
    return total / count


def fine_tune(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[Tensor],
    steps: int,
    callback: Progress | None = None,
    factor: Callable[[int], float] | None = None,
) -> list[float]:
    """Train on ``steps`` batches and return the loss of each.

    Args:
        model: a causal language model of transformers, bare or with adapters.
        optimizer: any torch optimizer over the model's trainable parameters.
        data: batches of token ids, [batch, length].
        steps: length of the schedule.
        callback: told of every step.
        factor: learning-rate factor of each step; linear decay to zero if not given.
    """
    device = next(model.parameters()).device
    decay = factor or (lambda step: 1.0 - step / steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    curve: list[float] = []
    model.train()
    for step, x in enumerate(data):
        x = x.to(device)
        optimizer.zero_grad()
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
        if callback:
            callback(step + 1, steps, curve[-1])
    return curve


def lora_model(
    model: nn.Module, rank: int = 8, seed: int = 0, *, alpha: float | None = None, targets: Any = "all-linear"
) -> PeftModel:
    """A copy of the model with a fresh PEFT LoRA adapter; the seed alone decides its starting values.

    Args:
        model: the base; it is copied, so that it can serve again.
        rank: r of every adapter.
        seed: for the start of A (B starts at zero).
        alpha: LoRA's alpha, 2r if not given.
        targets: PEFT's ``target_modules``; all linear layers but the head (in a Llama: seven per block).
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(copy.deepcopy(model), config)


def longest_window(config: PretrainConfig) -> int:
    """How many tokens the small Llama can read at once."""
    return 4 * config.length


def untrained_model(config: PretrainConfig) -> LlamaForCausalLM:
    """The small Llama before training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        intermediate_size=config.intermediate,
        initializer_range=config.initial_range,
        max_position_embeddings=longest_window(config),
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(shape)


def pretrain(domains: TextDomains, config: PretrainConfig, progress: Progress | None = None) -> LlamaForCausalLM:
    """Train the small Llama on domain P: AdamW, linear warm-up, cosine decay to zero."""
    model = untrained_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)

    def factor(step: int) -> float:
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / config.steps))
        return min(1.0, (step + 1) / config.warmup) * cosine

    data = batches(domains.source, config.batch, config.length, config.steps, config.seed)
    fine_tune(model, optimizer, data, config.steps, progress, factor)
    return model.eval()


def default_cache() -> Path:
    """``~/.cache/curvopt``."""
    return Path.home() / ".cache" / "curvopt"


def cached_folder(cache: Path, domains: TextDomains, config: PretrainConfig) -> Path:
    """Where the base model of this configuration and this text is kept: an ordinary Hugging Face folder."""
    key = json.dumps([asdict(config), domains.digest()], sort_keys=True)
    return cache / f"base-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def pretrained_model(
    cache: Path | None = None,
    progress: Progress | None = None,
    config: PretrainConfig | None = None,
    domains: TextDomains | None = None,
) -> LlamaForCausalLM:
    """The base model, from the cache if it is there and whole, else trained now and put there."""
    from transformers import LlamaForCausalLM

    config, domains = config or PretrainConfig(), domains or load_text_domains()
    folder = cached_folder(cache or default_cache(), domains, config)
    if not _whole(folder):
        if folder.exists():
            log.warning("The cached model %s is damaged; training it again.", folder)
        _store(pretrain(domains, config, progress), folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def _checksum(folder: Path) -> str:
    data = (folder / "config.json").read_bytes() + (folder / "model.safetensors").read_bytes()
    return hashlib.sha256(data).hexdigest()


def _whole(folder: Path) -> bool:
    try:
        return (folder / "checksum").read_text() == _checksum(folder)
    except (OSError, UnicodeDecodeError):
        return False


def _store(model: LlamaForCausalLM, folder: Path) -> None:
    """Write beside the final place and rename, so that an interrupted run leaves nothing half written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="new-") as place:
        fresh = Path(place) / folder.name
        model.save_pretrained(fresh)
        (fresh / "checksum").write_text(_checksum(fresh))
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
