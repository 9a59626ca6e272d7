"""trl's SFTTrainer without adapters: prompts and completions, loss of completions only, evaluation, accumulation, resume."""

import string

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

vocab = {c: i for i, c in enumerate(["<pad>", "<eos>", "<unk>", *string.printable])}
raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
rows = [{"prompt": f"{a} plus {b} is ", "completion": f"{a + b}."} for a in range(6) for b in range(8, 13)]


class Print(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        kept = ("loss", "grad_norm", "eval_loss", "mean_token_accuracy", "eval_mean_token_accuracy")
        print(state.global_step, {k: v for k, v in logs.items() if k in kept})


def make(steps):
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
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
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir="sft_full",
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            max_length=32,
            completion_only_loss=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows[:24]),
        eval_dataset=Dataset.from_list(rows[24:]),
        processing_class=tokenizer,
        callbacks=[Print()],
    )


make(4).train()
trainer = make(4)
trainer.train(resume_from_checkpoint="sft_full/checkpoint-2")
trainer.save_model("sft_full/final")
loaded = LlamaForCausalLM.from_pretrained("sft_full/final")
print(f"weights {sum(p.detach().double().abs().sum().item() for p in loaded.parameters()):.4f}")
