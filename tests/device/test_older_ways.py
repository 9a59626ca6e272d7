"""What older scripts say: tensor types, sparse tensors that move, weight norm, streams of a prefetcher."""

import pytest
import torch
from torch import nn

from tests.device import inline


@pytest.fixture(autouse=True, scope="module")
def accelerator():
    with inline.accelerator():
        yield


def test_a_tensor_type_makes_tensors_as_its_cpu_twin_does():
    for arguments in ((2, 3), ([1, 2],), (torch.Size([4]),), ()):
        made, twin = torch.cuda.LongTensor(*arguments), torch.LongTensor(*arguments)
        assert made.is_cuda and (made.shape, made.dtype) == (twin.shape, twin.dtype)
    assert torch.cuda.FloatTensor([1.5, 2]).tolist() == [1.5, 2]


def test_a_tensor_type_casts_and_knows_its_tensors():
    for type_ in (torch.cuda.HalfTensor, "torch.cuda.HalfTensor"):
        x = torch.ones(2).type(type_)
        assert (x.device.type, x.dtype, x.type()) == ("cuda", torch.float16, "torch.cuda.HalfTensor")
    assert isinstance(x, torch.cuda.HalfTensor)
    assert not isinstance(x, torch.cuda.FloatTensor) and not isinstance(torch.ones(1), torch.cuda.FloatTensor)


def test_a_default_tensor_type_of_cuda_puts_new_tensors_there():
    try:
        torch.set_default_tensor_type("torch.cuda.DoubleTensor")
        assert (torch.ones(1).device.type, torch.ones(1).dtype) == ("cuda", torch.float64)
    finally:
        torch.set_default_tensor_type(torch.FloatTensor)
    assert (torch.ones(1).device.type, torch.ones(1).dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_a_sparse_matrix_that_moves_to_the_accelerator_is_multiplied_as_a_dense_one(sparse):
    matrix, x = torch.eye(3) * 2, torch.randn(3, 2)
    assert torch.equal((sparse(matrix).to("cuda") @ x.cuda()).cpu(), matrix @ x)
    assert torch.equal(torch.mm(sparse(matrix).cuda(), x.cuda()).cpu(), matrix @ x)


def test_a_sparse_tensor_made_on_the_accelerator_is_refused_with_what_to_use():
    embedding = nn.Embedding(4, 2, sparse=True).cuda()
    with pytest.raises(NotImplementedError, match=r"no sparse or nested tensors.*nn\.Embedding\(sparse=False\)"):
        embedding(torch.tensor([1]).cuda()).sum().backward()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_module_with_weight_norm_moves_and_trains():
    torch.manual_seed(0)
    plain = nn.utils.weight_norm(nn.Linear(3, 2))
    torch.manual_seed(0)
    moved = nn.utils.weight_norm(nn.Linear(3, 2)).cuda()
    x = torch.randn(4, 3)
    plain(x).square().sum().backward()
    moved(x.cuda()).square().sum().backward()
    torch.testing.assert_close(moved.weight_v.grad.cpu(), plain.weight_v.grad)


def test_a_module_that_cannot_move_says_what_holds_it():
    with pytest.raises(RuntimeError, match=r"shape \(2, 2\) cannot be moved to cuda.*torch\.jit\.script"):
        torch.jit.script(nn.Linear(2, 2)).cuda()


def test_a_transformer_with_padding_is_evaluated():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    padding = torch.tensor([[False, False, True], [False, False, False]])
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = layer(x, src_key_padding_mask=padding)
        found = layer.cuda()(x.cuda(), src_key_padding_mask=padding.cuda())
    torch.testing.assert_close(found.cpu(), expected)


def test_a_prefetchers_stream_is_part_of_the_scripts_one():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.ones(3).cuda(non_blocking=True)
    torch.cuda.current_stream().wait_stream(stream)
    x.record_stream(torch.cuda.current_stream())
    assert x.sum().item() == 3
