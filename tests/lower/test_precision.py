"""Scripts whose every segment is rewritten to bf16 or fp64: against torch.autocast, and against .double()."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from moai.graph.step_graph import StepGraph
from moai.lower.canonical import canonical
from tests.capture.compare import randn
from tests.capture.conftest import Observed, capture  # noqa: F401  (a fixture)
from tests.capture.inline import evaluate
from tests.capture.test_models import CONFIGS, make_model
from tests.capture.test_models import batches as token_batches
from tests.lower.precise import BF16, FP32, FP64, casts_of, dtypes, nodes_of, rewritten

aten = torch.ops.aten
moai = torch.ops.moai
STEPS = 10


@pytest.fixture
def reads_on_the_host() -> bool:
    return True


@dataclass
class Accelerator:
    """Runs segments in `precision`; remembers the graphs before and after the rewrite."""

    precision: str | None = None
    graphs: dict[int, tuple[StepGraph, StepGraph]] = field(default_factory=dict)

    def execute(self, segment: Any) -> list[torch.Tensor]:
        for value in segment.inputs:
            value.buffer = value.host if value.buffer is None else value.buffer
        key = id(segment.graph)
        if key not in self.graphs:
            self.graphs[key] = segment.graph, rewritten(segment.graph, self.precision)
        return evaluate(self.graphs[key][1], [v.buffer for v in segment.inputs], segment.scalars)

    @property
    def last(self) -> StepGraph:
        return list(self.graphs.values())[-1][1]

    @property
    def largest(self) -> tuple[StepGraph, StepGraph]:
        return max(self.graphs.values(), key=lambda pair: len(pair[0].nodes))


@pytest.fixture
def accelerator(capture: Observed, monkeypatch: pytest.MonkeyPatch) -> Accelerator:  # noqa: F811
    made = Accelerator()
    monkeypatch.setattr(capture.recorder, "execute", made.execute)
    return made


CONFIGS_HERE: dict[str, tuple[str, str]] = {
    "llama": ("llama", "sdpa"),
    "qwen2": ("qwen2", "eager"),
    "gpt2": ("gpt2", "sdpa"),
}


def hf_model(name: str) -> nn.Module:
    if name in CONFIGS_HERE:
        return make_model(*CONFIGS_HERE[name])
    sizes = CONFIGS["llama"]().to_dict()
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    options = {k: sizes[k] for k in (*kept, "intermediate_size", "max_position_embeddings")}
    config = transformers.Gemma2Config(head_dim=8, attn_implementation="eager", **options)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).train()


def train(model: nn.Module, device: str, autocast: bool = False) -> tuple[list[float], list[torch.Tensor]]:
    """The losses of ten steps, and the gradients of the first."""
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    given = token_batches()
    losses, gradients = [], []
    for step in range(STEPS):
        tokens, mask, labels = (t.to(device) for t in given[step % len(given)])
        with torch.autocast(device, BF16, enabled=autocast):
            loss = model(tokens, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        if step == 0:
            gradients = [p.grad.detach().cpu().clone() for p in model.parameters()]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, gradients


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
def test_bf16_trains_as_autocast_does(accelerator: Accelerator, name: str) -> None:
    accelerator.precision = "bf16"
    losses, gradients = train(hf_model(name), "cuda")
    expected_losses, expected_gradients = train(hf_model(name), "cpu", autocast=True)
    assert losses == pytest.approx(expected_losses, rel=2e-4)
    for got, expected in zip(gradients, expected_gradients, strict=True):
        assert torch.cosine_similarity(got.double().flatten(), expected.double().flatten(), 0) > 0.999
    assert_a_sound_mixture(*accelerator.largest)


def assert_a_sound_mixture(written: StepGraph, graph: StepGraph) -> None:
    """What holds of every training step in bf16."""
    products = nodes_of(graph, aten.mm.default, aten.addmm.default, aten.bmm.default, moai.sdpa.default)
    assert products
    for node in products:
        assert FP32 not in dtypes(graph, node)[0]
    for node in nodes_of(graph, aten._softmax.default, aten._log_softmax.default, aten.native_layer_norm.default,
                         aten.mean.dim, aten.rsqrt.default, aten.nll_loss_forward.default, aten.pow.Tensor_Scalar,
                         aten.sum.dim_IntList):  # fmt: skip
        assert set(dtypes(graph, node)[1]) == {FP32}
    for parameter in (i.id for i in graph.inputs if not i.batch):
        casts = casts_of(graph, parameter)
        assert len(casts) <= 1
        assert all(c.origin.phase == "forward" for c in casts)
    optimizer = [n for n in graph.nodes if n.origin.phase == "optimizer"]
    assert optimizer == [n for n in canonical(written)[0] if n.origin.phase == "optimizer"]
    for node in optimizer:
        assert BF16 not in dtypes(graph, node)[0]


class Net(nn.Module):
    """Every kind of layer that the tests below look at, without a library around them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, 16)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 32, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(torch.nn.functional.gelu(x))


def step(net: nn.Module, device: str, dtype: torch.dtype = FP32, times: int = 1) -> list[torch.Tensor]:
    """Loss and gradients of a step of `times` backward passes, widened on the device; the weights after it."""
    net = net.to(device, dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for k in range(times):
        tokens = torch.randint(0, 32, (3, 9), generator=torch.Generator().manual_seed(k)).to(device)
        logits = net(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
    found = [loss.detach().double(), *(p.grad.double() for p in net.parameters())]
    optimizer.step()
    return [t.detach().cpu() for t in (*found, *net.parameters())]


def test_fp64_gives_the_numbers_of_a_double_model(accelerator: Accelerator) -> None:
    accelerator.precision = "fp64"
    found, expected = step(Net(), "cuda"), step(Net(), "cpu", FP64)
    n = len(list(Net().parameters()))
    torch.testing.assert_close(found[:-n], expected[:-n], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[-n:], [w.float() for w in expected[-n:]], rtol=2e-7, atol=0)


def test_fp64_computes_nothing_in_fp32(accelerator: Accelerator) -> None:
    accelerator.precision = "fp64"
    step(Net(), "cuda")
    graph = accelerator.largest[1]
    for node in graph.nodes:
        assert node.op is aten._to_copy.default or FP32 not in dtypes(graph, node)[1]


def test_fp64_draws_the_random_numbers_of_the_script(accelerator: Accelerator) -> None:
    def masks() -> torch.Tensor:
        torch.manual_seed(3)
        return torch.cat([torch.rand(8, device="cuda"), nn.functional.dropout(torch.ones(8, device="cuda"))]).cpu()

    plain = masks()
    accelerator.precision = "fp64"
    accelerator.graphs.clear()
    torch.testing.assert_close(masks(), plain, rtol=0, atol=0)


def test_fp64_takes_a_fused_optimizer_whose_counters_are_fp32(accelerator: Accelerator) -> None:
    accelerator.precision = "fp64"

    def weights(device: str) -> torch.Tensor:
        weight = nn.Parameter(randn(4, 4).to(device))
        optimizer = torch.optim.AdamW([weight], lr=1e-2, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            (weight * weight).sum().backward()
            optimizer.step()
        return weight.detach().cpu()

    torch.testing.assert_close(weights("cuda"), weights("cpu"), rtol=1e-6, atol=1e-7)
    (node,) = nodes_of(accelerator.last, aten._fused_adamw.default)
    parameters, *_, counters = node.args[:6]
    assert accelerator.last.types[parameters[0].id].dtype == FP64
    assert accelerator.last.types[counters[0].id].dtype == FP32


def test_gradients_of_parameters_are_widened_directly_after_their_products(accelerator: Accelerator) -> None:
    accelerator.precision = "bf16"
    step(Net(), "cuda", times=2)
    shapes = {tuple(p.shape) for p in Net().parameters() if p.dim() == 2}
    found = 0
    for _, graph in accelerator.graphs.values():
        for node, cast in zip(graph.nodes, graph.nodes[1:], strict=False):
            if (
                node.op is aten.mm.default
                and node.origin.phase == "backward"
                and graph.types[node.outs].shape in shapes
            ):
                found += 1
                assert (cast.op, cast.args[0].id) == (aten._to_copy.default, node.outs)
                assert graph.types[cast.outs].dtype == FP32
    assert found == 2 * 3  # the gradient of the table is no product


def test_a_parameter_used_in_several_passes_is_cast_once(accelerator: Accelerator) -> None:
    accelerator.precision = "bf16"
    step(Net(), "cuda", times=2)
    graph = accelerator.largest[1]
    assert all(len(casts_of(graph, i.id)) <= 1 for i in graph.inputs)


def test_what_the_forward_widened_is_not_kept_for_the_backward(accelerator: Accelerator) -> None:
    accelerator.precision = "bf16"
    weight = nn.Parameter(randn(8, 8).to("cuda"))

    def loss() -> torch.Tensor:
        y = randn(4, 8).to("cuda") @ weight
        return (y.pow(3) * y.neg()).sum()

    loss().backward()
    weight.grad.cpu()
    graph = accelerator.last
    (product,) = (n for n in nodes_of(graph, aten.mm.default) if n.origin.phase == "forward")
    assert {n.origin.phase for n in casts_of(graph, product.outs)} == {"forward", "backward"}


def test_a_script_under_autocast_is_left_alone(accelerator: Accelerator) -> None:
    accelerator.precision = "bf16"
    net, tokens = Net().to("cuda"), torch.randint(0, 32, (3, 8)).to("cuda")
    with torch.autocast("cuda", BF16):
        y = net(tokens)
        with torch.autocast("cuda", enabled=False):
            y = y.float() @ net.head.weight
    y.sum().backward()
    y.cpu()
    written, graph = accelerator.largest
    assert list(graph.nodes) == canonical(written)[0]


def test_a_model_that_is_bf16_is_left_alone(accelerator: Accelerator) -> None:
    accelerator.precision = "bf16"
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).to("cuda", BF16)
    net(randn(4, 8).to("cuda", BF16)).float().sum().backward()
    net[0].weight.grad.cpu()
    written, graph = accelerator.largest
    assert list(graph.nodes) == canonical(written)[0]


def test_what_a_script_makes_of_gradients_itself_is_fp32(accelerator: Accelerator) -> None:
    accelerator.precision = "bf16"
    weight = nn.Parameter(randn(8, 8).to("cuda"))
    (randn(4, 8).to("cuda") @ weight).sum().backward()
    with torch.no_grad():
        weight -= 0.1 * weight.grad @ weight.grad.T
    weight.cpu()
    update = [n for n in nodes_of(accelerator.last, aten.mm.default) if n.origin.phase == "forward"][-1]
    assert dtypes(accelerator.last, update) == ([FP32, FP32], [FP32])


class Orthogonal(torch.optim.SGD):
    """Steps along gradients times themselves, in fp32 and in bf16."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                low = p.grad.bfloat16()
                p.sub_(p.grad @ p.grad.T @ p.grad + (low @ low.T).float() @ p.grad, alpha=group["lr"])


def test_products_in_an_optimizer_are_those_it_wrote(accelerator: Accelerator) -> None:
    accelerator.precision = "bf16"
    weight = nn.Parameter(randn(8, 8).to("cuda"))
    optimizer = Orthogonal([weight], lr=0.1)
    (randn(4, 8).to("cuda") @ weight).sum().backward()
    optimizer.step()
    weight.detach().cpu()
    products = nodes_of(accelerator.last, aten.mm.default)
    assert [set(dtypes(accelerator.last, n)[0]) for n in products if n.origin.phase != "optimizer"] == [{BF16}]
    written = [set(dtypes(accelerator.last, n)[0]) for n in products if n.origin.phase == "optimizer"]
    assert written == [{FP32}, {FP32}, {BF16}, {FP32}]
