"""A view's geometry over a dense base reads as a chain of invertible steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moai.capture.geometry import ViewStep, contiguous_stride, span, view_chain

LENGTHS = st.sampled_from([1, 2, 3, 4, 6])


def apply(base: torch.Tensor, steps: tuple[ViewStep, ...]) -> torch.Tensor:
    """The steps, done by torch."""
    x = base
    for step in steps:
        if step.kind == "slice":
            dim, start, end = step.args
            x = x.narrow(dim, start, end - start)
        else:
            x = getattr(x, step.kind)(*step.args)
        assert tuple(x.shape) == step.size
    return x


def chain(base: torch.Tensor, view: torch.Tensor) -> tuple[ViewStep, ...] | None:
    return view_chain(tuple(base.shape), base.stride(), tuple(view.shape), view.stride(), view.storage_offset())


@st.composite
def dense_bases(draw: st.DrawFn) -> torch.Tensor:
    """A tensor without gaps, its dims in any order in memory."""
    shape = draw(st.lists(LENGTHS, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    inverse = [order.index(d) for d in range(len(shape))]
    numel = torch.Size(shape).numel()
    return torch.arange(numel).reshape([shape[d] for d in order]).permute(inverse)


@st.composite
def bases_and_views(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    base = draw(dense_bases())
    view = base
    for kind in draw(st.lists(st.sampled_from(sorted(_VIEWS)), max_size=5)):
        dim = draw(st.integers(0, max(0, view.dim() - 1)))
        number = draw(st.integers(0, 5))
        if view.dim() or kind in ("unsqueeze", "expand"):
            view = _VIEWS[kind](view, dim, number)
    return base, view


_VIEWS = {
    "select": lambda x, dim, n: x.select(dim, n % x.size(dim)),
    "narrow": lambda x, dim, n: x.narrow(dim, n % x.size(dim), max(1, (x.size(dim) - n % x.size(dim)) // 2)),
    "transpose": lambda x, dim, n: x.transpose(dim, n % x.dim()),
    "unsqueeze": lambda x, dim, n: x.unsqueeze(dim),
    "expand": lambda x, dim, n: x.expand(n + 1, *x.shape),
    "every_second": lambda x, dim, n: x[(slice(None),) * dim + (slice(None, None, 2),)],
    "split_dim": lambda x, dim, n: x.unflatten(dim, (-1, 2)) if x.size(dim) % 2 == 0 else x,
    "flatten": lambda x, dim, n: x.view(-1) if x.is_contiguous() else x,
    "diagonal": lambda x, dim, n: x.diagonal() if x.dim() > 1 else x,
}


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(bases_and_views())
def test_a_chain_makes_the_view_out_of_the_base(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, view = pair
    steps = chain(base, view)
    if steps is not None:
        assert torch.equal(apply(base, steps), view)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(dense_bases(), st.data())
def test_what_attention_does_to_tensors_has_a_chain(base: torch.Tensor, data: st.DataObject) -> None:
    """Selects, contiguous slices, transposes and split dims: the views of every model."""
    view = base.contiguous()
    base = view
    for kind in data.draw(st.lists(st.sampled_from(["select", "narrow", "transpose", "unsqueeze"]), max_size=4)):
        if view.dim():
            view = _VIEWS[kind](view, data.draw(st.integers(0, view.dim() - 1)), data.draw(st.integers(0, 5)))
    assert chain(base, view) is not None


@pytest.mark.parametrize(
    ("shape", "view", "kinds"),
    [
        ((2, 5, 8), lambda x: x, []),
        ((2, 5, 8), lambda x: x[0], ["select"]),
        ((2, 5, 8), lambda x: x[:, -1], ["select"]),
        ((2, 6), lambda x: x[:, 1:], ["slice"]),
        ((4, 6), lambda x: x.t(), ["permute"]),
        ((10, 8), lambda x: x.view(2, 5, 8), ["reshape"]),
        ((2, 5, 8), lambda x: x.view(2, 5, 2, 4).transpose(1, 2), ["reshape", "permute"]),
        ((8,), lambda x: x[None, None].expand(3, 1, 8), ["reshape", "expand"]),
    ],
)
def test_a_common_view_is_as_few_steps_as_a_person_would_write(shape, view, kinds) -> None:
    base = torch.zeros(shape)
    assert [step.kind for step in chain(base, view(base))] == kinds


def test_overlapping_windows_have_no_chain() -> None:
    base = torch.arange(6)
    assert chain(base, base.unfold(0, 3, 1)) is None


def test_a_base_with_gaps_has_no_chain() -> None:
    assert view_chain((3,), (2,), (3,), (2,), 0) is None


def test_an_empty_view_has_no_chain() -> None:
    assert view_chain((4,), (1,), (0,), (1,), 4) is None


def test_span_counts_the_elements_from_the_first_to_the_last() -> None:
    assert span((3, 2), (4, 1)) == 10
    assert span((), ()) == 1
    assert span((3, 0), (1, 1)) == 0


def test_contiguous_strides_are_those_of_torch() -> None:
    for shape in ((), (3,), (2, 0, 3), (4, 1, 5)):
        assert contiguous_stride(shape) == torch.empty(shape).stride()


def test_a_part_of_a_sequence_seen_as_an_image_has_a_chain():
    """Patches behind a class token: 1 + 16 positions, of which the last 16 are 4 x 4."""
    base = torch.arange(2 * 17 * 3).reshape(2, 17, 3)
    view = base[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    steps = chain(base, view)
    assert steps is not None
    assert torch.equal(apply(base, steps), view)
