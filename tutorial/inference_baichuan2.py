"""Ask a fine-tuned Baichuan2 a question: a plain PyTorch script for one device."""

from __future__ import annotations

from argparse import ArgumentParser

import baichuan2  # noqa: F401  (the model, which transformers does not have)
import checkpoint
import torch

PROMPT = "Question: What is the function json.dumps for?\nAnswer: "


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model-name-or-path", default="./baichuan2_customer_support")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--trust-remote-code", action="store_true", help="the hub's tokenizer is code of its own")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = checkpoint.load(args.model_name_or_path, args.trust_remote_code)
    model.eval()
    model.to(device)

    prompt = tokenizer(PROMPT, return_tensors="pt").to(device)
    with torch.no_grad():
        answer = model.generate(
            **prompt, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    print(f"Baichuan2: {tokenizer.decode(answer[0].cpu(), skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
