"""The data sets of the tutorials, made of what Python's standard library says about itself.

Out: folders with one `train.jsonl` each, which `datasets.load_dataset` opens as it opens a data set of the hub. Their
columns are those of the data sets that the tutorials stand for:
    code       what a function does, and its source: `instruction`, `input`, `output`, `prompt`
    articles   documentation, and the sentence that sums it up: `article`, `highlights`
    questions  what somebody may ask about a function or class, and its documentation: `instruction`, `response`

The same Python gives the same files.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOST_CHARACTERS = 4000  # longer texts are left out: the model sees the first few hundred characters only


@dataclass(frozen=True)
class Documented:
    """A module, class or function of the library with its docstring."""

    node: ast.Module | ast.ClassDef | ast.FunctionDef
    docstring: str
    module: str
    lines: list[str]  # of the whole module

    @property
    def paragraphs(self) -> list[str]:
        """The first, in one line, and the rest, if any."""
        first, *rest = self.docstring.split("\n\n", 1)
        return [" ".join(first.split()), *rest]


def write(name: str, folder: Path) -> int:
    """Write the data set `name` as `folder`, no text twice; the number of rows."""
    rows, unique = DATA_SETS[name]
    folder.mkdir(parents=True)
    seen = set()
    with (folder / "train.jsonl").open("w", encoding="utf-8") as out:
        for item in documented():
            row = rows(item)
            if row and len(row[unique]) <= MOST_CHARACTERS and row[unique] not in seen:
                seen.add(row[unique])
                out.write(json.dumps(row) + "\n")
    return len(seen)


def texts(folder: Path) -> list[str]:
    """The rows of a written data set, each as one text."""
    with (folder / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row.get("prompt") or "\n".join(row.values()) for row in rows]


def code(item: Documented) -> dict[str, str] | None:
    source = source_without_docstring(item) if isinstance(item.node, ast.FunctionDef) else None
    instruction = item.paragraphs[0]
    if not source or not instruction:
        return None
    prompt = f"### Instruction:\n{instruction}\n\n### Output:\n{source}"
    return {"instruction": instruction, "input": "", "output": source, "prompt": prompt}


def articles(item: Documented) -> dict[str, str] | None:
    highlights, *article = item.paragraphs
    if not article or not 20 <= len(highlights) <= 200:
        return None
    return {"article": article[0], "highlights": highlights}


def questions(item: Documented) -> dict[str, str] | None:
    if isinstance(item.node, ast.Module) or item.node.name.startswith("_"):
        return None
    kind = "class" if isinstance(item.node, ast.ClassDef) else "function"
    return {"instruction": f"What is the {kind} {item.module}.{item.node.name} for?", "response": item.docstring}


# What makes a row, and the column that no two rows have the same text in.
DATA_SETS = {"code": (code, "output"), "articles": (articles, "article"), "questions": (questions, "response")}


@functools.cache
def documented() -> list[Documented]:
    """What is documented in Python's library, always in one order."""
    library = Path(sysconfig.get_path("stdlib"))
    return [item for path in sorted(library.rglob("*.py")) for item in documented_in(path, path.relative_to(library))]


def documented_in(path: Path, relative: Path) -> Iterator[Documented]:
    """What is documented in the file `path`, which is `relative` in the library."""
    parts = relative.with_suffix("").parts
    if {"site-packages", "dist-packages", "test", "tests", "lib2to3"} & set(parts):
        return
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):  # the library holds files that are broken on purpose
        return
    module = ".".join(part for part in parts if part != "__init__")
    lines = text.splitlines()
    for node in blocks(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            yield Documented(node, docstring, module, lines)


def blocks(tree: ast.Module) -> Iterator[ast.AST]:
    """The module and all statements in it, outer ones first; definitions are nowhere else."""
    rest: deque[ast.AST] = deque([tree])
    while rest:
        node = rest.popleft()
        rest.extend(
            c for c in ast.iter_child_nodes(node) if isinstance(c, ast.stmt | ast.excepthandler | ast.match_case)
        )
        yield node


def source_without_docstring(item: Documented) -> str | None:
    """A function's lines; None if it does nothing but have a docstring."""
    node = item.node
    assert not isinstance(node, ast.Module)
    literal = node.body[0]
    assert literal.end_lineno is not None and node.end_lineno is not None
    if len(node.body) < 2 or literal.lineno <= node.lineno:
        return None
    kept = item.lines[node.lineno - 1 : literal.lineno - 1] + item.lines[literal.end_lineno : node.end_lineno]
    return inspect.cleandoc("\n" + "\n".join(line.rstrip() for line in kept))
