"""Where kernels run: on the GPU if there is one, else in Triton's interpreter.

The interpreter is chosen by TRITON_INTERPRET when triton is first imported, for the whole process. So without a GPU the
numerical tests are collected only in the processes that test_interpreted.py starts, one per file.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from numerical import NUMERICAL

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

sys.path.insert(0, str(Path(__file__).parent))  # update_cases

collect_ignore = []
if not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore += NUMERICAL


def pytest_collection_modifyitems(config, items):
    if "slow" in (config.option.markexpr or ""):
        return
    for item in items:
        if "slow" in item.keywords and "tests/kernels" in str(item.path):
            item.add_marker(pytest.mark.skip(reason="the full sweep: run with -m slow"))


@pytest.fixture(scope="session")
def device():
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1; test_interpreted.py runs this file with the latter")
    torch.set_num_threads(1)
    return torch.device("cpu" if INTERPRETED else "cuda")


def log_spaced(L, r, generator, condition=1e4):
    """Random eigenvectors, eigenvalues from 1 down to 1/condition."""
    Q, _ = torch.linalg.qr(torch.randn(L, r, r, generator=generator, dtype=torch.float64))
    return (Q * torch.logspace(0, -torch.tensor(condition).log10().item(), r, dtype=torch.float64)) @ Q.mT


def power_law(L, r, generator, power=1.0):
    """Covariance of 4r rows whose scale falls as 1/i^power, rotated: what training really gives."""
    x = torch.randn(L, 4 * r, r, generator=generator, dtype=torch.float64)
    x = x * torch.arange(1, r + 1).double() ** -power
    Q, _ = torch.linalg.qr(torch.randn(L, r, r, generator=generator, dtype=torch.float64))
    return (x @ Q).mT @ (x @ Q) / (4 * r)


@pytest.fixture
def spd():
    """Make float32 stacks ``spd.log_spaced(L, r, …)``, ``spd.power_law(L, r, …)``."""
    g = torch.Generator().manual_seed(0)

    def single(make):
        return lambda L, r, *a: ((S := make(L, r, g, *a)) + S.mT).div(2).float().contiguous()

    return SimpleNamespace(log_spaced=single(log_spaced), power_law=single(power_law), generator=g)
