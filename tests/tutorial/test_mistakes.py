"""A mistake ends the training script at once: a sentence about it, an exit status, and nothing left on disk."""

import json

import pytest

from tests.tutorial.scripts import train


def fails(prepared, folder, *arguments, **environ):
    """What the script says on stderr when it fails before training, leaving no checkpoint."""
    result = train(prepared, folder, *arguments, **environ)
    assert result.returncode != 0
    assert "[Step " not in result.stderr
    assert [p.name for p in folder.iterdir() if p.name.startswith((".", "out"))] == []
    return result.stderr


def test_an_unknown_flavor(prepared, tmp_path):
    assert "MOAI_FLAVOR=Huge: no such flavor here. There are: Small." in fails(prepared, tmp_path, MOAI_FLAVOR="Huge")


@pytest.mark.slow
def test_too_many_devices(prepared, tmp_path):
    assert "no free device" in fails(prepared, tmp_path, MOAI_DEVICES="100000")


def test_a_missing_model_folder(prepared, tmp_path):
    error = fails(prepared, tmp_path, "--model-name-or-path", tmp_path / "nothing", MOAI_CUDA="0")
    assert "nothing is not a model folder" in error
    assert "Traceback" not in error


def test_a_missing_data_set(prepared, tmp_path):
    error = fails(prepared, tmp_path, "--dataset-name-or-path", tmp_path / "nothing", MOAI_CUDA="0")
    assert f"Cannot load the data set {tmp_path / 'nothing'}" in error


@pytest.mark.slow
def test_a_data_set_without_prompts(prepared, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    error = fails(prepared, tmp_path, "--dataset-name-or-path", tmp_path / "data", MOAI_CUDA="0")
    assert "has no column `prompt`, only ['text']" in error


@pytest.mark.slow
def test_a_data_set_smaller_than_a_batch(prepared, tmp_path):
    assert "less than one batch of 64" in fails(prepared, tmp_path, "--batch-size", 64, MOAI_CUDA="0")


def test_a_save_folder_that_cannot_be_made(prepared, tmp_path):
    (tmp_path / "file").write_text("")
    error = fails(prepared, tmp_path, "--save-dir", tmp_path / "file" / "out", MOAI_CUDA="0")
    assert "Cannot save to" in error
    assert "Loading" not in error


@pytest.mark.slow
def test_a_size_that_is_not_positive(prepared, tmp_path):
    assert "--batch-size: 0 is not a positive number" in fails(prepared, tmp_path, "--batch-size", 0, MOAI_CUDA="0")
