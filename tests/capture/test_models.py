"""Training small Hugging Face models gives the losses and weights of the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers

from tests.capture.compare import assert_same
from tests.capture.conftest import Observed, on_the_host

STEPS = 5
VOCABULARY = 128
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_LLAMA_SIZES = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2}

CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "qwen2": lambda: transformers.Qwen2Config(tie_word_embeddings=True, **_LLAMA_SIZES),
    "llama": lambda: transformers.LlamaConfig(**_LLAMA_SIZES),
    "qwen3": lambda: transformers.Qwen3Config(head_dim=8, **_LLAMA_SIZES),
    "mistral": lambda: transformers.MistralConfig(sliding_window=8, **_LLAMA_SIZES),
    "mixtral": lambda: transformers.MixtralConfig(num_local_experts=4, output_router_logits=True, **_LLAMA_SIZES),
    "gemma2": lambda: transformers.Gemma2Config(head_dim=8, sliding_window=8, **_LLAMA_SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "opt": lambda: transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, **_SIZES),
}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw_single": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def make_model(architecture: str, attention: str | None = None, experts: str | None = None) -> torch.nn.Module:
    config = CONFIGS[architecture]()
    config._attn_implementation = attention
    config._experts_implementation = experts
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).train()


def batches() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, mask and labels [4, 16] of every step; one row is padded at the left."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(STEPS):
        tokens = torch.randint(0, VOCABULARY, (4, 16), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0
        labels = tokens.masked_fill(mask == 0, -100)
        labels[1, : i + 1] = -100
        made.append((tokens, mask, labels))
    return made


def train(
    device: str,
    architecture: str,
    attention: str | None = None,
    experts: str | None = None,
    optimizer: str = "adamw_foreach",
    masked: bool = True,
    clip: bool = False,
) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and final weights of a few steps."""
    model = make_model(architecture, attention, experts).to(device)
    optim = OPTIMIZERS[optimizer](model.parameters())
    schedule = torch.optim.lr_scheduler.LinearLR(optim, 0.1, 1.0, total_iters=10)
    losses = []
    for tokens, mask, labels in batches():
        options = {"attention_mask": mask.to(device)} if masked else {}
        loss = model(tokens.to(device), labels=labels.to(device), use_cache=False, **options).loss
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses, [p.detach().cpu() for p in model.parameters()]


def assert_trains_alike(*args, **kwargs) -> None:
    losses, weights = train("cuda", *args, **kwargs)
    expected_losses, expected_weights = train("cpu", *args, **kwargs)
    assert_same(losses, expected_losses, rtol=1e-6, atol=0)
    assert_same(weights, expected_weights, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("attention", [None, "eager"])  # None: what transformers chooses, sdpa where it can
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_every_architecture_trains_as_on_the_cpu(architecture: str, attention: str | None) -> None:
    assert_trains_alike(architecture, attention)


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_experts_train_as_on_the_cpu(experts: str) -> None:
    assert_trains_alike("mixtral", experts=experts)


@on_the_host
@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
def test_routing_to_experts_changes_no_graph(capture: Observed, experts: str) -> None:
    segments = capture.segments
    train("cuda", "mixtral", experts=experts)
    assert len(capture.graphs) == 2
    assert capture.segments - segments <= STEPS + 1


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_every_optimizer_trains_as_on_the_cpu(optimizer: str) -> None:
    assert_trains_alike("qwen2", optimizer=optimizer)


def test_clipped_gradients_train_as_on_the_cpu() -> None:
    assert_trains_alike("llama", clip=True)


@on_the_host
def test_a_model_without_a_mask_trains_as_on_the_cpu(capture: Observed) -> None:
    before = capture.segments
    assert_trains_alike("qwen2", masked=False)
    assert capture.segments - before <= STEPS + 1  # the weights are read after the last step


@on_the_host
def test_the_mask_check_of_transformers_is_worked_out_on_the_host(capture: Observed) -> None:
    segments, reads = capture.segments, capture.recorder.stats.host_reads
    train("cuda", "qwen2")
    assert capture.recorder.stats.host_reads > reads
    assert capture.segments - segments <= STEPS + 1


@on_the_host
def test_a_model_is_steady_after_two_graphs(capture: Observed) -> None:
    train("cuda", "qwen2")
    assert len(capture.graphs) == 2  # the first step makes the optimizer's state


def test_attention_is_one_node_forward_and_one_backward(capture: Observed) -> None:
    train("cuda", "qwen2")
    names = [str(node.op) for node in capture.graphs[-1].nodes]
    assert names.count("moai.sdpa.default") == names.count("moai.sdpa_backward.default") == 2


def test_generation_gives_the_tokens_of_the_cpu() -> None:
    model, prompt = make_model("qwen2").eval(), batches()[0][0][:1, :4]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    assert_same(model.to("cuda").generate(prompt.to("cuda"), **options), expected)


def test_gradient_checkpointing_trains_as_on_the_cpu() -> None:
    def losses(device: str) -> list[float]:
        model = make_model("qwen2").to(device)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = OPTIMIZERS["adamw_foreach"](model.parameters())
        found = []
        for tokens, _, labels in batches()[:3]:
            loss = model(tokens.to(device), labels=labels.to(device), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    assert_same(losses("cuda"), losses("cpu"), rtol=1e-6, atol=0)
