"""The tutorial from its first line to its checkpoint, on plain PyTorch and on an accelerator of two devices."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tutorial.scripts import eval_losses, losses, run_script, train


@pytest.fixture(scope="module")
def plain(prepared, tmp_path_factory):
    """A run on plain PyTorch, without an accelerator: (what it printed, its folder)."""
    folder = tmp_path_factory.mktemp("plain")
    return train(prepared, folder, MOAI_CUDA="0"), folder


@pytest.fixture(scope="module")
def accelerated(prepared, tmp_path_factory):
    """The same on two devices."""
    folder = tmp_path_factory.mktemp("accelerated")
    # Where the devices are fast at bf16 that would be the default, and the losses others than plain PyTorch's.
    return train(prepared, folder, MOAI_DEVICES="2", MOAI_PLAN="precision=fp32"), folder


@pytest.fixture(params=["plain", "accelerated"])
def run(request):
    return request.getfixturevalue(request.param)


def logits(folder):
    """What the checkpoint says about a few tokens, in plain PyTorch."""
    model = AutoModelForCausalLM.from_pretrained(folder / "out").eval()
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12)).logits


def test_a_run_ends_well(run):
    result, folder = run
    assert result.returncode == 0, result.stderr
    assert [p.name for p in folder.iterdir() if p.name.startswith((".", "out"))] == ["out"]


def test_the_loss_falls(run):
    (first, start), *_, (last, end) = losses(run[0].stderr)
    assert (first, last) == (1, 8)
    assert end < start - 0.5


def test_a_run_prints_the_lines_of_the_tutorial_in_order(run):
    text = run[0].stderr
    lines = [
        r"total_step: 8",
        r"\[Step 1/8\] \| Loss: \d\.\d+$",
        r"Model load and warmup done\. Duration: \d+\.\d\d$",
        r"\[Step 2/8\] \| Loss: \d\.\d+ \| Duration: \d+\.\d\d \| Throughput: \d+\.\d\d tokens/sec$",
        r"\[Step 8/8\]",
        r"\[START EPOCH EVAL\]$",
        r"EVAL STEP: 1 / 1$",
        r"Eval Loss: \d\.\d+ \| ELAPSED EVAL TIME: \d+\.\d\d sec$",
        r"Training Done",
        r"Saving Model\.\.\.",
        r"Model saved in .*out$",
    ]
    found = [re.search(line, text, re.MULTILINE) for line in lines]
    assert all(found), text
    assert [m.start() for m in found if m] == sorted(m.start() for m in found if m)


def test_throughput_counts_the_steps_since_the_last_line_and_their_time(plain):
    lines = re.findall(r"Duration: (\S+) \| Throughput: (\S+) tokens", plain[0].stderr)
    steps = [1, 2, 2, 2]  # between the lines of steps 1, 2, 4, 6 and 8
    for n, (duration, throughput) in zip(steps, lines, strict=True):
        assert float(throughput) * float(duration) == pytest.approx(n * 8 * 16, abs=float(throughput) * 0.0051)


def test_two_devices_print_the_losses_of_one(plain, accelerated):
    assert [step for step, _ in losses(plain[0].stderr)] == [step for step, _ in losses(accelerated[0].stderr)]
    for (_, one), (_, two) in zip(losses(plain[0].stderr), losses(accelerated[0].stderr), strict=True):
        assert two == pytest.approx(one, abs=2e-4)
    assert eval_losses(accelerated[0].stderr) == pytest.approx(eval_losses(plain[0].stderr), abs=2e-4)


def test_two_devices_leave_the_checkpoint_of_one(plain, accelerated):
    torch.testing.assert_close(logits(accelerated[1]), logits(plain[1]), atol=5e-3, rtol=5e-3)


def test_only_the_accelerated_run_uses_an_accelerator(plain, accelerated):
    assert "MoAI Accelerator is ready to use." in accelerated[0].stderr
    assert "MoAI Accelerator is ready to use." not in plain[0].stderr


def test_the_checkpoint_answers(run):
    _, folder = run
    result = run_script(
        "inference_qwen.py", folder, "--model-name-or-path", "out", "--max-new-tokens", 4, MOAI_CUDA="0"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Qwen: ### Instruction:")


def test_an_accelerator_gives_the_answer_of_plain_pytorch(plain):
    _, folder = plain
    arguments = ("--model-name-or-path", "out", "--max-new-tokens", 4)
    one = run_script("inference_qwen.py", folder, *arguments, MOAI_CUDA="0")
    two = run_script("inference_qwen.py", folder, *arguments, MOAI_DEVICES="2")
    assert two.returncode == 0, two.stderr
    assert two.stdout == one.stdout
