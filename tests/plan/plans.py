"""Hypothesis strategies for plans."""

from dataclasses import replace

from hypothesis import strategies as st

from moai.plan.plan import Plan

DEVICES = st.integers(1, 24)

wanted = st.builds(
    Plan,
    dp=st.integers(1, 24),
    tp=st.integers(1, 12),
    pp=st.integers(1, 3),
    micro=st.integers(1, 40),
    recompute=st.sampled_from(["none", "default", "full"]),
    distribute_param=st.booleans(),
    distribute_low_prec_param=st.booleans(),
    precision=st.sampled_from([None, "fp32", "bf16", "fp64"]),
    shard=st.none() | st.integers(1, 12),
)


@st.composite
def possible(draw):
    """A plan that some number of devices can run."""
    dp = draw(st.integers(1, 12))
    states = draw(st.sampled_from([(False, False), (True, False), (True, True)]))
    shard = draw(st.none() | st.sampled_from([n for n in range(1, dp + 1) if dp % n == 0])) if states[0] else None
    return replace(
        draw(wanted), dp=dp, pp=1, distribute_param=states[0], distribute_low_prec_param=states[1], shard=shard
    )
