"""Fine-tune Llama 3 for summarization: a plain PyTorch script for one device.

The one line that knows of MoAI is marked. On plain PyTorch it does not apply, and the script runs on what is there.
"""

from __future__ import annotations

import checkpoint
import torch
import training
from loguru import logger


def main() -> None:
    parser = training.parser(__doc__, model="llama3", dataset="articles", save_dir="./llama3_summarization")
    parser.set_defaults(batch_size=32, block_size=128)
    args = parser.parse_args()
    size = args.block_size
    checkpoint.check_writable(args.save_dir)
    torch.manual_seed(0)

    if hasattr(torch, "moreh"):
        torch.moreh.option.enable_advanced_parallelization()  # the one line
    device = "cuda" if torch.cuda.is_available() else "cpu"

    logger.info(f"Loading {args.model_name_or_path}")
    model, tokenizer = checkpoint.load(args.model_name_or_path)
    tokenizer.pad_token = tokenizer.eos_token  # it has none for padding, and none for what is unknown
    if args.use_lora:
        model = training.add_lora(model, args, targets=["q_proj", "v_proj"])

    def tokenize(rows: dict) -> dict:
        heads = tokenizer([f"[ARTICLE]\n{text}" for text in rows["article"]])["input_ids"]
        tails = [f"\n[SUMMARY]\n{text}{tokenizer.eos_token}" for text in rows["highlights"]]
        tails = tokenizer(tails, add_special_tokens=False)["input_ids"]
        # It is the article that is cut where a sample is too long, not its summary.
        samples = [(head[: max(0, size - len(tail))] + tail)[:size] for head, tail in zip(heads, tails, strict=True)]
        return dict(tokenizer.pad({"input_ids": samples}, padding="max_length", max_length=size))

    train_batches, eval_batches = training.loaders(args, ["article", "highlights"], tokenize)

    def loss_of(batch: dict) -> torch.Tensor:
        input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        labels = training.mask_pads(input_ids, attention_mask)
        outputs = model(
            input_ids.to(device), attention_mask=attention_mask.to(device), labels=labels.to(device), use_cache=False
        )
        return outputs[0]

    model.to(device)
    model.train()
    # The values that transformers.AdamW had; torch's defaults differ.
    optim = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-6, weight_decay=0.0)

    total_step = len(train_batches) * args.epochs
    logger.info(f"total_step: {total_step}")
    step, clock = 0, training.Clock(args, total_step)
    for _ in range(args.epochs):
        for batch in train_batches:
            step += 1
            loss = loss_of(batch)
            loss.backward()
            optim.step()
            model.zero_grad(set_to_none=True)

            if step == 1 or step % args.log_interval == 0 or step == total_step:
                clock.log(step, loss)
            if step % args.eval_step == 0 or step == total_step:
                training.evaluate(model, eval_batches, loss_of)
                clock.restart(step)

    logger.info("Training Done")
    logger.info("Saving Model...")
    checkpoint.save(model, tokenizer, args.save_dir)
    logger.info(f"Model saved in {args.save_dir}")


if __name__ == "__main__":
    main()
