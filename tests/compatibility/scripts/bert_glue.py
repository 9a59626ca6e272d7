"""BERT classification without Trainer, as in the course: dynamic padding, get_scheduler, tqdm, metric over batches."""

import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_scheduler

torch.manual_seed(0)
config = BertConfig(
    vocab_size=80,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
    num_labels=3,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
model = BertForSequenceClassification(config)
rows = [(torch.randint(3, 80, (int(n),)), int(n) % 3) for n in torch.randint(4, 14, (48,))]


def collate(batch):
    width = max(len(t) for t, _ in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    for i, (t, _) in enumerate(batch):
        ids[i, : len(t)] = t
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([y for _, y in batch])}


train_dataloader = DataLoader(rows[:36], shuffle=True, batch_size=8, collate_fn=collate)
eval_dataloader = DataLoader(rows[36:], batch_size=8, collate_fn=collate)
optimizer = AdamW(model.parameters(), lr=5e-4)
num_epochs = 2
steps = num_epochs * len(train_dataloader)
lr_scheduler = get_scheduler("linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=steps)
device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
model.to(device)
for _epoch in range(num_epochs):
    model.train()
    for batch in train_dataloader:
        batch = {k: v.to(device) for k, v in batch.items()}
        outputs = model(**batch)
        loss = outputs.loss
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.6f}")
    model.eval()
    correct = total = 0
    for batch in eval_dataloader:
        batch = {k: v.to(device) for k, v in batch.items()}
        with torch.no_grad():
            outputs = model(**batch)
        predictions = torch.argmax(outputs.logits, dim=-1)
        correct += (predictions == batch["labels"]).sum().item()
        total += len(predictions)
    print(f"accuracy {correct}/{total}")
