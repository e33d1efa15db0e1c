"""What GoRAInit sums of a layer's input x and output gradient g, as one step asks for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvopt.functional.whitening import Whitening, gaussian, right_singular, whitening
from curvopt.lora import LoraPair
from curvopt.lora.gradients import gathered, layer_gradient, layer_shape, output_rows, projected

FACTOR_RANK = 32  # eigenpairs kept of S_x and S_g, from twice as many columns
OVERSAMPLING = 8
FACTORS = ("input_sketch", "output_sketch", "traces")


@dataclass
class Products:
    """The products of one calibration: of each layer Ḡ, or sketches of S_x, S_g and then of R_g Ḡ R_x.

    The first step that reaches a layer gives its S_x and S_g; they fix R_x and R_g, and the steps after it sum
    Ḡ (R_x Ω) and (Ψᵀ R_g) Ḡ. See `curvopt.functional.whitening`.

    Attributes:
        gradient: sum Ḡ itself.
        sketch: sketch R_g Ḡ R_x.
        factors: sketch S_x and S_g in all steps, without R_g Ḡ R_x.
        largest: the largest rank asked for.
        maps: by pair, R_x and R_g once they are known.
    """

    gradient: bool
    sketch: bool
    factors: bool
    largest: int
    maps: dict[LoraPair, tuple[Whitening, Whitening]] = field(default_factory=dict)
    _drawn: dict[LoraPair, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, pair: LoraPair, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Return the products of one backward through one layer, all linear in what a step adds."""
        found = {"gradient": layer_gradient(pair, x, g)} if self.gradient else {}
        if not (self.sketch or self.factors):
            return found
        rows = output_rows(pair, g)
        left, right = (T.to(rows) for T in self.tests(pair))
        x_right = projected(pair, x, right)
        if self.factors or pair not in self.maps:
            found["input_sketch"] = gathered(pair, x_right, x).mT
            found["output_sketch"] = rows.mT @ (rows @ left)
            found["traces"] = torch.stack([_square_sum(pair, x, rows), rows.square().sum()])
        else:
            found["right"] = rows.mT @ x_right
            found["left"] = gathered(pair, rows @ left, x)
        return found

    def tests(self, pair: LoraPair) -> tuple[Tensor, Tensor]:
        """Return the test matrices (d_out, m) and (d_in, l): Gaussian ones, times R_g and R_x once these are known."""
        if pair not in self._drawn:
            d_in, d_out = layer_shape(pair)
            small = min(d_in, d_out)
            if self.factors or pair not in self.maps:
                m, l = min(2 * FACTOR_RANK, d_out), min(2 * FACTOR_RANK, d_in)
            else:
                l = min(self.largest + OVERSAMPLING, small)
                m = min(2 * l, d_out)
            like = torch.zeros((), dtype=torch.float64, device=pair.B.device)
            left, right = gaussian(d_out, m, f"{pair.name} g", like), gaussian(d_in, l, f"{pair.name} x", like)
            if pair in self.maps and not self.factors:
                R_x, R_g = self.maps[pair]
                left, right = R_g(left.mT).mT, R_x(right.mT).mT
            self._drawn[pair] = left, right
        return self._drawn[pair]

    def learn(self, pair: LoraPair, sums: Mapping[str, Tensor]) -> None:
        """Fix R_x and R_g of a pair from its sums over all processes."""
        left, right = self.tests(pair)
        home = left.device
        traces = sums["traces"].to(home)
        self.maps[pair] = (
            whitening(sums["input_sketch"].to(home), right, traces[0], FACTOR_RANK),
            whitening(sums["output_sketch"].to(home), left, traces[1], FACTOR_RANK),
        )
        del self._drawn[pair]

    def spectrum(self, pair: LoraPair, sums: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return σ and V of R_g Ḡ R_x from the sums (or mean) of a pair's sketches."""
        R_x, R_g = self.maps[pair]
        left, right = self.tests(pair)
        d_out, m = left.shape
        Psi = gaussian(d_out, m, f"{pair.name} g", left)
        MO = R_g(sums["right"].to(left).mT).mT
        return right_singular(MO, R_x(sums["left"].to(left)), Psi, right.shape[1])

    def forget(self) -> None:
        """Begin anew."""
        self.maps.clear()
        self._drawn.clear()


def _square_sum(pair: LoraPair, x: Tensor, rows: Tensor) -> Tensor:
    """Return Σ x², 0-d: the trace of xᵀx."""
    ones = torch.ones(layer_shape(pair)[0], 1, dtype=rows.dtype, device=rows.device)
    if pair.kind == "embedding":
        return projected(pair, x, ones).sum()  # one-hot rows; padding is none
    # of a convolution the patches, which `projected` alone knows
    return projected(pair, x.square(), ones).sum()
