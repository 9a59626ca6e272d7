"""Scripts that leave their plan to the platform: what they print, and what the log says."""

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(240)
TIMEOUT = 110
TRAIN = """
import sys, torch
options = eval(sys.argv[2]) if len(sys.argv) > 2 else {}
torch.moreh.option.enable_advanced_parallelization(mixed_precision=False, **options) if sys.argv[1] == "cuda" else None
torch.manual_seed(0)
layers = [m for _ in range(3) for m in (torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))]
model = torch.nn.Sequential(*layers).double().to(sys.argv[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(4):
    x, y = (torch.randn(8, 64, dtype=torch.float64).to(sys.argv[1]) for _ in range(2))
    loss = torch.nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    print(loss.item())
"""
EVALUATED_FIRST = """
import sys, torch
from moai.lower import lower_cached
from moai.plan.plan import Plan
from moai.planning.planner import Planned

class TensorParallel:
    def __init__(self, *args): pass
    def choose(self, graph, given, taken):
        return Planned(Plan(tp=2), lower_cached(graph, Plan(tp=2), given), "tp : 2")

if sys.argv[1] == "cuda":
    torch.moreh.option.enable_advanced_parallelization(mixed_precision=False)
    import moai.session
    moai.session.Planner = TensorParallel
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)).double().to(sys.argv[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
x, y = (torch.randn(8, 64, dtype=torch.float64).to(sys.argv[1]) for _ in range(2))
with torch.no_grad():
    seen = model(x)
    print(seen.sum().item())
for _ in range(2):
    loss = torch.nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    print(loss.item())
print((model(x) - seen).detach().abs().sum().item())
"""
STAGED = """
import dataclasses, sys
from moai.plan.space import Allowed
by = Allowed.by
Allowed.by = staticmethod(lambda options: dataclasses.replace(by(options), pp=2))
""" + TRAIN.replace("range(3)", "range(4)")
DUMP = "advanced_parallelization_selected_config.dump"
CONFIG = r"No PP, (No TP|tp : \d+), dp : \d+, num_micro_batches : \d+, recomputation : \w+\(\d\), distribute_param .*"
# As the original's log has them (its section on advanced parallelization), but for those of the accelerator's start.
LINES = (
    r"Got DBs from backend for auto config\.",
    r"Requesting resources for MoAI Accelerator from the server\.\.\.",
    r"MoAI Accelerator is ready to use\.",
    r"The number of candidates is \d+\.",
    r"Parallel Graph Compile start\.\.\.",
    r"Elapsed Time to compile all candidates = \d+ \[ms\]",
    r"Parallel Graph Compile finished\.",
    r"The number of possible candidates is \d+\.",
    r"SelectBestGraphFromCandidates start\.\.\.",
    r"Elapsed Time to compute cost for survived candidates = \d+ \[ms\]",
    r"SelectBestGraphFromCandidates finished\.",
    r"Configuration for parallelism is selected\.",
    CONFIG,
    r"train: true",
)


@pytest.fixture
def run(tmp_path):
    """Runs the script with these options and variables; the accelerator has two devices."""

    def run(options=None, device="cuda", script=TRAIN, **variables):
        (tmp_path / "train.py").write_text(script)
        env = {**os.environ, "MOAI_CUDA": "1", "MOAI_DEVICES": "2", "OMP_NUM_THREADS": "1", **variables}
        env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "MOAI_PROGRAM_CACHE": "1", "MOAI_VALIDATE": "0"}
        command = [sys.executable, "train.py", device, repr(options or {})]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=TIMEOUT)

    return run


def losses(done):
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.split()]


def said(done):
    return [line.partition("] [")[2].partition("] ")[2] for line in done.stderr.splitlines()]


def config(done):
    return next(line for line in said(done) if re.fullmatch(CONFIG, line))


def test_the_numbers_are_those_of_one_device_and_the_log_is_the_originals(run, tmp_path):
    plain = losses(run(device="cpu", MOAI_CUDA="0"))
    done = run()
    assert losses(done) == pytest.approx(plain, rel=1e-10)
    lines = iter(said(done))
    for pattern in LINES:
        assert any(re.fullmatch(pattern, line) for line in lines), f"{pattern} is missing, or comes too early"
    assert (tmp_path / DUMP).read_text() == config(done) + "\n"

    again = run()
    assert losses(again) == pytest.approx(plain, rel=1e-10)
    (found,) = [line for line in said(again) if "planned before" in line]
    assert int(re.search(r"(\d+) \[ms\]", found)[1]) < 100
    assert not any("Parallel Graph Compile" in line for line in said(again))
    assert config(again) == config(done)


@pytest.mark.slow
def test_what_was_evaluated_before_the_plan_was_chosen_is_placed_anew(run):
    plain = losses(run(device="cpu", script=EVALUATED_FIRST, MOAI_CUDA="0"))
    assert losses(run(script=EVALUATED_FIRST)) == pytest.approx(plain, rel=1e-10)


def test_options_restrict_what_is_chosen(run):
    done = run({"num_micro_batches": 2, "activation_recomputation": True, "distribute_parameter": True})
    assert len(losses(done)) == 4
    line = config(done)
    assert "num_micro_batches : 2" in line and "distribute_param : true" in line and "none(0)" not in line


def test_a_step_that_fits_under_no_plan_is_refused_with_what_it_needs_and_what_to_do(run, tmp_path):
    (tmp_path / "flavors.toml").write_text('[[flavor]]\nname = "Tiny"\ndevices = 2\nmemory_mib = 64\n')
    ratio = {"MOREH_ADVANCED_PARALLELIZATION_MEMORY_USAGE_CORRECTION_RATIO": "1"}
    done = run(MOAI_CONFIG=str(tmp_path / "flavors.toml"), MOAI_FLAVOR="Tiny", MOAI_DEVICES="", **ratio)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert "No plan fits" in last and "a device" in last and "moreh-switch-model" in last
    assert f"{os.sep}moai{os.sep}" not in done.stderr, "the error shows the platform's own files"


def test_a_share_of_the_memory_that_is_none_is_a_plain_error_that_says_what_to_do(run):
    done = run(MOREH_ADVANCED_PARALLELIZATION_MEMORY_USAGE_CORRECTION_RATIO="eighty")
    *_, last = done.stderr.splitlines()
    assert last.startswith("ValueError: MOREH_ADVANCED_PARALLELIZATION_MEMORY_USAGE_CORRECTION_RATIO=eighty: ")
    assert "from 1 to 100" in last and "unset it" in last and done.returncode == 1


def test_the_table_of_candidates_goes_to_the_log_or_to_a_file(run, tmp_path):
    variable = "MOREH_ADVANCED_PARALLELIZATION_DETAILED_LOG"
    to_file = run(**{variable: "2"})
    number = int(re.search(r"number of candidates is (\d+)", to_file.stderr)[1])
    table = (tmp_path / "autoconfig_log.dump").read_text().splitlines()
    assert len(table) == number and any("step : " in line and "memory : " in line for line in table)
    assert "dropped : " in "".join(table)


def test_stages_that_are_chosen_are_run_and_found_again(run):
    plain = losses(run(device="cpu", script=STAGED, MOAI_CUDA="0"))
    for _ in range(2):
        done = run(script=STAGED)
        assert losses(done) == pytest.approx(plain, rel=1e-10)
        (line,) = [line for line in said(done) if line.startswith("num_stages")]
        assert line.startswith("num_stages : 2, num_micro_batches : 2, batch_per_device : 4, No TP, dp : 1, ")
        assert sum(map(int, line.partition("layers : ")[2].split("+"))) == 4


def test_an_evaluation_before_the_first_step_keeps_no_stages_away(run):
    evaluated = (
        "with torch.no_grad(): print(model(torch.ones(8, 64, dtype=torch.float64).to(sys.argv[1])).sum().item())"
    )
    script = STAGED.replace("for _ in range(4):", f"{evaluated}\nfor _ in range(4):")
    done = run(script=script)
    assert losses(done) == pytest.approx(losses(run(device="cpu", script=script, MOAI_CUDA="0")), rel=1e-10)
    assert any(line.startswith("num_stages : 2") for line in said(done))
