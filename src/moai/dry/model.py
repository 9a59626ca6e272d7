"""A training step of a model that is known by its config: what a plain fine-tuning script would do.

In: a config of transformers, a batch. Out: one step, forward, backward and AdamW, is recorded.
"""

from __future__ import annotations

import json
import os
import socket
import urllib.parse
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moai.capture.recorder import Recorder
from moai.capture.values import Value, record_of
from moai.dry.messages import ModelStep
from moai.dry.script import Failure, described
from moai.dry.values import Nowhere
from moai.dry.weightless import loaded_dtype

_HUB_SECONDS = 5.0


def train(step: ModelStep, recorder: Recorder) -> None:
    """Record the step. Raises Failure where there is no such model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = _config(step.model)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Failure(f"{step.model} is no causal language model, but a {config.model_type}: plan a script of your own")
    dtype = loaded_dtype(config, step.dtype)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train().cuda()
    except Exception as error:  # whatever an architecture makes of a config that is not its own
        raise Failure(f"{step.model} cannot be built as a causal language model: {described(error)}") from None
    optimizer = torch.optim.AdamW(model.parameters())
    tokens, labels = (_tokens((step.batch_size, step.block_size), recorder) for _ in range(2))
    try:
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
    except Exception as error:
        raise Failure(f"{step.model} cannot take a training step: {described(error)}") from None
    optimizer.step()
    model.zero_grad()
    recorder.flush()


def _config(name: str) -> Any:
    from transformers import AutoConfig

    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise Failure(f"{name} has no config.json: it is no model's folder")
    if path.is_file():
        try:
            json.loads(path.read_text())
        except ValueError as error:
            raise Failure(f"{name} is no config.json of a model: {error}") from None
    elif not path.exists() and (name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1):
        raise Failure(f"{name}: there is no such file or folder")
    try:
        return AutoConfig.from_pretrained(name, local_files_only=path.exists() or not _hub_answers())
    except Exception as error:  # as many kinds as there are ways to get a config wrong, or not at all
        if not path.exists() and not _hub_answers():
            raise Failure(
                f"{name} is no folder, nor a model that was downloaded before, and the Hugging Face hub cannot be "
                "reached: give --model a folder or a config.json"
            ) from None
        raise Failure(f"The config of {name} cannot be used: {described(error)}") from None


@cache
def _hub_answers() -> bool:
    """Whether to ask the hub at all: its library tries for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    if urllib.request.getproxies().get("https"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        with socket.create_connection((host.hostname, host.port or 443), timeout=_HUB_SECONDS):
            return True
    except OSError:
        return False


def _tokens(shape: tuple[int, int], recorder: Recorder) -> torch.Tensor:
    """A batch of data that nobody has."""
    tensor = recorder.allocate(shape, (shape[1], 1), torch.int64)
    record_of(tensor).value = Value(buffer=Nowhere(), role="batch")
    return tensor
