"""Dry runs: what is captured of a script's first step, and what is said where there is none.

Every test runs a script in a process of its own, as the command does.
"""

import json
import subprocess
import sys
import time

import pytest

from moai.dry import script
from moai.dry.capture import CaptureError, capture_model, capture_script
from moai.dry.messages import ModelStep
from moai.dry.model import train
from moai.dry.script import Failure
from moai.graph.step_graph import Ref, flat_ids, map_args

MEMORY = 1 << 40
SECONDS = 60.0
LARGE = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(2000, 600_000), torch.nn.ReLU(), torch.nn.Linear(600_000, 10))
model.cuda()
optimizer = torch.optim.Adam(model.parameters())
"""
PRINT_GRAPHS = """
import runpy, sys
from moai.session import Session
execute = Session._execute
def told(self, segment):
    print(segment.graph)
    return execute(self, segment)
Session._execute = told
runpy.run_path(sys.argv[1], run_name="__main__")
"""
TINY = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def captured(folder, text, *arguments, seconds=SECONDS):
    file = folder / "script.py"
    file.write_text(text)
    return capture_script(str(file), arguments, MEMORY, seconds)


def canonical(graph):
    """What a graph computes, whatever its values are called."""
    names = {}

    def name(arg):
        return names.setdefault(arg.id, len(names)) if type(arg) is Ref else arg

    def type_of(id):
        return names.setdefault(id, len(names)), graph.types[id]

    inputs = {(type_of(i.id), i.batch, i.dies) for i in graph.inputs}
    nodes = [(str(n.op), map_args(n.args, name), [type_of(o) for o in flat_ids(n.outs)]) for n in graph.nodes]
    taken = [None if o.replaces is None else names[graph.inputs[o.replaces].id] for o in graph.outputs]
    outputs = {(type_of(o.id), name) for o, name in zip(graph.outputs, taken, strict=True)}
    return inputs, nodes, outputs


def refused(folder, text, *arguments, seconds=SECONDS):
    with pytest.raises(CaptureError) as caught:
        captured(folder, text, *arguments, seconds=seconds)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- what is captured


def test_a_step_is_captured_before_the_script_does_anything_with_it(folder):
    text = """
import sys
x = torch.ones(int(sys.argv[1]), 2000).cuda()
import atexit
atexit.register(lambda: open("at_exit", "w"))
try:
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    print(loss.item())
    open("after", "w")
finally:
    open("finally", "w")
"""
    found = captured(folder, LARGE + text, "64")
    batch = [found.graph.types[i.id].shape for i in found.graph.inputs if i.batch]
    assert (batch, found.graph.trains, found.batches) == ([(64, 2000)], True, 1)
    assert [path.name for path in folder.iterdir()] == ["script.py"]


def test_the_graph_is_that_of_a_real_run(folder, monkeypatch):
    model = "torch.nn.Sequential(torch.nn.Embedding(100, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 100))"
    text = f"""
import torch
model = {model}
model[0].weight.data.normal_()
model.half().float().cuda()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tokens = torch.arange(64).view(4, 16)
if tokens.cuda().max() < 100:
    loss = torch.nn.functional.cross_entropy(model(tokens.cuda()).flatten(0, 1), tokens.cuda().flatten())
    loss.backward()
    optimizer.step()
    print(loss.item())
"""
    graph = captured(folder, text).graph
    monkeypatch.setenv("MOAI_DEVICES", "1")
    monkeypatch.setenv("MOAI_CUDA", "1")
    command = [sys.executable, "-c", PRINT_GRAPHS, str(folder / "script.py")]
    real = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert str(graph) in real.stdout, real.stderr


def test_weights_take_no_memory_and_no_time(folder):
    text = """
import resource
model(torch.ones(8, 2000).cuda()).sum().backward()
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1 << 20, "more than a GiB"
optimizer.step()
"""
    assert captured(folder, LARGE + text).graph.trains  # weights and states would be 14 GiB


def test_gradients_that_a_script_adds_up_are_several_passes_of_one_step(folder):
    text = """
for _ in range(3):
    loss = model(torch.ones(8, 2000).cuda()).sum()
    loss.backward()
    print(loss.item())
optimizer.step()
"""
    found = captured(folder, LARGE + text)
    assert (found.batches, found.graph.trains) == (3, True)


def test_a_loss_that_is_read_before_the_optimizer_cuts_no_step_in_two(folder):
    text = """
import sys
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).cuda()
optimizer = torch.optim.Adam(model.parameters())
loss = model(torch.ones(8, 64).cuda()).square().sum()
loss.backward()
if sys.argv[1] == "early":
    assert loss.item() == 0
optimizer.step()
print(loss.item())
"""
    early, late = (captured(folder, "import torch" + text, when) for when in ("early", "late"))
    assert (early.batches, early.graph.trains, late.batches) == (1, True, 1)
    assert canonical(early.graph) == canonical(late.graph)


def test_a_step_right_before_the_end_of_the_script_is_captured(folder):
    text = """
def main():
    model = torch.nn.Linear(64, 64).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(8, 64).cuda()).sum().backward()
    optimizer.step()
main()
"""
    assert captured(folder, "import torch\n" + text).graph.trains


def test_what_follows_from_the_scripts_data_is_known(folder):
    text = """
mask = torch.ones(64, 2000, dtype=torch.bool).cuda()
torch.cuda.synchronize()
full = mask.all() & mask[0].any()
torch.cuda.synchronize()
assert full.item() is True
model(mask.float()).sum().backward()
optimizer.step()
"""
    assert captured(folder, LARGE + text).graph.trains


def test_what_is_done_to_parameters_before_the_step_is_no_part_of_it(folder):
    text = """
with torch.no_grad():
    for p in model.parameters():
        p.normal_()
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
model(torch.ones(8, 2000).cuda()).sum().backward()
optimizer.step()
"""
    names = {str(node.op) for node in captured(folder, LARGE + text).graph.nodes}
    assert not any("normal" in name or "random" in name for name in names)


def test_the_options_of_the_script_come_with_the_step(folder):
    ask = "torch.moreh.option.enable_advanced_parallelization(num_micro_batches=4)\n"
    step = "model(torch.ones(8, 2000).cuda()).sum().backward(); optimizer.step()"
    options = captured(folder, LARGE + ask + step).options
    assert options is not None and options.num_micro_batches == 4


def test_a_pretrained_model_is_made_of_its_config_alone(folder):
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({**TINY, "dtype": "bfloat16"}))
    (folder / "model" / "model.safetensors").write_text("no weights")
    text = """
import torch
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
model, info = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32, output_loading_info=True)
assert not info["missing_keys"] and not model.training and model.config.name_or_path == "model"
assert Qwen2ForCausalLM.from_pretrained("model").lm_head.weight.dtype == torch.bfloat16
model.train().cuda()
tokens = torch.ones(4, 16, dtype=torch.int64).cuda()
model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss.backward()
torch.optim.AdamW(model.parameters()).step()
"""
    graph = captured(folder, text).graph
    assert graph.trains and {str(t.dtype) for t in graph.types} <= {"torch.float32", "torch.int64", "torch.bool"}


def test_a_trainer_of_transformers_comes_to_its_first_step(folder):
    (folder / "config.json").write_text(json.dumps(TINY))
    text = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
rows = [{"input_ids": [k] * 16, "labels": [k] * 16} for k in range(64)]
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("config.json"))
settings = TrainingArguments("out", per_device_train_batch_size=8, gradient_accumulation_steps=2, report_to=[])
Trainer(model, settings, train_dataset=rows).train()
"""
    found = captured(folder, text)
    assert found.graph.trains


@pytest.mark.parametrize("spread", [{}, {"dtype": "bfloat16"}])
def test_a_model_takes_a_fine_tuning_step(folder, spread):
    (folder / "config.json").write_text(json.dumps({**TINY, **spread}))
    graph = capture_model(ModelStep("config.json", 8, 16), MEMORY, SECONDS).graph
    batch = {graph.types[i.id] for i in graph.inputs if i.batch}
    weights = {str(graph.types[i.id].dtype) for i in graph.inputs if len(graph.types[i.id].shape) == 2 and not i.batch}
    assert {(t.shape, str(t.dtype)) for t in batch} == {((8, 16), "torch.int64")}
    assert graph.trains and weights == {"torch." + spread.get("dtype", "float32")}


# ---------------------------------------------------------------- where there is no step


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("print(1)", ["script.py ended without a training step", "step()"]),
        ("import sys; sys.exit(3)", ["ended before its first training step, with exit status 3"]),
        ("import sys; sys.exit('No data.')", ["ended before its first training step: No data."]),
        ("x = 1\n1 / 0", ["(line 2): ZeroDivisionError: division by zero"]),
        ("x = (", ["SyntaxError"]),
        ("raise EOFError('EOF when reading a line')", ["EOFError: EOF", "nobody can answer"]),
    ],
)
def test_a_script_that_takes_no_step_is_told_why(folder, monkeypatch, text, parts):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (folder / "script.py").write_text(text)
    with pytest.raises(Failure) as caught:
        script.run(str(folder / "script.py"), [], lambda: None)
    assert all(part in caught.value.text for part in parts), caught.value.text


def test_an_exit_without_a_reason_is_told_with_what_was_printed_last(folder):
    said = refused(folder, "import argparse; argparse.ArgumentParser().parse_args()", "--foo")
    assert "with exit status 2. The last line that it printed: script.py: error: unrecognized arguments: --foo" in said
    assert refused(folder, "import os; os._exit(4)").endswith("with exit status 4.")


def test_a_question_is_answered_by_nobody(folder):
    assert "EOFError" in refused(folder, "input('Which?')")


def test_a_script_that_goes_on_for_ever_is_ended(folder):
    begin = time.monotonic()
    said = refused(folder, "import subprocess\nsubprocess.run(['sleep', '1000'])", seconds=4.0)
    assert "within 4 s" in said and "--timeout" in said
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["is no config.json of a model"]),
        ("{}", ["cannot be used", "model_type"]),
        ('{"model_type": "nonsense"}', ["cannot be used", "nonsense"]),
        ('{"model_type": "t5"}', ["is no causal language model, but a t5"]),
        ('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 5}', ["hidden size (64)"]),
    ],
)
def test_a_config_that_makes_no_model_is_refused(folder, text, parts):
    (folder / "c.json").write_text(text)
    said = not_trained("c.json")
    assert "c.json" in said and all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("Qwen/Qwen1.5-7B", "is no folder, nor a model that was downloaded before, and the Hugging Face hub cannot"),
        ("nosuch.json", "nosuch.json: there is no such file"),
        (".", "has no config.json"),
    ],
)
def test_a_model_that_is_not_there_is_refused(name, part):
    assert part in not_trained(name)


def not_trained(model):
    """What is said of a model before anything is recorded."""
    with pytest.raises(Failure) as caught:
        train(ModelStep(model, 8, 16), recorder=None)
    return caught.value.text
