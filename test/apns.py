"""Push to gateways as they are: the binary protocol, and HTTP/2 servers that nobody here wrote.

For the binary protocol there is a gateway of our own that rejects what it is told to, and `openssl s_server`,
which shows the bytes. For HTTP/2 there are nginx, nghttpd, h2o and apache; push.py does what none of them can.
Programs that are not installed are skipped. All servers are on loopback, and in a directory that goes away.

    python3 test/apns.py apns.nghttpd     runs the cases with that in their names
"""

import atexit
import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import itertools
import json
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import tempfile
import termios
import threading
import time

from harness import (CERTIFICATE, DEADLINE, SLOW, Http, Server, Skip, Ws, case, check, close_frame, command, environment, main,
                     run, until)

HERE = os.path.dirname(os.path.abspath(__file__))
OTHER = os.path.join(HERE, "other.pem")
KEY = ("--apns-key", os.path.join(HERE, "apns.p8"), "--apns-key-id", "ABC123DEFG", "--apns-team-id", "DEF123GHIJ")
TOPIC = "com.example.xchat"
PHRASE = "correct horse 4711"
SOON = DEADLINE + 3 * SLOW   # for a push, which waits for others first

# Section 2.7 of the description of the protocol.
TOKEN = "ed8c1c155a6daf448f610ae749eec794be551f8d1b145448711eea973583f820"
TEXT = "My first push test!"
PAYLOAD = b'{"aps":{"alert":"My first push test!","sound":"default"}}'
COMMAND_0 = "000020" + TOKEN + "0039" + PAYLOAD.hex()
COMMAND_2 = "0200000071" "010020" + TOKEN + "020039" + PAYLOAD.hex() + "0300040000002a" "0400046553ff10" "0500010a"


# ---------------------------------------------------------------------------
# Certificates, ports, programs
# ---------------------------------------------------------------------------

def once(function, lock=threading.Lock()):
    """Made when first wanted, for all cases."""
    cached = functools.lru_cache(function)

    def locked():
        with lock:
            return cached()
    return locked


@once
def pki():
    """A directory with a CA (ca.pem), what it has signed (client.pem, with its key; and apart as client.crt and
    client.key, or under a passphrase as locked.pem and locked.key), and elsewhere.pem, not for localhost."""
    d = tempfile.mkdtemp(prefix="xchat-pki")
    atexit.register(shutil.rmtree, d)

    def openssl(line, *more):
        done = subprocess.run(["openssl", *line.split(), *more], cwd=d, capture_output=True, text=True)
        check(done.returncode == 0, line, done.stderr)
    new = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 99 -keyout "
    openssl(new + "ca.key -out ca.pem", "-subj", "/CN=CA of a test")
    openssl(new + "elsewhere.key -out elsewhere.crt -addext subjectAltName=DNS:elsewhere -subj /CN=localhost")
    openssl(new + "client.key -out client.crt -CA ca.pem -CAkey ca.key", "-subj",
            f"/UID={TOPIC}/CN=Apple Push Services: {TOPIC}")
    openssl("pkcs8 -topk8 -in client.key -out locked.key", "-passout", "pass:" + PHRASE)
    for name, parts in {"client.pem": ("client.crt", "client.key"), "locked.pem": ("locked.key", "client.crt"),
                        "elsewhere.pem": ("elsewhere.crt", "elsewhere.key")}.items():
        put(os.path.join(d, name), "".join(take(os.path.join(d, part)) for part in parts))
    put(os.path.join(d, "phrase"), PHRASE + "\n")
    put(os.path.join(d, "wrong"), "not " + PHRASE + "\n")
    return d


def take(path):
    with open(path) as file:
        return file.read()


def put(path, text):
    with open(path, "w") as file:
        file.write(text)
    return path


def of_pki(name):
    return os.path.join(pki(), name)


def two_listeners(numbers=itertools.count(20000 + os.getpid() * 200 % 12000, 2), lock=threading.Lock()):
    """At a port that nobody has and the next, below those that the kernel gives out."""
    with lock:
        for port in numbers:
            with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
                both = [stack.enter_context(socket.create_server(("127.0.0.1", port + i))) for i in range(2)]
                stack.pop_all()
                return both


def free_port():
    """The first of two that are free."""
    first, second = two_listeners()
    with first, second:
        return first.getsockname()[1]


def listening(port):
    """Seen without connecting."""
    return f"0100007F:{port:04X} 00000000:0000 0A" in take("/proc/net/tcp")


@contextlib.contextmanager
def program(*line, port, directory, **popen):
    """Something of others that listens there; its process."""
    if not shutil.which(line[0], path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"):
        raise Skip(f"{line[0]} is not installed")
    with open(os.path.join(directory, "stderr"), "a+") as errors:
        process = subprocess.Popen(list(map(str, line)), cwd=directory, **{
            "stdin": subprocess.DEVNULL, "stdout": errors, "stderr": errors, **popen})
        try:
            until(lambda: listening(port) or process.poll() is not None, f"{line[0]} does not come up", 2 * DEADLINE)
            check(process.poll() is None, line[0], "ended:", take(errors.name)[-800:])
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def directory():
    with tempfile.TemporaryDirectory(prefix="xchat") as d:
        yield d


# ---------------------------------------------------------------------------
# A server that pushes, phones, people
# ---------------------------------------------------------------------------

class Xchat(Server):
    """A server with --apns, and a directory."""

    def __init__(self, url, *options, login=None, ca=CERTIFICATE, devices="", **server):
        self.data = tempfile.mkdtemp(prefix="xchat")
        if devices:
            put(os.path.join(self.data, "devices"), devices)
        super().__init__("--apns", url, "--apns-ca", ca, "--apns-topic", TOPIC, "--data", self.data,
                         *(login or ("--apns-cert", of_pki("client.pem"))), "--admin", "127.0.0.1:0",
                         "--rate", "0", "--max-per-address", "0", *options, **server)
        self.wait_log("(?s)(listening on.*){2}")

    def stop(self):
        fault, log = super().stop(), self.log()
        shutil.rmtree(self.data)
        leaks = re.findall(r".*secret.*", log) + [word for word in (PHRASE,) if word in log]
        return "; ".join(filter(None, [fault, leaks and f"the log tells {leaks[:3]}"])) or None

    def metric(self, name):
        with contextlib.closing(Http(self, at=len(self.listeners) - 1)) as http:
            figures = dict(re.findall(r"(?m)^xchat_push_([a-z_]+(?:\{[^}]*\})?) (\S+)$", http.ask("/metrics").body.decode()))
        return float(figures.get(name, 0))

    def devices(self):
        """The tokens of the file."""
        known = {}
        for line in take(os.path.join(self.data, "devices")).splitlines():
            known[json.loads(line)["token"]] = json.loads(line)["at"]
        return {token for token, at in known.items() if at}

    def settle(self):
        """Until all is answered; not for the binary protocol, which has no answers."""
        until(lambda: self.metric("queued") + self.metric("in_flight") == 0, "pushes are left", SOON)


def leave(ws):
    ws.send(close_frame(1000))
    ws.expect_close(1000, skip=True)


def phones(s, n, room="room", prefix="", size=32):
    """So many new ones come, and leave; their tokens."""
    tokens = [prefix + os.urandom(size).hex()[len(prefix):] for _ in range(n)]
    for token in tokens:
        ws = Ws(s)
        ws.login("Bob", room, device_token=token)
        leave(ws)
    return tokens


def tell(s, text="secret", room="room"):
    """Somebody comes, says this, and goes; its id."""
    ws = Ws(s)
    ws.login("Ann", room)
    ws.say(text, ref="r")
    message = ws.message()
    while message.get("ref") != "r":
        message = ws.message()
    leave(ws)
    return message["id"]


def at_once(rows, function):
    """function(*row) for all rows at the same time; all faults at the end."""
    def one(row):
        try:
            function(*row)
        except (AssertionError, OSError, ValueError) as error:
            return f"[{row[0]}] {type(error).__name__ * (type(error) is not AssertionError)} {error}"
    with concurrent.futures.ThreadPoolExecutor(len(rows)) as pool:
        faults = list(filter(None, pool.map(one, rows)))
    check(not faults, f"{len(faults)} of {len(rows)} rows:", "\n    ".join(["", *faults]))


# ---------------------------------------------------------------------------
# The binary protocol: a gateway that does as it is told
# ---------------------------------------------------------------------------

Packet = collections.namedtuple("Packet", "raw token payload id expires priority")


def parse(data):
    """The first packet of this, or None while it is not all there."""
    if data[:1] == b"\0" and len(data) >= 37:
        check(data[1:3] == b"\0\x20", "token length", data[1:3])
        end = 37 + int.from_bytes(data[35:37], "big")
        return Packet(data[:end], data[3:35].hex(), data[37:end], None, None, None) if len(data) >= end else None
    check(data[:1] in (b"", b"\0", b"\2"), "a packet begins with", data[:8])
    end = 5 + int.from_bytes(data[1:5], "big")
    if data[:1] != b"\2" or len(data) < max(end, 6):
        return None
    at, items = 5, {}
    while at < end:
        item, size = struct.unpack(">BH", data[at:at + 3])
        check(item not in items and at + 3 + size <= end, "item", item, "of", size, "bytes in", data[:end])
        items[item] = data[at + 3:at + 3 + size]
        at += 3 + size
    check({1: 32, 3: 4, 4: 4, 5: 1} == {i: len(items[i]) for i in items if i != 2}, "items of", data[:end])
    return Packet(data[:end], items[1].hex(), items[2], *(int.from_bytes(items[i], "big") for i in (3, 4, 5)))


def packets_of(data):
    """All packets; the rest must be none."""
    found = []
    while data:
        found.append(parse(data))
        check(found[-1], "cut short:", data)
        data = data[len(found[-1].raw):]
    return found


def error(status, named):
    """The error packet for that push."""
    return struct.pack(">BBI", 8, status, named.id if isinstance(named, Packet) else named)


def rejects(n, status, which=-1, of=None):
    """A rule: when n packets have come, the error packet for one of them, and the end."""
    return lambda got: [error(status, got[which] if of is None else of)] if len(got) == n else None


class Binary:
    """A gateway, and at the next port a feedback service that tells `feedback` to each who asks.

    There is a rule for each connection (none: it only listens). It is called with the packets so far, and gives
    None, or what to send before the end, in pieces.
    `got` is a list for each connection that had a good handshake, of its packets.
    """

    def __init__(self, *rules, certificate=CERTIFICATE, feedback=(), rcvbuf=None, reset=False):
        self.rules, self.got, self.subjects, self.faults = rules, [], [], []
        self.feedback, self.asked, self.refused, self.reset = feedback, 0, 0, reset
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=of_pki("ca.pem"))
        self.context.load_cert_chain(certificate)
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.ending, self.live, self.may_read = False, set(), threading.Event()
        self.may_read.set()
        self.listeners = two_listeners()
        self.port = self.listeners[0].getsockname()[1]
        self.url = f"binary://localhost:{self.port}"
        if rcvbuf:
            self.listeners[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        self.threads = [threading.Thread(target=self.serve, args=pair) for pair in
                        zip(self.listeners, (self.gateway, self.dead_tokens))]
        for thread in self.threads:
            thread.start()

    def serve(self, listener, talk):
        while not self.ending:
            try:
                sock = listener.accept()[0]
            except OSError:
                return
            sock.settimeout(30 * SLOW)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                tls = self.context.wrap_socket(sock, server_side=True)
            except OSError:
                self.refused += 1
                sock.close()
                continue
            self.live.add(tls)
            try:
                talk(tls)
            except AssertionError as fault:
                self.faults.append(str(fault))
            except OSError:
                pass
            self.live.discard(tls)
            tls.close()

    def gateway(self, tls):
        rule = self.rules[len(self.got)] if len(self.got) < len(self.rules) else lambda got: None
        self.subjects.append(str(tls.getpeercert()["subject"]))
        self.got.append([])
        got, buffer, answer = self.got[-1], b"", None
        while answer is None:
            self.may_read.wait()
            data = tls.recv(16384)
            if not data:
                check(not buffer, "a packet is cut short:", buffer[:80])
                return
            buffer += data
            while answer is None and (packet := parse(buffer)):
                buffer = buffer[len(packet.raw):]
                got.append(packet)
                answer = rule(got)
        for piece in answer:
            tls.sendall(piece)
        if self.reset:
            tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def dead_tokens(self, tls):
        self.asked += 1
        for piece in self.feedback:
            tls.sendall(piece)
        tls.unwrap()

    def hang_up(self):
        for tls in list(self.live):
            tls.shutdown(socket.SHUT_RDWR)

    def tokens(self, *connections):
        """Of all packets of these connections (default: all), in order."""
        return [packet.token for i, got in enumerate(self.got) if not connections or i in connections for packet in got]

    def wait(self, n, *connections, seconds=SOON):
        """Until so many packets have come; their tokens."""
        until(lambda: len(self.tokens(*connections)) >= n or self.faults, f"the gateway did not get {n} packets", seconds)
        check(not self.faults, self.faults)
        return self.tokens(*connections)

    def __enter__(self):
        return self

    def __exit__(self, kind, fault, trace):
        self.ending = True
        self.may_read.set()
        for sock in self.listeners:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.hang_up()
        for thread in self.threads:
            thread.join(DEADLINE)
        for sock in self.listeners:
            sock.close()
        check(not self.faults or fault, "the gateway:", self.faults)


def push_test(url, *options, token=TOKEN, ca=CERTIFICATE):
    return run("--push-test", token, TEXT, "--apns", url, "--apns-cert", of_pki("client.pem"), "--apns-ca", ca, *options)


@case()
def golden():
    """The packets of section 2.7, byte for byte, whoever reads them; success is silence."""
    def row(name, version, wanted):
        with Binary() as gateway:
            status, out, err = push_test(gateway.url, "--apns-format", version)
            check(status == 0 and out, status, out, err)
            packet, = gateway.got[0]
            check(len(gateway.got) == 1 and TOPIC in gateway.subjects[0], gateway.subjects)
            raw = packet.raw.hex()
            if version == 2:
                check(packet.id > 0 and 0 < packet.expires - time.time() <= 30 * 86400, packet)
                raw = raw[:-30] + "0000002a" + raw[-22:-16] + "6553ff10" + raw[-8:]
            check(raw == wanted, raw, "is not", wanted)
    at_once([("command 0", 0, COMMAND_0), ("command 2", 2, COMMAND_2)], row)


@case()
def push_test_rejected():
    """--push-test tells what the gateway said, and ends with 1."""
    def row(name, status, words):
        with Binary(*[rejects(1, status)] * 9) as gateway:
            code, out, err = push_test(gateway.url)
            check(code == 1 and re.search(words, out), code, out, err)
            check(len(gateway.tokens()) == 1, "sent again")
    at_once([("8", 8, "token"), ("7", 7, "long|large|size"), ("3", 3, "topic|certificate"), ("255", 255, "not|error")], row)


# A status; what is sent again, in this order (3: only after a while, since that counts as a trial); is the token of the third
# forgotten; is nothing more sent for now.
STATUSES = [
    ("0", 0, [4, 5], False, False), ("1", 1, [4, 5, 3], False, False), ("2", 2, [4, 5], False, False),
    ("3", 3, [], False, True), ("4", 4, [4, 5], False, False), ("5", 5, [4, 5], True, False),
    ("6", 6, [], False, True), ("7", 7, [4, 5], False, False), ("8", 8, [4, 5], True, False),
    ("10", 10, [4, 5], False, False), ("128", 128, [4, 5], False, False), ("255", 255, [4, 5, 3], False, False),
    ("99, unheard of", 99, [4, 5], False, False),
]


@case()
def statuses():
    """Each error for the third of five: what followed is sent again, once, in order; what was before is not."""
    def row(name, status, again, forgotten, paused):
        again_255 = lambda got: [error(255, got[-1])] if got[-1].token == third else None
        with Binary(rejects(5, status, 2), *[again_255] * (status == 255)) as gateway, Xchat(gateway.url) as s:
            known = phones(s, 5)
            third = None
            tell(s)
            first = gateway.wait(5, 0)
            third = first[2]
            check(sorted(first) == sorted(known), "not those that were told")
            wanted = [first[i - 1] for i in again]
            if paused:
                s.wait_log("(?i)warn.*(certificate|topic)", SOON)
            else:
                gateway.wait(5 + len(again))
            begin = time.monotonic()
            fence = phones(s, 1, "fence")
            tell(s, room="fence")
            if paused:
                until(lambda: time.monotonic() > begin + 2.5 * SLOW, "")   # when it would have been sent
                check(len(gateway.got) == 1 and s.metric("queued") == 4, gateway.got[1:], s.metric("queued"))
            else:
                gateway.wait(6 + len(again))
                check([t for t in gateway.tokens()[5:] if t not in fence] == wanted, "not the right ones were sent again:",
                      [first.index(t) + 1 for t in gateway.tokens()[5:] if t not in fence])
                check(len(gateway.got) == (3 if status == 255 else 2), len(gateway.got), "connections")
            kept = set(known + fence) - ({third} if forgotten else set())
            until(lambda: s.devices() == kept, "the devices are not those that should be kept")
            check(s.metric('tokens_removed_total{status="400"}') == forgotten)
    at_once(STATUSES, row)


@case()
def error_in_pieces():
    """An error packet that comes as 2 and 4 bytes, with something else done in between."""
    def rule(got):
        return pieces(got) if len(got) == 3 else None

    def pieces(got):
        yield error(8, got[1])[:2]
        for _ in range(5):
            ann.fence()
        yield error(8, got[1])[2:]
    with Binary(rule) as gateway, Xchat(gateway.url) as s:
        ann = Ws(s)
        ann.login("Ann", "elsewhere")
        phones(s, 3)
        tell(s)
        first = gateway.wait(3, 0)
        check(gateway.wait(1, 1) == first[2:], gateway.tokens(1))
        until(lambda: first[1] not in s.devices(), "the dead token is kept")


@case()
def dead_at_once():
    """A token error for the very first push proves nothing about the token: it may be of the other environment."""
    with Binary(rejects(3, 8, 0)) as gateway, Xchat(gateway.url) as s:
        known = phones(s, 3)
        tell(s)
        first = gateway.wait(3, 0)
        check(gateway.wait(2, 1) == first[1:], gateway.tokens(1))
        check(s.devices() == set(known), "it was forgotten")


@case()
def many_dead():
    """Each dead token costs a connection: they come at once, but not more than ten in a second."""
    begins = []

    def rule(got):
        begins.extend([time.monotonic()] * (len(got) == 1))
        return [error(8, got[-1])] if got[-1].token.startswith("dead") else None
    with Binary(*[rule] * 99) as gateway, Xchat(gateway.url) as s:
        good = phones(s, 30, "good", prefix="0")
        tell(s, room="good")
        check(sorted(gateway.wait(30)) == sorted(good))
        phones(s, 10, prefix="dead")
        tell(s)
        until(lambda: s.devices() == set(good), "the devices are not those that should be kept", SOON)
        check([len(got) for got in gateway.got] == [31] + [1] * 9, "packets came", [len(got) for got in gateway.got])
        check(min(b - a for a, b in zip(begins, begins[1:])) > 0.05, "in haste:", begins)


@case()
def end_without_a_word():
    """What was sent just now is sent again; what was sent long ago was accepted; a number unknown to us is as good as none."""
    def row(name, options, rule):
        with Binary(rule) as gateway, Xchat(gateway.url, *options) as s:
            phones(s, 3)
            tell(s)
            first = gateway.wait(3, 0)
            check(sorted(gateway.wait(3, 1)) == sorted(first), "not all were sent again")
            fence = phones(s, 1, "fence")
            tell(s, room="fence")
            gateway.wait(7)
            check(gateway.tokens(1)[3:] == fence, "sent once too often")
            check(len(s.devices()) == 4)
    at_once([("command 2", (), lambda got: [] if len(got) == 3 else None),
             ("command 0", ("--apns-format", "0"), lambda got: [] if len(got) == 3 else None),
             ("error for 0", (), rejects(3, 8, of=0)), ("error for another", (), rejects(3, 8, of=0x7fffffff)),
             ("error cut short", (), lambda got: [error(8, got[0])[:5]] if len(got) == 3 else None),
             ("nonsense", (), lambda got: [b"HTTP/1.1 400 No\r\n\r\n"] if len(got) == 3 else None)], row)


@case()
def idle_end():
    """A gateway that closes when nothing happens is connected to again when there is something to send."""
    with Binary() as gateway, Xchat(gateway.url) as s:
        phones(s, 2)
        tell(s)
        gateway.wait(2, 0)
        begin = time.monotonic()
        until(lambda: time.monotonic() > begin + 2.6, "")   # so old that it was accepted
        gateway.hang_up()
        until(lambda: s.metric("connected") == 0, "still connected")
        tell(s, "secret again")
        check(len(gateway.wait(4)) == 4 and len(gateway.got) == 2, gateway.tokens(1))
        check([json.loads(p.payload)["aps"]["badge"] for p in gateway.got[1]] == [2, 2], gateway.got[1])


@case()
def backlog():
    """800 kB to a gateway that does not read, and then rejects one of 400: the others come in order, none is lost, none
    is doubled. Also when the connection is reset with the error packet on its way."""
    def row(name, n, more):
        text = "secret " + "x" * 1900
        with Binary(rejects(n, 8, 49), rcvbuf=4096, **more) as gateway, Xchat(gateway.url) as s:
            known = phones(s, 400)
            gateway.may_read.clear()
            tell(s, text)
            until(lambda: s.metric("in_flight") > 100, "nothing is sent", SOON)
            gateway.may_read.set()
            seen = gateway.wait(n, 0)
            gateway.wait(350, 1)
            check(sorted(gateway.tokens(1) + seen[:50]) == sorted(known), "some are lost or doubled")
            check(gateway.tokens(1)[:len(seen) - 50] == seen[50:], "not in order")
            until(lambda: s.devices() == set(known) - {seen[49]}, "the devices are not those that should be kept")
    at_once([("all read", 400, {}), ("reset", 60, {"reset": True})], row)


@case()
def limits():
    """256 bytes with command 0, 2048 with command 2: texts are cut to that, between characters."""
    def row(name, version, limit, text):
        with Binary() as gateway, Xchat(gateway.url, "--apns-format", version) as s:
            phones(s, 1)
            tell(s, text)
            gateway.wait(1)
            payload = gateway.got[0][0].payload
            body = json.loads(payload)["aps"]["alert"]["body"]
            check(limit - 12 <= len(payload) <= limit, len(payload), "bytes")
            check(body.endswith("…") and text.startswith(body[:-1]), body)
            tell(s, "short")
            gateway.wait(2)
            check(json.loads(gateway.got[0][1].payload)["aps"]["alert"]["body"] == "short")
    texts = [("letters", "x" * 2500), ("three bytes", "推送" * 500), ("quotes", 'say "no\\"\n' * 300), ("faces", "🙂x" * 500)]
    at_once([(f"{name}, command {version}", version, limit, text) for version, limit in ((0, 256), (2, 2048))
             for name, text in texts], row)


@case()
def other_tokens():
    """Tokens that have not 32 bytes are not sent this way, and are in nobody's."""
    with Binary() as gateway, Xchat(gateway.url) as s:
        phones(s, 2, size=31)
        phones(s, 2, size=100)
        good = phones(s, 1)
        phones(s, 1, size=8)
        tell(s)
        gateway.wait(1)
        until(lambda: s.metric('dropped_total{why="refused"}') == 5, "they are kept", SOON)
        check(gateway.tokens() == good, gateway.tokens())


# ---------------------------------------------------------------------------
# The feedback service
# ---------------------------------------------------------------------------

def tuple_of(token, at):
    return struct.pack(">IH", int(at), len(token) // 2) + bytes.fromhex(token)


def stored(token, at):
    """A line of DIR/devices."""
    return json.dumps({"token": token, "uid": "bob", "at": int(at * 1000), "unread": 0, "room": "rooms/room"}) + "\n"


@case()
def feedback():
    """Forgotten is who registered before the time it tells, and nobody else, however the bytes come."""
    now = time.time()
    old, new, unnamed, long, cut = (os.urandom(n).hex() for n in (32, 32, 32, 100, 32))
    dead = tuple_of(os.urandom(32).hex(), now) + tuple_of(new, now - 500) + tuple_of("", now) + tuple_of(long, now - 500) \
        + tuple_of(old, now - 500) + tuple_of(os.urandom(3000).hex(), now)
    rest = tuple_of(cut, now)[:-1]
    lines = stored(new, now - 400) + "".join(stored(t, now - 1000) for t in (old, unnamed, long, cut))

    def row(name, pieces):
        with Binary(feedback=pieces) as gateway, Xchat(gateway.url, devices=lines) as s:
            until(lambda: s.devices() == {new, unnamed, cut}, "not the right ones are kept", SOON)
            check(s.metric("devices") == 3 and gateway.asked == 1)
            tell(s)
            check(sorted(gateway.wait(3)) == sorted([new, unnamed, cut]), "pushed to others")
            check(gateway.asked == 1, "asked again")
    at_once([("at once", [dead + rest]), ("in pieces", [dead[i:i + 7] for i in range(0, len(dead), 7)] + [rest])], row)


@case()
def no_feedback():
    """Pushes do not need that service."""
    with Binary() as gateway:
        gateway.listeners[1].shutdown(socket.SHUT_RDWR)
        with Xchat(gateway.url, devices=stored(TOKEN, 1)) as s:
            tell(s)
            check(gateway.wait(1) == [TOKEN])
            check(s.devices() == {TOKEN})


# ---------------------------------------------------------------------------
# The binary protocol: openssl s_server, as section 13.7 has it
# ---------------------------------------------------------------------------

class Plain:
    """`openssl s_server` for one connection. What it gets is in `data`; what it is told to say, it says; at the end
    of that it closes."""

    def __init__(self, port, stack):
        options = f"-cert {CERTIFICATE} -key {CERTIFICATE} -CAfile {of_pki('ca.pem')}".split()
        self.data, self.process = b"", stack.enter_context(program(
            "openssl", "s_server", "-accept", f"127.0.0.1:{port}", *options, "-Verify", "1", "-verify_return_error", "-quiet",
            "-naccept", "1", port=port, directory=pki(), stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        stack.callback(self.process.stdin.close)

    def read(self):
        while data := os.read(self.process.stdout.fileno(), 65536):
            self.data += data
        self.process.stdout.close()

    def say(self, data):
        """And close."""
        self.process.stdin.write(data)
        self.process.stdin.close()

    def packets(self, size):
        """When it has got that many bytes."""
        until(lambda: len(self.data) >= size, f"it did not get {size} bytes", SOON)
        return packets_of(self.data)


@case()
def s_server():
    """Five packets, an error for the third, and the resend on the next connection; the feedback service of the same make."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        first = Plain(port, stack)
        service = Plain(port + 1, stack)
        with Xchat(f"binary://localhost:{port}", devices=stored(TOKEN, time.time() - 1000)) as s:
            service.say(tuple_of(TOKEN, time.time() - 500) + tuple_of(os.urandom(32).hex(), 1))
            until(lambda: not s.devices(), "the token of the feedback is kept", SOON)
            phones(s, 5)
            tell(s)
            until(lambda: first.data, "nothing came", SOON)
            one = len(parse(first.data[:200] + b"\0" * 200).raw)
            packets = first.packets(5 * one)
            check(len(packets) == 5 and len({p.payload for p in packets}) == 1, packets)
            first.say(error(8, packets[2]))
            first.process.wait(DEADLINE)
            second = Plain(port, stack)
            again = second.packets(2 * one)
            check([p.token for p in again] == [p.token for p in packets[3:]], again)
            until(lambda: len(s.devices()) == 4, "the dead token is kept")
            check(not service.data, "the feedback service was told something")


# ---------------------------------------------------------------------------
# Certificates
# ---------------------------------------------------------------------------

@case()
def gateway_is_verified():
    """One that we do not trust, or of another name, is not told anything: neither packets nor who we are."""
    def row(name, scheme, certificate, ca):
        with Binary(certificate=certificate) as gateway:
            url = f"{scheme}://localhost:{gateway.port}"
            status, out, err = push_test(url, "--apns-topic", TOPIC, ca=ca)
            check(status == 1 and re.search("certificate|verif|name|trust", out + err), status, out, err)
            with Xchat(url, ca=ca) as s:
                phones(s, 1)
                tell(s)
                until(lambda: gateway.refused >= 2, "it did not try", SOON)
                s.wait_log("(?i)certificate|verif|name|trust")
                check(not gateway.got and not gateway.asked, "told", gateway.got, gateway.asked)
                check(s.metric("queued") == 1, "the push is lost")
    elsewhere = of_pki("elsewhere.pem")
    at_once([(f"{name}, {scheme}", scheme, *more) for scheme in ("binary", "https") for name, *more in
             [("another CA", OTHER, CERTIFICATE), ("another name", elsewhere, elsewhere)]], row)


LOCKED = ("--apns-cert", "client.crt", "--apns-key", "locked.key")
LOGINS = [
    ("one file", ("--apns-cert", "client.pem"), None),
    ("two files", ("--apns-cert", "client.crt", "--apns-key", "client.key"), None),
    ("a passphrase from a file", (*LOCKED, "--apns-passphrase-file", "phrase"), None),
    ("a passphrase from the environment", LOCKED, PHRASE),
    ("one file, locked", ("--apns-cert", "locked.pem", "--apns-passphrase-file", "phrase"), None),
    ("one file, locked, environment", ("--apns-cert", "locked.pem"), PHRASE),
    ("a passphrase nobody needs", ("--apns-cert", "client.pem", "--apns-passphrase-file", "wrong"), None),
]
NOT_LOGINS = [   # and the options of which one must be named
    ("no passphrase", LOCKED, "key"), ("wrong passphrase", (*LOCKED, "--apns-passphrase-file", "wrong"), "key|passphrase-file"),
    ("wrong, one file", ("--apns-cert", "locked.pem", "--apns-passphrase-file", "wrong"), "cert|passphrase-file"),
    ("no passphrase, one file", ("--apns-cert", "locked.pem"), "cert"),
    ("no passphrase file", (*LOCKED, "--apns-passphrase-file", "nosuch"), "passphrase-file"),
    ("empty passphrase file", (*LOCKED, "--apns-passphrase-file", "/dev/null"), "passphrase-file|key"),
    ("no such certificate", ("--apns-cert", "nosuch"), "cert"), ("no such key", (*LOCKED[:3], "nosuch"), "key"),
    ("another's key", (*LOCKED[:3], "ca.key"), "key"), ("no key in it", ("--apns-cert", "client.crt"), "cert"),
    ("no such CA", ("--apns-cert", "client.pem", "--apns-ca", "nosuch"), "ca"),
    ("nothing in it", ("--apns-cert", "/dev/null"), "cert"), ("a directory", ("--apns-cert", "/"), "cert"),
]


@case()
def client_certificates():
    """In one file or two, locked or not: the gateway sees who it is. Nobody else sees the passphrase."""
    def row(name, login, phrase):
        with Binary() as gateway, Xchat(gateway.url, login=login, ca=CERTIFICATE, cwd=pki(),
                                        env={"XCHAT_APNS_PASSPHRASE": phrase}) as s:
            phones(s, 1)
            tell(s)
            gateway.wait(1)
            check(TOPIC in gateway.subjects[0], gateway.subjects)
            check(PHRASE not in take(f"/proc/{s.pid}/cmdline"), "the command line has the passphrase")
            check(80 < s.metric("certificate_days") < 100, s.metric("certificate_days"))
    at_once(LOGINS, row)


@case()
def new_certificate():
    """SIGHUP: a gateway sees the new one from then on. One that cannot be read changes nothing."""
    with directory() as d, Binary() as gateway:
        path = shutil.copy(of_pki("client.pem"), os.path.join(d, "pem"))
        with Xchat(gateway.url, login=("--apns-cert", path)) as s:
            phones(s, 1)
            for number, text in enumerate((None, take(of_pki("ca.pem")) + take(of_pki("ca.key")), "nothing")):
                if text:
                    put(path, text)
                    s.signal(signal.SIGHUP)
                    s.wait_log("read again" if number == 1 else "warn.*--apns-cert")
                tell(s)
                gateway.wait(number + 1)
            check([TOPIC in subject for subject in gateway.subjects] == [True, False], gateway.subjects)
            check([len(got) for got in gateway.got] == [1, 2], gateway.got)


@case()
def no_client_certificate():
    """Status 1 and one line that names the option; nobody is asked for the passphrase, though there is a terminal."""
    def row(name, login, options):
        ours, theirs = os.openpty()
        try:
            line = command("--apns", "binary://localhost:1", "--apns-ca", CERTIFICATE, *login)
            process = subprocess.Popen(line, env=environment(), cwd=pki(), stdin=theirs, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, text=True, start_new_session=True,
                                       preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0))
            try:
                out, err = process.communicate(timeout=DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError("it waits for something", *process.communicate()) from None
            check(process.returncode == 1, "status", process.returncode, err)
            check(err.count("\n") == 1 and re.search(f"--apns-({options})", err), err)
            check(PHRASE not in out + err, err)
        finally:
            os.close(ours)
            os.close(theirs)
    at_once(NOT_LOGINS, row)


# ---------------------------------------------------------------------------
# HTTP/2: nginx
# ---------------------------------------------------------------------------

NGINX = """
daemon off; worker_processes 1; pid nginx.pid; error_log error.log; user root;
events { worker_connections 512; }
http {
  client_body_temp_path tmp_b; proxy_temp_path tmp_p; fastcgi_temp_path tmp_f; uwsgi_temp_path tmp_u; scgi_temp_path tmp_s;
  log_format apns escape=json '{"uri":"$uri","method":"$request_method","proto":"$server_protocol","host":"$http_host",'
    '"topic":"$http_apns_topic","type":"$http_apns_push_type","auth":"$http_authorization","exp":"$http_apns_expiration",'
    '"prio":"$http_apns_priority","id":"$http_apns_id","collapse":"$http_apns_collapse_id","len":"$content_length",'
    '"mime":"$content_type","body":"$request_body","status":$status,"client":"$ssl_client_s_dn","conn":$connection,'
    '"nreq":$connection_requests}';
  access_log off;
  server {
    listen 127.0.0.1:%(port)d ssl http2; server_name localhost; ssl_protocols TLSv1.2 TLSv1.3;
    ssl_certificate %(cert)s; ssl_certificate_key %(cert)s;
    ssl_client_certificate %(ca)s; ssl_verify_client on; keepalive_requests %(keep)d;
    client_max_body_size 4k; error_page 413 @big; access_log apns.log apns; default_type application/json;
    location @big { return 413 '{"reason":"PayloadTooLarge"}'; }
    location / { proxy_pass http://127.0.0.1:%(next)d; proxy_http_version 1.1; proxy_set_header Connection ""; }
    location /3/device/0bad { return 410 '{"reason":"Unregistered","timestamp":1700000000000}'; }
    location /3/device/0dead { return 410 '{"reason":"Unregistered","timestamp":9700000000000}'; }
    location /3/device/0odd { return 418 '<html>No</html>'; }
  }
  server { listen 127.0.0.1:%(next)d; location / { return 200; } }
}
"""


@contextlib.contextmanager
def nginx(keep=1000):
    """A port, and a function that gives what nginx has logged when it is n lines."""
    with directory() as d:
        port = free_port()
        put(os.path.join(d, "conf"), NGINX % {"port": port, "next": port + 1, "cert": CERTIFICATE, "ca": of_pki("ca.pem"), "keep": keep})
        path = put(os.path.join(d, "apns.log"), "")

        def seen(n):
            until(lambda: take(path).count("\n") >= n, f"nginx did not see {n} requests", SOON)
            return [json.loads(line) for line in take(path).splitlines()]
        with program("nginx", "-p", d, "-c", "conf", port=port, directory=d) as process:
            seen.process = process
            yield port, seen


@case()
def nginx_fields():
    """What nginx reads: all fields, the body, and who we are by our certificate; one connection for all."""
    with nginx() as (port, seen), Xchat(f"https://localhost:{port}") as s:
        tokens = phones(s, 3)
        text = 'secret "quotes" \\ \n 推送 🙂 <b>'
        ids = [tell(s, text)]
        seen(3)
        ids.append(tell(s, text))
        lines = seen(6)
        for i, line in enumerate(lines):
            check(line["collapse"] == ids[i // 3] and line["uri"][10:] in tokens, line)
            want = {"method": "POST", "proto": "HTTP/2.0", "host": "localhost", "topic": TOPIC, "type": "alert", "auth": "",
                    "prio": "10", "len": str(len(line["body"].encode())), "mime": "application/json", "status": 200}
            check(want == {k: line[k] for k in want}, line)
            check(f"UID={TOPIC}" in line["client"] and 0 < int(line["exp"]) - time.time() <= 30 * 86400, line)
            check(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", line["id"]), line)
            aps = json.loads(line["body"])["aps"]
            check(aps == {"alert": {"title": "Ann", "body": text}, "badge": i // 3 + 1, "sound": "default", "thread-id": "room"}, aps)
        check(len({line["id"] for line in lines}) == 6 and len({line["conn"] for line in lines}) == 1, lines)
        s.settle()
        check(s.metric('responses_total{status="200"}') == 6 and s.metric("ok_total") == 6)


@case()
def nginx_goodbyes():
    """A goodbye after every third request, and when nginx reads its configuration again: each phone gets one push."""
    with nginx(keep=3) as (port, seen), Xchat(f"https://localhost:{port}") as s:
        tokens = phones(s, 8)
        for i in 1, 2:
            tell(s)
            lines = seen(8 * i)[-8:]
            s.settle()
            check(sorted(line["uri"][10:] for line in lines) == sorted(tokens) and s.metric("ok_total") == 8 * i, lines)
            check(len({line["conn"] for line in lines}) >= 3, "there was no goodbye")
            seen.process.send_signal(signal.SIGHUP)


@case()
def nginx_answers():
    """Answers that come before the body is read, with a RST_STREAM behind: dead tokens, and an answer that is no JSON."""
    with nginx() as (port, seen), Xchat(f"https://localhost:{port}") as s:
        known = {prefix: phones(s, 2, prefix=prefix) for prefix in ("0bad", "0dead", "0ddd", "1")}
        tell(s)
        seen(8)
        s.settle()
        check(s.devices() == set(sum(known.values(), [])) - set(known["0dead"]), "the devices are not those that should be kept")
        check(s.metric('responses_total{status="410"}') == 4 and s.metric('tokens_removed_total{status="410"}') == 2)
        check(s.metric("retried_total") == 0 and s.metric("connected") == 1, s.log())


@case()
def nginx_wants_a_certificate():
    """Without one it answers 400, in HTML: nobody is forgotten, and the log says that something is wrong."""
    with nginx() as (port, seen), Xchat(f"https://localhost:{port}", login=KEY) as s:
        tokens = phones(s, 3)
        tell(s)
        check([line["status"] for line in seen(3)] == [400] * 3, seen(3))
        s.settle()
        check(s.devices() == set(tokens) and s.metric("ok_total") == 0)
        s.wait_log("(info|warn) .*apns.* 400")


@case()
def nginx_comes_late():
    """Pushes wait for a gateway that is not there."""
    with nginx() as (port, seen):
        with Xchat(f"https://localhost:{port}") as s:
            seen.process.terminate()
            seen.process.wait()
            tokens = phones(s, 3)
            tell(s)
            s.wait_log("(?i)refused", SOON)
            check(s.metric("queued") == 3, s.metric("queued"))
            with program("nginx", "-p", seen.process.args[2], "-c", "conf", port=port, directory=seen.process.args[2]):
                check(sorted(line["uri"][10:] for line in seen(3)) == sorted(tokens), seen(3))
                s.settle()


# ---------------------------------------------------------------------------
# HTTP/2: nghttpd, h2o, apache
# ---------------------------------------------------------------------------

@contextlib.contextmanager
def nghttpd(*options):
    """A port, a directory whose empty files are good tokens, and a function for what it has said."""
    with directory() as d:
        port, where = free_port(), os.path.join(d, "3", "device")
        os.makedirs(where)
        with program("nghttpd", "-v", "-a", "127.0.0.1", "-d", d, *options, port, CERTIFICATE, CERTIFICATE, port=port, directory=d):
            yield port, where, lambda: take(os.path.join(d, "stderr"))


@case()
def nghttpd_fields():
    """The header block as another HPACK decoder reads it, in order; the JWT is marked as secret."""
    with nghttpd() as (port, where, said), Xchat(f"https://localhost:{port}", login=KEY) as s:
        token, = phones(s, 1)
        put(os.path.join(where, token), "")
        id = tell(s)
        until(lambda: s.metric("ok_total") == 1, "not accepted", SOON)
        fields = re.findall(r"recv \(stream_id=1(, sensitive|)\) (:?[^:]+): (.*)", said())
        body = r'{"aps":{"alert":{"title":"Ann","body":"secret"},"badge":1,"sound":"default","thread-id":"room"}}'
        want = [(":method", "POST"), (":scheme", "https"), (":path", "/3/device/" + token), (":authority", "localhost"),
                ("authorization", r"bearer eyJ[\w-]+\.[\w-]+\.[\w-]{86}"), ("content-type", "application/json"),
                ("content-length", str(len(body))), ("apns-topic", TOPIC), ("apns-push-type", "alert"),
                ("apns-id", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), ("apns-expiration", r"\d{10}"),
                ("apns-priority", "10"), ("apns-collapse-id", id)]
        check([name for _, name, _ in fields] == [name for name, _ in want], fields)
        for (secret, name, value), (_, wanted) in zip(fields, want):
            check(re.fullmatch(wanted, value) and (secret != "") == (name == "authorization"), secret, name, value)
        check("recv (stream_id=1) :method" in said(), said()[:900])


@case()
def nghttpd_limits():
    """What ends a connection there when it is done wrong: too many streams, windows, the table of header fields."""
    text = "secret " + "x" * 3750

    def row(name, n, options, login=None, what=None):
        with nghttpd(*options) as (port, where, said), Xchat(f"https://localhost:{port}", login=login) as s:
            for token in phones(s, n):
                put(os.path.join(where, token), "")
            for i in range(2):
                tell(s, text)
                until(lambda: s.metric("ok_total") == n * (i + 1), "not accepted", SOON)
            check(s.metric("sent_total") == 2 * n and s.metric("retried_total") == 0, "some were sent twice")
            check("send GOAWAY" not in said() and "send RST_STREAM" not in said(), "it complains:", said()[-500:])
            check(len(set(re.findall(r"\[id=(\d+)\]", said()))) == 1, "there were several connections")
            sizes = [int(size) for size in re.findall(r"recv DATA frame <length=(\d+)", said())]
            check(sum(sizes) > 2 * n * 3800 and (name != "small windows" or 4095 >= max(sizes)), sizes)
    at_once([("windows of 65535", 40, ()), ("5 streams", 40, ("-m", "5")), ("1 stream", 10, ("-m", "1")),
             ("no table", 5, ("--header-table-size=0",)), ("no table, JWT", 5, ("--header-table-size=0",), KEY),
             ("small windows", 5, ("-w", "12")), ("small windows for all", 5, ("-w", "12", "-W", "12")),
             ("bodies of 200", 40, ("--echo-upload",)), ("padding", 5, ("-b", "200"))], row)


@case()
def nghttpd_not_found():
    """A page of HTML with 404: dropped, and said so; nobody is forgotten."""
    with nghttpd() as (port, where, said), Xchat(f"https://localhost:{port}") as s:
        tokens = phones(s, 3)
        tell(s)
        until(lambda: s.metric('responses_total{status="404"}') == 3, "no 404", SOON)
        s.settle()
        check(s.devices() == set(tokens) and s.metric('dropped_total{why="refused"}') == 3)
        s.wait_log("apns.* 404")


H2O = """
listen:
  host: 127.0.0.1
  port: %d
  ssl: {certificate-file: %s, key-file: %s}
num-threads: 1
%s
hosts:
  default:
    paths:
      "/":
        mruby.handler: |
          Proc.new do |env|
            h = {"content-type"=>"application/json", "apns-id"=>(env["HTTP_APNS_ID"]||"")}
            body = env["rack.input"] ? env["rack.input"].read : ""
            p = env["PATH_INFO"]
            if env["REQUEST_METHOD"] != "POST" || (env["HTTP_APNS_TOPIC"]||"") == "" || body.size > 4096
              [405, h, ['{"reason":"MethodNotAllowed"}']]
            elsif p[10,4] == "dead"
              [410, h, ['{"reason":"Unregistered","timestamp":9700000000000}']]
            elsif p[10,3] == "bad"
              [400, h, ['{"reason":"BadDeviceToken"}']]
            else
              [200, h, []]
            end
          end
"""


def answers_of(s):
    """100 phones: of those of the first message half are dead, the second is for the others."""
    good, dead = phones(s, 50), phones(s, 50, prefix="dead")
    good = [t for t in good if t[:4] != "dead"]
    tell(s, "secret " + "x" * 5000)
    until(lambda: s.metric('tokens_removed_total{status="410"}') == 50, "the dead are kept", SOON)
    s.settle()
    check(s.metric('responses_total{status="200"}') == len(good) and s.devices() == set(good), "not the right ones are kept")
    tell(s)
    until(lambda: s.metric('responses_total{status="200"}') == 2 * len(good), "the second was not accepted", SOON)
    s.settle()
    check(s.metric("unknown_total") + s.metric("retried_total") == 0 and s.metric("sent_total") == 100 + len(good), s.log())


@case()
def h2o():
    """Its second answer names fields of a table that we do not keep; bodies are read before it answers."""
    with directory() as d:
        port = free_port()
        put(os.path.join(d, "conf"), H2O % (port, CERTIFICATE, CERTIFICATE, "user: root" if os.getuid() == 0 else ""))
        with program("h2o", "-c", "conf", port=port, directory=d), Xchat(f"https://localhost:{port}") as s:
            answers_of(s)
            bad = phones(s, 1, room="other", prefix="bad")
            tell(s, room="other")
            until(lambda: s.metric('tokens_removed_total{status="400"}') == 1, "the bad token is kept", SOON)
            check(bad[0] not in s.devices())


APACHE = """
ServerRoot %(d)s
PidFile %(d)s/pid
ErrorLog %(d)s/error.log
Mutex file:%(d)s
ServerName localhost
DocumentRoot %(d)s
%(modules)s
Listen 127.0.0.1:%(port)d
SSLSessionCache none
<VirtualHost *:%(port)d>
  Protocols h2
  SSLEngine on
  SSLCertificateFile %(cert)s
  SSLCertificateKeyFile %(cert)s
  SSLCACertificateFile %(ca)s
  SSLVerifyClient require
  ErrorDocument 410 {"reason":"Unregistered","timestamp":9700000000000}
  RewriteEngine on
  RewriteRule ^/3/device/dead - [R=410,L]
  RewriteRule ^/3/device/ - [R=200,L]
</VirtualHost>
"""


@case()
def apache():
    """Statuses in Huffman's code; a success that has a body, of HTML, is one."""
    where = "/usr/lib/apache2/modules"
    if not os.path.exists(where + "/mod_http2.so"):
        raise Skip("apache2 with mod_http2 is not installed")
    with directory() as d:
        port = free_port()
        modules = "\n".join(f"LoadModule {name}_module {where}/mod_{name}.so" for name in
                            ("mpm_event", "authz_core", "http2", "ssl", "rewrite", "mime", "socache_shmcb"))
        put(os.path.join(d, "mime.types"), "")
        put(os.path.join(d, "conf"), APACHE % {"d": d, "port": port, "cert": CERTIFICATE, "ca": of_pki("ca.pem"),
                                               "modules": modules + f"\nTypesConfig {d}/mime.types"})
        with program("apache2", "-d", d, "-f", "conf", "-DFOREGROUND", port=port, directory=d), \
                Xchat(f"https://localhost:{port}") as s:
            answers_of(s)


if __name__ == "__main__":
    main()
