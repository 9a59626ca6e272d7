"""Which stage each unit is on, and where states live.

In: the step's code on the mesh of one stage, phases, and where states live already. Out: `Assignment`.

- What follows from numbers or data alone at little cost is on no stage: every stage that needs it makes it. What
  follows from states alone is made where these live, or from copies of them.
- The forward is cut in the script's order (`cut`), so its messages go up. A state lives where the forward reads it
  first.
- The backward is where what it reads of the forward is, and not above its gradients: its messages go down. Where it
  reads nothing of the forward (a bias's gradient is a sum), it is where the state lives that it is for.
- What is done with gradients is done where most of what it reads is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from moai.graph.step_graph import Phase, flat_ids
from moai.lower.operators import BUILTINS, is_view
from moai.lower.program import Instruction
from moai.lower.regions import is_fusable
from moai.lower.stages.cut import balanced, layers_of
from moai.lower.stages.effort import effort
from moai.lower.stages.following import following
from moai.lower.stages.units import Unit
from moai.lower.values import Values

# What a value is made of. "after" is what is made of gradients, or of states that live apart.
Kind = Literal["number", "data", "state", "forward", "backward", "after"]

# Entries of what is made on every stage that needs it, though it is neither a view nor element by element.
_SMALL = 4096
# What the step does not change is given to every stage that reads it: tables of positions and frequencies, masks. A
# weight is no such thing, so few entries may be floats.
_CONSTANT, _FLOATS = 1 << 22, 128
# The part of the states that a run of forward units must read to be cut for itself.
_SHARE = 0.25
_HANDED_ON = frozenset({"accumulate", "collect", "take", "join"})


@dataclass(frozen=True)
class Step:
    """What is to be cut. `data`, `states` and `passing` are the inputs, of which the last are activations or gradients
    of an earlier segment; `replaced` says of outputs which states they replace; `living` says of inputs on which
    devices they are already. `phases`: of values. The `stages` are dealt to `devices` in turns.
    `dealt`: how many layers each stage is to have (0: those that the others leave)."""

    code: Sequence[Instruction]
    units: Sequence[Unit]
    values: Values
    phases: Mapping[int, Phase]
    data: frozenset[int]
    states: frozenset[int]
    passing: frozenset[int]
    replaced: Mapping[int, int]
    living: Mapping[int, tuple[int, ...]]
    stages: int
    devices: int
    dealt: tuple[int, ...] | None = None

    @property
    def changed(self) -> frozenset[int]:
        """The states that the step replaces."""
        return frozenset(self.replaced.values())

    def device(self, stage: int) -> int:
        """The device that has `stage`."""
        return stage % self.devices


@dataclass
class Assignment:
    """`stage[k]`: of unit k; None: it is made wherever it is needed. `kinds`: of values. `home`: where a value is made,
    or a state lives; a state that no unit on a stage reads has none. `leaves`: the states that a value of kind "state"
    is made of. `dealt`: how many layers each stage has, where they are of one kind."""

    stage: list[int | None]
    kinds: dict[int, Kind]
    home: dict[int, int] = field(default_factory=dict)
    leaves: dict[int, frozenset[int]] = field(default_factory=dict)
    dealt: tuple[int, ...] | None = None

    def homes(self, id_: int) -> set[int]:
        """The stages that a value comes from: several, if it is made of states that live apart."""
        sources = self.leaves.get(id_, (id_,))
        return {self.home[i] for i in sources if i in self.home}


class NoCut(ValueError):
    """A step cannot be cut into so many stages. Its text says why; `most`: how many there can be, if that is known."""

    def __init__(self, reason: str, most: int = 1) -> None:
        super().__init__(reason)
        self.most = most


def assigned(step: Step) -> Assignment:
    """Raises NoCut."""
    walk = _Walk(step)
    walk.cut_forward()
    walk.place_all()
    return walk.found


class _Walk:
    def __init__(self, step: Step):
        self._step = step
        self._types = step.values.types
        self._changed = step.changed
        kinds: dict[int, Kind] = dict.fromkeys(step.data, "data")
        for id_ in step.states:
            kinds[id_] = "number" if self._is_constant(id_) else "state"
        backward = "backward" in step.phases.values()
        kinds.update(dict.fromkeys(step.passing, "forward" if backward or not self._changed else "after"))
        leaves = {i: frozenset((i,)) for i, kind in kinds.items() if kind == "state"}
        home = {i: stages[0] for i, stages in step.living.items()}
        self.found = Assignment([None] * len(step.units), kinds, home, leaves)
        self._unread = set(home)  # those of whose homes but the device is known
        self._there: dict[int, set[int]] = defaultdict(set)  # the stages that have read a value
        self._cut: dict[int, int] = {}
        self._aims: dict[int, int] = {}  # the stage of the state that a value is to change, entry by entry

    # -- kinds

    def _is_constant(self, id_: int) -> bool:
        type_ = self._types[id_]
        few = type_.numel <= (_FLOATS if type_.dtype.is_floating_point else _CONSTANT)
        return few and id_ not in self._changed and id_ not in self._step.living

    def _kind(self, unit: Unit) -> Kind:
        kinds = self.found.kinds
        read = {kinds[i] for i in unit.uses} - {"number"}
        instruction = self._step.code[unit.at]
        if instruction.op in _HANDED_ON:
            return kinds[unit.uses[0]]
        phase = self._phase(unit)
        if unit.in_loop:
            read -= {"after"}  # it has been made before the loop
        if not read:
            return "number"
        if read == {"data"}:
            return "data" if self._is_light(unit, instruction) else "forward"
        if read == {"state"}:
            return "state"
        if ("backward" in read and unit.in_loop) or phase == "backward":
            return "backward"
        if phase == "optimizer" or not read.isdisjoint(("backward", "after")):
            return "after"
        return "forward"

    def _phase(self, unit: Unit) -> Phase:
        return next((self._step.phases[o] for o in unit.outs if o in self._step.phases), "forward")

    def _is_entrywise(self, instruction: Instruction) -> bool:
        return instruction.op in BUILTINS or is_view(instruction.op) or is_fusable(instruction)

    def _is_light(self, unit: Unit, instruction: Instruction) -> bool:
        return self._is_entrywise(instruction) or all(self._types[o].numel <= _SMALL for o in unit.outs)

    def _note_kind(self, unit: Unit) -> Kind:
        found, kind = self.found, self._kind(unit)
        if kind == "state":
            leaves = frozenset().union(*(found.leaves.get(i, ()) for i in unit.uses))
            found.leaves.update(dict.fromkeys(unit.outs, leaves))
        found.kinds.update(dict.fromkeys(unit.outs, kind))
        return kind

    # -- the forward

    def cut_forward(self) -> None:
        """Cut every run of forward units that has states of its own; a state lives where it is read first."""
        kinds = [self._note_kind(unit) for unit in self._step.units]
        staged = [k for k, kind in enumerate(kinds) if kind in ("forward", "backward")]
        runs = [list(run) for kind, run in groupby(staged, lambda k: kinds[k]) if kind == "forward"]
        read = [sum(self._types[i].nbytes for i in self._states_of(run)) for run in runs]
        for run, nbytes in zip(runs, read, strict=True):
            if nbytes and nbytes >= _SHARE * max(read):
                begins = self._begins(run)
                self._cut.update((k, sum(begin <= place for begin in begins)) for place, k in enumerate(run))
                self._settle(run)
        self._aim()

    def _states_of(self, run: Iterable[int]) -> dict[int, None]:
        leaves, units = self.found.leaves, self._step.units
        return dict.fromkeys(leaf for k in run for i in units[k].uses for leaf in sorted(leaves.get(i, ())))

    def _begins(self, run: Sequence[int]) -> list[int]:
        crossing = self._crossing(run)
        states = self._states_of(run)
        living = [i for i in states if i in self.found.home]
        if 2 * sum(self._types[i].nbytes for i in living) >= sum(self._types[i].nbytes for i in states):
            first: dict[int, int] = {}  # a state lives where it is read first: later reads say nothing
            for place, k in enumerate(run):
                for i in self._states_of((k,)):
                    if i in self.found.home:
                        first.setdefault(i, place)
            homes: list[list[tuple[int, int]]] = [[] for _ in run]
            for i, place in first.items():
                homes[place].append((self.found.home[i], self._types[i].nbytes))
            return following(homes, crossing, self._step.stages, self._step.devices)
        return self._between_layers([self._step.code[self._step.units[k].at] for k in run], crossing)

    def _between_layers(self, code: Sequence[Instruction], crossing: Sequence[int]) -> list[int]:
        """The cuts where no state lies on a stage yet."""
        stages, trains = self._step.stages, "backward" in self._step.phases.values()
        layers = layers_of([(i.op, *(self._types.get(o) for o in flat_ids(i.outs))) for i in code], crossing)
        seconds = [effort(i, self._step.values) for i in code]
        if layers is not None and layers.count < stages:
            raise NoCut(f"there are more stages than layers, of which the model has {layers.count}", layers.count)
        if self._step.dealt is not None and trains:
            self.found.dealt = _dealt(self._step.dealt, None if layers is None or not layers.begins else layers.count)
        elif layers is not None and layers.begins is not None:
            even = layers.even(seconds, stages)
            self.found.dealt = None if even is None else tuple(even)
        if layers is not None and self.found.dealt is not None:
            return layers.cuts(self.found.dealt)
        begins = balanced(seconds, crossing, stages)
        if begins is None and trains:
            most = next((n for n in range(stages - 1, 1, -1) if balanced(seconds, crossing, n) is not None), 1)
            raise NoCut("the model has too few operators to be cut into so many stages", most)
        return begins or [len(code)] * (stages - 1)  # a few operators on their own: all by the first stage

    def _crossing(self, run: Sequence[int]) -> list[int]:
        """For each unit of the run, the bytes that it and later ones read of earlier ones."""
        made: dict[int, int] = {}
        last: dict[int, int] = {}
        held: dict[int, int] = {}
        for place, k in enumerate(run):
            unit = self._step.units[k]
            made.update(dict.fromkeys(unit.outs, place))
            last.update((i, place) for i in unit.uses if i in made)
            listed = self._step.code[unit.at].op == "collect"
            held.update((o, self._types[unit.uses[0] if listed else o].nbytes) for o in unit.outs)
        change = [0] * (len(run) + 1)
        for id_, place in last.items():
            change[made[id_] + 1] += held[id_]
            change[place + 1] -= held[id_]
        found, now = [], 0
        for step in change[:-1]:
            now += step
            found.append(now)
        return found

    def _settle(self, run: Sequence[int]) -> None:
        """What is made of many states says less of each than what is made of it alone."""
        for few in (True, False):
            for k in run:
                for i in self._step.units[k].uses:
                    leaves = self.found.leaves.get(i, ())
                    if not few or len(leaves) == 1:
                        self._live(leaves, self._cut[k])

    def _live(self, leaves: Iterable[int], stage: int) -> None:
        """What lives on a device already is of the first of its stages that reads it."""
        for leaf in leaves:
            if leaf in self._unread and self._step.device(stage) == self._step.device(self.found.home[leaf]):
                self.found.home[leaf] = stage
                self._unread.remove(leaf)
            self.found.home.setdefault(leaf, stage)

    def _aim(self) -> None:
        """From the states that the forward reads back to what they are changed by: entry by entry, and in the backward
        no further than to what is for nothing else."""
        home, aims = self.found.home, self._aims
        readers = Counter(i for unit in self._step.units for i in unit.uses)
        aims.update((out, home[state]) for out, state in self._step.replaced.items() if state in home)
        for unit in reversed(self._step.units):
            aimed = next((o for o in unit.outs if o in aims), None)
            late = self._phase(unit) == "optimizer"
            if aimed is None or not (late or self._is_entrywise(self._step.code[unit.at])):
                continue
            for i in unit.uses:
                its = self._types.get(i)  # a list of values has no type
                if its and its.numel == self._types[aimed].numel and (late or readers[i] == 1):
                    aims.setdefault(i, aims[aimed])

    # -- everything

    def place_all(self) -> None:
        """Give every unit its stage."""
        for k, unit in enumerate(self._step.units):
            kind = self._note_kind(unit)
            stage = self._stage(k, unit, kind)
            if stage is None:
                continue
            if kind == "state":
                self.found.kinds.update(dict.fromkeys(unit.outs, "after"))
                for o in unit.outs:
                    del self.found.leaves[o]
            self.found.stage[k] = stage
            self.found.home.update(dict.fromkeys(unit.outs, stage))
            for i in unit.uses:
                leaves = self.found.leaves.get(i, ())
                self._live((i,) if i in self._step.passing else leaves, stage)
                for id_ in (i, *leaves):
                    self._there[id_].add(stage)
        self._live((i for i in self._step.states if self.found.kinds[i] == "state"), 0)
        self._live(self._step.passing, 0)

    def _stage(self, k: int, unit: Unit, kind: Kind) -> int | None:
        if kind in ("number", "data"):
            return None
        if self._step.code[unit.at].op in _HANDED_ON:
            return self.found.home[unit.uses[0]]
        if kind == "state":
            apart = {home for i in unit.uses for home in self.found.homes(i)}
            return self._where_most_is(unit) if len(apart) > 1 else None
        if kind == "forward":
            return self._of_forward(k, unit)
        return self._of_backward(unit) if kind == "backward" else self._where_most_is(unit)

    def _of_forward(self, k: int, unit: Unit) -> int:
        """As it was cut, but not before what it reads of the same pass."""
        read = [i for i in unit.uses if self.found.kinds[i] == "forward"]
        behind = max((home for i in read for home in self.found.homes(i)), default=0)
        if k not in self._cut:
            return behind
        return max(self._cut[k], behind) if unit.in_loop else self._cut[k]

    def _of_backward(self, unit: Unit) -> int:
        """The last stage that has all that is read of the forward, or else most of it. Without any, the stage of the
        state that it is for."""
        kinds, found = self.found.kinds, self.found
        most = min((found.home[i] for i in unit.uses if kinds[i] == "backward"), default=self._step.stages - 1)
        pins = [
            (found.homes(i).union(*(self._there[j] for j in found.leaves.get(i, (i,)))), self._types[i].nbytes)
            for i in unit.uses
            if kinds[i] in ("forward", "state") and found.homes(i)
        ]
        if not pins:
            return min([most, *(self._aims[o] for o in unit.outs if o in self._aims)])
        held = {stage: sum(n for stages, n in pins if stage in stages) for stage in range(most + 1)}
        return max(held, key=lambda stage: (held[stage], stage))

    def _where_most_is(self, unit: Unit) -> int:
        held: dict[int, int] = defaultdict(int)
        for i in unit.uses:
            for stage in self.found.homes(i):
                held[stage] += self._types[i].nbytes
        return max(held, key=lambda stage: (held[stage], -stage), default=0)


def _dealt(wanted: Sequence[int], count: int | None) -> tuple[int, ...]:
    """`wanted` layers for each stage, of `count` that there are (None: it is not clear what a layer is)."""
    said = "+".join(map(str, wanted))
    if count is None:
        raise NoCut(f"layers={said} cannot be: it is not clear what the model's layers are", len(wanted))
    rest = count - sum(wanted)
    if rest < 0 or (rest > 0) != (0 in wanted):
        raise NoCut(f"layers={said} deals {sum(wanted)} layers, but the model has {count}", len(wanted))
    return tuple(n or rest for n in wanted)
