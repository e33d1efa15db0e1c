"""The Trainer callback and the factory."""

import dataclasses
import json
import logging
import subprocess
import sys

import models
import pytest
import torch
from gora_models import published
from loopkit_frameworks import arguments
from transformers import Trainer, TrainerCallback, TrainingArguments

from curvopt import GritKFAC, MatryoshkaScaledAdam
from curvopt.integrations.transformers import CurvatureCallback, OptimizerFactory, mask_padding
from curvopt.optim.grit.diagnostics import steps_of

DATA = [{"input_ids": ids, "labels": ids} for i in range(8) for ids in models.llama_ids(i)]
MOVING = {"lr": 1e-2, "reproject_every": 1, "rank_threshold": 0.6, "min_rank": 1}
NAMES = {"mean_rank", "min_rank", "max_rank", "kept_share", "effective_rank", "skipped_updates"}


def trainer(folder, model, **kwargs):
    given = {key: kwargs.pop(key) for key in ("optimizer_cls_and_kwargs", "optimizers", "callbacks") if key in kwargs}
    quiet = {"max_steps": 6, "per_device_train_batch_size": 2, "logging_strategy": "steps", "logging_steps": 2}
    return Trainer(model, arguments(str(folder), **{**quiet, **kwargs}), train_dataset=DATA, **given)


class Reporter(TrainerCallback):
    """Stands for the reporters that Trainer itself puts first."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def run(folder, installed=True, **kwargs):
    model = models.llama(r=6, start="random")
    optimizer = GritKFAC(model, **MOVING)
    reporter = Reporter()
    done = trainer(folder, model, optimizers=(optimizer, None), callbacks=[reporter])
    callback = CurvatureCallback(**kwargs)
    if installed:
        assert callback.install(done) is callback
    else:
        done.add_callback(callback)
    return model, optimizer, reporter, done


@pytest.mark.parametrize("installed", [True, False])
def test_numbers_are_logged_and_true(installed, tmp_path):
    _, optimizer, reporter, done = run(tmp_path, installed)
    done.train()
    entries = [entry for entry in done.state.log_history if "loss" in entry]
    assert len(entries) == 3 and all({f"curvopt/{name}" for name in NAMES} <= set(entry) for entry in entries)
    last, ranks = entries[-1], optimizer.ranks()
    assert last["curvopt/mean_rank"] == sum(ranks.values()) / len(ranks) < 6
    assert last["curvopt/kept_share"] == pytest.approx(sum(ranks.values()) / (6 * len(ranks)))
    assert (last["curvopt/min_rank"], last["curvopt/max_rank"]) == (min(ranks.values()), max(ranks.values()))
    effective = [pair["effective_rank"] for pair in optimizer.diagnostics()["pairs"].values()]
    assert last["curvopt/effective_rank"] == pytest.approx(sum(effective) / len(effective))
    assert last["curvopt/skipped_updates"] == 0
    # a callback added last comes after the reporters, hence `install`
    assert all(("curvopt/mean_rank" in seen) == installed for seen in reporter.seen)


def test_skipped_updates_are_logged(tmp_path):
    model, optimizer, _, done = run(tmp_path)
    spoil = model.base_model.model.lm_head.register_forward_hook(
        lambda module, args, out: out * torch.nan if steps_of(optimizer) == 3 else None
    )
    done.train()
    spoil.remove()
    assert [e["curvopt/skipped_updates"] for e in done.state.log_history if "loss" in e] == [0, 1, 1]


def test_logging_changes_no_bit(tmp_path):
    ends = []
    for installed in (True, False):
        model = models.llama(r=6, start="random")
        optimizer = GritKFAC(model, **MOVING)
        done = trainer(tmp_path, model, optimizers=(optimizer, None))
        if installed:
            CurvatureCallback().install(done)
        done.train()
        ends.append(models.snapshot(model, optimizer))
    models.assert_same(*ends)


def test_compaction_at_the_end(tmp_path):
    _, optimizer, _, done = run(tmp_path, compact=True)
    done.train()
    shapes = {pair.name: pair.rank for pair in optimizer.pairs}
    assert shapes == optimizer.ranks() and max(shapes.values()) < 6
    kept = [e for e in done.state.log_history if "curvopt/kept_share" in e][-1]["curvopt/kept_share"]
    assert kept == pytest.approx(sum(shapes.values()) / (6 * len(shapes)))


def test_compaction_and_the_best_model_do_not_go_together(tmp_path):
    model = models.llama(start="random")
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 2,
               "eval_steps": 2}  # fmt: skip
    args = arguments(str(tmp_path), max_steps=2, **options)
    done = Trainer(model, args, train_dataset=DATA, eval_dataset=DATA[:2], optimizers=(GritKFAC(model), None),
                   callbacks=[CurvatureCallback(compact=True)])  # fmt: skip
    with pytest.raises(ValueError, match="compact must be False with load_best_model_at_end=True"):
        done.train()


def test_compaction_of_what_is_known_by_name_is_refused_before_the_training(tmp_path):
    model = models.llama(start="random")
    done = Trainer(model, arguments(str(tmp_path), max_steps=2), train_dataset=DATA,
                   optimizers=(GritKFAC(model.named_parameters(), rank_threshold=0.9), None),
                   callbacks=[CurvatureCallback(compact=True)])  # fmt: skip
    with pytest.raises(ValueError, match="compact must be False with an optimizer that knows its parameters by their"):
        done.train()


def test_records_are_kept(tmp_path):
    _, optimizer, _, done = run(tmp_path, path=tmp_path / "run.jsonl", every=2)
    done.train()
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert set(lines[-1]["pairs"]) == set(optimizer.ranks())


@pytest.mark.parametrize("every", [0, 1.5, True])
def test_bad_every(every, tmp_path):
    with pytest.raises(ValueError, match="every must be an integer ≥ 1, got"):
        CurvatureCallback(path=tmp_path / "run.jsonl", every=every)


def test_the_numbers_of_what_gora_hands_over_to(tmp_path):
    model = models.llama(r=6)
    optimizer = published(model, rank=4, min_rank=2, max_rank=6, calibration_steps=2,
                         then=lambda m: GritKFAC(m, **MOVING))  # fmt: skip
    done = trainer(tmp_path, model, optimizers=(optimizer, None))
    CurvatureCallback(compact=True).install(done)
    done.train()
    first, *_, last = [entry for entry in done.state.log_history if "loss" in entry]
    assert "curvopt/effective_rank" in last and "curvopt/effective_rank" not in first
    assert optimizer.delegate.ranks() == {pair.name: pair.rank for pair in optimizer.pairs}


@pytest.mark.parametrize("nesting", ["matryoshka", "dylora", "stratified"])
def test_the_numbers_of_nested_ranks(nesting, tmp_path):
    model = models.llama(r=6, start="random")
    done = trainer(tmp_path, model, optimizers=(MatryoshkaScaledAdam(model, lr=1e-2, nesting=nesting), None))
    CurvatureCallback().install(done)
    done.train()
    entries = [entry for entry in done.state.log_history if "loss" in entry]
    expected = {"mean_rank": 6, "min_rank": 6, "max_rank": 6, "kept_share": 1, "skipped_updates": 0}
    expected = {f"curvopt/{name}": value for name, value in expected.items()}
    assert len(entries) == 3
    for entry in entries:
        assert {key: value for key, value in entry.items() if key.startswith("curvopt/")} == expected


def test_the_numbers_before_training():
    model = models.llama(r=6, start="random")
    for optimizer in (MatryoshkaScaledAdam(model), GritKFAC(model)):
        summary = CurvatureCallback().summary(optimizer)
        assert (summary["mean_rank"], summary["kept_share"]) == (6, 1)


def test_other_optimizers_are_left_in_peace(tmp_path):
    model = models.llama(start="random")
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    done = trainer(tmp_path, model, optimizers=(adamw, None))
    CurvatureCallback(compact=True).install(done)
    done.train()
    assert not any(key.startswith("curvopt/") for entry in done.state.log_history for key in entry)


# ---------------------------------------------------------------------------------------------- padding


def padded_run(folder, pad, **kwargs):
    """Three steps on rows of ten tokens, each followed by ``pad`` tokens of padding."""
    model = models.llama(torch.float64, start="random")
    optimizer = GritKFAC(model, lr=1e-2, statistics="activation", update="eigen", factor_every=1, inverse_every=1)
    rows = []
    for entry in DATA[:6]:
        ids = torch.cat([entry["input_ids"], torch.zeros(pad, dtype=torch.int64)])
        mask = (torch.arange(len(ids)) < 10).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    args = arguments(str(folder), max_steps=3, per_device_train_batch_size=2)
    done = Trainer(model, args, train_dataset=rows, optimizers=(optimizer, None))
    CurvatureCallback(**kwargs).install(done)
    hooks = models.hooks(model)
    done.train()
    assert models.hooks(model) == hooks
    return models.snapshot(model), {pair["rows"] for pair in optimizer.diagnostics()["pairs"].values()}


def test_padding_is_kept_out_of_the_statistics(tmp_path):
    plain, rows = padded_run(tmp_path, 0)
    padded, same_rows = padded_run(tmp_path, 7)
    assert rows == same_rows == {3 * 20.0}
    models.assert_near(padded, plain, 1e-8, 1e-10)


def test_control_padding_counts_where_nobody_says_so(tmp_path):
    plain, _ = padded_run(tmp_path, 0)
    padded, rows = padded_run(tmp_path, 7, mask_padding=False)
    assert rows == {3 * 34.0}
    assert max((padded[name] - plain[name]).abs().max() for name in plain) > 1e-4


def test_padding_by_hand_in_any_loop():
    model = models.llama()
    optimizer = GritKFAC(model, statistics="activation", factor_every=1)
    handle = mask_padding(model, optimizer)
    ids = models.llama_ids(0)
    model(input_ids=ids, labels=ids, attention_mask=torch.tensor([[1] * 10, [1] * 4 + [0] * 6])).loss.backward()
    optimizer.step()
    assert {pair["rows"] for pair in optimizer.diagnostics()["pairs"].values()} == {14.0}
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()  # no mask: all rows
    optimizer.step()
    assert {pair["rows"] for pair in optimizer.diagnostics()["pairs"].values()} == {34.0}
    handle.remove()
    mask_padding(model, torch.optim.SGD(model.parameters()))
    model(input_ids=ids, attention_mask=torch.ones_like(ids))


# ---------------------------------------------------------------------------------------------- the factory


def test_the_factory_takes_the_trainer_s_arguments(tmp_path):
    model = models.llama(start="random", modules_to_save=["norm", "lm_head"])
    args = arguments(str(tmp_path), learning_rate=7e-3, adam_beta1=0.8, adam_epsilon=1e-7, weight_decay=0.1)
    kwargs = {"args": args, "inverse_every": 3}
    for _ in range(2):  # unlike a "model" entry, nothing is used up
        done = Trainer(model, args, train_dataset=DATA, optimizer_cls_and_kwargs=(OptimizerFactory, kwargs))
        optimizer = done.create_optimizer()
    decays, plain = optimizer.param_groups
    assert isinstance(optimizer, GritKFAC) and len(optimizer.pairs) == 14
    assert decays["lr"] == 7e-3 and decays["betas"] == (0.8, 0.999) and decays["eps"] == 1e-7
    assert (decays["weight_decay"], plain["weight_decay"]) == (0.1, 0.0) and decays["inverse_every"] == 3
    assert {p.ndim for p in plain["params"]} == {1} and all(p.ndim >= 2 for p in decays["params"])
    found = sum(len(g["params"]) for g in optimizer.param_groups)
    assert found == sum(p.requires_grad for p in model.parameters()) == 28 + 1 + 5  # lm_head and five norms


@pytest.mark.parametrize(
    ("said", "kwargs", "betas", "logged"),
    [
        ({}, {}, (0.7, 0.99), True),
        ({"adam_beta1": 0.9, "adam_beta2": 0.999}, {}, (0.7, 0.99), True),  # nothing tells it from the default
        ({"adam_beta2": 0.95}, {}, (0.9, 0.95), False),
        ({}, {"betas": (0.9, 0.999)}, (0.9, 0.999), False),
        ({"adam_beta2": 0.95}, {"betas": "0.8,0.9"}, (0.8, 0.9), False),
        ({}, {"optimizer": "matryoshka"}, (0.9, 0.999), True),
    ],
)
def test_betas_of_the_arguments_are_taken_where_they_are_a_choice(tmp_path, caplog, said, kwargs, betas, logged):
    with caplog.at_level(logging.INFO, "curvopt"):
        optimizer = OptimizerFactory()(models.llama(), args=arguments(str(tmp_path), **said), **kwargs)
    assert optimizer.param_groups[0]["betas"] == betas
    assert ("betas: the optimizer's own" in caplog.text) == logged


def test_a_class_of_arguments_may_have_other_defaults(tmp_path):
    @dataclasses.dataclass
    class Other(TrainingArguments):
        adam_beta2: float = 0.95

    for said, betas in (({}, (0.7, 0.99)), ({"adam_beta2": 0.999}, (0.9, 0.999))):
        args = Other(str(tmp_path), report_to=[], use_cpu=True, **said)
        assert OptimizerFactory()(models.llama(), args=args).param_groups[0]["betas"] == betas


def test_what_is_said_outright_wins(tmp_path):
    args = arguments(str(tmp_path), learning_rate=7e-3, weight_decay=0.1)
    optimizer = OptimizerFactory()(models.llama(), args=args, lr=1e-3, weight_decay=0.0, update="adam")
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["update"]) == (1e-3, 0.0, "adam")


def test_the_factory_builds_what_a_hand_would(tmp_path):
    ends = []
    for how in ("factory", "hand"):
        model = models.llama(start="random")
        kwargs = {"lr": 1e-2, "inverse_every": 2}
        given = {"optimizer_cls_and_kwargs": (OptimizerFactory, kwargs)} if how == "factory" else {
            "optimizers": (GritKFAC(model, **kwargs), None)
        }  # fmt: skip
        done = trainer(tmp_path, model, lr_scheduler_type="linear", **given)
        done.train()
        ends.append(models.snapshot(model, done.optimizer.optimizer))
    models.assert_same(*ends)


@pytest.mark.parametrize("cls", [MatryoshkaScaledAdam, GritKFAC])
def test_the_factory_builds_other_classes(cls):
    optimizer = OptimizerFactory()(models.llama(), optimizer=cls, lr=1e-3, weight_decay=0.1)
    assert type(optimizer) is cls and len(optimizer.pairs) == 14 and len(optimizer.param_groups) == 1


def test_importing_curvopt_does_not_import_transformers():
    program = "import sys, curvopt, curvopt.integrations; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
