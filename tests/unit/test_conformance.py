"""Conformance to the specification, case by case: 44 numbered ones and two of datagrams, with the tests that show each.

Each case runs what shows it. What takes endpoints, certificates and a loop runs where it stands; here it is only named.
"""

import inspect
import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from konnektor import frames
from tests.endpoints import test_resume as endpoints
from tests.property import test_mux_bytes as any_bytes
from tests.property import test_mux_model as model
from tests.unit import test_abuse as abuse
from tests.unit import test_core_parts as parts
from tests.unit import test_credit as credit
from tests.unit import test_datagrams as datagrams
from tests.unit import test_mux_drain as drain
from tests.unit import test_mux_flow as flow
from tests.unit import test_mux_paths as paths
from tests.unit import test_mux_session as session
from tests.unit import test_mux_streams as streams
from tests.unit import test_resume as resume
from tests.unit import test_vectors as vectors

RUN = {
    "frames": vectors.test_decode,
    "errors": vectors.test_errors,
    "sessions": vectors.test_sessions,
    "resume": vectors.test_resume,
}
VECTORS = {
    vector["name"]: (name, vector)
    for name in RUN
    for vector in json.loads((Path(vectors.VECTORS) / f"{name}.json").read_text())
}
CASES = {
    "1 header split at every byte": [vectors.test_decode_cut_anywhere, "PING is answered"],
    "2 payload 0, max, max+1": [
        "empty DATA with FIN",
        "DATA as long as a frame can be",
        "DATA of the floor of max_frame",
        "DATA one byte over max_frame",
        flow.test_frames_never_exceed_what_the_peer_takes,
    ],
    "3 unknown critical frame is fatal": ["an unknown critical frame", "unknown type 0x09", "unknown type 0x48"],
    "4 unknown ignorable is skipped": ["unknown ignorable frames are skipped"],
    "5 undefined flag": ["DATA with undefined flag 4", "OPEN with undefined flag 1", "HELLO with undefined flag 128"],
    "6 HELLO missing, late, duplicate, oversize, below a floor": [
        "something before HELLO",
        session.test_no_hello_in_time,
        "HELLO twice",
        "HELLO one byte too long",
        "HELLO with max_frame below its floor",
        "HELLO with idle timeout below its floor",
    ],
    "7 disjoint versions": ["a client that no longer speaks version 1", "a client from before version 1"],
    "8 duplicate setting": ["HELLO with a setting twice"],
    "9 GREASE tolerated": ["HELLO with settings and GREASE", "HELLO with unknown settings, odd and even"],
    "10 floors usable before the peer's HELLO": [session.test_client_may_use_the_floors_before_the_servers_hello],
    "11 OPEN with wrong parity or a gap": ["OPEN with even id", "OPEN with a gap"],
    "12 id reused or decreasing": ["OPEN of the same id twice", "OPEN with a decreasing id"],
    "13 OPEN beyond STREAMS": ["one OPEN more than the server allows (8)"],
    "14 id exhaustion drains": [session.test_ids_run_out],
    "15 a reply races registration": [
        streams.test_finish_at_once_without_data,
        streams.test_data_never_overtakes_accept,
    ],
    "16 early data, then REFUSE": [streams.test_early_data_then_refuse],
    "17 TLV odd refused, even skipped": [
        "OPEN with an unknown odd parameter is refused, and the session lives",
        "OPEN with an unknown even parameter",
        streams.test_accept_with_a_critical_unknown_cancels_the_stream,
    ],
    "18 DATA after FIN": ["DATA after FIN"],
    "19 DATA one past credit": ["DATA one byte past the credit (16,384)"],
    "20 credit regression ignored, overflow fatal": ["CREDIT that goes back", "CREDIT overflow"],
    "21 final_offset mismatch": ["RESET below what came", "RESET above what came", "RESET beyond the credit"],
    "22 STOP elicits RESET, silence after its ACK closes": [
        streams.test_stop_elicits_reset,
        lambda: streams.test_reset_owed_and_not_sent_ends_the_session("STOP"),
    ],
    "23 late CREDIT for a forgotten stream is fine": [streams.test_frames_for_a_forgotten_stream],
    "24 DATA for a forgotten stream is fatal": [streams.test_frames_for_a_forgotten_stream],
    "25 half-close drains the other direction": [streams.test_half_close_leaves_the_other_direction_open],
    "26 buffered data before EOF": [flow.test_fin_waits_behind_blocked_data],
    "27 255 stalled streams, one proceeds": [flow.test_255_stalled_streams_and_one_that_proceeds],
    "28 both sides saturated, replay buffers full, no deadlock": [
        resume.test_full_replay_buffers_block_and_do_not_deadlock,
        resume.test_what_waited_for_room_in_the_replay_buffer_is_not_forgotten,
    ],
    "29 pool invariant under fuzz": [
        credit.test_the_pool_is_never_overdrawn_and_its_books_are_right,
        any_bytes.test_no_stall,
    ],
    "30 tuning reaches the bandwidth-delay product, then stops": [
        lambda: paths.test_tuning_reaches_the_bandwidth_delay_product_then_stops(0.050, 20e6),
        paths.test_a_slow_reader_has_a_window_of_its_own_pace,
    ],
    "31 PING bounded under saturation": [
        parts.test_only_the_ping_that_is_out_is_answered,
        lambda: paths.test_ping_is_bounded_under_saturation(both_ways=False),
        lambda: paths.test_ping_is_bounded_under_saturation(both_ways=True),
    ],
    "32 PING, CREDIT, PRIORITY, empty and one-byte floods": [
        *(partial(abuse.test_one_beyond_the_limit_is_calm, name) for name in abuse.LIMITS),
        "20 PINGs",
        "21 PINGs",
        "66 CREDITs, after one OPEN",
        "67 CREDITs, after one OPEN",
        "101 PRIORITYs, after one OPEN",
        "102 PRIORITYs, after one OPEN",
        abuse.test_a_flood_of_tiny_frames_pauses_reading,
        abuse.test_empty_blocked_floods_pause_reading,
    ],
    "33 rapid reset and provoked resets keep handlers bounded": [
        session.test_streams_rises_only_when_the_handler_is_gone,
        *(partial(abuse.test_rapid_resets_keep_handlers_bounded, ends) for ends in abuse.RAPID.values()),
        *(partial(abuse.test_provoked_resets_keep_handlers_bounded, name) for name in abuse.PROVOKED),
    ],
    "34 a peer that never reads leaves memory flat": [
        flow.test_a_peer_that_never_reads_leaves_memory_flat,
        lambda: paths.test_a_peer_that_takes_nothing_is_given_up(busy=True),
    ],
    "35 interactive latency beside 16 bulk streams": [
        lambda: paths.test_keystrokes_beside_16_bulk_streams(both_ways=False),
        lambda: paths.test_keystrokes_beside_16_bulk_streams(both_ways=True),
    ],
    "36 two-phase GOAWAY loses nothing, OPENs that cross it are settled": [drain.test_two_phases],
    "37 connection cut at every byte, resumed, exactly once": [
        partial(resume.test_cut_at_every_byte, ("client", "server")),
        resume.test_the_second_connection_cut_at_every_byte,
    ],
    "38 RESUME forged, replayed, ahead, behind, other identity, re-issued certificate": [
        *(
            f"refused: {what}"
            for what in (
                "a session that nobody has",
                "a proof with its last bit wrong",
                "a proof made for another connection",
                "the attempt that was granted last",
                "ahead of what was sent",
                "behind what was acknowledged",
            )
        ),
        *(partial(resume.test_a_resume_that_was_tampered_with, change) for change in resume.BAD.values()),
        *(partial(resume.test_a_resume_of_what_cannot_be, {"rx_seq": count}) for count in (0, 10**9)),
        resume.test_a_resume_is_taken_once,
        endpoints.test_another_workers_certificate_does_not_resume,
        endpoints.test_another_control_planes_certificate_is_not_resumed_with,
        endpoints.test_a_renewed_certificate_of_the_same_name_resumes,
    ],
    "39 resume while the old socket still lives and delivers": [
        resume.test_the_old_connection_still_lives_and_delivers,
        endpoints.test_the_old_connection_still_delivers,
    ],
    "40 fuzzed frame sequences agree with a simple model and leak nothing": [
        lambda: run_state_machine_as_test(
            model.MuxModel, settings=settings(max_examples=10, stateful_step_count=60, deadline=None)
        ),
        any_bytes.test_sound_frames_that_make_no_sense,
    ],
    "41 honest extremes trip no limit": [
        abuse.test_six_thousand_opens_a_second,
        abuse.test_a_target_that_resets_a_thousand_times_a_second,
        abuse.test_keystrokes_at_30_hz,
        partial(abuse.test_a_gigabyte_a_second_one_way, 1),
        partial(abuse.test_a_gigabyte_a_second_one_way, 40),
    ],
    "42 cancel while PENDING, also after FIN and crossing ACCEPT, leaves nothing": [
        lambda: streams.test_cancel_while_pending("cancel", finished=False),
        lambda: streams.test_cancel_while_pending("cancel", finished=True),
        lambda: streams.test_cancel_crosses_the_answer("accept", finished=False),
        lambda: streams.test_cancel_crosses_the_answer("accept and finish", finished=True),
    ],
    "43 a VM paused for a minute keeps its sessions": [session.test_paused_machine_kills_no_session],
    "44 the in-flight cap does not collapse when the round trip rises": [
        paths.test_the_cap_does_not_collapse_when_the_round_trip_rises_from_10_to_80_ms,
    ],
    "45 DATAGRAM that nobody can take is dropped, one on a stream of another kind is fatal": [
        "DATAGRAM for a stream that was never opened is dropped",
        "DATAGRAM for a pending stream is dropped",
        "DATAGRAM for a stream that was given up is dropped",
        datagrams.test_never_opened_and_forgotten,
        datagrams.test_pending,
        datagrams.test_refused,
        lambda: datagrams.test_finished(frames.Data(1, b"", 1)),
        datagrams.test_a_type_without,
        lambda: datagrams.test_used_only_if_both_have_them("client"),
    ],
    "46 datagrams that wait are bounded, the oldest go, and those in flight count": [
        datagrams.test_the_queue_drops_its_oldest_while_the_connection_is_full,
        datagrams.test_a_session_drops_its_oldest_whosever_it_is,
        datagrams.test_beyond_the_cap_they_wait_for_a_pong,
    ],
}


def test_every_case_is_here():
    """Those of the specification, by number; 45 and 46 are of datagrams, which it had no case for."""
    assert [int(case.split()[0]) for case in CASES] == list(range(1, 47))
    for case, shown in CASES.items():
        assert any(not inspect.iscoroutinefunction(test) for test in shown), f"{case}: nothing runs here"
        elsewhere = [test for test in shown if inspect.iscoroutinefunction(test)]
        assert all(test.__name__.startswith("test_") for test in elsewhere), f"{case}: nothing collects it"


@pytest.mark.parametrize("case", CASES)
def test_case(case):
    for shown in CASES[case]:
        if isinstance(shown, str):
            name, vector = VECTORS[shown]
            RUN[name](vector)
        elif shown is vectors.test_decode_cut_anywhere:
            for name, vector in VECTORS.values():
                if name == "frames":
                    shown(vector)
        elif not inspect.iscoroutinefunction(shown):
            shown()
