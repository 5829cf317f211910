"""Dialing real sockets on loopback: the race, the checks, every error's code, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from konnektor import connecting
from konnektor import dial as dial_module
from konnektor.addresses import IPAddress
from konnektor.connecting import Address, Dialing, begin_dial, literal
from konnektor.dial import MAX_ADDRESSES, dial
from konnektor.errors import (
    ConnectRefusedError,
    DeniedError,
    DialTimeoutError,
    DNSError,
    LimitError,
    StreamError,
    TargetResetError,
    UnreachableError,
)
from konnektor.policy import AllowList, parse_allow
from tests.session.pairs import assert_options


@contextmanager
def listening(host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
        yield listener.getsockname()[1]


@contextmanager
def silent(*hosts: str) -> Iterator[int]:
    """One port at several addresses that never answers: each listener's backlog is full."""
    while True:
        with ExitStack() as stack:
            try:
                port = _occupied(stack, hosts)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue  # free at one address, and not at another
            yield port
            return


def _occupied(stack: ExitStack, hosts: tuple[str, ...]) -> int:
    port = 0
    for host in hosts:
        listener = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
        listener.bind((host, port))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(2):  # Linux accepts one more than the backlog
            filler = stack.enter_context(socket.socket(listener.family))
            filler.setblocking(False)
            filler.connect_ex((host, port))
    return port


def unused_port(host: str = "127.0.0.1") -> int:
    with listening(host) as port:
        return port


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path(os.devnull).open("rb") as lowest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno() + 1, hard))
        held = []
        try:
            while True:
                held.append(os.dup(lowest.fileno()))
        except OSError:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in held:
                os.close(fd)


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has names resolve to the given addresses."""

    def install(*hosts: str) -> None:
        def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
            return [
                (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (h, port, 0, 0))
                if ":" in h
                else (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (h, port))
                for h in hosts
            ]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return install


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Has connecting raise the given errors in turn, None for a real connection; the addresses tried are listed."""

    def install(*errors: OSError | None) -> list[str]:
        real = dial_module._connect
        turns = iter(errors)
        tried = []

        async def connect(sock: socket.socket, address: Any) -> None:
            tried.append(address[0])
            error = next(turns)
            if error is not None:
                raise error
            await real(sock, address)

        monkeypatch.setattr(dial_module, "_connect", connect)
        return tried

    return install


@pytest.fixture(autouse=True)
def quick_stagger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_module, "STAGGER", 0.02)


async def sleepless(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.5"])
async def test_a_dialed_socket_is_ready_for_use(host: str) -> None:
    with listening("127.0.0.1" if host == "localhost" else host) as port, await dial(host, port) as sock:
        assert sock.getpeername()[1] == port
        assert not sock.getblocking()
        assert_options(sock)


@pytest.mark.replaces_methods
async def test_options_that_a_platform_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = socket.TCP_KEEPIDLE
    monkeypatch.delattr(socket, "TCP_KEEPIDLE")
    monkeypatch.setattr(connecting, "_KEEPALIVE", connecting._keepalive())
    with listening() as port, await dial("127.0.0.1", port) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, idle) != 30
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 10


async def test_an_address_asks_no_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = asyncio.all_tasks()
    monkeypatch.setattr(dial_module, "_race", None)
    with listening() as port:
        dialing = asyncio.ensure_future(dial("127.0.0.1", port))
        await asyncio.sleep(0)
        assert asyncio.all_tasks() - tasks <= {dialing}
        (await dialing).close()


async def test_refused() -> None:
    with pytest.raises(ConnectRefusedError, match=r"127\.0\.0\.1:\d+: ECONNREFUSED"):
        await dial("127.0.0.1", unused_port())


async def test_the_dialed_name_may_be_all_refused(resolve: Callable[..., None]) -> None:
    resolve("127.0.0.1", "127.0.0.2", "::1")
    with pytest.raises(ConnectRefusedError):
        await dial("db.example", unused_port())


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (errno.ECONNREFUSED, ConnectRefusedError),
        (errno.ECONNRESET, TargetResetError),
        (errno.ENETUNREACH, UnreachableError),
        (errno.EHOSTUNREACH, UnreachableError),
        (errno.EADDRNOTAVAIL, UnreachableError),
        (errno.EACCES, UnreachableError),
        (errno.ETIMEDOUT, DialTimeoutError),
        (errno.EMFILE, LimitError),
        (errno.ENFILE, LimitError),
        (errno.EAGAIN, LimitError),
        (errno.ENOBUFS, LimitError),
        (None, UnreachableError),
    ],
)
async def test_every_error_has_its_code(
    code: int | None, cls: type[StreamError], connects: Callable[..., list[str]]
) -> None:
    connects(OSError(code, "secret") if code else OSError("secret"))
    with pytest.raises(StreamError) as caught:
        await dial("127.0.0.1", 9)
    assert type(caught.value) is cls
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("first", [errno.ENETUNREACH, errno.ECONNREFUSED])
async def test_the_most_telling_error_counts(
    first: int, resolve: Callable[..., None], connects: Callable[..., list[str]]
) -> None:
    resolve("::1", "127.0.0.1")
    connects(OSError(first, "x"), OSError({errno.ENETUNREACH, errno.ECONNREFUSED}.difference({first}).pop(), "x"))
    with pytest.raises(ConnectRefusedError):
        await dial("db.example", 9)


async def test_no_descriptor_left() -> None:
    with listening() as port:
        with no_more_descriptors(), pytest.raises(LimitError):
            await dial("127.0.0.1", port)
        (await dial("127.0.0.1", port)).close()


async def test_silence_ends_at_the_deadline() -> None:
    with silent("127.0.0.1") as port, pytest.raises(DialTimeoutError, match=r"did not answer within 0\.05 s"):
        await dial("127.0.0.1", port, within=0.05)


async def test_silence_of_all_addresses_ends_at_the_deadline(resolve: Callable[..., None]) -> None:
    resolve("127.0.0.1", "127.0.0.2", "::1")
    with silent("127.0.0.1", "127.0.0.2", "::1") as port, pytest.raises(DialTimeoutError):
        await dial("db.example", port, within=0.2)


async def test_the_deadline_covers_the_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer.wait() and [])
    with pytest.raises(DialTimeoutError):
        await dial("db.example", 9, within=0.05)
    answer.set()


async def test_a_callers_own_timeout_stays_the_callers() -> None:
    with silent("127.0.0.1") as port, pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await dial("127.0.0.1", port, within=60)


async def test_unresolved_names(monkeypatch: pytest.MonkeyPatch, resolve: Callable[..., None]) -> None:
    resolve()
    with pytest.raises(DNSError, match=r"db\.example has no address"):
        await dial("db.example", 9)

    def getaddrinfo(*args: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(DNSError, match=r"db\.example did not resolve: Name or service not known"):
        await dial("db.example", 9)


@pytest.mark.parametrize("host", ["127.1", "0x7f000001", "2130706433", "::1%lo", "a b", ""])
async def test_what_is_neither_name_nor_address_reaches_no_resolver(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", None)
    with pytest.raises(DNSError, match="neither"):
        await dial(host, 9)


async def test_the_resolver_gets_the_trailing_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def getaddrinfo(host: str, *args: Any, **options: Any) -> Any:
        asked.append(host)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(DNSError):
        await dial("db.example.", 9)
    assert asked == ["db.example."]


async def test_only_checked_addresses_are_dialed(
    resolve: Callable[..., None], connects: Callable[..., list[str]]
) -> None:
    resolve("169.254.169.254", "127.0.0.1", "127.0.0.2", "::1")
    tried = connects(OSError(errno.ECONNREFUSED, "x"), None)
    seen = []
    rules = AllowList(parse_allow(text) for text in ("0.0.0.0/0:*", "[::1]:*", "127.0.0.2:*"))
    checked = rules.checker("db.example", 9)

    def check(address: IPAddress) -> None:
        seen.append(str(address))
        checked(address)

    with listening("::1") as port, await dial("db.example", port, check=check) as sock:
        assert sock.getpeername()[0] == "::1"
    assert seen == ["169.254.169.254", "127.0.0.1", "127.0.0.2", "::1"]
    assert tried == ["127.0.0.2", "::1"]


async def test_all_addresses_vetoed(resolve: Callable[..., None], connects: Callable[..., list[str]]) -> None:
    resolve("127.0.0.1", "::1")
    tried = connects()
    check = AllowList([parse_allow("db.example:9")]).checker("db.example", 9)
    with pytest.raises(DeniedError, match=r"127\.0\.0\.0/8"):
        await dial("db.example", 9, check=check)
    assert tried == []


async def test_an_address_is_checked_too(connects: Callable[..., list[str]]) -> None:
    tried = connects()
    with pytest.raises(DeniedError):
        await dial("127.0.0.1", 9, check=AllowList().checker("127.0.0.1", 9))
    assert tried == []


async def test_families_take_turns(resolve: Callable[..., None], connects: Callable[..., list[str]]) -> None:
    resolve("::1", "::2", "::3", "127.0.0.1", "127.0.0.2", *(f"127.0.1.{n}" for n in range(40)))
    tried = connects(*(OSError(errno.ENETUNREACH, "x") for _ in range(MAX_ADDRESSES)))
    with pytest.raises(UnreachableError):
        await dial("db.example", 9)
    assert tried[:6] == ["::1", "127.0.0.1", "::2", "127.0.0.2", "::3", "127.0.1.0"]
    assert len(tried) == MAX_ADDRESSES


async def test_a_silent_address_does_not_keep_the_others_waiting(resolve: Callable[..., None]) -> None:
    resolve("::1", "127.0.0.2", "127.0.0.3")
    with silent("::1", "127.0.0.2") as port, listening("127.0.0.3", port), await dial("db.example", port) as sock:
        assert sock.getpeername()[0] == "127.0.0.3"


async def test_of_two_that_connect_at_once_one_is_closed(
    resolve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = asyncio.Event()
    socks = []

    async def connect(sock: socket.socket, address: Any) -> None:
        sock.setblocking(True)
        sock.connect(address)
        sock.setblocking(False)
        socks.append(sock)
        if len(socks) == 2:
            both.set()
        await both.wait()

    monkeypatch.setattr(dial_module, "_connect", connect)
    resolve("127.0.0.1", "127.0.0.2")
    with listening("127.0.0.1") as port, listening("127.0.0.2", port), await dial("db.example", port) as sock:
        assert sock in socks
        assert [s.fileno() >= 0 for s in socks].count(True) == 1


async def test_a_connection_may_be_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(sock: socket.socket, address: Any) -> None:
        sock.setblocking(True)
        super(socket.socket, sock).connect(address)
        sock.setblocking(False)

    with listening() as port:
        monkeypatch.setattr(socket.socket, "connect", connect)
        with await dial("127.0.0.1", port) as sock:
            assert sock.getpeername() == ("127.0.0.1", port)


async def test_no_free_local_port_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(sock: socket.socket, address: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "x")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(LimitError):
        await dial("127.0.0.1", 9)


async def test_meeting_oneself_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(sock: socket.socket, address: Any) -> None:
        sock.setblocking(True)
        sock.bind(address)
        sock.connect(address)

    monkeypatch.setattr(dial_module, "_connect", connect)
    with pytest.raises(ConnectRefusedError):
        await dial("127.0.0.1", unused_port())


async def test_a_socket_reset_at_once_is_left_to_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(sock: socket.socket, address: Any) -> None:
        pass  # never connected: there is no peer's name

    monkeypatch.setattr(dial_module, "_connect", connect)
    with await dial("127.0.0.1", 9) as sock, pytest.raises(OSError):
        sock.getpeername()


@pytest.mark.replaces_methods
@pytest.mark.parametrize("turns", range(12))
@pytest.mark.parametrize("hosts", [("127.0.0.1",), ("127.0.0.1", "127.0.0.2"), ("::1", "127.0.0.1", "127.0.0.2")])
async def test_cancelling_at_any_turn_leaves_nothing(
    turns: int, hosts: tuple[str, ...], resolve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(*hosts)
    made = []

    class Noted(socket.socket):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    class Module:
        socket = Noted

        def __getattr__(self, name: str) -> Any:
            return getattr(socket, name)

    monkeypatch.setattr(connecting, "socket", Module())
    tasks = asyncio.all_tasks()
    with listening("127.0.0.1") as port:
        dialing = asyncio.ensure_future(dial("db.example", port, within=60))
        await sleepless(turns)
        if dialing.cancel():
            with pytest.raises(asyncio.CancelledError):
                await dialing
        else:
            dialing.result().close()
    assert asyncio.all_tasks() == tasks
    assert [sock.fileno() for sock in made] == [-1] * len(made)


@pytest.mark.parametrize("hosts", [("127.0.0.1",), ("::1", "127.0.0.1", "127.0.0.2")])
async def test_cancelling_a_silent_dial_leaves_nothing(
    hosts: tuple[str, ...], resolve: Callable[..., None], connects: Callable[..., list[str]]
) -> None:
    resolve(*hosts)
    tried = connects(*(None for _ in hosts))
    with silent(*hosts) as port:
        dialing = asyncio.ensure_future(dial("db.example", port))
        while len(tried) < len(hosts):
            await asyncio.sleep(0.01)
        dialing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialing
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_cancelling_as_the_winner_comes_in_closes_it(
    resolve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dial_module._connect
    socks = []

    async def connect(sock: socket.socket, address: Any) -> None:
        await real(sock, address)
        socks.append(sock)
        dialing.cancel()

    monkeypatch.setattr(dial_module, "_connect", connect)
    resolve("127.0.0.1", "127.0.0.2")
    with listening("127.0.0.1") as port:
        dialing = asyncio.ensure_future(dial("db.example", port))
        with pytest.raises(asyncio.CancelledError):
            await dialing
    assert [sock.fileno() for sock in socks] == [-1]


# Without a task


def at(host: str, port: int) -> Address:
    address = literal(host, port)
    assert address is not None
    return address


def outcome(
    sock: socket.SocketType, address: Address
) -> tuple[Dialing, asyncio.Future[socket.SocketType | StreamError]]:
    """What becomes of a socket that is connecting."""
    future: asyncio.Future[socket.SocketType | StreamError] = asyncio.get_running_loop().create_future()
    return Dialing(sock, address, future.set_result), future


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("at_once", [True, pytest.param(False, marks=pytest.mark.replaces_methods)])
async def test_an_address_needs_no_task(host: str, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:
        monkeypatch.setattr(connecting, "_is_connected", lambda _sock: False)
    tasks = asyncio.all_tasks()
    with listening(host) as port:
        sock, connected = begin_dial(at(host, port))
        assert connected is at_once
        if not connected:
            assert await outcome(sock, at(host, port))[1] is sock
            assert not asyncio.get_running_loop().remove_writer(sock.fileno())
        assert asyncio.all_tasks() == tasks
        with contextlib.closing(sock):
            assert sock.getpeername()[:2] == (host, port)
            assert not sock.getblocking()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            connecting.keep_alive(sock)  # which is left to who knows that the connection lasts
            assert_options(sock)


def test_connected_is_what_was_connected_even_if_the_other_end_has_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as near:
        assert not connecting._is_connected(near)
        near.connect(listener.getsockname())
        assert connecting._is_connected(near)
        listener.accept()[0].close()
        assert near.recv(1) == b""
        assert connecting._is_connected(near)
    with silent("127.0.0.1") as port, socket.socket() as near:
        near.setblocking(False)
        assert near.connect_ex(("127.0.0.1", port)) == errno.EINPROGRESS
        assert not connecting._is_connected(near)


async def test_a_refusal_needs_no_task() -> None:
    port = unused_port()
    sock, connected = begin_dial(at("127.0.0.1", port))
    assert not connected
    error = await outcome(sock, at("127.0.0.1", port))[1]
    assert isinstance(error, ConnectRefusedError)
    assert str(error) == f"127.0.0.1:{port}: ECONNREFUSED"
    assert sock.fileno() == -1


@pytest.mark.parametrize(
    ("number", "cls"),
    [(errno.ENETUNREACH, UnreachableError), (errno.EAGAIN, LimitError), (errno.ETIMEDOUT, DialTimeoutError)],
)
async def test_what_fails_at_once(number: int, cls: type[StreamError], monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(socket.SocketType):
        def connect_ex(self, address: Any) -> int:
            return number

    monkeypatch.setattr(socket, "SocketType", Failing)
    with pytest.raises(cls, match=rf"127\.0\.0\.1:9: {errno.errorcode[number]}"):
        begin_dial(at("127.0.0.1", 9))


async def test_no_descriptor_left_for_an_address() -> None:
    with no_more_descriptors(), pytest.raises(LimitError):
        begin_dial(at("127.0.0.1", 9))


async def test_an_address_that_meets_itself_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meeting(socket.SocketType):
        def connect_ex(self, address: Any) -> int:
            self.setblocking(True)
            self.bind(address)
            self.connect(address)
            return 0

    monkeypatch.setattr(socket, "SocketType", Meeting)
    with pytest.raises(ConnectRefusedError):
        begin_dial(at("127.0.0.1", unused_port()))


async def test_an_address_given_up_leaves_nothing() -> None:
    with silent("127.0.0.1") as port:
        sock, connected = begin_dial(at("127.0.0.1", port))
        assert not connected
        dialing, future = outcome(sock, at("127.0.0.1", port))
        await asyncio.sleep(0.01)
        number = sock.fileno()
        dialing.cancel()
        assert sock.fileno() == -1
        assert not asyncio.get_running_loop().remove_writer(number)
        assert not future.done()


async def test_a_loop_that_cannot_watch_a_socket_has_it_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_writer(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "x")

    with silent("127.0.0.1") as port:
        sock, _ = begin_dial(at("127.0.0.1", port))
        with monkeypatch.context() as patch, pytest.raises(OSError, match="x"):
            patch.setattr(asyncio, "get_running_loop", lambda: SimpleNamespace(add_writer=add_writer))
            Dialing(sock, at("127.0.0.1", port), lambda _: None)
        assert sock.fileno() == -1
