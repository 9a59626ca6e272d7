"""The model and the data of the tutorial are made here, and are real."""

import json

import pytest
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.tutorial.scripts import ROOT, run_script


def test_the_corpus_opens_as_a_data_set_of_instructions(prepared, tmp_path):
    rows = load_dataset(str(prepared.folder / "code"), split="train", cache_dir=str(tmp_path))
    assert rows.column_names == ["instruction", "input", "output", "prompt"]
    assert len(rows) > 2000
    row = rows[0]
    assert row["instruction"] in row["prompt"]
    assert row["prompt"].endswith(row["output"])


def test_an_answer_is_source_without_its_docstring(prepared):
    rows = [json.loads(line) for line in (prepared.folder / "code" / "train.jsonl").open()]
    (row,) = [r for r in rows if r["output"].startswith("def dedent(")]
    assert row["instruction"] == "Remove any common leading whitespace from every line in `text`."
    assert "Remove any common leading whitespace" not in row["output"]
    compile(row["output"], "dedent", "exec")


def test_the_tokenizer_gives_back_what_it_was_given(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared.model())
    text = 'def f(x):\n    return "日本" + x  # 42\n'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 512


def test_the_model_opens_and_fits_its_tokenizer(prepared):
    model = AutoModelForCausalLM.from_pretrained(prepared.model())
    tokenizer = AutoTokenizer.from_pretrained(prepared.model())
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_the_model_of_the_tutorial_has_ten_million_parameters():
    import torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(ROOT / "tutorial" / "configs" / "qwen.json")
        )
    assert model.num_parameters() >= 10_000_000


def prepare_again(prepared, *names):
    folders = ("--output", prepared.folder, "--configs", prepared.configs)
    return run_script("prepare.py", prepared.folder.parent, *names, *folders)


@pytest.mark.parametrize(
    ("data", "columns"), [("articles", ["article", "highlights"]), ("questions", ["instruction", "response"])]
)
def test_other_data_sets_have_the_columns_of_those_on_the_hub(prepared, data, columns):
    rows = [json.loads(line) for line in (prepared.folder / data / "train.jsonl").open()]
    assert len(rows) > 1500
    assert {tuple(row) for row in rows} == {tuple(columns)}
    assert len({row[columns[-1 if data == "questions" else 0]] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("name", "pad", "begins"),
    [("llama2", None, True), ("llama3", None, True), ("gpt", None, False), ("opt", 1, True), ("baichuan2", 0, False)],
)
def test_tokenizers_have_the_special_tokens_of_the_real_ones(prepared, name, pad, begins):
    tokenizer = AutoTokenizer.from_pretrained(prepared.model(name))
    config = json.loads((prepared.model(name) / "config.json").read_text())
    assert tokenizer.pad_token_id == pad == config["pad_token_id"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert (tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id) == begins
    assert "token_type_ids" not in tokenizer("x")


def test_an_unknown_model_is_said(prepared):
    assert "there is no model t5, only qwen, " in prepare_again(prepared, "t5").stderr


def test_a_second_call_does_nothing(prepared):
    before = {p: p.stat().st_mtime_ns for p in prepared.folder.rglob("*")}
    assert prepare_again(prepared).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in prepared.folder.rglob("*")} == before


@pytest.mark.slow
def test_preparing_twice_gives_the_same_files(prepared):
    before = {p: p.read_bytes() for p in prepared.folder.rglob("*") if p.is_file()}
    for stamp in prepared.folder.glob("*.stamp"):
        stamp.unlink()
    assert prepare_again(prepared).returncode == 0
    assert {p: p.read_bytes() for p in prepared.folder.rglob("*") if p.is_file()} == before
