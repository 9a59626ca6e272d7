"""Every model's scripts on an accelerator of two devices say what they say on plain PyTorch."""

import pytest

from tests.tutorial.scripts import ROWS, eval_losses, losses, run_script, train

FAST = ("baichuan2",)
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ROWS]
PLAIN = {"MOAI_CUDA": "0"}
# Where the devices are fast at bf16 that would be the default, and the numbers others than plain PyTorch's.
DEVICES = {"MOAI_DEVICES": "2", "MOAI_PLAN": "precision=fp32"}
SETTINGS = ("--lr", 1e-3, "--eval-step", 4)


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_answers_are_those_of_plain_pytorch(prepared, tmp_path, name, lora):
    settings = (*SETTINGS, *(("--use-lora", "--lora-dropout", 0) if lora else ()))
    one = train(prepared, tmp_path, *settings, "--save-dir", "one", name=name, **PLAIN)
    two = train(prepared, tmp_path, *settings, "--save-dir", "two", name=name, **DEVICES)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert "MoAI Accelerator is ready to use." in two.stderr
    assert [step for step, _ in losses(one)] == [1, 2, 4, 6, 8]
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-5)
    assert len(eval_losses(one)) == 2
    assert eval_losses(two) == pytest.approx(eval_losses(one), rel=1e-5)

    answers = [
        run_script(f"inference_{name}.py", tmp_path, "--model-name-or-path", "one", "--max-new-tokens", 12, **where)
        for where in (PLAIN, DEVICES)
    ]
    assert [answer.returncode for answer in answers] == [0, 0], answers
    assert answers[0].stdout.lower().startswith(f"{name}: ")
    assert answers[0].stdout == answers[1].stdout
