"""What GritKFAC tells of itself when asked."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from curvopt.distributed import is_sharded
from curvopt.functional.basis import balanced
from curvopt.functional.inverse import broken, empty, normalised
from curvopt.functional.ranks import entropy_rank
from curvopt.functional.update import RULES
from curvopt.lora import LoraPair, find_skipped
from curvopt.optim.base import PairedOptimizer, Side
from curvopt.optim.bucket import BucketedOptimizer
from curvopt.optim.grit.communication import bytes_sent
from curvopt.optim.grit.curvature import source_of
from curvopt.optim.grit.factors import PairFactors, rank_factors


def live_rank(optimizer: PairedOptimizer, pair: LoraPair) -> int:
    """Return the live rank of a pair: that of its tensors until a mask is set, or where they do not bear it out.

    Weights may have been put back from outside (a best model, a rollback, an average) since the mask was set.
    """
    k = pair.rank
    for p in (pair.A, pair.B):
        if "rank" in optimizer.state.get(p, {}):
            k = min(int(optimizer.state[p]["rank"]), k)
            break
    if k == pair.rank or is_sharded(pair.A) or is_sharded(pair.B):
        return k
    rest = [p.detach().narrow(dim, k, pair.rank - k) for p, dim in ((pair.A, pair.dim_A), (pair.B, pair.dim_B))]
    return pair.rank if all(bool(X.any()) for X in rest) else k


def diagnose(optimizer: BucketedOptimizer, entangled: Callable[[LoraPair], str]) -> dict[str, Any]:
    """Return a report of plain numbers, strings, lists and dicts. Reads the device.

    ``entangled`` says why a pair keeps its basis.

    Keys: ``steps`` (calls of ``step``), ``skipped_updates`` (of those, how many changed nothing), ``backend``,
    ``fallbacks`` (ops that CUDA tensors had to take from the reference),
    ``silent`` (pairs whose hook never fired though they had gradients), ``idle`` (pairs that never had a gradient),
    ``skipped_layers`` (layers that look like adapters but are not plain pairs, with the reason), ``bytes_sent`` (to
    other processes by this one, by occasion; see `communication.bytes_sent`), and ``pairs``: by name

    - ``rank``, ``full_rank``: live directions and rank of the tensors; ``kept``: GRIT's published projection's k;
    - ``statistics``: what it is observed by, ``note``: why not by activations, and why the pair keeps its basis and
      rank if it does; ``rows``: rows (tokens) seen;
    - ``energy``: σ_i² as shares of their sum in descending order, ``effective_rank``: exp of their entropy;
    - ``outer``: by side, the share of the outer factor's trace that its k directions hold; empty without outer factors;
    - ``A``, ``B``: of the factor on the rank side, ``condition`` of Ŝ + λI, ``scalar_distance``
      ‖M − mean(M) I‖_F / ‖M‖_F of what acts on the gradient (of Ŝ where its basis is used, or nothing of it) — 0 means
      that the factor has nothing to say — and ``failed``.
    """
    by_pair: dict[LoraPair, list[Side]] = {}
    for side in optimizer.sides:
        by_pair.setdefault(side.pair, []).append(side)
    skipped = [float(s["skipped"]) for s in optimizer.state.values() if "skipped" in s]
    known = {pair: [s for s in sides if "rank" in optimizer.state.get(s.param, {})] for pair, sides in by_pair.items()}
    silent = [p.name for p, s in known.items() if s and p.signal is not None and _unseen(optimizer, s)]
    model = optimizer.model
    factors = rank_factors(optimizer)
    return {
        "steps": steps_of(optimizer),
        "skipped_updates": int(max(skipped, default=0)),
        "backend": optimizer.ops.backend,
        "fallbacks": sorted(optimizer.ops.fallbacks),
        "silent": silent,
        "idle": [p.name for p, sides in known.items() if not sides],
        "bytes_sent": bytes_sent(optimizer),
        "skipped_layers": [] if model is None else find_skipped(model),
        "pairs": {
            pair.name: _pair(optimizer, pair, sides, factors.get(pair.name), entangled(pair))
            for pair, sides in known.items()
        },
    }


def _unseen(optimizer: PairedOptimizer, sides: list[Side]) -> bool:
    wanted = source_of(sides[0]).hooks
    return wanted and all(float(optimizer.state[s.param]["observed"]) == 0 for s in sides)


def steps_of(optimizer: PairedOptimizer) -> int:
    """Return the steps that any side has had a gradient in."""
    return int(max((float(s["cadence"][0]) for s in optimizer.state.values() if "cadence" in s), default=0))


def _pair(
    optimizer: PairedOptimizer, pair: LoraPair, sides: list[Side], factors: PairFactors | None, entangled: str
) -> dict[str, Any]:
    states = {s.name: optimizer.state[s.param] for s in sides}
    out: dict[str, Any] = {"rank": live_rank(optimizer, pair), "full_rank": pair.rank}
    out["note"] = "; ".join(filter(None, (pair.note, entangled)))
    if not sides:
        return out
    group = sides[0].group
    out["statistics"] = source_of(sides[0]).name
    out["kept"] = [int(s["kept"]) for s in states.values() if "kept" in s][:1]
    out["outer"] = {name: outer_share(s) for name, s in states.items() if "outer_trace" in s}
    if factors is None:
        return out
    out["rows"] = max(float(s["rows"]) for s in states.values())
    k = torch.tensor([out["rank"]])
    S = {word: F[None].cpu() for word, F in zip("ud", factors, strict=True) if F is not None}
    for side in sides:
        out[side.name] = describe_factor(S[side.moment()], float(group["damping"]), k, group["update"])
    if len(S) == 2:
        sigma2 = balanced(S["u"], S["d"], k=k).sigma.square()
        total = sigma2.sum()
        out["energy"] = (sigma2 / total if total > 0 else sigma2)[0, : out["rank"]].tolist()
        out["effective_rank"] = float(entropy_rank(sigma2)[0])
    return out


def outer_share(state: Mapping[str, Any]) -> float:
    """Return Σμ / tr S of a side's outer factor; 0 while it is empty."""
    trace = float(state["outer_trace"])
    return float(state["outer_eigenvalues"].sum()) / trace if trace > 0 else 0.0


def describe_factor(S: Tensor, damping: float, k: Tensor, rule: str) -> dict[str, Any]:
    """Return ``condition``, ``scalar_distance`` and ``failed`` of one factor ``[1, r, r]`` on its live block.

    Args:
        S: the factor, on the CPU.
        damping: λ.
        k: ``[1]`` live rank.
        rule: name of the update rule, which decides what of the factor acts.
    """
    if bool(empty(S)) or bool(broken(S)):
        return {"condition": 1.0, "scalar_distance": 0.0, "failed": bool(broken(S))}
    n = int(k)
    values = torch.linalg.eigvalsh(normalised(S, k)[0][0, :n, :n]).clamp(min=0)
    damped = values + damping
    acting = RULES[rule].acting(values, damped)
    distance = (acting - acting.mean()).norm() / acting.norm()
    return {"condition": float(damped[-1] / damped[0]), "scalar_distance": float(distance), "failed": False}
