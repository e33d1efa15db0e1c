"""Every script of examples/ runs on the tiny model: what it reports gets better, and its files hold what it learnt."""

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from curvopt.demo import task

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
NEEDS = {"trl_sft": ("trl", "datasets"), "hf_trainer": ("accelerate",), "accelerate_loop": ("accelerate",),
         "vision_transformer": ("sklearn",)}  # fmt: skip
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
OPTIONS = {name: ["--steps", "12"] for name in SCRIPTS} | {"vision_transformer": ["--steps", "40"]}
pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's libraries


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder with the tiny base model, made once."""
    folder = tmp_path_factory.mktemp("cache")
    task.pretrained_model(folder, config=task.QUICK)
    return folder


@pytest.fixture
def script(monkeypatch):
    """Load a script as `python examples/name.py` would: its folder is on the path, and nothing stays afterwards."""

    def load(name):
        for needed in ("tqdm", "matplotlib", *NEEDS.get(name, ())):
            pytest.importorskip(needed, reason=f"{needed} is not installed (extra: trainers)")
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.delitem(sys.modules, "common", raising=False)
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("common", None)


def options(cache, out, *more):
    return ["--tiny", "--length", "32", "--cache", str(cache), "--out", str(out), *more]


def adapters(folder):
    """Every adapter below a folder, but those inside checkpoints."""
    return [p.parent for p in folder.rglob("adapter_config.json") if "checkpoint" not in str(p.relative_to(folder))]


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "fsdp2"])
def test_example(name, script, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    losses = script(name).main(options(cache, tmp_path / "out", *OPTIONS[name]))
    assert len(losses) >= 12 and all(loss == loss for loss in losses)
    what, before, after = re.search(r"^(.+): ([\d.]+) before, ([\d.]+) after", capsys.readouterr().out, re.M).groups()
    assert float(after) < float(before) if "loss" in what else float(after) > float(before) + 0.05
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000
    saved = adapters(tmp_path / "out")
    assert saved
    for folder in saved:
        weights = load_file(folder / "adapter_model.safetensors")
        assert all(x.isfinite().all() for x in weights.values())
        assert any(x.any() for key, x in weights.items() if "lora_B" in key)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # nothing is left elsewhere


def test_elastic_serving_writes_one_adapter_and_its_cut(script, cache, tmp_path, capsys):
    """The rank marked in the table is that of the second file, and the table has fewer bytes for smaller ranks."""
    script("elastic_serving").main(options(cache, tmp_path, "--steps", "12", "--tolerance", "0.5"))
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)(.*)$", capsys.readouterr().out, re.M)
    ranks, sizes = [int(row[0]) for row in rows], [float(row[3]) for row in rows]
    assert ranks == [1, 2, 4, 8] and sizes == sorted(set(sizes))
    (chosen,) = [row[0] for row in rows if row[4]]
    assert {folder.name for folder in adapters(tmp_path)} == {"adapter", f"rank-{chosen}"}
    (tensors,) = [load_file(f / "adapter_model.safetensors") for f in adapters(tmp_path) if f.name != "adapter"]
    assert {x.shape[0] for key, x in tensors.items() if "lora_A" in key} == {int(chosen)}


def test_the_control_is_another_optimizer(script, cache, tmp_path):
    """The same loop with AdamW: the same first loss, other losses after the first step with curvature."""
    plain = script("plain_loop")
    grit = plain.main(options(cache, tmp_path / "grit", "--steps", "12"))
    adamw = plain.main(options(cache, tmp_path / "adamw", "--steps", "12", "--optimizer", "adamw"))
    assert grit[0] == adamw[0] and grit[2:] != adamw[2:] and sum(adamw[-4:]) < sum(adamw[:4])


def test_accelerate_goes_on_from_its_checkpoint(script, cache, tmp_path):
    script("accelerate_loop").main(options(cache, tmp_path / "out", "--steps", "4"))
    assert {"optimizer.bin", "random_states_0.pkl"} <= {p.name for p in (tmp_path / "out" / "checkpoint").iterdir()}


def test_the_adapters_of_gora_and_of_the_engine_are_the_same_model(script, cache, tmp_path):
    script("gora_then_train").main(options(cache, tmp_path / "out", "--steps", "2", "--calibration", "2"))
    base = task.pretrained_model(cache, config=task.QUICK)
    x = torch.arange(48).reshape(2, 24) + 60
    plain, padded = (
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out" / target)(input_ids=x).logits
        for target in ("peft", "vllm")
    )
    torch.testing.assert_close(plain, padded, rtol=1e-5, atol=1e-5)
    assert not torch.equal(plain, base(input_ids=x).logits)


def test_fsdp2_in_two_processes(cache, tmp_path):
    """Under torchrun; the saved adapter is whole and has been trained."""
    pytest.importorskip("tqdm", reason="tqdm is not installed (extra: trainers)")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
               "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
               str(FOLDER / "fsdp2.py"), *options(cache, tmp_path / "out", "--steps", "6")]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = map(float, re.search(r"([\d.]+) before, ([\d.]+) after 6 steps", done.stdout).groups())
    assert after < before
    base = task.pretrained_model(cache, config=task.QUICK)
    domains = task.load_text_domains()
    again = PeftModel.from_pretrained(base, tmp_path / "out")
    assert task.evaluate(again, domains.topics_heldout, 32) == pytest.approx(after, abs=1e-4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, script, capsys):
    with pytest.raises(SystemExit) as stop:
        script(name).main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and f"examples/{name}.py" in shown and "--steps" in shown


def test_every_script_is_listed():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)\.py` ", text, flags=re.MULTILINE)) == set(SCRIPTS)
