"""Every model's scripts on an accelerator of two devices say what they say on plain PyTorch."""

import functools
import json
import re
import subprocess
import sys

import pytest

from tests.tutorial.scripts import ROOT, ROWS, environment, eval_losses, losses, train_arguments

# (model, with LoRA). Those that are not slow are looked at in every `make test`.
FAST = (("gpt", False), ("baichuan2", True))
SLOW = tuple((name, lora) for lora in (False, True) for name in ROWS if (name, lora) not in FAST)
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
LORA = ("--use-lora", "--lora-dropout", "0")


@pytest.fixture(scope="module")
def said(prepared, tmp_path_factory):
    """What a case's script said: (where, case, script) -> (stdout, stderr). All slow cases run when one is wanted."""

    @functools.cache
    def run(cases):
        return in_one_process(prepared, tmp_path_factory.mktemp("models"), cases)

    def of(where, case, script):
        return tuple(stream[f"{where} {run_of(case)} {script}_{case[0]}.py"] for stream in run(cases_with(case)))

    return of


def cases_with(case):
    return FAST if case in FAST else SLOW


def run_of(case):
    name, lora = case
    return f"{name}-{'lora' if lora else 'whole'}"


def in_one_process(prepared, folder, cases):
    """(stdout, stderr) of all runs, each by what stands in the line before it."""
    runs = []
    for name, lora in cases:
        settings = (*train_arguments(prepared, name), "--lr", "1e-3", "--eval-step", "4", *(LORA if lora else ()))
        runs.append((run_of((name, lora)), f"train_{name}.py", [*settings, "--save-dir", "out"]))
        inference = ["--model-name-or-path", "out", "--max-new-tokens", "12"]
        runs.append((run_of((name, lora)), f"inference_{name}.py", inference))
    result = subprocess.run(
        [sys.executable, "-m", "tests.tutorial.one_process", str(folder), json.dumps(runs)],
        # Where the devices are fast at bf16 that would be the default, and the numbers others than plain PyTorch's.
        env=environment(folder, MOAI_DEVICES="2", MOAI_PLAN="precision=fp32"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return [sections(text) for text in (result.stdout, result.stderr)]


def sections(text):
    """What stands behind each line `=== NAME`, by the name."""
    parts = re.split(r"^=== (.*)\n", text, flags=re.M)[1:]
    return {name: said.strip() for name, said in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.parametrize(("name", "lora"), CASES)
def test_losses_are_those_of_plain_pytorch(said, name, lora):
    one, two = (said(where, (name, lora), "train")[1] for where in ("plain", "devices"))
    assert [step for step, _ in losses(one)] == [step for step, _ in losses(two)] == [1, 2, 4, 6, 8]
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-5)
    assert len(eval_losses(one)) == 2
    assert eval_losses(two) == pytest.approx(eval_losses(one), rel=1e-5)
    assert losses(one)[-1][1] < losses(one)[0][1]


@pytest.mark.parametrize(("name", "lora"), CASES)
def test_answers_are_those_of_plain_pytorch(said, name, lora):
    one, two = (said(where, (name, lora), "inference")[0] for where in ("plain", "devices"))
    assert one.lower().startswith(f"{name}: ")
    assert two == one
