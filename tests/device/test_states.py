"""What a module holds is a state, however it came to the accelerator: a plan that shares batches must not share it."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from moai import session
from moai.capture.values import record_of
from tests.device.inline import accelerator


@pytest.fixture(scope="module", autouse=True)
def cuda() -> Iterator[None]:
    with accelerator():
        yield


def role(tensor: torch.Tensor) -> str:
    value = record_of(tensor).value
    assert value is not None
    return value.role


def test_what_is_uploaded_is_a_batch_until_it_becomes_a_parameter_or_a_buffer() -> None:
    uploaded = [torch.ones(3).cuda() for _ in range(3)]
    assert {role(x) for x in uploaded} == {"batch"}
    module = nn.Module()
    module.weight = nn.Parameter(uploaded[0])
    module.register_buffer("table", uploaded[1])
    assert (role(module.weight), role(module.table), role(uploaded[2])) == ("state", "state", "batch")


def test_weights_that_transformers_loads_onto_the_accelerator_are_states(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=8, n_layer=3, n_head=2, n_positions=8, vocab_size=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, device_map="cuda")
    assert {x.device.type for x in model.parameters()} == {"cuda"}
    assert {role(x) for x in (*model.parameters(), *model.buffers())} == {"state"}


def test_what_is_loaded_from_a_file_into_a_module_or_an_optimizer_is_a_state() -> None:
    model = nn.Linear(3, 3).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3).cuda()).sum().backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    weights, moments = torch.load(io.BytesIO(file.getvalue()), map_location="cuda")
    optimizer.load_state_dict(moments)
    model.load_state_dict(weights)
    assert {role(optimizer.state[model.weight][name]) for name in ("exp_avg", "exp_avg_sq")} == {"state"}
    assert {role(x) for x in weights.values()} == {"state"}


def test_loading_a_state_is_no_work_for_devices() -> None:
    model, recorder = nn.Linear(3, 3).cuda(), session.current().recorder
    for where in ("cuda", "cpu"):
        recorder.flush()
        loaded = {name: torch.full(x.shape, 2.0).to(where) for name, x in model.state_dict().items()}
        before, weight = recorder.stats.recorded, model.weight
        model.load_state_dict(loaded)
        assert recorder.stats.recorded == before and model.weight is weight
        loaded["weight"].zero_()  # what is loaded is the model's own
        assert model(torch.ones(1, 3).cuda()).tolist() == [[8.0, 8.0, 8.0]]
        loaded["bias"].add_(1)
        assert model.bias.tolist() == [2.0, 2.0, 2.0]


def test_what_a_step_has_used_is_loaded_behind_it() -> None:
    model, other = nn.Linear(2, 2, bias=False).cuda(), nn.Linear(2, 2, bias=False).cuda()
    with torch.no_grad():
        before = model.weight * 1
        model.load_state_dict(other.state_dict())
        after = model.weight * 1
    assert not torch.equal(before.cpu(), after.cpu()) and torch.equal(after.cpu(), other.weight.detach().cpu())


def test_a_part_of_a_state_may_be_loaded() -> None:
    model = nn.Linear(2, 2).cuda()
    with torch.no_grad():
        model.weight[0].copy_(nn.Parameter(torch.full((2,), 5.0).cuda()))
    assert model.weight[0].tolist() == [5.0, 5.0] and model.weight[1].abs().max() < 1


def test_tensors_made_in_threads_have_addresses_of_their_own() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: torch.empty(5, device="cuda"), range(4000)))
    sys.setswitchinterval(interval)
    assert len({x.data_ptr() for x in made}) == len(made)
