"""The text of a forced plan: what it says, and what is said about mistakes."""

import pytest
from hypothesis import given, settings

from moai.plan.errors import PlanError
from moai.plan.parse import parse
from moai.plan.plan import Plan
from tests.plan.plans import possible


def refusal(text, n_devices=4, source="--plan"):
    """(what is wrong, the text of the nearest plan) for a `text` that is refused."""
    with pytest.raises(PlanError) as caught:
        parse(text, n_devices, source)
    start = f'{source}="{text}": '
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith(f'. The nearest plan that is possible: "{caught.value.nearest}".')
    return caught.value.reason.removeprefix(start), str(caught.value.nearest)


def test_every_key_is_read():
    text = "dp=4,tp=2,pp=1,micro=3,recompute=full,distribute_param=true,distribute_low_prec_param=true,precision=bf16"
    assert parse(f"{text},shard=2", 8) == Plan(4, 2, 1, 3, "full", True, True, "bf16", 2)


@settings(deadline=None)
@given(possible())
def test_the_text_of_a_plan_is_read_as_that_plan(plan):
    assert parse(str(plan), plan.n_devices) == plan


def test_the_text_of_a_plan_has_dp_and_what_is_not_as_usual():
    assert str(Plan()) == "dp=1"
    assert str(Plan(2, micro=4, distribute_param=True)) == "dp=2,micro=4,distribute_param=true"


def test_what_is_left_out_is_as_usual():
    assert parse("dp=4", 4) == Plan(dp=4)


@pytest.mark.parametrize(("text", "dp"), [("micro=2", 8), ("tp=2", 4), ("tp=8", 1)])
def test_without_dp_it_is_what_remains_of_the_devices(text, dp):
    assert parse(text, 8).dp == dp


def test_spaces_and_capitals_do_not_count():
    assert parse(" DP = 2 , distribute_param=True ", 2) == Plan(2, distribute_param=True)


@pytest.mark.parametrize(
    ("text", "reason", "nearest"),
    [
        ("micor=4", 'there is no key "micor" (did you mean micro?)', "dp=4,micro=4"),
        ("dpp=4", 'there is no key "dpp" (did you mean dp?)', "dp=4"),
        ("recompute=ful", "recompute cannot be ful (did you mean full?)", "dp=4,recompute=full"),
        ("recompute=yes", "recompute cannot be yes (there are none, default, full)", "dp=4"),
        ("precision=fp16", "precision cannot be fp16 (there are fp32, bf16, fp64)", "dp=4"),
        ("distribute_param=", "distribute_param cannot be nothing (there are true, false)", "dp=4"),
        ("dp=2,tp=2,dp=2", "dp is given twice", "dp=2,tp=2"),
        ("tp=2,micro", '"micro" is not of the form KEY=VALUE', "dp=2,tp=2"),
        ("tp=2,,micro=2", "a KEY=VALUE is missing", "dp=2,tp=2,micro=2"),
        ("", "a KEY=VALUE is missing", "dp=4"),
        ("micro=0", "micro must be a whole number, 1 or more, not 0", "dp=4"),
        ("micro=-1,tp=2", "micro must be a whole number, 1 or more, not -1", "dp=2,tp=2"),
        ("micro=1.5", "micro must be a whole number, 1 or more, not 1.5", "dp=4"),
        ("pp=2,layers=3+x", "layers must be a number for each stage, with + between, not 3+x", "dp=2,pp=2"),
        ("micro=4_0", "micro must be a whole number, 1 or more, not 4_0", "dp=4"),
    ],
)
def test_a_mistake_is_told_with_the_plan_that_was_meant(text, reason, nearest):
    assert refusal(text) == (f"{reason}.", nearest)


def test_an_unknown_key_is_told_which_there_are():
    reason, _ = refusal("batch=4")
    for key in ("dp", "tp", "pp", "micro", "recompute", "distribute_param", "distribute_low_prec_param", "shard"):
        assert key in reason


def test_several_mistakes_are_one_message():
    reason, nearest = refusal("dp=x,micor=2,recompute=full")
    assert "dp must be" in reason
    assert "micor" in reason
    assert nearest == "dp=4,micro=2,recompute=full"


@pytest.mark.parametrize(
    ("text", "reason", "nearest"),
    [
        ("dp=2,tp=3", "dp=2 times tp=3 is 6 devices, but the accelerator has 4", "dp=2,tp=2"),
        ("dp=3", "dp=3 is 3 devices, but the accelerator has 4", "dp=4"),
        ("dp=1", "dp=1 is 1 device, but the accelerator has 4", "dp=4"),
        ("tp=3", "tp=3 does not divide the 4 devices of the accelerator", "dp=1,tp=4"),
        ("tp=8", "tp=8 does not divide the 4 devices of the accelerator", "dp=1,tp=4"),
        ("pp=3,tp=2", "tp=2 times pp=3 does not divide the 4 devices of the accelerator", "dp=1,tp=2,pp=2"),
        ("dp=2,pp=4", "dp=2 times pp=4 is 8 devices, but the accelerator has 4", "dp=1,pp=4"),
    ],
)
def test_a_plan_for_other_devices_is_refused(text, reason, nearest):
    assert refusal(text) == (f"{reason}.", nearest)


@pytest.mark.parametrize(
    ("text", "reason", "nearest"),
    [
        (
            "distribute_low_prec_param=true",
            "distribute_low_prec_param=true needs distribute_param=true",
            "dp=4,distribute_param=true,distribute_low_prec_param=true",
        ),
        ("shard=2", "shard=2 needs distribute_param=true", "dp=4,distribute_param=true,shard=2"),
        ("pp=2,layers=1+2+1", "layers=1+2+1 must have a number for each of 2 stages", "dp=2,pp=2"),
        ("pp=4,layers=0+2+0+2", "layers=0+2+0+2 must have a number for each of 4 stages", "dp=1,pp=4"),
        ("shard=3,distribute_param=true", "shard=3 does not divide dp=4", "dp=4,distribute_param=true"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(text, reason, nearest):
    said, meant = refusal(text)
    assert said.startswith(reason)
    assert meant == nearest


def test_the_message_says_where_the_text_stands():
    refusal("dp=3", source="MOAI_PLAN")


def test_the_line_of_the_log_is_the_originals_with_our_keys_added():
    assert Plan(2).line() == (
        "No PP, No TP, dp : 2, num_micro_batches : 1, recomputation : none(0), distribute_param : false, "
        "distribute_low_prec_param : false"
    )
    assert Plan(4, 2, 1, 4, "full", True, False, "bf16", 2).line() == (
        "No PP, tp : 2, dp : 4, num_micro_batches : 4, recomputation : full(2), distribute_param : true, "
        "distribute_low_prec_param : false, precision : bf16, shard : 2"
    )


def test_interleaved_stages_have_two_chunks_a_device_if_no_more_are_asked_for():
    assert parse("pp=2,schedule=interleaved", 4) == Plan(2, pp=2, schedule="interleaved", chunks=2)
    assert parse("pp=2,schedule=interleaved,chunks=4", 4).n_stages == 8


def test_chunks_need_interleaved_stages():
    assert refusal("pp=2,chunks=3")[0] == "chunks=3 needs schedule=interleaved: it is how many stages a device has."
    assert refusal("pp=2,chunks=1,schedule=interleaved") == (
        "chunks must be 2 or more: with one stage a device, it is schedule=1f1b.",
        "dp=2,pp=2,schedule=interleaved",
    )
    assert refusal("dp=4,schedule=interleaved") == ("schedule=interleaved needs stages (pp=2 or more).", "dp=4")


def test_the_line_of_a_pipeline_begins_as_the_originals():
    plan = Plan(dp=4, pp=2, micro=16, layers=(15, 17))
    rest = "No TP, dp : 4, recomputation : none(0), distribute_param : false, distribute_low_prec_param : false"
    assert plan.line(256) == f"num_stages : 2, num_micro_batches : 16, batch_per_device : 4, {rest}, layers : 15+17"
    assert plan.line().startswith("num_stages : 2, num_micro_batches : 16, No TP")
