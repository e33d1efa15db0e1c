"""Fine-tune a model that FSDP2 shards over two processes, and save the adapter as a plain PEFT folder.

torchrun --nproc-per-node 2 examples/fsdp2.py

`fully_shard` replaces all parameters; an optimizer that was given the model finds the new ones.
"""

import common
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from curvopt import GritKFAC
from curvopt.demo.task import batches, evaluate, lora_model


def main(argv: list[str] | None = None) -> list[float]:
    """Train; return the losses of this process."""
    args = common.parser(__doc__, "fsdp2", steps=100).parse_args(argv)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank > 0:
        dist.barrier()
    base, text = common.base_and_text(args)  # the first process makes the base model, the others read it
    if rank == 0:
        dist.barrier()

    model = lora_model(base, args.rank)
    optimizer = GritKFAC(model, lr=args.lr)  # before sharding or afterwards
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    losses = []
    model.train()
    data = batches(text.topics, args.batch, args.length, args.steps, seed=0)
    for x in tqdm(data, total=args.steps, disable=rank > 0):
        mine = x.chunk(world)[rank]
        optimizer.zero_grad()
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        whole = lora_model(base, args.rank)
        before = evaluate(whole, text.topics_heldout, args.length)
        whole.load_state_dict(weights)
        whole.save_pretrained(args.out, save_embedding_layers=False)
        common.report(args.out, losses, before, evaluate(whole, text.topics_heldout, args.length))
    dist.barrier()
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
