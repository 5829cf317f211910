"""Windows and the pool, with their books checked after each step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from konnektor.credit import Pool, ReceiveWindow, SendWindow
from konnektor.errors import FlowControlError
from konnektor.frames import MAX_OFFSET
from konnektor.limits import KIB

W0 = 16 * KIB


def pool(size=16 * W0, slots=1):
    return Pool(size, W0, slots)


def test_receive_up_to_the_credit_and_not_beyond():
    window = ReceiveWindow(pool(), 10**6)
    window.receive(W0)
    with pytest.raises(FlowControlError, match="1 bytes beyond"):
        window.receive(1)
    assert (window.received, window.unread) == (W0, W0)


def test_a_grant_is_due_at_a_quarter():
    window = ReceiveWindow(pool(), 10**6)
    window.receive(W0)
    assert not window.consume(W0 // 4 - 1)
    assert window.consume(1)
    assert window.grant() == W0 + W0 // 4
    assert window.grant() is None


def test_a_blocked_sender_gets_four_times_the_window():
    books = pool(size=100 * W0)
    window = ReceiveWindow(books, 10 * W0)
    window.receive(W0)
    window.consume(W0)
    window.blocked = True
    assert window.grant() == W0 + 4 * W0
    assert (window.size, books.extra, window.blocked) == (4 * W0, 3 * W0, False)
    window.blocked = True
    window.receive(4 * W0)
    window.consume(4 * W0)
    assert books.extra == 0
    assert window.grant() == 5 * W0 + 10 * W0  # the limit
    window.end()
    assert books.extra == 0


def test_growth_stops_where_the_pool_does():
    books = pool(size=8 * W0)
    window = ReceiveWindow(books, 10**9)
    window.receive(W0)
    window.consume(W0)
    window.blocked = True
    window.grant()
    assert window.size == W0 + 7 * W0 // 4
    books.assert_invariants()


def test_scarcity_shrinks_to_the_reservation():
    books = pool(size=16 * W0)
    window = ReceiveWindow(books, 10**9)
    window.size = 4 * W0
    window.receive(W0)
    window.consume(W0)
    books.slots = 13  # little is free
    assert books.scarce
    assert window.grant() == W0 + W0
    assert (window.size, books.extra) == (W0, 0)


def test_scarcity_that_comes_after_a_grant_was_due_leaves_the_old_one():
    books = pool(size=16 * W0)
    window = ReceiveWindow(books, 10**9)
    window.size = 4 * W0
    assert window.grant() == 4 * W0
    window.receive(2 * W0)
    assert window.consume(2 * W0)
    books.slots = 12
    assert window.grant() is None
    assert window.granted - window.consumed == 2 * W0


def test_a_grant_takes_no_more_than_is_free():
    books = pool(size=8 * W0)
    window = ReceiveWindow(books, 10**9)
    window.size = 20 * W0
    assert window.grant() == 8 * W0
    assert books.free == 0
    window.size = 20 * W0
    window.receive(8 * W0)
    window.consume(1)
    window.end()
    assert books.extra == 7 * W0 - 1
    window.drop()
    assert (books.extra, window.unread) == (0, 0)


def test_a_full_pool_grants_nothing():
    # free is 0 and a quarter of nothing: the only pool where scarcity does not come first
    books = Pool(0, 0, 0)
    window = ReceiveWindow(books, 10)
    window.size = 5
    assert window.grant() is None


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
            st.integers(0, 3), st.sampled_from(["receive", "consume", "block", "end", "drop"]), st.integers(1, 40_000)
        ),
        max_size=60,
    )
)
def test_the_pool_is_never_overdrawn_and_its_books_are_right(steps):
    books = Pool(12 * W0, W0, 4)
    windows = [ReceiveWindow(books, 8 * W0) for _ in range(4)]
    ended = set()
    for index, what, count in steps:
        window = windows[index]
        if what == "receive":
            window.receive(min(count, window.granted - window.received))
        elif what == "consume":
            due = window.consume(min(count, window.unread))
            if due and index not in ended:
                window.grant()
        elif what == "block":
            window.blocked = True
        elif what == "end":
            ended.add(index)
            window.end()
        else:
            ended.add(index)  # it is followed by no grant
            window.drop()
        books.assert_invariants()
        for each in windows:
            each.assert_invariants()
        assert books.extra == sum(max(0, w.granted - w.consumed - W0) for w in windows)
        assert sum(w.granted - w.consumed for w in windows) <= books.size
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
