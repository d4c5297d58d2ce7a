"""The memory of logits goes from one call of the head to the next."""

import pytest

from model.attribution_questions import AttributedText, AttributionQuestion
from model.score_slots import AskedPlace
from tests import goldens
from tests.test_attribution import answer
from tests.test_scores import residuals_of

PATHS = pytest.mark.parametrize(("name", "kernels"), goldens.PATHS)


def kept(engine):
    return [each.unsafe_buffer_pointer() for each in engine._scores._room._kept]


@PATHS
def test_the_logits_of_every_call_stand_where_those_of_the_last_stood(name, kernels, engine_of):
    engine = engine_of(name, kernels)
    places = [AskedPlace(each, (7,)) for each in residuals_of(engine, [2, 5, 9])]
    engine.measure(places)
    before = kept(engine)
    for count in (1, 3, 2):
        engine.measure(places[:count])
        assert kept(engine) == before


@PATHS
def test_those_of_a_derivative_do_too(name, kernels, engine_of):
    engine = engine_of(name, kernels)
    question = AttributionQuestion((AttributedText((2, 5, 9), ((2, 7),)),), 3, -1)
    answer(engine, question)
    before = kept(engine)
    answer(engine, question)
    assert kept(engine) == before


def test_a_score_between_the_parts_of_an_attribution_disturbs_neither(engine_of):
    engine = engine_of("gemma3_tiny")
    question = AttributionQuestion((AttributedText((2, 5, 9), ((2, 7), (1, 3))),), 3, -1)
    places = [AskedPlace(each, (7,), num_top=3) for each in residuals_of(engine, [2, 8, 1])]
    expected, measured = answer(engine, question)[0], engine.measure(places)
    found = []

    def whole():
        found.append((yield from engine.attribute(question)))

    for _ in whole():
        assert engine.measure(places) == measured
    assert found == [expected]


def test_logits_that_are_told_are_not_written_over(engine_of):
    engine = engine_of("gemma3_tiny")
    one, other, _ = residuals_of(engine, [2, 5, 9])
    [told] = engine.measure([AskedPlace(one, (7,), wants_logits=True)])
    again = engine.measure([AskedPlace(each, (7,), wants_logits=True) for each in (other, one)])
    assert again[1].logits == told.logits != again[0].logits
