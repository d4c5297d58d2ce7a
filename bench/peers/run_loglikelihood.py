"""transformers in float32 as a harness asks it: ``run_loglikelihood.py DIRECTORY``.

``{"rows": [[ids, num_scored], ...], "batch_size": 8}`` is answered by ``{"seconds": ...,
"logprobs": [...]}``: of each row, the sum for its last ``num_scored`` tokens. The longest rows go
first, so many together as ``batch_size``, padded on the right.
``{"stream_of": ids}`` is answered by ``{"stream": [[...], ...]}``, what enters the final norm at
each token.
"""

import sys
import time

import torch
from answering import num_threads, serve_questions
from transformers import AutoModelForCausalLM


def main(directory):
    torch.set_num_threads(num_threads())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def of_batch(rows):
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([[*each, *[0] * (longest - len(each))] for each, _ in rows])
        mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each, _ in rows])
        logprobs = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits, dim=-1)
        sums = []
        for number, (each, num_scored) in enumerate(rows):
            places = torch.arange(len(each) - num_scored - 1, len(each) - 1)
            targets = torch.tensor(each[-num_scored:])
            sums.append(logprobs[number, places, targets].sum().item())
        return sums

    @torch.inference_mode()
    def stream_of(ids):
        entered = []
        norm = model.get_decoder().norm
        with norm.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0])):
            model(input_ids=torch.tensor([ids]))
        [stream] = entered
        return stream[0].tolist()

    def answer(question):
        if "stream_of" in question:
            return {"stream": stream_of(question["stream_of"])}
        rows, size = question["rows"], question["batch_size"]
        began = time.perf_counter()
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number][0]))
        found = {}
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            found |= zip(batch, of_batch([rows[number] for number in batch]), strict=True)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "logprobs": [found[number] for number in range(len(rows))]}

    serve_questions(answer, ("transformers", "torch"))


if __name__ == "__main__":
    main(sys.argv[1])
