"""Make a small model and a small data set for the tutorial, without downloading anything.

Out, in `--output`:
    corpus/train.jsonl  what Python's standard library says its functions do, and their source: rows with the columns
                        `instruction`, `input`, `output`, `prompt`
    model/              a Qwen2 of the shape in `qwen2_small.json` with random weights, and a tokenizer trained on
                        the corpus; both as `save_pretrained` writes them

The same Python, libraries and sources give the same files. A second call finds them and does nothing.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import platform
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "qwen2_small.json"
MOST_CHARACTERS = 4000  # longer functions are left out: the model sees the first few hundred characters only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "data")
    parser.add_argument("--config", type=Path, default=CONFIG, help="architecture of the model")
    args = parser.parse_args()

    stamp = fingerprint(args.config)
    marker = args.output / "prepared.json"
    if marker.exists() and marker.read_text() == stamp:
        print(f"Model and data are ready in {args.output}")
        return

    partial = args.output.with_name(args.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    rows = write_corpus(partial / "corpus" / "train.jsonl")
    print(f"Corpus: {rows} functions of Python's standard library")
    parameters = write_model(partial / "model", partial / "corpus" / "train.jsonl", args.config)
    print(f"Model: Qwen2 with {parameters:,} parameters")
    (partial / "prepared.json").write_text(stamp)
    shutil.rmtree(args.output, ignore_errors=True)
    partial.rename(args.output)
    print(f"Model and data are ready in {args.output}")


def fingerprint(config: Path) -> str:
    """What the output depends on."""
    source = hashlib.sha256(Path(__file__).read_bytes() + config.read_bytes()).hexdigest()
    versions = {name: version(name) for name in ("tokenizers", "torch", "transformers")}
    return json.dumps({"source": source, "python": platform.python_version(), **versions}, indent=2)


def write_corpus(file: Path) -> int:
    """Write one row per documented function; the number of rows."""
    file.parent.mkdir(parents=True)
    seen = set()
    with file.open("w", encoding="utf-8") as out:
        for instruction, output in documented_functions(Path(sysconfig.get_path("stdlib"))):
            if output in seen:
                continue
            seen.add(output)
            prompt = f"### Instruction:\n{instruction}\n\n### Output:\n{output}"
            row = {"instruction": instruction, "input": "", "output": output, "prompt": prompt}
            out.write(json.dumps(row) + "\n")
    return len(seen)


def documented_functions(library: Path) -> Iterator[tuple[str, str]]:
    """(what it does, its source without that text) of each function under `library`, always in one order."""
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "lib2to3"} & set(path.relative_to(library).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):  # the library holds files that are broken on purpose
            continue
        lines = text.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
                pair = instruction_and_output(node, docstring, lines)
                if pair:
                    yield pair


def instruction_and_output(node: ast.FunctionDef, docstring: str, lines: list[str]) -> tuple[str, str] | None:
    """The docstring's first paragraph, and the function's lines without the docstring; None if nothing else is left."""
    first_paragraph = " ".join(docstring.split("\n\n")[0].split())
    literal = node.body[0]
    assert literal.end_lineno is not None and node.end_lineno is not None
    if len(node.body) < 2 or literal.lineno <= node.lineno:
        return None
    kept = lines[node.lineno - 1 : literal.lineno - 1] + lines[literal.end_lineno : node.end_lineno]
    output = inspect.cleandoc("\n" + "\n".join(line.rstrip() for line in kept))
    if not first_paragraph or len(output) > MOST_CHARACTERS:
        return None
    return first_paragraph, output


def write_model(folder: Path, corpus: Path, config_file: Path) -> int:
    """Write a model with random weights and a tokenizer for it; the number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Tokenizer

    config = AutoConfig.from_pretrained(config_file)
    with corpus.open(encoding="utf-8") as rows:
        prompts = [json.loads(row)["prompt"] for row in rows]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(prompts, config.vocab_size, show_progress=False)
    config.eos_token_id = config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


if __name__ == "__main__":
    main()
