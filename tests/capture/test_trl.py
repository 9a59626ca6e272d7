"""trl's trainers: what they log is what they log on the CPU, and their metrics cut no step in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import tokenizers
import torch
import transformers
import trl

from tests.capture.conftest import Observed, on_the_host

STEPS = 8
WORDS = [f"w{k}" for k in range(20)]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
}
COMMON = {
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "logging_steps": 4,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": None,
}


def tokenizer() -> Any:
    words = {word: k for k, word in enumerate(["<pad>", "<unk>", "</s>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )


def model() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def text(k: int, length: int = 6) -> str:
    return " ".join(WORDS[(7 * k + 3 * i) % len(WORDS)] for i in range(length))


def supervised(folder: Path, on_cpu: bool) -> list[dict[str, Any]]:
    rows = datasets.Dataset.from_list([{"text": text(k)} for k in range(16)])
    arguments = trl.SFTConfig(str(folder), use_cpu=on_cpu, **COMMON)
    return logs(trl.SFTTrainer(model(), arguments, train_dataset=rows, processing_class=tokenizer()))


def preferred(folder: Path, on_cpu: bool) -> list[dict[str, Any]]:
    rows = [{"prompt": text(k, 3), "chosen": text(k + 1, 4), "rejected": text(k + 2, 4)} for k in range(16)]
    arguments = trl.DPOConfig(str(folder), use_cpu=on_cpu, precompute_ref_log_probs=False, **COMMON)
    return logs(
        trl.DPOTrainer(
            model(), model(), arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer()
        )
    )


def rewarded(folder: Path, on_cpu: bool) -> list[dict[str, Any]]:
    rows = [{"chosen": text(k + 1, 4), "rejected": text(k + 2, 5)} for k in range(16)]
    torch.manual_seed(0)
    judge = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, num_labels=1, pad_token_id=0))
    arguments = trl.RewardConfig(str(folder), use_cpu=on_cpu, **COMMON)
    return logs(
        trl.RewardTrainer(
            judge, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer()
        )
    )


def desired(folder: Path, on_cpu: bool) -> list[dict[str, Any]]:
    rows = [{"prompt": text(k, 3), "completion": text(k + 1, 4), "label": k % 2 == 0} for k in range(16)]
    arguments = trl.KTOConfig(str(folder), use_cpu=on_cpu, **COMMON)
    return logs(
        trl.KTOTrainer(
            model(), model(), arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer()
        )
    )


def logs(trainer: Any) -> list[dict[str, Any]]:
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize("train", [supervised, preferred, rewarded, desired])
def test_what_is_logged_is_what_the_cpu_logs(tmp_path: Path, train: Any) -> None:
    expected, found = train(tmp_path, on_cpu=True), train(tmp_path, on_cpu=False)
    assert len(found) == len(expected) >= 2
    for here, there in zip(found, expected, strict=True):
        assert here.keys() == there.keys()
        for name, number in there.items():
            if not name.startswith("train_") or name == "train_loss":  # others are about time
                assert here[name] == pytest.approx(number, rel=1e-5, abs=1e-6), name


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="older Trainers wait for every loss")
@on_the_host
@pytest.mark.parametrize("train", [supervised, rewarded])
def test_a_step_is_one_segment(tmp_path: Path, capture: Observed, train: Any) -> None:
    before = capture.segments
    train(tmp_path, on_cpu=False)
    assert capture.segments - before <= STEPS + 2
