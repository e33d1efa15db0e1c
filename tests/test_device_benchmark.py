"""The script for a GPU, tried without one: every part runs, and what it writes can be read."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("ops", "plans", "steps", "sweep", "training", "cold", "heavy", "tests")


def test_dry_run(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/device.py"), "--dry-run", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for part in PARTS:
        with (tmp_path / f"device_{part}.csv").open() as f:
            rows = list(csv.DictReader(f))
        assert rows and all(row["torch"] and row["commit"] for row in rows)
    text = (tmp_path / "device.md").read_text()
    assert all(f"## {part}" in text for part in PARTS) and "failed:" not in text


def test_it_says_what_is_missing(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/device.py"), "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "--dry-run" in done.stdout
