"""Regions compute again what moves fewer numbers than keeping it; never anything that may have changed since."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from moai.graph.placement import REPLICATE, Mesh
from moai.graph.step_graph import Ref, TensorType
from moai.lower.again import computing_again
from moai.lower.program import Instruction, Program, Slot
from moai.lower.regions import Region, regions

SQUARE = TensorType((4, 4), torch.float32)
X, Y = 0, 1  # what the program is given, and keeps
A, PRODUCT, LATER = 2, 4, 5


def op(name: str, outs: int | None, *args, frees: Sequence[int] = ()) -> Instruction:
    given = tuple(Ref(a) if type(a) is int else a for a in args)
    return Instruction(name, given, {}, outs, tuple(frees), ((4, 4),) if outs is not None else ())


def overwriting(id_: int, frees: Sequence[int] = ()) -> Instruction:
    """What no compiler fuses."""
    return Instruction("aten._foreach_neg_.default", ((Ref(id_),),), {}, None, tuple(frees))


def found(*code: Instruction, outputs: Sequence[int]) -> tuple[Region, ...]:
    slots = tuple(Slot(i, SQUARE, REPLICATE) for i in (X, Y))
    kept = tuple(Slot(o, SQUARE, REPLICATE) for o in outputs)
    program = Program("p", Mesh(()), slots, kept, 0, code, 0, 0)
    return computing_again(program, regions(program))


def two_regions(
    *between: Instruction, maker: str = "aten.silu.default", source: int = X, reader: str = "aten.mul.Tensor"
) -> tuple[Region, ...]:
    """The first makes A of `source`, the second reads it."""
    return found(
        op(maker, A, source),
        op("aten.mul.Tensor", 3, A, Y),
        op("aten.mm.default", PRODUCT, 3, Y, frees=(3,)),
        *between,
        op(reader, LATER, PRODUCT, A),
        op("aten.mul.Tensor", 6, LATER, X, frees=(LATER, PRODUCT, A)),
        outputs=[6],
    )


def test_what_only_a_later_region_reads_is_computed_there_again():
    first, second = two_regions()
    assert (first.outputs, second.again) == ((3,), (0,))
    assert second.inputs == (X, PRODUCT) and second.frees == (PRODUCT,)


def test_a_chain_is_computed_again_from_what_is_there():
    first, second = found(
        op("aten.permute.default", 7, X, (1, 0)),
        op("aten.exp.default", 8, 7, frees=(7,)),
        op("aten.neg.default", A, 8, frees=(8,)),
        op("aten.mul.Tensor", 3, A, Y),
        op("aten.mm.default", PRODUCT, 3, Y, frees=(3,)),
        op("aten.mul.Tensor", LATER, PRODUCT, A, frees=(PRODUCT, A)),
        op("aten.neg.default", 6, LATER, frees=(LATER,)),
        outputs=[6],
    )
    assert first.outputs == (3,) and second.again == (0, 1, 2)


def nothing_again(regions: Sequence[Region]) -> bool:
    return len(regions) == 2 and A in regions[0].outputs and not any(r.again for r in regions)


def test_what_others_read_is_kept():
    assert nothing_again(two_regions(op("aten.mm.default", None, A, Y)))


def test_sums_are_not_computed_again():
    assert nothing_again(two_regions(maker="aten.logsumexp.default"))


@pytest.mark.parametrize("overwritten", [X, A])
def test_what_has_been_overwritten_since_is_not_read_again(overwritten: int):
    assert nothing_again(two_regions(overwriting(overwritten)))


def test_what_is_overwritten_through_a_view_is_not_read_again():
    view = op("aten.view.default", 7, X, (4, 4))
    assert nothing_again(two_regions(view, overwriting(7, frees=(7,))))


def test_what_is_gone_is_not_read_again():
    regions = found(
        op("aten.mm.default", 7, X, Y),
        op("aten.silu.default", A, 7, frees=(7,)),
        op("aten.mul.Tensor", 3, A, Y),
        op("aten.mm.default", PRODUCT, 3, Y, frees=(3,)),
        op("aten.mul.Tensor", LATER, PRODUCT, A, frees=(PRODUCT, A)),
        op("aten.neg.default", 6, LATER, frees=(LATER,)),
        outputs=[6],
    )
    assert nothing_again(regions)


def test_what_the_reader_overwrites_is_still_its_own():
    first, second = found(
        op("aten.silu.default", A, X),
        op("aten.mul.Tensor", 3, A, Y),
        op("aten.mm.default", PRODUCT, 3, Y, frees=(3,)),
        op("aten.mul_.Tensor", None, A, PRODUCT, frees=(PRODUCT,)),
        op("aten.mul.Tensor", 6, A, X, frees=(A,)),
        outputs=[6],
    )
    assert first.outputs == (3,) and second.again == (0,)


def test_what_a_later_region_finds_overwritten_is_kept():
    """The second region leaves other numbers under the same name for the third."""
    first, *others = found(
        op("aten.silu.default", A, X),
        op("aten.mul.Tensor", 3, A, Y),
        op("aten.mm.default", PRODUCT, 3, Y, frees=(3,)),
        op("aten.mul_.Tensor", None, A, PRODUCT),
        op("aten.mul.Tensor", 6, A, X),
        op("aten.mm.default", 7, PRODUCT, 6, frees=(PRODUCT, 6)),
        op("aten.mul.Tensor", 8, A, X, frees=(A,)),
        op("aten.mul.Tensor", 9, 7, 8, frees=(7, 8)),
        outputs=[9],
    )
    assert A in first.outputs and not any(r.again for r in others)


def test_nothing_is_taken_along_into_another_pass():
    first, second = found(
        op("aten.silu.default", A, X),
        op("aten.mul.Tensor", 3, A, Y),
        Instruction("repeat", (), {}, None),
        op("aten.mul.Tensor", LATER, 3, A),
        op("aten.neg.default", 6, LATER, frees=(LATER,)),
        Instruction("collect", (Ref(6),), {}, 7, (6,)),
        Instruction("end_repeat", (), {}, None, (3, A)),
        outputs=[],
    )
    assert nothing_again((first, second))


def test_reading_two_tensors_instead_of_one_pays_only_if_they_are_read_anyway():
    def regions(also_read: int) -> tuple[Region, ...]:
        return found(
            op("aten.mm.default", 7, X, X),
            op("aten.mm.default", 8, Y, Y),
            op("aten.add.Tensor", A, 7, 8),
            op("aten.mul.Tensor", 3, A, Y),
            op("aten.mm.default", PRODUCT, 3, Y, frees=(3,)),
            op("aten.mul.Tensor", LATER, PRODUCT, A, frees=(PRODUCT, A)),
            op("aten.mul.Tensor", 6, LATER, also_read, frees=(LATER,)),
            op("aten.mm.default", 9, 7, 8, frees=(7, 8)),
            op("aten.mm.default", 10, 6, 9, frees=(6, 9)),
            outputs=[10],
        )

    assert nothing_again(regions(X))
    assert regions(7)[1].again == (2,)
