"""Ways to train, continued: transformers' Trainer, Accelerate, and what PEFT can do to a model."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import models
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from loopkit import NAN, Loop, Make, Run, accumulation, clipped, halves, like_plain, plain, stepwise, token_loss, value
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

# ---------------------------------------------------------------------------------------------- Accelerate


def accelerator(**kwargs: Any) -> Accelerator:
    """Return an Accelerator that knows nothing of those before it; its state is global."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **kwargs)


def accelerated(make: Make) -> Run:
    model = models.mlp()
    accelerate = accelerator()
    prepared, optimizer = accelerate.prepare(model, make(model))

    def step(i: int, broken: bool) -> Tensor:
        optimizer.zero_grad()
        loss = value(prepared, i, broken)
        accelerate.backward(loss)
        optimizer.step()
        return loss

    return bare(stepwise(model, optimizer, step))


def accelerated_accumulation(make: Make) -> Run:
    model = models.mlp()
    accelerate = accelerator(gradient_accumulation_steps=2)
    prepared, optimizer = accelerate.prepare(model, make(model))

    def step(i: int, broken: bool) -> Tensor:
        for x, y in halves(model, i):
            with accelerate.accumulate(prepared):
                loss = token_loss(prepared, x, y) * (NAN if broken else 1)
                accelerate.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        return loss

    return bare(stepwise(model, optimizer, step))


def bare(run: Run) -> Run:
    """Look at the optimizer inside Accelerate's wrapper."""
    run.optimizer = run.optimizer.optimizer
    return run


def like_accumulation(make: Make, steps: int) -> dict[str, Tensor]:
    run = accumulation(make)
    run.train(0, steps, False)
    return run.snapshot()


# ---------------------------------------------------------------------------------------------- Trainer


class Graded(nn.Module):
    """A LoraMLP that returns its loss, times a factor, as Trainer wants it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, y: Tensor, factor: float) -> dict[str, Tensor]:
        return {"loss": token_loss(self.inner, x, y) * factor}


class Batches(torch.utils.data.IterableDataset):
    """Batches ``begin`` to ``end``, whole or in halves, one an item."""

    def __init__(self, model: nn.Module, begin: int, end: int, broken: bool, parts: int) -> None:
        self.model, self.span, self.factor, self.parts = model, range(begin, end), NAN if broken else 1.0, parts

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in self.span:
            for x, y in halves(self.model, i) if self.parts == 2 else [models.batch(self.model, i)]:
                yield {"x": x, "y": y, "factor": self.factor}


def arguments(folder: str, **kwargs: Any) -> TrainingArguments:
    """Return arguments for a run on the CPU that logs, reports and saves nothing by itself."""
    quiet = {"use_cpu": True, "save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True,
             "per_device_train_batch_size": 1, "remove_unused_columns": False, "lr_scheduler_type": "constant",
             "max_grad_norm": 0.0}  # fmt: skip
    return TrainingArguments(folder, **{**quiet, **kwargs})


def trainer(
    how: str, parts: int = 1, build: Callable[[], nn.Module] = models.mlp, **kwargs: Any
) -> Callable[[Make], Run]:
    """Trainer with ``how`` the optimizer gets in: "optimizers", or "optimizer_cls_and_kwargs"."""

    def start(make: Make) -> Run:
        model = Graded(build())
        folder = tempfile.TemporaryDirectory()

        def fresh(begin: int, end: int, broken: bool, **optimizer: Any) -> Trainer:
            data = Batches(model.inner, begin, end, broken, parts)
            args = arguments(folder.name, max_steps=end - begin, gradient_accumulation_steps=parts, **kwargs)
            return Trainer(model, args, train_dataset=data, data_collator=lambda items: items[0], **optimizer)

        def train(begin: int, end: int, broken: bool = False) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a dataset without a length
                fresh(begin, end, broken, optimizers=(run.optimizer, constant(run.optimizer))).train()

        if how == "optimizers":
            optimizer = make(model.inner)
        else:
            make.prepare(model.inner)
            given = {"optimizer_cls_and_kwargs": (make.cls, {"model": model.inner, **make.kwargs})}
            optimizer = fresh(0, 1, False, **given).create_optimizer()
        run = Run(model.inner, optimizer, train)
        run.folder = folder  # removed with the run
        return run

    return start


def constant(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda i: 1.0)


def like_clipped(make: Make, steps: int) -> dict[str, Tensor]:
    run = clipped(make, 0.05)
    run.train(0, steps, False)
    return run.snapshot()


# ---------------------------------------------------------------------------------------------- adapters of PEFT


NAMES = ("default", "other")


def two_adapters() -> nn.Module:
    return models.llama(torch.float64, adapters=NAMES, start="random")


def turns(make: Make) -> Run:
    """Two adapters that take turns, batch by batch, under one optimizer."""
    model = two_adapters()
    optimizer = make(model, **make.timeless)

    def step(i: int, broken: bool) -> Tensor:
        model.set_adapter(NAMES[i % 2])
        optimizer.zero_grad()
        loss = value(model, i, broken)
        loss.backward()
        optimizer.step()
        return loss

    return stepwise(model, optimizer, step)


def like_alone(make: Make, steps: int) -> dict[str, Tensor]:
    """Each adapter trained alone, in a model of its own, on the batches of its turns."""
    found: dict[str, Tensor] = {}
    for turn, name in enumerate(NAMES):
        model = two_adapters()
        model.set_adapter(name)
        optimizer = make(model, adapter=name, **make.timeless)
        for i in range(turn, steps, 2):
            models.fit(model, optimizer, 1, i)
        found |= {key: x for key, x in models.snapshot(model, optimizer).items() if f".{name}." in key}
    return found


def with_head() -> nn.Module:
    return models.llama(torch.float64, start="random", modules_to_save=["lm_head"])


def like_head_apart(make: Make, steps: int) -> dict[str, Tensor]:
    """The adapter under ours, the saved module under torch.optim.AdamW."""
    model = with_head()
    head = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    ours = make([p for name, p in model.named_parameters() if "lora_" in name], model=model)
    group = ours.param_groups[0]
    adamw = torch.optim.AdamW(head, **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})
    assert len(head) == 1
    for i in range(steps):
        model.zero_grad()
        models.loss(model, i).backward()
        ours.step()
        adamw.step()
    return models.snapshot(model, ours)


def frozen(model: nn.Module) -> nn.Module:
    for layer in [*model.layers, model.idle]:
        layer.lora_A.weight.requires_grad_(False)
    return model


def frozen_A(make: Make) -> Run:
    return plain(make, lambda: frozen(models.mlp()))


def like_frozen(make: Make, steps: int) -> dict[str, Tensor]:
    """A trainable A whose gradient is thrown away before every step."""
    model = models.mlp()
    optimizer = make(model)
    for i in range(steps):
        optimizer.zero_grad()
        models.loss(model, i).backward()
        for layer in model.layers:
            layer.lora_A.weight.grad = None
        optimizer.step()
    return models.snapshot(model, optimizer)


# ---------------------------------------------------------------------------------------------- quantized bases


def base(quantize: Callable[[nn.Linear], nn.Linear]) -> nn.Module:
    """Return a PEFT model whose base has every linear map of its blocks replaced by ``quantize`` of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.model.get_submodule(parent), leaf, quantize(module))
    model.is_loaded_in_4bit = quantize is nf4  # how transformers tells PEFT which layer to use
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


def adapters(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what a snapshot has of adapters."""
    return {name: x for name, x in found.items() if "lora_" in name}


def nf4(linear: nn.Linear) -> nn.Linear:
    """Return bitsandbytes' 4-bit layer of a linear map."""
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    layer.load_state_dict({"weight": linear.weight.detach()})
    return layer.to("cpu")  # quantizes


def nf4_and_back(linear: nn.Linear) -> nn.Linear:
    """Return a plain layer with the values that the 4-bit one has."""
    weight = nf4(linear).weight
    linear.weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return linear


LOOPS = [
    Loop("Accelerate", accelerated, like_plain),
    Loop("Accelerate, accumulation", accelerated_accumulation, like_accumulation),
    Loop("Trainer, `optimizers=`", trainer("optimizers"), like_plain),
    Loop("Trainer, `optimizer_cls_and_kwargs`", trainer("optimizer_cls_and_kwargs"), like_plain),
    Loop("Trainer, accumulation", trainer("optimizers", parts=2), like_accumulation),
    Loop("Trainer, clipping", trainer("optimizers", max_grad_norm=0.05), like_clipped),
    Loop("several adapters in turn", turns, like_alone, turns=2),
    Loop("`modules_to_save`", lambda make: plain(make, with_head), like_head_apart),
    Loop("frozen A", frozen_A, like_frozen),
    Loop("base quantized to nf4", lambda make: plain(make, lambda: base(nf4)),
         lambda make, n: adapters(like_plain(make, n, lambda: base(nf4_and_back)))),
]  # fmt: skip
