"""Fine-tune with Accelerate: gradient accumulation, clipping, a checkpoint in the middle.

python examples/accelerate_loop.py
accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py

The optimizer is made before `prepare`; it finds its parameters again whatever `prepare` does to the model.
"""

import common
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from curvopt import GritKFAC
from curvopt.demo.task import batches, evaluate, lora_model

ACCUMULATE = 2


def main(argv: list[str] | None = None) -> list[float]:
    """Train; return the losses."""
    args = common.parser(__doc__, "accelerate_loop").parse_args(argv)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    with accelerator.main_process_first():  # who comes first makes the base model, the others read it
        base, text = common.base_and_text(args)
    model = lora_model(base, args.rank)
    before = evaluate(model, text.topics_heldout, args.length)

    rows = next(batches(text.topics, args.batch * args.steps, args.length, 1, seed=0))
    data = DataLoader(rows, batch_size=max(1, args.batch // ACCUMULATE // accelerator.num_processes))
    optimizer = GritKFAC(model, lr=args.lr)  # before prepare: it finds its parameters again
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / args.steps))
    model, optimizer, data = accelerator.prepare(model, optimizer, data)

    losses = []
    model.train()
    for i, x in enumerate(tqdm(data, disable=not accelerator.is_main_process)):
        with accelerator.accumulate(model):
            loss = model(input_ids=x, labels=x).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            schedule.step()
        losses.append(loss.item())
        if i == len(data) // 2:
            accelerator.save_state(args.out / "checkpoint")  # load_state goes on from here, to the bit

    model = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        model.save_pretrained(args.out, save_embedding_layers=False)
        common.report(args.out, losses, before, evaluate(model, text.topics_heldout, args.length))
    return losses


if __name__ == "__main__":
    main()
