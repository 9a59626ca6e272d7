"""Model folders: what is broken is said at once, and what is saved is whole."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from tutorial import checkpoint


@pytest.fixture
def model_folder(prepared, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(prepared.model(), tmp_path / "model")


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(SystemExit, match="not a model folder"):
        checkpoint.load(str(tmp_path / "nothing"))


def test_a_path_is_never_looked_for_on_the_hub():
    with pytest.raises(SystemExit, match="not a model folder"):
        checkpoint.load("./no/such/folder")


def test_truncated_weights_are_said(model_folder):
    file = model_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="Cannot load the model"):
        checkpoint.load(str(model_folder))


def test_a_damaged_config_is_said(model_folder):
    (model_folder / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="Cannot load the model"):
        checkpoint.load(str(model_folder))


def test_weights_that_are_not_in_the_file_are_said(model_folder):
    from safetensors.torch import load_file, save_file

    file = model_folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"weights are missing \(model\.norm\.weight"):
        checkpoint.load(str(model_folder))


def test_what_was_saved_is_what_is_loaded(prepared, tmp_path):
    model, tokenizer = checkpoint.load(str(prepared.model()))
    checkpoint.save(model, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_an_earlier_checkpoint_is_replaced_as_a_whole(prepared, tmp_path):
    model, tokenizer = checkpoint.load(str(prepared.model()))
    checkpoint.save(model, tokenizer, tmp_path / "out")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("of a larger model")
    checkpoint.check_writable(tmp_path / "out")
    checkpoint.save(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out" / "model-00001-of-00002.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_save_that_fails_leaves_the_earlier_checkpoint(prepared, tmp_path, monkeypatch):
    model, tokenizer = checkpoint.load(str(prepared.model()))
    checkpoint.save(model, tokenizer, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    torch.nn.init.zeros_(model.lm_head.weight)

    def full(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(model, tokenizer, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_below_a_file_cannot_be_saved_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="Cannot save to"):
        checkpoint.check_writable(tmp_path / "file" / "out")


def test_a_file_cannot_be_saved_to(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit, match="it is a file"):
        checkpoint.check_writable(tmp_path / "out")


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(SystemExit, match=r"files of another kind \(thesis\.tex"):
        checkpoint.check_writable(tmp_path / "out")


def test_checking_leaves_nothing_behind(tmp_path):
    checkpoint.check_writable(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
