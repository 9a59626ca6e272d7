"""Ask a fine-tuned Llama2 for a summary: a plain PyTorch script for one device."""

from __future__ import annotations

from argparse import ArgumentParser

import checkpoint
import torch

PROMPT = """[ARTICLE]
If the stack is empty, the call waits until another thread puts an item there. With a timeout, it gives up after that
many seconds and raises Empty.
[SUMMARY]
"""


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model-name-or-path", default="./llama2_summarization")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = checkpoint.load(args.model_name_or_path)
    model.eval()
    model.to(device)

    prompt = tokenizer(PROMPT, return_tensors="pt").to(device)
    with torch.no_grad():
        answer = model.generate(
            **prompt, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    print(f"Llama2: {tokenizer.decode(answer[0].cpu(), skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
