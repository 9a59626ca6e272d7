"""Fine-tune Baichuan2 for customer support: a plain PyTorch script for one device.

The one line that knows of MoAI is marked. On plain PyTorch it does not apply, and the script runs on what is there.
"""

from __future__ import annotations

import baichuan2  # noqa: F401  (the model, which transformers does not have)
import checkpoint
import torch
import training
from loguru import logger


def main() -> None:
    parser = training.parser(__doc__, model="baichuan2", dataset="questions", save_dir="./baichuan2_customer_support")
    parser.add_argument("--trust-remote-code", action="store_true", help="the hub's tokenizer is code of its own")
    args = parser.parse_args()
    checkpoint.check_writable(args.save_dir)
    torch.manual_seed(0)

    if hasattr(torch, "moreh"):
        torch.moreh.option.enable_advanced_parallelization()  # the one line
    device = "cuda" if torch.cuda.is_available() else "cpu"

    logger.info(f"Loading {args.model_name_or_path}")
    model, tokenizer = checkpoint.load(args.model_name_or_path, args.trust_remote_code)
    if args.use_lora:  # queries, keys and values are one layer
        model = training.add_lora(model, args, targets=["W_pack"])

    def tokenize(rows: dict) -> dict:
        pairs = zip(rows["instruction"], rows["response"], strict=True)
        texts = [f"Question: {question}\nAnswer: {answer}{tokenizer.eos_token}" for question, answer in pairs]
        return tokenizer(texts, max_length=args.block_size, padding="max_length", padding_side="right", truncation=True)

    train_batches, eval_batches = training.loaders(args, ["instruction", "response"], tokenize)

    def loss_of(batch: dict) -> torch.Tensor:
        input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        labels = training.mask_pads(input_ids, attention_mask)
        # Nothing looks ahead at the padding behind a text. With a mask, ALiBi would be [batch, heads, block, block].
        outputs = model(input_ids.to(device), labels=labels.to(device), use_cache=False)
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
