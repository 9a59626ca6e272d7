"""Libraries decide by what torch says of its device: they must take the accelerator for a GPU."""

import pytest
import torch

from tests.device import inline

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True, scope="module")
def accelerator():
    with inline.accelerator():
        yield


def tiny_model():
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def test_transformers_finds_a_gpu_with_bf16():
    from transformers.utils import is_torch_bf16_gpu_available, is_torch_cuda_available

    assert is_torch_cuda_available() and is_torch_bf16_gpu_available()


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_accelerate_trains_on_cuda_in_mixed_precision(precision):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(mixed_precision=precision)
    assert accelerator.device.type == "cuda" and accelerator.num_processes == 1
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module, optimizer = accelerator.prepare(module, optimizer)
    before = module.weight.detach().cpu()
    accelerator.backward(module(torch.ones(1, 2, device=accelerator.device)).mean())
    accelerator.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    assert not torch.equal(module.weight.detach().cpu(), before)


def test_a_saved_model_is_loaded_straight_onto_cuda(tmp_path):
    model = tiny_model().cuda()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    assert loaded.device.type == "cuda"
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].cpu(), value.cpu())


def test_the_trainer_takes_cuda_and_resumes_from_a_checkpoint(tmp_path):
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(8)]
    arguments = transformers.TrainingArguments(
        tmp_path,
        per_device_train_batch_size=2,
        max_steps=3,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        bf16=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(tiny_model(), arguments, train_dataset=rows)
    assert arguments.device.type == "cuda"
    losses = [row["loss"] for row in _log_of(trainer.train, trainer)]
    resumed = [row["loss"] for row in _log_of(lambda: trainer.train(f"{tmp_path}/checkpoint-2"), trainer)]
    assert len(losses) == 3 and resumed[-1] == losses[-1]


def _log_of(train, trainer):
    train()
    return [row for row in trainer.state.log_history if "loss" in row]


def test_peft_adapters_train_and_merge():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).cuda()
    tokens = torch.randint(0, 64, (2, 8)).cuda()
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained and all("lora" in name for name in trained)
    assert model.merge_and_unload().device.type == "cuda"
