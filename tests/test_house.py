"""The rules of the house, by reading the sources: who may import whom, and what no file of the package does.

    optim → {lora, ops, distributed} → {functional | kernels}

Every rule is a function of a tree of sources, so that it can be tried on a tree with a violation planted in it.
"""

import ast
import functools
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# room → rooms of the package it may import besides itself
MAY_IMPORT = {
    "functional": set(),
    "kernels": set(),
    "ops": {"functional", "kernels"},
    "distributed": {"functional"},
    "lora": {"functional", "ops", "distributed"},
    "optim": {"functional", "ops", "distributed", "lora"},
    "": {"optim", "lora"},  # curvopt/__init__.py: the public names
    "analysis": {"functional", "ops", "distributed", "lora", "optim", ""},
    "integrations": {"functional", "ops", "distributed", "lora", "optim", "analysis", ""},
    "doctor": {"analysis"},
    "demo": {"functional", "ops", "distributed", "lora", "optim", "analysis", "integrations", ""},
}
MAY_PRINT = {"run.py", "doctor.py", "__main__.py"}  # what is run from the command line
HEAVY = ("triton", "transformers", "peft", "matplotlib")


@dataclass(frozen=True)
class Import:
    """One imported module, and where."""

    path: Path
    line: int
    module: str
    top_level: bool


@functools.cache
def parsed(text: str) -> ast.Module:
    """Return the syntax tree of a source; read by several rules, parsed once."""
    return ast.parse(text)


def sources(root: Path) -> dict[str, Path]:
    """Return module name → file of a tree with ``curvopt/`` and ``kernels/``; the latter is ``curvopt.kernels``."""
    found = {}
    for folder, name in (("curvopt", "curvopt"), ("kernels", "curvopt.kernels")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([name, *(part for part in parts if part != "__init__")])] = path
    return found


def room(module: str) -> str | None:
    """Return the room of a module of ours ("" is ``curvopt`` itself), or None for anybody else's."""
    parts = module.split(".")
    if parts[0] != "curvopt":
        return None
    name = parts[1] if len(parts) > 1 else ""
    return "demo" if name.startswith("demo") else name


def imports(root: Path) -> list[Import]:
    """Return every import of a tree, absolute; ``from a import b`` is ``a.b`` where that is a module of ours."""
    modules = sources(root)
    found = []
    for name, path in modules.items():
        tree = parsed(path.read_text(encoding="utf-8"))
        nested = {
            id(inner)
            for outer in ast.walk(tree)
            if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for inner in ast.walk(outer)
        }
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parts = package.split(".")
                    above = parts[: len(parts) - (node.level - 1)]
                    base = ".".join([*above, *([base] if base else [])])
                targets = [f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names]
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
                "import_module",
                "__import__",
            ):
                targets = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            else:
                continue
            found += [Import(path, node.lineno, target, id(node) not in nested) for target in targets]
    return found


def described(root: Path, path: Path, line: int, what: str) -> str:
    return f"{path.relative_to(root)}:{line}: {what}"


def layers(root: Path) -> list[str]:
    """Imports between rooms go the way of the arrows; an unknown room is a violation."""
    rooms = {path: room(name) for name, path in sources(root).items()}
    wrong = []
    for i in imports(root):
        here, there = rooms[i.path], room(i.module)
        if there is None or there == here:
            continue
        if here not in MAY_IMPORT or there not in MAY_IMPORT[here]:
            wrong.append(described(root, i.path, i.line, f"{here or 'curvopt'} imports {i.module}"))
    return wrong


def functional_imports_torch_alone(root: Path) -> list[str]:
    rooms = {path: room(name) for name, path in sources(root).items()}
    allowed = {"torch", "curvopt", *sys.stdlib_module_names}  # of curvopt: `layers` sees to it
    return [
        described(root, i.path, i.line, f"functional imports {i.module}")
        for i in imports(root)
        if rooms[i.path] == "functional" and i.module.split(".")[0] not in allowed
    ]


def no_triton_at_module_level(root: Path) -> list[str]:
    rooms = {path: room(name) for name, path in sources(root).items()}
    return [
        described(root, i.path, i.line, f"imports {i.module} when it is imported")
        for i in imports(root)
        if rooms[i.path] != "kernels" and i.top_level and i.module.split(".")[0] == "triton"
    ]


def only_ops_imports_kernels(root: Path) -> list[str]:
    modules = {path: name for name, path in sources(root).items()}
    return [
        described(root, i.path, i.line, f"imports {i.module}; only ops.py may")
        for i in imports(root)
        if room(i.module) == "kernels" and room(modules[i.path]) not in ("kernels", "ops")
    ]


def kernels_is_not_a_top_level_name(root: Path) -> list[str]:
    """``import kernels`` is another project's package."""
    return [
        described(root, i.path, i.line, f"imports {i.module}")
        for i in imports(root)
        if i.module.split(".")[0] == "kernels"
    ]


def calls_nothing_forbidden(root: Path) -> list[str]:
    """No print outside of the programs for people, and no environment variable anywhere."""
    wrong = []
    for path in sources(root).values():
        for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name) and node.id == "print" and path.name not in MAY_PRINT:
                wrong.append(described(root, path, node.lineno, "print"))
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
                wrong.append(described(root, path, node.lineno, f"os.{node.attr}"))
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                names = {alias.name for alias in node.names} & {"environ", "environb", "getenv"}
                wrong += [described(root, path, node.lineno, f"from os import {name}") for name in sorted(names)]
    return wrong


def _private_names(tree: ast.Module) -> set[str]:
    """Return the private attributes and methods that the classes of a file define."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef):
                    found.add(inner.name)
                elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    found.add(inner.attr)
                elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    found.add(inner.target.id)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def private_names_stay_at_home(root: Path) -> list[str]:
    """What begins with an underscore is read on ``self``, or in the file that defines it."""
    trees = {path: parsed(path.read_text(encoding="utf-8")) for path in sources(root).values()}
    own = {path: _private_names(tree) for path, tree in trees.items()}
    ours = set().union(*own.values())
    wrong = []
    for path, tree in trees.items():
        known = {"self", "cls"}  # and modules, whose names the layers' rule is about
        known |= {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or node.attr not in ours - own[path]:
                continue
            of_self = isinstance(node.value, ast.Name) and node.value.id in known
            inherited = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if not of_self and not inherited:
                wrong.append(described(root, path, node.lineno, f"reads {node.attr} of another object"))
    return wrong


def private_functions_stay_in_their_room(root: Path) -> list[str]:
    """What a module keeps to itself with an underscore is read in its own room at most."""
    modules = sources(root)
    wrong = []
    for name, path in modules.items():
        tree, aliases = parsed(path.read_text(encoding="utf-8")), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and room(node.module) not in (None, room(name)):
                aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
                private = [a.name for a in node.names if a.name.startswith("_")]
                wrong += [described(root, path, node.lineno, f"imports {one} of {node.module}") for one in private]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = aliases.get(getattr(node.value, "id", ""))
                if owner in modules:
                    wrong.append(described(root, path, node.lineno, f"reads {node.attr} of {owner}"))
    return wrong


RULES = [
    layers,
    functional_imports_torch_alone,
    no_triton_at_module_level,
    only_ops_imports_kernels,
    kernels_is_not_a_top_level_name,
    calls_nothing_forbidden,
    private_names_stay_at_home,
    private_functions_stay_in_their_room,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house(rule):
    assert not (wrong := rule(ROOT)), "\n".join(wrong)


def test_the_tree_is_read_at_all():
    modules = sources(ROOT)
    for name in ("curvopt", "curvopt.ops", "curvopt.functional.update", "curvopt.kernels"):
        assert name in modules
    assert any(i.module == "curvopt.kernels" and i.path.name == "ops.py" for i in imports(ROOT))
    assert any(i.module == "torch" for i in imports(ROOT))


# ------------------------------------------------------------------------------------------------- controls

CLEAN = {
    "curvopt/__init__.py": "from curvopt.optim.grit import Grit",
    "curvopt/functional/__init__.py": "import math\nimport torch",
    "curvopt/functional/moments.py": "from collections.abc import Sequence\nfrom curvopt.functional import left",
    "curvopt/ops.py": "from curvopt import kernels\nfrom .functional import moments",
    "curvopt/distributed.py": "import torch.distributed",
    "curvopt/lora/__init__.py": "",
    "curvopt/lora/pairs.py": "from curvopt.ops import Ops\ndef find():\n    import peft",
    "curvopt/optim/__init__.py": "",
    "curvopt/optim/home.py": "class Home:\n    def _drop(self):\n        self._buckets = []",
    "curvopt/optim/grit.py": "from ..lora import pairs\nimport curvopt.ops\nfrom curvopt.functional import basis",
    "curvopt/analysis/__init__.py": "from curvopt import GritKFAC\nfrom curvopt.lora import pairs",
    "curvopt/analysis/doctor.py": "print('fine')",
    "curvopt/integrations/trainer.py": "from curvopt.analysis import doctor\ndef f():\n    import triton",
    "curvopt/demo/run.py": "from curvopt.integrations import trainer\nprint('fine')",
    "kernels/__init__.py": "try:\n    import triton\nexcept ImportError:\n    pass\nfrom . import launch",
    "kernels/launch.py": "import triton.language as tl",
    "kernels/moments.py": "from curvopt.kernels.launch import tile\nfrom .launch import tile",
}

VIOLATIONS = [
    (layers, "curvopt/functional/bad.py", "from curvopt.ops import Ops"),
    (layers, "curvopt/functional/bad.py", "def f():\n    from curvopt.lora import pairs"),
    (layers, "curvopt/functional/bad.py", "from .. import ops"),
    (layers, "curvopt/functional/bad.py", "import curvopt"),
    (layers, "curvopt/functional/bad.py", "import importlib\nimportlib.import_module('curvopt.optim')"),
    (layers, "kernels/bad.py", "from curvopt.functional import update"),
    (layers, "kernels/bad.py", "from ..functional import update"),
    (layers, "kernels/bad.py", "import curvopt"),
    (layers, "curvopt/ops.py", "from curvopt.lora import pairs"),
    (layers, "curvopt/distributed.py", "import curvopt.optim.grit"),
    (layers, "curvopt/lora/bad.py", "from curvopt.optim import grit"),
    (layers, "curvopt/lora/bad.py", "from ..optim.grit import Grit"),
    (layers, "curvopt/lora/bad.py", "from curvopt import optim"),
    (
        layers,
        "curvopt/lora/bad.py",
        "if True:\n    from typing import TYPE_CHECKING\n    from curvopt.analysis import x",
    ),
    (layers, "curvopt/optim/bad.py", "from curvopt.analysis import doctor"),
    (layers, "curvopt/optim/bad.py", "from curvopt import kernels"),
    (layers, "curvopt/analysis/bad.py", "from curvopt.integrations import trainer"),
    (layers, "curvopt/analysis/bad.py", "from curvopt.demo import main"),
    (layers, "curvopt/__init__.py", "from curvopt.analysis import doctor"),
    (layers, "curvopt/elsewhere.py", "from curvopt.functional import basis"),
    (functional_imports_torch_alone, "curvopt/functional/bad.py", "import numpy as np"),
    (functional_imports_torch_alone, "curvopt/functional/bad.py", "def f():\n    from scipy.linalg import solve"),
    (functional_imports_torch_alone, "curvopt/functional/bad.py", "import triton"),
    (no_triton_at_module_level, "curvopt/ops.py", "try:\n    import triton\nexcept ImportError:\n    triton = None"),
    (no_triton_at_module_level, "curvopt/optim/bad.py", "from triton import language"),
    (no_triton_at_module_level, "curvopt/optim/bad.py", "class A:\n    import triton"),
    (only_ops_imports_kernels, "curvopt/optim/bad.py", "import curvopt.kernels.moments"),
    (only_ops_imports_kernels, "curvopt/analysis/bad.py", "def f():\n    from curvopt import kernels"),
    (only_ops_imports_kernels, "curvopt/demo/run.py", "from curvopt.kernels import OPS"),
    (kernels_is_not_a_top_level_name, "curvopt/ops.py", "import kernels"),
    (kernels_is_not_a_top_level_name, "kernels/bad.py", "from kernels import launch"),
    (calls_nothing_forbidden, "curvopt/optim/bad.py", "print('x')"),
    (calls_nothing_forbidden, "curvopt/optim/bad.py", "say = print"),
    (calls_nothing_forbidden, "kernels/bad.py", "import os\nos.environ['X']"),
    (calls_nothing_forbidden, "curvopt/demo/run.py", "import os as o\no.getenv('X')"),
    (calls_nothing_forbidden, "curvopt/lora/bad.py", "from os import path, environ"),
    (private_names_stay_at_home, "curvopt/lora/bad.py", "def f(optimizer):\n    return optimizer._buckets\n"),
    (private_names_stay_at_home, "kernels/bad.py", "def f(x):\n    x._drop(1)\n"),
    (private_functions_stay_in_their_room, "curvopt/analysis/bad.py", "from curvopt.lora.pairs import _orient"),
    (
        private_functions_stay_in_their_room,
        "curvopt/analysis/bad.py",
        "from curvopt.lora import pairs as p\ndef f():\n    return p._orient()",
    ),
]


def planted(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_control_a_clean_tree_passes(rule, tmp_path):
    assert rule(planted(tmp_path, CLEAN)) == []


@pytest.mark.parametrize(("rule", "name", "text"), VIOLATIONS, ids=lambda x: getattr(x, "__name__", None))
def test_control_a_planted_violation_is_found(rule, name, text, tmp_path):
    wrong = rule(planted(tmp_path, CLEAN | {name: text}))
    assert len(wrong) == 1 and wrong[0].startswith(name)


# ------------------------------------------------------------------------------------------------- at run time


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def importable(rooms: set[str]) -> list[str]:
    return [name for name in sources(ROOT) if room(name) in rooms and not name.endswith("__main__")]


def loaded_by(modules: list[str], preload: str, path: str = "") -> set[str]:
    """Return the top-level names of what importing ``modules`` loads on top of ``preload``."""
    return set(
        run_python(f"""
            import importlib, sys
            sys.path.insert(0, {path!r}) if {path!r} else None
            importlib.import_module({preload!r})
            before = set(sys.modules)
            for name in {modules!r}:
                importlib.import_module(name)
            print(*{{name.split(".")[0] for name in set(sys.modules) - before}})
        """).split()
    )


def test_importing_imports_nothing_heavy():
    """``import curvopt``, and every room a training loop needs, on top of torch; optional packages stay out."""
    loaded = loaded_by(importable({"", "functional", "ops", "distributed", "lora", "optim"}), preload="torch")
    assert "curvopt" in loaded and not set(HEAVY) & loaded


def test_control_heavy_imports_are_seen(tmp_path):
    folder = planted(tmp_path, {"room.py": "import peft.tuners", "peft/tuners.py": "", "peft/__init__.py": ""})
    assert set(HEAVY) & loaded_by(["room"], preload="sys", path=str(folder)) == {"peft"}


def test_everything_imports_without_optional_packages():
    """With triton, transformers, peft, scipy and matplotlib missing, the rooms import and there are no kernels."""
    modules = [*importable({"", "functional", "ops", "distributed", "lora", "optim"}), "curvopt.kernels"]
    program = f"""
        import importlib, sys
        sys.modules.update(dict.fromkeys({(*HEAVY, "scipy")!r}))
        for name in {modules!r}:
            importlib.import_module(name)
        print(sys.modules["curvopt.kernels"].OPS)
    """
    assert run_python(program) == "{}"


def test_importing_changes_no_global_state():
    """No import has side effects on torch: defaults, threads, and random numbers are as before."""
    modules = importable({"", "functional", "ops", "distributed", "lora", "optim", "kernels"})
    program = f"""
        import importlib, random, sys
        import torch
        def state():
            return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
                    torch.get_rng_state().sum().item(), torch.are_deterministic_algorithms_enabled(),
                    torch.get_float32_matmul_precision(), tuple(sys.path), random.getstate())
        before = state()
        for name in {modules!r}:
            importlib.import_module(name)
        print(state() == before)
    """
    assert run_python(program) == "True"
