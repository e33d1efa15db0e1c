"""Fine-tune a LoRA adapter in a plain PyTorch loop.

    python examples/plain_loop.py
    python examples/plain_loop.py --optimizer adamw     # the same loop with torch's AdamW

The only line that differs from any other loop is the one that makes the optimizer.
"""

import common
import torch
from tqdm import tqdm

from curvopt import GritKFAC
from curvopt.demo.task import batches, evaluate, lora_model


def main(argv: list[str] | None = None) -> list[float]:
    """Train; return the losses."""
    options = common.parser(__doc__, "plain_loop")
    options.add_argument("--optimizer", choices=("grit", "adamw"), default="grit", help="default grit")
    args = options.parse_args(argv)
    base, text = common.base_and_text(args)
    model = lora_model(base, args.rank)
    before = evaluate(model, text.topics_heldout, args.length)

    if args.optimizer == "grit":
        optimizer = GritKFAC(model, lr=args.lr)
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)

    losses = []
    model.train()
    bar = tqdm(batches(text.topics, args.batch, args.length, args.steps, seed=0), total=args.steps)
    for x in bar:
        optimizer.zero_grad()
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")

    model.save_pretrained(args.out, save_embedding_layers=False)
    common.report(args.out, losses, before, evaluate(model, text.topics_heldout, args.length))
    return losses


if __name__ == "__main__":
    main()
