"""Make small models and data sets for the tutorials, without downloading anything.

Out, in `--output`, for each model that is named (all, if none is):
    NAME/              a model of the shape in `configs/NAME.json` with random weights, and a tokenizer trained on its
                       data set, with the special tokens of the real one; both as `save_pretrained` writes them
    code/, articles/, questions/
                       the data sets, see corpora.py

The same Python, libraries and sources give the same files. What is there already is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import corpora

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Family:
    """What a model is trained on, and its tokenizer's special tokens, by their numbers."""

    data: str
    tokens: tuple[str, ...]
    eos: str
    bos: str | None = None
    pad: str | None = None
    unk: str | None = None
    begins: bool = False  # every text with `bos`


MODELS = {
    "qwen": Family("code", ("<|endoftext|>",), eos="<|endoftext|>", pad="<|endoftext|>"),
    "mistral": Family("code", ("<unk>", "<s>", "</s>"), eos="</s>", bos="<s>", unk="<unk>", begins=True),
    "llama2": Family("articles", ("<unk>", "<s>", "</s>"), eos="</s>", bos="<s>", unk="<unk>", begins=True),
    "llama3": Family(
        "articles",
        ("<|begin_of_text|>", "<|end_of_text|>"),
        eos="<|end_of_text|>",
        bos="<|begin_of_text|>",
        begins=True,
    ),
    "gpt": Family("code", ("<|endoftext|>",), eos="<|endoftext|>", bos="<|endoftext|>", unk="<|endoftext|>"),
    "opt": Family("code", ("<s>", "<pad>", "</s>"), eos="</s>", bos="</s>", pad="<pad>", unk="</s>", begins=True),
    "baichuan2": Family("questions", ("<unk>", "<s>", "</s>"), eos="</s>", bos="<s>", pad="<unk>", unk="<unk>"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--output", type=Path, default=HERE / "data")
    parser.add_argument("--configs", type=Path, default=HERE / "configs", help="folder with the models' shapes")
    args = parser.parse_args()
    if unknown := [name for name in args.models if name not in MODELS]:
        parser.error(f"there is no model {unknown[0]}, only {', '.join(MODELS)}")

    for name in args.models or MODELS:
        data = args.output / MODELS[name].data
        config = args.configs / f"{name}.json"
        put(data, write_corpus, [])
        put(args.output / name, partial(write_model, data=data, config_file=config), [config])


def put(folder: Path, write: Callable[[Path], str], sources: list[Path]) -> None:
    """Have `write` make the folder, whole or not at all, unless it is there and of these sources."""
    stamp, wanted, name = folder.with_suffix(".stamp"), fingerprint(sources), os.path.relpath(folder)
    if stamp.exists() and stamp.read_text() == wanted:
        print(f"{name} is ready")
        return
    new = folder.parent / ".new" / folder.name
    shutil.rmtree(new, ignore_errors=True)
    what = write(new)
    stamp.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    new.parent.rmdir()
    stamp.write_text(wanted)
    print(f"{name} is ready: {what}")


def fingerprint(sources: list[Path]) -> str:
    """What the output depends on."""
    code = [HERE / "baichuan2.py", HERE / "corpora.py", Path(__file__), *sources]
    source = hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()
    versions = {name: version(name) for name in ("tokenizers", "torch", "transformers")}
    return json.dumps({"source": source, "python": platform.python_version(), **versions}, indent=2)


def write_corpus(folder: Path) -> str:
    """Write the data set of the folder's name; its size."""
    return f"{corpora.write(folder.name, folder):,} rows"


def write_model(folder: Path, data: Path, config_file: Path) -> str:
    """Write the model of the folder's name with random weights, and a tokenizer for it; its size."""
    import baichuan2  # noqa: F401  (transformers knows this model from now on)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(config_file)
    tokenizer = trained_tokenizer(MODELS[folder.name], corpora.texts(data)[::4], config.vocab_size)  # enough of them
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"{model.num_parameters():,} parameters"


def trained_tokenizer(family: Family, texts: list[str], vocab_size: int):
    """A byte-level BPE tokenizer, whatever the real model's kind is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(family.tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if family.begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))]
        )
    names = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.pad, "unk_token": family.unk}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        **{key: token for key, token in names.items() if token},
    )


if __name__ == "__main__":
    main()
