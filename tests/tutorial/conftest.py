import json

import pytest

from tests.tutorial.scripts import ROOT, Prepared, run_script

TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Prepared:
    base = tmp_path_factory.mktemp("prepared")
    config = base / "config.json"
    config.write_text(json.dumps({**json.loads((ROOT / "tutorial" / "qwen2_small.json").read_text()), **TINY}))
    result = run_script("prepare.py", base, "--output", base / "data", "--config", config)
    assert result.returncode == 0, result.stderr
    few = base / "few"
    few.mkdir()
    with (base / "data" / "corpus" / "train.jsonl").open() as rows:
        (few / "train.jsonl").write_text("".join(next(rows) for _ in range(32)))
    return Prepared(base / "data", config, few)
