"""The doctor's rules: from facts to findings. Facts are plain numbers and strings, live or from a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from curvopt.analysis.findings import Finding

# ‖M − mean(M) I‖ / ‖M‖ of a preconditioner below which Adam, invariant to a scalar, cannot tell that it is there
SCALAR = 0.05
# condition of Ŝ + λI above which fp32 has lost all digits of the smallest direction
CONDITION = 1e6
# gradient norms that people clip to; a norm that is one of them to 1e-4 was hardly one by chance
ROUND_NORMS = (0.1, 0.25, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)

Pairs = Mapping[str, Mapping[str, Any]]


def check_curvature(pairs: Pairs, steps: int) -> Iterator[Finding]:
    """Report preconditioners that are scalar, ill-conditioned or broken. A first step has no curvature of A yet."""
    # a pair without rows was never observed: that is a finding of its own
    sides = [(name, side, p[side]) for name, p in pairs.items() for side in "AB" if side in p and p.get("rows", 1)]
    if broken := [f"{name}.{side}" for name, side, f in sides if f["failed"]]:
        yield Finding(
            "error", "broken factors", f"{len(broken)} factors are not finite: their matrices stay as they were",
            "look for overflow in the forward; load an earlier checkpoint", tuple(broken),
        )  # fmt: skip
    flat = [
        f"{name}.{side}" for name, side, f in sides
        if not f["failed"] and f["scalar_distance"] < SCALAR and pairs[name]["rank"] > 1
    ]  # fmt: skip
    if flat and steps > 1:
        yield Finding(
            "warning", "scalar preconditioner",
            f"{len(flat)} of {len(sides)} preconditioners are within {SCALAR:.0%} of a multiple of the identity, "
            "which Adam cancels: curvature does nothing there",
            "lower damping; check that the batches reach these layers (rows) and that B has moved; if the spectrum "
            "really is flat, nothing is lost", tuple(flat),
        )  # fmt: skip
    if single := [name for name, p in pairs.items() if p.get("full_rank") == 1]:
        yield Finding(
            "note", "rank one", f"{len(single)} pairs have rank 1, where every preconditioner is a scalar",
            "curvature needs rank 2 or more", tuple(single),
        )  # fmt: skip
    ill = [f"{name}.{side}" for name, side, f in sides if not f["failed"] and f["condition"] > CONDITION]
    if ill:
        worst = max(f["condition"] for _, _, f in sides)
        yield Finding(
            "warning", "ill-conditioned factors",
            f"{len(ill)} damped factors have a condition above {CONDITION:.0e} (up to {worst:.1e}): rounding "
            "decides how far the smallest directions go",
            "raise damping (0.1 is the default), or let the rank adapt (rank_threshold)", tuple(ill),
        )  # fmt: skip


def check_steps(skipped: int, steps: int, idle: Sequence[str], zero: Sequence[str]) -> Iterator[Finding]:
    """Report skipped updates, pairs without gradients, and updates that are still zero."""
    if skipped:
        share = skipped / max(steps, skipped)
        yield Finding(
            "error" if share > 0.5 else "warning", "skipped updates",
            f"{skipped} of {max(steps, skipped)} steps met non-finite gradients and changed nothing",
            "a few at the start are normal under a GradScaler; otherwise lower lr, clip, or use bf16 or fp32",
        )  # fmt: skip
    if idle and steps:
        yield Finding(
            "warning", "no gradient", f"{len(idle)} pairs never had a gradient: they are as they began",
            "freeze them or leave them out of target_modules; if they should learn, look for a detached or unused "
            "branch", tuple(idle),
        )  # fmt: skip
    if zero and steps > 1:
        yield Finding(
            "warning", "zero update", f"{len(zero)} pairs have ΔW = 0 after {steps} steps",
            "check that both factors are trainable and that lr is not 0", tuple(zero),
        )  # fmt: skip


def check_values(broken: Sequence[str]) -> Iterator[Finding]:
    """Report parameters that are not finite."""
    if broken:
        what = f"{len(broken)} pairs hold NaN or infinity"
        yield Finding("error", "non-finite parameters", what, "go back to the last good checkpoint", tuple(broken))


def check_settings(groups: Sequence[Mapping[str, Any]], ranks: Mapping[str, int]) -> Iterator[Finding]:
    """Report settings of a group that cancel each other."""
    found: dict[str, Finding] = {}
    for g in groups:
        tau, every = g.get("rank_threshold"), g.get("reproject_every")
        if tau is not None and every == 0:
            found["threshold"] = Finding(
                "warning", "settings: threshold without reprojection",
                f"rank_threshold={tau:g} with reproject_every=0: ranks are never looked at",
                "set reproject_every (say 50), or rank_threshold=None",
            )  # fmt: skip
        if every and g.get("reprojection", "") is None:
            found["reprojection"] = Finding(
                "warning", "settings: reprojection off",
                f"reproject_every={every} with reprojection=None: nothing is reprojected",
                'set reprojection="balanced", or reproject_every=0',
            )  # fmt: skip
        if tau is not None and every and ranks and g.get("min_rank", 0) >= max(ranks.values()):
            found["min_rank"] = Finding(
                "warning", "settings: no rank to give up",
                f"min_rank={g['min_rank']} is the rank of the largest pair: rank_threshold={tau:g} cannot lower any",
                "lower min_rank, or rank_threshold=None",
            )  # fmt: skip
        if g.get("factor_every", 1) > g.get("inverse_every", 1):
            found["cadence"] = Finding(
                "note", "settings: matrices without news",
                f"inverse_every={g['inverse_every']} is below factor_every={g['factor_every']}: matrices are made "
                "again from the same factors", "raise inverse_every to factor_every",
            )  # fmt: skip
    yield from found.values()


def check_clipping(nested: bool, max_grad_norm: float | None, norm: float | None) -> Iterator[Finding]:
    """Report gradients that are clipped by their global norm before a step with nested ranks.

    Args:
        nested: whether the optimizer scales rows (Matryoshka).
        max_grad_norm: what the loop clips to, if the caller knows; 0 for never.
        norm: norm of the present gradients, or None; used only if ``max_grad_norm`` is None.
    """
    evidence = f"the loop clips to {max_grad_norm:g}" if max_grad_norm else ""
    if max_grad_norm is None and norm is not None:
        near = [c for c in ROUND_NORMS if abs(norm / c - 1) < 1e-4]
        evidence = f"the gradients have norm {near[0]:g}, as if clipped to it" if near else ""
    if nested and evidence:
        yield Finding(
            "warning", "settings: clipping before nested ranks",
            f"{evidence}: clipping by global norm mixes rows that the nesting scales differently, so training is no "
            "longer exactly that of B P A",
            "do not clip (max_grad_norm=0), or clip to a norm that is rarely met",
        )  # fmt: skip
