"""Adapters: they alone are trained and saved, and what is loaded is the model with the adapter merged into it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tutorial.scripts import train
from tutorial import baichuan2, checkpoint  # noqa: F401  (transformers knows Baichuan2 by the import)

IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def adapter(prepared, tmp_path_factory):
    """An adapter for Baichuan2 that was trained on two devices."""
    folder = tmp_path_factory.mktemp("lora")
    result = train(prepared, folder, "--use-lora", "--lora-r", 4, name="baichuan2", MOAI_DEVICES="2")
    assert result.returncode == 0, result.stderr
    assert "LoRA: 1,024 of 59,680 parameters are trained" in result.stderr
    return folder / "out"


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_the_adapter_alone_is_saved(adapter):
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not (adapter / "model.safetensors").exists()


def test_a_merged_adapter_gives_the_logits_of_the_model_with_the_adapter_beside_it(prepared, adapter):
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(prepared.model("baichuan2"))
    before = logits(base)
    beside = logits(PeftModel.from_pretrained(base, adapter))
    merged, _ = checkpoint.load(str(adapter))
    torch.testing.assert_close(logits(merged), beside, rtol=1e-5, atol=1e-5)
    assert (beside - before).abs().max() > 1e-2
    assert type(merged) is type(base)


def test_an_adapter_without_its_model_is_said(adapter, tmp_path):
    import json
    import shutil

    copy = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "./gone"}))
    with pytest.raises(SystemExit, match=r"\./gone is not a model folder"):
        checkpoint.load(str(copy))
