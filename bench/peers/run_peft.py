"""transformers + PEFT in training, float32: ``run_peft.py DIRECTORY``.

``{"rows": [[...], ...], "num_trained": 4, "steps": 4, "rank": 8, "targets": [...]}`` is answered by
``{"seconds": [...]}``, those of each step: forward, backward, clipping and AdamW on all rows, which
have one length; the last ``num_trained`` tokens of each are learned. A new question begins a new
adapter, and its first step is not timed.
"""

import sys
import time

import torch
from answering import num_threads, serve_questions
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

_NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "attention_output": "o_proj"}


def main(directory):
    torch.set_num_threads(num_threads())
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def train(question):
        rank = question["rank"]
        targets = [_NAMES[name] for name in question["targets"]]
        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        model.train()
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
        rows = torch.tensor(question["rows"])
        labels = rows.clone()
        labels[:, : rows.shape[1] - question["num_trained"]] = -100
        mask = torch.ones_like(rows)
        seconds = []
        for _ in range(1 + question["steps"]):
            began = time.perf_counter()
            model(input_ids=rows, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
        model.unload()
        return {"seconds": seconds[1:]}

    serve_questions(train, ("transformers", "peft", "torch"))


if __name__ == "__main__":
    main(sys.argv[1])
