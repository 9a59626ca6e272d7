"""The scripts, and what is particular to some of them."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"

FP32, HALF = 1e-5, 5e-3  # how far numbers may be from plain PyTorch's


@dataclass(frozen=True)
class Case:
    """A script by its name. `libraries`: what it imports beside torch. `draws`: random numbers on its device, which are
    then drawn by the CPU's generator in both runs, as the accelerator has its own. `bound`: how far its numbers may be
    from those of plain PyTorch, relatively."""

    name: str
    libraries: tuple[str, ...] = ()
    draws: bool = False
    bound: float = FP32

    @property
    def path(self) -> Path:
        return SCRIPTS / f"{self.name}.py"

    @property
    def what(self) -> str:
        """The first line of the script's docstring."""
        return (ast.get_docstring(ast.parse(self.path.read_text())) or "").split("\n")[0].rstrip(".")

    @property
    def missing(self) -> list[str]:
        return [name for name in self.libraries if importlib.util.find_spec(name) is None]


ALL = (
    Case("mnist", draws=True),
    Case("resnet"),
    Case("unet"),
    Case("vit"),
    Case("gan", draws=True),
    Case("vae", draws=True),
    Case("wgan_gp"),
    Case("style_transfer"),
    Case("lstm_lm"),
    Case("nanogpt"),
    Case("seq2seq_transformer"),
    Case("clip"),
    Case("gnn"),
    Case("dqn", draws=True),
    Case("reinforce", draws=True),
    Case("optimizers", draws=True),
    Case("toolbox", draws=True),
    Case("functional"),
    Case("data_shapes", draws=True),
    Case("amp", bound=HALF),
    Case("wrappers"),
    Case("checkpoints"),
    Case("bert_glue", ("transformers",)),
    Case("t5", ("transformers",)),
    Case("hf_trainer", ("transformers", "accelerate")),
    Case("hf_classifier", ("transformers", "accelerate")),
    Case("accelerate_loop", ("accelerate",)),
    Case("peft_lora", ("transformers", "peft")),
    Case("trl_sft", ("transformers", "trl", "peft", "datasets")),
    Case("trl_sft_full", ("transformers", "trl", "datasets")),
    Case("diffusion", ("diffusers", "peft"), draws=True),
)
