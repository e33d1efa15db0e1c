"""A long run with accidents: ``make soak``. Outside of the tests, since it takes minutes.

Two adapters take turns under one optimizer for 2,000 steps, with a GradScaler. Accidents come at random, by
a seed, before a step: a batch with NaN in one gradient, a loss that overflows, a backward pass whose gradients are
thrown away; and processes are killed with SIGKILL, each followed by a new process that has the last checkpoint alone.
At the end parameters and state must be, bit for bit, those of a run in one process without accidents, and the counters
must say exactly what happened. Batches whose gradients are all zero come at random, too; as for AdamW they are steps,
so the run without accidents takes them as well.

Matrices are made at every step, since a skipped step counts for the cadences.
"""

import argparse
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import models
import torch
from torch import Tensor

from curvopt import GritKFAC, MatryoshkaScaledAdam

ADAPTERS = ("default", "other")
FAULTS = ("nan", "overflow", "thrown away", "zero")
MAKES = {
    # by activations the loss scale, which accidents change, would weigh the averages
    "grit": lambda model: GritKFAC(model, lr=1e-3, statistics="gradient", inverse_every=1, weight_decay=0.01),
    "matryoshka": lambda model: MatryoshkaScaledAdam(model, lr=1e-3, weight_decay=0.01),
}
EVERY = 25  # steps between checkpoints


def accidents(steps: int, seed: int) -> dict[int, list[str]]:
    """Return what happens before which step; the same in every process."""
    draw = random.Random(seed)
    return {i: [draw.choice(FAULTS)] * draw.choice((1, 1, 2)) for i in range(steps) if draw.random() < 0.08}


class Run:
    """The training of one process, from a checkpoint if there is one."""

    def __init__(self, name: str, folder: Path, faulty: bool) -> None:
        self.model = models.llama(adapters=ADAPTERS, start="random")
        self.optimizer = MAKES[name](self.model)
        # halved by one step in sixteen, it grows about as often; without accidents it stays, and is as invisible
        growth = 11 if faulty else 10**9
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=growth)
        self.file, self.faulty, self.begin, self.counts = folder / "checkpoint", faulty, 0, Counter()
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            self.begin, self.counts = saved["step"], Counter(saved["counts"])

    def save(self, step: int) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step,
            "scaler": self.scaler.state_dict(), "counts": dict(self.counts),
        }  # fmt: skip
        torch.save(state, self.file.with_suffix(".next"))
        self.file.with_suffix(".next").replace(self.file)

    def once(self, i: int, spoil: str = "") -> None:
        """Take step i, or an accident before it."""
        self.optimizer.zero_grad()
        loss = models.llama_loss(self.model, i + 30_000 if spoil else i)
        self.scaler.scale(loss * {"overflow": torch.inf, "zero": 0.0}.get(spoil, 1.0)).backward()
        if spoil == "thrown away":
            return  # the next zero_grad forgets it
        if spoil == "nan":
            next(pair.A for pair in self.optimizer.pairs if pair.A.grad is not None).grad[0, 0] = torch.nan
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def go(self, steps: int, seed: int, quiet: bool = False) -> None:
        """Train to the end."""
        plan = accidents(steps, seed)
        for i in range(self.begin, steps):
            self.model.set_adapter(ADAPTERS[i // 3 % 2])
            for spoil in plan.get(i, ()):
                if self.faulty or spoil == "zero":
                    self.counts[spoil] += 1
                    self.once(i, spoil)
            self.once(i)
            if not quiet and ((i + 1) % EVERY == 0 or i + 1 == steps):
                self.save(i + 1)
                print(i + 1, flush=True)


def counted(run: Run) -> int:
    """Return how many updates of the first pairs of both adapters were skipped."""
    state = run.optimizer.state
    first = {pair.adapter: pair.A for pair in reversed(run.optimizer.pairs)}
    return sum(int(state[A]["skipped"]) for A in first.values())


def killed(name: str, folder: Path, steps: int, seed: int, kills: int) -> int:
    """Train in processes of which all but the last are killed at a random checkpoint; return how many were."""
    draw, done = random.Random(seed + 1), 0
    targets = sorted(draw.sample(range(EVERY, steps, EVERY), kills))
    for target in [*targets, 0]:
        command = [sys.executable, __file__, "--child", name, str(folder), "--steps", str(steps), "--seed", str(seed)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in child.stdout:
            if target and int(line) >= target:
                time.sleep(draw.random() / 5)  # somewhere on the way to the next
                child.send_signal(signal.SIGKILL)
                done += 1
                break
        if child.wait() not in (0, -signal.SIGKILL):
            raise SystemExit(f"a process ended with {child.returncode}")
    return done


def differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    """Return what two runs do not agree on, but for the counters of skipped updates."""
    return [name for name in models.differences(one, two) if not name.endswith("/skipped")]


def soak(name: str, steps: int, seed: int, kills: int) -> bool:
    """Run with and without accidents; print the counters; return whether all is accounted for."""
    begun = time.perf_counter()
    with TemporaryDirectory() as one, TemporaryDirectory() as two:
        calm = Run(name, Path(one), faulty=False)
        calm.go(steps, seed, quiet=True)
        done = killed(name, Path(two), steps, seed, kills)
        stormy = Run(name, Path(two), faulty=True)
    planned = Counter(spoil for some in accidents(steps, seed).values() for spoil in some)
    skipped = counted(stormy)
    unequal = differing(models.snapshot(calm.model, calm.optimizer), models.snapshot(stormy.model, stormy.optimizer))
    print(f"{name}: {steps} steps, {done} processes killed, {time.perf_counter() - begun:.0f} s")
    print(f"  accidents planned   {dict(sorted(planned.items()))}")
    print(f"  accidents counted   {dict(sorted(stormy.counts.items()))}")
    print(f"  updates skipped     {skipped}, and {planned['nan'] + planned['overflow']} steps left out by the scaler")
    print(f"  zero batches        {planned['zero']}")
    print(f"  loss scale          {stormy.scaler.get_scale():g} (calm: {calm.scaler.get_scale():g})")
    print(f"  tensors that differ {len(unequal)} {unequal[:3]}")
    return stormy.counts == planned and skipped == 0 and not unequal


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--optimizer", choices=tuple(MAKES), nargs="+", default=list(MAKES))
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FOLDER"), help="used by the soak itself")
    options = parser.parse_args()
    if options.child:
        Run(options.child[0], Path(options.child[1]), faulty=True).go(options.steps, options.seed)
        return
    results = [soak(name, options.steps, options.seed, options.kills) for name in options.optimizer]
    raise SystemExit(0 if all(results) else "not everything is accounted for")


if __name__ == "__main__":
    main()
