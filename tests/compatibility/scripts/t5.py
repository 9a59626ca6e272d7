"""A seq2seq T5: labels with -100, Adafactor of transformers, gradient checkpointing, generation left out."""

import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.optimization import Adafactor, AdafactorSchedule

torch.manual_seed(0)
config = T5Config(
    vocab_size=60,
    d_model=32,
    d_kv=16,
    d_ff=64,
    num_layers=2,
    num_heads=2,
    dropout_rate=0.0,
    decoder_start_token_id=0,
    use_cache=False,
    feed_forward_proj="gated-gelu",
)
model = T5ForConditionalGeneration(config).to("cuda")
model.train()
optimizer = Adafactor(model.parameters(), scale_parameter=True, relative_step=True, warmup_init=True, lr=None)
lr_scheduler = AdafactorSchedule(optimizer)
for step in range(6):
    if step == 3:
        model.gradient_checkpointing_enable()
    source = torch.randint(2, 60, (8, 12))
    target = source.flip(1)[:, :7].clone()
    attention_mask = torch.ones_like(source)
    attention_mask[::2, -3:] = 0
    labels = target.masked_fill(torch.rand(target.shape) < 0.2, -100)
    outputs = model(
        input_ids=source.to("cuda"),
        attention_mask=attention_mask.to("cuda"),
        labels=labels.to("cuda"),
        return_dict=True,
    )
    outputs.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    lr_scheduler.step()
    optimizer.zero_grad()
    print(f"{step} {outputs.loss.item():.6f}")
