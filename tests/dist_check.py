"""Build the wheel and the sdist, install each into a fresh environment, and run `smoke.py` there.

    python tests/dist_check.py                                   # dependencies: those of the running interpreter
    python tests/dist_check.py torch==2.6.0 peft==0.15.0 ...     # these, and what else is required, from the index

It needs ``build``, ``setuptools`` and ``pip``; the fresh environments have nothing but what is installed here.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "site", "*.egg-info", "__pycache__", "runs", "quick")


def build(folder: Path) -> list[Path]:
    """Build the sdist and the wheel, of a copy so that the checkout stays clean; return both paths."""
    copy = folder / "checkout"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    for artefact in ("--sdist", "--wheel"):
        run(sys.executable, "-m", "build", "--no-isolation", artefact, "--outdir", folder / "dist", copy, cwd=folder)
    return sorted((folder / "dist").iterdir(), key=lambda path: path.suffix)


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command; its output is shown only when it fails."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def environment(folder: Path, requirements: list[str]) -> Path:
    """Make a fresh environment; return its interpreter."""
    borrow = not requirements
    venv.create(folder, with_pip=not borrow)
    interpreter = folder / "bin" / "python"
    if borrow:
        libraries = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        # plain lines: the .pth files in there, an editable curvopt among them, are not read
        places = [path for path in sys.path if path.endswith("-packages")]
        (libraries / "borrowed.pth").write_text("\n".join(places) + "\n")
    else:
        run(interpreter, "-m", "pip", "install", "--quiet", "setuptools>=77", *requirements, cwd=folder)
    return interpreter


def main(requirements: list[str]) -> None:
    """Install and try each artefact."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        artefacts = build(folder)
        for artefact in artefacts:
            place = folder / f"env-{artefact.suffix.strip('.')}"
            interpreter = environment(place, requirements)
            pip = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-build-isolation"]
            offline = [] if requirements else ["--no-deps", "--no-index", "--ignore-installed"]
            run(*pip, *offline, artefact, cwd=folder)
            said = run(interpreter, ROOT / "tests" / "smoke.py", place, cwd=place)
            print(f"{artefact.name} | {said.strip()}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
