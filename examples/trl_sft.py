"""Supervised fine-tuning with TRL's SFTTrainer, from texts, with a tokenizer that the script makes.

    python examples/trl_sft.py

TRL's trainers are transformers Trainers: the optimizer gets in as in hf_trainer.py. DPOTrainer and GRPOTrainer take
the optimizer itself: `optimizers=(GritKFAC(model, lr=...), None)`.
"""

import common
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from curvopt.demo.task import evaluate, lora_model, split_topics
from curvopt.integrations.transformers import OptimizerFactory


def main(argv: list[str] | None = None) -> list[float]:
    """Train; return the losses."""
    args = common.parser(__doc__, "trl_sft").parse_args(argv)
    base, text = common.base_and_text(args)
    model = lora_model(base, args.rank)
    before = evaluate(model, text.topics_heldout, args.length)

    documents, _ = split_topics()
    paragraphs = [p for document in documents.values() for p in document.split("\n\n") if len(p) >= args.length]
    trainer = SFTTrainer(
        model,
        SFTConfig(
            str(args.out),
            learning_rate=args.lr,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            max_length=args.length,
            logging_steps=max(1, args.steps // 20),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"text": paragraph} for paragraph in paragraphs[: args.batch * args.steps]]),
        processing_class=common.byte_tokenizer(),
        optimizer_cls_and_kwargs=(OptimizerFactory, {"lr": args.lr}),
    )
    trainer.train()

    model.save_pretrained(args.out, save_embedding_layers=False)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    common.report(args.out, losses, before, evaluate(model, text.topics_heldout, args.length))
    return losses


if __name__ == "__main__":
    main()
