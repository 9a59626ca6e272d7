"""Opening and saving model folders, so that what is broken is said before hours of training, not after.

In and out: folders as `save_pretrained` writes them. Every problem is a `SystemExit` with a sentence about it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

CHECKPOINT_SUFFIXES = {".jinja", ".json", ".md", ".model", ".py", ".safetensors", ".txt"}
EXAMPLES = Path(__file__).resolve().parent / "data"


def load(name_or_path: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in fp32, and its tokenizer, from a folder or from the Hugging Face hub.

    A folder with a LoRA adapter is the model that the adapter was trained for, with the adapter merged into it.
    """
    adapter = Path(name_or_path, "adapter_config.json")
    if adapter.is_file():
        return load_adapted(adapter, trust_remote_code)
    if looks_like_a_path(name_or_path) and not Path(name_or_path, "config.json").is_file():
        path = Path(name_or_path)
        hint = f" Make it: prepare.py {path.name}" if path.parent == EXAMPLES else ""
        sys.exit(f"Cannot load the model: {name_or_path} is not a model folder (there is no config.json in it).{hint}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        model, info = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=torch.float32, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # what a damaged file raises depends on the file and on the library that reads it
        sys.exit(f"Cannot load the model {name_or_path}: {type(error).__name__}: {error}")
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        sys.exit(f"Cannot load the model {name_or_path}: weights are missing ({missing}, ...).")
    return model, tokenizer


def load_adapted(adapter: Path, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What `load` gives, for an adapter's `adapter_config.json`."""
    from peft import PeftModel

    try:
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
        model, tokenizer = load(base, trust_remote_code)
        return PeftModel.from_pretrained(model, str(adapter.parent)).merge_and_unload(), tokenizer
    except Exception as error:
        sys.exit(f"Cannot load the adapter {adapter.parent}: {type(error).__name__}: {error}")


def looks_like_a_path(name: str) -> bool:
    """Whether `name` can only be a folder: hub names are NAME or OWNER/NAME."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def check_writable(save_dir: Path) -> None:
    """Exit unless a checkpoint can be saved as `save_dir`, and replaces nothing but a checkpoint."""
    save_dir = save_dir.resolve()
    if save_dir.exists():
        if not save_dir.is_dir():
            sys.exit(f"Cannot save to {save_dir}: it is a file.")
        others = [entry.name for entry in save_dir.iterdir() if entry.suffix not in CHECKPOINT_SUFFIXES]
        if others:
            sys.exit(f"Cannot save to {save_dir}: it holds files of another kind ({', '.join(others[:3])}, ...).")
    try:
        sibling(save_dir, "probe").mkdir(parents=True)
        sibling(save_dir, "probe").rmdir()
    except OSError as error:
        sys.exit(f"Cannot save to {save_dir}: {error}")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, save_dir: Path) -> None:
    """Save both as `save_dir`, whole or not at all; what an earlier run left there is replaced."""
    save_dir = save_dir.resolve()
    new, old = sibling(save_dir, "new"), sibling(save_dir, "old")
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if save_dir.exists():
        save_dir.rename(old)
    new.rename(save_dir)
    shutil.rmtree(old, ignore_errors=True)


def sibling(save_dir: Path, kind: str) -> Path:
    """A hidden folder beside `save_dir`: on the same file system, and of this process only."""
    return save_dir.with_name(f".{save_dir.name}.{kind}-{os.getpid()}")
