"""Let gradients decide the ranks and the start of the adapters (GoRA), train on, export for a serving engine.

    python examples/gora_then_train.py

`GoRAInit` watches the first batches without moving anything, gives every layer its rank and its start, and hands over
to GritKFAC in the same loop. The layers then have different ranks: PEFT reads those; for vLLM the adapter is filled
with zeros to one rank.
"""

import copy

import common
import torch
from peft import PeftModel
from tqdm import tqdm

from curvopt import GoRAInit, GritKFAC
from curvopt.demo.task import batches, evaluate, lora_model
from curvopt.lora import export_adapter


def main(argv: list[str] | None = None) -> list[float]:
    """Train; return the losses."""
    options = common.parser(__doc__, "gora_then_train")
    options.add_argument("--calibration", type=int, default=16, help="batches to look at first (default %(default)s)")
    args = options.parse_args(argv)
    base, text = common.base_and_text(args)
    model = lora_model(base, args.rank)
    before = evaluate(model, text.topics_heldout, args.length)
    optimizer = GoRAInit(
        model,
        rank=args.rank,
        min_rank=max(1, args.rank // 2),
        max_rank=2 * args.rank,
        start="gora",
        allocation="exact",
        compare="role",  # attention with attention, the MLP with the MLP
        calibration_steps=args.calibration,
        then=lambda model: GritKFAC(model, lr=args.lr),
    )

    steps = args.calibration + args.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)  # also after the hand-over

    losses = []
    model.train()
    for x in tqdm(batches(text.topics, args.batch, args.length, steps, seed=0), total=steps):
        optimizer.zero_grad()
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

    after = evaluate(model, text.topics_heldout, args.length)
    ranks = sorted(optimizer.plan.ranks.values())
    print(f"ranks {ranks[0]} to {ranks[-1]}, {optimizer.plan.spent} parameters of {optimizer.plan.budget}")
    for target in ("peft", "vllm"):
        folder = export_adapter(model, args.out / target, target=target)
        again = evaluate(PeftModel.from_pretrained(copy.deepcopy(base), folder), text.topics_heldout, args.length)
        print(f"{folder}: read again, held-out loss {again:.4f}")
    common.plot(args.out / "ranks.png", {"rank": ranks}, "layer, in order of rank", "rank")
    common.report(args.out, losses, before, after)
    return losses


if __name__ == "__main__":
    main()
