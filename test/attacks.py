"""What people try against a chat server, each case named by what it tries.

Most of these are bugs that real servers had. During every case two bystanders keep
talking: whatever is done to the server, they must not notice. The offender gets the
answer that is named, memory stays bounded, and the server lives. Hours of it, and
floods for which a machine has to be quiet, are test/abuse; random input is test/fuzz.c.

What is tried, and where (FILE.CASE; without FILE it is in this one):

  Frames
     1  lengths that wrap at 2^31, 2^32, 2^63, 2^64    huge_length
     2  lengths longer than need be                    bad_frame
     3  a byte a write, a cut at every place           cut_everywhere bad_frame unit.test_frames
     4  fragments whose sum is too much, or wraps      fragments_over_the_limit fragments_up_to_the_limit
     5  fragments without end, also empty ones         fragments_over_the_limit endless_empty_fragments
     6  frames of nothing                              zero_length
     7  no mask, reserved bits, opcodes, wrong order   bad_frame binary
     8  close frames that lie, words behind them       bad_close words_after_close both_close never_answers_close
     9  what only looks like UTF-8                     bad_utf8 utf8_that_ends_early unit.test_utf8_exhaustive
    10  pings whose pongs nobody takes                 ping_flood
    11  a member who does not read, and comes back     never_reads reads_in_sips tls.slow_reader
                                                       history.slow_member_comes_back
    12  compression                                    permessage_deflate
  HTTP and TLS
    13  heads and hellos that never end, 500 of them   slow_heads five_hundred_wait one_address_takes_all_places
                                                       tls.stalled_handshakes api.dripping
                                                       request_on_a_kept_connection
    14  heads that two parsers read in two ways        bad_head empty_lines_first tls.plain_text_on_a_tls_port
                                                       tls.broken_hellos
    15  bodies whose end is not certain                request_smuggling api.strange_lengths api.other_encodings
                                                       api.smuggled
    16  handshakes that nearly are one                 handshake handshake_of_another_kind
    17  paths that lead elsewhere                      paths history.room_names
    18  pages of others                                foreign_pages origins_by_default any_origin
                                                       api.origins api.rebinding api.preflight
    19  addresses that somebody only claims to have    server.forwarded_for server.forwarded_for_by_strangers
    20  asking much and reading little                 pipelines_and_never_reads page_in_sips server.pipelining
                                                       api.slow_reader last_answer_in_no_hurry
                                                       tls.asks_faster_than_it_reads tls.new_keys_without_end
  JSON and chat
    21  a million brackets                             deep_json depth_limit
    22  JSON that nearly is some                       odd_json bad_utf8_in_a_string chat.bad_json
    23  names, rooms and ids of the wrong kind         odd_login whispers_astray chat.errors chat.scene_room_types
                                                       chat.scene_name_types chat.content
    24  markup                                         markup chat.content chat.name_escaping
    25  rooms without end, one user everywhere, keys   ten_thousand_rooms one_user_everywhere colliding_keys
        of one hash
    26  more messages than anybody can read            flood_of_one flood_of_a_hundred
    27  the wrong moment                               after_the_end chat.before_login chat.scene_relogin_same_room
  Log and system
    28  forged lines, secrets where others can read    secrets server.log_injection server.contents_are_not_logged
                                                       api.nothing_in_the_log
    29  full disks, failing writes, death in between   history.full_disk history.failing_write history.failing_sync
                                                       history.changed_while_running history.crash_test
    30  damaged files, huge ones, two servers on one   history.damage_in_the_middle history.bad_tail
                                                       history.file_over_2_gib history.two_servers
    31  a clock that jumps                             clock_jumps stands_still
    32  no descriptors, no memory                      faults.memory server.descriptors_run_out history.few_descriptors
                                                       server.one_address_takes_all_descriptors
                                                       server.full_house_keeps_descriptors_for_files
    33  100,000 resets, accept() that fails, SIGPIPE   connect_and_reset accept_fails reset_while_being_written_to
                                                       server.harmless_signals
    34  a stop in the middle                           server.stopping server.second_signal
                                                       server.stopping_does_not_wait_for_ever
  The other ports
    35  garbage on any port; wrong keys, packets,      garbage_everywhere backend.wrong_keys backend.register_key
        sessions                                       backend.recorded_errors backend.nonsense backend.a_million_uids
                                                       backend.half_packet_deadline backend.sessions_that_are_refused
                                                       backend.refused_options api.bearer api.garbage
    36  a push gateway that breaks all rules           push.raw_bytes push.answers push.goaway push.refused_streams
                                                       push.limits push.small_windows push.no_answer push.no_new_jwt
                                                       apns.statuses
    37  one that is not there, while people talk       push.latency push.queue
"""

import base64
import contextlib
import errno
import functools
import hashlib
import hmac
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time

from harness import (BINARY, CERTIFICATE, CLOSE, CONTINUATION, KEY, PING, PONG, ROOT, SLOW, TEXT, UPGRADE,
                     Bystander, Faults, Http, Server, Skip, Stream, Ws, answer_and_end, case, check, close_frame,
                     expect_nothing, frame, get, instrumented, join, main, new_room, run, until)

attack = functools.partial(case, around=Bystander)
MAX_MESSAGE = 65536


def pushed(stream, data, seconds=1):
    """Send without reading: True if all went out, False if the server closed or stopped to read."""
    stream.sock.settimeout(seconds)
    try:
        stream.sock.sendall(data)
        return True
    except (ConnectionError, TimeoutError):
        return False


# ---------------------------------------------------------------------------
# Frames (RFC 6455)
# ---------------------------------------------------------------------------

HUGE = [(f"{opcode} of {n:#x}", opcode, n) for opcode in (TEXT, BINARY, PING)
        for n in (2**63, 2**64 - 1, 2**64 - 4, 2**63 - 1, 2**32 + 1, 2**31, MAX_MESSAGE + 1)]


@attack(rows=HUGE)
def huge_length(s, name, opcode, length):
    """A length that wraps around when something is added to it: refused before memory is asked for."""
    ann = join(s, new_room(), "Ann")
    with s.memory_grows_at_most(4096):
        ann.send(frame(opcode, claim=length, form=64))
        ann.expect_close(1002, 1003, 1009)


SUMS = [
    ("40,000 and 30,000", frame(TEXT, b"x" * 40000, fin=0) + frame(CONTINUATION, b"x" * 30000)),
    ("one too many", frame(TEXT, b"x" * MAX_MESSAGE, fin=0) + frame(CONTINUATION, b"x")),
    ("the sum wraps at 2^64", frame(TEXT, b"x" * 10, fin=0) + frame(CONTINUATION, claim=2**64 - 5, form=64)),
    ("the sum wraps at 2^63", frame(TEXT, b"x" * 10, fin=0) + frame(CONTINUATION, claim=2**63 - 5, form=64)),
    ("the sum wraps at 2^32", frame(TEXT, b"x" * 10, fin=0) + frame(CONTINUATION, claim=2**32 - 5, form=64)),
    ("100,000 of one byte", frame(TEXT, b"x", fin=0) + frame(CONTINUATION, b"x", fin=0) * 99999),
]


@attack(rows=SUMS)
def fragments_over_the_limit(s, name, raw):
    """A limit on each frame alone is not enough."""
    ann = join(s, new_room(), "Ann")
    with s.memory_grows_at_most(4096):
        ann.send(raw)
        ann.expect_close(1002, 1008, 1009)


@attack()
def fragments_up_to_the_limit(s):
    """The same fragments are welcome while their sum fits."""
    head, tail = b'{"type":"say","to_client_id":"all","content":"', b'"}'
    text = head + b"x" * (MAX_MESSAGE - len(head + tail)) + tail
    ann = join(s, "room", "Ann")
    for size in MAX_MESSAGE, 40000, 100:
        pieces = [text[i:i + size] for i in range(0, len(text), size)]
        ann.send(b"".join(frame(CONTINUATION if i else TEXT, p, fin=i == len(pieces) - 1)
                          for i, p in enumerate(pieces)))
        ann.expect("say", content=text[len(head):-len(tail)].decode())


@attack()
def endless_empty_fragments(s):
    """They cost nothing by size, so something else has to end them."""
    ann = join(s, "room", "Ann")
    with s.memory_grows_at_most(4096):
        ann.send(frame(TEXT, b"", fin=0) + frame(CONTINUATION, b"", fin=0) * 100000)
        ann.expect_close(1002, 1008, 1009)


@attack(rows=[
    ("text", frame(TEXT), (TEXT, "bad_json")),
    ("text in two", frame(TEXT, fin=0) + frame(CONTINUATION), (TEXT, "bad_json")),
    ("ping", frame(PING), (PONG, b"")),
    ("pong", frame(PONG) + frame(PING, b"next"), (PONG, b"next")),
    ("binary", frame(BINARY), (CLOSE, b"\x03\xeb")),
    ("close", frame(CLOSE), (CLOSE, b"")),
])
def zero_length(s, name, raw, answer):
    """Nothing is a legal payload, and reading its first byte is not."""
    ann = join(s, new_room(), "Ann")
    ann.send(raw)
    opcode, event = ann.event()
    if opcode == TEXT:
        event = event["code"]
    if opcode == CLOSE:
        event = event[:2]
        ann.expect_end()
    check((opcode, event) == answer, opcode, event)


FAULTS = [  # each must end with 1002
    ("unmasked", frame(TEXT, b"{}", mask=None)),
    ("unmasked and empty", frame(PING, mask=None)),
    *((f"reserved bits {rsv:03b}", frame(TEXT, b"{}", rsv=rsv)) for rsv in range(1, 8)),
    ("reserved bit of a ping", frame(PING, b"", rsv=4)),
    *((f"opcode {opcode}", frame(opcode, b"")) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    *((f"fragmented control {opcode}", frame(opcode, b"", fin=0)) for opcode in (CLOSE, PING, PONG)),
    *((f"control {opcode} of 126", frame(opcode, b"x" * 126)) for opcode in (CLOSE, PING, PONG)),
    ("control of 5 in 16 bits", frame(PING, b"12345", form=16)),
    ("continuation of nothing", frame(CONTINUATION, b"x")),
    ("continuation of what was complete", frame(TEXT, b'{"type":"pong"}') + frame(CONTINUATION, b"x")),
    ("text inside a message", frame(TEXT, b"x", fin=0) + frame(TEXT, b"x")),
    ("first fragment inside a message", frame(TEXT, b"x", fin=0) + frame(TEXT, b"x", fin=0)),
    *((f"{n} in 16 bits", frame(TEXT, b"x" * n, form=16)) for n in (0, 5, 125)),
    *((f"{n} in 64 bits", frame(TEXT, b"x" * n, form=64)) for n in (0, 125, 126, 65535)),
]


@attack("--max-per-address", "0", rows=FAULTS)
def bad_frame(s, name, raw):
    """Whatever RFC 6455 forbids ends with 1002, also when it comes byte by byte."""
    whole, dripped, other = Ws(s), Ws(s), Ws(s)
    whole.send(raw)
    whole.expect_close(1002)
    for i in range(min(len(raw), 200)):
        dripped.send(raw[i:i + 1])
        other.send(frame(PING))  # its pong proves that the server has read the byte before
        other.next_frame()
    dripped.send(raw[200:])
    dripped.expect_close(1002)


CLOSES = [  # payload of the close frame, answers
    ("one byte", b"\x03", (1002,)),
    *((f"code {c}", struct.pack(">H", c), (1002,))
      for c in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535)),
    ("reason is not UTF-8", b"\x03\xe8\xc3\x28", (1002, 1007)),
    ("reason ends in a character", b"\x03\xe8ok \xe4\xbd", (1002, 1007)),
    ("nothing", b"", (None,)),
    *((f"code {c}", struct.pack(">H", c), (c,))
      for c in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 4999)),
    ("longest reason", b"\x03\xe8" + b"x" * 123, (1000,)),
]


@attack(rows=CLOSES)
def bad_close(s, name, payload, answers):
    """A close frame may lie about everything it says; what is legal comes back, and TCP ends."""
    ann = Ws(s)
    ann.send(frame(CLOSE, payload))
    ann.expect_close(*answers)


@attack()
def words_after_close(s):
    """Nothing that follows a close frame counts, and there is only one answer to it."""
    ann, bob = join(s, "room", "Ann", "Bob")
    say = frame(TEXT, '{"type":"say","to_client_id":"all","content":"I am not here"}')
    bob.send(close_frame(1000) + say + close_frame(1001) + frame(3) + frame(TEXT, b'{"type":"login","room_id":"room"}'))
    bob.expect_close(1000)
    ann.expect("logout", from_client_id=bob.id)
    ann.expect_nothing()


@attack()
def both_close(s):
    """The server closes for a fault, the client's own close frame crosses with it."""
    ann = Ws(s)
    ann.send(frame(3) + close_frame(1000))
    ann.expect_close(1002)


@attack("--timeout", "1")
def never_answers_close(s):
    """A server that waits for the answer to its close frame for ever collects the dead."""
    ann = Ws(s)
    ann.send(frame(3))
    ann.expect_close(1002)  # and the end of TCP, though nothing was answered


BAD_UTF8 = [  # a good beginning, and the shortest continuation that cannot be UTF-8
    ("lone continuation byte", b"a", b"\x80"),
    ("overlong '/' in two", b"a", b"\xc0"),
    ("overlong in two, C1", b"a", b"\xc1"),
    ("overlong in three", b"\xe0", b"\x9f"),
    ("surrogate", b"\xed", b"\xa0"),
    ("overlong in four", b"\xf0", b"\x8f"),
    ("above U+10FFFF", b"\xf4", b"\x90"),
    ("F5", b"a", b"\xf5"),
    ("FF", b"a", b"\xff"),
    ("broken after one of two", b"\xc3", b"("),
    ("broken after two of three", b"\xe4\xbd", b"\xc0"),
    ("broken after three of four", b"\xf0\x9f\x98", b"a"),
]


@attack("--max-per-address", "0", rows=BAD_UTF8)
def bad_utf8(s, name, good, bad):
    """Found in a whole frame, across two, and as soon as the byte is there, whatever is still to come."""
    for raw in (frame(TEXT, good + bad),
                frame(TEXT, good, fin=0) + frame(CONTINUATION, bad, fin=0),
                frame(TEXT, good + bad, fin=0),
                frame(TEXT, b'{"type":"' + good + bad + b"x" * 900)[:8 + 9 + len(good + bad)]):
        ann = Ws(s)
        ann.send(raw)
        ann.expect_close(1007)


@attack(rows=[(f"{text[:n]!r}", text[:n]) for text in (b"\xc3\xa9", b"\xe4\xbd\xa0", b"\xf0\x9f\x98\x80")
              for n in range(1, len(text))])
def utf8_that_ends_early(s, name, start):
    """The end of a message inside a character is a fault; the end of a fragment is not."""
    for raw in frame(TEXT, start), frame(TEXT, start, fin=0) + frame(CONTINUATION, b""):
        ann = Ws(s)
        ann.send(raw)
        ann.expect_close(1007)


@attack(rows=[("text", frame(BINARY, b'{"type":"ping"}')), ("in pieces", frame(BINARY, b"x", fin=0)),
              ("not UTF-8", frame(BINARY, b"\xff")),
              ("inside a text", frame(TEXT, b"x", fin=0) + frame(BINARY, b"x"))])
def binary(s, name, raw):
    """Is not taken: 1003, also where it would be a fault of protocol as well."""
    ann = join(s, new_room(), "Ann")
    ann.send(raw)
    ann.expect_close(1003)


@attack()
def ping_flood(s):
    """200,000 pings from one who never reads the pongs: they must not pile up."""
    ann = Ws(s, rcvbuf=4096, answer_pings=False)
    with s.memory_grows_at_most(8192):
        block = frame(PING, b"x" * 125) * 1000
        for _ in range(200):
            if not pushed(ann, block, 0.5):
                break


@attack("--rate", "0", serial=True)
def never_reads(s):
    """A member that does not read is closed at the cap; the others hear everything, as fast as before."""
    talker, listener = join(s, "room", "Talker", "Listener")
    slow = Ws(s, rcvbuf=4096)
    slow.login("Slow", "room")
    for other in talker, listener:
        other.expect("login")
    word = frame(TEXT, json.dumps({"type": "say", "to_client_id": "all", "content": "x" * 60000}))
    latencies = []
    with s.memory_grows_at_most(12288):
        while "--backlog" not in s.log():
            check(len(latencies) < 200, "36 MB were said, and the slow one is still in")
            begin = time.monotonic()
            talker.send(word * 3)
            for member in listener, talker:
                for _ in range(3):
                    while member.message()["type"] != "say":
                        pass  # the end of the slow one comes somewhere in between
            latencies.append(time.monotonic() - begin)
    check(max(latencies) < 0.5 * SLOW, f"a word of the others took {max(latencies):.2f} s")
    check(slow.expect_close(1013, skip=True), "no reason is given")
    back = Ws(s)
    back.login("Slow", "room")
    back.say("here again")
    back.expect("say", content="here again")


@attack("--rate", "0", "--backlog", str(16 << 20))
def reads_in_sips(s):
    """TCP takes frames by halves: nothing comes between them, and who leaves still gets what was said before."""
    ann = Ws(s, rcvbuf=4096)
    ann.login("Ann", "room")
    bob = Ws(s)
    bob.login("Bob", "room")
    ann.expect("login")
    for i in range(400):
        bob.say(f"{i} " + "x" * (i * 71 % 30000))
        bob.say(f"{i}", to=ann.id)
        ann.send_json(type="ping", ref=f"{i}")
        bob.expect("say"), bob.expect("say")
    ann.send_json(type="logout")
    heard = {"all": [], ann.id: [], None: []}
    message = ann.message()
    while message["type"] != "logout":
        heard[message.get("to_client_id")].append(message.get("ref") or re.search(r"\d+", message["content"])[0])
        message = ann.message()
    check(all(words == [str(i) for i in range(400)] for words in heard.values()), "words are missing or changed places")
    ann.expect_nothing()


@attack()
def permessage_deflate(s):
    """Offered, it is not negotiated; used all the same, it is a fault."""
    ann = Ws(s, "/", "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits, x-webkit-deflate-frame")
    check("sec-websocket-extensions" not in ann.handshake.headers, ann.handshake)
    ann.send(frame(TEXT, b"\xaa\x56\x2a\xa9\x2c\x48\x55\xb2\x52\x2a\xc8\xcc\x4b\x57\xaa\x05\x00", rsv=4))
    ann.expect_close(1002)


# ---------------------------------------------------------------------------
# Cut everywhere
# ---------------------------------------------------------------------------

EXCHANGE = get("/chat?x=1", *UPGRADE) + b"".join([
    frame(TEXT, '{"type":"login","client_name":"Ann","room_id":"room"}'),
    frame(PING, b"abc"),
    frame(TEXT, '{"type":"ping","ref":"\u4f60'.encode()[:-1], fin=0),
    frame(PONG, b"unasked"),
    frame(CONTINUATION, '\u4f60"}'.encode()[2:]),
    frame(TEXT, '{"type":"ping","ref":"long","fill":"%s"}' % ("x" * 100)),
    close_frame(4000, "done")])


def replies(s, pieces, proof):
    """All that comes back for these pieces, with the order between pongs and the room's frames left out."""
    ann = Ws(s, open=False)
    for piece in pieces:
        ann.send(piece)
        proof.send(frame(PING))  # its pong proves that the server has read the piece before
        proof.next_frame()
    ann.finish_handshake()
    frames = []
    while not frames or frames[-1][0] != CLOSE:
        opcode, payload = ann.next_frame()
        frames.append((opcode, re.sub(rb"[0-9a-f]{8}-[0-9a-f]{16}|[0-9a-f]{20}|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", b"#", payload)))
    ann.expect_end()
    ann.close()
    return ann.handshake.headers, sorted(frames[:-1]), frames[-1]


@attack("--max-per-address", "0")
def cut_everywhere(s):
    """One handshake and its frames: whole, byte by byte, and in two pieces at every position."""
    proof = Ws(s)
    whole = replies(s, [EXCHANGE], proof)
    check(len(whole[1]) == 4 and whole[2] == (CLOSE, b"\x0f\xa0" + whole[2][1][2:]), whole)
    check(replies(s, [EXCHANGE[i:i + 1] for i in range(len(EXCHANGE))], proof) == whole, "byte by byte differs")
    differ = [i for i in range(1, len(EXCHANGE)) if replies(s, [EXCHANGE[:i], EXCHANGE[i:]], proof) != whole]
    check(not differ, "cut at", differ)


# ---------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------

@attack("--timeout", "1")
def slow_heads(s):
    """The deadline is for the whole head: a byte now and then does not move it."""
    begin = time.monotonic()
    silent, half, empty, drip = (Http(s) for _ in range(4))
    half.send(get()[:-4])
    empty.send(b"\r\n" * 50000)
    for byte in get("/", "X: " + "x" * 200):
        drip.send(bytes([byte]))
        try:
            if not drip.more(0.1):
                break
        except AssertionError:
            pass  # nothing yet
    for stream in silent, half, empty, drip:
        while stream.more():
            pass
        check(stream.buffer == b"" or stream.buffer.startswith(b"HTTP/1.1 408 "), stream.buffer)
    took = time.monotonic() - begin
    check(0.9 < took < 1 + 1.5 * SLOW, f"closed after {took:.2f} s")


@attack("--timeout", "2", "--max-per-address", "0")
def five_hundred_wait(s):
    """500 connections that say nothing or half a line; meanwhile others come in at once."""
    streams = [Http(s) for _ in range(500)]
    for stream in streams[::2]:
        stream.send(b"GET / HT")
    begin = time.monotonic()
    join(s, "room", "Ann", "Bob")
    check(time.monotonic() - begin < SLOW, "a login took", time.monotonic() - begin)
    for stream in streams:
        while stream.more():
            pass


@attack("--max-clients", "30", "--max-per-address", "10")
def one_address_takes_all_places(s):
    """100 connections of one address say nothing: it has its share, and others find a place."""
    for _ in range(100):
        Http(s)
    begin = time.monotonic()
    Ws(s, source="127.0.0.2").fence()
    check(time.monotonic() - begin < SLOW, "it took", time.monotonic() - begin)


LONG = "X-Fill: " + "x" * 8200
BAD_HEADS = [  # raw bytes, statuses
    ("no Host", b"GET / HTTP/1.1\r\n\r\n", 400),
    ("two Hosts", b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    ("NUL in a value", get("/", "X: a\0b"), 400),
    ("NUL in a name", get("/", "X\0: a"), 400),
    ("NUL in the path", get("/\0"), 400),
    ("bare LF", b"GET / HTTP/1.1\nHost: a\n\n", 400),
    ("bare LF in a header", b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n", 400),
    ("bare CR in a header", b"GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n", 400),
    ("folded header", get("/", "X: a", " b"), 400),
    ("folded with a tab", get("/", "X: a", "\tb"), 400),
    ("folded first header", b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    ("space before the colon", get("/", "X : a"), 400),
    ("no colon", get("/", "X"), 400),
    ("no name", get("/", ": a"), 400),
    ("HTTP/0.9", b"GET /\r\n", 400),
    ("HTTP/0.9 by name", b"GET / HTTP/0.9\r\n\r\n", 400, 505),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, 505),
    ("version without number", b"GET / HTTP/1.\r\nHost: a\r\n\r\n", 400),
    ("version in small letters", b"GET / http/1.1\r\nHost: a\r\n\r\n", 400),
    ("no path", b"GET HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("two paths", b"GET / / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("two spaces", b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("space first", b" GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("TLS hello", bytes.fromhex("16030100f4010000f00303") + bytes(range(200)), 400),
    ("TLS hello, cut", bytes.fromhex("1603010200"), 400),
    ("an HTTP proxy's CONNECT", b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 400, 405),
    ("SMTP", b"EHLO localhost\r\nMAIL FROM:<a@b>\r\n", 400),
    ("8 KB header", get("/", LONG), 431),
    ("8 KB header without end", get("/", LONG)[:-4], 431),
    ("8 KB path", get("/" + "x" * 8200), 431, 414),
    ("8 KB request line without end", b"GET /" + b"x" * 8200, 431, 414),
    ("10,000 headers", get("/", *["A: b"] * 10000), 431),
]


@attack(rows=BAD_HEADS)
def bad_head(s, name, raw, *statuses):
    """What two parsers could read in two ways is refused at once, and the connection ends."""
    answer = answer_and_end(s, raw)
    check(answer.status in statuses, answer)


@attack()
def empty_lines_first(s):
    """Some clients send a stray line end after a body: skipped, as RFC 9112 2.2 says."""
    http = Http(s)
    http.send(b"\r\n" + get("/health") + b"\r\n\r\n" + get("/health"))
    check([http.answer().status for _ in range(2)] == [200, 200])


BODIES = [
    *((f"Content-Length {v!r}", f"Content-Length: {v}") for v in (
        "1", "5", "-1", "+5", "0x10", "1e3", 2**31, 2**32, 2**63, 2**64, 2**64 + 5, "1" * 20,
        "5, 5", "5 5", "5;", "", "a")),
    ("two that differ", "Content-Length: 5", "Content-Length: 6"),
    ("0 and 5", "Content-Length: 0", "Content-Length: 5"),
    ("chunked", "Transfer-Encoding: chunked"),
    ("chunked and a length", "Transfer-Encoding: chunked", "Content-Length: 5"),
    ("a length and chunked", "Content-Length: 0", "Transfer-Encoding: chunked"),
    ("identity", "Transfer-Encoding: identity"),
    ("chunked in disguise", "Transfer-Encoding: xchunked"),
    ("empty encoding", "Transfer-Encoding:"),
]


@attack(rows=BODIES)
def request_smuggling(s, name, *lines):
    """The chat port takes no body, so nobody can be made to disagree about where one ends."""
    hidden = b"0\r\n\r\n" + get("/health")
    for raw in get("/", *lines), get("/", *lines, method="POST"), get("/", *UPGRADE, *lines):
        check(answer_and_end(s, raw + hidden).status == 400)


def upgrade(key=KEY, version="13", upgrade="websocket", connection="Upgrade"):
    """Handshake lines with one of them changed, or left out when None."""
    lines = {"Sec-WebSocket-Key": key, "Sec-WebSocket-Version": version,
             "Upgrade": upgrade, "Connection": connection}
    return [f"{k}: {v}" for k, v in lines.items() if v is not None]


HANDSHAKES = [  # lines, statuses
    ("the common one", upgrade(), 101),
    ("key missing", upgrade(key=None), 400),
    ("key empty", upgrade(key=""), 400),
    ("key short", upgrade(key="c2l4dGVlbiBieXRlcw=="), 400),
    ("key long", upgrade(key="c2l4dGVlbiBieXRlcyAuLi4="), 400),
    ("key not base64", upgrade(key="!!!!dGVlbiBieXRlcyAuLg=="), 400),
    ("key without padding", upgrade(key="c2l4dGVlbiBieXRlcyAuLg"), 400),
    ("key twice", upgrade() + [f"Sec-WebSocket-Key: {KEY}"], 400),
    ("version missing", upgrade(version=None), 426),
    ("version 7", upgrade(version="7"), 426),
    ("version 8", upgrade(version="8"), 426),
    ("version 013", upgrade(version="013"), 400, 426),
    ("version 13, 8", upgrade(version="13, 8"), 400, 426),
    ("keep-alive, Upgrade", upgrade(connection="keep-alive, Upgrade"), 101),
    ("upgrade in small letters", upgrade(connection="upgrade", upgrade="WebSocket"), 101),
    ("Upgrade with commas and tabs", upgrade(connection=" ,\tUPGRADE ,"), 101),
    ("Connection in two lines", upgrade(connection="keep-alive") + ["Connection: Upgrade"], 101),
    ("Connection in two lines, turned", upgrade() + ["Connection: keep-alive"], 101),
    ("Upgraded", upgrade(connection="Upgraded"), 200, 400),
    ("no Connection", upgrade(connection=None), 200, 400),
    ("no Upgrade", upgrade(upgrade=None), 200, 400),
    ("Upgrade: h2c", upgrade(upgrade="h2c"), 200, 400),
    ("Upgrade: websockets", upgrade(upgrade="websockets"), 200, 400),
]


@attack(rows=HANDSHAKES)
def handshake(s, name, lines, *statuses):
    """Only the handshake of RFC 6455 4.2.1 opens a WebSocket."""
    http = Http(s)
    answer = http.ask("/", *lines)
    check(answer.status in statuses, answer)
    if answer.status == 426:
        check(answer.headers.get("sec-websocket-version") == "13", answer)
        check(answer.headers.get("connection") == "close, upgrade", "RFC 9110, 7.8:", answer)


@attack(rows=[("POST", {"method": "POST"}), ("HEAD", {"method": "HEAD"}), ("HTTP/1.0", {"version": "1.0"})])
def handshake_of_another_kind(s, name, request):
    """A WebSocket begins with GET and HTTP/1.1."""
    http = Http(s)
    check(http.ask("/", *UPGRADE, **request).status in (200, 400, 405, 426, 505))


ORIGINS = [  # Origin, Host, may it, with the option of foreign_pages
    (None, "localhost:7272", True),
    ("http://localhost:7272", "localhost:7272", True),
    ("https://localhost:7272", "localhost:7272", True),
    ("HTTPS://LocalHost:7272", "localhost:7272", True),
    ("https://localhost", "localhost", True),
    ("https://localhost:443", "localhost", True),
    ("https://localhost", "localhost:443", True),
    ("https://good.example", "localhost:7272", True),
    ("https://also.example:8443", "localhost:7272", True),
    ("app://chat", "localhost:7272", True),
    ("http://localhost:7273", "localhost:7272", False),
    ("http://localhost", "localhost:7272", False),
    ("https://localhost", "localhost:8443", False),
    ("http://localhost:7272.evil", "localhost:7272", False),
    ("http://localhost.evil:7272", "localhost:7272", False),
    ("http://evil.localhost:7272", "localhost:7272", False),
    ("http://user@localhost:7272", "localhost:7272", False),
    ("http://localhost:7272/", "localhost:7272", False),
    ("null", "localhost:7272", False),
    ("*", "localhost:7272", False),
    ("file://", "localhost:7272", False),
    ("localhost:7272", "localhost:7272", False),
    ("https://good.example.evil", "localhost:7272", False),
    ("https://evil.good.example", "localhost:7272", False),
    ("https://evilgood.example", "localhost:7272", False),
    ("https://good.example:8443", "localhost:7272", False),
    ("http://good.example", "localhost:7272", False),
    ("https://good.example, http://localhost:7272", "localhost:7272", False),
    ("https://good.example app://chat", "localhost:7272", False),
    ("https://" + "a" * 4000, "localhost:7272", False),
]


def connects(s, origin, host="localhost", *more):
    """The status that a page of this origin gets for its handshake."""
    lines = [f"Host: {host}", *([] if origin is None else [f"Origin: {origin}"]), *more, *UPGRADE]
    http = Http(s)
    http.send(("GET / HTTP/1.1\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode())
    answer = http.answer()
    if answer.status == 403:
        check(b"--origin" in answer.body, answer)
        http.expect_end()
    http.close()
    return answer.status


@attack("--origin", "https://good.example,app://chat , https://Also.example:8443",
        rows=[(f"{origin} to {host}"[:80], origin, host, good) for origin, host, good in ORIGINS])
def foreign_pages(s, name, origin, host, good):
    """A page may make its reader's browser connect to any server, which then must look whose page it is."""
    secure = s.tls[0] and (origin or "").lower().startswith("http://localhost")
    check(connects(s, origin, host) == (101 if good and not secure else 403), "handshake answered by", connects(s, origin, host))


@attack()
def origins_by_default(s):
    """Without --origin: one's own page, and who is no page."""
    for origin, status in (None, 101), ("https://localhost", 101), ("https://good.example", 403), ("null", 403):
        check(connects(s, origin) == status, origin)
    check(connects(s, "https://localhost", "localhost", "Origin: https://good.example") == 400, "two origins")
    check(connects(s, "") == 400, "an origin of nothing")
    check(Http(s).ask("/", "Origin: https://evil.example").status == 200, "a link to the page is not followed")


@attack("--origin", "*")
def any_origin(s):
    """* opens it to all."""
    for origin in None, "null", "https://evil.example", "https://localhost":
        check(connects(s, origin) == 101, origin)


PATHS = ["/xchat.c", "//etc/passwd", "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc%2fpasswd",
         "/..\\..\\etc\\passwd", "/%00", "/.", "/..", "/index.html", "/.git/config", "/%", "/%zz", "//", "/health/",
         "/health%00", "/HEALTH", "/?", "/;", "/#", "etc/passwd", "*", "file:///etc/passwd", "/\xff\xfe"]


@attack(cwd=ROOT, rows=[(path, path) for path in PATHS])
def paths(s, name, path):
    """Nothing is ever read from a disk for a path: it is the page, or it is not."""
    http = Http(s)
    answer = http.ask(path)
    check(answer.status in (400, 404) or path == "/?" and answer.status == 200, answer)
    check(b"root:" not in answer.body and b"#include" not in answer.body, answer)


@attack()
def pipelines_and_never_reads(s):
    """Requests without end, answers never taken: the server has to stop reading at some time."""
    with s.memory_grows_at_most(8192):
        http = Http(s, rcvbuf=4096)
        block = get("/") * 1000
        sent = 0
        while sent < 300 and pushed(http, block, 0.5):
            sent += 1
    check(sent < 300, "300,000 requests were taken in without an answer read")


@attack()
def page_in_sips(s):
    """The page through the smallest window TCP knows: it comes whole, and keeps nobody waiting."""
    whole = Http(s).ask("/").body
    slow = Http(s, rcvbuf=1)
    slow.send(get("/") * 20)
    for _ in range(20):
        time.sleep(0.01)   # it is the server that is kept waiting here
        check(slow.answer().body == whole, "the page is another one")


# ---------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------

MILLION = 1000000
DEEP = [
    "[" * MILLION,
    '{"a":' * MILLION,
    '[{"a":' * (MILLION // 2),
    "[" * MILLION + "]" * MILLION,
    '{"a":' * MILLION + "1" + "}" * MILLION,
    '{"type":"ping","x":' + "[" * MILLION + "]" * MILLION + "}",
    '{"type":"ping","x":[' + "[]," * MILLION + "]}",  # not deep, but a comma too many at the very end
]


@case()
def deep_json():
    """A million brackets do not use the stack, of which there are only 64 KB here."""
    shell = None if instrumented() else "ulimit -s 64"
    with Server("--max-message", 8 << 20, "--rate", "0", shell=shell) as s, Bystander(s):
        ann = join(s, "room", "Ann")
        for text in DEEP:
            ann.send(frame(TEXT, text))
            ann.expect_error("bad_json")
        ann.expect_nothing()


@attack()
def depth_limit(s):
    """32 levels are enough for everybody; the 33rd is refused."""
    ann = join(s, "room", "Ann")
    for opening, closing in ("[", "]"), ('{"a":', "}"):
        for depth, answer in (32, "pong"), (33, "error"):
            n = depth - 1  # the message itself is the first
            inner = opening * n + ("1" if closing == "}" else "") + closing * n
            ann.send(frame(TEXT, '{"type":"ping","x":%s}' % inner))
            ann.expect(answer)


ODD_JSON = [  # text, wanted answer: pong, say, or an error code; with several, any
    ("100,000 keys", '{"type":"ping"' + ",".join(["", *(f'"k{i}":{i}' for i in range(100000))]) + "}", "pong"),
    ("100,000 equal keys", '{' + '"type":"say",' * 100000 + '"type":"ping"}', "pong"),
    ("1 MB number unused", '{"type":"ping","x":1%s}' % ("0" * MILLION), "pong"),
    ("1 MB key", '{"type":"ping","%s":1}' % ("k" * MILLION), "pong"),
    ("1 MB of white space", '{"type":"ping"%s}' % (" " * MILLION), "pong"),
    ("1 MB string of escapes", '{"type":"ping","x":"%s"}' % ("\\u00e9" * (MILLION // 6)), "pong"),
    ("1 MB number as content", '{"type":"say","to_client_id":"all","content":1%s}' % ("0" * MILLION),
     "say", "bad_field", "too_long"),
    ("1 MB number as room", '{"type":"login","room_id":1%s}' % ("0" * MILLION), "bad_field", "too_long"),
    ("1 MB number as name", '{"type":"login","room_id":1,"client_name":1%s}' % ("0" * MILLION),
     "bad_field", "too_long"),
    ("1e999 as content", '{"type":"say","to_client_id":"all","content":1e999}', "say", "bad_field"),
    ("-1e999 as content", '{"type":"say","to_client_id":"all","content":-1e999}', "say", "bad_field"),
    ("1e-999 as content", '{"type":"say","to_client_id":"all","content":1e-999}', "say", "bad_field"),
    ("-0 as content", '{"type":"say","to_client_id":"all","content":-0}', "say"),
    ("1e999999999999 as content", '{"type":"say","to_client_id":"all","content":1e999999999999}', "say", "bad_field"),
    ("high surrogate", r'{"type":"ping","x":"\ud800"}', "bad_json"),
    ("low surrogate", r'{"type":"ping","x":"\udc00"}', "bad_json"),
    ("high surrogate twice", r'{"type":"ping","x":"\ud800\ud800"}', "bad_json"),
    ("high surrogate and a letter", r'{"type":"ping","x":"\ud800a"}', "bad_json"),
    ("high surrogate at the end of a key", r'{"type":"ping","\ud800":1}', "bad_json"),
    ("surrogate pair", r'{"type":"ping","x":"\ud83d\ude00"}', "pong"),
    ("NUL escape in a key", r'{"type":"ping","a\u0000b":1}', "pong"),
    ("NUL escape in the type", r'{"type":"ping\u0000"}', "bad_type"),
    ("type cut by a NUL in the key", r'{"type\u0000":"ping","type":"nosuch"}', "bad_type"),
    *((f"invalid: {text}", '{"type":"ping","x":%s}' % text, "bad_json") for text in (
        r'"\x41"', r'"\a"', r'"\u12"', r'"\u12g4"', r'"\U0041"', '"\\"', '"\t"', '"\x7f\x1f"',
        "01", "-", "+1", ".5", "1.", "1.e5", "1e", "1e+", "0x10", "--1", "1 2", "NaN", "Infinity", "-Infinity",
        "tru", "True", "nul", "undefined", "'a'", "[1,]", "[,1]", "[1 2]", "[1}", '{"a":1]', '{"a"}', '{"a":}',
        '{"a" 1}', '{a:1}', '{1:1}', '{"a":1,}', '{"a":1 "b":2}', '{"a"::1}', "]", "}", ",", ":",
        "/* */1", "// 1\n1", "")),
    *((f"trailing {text!r}", '{"type":"ping"}' + text, "bad_json")
      for text in ("x", "}", "]", ",", "{}", "\0", "1", "\v", "\u00a0")),
    ("nothing but a NUL", "\0", "bad_json"),
]


@attack("--max-message", 2 << 20, "--rate", "0", rows=ODD_JSON)
def odd_json(s, name, text, *answers):
    """Every message has exactly one answer, however odd it is."""
    ann = join(s, new_room(), "Ann")
    ann.send(frame(TEXT, text))
    message = ann.message()
    check(message["type"] in answers or message.get("code") in answers, "wanted", answers, "got", str(message)[:300])
    ann.expect_nothing()


@attack(rows=[(repr(bad), bad) for bad in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xbd")])
def bad_utf8_in_a_string(s, name, bad):
    """The frame is at fault, not only the JSON in it."""
    ann, bob = join(s, new_room(), "Ann", "Bob")
    ann.send(frame(TEXT, b'{"type":"say","to_client_id":"all","content":"' + bad + b'"}'))
    ann.expect_close(1007)
    bob.expect("logout")
    bob.expect_nothing()


# ---------------------------------------------------------------------------
# Chat
# ---------------------------------------------------------------------------

@attack("--max-message", 2 << 20, "--rate", "0", rows=[
    ("64 KB room", {"room_id": "r" * 65536}, "too_long"),
    ("64 KB name", {"client_name": "n" * 65536}, "too_long"),
    ("room that is an object", {"room_id": {"room_id": "1"}}, "bad_field"),
    ("room with a NUL", {"room_id": "1\0"}, "bad_field"),
    ("room with CR LF", {"room_id": "1\r\n"}, "bad_field"),
    ("name with ESC", {"client_name": "\x1b[31m"}, "bad_field"),
])
def odd_login(s, name, fields, code):
    """Names and rooms come from strangers: what would hurt somebody is refused."""
    ann = join(s, new_room(), "Ann")
    ann.send_json({"type": "login", "client_name": "x", "room_id": "1", **fields})
    ann.expect_error(code, next(iter(fields)))


MARKUP = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "' onmouseover='x",
          "</title><script>", "<!--", "&lt;script&gt;", "&#60;b&#62;", "<b>", "a\nb<br>", "\u2028<p>", "javascript:x&"]


@attack("--rate", "0", rows=[(text, text) for text in MARKUP])
def markup(s, name, text):
    """Pages put names and contents into their document: the only tags that come are our own."""
    room = new_room()
    bob = join(s, room, "Bob")
    eve = Ws(s)
    eve.login(text.replace("\n", " "), room)
    eve.send_json(type="say", to_client_id="all", to_client_name=text, content=text)
    eve.send_json(type="say", to_client_id=bob.id, to_client_name=text, content=text)
    eve.fence().close()
    seen = []
    while not seen or seen[-1]["type"] != "logout":
        seen.append(bob.message())
    ours = re.compile("<br />\n|<b>\u5bf9\u4f60\u8bf4: </b>")
    for value in (v for message in seen for v in message.values()):
        check(not re.search("[<>\"']", ours.sub("", value)), "markup came through:", value)


@attack("--rate", "0")
def whispers_astray(s):
    """Ids that nearly are one: nobody hears it but the sender, who is told."""
    ann, bob = join(s, "room", "Ann", "Bob")
    for to in ("all ", " all", "ALL", "all\0", "", bob.id[:-1], bob.id + "0", bob.id.upper() + "x", "\0" + bob.id,
               bob.id + "\0", "0" * 20, "f" * 20, "x" * 60000, "%s", "../" + bob.id):
        ann.say("psst", to=to, ref="r")
        ann.expect_error("no_such_client", ref="r")
    expect_nothing(ann, bob)


@attack("--rate", "0")
def ten_thousand_rooms(s):
    """One client joins and leaves them all; what they took comes back."""
    ann = join(s, "room", "Ann")

    def wander(start, rooms):
        for first in range(start, start + rooms, 500):
            ann.send(b"".join(frame(TEXT, '{"type":"login","client_name":"Ann","room_id":"room %d"}' % i)
                              for i in range(first, first + 500)))
            for _ in range(500):
                ann.expect("login")
    wander(0, 1000)
    before = s.status("VmRSS")
    wander(1000, 10000)
    after = s.status("VmRSS")
    check(not before or after - before < 1024, f"{before} KiB before, {after} after")


@attack("--admin", "127.0.0.1:0", "--rate", "0", "--max-per-address", "0")
def one_user_everywhere(s):
    """300 connections that are one user: a letter reaches each, once; when they have gone nothing is left of them."""
    def call(api, path, **fields):
        body = json.dumps(fields).encode()
        api.send(get("/api/" + path, f"Content-Length: {len(body)}", method="POST") + body)
        check(api.answer().status == 200, path)

    def crowd(size):
        clients = [Ws(s) for _ in range(size)]
        api = Http(s, at="admin")   # now, since it may not be idle for long
        for client in clients:
            client.login("Ann", "room %d" % (id(client) % 7))
            call(api, "bind", client_id=client.id, uid="ann")
        call(api, "send", uid="ann", message="a letter")
        api.close()
        for client in clients:
            while not client.message().get("content", "").endswith("a letter"):
                pass
        for client in clients:
            client.fence()
            check(all(m["type"] != "say" for m in client.early), "it came twice")
            client.reset()
        until(lambda: "xchat_clients 2\n" in Http(s, at="admin").ask("/metrics").body.decode(), "they have not gone")
    crowd(300)
    before = s.status("VmRSS")
    crowd(300)
    after = s.status("VmRSS")
    check(not before or after - before < 1024, f"{before} KiB before, {after} after")


@attack("--max-per-address", "0")
def colliding_keys(s):
    """Room names with one hash under the best-known functions (times 33, times 31): a keyed hash does not care."""
    members = []
    for i in range(256):
        members.append(join(s, "".join(("Ez", "FY")[i >> bit & 1] for bit in range(8)), "Ann"))
        members.append(join(s, "".join(("Aa", "BB")[i >> bit & 1] for bit in range(8)), "Ann"))
    for i, member in enumerate(members):
        member.say(f"word {i}")
    for i, member in enumerate(members):
        member.expect("say", content=f"word {i}")


@attack()
def flood_of_one(s):
    """10,000 messages at once from one client: some are answered, some refused, then it is 1008."""
    ann = join(s, "room", "Ann")
    bob = join(s, "other room", "Bob")
    ann.send(frame(TEXT, '{"type":"ping"}') * 10000)
    counts = {"pong": 0, "error": 0}
    while True:
        opcode, event = ann.event()
        if opcode == CLOSE:
            break
        counts[event["type"]] += 1
        check(event.get("code", "rate_limited") == "rate_limited", event)
    check(event[:2] == b"\x03\xf0", "closed with", event)
    check(90 <= counts["pong"] <= 300 and 50 <= counts["error"] <= 300, counts)
    ann.expect_end()
    bob.say("alive")
    bob.expect("say", content="alive")


@attack()
def flood_of_a_hundred(s):
    """10,000 from a hundred clients of one address, each within its burst: all arrive, once."""
    clients = [join(s, f"room {i}", "Ann") for i in range(100)]
    word = frame(TEXT, '{"type":"say","to_client_id":"all","content":"x"}')
    for client in clients:
        client.send(word * 99)  # the login was the first of a hundred
    for client in clients:
        for _ in range(99):
            client.expect("say", content="x")
        client.expect_nothing()


@attack("--rate", "0", rows=[
    ("login", '{"type":"login","client_name":"Bob","room_id":"room"}'),
    ("say", '{"type":"say","to_client_id":"all","content":"ghost"}'),
    ("logout", '{"type":"logout"}'),
])
def after_the_end(s, name, text):
    """Who has closed, is gone: what he says in the same breath has no effect."""
    ann, bob = join(s, new_room(), "Ann", "Bob")
    bob.send(close_frame(1000) + frame(TEXT, text))
    bob.expect_close(1000)
    ann.expect("logout", from_client_id=bob.id)
    ann.expect_nothing()


# ---------------------------------------------------------------------------
# TCP
# ---------------------------------------------------------------------------

@attack("--max-per-address", "0")
def connect_and_reset(s):
    """100,000 connections that are reset at every stage of their life, and none is left over."""
    with s.memory_grows_at_most(8192):
        for _ in range(2000 if instrumented() else 20000):
            for begin in b"", b"", b"GET", get("/"), get("/", *UPGRADE):
                stream = Stream(s)
                stream.send(begin)
                stream.reset()
    join(s, "room", "Ann", "Bob")


@attack("--rate", "0", "--max-per-address", "0")
def reset_while_being_written_to(s):
    """The peer is gone while a frame is on its way: no SIGPIPE, no half-freed member."""
    ann = join(s, "room", "Ann")
    word = frame(TEXT, '{"type":"say","to_client_id":"all","content":"%s"}' % ("x" * 5000))
    for _ in range(50):
        guests = [Ws(s, rcvbuf=4096) for _ in range(4)]
        for guest in guests:
            guest.send_json(type="login", client_name="Guest", room_id="room")
        ann.send(word * 5)
        for guest in guests:
            guest.reset()
        ann.send(word * 5)
        said = 0
        while said < 10:
            said += ann.message()["type"] == "say"
    left = Ws(s)
    until(lambda: len(left.login("Last", "room")["client_list"]) == 2, "the guests are still listed")


INNER = ("--admin", "plain:127.0.0.1:0", "--register", "127.0.0.1:0", "--gateway", "127.0.0.1:0")
BOTH = ("--bind", "plain:127.0.0.1:0", "--bind", "tls:127.0.0.1:0", "--tls-cert", CERTIFICATE)
BEGINNINGS = [b"", get("/", *UPGRADE), b"GET /", b"\x16\x03\x01", b'{"event":"', b"\0\0\0\x30\xca",
              b"POST /api/send HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n"]


@attack(*BOTH, *INNER, "--max-per-address", "0")
def garbage_everywhere(s):
    """Random bytes on every port, behind beginnings that are right: who sends them may go, and nothing else happens."""
    dice = random.Random(5)
    with s.memory_grows_at_most(16384):
        for i in range(40 if instrumented() else 400):
            stream = Stream(s, at=i % len(s.listeners), tls=None if i // 5 % 2 else False)
            with contextlib.suppress(OSError):
                stream.send(dice.choice(BEGINNINGS) + dice.randbytes(dice.choice((1, 20, 300, 5000))))
                stream.send(dice.randbytes(100))
            dice.choice((stream.close, stream.reset))()
    check(Http(s, at="admin").ask("/health").status == 200, "the inner ports are hurt")


# ---------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------

def spelled(path, text):
    """The name of a file with this text."""
    with open(path, "w") as file:
        file.write(text)
    return path


def key_of(path):
    """A PEM file's private key, as it stands there."""
    with open(path) as file:
        return re.search("PRIVATE KEY-----\n(.*?)\n-----END", file.read(), re.S)[1]


def told(s, at, raw):
    """What the port says to these bytes."""
    stream = Stream(s, at=at)
    with contextlib.suppress(OSError):
        stream.send(raw)
        stream.sock.shutdown(socket.SHUT_WR)   # and no more is to come
    while stream.more():
        pass
    stream.close()
    return stream.buffer


def call_with(s, key):
    """The HTTP API with this key: in its place, and where others write it."""
    lines = ["Authorization: Bearer " + key, "Authorization: Basic " + key, "Cookie: key=" + key, "X-Key: " + key]
    return b"".join(told(s, "admin", get(path, line, "Connection: close", method=method))
                    for line in lines for path in ("/api/rooms", "/metrics", "/nosuch") for method in ("GET", "POST"))


def gateway_with(s, key):
    """Register and inner port with this key, and what is sent in the same breath."""
    body = json.dumps({"secret_key": key}).encode()
    hello = struct.pack(">IBIHIHIBHI", 28 + len(body), 202, 0, 0, 0, 0, 0, 1, 0, 0) + body
    worker = json.dumps({"event": "worker_connect", "secret_key": key}).encode()
    return b"".join([told(s, "register", worker + b"\n"),
                     told(s, "gateway", hello + struct.pack(">IBIHIHIBHI", 28, 10, 0, 0, 0, 0, 0, 0, 0, 0)),
                     told(s, "gateway", hello[:-1] + b"\0" * 40)])


def push_with(s, key):
    """A push to a gateway that is not there, and one that the API asks for."""
    phone = join(s, new_room(), "Ann")
    phone.send_json(type="login", client_name="Ann", room_id=new_room(), device_token="ab" * 32)
    phone.message()
    body = b'{"device_token":"%s","message":"x"}' % (b"ab" * 32)
    phone.send(close_frame(1000))
    return told(s, "admin", get("/api/push", f"Content-Length: {len(body)}", "Connection: close", method="POST") + body)


def login_with(s, key):
    """Tokens signed with it, and nearly so."""
    part = lambda data: base64.urlsafe_b64encode(data).rstrip(b"=").decode()
    text = part(b'{"alg":"HS256"}') + "." + part(b'{"sub":"42"}')
    mac = hmac.new(key.encode(), text.encode(), hashlib.sha256).digest()
    answers = []
    for token in f"{text}.{part(mac)}", f"{text}.{part(mac[::-1])}", key:
        ws = Ws(s)
        ws.send_json(type="login", client_name="Ann", room_id="room", token=token)
        answers.append(json.dumps(ws.message()))
        ws.close()
    return "\n".join(answers).encode()


def nothing_with(s, key):
    """It is read at the start and at SIGHUP, and nobody is asked for it."""
    return told(s, 0, get("/"))


APNS = ("--apns", "https://localhost:1", "--apns-ca", CERTIFICATE, "--apns-topic", "a.b")
P8 = os.path.join(ROOT, "test", "apns.p8")
PHRASE = "correct horse battery"

# What it is; the secret; options, of which {} is a file with the secret (and a line end); environment; who uses it.
SECRETS = [
    ("key of the back end", "Ghq7-Kd81-s0Vx-22mT", ["--gateway-key-file", "{}"], {}, gateway_with),
    ("key of the HTTP API", "Zt5w-Pq93-e7Bc-81nL", ["--admin-key-file", "{}"], {}, call_with),
    ("Apple's .p8", key_of(P8), [*APNS, "--apns-key", P8, "--apns-key-id", "K", "--apns-team-id", "T"], {}, push_with),
    ("passphrase in a file", PHRASE, [*APNS, "--apns-cert", CERTIFICATE, "--apns-key", "LOCKED",
                                      "--apns-passphrase-file", "{}"], {}, push_with),
    ("passphrase in the environment", PHRASE, [*APNS, "--apns-cert", CERTIFICATE, "--apns-key", "LOCKED"],
     {"XCHAT_APNS_PASSPHRASE": PHRASE}, push_with),
    ("secret of tokens", "swordfish swordfish swordfish 7!", ["--jwt-secret-file", "{}"], {}, login_with),
    ("key of a certificate", key_of(CERTIFICATE), BOTH, {}, nothing_with),
]


def leaks(secret, text):
    """A piece of it, long enough to be no accident, as it is, in hex or in base64."""
    raw = secret.replace("\n", "").encode()
    forms = raw, raw.hex().encode(), *(base64.b64encode(raw[i:])[2:-4] for i in range(3))
    return next((f[i:i + 10] for f in forms for i in range(len(f) - 9) if f[i:i + 10] in text), None)


@case(rows=SECRETS)
def secrets(name, secret, options, env, use):
    """Used rightly and nearly so, read again, lost, garbled: not in argv, an answer or the log, however much it tells."""
    seen = []
    with tempfile.TemporaryDirectory() as d:
        file = f"{d}/secret"
        options = [*INNER, *(file if o == "{}" else f"{d}/locked" if o == "LOCKED" else o for o in options)]
        if f"{d}/locked" in options:
            if not shutil.which("openssl"):
                raise Skip("openssl is not installed")
            subprocess.run(["openssl", "pkcs8", "-topk8", "-in", CERTIFICATE, "-out", f"{d}/locked",
                            "-passout", "env:P"], env={**os.environ, "P": PHRASE}, check=True)
        for verbose in [], ["--verbose"]:
            spelled(file, secret + "\n")
            with Server(*options, *verbose, env=env) as s:
                if os.path.exists(f"/proc/{s.pid}/cmdline"):
                    with open(f"/proc/{s.pid}/cmdline", "rb") as argv:
                        seen.append(argv.read())
                for key in secret, secret[:-1], secret + "x", secret.swapcase(), secret + " " + secret:
                    seen.append(use(s, key.replace("\n", " ")))
                for text in secret, "", secret * 100, "\0" + secret:
                    spelled(file, text)
                    before = len(s.lines)
                    s.signal(signal.SIGHUP)
                    until(lambda: len(s.lines) > before, "the log says nothing of SIGHUP")
            seen.append(s.log().encode())
            for text in secret, secret * 100:   # the second cannot be right, and is told of
                spelled(file, text)
                given = {variable: text for variable in env}
                seen += [out.encode() for out in run("--check", *options, *verbose, env=given)[1:]]
    for text in seen:
        piece = leaks(secret, text)
        check(not piece, piece, "of the secret is in", text[max(0, text.find(piece or b"") - 200):][:400])


# ---------------------------------------------------------------------------
# The system
# ---------------------------------------------------------------------------

@contextlib.contextmanager
def faulty(*options):
    """(server, faults): see fault.c."""
    with tempfile.TemporaryDirectory() as directory:
        faults = Faults(directory)
        with Server(*options, env=faults.env) as s:
            yield s, faults


@case()
def request_on_a_kept_connection():
    """Each request has all of --timeout, however long the connection had nothing to do before."""
    with faulty("--timeout", "1000", "--admin", "127.0.0.1:0") as (s, faults):
        idle, http = Http(s), Http(s, at="admin")
        for kept in idle, http:
            check(kept.ask("/health").status == 200)
        faults.later = 900
        body = b'{"room":"1","message":"hello"}'
        http.send(get("/api/send", f"Content-Length: {len(body)}", "Expect: 100-continue", method="POST"))
        http.take_line_end(b"100 Continue\r\n\r\n")
        faults.later = 1500
        idle.expect_end()
        http.send(body)
        check((answer := http.answer()).status == 200, answer)


@case()
def last_answer_in_no_hurry():
    """Who asks for "Connection: close" has as much time to read as others."""
    with faulty() as (s, faults):
        whole = Http(s).ask("/").body
        faults.sndbuf = 4096
        slow = Http(s, rcvbuf=2048)
        slow.send(get("/", "Connection: close"))
        time.sleep(6)   # it is the server that is kept waiting here
        check(slow.answer().body == whole, "the page is another one")


@case()
def clock_jumps():
    """A day ahead, to 1970, 2038 and 2106: times are as told, nobody is closed for it, and who is silent still is."""
    with faulty("--ping", "1", "--rate", "0") as (s, faults):
        ann, bob = join(s, "room", "Ann", "Bob")
        for wall in int(time.time()) + 86400, 100000, 2**31 - 1, 2**31 + 100000, 2**32 - 100000:
            faults.wall = wall if wall < 2**31 else wall - 2**32
            ann.fence()  # the clock is read once a round
            ann.say(str(wall))
            for client in ann, bob:
                stamp = client.expect("say", content=str(wall))["time"]
                told = time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S"))
                check(0 <= told - wall < 10, stamp, "is not", wall)
        begin = time.monotonic()
        bob.answer_pings = False
        bob.expect_close(4408, skip=True)
        took = time.monotonic() - begin
        check(1.5 < took < 5 * SLOW, f"he was silent for {took:.1f} s")
        join(s, "room 2", "Carl").fence()


@case()
def stands_still():
    """After a pause of the whole server (a machine that is moved) who has answered nothing is asked, and has time."""
    with faulty("--ping", "25") as (s, faults):
        ann, mute = join(s, "room", "Ann"), join(s, "elsewhere", "Mute")
        for later in 1000, 1002, 1004, 1006:   # each is a second that has passed for the server, at least
            faults.later = later
            ann.fence()
        mute.expect_nothing()


@case(rows=[("aborted", errno.ECONNABORTED, 1000), ("forbidden", errno.EPERM, 1000), ("interrupted", errno.EINTR, 1000),
            ("no descriptors", errno.EMFILE, 1), ("no memory", errno.ENOMEM, 1)])
def accept_fails(name, number, times):
    """Those who wait come in as soon as accept() works again; those inside do not notice."""
    with faulty() as (s, faults):
        ann, bob = join(s, "room", "Ann", "Bob")
        faults.fail("accept", number, times=times)
        late = Stream(s)
        until(lambda: faults.calls, "accept() is not intercepted")
        ann.say("hello")
        bob.expect("say")
        late.send(get("/health"))
        late.take_line_end(b"ok\n")
        check(s.log().count("accept: ") == (times == 1), s.log())


if __name__ == "__main__":
    raise SystemExit(main())
