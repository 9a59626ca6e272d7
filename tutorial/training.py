"""What the training scripts have in common around their loops: arguments, rows, LoRA, evaluation, log lines."""

from __future__ import annotations

import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from loguru import logger
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

DATA = Path(__file__).resolve().parent / "data"
HELD_OUT = 0.05  # of a data set that has no validation rows of its own


def parser(description: str | None, model: str, dataset: str, save_dir: str) -> ArgumentParser:
    """The arguments of every training script; by default the small model and data that prepare.py makes."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--model-name-or-path", default=str(DATA / model), help="hub name or folder")
    parser.add_argument("--dataset-name-or-path", default=str(DATA / dataset), help="hub name or folder")
    parser.add_argument("--dataset-config", help="which of several configurations of the data set")
    parser.add_argument("--epochs", type=positive, default=1)
    parser.add_argument("--batch-size", type=positive, default=64, help="of the whole accelerator")
    parser.add_argument("--block-size", type=positive, default=64, help="tokens of one sample")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--log-interval", type=positive, default=10, help="steps between two log lines")
    parser.add_argument("--eval-step", type=positive, default=50, help="steps between two evaluations")
    parser.add_argument("--use-lora", action="store_true", help="train low-rank adapters, and save these alone")
    parser.add_argument("--lora-r", type=positive, default=16)
    parser.add_argument("--lora-alpha", type=positive, default=16)
    parser.add_argument("--lora-dropout", type=float, default=0.05)
    parser.add_argument("--save-dir", type=Path, default=Path(save_dir))
    return parser


def positive(text: str) -> int:
    if not (text.isdigit() and int(text) > 0):
        raise ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def add_lora(
    model: PreTrainedModel, args: Namespace, targets: list[str], fan_in_fan_out: bool = False
) -> PreTrainedModel:
    """The model with an adapter beside each of the linear layers `targets`; nothing else of it is trained.

    `fan_in_fan_out` says that the layers keep their weights as [in, out], as GPT-2's do.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=fan_in_fan_out,
    )
    model = get_peft_model(model, config)
    trained, whole = model.get_nb_trainable_parameters()
    logger.info(f"LoRA: {trained:,} of {whole:,} parameters are trained")
    return model


def loaders(args: Namespace, columns: list[str], tokenize: Callable[[dict], dict]) -> tuple[DataLoader, DataLoader]:
    """Batches to train on and to evaluate with, of rows that `tokenize` has made of the `columns`."""
    train, held_out = (
        rows.map(tokenize, batched=True, remove_columns=rows.column_names).with_format("torch")
        for rows in load_rows(args.dataset_name_or_path, args.dataset_config, columns)
    )
    if len(train) < args.batch_size:
        raise SystemExit(f"The data set has {len(train)} rows to train on, less than one batch of {args.batch_size}.")
    # Batches of one size: a model is evaluated with full ones, or with all rows in one.
    eval_size = min(args.batch_size, len(held_out))
    return (
        DataLoader(train, batch_size=args.batch_size, shuffle=True, drop_last=True),
        DataLoader(held_out, batch_size=eval_size, drop_last=True),
    )


def load_rows(name_or_path: str, config: str | None, columns: list[str]) -> tuple[Dataset, Dataset]:
    """The rows to train on and those to evaluate with."""
    try:
        splits = load_dataset(name_or_path, config)
    except Exception as error:  # as many kinds as there are file formats
        raise SystemExit(f"Cannot load the data set {name_or_path}: {type(error).__name__}: {error}") from error
    if "train" not in splits:
        raise SystemExit(f"The data set {name_or_path} has no rows to train on, only {list(splits)}.")
    for column in columns:
        if column not in splits["train"].column_names:
            raise SystemExit(
                f"The data set {name_or_path} has no column `{column}`, only {splits['train'].column_names}."
            )
    return split(splits)


def split(splits: DatasetDict) -> tuple[Dataset, Dataset]:
    if "validation" in splits:
        return splits["train"], splits["validation"]
    if len(splits["train"]) < 2:
        raise SystemExit("A data set needs a row to train on and one to evaluate with.")
    parts = splits["train"].train_test_split(test_size=HELD_OUT, seed=0)
    return parts["train"], parts["test"]


def mask_pads(input_ids: torch.Tensor, attention_mask: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Labels [batch, block]: the tokens themselves, with `ignore_index` where there is padding."""
    return input_ids.masked_fill(attention_mask == 0, ignore_index)


@torch.no_grad()
def evaluate(model: PreTrainedModel, loader: DataLoader, loss_of: Callable[[dict], torch.Tensor]) -> float:
    """The mean of `loss_of` over the batches, logged; the model trains on afterwards."""
    began = time.perf_counter()
    logger.info("[START EPOCH EVAL]")
    model.eval()
    total = 0.0
    for step, batch in enumerate(loader, 1):
        total += loss_of(batch).item()  # read batch by batch, so that each is the same small graph
        if step % 10 == 0 or step == len(loader):
            logger.info(f"EVAL STEP: {step} / {len(loader)}")
    mean = total / len(loader)
    model.train()
    logger.info(f"Eval Loss: {mean:.6f} | ELAPSED EVAL TIME: {time.perf_counter() - began:.2f} sec")
    return mean


class Clock:
    """An honest one: it stops after the loss has been read, when everything before it has really been computed."""

    def __init__(self, args: Namespace, total_step: int) -> None:
        self.tokens_per_step = args.batch_size * args.block_size
        self.total_step = total_step
        self.restart(0)

    def restart(self, step: int) -> None:
        """What has been done up to and in `step` does not count."""
        self.last_step = step
        self.began = time.perf_counter()

    def log(self, step: int, loss: torch.Tensor) -> None:
        value = loss.item()  # awaits the device
        duration = time.perf_counter() - self.began
        line = f"[Step {step}/{self.total_step}] | Loss: {value:.6f}"
        if step == 1:
            logger.info(line)
            logger.info(f"Model load and warmup done. Duration: {duration:.2f}")
        else:
            throughput = self.tokens_per_step * (step - self.last_step) / duration
            logger.info(f"{line} | Duration: {duration:.2f} | Throughput: {throughput:.2f} tokens/sec")
        self.restart(step)
