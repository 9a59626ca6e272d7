"""Fine-tune Qwen for code generation: a plain PyTorch script for one device.

The one line that knows of MoAI is marked. On plain PyTorch it does not apply, and the script runs on what is there.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

import checkpoint
import torch
from datasets import Dataset, load_dataset
from loguru import logger
from torch.utils.data import DataLoader


def positive(text: str) -> int:
    if not (text.isdigit() and int(text) > 0):
        raise ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model-name-or-path", default="Qwen/Qwen1.5-7B", help="hub name or folder")
    parser.add_argument("--epochs", type=positive, default=3)
    parser.add_argument("--batch-size", type=positive, default=256, help="of the whole accelerator")
    parser.add_argument("--block-size", type=positive, default=1024, help="tokens of one sample")
    parser.add_argument("--lr", type=float, default=2e-6)
    parser.add_argument("--log-interval", type=positive, default=10, help="steps between two log lines")
    parser.add_argument(
        "--dataset-name-or-path",
        default="iamtarun/python_code_instructions_18k_alpaca",
        help="hub name or folder; needs a column `prompt`",
    )
    parser.add_argument("--save-dir", type=Path, default=Path("./qwen_code_generation"))
    return parser.parse_args()


def load_prompts(name_or_path: str) -> Dataset:
    """The rows to train on."""
    try:
        dataset = load_dataset(name_or_path, split="train").with_format("torch")
    except Exception as error:  # as many kinds as there are file formats
        raise SystemExit(f"Cannot load the data set {name_or_path}: {type(error).__name__}: {error}") from error
    if "prompt" not in dataset.column_names:
        raise SystemExit(f"The data set {name_or_path} has no column `prompt`, only {dataset.column_names}.")
    return dataset


def mask_pads(input_ids: torch.Tensor, attention_mask: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Labels [batch, block]: the tokens themselves, with `ignore_index` where there is padding."""
    return input_ids.masked_fill(attention_mask == 0, ignore_index)


def main() -> None:
    args = parse_args()
    checkpoint.check_writable(args.save_dir)
    torch.manual_seed(0)

    if hasattr(torch, "moreh"):
        torch.moreh.option.enable_advanced_parallelization()  # the one line
    device = "cuda" if torch.cuda.is_available() else "cpu"

    logger.info(f"Loading {args.model_name_or_path}")
    model, tokenizer = checkpoint.load(args.model_name_or_path)
    dataset = load_prompts(args.dataset_name_or_path)
    if len(dataset) < args.batch_size:
        raise SystemExit(f"The data set has {len(dataset)} rows, less than one batch of {args.batch_size}.")

    def tokenize(rows: dict) -> dict:
        texts = [prompt + tokenizer.eos_token for prompt in rows["prompt"]]
        return tokenizer(texts, max_length=args.block_size, padding="max_length", truncation=True)

    dataset = dataset.map(tokenize, batched=True, remove_columns=dataset.column_names)
    loader = DataLoader(dataset, batch_size=args.batch_size, shuffle=True, drop_last=True)

    model.to(device)
    model.train()
    # The values that transformers.AdamW had; torch's defaults differ.
    optim = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-6, weight_decay=0.0)

    total_step = len(loader) * args.epochs
    logger.info(f"total_step: {total_step}")
    step, clock = 0, Clock(args.batch_size * args.block_size)
    for _ in range(args.epochs):
        for batch in loader:
            step += 1
            input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
            labels = mask_pads(input_ids, attention_mask)
            outputs = model(
                input_ids.to(device),
                attention_mask=attention_mask.to(device),
                labels=labels.to(device),
                use_cache=False,
            )
            loss = outputs[0]
            loss.backward()
            optim.step()
            model.zero_grad(set_to_none=True)

            if step == 1 or step % args.log_interval == 0 or step == total_step:
                clock.log(step, total_step, loss)

    logger.info("Training Done")
    logger.info("Saving Model...")
    checkpoint.save(model, tokenizer, args.save_dir)
    logger.info(f"Model saved in {args.save_dir}")


class Clock:
    """An honest one: it stops after the loss has been read, when everything before it has really been computed."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.last_step = 0
        self.began = time.perf_counter()

    def log(self, step: int, total_step: int, loss: torch.Tensor) -> None:
        value = loss.item()  # awaits the device
        duration = time.perf_counter() - self.began
        line = f"[Step {step}/{total_step}] | Loss: {value:.6f}"
        if step == 1:
            logger.info(line)
            logger.info(f"Model load and warmup done. Duration: {duration:.2f}")
        else:
            throughput = self.tokens_per_step * (step - self.last_step) / duration
            logger.info(f"{line} | Duration: {duration:.2f} | Throughput: {throughput:.2f} tokens/sec")
        self.last_step = step
        self.began = time.perf_counter()


if __name__ == "__main__":
    main()
