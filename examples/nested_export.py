"""Train one adapter that can be used at several ranks (MatryoshkaLoRA), and export each of them.

    python examples/nested_export.py

The forward pass is untouched: the optimizer trains the leading directions to be adapters in their own right.
"""

import copy

import common
import torch
from peft import PeftModel
from tqdm import tqdm

from curvopt import MatryoshkaScaledAdam
from curvopt.demo.task import batches, evaluate, lora_model


def main(argv: list[str] | None = None) -> list[float]:
    """Train; return the losses."""
    args = common.parser(__doc__, "nested_export").parse_args(argv)
    base, text = common.base_and_text(args)
    model = lora_model(base, args.rank)
    before = evaluate(model, text.topics_heldout, args.length)
    ranks = [2**i for i in range(args.rank.bit_length()) if 2**i <= args.rank]
    optimizer = MatryoshkaScaledAdam(model, lr=args.lr, ranks=ranks)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)

    losses = []
    model.train()
    for x in tqdm(batches(text.topics, args.batch, args.length, args.steps, seed=0), total=args.steps):
        optimizer.zero_grad()
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

    after = {}
    for rank in ranks:
        folder = optimizer.export(args.out / f"rank-{rank}", rank, keep_P=True)  # a plain PEFT adapter of that rank
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        after[rank] = evaluate(adapted, text.topics_heldout, args.length)
        print(f"{folder}: held-out loss {after[rank]:.4f}")
    common.plot(args.out / "ranks.png", {"held-out loss": list(after.values())}, f"one of ranks {ranks}", "loss")
    common.report(args.out, losses, before, after[ranks[-1]])
    return losses


if __name__ == "__main__":
    main()
