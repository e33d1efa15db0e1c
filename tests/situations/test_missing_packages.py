"""Packages that are not there, and names that belong to others."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from curvopt.analysis import fit_forgetting_law


def test_a_fit_without_scipy_names_the_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "scipy" else found(name, *rest)
    )
    with pytest.raises(ModuleNotFoundError, match=r"needs SciPy: install curvopt-lora\[analysis\]"):
        fit_forgetting_law([1e6], [1e5], [2.0], 1.9)


def test_no_package_called_kernels_is_ours(tmp_path):
    """bitsandbytes and transformers look for a package of that name, and must not find our folder."""
    script = tmp_path / "script.py"
    script.write_text(
        "import curvopt, curvopt.kernels, importlib.util as u\n"
        "spec = u.find_spec('kernels')\n"
        "print(spec and (spec.origin or list(spec.submodule_search_locations)))\n"
    )
    run = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=True)
    root = str(Path(__file__).parents[2])
    assert root not in run.stdout, run.stdout
