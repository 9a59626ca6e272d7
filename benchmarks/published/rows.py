"""Rows of published_runs.csv as problems for the cost model.

In: the CSV file, and what is known of each source (sources.toml). Out: a Case for each row that says enough, and for
each other one a reason why it is left out. No row raises.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.published.hardware import UnknownHardware, hardware_of
from moai.plan.cluster import Cluster
from moai.plan.cluster_file import tomllib
from moai.plan.dims import Layout, Model, Stack

FACTS = Path(__file__).parent / "sources.toml"
# Facts of a source that say how to read its rows.
_OF_ROWS = ("local_batch", "interleaves", "adapters", "selective", "memory", "autocast_bytes")
_PRECISIONS = {
    "nvfp4": "fp4",
    "fp4": "fp4",
    "fp8": "fp8",
    "mxfp8": "fp8",
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
}


class LeftOut(ValueError):
    """Why a row cannot be predicted."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One reading of a row. `interleave`: chunks of layers a device has."""

    layout: Layout
    interleave: int = 1


@dataclass(frozen=True, slots=True)
class Case:
    """A row that can be predicted. `variants`: one where the row states all, else one for each value of what it does
    not state (`unstated`). `memory_metric`: whether the memory was "reserved" by the allocator, or what was "allocated"
    of it; "" is not known. `problem`: equal for rows that solve the same problem with the same devices.
    `typical`: the time is no fastest step's."""

    id: str
    source: str
    hardware: str
    cluster: Cluster
    model: Model
    stack: Stack
    variants: tuple[Variant, ...]
    unstated: tuple[str, ...]
    step_s: float
    memory_bytes: float | None
    memory_metric: str
    problem: tuple[object, ...]
    typical: bool


def read(file: Path) -> tuple[list[Case], dict[str, str]]:
    """The cases of a CSV file, and the ids of the rows left out with the reasons."""
    cases, left_out = [], {}
    with file.open(newline="", encoding="utf-8") as opened:
        for number, row in enumerate(csv.DictReader(opened), 2):
            known = {k: (v or "").strip() for k, v in row.items() if isinstance(k, str) and not isinstance(v, list)}
            name = known.get("id") or f"line {number}"
            try:
                cases.append(_case(name, _Row(known)))
            except (LeftOut, UnknownHardware) as reason:
                left_out[name] = str(reason)
    return cases, left_out


class _Row:
    """The cells of a row."""

    def __init__(self, cells: Mapping[str, str]) -> None:
        self.cells = cells

    def __getitem__(self, name: str) -> str:
        return self.cells.get(name, "")

    def number(self, name: str) -> float | None:
        """None where the cell is empty. Of "1 (5)" the first is meant."""
        text = self[name].split("(")[0].strip()
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            raise LeftOut(f"{name} is no number: {self[name]!r}") from None
        if not 0 <= value < 1e15:
            raise LeftOut(f"{name} is no quantity: {self[name]!r}")
        return value

    def count(self, name: str, usual: int | None = None) -> int:
        value = self.number(name)
        if value is None and usual is not None:
            return usual
        if value is None:
            raise LeftOut(f"{name} is not stated")
        if value < 1 or value != int(value):
            raise LeftOut(f"{name} is no positive whole number: {self[name]!r}")
        return int(value)

    @property
    def source(self) -> str:
        """The repository."""
        return re.split(r"[@\s]", self["source"], maxsplit=1)[0]


def _case(name: str, row: _Row) -> Case:
    hardware, cluster = hardware_of(row["hw"], row.count("gpus"))
    if re.search(r"\bILP\b", row["note"]):
        raise LeftOut("its plan is a solver's, which the columns do not state")
    stack, facts = _stack(row)
    model = _model(row, facts)
    variants, unstated = _variants(row, model, facts)
    gbs = _global_batch(row, facts)
    return Case(
        name,
        row.source,
        hardware,
        cluster,
        model,
        stack,
        variants,
        unstated,
        _step_s(row, model, gbs),
        _memory(row),
        facts["memory"],
        (row.source, hardware, model, cluster.n_devices, gbs, row["precision"].lower(), row["kind"]),
        "min of steps" not in row["note"].lower(),
    )


def _model(row: _Row, facts: Mapping[str, Any]) -> Model:
    layers, hidden, heads = row.count("layers"), row.count("hidden"), row.count("heads")
    if (row.number("ep") or 1) > 1:
        raise LeftOut("its experts' sizes are not stated")
    model = Model(
        layers,
        hidden,
        heads,
        row.count("kv_heads", heads),
        row.count("ffn"),
        row.count("vocab"),
        row.count("seq"),
        adapters=facts["adapters"] if row["kind"] == "lora" else "",
    )
    form = replace(model, gated=model.ffn < 4 * hidden, tied=model.ffn >= 4 * hidden)
    billions = row.number("n_params_B")
    if not billions:
        return form
    forms = [
        form,
        *(replace(model, gated=g, tied=t, head=h) for g in (True, False) for t in (True, False) for h in (0, 128)),
    ]
    return min(forms, key=lambda m: abs(m.parameters / 1e9 - billions))


@cache
def _facts() -> dict[str, Any]:
    return tomllib.loads(FACTS.read_text(encoding="utf-8"))


def _stack(row: _Row) -> tuple[Stack, dict[str, Any]]:
    facts = _facts()
    own = dict(facts["sources"].get(row.source, {}))
    compiled = own.pop("compiled", {})
    known = {**facts["generic"], **own, **(compiled if row["compile"] == "1" else {})}
    note = row["note"].lower()
    if re.search(r"async ?tp", note):
        known["tp_overlap"] = "all"
    known["casts"] = _casts(row["precision"].lower(), known["casts"])
    if known.pop("flash2") and re.search("H[12]00|B[12]00", row["hw"]):
        known["attention_excess"] *= 1.6  # Shah et al., "FlashAttention-3" (2024): 1.5 to 2 times as fast on an H100
    if row["precision"].lower().startswith("amp"):
        known["entry_bytes"] = known["autocast_bytes"]
    if "overlap off" in note:
        known.update(tp_overlap="none", dp_overlap=False)
    if row["shard"].upper().startswith("FSDP") and row.number("pp") not in (None, 1):
        known["gathered_once"] = True
    facts = {name: known.pop(name) for name in _OF_ROWS}
    if not facts["memory"]:
        facts["memory"] = next((m for m in ("allocated", "reserved") if m in note), "")
    facts["local_batch"] |= "local batch" in note
    return Stack(**known), facts


def _casts(precision: str, usual: float) -> float:
    """Bytes moved for an entry: blocks of 32 are scaled along both of an operand's dims, whole rows not in a kernel."""
    if "rowwise" in precision:
        return 2 * usual
    if "mx" in precision or "fp4" in precision:
        return 2 * usual
    return usual if "fp8" in precision else 0.0


def _variants(row: _Row, model: Model, facts: Mapping[str, Any]) -> tuple[tuple[Variant, ...], tuple[str, ...]]:
    dp, tp, pp, cp = row.count("dp"), row.count("tp"), row.count("pp"), row.count("cp", 1)
    if dp * tp * pp * cp != row.count("gpus"):
        raise LeftOut(f"dp {dp}, tp {tp}, pp {pp} and cp {cp} do not make {row['gpus']} devices")
    share = _global_batch(row, facts) / dp
    unstated = []
    if facts["local_batch"] and pp > 1:
        batches = [share / pp]
    elif row.number("mbs"):
        batches = [float(row.count("mbs"))]
    elif row.number("ga"):
        batches = [share / row.count("ga")]
    else:
        unstated.append("mbs")
        batches = [float(b) for b in (1, 2, 4, 8, 16, 32) if share % b == 0]
    levels = _recomputation(row["recompute"], facts["selective"])
    if len(levels) > 1:
        unstated.append("recompute")
    chunks = [row.count("vp", 1)]
    note = row["note"].lower()
    if pp > 1 and not row["vp"] and "interleaved" in note:
        unstated.append("vp")
        chunks = [2]  # the least that is interleaved
    elif pp > 1 and not row["vp"] and facts["interleaves"] and "1f1b" not in note:
        unstated.append("vp")
        chunks = [v for v in range(1, model.layers // pp + 1) if model.layers % (v * pp) == 0]
    base = Layout(
        dp,
        tp,
        pp,
        cp,
        precision=_precision(row["precision"]),
        sharding=_sharding(row["shard"]),
    )
    found = [
        Variant(replace(base, samples=b, micro=round(share / b), recompute=level), v)
        for b, level, v in product(batches, levels, chunks)
        if share % b == 0 and model.layers >= pp
    ]
    if not found:
        raise LeftOut(
            f"a batch of {share:g} on a device is not made of whole micro-batches, or there are too few layers"
        )
    return tuple(found), tuple(unstated)


def _global_batch(row: _Row, facts: Mapping[str, Any]) -> float:
    if row.number("gbs"):
        return row.count("gbs")
    if row.number("mbs"):
        return row.count("mbs") * row.count("dp") * row.count("ga", 1)
    raise LeftOut("neither gbs nor mbs is stated")


def _recomputation(text: str, selective: str) -> tuple[str, ...]:
    """Levels it can mean."""
    text = text.lower()
    if text.startswith("selective"):
        return (selective,)
    if text in ("none", "full"):
        return (text,)
    if not text:
        return ("none", "attention", "full")
    raise LeftOut(f"recompute is not known: {text!r}")


def _precision(text: str) -> str:
    """That of the layers' products. Products in fp8 with a scale for each row are no faster than in bf16."""
    lower = text.lower()
    if "rowwise" in lower:
        return "bf16"
    for name in ("nvfp4", "fp4", "mxfp8", "fp8", "bf16", "fp16", "fp32"):
        if name in lower:
            return _PRECISIONS[name]
    raise LeftOut(f"precision is not known: {text!r}")


def _sharding(text: str) -> Any:
    lower = text.lower()
    if lower in ("", "ddp", "none"):
        return "none"
    if "zero-1" in lower or "dist-opt" in lower:
        return "states"
    if "zero-2" in lower or "grad_op" in lower:
        return "gradients"
    if "fsdp" in lower or "zero-3" in lower:
        return "full"
    raise LeftOut(f"shard is not known: {text!r}")


def _step_s(row: _Row, model: Model, batch: float) -> float:
    step, speed, rate = row.number("step_s"), row.number("tok_s_gpu"), row.number("tflops_gpu")
    if step:
        return step
    gpus = row.count("gpus")
    if speed:
        return batch * model.seq / (gpus * speed)
    if rate and row.number("hfu_pct"):
        # Narayanan et al., SC21, appendix: with the second forward of full recomputation.
        tokens, h = batch * model.seq, model.hidden
        layers = 96 * tokens * model.layers * h * h * (1 + model.seq / (6 * h) + model.vocab / (16 * model.layers * h))
        return layers / (gpus * rate * 1e12)
    raise LeftOut("no speed that is free of a convention for FLOPs is stated")


def _memory(row: _Row) -> float | None:
    value = row.number("mem_gib")
    return value * 2**30 if value else None
