"""Push to gateways as they are: the binary protocol, and HTTP/2 servers that nobody here wrote.

For the binary protocol there is a gateway of our own, that rejects what it is told to, and `openssl s_server`.
For HTTP/2 there are nginx, nghttpd, h2o and apache; push.py does what none of them can. What is not installed
is skipped. All are on loopback, and in a directory that goes away.

    python3 test/apns.py apns.nghttpd     runs the cases with that in their names
"""

import atexit
import collections
import concurrent.futures
import contextlib
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
import threading
import time

from harness import (CERTIFICATE, DEADLINE, SLOW, WRAP, Faults, Http, Server, Skip, Ws, case, check, close_frame, command,
                     environment, explain, instrumented, main, new_keys, openssl, run, until)

HERE = os.path.dirname(os.path.abspath(__file__))
OTHER = os.path.join(HERE, "other.pem")
KEY = ("--apns-key", os.path.join(HERE, "apns.p8"), "--apns-key-id", "ABC123DEFG", "--apns-team-id", "DEF123GHIJ")
TOPIC = "com.example.xchat"
PHRASE = "correct horse 4711"
SOON = DEADLINE + 3 * SLOW   # for a push, which waits for others first
GONE_400 = 'tokens_removed_total{status="400"}'
GONE_410 = 'tokens_removed_total{status="410"}'

# The golden packets.
TOKEN = "ed8c1c155a6daf448f610ae749eec794be551f8d1b145448711eea973583f820"
TEXT = "My first push test!"
PAYLOAD = b'{"aps":{"alert":"My first push test!","sound":"default"}}'.hex()
COMMAND_0 = "000020" + TOKEN + "0039" + PAYLOAD
COMMAND_2 = "0200000071" "010020" + TOKEN + "020039" + PAYLOAD + "0300040000002a" "0400046553ff10" "0500010a"


# ---------------------------------------------------------------------------
# Files, ports, programs
# ---------------------------------------------------------------------------

def take(path):
    with open(path) as file:
        return file.read()


def put(path, text):
    with open(path, "w") as file:
        file.write(text)
    return path


@functools.lru_cache
def certificates():
    if not shutil.which("openssl"):
        raise Skip("openssl is not installed")
    d = tempfile.mkdtemp(prefix="xchat-certificates")
    atexit.register(shutil.rmtree, d)

    def openssl(line, *more):
        done = subprocess.run(["openssl", *line.split(), *more], cwd=d, capture_output=True, text=True)
        check(done.returncode == 0, line, done.stderr)
    new = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 99 -keyout "
    openssl(new + "ca.key -out ca.pem -subj /CN=CA")
    openssl(new + "elsewhere.key -out elsewhere.crt -addext subjectAltName=DNS:elsewhere -subj /CN=localhost")
    openssl(new + "client.key -out client.crt -CA ca.pem -CAkey ca.key -subj",
            f"/UID={TOPIC}/CN=Apple Push Services: {TOPIC}")
    openssl("pkcs8 -topk8 -in client.key -out locked.key -passout", "pass:" + PHRASE)
    for name, key in ("client", "client"), ("locked", "locked"), ("elsewhere", "elsewhere"):
        crt = "elsewhere.crt" if name == "elsewhere" else "client.crt"
        put(f"{d}/{name}.pem", take(f"{d}/{crt}") + take(f"{d}/{key}.key"))
    put(f"{d}/phrase", PHRASE + "\n")
    put(f"{d}/wrong", "not " + PHRASE + "\n")
    return d


def pki(name="", lock=threading.Lock()):
    """A file of a directory with a CA (ca.pem), a client certificate by it (client.pem, with its key; apart as client.crt,
    client.key; with a passphrase as locked.pem, locked.key) and one that is not for localhost (elsewhere.pem)."""
    with lock:
        return os.path.join(certificates(), name)


def two_listeners(numbers=itertools.count(20000 + os.getpid() * 200 % 12000, 2), lock=threading.Lock()):
    """At a port that nobody has and the next, below those that the kernel gives out."""
    with lock:
        for port in numbers:
            with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
                both = [stack.enter_context(socket.create_server(("127.0.0.1", port + i))) for i in range(2)]
                stack.pop_all()
                return both


def free_port():
    """It and the next are free."""
    first, second = two_listeners()
    with first, second:
        return first.getsockname()[1]


@contextlib.contextmanager
def program(*line, port, directory, **popen):
    """Something of others that listens there; its process."""
    if not shutil.which(line[0], path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"):
        raise Skip(f"{line[0]} is not installed")
    with open(os.path.join(directory, "stderr"), "a+") as errors:
        process = subprocess.Popen(list(map(str, line)), cwd=directory, **{
            "stdin": subprocess.DEVNULL, "stdout": errors, "stderr": errors, **popen})
        try:   # seen without connecting, which some would count
            until(lambda: f"0100007F:{port:04X} 00000000:0000 0A" in take("/proc/net/tcp") or process.poll() is not None,
                  f"{line[0]} does not come up", 2 * DEADLINE)
            check(process.poll() is None, line[0], "ended:", take(errors.name)[-800:])
            yield process
        finally:
            process.terminate()
            try:
                process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


# ---------------------------------------------------------------------------
# A server that pushes, phones, people
# ---------------------------------------------------------------------------

class Xchat(Server):
    """A server with --apns, and a directory: `devices` is what it finds there."""

    def __init__(self, url, *options, login=None, ca=CERTIFICATE, devices="", **server):
        self.data = tempfile.mkdtemp(prefix="xchat")
        put(os.path.join(self.data, "devices"), devices)
        super().__init__("--apns", url, "--apns-ca", ca, "--apns-topic", TOPIC, "--data", self.data,
                         *(login or ("--apns-cert", pki("client.pem"))), "--admin", "127.0.0.1:0",
                         "--rate", "0", "--max-per-address", "0", *options, **server)
        self.wait_log("(?s)(listening on.*){2}")

    def stop(self):
        fault, log = super().stop(), self.log()
        shutil.rmtree(self.data)
        leaks = re.findall("secret|" + PHRASE, log)   # "secret" is in all that is said
        return "; ".join(filter(None, [fault, leaks and f"the log tells {leaks[:3]}"])) or None

    def metrics(self, *names):
        """Of one moment."""
        with contextlib.closing(Http(self, at=1)) as http:
            figures = dict(re.findall(r"(?m)^xchat_push_(\S+) (\S+)$", http.ask("/metrics").body.decode()))
        return [float(figures.get(name, 0)) for name in names]

    def metric(self, name):
        return self.metrics(name)[0]

    def devices(self):
        """The tokens of the file."""
        lines = map(json.loads, take(os.path.join(self.data, "devices")).splitlines())
        return {token for token, at in {line["token"]: line["at"] for line in lines}.items() if at}

    def expect_devices(self, *tokens):
        until(lambda: self.devices() == set(tokens), "the devices are not those that should be kept", SOON)
        check(self.metric("devices") == len(set(tokens)), "there are more than in the file")

    def settle(self):
        """Until all is answered; which in the binary protocol nothing is."""
        until(lambda: sum(self.metrics("queued", "in_flight")) == 0, "pushes are left", SOON)


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


def stored(token, at):
    """A line of DIR/devices."""
    return json.dumps({"token": token, "uid": "bob", "at": int(at * 1000), "unread": 0, "room": "rooms/room"}) + "\n"


def at_once(rows, function):
    """function(*row) for all rows at the same time; all faults at the end."""
    def one(row):
        try:
            function(*row)
        except (AssertionError, OSError, ValueError) as error:
            return f"[{row[0]}] {explain(error)}"
    with concurrent.futures.ThreadPoolExecutor(2 if WRAP else len(rows)) as pool:   # valgrind is slow enough
        faults = list(filter(None, pool.map(one, rows)))
    check(not faults, f"{len(faults)} of {len(rows)} rows:", "\n    ".join(["", *faults]))


# ---------------------------------------------------------------------------
# A gateway of the binary protocol
# ---------------------------------------------------------------------------

Packet = collections.namedtuple("Packet", "raw token payload id expires priority")


def parse(data):
    """The first packet of this, or None while it is not all there."""
    check(data[:1] in (b"", b"\0", b"\2"), "a packet begins with", data[:8])
    head = 37 if data[:1] == b"\0" else 5
    end = head + int.from_bytes(data[35:37] if head == 37 else data[1:5], "big")
    if len(data) < max(head, end):
        return None
    raw, at, items = data[:end], 5, {}
    if head == 37:
        check(raw[1:3] == b"\0\x20", "token length", raw[1:3])
        return Packet(raw, raw[3:35].hex(), raw[37:], None, None, None)
    while at < end:
        item, size = struct.unpack(">BH", raw[at:at + 3])
        check(item not in items and at + 3 + size <= end, "item", item, "of", size, "bytes in", raw)
        items[item] = raw[at + 3:at + 3 + size]
        at += 3 + size
    check({1: 32, 3: 4, 4: 4, 5: 1} == {i: len(items[i]) for i in items if i != 2}, "items of", raw)
    return Packet(raw, items[1].hex(), items[2], *(int.from_bytes(items[i], "big") for i in (3, 4, 5)))


def error(status, named):
    """The error packet for a packet, or a number."""
    return struct.pack(">BBI", 8, status, named.id if isinstance(named, Packet) else named)


def after(n, *pieces):
    """A rule: when n packets have come, say this, and end. A piece may be made by a function of them."""
    return lambda got: [piece(got) if callable(piece) else piece for piece in pieces] if len(got) == n else None


def rejects(n, status, which=-1):
    return after(n, lambda got: error(status, got[which]))


def dead_only(got):
    """A rule: tokens that begin so are dead."""
    return [error(8, got[-1])] if got[-1].token.startswith("dead") else None


class Binary:
    """A gateway, and at the next port a feedback service that says `feedback` to each who asks.

    There is a rule for each connection; without one it only listens. It is called with the packets so far, and
    gives None, or what to say before the end, in pieces. `got` are the packets of each connection.
    """

    def __init__(self, *rules, certificate=CERTIFICATE, feedback=(), rcvbuf=None, reset=False, late=0):
        self.rules, self.feedback, self.reset, self.late = rules, feedback, reset, late
        self.got, self.subjects, self.asked, self.refused, self.faults = [], [], 0, 0, []
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=pki("ca.pem"))
        self.context.load_cert_chain(certificate)
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.live, self.may_read = set(), threading.Event()
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
        while True:
            try:
                sock = listener.accept()[0]
            except OSError:   # it was shut down
                return
            sock.settimeout(30 * SLOW)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with sock, contextlib.suppress(OSError):
                self.refused += 1
                with self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False) as tls:
                    if self.late and talk == self.gateway:
                        self.look_late(tls)
                    tls.do_handshake()
                    self.refused -= 1
                    self.live.add(tls)
                    try:
                        talk(tls)
                    except AssertionError as fault:
                        self.faults.append(str(fault))
                    finally:
                        self.live.discard(tls)

    def look_late(self, tls):
        """With TLS 1.3: not at who comes, until so many bytes are there, more than it takes to say who it is."""
        def there():
            with contextlib.suppress(BlockingIOError):
                return len(socket.socket.recv(tls, self.late, socket.MSG_PEEK))
        tls.settimeout(0)
        until(there, "no hello")
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        until(lambda: there() == self.late, "no packet behind the handshake", SOON)
        tls.settimeout(30 * SLOW)

    def gateway(self, tls):
        rule = self.rules[len(self.got)] if len(self.got) < len(self.rules) else lambda got: None
        self.subjects.append(str(tls.getpeercert()["subject"]))
        self.got.append([])
        got, buffer, answer = self.got[-1], b"", None
        while answer is None:
            self.may_read.wait()
            data = tls.recv(16384)
            if not data:
                return check(not buffer, "a packet is cut short:", buffer[:80])
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
            with contextlib.suppress(OSError):
                tls.shutdown(socket.SHUT_RDWR)

    def tokens(self, *connections):
        """Of all packets of these connections (default: all), in order."""
        return [packet.token for i, got in enumerate(self.got) if not connections or i in connections for packet in got]

    def wait(self, n, *connections):
        """Until so many packets have come; their tokens."""
        until(lambda: len(self.tokens(*connections)) >= n or self.faults, f"the gateway did not get {n} packets", SOON)
        return self.tokens(*connections)

    def __enter__(self):
        return self

    def __exit__(self, kind, fault, trace):
        self.may_read.set()
        for listener in self.listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
        self.hang_up()
        for thread in self.threads:
            thread.join(DEADLINE)
        for listener in self.listeners:
            listener.close()
        check(not self.faults, fault or "", "; the gateway:", self.faults)


def push_test(url, *options, ca=CERTIFICATE):
    return run("--push-test", TOKEN, TEXT, "--apns", url, "--apns-cert", pki("client.pem"), "--apns-ca", ca, *options)


@case()
def golden():
    """The packets byte for byte; success is silence."""
    def row(name, version, wanted):
        with Binary() as gateway:
            status, out, err = push_test(gateway.url, "--apns-format", version)
            check(status == 0 and out, status, out, err)
            (packet,), = gateway.got
            check(TOPIC in gateway.subjects[0], gateway.subjects)
            raw = packet.raw.hex()
            if version == 2:
                check(packet.id > 0 and 0 < packet.expires - time.time() <= 30 * 86400, packet)
                raw = raw[:-30] + "0000002a" + raw[-22:-16] + "6553ff10" + raw[-8:]
            check(raw == wanted, raw, "is not", wanted)
    at_once([("command 0", 0, COMMAND_0), ("command 2", 2, COMMAND_2)], row)


@case()
def push_test_rejected():
    """--push-test tells what the gateway said, and ends with 1."""
    def row(status, words):
        with Binary(*[rejects(1, status)] * 9) as gateway:
            code, out, err = push_test(gateway.url)
            check(code == 1 and re.search(words, out), code, out, err)
            check(gateway.tokens() == [TOKEN], "sent again")
    at_once([(8, "token"), (7, "long|large|size"), (3, "topic|certificate"), (255, "not|error|trouble")], row)


STATUSES = [   # what is sent again, in this order (3 after a while: that is a trial); is the token of the third forgotten
    (0, [4, 5], False), (1, [4, 5, 3], False), (2, [4, 5], False), (3, [], False), (4, [4, 5], False), (5, [4, 5], True),
    (6, [], False), (7, [4, 5], False), (8, [4, 5], True), (10, [4, 5], False), (128, [4, 5], False),
    (255, [4, 5, 3], False), (99, [4, 5], False),
]


@case()
def statuses():
    """Each error for the third of five: what followed is sent again, once, in order; what was before is not. Or nothing is
    sent any more, when it would be of no use. What 255 comes for again is dropped."""
    def row(status, again, forgotten):
        first = []
        once_more = [lambda got: [error(255, got[-1])] if got[-1].token in first[2:3] else None] * (status == 255)
        with Binary(rejects(5, status, 2), *once_more) as gateway, Xchat(gateway.url) as s:
            known = phones(s, 5)
            tell(s)
            first += gateway.wait(5)[:5]
            check(sorted(first) == sorted(known), "not those that were told")
            gateway.wait(5 + len(again))
            if not again:
                s.wait_log("(?i)warn.*(certificate|topic)", SOON)
            begin = time.monotonic()
            fence, = phones(s, 1, "fence")
            tell(s, room="fence")
            if again:
                gateway.wait(6 + len(again))
                number = {token: i + 1 for i, token in enumerate(first)}
                later = [number[token] for token in gateway.tokens()[5:] if token != fence]
                check(later == again and len(gateway.got) == 2 + len(once_more), later, "were sent again", len(gateway.got))
            else:
                until(lambda: time.monotonic() > begin + 2.5 * SLOW, "")   # when it would have been sent
                check(len(gateway.got) == 1 and s.metric("queued") == 4, gateway.tokens(), s.metric("queued"))
            s.expect_devices(*set(known + [fence]) - ({first[2]} if forgotten else set()))
            check(s.metric(GONE_400) == forgotten)
    at_once(STATUSES, row)


@case()
def error_in_pieces():
    """An error packet that comes as 2 and 4 bytes, with something else done in between. It is for the very first push,
    which proves nothing about the token: it may be of the other environment."""
    def rule(got):
        return pieces(got) if len(got) == 3 else None

    def pieces(got):
        yield error(8, got[0])[:2]
        for _ in range(5):
            ann.fence()
        yield error(8, got[0])[2:]
    with Binary(rule) as gateway, Xchat(gateway.url) as s:
        ann = Ws(s)
        ann.login("Ann", "elsewhere")
        known = phones(s, 3)
        tell(s)
        check(gateway.wait(5)[3:] == gateway.tokens(0)[1:], "not the right ones were sent again")
        s.expect_devices(*known)


@case()
def many_dead():
    """Each dead token costs a connection: they come at once, but not more than ten in a second."""
    begins = []

    def rule(got):
        begins.extend([time.monotonic()] * (len(got) == 1))
        return dead_only(got)
    with Binary(*[rule] * 99) as gateway, Xchat(gateway.url) as s:
        good = phones(s, 30, "good", prefix="0")
        tell(s, room="good")
        check(sorted(gateway.wait(30)) == sorted(good))
        phones(s, 10, prefix="dead")
        tell(s)
        s.expect_devices(*good)
        check([len(got) for got in gateway.got] == [31] + [1] * 9, "packets came", [len(got) for got in gateway.got])
        check(begins[-1] - begins[1] > 0.6, "in haste:", begins)


@case()
def end_without_a_word():
    """What was sent just now is sent again; a number that is not known to us is as good as none."""
    def row(name, rule, *options):
        with Binary(rule) as gateway, Xchat(gateway.url, *options) as s:
            known = phones(s, 3)
            tell(s)
            gateway.wait(6)
            fence = phones(s, 1, "fence")
            tell(s, room="fence")
            gateway.wait(7)
            check(gateway.tokens(1)[3:] == fence, "sent once too often")
            check(sorted(gateway.tokens(0)) == sorted(gateway.tokens(1)[:3]) == sorted(known), "not all were sent again")
            s.expect_devices(*known, *fence)
    at_once([("command 2", after(3)), ("command 0", after(3), "--apns-format", "0"),
             ("error for 0", after(3, error(8, 0))), ("error for another", after(3, error(8, 0x7fffffff))),
             ("error cut short", after(3, lambda got: error(8, got[0])[:5])), ("nonsense", after(3, b"HTTP/1.1 400 No\r\n"))], row)


@case()
def end_after_a_slow_beginning():
    """A gateway that takes three seconds for the handshake, and then closes without a word: what it was sent is not old."""
    with Binary(after(2)) as gateway, Xchat(gateway.url) as s:
        known = phones(s, 2)
        gateway.context.sni_callback = lambda *_: time.sleep(3)
        tell(s)
        gateway.wait(2)
        gateway.context.sni_callback = None
        gateway.wait(4)
        check(sorted(gateway.tokens(1)) == sorted(known), gateway.tokens(1))


@case(serial=True)
def new_keys_without_end():
    """A gateway that does nothing but change keys has one turn in a round, as everybody; then it is heard."""
    context = openssl("SSL_CTX_new", openssl("TLS_server_method"))
    openssl("SSL_CTX_use_certificate_chain_file", context, CERTIFICATE.encode())
    openssl("SSL_CTX_use_PrivateKey_file", context, CERTIFICATE.encode(), 1)
    listener, other = two_listeners()
    listener.settimeout(SOON)
    with listener, other, Xchat(f"binary://localhost:{listener.getsockname()[1]}") as s:
        ann = Ws(s)
        phones(s, 1)
        tell(s)
        with listener.accept()[0] as sock:
            sock.settimeout(None)
            tls = openssl("SSL_new", context)
            openssl("SSL_set_fd", tls, sock.fileno())
            check(openssl("SSL_accept", tls).value == 1, "no handshake")
            flood = new_keys(tls, 1000 if instrumented() else 20000, error(8, 4711))
            begin = time.monotonic()
            sock.sendall(flood)
            ann.fence()
            waited = time.monotonic() - begin
            s.wait_log("error 8, of no push", SOON)
            flooded = time.monotonic() - begin
    check(waited < flooded / 2, f"another waited {waited:.3f} s of {flooded:.3f} s")


@case()
def idle_end():
    """A gateway that closes when nothing happens is connected to again when there is something to send; what was sent long
    ago was accepted."""
    with Binary() as gateway, Xchat(gateway.url) as s:
        phones(s, 2)
        tell(s)
        gateway.wait(2)
        begin = time.monotonic()
        until(lambda: time.monotonic() > begin + 2.6, "")   # it is long ago then
        gateway.hang_up()
        until(lambda: s.metric("connected") == 0, "still connected")
        tell(s, "secret again")
        check(len(gateway.wait(4)) == 4 and len(gateway.got) == 2, gateway.got)
        check([json.loads(p.payload)["aps"]["badge"] for p in gateway.got[1]] == [2, 2], gateway.got[1])


@case()
def backlog():
    """800 kB to a gateway that does not read, and then rejects one of 400: the others come in order, none is lost or
    doubled. Also when the connection is reset behind the error packet."""
    def row(name, n, more):
        with Binary(rejects(n, 8, 49), rcvbuf=4096, **more) as gateway, Xchat(gateway.url) as s:
            known = phones(s, 400)
            gateway.may_read.clear()
            tell(s, "secret " + "x" * 1900)
            until(lambda: s.metric("in_flight") > 100, "nothing is sent", SOON)
            gateway.may_read.set()
            seen = gateway.wait(n, 0)
            again = gateway.wait(350, 1)
            check(sorted(again + seen[:50]) == sorted(known), len(again), "came again, some", "lost" * (set(again + seen[:50]) < set(known)), s.log()[-300:])
            check(again[:n - 50] == seen[50:], "not in order")
            s.expect_devices(*set(known) - {seen[49]})
    at_once([("all read", 400, {}), ("reset", 60, {"reset": True})], row)


@case()
def limits():
    """256 bytes with command 0, 2048 with command 2: texts are cut to that, between characters."""
    def row(name, version, limit, text):
        with Binary() as gateway, Xchat(gateway.url, "--apns-format", version) as s:
            phones(s, 1)
            tell(s, text)
            gateway.wait(1)
            tell(s, "short")
            gateway.wait(2)
            long, short = (p.payload for p in gateway.got[0])
            body = json.loads(long)["aps"]["alert"]["body"]
            check(limit - 12 <= len(long) <= limit, len(long), "bytes")
            check(body.endswith("…") and text.startswith(body[:-1]), body)
            check(json.loads(short)["aps"]["alert"]["body"] == "short")
    texts = [("letters", "x" * 2500), ("three bytes", "推送" * 500), ("quotes", 'say "no\\"\n' * 300), ("faces", "🙂x" * 500)]
    at_once([(f"{name}, {version}", version, limit, text) for version, limit in ((0, 256), (2, 2048)) for name, text in texts],
            row)


@case()
def other_tokens():
    """Tokens that have not 32 bytes are not sent this way, and in nobody's. (There is no feedback service: no matter.)"""
    with Binary() as gateway, contextlib.suppress(OSError):
        gateway.listeners[1].shutdown(socket.SHUT_RDWR)
        with Xchat(gateway.url) as s:
            phones(s, 2, size=31)
            phones(s, 2, size=100)
            good = phones(s, 1)
            phones(s, 1, size=8)
            tell(s)
            until(lambda: s.metric('dropped_total{why="refused"}') == 5, "they are kept", SOON)
            check(gateway.wait(1) == good, gateway.tokens())


# ---------------------------------------------------------------------------
# The feedback service; openssl as a gateway
# ---------------------------------------------------------------------------

def tuple_of(token, at):
    return struct.pack(">IH", int(at), len(token) // 2) + bytes.fromhex(token)


@case()
def feedback():
    """Forgotten is who registered before the time it tells, and nobody else, however the bytes come."""
    now = time.time()
    old, new, unnamed, long, cut = (os.urandom(n).hex() for n in (32, 32, 32, 100, 32))
    dead = b"".join(tuple_of(*pair) for pair in [(os.urandom(32).hex(), now), (new, now - 500), ("", now), (long, now - 500),
                                                 (old, now - 500), (os.urandom(3000).hex(), now)])
    rest = tuple_of(cut, now)[:-1]
    lines = stored(new, now - 400) + "".join(stored(t, now - 1000) for t in (old, unnamed, long, cut))

    def row(name, pieces):
        with Binary(feedback=pieces) as gateway, Xchat(gateway.url, devices=lines) as s:
            s.expect_devices(new, unnamed, cut)
            tell(s)
            check(sorted(gateway.wait(3)) == sorted([new, unnamed, cut]), "pushed to others")
            check(gateway.asked == 1, "asked", gateway.asked, "times")
    at_once([("at once", [dead + rest]), ("in pieces", [dead[i:i + 7] for i in range(0, len(dead), 7)] + [rest])], row)


class Plain:
    """`openssl s_server` for one connection. What it gets is in `data`."""

    def __init__(self, port, stack):
        line = f"-cert {CERTIFICATE} -key {CERTIFICATE} -CAfile {pki('ca.pem')} -Verify 1 -verify_return_error -quiet -naccept 1"
        self.data, self.process = b"", stack.enter_context(program(
            "openssl", "s_server", "-accept", f"127.0.0.1:{port}", *line.split(), port=port, directory=pki(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        stack.callback(self.process.stdin.close)

    def read(self):
        with self.process.stdout as stdout:
            while data := stdout.read1():
                self.data += data

    def say(self, data):
        """And close."""
        self.process.stdin.write(data)
        self.process.stdin.close()

    def packets(self, n):
        """The first n."""
        found = []
        while len(found) < n:
            at = sum(len(packet.raw) for packet in found)
            until(lambda: parse(self.data[at:]), f"it did not get {n} packets", SOON)
            found.append(parse(self.data[at:]))
        return found


@case()
def s_server():
    """Five packets, an error for the third, and the resend on the next connection; the feedback service of the same make."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        first, service = Plain(port, stack), Plain(port + 1, stack)
        with Xchat(f"binary://localhost:{port}", devices=stored(TOKEN, time.time() - 1000)) as s:
            service.say(tuple_of(TOKEN, time.time() - 500) + tuple_of(os.urandom(32).hex(), 1))
            s.expect_devices()
            known = phones(s, 5)
            tell(s)
            packets = first.packets(5)
            check({p.token for p in packets} == set(known) and len({p.payload for p in packets}) == 1, packets)
            first.say(error(8, packets[2]))
            first.process.wait(DEADLINE)
            second = Plain(port, stack)
            check([p.token for p in second.packets(2)] == [p.token for p in packets[3:]], second.data)
            s.expect_devices(*set(known) - {packets[2].token})
            check(not service.data, "the feedback service was told something")


# ---------------------------------------------------------------------------
# Certificates
# ---------------------------------------------------------------------------

ELSEWHERE = ("elsewhere.pem", "elsewhere.pem")   # of the gateway, and who shall vouch for it


@case()
def gateway_is_verified():
    """One that we do not trust, or of another name, is told nothing: neither packets nor who we are."""
    def row(name, scheme, certificate, ca):
        with Binary(certificate=pki(certificate)) as gateway:   # a full path stays what it is
            url = f"{scheme}://localhost:{gateway.port}"
            status, out, err = push_test(url, "--apns-topic", TOPIC, ca=pki(ca))
            check(status == 1 and re.search("certificate|verif|name|trust", out + err), status, out, err)
            with Xchat(url, ca=pki(ca)) as s:
                phones(s, 1)
                tell(s)
                s.wait_log("(?i)certificate|verif|name|trust", SOON)
                until(lambda: gateway.refused >= 2, "it did not try")
                check(not gateway.got and not gateway.asked, "told", gateway.got, gateway.asked)
                check(s.metric("queued") == 1, "the push is lost")
    at_once([(f"{name}, {scheme}", scheme, *more) for scheme in ("binary", "https") for name, *more in
             [("another CA", OTHER, CERTIFICATE), ("another name", *ELSEWHERE)]], row)


TWO, LOCKED = ("--apns-cert", "client.crt", "--apns-key"), ("--apns-cert", "locked.pem")
PHRASE_IN = "--apns-passphrase-file"
LOGINS = [   # and the passphrase in the environment
    ("one file", ("--apns-cert", "client.pem"), None), ("two files", (*TWO, "client.key"), None),
    ("passphrase in a file", (*TWO, "locked.key", PHRASE_IN, "phrase"), None),
    ("passphrase in the environment", (*TWO, "locked.key"), PHRASE),
    ("one file, locked", (*LOCKED, PHRASE_IN, "phrase"), None), ("one file, locked, environment", LOCKED, PHRASE),
    ("nobody needs it", ("--apns-cert", "client.pem", PHRASE_IN, "wrong"), None),
]
NOT_LOGINS = [   # and of which options one must be named
    ("no passphrase", (*TWO, "locked.key"), "key"), ("no passphrase, one file", LOCKED, "cert"),
    ("wrong passphrase", (*TWO, "locked.key", PHRASE_IN, "wrong"), "key|passphrase-file"),
    ("wrong passphrase, one file", (*LOCKED, PHRASE_IN, "wrong"), "cert|passphrase-file"),
    ("no passphrase file", (*TWO, "locked.key", PHRASE_IN, "nosuch"), "passphrase-file"),
    ("nothing in it", (*TWO, "locked.key", PHRASE_IN, "/dev/null"), "passphrase-file|key"),
    ("no certificate", ("--apns-cert", "nosuch"), "cert"), ("empty certificate", ("--apns-cert", "/dev/null"), "cert"),
    ("a directory", ("--apns-cert", "/"), "cert"), ("no key", (*TWO, "nosuch"), "key"),
    ("another's key", (*TWO, "ca.key"), "key"), ("no key in it", ("--apns-cert", "client.crt"), "cert"),
    ("no CA", ("--apns-cert", "client.pem", "--apns-ca", "nosuch"), "ca"),
]


@case()
def client_certificates():
    """In one file or two, locked or not: the gateway sees who it is. Nobody else sees the passphrase."""
    def row(name, login, phrase):
        with Binary() as gateway, Xchat(gateway.url, login=login, cwd=pki(), env={"XCHAT_APNS_PASSPHRASE": phrase}) as s:
            phones(s, 1)
            tell(s)
            gateway.wait(1)
            check(TOPIC in gateway.subjects[0], gateway.subjects)
            check(PHRASE not in take(f"/proc/{s.pid}/cmdline"), "the command line has the passphrase")
            check(80 < s.metric("certificate_days") < 100, s.metric("certificate_days"))
    at_once(LOGINS, row)


@case()
def old_certificate():
    """One that is good for 99 days, in a server that has run for 80: the days that are left are counted, and told each day."""
    with tempfile.TemporaryDirectory() as d:
        faults = Faults(d)
        with Xchat("binary://localhost:1", env=faults.env) as s:
            check(90 < s.metric("certificate_days") < 100, s.metric("certificate_days"))
            faults.wall = int(time.time()) + 80 * 86400
            check(10 < s.metric("certificate_days") < 20, s.metric("certificate_days"))
            faults.later = 86400
            s.wait_log("warn.*--apns-cert: it expires in 1. days", SOON)


@case()
def no_client_certificate():
    """Status 1 and one line that names the option; nobody is asked for the passphrase, though there is a terminal."""
    def row(name, login, options):
        ours, theirs = os.openpty()
        line = ["setsid", "--ctty", *command("--apns", "binary://localhost:1", "--apns-ca", CERTIFICATE, *login)]
        try:
            done = subprocess.run(line, env=environment(), cwd=pki(), stdin=theirs, capture_output=True, text=True, timeout=DEADLINE)
        except subprocess.TimeoutExpired as late:
            raise AssertionError(f"it waits for something: {late.stderr}") from None
        finally:
            os.close(ours)
            os.close(theirs)
        check(done.returncode == 1 and done.stderr.count("\n") == 1, "status", done.returncode, done.stderr)
        check(re.search(f"--apns-({options})", done.stderr) and PHRASE not in done.stdout + done.stderr, done.stderr)
    at_once(NOT_LOGINS, row)


@case()
def new_certificate():
    """SIGHUP: a gateway sees the new one from then on. One that cannot be read changes nothing."""
    with tempfile.TemporaryDirectory() as d, Binary() as gateway:
        path = shutil.copy(pki("client.pem"), os.path.join(d, "pem"))
        with Xchat(gateway.url, login=("--apns-cert", path)) as s:
            phones(s, 1)
            for number, text in enumerate((None, take(pki("ca.pem")) + take(pki("ca.key")), "nothing")):
                if text:
                    put(path, text)
                    s.signal(signal.SIGHUP)
                    s.wait_log("read again" if number == 1 else "warn.*--apns-cert")
                tell(s)
                gateway.wait(number + 1)
            check([TOPIC in subject for subject in gateway.subjects] == [True, False], gateway.subjects)
            check([len(got) for got in gateway.got] == [1, 2], gateway.got)


@case()
def refused_certificate():
    """A gateway that does not want our certificate has looked at no push, however often, and whenever it says so."""
    def row(name, version, late):
        with tempfile.TemporaryDirectory() as d, Binary(late=late) as gateway:
            gateway.context.minimum_version = gateway.context.maximum_version = version
            path = shutil.copy(pki("elsewhere.pem"), os.path.join(d, "pem"))
            with Xchat(gateway.url, login=("--apns-cert", path)) as s:
                known = phones(s, 2)
                tell(s, "secret" * 300)
                for n in range(3):   # SIGHUP: it is asked at once
                    until(lambda: len(re.findall("warn.*alert.*trying again", s.log())) > n, "it is not refused", SOON)
                    if n == 2:
                        shutil.copy(pki("client.pem"), path)
                    s.signal(signal.SIGHUP)
                check(sorted(gateway.wait(2)) == sorted(known), "not all, or not once:", gateway.tokens())
    at_once([("TLS 1.3", ssl.TLSVersion.TLSv1_3, 3000), ("TLS 1.2", ssl.TLSVersion.TLSv1_2, 0)], row)


@case()
def nothing_twice_for_a_new_certificate():
    """SIGHUP right behind a push: it is not sent again, and what the old connection rejects is still heard."""
    with Binary(lambda got: time.sleep(1) or [error(8, got[1])] if len(got) == 3 else None) as gateway, \
            Xchat(gateway.url) as s:
        known = phones(s, 3)
        tell(s)
        until(lambda: s.metric("in_flight") == 3, "nothing is sent", SOON)
        s.signal(signal.SIGHUP)
        gateway.wait(4)
        s.expect_devices(*set(known) - set(gateway.tokens(0)[1:2]))
        begin = time.monotonic()
        until(lambda: time.monotonic() > begin + 3, "")
        check(gateway.tokens(1) == gateway.tokens(0)[2:], "sent again:", len(gateway.tokens(1)), "and not 1")
    with Binary() as gateway, Xchat(gateway.url) as s:
        phones(s, 2)
        tell(s)
        gateway.wait(2)
        s.signal(signal.SIGHUP)
        until(lambda: len(gateway.live) == 0, "the old connection stays", SOON)
        check(len(gateway.tokens()) == 2, len(gateway.tokens()), "packets for two phones")


# ---------------------------------------------------------------------------
# HTTP/2: nginx
# ---------------------------------------------------------------------------

NGINX = """
daemon off; worker_processes 1; pid pid; error_log error.log; events { worker_connections 512; } %(user)s
http {
  client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s; access_log off;
  log_format apns escape=json '{"uri":"$uri","method":"$request_method","proto":"$server_protocol","host":"$http_host",'
    '"topic":"$http_apns_topic","type":"$http_apns_push_type","auth":"$http_authorization","exp":"$http_apns_expiration",'
    '"prio":"$http_apns_priority","id":"$http_apns_id","collapse":"$http_apns_collapse_id","len":"$content_length",'
    '"mime":"$content_type","body":"$request_body","status":$status,"client":"$ssl_client_s_dn","conn":$connection}';
  server {
    listen 127.0.0.1:%(port)d ssl http2; ssl_protocols TLSv1.2 TLSv1.3; ssl_certificate %(cert)s; ssl_certificate_key %(cert)s;
    ssl_client_certificate %(ca)s; ssl_verify_client on; keepalive_requests %(keep)d; client_max_body_size 4k;
    access_log apns.log apns;
    location / { proxy_pass http://127.0.0.1:%(next)d; proxy_http_version 1.1; proxy_set_header Connection ""; }
    location /3/device/0bad { return 410 '{"reason":"Unregistered","timestamp":1700000000000}'; }
    location /3/device/0dead { return 410 '{"reason":"Unregistered","timestamp":9700000000000}'; }
    location /3/device/0ddd { return 418 '<html>No</html>'; }
  }
  server { listen 127.0.0.1:%(next)d; location / { return 200; } }
}
"""
AS_ROOT = os.getuid() == 0


@contextlib.contextmanager
def nginx(keep=1000):
    """A port, what tells the first n requests when nginx has logged them, and its process."""
    with tempfile.TemporaryDirectory() as d:
        port, log = free_port(), put(f"{d}/apns.log", "")
        put(f"{d}/conf", NGINX % {"port": port, "next": port + 1, "cert": CERTIFICATE, "ca": pki("ca.pem"), "keep": keep,
                                  "user": "user root;" * AS_ROOT})

        def seen(n):
            until(lambda: take(log).count("\n") >= n, f"nginx did not see {n} requests", SOON)
            return [json.loads(line) for line in take(log).splitlines()]
        with program("nginx", "-p", d, "-c", "conf", port=port, directory=d) as process:
            yield port, seen, process


def https(port, **more):
    return Xchat(f"https://localhost:{port}", **more)


@case()
def nginx_fields():
    """What nginx reads: all fields, the body, and who we are by our certificate; one connection for all."""
    text = 'secret "quotes" \\ \n 推送 🙂 <b>'
    with nginx() as (port, seen, _), https(port) as s:
        tokens, ids = phones(s, 3), []
        for n in 1, 2:
            ids.append(tell(s, text))
            lines = seen(3 * n)
        for i, line in enumerate(lines):
            want = {"method": "POST", "proto": "HTTP/2.0", "host": "localhost", "topic": TOPIC, "type": "alert", "auth": "",
                    "prio": "10", "len": str(len(line["body"].encode())), "mime": "application/json", "status": 200,
                    "collapse": ids[i // 3]}
            check(want == {k: line[k] for k in want} and line["uri"][10:] in tokens, line)
            check(f"UID={TOPIC}" in line["client"] and 0 < int(line["exp"]) - time.time() <= 30 * 86400, line)
            check(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", line["id"]), line)
            check(json.loads(line["body"]) == {"aps": {"alert": {"title": "Ann", "body": text}, "badge": i // 3 + 1,
                                                       "sound": "default", "thread-id": "room"}}, line)
        check(len({line["id"] for line in lines}) == 6 and len({line["conn"] for line in lines}) == 1, lines)
        s.settle()
        check(s.metric('responses_total{status="200"}') == 6 and s.metric("ok_total") == 6)


@case()
def nginx_goodbyes():
    """A goodbye after every third request, and when nginx reads its configuration again: each phone gets one push."""
    with nginx(keep=3) as (port, seen, process), https(port) as s:
        tokens = phones(s, 8)
        for n in 8, 16:
            tell(s)
            lines = seen(n)[-8:]
            s.settle()
            check(sorted(line["uri"][10:] for line in lines) == sorted(tokens) and s.metric("ok_total") == n, lines)
            check(len({line["conn"] for line in lines}) >= 3, "there was no goodbye")
            process.send_signal(signal.SIGHUP)


@case()
def nginx_answers():
    """Answers that come before the body is read, with a RST_STREAM behind: dead tokens, and an answer that is no JSON."""
    with nginx() as (port, seen, _), https(port) as s:
        known = {prefix: phones(s, 2, prefix=prefix) for prefix in ("0bad", "0dead", "0ddd", "1")}
        tell(s)
        seen(8)
        s.settle()
        s.expect_devices(*known["0bad"], *known["0ddd"], *known["1"])
        check(s.metric('responses_total{status="410"}') == 4 and s.metric(GONE_410) == 2 and s.metric("ok_total") == 2)
        check(s.metric("retried_total") == 0 and s.metric("connected") == 1, s.log())


@case()
def nginx_wants_a_certificate():
    """Without one it answers 400, in HTML: nobody is forgotten, and the log says that something is wrong."""
    with nginx() as (port, seen, _), https(port, login=KEY) as s:
        tokens = phones(s, 3)
        tell(s)
        check([line["status"] for line in seen(3)] == [400] * 3, seen(3))
        s.settle()
        s.expect_devices(*tokens)
        s.wait_log("(info|warn) .*apns.* 400")


# ---------------------------------------------------------------------------
# HTTP/2: nghttpd, h2o, apache
# ---------------------------------------------------------------------------

@contextlib.contextmanager
def nghttpd(tokens, *options):
    """A port, and a function for what it has said. These tokens are good."""
    with tempfile.TemporaryDirectory() as d:
        port = free_port()
        os.makedirs(f"{d}/3/device")
        for token in tokens:
            put(f"{d}/3/device/{token}", "")
        with program("nghttpd", "-v", "-a", "127.0.0.1", "-d", d, *options, port, CERTIFICATE, CERTIFICATE,
                     port=port, directory=d):
            yield port, lambda: take(f"{d}/stderr")


@case()
def nghttpd_fields():
    """The header block as another HPACK decoder reads it, in order; the JWT is marked as a secret."""
    with nghttpd([TOKEN]) as (port, said), https(port, login=KEY, devices=stored(TOKEN, 1)) as s:
        id = tell(s)
        until(lambda: s.metric("ok_total") == 1, "not accepted", SOON)
        fields = re.findall(r"recv \(stream_id=1(, sensitive|)\) (:?[^:]+): (.*)", said())
        body = '{"aps":{"alert":{"title":"Ann","body":"secret"},"badge":1,"sound":"default","thread-id":"room"}}'
        want = [(":method", "POST"), (":scheme", "https"), (":path", "/3/device/" + TOKEN), (":authority", "localhost"),
                ("authorization", r"bearer eyJ[\w-]+\.[\w-]+\.[\w-]{86}"), ("content-type", "application/json"),
                ("content-length", str(len(body))), ("apns-topic", TOPIC), ("apns-push-type", "alert"),
                ("apns-id", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), ("apns-expiration", r"\d{10}"),
                ("apns-priority", "10"), ("apns-collapse-id", id)]
        check([name for _, name, _ in fields] == [name for name, _ in want], fields)
        for (secret, name, value), (_, wanted) in zip(fields, want):
            check(re.fullmatch(wanted, value) and (secret != "") == (name == "authorization"), secret, name, value)


@case()
def nghttpd_limits():
    """What ends a connection there when it is done wrong: too many streams, windows, the table of header fields."""
    def row(name, n, options, login=None):
        tokens = [os.urandom(32).hex() for _ in range(n)]
        lines = "".join(stored(token, 1) for token in tokens)
        with nghttpd(tokens, *options) as (port, said), https(port, login=login, devices=lines) as s:
            for sent in n, 2 * n:
                tell(s, "secret " + "x" * 5000)   # cut to 4096 with all
                until(lambda: s.metric("ok_total") == sent, "not accepted", SOON)
            check(s.metric("sent_total") == 2 * n and s.metric("retried_total") == 0, "some were sent twice")
            check("send GOAWAY" not in said() and "send RST_STREAM" not in said(), "it complains:", said()[-500:])
            check(len(set(re.findall(r"\[id=(\d+)\]", said()))) == 1, "there were several connections")
            sizes = [int(size) for size in re.findall(r"recv DATA frame <length=(\d+)", said())]
            check(sum(sizes) > 2 * n * 4090 and ("-w" not in options or max(sizes) <= 4095), sizes)
    at_once([("windows of 65535", 40, ()), ("5 streams", 40, ("-m", "5")), ("1 stream", 10, ("-m", "1")),
             ("no table", 5, ("--header-table-size=0",)), ("no table, JWT", 5, ("--header-table-size=0",), KEY),
             ("small windows", 5, ("-w", "12")), ("small windows for all", 5, ("-w", "12", "-W", "12")),
             ("bodies of 200", 40, ("--echo-upload",)), ("padding", 5, ("-b", "200"))], row)


def half_are_dead(s):
    """The second of two messages is only for those whose token the first has not shown to be dead."""
    good, dead = phones(s, 50, prefix="0"), phones(s, 50, prefix="dead")
    for n, text in (50, "secret " + "x" * 5000), (100, "secret"):
        tell(s, text)
        until(lambda: s.metric("ok_total") == n, "not accepted", SOON)
        s.settle()
        s.expect_devices(*good)
        check(s.metric(GONE_410) == len(dead))
    check(s.metric("unknown_total") + s.metric("retried_total") == 0 and s.metric("sent_total") == 150, s.log())


H2O = """
listen: {host: 127.0.0.1, port: %(port)d, ssl: {certificate-file: %(cert)s, key-file: %(cert)s}}
num-threads: 1
%(user)s
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
            else
              p[10,3] == "bad" ? [400, h, ['{"reason":"BadDeviceToken"}']] : [200, h, []]
            end
          end
"""


@case()
def h2o():
    """Its second answer names fields of a table that we do not keep; bodies are read before it answers."""
    with tempfile.TemporaryDirectory() as d:
        port = free_port()
        put(f"{d}/conf", H2O % {"port": port, "cert": CERTIFICATE, "user": "user: root" * AS_ROOT})
        with program("h2o", "-c", "conf", port=port, directory=d), https(port) as s:
            half_are_dead(s)
            phones(s, 1, "other", prefix="bad")
            tell(s, room="other")
            until(lambda: s.metric(GONE_400) == 1, "the bad token is kept", SOON)


APACHE = """
ServerRoot %(d)s
PidFile %(d)s/pid
ErrorLog %(d)s/error.log
Mutex file:%(d)s
DocumentRoot %(d)s
%(modules)s
ServerName localhost
Listen 127.0.0.1:%(port)d
SSLSessionCache none
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
"""


@case()
def apache():
    """Statuses in Huffman's code; a success that has a body, of HTML, is one."""
    where = "/usr/lib/apache2/modules"
    if not os.path.exists(where + "/mod_http2.so"):
        raise Skip("apache2 with mod_http2 is not installed")
    modules = [f"LoadModule {name}_module {where}/mod_{name}.so" for name in ("mpm_event", "authz_core", "http2", "ssl", "rewrite")]
    with tempfile.TemporaryDirectory() as d:
        port = free_port()
        put(f"{d}/conf", APACHE % {"d": d, "port": port, "cert": CERTIFICATE, "ca": pki("ca.pem"), "modules": "\n".join(modules)})
        with program("apache2", "-d", d, "-f", "conf", "-DFOREGROUND", port=port, directory=d), https(port) as s:
            half_are_dead(s)


if __name__ == "__main__":
    main()
