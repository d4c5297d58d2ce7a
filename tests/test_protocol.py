"""service.protocol: every message round trips, and nothing else is taken for one."""

import random
import socket
from dataclasses import fields
from typing import get_args

import msgspec
import pytest

from model.intervention_slots import MAX_INTERVENTIONS
from model.score_slots import HEAD_PAIRS
from model.search_slots import MAX_WIDTH
from model.slots import MAX_BIASES, MAX_LOGPROBS, MAX_STOP_IDS, EngineInfo, Sampling
from service.api import score_schemas
from service.api.schemas import MAX_SEARCH_WIDTH, GenerateRequest, field_limits
from service.protocol import framing
from service.protocol.framing import ProtocolError
from service.protocol.messages import (
    Accepted,
    Attribute,
    Cancel,
    Capture,
    CapturedStream,
    Command,
    Event,
    Failed,
    Finished,
    Generate,
    Heartbeat,
    InputAttribution,
    InputScore,
    Intervention,
    Load,
    LoadFailed,
    OutputEnd,
    Piece,
    Progress,
    Ready,
    SamplingParameters,
    Score,
    Scored,
    ScoredContext,
    ScoredIds,
    ScoredText,
    SelfTest,
    ServerInfo,
    StopRules,
    TargetScore,
    Timings,
    TokenAttribution,
    TokenLogprob,
    TokenLogprobs,
    TokenScore,
)
from service.worker.channel import ConnectionClosed, read_frame
from service.worker.score_inputs import MAX_LOGIT_PLACES

LOGPROB = TokenLogprob(id=7, token="é", bytes=(195, 169), logprob=-0.25)
TARGET = TargetScore(-0.5, True, 1, 2, (TokenScore(LOGPROB, 3, 0, (LOGPROB,)),))
COMMANDS: list[Command] = [
    Load(
        engine="tests.fakes.arithmetic_engine:load",
        preset="/presets/é",
        cache_dir="/tmp",
        num_slots=8,
        context_tokens=4096,
        max_queued_requests=256,
        max_queued_tokens=262_144,
    ),
    Generate(
        request_id="gen_1",
        tenant="default",
        deadline=1234.5,
        adapter=None,
        prompts=("a \x00 text", (0, 1, 999), ""),
        num_choices=2,
        sampling=SamplingParameters(
            temperature=0.5,
            top_k=3,
            top_p=0.9,
            seed=2**32 - 1,
            min_p=0.05,
            repetition_penalty=1.2,
            presence_penalty=-2.0,
            frequency_penalty=0.5,
            logit_bias=((7, -100.0), (999, 0.25)),
        ),
        stop=StopRules(
            max_tokens=9, min_tokens=1, strings=("é", "\n"), token_ids=(4,), ignore_eos=True
        ),
        num_logprobs=20,
        interventions=(
            Intervention("add", (-1, 0), "last", -0.5, b"\x00\x00\x80\x3f"),
            Intervention("zero", (3,), (0, 7)),
        ),
    ),
    Score(
        request_id="sco_1",
        tenant="default",
        deadline=1234.5,
        adapter=None,
        inputs=(
            ScoredText("é"),
            ScoredContext("a \x00 text", ("", " b")),
            ScoredIds((1, 2), None, (False, True)),
            ScoredIds((1, 2), (3, 4), None),
        ),
        tells_tokens=True,
        num_top=20,
        interventions=(Intervention("scale", (0,), "target", 2.0),),
        captures=(Capture((-1, 2), (0, 3), is_half=True), Capture((0,), "all", is_half=False)),
        attribution=Attribute(layer=-1, target=None, num_steps=8, reduction="l2"),
    ),
    Cancel("gen_1"),
]
EVENTS: list[Event] = [
    Progress("load", 1.5, 2.0),
    Ready(
        ServerInfo(
            preset="x",
            preset_digest="sha256:0",
            family="gemma3",
            is_instruct=True,
            num_parameters=268_098_176,
            dtype="float32",
            backend="cpu",
            device="cpu",
            kernels="xla",
            kernels_reason="switched off",
            context_tokens=4096,
            num_slots=8,
            vocabulary_size=262_144,
            num_layers=18,
            hidden_dim=640,
            buckets={"decode_rows": [2, 4, 8]},
            programs=("decode[2]",),
            has_tokenizer=False,
            self_test=SelfTest((2, 4, 8), (32, 256), 190),
        ),
        num_compilations=24,
    ),
    LoadFailed("The file is truncated.", is_permanent=True),
    Accepted("gen_1", (3, 4)),
    Piece("gen_1", 1, (7, 8), "é", (TokenLogprobs(LOGPROB, (LOGPROB, LOGPROB)),)),
    Finished(
        "gen_1",
        (OutputEnd("stop", "\n", 3), OutputEnd("stop", 999, 2), OutputEnd("length", None, 9)),
        Timings(queue_seconds=0.1, first_token_seconds=None, total_seconds=0.5),
    ),
    Scored(
        "sco_1",
        (
            InputScore(
                3,
                (TARGET, TARGET),
                captures=(CapturedStream(1, -1, (0, 5), is_half=True, numbers=bytes(8)),),
                attribution=InputAttribution(2, (TokenAttribution(2, "a", 0.5),), b"", 0.01),
            ),
        ),
        Timings(queue_seconds=0.1, first_token_seconds=None, total_seconds=0.5),
    ),
    Failed("gen_1", "queue_full", "because", "/prompt/0", 5),
    Heartbeat(
        turn=9,
        phase="step",
        phase_seconds=0.1,
        num_running=1,
        num_waiting=2,
        num_waiting_tokens=30,
        num_compilations=24,
    ),
]


def body_of(frame: bytes) -> bytes:
    return frame[framing.LENGTH_BYTES :]


def test_there_is_an_example_of_every_message_above():
    assert {type(message) for message in COMMANDS} == set(get_args(Command))
    assert {type(message) for message in EVENTS} == set(get_args(Event))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda message: type(message).__name__)
def test_a_command_comes_out_as_it_went_in(command):
    frame = framing.encode([command])
    assert framing.body_length(frame[:4]) == len(frame) - 4
    assert framing.decode_commands(body_of(frame)) == [command]


@pytest.mark.parametrize("event", EVENTS, ids=lambda message: type(message).__name__)
def test_an_event_comes_out_as_it_went_in(event):
    assert framing.decode_events(body_of(framing.encode([event]))) == [event]


def test_one_frame_carries_many_messages_in_order():
    assert framing.decode_events(body_of(framing.encode(EVENTS))) == EVENTS


@pytest.mark.parametrize("message", [*COMMANDS, *EVENTS], ids=lambda it: type(it).__name__)
def test_a_message_never_goes_the_other_way(message):
    wrong_way = framing.decode_events if message in COMMANDS else framing.decode_commands
    with pytest.raises(ProtocolError):
        wrong_way(body_of(framing.encode([message])))


@pytest.mark.parametrize(
    "message",
    [
        {"type": "Cancel", "request_id": "a", "extra": 1},
        {"type": "Cancel"},
        {"type": "Cancel", "request_id": 5},
        {"type": "Cancel", "request_id": b"a"},
        {"type": "Cancel", "request_id": None},
        {"type": "Cancelled", "request_id": "a"},
        {"type": 1, "request_id": "a"},
        {"request_id": "a"},
        ["Cancel", "a"],
        "Cancel",
        None,
    ],
)
def test_an_unknown_field_tag_or_type_is_refused(message):
    with pytest.raises(ProtocolError):
        framing.decode_commands(msgspec.msgpack.encode([message]))


def test_a_field_of_a_nested_message_is_as_strict():
    command = msgspec.to_builtins(COMMANDS[1])
    command["sampling"]["beams"] = 4
    with pytest.raises(ProtocolError):
        framing.decode_commands(msgspec.msgpack.encode([command]))


def test_a_message_outside_a_list_is_refused():
    with pytest.raises(ProtocolError):
        framing.decode_commands(msgspec.msgpack.encode(Cancel("a")))


def test_bytes_after_the_list_are_refused():
    with pytest.raises(ProtocolError):
        framing.decode_commands(body_of(framing.encode([Cancel("a")])) + b"\x00")


def test_a_body_cut_anywhere_is_refused():
    body = body_of(framing.encode(EVENTS))
    for length in range(len(body)):
        with pytest.raises(ProtocolError):
            framing.decode_events(body[:length])


@pytest.mark.parametrize("body", [b"\x91" * 100_000, b"\x81" * 100_000, b"\xdd\xff\xff\xff\xff"])
def test_a_body_nested_or_promising_without_end_is_refused(body):
    with pytest.raises(ProtocolError):
        framing.decode_commands(body)


def test_ten_thousand_mutated_and_random_bodies_decode_or_are_refused():
    chance = random.Random(20261122)
    good = [body_of(framing.encode([message])) for message in (*COMMANDS, *EVENTS)]
    num_refused = 0
    for _ in range(10_000):
        body = bytearray(chance.choice(good))
        match chance.randrange(4):
            case 0:
                body[chance.randrange(len(body))] = chance.randrange(256)
            case 1:
                del body[chance.randrange(len(body)) :]
            case 2:
                place = chance.randrange(len(body))
                body[place:place] = chance.randbytes(chance.randrange(1, 9))
            case 3:
                body = bytearray(chance.randbytes(chance.randrange(64)))
        for decode in (framing.decode_commands, framing.decode_events):
            try:
                assert isinstance(decode(bytes(body)), list)
            except ProtocolError:
                num_refused += 1
    assert 10_000 < num_refused < 20_000, "most are refused, and some changes are within a text"


def test_a_frame_may_have_exactly_the_limit_of_bytes():
    assert framing.body_length((32 * 1024 * 1024).to_bytes(4, "big")) == 33_554_432
    with pytest.raises(ProtocolError):
        framing.body_length((33_554_433).to_bytes(4, "big"))
    with pytest.raises(ProtocolError):
        framing.encode([Cancel("a" * 33_554_432)])


def test_frames_are_read_from_a_socket_however_their_bytes_arrive():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frames = framing.encode([Cancel("a")]) + framing.encode([Cancel("b"), Cancel("c")])
        for byte in frames:
            theirs.send(bytes([byte]))
        assert read_frame(ours) == [Cancel("a")]
        assert read_frame(ours) == [Cancel("b"), Cancel("c")]


@pytest.mark.parametrize("num_bytes", [0, 3, 4, 10])
def test_the_end_of_the_stream_is_told_also_in_the_middle_of_a_frame(num_bytes):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(framing.encode([Cancel("a")])[:num_bytes])
        theirs.close()
        with pytest.raises(ConnectionClosed):
            read_frame(ours)


def test_a_prefix_beyond_the_limit_is_refused_before_anything_is_read():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(ProtocolError):
            read_frame(ours)


def test_the_api_the_protocol_and_the_model_name_the_same_parameters():
    sampling = set(SamplingParameters.__struct_fields__)
    assert sampling == {field.name for field in fields(Sampling)}
    api_name = {"strings": "stop", "token_ids": "stop_token_ids"}
    stop = {api_name.get(name, name) for name in StopRules.__struct_fields__}
    others = {"model", "prompt", "n", "logprobs", "stream", "timeout_s", "echo", "priority"}
    others |= {"interventions"}
    searches = {"sampler", "num_beams", "contrastive_alpha"}
    assert set(GenerateRequest.model_fields) == sampling | stop | searches | others


def test_what_info_shows_is_what_the_engine_tells():
    shown = set(ServerInfo.__struct_fields__)
    of_the_scheduler = {"chunk_tokens", "packed_tokens", "packed_prompts", "keeps_prefixes"}
    of_the_scheduler |= {"joined_tokens", "joined_rows", "head_places", "head_places_of_step"}
    assert shown | of_the_scheduler == {field.name for field in fields(EngineInfo)}


def test_the_api_asks_for_no_more_than_an_engine_gives():
    limits = field_limits()
    assert limits["logprobs"]["maximum"] == MAX_LOGPROBS
    # The ids that stop are banned until min_tokens: the request's own, eos and end of turn.
    assert limits["stop_token_ids"]["maxItems"] + 2 <= MAX_STOP_IDS
    assert limits["logit_bias"]["maxProperties"] == MAX_BIASES
    assert limits["num_beams"]["maximum"] == MAX_SEARCH_WIDTH == MAX_WIDTH
    assert score_schemas.MAX_TOP == MAX_LOGPROBS
    assert score_schemas.MAX_LOGIT_PLACES == MAX_LOGIT_PLACES
    assert limits["interventions"]["maxItems"] == MAX_INTERVENTIONS
    # All first tokens of a context's targets are asked about behind one place.
    assert score_schemas.MAX_TARGETS <= HEAD_PAIRS
