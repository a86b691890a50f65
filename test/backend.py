"""The back end's side: register, inner port of the gateway, business workers.

A PHP program orders a chat about through two ports, in a protocol of its own: packets
with a header of 28 bytes, answers in PHP's serialize(). backend.json holds what its
library and two gateways of a PHP chat have said to each other, and is replayed here
byte for byte; only addresses and connection numbers differ.

backend.php is a back end as small as can be; its cases need php (the package php-cli).

    GATEWAYCLIENT   Gateway.php of GatewayClient, or its directory. Without it there is
                    no case real_library (none that is skipped either).
"""

import contextlib
import functools
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
import threading
import time

from harness import (DEADLINE, PING, PONG, ROOT, TEXT, Bystander, Faults, Http, Server, Skip, Stream, Ws,
                     case, check, expect_nothing, frame, get, instrumented, join, main, new_room, run, until)
from inner import (ALL_SESSIONS, BATCH_COUNT, BATCH_IDS_BY_UID, BIND_UID, COUNT_BY_GROUP, DESTROY, GROUPS, HEAD, HELLO,
                   IDS_BY_UID, IS_ONLINE, JOIN_GROUP, KICK, LEAVE_GROUP, ON_CLOSE, ON_CONNECT, ON_HANDSHAKE,
                   ON_MESSAGE, SELECT, SEND_TO_ALL, SEND_TO_GROUP, SEND_TO_ONE, SEND_TO_UID,
                   SESSIONS_BY_GROUP, SET_SESSION, UNBIND_UID, UNGROUP, UPDATE_SESSION, WORKER, WORKER_PING,
                   Inner, Worker, hello, number, octets, packet, php)

with open(os.path.join(ROOT, "test", "backend.json"), encoding="utf-8") as golden:
    GOLDEN = json.load(golden)

GATEWAY = ("--gateway", "127.0.0.1:0", "--rate", "0", "--max-per-address", "0")
BOTH = (*GATEWAY, "--register", "127.0.0.1:0")
gateway = functools.partial(case, *GATEWAY)
attack = functools.partial(case, *GATEWAY, around=Bystander)


# ---------------------------------------------------------------------------
# What comes to a client
# ---------------------------------------------------------------------------

def chat_text(client):
    """The next text as it is on the wire; not all of a back end's messages are JSON."""
    while True:
        opcode, payload = client.next_frame()
        if opcode == PING:
            client.send(frame(PONG, payload))
            continue
        check(opcode == TEXT, f"wanted a text, got opcode {opcode}", payload)
        if payload != b'{"type":"ping"}':
            return payload.decode()


def texts(inner, client, conn=None):
    """What has come to a client, now that what was told is done."""
    inner.fence().tell(SEND_TO_ONE, conn or client, body="the end")
    return list(iter(lambda: chat_text(client), "the end"))


def hears(inner, client, *words):
    heard = texts(inner, client)
    check(heard == list(words), "heard", heard[:9], "in place of", list(words)[:9])


def stranger(s, inner):
    """(client, number) of one who has not logged in."""
    before = set(inner.numbers())
    client = Ws(s)
    new = set(inner.numbers()) - before
    check(len(new) == 1, "the newcomer is one of", new)
    return client, new.pop()


# ---------------------------------------------------------------------------
# The register
# ---------------------------------------------------------------------------

ASK = b'{"event":"worker_connect","secret_key":""}\n'


def announce(address, key=""):
    return json.dumps({"event": "gateway_connect", "address": address, "secret_key": key}).encode() + b"\n"


class Register(Stream):
    """A connection to the register."""

    def __init__(self, s, **stream):
        super().__init__(s, "register", **stream)

    def line(self):
        return self.take_line_end(b"\n")

    def addresses(self):
        line = self.line()
        message = json.loads(line)
        check(list(message) == ["event", "addresses"] and message["event"] == "broadcast_addresses", line)
        check(isinstance(message["addresses"], list), "not an array:", line)
        check(b" " not in line and b"\\" not in line, "not as PHP has it:", line)
        return message["addresses"]

    def ask(self, key=""):
        self.send(ASK.replace(b'""', json.dumps(key).encode()))
        return self.addresses()


@case()
def register_deadline():
    """Ten seconds for a first line, and no word when they are over; the clock is put forward."""
    with clock() as faults, Server(*BOTH, env=faults.env) as s:
        idle, half, live = Register(s), Register(s), Register(s)
        half.send(ASK[:-1])
        live.send(b'{"event":"ping"}\n')
        Register(s).ask()   # so all of them are accepted, and read
        faults.later = 3
        late = Register(s)
        late.send(ASK[:-1])
        Register(s).ask()
        faults.later = 11
        idle.expect_end()
        half.expect_end()
        late.send(ASK[-1:])
        check(late.addresses() == live.ask() == [s.gateway], "who has spoken, or has time, is closed as well")


@contextlib.contextmanager
def clock():
    """Faults of which only the clock is meant."""
    with tempfile.TemporaryDirectory(prefix="xchat") as d:
        yield Faults(d)


@case(*BOTH, rows=GOLDEN["register"])
def register_lines(s, name, request, answer, closed):
    """Lines, and what the register of a PHP chat answers to them."""
    other = Register(s)
    other.send(announce("127.0.0.1:2301"))
    until(lambda: len(Register(s).ask()) == 2, "the other gateway is not listed")
    again = Register(s)
    again.send(announce(s.gateway))
    client = Register(s)
    client.send(bytes.fromhex(request))
    want = bytes.fromhex(answer).replace(b"127.0.0.1:2300", s.gateway.encode())
    got = client.take(len(want))
    check(got == want, got)
    if closed:
        return client.expect_end()
    client.send(b"}\n" if name == "unterminated" else ASK)
    check(client.addresses() == [s.gateway, "127.0.0.1:2301"], "then")
    other.close()
    until(lambda: len(Register(s).ask()) == 1, "the other gateway is still listed")


@case(*BOTH)
def register_broadcasts(s):
    """Gateways come, move and go; who waits hears of each change, and always an array without doubles."""
    base, watcher, gateways = Register(s), Register(s), {}
    base.send(announce("127.0.0.1:2301"))
    until(lambda: len(Register(s).ask()) == 2, "the second gateway is not listed")
    for after, addresses in GOLDEN["broadcast"]:
        name, does, line = (after + " ").partition(" ")
        if after == "start":
            watcher.send(ASK)
        elif "disconnects" in line:
            gateways[name].close()
        else:
            gateways.setdefault(name, None) or gateways.update({name: Register(s)})
            gateways[name].send(line[line.index("{"):].strip().encode() + b"\n")
        want = [a.replace("127.0.0.1:2300", s.gateway) for a in addresses]
        got = watcher.addresses()
        check(got == want, f"after {after!r}:", got, "in place of", want)


@case(*BOTH)
def register_of_a_bad_address(s):
    """A gateway that names another address, and none that can be one, has gone: who waits hears of it."""
    watcher = Register(s)
    check(watcher.ask() == [s.gateway])
    for bad in "", "x" * 65:
        moving = Register(s)
        moving.send(announce("10.0.0.1:2300"))
        check(watcher.addresses() == [s.gateway, "10.0.0.1:2300"])
        moving.send(announce(bad))
        moving.expect_end()
        check(watcher.addresses() == [s.gateway], "it is listed still")


def heard_of(s):
    """How many addresses the register has."""
    with contextlib.closing(Register(s)) as asker:
        return len(asker.ask())


@case("--register", "127.0.0.1:0", around=Bystander)
def register_is_not_read(s):
    """Who wants all addresses and reads none is shut out, before the server holds too much for him.
    His own buffer has an end, too: a kernel that makes it larger may hold all of this for him."""
    watcher, base = Register(s, rcvbuf=4096), Register(s)
    watcher.send(ASK)
    until(lambda: len(watcher.sock.recv(1, socket.MSG_PEEK)) == 1, "no answer")
    others = [Register(s) for _ in range(100)]
    for i, other in enumerate(others):
        other.send(announce(f"{i:064}"))
    until(lambda: heard_of(s) == len(others), "not all are listed")   # or the lists below are short ones
    for i in range(4000):
        base.send(announce(f"{i:064}"))
    base.send(ASK)
    base.line()
    held = 0
    with contextlib.suppress(ConnectionResetError):
        while more := len(watcher.sock.recv(1 << 20)):
            held += more
    check(held < 24 << 20, "held for him:", held)


@case("--register", "127.0.0.1:0")
def register_alone(s):
    """Without a gateway the list is empty; lines may come in pieces, or many at once; one has an end."""
    client = Register(s)
    for i in range(len(ASK)):
        client.send(ASK[i:i + 1])
    check(client.addresses() == [])
    client.send(ASK * 500)
    for _ in range(500):
        check(client.addresses() == [])
    with s.memory_grows_at_most(24 << 10):
        for _ in range(3):
            endless = Register(s)
            endless.send(b"x" * (10 << 20))
            endless.send(b"xx")
            endless.expect_end()
            endless.close()
    check(client.ask() == [])


def key_file(directory, key, name="key"):
    path = os.path.join(directory, name)
    with open(path, "wb") as file:
        file.write(octets(key))
    return path


@contextlib.contextmanager
def keyed(key="sekret", *options, **server):
    """A server with a key, which it must not log."""
    with tempfile.TemporaryDirectory(prefix="xchat") as d, \
            Server(*BOTH, "--gateway-key-file", key_file(d, key + "\n"), "--verbose", *options, **server) as s:
        s.directory = d
        yield s
        check(key not in s.log(), "the key is in the log")


@case()
def register_key():
    """Who does not know the key hears nothing, whatever its form."""
    with keyed() as s:
        for secret in ("", "sekre", "sekret ", "sekretx", "SEKRET", "sekret\0", None, 5, True, ["sekret"], {"a": 1}):
            for event in "worker_connect", "gateway_connect":
                client = Register(s)
                line = json.dumps({"event": event, "address": "127.0.0.1:1", "secret_key": secret})
                client.send(line.encode() + b"\n")
                client.expect_end()
        for line in b'{"event":"worker_connect"}\n', b'{"event":"gateway_connect","address":"127.0.0.1:1"}\n':
            client = Register(s)
            client.send(line)
            client.expect_end()
        client = Register(s)
        client.send(b'{"event":"ping"}\n' + ASK.replace(b'""', b'"sekret"'))
        check(client.addresses() == [s.gateway], "a wrong gateway is listed")


@contextlib.contextmanager
def pair(key=""):
    """Two servers whose gateways are listed in the register of the first."""
    with tempfile.TemporaryDirectory(prefix="xchat") as d:
        options = ("--gateway-key-file", key_file(d, key)) if key else ()
        with Server(*BOTH, *options) as a, Server(*GATEWAY, "--join", a.register, *options) as b:
            until(lambda: Register(a).ask(key) == [a.gateway, b.gateway], "the second gateway is not listed")
            yield a, b


@case()
def join_comes_back():
    """A gateway is listed as long as it lives; it looks for a register that was away."""
    with Server("--register", "127.0.0.1:0") as first, Server(*GATEWAY, "--join", first.register) as s:
        watcher = Register(first)
        watcher.send(ASK)
        until(lambda: s.gateway in watcher.addresses(), "it is not listed")
        with Server(*GATEWAY, "--join", first.register.replace("127.0.0.1", "localhost")) as other:
            check(watcher.addresses() == [s.gateway, other.gateway])
            other.kill()
            check(watcher.addresses() == [s.gateway], "a dead gateway is listed")
            other.want_status, other.asked_to_stop = other.process.returncode, True
        address = first.register
        first.stop()
        with Server("--register", address) as second:
            watcher = Register(second)
            watcher.send(ASK)
            check(watcher.addresses() == [] and watcher.addresses() == [s.gateway], "it does not come back")


def first_line(listener, s):
    """A gateway comes to a register of ours: the connection, what it says, and a reader of what follows."""
    sock = listener.accept()[0]
    sock.settimeout(DEADLINE)
    lines = sock.makefile("rb")
    said = json.loads(lines.readline())
    check(said == {"event": "gateway_connect", "address": s.gateway, "secret_key": ""}, "its first line:", said)
    return sock, lines


@contextlib.contextmanager
def joined(host):
    """(faults, listener, server) of a gateway that joins us there."""
    with clock() as faults, socket.create_server((host, 0)) as listener:
        listener.settimeout(DEADLINE)
        with Server(*GATEWAY, "--join", f"{host}:{listener.getsockname()[1]}", env=faults.env) as s:
            yield faults, listener, s


@case()
def join_pings():
    """To a register elsewhere, every 25 s."""
    with joined("127.0.0.2") as (faults, listener, s):
        sock, lines = first_line(listener, s)
        faults.later = 26
        check(json.loads(lines.readline()) == {"event": "ping"}, "its next line")
        lines.close(), sock.close()


@case()
def join_is_silent():
    """To one on this machine it says its address, and again when it has lost it; nothing else, whatever it hears."""
    with joined("127.0.0.1") as (faults, listener, s):
        sock, lines = first_line(listener, s)
        sock.sendall(b'{"event":"broadcast_addresses","addresses":[]}\n' * 3)   # of no interest
        half = Inner(s)
        half.send(packet(IS_ONLINE)[:-1])
        Inner(s).fence()
        faults.later = 31
        half.expect_end()   # so it has looked at the clock
        sock.shutdown(socket.SHUT_WR)
        check(lines.read() == b"", "it has said more")
        lines.close(), sock.close()
        for stream in first_line(listener, s):
            stream.close()


@case(rows=[
    ("any address", ["--gateway", "0.0.0.0:0"], 2, ["--gateway"]),
    ("a name", ["--gateway", "localhost:0"], 2, ["--gateway"]),
    ("IPv6", ["--gateway", "[::1]:0"], 2, ["--gateway"]),
    ("no port", ["--gateway", "127.0.0.1"], 2, ["--gateway"]),
    ("reachable", ["--gateway", "192.0.2.1:0"], 2, ["--gateway", "--gateway-key-file"]),
    ("reachable register", ["--register", "0.0.0.0:0"], 2, ["--register", "--gateway-key-file"]),
    ("nothing to join with", ["--join", "127.0.0.1:1"], 2, ["--join", "--gateway"]),
    ("no port to join", [*GATEWAY, "--join", "127.0.0.1"], 2, ["--join", "HOST:PORT"]),
    ("port 0 to join", [*GATEWAY, "--join", "127.0.0.1:0"], 2, ["--join", "HOST:PORT"]),
    ("port 65536 to join", [*GATEWAY, "--join", "127.0.0.1:65536"], 2, ["--join", "HOST:PORT"]),
    ("no host to join", [*GATEWAY, "--join", ":1236"], 2, ["--join", "HOST:PORT"]),
    ("a long host to join", [*GATEWAY, "--join", "x" * 256 + ":1236"], 2, ["--join", "HOST:PORT"]),
    ("no key file", [*GATEWAY, "--gateway-key-file", "/nonexistent"], 1, ["--gateway-key-file", "/nonexistent"]),
    ("an empty one", [*GATEWAY, "--gateway-key-file", "/dev/null"], 1, ["--gateway-key-file", "/dev/null"]),
    ("one without end", [*GATEWAY, "--gateway-key-file", "/dev/zero"], 1, ["--gateway-key-file", "/dev/zero"]),
])
def refused_options(name, options, status, words):
    """What would be reachable by everybody, or cannot work, does not start."""
    got, out, err = run(*options)
    check(got == status, f"status {got}:", err)
    last = err.strip().split("\n")[-1]
    check(all(w in last for w in words), words, "are not in:", last)


# ---------------------------------------------------------------------------
# As it was recorded
# ---------------------------------------------------------------------------

def renumbered(raw, numbers):
    """A recorded request, with the clients of today: in the header and in JSON."""
    raw = bytes.fromhex(raw)
    done, at = b"", 0
    while at < len(raw):
        length, cmd, *_, conn, flag, _, size = HEAD.unpack_from(raw, at)
        ext, body = raw[at + 28:at + 28 + size], raw[at + 28 + size:at + length]
        ext = re.sub(rb'"(\d+)":(\d+)', lambda m: b'"%d":%d' % ((numbers.get(int(m[1]), int(m[1])),) * 2), ext)
        done += packet(cmd, numbers.get(conn, conn), ext, body, flag)
        at += length
    return done


def answer_of(raw, numbers):
    """A recorded answer, as `reply` has it, with the numbers of today."""
    text = bytes.fromhex(raw)[4:].decode()
    return re.sub(r"(?<=[{};])i:(\d+);", lambda m: f"i:{numbers.get(int(m[1]), int(m[1]))};", text)


def repeat(entries, sides, talk):
    """Play recorded packets. `sides`: "A", "B" -> (server, numbers); talk(server) gives a connection."""
    for name, where, request, answers in entries:
        for side in where:
            s, numbers = sides[side]
            with talk(s) as inner:
                inner.send(renumbered(request, numbers))
                if side in answers:
                    got, want = inner.reply(), answer_of(answers[side], numbers)
                    check(got == want, f"{name} at {side}: {got!r} in place of {want!r}")


def persistent(prefix=b""):
    """A `talk` that keeps one connection to each server, and begins each time with `prefix`."""
    kept = {}

    @contextlib.contextmanager
    def talk(s):
        inner = kept.setdefault(s.pid, None) or kept.update({s.pid: Inner(s)}) or kept[s.pid]
        inner.send(prefix)
        yield inner
    return talk


@contextlib.contextmanager
def short_lived(s):
    """A `talk` that opens a connection each time, as the library does; but it waits until that has been read.
    Of two connections that are ready at the same time, any may be read first."""
    inner = Inner(s)
    yield inner
    inner.sock.shutdown(socket.SHUT_WR)
    inner.expect_end()
    inner.close()


ARRAY = ('{"type":"arr","u":"你\\/\\"","n":[1,2.5,null,true,0.1],"e":[],'
         '"o":{"__PHP_Incomplete_Class_Name":"stdClass","p":1}}')
HEARD = {   # until the first of them is closed
    "A": ["one", "", ARRAY, "5", "1.5", "1", "", "null", "to all", "to A+B", "A,B minus B", "raw", '{"arr":1}', "to u1",
          "to u1 and 42", "to g1", *["g1 and 9: twice for A"] * 2, "unicode", "int group", '{"arr":"你"}', "raw"],
    "B": ["to all", "to A+B", "not A", "not A str", "raw", '{"arr":1}', "to u1", "to u1 and 42",
          "g1 and 9: twice for A", "not A", "not A str", '{"arr":"你"}', "raw"],
    "C": ["to all", "not A", "not A str", "raw", '{"arr":1}', "to u1 and 42", "to 42", "to g1",
          "g1 and 9: twice for A"],
}


def cast(a, b, key=""):
    """The clients of the record: A and B in room 9, C with a session that makes him a member of nothing."""
    first, second = Inner(a, key), Inner(b, key)
    ann, (carl, c), bob = join(a, "9", "A"), stranger(a, first), join(b, "9", "B")
    first.tell(SET_SESSION, c, php({"room_id": "0", "client_name": "tmp"}))
    first.fence()
    return first, second, ann, carl, c, bob


@case(rows=[("a connection each", lambda: short_lived), ("one connection", persistent),
            ("one connection, the key before each", lambda: persistent(hello("")))])
def recorded(name, talk):
    """Every method of the library, packet by packet; and what the people in the chat get of it."""
    with pair() as (a, b):
        first, second, ann, carl, c, bob = cast(a, b)
        sides = {"A": (a, {21: number(ann), 22: c}), "B": (b, {24: number(bob)})}
        talk = talk()
        middle = next(i for i, e in enumerate(GOLDEN["packets"]) if "closeClient" in e[0])
        repeat(GOLDEN["packets"][:middle], sides, talk)
        for inner, client, who, conn in (first, ann, "A", ann), (second, bob, "B", bob), (first, carl, "C", c):
            heard = sorted(texts(inner, client, conn))   # what goes to one and to all may change places
            check(heard == sorted(HEARD[who]), who, "heard", heard, "in place of", HEARD[who])
        repeat(GOLDEN["packets"][middle:], sides, talk)
        check(chat_text(bob) == "bye", "the last word")
        bob.expect_close(4001)
        ann.expect_close(4001)
        carl.expect_end()


@gateway(rows=GOLDEN["errors"])
def recorded_errors(s, name, request, answer, then):
    """Packets that nobody should send. Where a PHP gateway is stuck for ever this one closes."""
    inner, request = Inner(s), bytes.fromhex(request)
    inner.send(request)
    got = inner.take(len(answer) // 2).hex()
    check(got == answer, got)
    if then == "closed":
        return inner.expect_end()
    if then == "waits":
        length = struct.unpack_from(">I", request)[0]
        Inner(s).fence()
        inner.send(bytes(length - len(request)))
        check(inner.reply() == "i:0;", "after the rest")
    check(inner.ask(COUNT_BY_GROUP) == "i:0;", "then")


@case()
def recorded_with_key():
    """The same with a key: 202 and the command come in one segment."""
    with keyed() as a, Server(*GATEWAY, "--join", a.register, "--gateway-key-file",
                              os.path.join(a.directory, "key")) as b:
        client, first, second = Ws(a), Inner(a, "sekret"), Inner(b, "sekret")
        bob, bobs = stranger(b, second)
        other, others = stranger(b, second)
        mine = first.numbers()[0]
        second.tell(BIND_UID, bobs, "u1")
        second.fence()
        repeat(GOLDEN["secret"], {"A": (a, {1: mine}), "B": (b, {1: bobs})}, short_lived)
        heard = texts(first, client, mine), sorted(texts(second, bob, bobs)), texts(second, other, others)
        check(heard == (["to all"], ["one", "to all"], ["to all"]), "heard", *heard)
        check(first.look("groups") == f'a:1:{{i:{mine};a:1:{{s:6:"groups";a:1:{{s:2:"g1";s:2:"g1";}}}}}}')


NO_KEYS = [
    ("nothing before it", b""),
    *((f"{key!r}", hello(key)) for key in
      ("", "sekre", "sekretx", "sekret ", "Sekret", "sekret\0", None, 0, True, ["sekret"])),
    ("no key", packet(HELLO, body="{}")), ("no JSON", packet(HELLO, body="sekret")), ("no body", packet(HELLO)),
    ("as ext_data", packet(HELLO, ext='{"secret_key":"sekret"}')),
    ("a worker without", packet(WORKER, body='{"worker_key":"w:1"}')),
    ("a worker with another", packet(WORKER, body='{"worker_key":"w:1","secret_key":"wrong"}')),
    ("a ping before it", packet(WORKER_PING) + hello("sekret")),
    ("the wrong one second", hello("sekret") + hello("wrong")),
]


@case()
def wrong_keys():
    """Without the right key first: closed, without a word; and nothing is done."""
    with keyed() as s:
        right, ann = Inner(s, "sekret"), join(s, "room", "Ann")
        for name, before in NO_KEYS:
            inner = Inner(s)
            inner.send(before + packet(SEND_TO_ALL, body=name) + packet(COUNT_BY_GROUP))
            try:
                inner.expect_end()
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
        hears(right, ann)
        right.send(hello("sekret") * 3)
        right.fence()
        check(right.ask(COUNT_BY_GROUP) == "i:1;")


@case()
def key_changes():
    """SIGHUP reads the key again, and keeps the old one if there is none."""
    with keyed("first key") as s:
        Inner(s, "first key").fence()
        key_file(s.directory, "another\r\n")
        s.signal(1)
        until(lambda: accepts(s, "another"), "the new key does not count")
        check(not accepts(s, "first key"), "the old key counts")
        key_file(s.directory, "")
        s.signal(1)
        s.wait_log("--gateway-key-file.*key")
        check(accepts(s, "another"), "no key counts in place of the old one")


def accepts(s, key):
    with contextlib.closing(Inner(s, key)) as inner:
        inner.tell(IS_ONLINE)
        return inner.more() and inner.reply() == "i:0;"


# ---------------------------------------------------------------------------
# Packets
# ---------------------------------------------------------------------------

@gateway()
def split_packets(s):
    """Wherever a packet is cut in two, it is one packet."""
    ann, inner, other = join(s, "room", "Ann"), Inner(s), Inner(s)
    whole = packet(SEND_TO_GROUP, ext='{"group":["room"],"exclude":null}', body="hi")
    whole += packet(COUNT_BY_GROUP, ext="room")
    for cut in range(1, len(whole)):
        inner.send(whole[:cut])
        other.fence()
        inner.send(whole[cut:])
        check(inner.reply() == "i:1;", "cut at", cut)
    hears(inner, ann, *["hi"] * (len(whole) - 1))


@gateway()
def many_packets_at_once(s):
    """Answers come in order of the questions, also when nobody reads them for a while."""
    ann, inner = join(s, "room", "Ann"), Inner(s)
    online, offline = packet(IS_ONLINE, number(ann)), packet(IS_ONLINE, 0)
    pattern = [random.random() < 0.5 for _ in range(20000)]
    inner.send(b"".join(online if on else offline for on in pattern))
    got = [inner.reply() == "i:1;" for _ in pattern]
    check(got == pattern, "answers in another order")


@case()
def half_packet_deadline():
    """Half a packet is waited for thirty seconds; a connection that says nothing, for ever."""
    with clock() as faults, Server(*GATEWAY, env=faults.env) as s:
        half, slow, silent, done = Inner(s), Inner(s), Inner(s), Inner(s)
        for inner in half, slow:
            inner.send(packet(IS_ONLINE)[:20])
        done.fence()
        slow.send(packet(IS_ONLINE)[20:])
        slow.reply()
        faults.later = 20
        half.send(b"\0")
        done.fence()
        faults.later = 36
        half.expect_end()
        for inner in slow, silent, done:
            inner.fence()


NO_REPLY = [(SEND_TO_ONE, "", "x"), (KICK, "", "x"), (DESTROY, "", ""), (UPDATE_SESSION, php({"a": 1}), ""),
            (BIND_UID, "u", ""), (UNBIND_UID, "u", ""), (JOIN_GROUP, "g", ""), (LEAVE_GROUP, "g", ""),
            (SET_SESSION, php({"a": 1}), "")]


@gateway()
def no_such_client(s):
    """Orders about somebody who is not there do nothing, and what asks is answered."""
    ann, inner = join(s, "room", "Ann"), Inner(s)
    for conn in 0, (number(ann) + 12345) % 2**32, 2**32 - 1:
        for cmd, ext, body in NO_REPLY:
            inner.tell(cmd, conn, ext, body)
        check(inner.ask(IS_ONLINE, conn) == "i:0;" and inner.session(conn) == "N;", conn)
        check(inner.look("uid", where={"connection_id": {str(conn): conn}}) == "a:0:{}")
    check(inner.ask(GROUPS) == 'a:1:{i:0;s:4:"room";}', inner.ask(GROUPS))
    hears(inner, ann)
    ann.close()
    until(lambda: inner.ask(COUNT_BY_GROUP) == "i:0;", "still there")
    for cmd, ext, body in NO_REPLY:
        inner.tell(cmd, ann, ext, body)
    check(inner.ask(GROUPS) == "a:0:{}" and inner.ask(IS_ONLINE, ann) == "i:0;")


RUBBISH = [("", ""), ("{", "a:1:{"), ("[[[[", "O:1"), ('{"group":5,"fields":5,"where":"x"}', "s:9999999:\"x\";"),
           ('{"group":[[1]],"fields":[[]],"where":{"uid":{"a":[]},"groups":5}}', "a:99999999:{i:0;"),
           ('{"connections":5,"exclude":"x"}', "\xff"), ('{"connections":{"x":"y"}}', "i:5")]
WRONG = [packet(cmd, 0, ext, body, flag) for flag in (0, 1, 2, 3, 255) for cmd in range(256)
         if cmd not in (WORKER, HELLO) for ext, body in RUBBISH]


@gateway()
def values_on_the_edge(s):
    """What looks complete only if one reads on behind its end: into the body, or the next packet."""
    ann, inner = join(s, "room", "Ann"), Inner(s)
    before = inner.session(ann)
    for whole in 'a:1:{s:1:"a";i:1;}', "a:0:{}", "i:5;", "N;", 's:3:"abc";', "b:1;", "d:1.5;", 'O:1:"x":0:{}':
        for cut in range(1, len(whole)):
            for cmd in SET_SESSION, UPDATE_SESSION:
                if ":" in whole[:cut]:
                    inner.tell(cmd, ann, whole[:cut], whole[cut:])
            inner.tell(SEND_TO_ONE, ann, body=whole[:cut], flag=0)
    check(inner.session(ann) == before, inner.session(ann))
    hears(inner, ann)


@gateway()
def mutilated_values(s):
    """Good values with a few bytes changed: what is sent on is JSON, and what is kept can be merged."""
    ann, inner, dice = join(s, "room", "Ann"), Inner(s), random.Random(7)
    seeds = [octets(body) for _, body, _ in JSON] + [octets(text) for row in UPDATES for text in row[1:]]
    for i in range(4000):
        value = bytearray(dice.choice(seeds))
        for _ in range(dice.randrange(1, 4)):
            at = dice.randrange(len(value) + 1)
            value[at:at + dice.randrange(2)] = dice.choice([b"", b"\xff", bytes(value[:at]),
                                                           *(bytes([c]) for c in b"\0:;\"{}09aiNdsbO-")])
        inner.tell(SEND_TO_ONE, ann, body=bytes(value), flag=0)
        inner.tell(dice.choice((SET_SESSION, UPDATE_SESSION)), ann, bytes(value), dice.choice(seeds))
        if i % 40 == 0:
            for text in texts(inner, ann):
                json.loads(text)


@gateway()
def nonsense(s):
    """Every command with every kind of rubbish: the connection is closed or lives, the chat goes on."""
    ann, inner = join(s, "room", "Ann"), Inner(s)
    inner.tell(JOIN_GROUP, ann, "g")
    for raw in WRONG:
        inner.send(raw)
    inner.tell(99)
    inner.sock.shutdown(socket.SHUT_WR)
    while inner.more():
        inner.buffer = b""
    dice = random.Random(5)
    for _ in range(300):
        inner = Inner(s)
        raw = bytearray(dice.choice(WRONG))
        for _ in range(dice.randrange(1, 4)):
            raw[dice.randrange(len(raw))] = dice.choice((0, 1, 28, 127, 128, 255))
        inner.send(bytes(raw))
        inner.close()
    Inner(s).fence()
    ann.close()
    join(s, "after", "Ann", "Bob")


@attack()
def ten_thousand_letters(s):
    """Over one connection, to one of many, while others talk: all arrive, in order."""
    ann, inner, heard = join(s, new_room(), "Ann"), Inner(s), []
    inner.tell(BIND_UID, ann, "u1")

    def listen():
        heard.extend(chat_text(ann) for _ in range(10000))
    reader = threading.Thread(target=listen)
    reader.start()
    letters = [packet(SEND_TO_UID, ext='["u1"]', body=f"letter {i}") for i in range(10000)]
    for i in range(0, len(letters), 100):
        inner.send(b"".join(letters[i:i + 100]))
    reader.join(3 * DEADLINE)
    check(heard == [f"letter {i}" for i in range(10000)], f"{len(heard)} came, the last is {heard[-1:]}")


@attack(serial=True)
def a_million_uids(s):
    """In one packet; whoever is named gets it, as often as he is named, or falls behind: memory has an end."""
    ann, inner = join(s, new_room(), "Ann"), Inner(s)
    inner.tell(BIND_UID, ann, "u1")
    n = 50000 if instrumented() else 1000000
    with s.memory_grows_at_most(64 << 10):
        inner.tell(SEND_TO_UID, ext="[" + '"x",' * (n - 1) + '"u1"]', body="to one of a million")
        hears(inner, ann, "to one of a million")
        bob = Ws(s, rcvbuf=4096)
        bob.login("Bob", "elsewhere")
        inner.tell(BIND_UID, bob, "u2")
        inner.tell(SEND_TO_UID, ext="[" + '"u2",' * (n // 5) + '"u2"]', body="x" * 100)
        inner.fence()
        inner.tell(SEND_TO_GROUP, ext='{"group":[' + '"elsewhere",' * (n // 5) + '"elsewhere"]}', body="x" * 100)
        inner.fence()
        for cmd in BATCH_IDS_BY_UID, BATCH_COUNT:
            answer = inner.ask(cmd, ext=json.dumps(list(range(n // 10))))
            check(answer.startswith(f"a:{n // 10}:{{i:0;"), cmd, answer[:99])
    hears(inner, ann)


# ---------------------------------------------------------------------------
# Messages
# ---------------------------------------------------------------------------

JSON = [   # a serialized body, and the text that it becomes
    ("null", "N;", "null"),
    ("empty", "a:0:{}", "[]"),
    ("a list", "a:2:{i:0;i:1;i:1;i:-2;}", "[1,-2]"),
    ("not from 0", "a:1:{i:1;i:1;}", '{"1":1}'),
    ("not in order", "a:2:{i:1;i:1;i:0;i:0;}", '{"1":1,"0":0}'),
    ("nested", 'a:1:{s:1:"a";a:1:{i:0;a:1:{s:1:"b";a:0:{}}}}', '{"a":[{"b":[]}]}'),
    ("bool", "a:2:{i:0;b:1;i:1;b:0;}", "[true,false]"),
    ("integers", "a:2:{i:0;i:9223372036854775807;i:1;i:-9223372036854775808;}",
     "[9223372036854775807,-9223372036854775808]"),
    ("whole floats", "a:4:{i:0;d:1;i:1;d:-0;i:2;d:100000;i:3;d:1.2345678901234568E+17;}",
     "[1,-0,100000,1.2345678901234568e+17]"),
    ("floats", "a:4:{i:0;d:0.1;i:1;d:-2.5;i:2;d:0.30000000000000004;i:3;d:3.141592653589793;}",
     "[0.1,-2.5,0.30000000000000004,3.141592653589793]"),
    ("large floats", "a:4:{i:0;d:1.0E+15;i:1;d:1.0E+17;i:2;d:1.0E+25;i:3;d:1.7976931348623157E+308;}",
     "[1.0e+15,1.0e+17,1.0e+25,1.7976931348623157e+308]"),
    ("small floats", "a:4:{i:0;d:0.0001;i:1;d:1.0E-5;i:2;d:1.5E-7;i:3;d:4.9E-324;}", "[0.0001,1.0e-5,1.5e-7,4.9e-324]"),
    ("unicode", 'a:1:{s:3:"你";s:9:"ä😀/é";}', '{"你":"ä😀\\/é"}'),
    ("escapes", 'a:1:{i:0;s:9:"\\"/\b\f\n\r\t\x01";}', '["\\\\\\"\\/\\b\\f\\n\\r\\t\\u0001"]'),
    ("html", "a:1:{i:0;s:6:\"<&>'\x7f\";}".replace("s:6", "s:5"), "[\"<&>'\x7f\"]"),
    ("an object", 'O:8:"stdClass":1:{s:1:"p";i:1;}', '{"__PHP_Incomplete_Class_Name":"stdClass","p":1}'),
    ("an empty one", 'a:1:{i:0;O:3:"Foo":0:{}}', '[{"__PHP_Incomplete_Class_Name":"Foo"}]'),
    ("flag 2", "a:1:{i:0;i:1;}", "[1]"),
]


@gateway(rows=JSON)
def arrays_become_json(s, name, body, text):
    """As json_encode() has it."""
    ann, inner = join(s, new_room(), "Ann"), Inner(s)
    inner.tell(SEND_TO_ONE, ann, body=body, flag=0)
    hears(inner, ann, text)


BAD_BODIES = [
    "", "garb", "a:1:{", "a:1:{i:0;", "a:1:{i:0;}", "a:1:{i:0;i:1;", "a:0:{", "a:2:{i:0;i:1;}", "a:1:{i:0;i:1;}x",
    "a:-1:{}", "a:1:{N;i:1;}", "a:1:{d:1;i:1;}", 's:5:"abc";', 's:3:"abc"', 's:99999999999999999999:"x";',
    'a:1:{i:0;s:2:"x";}', "a:1:{i:0;i:;}", "a:1:{i:0;i:x;}", "a:1:{i:0;d:;}", "a:1:{i:0;d:INF;}", "a:1:{i:0;d:NAN;}",
    "a:1:{i:0;b:7x;}", "a:1:{i:0;R:1;}", "a:1:{i:0;r:1;}", 'C:3:"Foo":0:{}', b'a:1:{i:0;s:1:"\xff";}',
    b'a:1:{s:1:"\xff";i:0;}', "a:1:{i:0;" * 600 + "N;" + "}" * 600, "a:1:{i:0;" * 100000,
    "a:1:{i:0;" * 100000 + "N;" + "}" * 100000, "a:4000000000:{}", 'O:-1:"x":0:{}', 'O:99:"x":0:{}', 'O:1:"x":1:{i:0;',
    'O:1:"x":0:{', "a:1:{i:0;\0:5;}", "\0:5;", "a:1:{i:0;" * 31 + "a:40:{" + "i:0;\0:5;" * 40 + "}" * 32,
    "a:1:{i:0;d:x;}", "a:1:{i:0;i:1-1;}", "a:1:{i:0;i:--1;}", "a:1:{i:0;d:.;}",
    "a:1:{i:0;i:99999999999999999999;}",
]


@gateway()
def bodies_that_are_no_json(s):
    """Dropped, and the next one arrives."""
    ann, inner = join(s, "room", "Ann"), Inner(s)
    for i, body in enumerate(BAD_BODIES):
        inner.tell(SEND_TO_ONE, ann, body=body, flag=0)
        inner.tell(SEND_TO_GROUP, ext='{"group":["room"]}', body=body, flag=0)
        heard = texts(inner, ann)
        check(heard == [], f"of {body[:40]!r} came {heard}")


@gateway()
def messages_are_not_remembered(s):
    """What a back end sends is seen by those present, as it is."""
    ann, inner = join(s, "room", "Ann"), Inner(s)
    before = ann.id
    inner.tell(SEND_TO_GROUP, ext='{"group":["room"],"exclude":null}', body='{"type":"say","content":"x"}')
    ann.expect("say", content="x")
    bob = Ws(s)
    bob.login("Bob", "room")
    bob.send_json(type="history", room_id="room")
    check(bob.expect("history")["messages"] == [], before)


@case(*GATEWAY, "--backlog", "4096")
def longer_than_the_backlog(s):
    """Could not be sent to anybody, so it is not."""
    ann, inner = join(s, "room", "Ann"), Inner(s)
    for cmd, client, ext in (SEND_TO_ONE, ann, ""), (SEND_TO_ALL, 0, ""), (SEND_TO_GROUP, 0, '{"group":["room"]}'):
        inner.tell(cmd, client, ext, body="x" * 5000)
        hears(inner, ann)
        inner.tell(cmd, client, ext, body="y" * 3000)
        hears(inner, ann, "y" * 3000)


@gateway()
def long_and_binary_text(s):
    """Up to the backlog; a frame has a longer head then. Raw bytes are the caller's own affair."""
    ann, inner = join(s, "room", "Ann"), Inner(s)
    for n in 125, 126, 65535, 65536, 900000:
        inner.tell(SEND_TO_ONE, ann, body="z" * n)
        hears(inner, ann, "z" * n)
    inner.tell(SEND_TO_ONE, ann, body=b"\x81\x02hi\x81\x00\x81\x01!", flag=3)
    hears(inner, ann, "hi", "", "!")


@gateway()
def twice_for_two(s):
    """Once for each group or uid that is named; those excluded get nothing, whatever is the form of it, nor do no connections."""
    ann, bob = join(s, "a", "Ann"), join(s, "b", "Bob")
    inner = Inner(s)
    inner.tell(JOIN_GROUP, ann, "b")
    for uid, client in ("u", ann), ("u", bob):
        inner.tell(BIND_UID, client, uid)
    inner.tell(SEND_TO_GROUP, ext='{"group":["a","b","b"],"exclude":null}', body="1")
    inner.tell(SEND_TO_GROUP, ext=json.dumps({"group": ["b", "a"], "exclude": {number(ann): number(ann)}}), body="2")
    inner.tell(SEND_TO_GROUP, ext='{"group":["nosuch"]}', body="3")
    inner.tell(SEND_TO_UID, ext='["u","u"]', body="4")
    his = {"1": number(bob)}
    inner.tell(SEND_TO_ALL, ext=json.dumps({"connections": his, "exclude": his}), body="5")
    inner.tell(SEND_TO_ALL, ext=json.dumps({"exclude": his}), body="6")
    for none in [], {}:
        inner.tell(SEND_TO_ALL, ext=json.dumps({"connections": none}), body="7")
    hears(inner, ann, *"111446")
    hears(inner, bob, *"112445")


@gateway()
def in_order(s):
    """What is sent by one way, to one, to a room, to a user, to all, arrives as it was sent."""
    ann, inner = join(s, "room", "Ann"), Inner(s)
    inner.tell(BIND_UID, ann, "u")
    ways = [(SEND_TO_ONE, number(ann), ""), (SEND_TO_GROUP, 0, '{"group":["room"]}'), (SEND_TO_UID, 0, '["u"]'),
            (SEND_TO_ALL, 0, "")]
    for cmd, conn, ext in ways:
        inner.send(b"".join(packet(cmd, conn, ext, f"{cmd} {i}") for i in range(500)))
    heard = texts(inner, ann)
    for cmd, *_ in ways:
        mine = [word for word in heard if word.startswith(f"{cmd} ")]
        check(mine == [f"{cmd} {i}" for i in range(500)], cmd, "came as", mine[:20])


@gateway()
def in_order_by_many_connections(s):
    """Each order comes by its own connection, as the library has it; a busy server does them in their order, too."""
    ann, inner = join(s, "room", "Ann"), Inner(s).fence()
    words = [str(i) for i in range(60)]
    for _ in range(3):
        os.kill(s.process.pid, signal.SIGSTOP)
        os.waitpid(s.process.pid, os.WUNTRACED)
        for word in words:
            order = Inner(s)
            order.tell(SEND_TO_ONE, ann, body=word)
            order.close()
        os.kill(s.process.pid, signal.SIGCONT)
        heard = [chat_text(ann) for _ in words]
        check(heard == words, "came as", heard)
        inner.fence()


# ---------------------------------------------------------------------------
# People
# ---------------------------------------------------------------------------

@gateway()
def kick(s):
    """The last word, then 4001; the others hear of it once, and nothing of him is left."""
    ann, bob, carl = join(s, "room", "Ann", "Bob", "Carl")
    inner = Inner(s)
    for client in ann, bob:
        inner.tell(BIND_UID, client, "u")
        inner.tell(JOIN_GROUP, client, "g")
    inner.tell(KICK, ann, body="go")
    check(inner.ask(IS_ONLINE, ann) == "i:0;", "still online")
    check(chat_text(ann) == "go")
    ann.expect_close(4001)
    bob.expect("logout", from_client_id=ann.id, from_client_name="Ann")
    check(inner.ask(COUNT_BY_GROUP, ext="g") == inner.ask(COUNT_BY_GROUP, ext="room").replace("2", "1") == "i:1;")
    inner.tell(KICK, bob, body="N;", flag=0)
    bob.expect_close(4001)
    carl.expect("logout", from_client_id=ann.id)
    carl.expect("logout", from_client_id=bob.id)
    check(inner.ask(IDS_BY_UID, ext="u") == "a:0:{}" and inner.ask(COUNT_BY_GROUP, ext="g") == "i:0;")
    inner.tell(KICK, carl, body="")
    check(chat_text(carl) == "")
    carl.expect_close(4001)


@gateway()
def destroy(s):
    """The connection ends at once, without a close frame."""
    ann, bob = join(s, "room", "Ann", "Bob")
    inner = Inner(s)
    inner.tell(DESTROY, ann)
    check(inner.ask(IS_ONLINE, ann) == "i:0;")
    ann.expect_end()
    bob.expect("logout", from_client_id=ann.id)


@gateway()
def last_words(s):
    """A worker has all its orders in one packet of TCP: what it sends to somebody, in whatever way, and then his end."""
    inner, last = Inner(s), {"KICK": (KICK, "N;", 0), "KICK with a word": (KICK, "go", 1), "DESTROY": (DESTROY, "", 1)}
    for name, (cmd, body, flag) in last.items():
        ann, bob = join(s, new_room(), "Ann", "Bob")
        inner.tell(BIND_UID, ann, name)
        inner.tell(JOIN_GROUP, ann, name)
        inner.send(packet(SEND_TO_UID, 0, json.dumps([name]), "user") +
                   packet(SEND_TO_GROUP, 0, json.dumps({"group": [name], "exclude": None}), "group") +
                   packet(SEND_TO_ONE, number(ann), "", "one") +
                   packet(SEND_TO_UID, 0, json.dumps([name]), "user again") + packet(cmd, number(ann), "", body, flag))
        words = ["user", "group", "one", "user again"] + ["go"] * (body == "go")
        heard = [chat_text(ann) for _ in words]
        check(heard == words, name, "came as", heard)
        ann.expect_end() if cmd == DESTROY else ann.expect_close(4001)
        bob.expect("logout", from_client_id=ann.id)


@gateway()
def not_counted_any_more(s):
    """Who was told to go is in no number and no list that is asked for right behind that, in the same round."""
    ann, bob = join(s, "room", "Ann", "Bob")
    inner = Inner(s)
    asks = (packet(COUNT_BY_GROUP, ext="room") + packet(BATCH_COUNT, ext='["room"]') + packet(GROUPS) +
            packet(COUNT_BY_GROUP) + packet(IDS_BY_UID, ext="u"))
    for client in ann, bob:
        inner.tell(BIND_UID, client, "u")
    for order, rest in (packet(KICK, number(ann), body="go"), [bob]), (packet(DESTROY, number(bob)), []):
        inner.send(order + asks)
        answers = [inner.reply() for _ in range(5)]
        n = len(rest)
        check(answers == [php(n), php({"room": n}), php(["room"] * n), php(n), php([number(c) for c in rest])], answers)


@gateway()
def uids(s):
    """Who is bound is that user in the chat: it stands in what he says, and letters to it reach him."""
    ann, bob = join(s, "room", "Ann", "Bob")
    inner = Inner(s)
    for uid in "", "0", "u" * 129:
        inner.tell(BIND_UID, ann, uid)
    check(inner.look("uid", where={"connection_id": [number(ann)]}) == php({number(ann): {"uid": None}}))
    inner.tell(BIND_UID, ann, "first")
    inner.tell(BIND_UID, ann, "u1")
    inner.fence()
    ann.say("hi")
    for client in ann, bob:
        client.expect("say", content="hi", from_uid="u1")
    bob.send_json(type="say", to_uid="u1", content="psst")
    ann.expect("say", to_uid="u1", content="<b>对你说: </b>psst")
    bob.expect("say", to_uid="u1")
    bob.send_json(type="say", to_uid="first", content="psst")
    bob.expect("say", to_uid="first")
    ann.expect_nothing()
    inner.tell(UNBIND_UID, ann, "another")
    inner.fence()
    ann.say("who am I")
    for client in ann, bob:
        check("from_uid" not in client.expect("say", content="who am I"))
    bob.send_json(type="say", to_uid="u1", content="psst")
    bob.expect("say", to_uid="u1")
    expect_nothing(ann, bob)
    check(inner.ask(GROUPS) == 'a:1:{i:0;s:4:"room";}', "groups:", inner.ask(GROUPS))
    inner.tell(BIND_UID, ann, "u" * 128)
    check(inner.ask(IDS_BY_UID, ext="u" * 128) == php([number(ann)]))


@gateway()
def a_group_is_a_room(s):
    """Who is made a member hears what is said there, without having logged in there."""
    ann, bob, inner = join(s, "1", "Ann"), join(s, "2", "Bob"), Inner(s)
    inner.tell(JOIN_GROUP, ann, "2")
    inner.tell(JOIN_GROUP, ann, "2")
    inner.fence()
    bob.say("hello")
    for client in ann, bob:
        client.expect("say", content="hello", from_client_name="Bob")
    ann.say("in my own")
    ann.expect("say", content="in my own")
    expect_nothing(ann, bob)
    check(inner.ask(COUNT_BY_GROUP, ext="2") == "i:2;")
    sessions = {number(client): inner.session(client) for client in (bob, ann)}   # as they joined
    check(inner.ask(SESSIONS_BY_GROUP, ext="2") == php(sessions))
    inner.tell(LEAVE_GROUP, ann, "2")
    inner.fence()
    bob.say("alone")
    bob.expect("say", content="alone")
    ann.expect_nothing()
    inner.tell(UNGROUP, ext="2")
    check(inner.ask(GROUPS) == php([1]), inner.ask(GROUPS))
    groups = inner.look("groups")
    check(groups == php({number(ann): {"groups": {1: "1"}}, number(bob): {"groups": []}}), groups)


@gateway()
def in_a_room_before_login(s):
    """Who the back end has brought there has no name yet: it is not in the list of those who come, and nobody suffers."""
    conn = stranger(s, Inner(s))[1]
    inner = Inner(s)
    inner.tell(JOIN_GROUP, conn, "room")
    inner.fence()
    ann = Ws(s)
    ann.send_json(type="login", client_name="Ann", room_id="room")
    check(list(ann.expect("login")["client_list"].values()) == ["Ann"])
    check(inner.ask(COUNT_BY_GROUP, ext="room") == "i:2;")


@gateway()
def moves_between_ones_rooms(s):
    """Who is in both rooms hears first that somebody has left the one, then that he is in the other."""
    inner, watchers = Inner(s), join(s, "watchers", "Ann", "Bob")
    for client, rooms in zip(watchers, (("1", "2"), ("2", "1"))):
        for room in rooms:
            inner.tell(JOIN_GROUP, client, room)
    inner.fence()
    carl = Ws(s)
    carl.login("Carl", "1")
    for client in watchers:
        client.expect("login", client_id=carl.id)
    for room in "2", "1":
        carl.login("Carl", room)
        for client in watchers:
            client.expect("logout", from_client_id=carl.id)
            client.expect("login", client_id=carl.id)


@gateway()
def taken_out_of_ones_room(s):
    """The others hear that it has gone: then, and not again when it goes."""
    ann, bob, inner = *join(s, "room", "Ann", "Bob"), Inner(s)
    inner.tell(LEAVE_GROUP, ann, "room")
    bob.expect("logout", from_client_id=ann.id, from_client_name="Ann")
    ann.say("hello")
    ann.expect_error("not_logged_in")
    check("Ann" in inner.session(ann), "the session is kept")
    inner.tell(UPDATE_SESSION, ann, php({"vip": True}))   # names no room: it stays out
    check(inner.ask(COUNT_BY_GROUP, ext="room") == "i:1;", "it is in the room again")
    ann.say("hello")
    ann.expect_error("not_logged_in")
    inner.tell(KICK, ann, body="N;", flag=0)
    ann.expect_close(4001)
    check(inner.ask(IS_ONLINE, ann) == "i:0;")
    bob.expect_nothing()
    ann = join(s, "room", "Ann")
    bob.expect("login", client_id=ann.id)
    inner.tell(UNGROUP, ext="room")   # nobody is left to hear of it
    inner.fence()
    check(inner.ask(COUNT_BY_GROUP, ext="room") == "i:0;")
    for client in ann, bob:
        client.expect_nothing()
        client.say("hello")
        client.expect_error("not_logged_in")
    check("Bob" in inner.session(bob), "the session is kept")


@gateway()
def login_when_in_many_rooms(s):
    """However many groups it is in, a place is left for the room of its login and one for its inbox, whichever is first."""
    inner = Inner(s)
    for first in True, False:
        ann, conn = stranger(s, inner)
        if first:
            inner.tell(BIND_UID, conn, "ann")
        for i in range(70):
            inner.tell(JOIN_GROUP, conn, f"g{i}")
        inner.fence()
        ann.login("Ann", "room")
        if not first:
            inner.tell(BIND_UID, conn, "ann")
        check(inner.ask(COUNT_BY_GROUP, ext="room") == "i:1;", "it is not in its room")
        ann.say("a letter", to=None, to_uid="ann", ref="1")
        check({ann.expect("say")["to_uid"] for _ in range(2)} == {"ann"}, "one comes by the inbox, the other as an answer")
        ann.close()
        until(lambda: inner.ask(COUNT_BY_GROUP, ext="room") == "i:0;", "it does not go")
    full, conn = stranger(s, inner)
    for i in range(70):   # it speaks in one after the other, and stays in each
        inner.tell(SET_SESSION, conn, php({"room_id": f"r{i}", "client_name": "Bob"}))
    check(inner.ask(COUNT_BY_GROUP, ext="r62") == "i:1;" and inner.ask(COUNT_BY_GROUP, ext="r63") == "i:0;", "in 63 rooms")
    full.send_json(type="login", client_name="Bob", room_id="new", ref="2")
    full.expect_error("limit", "63 rooms", ref="2")
    check(inner.ask(COUNT_BY_GROUP, ext="new") == "i:0;", "it is in one more")
    seated, conn = stranger(s, inner)
    for i in range(63):
        inner.tell(SET_SESSION, conn, php({"room_id": f"r{i}", "client_name": "Eve"}))
    inner.fence()
    seated.login("Eve", "new")   # in place of the one it speaks in
    seated.say("moved")
    seated.expect("say", content="moved")


@gateway()
def moved_when_in_62_rooms(s):
    """There is a place left for the room that a session names."""
    ann, inner = join(s, "1", "Ann"), Inner(s)
    for i in range(70):
        inner.tell(JOIN_GROUP, ann, f"g{i}")
    inner.tell(SET_SESSION, ann, php({"room_id": "2", "client_name": "Ann"}))
    inner.fence()
    ann.say("hello")
    ann.expect("say", content="hello")
    inner.tell(SET_SESSION, ann, php({"room_id": "2"}))   # nobody
    inner.fence()
    ann.say("hello")
    ann.expect_error("not_logged_in")


@gateway()
def raw_bytes_to_who_does_not_read(s):
    """They have a limit, too."""
    ann, inner = Ws(s, rcvbuf=4096), Inner(s)
    ann.login("Ann", "room")
    block = b"\x82\x7e\xff\xff" + bytes(65535)
    with s.memory_grows_at_most(16384):
        for _ in range(500):
            inner.tell(SEND_TO_ONE, ann, body=block, flag=3)
        inner.fence()
    check(inner.ask(IS_ONLINE, ann) == "i:0;", "it has all of that to read")


@gateway()
def text_that_is_none(s):
    """A text frame that is not UTF-8 would have browsers hang up: it is not sent. Raw bytes are the back end's own affair."""
    ann, inner = join(s, "room", "Ann"), Inner(s)
    inner.tell(SEND_TO_ONE, ann, body=b"caf\xe9")
    inner.tell(SEND_TO_ALL, body=b"\xff")
    inner.tell(SEND_TO_GROUP, ext='{"group":["room"],"exclude":null}', body=b"\xc3")
    inner.tell(SEND_TO_ONE, ann, body="caf\u00e9".encode())
    check(chat_text(ann) == "caf\u00e9")


@case("--register", "127.0.0.1:0", "--gateway", "127.0.0.1:0")
def strangers_who_stay(s):
    """Who has shown no secret at the register cannot keep others out, however many they are."""
    strangers = [Register(s) for _ in range(300)]
    for stranger_ in strangers:
        stranger_.send(b'{"event":"ping"}\n')
    known = [Inner(s) for _ in range(20)]
    for inner in known:
        check(inner.ask(COUNT_BY_GROUP) == "i:0;")
    check(Register(s).ask() != [])
    for inner in known:
        check(inner.ask(COUNT_BY_GROUP) == "i:0;")


@gateway()
def sessions_with_too_many_values(s):
    """Merging takes time that grows with their number squared, so it has an end: then nothing changes."""
    ann, inner = join(s, "room", "Ann"), Inner(s)
    for n in 1022, 1024:   # and one is added
        before = php({i: i for i in range(n)})
        inner.tell(SET_SESSION, ann, before)
        check(inner.session(ann) == before, "it is not taken")
        inner.tell(UPDATE_SESSION, ann, php({"k": "v"}))
        after = php({**{i: i for i in range(n)}, "k": "v"})
        check(inner.session(ann) == (after if n == 1022 else before), n, "and one are", inner.session(ann)[-40:])
    inner.tell(SET_SESSION, ann, php({f"k{i}": i for i in range(500)}))
    inner.tell(UPDATE_SESSION, ann, php({f"k{i}": 0 for i in reversed(range(500))}))
    check(inner.session(ann) == php({f"k{i}": 0 for i in range(500)}))


@gateway()
def sessions_too_long_for_a_login(s):
    """A login cannot be merged into a session of too many values: that stays as the back end has set it."""
    ann, inner, long = join(s, "room", "Ann"), Inner(s), php({i: i for i in range(2, 1502)})
    inner.tell(SET_SESSION, ann, long)
    check(inner.session(ann) == long, "it is not taken")
    ann.login("Ann", "other")
    check(inner.session(ann) == long, inner.session(ann)[:200])
    inner.tell(LEAVE_GROUP, ann, "other")   # where it speaks
    check(inner.session(ann) == long, inner.session(ann)[:200])


@gateway()
def answers_have_an_end(s):
    """Of 16 MB, and a question has one of 65,536 names; who asks for more is shut out, and hurts nobody else."""
    ann, inner, greedy = join(s, "room", "Ann"), Inner(s), Inner(s)
    inner.tell(SET_SESSION, ann, php({"a": "x" * 32000}))
    inner.fence()
    for n in 2, 100:   # 16 MB are 524 of them
        answer = greedy.ask(SELECT, ext=json.dumps({"fields": ["session"] * n, "where": []}))
        check(answer.count("x" * 32000) == n, len(answer), "bytes for", n)
    greedy.tell(SELECT, ext=json.dumps({"fields": ["session"] * 600, "where": []}))
    greedy.expect_end()
    for kind, name in ("groups", "room"), ("uid", "ann"):
        if kind == "uid":
            inner.tell(BIND_UID, ann, name)
        for before in 65535, 65536:
            found = inner.ask(SELECT, ext=json.dumps({"fields": [], "where": {kind: ["n"] * before + [name]}}))
            check(found == php({number(ann): {}} if before == 65535 else {}), kind, before, found)


@gateway()
def groups_have_an_end(s):
    """At most 62 of them, of at most 128 bytes; any bytes may be in a name."""
    ann, inner = join(s, "room", "Ann"), Inner(s)
    for name in "", "0", "x" * 129:
        inner.tell(JOIN_GROUP, ann, name)
    check(inner.ask(GROUPS) == php(["room"]), inner.ask(GROUPS))
    inner.tell(JOIN_GROUP, ann, "x" * 128)
    check(inner.ask(GROUPS) == php(["room", "x" * 128]))
    for i in range(100):
        inner.tell(JOIN_GROUP, ann, f"g{i}")
    groups = re.findall(r's:\d+:"(\w+)";s:\d+:"\1";', inner.look("groups"))
    check(groups == ["room", "x" * 128, *(f"g{i}" for i in range(60))], len(groups), groups[-1:])
    for name in groups:
        inner.tell(LEAVE_GROUP, ann, name)
    check(inner.look("groups") == php({number(ann): {"groups": []}}), "after leaving all")
    names = ["-5", "-0", "01", "1.0", " 1", "+1", "1", "9223372036854775807", "9223372036854775808",
             "-9223372036854775808", "-9223372036854775809"]
    for name in names:
        inner.tell(JOIN_GROUP, ann, name)
    keys = [int(n) if re.fullmatch(r"0|-?[1-9]\d*", n) and -2**63 <= int(n) < 2**63 else n for n in names]
    check(inner.ask(GROUPS) == php(keys), inner.ask(GROUPS))
    check(inner.look("groups") == php({number(ann): {"groups": dict(zip(keys, names))}}), inner.look("groups"))
    counts = inner.ask(BATCH_COUNT, ext=json.dumps(names))
    check(counts == php({k: 1 for k in keys}), counts)


@gateway()
def sessions_leave_a_place(s):
    """Who enters one room after the other by its session can still be made a user, who has an inbox."""
    inner = Inner(s)
    ann, a = stranger(s, inner)
    for i in range(62):
        inner.tell(JOIN_GROUP, a, f"g{i}")
    for i in range(3):
        inner.tell(SET_SESSION, a, php({"room_id": f"room {i}", "client_name": "Ann"}))
    inner.tell(BIND_UID, a, "ann")
    check(inner.ask(IDS_BY_UID, ext="ann") == php([a]), "she has no inbox", inner.look("uid"))
    inner.tell(SEND_TO_UID, ext='["ann"]', body='{"type": "hello"}')
    ann.expect("hello")


@gateway()
def select(s):
    """Fields and conditions: any one of several is enough; clients come by age."""
    inner = Inner(s)
    ann, bob = join(s, "room", "Ann", "Bob")
    carl, c = stranger(s, inner)
    a, b = number(ann), number(bob)
    inner.tell(BIND_UID, ann, "u1")
    inner.tell(BIND_UID, c, "42")
    inner.tell(JOIN_GROUP, bob, "g")

    def found(**where):
        return [int(n) for n in re.findall(r"[{}]i:(\d+);a:", inner.look("uid", where=where or []))]
    check(found() == [a, b, c], "all")
    check(found(groups=["room"]) == [a, b] and found(groups=["g", "x"]) == [b], "groups")
    check(found(groups=["g", "room"]) in ([a, b], [b, a]), "twice by groups")
    check(found(uid=["u1"]) == [a] and found(uid=[42]) == [c] and found(uid=["no"]) == [], "uid")
    check(sorted(found(uid=["42"], groups=["g"])) == sorted([b, c]), "or")
    check(found(connection_id=[b]) == [b] and found(connection_id={"x": b}) == [b], "connection_id")
    check(found(connection_id=[0], uid=["u1"]) == [a], "or")
    whole = inner.look("session", "uid", "groups", "nosuch", where={"connection_id": [a, c]})
    want = {a: {"session": inner.session(ann), "uid": "u1", "groups": {"room": "room"}, "nosuch": None},
            c: {"session": None, "uid": "42", "groups": None, "nosuch": None}}
    check(whole.replace('s:7:"session";s:0:"";', 's:7:"session";N;') == php(want), whole)
    check(inner.ask(ALL_SESSIONS) == php({a: inner.session(ann), b: inner.session(bob), c: ""}), "sessions")


# ---------------------------------------------------------------------------
# Sessions
# ---------------------------------------------------------------------------

def deep(levels):
    """An array in an array ..., so many of them."""
    return "a:1:{i:0;" * (levels - 1) + "a:0:{}" + "}" * (levels - 1)


NOT_KEPT = [
    ("an object", 'O:8:"stdClass":0:{}'), ("one inside", 'a:1:{i:0;O:8:"stdClass":1:{s:1:"p";i:1;}}'),
    ("custom", 'C:11:"ArrayObject":0:{}'), ("enum", 'E:7:"Foo:Bar";'), ("reference", "a:2:{i:0;i:1;i:1;R:2;}"),
    ("another", "a:2:{i:0;i:1;i:1;r:1;}"), ("too few", "a:2:{i:0;i:1;}"), ("too many", "a:1:{i:0;i:1;i:1;i:1;}"),
    ("more behind", "a:0:{}a:0:{}"), ("cut", "a:1:{i:0;i:1;"), ("length", 'a:1:{i:0;s:5:"x";}'),
    ("cut to nothing", "a:0:{"), ("cut inside", "a:1:{i:0;a:1:{i:0;i:1;}"), ("NUL", "a:1:{i:0;\0:5;}"),
    ("no float", "a:1:{i:0;d:x;}"), ("no float either", "a:1:{i:0;d:1e;}"), ("no integer", "a:1:{i:0;i:1.5;}"),
    ("a large one", "a:1:{i:0;i:99999999999999999999;}"), ("bool", "a:1:{i:0;b:2;}"),
    ("negative", "a:-1:{}"), ("huge", "a:99999999999999999999:{}"), ("huge text", 'a:1:{i:0;s:99999999999:"x";}'),
    ("a key that is a float", "a:1:{d:1;i:1;}"), ("a key that is an array", "a:1:{a:0:{}i:1;}"),
    ("no quote", "a:1:{i:0;s:1:x;}"),
    ("not PHP's", "gar:bage"), ("33 levels", deep(33)), ("a million levels", deep(1000000)),
    ("never closed", "a:1:{i:0;" * 3000),
    ("too long", php({"x": "y" * (32 << 10)})),
]


@gateway(rows=NOT_KEPT)
def sessions_that_are_refused(s, name, session):
    """What is not PHP's, or would do something where it is read, changes nothing."""
    ann, inner = join(s, new_room(), "Ann"), Inner(s)
    before = inner.session(ann)
    for cmd in SET_SESSION, UPDATE_SESSION:
        inner.tell(cmd, ann, session)
        check(inner.session(ann) == before, "it became", repr(inner.session(ann)[:200]))
    check(inner.ask(ALL_SESSIONS).count(before) >= 1)


@gateway(rows=[("an array", "a:0:"), ("an object", 'O:1:"x":0:')])
def brackets_behind_the_end(s, name, session):
    """What ends in front of a bracket is cut short, even if the next byte of the packet would do."""
    ann, inner = join(s, new_room(), "Ann"), Inner(s)
    before = inner.session(ann)
    for cmd in SET_SESSION, UPDATE_SESSION:
        inner.tell(cmd, ann, session, body="{}")
    inner.send(packet(SEND_TO_ONE, number(ann), body=session, flag=0) + b"{}{}")
    inner = Inner(s)
    check(inner.session(ann) == before, "it became", inner.session(ann))
    check(texts(inner, ann) == [])


KEPT = 300   # more than the 256 that there may be


@case(rows=[("without a key", None), ("with a key", "sekret")])
def connections_that_are_kept(name, key):
    """PHP keeps connections that it seldom uses; when there are too many, the one that rested longest makes room."""
    with Server(*BOTH) if key is None else keyed(key) as s:
        worker, watcher, busy = Worker(s, "w:1", key or ""), Register(s), Inner(s, key)
        watcher.ask(key or "")
        busy.fence()
        kept = [busy]
        for _ in range(KEPT):
            kept.append(Inner(s, key).fence())
            busy.fence()
        kept[1].expect_end()
        for inner in kept[KEPT - 200:]:
            inner.fence()
        check(watcher.ask(key or "") == [s.gateway])
        check(worker.ask(COUNT_BY_GROUP) == "i:0;")


@case(rows=[("without a key", None), ("with a key", "sekret")])
def orders_in_a_full_house(name, key):
    """There are as many connections as may be. Those who come at the same time, and order something, are heard all the same."""
    with Server(*BOTH) if key is None else keyed(key) as s:
        kept = [Inner(s, key).fence() for _ in range(KEPT)]
        people = [join(s, new_room(), "Ann") for _ in range(40)]
        os.kill(s.process.pid, signal.SIGSTOP)
        os.waitpid(s.process.pid, os.WUNTRACED)
        for i, person in enumerate(people):   # also one that was kept, and is the next to go
            inner = kept[KEPT - 256] if i == 0 else Inner(s, key)
            inner.tell(SEND_TO_ONE, person, body='{"type": "order"}')
            inner.close()
        os.kill(s.process.pid, signal.SIGCONT)
        for person in people:
            person.expect("order")


@gateway()
def the_next_stays(s):
    """Who comes into a full house in the round in which somebody leaves takes nobody else's place."""
    kept = [Inner(s).fence() for _ in range(256)]
    s.signal(signal.SIGSTOP)
    kept.pop(0).close()
    come = [Inner(s)]
    s.signal(signal.SIGCONT)
    for inner in come + kept:
        inner.fence()


@case()
def objects_need_a_key():
    """Who has the key may keep objects; references and the like nobody."""
    with keyed() as s:
        ann, inner = join(s, "room", "Ann"), Inner(s, "sekret")
        good = 'a:1:{i:0;O:8:"stdClass":1:{s:1:"p";i:1;}}'
        inner.tell(SET_SESSION, ann, good)
        for bad in 'a:1:{i:0;C:11:"ArrayObject":0:{}}', "a:2:{i:0;i:1;i:1;R:2;}", 'a:1:{i:0;E:7:"Foo:Bar";}':
            inner.tell(SET_SESSION, ann, bad)
        check(inner.session(ann) == good, inner.session(ann))


@gateway()
def sessions_that_are_kept(s):
    """Byte for byte; up to 32 KiB and 32 levels; a text without a colon too, and no session at all."""
    client, inner = Ws(s), Inner(s)
    conn = inner.numbers()[0]
    check(inner.session(conn) == "a:0:{}" and inner.ask(ALL_SESSIONS) == php({conn: ""}), "at first")
    longest = php({"x": "y" * ((32 << 10) - len(php({"x": "y" * 10000})) + 10000)})
    check(len(longest) == 32 << 10, len(longest))
    for session in ("a:1:{i:0;d:1.50;}", "a:1:{i:0;d:0.1;}", 'a:1:{s:3:"\0\xff";i:1;}', deep(32), longest,
                    "garbage", php({"k": "\";}a:0:{}"})):
        inner.tell(SET_SESSION, conn, session)
        check(inner.session(conn) == session, "it is", inner.session(conn)[:200], "in place of", session[:200])
    inner.tell(UPDATE_SESSION, conn, php({"a": 1}))
    inner.tell(SET_SESSION, conn, "garbage")
    inner.tell(UPDATE_SESSION, conn, php({"a": 1}))
    check(inner.session(conn) == "garbage", "an update of what is no array:", inner.session(conn))
    inner.tell(SET_SESSION, conn, "")
    check(inner.session(conn) == "a:0:{}" and inner.ask(ALL_SESSIONS) == php({conn: ""}), "at last")
    client.close()


UPDATES = [   # a session, an update, and what it becomes
    ("a value", 'a:2:{s:1:"a";i:1;s:1:"b";i:2;}', 'a:1:{s:1:"a";i:3;}', 'a:2:{s:1:"a";i:3;s:1:"b";i:2;}'),
    ("a new one", 'a:1:{s:1:"b";i:2;}', 'a:2:{s:1:"a";N;s:1:"b";i:0;}', 'a:2:{s:1:"b";i:0;s:1:"a";N;}'),
    ("lists", "a:3:{i:0;i:1;i:1;i:2;i:2;i:3;}", "a:2:{i:0;i:9;i:5;i:8;}", "a:4:{i:0;i:9;i:1;i:2;i:2;i:3;i:5;i:8;}"),
    ("nested", 'a:1:{s:1:"a";a:2:{s:1:"x";i:1;s:1:"y";a:1:{i:0;i:1;}}}', 'a:1:{s:1:"a";a:1:{s:1:"y";a:1:{i:1;i:2;}}}',
     'a:1:{s:1:"a";a:2:{s:1:"x";i:1;s:1:"y";a:2:{i:0;i:1;i:1;i:2;}}}'),
    ("array to value", 'a:1:{s:1:"a";a:1:{i:0;i:1;}}', 'a:1:{s:1:"a";s:1:"x";}', 'a:1:{s:1:"a";s:1:"x";}'),
    ("value to array", 'a:1:{s:1:"a";s:1:"x";}', 'a:1:{s:1:"a";a:1:{i:0;i:1;}}', 'a:1:{s:1:"a";a:1:{i:0;i:1;}}'),
    ("array to null", 'a:1:{s:1:"a";a:1:{i:0;i:1;}}', 'a:1:{s:1:"a";N;}', 'a:1:{s:1:"a";N;}'),
    ("empty into array", 'a:1:{s:1:"a";a:1:{i:0;i:1;}}', 'a:1:{s:1:"a";a:0:{}}', 'a:1:{s:1:"a";a:1:{i:0;i:1;}}'),
    ("nothing", 'a:1:{s:1:"a";i:1;}', "a:0:{}", 'a:1:{s:1:"a";i:1;}'),
    ("into nothing", "a:0:{}", 'a:1:{s:1:"a";a:1:{i:3;d:0.5;}}', 'a:1:{s:1:"a";a:1:{i:3;d:0.5;}}'),
    ("into no session", "", 'a:1:{s:1:"a";d:1.5;}', 'a:1:{s:1:"a";d:1.5;}'),
    ("floats", 'a:2:{s:1:"a";d:0.1;s:1:"b";d:1.0E+25;}', 'a:1:{s:1:"b";d:-0;}', 'a:2:{s:1:"a";d:0.1;s:1:"b";d:-0;}'),
    ("keys alike", 'a:2:{i:1;s:1:"x";s:2:"01";s:1:"y";}', 'a:2:{s:2:"01";i:5;i:-1;i:6;}',
     'a:3:{i:1;s:1:"x";s:2:"01";i:5;i:-1;i:6;}'),
    ("texts with marks", 'a:1:{s:1:"a";s:6:"";}{:a";}', 'a:1:{s:3:"";}";i:1;}',
     'a:2:{s:1:"a";s:6:"";}{:a";s:3:"";}";i:1;}'),
    ("no array", 'a:1:{s:1:"a";i:1;}', "i:5;", 'a:1:{s:1:"a";i:1;}'),
    ("types", 'a:4:{i:0;N;i:1;b:1;i:2;d:1;i:3;s:1:"x";}', 'a:4:{i:0;b:0;i:1;N;i:2;i:1;i:3;d:1;}',
     'a:4:{i:0;b:0;i:1;N;i:2;i:1;i:3;d:1;}'),
    ("deep", deep(16), deep(16), deep(16)),
    ("deeper", deep(3), deep(32), deep(32)),
]


@gateway(rows=UPDATES)
def session_updates(s, name, before, update, after):
    """array_replace_recursive(), and serialized again."""
    ann, inner = join(s, new_room(), "Ann"), Inner(s)
    inner.tell(SET_SESSION, ann, before)
    inner.tell(UPDATE_SESSION, ann, update)
    check(inner.session(ann) == after, inner.session(ann))


@gateway()
def updates_have_an_end(s):
    """A session that has grown too long by an update stays as it was."""
    ann, inner = join(s, "room", "Ann"), Inner(s)
    inner.tell(SET_SESSION, ann, php({"a": "x" * 20000}))
    inner.tell(UPDATE_SESSION, ann, php({"b": "y" * 20000}))
    check(inner.session(ann) == php({"a": "x" * 20000}), len(inner.session(ann)))
    many = php({f"k{i}": i for i in range(1000)})
    inner.tell(SET_SESSION, ann, many)
    inner.fence()
    begin = s.cpu_seconds()
    for _ in range(20):
        inner.tell(UPDATE_SESSION, ann, many)
    check(inner.session(ann) == many)
    check(instrumented() or s.cpu_seconds() - begin < 0.5, "20 updates of 1000 fields:", s.cpu_seconds() - begin, "s")


@gateway()
def sessions_of_the_chat(s):
    """Who logs in has one, with his room as he sent it and his name as HTML."""
    inner, clients = Inner(s), [Ws(s) for _ in range(3)]
    for client, room, name in zip(clients, ("room", 7, "7"), ("Ann", "<b>你", "Bob")):
        client.login(name, room)
        name = name.replace("<", "&lt;").replace(">", "&gt;")
        check(inner.session(client) == php({"room_id": room, "client_name": name}), inner.session(client))
    inner.tell(UPDATE_SESSION, clients[0], php({"vip": True}))
    inner.fence()
    clients[0].login("Ann", "other")
    check('"other"' in inner.session(clients[0]), "after another login", inner.session(clients[0]))
    clients[0].login("", "nameless")
    inner.tell(UPDATE_SESSION, clients[0], php({"vip": False}))
    inner.fence()
    clients[0].say("still here")
    clients[0].expect("say", content="still here", from_client_name="")


@gateway()
def sessions_change_the_chat(s):
    """Its room and name are those of the session: he speaks there, and hears it, and still hears the old room."""
    ann, old, new = *join(s, "1", "Ann", "Old"), join(s, "2", "New")
    ann.fence(), old.fence()
    inner = Inner(s)
    inner.tell(SET_SESSION, ann, php({"room_id": "2", "client_name": "Anna"}))
    inner.fence()
    ann.say("hello")
    for client in ann, new:
        client.expect("say", content="hello", from_client_name="Anna")
    old.say("still here?")
    for client in ann, old:
        client.expect("say", content="still here?")
    inner.tell(UPDATE_SESSION, ann, php({"client_name": "A&amp;B"}))
    inner.fence()
    ann.say("again")
    for client in ann, new:
        client.expect("say", content="again", from_client_name="A&amp;B")
    inner.tell(SET_SESSION, ann, php({"k": "v"}))
    inner.fence()
    ann.say("who am I")
    ann.expect_error("not_logged_in")
    expect_nothing(old, new)
    stray, conn = stranger(s, inner)
    inner.tell(SET_SESSION, conn, php({"room_id": 2, "client_name": "Stray"}))
    inner.fence()
    stray.say("let in")
    for client in stray, new:
        client.expect("say", content="let in", from_client_name="Stray")
    stray.close()
    new.expect("logout", from_client_name="Stray")


# ---------------------------------------------------------------------------
# Business workers
# ---------------------------------------------------------------------------

def ask_as(recorded, s):
    """The client of a recorded handshake, and the body of 205 that it should cause."""
    body = bytes.fromhex(recorded)[28:].decode()
    value = dict(re.findall(r's:\d+:"([A-Z_]+)";s:\d+:"([^"]*)";', body))
    lines = [f"{k[5:].replace('_', '-').title()}: {v}" for k, v in value.items() if k.startswith("HTTP_")]
    client = Ws(s, open=False)
    client.send("\r\n".join([f"GET {value['REQUEST_URI']} HTTP/1.1", *lines, "", ""]).encode())
    check(client.answer().status == 101, "the handshake failed")
    mine = f'REMOTE_PORT";i:{client.sock.getsockname()[1]};s:11:"SERVER_PORT";i:{s.port};'
    return client, re.sub(r'REMOTE_PORT";i:\d+;s:11:"SERVER_PORT";i:\d+;', mine, body).encode()


@gateway()
def recorded_workers(s):
    """Two workers of a PHP chat and two people, as it was: the workers are told the same, and the people hear it."""
    workers = {n: Worker(s, f"ChatBusinessWorker:{n}").fence() for n in (1, 2)}
    clients, ports, numbers, groups, heard, events = {}, {}, {}, {}, {1: [], 2: []}, {}

    def now(data):
        """With the ids of today."""
        return re.sub(rb"7f00000108fd(0000000[12])", lambda m: b"%s%08x" % (events[1].raw[5:11].hex().encode(),
                                                                          numbers[int(m[1])]), data)
    for from_gateway, kind, n, raw in GOLDEN["worker"]:
        raw = bytes.fromhex(raw)
        length, cmd, *_, conn, flag, _, ext_len = HEAD.unpack_from(raw)
        ext, body = raw[28:28 + ext_len], raw[28 + ext_len:]
        if not from_gateway:
            workers[n].send(packet(cmd, numbers.get(conn, 0), ext, now(body), flag))
            workers[n].fence()
            if cmd == JOIN_GROUP:
                groups[conn] = ext.decode()
            reached = [conn] if cmd == SEND_TO_ONE else \
                [c for c in groups if groups[c] in json.loads(ext)["group"]] if cmd == SEND_TO_GROUP else []
            for client in reached:
                heard[client].append(now(body).decode())
            continue
        if cmd == ON_CONNECT:
            clients[n], handshake = ask_as(GOLDEN["handshakes"][0], s)
            ports[n] = clients[n].sock.getsockname()[1]
        elif cmd == ON_MESSAGE:
            clients[n].send(frame(TEXT, body := now(body)))
        elif cmd == ON_CLOSE:
            got = [chat_text(clients[n]) for _ in heard[n]]
            check(got == heard[n], n, "heard", got, "in place of", heard[n])
            clients[n].close()
            groups.pop(n)
        event = workers[n].event(cmd)
        numbers.setdefault(n, event.conn)
        events.setdefault(n, event)
        want = HEAD.pack(0, cmd, event.ip, event.port, 0x7f000001, ports[n], numbers[n], flag, s.port, ext_len)
        check(event.raw[4:28] == want[4:], kind, "has the header", event.raw[4:28].hex(), "in place of", want[4:].hex())
        check(event.ext.encode() == ext, kind, "has the session", event.ext)
        if cmd == ON_HANDSHAKE:
            body = handshake
        check(event.body == body, kind, "has the body", event.body, "in place of", body)
    for worker in workers.values():
        worker.none()


@gateway("--origin", "*", rows=[(str(i), raw) for i, raw in enumerate(GOLDEN["handshakes"])])
def handshakes(s, name, raw):
    """A worker gets the request as PHP has it: query, server, cookies."""
    worker = Worker(s, "w:1").fence()
    client, body = ask_as(raw, s)
    check(worker.event(ON_CONNECT, client).body == b"")
    event = worker.event(ON_HANDSHAKE, client)
    check(event.flag == 0 and event.ext == "", event)
    check(event.body == body, event.body, "in place of", body)
    client.close()
    worker.event(ON_CLOSE)


@gateway(rows=[("query", "/?a=1&&=2&b=3&", ""), ("cookies", "/?a=1&b=3", "Cookie: ; =2; c=4;")])
def pairs_without_a_name(s, name, target, cookie):
    """PHP has no such variables, and no array has such a key."""
    worker, client = Worker(s, "w:1").fence(), Http(s)
    client.send(get(target, "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
                    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", *filter(None, [cookie])))
    worker.event(ON_CONNECT)
    body = worker.event(ON_HANDSHAKE).body.decode()
    check(body.startswith('a:3:{s:3:"get";' + php({"a": "1", "b": "3"})), body)
    check(body.endswith('s:6:"cookie";' + php({"c": "4"} if cookie else {}) + "}"), body)
    check(worker.ask(BATCH_COUNT, ext='["",1]') == 'a:2:{s:0:"";i:0;i:1;i:0;}')
    client.close()
    worker.event(ON_CLOSE)


@gateway()
def names_as_php_has_them(s):
    """Dots and blanks in names are '_' in $_GET and $_COOKIE; blanks in front, and names of nothing else, are not there."""
    worker, client = Worker(s, "w:1").fence(), Http(s)
    client.send(get("/?a.b=c.d&%20+x+y=+z&+=1&k[a.b]=1", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
                    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Cookie: connect.sid=s.1; b=2"))
    worker.event(ON_CONNECT)
    body = worker.event(ON_HANDSHAKE).body.decode()
    check(body.startswith('a:3:{s:3:"get";' + php({"a_b": "c.d", "x_y": " z", "k[a.b]": "1"})), body)
    check(body.endswith('s:6:"cookie";' + php({"connect_sid": "s.1", "b": "2"}) + "}"), body)
    client.close()
    worker.event(ON_CLOSE)


@gateway()
def workers_share(s):
    """Who has the fewest clients gets the next; if it leaves another takes over, and at last the chat itself."""
    early = join(s, "room", "Early")
    one, two = Worker(s, "w:1").fence(), Worker(s, "w:2").fence()
    mine = {one: [], two: []}
    for i in range(6):
        worker = (one, two)[i % 2]
        mine[worker].append(worker.newcomer())
    early.say("I was here before")
    early.expect("say", content="I was here before")
    for worker, clients in mine.items():
        for i, client in enumerate(clients):
            client.send(frame(TEXT, f"not JSON {i}"))
            event = worker.event(ON_MESSAGE, client)
            check((event.conn, event.body, event.ext) == (client.conn, f"not JSON {i}".encode(), ""), event)
    ann = mine[one][0]
    session = php({"room_id": "room", "client_name": "Ann"})
    one.tell(JOIN_GROUP, ann.conn, "room")
    one.tell(SET_SESSION, ann.conn, session)
    one.fence()
    gone = mine[two].pop()
    gone.close()
    check(two.event(ON_CLOSE).conn == gone.conn)
    two.newcomer()   # it has two then, the other three
    one.close()
    Inner(s).fence().fence()
    ann.send(frame(TEXT, "hello"))
    event = two.event(ON_MESSAGE, ann)
    check((event.conn, event.ext, event.body) == (ann.conn, session, b"hello"), event)
    two.close()
    Inner(s).fence().fence()
    ann.say("who answers?")
    for client in ann, early:
        client.expect("say", content="who answers?", from_client_name="Ann")
    other = mine[two][0]
    other.send(frame(TEXT, "not JSON"))
    other.expect_error("bad_json")
    other.login("Other", "room")
    ann.close()
    other.expect("logout", from_client_name="Ann")


@gateway()
def workers_come_late(s):
    """Who was faster than the workers after a restart comes again, and is served by one; who talks to the chat stays."""
    early, fast = join(s, "room", "Early"), Ws(s)
    fast.send(frame(TEXT, "hello, Events.php"))
    fast.expect_error("bad_json")
    worker = Worker(s, "w:1").fence()
    fast.expect_close(1001)
    again = worker.newcomer()
    again.send(frame(TEXT, "hello, Events.php"))
    check(worker.event(ON_MESSAGE, again).body == b"hello, Events.php")
    second = Worker(s, "w:2").fence()
    early.say("hello")
    early.expect("say", content="hello")
    expect_nothing(early, again)
    for one in worker, second:
        one.none()


@gateway()
def workers_take_out(s):
    """A worker takes its client out of the room of its session, which stays; it is for the worker to tell others."""
    early, worker = join(s, "room", "Early"), Worker(s, "w:1").fence()
    ann, session = worker.newcomer(), php({"room_id": "room", "client_name": "Ann"})
    worker.tell(SET_SESSION, ann.conn, session)
    check(worker.ask(COUNT_BY_GROUP, ext="room") == "i:2;", "it is not in the room")
    worker.tell(LEAVE_GROUP, ann.conn, "room")
    check(worker.ask(COUNT_BY_GROUP, ext="room") == "i:1;", "it is in the room still")
    check(worker.session(ann.conn) == session, worker.session(ann.conn))
    worker.tell(SET_SESSION, ann.conn, php({"room_id": "room", "client_name": "Ann", "n": 1}))   # after an event
    early.say("alone")
    early.expect("say", content="alone")
    expect_nothing(early, ann)
    worker.tell(SET_SESSION, ann.conn, session.replace('"room"', '"next"'))
    check([worker.ask(COUNT_BY_GROUP, ext=room) for room in ("room", "next")] == ["i:1;", "i:1;"], "another is entered")


@gateway()
def workers_take_over_who_leaves(s):
    """A worker goes, and its clients have no other before something happens to them: the chat does not speak for them."""
    early, one, two = join(s, "room", "Early"), Worker(s, "w:1").fence(), Worker(s, "w:2").fence()
    ann, session = one.newcomer(), php({"room_id": "room", "client_name": "Ann"})
    one.tell(SET_SESSION, ann.conn, session)
    one.fence()
    one.close()
    Inner(s).fence().fence()
    two.tell(LEAVE_GROUP, ann.conn, "room")
    two.fence()
    early.say("alone")
    early.expect("say", content="alone")
    expect_nothing(early)
    check(two.session(ann.conn) == session, two.session(ann.conn))
    ann.send(frame(TEXT, "hello"))
    check(two.event(ON_MESSAGE, ann).ext == session)


@gateway()
def workers_that_do_not_read(s):
    """A worker with 16 MB before it is shut out; its clients are served by the chat then."""
    worker = Worker(s, "w:1").fence()
    ann = worker.newcomer()
    for _ in range(600):   # 36 MB; the kernel takes some
        ann.send(frame(TEXT, "x" * 60000))
    ann.expect_error("bad_json")
    ann.fence()
    ann.early.clear()
    ann.login("Ann", "room")


@gateway()
def workers_close_and_kick(s):
    """ON_CLOSE comes for whoever ends in whatever way; who only asks for the page is no client."""
    worker = Worker(s, "w:1").fence()
    with contextlib.closing(Http(s)) as plain:
        check(plain.ask("/health").status == 200)
    worker.none()
    kicked, destroyed, resets = worker.newcomer(), worker.newcomer(), worker.newcomer()
    worker.tell(KICK, kicked.conn, body="bye")
    check(worker.event(ON_CLOSE).conn == kicked.conn)
    check(chat_text(kicked) == "bye")
    kicked.expect_close(4001)
    worker.tell(DESTROY, destroyed.conn)
    check(worker.event(ON_CLOSE).conn == destroyed.conn)
    destroyed.expect_end()
    worker.tell(SET_SESSION, resets.conn, php({"k": "v"}))
    worker.fence()
    resets.reset()
    event = worker.event(ON_CLOSE)
    check((event.conn, event.ext, event.body) == (resets.conn, php({"k": "v"}), b""), event)
    worker.none()


@gateway()
def worker_asks(s):
    """What a worker has ordered is done when it asks, though it asks by another connection, and asked before."""
    ann = join(s, "room", "Ann")
    before, worker, behind = Inner(s).fence(), Worker(s, "w:1").fence(), Inner(s).fence()
    for cmd, count, asks in [(JOIN_GROUP, "i:1;", before), (LEAVE_GROUP, "i:0;", behind)] * 3:
        os.kill(s.process.pid, signal.SIGSTOP)
        os.waitpid(s.process.pid, os.WUNTRACED)
        asks.tell(COUNT_BY_GROUP)
        worker.tell(cmd, ann, "news")
        asks.tell(COUNT_BY_GROUP, ext="news")
        os.kill(s.process.pid, signal.SIGCONT)
        check(asks.reply() == "i:1;", "there is one client")
        got = asks.reply()
        check(got == count, "after", cmd, "it says", got)


@gateway()
def worker_orders_when_busy(s):
    """What a worker orders is done though it has not read yet what its clients do; not what it asks without an end."""
    ann, worker, asks = join(s, "room", "Ann"), Worker(s, "w:1").fence(), Inner(s).fence()
    client = worker.newcomer()
    for _ in range(200):   # 12 MB: more than the kernel takes, and less than it may leave unread
        client.send(frame(TEXT, "x" * 60000))
    client.fence()
    worker.tell(JOIN_GROUP, ann, "news")
    until(lambda: asks.ask(COUNT_BY_GROUP, ext="news") == "i:1;", "the order is not heard")
    names = json.dumps([f"group {i}" for i in range(50000)])
    with contextlib.suppress(ConnectionError):   # 1.2 MB each
        for _ in range(30):
            worker.tell(BATCH_COUNT, ext=names)
    client.fence()
    client.send(frame(TEXT, "is it gone?"))
    client.expect_error("bad_json")


@gateway()
def worker_keys(s):
    """A second worker of the same name takes the place of the first; a wrong key is closed."""
    old = Worker(s, "w:1").fence()
    client = old.newcomer()
    wrong = Worker(s, "w:2", "wrong")
    wrong.expect_end()
    new = Worker(s, "w:1").fence()
    old.expect_end()
    client.send(frame(TEXT, "hi"))
    check(new.event(ON_MESSAGE, client).body == b"hi")
    for body in "", "{}", "x", '{"secret_key":5}', '{"worker_key":"w:3","secret_key":null}':
        bad = Inner(s)
        bad.tell(WORKER, body=body)
        bad.tell(COUNT_BY_GROUP)
        bad.expect_end()


@case()
def worker_pings():
    """Every 25 s, if the gateway is not at 127.0.0.1."""
    with clock() as faults, Server(*GATEWAY, env=faults.env) as here, \
            Server("--gateway", "127.0.0.2:0", env=faults.env) as there:
        near, far, half, client = Worker(here, "w:1").fence(), Worker(there, "w:1").fence(), Inner(here), Inner(there)
        half.send(packet(IS_ONLINE)[:-1])
        Inner(here).fence()
        faults.later = 31
        check(far.event(WORKER_PING).raw == packet(WORKER_PING), "another ping")
        half.expect_end()   # so the other has looked at its clock as well
        near.none()
        client.fence()


# ---------------------------------------------------------------------------
# PHP
# ---------------------------------------------------------------------------

SCRIPT = os.path.join(ROOT, "test", "backend.php")


class Php:
    """backend.php, call by call."""

    def __init__(self, *arguments):
        if not shutil.which("php"):
            raise Skip("there is no php (package php-cli)")
        line = ["php", "-d", "display_errors=stderr", SCRIPT, *arguments]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def call(self, method, *arguments):
        self.process.stdin.write(json.dumps([method, arguments]).encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline() or b'"it ended"')

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.communicate()


def same(one, two):
    """Equal, where PHP does not tell an empty list from an empty object."""
    if isinstance(one, dict) and isinstance(two, dict):
        return list(one) == list(two) and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two and type(one) is type(two) or (one in ([], {}) and two in ([], {}))


def calls_of_the_record(methods, key, *options):
    """Those calls of the record whose method is meant, from PHP: what they return, and what is heard."""
    with pair(key) as (a, b):
        first, second, ann, carl, c, bob = cast(a, b, key)
        today = {"c00000015": ann.id, "d00000018": bob.id, "c00000016": f"{ann.id[:12]}{c:08x}"}

        def now(value):
            text = re.sub("7f00000108f([cd][0-9a-f]{8})",
                          lambda m: today.get(m[1], (ann if m[1][0] == "c" else bob).id[:12] + m[1][1:]),
                          json.dumps(value, ensure_ascii=False))
            return json.loads(text)
        closed = False
        with Php(a.register, key, *options) as back_end:
            for name, arguments, returns in GOLDEN["calls"]:
                method = name[4:]
                if method not in methods or "\ufffd" in str(arguments):   # bytes that JSON cannot carry
                    continue
                if method == "closeClient" and not closed:
                    closed = True
                    for inner, client, who in (first, ann, "A"), (second, bob, "B"):
                        want = [word.replace('"__PHP_Incomplete_Class_Name":"stdClass",', "")
                                for word in HEARD[who] if word != "raw"]
                        heard = texts(inner, client)
                        check(sorted(heard) == sorted(want), who, "heard", heard, "in place of", want)
                got, want = back_end.call(method, *now(arguments)), {"returns": now(returns)}
                check(same(got, want), name, "gave", got, "in place of", want)
        check(chat_text(bob) == "bye")
        bob.expect_close(4001)


def own_methods():
    with open(SCRIPT, encoding="utf-8") as script:
        return set(re.findall(r"public function (\w+)", script.read())) - {"__construct"}


WAYS = [("a connection each", "", ""), ("one connection", "", "keep"),
        ("a connection each, with a key", "se/kr+et=", ""), ("one connection, with a key", "se/kr+et=", "keep")]


@case(rows=WAYS)
def php_back_end(name, key, keep):
    """A back end in PHP finds both gateways by the register, and gets what it got from those of a PHP chat."""
    calls_of_the_record(own_methods(), key, keep)


@case()
def php_back_end_with_key():
    """With the key it works, with another one it does not."""
    for keep in ("", "keep"):
        with keyed("sekret&\"'") as s:
            ann = join(s, "room", "Ann")
            for key in "", "sekret":
                with Php(s.register, key, keep) as wrong:
                    check("throws" in wrong.call("sendToAll", "x") and "throws" in wrong.call("isOnline", ann.id))
                    wrong.call("sendToClient", ann.id, "x")
            with Php(s.register, "sekret&\"'", keep) as right:
                for method, arguments, want in (
                        ("sendToClient", [ann.id, "one"], True), ("isOnline", [ann.id], 1),
                        ("bindUid", [ann.id, "u"], None),
                        ("sendToUid", ["u", {"a": 1.5}], None), ("isUidOnline", ["u"], 1), ("getAllClientCount", [], 1),
                        ("getSession", [ann.id], {"room_id": "room", "client_name": "Ann"}),
                        ("getClientCountByGroup", ["room"], 1), ("closeClient", [ann.id, "bye"], True),
                        ("isOnline", [ann.id], 0)):
                    got = right.call(method, *arguments)
                    check(got == {"returns": want}, method, "gave", got)
            check([chat_text(ann) for _ in range(3)] == ["one", '{"a":1.5}', "bye"])
            ann.expect_close(4001)


@gateway()
def as_php_does_it(s):
    """JSON and merging of arrays of all sorts, compared with what PHP makes of them."""
    if not shutil.which("php"):
        raise Skip("there is no php (package php-cli)")
    lines = subprocess.run(["php", SCRIPT, "random", "400"], capture_output=True, check=True).stdout.splitlines()
    ann, inner = join(s, "room", "Ann"), Inner(s)
    for one, text, two, both in map(json.loads, lines):
        one, two, both = (bytes.fromhex(h) for h in (one, two, both))
        inner.tell(SEND_TO_ONE, ann, body=one, flag=0)
        got = chat_text(ann)
        check(got == text, one, "became", got, "in place of", text)
        inner.tell(SET_SESSION, ann, one)
        inner.tell(UPDATE_SESSION, ann, two)
        got = inner.session(ann)
        check(got == both.decode(), one, "and", two, "became", got, "in place of", both)


if os.environ.get("GATEWAYCLIENT"):
    @case(rows=WAYS)
    def real_library(name, key, keep):
        """GatewayClient itself, with all its methods."""
        path = os.environ["GATEWAYCLIENT"]
        path = os.path.join(path, "Gateway.php") if os.path.isdir(path) else path
        calls_of_the_record({call[0][4:] for call in GOLDEN["calls"]}, key, keep, path)


if __name__ == "__main__":
    raise SystemExit(main())
