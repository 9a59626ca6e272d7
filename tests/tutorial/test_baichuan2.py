"""The tutorial's Baichuan2 is the model of the 13B checkpoint, and does what transformers expects of a model."""

import pytest
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tutorial import baichuan2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = baichuan2.BaichuanConfig(
        vocab_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=6
    )
    model = baichuan2.BaichuanForCausalLM(config).eval()
    for parameter in model.parameters():  # large enough for every part to matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_slopes_are_a_geometric_series_from_a_half():
    torch.testing.assert_close(baichuan2.slopes(8), torch.tensor([2.0**-n for n in range(1, 9)]))


def test_the_40_heads_of_the_13b_take_every_other_slope_of_64_beyond_32():
    slopes = baichuan2.slopes(40)
    torch.testing.assert_close(slopes[:32], torch.tensor([2 ** (-n / 4) for n in range(1, 33)]))
    torch.testing.assert_close(slopes[32:], torch.tensor([2 ** (-n / 8) for n in range(1, 17, 2)]))


def test_a_key_counts_less_the_farther_back_it_is_and_nothing_ahead_counts():
    least = torch.finfo(torch.float32).min
    bias = baichuan2.attention_bias(8, torch.arange(3), 3, None, torch.float32)
    half = torch.tensor([[0.0, least, least], [-0.5, 0.0, least], [-1.0, -0.5, 0.0]])
    torch.testing.assert_close(bias[0, 0], half)
    torch.testing.assert_close(bias[0, 1, 2], half[2] / 2)


def test_parameters_have_the_names_of_the_checkpoint():
    with torch.device("meta"):
        model = baichuan2.BaichuanForCausalLM(baichuan2.BaichuanConfig())
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    layer = "model.layers.39."
    assert {name.removeprefix(layer): shape for name, shape in shapes.items() if name.startswith(layer)} == {
        "self_attn.W_pack.weight": (15360, 5120),
        "self_attn.o_proj.weight": (5120, 5120),
        "mlp.gate_proj.weight": (13696, 5120),
        "mlp.up_proj.weight": (13696, 5120),
        "mlp.down_proj.weight": (5120, 13696),
        "input_layernorm.weight": (5120,),
        "post_attention_layernorm.weight": (5120,),
    }
    assert {name for name in shapes if ".layers." not in name} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert sum(parameter.numel() for parameter in model.parameters()) == 13_896_668_160


@pytest.mark.parametrize("other", [{"max_position_embeddings": 4096}, {"vocab_size": 64000}])
def test_its_relatives_of_the_same_type_are_refused(other):
    with pytest.raises(ValueError, match=r"only Baichuan2-13B is known"):
        baichuan2.BaichuanConfig(**other)


def test_logits_do_not_depend_on_the_length_of_the_head_s_rows(model):
    ids = torch.arange(5)[None]
    before = model(ids).logits
    norms = torch.linspace(0.5, 2, 64)[:, None]
    with torch.no_grad():
        model.lm_head.weight.mul_(norms)
        after = model(ids).logits
        model.lm_head.weight.div_(norms)
    torch.testing.assert_close(after, before)


def test_padding_on_either_side_changes_nothing(model):
    ids, pad = torch.arange(7, 12)[None], torch.zeros(1, 3, dtype=torch.long)
    alone = model(ids).logits
    mask = torch.tensor([[1] * 5 + [0] * 3])
    torch.testing.assert_close(model(torch.cat([ids, pad], 1), attention_mask=mask).logits[:, :5], alone)
    torch.testing.assert_close(model(torch.cat([ids, pad], 1)).logits[:, :5], alone)
    torch.testing.assert_close(model(torch.cat([pad, ids], 1), attention_mask=mask.flip(1)).logits[:, 3:], alone)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_text_generated_with_a_cache_is_that_without(model, cache):
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    settings = {"attention_mask": (ids > 0).long(), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    without = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, cache_implementation=cache, **settings), without)
    assert len(without[0].unique()) > 4


def test_a_saved_folder_brings_the_code_that_opens_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model.save_pretrained(tmp_path / "out")
    kind = get_class_from_dynamic_module("baichuan2.BaichuanForCausalLM", tmp_path / "out")
    assert kind is not baichuan2.BaichuanForCausalLM
    again = kind.from_pretrained(tmp_path / "out")
    ids = torch.arange(5)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
