"""Tensors on "cuda": what scripts and libraries do with them, with an executor in this process."""

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moai.device import alias, autocast
from tests.device import inline


@pytest.fixture(autouse=True, scope="module")
def accelerator():
    with inline.accelerator():
        yield


def same(accelerated, host):
    assert accelerated.device.type == "cuda"
    return torch.equal(accelerated.cpu(), host)


# ---------------------------------------------------------------------------------------------------- moving tensors


def test_a_tensor_says_that_it_is_on_cuda():
    x = torch.ones(2, device="cuda")
    assert x.device == torch.device("cuda:0") and x.is_cuda and x.get_device() == 0
    assert x.type() == "torch.cuda.FloatTensor"
    assert "device='cuda:0'" in repr(x)
    assert not torch.ones(2).is_cuda


@pytest.mark.parametrize("where", ["cuda", "cuda:0", 0, torch.device("cuda") if alias.turn_on() else None])
def test_moving_to_where_it_is_gives_the_tensor_itself(where):
    x = torch.ones(2).to(where)
    assert x.is_cuda
    assert x.to(where) is x and x.to(device=where) is x and x.to(where, torch.float32) is x
    assert x.cuda() is x and x.cuda(where) is x
    assert torch.as_tensor(x, device=where) is x


def test_values_survive_the_way_there_and_back():
    x = torch.randn(3, 2)
    assert same(x.cuda(), x) and same(x.t().to("cuda"), x.t())
    assert x.to("cuda", torch.float64).dtype == torch.float64
    assert x.to(dtype=torch.bfloat16, device="cuda").dtype == torch.bfloat16


def test_factories_take_the_device_in_every_form():
    for device in ("cuda", "cuda:0", torch.device("cuda"), 0):
        assert same(torch.tensor([1.0, 2.0], device=device), torch.tensor([1.0, 2.0]))
        assert torch.zeros(2, device=device).is_cuda and torch.randn(2, device=device).is_cuda
        assert torch.ones(2).new_tensor([1.0], device=device).is_cuda
        assert torch.zeros_like(torch.ones(2), device=device).is_cuda


def test_a_second_device_is_refused():
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(2, device="cuda:1")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(2).to("cuda:1")


def test_a_default_device_is_obeyed():
    with torch.device("cuda"):
        assert torch.zeros(2).is_cuda and torch.tensor([1.0]).is_cuda and nn.Linear(2, 2).weight.is_cuda
    torch.set_default_device("cuda")
    try:
        assert torch.arange(3).is_cuda and torch.get_default_device().type == "cuda"
    finally:
        torch.set_default_device(None)
    assert not torch.zeros(2).is_cuda


def test_pinned_memory_is_accepted_and_ignored():
    assert not torch.empty(2, pin_memory=True).is_pinned()
    x = torch.ones(2)
    assert x.pin_memory() is x
    loader = torch.utils.data.DataLoader(torch.arange(4.0), batch_size=2, pin_memory=True)
    assert [batch.to("cuda", non_blocking=True).sum().item() for batch in loader] == [1.0, 5.0]


# ---------------------------------------------------------------------------------------------------------- modules


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("move", [lambda m: m.cuda(), lambda m: m.to("cuda"), lambda m: m.to(device="cuda:0")])
def test_moving_a_module_keeps_parameters_and_ties(move):
    module = Tied()
    weight, value = module.head.weight, module.head.weight.detach().clone()
    move(module)
    assert module.head.weight is weight and module.embedding.weight is weight
    assert type(weight) is nn.Parameter and weight.requires_grad and weight.is_leaf
    assert same(weight.detach(), value)
    assert module.cpu().head.weight is weight and torch.equal(weight, value)


def test_an_optimizer_made_before_the_move_trains_the_moved_parameters():
    module = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    before = module.weight.detach().clone()
    module.cuda()(torch.ones(1, 2, device="cuda")).sum().backward()
    optimizer.step()
    assert same(module.weight.detach(), before - 1)


def test_gradients_and_hooks_move_with_their_parameter():
    parameter, seen = nn.Parameter(torch.ones(2)), []
    parameter.register_hook(lambda grad: seen.append("hook"))
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    parameter.tag = "kept"
    parameter.grad = torch.full((2,), 3.0)
    parameter.data = parameter.data.cuda()
    assert same(parameter.grad, torch.full((2,), 3.0))
    (parameter * 2).sum().backward()
    assert seen == ["hook", "accumulated"] and parameter.tag == "kept"
    assert same(parameter.grad, torch.full((2,), 5.0))


def test_data_of_the_same_device_is_set_as_ever():
    x = torch.ones(2)
    alias_of_x = x.data
    alias_of_x.add_(1)
    x.data = torch.zeros(3)
    assert x.shape == (3,) and torch.equal(alias_of_x, torch.full((2,), 2.0))


def test_modules_of_the_cpu_are_not_affected():
    module = nn.Linear(2, 2)
    weight = module.weight
    assert module.half().weight is weight and not torch.__future__.get_swap_module_params_on_conversion()


def test_a_module_on_meta_is_made_empty_on_cuda():
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    assert module.to_empty(device="cuda").weight.is_cuda


# --------------------------------------------------------------------------------------------------- copies and files


def test_deepcopy_copies_values_and_keeps_shared_storages_shared():
    x = torch.arange(6.0, device="cuda")
    a, b = copy.deepcopy((x, x[1:3]))
    a.add_(1)
    assert same(b, torch.tensor([2.0, 3.0])) and same(x, torch.arange(6.0))
    assert same(copy.deepcopy(x.view(2, 3).t()), torch.arange(6.0).view(2, 3).t())


def test_copied_storages_have_the_type_of_their_tensors():
    x = copy.deepcopy(torch.ones(4, dtype=torch.bfloat16, device="cuda")[1:3])
    assert x.untyped_storage()._moai.base == ((4,), (1,), torch.bfloat16)


def test_a_deepcopied_module_is_independent():
    module = Tied().cuda()
    twin = copy.deepcopy(module)
    assert twin.head.weight is twin.embedding.weight and twin.head.weight.is_cuda
    with torch.no_grad():
        twin.head.weight.zero_()
    assert module.head.weight.abs().sum().item() > 0


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


@pytest.mark.parametrize("location", [None, "cuda", torch.device("cuda:0") if alias.is_on() else None])
def test_saved_tensors_come_back_to_the_accelerator(location):
    x = torch.arange(6.0, device="cuda").view(2, 3)
    whole, row = torch.load(io.BytesIO(saved([x, x[1]])), map_location=location)
    assert same(whole, x.cpu()) and same(row, x[1].cpu())
    whole.zero_()
    assert same(row, torch.zeros(3))


def test_saved_tensors_open_in_plain_torch(tmp_path):
    torch.save({"x": torch.arange(3.0, device="cuda"), "device": torch.device("cuda")}, tmp_path / "x.pt")
    code = f"import torch; print(torch.load({str(tmp_path / 'x.pt')!r}, map_location='cpu', weights_only=False))"
    assert inline.said_by_plain_torch(code) == "{'x': tensor([0., 1., 2.]), 'device': device(type='cuda')}"


def test_files_are_tagged_as_a_gpus():
    assert b"cuda:0" in saved(torch.ones(2, device="cuda"))
    assert torch.load(io.BytesIO(saved(torch.ones(2, device="cuda"))), map_location="cpu").device.type == "cpu"


def test_a_file_of_a_second_gpu_is_refused_with_advice():
    data = saved(torch.ones(2, device="cuda")).replace(b"cuda:0", b"cuda:1")
    with pytest.raises(RuntimeError, match="map_location='cuda'"):
        torch.load(io.BytesIO(data))
    assert torch.load(io.BytesIO(data), map_location="cuda").is_cuda


def test_tensors_and_parameters_are_pickled():
    x = torch.arange(3.0, device="cuda")
    assert same(pickle.loads(pickle.dumps(x)), torch.arange(3.0))
    assert isinstance(pickle.loads(pickle.dumps(nn.Parameter(x))), nn.Parameter)


def test_loaded_storages_have_the_type_of_their_tensors():
    x = torch.load(io.BytesIO(saved(torch.ones(2, 3, dtype=torch.bfloat16, device="cuda"))))
    assert x.untyped_storage()._moai.base == ((2, 3), (3, 1), torch.bfloat16)


def test_an_optimizer_state_goes_through_a_file():
    module = nn.Linear(2, 2).cuda()
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2, device="cuda")).sum().backward()
    optimizer.step()
    state = torch.load(io.BytesIO(saved(optimizer.state_dict())))
    expected = optimizer.state[module.weight]["exp_avg"].cpu()
    optimizer.load_state_dict(state)
    assert same(optimizer.state[module.weight]["exp_avg"], expected)


def test_storages_are_copied_between_devices():
    x = torch.arange(3.0, device="cuda")
    storage = x.untyped_storage()
    assert storage.is_cuda and storage.nbytes() == 12
    assert storage.cpu().tolist() == torch.arange(3.0).untyped_storage().tolist()
    clone = storage.clone()
    x.zero_()
    assert clone.cuda() is clone and clone.cpu().tolist() == torch.arange(3.0).untyped_storage().tolist()


def test_safetensors_saves_and_loads(tmp_path):
    from safetensors.torch import load_file, load_model, save_file, save_model

    save_file({"x": torch.arange(3.0, device="cuda")}, tmp_path / "x")
    assert torch.equal(load_file(tmp_path / "x")["x"], torch.arange(3.0))
    assert same(load_file(tmp_path / "x", device="cuda")["x"], torch.arange(3.0))
    module, other = Tied().cuda(), Tied().cuda()
    save_model(module, tmp_path / "m")  # finds the tie by the storages' addresses
    load_model(other, tmp_path / "m")
    assert same(other.head.weight.detach(), module.head.weight.detach().cpu())


# ----------------------------------------------------------------------------------------------------------- random


def test_a_generator_decides_the_numbers_of_a_device_operator():
    generator = torch.Generator("cuda").manual_seed(1)
    first, second = (torch.randn(3, device="cuda", generator=generator).cpu() for _ in range(2))
    assert not torch.equal(first, second)
    assert same(torch.randn(3, device="cuda", generator=generator.manual_seed(1)), first)


def test_a_generator_of_the_cpu_is_refused():
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.randn(3, device="cuda", generator=torch.Generator())


def test_checkpointing_repeats_the_dropout_mask():
    from torch.utils.checkpoint import checkpoint

    masks = []

    def run(x):
        y = F.dropout(x, 0.5)
        masks.append(y.detach())
        return y * y

    for reentrant in (False, True):
        masks.clear()
        checkpoint(run, torch.ones(100, device="cuda", requires_grad=True), use_reentrant=reentrant).sum().backward()
        assert len(masks) == 2 and same(masks[0], masks[1].cpu())


# --------------------------------------------------------------------------------------------------------- autocast


@pytest.fixture
def bf16():
    with torch.autocast("cuda", dtype=torch.bfloat16):
        yield


def operand(*size):
    return torch.ones(*size, device="cuda")


@pytest.mark.parametrize(
    ("macro", "names"),
    [
        ("LOWER_PRECISION_FP", autocast.LOWER_PRECISION),
        ("FP32", autocast.FP32),
        ("FP32_SET_OPT_DTYPE", autocast.FP32_RESULT),
        ("PROMOTE", autocast.WIDEST),
    ],
)
def test_the_lists_of_operators_are_those_that_cuda_uses(macro, names):
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    _, _, body = header.partition(f"#define AT_FORALL_{macro}(_)")
    listed = re.findall(r"_\(([^)]+)\)", body.partition("#")[0])
    assert sorted(names) == sorted(entry.replace(", ", ".") for entry in listed)


@pytest.mark.parametrize(
    ("operate", "dtype"),
    [
        (lambda: operand(2, 2) @ operand(2, 2), torch.bfloat16),
        (lambda: F.linear(operand(2, 2), operand(2, 2)), torch.bfloat16),
        (lambda: torch.einsum("ij,kj->ik", operand(2, 2), operand(2, 2)), torch.bfloat16),
        (lambda: F.scaled_dot_product_attention(*[operand(1, 1, 2, 4)] * 3), torch.bfloat16),
        (lambda: operand(2, 2).bfloat16().exp(), torch.float32),
        (lambda: operand(2, 2).bfloat16() ** 2, torch.float32),
        (lambda: F.layer_norm(operand(2, 2).bfloat16(), (2,)), torch.float32),
        (
            lambda: F.cross_entropy(operand(2, 2).bfloat16(), torch.zeros(2, dtype=torch.long, device="cuda")),
            torch.float32,
        ),
        (lambda: operand(2, 2).bfloat16().softmax(-1), torch.float32),
        (lambda: operand(2, 2).bfloat16().softmax(-1, dtype=torch.bfloat16), torch.bfloat16),
        (lambda: operand(2, 2).bfloat16().sum(), torch.float32),
        (lambda: operand(2, 2).bfloat16().cumsum(0), torch.float32),
        (lambda: operand(2, 2).bfloat16().norm(), torch.float32),
        (lambda: torch.addcmul(operand(2), operand(2).bfloat16(), operand(2).bfloat16()), torch.float32),
        (lambda: F.gelu(operand(2, 2).bfloat16()), torch.bfloat16),
        (lambda: operand(2, 2).double() @ operand(2, 2).double(), torch.float64),
    ],
)
def test_operators_run_in_the_type_that_cuda_casts_to(operate, dtype, bf16):
    assert operate().dtype == dtype


def test_autocast_leaves_the_cpu_alone(bf16):
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_disabled_autocast_casts_nothing(bf16):
    with torch.autocast("cuda", enabled=False):
        assert (operand(2, 2) @ operand(2, 2)).dtype == torch.float32


def test_the_unsafe_loss_is_refused_with_the_safe_one(bf16):
    with pytest.raises(RuntimeError, match="binary_cross_entropy_with_logits"):
        F.binary_cross_entropy(operand(2), operand(2))


def test_a_parameter_is_cast_once_until_the_outermost_autocast_ends():
    module = nn.Linear(2, 2, bias=False).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            module(module(operand(1, 2)))
        assert len(autocast._casts) == 1
    assert not autocast._casts


def test_a_cast_made_without_gradients_is_not_found_by_code_that_needs_them():
    module = nn.Linear(2, 2, bias=False).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        with torch.no_grad():
            module(operand(1, 2))
        module(operand(1, 2)).sum().backward()
    assert module.weight.grad is not None


def test_autocast_without_a_cache_keeps_no_casts():
    module = nn.Linear(2, 2).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        module(operand(1, 2))
        assert not autocast._casts


def test_gradients_of_autocast_layers_have_the_parameters_type():
    module = nn.Linear(2, 2).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = module(operand(1, 2)).square().mean()
    loss.backward()
    assert module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("overflow", [False, True])
def test_the_grad_scaler_steps_unless_gradients_overflow(overflow):
    module = nn.Linear(2, 2).cuda()
    before = module.weight.detach().cpu()
    optimizer, scaler = torch.optim.SGD(module.parameters(), lr=0.1), torch.amp.GradScaler("cuda")
    loss = module(operand(1, 2)).sum() * (float("inf") if overflow else 1.0)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same(module.weight.detach(), before) is overflow
    assert scaler.get_scale() == (32768.0 if overflow else 65536.0)
