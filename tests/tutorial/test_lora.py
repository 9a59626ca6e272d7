"""Adapters: they alone are saved, and what is loaded is the model with the adapter merged into it."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tutorial import baichuan2, checkpoint  # noqa: F401  (transformers knows Baichuan2 by the import)

IDS = torch.arange(3, 15)[None]
TARGETS = {"baichuan2": ["W_pack"], "gpt": ["c_attn"], "llama3": ["q_proj", "v_proj"]}


@pytest.fixture(params=TARGETS)
def adapter(request, prepared, tmp_path):
    """(the model, the folder of an adapter for it that does something)."""
    model, tokenizer = checkpoint.load(str(prepared.model(request.param)))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS[request.param]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    checkpoint.save(adapted, tokenizer, tmp_path / "out")
    return prepared.model(request.param), tmp_path / "out"


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_the_adapter_alone_is_saved(adapter):
    _, folder = adapter
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    checkpoint.check_writable(folder)


def test_a_merged_adapter_gives_the_logits_of_the_model_with_the_adapter_beside_it(adapter):
    base, folder = adapter
    model = AutoModelForCausalLM.from_pretrained(base)
    before = logits(model)
    beside = logits(PeftModel.from_pretrained(model, folder))
    merged, _ = checkpoint.load(str(folder))
    torch.testing.assert_close(logits(merged), beside, rtol=1e-4, atol=1e-5)
    assert (beside - before).abs().max() > 0.01
    assert type(merged).__name__ in ("BaichuanForCausalLM", "GPT2LMHeadModel", "LlamaForCausalLM")


def test_an_adapter_without_its_model_is_said(adapter):
    file = adapter[1] / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "./gone"}))
    with pytest.raises(SystemExit, match=r"\./gone is not a model folder"):
        checkpoint.load(str(adapter[1]))
