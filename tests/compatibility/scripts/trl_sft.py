"""trl's SFTTrainer with a tokenizer made here, LoRA by peft_config, packing off."""

import string

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

set_seed(0)
vocab = {c: i for i, c in enumerate(["<pad>", "<eos>", "<unk>", *string.printable])}
raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
dataset = Dataset.from_list([{"text": f"{a} plus {b} is {a + b}."} for a in range(5) for b in range(8, 13)])
model = Qwen2ForCausalLM(
    Qwen2Config(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
)


class Print(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        print({k: v for k, v in logs.items() if k in ("loss", "grad_norm", "mean_token_accuracy", "entropy")})


trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir="sft",
        max_steps=5,
        per_device_train_batch_size=5,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        max_length=32,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear"),
    callbacks=[Print()],
)
trainer.train()
trainer.save_model("sft/final")
