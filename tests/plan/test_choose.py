"""Which plan a process runs: MOAI_PLAN, the script's options, or the usual one."""

import pytest

from moai.plan.choose import choose
from moai.plan.errors import PlanError
from moai.plan.options import Options
from moai.plan.plan import Plan
from moai.plan.space import Allowed


def chosen(forced=None, bf16=False, **options):
    return choose(4, forced, Options(**options) if options else None, lambda: bf16)


def test_without_a_wish_the_devices_share_the_batch():
    choice = choose(4, None, None, pytest.fail)
    assert (choice.plan, choice.asked_for, choice.notes) == (Plan(dp=4), False, ())


def test_options_leave_the_plan_to_a_search_when_the_step_is_known():
    choice = chosen(num_stages="auto")
    assert (choice.plan, choice.allowed) == (Plan(dp=4), Allowed())


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"num_micro_batches": 8}, Allowed(micro=8)),
        ({"activation_recomputation": True}, Allowed(recompute=("default", "full"))),
        ({"activation_recomputation": False}, Allowed(recompute=("none",))),
        ({"distribute_parameter": True}, Allowed(distribute_param=True)),
        ({"distribute_parameter": False}, Allowed(distribute_param=False)),
        ({"num_stages": 4}, Allowed(most_stages=4)),
        ({"pipeline_parallel": False}, Allowed(most_stages=1)),
    ],
)
def test_each_option_restricts_the_search(options, allowed):
    assert chosen(**options).allowed == allowed


def test_mixed_precision_is_bf16_where_that_is_faster_and_the_log_says_so():
    choice = chosen(bf16=True, mixed_precision=True)
    assert choice.plan.precision == "bf16"
    assert "computed in bf16" in choice.notes[0]


def test_mixed_precision_where_bf16_is_no_faster_has_no_effect_and_the_log_says_so():
    choice = chosen(bf16=False, mixed_precision=True)
    assert choice.plan.precision is None
    assert "no effect" in choice.notes[0]


def test_without_mixed_precision_the_script_decides():
    choice = chosen(bf16=True, mixed_precision=False)
    assert (choice.plan.precision, choice.notes) == (None, ())


def test_a_forced_plan_wins_and_the_log_names_the_options_that_say_otherwise():
    choice = chosen(
        "tp=2,micro=2", num_micro_batches=8, activation_recomputation=False, distribute_parameter=True, bf16=True
    )
    assert choice.plan == Plan(2, 2, micro=2)
    (note,) = choice.notes
    assert note.startswith("MOAI_PLAN is followed")
    assert note.endswith(": num_micro_batches=8, distribute_parameter=True, mixed_precision=True.")


def test_a_forced_plan_that_agrees_with_the_options_needs_no_words():
    assert chosen("micro=8,recompute=default", num_micro_batches=8, activation_recomputation=True).notes == ()
    assert chosen("micro=8,distribute_param=true", num_stages=2).notes == ()


def test_a_forced_plan_that_cannot_be_is_refused_whatever_the_options():
    with pytest.raises(PlanError, match="MOAI_PLAN"):
        chosen("dp=3", num_micro_batches=2)


def test_an_error_can_say_who_asked_for_the_plan():
    assert chosen("tp=2").origin == 'MOAI_PLAN="tp=2"'
    assert "torch.moreh.option" in chosen(num_micro_batches=2).origin
    assert chosen().origin == 'The plan "dp=4"'


def test_a_forced_plan_with_fewer_micro_batches_than_stages_is_followed_with_a_warning():
    choice = chosen("pp=4,micro=2")
    assert choice.plan == Plan(pp=4, micro=2)
    assert choice.warning.startswith("There are fewer micro-batches (2) than stages (4)")
    assert not chosen("pp=4,micro=4").warning


@pytest.mark.parametrize("options", [{"num_stages": 2}, {"pipeline_parallel": False}])
def test_forced_stages_beyond_those_of_the_options_are_named_in_the_log(options):
    (note,) = chosen("pp=4,micro=4", mixed_precision=False, **options).notes
    assert next(iter(options)) in note
    assert not chosen("dp=4", mixed_precision=False, **options).notes
