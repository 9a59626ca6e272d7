"""peft LoRA on a small Llama: train, save the adapter, load it onto the base model, merge_and_unload."""

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


model = get_peft_model(
    base(),
    LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj", "down_proj"],
        modules_to_save=["lm_head"],
    ),
)
model.print_trainable_parameters()
model = model.to("cuda")
model.enable_input_require_grads()
optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-2)
torch.manual_seed(1)
for step in range(6):
    ids = torch.randint(0, 96, (8, 16)).cuda()
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"{step} {loss.item():.6f}")
model.save_pretrained("adapter")
ids = torch.randint(0, 96, (4, 16)).cuda()
model.eval()
with torch.no_grad():
    print(f"trained {model(input_ids=ids, labels=ids).loss.item():.6f}")
    with model.disable_adapter():
        print(f"disabled {model(input_ids=ids, labels=ids).loss.item():.6f}")
loaded = PeftModel.from_pretrained(base(), "adapter").cuda().eval()
with torch.no_grad():
    print(f"loaded {loaded(input_ids=ids, labels=ids).loss.item():.6f}")
merged = loaded.merge_and_unload()
with torch.no_grad():
    print(f"merged {merged(input_ids=ids, labels=ids).loss.item():.6f}")
merged.save_pretrained("merged")
again = LlamaForCausalLM.from_pretrained(
    "merged", torch_dtype=torch.float32, device_map={"": 0} if torch.cuda.is_available() else None
)
with torch.no_grad():
    print(
        f"again {again(input_ids=ids, labels=ids).loss.item():.6f} {next(again.parameters()).device.type == ids.device.type}"
    )
