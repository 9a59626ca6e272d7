import json

import pytest

from tests.tutorial.scripts import ROOT, ROWS, Prepared, run_script

TINY = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_OF = {
    "qwen": {"intermediate_size": 64, "num_key_value_heads": 2},
    "mistral": {"intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 8},
    "llama2": {"intermediate_size": 64, "num_key_value_heads": 4},
    "llama3": {"intermediate_size": 64, "num_key_value_heads": 2},
    "gpt": {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "baichuan2": {"intermediate_size": 64},
}
FEW = 34  # rows; 32 of them to train on


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Prepared:
    base = tmp_path_factory.mktemp("prepared")
    prepared = Prepared(base / "data", base / "configs", base / "few")
    prepared.configs.mkdir()
    for name, tiny in TINY_OF.items():
        config = json.loads((ROOT / "tutorial" / "configs" / f"{name}.json").read_text())
        sizes = {key: value for key, value in {**TINY, **tiny}.items() if key in config}
        (prepared.configs / f"{name}.json").write_text(json.dumps({**config, **sizes}))
    result = run_script("prepare.py", base, "--output", prepared.folder, "--configs", prepared.configs)
    assert result.returncode == 0, result.stderr
    for data in set(ROWS.values()):
        (prepared.few_rows / data).mkdir(parents=True)
        with (prepared.folder / data / "train.jsonl").open() as rows:
            (prepared.few_rows / data / "train.jsonl").write_text("".join(next(rows) for _ in range(FEW)))
    return prepared
