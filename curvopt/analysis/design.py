"""Observations of forgetting: what can be fitted to them, and why not.

The laws are computed in centred logarithms, log a + β (log D − m_D) − α (log N + log Ξ − m_N): a is the rise at the
centre of the observations, which they determine; A is its value at one token and one parameter, far away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MODULATORS = ("r_eff", "rho_align", "pi_proj")
NAMES = ("alpha", "beta", "A", "E", "gamma_r", "gamma_a", "gamma_p")
# below this share of a column's length beside the other columns, its parameter is not determined
INDEPENDENT = 1e-6
BOUND = 1e-9  # an exponent, a loss or a γ below this is zero


@dataclass(frozen=True)
class Design:
    """Where the observations lie.

    Attributes:
        log_n: log N, centred, (n,).
        log_d: log D, centred, (n,).
        centre: the two means.
        modulators: r_eff, rho_align and pi_proj, (3, n), or (0, n) for the plain law.
    """

    log_n: np.ndarray
    log_d: np.ndarray
    centre: tuple[float, float]
    modulators: np.ndarray

    @property
    def plain(self) -> Design:
        """The same without modulators."""
        return replace(self, modulators=self.modulators[:0])

    def _term(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log(NΞ) centred and the term a D^β/(NΞ)^α."""
        import numpy as np

        capacity = self.log_n + np.log1p(x[4:, None] * self.modulators).sum(0)
        return capacity, np.exp(np.clip(x[2] + x[1] * self.log_d - x[0] * capacity, -700, 300))

    def curve(self, x: np.ndarray) -> np.ndarray:
        """Return the rise of the loss at x = (α, β, log a, E, γ...)."""
        return np_asarray(self._term(x)[1] + x[3])

    def jacobian(self, x: np.ndarray) -> np.ndarray:
        """Return ∂curve/∂x, (n, len(x))."""
        import numpy as np

        capacity, term = self._term(x)
        gammas = [-x[0] * z / (1 + g * z) * term for g, z in zip(x[4:], self.modulators, strict=True)]
        return np.stack([-capacity * term, self.log_d * term, term, np.ones_like(term), *gammas], axis=1)

    def start(self, rise: np.ndarray, alpha: float, beta: float, gamma: float) -> np.ndarray:
        """Return x with a and E fitted to the rest by non-negative least squares."""
        import numpy as np
        from scipy.optimize import nnls

        x = np.array([alpha, beta, 0.0, 0.0, *[gamma] * len(self.modulators)])
        term = self._term(x)[1]
        a, E = nnls(np.stack([term, np.ones_like(term)], axis=1), np.maximum(rise, 0.0))[0]
        x[2:4] = math.log(max(a, 1e-6 * float(np.abs(rise).max()))), E
        return x

    def params(self, x: np.ndarray) -> dict[str, float]:
        """Return the parameters of the law, A at one token and one parameter."""
        log_A = x[2] - x[1] * self.centre[1] + x[0] * self.centre[0]
        on_bound = [0.0 if value < BOUND else value for value in x]  # the search ends a little inside
        values = [*on_bound[:2], math.exp(min(log_A, 700.0)), *on_bound[3:]]
        return dict(zip(NAMES[: len(values)], map(float, values), strict=True))

    def coordinates(self, params: Mapping[str, float]) -> np.ndarray:
        """Return x of some parameters; γ that are not among them are zero."""
        import numpy as np

        alpha, beta = params["alpha"], params["beta"]
        log_a = math.log(max(params["A"], 1e-300)) + beta * self.centre[1] - alpha * self.centre[0]
        gammas = [params.get(name, 0.0) for name in NAMES[4 : 4 + len(self.modulators)]]
        return np.array([alpha, beta, log_a, params["E"], *gammas])


def np_asarray(values: Any) -> np.ndarray:
    """Return values as one row of floats."""
    import numpy as np

    return np.asarray(values, dtype=float)


def checked(
    n_params: Any, n_tokens: Any, loss: Any, loss0: Any, modulators: Mapping[str, Any]
) -> tuple[Design, np.ndarray]:
    """Return the design and the rise of the loss, or say what is missing.

    Raises:
        ValueError: wrong shapes or values, too few observations, or parameters that they do not determine.
    """
    import numpy as np

    given = {name: value for name, value in modulators.items() if value is not None}
    if given and (missing := [name for name in modulators if name not in given]):
        raise ValueError(f"r_eff, rho_align and pi_proj belong together: {', '.join(missing)} missing")
    rows = {"n_params": n_params, "n_tokens": n_tokens, "loss": loss, **given}
    columns = {name: _row(name, value) for name, value in rows.items()}
    n = len(columns["loss"])
    base = _row("loss0", np.broadcast_to(np_asarray(loss0), n) if np.ndim(loss0) == 0 else loss0)
    for name, row in {**columns, "loss0": base}.items():
        if len(row) != n:
            raise ValueError(f"{name} must have one value for each of the {n} losses, got {len(row)}")
    for name, row in columns.items():
        least = "> 0" if name in ("n_params", "n_tokens") else "≥ 0"
        if bool((row <= 0).any() if least == "> 0" else (row < 0).any()):
            raise ValueError(f"{name} must be {least}, got {float(row.min()):g}")
    rise = columns["loss"] - base
    _enough(n, columns, given)
    if float(rise.max()) <= 0:
        raise ValueError(f"loss never rises above loss0 (by {float(rise.max()):g} at most): there is nothing to fit")
    log_n, log_d = np.log(columns["n_params"]), np.log(columns["n_tokens"])
    centre = float(log_n.mean()), float(log_d.mean())
    z = np.array([columns[name] for name in given]).reshape(len(given), n)
    _independent({"n_params": log_n, "n_tokens": log_d, **{name: np.log1p(columns[name]) for name in given}})
    return Design(log_n - centre[0], log_d - centre[1], centre, z), rise


def _row(name: str, value: Any) -> np.ndarray:
    import numpy as np

    try:
        row = np_asarray(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, got {value!r}") from None
    if row.ndim != 1 or not np.isfinite(row).all():
        raise ValueError(f"{name} must be one row of finite numbers, got shape {row.shape}: {row}")
    return row


def _enough(n: int, columns: Mapping[str, np.ndarray], given: Mapping[str, Any]) -> None:
    import numpy as np

    least = 5 + len(given)
    if n < least:
        law = "modulated" if given else "plain"
        raise ValueError(f"the {law} law has {least - 1} parameters and needs at least {least} observations, got {n}")
    for name, wanted, why in (
        ("n_params", 2, "alpha cannot be told from A"),
        ("n_tokens", 3, "beta, A and E cannot be told apart"),
        *((name, 2, f"gamma_{name[0] if name != 'rho_align' else 'a'} cannot be told from A") for name in given),
    ):
        values = np.unique(columns[name])
        if len(values) < wanted:
            raise ValueError(f"{name} needs at least {wanted} different values, got {values.tolist()}: {why}")


def _independent(columns: Mapping[str, np.ndarray]) -> None:
    """Refuse a column that the others and a constant already explain, in logarithms."""
    import numpy as np

    for name, column in columns.items():
        others = np.stack([np.ones_like(column), *(c for key, c in columns.items() if key != name)], axis=1)
        centred = column - column.mean()
        left = column - others @ np.linalg.lstsq(others, column, rcond=None)[0]
        if np.linalg.norm(left) < INDEPENDENT * np.linalg.norm(centred):
            raise ValueError(
                f"{name} varies only together with {', '.join(key for key in columns if key != name)}: "
                "their effects cannot be told apart; observe other combinations"
            )
