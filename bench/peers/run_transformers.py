"""Hugging Face transformers: ``run_transformers.py DIRECTORY``, in float32; see `answering`."""

import sys

import torch
from answering import num_threads, serve
from transformers import AutoModelForCausalLM


def main(directory):
    torch.set_num_threads(num_threads())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    # None of the tokens that end a text, so that every row has the length that was asked for.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def generate(prompts, num_new_tokens):
        rows = torch.tensor(prompts)
        answer = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=num_new_tokens,
            do_sample=False,
        )
        return answer[:, rows.shape[1] :].tolist()

    serve(generate, ("transformers", "torch"))


if __name__ == "__main__":
    main(sys.argv[1])
