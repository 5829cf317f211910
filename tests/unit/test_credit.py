"""Windows and the pool, with their books checked after each step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from konnektor.credit import TURN, Pool, ReceiveWindow, SendWindow
from konnektor.errors import FlowControlError
from konnektor.frames import MAX_OFFSET
from konnektor.limits import KIB, MIB

W0 = 16 * KIB
RTT = 0.010


def pool(size=16 * W0, slots=1):
    return Pool(size, W0, slots)


def window_of(books, limit=10**9):
    return ReceiveWindow(books, limit, 0.0)


def take(window, count):
    window.receive(count)
    return window.consume(count)


def test_receive_up_to_the_credit_and_not_beyond():
    window = window_of(pool())
    window.receive(W0)
    with pytest.raises(FlowControlError, match="1 bytes beyond"):
        window.receive(1)
    assert (window.received, window.unread) == (W0, W0)


def test_a_grant_is_due_at_a_quarter():
    window = window_of(pool())
    window.receive(W0)
    assert not window.consume(W0 // 4 - 1)
    assert window.consume(1)
    assert window.grant(0.0, RTT) == W0 + W0 // 4
    assert window.grant(0.0, RTT) is None


def test_a_grant_of_a_wide_window_is_due_at_a_mebibyte():
    window = window_of(pool(64 * MIB))
    window.size = 16 * MIB
    window.grant(0.0, RTT)
    assert not take(window, MIB - 1)
    assert take(window, 1)


def test_a_window_that_held_the_sender_back_grows():
    books = pool(1000 * W0)
    window = window_of(books, 10 * W0)
    window.blocked = True
    take(window, W0)
    assert window.grant(0.0, RTT) == W0 + 4 * W0
    assert (window.size, books.extra, window.blocked) == (4 * W0, 3 * W0, False)
    window.blocked = True
    take(window, 4 * W0)
    assert books.extra == 0
    # A window in a round trip: there is an excess, and it is less than what would be four times as much.
    assert window.grant(RTT + TURN, RTT) == 5 * W0 + 10 * W0  # the limit
    window.end()
    assert books.extra == 0


def test_growth_is_four_times_the_excess():
    window = window_of(pool(1000 * W0))
    window.blocked = True
    take(window, W0)
    window.grant(1.5 * (RTT + TURN), RTT)
    assert window.size == pytest.approx(W0 + 4 * (W0 - 3 * W0 // 4), abs=8)


def test_nothing_grows_that_was_not_blocked_or_not_in_time_or_not_measured():
    for blocked, elapsed, rtt in ((False, 0.0, RTT), (True, 2.1 * (RTT + TURN), RTT), (True, 0.0, 0.0)):
        window = window_of(pool(1000 * W0))
        window.blocked = blocked
        take(window, W0)
        window.grant(elapsed, rtt)
        assert (window.size, window.blocked) == (W0, False)


def test_a_window_is_judged_by_a_quarter_of_it():
    window = window_of(pool(64 * MIB))
    window.size = 8 * MIB
    window.grant(0.0, RTT)
    window.blocked = True
    take(window, MIB)
    assert window.grant(0.001, RTT) is not None
    assert (window.size, window.blocked) == (8 * MIB, True)
    take(window, MIB)
    window.grant(0.001, RTT)
    assert window.size > 8 * MIB
    assert not window.blocked


@pytest.mark.parametrize(("idle", "size"), [(29.9, 8 * W0), (30.0, 4 * W0), (61.0, 2 * W0), (1e4, W0), (1e300, W0)])
def test_an_idle_window_shrinks(idle, size):
    window = window_of(pool(1000 * W0))
    window.size = 8 * W0
    offset = window.grant(0.0, RTT)
    assert window.idle(idle) is (idle >= 30)
    assert window.held == 7 * W0
    take(window, W0)
    window.blocked = True
    granted = window.grant(idle, RTT)
    assert (granted or offset) >= offset
    assert window.size == size
    assert size == 8 * W0 or not window.idle(idle + 1)


def test_each_stream_holds_no_more_than_three_times_what_it_leaves_to_others():
    books = pool(64 * W0)
    windows = [window_of(books) for _ in range(3)]
    for _ in range(30):
        for window in windows:
            window.size = 64 * W0
            window.grant(0.0, RTT)
            take(window, window.granted - window.received)
            window.size = 64 * W0
            window.grant(0.0, RTT)
            books.assert_invariants()
    spare = books.free - books.size // 16
    assert all(abs(window.held - 3 * spare) < W0 for window in windows)


def test_one_stream_alone_has_three_quarters_of_the_rest_until_others_come():
    books = pool(64 * MIB, 1024)
    assert books.share(0) == 3 * (48 - 4) * MIB // 4
    first, second = window_of(books), window_of(books)
    sizes = []
    for _ in range(60):
        for window in (first, second)[: 1 + bool(sizes)]:
            window.size = 64 * MIB
            window.grant(0.0, RTT)
            take(window, min(MIB, window.granted - window.received))
            books.assert_invariants()
        sizes.append(first.held)
    assert sizes[0] == 33 * MIB - MIB
    assert sizes == sorted(sizes, reverse=True)
    assert abs(first.held - second.held) <= MIB


def test_what_is_lent_is_not_granted():
    books = pool(64 * MIB, 1024)
    books.lend(-5)
    assert books.lent == 0
    books.lend(10 * MIB)
    assert (books.lent, books.free) == (10 * MIB, 38 * MIB)
    books.lend(60 * MIB)
    assert books.lent == 33 * MIB
    assert books.share(0) == 3 * (48 - 33 - 4) * MIB // 4
    assert books.reserve()
    books.lend(60 * MIB)
    assert books.lent == 33 * MIB  # its share is less by now, and it cannot give back what was sent
    books.lend(MIB)
    assert books.lent == MIB
    books.lend(0)
    assert books.lent == 0
    books.assert_invariants()


def test_a_pool_that_runs_short_shrinks_windows_to_the_reservation():
    books = pool(16 * W0)
    window = window_of(books)
    window.size = 4 * W0
    take(window, W0)
    books.slots = 15
    assert window.grant(0.0, RTT) == W0 + W0
    assert (window.size, books.extra) == (W0, 0)


def test_what_was_granted_is_never_taken_back():
    books = pool(16 * W0)
    window = window_of(books)
    window.size = 4 * W0
    assert window.grant(0.0, RTT) == 4 * W0
    assert take(window, 2 * W0)
    books.slots = 14
    assert window.grant(0.0, RTT) is None
    assert window.granted - window.consumed == 2 * W0
    assert window.size == W0 + 3 * W0 // 4
    window.end()
    window.drop()
    assert (books.extra, window.unread) == (0, 0)


def test_a_limit_below_the_initial_window_is_the_initial_window():
    window = window_of(pool(), 1)
    window.blocked = True
    take(window, W0)
    assert window.grant(0.0, RTT) == 2 * W0


def test_reservations():
    books = pool(size=4 * W0, slots=2)
    assert books.reserve() and books.reserve()
    assert not books.reserve()
    books.release()
    assert books.reserve()
    books.assert_invariants()


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from(["receive", "consume", "block", "wait", "reserve", "release", "lend", "end", "drop"]),
            st.one_of(st.integers(1, 40_000), st.integers(1, 2**21)),
        ),
        max_size=80,
    ),
    st.sampled_from([0.0, 1e-5, 0.05, 10.0]),
)
def test_the_pool_is_never_overdrawn_and_its_books_are_right(steps, rtt):
    books = Pool(128 * W0, W0, 4)
    windows = [window_of(books, 64 * W0) for _ in range(4)]
    ended = set()
    now = 0.0
    for index, what, count in steps:
        window = windows[index]
        match what:
            case "receive":
                window.receive(min(count, window.granted - window.received))
                window.blocked = window.received == window.granted
            case "consume":
                due = window.consume(min(count, window.unread))
                if due and index not in ended:
                    before = window.granted
                    offset = window.grant(now, rtt)
                    assert window.granted == (offset or before) >= before
            case "block":
                window.blocked = True
            case "wait":
                now += count / 40_000
            case "reserve":
                books.reserve()
            case "release":
                if books.slots > 4:
                    books.release()
            case "lend":
                room = books.share(books.lent)
                books.lend(count if count & 1 else 0)
                assert not count & 1 or books.lent >= min(count, room)
            case "end":
                ended.add(index)
                window.end()
            case _:
                ended.add(index)  # it is followed by no grant
                window.drop()
        books.assert_invariants()
        for each in windows:
            each.assert_invariants()
        assert books.extra == sum(w.held for w in windows)
        assert sum(w.granted - w.consumed for w in windows) + books.lent <= books.size
        # whoever has read everything can always be sent more
        for number, each in enumerate(windows):
            assert number in ended or each.unread or each.granted - each.consumed >= W0 // 4


def test_sender_waits_rather_than_sending_crumbs():
    window = SendWindow(1000)
    assert window.sendable(1000) == 1000
    assert window.sendable(1001) == 0
    assert window.raise_limit(5000)
    assert window.sendable(10_000) == 5000
    window.sent = 4000
    assert window.sendable(1001) == 0
    assert window.sendable(999) == 999
    window.assert_invariants()


def test_credit_regression_and_overflow():
    window = SendWindow(100)
    assert not window.raise_limit(100)
    assert not window.raise_limit(5)
    assert window.raise_limit(MAX_OFFSET)
    with pytest.raises(FlowControlError):
        window.raise_limit(MAX_OFFSET + 1)
