"""docs/interpretability.md is run, from top to bottom, against the tiny preset.

Only the port differs, and what the numbers are: this model knows neither Paris nor hotels.
"""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.lora_files import lora_file
from tests.service_process import ServiceProcess
from tests.test_company import tiny_service

PAGE = Path(__file__).parents[1] / "docs" / "interpretability.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("tiny")
    adapter = f"--adapter=tone={lora_file(directory, 'tone')}"
    with tiny_service(directory / "service", cache_dir, adapter) as running:
        yield running


@pytest.fixture(scope="module")
def page(
    service: ServiceProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """The names that the page leaves, its client open again, and the folder of its files."""
    code = "\n".join(BLOCKS).replace(":8000", f":{service.port}")
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory := tmp_path_factory.mktemp("page"))
        exec(compile(code, str(PAGE), "exec"), names)
        assert len(BLOCKS) == 10
        # The page's functions look their client up when they are called.
        with names["GemmaClient"](service.url) as names["client"]:
            yield SimpleNamespace(**names, directory=directory)


def top(page, context, interventions=()):
    """The likeliest tokens behind a context, with their log-probabilities."""
    inputs = [{"context": context, "targets": [" Paris"]}]
    fields = {"return_": ["tokens"], "top": 20, "interventions": interventions}
    [result] = page.client.score(inputs, **fields).results
    return {token.id: token.logprob for token in result.targets[0].tokens[0].top}


def test_the_last_layer_of_a_prompt_set_in_another_has_its_next_token_distribution(page):
    last = page.info.layers - 1
    found = top(page, page.italian, page.patch(last, 1))

    assert found == pytest.approx(top(page, page.french), abs=5e-5)
    assert found != pytest.approx(top(page, page.italian), abs=5e-3)


def test_there_is_a_number_for_each_layer_and_token_that_was_patched(page):
    assert [len(row) for row in page.patched] == [len(page.backs)] * (page.info.layers + 1)
    # Behind the last layer a token is read by the head alone.
    *others, last = page.patched[-1]
    unpatched = page.logprobs(page.italian, page.answers[:1])
    assert others == unpatched * len(others)
    assert last != unpatched[0]


def test_a_vector_of_scale_zero_is_none_to_the_last_bit(page):
    assert page.by_scale[page.scales.index(0)] == page.logprobs(page.prompt, page.words)
    assert page.by_scale[0] != page.by_scale[-1]


def test_a_page_has_one_cell_for_each_token(page):
    written = (page.directory / "attribution.html").read_text()
    tokens = [html.unescape(each) for each in re.findall(r"<td [^>]*>([^<]*)<br>", written)]

    assert tokens == [t.replace("▁", " ") for t in page.tokens]
    assert written.count("<td ") == written.count("</td>") == len(tokens)


def test_a_token_that_looks_like_html_is_shown_as_it_is(page):
    score = SimpleNamespace(token='▁<b>"', score=-2.0)

    assert "> &lt;b&gt;&quot;<br><small>-2.00<" in page.heat_map([score])


def test_an_adapter_differs_from_the_base_and_the_base_not_from_itself(page):
    between = page.differences("The capital", ["gemma", "gemma:tone"])
    assert all(divergence > 0 for _, divergence, _ in between)
    # What is told of both is what each has alone.
    alone = {
        model: page.client.score([{"text": "The capital"}], model=model, return_=["tokens"])
        for model in ("gemma", "gemma:tone")
    }
    first, other = (each.results[0].targets[0].tokens for each in alone.values())
    assert [likelier for _, _, likelier in between] == [
        two.logprob - one.logprob for one, two in zip(first, other, strict=True)
    ]


def test_what_is_kept_for_the_pictures_is_what_was_found(page):
    numbers = json.loads((page.directory / "numbers.json").read_text())

    assert numbers["steering"]["logprobs"] == page.by_scale
    assert numbers["patching"]["logprobs"] == page.patched
    assert len(numbers["patching"]["tokens"]) == len(page.backs)
    assert numbers["attribution"]["tokens"] == page.tokens


def test_the_pictures_that_the_page_shows_are_there_and_small():
    shown = re.findall(r"\]\((interpretability/[\w.]+)\)", PAGE.read_text())
    files = [PAGE.parent / path for path in shown]

    assert {file.suffix for file in files} == {".png", ".html", ".py"}
    assert all(0 < file.stat().st_size < 100_000 for file in files)
    assert {file.name for file in (PAGE.parent / "interpretability").iterdir()} <= {
        file.name for file in files
    }
