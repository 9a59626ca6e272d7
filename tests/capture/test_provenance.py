"""Every node of a graph says where it comes from: phase, module, autograd sequence number, line of the script."""

from __future__ import annotations

import os

import pytest
import torch

from moai.graph.step_graph import Node, StepGraph
from tests.capture.compare import randn
from tests.capture.conftest import Observed


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(4)
        self.up = torch.nn.Linear(4, 8)
        self.down = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


def steady_graph(capture: Observed, model: torch.nn.Module) -> StepGraph:
    """The graph of a training step of `model`, after the optimizer has made its state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for i in range(3):
        loss = model(randn(2, 4, seed=i).to("cuda")).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return capture.graphs[-1]


@pytest.fixture
def graph(capture: Observed) -> StepGraph:
    return steady_graph(capture, torch.nn.Sequential(Block(), Block()).to("cuda"))


def nodes(graph: StepGraph, phase: str, op: str = "") -> list[Node]:
    return [n for n in graph.nodes if n.origin.phase == phase and op in str(n.op)]


def test_every_phase_is_there_in_order(graph: StepGraph) -> None:
    phases = [n.origin.phase for n in graph.nodes]
    assert sorted(set(phases), key=phases.index) == ["forward", "backward", "optimizer"]
    assert phases == sorted(phases, key=["forward", "backward", "optimizer"].index)


def test_forward_nodes_carry_the_path_of_their_module(graph: StepGraph) -> None:
    matmuls = [n.origin.module for n in nodes(graph, "forward", "addmm")]
    assert matmuls == ["0.up", "0.down", "1.up", "1.down"]
    assert [n.origin.module for n in nodes(graph, "forward", "native_layer_norm")] == ["0.norm", "1.norm"]
    assert [n.origin.module for n in nodes(graph, "forward", "tanh")] == ["0", "1"]


def test_forward_nodes_carry_the_line_of_the_script(graph: StepGraph) -> None:
    line = Block.forward.__code__.co_firstlineno + 1
    assert {n.origin.where for n in nodes(graph, "forward", "addmm")} == {f"{os.path.basename(__file__)}:{line}"}


def test_backward_nodes_pair_with_forward_nodes_by_sequence_number(graph: StepGraph) -> None:
    forward = {n.origin.sequence: n for n in nodes(graph, "forward")}
    names = {"NativeLayerNormBackward": "native_layer_norm", "TanhBackward": "tanh", "AddmmBackward": "addmm"}
    paired = [n for n in nodes(graph, "backward") if any(n.origin.module.startswith(name) for name in names)]
    assert len(paired) >= 8
    for node in paired:
        expected = next(op for name, op in names.items() if node.origin.module.startswith(name))
        assert expected in str(forward[node.origin.sequence].op)


def test_backward_nodes_are_named_after_their_autograd_node(graph: StepGraph) -> None:
    for node in nodes(graph, "backward"):
        assert "Backward" in node.origin.module or "AccumulateGrad" in node.origin.module


def test_optimizer_nodes_say_which_line_called_step(graph: StepGraph) -> None:
    line = steady_graph.__code__.co_firstlineno + 6
    assert {n.origin.where for n in nodes(graph, "optimizer")} == {f"{os.path.basename(__file__)}:{line}"}


def test_a_recomputed_forward_is_backward_work_of_its_module(capture: Observed) -> None:
    """What a checkpointed layer recomputes runs within the backward pass, and is told from the gradients by its
    operators."""

    class Checkpointed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    graph = steady_graph(capture, Checkpointed().to("cuda"))
    assert len(nodes(graph, "forward", "tanh")) == 1
    assert len(nodes(graph, "backward", "aten.tanh.default")) == 1


def test_a_graph_prints_its_types_and_lines(graph: StepGraph) -> None:
    text = str(graph)
    assert "float32[2,4] batch" in text
    assert "aten.addmm.default" in text
    assert f"# forward {os.path.basename(__file__)}" in text
