"""`moai plan`: what is asked, and what is shown."""

import json
import os

import pytest
from rich.console import Console

from moai.cli import app
from moai.cli.plan import choosing, figures, page, report, schedule
from moai.cli.plan.arguments import separated
from moai.cli.plan.choosing import Chosen
from moai.cli.plan.request import Target, of, others
from moai.dry.session import Captured
from moai.graph.step_graph import StepGraph
from moai.plan import cluster_file
from moai.plan.plan import Plan
from moai.plan.prediction import Parts, Prediction, Stage
from moai.plan.profile import Profile, Profiled
from moai.plan.schedule import order
from moai.plan.search import Candidate, Choice
from moai.plan.timings import Described
from moai.plan.work import Memory
from moai.planning.budget import budget
from moai.profiling import store

GIB = 2**30
CLUSTER = cluster_file.load("mi250")
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


# ---------------------------------------------------------------- whose an argument is


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("train.py --lr 1", "-- train.py --lr 1"),
        ("train.py --lr 1 --flavor F", "--flavor F -- train.py --lr 1"),
        ("--flavor F train.py --lr 1 --json", "--flavor F --json -- train.py --lr 1"),
        ("train.py --batch-size 8 --model m --set tp=2", "--set tp=2 -- train.py --batch-size 8 --model m"),
        ("train.py --set=tp=2 x", "--set=tp=2 -- train.py x"),
        ("--set tp=2 -- train.py --json --flavor F", "--set tp=2 -- train.py --json --flavor F"),
        ("train.py --lr 1 -- --json", "-- train.py --lr 1 --json"),
        ("--model m --batch-size 8", "--model m --batch-size 8 --"),
        ("--nonsense train.py", "--nonsense -- train.py"),
        ("train.py --flavor", "--flavor -- train.py"),
    ],
)
def test_our_options_are_ours_behind_the_script_too(typed, expected):
    takes_value = {"--flavor": True, "--set": True, "--json": False, "--model": True, "--batch-size": True}
    assert " ".join(separated(typed.split(), takes_value, {"--model", "--batch-size"})) == expected


# ---------------------------------------------------------------- what cannot be


@pytest.fixture
def refused(home, capsys, monkeypatch):
    """What `moai plan` says instead of running anything."""
    monkeypatch.chdir(home)
    (home / "train.py").write_text("raise AssertionError('this ran')")
    (home / "broken.toml").write_text("nodes = [")

    def run(*arguments, status=1):
        assert app.main(["plan", *arguments]) == status
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    return run


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nosuch.py"], "nosuch.py: there is no such file"),
        (["train.py", "--flavor", "Gigantic"], 'no flavor "Gigantic"'),
        (["train.py", "--cluster", "h1000"], 'no cluster "h1000"'),
        (["train.py", "--cluster", "broken.toml"], "broken.toml is not valid TOML"),
        (["train.py", "--cluster", "h100", "--flavor", "Small.64GB"], "give one of them"),
        (["train.py", "--cluster", "h100", "--set", "tp=3"], "tp=3 does not divide the 8 devices"),
        (["train.py", "--cluster", "h100", "--set", "tpp=2"], "did you mean tp?"),
        (["train.py", "--cluster", "h100", "--set", "tp=2", "--set", "tp=4"], "tp is given twice"),
        (["train.py", "--cluster", "h100", "--set", "shard=2"], "not searched for"),
        (["train.py", "--cluster", "h100", "--why", "recompute=ful"], "did you mean full?"),
        (["train.py", "--cluster", "h100", "--html", "nowhere/plan.html"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_before_the_script_runs(refused, arguments, part):
    assert part in refused(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train.py", "--timeout", "0"],
        ["--model", "m", "train.py", "--batch-size", "8"],
        ["--model", "m", "--batch-size", "8"],
        ["--model", "m", "--batch-size", "0", "--block-size", "8"],
        ["--batch-size", "8", "train.py"],
        ["--nonsense", "train.py"],
    ],
)
def test_a_wrong_command_line_is_one_line(refused, arguments):
    assert refused(*arguments, status=2).endswith("See moai --help.\n")


@pytest.mark.parametrize("text", ["0", "101", "half", "-1"])
def test_a_ratio_that_is_no_percentage_is_refused(refused, monkeypatch, text):
    monkeypatch.setenv("MOREH_ADVANCED_PARALLELIZATION_MEMORY_USAGE_CORRECTION_RATIO", text)
    assert "percentage" in refused("train.py", "--cluster", "h100")


def test_a_script_that_takes_no_step_is_refused_with_its_reason(refused):
    assert "train.py failed before its first training step (line 1): AssertionError" in refused("train.py")


def test_a_plan_may_use_eighty_percent_of_a_device_or_what_the_variable_says():
    ratio = {"MOREH_ADVANCED_PARALLELIZATION_MEMORY_USAGE_CORRECTION_RATIO": "70"}
    memory = CLUSTER.device.memory_bytes
    assert (budget(memory, {}), budget(memory, ratio)) == (memory * 80 // 100, memory * 70 // 100)


def test_other_sizes_are_the_flavors_of_the_hardware_and_multiples_beyond(cluster):
    names = [each.name for each in others(Target("8xLarge.4096GB", CLUSTER, True, 0), {})]
    assert (names[0], names[12], names[-1]) == ("Small.64GB", "48xLarge.24576GB", "6144 x AMD Instinct MI250")
    assert [each.cluster.n_devices for each in others(Target("mi250:8", CLUSTER, False, 0), {})] == [16, 32, 64, 128]


def test_times_are_measured_ones_where_the_devices_were_profiled(home, monkeypatch):
    monkeypatch.setenv("MOAI_DEVICES", "2")
    here = of(None, None, None, [], None, None, dict(os.environ)).target
    assert len(here.devices) == 2 and isinstance(choosing.timings(here), Described)
    profile = Profile(store.hardware(here.devices), "", 1e-6, 0.1, {})
    monkeypatch.setattr(store, "find", lambda devices: profile)
    assert isinstance(choosing.timings(here), Profiled)
    assert isinstance(choosing.timings(Target("h100", CLUSTER, False, 0)), Described)


# ---------------------------------------------------------------- what is shown


def prediction(step_s=1.0, stages=1, **more):
    parts = Parts(**{"forward": 0.3 * step_s, "backward": 0.6 * step_s, "optimizer": 0.1 * step_s, **more})
    memory = Memory(1 * GIB, 2 * GIB, 3 * GIB, 4 * GIB, 0.5 * GIB)
    return Prediction(
        parts.total, parts, memory, (Stage(2, 0.3 * step_s, 0.6 * step_s, 0.2 * step_s, 0.1 * step_s, memory),) * stages
    )


BEST = Candidate(Plan(dp=8), prediction())
SLOWER = Candidate(Plan(dp=4, tp=2), prediction(tp_exposed=0.5))
STAGED = Candidate(Plan(dp=4, pp=2, micro=4, layers=(2, 2)), prediction(bubble=0.25))
DROPPED = [
    Candidate(Plan(dp=2, tp=4), dropped="slower: 3.5 s or more"),
    Candidate(Plan(dp=1, tp=8), dropped="slower: 4.25 s or more"),
    Candidate(Plan(dp=8, micro=2), prediction(), dropped="memory: 75.5 GiB"),
]


def chosen(alternative=None, best=BEST):
    choice = Choice(best, (best, STAGED, SLOWER, *DROPPED), CLUSTER, 12 * GIB, 64, 4096, 0.5)
    empty = StepGraph((), (), (), (), 0)
    target = Target("xLarge.512GB", CLUSTER, True, 12 * GIB)
    return Chosen(choice, target, Captured(empty, 1, None), "Small.64GB", alternative)


def shown(of):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(report.screen(of))
    return captured.get()


def test_the_screen_has_the_plan_its_step_and_its_memory():
    text = shown(chosen())
    parts = ["8 x AMD Instinct MI250", "Plan       dp=8", "1.00 s predicted, 4,096 tokens/s", "10.50 GiB of 12.00 GiB"]
    parts += ["the smallest that fits is Small.64GB", "optimizer states", "25.0%"]
    assert all(part in text for part in parts)


def test_the_screen_says_why_others_are_behind():
    lines = shown(chosen()).splitlines()
    slower = next(line for line in lines if "dp=4,tp=2 " in line)
    staged = next(line for line in lines if "pp=2" in line)
    assert "+50.0%" in slower and "waiting for messages within layers +500 ms" in slower
    assert "layers=2+2" in staged and "waiting for other stages +250 ms" in staged


def test_reasons_that_differ_in_numbers_alone_are_one():
    groups = [(reason, count) for reason, count, _ in figures.dropped(DROPPED)]
    assert groups == [("slower: 3.5 s or more", 2), ("memory: 75.5 GiB", 1)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0 us"), (1.5e-5, "15 us"), (0.00099999, "1 ms"), (0.25, "250 ms"), (0.99999, "1.00 s")),
        *((12.345, "12.35 s"), (99.999, "100 s"), (1234.5, "1,234 s")),
    ],
)
def test_times_are_said_in_the_unit_that_people_use(value, text):
    assert figures.seconds(value) == text


@pytest.mark.parametrize(
    ("asked", "verdict"),
    [
        (SLOWER, '"dp=4,tp=2", takes 1.50 times as long as the chosen one'),
        (STAGED, '"dp=4,pp=2,micro=4,layers=2+2", takes 1.25 times as long'),
        (DROPPED[2], "cannot be taken: memory: 75.5 GiB."),
        (DROPPED[0], "cannot be taken: slower: 3.5 s or more."),
        (BEST, "is the chosen one"),
    ],
)
def test_why_says_what_another_plan_would_have_cost(asked, verdict):
    assert verdict in shown(chosen(asked))


def test_why_sets_the_parts_beside_those_of_the_chosen_plan():
    line = next(
        x for x in shown(chosen(SLOWER)).splitlines() if "within layers" in x and "chosen" not in x and "=" not in x
    )
    assert line.split()[-6:] == ["0", "us", "500", "ms", "+500", "ms"]


def test_json_has_the_plan_what_is_predicted_and_all_candidates():
    found = json.loads(json.dumps(report.as_json(chosen(SLOWER))))
    assert (found["plan"]["dp"], found["plan"]["text"], found["search_s"]) == (8, "dp=8", 0.5)
    predicted = found["predicted"]
    assert (predicted["step_s"], predicted["tokens_per_s"]) == pytest.approx((1.0, 4096))
    assert predicted["peak_bytes"] == 10.5 * GIB
    assert sum(predicted["breakdown"]["seconds"].values()) == pytest.approx(1.0)
    assert sum(predicted["breakdown"]["bytes"].values()) == 10.5 * GIB
    assert found["candidates"][3]["predicted"] is None and found["why"]["plan"]["tp"] == 2


# ---------------------------------------------------------------- the page


def test_the_page_needs_nothing_else(tmp_path):
    file = tmp_path / "plan.html"
    file.write_text("older")
    page.write(chosen(), file)
    text = file.read_text()
    assert text.startswith("<!DOCTYPE html>") and text.endswith("</body></html>\n")
    assert not any(outside in text for outside in ("http", "<script", "src=", "@import", "<link"))
    assert text.count("<svg") == 2 and 'class="budget"' in text and "devices 0-7" in text
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]


def test_a_page_that_cannot_be_finished_leaves_the_older_one(tmp_path, monkeypatch):
    file = tmp_path / "plan.html"
    file.write_text("older")
    monkeypatch.setattr(page, "page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page.write(chosen(), file)
    assert file.read_text() == "older" and len(list(tmp_path.iterdir())) == 1


def test_a_step_of_many_micro_batches_is_drawn_in_part():
    best = Candidate(Plan(dp=8, micro=4096), prediction())
    text = page.page(chosen(best=best))
    assert "of its 4096 micro-batches" in text and len(text) < 2_000_000


@pytest.mark.parametrize(("stages", "micro"), [(1, 1), (1, 4), (2, 4), (4, 4), (4, 13)])
def test_stages_of_one_length_take_what_the_prediction_says(stages, micro):
    rows = schedule.lanes(prediction(stages=stages), Plan(pp=stages, micro=micro))
    end = max(lane.spans[-1].end for lane in rows)
    assert end == pytest.approx((micro + stages - 1) * 0.9 + 0.1)
    for lane in rows:
        assert all(a.end <= b.begin + 1e-12 for a, b in zip(lane.spans, lane.spans[1:], strict=False))


@pytest.mark.parametrize("kind", ["1f1b", "gpipe", "zero_bubble"])
def test_stages_are_drawn_in_the_order_in_which_they_will_work(kind):
    plan, parts = Plan(pp=4, micro=6, schedule=kind, layers=(2, 2, 2, 2)), ("forward", "backward", "weights")
    for lane in schedule.lanes(prediction(stages=4), plan):
        drawn = [(parts.index(each.kind), each.micro) for each in lane.passes]
        assert tuple(drawn) == order(kind, lane.stage, 4, 6)
    text = page.page(chosen(best=Candidate(plan, prediction(stages=4))))
    assert all(f"device {k}: 2 layers" in text for k in range(4)) and "waiting for other stages</p>" in text
    assert text.count("<title>forward of micro-batch 6,") == 4


def test_a_device_with_several_stages_is_drawn_with_all_of_them():
    plan = Plan(pp=2, micro=4, schedule="interleaved", layers=(2, 2, 1, 3))
    found = prediction(stages=4)
    first, second = schedule.lanes(found, plan)
    assert [each.kind for each in first.passes].count("forward") == 2 * 4
    assert second.passes[0].begin == pytest.approx(first.passes[0].end)
    text = page.page(chosen(best=Candidate(plan, found)))
    assert "device 0: 3 layers" in text and "device 1: 5 layers" in text


@pytest.mark.parametrize(("stages", "micro"), [(1, 1), (1, 4), (4, 8)])
@pytest.mark.parametrize("more", [{"recompute": 0.2}, {"forward": 0.0}])
def test_the_highest_point_of_the_curve_is_the_predicted_peak(stages, micro, more):
    plan, found = Plan(pp=stages, micro=micro), prediction(stages=stages, **more)
    for lane in schedule.lanes(found, plan):
        curve = schedule.held(found, lane)
        assert max(level for _, level in curve) == pytest.approx(found.memory.total)
        assert [at for at, _ in curve] == sorted(at for at, _ in curve)


# ---------------------------------------------------------------- from the beginning to the end


@pytest.fixture
def model(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (home / "config.json").write_text(json.dumps(TINY))
    return ["--model", "config.json", "--batch-size", "8", "--block-size", "16"]


def test_a_model_is_planned_from_its_config(model, home, says):
    out = says(app.main, "plan", *model, "--cluster", "h100:4", "--json", "--html", "plan.html", "--why", "tp=2")
    found = json.loads(out)
    plan = found["plan"]
    assert (plan["dp"] * plan["tp"] * plan["pp"], found["devices"], found["tokens"]) == (4, 4, 128)
    assert found["predicted"]["peak_bytes"] <= found["budget_bytes"]
    assert found["why"]["plan"]["tp"] == 2
    assert (home / "plan.html").read_text().count("<svg") == 2


def test_what_is_set_is_kept(model, says):
    out = says(app.main, "plan", *model, "--cluster", "h100:4", "--json", "--set", "tp=2", "--set", "recompute=full")
    found = json.loads(out)
    assert (found["plan"]["tp"], found["plan"]["recompute"]) == (2, "full")
    assert {c["plan"]["tp"] for c in found["candidates"]} == {2}


def test_a_model_that_fits_nowhere_is_refused_with_what_it_needs(model, home, capsys):
    text = cluster_file.SHIPPED.joinpath("mi250.toml").read_text()
    small = text.replace("memory_gib = 63.98", "memory_gib = 0.02").replace(
        "devices_per_node = 8", "devices_per_node = 1"
    )
    (home / "small.toml").write_text(small)
    big = [*model[:2], "--batch-size", "512", "--block-size", "64"]
    assert app.main(["plan", *big, "--cluster", "small.toml", "--set", "micro=1"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "No plan fits" in err and "needs the least memory" in err
    assert "The smallest size that would do: " in err


def test_a_script_is_planned_with_our_options_behind_its_own(home, monkeypatch, says):
    monkeypatch.chdir(home)
    (home / "train.py").write_text(
        "import sys, torch\n"
        "assert sys.argv[1:] == ['--batch-size', '64'], sys.argv\n"
        "torch.moreh.option.enable_advanced_parallelization(num_micro_batches=2)\n"
        "print('noise')\n"
        "model = torch.nn.Linear(256, 256).cuda()\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "model(torch.ones(64, 256).cuda()).sum().backward()\n"
        "optimizer.step()\n"
    )
    out = says(app.main, "plan", "train.py", "--batch-size", "64", "--flavor", "Medium.128GB", "--json")
    found = json.loads(out)
    assert (found["target"], found["devices"], found["plan"]["micro"]) == ("Medium.128GB", 2, 2)
    assert found["smallest_flavor"] == "Small.64GB"
