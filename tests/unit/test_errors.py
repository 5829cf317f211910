"""One exception class per wire code, and each is what callers of either world catch."""

import anyio
import pytest

from konnektor import errors
from konnektor.errors import APPLICATION_CODES, Code, PeerError, SessionError, StreamError, session_error, stream_error


@pytest.mark.parametrize("code", [code for code in Code if code < 32])
def test_session_codes(code):
    error = session_error(code, "why")
    assert isinstance(error, SessionError) and error.code == code
    assert type(error).default_code == code
    assert str(error) == error.reason == "why"


@pytest.mark.parametrize("code", [code for code in Code if code >= 32])
def test_stream_codes(code):
    error = stream_error(code)
    assert isinstance(error, StreamError) and error.code == code
    assert type(error).default_code == code
    assert str(error) == code.name.lower().replace("_", " ")


def test_unknown_codes():
    assert type(session_error(31)) is SessionError
    assert type(stream_error(99)) is StreamError and str(stream_error(99)) == "code 99"
    error = stream_error(APPLICATION_CODES[5], refused=True, retry_after=2.0)
    assert type(error) is errors.ApplicationError
    assert str(error) == "application code 2147483653"
    assert (error.refused, error.retry_after) == (True, 2.0)


@pytest.mark.parametrize("name", errors.__all__)
def test_what_callers_catch(name):
    cls = getattr(errors, name)
    if not isinstance(cls, type) or not issubclass(cls, BaseException):
        return
    assert issubclass(cls, errors.KonnektorError)
    if issubclass(cls, PeerError):
        assert issubclass(cls, anyio.BrokenResourceError) and issubclass(cls, ConnectionError)
        assert name in errors.__doc__
    assert cls.__doc__


def test_session_lost_says_how_far_it_got():
    error = errors.SessionLost("gone", Code.INTERNAL, sent=5, received=7)
    assert (error.sent, error.received, error.code) == (5, 7, Code.INTERNAL)


@pytest.mark.parametrize("code", Code)
def test_retryable(code):
    error = stream_error(code, refused=True)
    expected = code in (Code.CONNECT_REFUSED, Code.UNREACHABLE, Code.DNS, Code.DIAL_TIMEOUT, Code.LIMIT)
    assert error.retryable is expected
