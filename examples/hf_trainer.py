"""Fine-tune with transformers' Trainer; ranks follow the spectrum, and the adapter is saved at its reduced ranks.

    python examples/hf_trainer.py

`OptimizerFactory` builds the optimizer from the model and takes learning rate, betas and weight decay from the training
arguments. `CurvatureCallback` logs ranks and skipped steps, and slices the adapters when training ends.
"""

import common
from transformers import Trainer, TrainingArguments

from curvopt.demo.task import batches, evaluate, lora_model
from curvopt.integrations.transformers import CurvatureCallback, OptimizerFactory


def main(argv: list[str] | None = None) -> list[float]:
    """Train; return the losses."""
    args = common.parser(__doc__, "hf_trainer").parse_args(argv)
    base, text = common.base_and_text(args)
    model = lora_model(base, args.rank)
    before = evaluate(model, text.topics_heldout, args.length)
    rows = next(batches(text.topics, args.batch * args.steps, args.length, 1, seed=0))

    trainer = Trainer(
        model,
        TrainingArguments(
            str(args.out),
            learning_rate=args.lr,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            logging_steps=max(1, args.steps // 20),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizer_cls_and_kwargs=(
            OptimizerFactory,
            {"lr": args.lr, "reproject_every": max(1, args.steps // 5), "rank_threshold": 0.99, "min_rank": 1},
        ),
    )
    CurvatureCallback(compact=True).install(trainer)
    trainer.train()

    model.save_pretrained(args.out, save_embedding_layers=False)
    log = trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    ranks = [entry["curvopt/mean_rank"] for entry in log if "curvopt/mean_rank" in entry]
    common.plot(args.out / "ranks.png", {"mean rank of an adapter": ranks}, "entry of the log", "rank")
    common.report(args.out, losses, before, evaluate(model, text.topics_heldout, args.length))
    return losses


if __name__ == "__main__":
    main()
