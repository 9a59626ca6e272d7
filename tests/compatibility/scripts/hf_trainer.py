"""transformers' Trainer: cosine with warm-up, clipping, evaluation and saving each epoch, a callback, resume, best model."""

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class Tokens(Dataset):
    def __init__(self, n, seed):
        rng = np.random.RandomState(seed)
        self.rows = (rng.randint(0, 6, (n, 1)) + np.arange(17)[None] * rng.randint(1, 4, (n, 1))) % 64

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        ids = torch.tensor(self.rows[i])
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


class Print(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        print({k: v for k, v in logs.items() if k in ("loss", "grad_norm", "learning_rate", "eval_loss", "epoch")})

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            control.should_save = True


def compute_metrics(p):
    logits, labels = p
    return {"accuracy": float((np.argmax(logits, -1)[:, :-1] == labels[:, 1:]).mean())}


def make_trainer(epochs):
    set_seed(42)
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    args = TrainingArguments(
        output_dir="trainer_out",
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_grad_norm=0.5,
        weight_decay=0.01,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        save_total_limit=3,
        report_to="none",
        dataloader_num_workers=0,
        disable_tqdm=True,
    )
    return Trainer(
        model=GPT2LMHeadModel(config),
        args=args,
        train_dataset=Tokens(64, 0),
        eval_dataset=Tokens(24, 1),
        compute_metrics=compute_metrics,
        callbacks=[Print(), EarlyStoppingCallback(3)],
    )


trainer = make_trainer(2)
result = trainer.train()
print(f"train_loss {result.training_loss:.6f}")
print({k: round(v, 6) for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_accuracy")})
print(f"weights {sum(p.detach().double().abs().sum().item() for p in trainer.model.parameters()):.4f}")
again = make_trainer(2)
result = again.train(resume_from_checkpoint="trainer_out/checkpoint-4")
print(f"resumed {result.training_loss:.6f}")
print(f"weights {sum(p.detach().double().abs().sum().item() for p in again.model.parameters()):.4f}")
again.save_model("trainer_out/final")
loaded = GPT2LMHeadModel.from_pretrained("trainer_out/final").cuda().eval()
batch = torch.stack([Tokens(4, 2)[i]["input_ids"] for i in range(4)]).cuda()
with torch.no_grad():
    print(f"loaded {loaded(batch, labels=batch).loss.item():.6f}")
prediction = again.predict(Tokens(5, 3))
print(f"predict {prediction.metrics['test_loss']:.6f} {np.abs(prediction.predictions).sum():.3f}")
