"""The demo end to end in its quick setting, and its complaints."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

pytest.importorskip("peft")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from curvopt.demo import options as demo_options
from curvopt.demo import report as demo_report
from curvopt.demo import run as demo
from curvopt.demo import task as demo_task

NAMES = ("adamw", "grit", "grit-ranks")
TINY = replace(demo_task.QUICK, steps=3, warmup=1, batch=2, length=16)


def run(*options, env=None):
    """The demo in a process of its own, on one thread."""
    command = [sys.executable, "-m", "curvopt.demo", *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def read_rows(out):
    with (out / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def domains():
    return demo_task.load_text_domains()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """One quick run of everything."""
    out = tmp_path_factory.mktemp("out") / "demo"
    return run("--quick", "--cache", cache, "--out", out), out


def test_quick_run_says_what_it_did(finished):
    result, out = finished
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    for words in ("pre-trained now", "adamw", "grit", "held-out", "± ", str(out)):
        assert words in result.stdout


def test_quick_run_learns_with_every_optimizer(finished):
    _, out = finished
    everything = json.loads((out / "results.json").read_text())
    rows = read_rows(out)
    assert {(row["optimizer"], row["seed"]) for row in rows} == {(n, s) for n in NAMES for s in "01"}
    for row in rows:
        assert float(row["train_loss"]) < everything["before"]["train"]
        assert float(row["heldout_loss"]) < everything["before"]["heldout"]
        assert float(row["seconds"]) > 0
    assert all(len(run["curve"]) == demo_options.QUICK["steps"] for run in everything["runs"])


def test_same_seed_means_same_start_and_batches(finished):
    _, out = finished
    runs = json.loads((out / "results.json").read_text())["runs"]
    first = {(run["optimizer"], run["seed"]): run["curve"][0] for run in runs}
    assert first["adamw", 0] == pytest.approx(first["grit", 0], abs=1e-6)
    assert first["adamw", 0] != pytest.approx(first["adamw", 1], abs=1e-6)


def test_figure_is_a_picture_of_sane_size(finished):
    from matplotlib.image import imread

    picture = imread(finished[1] / "curves.png")
    assert 500 < picture.shape[0] < 2000 and 1000 < picture.shape[1] < 4000
    assert picture[..., :3].std() > 0.02  # not blank


def test_saved_adapters_reload_to_the_same_loss(finished, cache, domains):
    from peft import PeftModel

    result, out = finished
    assert result.stdout.count("the same held-out loss") == len(NAMES)
    last = {row["optimizer"]: row for row in read_rows(out)}
    for name, row in last.items():
        base = demo_task.pretrained_model(cache, None, demo_task.QUICK, domains)
        model = PeftModel.from_pretrained(base, out / f"adapter-{name}")
        loss = demo_task.evaluate(model, domains.topics_heldout, demo_options.QUICK["length"])
        assert loss == pytest.approx(float(row["heldout_loss"]), abs=1e-5)
        size = (out / f"adapter-{name}" / "adapter_model.safetensors").stat().st_size
        assert size == int(row["disk_bytes"]) > 4 * int(row["parameters"])


def test_second_run_uses_the_cache_and_adapts_ranks(finished, cache, tmp_path):
    options = ("--optimizer", "grit-ranks", "--threshold", 0.5, "--seeds", 1, "--lr", "grit-ranks=1e-2")
    result = run("--quick", "--cache", cache, "--out", tmp_path, *options)
    assert result.returncode == 0, result.stderr
    assert "loaded from" in result.stdout and "pre-trained" not in result.stdout
    assert "the same held-out loss" in result.stdout
    (row,) = read_rows(tmp_path)
    before = {row["optimizer"]: row for row in read_rows(finished[1])}["grit"]
    assert float(row["rank"]) < demo_options.QUICK["rank"] == float(before["rank"])
    assert int(row["parameters"]) < int(before["parameters"])
    assert int(row["disk_bytes"]) < int(before["disk_bytes"])


def test_nested_ranks_train_and_reload(finished, cache, tmp_path):
    result = run("--quick", "--cache", cache, "--out", tmp_path, "--optimizer", "matryoshka", "--seeds", 1)
    assert result.returncode == 0, result.stderr
    assert "the same held-out loss" in result.stdout
    before = json.loads((finished[1] / "results.json").read_text())["before"]
    (row,) = read_rows(tmp_path)
    assert float(row["train_loss"]) < before["train"] and float(row["rank"]) == demo_options.QUICK["rank"]


# name: (options, a word the complaint must contain); {tmp} is a folder with an unusable model in it
WRONG = {
    "no model": ("--model {tmp}/none", "none"),
    "empty model": ("--model {tmp}/empty", "config.json"),
    "broken model": ("--model {tmp}", "cannot load"),
    "no data": ("--data {tmp}/none.txt", "none.txt"),
    "data is a folder": ("--data {tmp}", "--data"),
    "data is no text": ("--data {tmp}/latin", "UTF-8"),
    "data too short": ("--data {tmp}/short", "too short"),
    "data empty": ("--data {tmp}/nothing", "too short"),
    "no retain": ("--retain {tmp}/none.txt", "--retain"),
    "retain too short": ("--retain {tmp}/short", "too short"),
    "unknown optimizer": ("--optimizer sdg", "adamw, grit"),
    "lr of another": ("--optimizer adamw --lr grit=1e-3", "grit"),
    "lr no number": ("--lr fast", "fast"),
    "lr negative": ("--lr=-1", "-1"),
    "lr nan": ("--lr nan", "nan"),
    "rank": ("--rank 0", "--rank"),
    "steps": ("--steps many", "--steps"),
    "length": ("--length 1", "--length"),
    "length too long": ("--length 100000", "at most"),
    "threshold": ("--threshold 1.5", "--threshold"),
    "device": ("--device abacus", "abacus"),
    "device without numbers": ("--device meta", "meta"),
    "out is a file": ("--out {tmp}/short", "--out"),
    "unknown option": ("--speed 9", "--speed"),
}


@pytest.fixture
def unusable(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").write_text("x")
    (tmp_path / "nothing").write_text("")
    (tmp_path / "latin").write_bytes(b"caf\xe9" * 1000)
    (tmp_path / "config.json").write_text("{not json")
    return tmp_path


@pytest.mark.parametrize("case", WRONG)
def test_wrong_option_is_one_line_and_exit_2(case, unusable, cache, capsys):
    options, word = WRONG[case]
    argv = ["--quick", "--cache", str(cache), "--out", str(unusable / "out")]
    assert demo.main(argv + options.format(tmp=unusable).split()) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("curvopt.demo: ") and err.count("\n") == 1
    assert word in err


def test_wrong_option_in_a_process_of_its_own(tmp_path):
    result = run("--model", tmp_path / "none", "--out", tmp_path, "--cache", tmp_path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_interrupt_during_training_is_130(cache, tmp_path):
    """A real signal; the handler is set because a background shell starts its children without one."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from curvopt.demo.run import main; sys.exit(main(sys.argv[1:]))"
    )
    options = ["--quick", "--steps", "1000000", "--cache", str(cache), "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code, *options], env=environment, **streams)
    try:
        while "Base model" not in (line := process.stdout.readline()):
            assert "Pre-training" in line
        time.sleep(1)
        for _ in range(6):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
        _, err = process.communicate(timeout=10)
    finally:
        process.kill()
    # Python drops a signal that meets a destructor, as imports of large libraries run them, and says so
    assert process.returncode == 130 and err.strip().splitlines()[-1] == "interrupted"


def test_missing_package_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert demo.main(["--quick", "--out", str(tmp_path), "--cache", str(tmp_path)]) == 2
    assert "rich" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, domains):
    """A small Hugging Face model with a byte-level BPE tokenizer, made here."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    text = bytes(domains.topics[:50_000].tolist()).decode("utf-8", "ignore")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=300, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder)
    model = demo_task.untrained_model(TINY)
    model.resize_token_embeddings(300)
    model.save_pretrained(folder)
    return folder


def test_own_model_and_text(model_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 200)
    sizes = ("--steps", 12, "--batch", 4, "--length", 32, "--seeds", 1, "--rank", 4, "--lr", 1e-2)
    result = run("--model", model_folder, "--data", text, "--out", tmp_path / "out", *sizes)
    assert result.returncode == 0, result.stderr
    assert "nats per token" in result.stdout and "earlier text" not in result.stdout
    assert result.stdout.count("the same held-out loss") == len(NAMES)
    before = json.loads((tmp_path / "out" / "results.json").read_text())["before"]
    assert all(float(row["heldout_loss"]) < before["heldout"] for row in read_rows(tmp_path / "out"))


def test_own_text_to_retain_has_its_column(model_folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("To be kept in mind. " * 200)
    sizes = ("--steps", 2, "--batch", 2, "--length", 16, "--seeds", 1, "--optimizer", "adamw")
    options = ["--model", model_folder, "--retain", text, "--data", text, "--out", tmp_path / "out", *sizes]
    assert demo.main([str(option) for option in options]) == 0
    assert "earlier text" in capsys.readouterr().out


def test_smoothing_keeps_length_and_constants():
    assert demo_report.smooth([2.0] * 9, 4) == [2.0] * 9
    assert demo_report.smooth([0.0, 3.0, 6.0], 3) == [1.5, 3.0, 4.5]
