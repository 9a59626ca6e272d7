"""What scripts for several GPUs, or for a compiler, say: on the accelerator it changes no number."""

import socket

import pytest
import torch
from torch import distributed, nn

from tests.device import inline


@pytest.fixture(autouse=True, scope="module")
def accelerator():
    with inline.accelerator():
        yield


@pytest.fixture(params=["nccl", "cpu:gloo,cuda:nccl", None])
def group_of_one(request, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), ("RANK", 0), ("WORLD_SIZE", 1)):
        monkeypatch.setenv(name, str(value))
    distributed.init_process_group(request.param)
    yield
    distributed.destroy_process_group()


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2).cuda()


def gradient_through(wrapped, *inputs):
    wrapped(*inputs).sum().backward()
    return wrapped.module.weight.grad.cpu()


def test_data_parallel_moves_its_inputs_and_calls_its_module():
    x = torch.randn(4, 3)
    module = linear()
    module(x.cuda()).sum().backward()
    assert torch.equal(gradient_through(nn.DataParallel(linear()), x), module.weight.grad.cpu())


def test_distributed_data_parallel_of_one_process_is_its_module(group_of_one):
    x = torch.randn(4, 3).cuda()
    wrapped = nn.parallel.DistributedDataParallel(linear(), device_ids=[0], find_unused_parameters=True)
    with wrapped.no_sync():
        found = gradient_through(wrapped, x)
    module = linear()
    module(x).sum().backward()
    assert torch.equal(found, module.weight.grad.cpu())
    assert list(wrapped.state_dict()) == ["module.weight", "module.bias"]


def test_collectives_of_one_process_give_back_what_they_get(group_of_one):
    x = torch.arange(4.0).cuda()
    distributed.all_reduce(x)
    distributed.broadcast(x, 0)
    parts, whole = [torch.zeros(4).cuda()], torch.zeros(4).cuda()
    distributed.all_gather(parts, x)
    distributed.reduce_scatter(whole, [x])
    distributed.barrier()
    said = [None]
    distributed.all_gather_object(said, {"loss": 1})
    assert [t.tolist() for t in (x, *parts, whole)] == [[0, 1, 2, 3]] * 3
    assert (said, distributed.get_world_size()) == ([{"loss": 1}], 1)


def test_several_processes_are_told_to_be_one():
    with pytest.raises(RuntimeError, match=r"2 processes.*start the script once"):
        distributed.distributed_c10d.ProcessGroupNCCL(None, 0, 2)


def test_sync_batch_norm_of_one_process_is_batch_norm(group_of_one):
    x = torch.randn(6, 3)
    plain = nn.BatchNorm1d(3)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3)).cuda()
    torch.testing.assert_close(synced(x.cuda()).cpu(), plain(x))


def test_torch_compile_leaves_the_step_to_the_accelerator():
    module = linear()
    x = torch.randn(4, 3).cuda()
    compiled = torch.compile(module, mode="max-autotune", fullgraph=True)
    assert torch.equal(compiled(x).cpu(), module(x).cpu())
    assert list(compiled.state_dict()) == ["_orig_mod.weight", "_orig_mod.bias"]
    module.compile()
    assert torch.equal(module(x).cpu(), compiled(x).cpu())

    @torch.compile
    def twice(x):
        return x * 2

    assert torch.equal(twice(x).cpu(), (x * 2).cpu())
