"""docs/keras_page.md is run: every block, from top to bottom, in one program."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests import goldens

PAGE = Path(__file__).parent.parent / "docs" / "keras_page.md"


def blocks():
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def run(code, directory):
    vocabulary = goldens.preset_directory("gemma1_tiny") / "assets/tokenizer/vocabulary.spm"
    shutil.copy(vocabulary, directory / "proto.spm")
    (directory / "page.py").write_text(code)
    # A cache of its own, so that nothing on this machine is found or needed.
    environment = {**os.environ, "GEMMA_CACHE_DIR": str(directory / "cache")}
    environment["PYTHONPATH"] = str(PAGE.parent.parent)
    return subprocess.run(
        [sys.executable, "page.py"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_every_example_of_the_page_runs(tmp_path):
    code = "\n".join(blocks())
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for said in (
        "There is no preset 'bert_base_en'",
        "Pass stop_token_ids=None",
        "'num_query_heads', 'num_key_value_heads', and 'head_dim'",
    ):
        assert said in done.stdout
    assert (tmp_path / "keras.lora.h5").stat().st_size > 0


def test_an_example_that_fails_turns_the_test_red(tmp_path):
    done = run("from model import GemmaCausalLM\nassert GemmaCausalLM is None", tmp_path)
    assert done.returncode == 1
    assert "AssertionError" in done.stderr
