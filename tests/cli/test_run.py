"""`moai run`: a script on the accelerator, as Python would run it."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from moai.cli import app

TIMEOUT = 100
MOAI = (sys.executable, "-m", "moai.cli.app")
TELL = """
import json, os, sys
names = ("MOAI_PLAN", "MOAI_CUDA", "TORCH_DEVICE_BACKEND_AUTOLOAD")
print(json.dumps({"argv": sys.argv, "name": __name__, **{name: os.environ.get(name) for name in names}}))
"""


@pytest.fixture(autouse=True)
def folder(home, monkeypatch):
    """The current folder, of a user with an accelerator of two devices and no plan."""
    monkeypatch.chdir(home)
    monkeypatch.delenv("MOAI_PLAN", raising=False)
    monkeypatch.setenv("MOAI_DEVICES", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (home / "tell.py").write_text(TELL)
    return home


def run(*arguments, **variables):
    command = [*MOAI, "run", *map(str, arguments)]
    env = {**os.environ, **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)


def told(*arguments, **variables):
    """What the script finds, having been started with `moai run` and these arguments."""
    done = run(*arguments, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def refused(capsys, *arguments):
    """What `moai run` says instead of starting anything."""
    assert app.main(["run", *map(str, arguments)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err.partition(": ")[2].rstrip("\n")


# ---------------------------------------------------------------- what the script gets


def test_the_script_is_main_and_gets_its_arguments():
    found = told("tell.py", "a b", "", "ü")
    assert (found["argv"], found["name"]) == (["tell.py", "a b", "", "ü"], "__main__")


def test_arguments_that_look_like_options_are_the_scripts():
    arguments = ["--plan", "x", "--help", "-m", "--", "--lr=1e-3"]
    assert told("--plan", "dp=2", "tell.py", *arguments)["argv"] == ["tell.py", *arguments]


def test_the_script_may_stand_behind_two_dashes():
    assert told("--", "tell.py", "--x")["argv"] == ["tell.py", "--x"]


def test_a_module_is_run_as_python_does(folder):
    assert told("-m", "tell", "--lr", "3")["argv"] == [str(folder / "tell.py"), "--lr", "3"]


def test_a_folder_with_a_main_is_a_script(folder):
    (folder / "app").mkdir()
    (folder / "app" / "__main__.py").write_text(TELL)
    assert told("app", "x")["argv"] == ["app", "x"]


def test_import_torch_alone_brings_the_accelerator(folder):
    (folder / "script.py").write_text("import torch; print(torch.ones(2, device='cuda').device)")
    done = run("script.py", MOAI_DEVICES="", MOAI_CUDA="0", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert (done.stdout, done.stderr) == ("cuda:0\n", "")


# ---------------------------------------------------------------- the plan


def test_the_plan_reaches_the_script():
    assert told("--plan", "dp=1,tp=2", "tell.py")["MOAI_PLAN"] == "dp=1,tp=2"


def test_the_environments_plan_is_kept_and_that_of_the_command_line_wins():
    assert told("tell.py", MOAI_PLAN="dp=2,micro=2")["MOAI_PLAN"] == "dp=2,micro=2"
    assert told("--plan", "tp=2", "tell.py", MOAI_PLAN="dp=2,micro=2")["MOAI_PLAN"] == "tp=2"


def test_without_a_plan_there_is_none():
    assert told("tell.py")["MOAI_PLAN"] is None


def test_a_plan_that_cannot_be_is_refused_before_the_script_starts(capsys):
    assert refused(capsys, "--plan", "dp=3", "tell.py") == (
        '--plan="dp=3": dp=3 is 3 devices, but the accelerator has 2. The nearest plan that is possible: "dp=2".'
    )


def test_the_message_says_if_the_plan_is_the_environments(capsys, monkeypatch):
    monkeypatch.setenv("MOAI_PLAN", "micor=2")
    assert refused(capsys, "tell.py").startswith('MOAI_PLAN="micor=2": there is no key "micor" (did you mean micro?)')


# ---------------------------------------------------------------- how it ends


@pytest.mark.parametrize(("ending", "status"), [("sys.exit(7)", 7), ("sys.exit('no')", 1), ("1 / 0", 1), ("", 0)])
def test_the_exit_status_is_the_scripts(folder, ending, status):
    (folder / "script.py").write_text(f"import sys\n{ending}\n")
    assert run("script.py").returncode == status


def test_a_signal_reaches_the_script_itself(folder):
    (folder / "script.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    assert run("script.py").returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("script", "reason"),
    [("nope.py", "nope.py: there is no such file."), (".", ". is a folder without a __main__.py.")],
)
def test_what_is_no_script_is_refused_in_one_line(capsys, script, reason):
    assert refused(capsys, script) == reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_script_without_permission_to_read_is_refused_in_one_line(capsys, folder):
    (folder / "tell.py").chmod(0)
    assert refused(capsys, "tell.py") == "tell.py cannot be read: no permission."


@pytest.mark.parametrize("arguments", [[], ["--plan"], ["--plann", "dp=2", "tell.py"]])
def test_a_wrong_command_line_is_one_line(capsys, arguments):
    assert app.main(["run", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------- with a model

TRAIN = """
import sys, torch
if "--options" in sys.argv:
    torch.moreh.option.enable_advanced_parallelization(num_micro_batches=2, mixed_precision=False)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)).double().to(sys.argv[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(3):
    x, y = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    loss = torch.nn.functional.mse_loss(model(x.to(sys.argv[1])), y.to(sys.argv[1]))
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    print(loss.item())
"""
PLAN_LINE = re.compile(r"\] \[info\] ((?:No PP|num_stages).*)")


@pytest.fixture
def train(folder):
    (folder / "train.py").write_text(TRAIN)


def losses(done):
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.split()]


def plan_lines(done):
    return PLAN_LINE.findall(done.stderr)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The losses of plain PyTorch."""
    script = tmp_path_factory.mktemp("reference") / "train.py"
    script.write_text(TRAIN)
    env = {**os.environ, "MOAI_CUDA": "0"}
    command = [sys.executable, script, "cpu"]
    return losses(subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT))


@pytest.mark.parametrize(
    "plan",
    [
        "tp=2",
        "dp=2,micro=4,recompute=full",
        *(
            pytest.param(p, marks=pytest.mark.slow)
            for p in ("dp=2", "dp=2,micro=2", "dp=2,distribute_param=true", "tp=2,micro=2")
        ),
    ],
)
def test_a_forced_plan_gives_the_losses_of_one_device_and_is_logged_once(train, reference, plan):
    done = run("--plan", plan, "train.py", "cuda")
    assert losses(done) == pytest.approx(reference, rel=1e-10)
    (line,) = plan_lines(done)
    assert ("No TP" not in line) == ("tp=2" in plan)


def test_moai_plan_alone_does_the_same_for_plain_python(train, reference):
    env = {**os.environ, "MOAI_PLAN": "tp=2,micro=2", "MOAI_DEVICES": "", "MOAI_FLAVOR": "Medium"}
    command = [sys.executable, "train.py", "cuda"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    assert losses(done) == pytest.approx(reference, rel=1e-10)
    assert plan_lines(done)[0].startswith("No PP, tp : 2, dp : 1, num_micro_batches : 2, ")


def test_the_scripts_options_choose_the_plan(train, reference):
    done = run("train.py", "cuda", "--options")
    assert losses(done) == pytest.approx(reference, rel=1e-10)
    assert plan_lines(done)[0].startswith("No PP, No TP, dp : 2, num_micro_batches : 2, ")


def test_the_log_says_that_a_forced_plan_overrides_the_scripts_options(train):
    done = run("--plan", "dp=2", "train.py", "cuda", "--options")
    assert plan_lines(done)[0].startswith("No PP, No TP, dp : 2, num_micro_batches : 1, ")
    assert "MOAI_PLAN is followed, and not what the script asks for: num_micro_batches=2." in done.stderr


def test_options_that_come_after_the_first_step_are_said_to_change_nothing(folder):
    (folder / "late.py").write_text(
        "import torch\n"
        "x = torch.ones(600, 600).cuda()\n"
        "print((x @ x).sum().item())\n"
        "torch.moreh.option.enable_advanced_parallelization(num_micro_batches=2)\n"
        "print((x @ x @ x).sum().item())\n"
        "print((x @ x + x).sum().item())\n"
    )
    done = run("late.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("come after the first step: they do not change its plan.") == 1
    assert plan_lines(done) == []


def test_the_list_of_jobs_has_the_plan(train, capsys):
    losses(run("--plan", "dp=2,micro=2", "train.py", "cuda"))
    assert app.main(["jobs", "--json"]) == 0
    (job,) = json.loads(capsys.readouterr().out)
    assert job["plan"].startswith("No PP, No TP, dp : 2, num_micro_batches : 2, ")
    assert job["command"].endswith("train.py cuda")


def test_a_batch_too_small_for_the_plan_is_one_message_with_the_nearest(train):
    done = run("--plan", "dp=2,micro=5", "train.py", "cuda")
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert 'MOAI_PLAN="dp=2,micro=5"' in last
    assert last.endswith('The nearest plan that is possible: "dp=2,micro=4".')
    assert f"{os.sep}moai{os.sep}" not in done.stderr, "the error shows the platform's own files"


def test_a_plan_that_cannot_be_is_refused_at_the_first_use_of_the_device(train):
    env = {**os.environ, "MOAI_PLAN": "dp=3"}
    command = [sys.executable, "train.py", "cuda"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 1
    assert done.stderr.endswith('The nearest plan that is possible: "dp=2".\n')
    assert f"{os.sep}moai{os.sep}" not in done.stderr, "the error shows the platform's own files"


LARGE = """
import torch
layers = [torch.nn.Linear(1448, 1448, bias=False) for _ in range(8)]
model = torch.nn.Sequential(*layers).cuda()  # 64 MiB, of gradients and AdamW's states as much each
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(2):
    model(torch.ones(4, 1448).cuda()).sum().backward()
    optimizer.step(); optimizer.zero_grad()
print(model[0].weight.sum().item())
"""


def test_a_step_that_does_not_fit_is_told_a_plan_with_which_it_does(folder):
    (folder / "large.py").write_text(LARGE)
    (folder / "flavors.toml").write_text('[[flavor]]\nname = "Tiny"\ndevices = 2\nmemory_mib = 250\n')
    environ = {"MOAI_DEVICES": "", "MOAI_FLAVOR": "Tiny", "MOAI_CONFIG": str(folder / "flavors.toml")}
    failed = run("large.py", **environ)
    assert failed.returncode == 1
    assert "OUT_OF_MEMORY" in failed.stderr
    (plan,) = re.findall(r'3\. Use the plan .*: MOAI_PLAN="(.*)"\.', failed.stderr)
    assert run("--plan", plan, "large.py", **environ).returncode == 0
