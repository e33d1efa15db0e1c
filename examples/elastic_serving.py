"""Serve one adapter at the size that a request can afford: a table of rank, loss, accuracy and bytes.

    python examples/elastic_serving.py

One run with AdamW's cost trains an adapter whose leading directions are adapters of their own. One file is written; a
server loads it once and computes at any smaller rank, and `smallest_rank` says which is good enough.
"""

import copy

import common
import torch
from peft import PeftModel
from tqdm import tqdm

from curvopt import MatryoshkaScaledAdam
from curvopt.demo.task import batches, evaluate, lora_model
from curvopt.lora import export_adapter, smallest_rank, truncated


@torch.no_grad()
def accuracy(model: torch.nn.Module, held_out: list[dict[str, torch.Tensor]]) -> float:
    """Return the share of next bytes that were the most probable."""
    model.eval()
    hits = [(model(**b).logits[:, :-1].argmax(-1) == b["labels"][:, 1:]).float().mean() for b in held_out]
    return float(torch.stack(hits).mean())


def main(argv: list[str] | None = None) -> list[float]:
    """Train; return the losses."""
    options = common.parser(__doc__, "elastic_serving")
    options.add_argument("--tolerance", type=float, default=0.01, help="of the full loss (default %(default)s)")
    args = options.parse_args(argv)
    base, text = common.base_and_text(args)
    model = lora_model(base, args.rank)
    before = evaluate(model, text.topics_heldout, args.length)
    optimizer = MatryoshkaScaledAdam(model, lr=args.lr, nesting="stratified")
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
    optimizer.remove_hooks()

    # one file, its directions in order; the server loads it and cuts
    folder = export_adapter(model, args.out / "adapter", basis="svd")
    served = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    held_out = [{"input_ids": x, "labels": x} for x in batches(text.topics_heldout, 32, args.length, 4, seed=1)]
    choice = smallest_rank(served, held_out, args.tolerance, basis="stored")
    print(f"{'rank':>6}{'loss':>10}{'accuracy':>10}{'kB':>8}")
    for row in choice.table:
        with truncated(served, row.rank, basis="stored"):
            right = accuracy(served, held_out)
        chosen = "  <- within the tolerance" if row.rank == choice.rank else ""
        print(f"{row.rank:>6}{row.loss:>10.4f}{right:>10.4f}{row.bytes / 1000:>8.1f}{chosen}")
    small = export_adapter(served, args.out / f"rank-{choice.rank}", ranks=choice.rank)
    print(f"{small}: the smallest rank within {args.tolerance:.1%} of the full loss, as a plain adapter")
    ranks = [row.rank for row in choice.table]
    curve = {"loss": [row.loss for row in choice.table], "limit": [choice.limit] * len(ranks)}
    common.plot(args.out / "ranks.png", curve, f"one of ranks {ranks}", "held-out loss")
    common.report(args.out, losses, before, evaluate(served, text.topics_heldout, args.length))
    return losses


if __name__ == "__main__":
    main()
