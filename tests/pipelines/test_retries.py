"""Claims about when a request is repeated, without a store."""

import asyncio
import itertools
from types import SimpleNamespace

import aiohttp
import pytest
from botocore import exceptions as botocore
from botocore.parsers import ResponseParserError
from s3fs.errors import translate_boto_error

from pipelines import retries
from pipelines.retries import GaveUpError, is_transient, pauses, repeated, seconds_for


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "pauses" not in request.node.name:
        monkeypatch.setattr(retries, "FIRST_PAUSE", 0.0)


def refusal(status: int, code: str) -> botocore.ClientError:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.ClientError(answer, "GetObject")


class Attempt:
    """Raises these, one after the other, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.made = 0

    async def __call__(self) -> str:
        self.made += 1
        if self._errors:
            raise self._errors.pop(0)
        return "answer"


URL = {"endpoint_url": "http://store"}
TRANSIENT = [
    refusal(503, "SlowDown"),
    refusal(503, "503"),  # the answer to HEAD has no body that could say more
    refusal(500, "InternalError"),
    refusal(502, "502"),
    refusal(504, "504"),
    refusal(429, "TooManyRequests"),
    refusal(400, "RequestTimeout"),
    refusal(400, "XAmzContentSHA256Mismatch"),
    refusal(409, "ConditionalRequestConflict"),
    botocore.ConnectionClosedError(**URL),
    botocore.EndpointConnectionError(**URL, error="refused"),
    botocore.ReadTimeoutError(**URL),
    botocore.ConnectTimeoutError(**URL),
    botocore.ResponseStreamingError(error="cut"),
    botocore.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    botocore.FlexibleChecksumError(error_msg="differs"),
    ResponseParserError("no XML"),
    aiohttp.ClientPayloadError("cut"),
    TimeoutError(),
    ConnectionResetError(),
]
FINAL = [
    refusal(403, "AccessDenied"),
    refusal(404, "NoSuchKey"),
    refusal(404, "NoSuchBucket"),
    refusal(412, "PreconditionFailed"),
    refusal(400, "InvalidArgument"),
    refusal(501, "NotImplemented"),
    botocore.NoCredentialsError(),
    botocore.ParamValidationError(report="wrong"),
    ValueError("ours"),
    KeyError("ours"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=str)
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    attempt = Attempt(error, error)
    assert asyncio.run(repeated(attempt)) == "answer"
    assert attempt.made == 3


@pytest.mark.parametrize("error", FINAL, ids=str)
def test_what_will_not_pass_is_raised_as_it_is_at_once(error: Exception) -> None:
    attempt = Attempt(error)
    with pytest.raises(type(error)) as caught:
        asyncio.run(repeated(attempt))
    assert caught.value is error
    assert attempt.made == 1


def test_a_refusal_is_known_in_the_words_of_s3fs_too() -> None:
    for error in (*TRANSIENT, *FINAL):
        assert is_transient(translate_boto_error(error)) == (error in TRANSIENT), error


def test_a_final_error_after_transient_ones_is_raised_as_it_is() -> None:
    final = refusal(412, "PreconditionFailed")
    with pytest.raises(botocore.ClientError) as caught:
        asyncio.run(repeated(Attempt(TimeoutError(), final)))
    assert caught.value is final


def test_giving_up_says_how_often_and_what_was_met() -> None:
    attempt = Attempt(*[refusal(503, "SlowDown")] * 5, *[TimeoutError()] * 95)
    with pytest.raises(GaveUpError, match=r"every one of 8 attempts failed.*5 x 503 SlowDown, 3 x timeout"):
        asyncio.run(repeated(attempt))
    assert attempt.made == retries.ATTEMPTS == 8


def test_pauses_grow_exponentially_and_are_jittered_down_to_nothing() -> None:
    rows = [list(pauses()) for _ in range(400)]
    for number, drawn in enumerate(zip(*rows, strict=True)):
        most = min(retries.LONGEST_PAUSE, retries.FIRST_PAUSE * 2**number)
        assert 0 <= min(drawn) < 0.1 * most
        assert 0.9 * most < max(drawn) <= most
        assert len(set(drawn)) == len(drawn)


def test_when_the_patience_has_run_out_no_further_attempt_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 60.0)  # a silence of a minute for each attempt
    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert len(list(pauses())) == retries.PATIENCE / 60 - 1


def test_the_limit_of_an_attempt_grows_with_its_bytes() -> None:
    assert seconds_for(0) == retries.ANSWER_SECONDS
    assert seconds_for(10 * retries.SLOWEST) == retries.ANSWER_SECONDS + 10
