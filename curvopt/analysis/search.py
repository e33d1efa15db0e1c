"""Robust least squares for the laws of forgetting: the search, and where residuals begin to be outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curvopt.analysis.design import Design

if TYPE_CHECKING:
    import numpy as np

# starting points (α, β) and γ of the search; A and E follow from them by linear least squares
STARTS = [(alpha, beta) for alpha in (0.1, 0.5, 1.2) for beta in (0.2, 0.6, 1.2)]
STARTS_GAMMA = (0.1, 1.0)
# Largest exponents and γ that are searched. Data without a trend runs into them instead of to infinity.
TOP = 20.0
# fits until the scale of the residuals stands still, also beside a tenth of gross outliers
SCALE_ROUNDS = 4


@dataclass(frozen=True)
class Solution:
    """Coordinates of a fit, x = (α, β, log a, E, γ...), the curve it gives and its cost ½ Σ ρ."""

    x: np.ndarray
    curve: np.ndarray
    cost: float


def outlier_scale(design: Design, rise: np.ndarray) -> float:
    """Return where residuals begin to count as outliers: three robust deviations, at least 1e-3 of the median rise.

    The first fit is by least squares; outliers that bend it are less and less believed in the following ones.
    """
    import numpy as np

    solution = search(design, rise, None)
    scale = 0.0
    for _ in range(SCALE_ROUNDS):
        spread = 1.4826 * float(np.median(np.abs(rise - solution.curve)))
        scale = max(3 * spread, 1e-3 * float(np.median(np.abs(rise))))
        solution = search(design, rise, scale, [solution.x])
    return scale


def search(design: Design, rise: np.ndarray, scale: float | None, near: list[np.ndarray] | None = None) -> Solution:
    """Minimise ½ Σ ρ(residual) from every start, or only from ``near``; ``scale`` None is plain least squares."""
    import numpy as np
    from scipy.optimize import least_squares

    lower = np.array([0.0, 0.0, -np.inf, 0.0, *[0.0] * len(design.modulators)])
    upper = np.array([TOP, TOP, np.inf, np.inf, *[TOP] * len(design.modulators)])
    options: dict[str, Any] = {"bounds": (lower, upper), "jac": lambda x: design.jacobian(x), "x_scale": "jac"}
    fine = 1e-14 if near is None else 1e-9  # resamples start at the solution, and are as uncertain as the intervals
    options |= {"xtol": fine, "ftol": fine, "gtol": fine, "max_nfev": 400}
    if scale is not None:
        options |= {"loss": "soft_l1", "f_scale": scale}
    gammas = STARTS_GAMMA[: max(1, len(design.modulators))]  # one is enough where there is none
    starts = near if near is not None else [design.start(rise, *s, gamma) for s in STARTS for gamma in gammas]
    found = []
    for x0 in starts:
        result = least_squares(lambda x: design.curve(x) - rise, np.clip(x0, lower + 1e-9, upper - 1e-9), **options)
        found.append(Solution(result.x, design.curve(result.x), float(result.cost)))
    return min(found, key=lambda s: s.cost)


def leverage(J: np.ndarray) -> np.ndarray:
    """Return how far each observation pulls its own prediction, diag(J J⁺), below one; ``J`` is (n, k)."""
    import numpy as np

    Q = np.linalg.svd(J / np.maximum(np.linalg.norm(J, axis=0), 1e-300), full_matrices=False)[0]
    return np.minimum((Q**2).sum(1), 0.99)
