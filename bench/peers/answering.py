"""What every peer does: load, then answer one line of JSON for each line that it reads.

``{"prompts": [[...], ...], "num_new_tokens": 64}`` is answered by ``{"seconds": ...,
"token_ids": [[...], ...]}``, the new tokens of each prompt; the prompts of a line have one length.
The first line that a peer writes is its versions. What libraries print goes to standard error.

A peer runs in an environment of its own, where this file is a neighbour and no package; it imports
nothing of the project.
"""

import json
import os
import sys
import time
from importlib.metadata import version


def serve(generate, packages):
    """Answers until standard input ends.

    Args:
        generate: (prompts, num_new_tokens) -> new token ids of each prompt, greedy, with no token
            that ends it early.
        packages: Whose versions to tell.
    """

    def answer(question):
        began = time.perf_counter()
        token_ids = generate(question["prompts"], question["num_new_tokens"])
        return {"seconds": time.perf_counter() - began, "token_ids": token_ids}

    serve_questions(answer, packages)


def serve_questions(answer, packages):
    """The same with answers of any form: a dictionary for a dictionary."""
    answers = _take_standard_output()
    _write(answers, {"versions": {package: version(package) for package in packages}})
    for line in sys.stdin:
        _write(answers, answer(json.loads(line)))


def num_threads():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _take_standard_output():
    """The stream for answers; prints of libraries, of C too, go elsewhere from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _write(answers, answer):
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
