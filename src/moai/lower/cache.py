"""Programs that have been lowered before, on disk.

In: what `lower` takes. Out: the same Program, lowered at most once on a machine.

A program is found by everything that it depends on: the graph with the script's lines, the plan, the placements given,
the versions of PyTorch and of the code that lowers. It is kept in moai/programs in $XDG_CACHE_HOME (~/.cache), in a
file of its own that is there whole or not at all, so that many processes may read and write at once.
MOAI_PROGRAM_CACHE=0 switches this off. A cache that cannot be used never stops a run: then programs are lowered.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import moai
from moai.graph.placement import Placement
from moai.graph.step_graph import Ref, StepGraph
from moai.lower.cache_folder import home
from moai.lower.lowering import VALIDATE, lower, new_name
from moai.lower.program import Instruction, Program
from moai.lower.unhindered import without_collections
from moai.plan.plan import Plan

logger = logging.getLogger("moai")

VARIABLE = "MOAI_PROGRAM_CACHE"
# All files together; a program of 20,000 instructions takes 0.3 MB. The ones not used for longest go first.
MOST_BYTES = 128 << 20
# Smaller graphs are lowered about as fast as a file is found and read.
LEAST_NODES = 64
# Operators whose meaning goes with a version that is known; somebody else's may be another one tomorrow.
_KNOWN = frozenset({"aten", "prims", "moai"})


def _version() -> str:
    """Of all that decides what a graph is lowered to. The code itself is looked at: it changes between releases."""
    digest = hashlib.sha256(f"{moai.__version__} {torch.__version__}".encode())
    rooms = Path(__file__).parents[1]
    for room in ("graph", "lower", "plan"):
        for file in sorted((rooms / room).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


# When this is imported, and not when it is first needed: what runs is the code of now.
_VERSION = _version()


def lower_cached(graph: StepGraph, plan: Plan, given: Sequence[Placement | None]) -> Program:
    """`lower(graph, plan, given)`, from the disk if this was lowered before. Raises what `lower` does."""
    file = _file_of(graph, plan, given, os.environ)
    program = None if file is None else _read(file)
    if program is None:
        program = lower(graph, plan, given)
        if file is not None:
            _write(file, program)
        return program
    return replace(program, name=new_name())


def folder(environ: Mapping[str, str]) -> Path:
    """Where programs are kept."""
    return home(environ) / "programs"


def _file_of(
    graph: StepGraph, plan: Plan, given: Sequence[Placement | None], environ: Mapping[str, str]
) -> Path | None:
    """The program's file; None where it is not to be kept."""
    if environ.get(VARIABLE) == "0" or environ.get(VALIDATE) == "1" or len(graph.nodes) < LEAST_NODES:
        return None
    if any(op.namespace not in _KNOWN for op in {n.op for n in graph.nodes}):
        return None
    try:
        programs = folder(environ)
        programs.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(programs):
            logger.debug("%s is somebody else's, or open to others: programs are not kept there.", programs)
            return None
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        logger.debug("Programs are not kept: %s", error)
        return None
    return programs / key(graph, plan, given)


def _is_own(programs: Path) -> bool:
    """Whether nobody else can put a file there: reading a pickle runs what it says."""
    status = programs.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def key(graph: StepGraph, plan: Plan, given: Sequence[Placement | None]) -> str:
    """The same in every process for the same program. Operators go by name; repr tells 1 from 1.0 and True."""
    lines = [_VERSION, repr(plan), repr(given), repr((graph.types, graph.inputs, graph.outputs, graph.n_scalars))]
    lines += [f"{n.op}{n.args!r}{n.kwargs!r}{n.outs!r}{n.origin!r}" for n in graph.nodes]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _read(file: Path) -> Program | None:
    """The program in `file`, None if there is none or it is damaged."""
    try:
        content = file.read_bytes()
        os.utime(file)  # it is in use
    except OSError:
        return None
    digest, packed = content[:32], content[32:]
    if hashlib.sha256(packed).digest() != digest:
        return None
    with without_collections():
        program = pickle.loads(zlib.decompress(packed))
    assert isinstance(program, Program)
    return program


def _write(file: Path, program: Program) -> None:
    """Keep `program` in `file`, which is there whole or not at all."""
    buffer = io.BytesIO()
    with without_collections():
        _Pickler(buffer, protocol=5).dump(program)
    packed = zlib.compress(buffer.getvalue(), level=1)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(hashlib.sha256(packed).digest() + packed)
            os.replace(temporary, file)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _make_room(file.parent)
    except OSError as error:
        logger.debug("A program could not be kept: %s", error)


def _make_room(programs: Path) -> None:
    """Remove what was not used for longest until the rest is small enough. Others may be removing files, too."""
    files = []
    for entry in os.scandir(programs):
        with suppress(FileNotFoundError):
            status = entry.stat()
            files.append((status.st_mtime_ns, status.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= MOST_BYTES:
            return
        with suppress(FileNotFoundError):
            os.unlink(path)
        total -= size


class _Pickler(pickle.Pickler):
    """Has the many small objects of a program made by their constructors, which is read in two thirds of the time."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Ref:
            return Ref, (value.id,)
        if type(value) is Instruction:
            parts = (value.op, value.args, value.kwargs, value.outs, value.frees, value.shapes, value.where)
            return Instruction, parts
        return NotImplemented
