"""llama.cpp: ``run_llama_cpp.py MODEL.gguf f32|f16|q4_k_m DIRECTORY``; see `answering`.

The model is the Q4_K_M file of which our float32 weights are the dequantised numbers, so all
three formats are the same weights. A format that is not there yet is written to DIRECTORY by
llama.cpp itself.
"""

import ctypes
import os
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from answering import num_threads, serve

_FORMATS = {"f32": llama_cpp.LLAMA_FTYPE_ALL_F32, "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16}
_MAX_ROWS = 16
_ROW_TOKENS = 1024


def in_format(source, name, directory):
    """The model's file in the format ``name``."""
    if name == "q4_k_m":
        return source
    target = directory / f"{source.stem}.{name}.gguf"
    if not target.exists():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = _FORMATS[name]
        parameters.allow_requantize = True
        unfinished = target.with_suffix(".unfinished")
        paths = (os.fsencode(source), os.fsencode(unfinished))
        if llama_cpp.llama_model_quantize(*paths, ctypes.byref(parameters)) != 0:
            raise SystemExit(f"llama.cpp could not write {source} as {name}.")
        unfinished.replace(target)
    return target


class Rows:
    """Sequences that decode together, each at its own positions."""

    def __init__(self, path, name):
        llama_cpp.llama_backend_init()
        model_parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_parameters)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = _MAX_ROWS * _ROW_TOKENS
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_seq_max = _MAX_ROWS
        parameters.n_threads = parameters.n_threads_batch = num_threads()
        if name == "f32":
            parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise SystemExit(f"llama.cpp could not load {path}.")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(parameters.n_batch, 0, 1)

    def generate(self, prompts, num_new_tokens):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        tokens = [
            (row, position, token)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        length = len(prompts[0])
        ends = {(row, length - 1) for row in range(len(prompts))}
        newest = [self._likeliest(tokens[i : i + 512], ends) for i in range(0, len(tokens), 512)]
        rows = [[token] for part in newest for token in part]
        for position in range(length, length + num_new_tokens - 1):
            step = [(row, position, new[-1]) for row, new in enumerate(rows)]
            for new, token in zip(rows, self._likeliest(step, None), strict=True):
                new.append(token)
        return rows

    def _likeliest(self, tokens, wanted):
        """Runs (row, position, token) and returns the likeliest next token of each wanted one."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        indexes = []
        for index, (row, position, token) in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row
            is_wanted = wanted is None or (row, position) in wanted
            batch.logits[index] = is_wanted
            if is_wanted:
                indexes.append(index)
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise SystemExit("llama.cpp could not decode.")
        return [self._argmax(index) for index in indexes]

    def _argmax(self, index):
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary_size,)).argmax())


def main(source, name, directory):
    path = in_format(Path(source), name, Path(directory))
    serve(Rows(path, name).generate, ("llama-cpp-python",))


if __name__ == "__main__":
    main(*sys.argv[1:])
