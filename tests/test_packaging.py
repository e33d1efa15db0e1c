"""The sdist and the wheel: what they hold, what they say of themselves, and that the extras name what is imported."""

import ast
import email
import functools
import re
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import dist_check
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """The sdist and the wheel, in this order."""
    return dist_check.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(artefacts):
    """{path in the wheel: content}."""
    with zipfile.ZipFile(artefacts[1]) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(wheel):
    name = next(name for name in wheel if name.endswith(".dist-info/METADATA"))
    return email.message_from_string(wheel[name].decode())


def modules(folder, installed):
    return {f"{installed}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}


def test_wheel_has_the_package_and_nothing_else(wheel, artefacts):
    info = f"curvopt_lora-{version()}.dist-info/"
    files = {name for name in wheel if not name.startswith(info)}
    assert files == modules("curvopt", "curvopt") | modules("kernels", "curvopt/kernels") | {"curvopt/py.typed"}
    assert f"{info}licenses/LICENSE" in wheel
    assert artefacts[1].name == f"curvopt_lora-{version()}-py3-none-any.whl"


def test_sdist_has_what_is_needed_to_test_and_document_it(artefacts):
    with tarfile.open(artefacts[0]) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "Makefile", "constraints.txt",
              "docs/conf.py", "pyproject.toml", "setup.py", "curvopt/py.typed", "kernels/__init__.py"}  # fmt: skip
    for folder, pattern in (("tests", "*.py"), ("docs", "*.md"), ("benchmarks", "*.py"), ("benchmarks", "*.csv")):
        wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern) if "quick" not in path.parts}
    assert wanted - files == set()
    assert not [name for name in files if "__pycache__" in name or "/." in name or name.startswith((".git", "site/"))]


def version():
    """The one place that says it."""
    text = (ROOT / "curvopt" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)[1]


def test_metadata(metadata):
    assert (metadata["Name"], metadata["Version"]) == ("curvopt-lora", version())
    assert metadata["Requires-Python"] == ">=3.10" and metadata["License-Expression"] == "Apache-2.0"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.6", "typing-extensions>=4.10"]  # torch, and what torch itself requires
    assert set(metadata.get_all("Provides-Extra")) == set(EXTRAS)
    assert f"## {version()}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_index_page_has_no_link_that_leads_nowhere(metadata):
    page = metadata.get_payload()
    assert page.startswith("# curvopt\n")
    assert [target for target in re.findall(r"\]\(([^)]*)\)", page) if not target.startswith(("https://", "#"))] == []


def test_no_text_names_the_other_package():
    """``curvopt`` on the package index is not this project."""
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    wrong = re.compile(r"install\s+curvopt(?!-lora)")
    assert [str(path) for path in texts if wrong.search(path.read_text(encoding="utf-8"))] == []


# ------------------------------------------------------------------------------------------------- extras


def expanded(extra):
    """Distributions of an extra, those of the extras it names included, as {normalised name}."""
    found = set()
    for requirement in EXTRAS[extra]:
        name, inner = re.match(r"([\w.-]+)(?:\[([^\]]*)\])?", requirement).groups()
        if name == PROJECT["name"]:
            found |= set().union(*(expanded(other.strip()) for other in inner.split(",")))
        else:
            found.add(normalised(name))
    return found


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(folder):
    """Top-level names that the sources of a folder import, ``pytest.importorskip`` included, but for its own files.

    Nor do the integrations count: the program that each is for imports it.
    """
    paths = [path for path in (ROOT / folder).rglob("*.py") if path.parent != ROOT / "curvopt" / "integrations"]
    own = {path.stem for path in paths} | {path.parent.name for path in paths} | {"curvopt", *sys.stdlib_module_names}
    found = set()
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
            found |= {name.value for name in node.args[:1] if isinstance(name, ast.Constant)}
    return {name.partition(".")[0] for name in found} - own


@functools.cache
def distributions():
    return packages_distributions()


def distribution(module):
    """The distribution that brings a module; its name, if it is not installed."""
    known = {"curvlinops": "curvlinops-for-pytorch", "sklearn": "scikit-learn"}
    named = known.get(module) or next(iter(distributions().get(module, [module])))
    return normalised(named)


@pytest.mark.parametrize(
    ("folder", "extras", "also"),
    [
        ("tests", ["test"], {"torch", "axolotl"}),  # tests of the latter replace it by a stub
        ("benchmarks", ["bench", "triton"], {"torch", "distributed-shampoo"}),  # the latter is on no index
        (
            "curvopt",
            ["analysis", "demo"],
            {"torch", "typing-extensions", "numpy", "safetensors"},
        ),  # scipy and peft bring these
        ("kernels", ["triton"], {"torch"}),
        ("docs", ["docs"], {"docutils"}),  # sphinx brings it
    ],
)
def test_extras_bring_what_is_imported(folder, extras, also):
    needed = {distribution(module) for module in imported(folder)}
    assert needed - set().union(*map(expanded, extras)) - also == set()


def test_control_a_missing_extra_is_seen():
    needed = {distribution(module) for module in imported("tests")}
    assert {"pytest", "hypothesis", "peft", "torchao"} <= needed and not needed <= expanded("demo")
