"""Arguments, names and configs of the Keras-named samplers."""

import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from model import samplers
from tests.hand_made_models import DESCENDING, PROMPT, SIMPLE


class SecondBest(samplers.Sampler):
    def get_next_token(self, probabilities):
        return jnp.argsort(probabilities, axis=-1)[:, -2]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("identifier", [*SIMPLE, "contrastive"])
def test_a_temperature_must_be_above_zero(identifier, temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        samplers.get({"class_name": identifier, "config": {"temperature": temperature}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samplers.TopKSampler(k=0), "k must be at least 1"),
        (lambda: samplers.TopKSampler(seed=-1), "seed must be from 0"),
        (lambda: samplers.TopKSampler(k=27)(DESCENDING, PROMPT), "only 26 tokens"),
        (lambda: samplers.TopPSampler(p=1.5), "p must be from 0 to 1"),
        (lambda: samplers.TopPSampler(k=0), "k must be at least 1"),
        (lambda: samplers.BeamSampler(num_beams=0), "num_beams must be at least 1"),
        (lambda: samplers.ContrastiveSampler(k=0), "k must be at least 1"),
        (lambda: samplers.ContrastiveSampler(alpha=1.1), "alpha must be from 0 to 1"),
    ],
)
def test_arguments_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


DEFAULT_CONFIGS = {
    "greedy": {"temperature": 1.0},
    "top_k": {"temperature": 1.0, "k": 5, "seed": None},
    "top_p": {"temperature": 1.0, "p": 0.1, "k": None, "seed": None},
    "random": {"temperature": 1.0, "seed": None},
    "beam": {"temperature": 1.0, "num_beams": 5, "return_all_beams": False},
    "contrastive": {"temperature": 1.0, "k": 5, "alpha": 0.6},
}


@pytest.mark.parametrize("identifier", DEFAULT_CONFIGS)
def test_an_identifier_gives_the_defaults_of_keras_hub(identifier):
    assert samplers.get(identifier).get_config() == DEFAULT_CONFIGS[identifier]


EXAMPLES = [
    samplers.GreedySampler(temperature=0.5),
    samplers.TopKSampler(k=3, seed=8, temperature=2.0),
    samplers.TopPSampler(p=0.7, k=9, seed=8, temperature=2.0),
    samplers.RandomSampler(seed=8, temperature=2.0),
    samplers.BeamSampler(num_beams=2, return_all_beams=True, temperature=0.5),
    samplers.BeamSampler(num_beams=2, compat="keras_hub"),
    samplers.ContrastiveSampler(k=4, alpha=0.2, temperature=0.5),
]


@pytest.mark.parametrize("sampler", EXAMPLES, ids=lambda sampler: type(sampler).__name__)
def test_configs_and_dicts_make_the_same_sampler_again(sampler):
    written = json.loads(json.dumps(samplers.serialize(sampler)))
    by_class_name = {"class_name": written["registered_name"], "config": written["config"]}
    assert written["registered_name"] == f"keras_hub>{type(sampler).__name__}"
    for again in (
        type(sampler).from_config(sampler.get_config()),
        samplers.deserialize(written),
        samplers.get(written),
        samplers.get(by_class_name),
    ):
        assert type(again) is type(sampler)
        assert again.get_config() == sampler.get_config()


def test_none_samplers_and_callables_are_returned_as_they_are():
    sampler = samplers.TopKSampler()
    for given in (None, sampler, SecondBest, len):
        assert samplers.get(given) is given


@pytest.mark.parametrize(
    "given", ["speculative", "Top_K", "", {"class_name": "nucleus", "config": {}}]
)
def test_an_unknown_name_lists_the_known_ones(given):
    with pytest.raises(
        ValueError, match="Known samplers: beam, contrastive, greedy, random, top_k, top_p"
    ):
        samplers.get(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "A sampler is a name"),
        ({"config": {}}, "needs a class_name"),
        ({"class_name": "top_k", "config": {"p": 0.5}}, "does not take"),
    ],
)
def test_what_is_no_identifier_says_so(given, message):
    with pytest.raises(ValueError, match=message):
        samplers.get(given)


def test_a_sampler_of_ones_own_is_found_by_custom_objects():
    written = samplers.serialize(SecondBest(temperature=0.5))
    with pytest.raises(ValueError, match="There is no sampler 'SecondBest'"):
        samplers.deserialize(written)
    again = samplers.deserialize(written, {"SecondBest": SecondBest})
    assert type(again) is SecondBest
    assert again.temperature == 0.5


def test_what_the_engine_draws_with_needs_no_keras():
    code = "import model.samplers.draw, sys; sys.exit('keras' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_exported_name_is_there():
    assert [getattr(samplers, name).__name__ for name in samplers.__all__] == samplers.__all__
    with pytest.raises(AttributeError, match="Speculative"):
        _ = samplers.SpeculativeSampler
