"""``python -m curvopt.kernels [target ...]``: compile every shipped configuration and say whether it fits.

Needs triton, no GPU. Prints one line per kernel, configuration and target, and leaves with 1 if one does not fit. With
``--reference curvopt.ops:REFERENCE`` and a CUDA device every op is also run once against that mapping of names to
references; it is named on the command line because nothing in here may depend on the package that holds it.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Compile for the given targets (default: all), print the table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m curvopt.kernels", description="Compile every kernel for a target.")
    parser.add_argument("targets", nargs="*", help="sm_80, sm_90, sm_100, gfx942; default: all")
    parser.add_argument("--reference", metavar="MODULE:NAME", help="what to compare with on a CUDA device")
    given = parser.parse_args(arguments)
    targets = given.targets
    try:
        compiled = importlib.import_module(".compiled", __package__)
    except ImportError:
        print("triton is not installed: there are no kernels to compile")
        return 1
    launch = compiled.launch
    unknown = [t for t in targets if t not in launch.TARGETS]
    if unknown:
        print(f"unknown target {', '.join(unknown)}; known: {', '.join(launch.TARGETS)}")
        return 1
    if launch.interpreting():
        print("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
        return 1
    failed = 0
    heads = f"{'warps':>6}{'regs':>6}{'stack':>6}{'shared':>8}{'limit':>8}"
    print(f"{'kernel':11}{'configuration':47}{'target':8}{heads}  verdict")
    for target in targets or launch.TARGETS:
        for case in compiled.cases(target):
            b = compiled.build(case, target)
            failed += b.verdict != "fits"
            numbers = f"{case.config.warps:6}{b.registers:6}{b.stack:6}{b.shared:8}{launch.SHARED_LIMIT[target]:8}"
            print(f"{case.kernel:11}{case.label:47}{target:8}{numbers}  {b.verdict}", flush=True)
    print(f"{failed} do not fit" if failed else "all fit")
    return 1 if failed else _launched(given.reference)


def _launched(reference: str | None) -> int:
    """Run every op once on the device against the reference, if there are both."""
    import torch

    if not torch.cuda.is_available() or reference is None:
        return 0
    module, _, name = reference.partition(":")
    check = importlib.import_module(".selfcheck", __package__)
    failures = 0
    for op, error, bound in check.run(getattr(importlib.import_module(module), name), torch.device("cuda")):
        failures += not error <= bound
        print(f"{op:22} error {error:.1e}, allowed {bound:.0e}  {'ok' if error <= bound else 'WRONG'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
