"""Every error of the service, and of the way to it, is one of the client's and says no input."""

import pickle
import re

import httpx
import pytest

from service.client import errors, transport
from service.client.errors import (
    ConnectionLost,
    GemmaError,
    InvalidField,
    RequestError,
    ServiceFailed,
    Unavailable,
    UnexpectedAnswer,
    error_of_event,
    error_of_response,
    retry_after_seconds,
)
from service.errors import FieldError, InvalidField as ServedInvalidField, leaves, problem
from tests.client_kinds import KINDS, open_client
from tests.scripted_server import OK, response, scripted_server


def drawn(docstring: str) -> list[tuple[int, str]]:
    """The tree in a docstring: depth and name of each class."""
    lines = re.findall(r"^( *)[*x+-] (\w+)", docstring, re.MULTILINE)
    return [(len(indent) // 2, name) for indent, name in lines]


def defined(root: type, depth: int = 0) -> list[tuple[int, str]]:
    below = [line for child in root.__subclasses__() for line in defined(child, depth + 1)]
    return [(depth, root.__name__), *below]


def test_the_tree_of_the_docstring_is_the_one_of_the_classes():
    assert drawn(errors.__doc__ or "") == defined(GemmaError)


@pytest.mark.parametrize("served", leaves(), ids=lambda served: served.code)
def test_every_error_of_the_service_has_its_family_and_loses_nothing(served):
    sent = served("Too much.", errors=(FieldError("/n", "is 9"),), retry_after_seconds=7)
    body = httpx.Response(int(served.status), json=problem(sent, "abc"))

    caught = error_of_response(body.status_code, {}, body.content)

    group = next(
        each.__name__ for each in served.__mro__ if each.__base__.__name__ == "ServiceError"
    )
    families = {
        "RequestError": RequestError,
        "CapacityError": Unavailable,
        "WorkerError": Unavailable if served.status == 503 else ServiceFailed,
    }
    assert isinstance(caught, families[group])
    assert (caught.status, caught.code) == (served.status, served.code)
    assert (caught.request_id, caught.retry_after_s) == ("abc", 7)
    assert [(field.pointer, field.detail) for field in caught.errors] == [("/n", "is 9")]
    assert type(error_of_event(body.text)) is type(caught)


@pytest.mark.parametrize(
    ("status", "family"),
    [
        (401, "RequestError"),
        (404, "NotFound"),
        (409, "Conflict"),
        (418, "RequestError"),
        (422, "InvalidField"),
        (429, "Unavailable"),
        (502, "ServiceFailed"),
        (503, "Unavailable"),
        (507, "ServiceFailed"),
    ],
)
def test_what_is_no_problem_of_ours_has_the_family_of_its_status(status, family):
    caught = error_of_response(status, {"Retry-After": "4"}, b"<html>Bad gateway</html>")

    assert type(caught).__name__ == family
    assert (caught.status, caught.code, caught.retry_after_s) == (status, None, 4)
    assert "html" not in str(caught)


def test_an_error_says_where_which_code_and_which_request():
    fields = (FieldError("/top_p", "should be above 0"), FieldError("/n", "should be at most 8"))
    sent = problem(ServedInvalidField("Two fields are wrong.", errors=fields), "3f0c")

    caught = error_of_response(422, {}, httpx.Response(422, json=sent).content)

    assert isinstance(caught, InvalidField)
    assert str(caught) == (
        "Two fields are wrong. /top_p: should be above 0; /n: should be at most 8 "
        "(HTTP 422, code invalid_field, request 3f0c)"
    )


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        ("2", 2.0),
        ("0", 0.0),
        ("Mon, 23 Nov 2026 06:00:09 GMT", 9.0),
        ("Mon, 23 Nov 2026 05:00:00 GMT", 0.0),
        ("-1", None),
        ("soon", None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_by_the_clock_of_the_server(told, seconds):
    headers = httpx.Headers({"retry-after": told, "date": "Mon, 23 Nov 2026 06:00:00 GMT"})
    assert retry_after_seconds(headers) == seconds


def test_a_date_without_the_time_of_the_server_says_nothing():
    assert retry_after_seconds({"Retry-After": "Mon, 23 Nov 2026 06:00:09 GMT"}) is None
    assert retry_after_seconds({}) is None


def all_below(root: type) -> list[type]:
    return [root, *(found for child in root.__subclasses__() for found in all_below(child))]


# httpx also has errors of its callers: reading twice, cookies of the same name, a bad URL.
@pytest.mark.parametrize("foreign", all_below(httpx.RequestError), ids=lambda kind: kind.__name__)
def test_no_exception_of_the_http_library_gets_out(foreign):
    with (
        pytest.raises(GemmaError) as caught,
        transport._own_errors(httpx.URL("http://user:secret@gemma.example:81/generate")),
    ):
        raise foreign("illegal line: secret")

    assert "gemma.example:81" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_error_can_go_from_one_process_to_another():
    unavailable = error_of_response(429, {"Retry-After": "3"}, b"")
    for error in (unavailable, ConnectionLost("Broken.", 12)):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "", "ftp://a.example", "http://", "http://[::1"])
def test_an_address_that_cannot_be_one_is_refused_at_once(url):
    with pytest.raises(ValueError, match=r"^The address of a service is like http://127"):
        transport._checked(url)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>secret</html>", "Generation cannot be read at its beginning"),
        (b'{"id": "secret"}', "Generation cannot be read at model: Field required"),
    ],
)
def test_the_answer_of_another_program_is_named_as_such_and_not_shown(kind, body, said):
    with (
        scripted_server(response(OK, body)) as server,
        open_client(kind, server.url) as client,
        pytest.raises(UnexpectedAnswer, match=said) as caught,
    ):
        client.generate("1")
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_redirection_is_not_followed(kind):
    answer = response("307 Temporary Redirect", b"", "Location: http://127.0.0.1:1/")
    with (
        scripted_server(answer) as server,
        open_client(kind, server.url) as client,
        pytest.raises(UnexpectedAnswer, match="HTTP 307"),
    ):
        client.health()
