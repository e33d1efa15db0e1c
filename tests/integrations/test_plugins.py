"""Axolotl, LLaMA-Factory and ms-swift: their plugins against the packages, or against stubs of their interfaces.

The stubs have what the named versions document and no more: Axolotl 0.19 (`BasePlugin`, and what `train.py` and the
optimizer mixin do with a plugin and a trainer), LLaMA-Factory 0.9.5 v1 (`OptimizerPlugin`), ms-swift 4.6
(`OptimizerCallback`, `optimizers_map`, and what its trainer mixin does with them).
"""

import importlib
import importlib.util
import logging
import sys
import types

import models
import pytest
import torch
from loopkit_frameworks import arguments
from transformers import Trainer

from curvopt import GritKFAC, MatryoshkaScaledAdam

DATA = [{"input_ids": ids, "labels": ids} for i in range(8) for ids in models.llama_ids(i)]
SETTINGS = {"inverse_every": 2, "update": "eigen"}


def install(monkeypatch, modules):
    """Put stub modules, {dotted name: {attribute: value}}, where an import finds them."""
    for name, attributes in modules.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            if ".".join(parts[:i]) not in sys.modules:
                monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        for key, value in attributes.items():
            setattr(sys.modules[name], key, value)


def usable(name):
    """Whether the package is there and can be imported."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def plugin(monkeypatch, name):
    """Import a plugin anew, so that it registers itself with what is there now."""
    monkeypatch.delitem(sys.modules, f"curvopt.integrations.{name}", raising=False)
    module = importlib.import_module(f"curvopt.integrations.{name}")
    monkeypatch.delitem(sys.modules, f"curvopt.integrations.{name}", raising=False)
    return module


def trained_by_hand(folder, **kwargs):
    model = models.llama(start="random")
    optimizer = GritKFAC(model, lr=1e-2, **SETTINGS, **kwargs)
    args = arguments(str(folder), max_steps=4, per_device_train_batch_size=2)
    Trainer(model, args, train_dataset=DATA, optimizers=(optimizer, None)).train()
    return models.snapshot(model, optimizer)


# ---------------------------------------------------------------------------------------------- Axolotl


class AxolotlTrainer(Trainer):
    """A Trainer with Axolotl's way of calling factories: the model, its training arguments, then the keywords."""

    def create_optimizer(self, model=None):
        from transformers.trainer_optimizer import is_optimizer_factory

        factory, kwargs = self.optimizer_cls_and_kwargs
        assert is_optimizer_factory(factory)
        if self.optimizer is None:
            self.optimizer = factory()(self.model if model is None else model, self.args, **kwargs)
        return self.optimizer


@pytest.fixture(params=["stub", "axolotl"])
def axolotl(request, monkeypatch):
    if request.param == "stub":
        base = type("BasePlugin", (), {"post_trainer_create": lambda self, cfg, trainer: None})
        install(monkeypatch, {"axolotl.integrations.base": {"BasePlugin": base}})
    elif not usable("axolotl.integrations.base"):
        pytest.skip("axolotl is not installed")
    yield plugin(monkeypatch, "axolotl")


def axolotl_trainer(folder, cls=AxolotlTrainer, **kwargs):
    model = models.llama(start="random")
    args = arguments(str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
                     lr_scheduler_type="linear", **kwargs)  # fmt: skip
    return model, cls(model, args, train_dataset=DATA)


@pytest.mark.parametrize("cls", [AxolotlTrainer, Trainer])
def test_axolotl_trains_as_by_hand(axolotl, cls, tmp_path):
    """Also in trainers that call factories as transformers does."""
    model, trainer = axolotl_trainer(tmp_path, cls)
    said = {"curvopt": {"optimizer": "grit", "inverse_every": "2", "update": "eigen"}, "lora_mlp_kernel": False}
    axolotl.CurvoptPlugin().post_trainer_create(said, trainer)
    trainer.train()
    optimizer = trainer.optimizer.optimizer

    other = models.llama(start="random")
    by_hand = GritKFAC(other, lr=1e-2, **SETTINGS)
    args = arguments(str(tmp_path), max_steps=4, per_device_train_batch_size=2, lr_scheduler_type="linear")
    Trainer(other, args, train_dataset=DATA, optimizers=(by_hand, None)).train()
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(other, by_hand))


@pytest.mark.parametrize("kernel", ["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"])
def test_axolotl_s_kernels_mean_statistics_from_gradients(axolotl, kernel, tmp_path, caplog):
    _, trainer = axolotl_trainer(tmp_path)
    with caplog.at_level(logging.WARNING):
        axolotl.CurvoptPlugin().post_trainer_create({kernel: True, "curvopt": {"reproject_every": "3"}}, trainer)
    assert trainer.create_optimizer().param_groups[0]["statistics"] == "gradient"
    assert f"{kernel} never call lora_A" in caplog.text and 'so statistics="gradient" is used' in caplog.text


@pytest.mark.parametrize(
    ("said", "statistics"),
    [({}, "none"), ({"curvopt": None}, "none"), ({"lora_qkv_kernel": True}, "none"),
     ({"curvopt": {"statistics": "weight"}, "lora_o_kernel": True}, "weight")],
)  # fmt: skip
def test_axolotl_without_kernels_or_with_a_choice(axolotl, said, statistics, tmp_path, caplog):
    _, trainer = axolotl_trainer(tmp_path, weight_decay=0.1, adam_beta1=0.8)
    axolotl.CurvoptPlugin().post_trainer_create(said, trainer)
    group = trainer.create_optimizer().param_groups[0]
    assert group["statistics"] == statistics and "lora_A" not in caplog.text
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-2, (0.8, 0.999), 0.1)


def test_axolotl_other_names(axolotl, tmp_path):
    _, trainer = axolotl_trainer(tmp_path)
    axolotl.CurvoptPlugin().post_trainer_create(
        {"curvopt": {"optimizer": "matryoshka"}, "lora_o_kernel": True}, trainer
    )
    assert type(trainer.create_optimizer()) is MatryoshkaScaledAdam
    _, trainer = axolotl_trainer(tmp_path)
    axolotl.CurvoptPlugin().post_trainer_create({"curvopt": {"optimizer": "adam"}}, trainer)
    with pytest.raises(ValueError, match="optimizer must be one of 'grit', 'matryoshka', got 'adam'"):
        trainer.create_optimizer()


def test_axolotl_s_settings_schema(axolotl):
    """`get_input_args` is a dotted path to a pydantic model with the section."""
    module, _, name = axolotl.CurvoptPlugin().get_input_args().rpartition(".")
    assert module == "curvopt.integrations.axolotl"
    schema = getattr(axolotl, name)
    assert schema(curvopt={"optimizer": "grit"}).curvopt == {"optimizer": "grit"} and schema().curvopt is None


def test_axolotl_loads_the_plugin_by_its_path(monkeypatch):
    if not usable("axolotl.integrations.base"):
        pytest.skip("axolotl is not installed")
    from axolotl.integrations.base import load_plugin

    assert type(load_plugin("curvopt.integrations.axolotl.CurvoptPlugin")).__name__ == "CurvoptPlugin"


# ---------------------------------------------------------------------------------------------- LLaMA-Factory


class StubOptimizerPlugin:
    """`OptimizerPlugin(name).register()(function)`, then `OptimizerPlugin(name)(model, config)`."""

    registry: dict = {}

    def __init__(self, name):
        self.name = name

    def register(self):
        return lambda function: self.registry.setdefault(self.name, function)

    def __call__(self, *args):
        return self.registry[self.name](*args)


@pytest.fixture(params=["stub", "llamafactory"])
def optimizer_plugin(request, monkeypatch):
    where = "llamafactory.v1.plugins.trainer_plugins.optimizer"
    if request.param == "stub":
        install(monkeypatch, {where: {"OptimizerPlugin": StubOptimizerPlugin}})
    elif not usable(where):
        pytest.skip("llamafactory is not installed")
    plugin(monkeypatch, "llamafactory")
    yield sys.modules[where].OptimizerPlugin


def test_llamafactory(optimizer_plugin):
    """As `BaseTrainer._init_optimizer` does, with settings as YAML gives them; then its loop of backward and step."""
    config = {"name": "grit", "lr": "1e-2", "inverse_every": 2, "update": "eigen"}
    model, other = models.llama(start="random"), models.llama(start="random")
    optimizer = optimizer_plugin(config["name"])(model, config)
    by_hand = GritKFAC(other, lr=1e-2, **SETTINGS)
    models.fit(model, optimizer, 4), models.fit(other, by_hand, 4)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(other, by_hand))
    assert type(optimizer_plugin("matryoshka")(model, {"name": "matryoshka", "learning_rate": 1e-3})).__name__ == (
        "MatryoshkaScaledAdam"
    )


def test_llamafactory_wants_a_learning_rate(optimizer_plugin):
    with pytest.raises(ValueError, match="lr must be in the optim_config of grit"):
        optimizer_plugin("grit")(models.llama(), {"name": "grit"})


# ---------------------------------------------------------------------------------------------- ms-swift


class StubOptimizerCallback:
    """What a callback is: made of the arguments and the trainer, asked for an optimizer of a model or of none."""

    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer


@pytest.fixture(params=["stub", "swift"])
def swift(request, monkeypatch):
    if request.param == "stub":
        install(monkeypatch, {"swift.optimizers": {"OptimizerCallback": StubOptimizerCallback, "optimizers_map": {}}})
    elif not usable("swift.optimizers"):
        pytest.skip("ms-swift is not installed")
    # `--external_plugins` imports the file by its path, under a name of its own
    path = importlib.util.find_spec("curvopt.integrations.ms_swift").origin
    spec = importlib.util.spec_from_file_location("_swift_external", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield sys.modules["swift.optimizers"].optimizers_map


class SwiftTrainer(Trainer):
    """A Trainer with ms-swift's mixin: a callback by the name in ``args.optimizer`` makes the optimizer."""

    callbacks: dict = {}

    def create_optimizer(self, model=None):
        callback = self.callbacks[self.args.optimizer](self.args, self)
        self.optimizer = callback.create_optimizer(model=model)
        self.optimizer.param_groups = [g for g in self.optimizer.param_groups if len(g["params"]) > 0]
        return self.optimizer


def test_ms_swift_trains_as_by_hand(swift, tmp_path, monkeypatch):
    monkeypatch.setattr(SwiftTrainer, "callbacks", swift)
    model = models.llama(start="random")
    args = arguments(str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
                     optim_args="inverse_every=2,update=eigen")  # fmt: skip
    args.optimizer = "grit"
    trainer = SwiftTrainer(model, args, train_dataset=DATA)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is GritKFAC
    other = models.llama(start="random")
    by_hand = GritKFAC(other, lr=1e-2, **SETTINGS)
    quiet = arguments(str(tmp_path), max_steps=4, per_device_train_batch_size=2)
    Trainer(other, quiet, train_dataset=DATA, optimizers=(by_hand, None)).train()
    # Trainer with optimizers=(optimizer, None) makes the same scheduler
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(other, by_hand))


def test_ms_swift_options_and_errors(swift, tmp_path):
    args = arguments(str(tmp_path), learning_rate=1e-2, optim_args="ranks=1,2,4")
    args.optimizer = "matryoshka"
    callback = swift["matryoshka"](args, types.SimpleNamespace(model=models.llama()))
    assert type(callback.create_optimizer()) is MatryoshkaScaledAdam
    args.optimizer, args.optim_args = "grit", "dampening=1"
    with pytest.raises(ValueError, match="did you mean damping"):
        swift["grit"](args, types.SimpleNamespace(model=models.llama())).create_optimizer()


def test_control_another_optimizer_ends_elsewhere(tmp_path):
    model = models.llama(start="random")
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    args = arguments(str(tmp_path), max_steps=4, per_device_train_batch_size=2)
    Trainer(model, args, train_dataset=DATA, optimizers=(adamw, None)).train()
    assert models.differences(models.snapshot(model), {
        name: x for name, x in trained_by_hand(tmp_path).items() if name in models.snapshot(model)
    }) != []  # fmt: skip
