"""Whole runs in other people's trainers, each with three optimizers.

torch's AdamW is the control. GritKFAC in its warm-up is AdamW by definition, so in every trainer it must end where
AdamW ends: whatever the trainer does to gradients, parameters and schedules reaches both alike. GritKFAC at work must
train as well, and end elsewhere.
"""

import importlib.util
from pathlib import Path

import models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from curvopt import GritKFAC, find_lora_pairs
from curvopt.demo import task
from curvopt.integrations.transformers import OptimizerFactory


def common():
    """The helpers of examples/, which are no package."""
    spec = importlib.util.spec_from_file_location(
        "examples_common", Path(__file__).parents[2] / "examples" / "common.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


byte_tokenizer = common().byte_tokenizer
pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's libraries
LR = 5e-3


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.01)


def in_warm_up(model):
    return GritKFAC(model, lr=LR, weight_decay=0.01, warmup_steps=10**6)


def at_work(model):
    return GritKFAC(model, lr=LR, weight_decay=0.01, inverse_every=2)


def compare(build, train, falls=True):
    """Train fresh models with the three optimizers; ``train(model, make)`` returns the losses."""
    start = models.snapshot(build())
    ends = {}
    for make in (adamw, in_warm_up, at_work):
        model = build()
        losses = train(model, make)
        ends[make] = models.snapshot(model)
        assert len(losses) >= 4 and all(map(torch.isfinite, map(torch.tensor, losses)))
        third = len(losses) // 3
        assert not falls or sum(losses[-third:]) < sum(losses[:third]), make.__name__
        moved = set(models.differences(start, ends[make])) & start.keys()  # DPO adds a frozen copy of the adapter
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert moved == trained and any("lora_A" in name for name in moved), make.__name__
        assert len(find_lora_pairs(model)) >= 2
    models.assert_near(ends[in_warm_up], ends[adamw], 1e-7, 1e-9)
    assert models.differences(ends[at_work], ends[adamw]) != []


def byte_llama():
    """A small Llama over bytes with an adapter, float64."""
    base = task.untrained_model(task.QUICK)
    model = task.lora_model(base, rank=4).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    return model


# ---------------------------------------------------------------------------------------------- Lightning


def lightning():
    return pytest.importorskip("lightning.pytorch", reason="lightning is not installed (extra: trainers)")


def module_of(model, make):
    """A LightningModule around a LoraMLP; every step has its own one of `models`' batches."""

    class Module(lightning().LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch, index):
            loss = models.loss(self.model, self.global_step)  # resuming starts the data anew
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            optimizer = make(self.model)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.9**i)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def fit(module, folder, steps, checkpoint=None, **kwargs):
    trainer = lightning().Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, **kwargs,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(range(12), batch_size=1), ckpt_path=checkpoint)
    return trainer


def without_idle():
    """A LoraMLP whose every trainable parameter gets a gradient."""
    model = models.mlp()
    model.idle.requires_grad_(False)
    return model


def test_lightning(tmp_path):
    def train(model, make):
        module = module_of(model, make)
        fit(module, tmp_path, 12, gradient_clip_val=1.0)
        return module.losses

    compare(without_idle, train, falls=False)  # every batch has labels of its own


def test_lightning_is_the_plain_loop_to_the_bit(tmp_path):
    ends = []
    for trainer in (True, False):
        model = without_idle()
        if trainer:
            module = module_of(model, at_work)
            optimizer = fit(module, tmp_path, 6).optimizers[0]
        else:
            optimizer = at_work(model)
            for i in range(6):
                optimizer.param_groups[0]["lr"] = LR * 0.9**i
                models.fit(model, optimizer, 1, i)
        ends.append(models.snapshot(model, optimizer))
    models.assert_same(*ends)


def test_lightning_resumes_to_the_bit(tmp_path):
    whole = without_idle()
    last = fit(module_of(whole, at_work), tmp_path, 8).optimizers[0]
    half = module_of(without_idle(), at_work)
    fit(half, tmp_path, 4).save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    again = module_of(without_idle(), at_work)
    resumed = fit(again, tmp_path, 8, checkpoint=tmp_path / "half.ckpt").optimizers[0]
    models.assert_same(models.snapshot(again.model, resumed), models.snapshot(whole, last))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_lightning_in_bf16_mixed_precision(clip, tmp_path):
    if clip and getattr(GritKFAC, "_step_supports_amp_scaling", False):
        pytest.xfail("Lightning refuses to clip for optimizers that unscale gradients themselves")
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        module = module_of(models.mlp(torch.float32).requires_grad_(True), at_work)
        fit(module, tmp_path, 6, precision=precision, gradient_clip_val=clip)
        losses[precision] = module.losses
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=3e-2)
    assert losses["bf16-mixed"] != losses["32-true"]


# ---------------------------------------------------------------------------------------------- TRL


SENTENCES = ["the adapter learns to say what the base never said", "a rank is a promise that the spectrum may keep",
             "curvature is cheap where the rank is small", "the loop that trains is the loop that was"]  # fmt: skip


def trl():
    pytest.importorskip("datasets", reason="datasets is not installed (extra: trainers)")
    return pytest.importorskip("trl", reason="trl is not installed (extra: trainers)")


def quiet(folder, **kwargs):
    """Arguments for a short run on the CPU that logs every step and saves nothing."""
    return {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no",
            "seed": 0, "logging_steps": 1, "per_device_train_batch_size": 2, "disable_tqdm": True, "max_steps": 9,
            "gradient_checkpointing": False, "learning_rate": LR, **kwargs}  # fmt: skip


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(folder, model, **kwargs):
    from datasets import Dataset

    args = trl().SFTConfig(**quiet(folder, max_length=32, **kwargs.pop("args", {})))
    data = Dataset.from_list([{"text": text} for text in SENTENCES])
    return trl().SFTTrainer(model, args, train_dataset=data, processing_class=byte_tokenizer(), **kwargs)


def test_trl_sft(tmp_path):
    trl()
    compare(byte_llama, lambda model, make: losses_of(sft(tmp_path, model, optimizers=(make(model), None))))


def test_trl_builds_the_optimizer_itself(tmp_path):
    """`optimizer_cls_and_kwargs` with the factory is the same run as an optimizer made by hand."""
    trl()
    ends = []
    for factory in (True, False):
        model = byte_llama()
        kwargs = {"lr": LR, "weight_decay": 0.01, "inverse_every": "2"}
        given = {"optimizer_cls_and_kwargs": (OptimizerFactory, kwargs)} if factory else {
            "optimizers": (at_work(model), None)
        }  # fmt: skip
        trainer = sft(tmp_path, model, **given)
        trainer.train()
        ends.append(models.snapshot(model, trainer.optimizer.optimizer))
    models.assert_same(*ends)


def test_trl_sft_resumes_to_the_bit(tmp_path):
    trl()
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = task.lora_model(task.untrained_model(task.QUICK), rank=4)
    optimizer = at_work(whole)
    sft(tmp_path / "whole", whole, optimizers=(optimizer, None), args=saving).train()
    fresh = task.lora_model(task.untrained_model(task.QUICK), rank=4, seed=1)
    other = at_work(fresh)
    trainer = sft(tmp_path / "again", fresh, optimizers=(other, None), args={"max_steps": 6})
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    models.assert_same(models.snapshot(fresh, other), models.snapshot(whole, optimizer))


def test_trl_dpo(tmp_path):
    trl()
    from datasets import Dataset

    rows = [{"prompt": text[:12], "chosen": text[12:], "rejected": text[12:][::-1]} for text in SENTENCES]

    def train(model, make):
        args = trl().DPOConfig(**quiet(tmp_path, max_length=40))
        trainer = trl().DPOTrainer(
            model, args=args, train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer(),
            optimizers=(make(model), None),
        )  # fmt: skip
        return losses_of(trainer)

    compare(byte_llama, train)


def test_trl_grpo(tmp_path):
    """Completions are sampled; with one seed all three optimizers see the same first ones."""
    trl()
    from datasets import Dataset

    def reward(completions, **kwargs):
        return [float(sum(map(str.isalpha, text))) for text in completions]

    firsts = set()
    for make in (adamw, at_work):
        model = byte_llama().float()
        before = models.snapshot(model)
        args = trl().GRPOConfig(**quiet(tmp_path, max_completion_length=6, num_generations=2, max_steps=3))
        trainer = trl().GRPOTrainer(
            model, reward_funcs=reward, args=args, processing_class=byte_tokenizer(),
            train_dataset=Dataset.from_list([{"prompt": text[:12]} for text in SENTENCES]),
            optimizers=(make(model), None),
        )  # fmt: skip
        trainer.train()
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        firsts.add(rewards[0])
        moved = models.differences(before, models.snapshot(model))
        assert len(rewards) == 3 and moved and all("lora_" in name for name in moved)
    assert len(firsts) == 1


# ---------------------------------------------------------------------------------------------- sentence-transformers


def test_sentence_transformers(tmp_path):
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed (extra: trainers)")
    pytest.importorskip("datasets", reason="datasets is not installed (extra: trainers)")
    from datasets import Dataset
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=256,
                       max_position_embeddings=64, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0)  # fmt: skip
    BertModel(shape).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")

    def build():
        words = Transformer(str(tmp_path / "bert"), max_seq_length=32)
        model = st.SentenceTransformer(modules=[words, Pooling(32)], device="cpu")
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
        return model.double()

    data = Dataset.from_list([{"anchor": text, "positive": text[:20]} for text in SENTENCES * 2])

    def train(model, make):
        args = st.SentenceTransformerTrainingArguments(**quiet(tmp_path / "runs", per_device_train_batch_size=4))
        loss = MultipleNegativesRankingLoss(model)
        return losses_of(st.SentenceTransformerTrainer(
            model, args=args, train_dataset=data, loss=loss, optimizers=(make(model), None)
        ))  # fmt: skip

    compare(build, train)


# ---------------------------------------------------------------------------------------------- timm


def test_timm(tmp_path):
    """A timm ViT, its scheduler and its moving average of the weights; the head is trained beside the adapters."""
    try:
        import timm
        from timm.scheduler import CosineLRScheduler
        from timm.utils import ModelEmaV2
    except (ImportError, RuntimeError) as error:  # torchvision of another build raises the latter
        pytest.skip(f"timm cannot be imported: {error}")

    def build():
        torch.manual_seed(0)
        base = timm.create_model(
            "vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2,
            num_classes=5,
        )  # fmt: skip
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["qkv", "fc1", "fc2"], modules_to_save=["head"])
        return get_peft_model(base, lora).double()

    images = torch.randn(8, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(8) % 5

    def train(model, make):
        optimizer = make(model)
        scheduler = CosineLRScheduler(optimizer, t_initial=12, warmup_t=2, warmup_lr_init=1e-4)
        average = ModelEmaV2(model, decay=0.9)
        losses = []
        for step in range(12):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            scheduler.step(step + 1)
            average.update(model)
            losses.append(loss.item())
        return losses

    compare(build, train)
