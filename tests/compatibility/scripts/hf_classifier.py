"""transformers' Trainer on BERT: padding by collator, label smoothing, save_steps, eval_steps, resume=True, checkpointing."""

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class Texts(Dataset):
    def __init__(self, n, seed):
        rng = np.random.RandomState(seed)
        self.rows = [rng.randint(4, 60, rng.randint(5, 20)) for _ in range(n)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i].tolist(), "label": int(self.rows[i].sum() % 3)}


def pad(rows):
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["label"] for row in rows])}


class Print(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        print(
            state.global_step,
            {k: v for k, v in logs.items() if k in ("loss", "grad_norm", "learning_rate", "eval_loss")},
        )

    def on_save(self, args, state, control, **kwargs):
        print(f"saved {state.global_step}")


def trainer(steps):
    set_seed(3)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    args = TrainingArguments(
        output_dir="classifier",
        max_steps=steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=10,
        learning_rate=5e-4,
        lr_scheduler_type="linear",
        warmup_steps=3,
        label_smoothing_factor=0.1,
        gradient_checkpointing=True,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        dataloader_drop_last=True,
        report_to=[],
        disable_tqdm=True,
    )
    return Trainer(
        model=BertForSequenceClassification(config),
        args=args,
        train_dataset=Texts(48, 0),
        eval_dataset=Texts(23, 1),
        data_collator=pad,
        callbacks=[Print()],
    )


trainer(8).train()
again = trainer(12)
again.train(resume_from_checkpoint=True)
print(f"weights {sum(p.detach().double().abs().sum().item() for p in again.model.parameters()):.4f}")
