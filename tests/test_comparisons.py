"""Several versions of a model compared in one request: in the worker, by the engine, over HTTP."""

import base64
import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from model.score_slots import AskedPlace
from service.protocol.messages import (
    AdapterSource,
    Capture,
    Failed,
    Score,
    ScoredContext,
    ScoredText,
)
from service.worker.admission import Refusal
from service.worker.score_inputs import MAX_LOGIT_PLACES
from tests import goldens
from tests.fakes.arithmetic_engine import NOT_FINITE
from tests.lora_files import lora_file
from tests.service_process import running_service
from tests.test_company import tiny_service
from tests.test_engine import random_tokens
from tests.test_loop import generate
from tests.test_scores import residuals_of
from tests.test_service_adapters import number_files
from tests.test_worker_scores import ScoreWorker, logprob, score

NUMBERS = (10, 200, 30)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Adapters of the arithmetic engine, each of which adds a number to every sum."""
    found = []
    for number in NUMBERS:
        path = tmp_path_factory.mktemp("adapters") / f"{number}.lora.h5"
        path.write_text(str(number))
        digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        found.append(AdapterSource(digest, str(path)))
    return found


def worker_of(sources, adapter_slots=3):
    return ScoreWorker(adapters=sources, adapter_slots=adapter_slots)


def compared(request_id, *inputs, versions, **others):
    command = score(request_id, *inputs, **others)
    first, *rest = versions
    fields = {name: getattr(command, name) for name in command.__struct_fields__}
    return Score(**{**fields, "adapter": first, "compared": tuple(rest)})


def logprobs(found):
    return [[target.logprob for target in each.targets] for each in found]


def scored(worker, request_id):
    [event] = worker.events(request_id)
    return event


def test_versions_are_scored_and_compared_by_hand(sources):
    ten, two_hundred, _ = (source.digest for source in sources)
    worker = worker_of(sources)
    worker.score(
        compared("a", ScoredContext("1 2", (" 4 8", " 3")), versions=(ten, None, two_hundred))
    )
    worker.run()
    event = scored(worker, "a")
    # Behind 1 + 2 + 10 comes 13, and so on: a token that is k less is 1000 − k too far.
    expected = [
        [[logprob([1, 2, added], 4) + logprob([1, 2, 4, added], 8), logprob([1, 2, added], 3)]]
        for added in (10, 0, 200)
    ]
    assert [logprobs(found) for found in (event.inputs, *event.compared)] == expected
    # Sums of 0 and 200 where the first one's has 10.
    told = [(each.target_index, each.version, each.per_token) for each in event.divergences]
    assert told == [
        (0, 1, (990.0, 990.0)),
        (1, 1, (990.0,)),
        (0, 2, (190.0, 190.0)),
        (1, 2, (190.0,)),
    ]


def test_one_model_is_compared_with_nothing(sources):
    worker = worker_of(sources)
    worker.score(score("a", ScoredText("1 2")))
    worker.run()
    assert scored(worker, "a").compared == scored(worker, "a").divergences == ()


TEXTS = st.lists(st.integers(1, 9), min_size=1, max_size=14)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=40)), max_size=3),
            st.permutations([0, 1, 2, 3]),
            st.integers(1, 4),
        ),
        max_size=4,
    ),
    adapter_slots=st.sampled_from([3, 4]),
)
def test_any_comparison_has_the_numbers_of_each_version_alone(sources, requests, adapter_slots):
    worker = worker_of(sources, adapter_slots)
    added = {None: 0, **dict(zip([each.digest for each in sources], NUMBERS, strict=True))}
    versions = {}
    for number, (contexts, order, count) in enumerate(requests):
        inputs = [
            ScoredContext(
                " ".join(map(str, context)),
                tuple("".join(f" {id_}" for id_ in target) for target in targets),
            )
            for context, targets in contexts
        ] or [ScoredText("5")]
        versions[number] = [list(added)[place] for place in order[:count]]
        worker.score(compared(f"s{number}", *inputs, versions=versions[number]))
        worker.submit(generate(f"g{number}", (number, 2, 3), max_tokens=3))
    worker.run()
    for number, (contexts, _, _) in enumerate(requests):
        event = scored(worker, f"s{number}")
        numbers = [added[each] for each in versions[number]]
        for extra, found in zip(numbers, (event.inputs, *event.compared), strict=True):
            expected = [
                [
                    sum(
                        logprob([*context, *target[:end], extra], target[end])
                        for end in range(len(target))
                    )
                    for target in targets
                ]
                for context, targets in contexts
            ] or [[logprob([extra], 5)]]
            assert logprobs(found) == expected
        for each in event.divergences:
            assert set(each.per_token) == {(numbers[each.version] - numbers[0]) % 1000}
        num_targets = sum(len(each.targets) for each in event.inputs)
        assert len(event.divergences) == num_targets * (len(numbers) - 1)


def test_versions_of_a_request_share_its_chunks(sources):
    versions = tuple(source.digest for source in sources[:2])
    worker = worker_of(sources)
    read, own = [], worker.engine.read
    worker.engine.read = lambda chunks: read.append([c.adapter for c in chunks]) or own(chunks)
    worker.score(compared("a", ScoredText("1 2"), ScoredText("3 4"), versions=versions))
    worker.run()
    assert [len(set(chunk)) for chunk in read] == [2, 2]


def test_what_is_captured_and_told_is_of_each_version(sources):
    worker = worker_of(sources)
    everything = Capture((-1, 0), "all", is_half=False)
    worker.score(
        compared(
            *("a", ScoredText("1 2 3")),
            versions=(None, sources[0].digest),
            captures=(everything,),
            tells_tokens=True,
            tells_logits=True,
        )
    )
    worker.run()
    event = scored(worker, "a")
    [base], [[other]] = event.inputs, event.compared
    for found, first in ((base, 0), (other, 10)):
        assert [len(each.positions) for each in found.captures] == [4, 4]
        logits = np.frombuffer(found.logits, "<f4").reshape(3, 1000)
        assert logits.argmax(1).tolist() == [first, first + 1, first + 3]
        assert [each.token.id for each in found.targets[0].tokens] == [1, 2, 3]


def test_versions_that_have_no_room_together_wait_and_hold_none_of_it(sources):
    a, b, c = (source.digest for source in sources)
    worker = worker_of(sources, adapter_slots=2)
    worker.submit(generate("g", (1,), max_tokens=6, adapter=c))
    worker.turn()
    worker.score(compared("s", ScoredText("1 2"), versions=(a, b)))
    for _ in range(3):
        worker.turn()
    assert worker.events("s") == []
    # One slot is free: the one that the two wait for together.
    worker.submit(generate("h", (2,), max_tokens=1, adapter=a))
    worker.run()
    order = [event.request_id for frame in worker.frames for event in frame]
    assert order.index("s") > order.index("h"), "what needs one slot was not kept waiting"
    assert [each.per_token for each in scored(worker, "s").divergences] == [(190.0, 190.0)]
    assert worker.tokens("h") == [12]


def test_more_versions_than_the_bank_has_slots_are_refused(sources):
    worker = worker_of(sources, adapter_slots=2)
    versions = (None, *(source.digest for source in sources))
    with pytest.raises(Refusal) as refusal:
        worker.score(compared("a", ScoredText("1 2"), versions=versions))
    failed = refusal.value.failed
    assert (failed.code, failed.pointer) == ("invalid_field", "/models")
    worker.score(compared("b", ScoredText("1 2"), versions=versions[:3]))
    worker.run()
    assert len(scored(worker, "b").compared) == 2


def test_limits_count_every_version(sources):
    worker = worker_of(sources)
    versions = (None, sources[0].digest)
    for num_tokens in (MAX_LOGIT_PLACES // 2, MAX_LOGIT_PLACES // 2 + 1):
        text = ScoredText(" ".join("1" * num_tokens))
        command = compared(f"{num_tokens}", text, versions=versions, tells_logits=True)
        if num_tokens * 2 <= MAX_LOGIT_PLACES:
            worker.score(command)
            continue
        with pytest.raises(Refusal) as refusal:
            worker.score(command)
        assert refusal.value.failed.pointer == "/return"


def test_a_version_that_is_not_finite_fails_the_request_and_leaves_nothing(sources):
    worker = worker_of(sources)
    versions = (None, sources[0].digest)
    worker.score(compared("bad", ScoredText(f"1 2 {NOT_FINITE} 4"), versions=versions))
    worker.score(compared("good", ScoredText("1 2"), versions=versions))
    worker.run()
    [failed] = worker.events("bad")
    assert isinstance(failed, Failed)
    assert failed.code == "numerical"
    assert [each.per_token for each in scored(worker, "good").divergences] == [(10.0, 10.0)]


def test_a_comparison_that_is_cancelled_half_read_leaves_nothing(sources):
    worker = worker_of(sources, adapter_slots=2)
    versions = tuple(source.digest for source in sources[:2])
    worker.score(compared("a", *[ScoredText("1 2 3 4 5 6 7")] * 3, versions=versions))
    for _ in range(4):
        worker.turn()
    worker.cancel("a")
    worker.score(compared("b", ScoredText("1 2"), versions=versions[::-1]))
    worker.run()
    assert worker.events("a")[-1].code == "request_cancelled"
    assert [each.per_token for each in scored(worker, "b").divergences] == [(810.0, 810.0)]


# --- the engine -------------------------------------------------------------------------------


def divergence(first, other):
    """KL(first ‖ other) from logits, in float64."""
    p, q = (np.asarray(logits, np.float64) for logits in (first, other))
    p, q = (each - np.log(np.exp(each - each.max()).sum()) - each.max() for each in (p, q))
    return float((np.exp(p) * (p - q)).sum())


@pytest.mark.parametrize("name", goldens.TINY_PRESETS)
def test_a_divergence_is_that_of_the_logits_in_double_precision(name, engine_of):
    engine = engine_of(name)
    draw = np.random.default_rng(0)
    first, *others = residuals_of(engine, random_tokens(7))
    # Far apart, as near as rounding goes, the same, and almost nothing alike.
    near = [first * np.float32(1 + 2.0**-k) + draw.normal(size=len(first)).astype("f4") * 10.0**-k
            for k in (1, 2, 3, 5, 7)]  # fmt: skip
    places = [first, first, *others, *near, -100 * first]
    asked = [
        AskedPlace(each, (0,), wants_logits=True, compared_with=0 if row else None)
        for row, each in enumerate(places)
    ]
    base, *found = engine.measure(asked)
    assert base.divergence is None
    assert found[0].divergence == 0.0
    logits = [np.frombuffer(each.logits, "<f4") for each in (base, *found)]
    for score_, own in zip(found, logits[1:], strict=True):
        expected = divergence(logits[0], own)
        assert score_.divergence >= 0
        assert score_.divergence == pytest.approx(expected, rel=2e-5, abs=1e-12)


def test_a_divergence_and_its_places_have_the_bits_they_have_alone(engine_of):
    engine = engine_of("gemma3_tiny")
    residuals = residuals_of(engine, random_tokens(engine.info.head_places))
    plain = engine.measure([AskedPlace(each, (7,), num_top=3) for each in residuals])
    asked = [
        AskedPlace(each, (7,), num_top=3, compared_with=row - row % 4 if row % 4 else None)
        for row, each in enumerate(residuals)
    ]
    together = engine.measure(asked)
    for row, (one, other) in enumerate(zip(plain, together, strict=True)):
        assert (one.logprobs, one.top) == (other.logprobs, other.top)
        if row % 4:
            pair = [AskedPlace(residuals[each], (1,)) for each in (row - row % 4, row)]
            pair[1] = AskedPlace(residuals[row], (1,), compared_with=0)
            assert engine.measure(pair)[1].divergence == other.divergence


# --- over HTTP --------------------------------------------------------------------------------


def floats(tensor):
    return np.frombuffer(base64.b64decode(tensor["b64"]), "<f4").reshape(tensor["shape"])


def test_each_version_of_a_comparison_has_the_bits_of_its_own_call(tmp_path, cache_dir):
    options = [f"--adapter={name}={lora_file(tmp_path, name)}" for name in ("tone", "other")]
    models = ["gemma:tone", "gemma", "gemma:other@1"]
    short = {"token_ids": [40, 77, 91, 12, 60], "target_mask": [0, 0, 0, 1, 1]}
    inputs = [short, {"token_ids": random_tokens(300)}, {"context": "a b", "targets": ["c", "d"]}]
    with tiny_service(tmp_path / "service", cache_dir, *options) as service:

        def post(**body):
            answer = service.client.post("/score", json={"return": ["tokens"], **body})
            assert answer.status_code == 200, answer.text
            return answer.json()

        together = post(inputs=inputs, models=models)
        resolved = ["gemma:tone@1", "gemma", "gemma:other@1"]
        assert [each["model"] for each in together["results"]] == resolved * 3
        assert [each["input_index"] for each in together["results"]] == [0] * 3 + [1] * 3 + [2] * 3
        assert together["model"] == "gemma:tone@1"
        alone = [post(inputs=inputs, model=model)["results"] for model in models]
        for place, result in enumerate(together["results"]):
            assert result == alone[place % 3][place // 3]
        assert [(each["input_index"], each["target_index"], each["models"])
                for each in together["kl"]] == [
            (index, target, [resolved[0], other])
            for index, target in ((0, 0), (1, 0), (2, 0), (2, 1))
            for other in resolved[1:]
        ]  # fmt: skip
        # The same from the logits of calls of one model each.
        logits = [
            floats(post(inputs=[short], model=model, **{"return": ["logits"]})["results"][0]
                   ["logits"]["tensor"])
            for model in models
        ]  # fmt: skip
        for number in (1, 2):
            expected = [divergence(*pair) for pair in zip(logits[0], logits[number], strict=True)]
            assert together["kl"][number - 1]["per_token"] == pytest.approx(expected, rel=2e-5)
            assert min(expected) > 1e-3, "they differ"
        assert all(
            math.isfinite(x) and x >= 0 for each in together["kl"] for x in each["per_token"]
        )
        assert "kl" not in post(inputs=[short], models=["gemma"])
        assert service.metric('gemma_compilations_total{phase="serving"}') == 0


def test_what_cannot_be_compared_is_refused_and_says_where(tmp_path):
    options = [*number_files(tmp_path / "files", a=10, b=20), "--adapter-slots=1"]
    with running_service(tmp_path, *options) as service:
        for fields, status, pointer in (
            ({"models": ["gemma:a", "gemma", "gemma:a@1"]}, 422, "/models/2"),
            ({"models": ["gemma", "gemma"]}, 422, "/models"),
            ({"models": ["gemma", "gemma:a"], "model": "gemma"}, 422, "/models"),
            ({"models": ["gemma", "gemma:c"]}, 404, None),
            ({"models": ["gemma:a", "gemma:b"]}, 422, "/models"),
            (
                {
                    "models": ["gemma", "gemma:a"],
                    "attribution": {"method": "gradient", "of": "loss_sum"},
                },
                422,
                "/attribution",
            ),
        ):
            answer = service.client.post(
                "/score", json={"inputs": [{"token_ids": [1, 2]}], **fields}
            )
            assert answer.status_code == status, answer.text
            assert pointer is None or answer.json()["errors"][0]["pointer"] == pointer
        usage = service.client.post(
            "/score", json={"inputs": [{"token_ids": [1, 2]}], "models": ["gemma", "gemma:a"]}
        ).json()["usage"]
        assert usage["prompt_tokens"] == 4
