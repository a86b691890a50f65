"""Push over HTTP/2: who is told, what is sent, and what a gateway may do to it.

The gateway is gateway.py, a stand-in for Apple's that is told what to do and tells what it sees; it fails
the case when xchat breaks a rule of HTTP/2. A push leaves one to two seconds after the message, which
makes most cases last that long; where times of minutes matter, a binary with short ones is built.

    python3 test/push.py latency figures     prints what the cases have measured to stderr

apns.p8 is the public example key of RFC 7515 A.3; it opens nothing.
"""

import atexit
import base64
import concurrent.futures
import contextlib
import errno
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from harness import (CERTIFICATE, DEADLINE, ROOT, SLOW, TEXT, UPGRADE, WRAP, Faults, Http, Server, Skip, Ws, case, check,
                     close_frame, each_row, environment, explain, frame, get, main, run, until)
from inner import BIND_UID, JOIN_GROUP, KICK, LEAVE_GROUP, SEND_TO_GROUP, SEND_TO_ONE, UNBIND_UID, UNGROUP, Inner

HERE = os.path.dirname(os.path.abspath(__file__))
KEY = os.path.join(HERE, "apns.p8")
OTHER = os.path.join(HERE, "other.pem")
PUBLIC = b"""-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEf83OJ3D2xF1Bg8vub9tLe1gHMzV7
6e8Tus9uPHvRVEXH8UTNG72bfocs3+257rn0s2ldbqkLJK2KRiMohYjlrQ==
-----END PUBLIC KEY-----
"""
TOPIC = "com.example.xchat"
LOGIN = ("--apns-key", KEY, "--apns-key-id", "ABC123DEFG", "--apns-team-id", "DEF123GHIJ")
SOON = DEADLINE + 3 * SLOW   # for a push, which waits for others first
RULES = ("answer", "client_ca", "vanish", "apple", "refill", "settings", "brief", "goaway_every", "reset_at", "port")
UNREGISTERED = {"status": 410, "reason": "Unregistered"}
FIGURES = "figures" in sys.argv


# ---------------------------------------------------------------------------
# A gateway, a server that pushes to it, phones
# ---------------------------------------------------------------------------

@functools.lru_cache
def have_h2():
    with contextlib.suppress(OSError):
        return subprocess.run(["/usr/bin/python3", "-c", "import h2"], capture_output=True).returncode == 0
    return False


class Gateway:
    """A running gateway.py. Its reports are in `events`; "error" among them fails the case."""

    def __init__(self, **rules):
        if not have_h2():
            raise Skip("python3-h2 is not installed")
        self.events, self.news, self.orders, self.ordering = [], threading.Condition(), 0, threading.Lock()
        line = ["/usr/bin/python3", os.path.join(HERE, "gateway.py"), json.dumps(rules)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(line, text=True, **pipes)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        self.port = self.wait(1, "port", seconds=2 * DEADLINE)[0]["port"]

    def read(self):
        for line in self.process.stdout:
            with self.news:
                self.events.append(json.loads(line))
                self.news.notify_all()

    def all(self, kind, **fields):
        """The reports of this kind with these fields."""
        with self.news:
            return [e for e in self.events if e["event"] == kind and all(e[k] == v for k, v in fields.items())]

    def wait(self, n, kind, seconds=SOON, **fields):
        """Until there are so many of them."""
        with self.news:
            self.news.wait_for(lambda: len(self.all(kind, **fields)) >= n, seconds)
        found = self.all(kind, **fields)
        check(len(found) >= n, f"in {seconds:g} s the gateway saw {len(found)} of {n}", kind, fields)
        return found

    def pushes(self, device=None, n=0, seconds=SOON):
        """The requests for a token, or for all, without those that a GOAWAY had given back; at least n."""
        fields = {"token": device} if device else {}
        return self.wait(n, "request", seconds, ignored=False, **fields)

    def tell(self, do, **fields):
        """An order, and wait until it is carried out; what was reported before that is there then."""
        with self.ordering:
            self.orders += 1
            self.process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            self.process.stdin.flush()
            self.wait(self.orders, "done")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.process.stdin.close()
        try:
            self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.reader.join(DEADLINE)
        words = [f"{e['what']} (conn {e['conn']})" for e in self.all("error")[:3]] + [self.process.stderr.read()[-800:]]
        self.process.stdout.close()
        self.process.stderr.close()
        fault = "; ".join(filter(None, words))
        if fault and kind is not Skip:
            raise AssertionError(f"{error}; the gateway: {fault}" if error else f"the gateway: {fault}") from error


@functools.lru_cache
def build():
    os.makedirs(os.path.join(HERE, "build"), exist_ok=True)
    made = os.path.join(HERE, "build", f"xchat-fast-{os.getpid()}")
    speed = max(int(20 / SLOW), 1)
    line = [os.environ.get("CC", "cc"), os.environ.get("UNIT_CFLAGS", "-g -O1"), f"-DPUSH_SPEED={speed} -o", made,
            os.path.join(ROOT, "xchat.c"), "-lssl -lcrypto"]
    done = subprocess.run(shlex.split(" ".join(line)), capture_output=True, text=True)
    check(done.returncode == 0, done.stderr)
    atexit.register(os.unlink, made)
    return made


def fast(lock=threading.Lock()):
    """The binary in which a minute of waiting for a gateway is three seconds (more, where all is slow)."""
    with lock:
        return build()


TOKENS = []   # all that were ever used, in lower case


def token(numbers=itertools.count(1)):
    """A device token that nobody has."""
    TOKENS.append(f"{next(numbers):08x}{os.urandom(28).hex()}")
    return TOKENS[-1]


class Xchat(Server):
    """A server with --apns. It must not log tokens, JWTs, or what people say ("secret" is in all that is said)."""

    def __init__(self, gateway, *options, quick=False, login=LOGIN, **server):
        if quick:   # another binary in place of ours
            server["shell"] = f'shift {len(WRAP) + 1} && set -- {shlex.join([*WRAP, fast()])} "$@"'
        self.apple = gateway if isinstance(gateway, Gateway) else None
        port = gateway.port if self.apple else gateway
        super().__init__("--apns", f"https://localhost:{port}", "--apns-ca", CERTIFICATE, "--apns-topic", TOPIC, *login,
                         "--admin", "127.0.0.1:0", "--rate", "0", "--max-per-address", "0", *options, **server)
        self.wait_log("(?s)(listening on.*){2}")

    def metrics(self):
        """All figures of /metrics, by name with labels."""
        with contextlib.closing(Http(self, at="admin")) as http:
            answer = http.ask("/metrics")
        check(answer.status == 200, answer)
        return {name: float(value) for name, value in
                re.findall(r"(?m)^xchat_push_([a-z_]+(?:\{[^}]*\})?) (\S+)$", answer.body.decode())}

    def metric(self, name):
        return self.metrics().get(name, 0)

    def answered(self, status):
        return self.metric(f'responses_total{{status="{status}"}}')

    def settle(self, seconds=SOON):
        """Until nothing waits and nothing is in flight, and the gateway has reported all of that."""
        def left():   # by one look: between two, one could go from the one to the other
            now = self.metrics()
            return now["queued"] + now["in_flight"]
        until(lambda: left() == 0, "pushes are left", seconds)
        if self.apple:
            self.apple.tell("rules")   # its reports come by another way than its answers

    def alarm(self):
        return re.search(r"(?m)warn.*apns.*", self.log())

    def crash(self):
        """kill -9, which nobody shall complain about."""
        self.kill()
        self.want_status, self.asked_to_stop = self.process.returncode, True

    def stop(self):
        fault, log = super().stop(), self.log()
        leaks = [t[:12] for t in TOKENS if t[:12] in log.lower()] + re.findall(r"eyJ\w{5}|.*secret", log)
        return "; ".join(filter(None, [fault, leaks and f"the log tells {leaks[:3]}"])) or None


def each(servers, rows, function):
    """function(server, row) for all; all faults at the end."""
    each_row(lambda name, s, row: function(s, row), [(str(row[:3]), s, row) for s, row in zip(servers, rows)])


def leave(ws):
    ws.send(close_frame(1000))
    ws.expect_close(1000, skip=True)


def visit(s, *devices, room="room"):
    """Phones come, and leave as they should; their tokens."""
    for device in devices:
        ws = Ws(s)
        ws.login("Bob", room, device_token=device)
        leave(ws)
    return devices


def phones(s, n, room="room"):
    """So many new ones; their tokens."""
    return visit(s, *(token() for _ in range(n)), room=room)


def tell(s, *texts, room="room", name="Ann", **login):
    """Somebody comes, says this, and goes; the ids."""
    ws, ids = Ws(s), []
    ws.login(name, room, **login)
    for text in texts:
        ws.say(text, ref="r")
        message = ws.message()
        while message.get("ref") != "r":
            message = ws.message()
        check(message["type"] == "say", message)
        ids.append(message["id"])
    leave(ws)
    return ids


def aps(push):
    return json.loads(push["body"])["aps"]


def text_and_badge(push):
    return aps(push)["alert"]["body"], aps(push)["badge"]


def ids(pushes):
    return {(p["token"], p["id"], p["collapse"]) for p in pushes}


@contextlib.contextmanager
def fleet(gateway, n, *options, quick=True, **server):
    """n servers, with short times if `quick`. Each has pushed to a phone of its own in the room "good", so that its
    login and its connection (.conn) are proven, and several streams may be open."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Xchat(gateway, *options, quick=quick, **server)) for _ in range(n)]
        for s in servers:
            s.good, = phones(s, 1, "good")
            tell(s, "secret", room="good")
        for s in servers:
            s.conn = gateway.pushes(s.good, 1)[0]["conn"]
            s.settle()
        yield servers


def pushing(*options, rows=[("", {})], proven=False, **server):
    """A case with a gateway and a server: f(gateway, s). With rows, each has its own, and all run at once:
    f(gateway, s, *row); the second column of a row is rules of the gateway, and then "options" and
    keywords of the server. `proven`: one of a fleet."""
    def register(function):
        def row_of(row):
            name, more, *rest = row
            more = {**server, **more}
            rules = {k: more.pop(k) for k in RULES if k in more}
            line = [*options, *more.pop("options", ())]
            try:
                one = more.pop("proven", proven)
                with Gateway(**rules) as gateway, \
                        fleet(gateway, 1, *line, **more) if one else Xchat(gateway, *line, **more) as s:
                    function(gateway, s[0] if one else s, *([name, *rest] if name else []))
            except (AssertionError, OSError, ValueError) as error:
                return f"[{name}] {explain(error)}"

        def whole():
            with concurrent.futures.ThreadPoolExecutor(len(rows)) as pool:
                faults = list(filter(None, pool.map(row_of, rows)))
            check(not faults, "\n    ".join(faults))
        whole.__name__ = function.__name__
        case()(whole)
        return function
    return register


@contextlib.contextmanager
def directory():
    with tempfile.TemporaryDirectory(prefix="xchat") as parent:
        yield os.path.join(parent, "data")


TAKEN = []


def closed_port():
    """Where nobody listens; nor will a test beside us, since it is taken."""
    TAKEN.append(socket.socket())
    TAKEN[-1].bind(("127.0.0.1", 0))
    return TAKEN[-1].getsockname()[1]


# ---------------------------------------------------------------------------
# Who is told
# ---------------------------------------------------------------------------

@pushing("--verbose")
def end_to_end(gateway, s):
    """Two phones, one closes: it gets a push within 3 s, comes back and has everything; 410 ends it."""
    ann, bob, cy, b, c = Ws(s), Ws(s), Ws(s), token(), token()
    ann.login("Ann", "room")
    newest = bob.login("Bob", "room", device_token=b)["id"]
    cy.login("Cy", "room", device_token=c)
    leave(bob)
    begin = time.monotonic()
    ann.say("secret hello")
    push, = gateway.pushes(b, 1, 3 * SLOW)
    check(0.9 < push["at"] - begin < 3 * SLOW, f"it took {push['at'] - begin:.2f} s")
    check(text_and_badge(push) == ("secret hello", 1), push["body"])
    bob = Ws(s)
    bob.login("Bob", "room", since=newest, device_token=b)
    missed = bob.expect("history")["messages"]
    check([(m["content"], m["id"]) for m in missed] == [("secret hello", push["collapse"])], missed)
    leave(bob)
    gateway.tell("rules", answers={b: [UNREGISTERED]})
    ann.say("secret again")
    gateway.pushes(b, 2)
    until(lambda: s.metric("devices") == 1, "the dead token is kept")
    ann.say("secret and again")
    fence, = phones(s, 1)
    ann.say("secret end")
    gateway.pushes(fence, 1)
    s.settle()
    check(len(gateway.pushes(b)) == 2, "a dead token got another push")
    check(not gateway.pushes(c), "a push to one who is online")


@pushing("--verbose")
def who(gateway, s):
    """Those who left get it; those who are there, who speak, who are elsewhere, who have come back or were
    forgotten do not."""
    left, twice, moved, back, there, author, forgotten = (token() for _ in range(7))
    visit(s, left, twice, twice, back)
    visit(s, moved, room="another room")
    visit(s, moved)
    elsewhere, = phones(s, 1, "another room")
    bob, eve, dan = Ws(s), Ws(s), Ws(s)
    bob.login("Bob", "room", device_token=there)
    eve.login("Eve", "room", device_token=forgotten)
    eve.send_json(type="logout", forget_device=True)
    leave(eve)
    dan.login("Dan", "a third room", device_token=forgotten)   # subscribes again, but only to this one
    leave(dan)
    newest, = tell(s, "secret", device_token=author)
    visit(s, back)   # before its push left
    for device in left, twice, moved:
        check(gateway.pushes(device, 1)[0]["collapse"] == newest, "another message")
    s.settle()
    for name in "back", "there", "author", "elsewhere", "forgotten":
        check(not gateway.pushes(locals()[name]), "a push to the one that is", name)
    check(len(gateway.pushes()) == 3, "pushes", len(gateway.pushes()))
    check(s.metric("devices") == 8, s.metric("devices"))
    tell(s, "secret again")
    check(text_and_badge(gateway.pushes(back, 1)[0]) == ("secret again", 1), "what was seen is counted")
    bob.close()


BAD = [("short", "abcdef"), ("odd", "abcdef012"), ("not hex", "ghijklmn" * 8), ("a path", "ab" * 30 + "/../"),
       ("long", "ab" * 201), ("empty", ""), ("NUL inside", "abcdef01\0"), ("a list", ["ab" * 32])]


@case("--rate", "0", "--apns", "https://localhost:1", "--apns-topic", TOPIC, *LOGIN, rows=BAD)
def bad_tokens(s, name, value):
    """error bad_field that names device_token, and the connection lives on."""
    ws = Ws(s)
    ws.send_json(type="login", client_name="Ann", room_id="room", device_token=value, ref="x")
    ws.expect_error("bad_field", "device_token", ref="x")
    ws.login("Ann", "room")


@pushing()
def spelling(gateway, s):
    """Case, blanks and brackets of a token do not matter; 8 to 400 digits are good."""
    device, short = token(), "0badcafe"
    long = (device * 7)[:400]
    visit(s, "<" + " ".join(device[i:i + 8] for i in range(0, 64, 8)).upper() + ">", device, long, short)
    check(s.metric("devices") == 3, s.metric("devices"))
    tell(s, "secret")
    for each in device, long, short:
        gateway.pushes(each, 1)
    s.settle()
    check(len(gateway.pushes()) == 3, "more than one push")


@pushing()
def bursts(gateway, s):
    """What comes within a second is one push with the newest text; the badge counts all, in all rooms."""
    b, c = visit(s, token(), token(), room="one")
    visit(s, b, room="other")
    said = tell(s, *(f"secret {i}" for i in range(1, 6)), room="one")
    push, = gateway.pushes(c, 1)
    check(text_and_badge(push) == ("secret 5", 5) and push["collapse"] == said[-1], push, said)
    gateway.pushes(b, 1)
    tell(s, "secret 6", room="other")
    push = gateway.pushes(b, 2)[1]
    check(text_and_badge(push) == ("secret 6", 6) and aps(push)["thread-id"] == "other", push["body"])
    visit(s, b, room="one")
    tell(s, "secret 7", room="other")
    check(text_and_badge(gateway.pushes(b, 3)[2]) == ("secret 7", 1), "the badge does not begin again")
    s.settle()
    check(len(gateway.pushes()) == 4, "pushes", len(gateway.pushes()))


@pushing(quick=True)
def badge_of_a_retry(gateway, s):
    """A push that is tried again counts what was missed in other rooms meanwhile: what comes last has the whole badge."""
    b, = visit(s, token(), room="one")
    visit(s, b, room="other")
    gateway.tell("rules", answers={b: [{"status": 503, "reason": "ServiceUnavailable"}] * 3 + [{"status": 200}]})
    tell(s, "secret 1", room="one")
    gateway.pushes(b, 3)   # the next try is a minute away, or what is one here
    tell(s, "secret 2", room="other")
    pushes = [text_and_badge(p) for p in gateway.pushes(b, 5)]
    check(pushes[-1][1] == 2, pushes)


@pushing()
def older_fails_late(gateway, s):
    """A push that fails when a newer one to this phone and room was sent long ago is not sent again: it would be the same."""
    b, = phones(s, 1)
    gateway.tell("rules", answers={b: [{"status": 503, "reason": "ServiceUnavailable", "hold": True}, {"status": 200}]})
    for n in 1, 2:
        tell(s, f"secret {n}")
        gateway.pushes(b, n)
    until(lambda: s.answered(200) == 1, "the newer one is not answered")
    gateway.tell("release")
    s.settle()
    check(s.metric("sent_total") == 2, s.metric("sent_total"), "were sent")


@pushing("--verbose", rows=[("silence", {"options": ["--ping", "1"]}), ("reset", {})])
def broken_connection(gateway, s, name):
    """A connection that ends by silence or a reset: what was said since its last byte is pushed."""
    b, bob = token(), Ws(s, answer_pings=False)
    bob.login("Bob", "room", device_token=b)
    tell(s, "secret 1")
    bob.fence()   # here he is alive
    tell(s, "secret 2", "secret 3")
    if name == "reset":
        bob.reset()
    push, = gateway.pushes(b, 1, SOON + 4 * SLOW)
    check(text_and_badge(push) == ("secret 3", 2), push["body"])
    tell(s, "secret 4")
    check(text_and_badge(gateway.pushes(b, 2)[1]) == ("secret 4", 3), gateway.pushes(b)[1]["body"])


@pushing(rows=[("plain", {}), ("TLS", {"options": ["--tls-cert", CERTIFICATE]})])
def hangs_up(gateway, s, name):
    """An app is ended, and the system says so for it, but not in its words: what it was sent is not pushed again."""
    b, ann, bob = token(), Ws(s), Ws(s)
    bob.login("Bob", "room", device_token=b)
    ann.login("Ann", "room")
    ann.say("secret 1")
    bob.expect("login")
    bob.expect("say")
    bob.close()   # by TCP alone, also with TLS
    ann.expect("say")
    ann.expect("logout")
    ann.say("secret 2")
    push, = gateway.pushes(b, 1)
    check(text_and_badge(push) == ("secret 2", 1), push["body"])


@pushing("--ping", "1", rows=[("all of it", {}), ("not the last", {})])
def old_connection(gateway, s, name):
    """A phone comes back by another network, reads what was said, and goes; the old connection is found to be dead only
    then: what was read meanwhile is not pushed, but what was said since is."""
    b, old, new = token(), Ws(s, answer_pings=False), Ws(s)
    since = old.login("Bob", "room", device_token=b)["id"]
    tell(s, "secret 1")
    new.login("Bob", "room", device_token=b, since=since)
    new.expect("history")
    leave(new)
    if name == "not the last":
        tell(s, "secret 2")
        push, = gateway.pushes(b, 1, SOON + 4 * SLOW)
        return check(text_and_badge(push) == ("secret 2", 1), push["body"])
    old.expect_close(4408, skip=True)
    tell(s, "secret 3")
    push, = gateway.pushes(b, 1)
    check(text_and_badge(push) == ("secret 3", 1), push["body"])


@pushing("--backlog", "67108864")
def slow_reader(gateway, s):
    """Who still speaks, but does not read, has not heard what waits for it: that is pushed when the connection ends."""
    b, bob = token(), Ws(s, answer_pings=False, rcvbuf=4096)
    bob.login("Bob", "room", device_token=b)
    tell(s, *["secret" + "x" * 60000] * 150, "secret 1")   # 9 MB: more than sockets take
    bob.send(frame(TEXT, '{"type":"pong"}'))
    tell(s, "secret", room="other")
    bob.reset()
    push, = gateway.pushes(b, 1)
    check(text_and_badge(push)[0] == "secret 1", push["body"])


@case()
def cut_off_while_it_catches_up():
    """A phone comes to what was said before anybody had one, and its connection breaks while it is sent that: what it
    did not get is pushed, with the text that was said last."""
    with directory() as d, Gateway() as gateway, Xchat(gateway, "--data", d) as s:
        b, bob = token(), Ws(s, answer_pings=False, rcvbuf=4096)
        first, *_ = tell(s, *["secret" + "x" * 60000] * 150, "secret 1")   # 9 MB: more than sockets take
        bob.send_json(type="login", client_name="Bob", room_id="room", device_token=b, since=first)
        tell(s, "secret", room="other")
        bob.reset()
        push, = gateway.pushes(b, 1)
        check(text_and_badge(push) == ("secret 1", 50), push["body"])


@pushing(rows=[("behind", {}), ("in front", {})])
def said_at_the_same_time(gateway, s, name):
    """What is said in the very round in which a phone says goodbye is not sent to it any more, so it is pushed."""
    b, bob, ann, carl = token(), Ws(s), Ws(s), Ws(s)
    bob.login("Bob", "room", device_token=b)
    for client, who in (ann, "Ann"), (carl, "Carl"):
        client.login(who, "room")
        bob.expect("login", client_name=who)
    ann.say("secret 1")
    bob.expect("say", content="secret 1")
    acts = [lambda: bob.send(close_frame(1000)), lambda: ann.say("secret 2"), lambda: carl.send(close_frame(1000)),
            lambda: ann.send_json(type="login", client_name="Ann", room_id="room"), lambda: ann.say("secret 3")]
    s.signal(signal.SIGSTOP)   # all that comes meanwhile is one round
    for act in acts[::1 if name == "behind" else -1]:
        act()
    s.signal(signal.SIGCONT)
    push, = gateway.pushes(b, 1)
    check(text_and_badge(push) == (f"secret {3 if name == 'behind' else 2}", 2), push["body"])


def phone_and_back_end(s):
    """The token of a phone; Ann, and Bob, whose it is, in a room; and a back end that was heard. In one round Ann comes
    before Bob, and he before the back end."""
    b, ann, bob, inner = token(), Ws(s), Ws(s), Inner(s).fence()
    ann.login("Ann", "room")
    bob.login("Bob", "room", device_token=b)
    ann.fence()
    return b, ann, bob, inner


@pushing("--gateway", "127.0.0.1:0")
def ordered_at_the_same_time(gateway, s):
    """In that round a back end sends something to some of the room: what the phone was not sent is pushed all the same."""
    b, ann, bob, inner = phone_and_back_end(s)
    s.signal(signal.SIGSTOP)
    ann.say("secret")
    bob.send(close_frame(1000))
    inner.tell(SEND_TO_GROUP, ext=json.dumps({"group": ["room"], "exclude": {"1": int(ann.id[12:], 16)}}), body="{}")
    s.signal(signal.SIGCONT)
    push, = gateway.pushes(b, 1)
    check(text_and_badge(push) == ("secret", 1), push["body"])


@pushing("--gateway", "127.0.0.1:0")
def told_at_the_same_time(gateway, s):
    """In that round a back end tells the phone something, so that all that is for it stands in one queue: what was said
    is pushed all the same."""
    b, ann, bob, inner = phone_and_back_end(s)
    s.signal(signal.SIGSTOP)
    ann.say("secret")
    inner.tell(SEND_TO_ONE, bob, body="{}")
    bob.send(close_frame(1000))
    s.signal(signal.SIGCONT)
    push, = gateway.pushes(b, 1)
    check(text_and_badge(push) == ("secret", 1), push["body"])


@pushing("--gateway", "127.0.0.1:0", rows=[("with a message", {}, 1), ("in silence", {}, 0)])
def shown_out_at_the_same_time(gateway, s, _, flag):
    """In that round a back end shows the phone out, behind what was said: it is sent that, and so only what is said later is
    pushed."""
    b, ann, bob, inner = phone_and_back_end(s)
    s.signal(signal.SIGSTOP)
    ann.say("secret")
    inner.tell(KICK, bob, body='{"type":"bye"}' if flag else "N;", flag=flag)
    s.signal(signal.SIGCONT)
    bob.expect("say", content="secret")
    if flag:
        bob.expect("bye")
    bob.expect_close(4001)
    ann.say("secret too")
    push, = gateway.pushes(b, 1)
    check(text_and_badge(push) == ("secret too", 1), push["body"])


@pushing("--gateway", "127.0.0.1:0")
def room_ended_at_the_same_time(gateway, s):
    """In that round a back end ends the room: what was said before that, and was not sent to the phone, is pushed."""
    b, ann, bob, inner = phone_and_back_end(s)
    s.signal(signal.SIGSTOP)
    bob.send(close_frame(1000))
    ann.say("secret")
    inner.tell(UNGROUP, ext="room")
    s.signal(signal.SIGCONT)
    push, = gateway.pushes(b, 1)
    check(text_and_badge(push) == ("secret", 1), push["body"])


@pushing("--backlog", "4096")
def much_at_the_same_time(gateway, s):
    """In that round more is said than --backlog: the phone is told of all of it."""
    b, bob, ann = token(), Ws(s), Ws(s)   # so that he is heard first, by the portable loop, too
    ann.login("Ann", "room")
    bob.login("Bob", "room", device_token=b)
    s.signal(signal.SIGSTOP)
    bob.send(close_frame(1000))
    for _ in range(10):
        ann.say("secret" * 150)
    s.signal(signal.SIGCONT)
    push, = gateway.pushes(b, 1)
    check(aps(push)["badge"] == 10, push["body"])


@case()
def put_and_taken_out():
    """A back end puts a client into a room, and takes it out of its own: the phone is where its client is, also after a
    crash."""
    with directory() as d, Gateway() as gateway:
        options = "--data", d, "--gateway", "127.0.0.1:0"
        with Xchat(gateway, *options) as s:
            b, bob, inner = token(), Ws(s), Inner(s)
            bob.login("Bob", "room", device_token=b)
            inner.tell(JOIN_GROUP, bob, "news")
            inner.tell(LEAVE_GROUP, bob, "room")
            inner.fence()
            leave(bob)
            s.crash()   # so that nothing is written once more
        with Xchat(gateway, *options) as s:
            tell(s, "secret 1")
            tell(s, "secret 2", room="news")
            gateway.pushes(b, 1)
            s.settle()
            check([text_and_badge(push) for push in gateway.pushes(b)] == [("secret 2", 1)], gateway.pushes(b))


@pushing("--gateway", "127.0.0.1:0", rows=[(f"{user or 'nobody'} {name}", {}, user, act) for user in ("bob", "")
                                               for name, act in [
    ("forgets", lambda bob, inner: (bob.send_json(type="logout", forget_device=True), bob.expect("login"),
                                    bob.expect("logout"))),
    ("is nobody", lambda bob, inner: inner.tell(UNBIND_UID, bob, "bob")),
    ("is another one", lambda bob, inner: inner.tell(BIND_UID, bob, "dan")),
    ("is put into a room", lambda bob, inner: inner.tell(JOIN_GROUP, bob, "news")),
    ("is taken out of one", lambda bob, inner: inner.tell(LEAVE_GROUP, bob, "room")),
]])
def phone_of_another_user(gateway, s, name, user, act):
    """A phone has gone to another user: what becomes of the connection of the one before is nothing to it."""
    b, ann, inner = token(), Ws(s), Inner(s)
    clients = bob, eve = Ws(s), Ws(s)
    for client, uid in zip(clients, (user, "eve")):
        client.login(uid or "Bob", "room", device_token=b)
        if uid:
            inner.tell(BIND_UID, client, uid)
        inner.fence()
    act(bob, inner)
    inner.fence()
    for client in clients:
        leave(client)
    for room in "news", "room":
        ann.login("Ann", room)
        ann.say(f"secret {room}")
        ann.expect("say")
    ann.send_json(type="say", to_uid="eve", content="secret letter")
    ann.expect("say")
    gateway.pushes(b, 2), s.settle()
    told = sorted(text_and_badge(push)[0] for push in gateway.pushes(b))
    check(told == ["secret letter", "secret room"], told)


@pushing()
def many_rooms(gateway, s):
    """A phone that is in too many rooms leaves the one that it did not come to for longest, and never its user's inbox."""
    b, bob = token(), Ws(s)
    bob.login("Bob", "room", device_token=b)
    body = f"client_id={bob.id}&uid=bob".encode()
    with contextlib.closing(Http(s, at=len(s.listeners) - 1)) as http:
        http.send(get("/api/bind", f"Content-Length: {len(body)}", "Content-Type: application/x-www-form-urlencoded",
                      method="POST") + body)
        check(http.answer().status == 200, "it is not bound")
    for room in *range(1, 63), "room", 63, 64:   # with the inbox these are 66
        bob.login("Bob", f"{room}", device_token=b)
    leave(bob)
    ann = Ws(s)
    for room in "room", "3", "2", "1":
        ann.login("Ann", room)
        ann.say(f"secret {room}")
        ann.expect("say")
    ann.send_json(type="say", to_uid="bob", content="secret letter")
    ann.expect("say")
    s.settle()
    gateway.pushes(b, 3), s.settle()
    told = sorted(text_and_badge(push)[0] for push in gateway.pushes(b))
    check(told == ["secret 3", "secret letter", "secret room"], told)


# ---------------------------------------------------------------------------
# What is sent
# ---------------------------------------------------------------------------

NAME, WORDS = '<Ann> & "Co"', "secret <b>'1 & 2'</b>\nü😀\\"
REST = {"badge": 1, "sound": "default", "thread-id": "room é"}


@pushing("--verbose", rows=[
    ("full", {"options": ["--push-content", "full"]}, {"alert": {"title": NAME, "body": WORDS}, **REST}),
    ("name", {"options": ["--push-content", "name"]}, {"alert": {"title": NAME, "body": "New message"}, **REST}),
    ("none", {"options": ["--push-content", "none"]}, {"alert": {"loc-key": "NEW_MESSAGE"}, "badge": 1,
                                                       "sound": "default"}),
])
def content(gateway, s, name, wanted):
    """--push-content, key by key in order, as plain text and raw UTF-8."""
    b, = phones(s, 1, "room é")
    tell(s, WORDS, room="room é", name=NAME)
    push, = gateway.pushes(b, 1)
    payload = json.dumps({"aps": wanted}, ensure_ascii=False, separators=(",", ":"))
    check(push["body"] == payload, push["body"], "is not", payload)


@pushing("--verbose")
def long_texts(gateway, s):
    """Over 4096 bytes the text is cut at a character, with an ellipsis; not one byte shorter than needed."""
    texts = {token(): text for text in ("x" * 5000, "é" * 3000, "x" + "é" * 3000, "😀" * 2000, 'x"\\' * 1500,
                                        "\n" * 5000, '"' * 3000, "x" * 60000)}
    for device, text in texts.items():
        visit(s, device, room=device[:8])
        tell(s, text, room=device[:8])
    for device, text in texts.items():
        push, = gateway.pushes(device, 1)
        body, size = aps(push)["alert"]["body"], len(push["body"].encode())
        check(4096 - 4 - 2 <= size <= 4096, f"{text[:2]!r}...: {size} bytes")
        check(body.endswith("…") and text.startswith(body[:-1]), f"{text[:2]!r}... became", body[-20:])


def literal(name, value):
    """An HPACK literal field as section 6.2 of apns.md has it; authorization is never indexed."""
    def text(t):   # its length has a prefix of 7 bits
        return bytes([len(t)] if len(t) < 127 else [127, len(t) - 127]) + t.encode()
    index = {":path": 4, ":authority": 1, "authorization": 23, "content-length": 28, "content-type": 31}.get(name, 0)
    bits = 0x10 * (name == "authorization")
    key = bytes([bits | index] if index < 15 else [bits | 15, index - 15])
    return key + (b"" if index else text(name)) + text(value)


@pushing("--verbose")
def golden(gateway, s):
    """The fields in the order of the golden block, and their very octets."""
    b, = phones(s, 1)
    newest, = tell(s, "secret")
    push, = gateway.pushes(b, 1)
    for (name, value), (wanted, pattern) in zip(push["headers"], [
            (":method", "POST"), (":scheme", "https"), (":path", "/3/device/" + b),
            (":authority", fr"localhost(:{gateway.port})?"), ("authorization", r"bearer [\w-]+\.[\w-]+\.[\w-]{86}"),
            ("content-type", "application/json"), ("content-length", str(len(push["body"].encode()))),
            ("apns-topic", re.escape(TOPIC)), ("apns-push-type", "alert"),
            ("apns-id", "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), ("apns-expiration", r"\d{10}"),
            ("apns-priority", "10"), ("apns-collapse-id", newest)], strict=True):
        check(name == wanted and re.fullmatch(pattern, value), name, value, "is not", wanted, pattern)
        if name == "apns-expiration":
            check(-20 * SLOW < int(value) - time.time() - 7 * 86400 < 20, "not 7 days from now:", value)
    check(len(push["headers"][4][1]) == 191 and push["sensitive"] == ["authorization"], push["headers"][4])
    block = b"\x83\x87" + b"".join(literal(*field) for field in push["headers"][2:])
    check(push["block"] == block.hex(), push["block"], "is not", block.hex())
    values = gateway.all("settings")[0]["values"]
    check(values["1"] == 0 and values["2"] == 0, "HEADER_TABLE_SIZE and ENABLE_PUSH are", values)
    check(gateway.all("open")[0]["alpn"] == "h2", gateway.all("open"))


# ---------------------------------------------------------------------------
# The login
# ---------------------------------------------------------------------------

def verified(jwt):
    """iat of a JWT whose signature openssl finds good."""
    def unbase64(part):
        check("=" not in part, "padding in", part)
        return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    head, claims, signature = jwt.split(".")
    check(head == "eyJhbGciOiJFUzI1NiIsImtpZCI6IkFCQzEyM0RFRkcifQ", "the header is", unbase64(head))
    raw, numbers = unbase64(signature), b""
    check(len(raw) == 64, len(raw), "bytes of signature")
    for half in raw[:32], raw[32:]:   # as DER: no more zeros than needed
        half = half.lstrip(b"\0")
        half = b"\0" * (half[0] > 127) + half
        numbers += bytes([2, len(half)]) + half
    with tempfile.TemporaryDirectory() as d:
        for name, data in ("key", PUBLIC), ("signature", bytes([48, len(numbers)]) + numbers), \
                ("text", f"{head}.{claims}".encode()):
            with open(os.path.join(d, name), "wb") as file:
                file.write(data)
        line = "openssl dgst -sha256 -verify key -signature signature text"
        done = subprocess.run(line.split(), cwd=d, capture_output=True, text=True)
    check(done.returncode == 0, "openssl says", done.stdout, done.stderr)
    claims = json.loads(unbase64(claims))
    check(list(claims) == ["iss", "iat"] and claims["iss"] == "DEF123GHIJ", claims)
    return claims["iat"]


def jwt_of(push):
    return dict(push["headers"])["authorization"].removeprefix("bearer ")


@case()
def jwt():
    """One that verifies, over reconnects and restarts; in a file of mode 0600; a new one after 50 minutes."""
    with directory() as d, Gateway() as gateway:
        path, used, b = os.path.join(d, "apns-jwt"), [], token()

        def push_once(s):
            tell(s, "secret")
            used.append(jwt_of(gateway.pushes(b, len(used) + 1)[-1]))
            s.settle()
        with Xchat(gateway, "--data", d, "--verbose") as s:
            visit(s, b)
            push_once(s)
            check(-1 <= time.time() - verified(used[0]) < 20 * SLOW, "iat is", verified(used[0]))
            check(0 <= s.metric("jwt_age_seconds") < 20 * SLOW, s.metric("jwt_age_seconds"))
            check(os.stat(path).st_mode & 0o777 == 0o600, oct(os.stat(path).st_mode))
            gateway.tell("close")
            push_once(s)
        with open(path) as file:
            kept = json.load(file)
        wanted = {"key_id": "ABC123DEFG", "team_id": "DEF123GHIJ", "iat": verified(used[0]), "jwt": used[0]}
        check(kept == {"key": kept.get("key"), **wanted}, kept)   # "key": which one it was
        for age, same in (2900, True), (3100, False):   # what is in the file counts
            with open(path, "w") as file:
                json.dump({**kept, "iat": int(time.time()) - age}, file, separators=(",", ":"))
            with Xchat(gateway, "--data", d) as s:
                push_once(s)
            check((used[-1] == used[0]) == same, f"after {age} s", "another JWT" if same else "the same JWT")
        check(used[0] == used[1] and len(set(used)) == 2, len(set(used)), "JWTs")
        check(time.time() - verified(used[-1]) < 60 * SLOW, "the new one is old")


@pushing(proven=True, rows=[
    ("expired", {}, {"max_age": -60}),   # a gateway whose clock is ahead
    ("too many", {}, {"answer": {"status": 429, "reason": "TooManyProviderTokenUpdates"}}),
])
def no_new_jwt(gateway, s, name, rules):
    """A JWT that is refused though it is young is not replaced, and the connection is left."""
    gateway.tell("rules", **rules)
    tell(s, "secret", room="good")
    gateway.pushes(s.good, 2)
    gateway.wait(1, "lost", conn=s.conn)
    if name == "too many":
        check(gateway.pushes(s.good, 3)[-1]["conn"] != s.conn, "the same connection")
    check(len({jwt_of(p) for p in gateway.pushes()}) == 1, "another JWT")
    check(s.metric("devices") == 1)


@case()
def late_answers():
    """What a connection that was left has still to say of our JWT, or our key, is no news: there is no other JWT, and
    no pause."""
    with directory() as d, Gateway() as gateway:
        path, rooms = os.path.join(d, "apns-jwt"), ("one", "two", "three")
        with Xchat(gateway, "--data", d) as s:
            devices = [phones(s, 1, room)[0] for room in rooms]
            tell(s, "secret", room="one")
            gateway.pushes(devices[0], 1)
            s.settle()
        with open(path) as file:
            kept = json.load(file)
        with open(path, "w") as file:
            json.dump({**kept, "iat": int(time.time()) - 1500}, file, separators=(",", ":"))
        expired = {"status": 403, "reason": "ExpiredProviderToken"}
        wrong = {"status": 403, "reason": "InvalidProviderToken", "hold": True}
        gateway.tell("rules", answers=dict(zip(devices, ([expired, {"status": 200}], [{**expired, "hold": True}, {"status": 200}],
                                                         [wrong, {"status": 200}]))))
        with Xchat(gateway, "--data", d) as s:
            for room in reversed(rooms):
                tell(s, "secret", room=room)
            gateway.pushes(devices[0], 3)   # the last with a new JWT, on a new connection
            gateway.tell("release")
            s.settle()
            for device in devices[1:]:
                check(len(gateway.pushes(device)) == 2, len(gateway.pushes(device)), "requests")
            check(s.metric("ok_total") == 3 and len({jwt_of(p) for p in gateway.pushes()}) == 2, s.metrics())


@case()
def no_new_key():
    """A key that cannot be used changes nothing at SIGHUP: the JWT stays, too, or new ones would come too often."""
    with tempfile.TemporaryDirectory() as d, Gateway() as gateway:
        path = shutil.copy(KEY, os.path.join(d, "p8"))
        with Xchat(gateway, login=("--apns-key", path, *LOGIN[2:])) as s:
            b, = phones(s, 1)
            for n in 1, 2:
                tell(s, "secret")
                gateway.pushes(b, n)
                s.settle()
                with open(path, "w") as file:
                    file.write("no key")
                s.signal(signal.SIGHUP)
                s.wait_log("warn.*--apns-key")
        check(len({jwt_of(p) for p in gateway.pushes()}) == 1, "another JWT")


@case()
def new_key():
    """SIGHUP: from then on JWTs are of the new key, whatever is wrong with other files."""
    with tempfile.TemporaryDirectory() as d, Gateway() as gateway:
        path, other = shutil.copy(KEY, os.path.join(d, "p8")), shutil.copy(KEY, os.path.join(d, "other"))
        with Xchat(gateway, "--gateway-key-file", other, login=("--apns-key", path, *LOGIN[2:])) as s:
            b, = phones(s, 1)
            for n in 1, 2:
                tell(s, "secret")
                gateway.pushes(b, n)
                s.settle()
                if n == 1:
                    shutil.copy(OTHER, path)
                    os.unlink(other)
                    s.signal(signal.SIGHUP)
                    s.wait_log("warn.*--gateway-key-file")
        check(len({jwt_of(p) for p in gateway.pushes()}) == 2, "the same JWT")


@pushing(client_ca=CERTIFICATE, login=("--apns-cert", CERTIFICATE))
def client_certificate(gateway, s):
    """With --apns-cert there is no authorization; the gateway asks for the certificate, and gets it."""
    b, = phones(s, 1)
    tell(s, "secret")
    check("authorization" not in dict(gateway.pushes(b, 1)[0]["headers"]), gateway.pushes(b))
    check(s.metric("certificate_days") > 30000, s.metric("certificate_days"))


@pushing(quick=True, rows=[("refused", {"client_ca": CERTIFICATE}), ("no SETTINGS", {"vanish": True})])
def no_certificate(gateway, s, name):
    """Closed before SETTINGS: few attempts, an alarm after three, devices and pushes kept."""
    phones(s, 1)
    tell(s, "secret")
    first, *_, third = gateway.wait(3, "accept", 2 * SOON)
    check(third["at"] - first["at"] > 0.7, "three attempts in", third["at"] - first["at"], "s")   # 0.5 s + 1 s - 25 %
    until(s.alarm, "no alarm")
    check(s.metric("devices") == 1 and s.metric("queued") == 1, s.metrics())


# ---------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------

# What a push, its token and the connection make of an answer: section 8 of apns.md.
AGAIN, GONE, NEW, PAUSED = "again", "gone", "new connection", "paused, with an alarm"
HTML = "<html><head><title>400</title></head></html>"
FAR = 1 << 42   # milliseconds: after any registration
ANSWERS = [
    (200, None, {}), (200, None, {"shape": "empty"}), (200, None, {"body": HTML}), (200, None, {"shape": "early"}),
    (200, None, {"shape": "continuation"}), (200, None, {"shape": "trailers"}), (204, None, {}),
    (400, "BadCollapseId", {}), (400, "BadExpirationDate", {}), (400, "BadMessageId", {}), (400, "BadPriority", {}),
    (400, "DuplicateHeaders", {}), (400, "InvalidPushType", {}), (400, "MissingDeviceToken", {}),
    (400, "PayloadEmpty", {}), (404, "BadPath", {}), (405, "MethodNotAllowed", {}), (413, "PayloadTooLarge", {}),
    (400, "NeverHeardOf", {}), (418, "Teapot", {}), (400, None, {}), (400, None, {"body": HTML}),
    (400, "BadDeviceToken", {}, GONE), (400, "BadDeviceToken", {"shape": "split"}, GONE),
    (400, "BadDeviceToken", {"shape": "trailers"}, GONE), (400, "DeviceTokenNotForTopic", {}, GONE),
    (410, "ExpiredToken", {}, GONE), (410, "Unregistered", {}, GONE), (410, "Unregistered", {"timestamp": FAR}, GONE),
    (410, "Unregistered", {"timestamp": FAR, "shape": "continuation"}, GONE), (410, None, {}, GONE),
    (410, "Unregistered", {"timestamp": 1700000000000}),
    (429, "TooManyRequests", {}, AGAIN), (500, "InternalServerError", {}, AGAIN),
    (503, "ServiceUnavailable", {}, AGAIN), (599, "NeverHeardOf", {}, AGAIN), (500, None, {"body": '{"reason"'}, AGAIN),
    (400, "IdleTimeout", {}, AGAIN, NEW), (503, "Shutdown", {}, AGAIN, NEW),
    (403, "UnrelatedKeyIdInToken", {}, AGAIN, NEW), (429, "TooManyProviderTokenUpdates", {}, AGAIN, NEW),
    *((status, reason, {}, PAUSED) for status, reason in (
        (403, "Forbidden"), (400, "BadTopic"), (400, "MissingTopic"), (400, "TopicDisallowed"), (403, "BadCertificate"),
        (403, "BadCertificateEnvironment"), (403, "InvalidProviderToken"), (403, "MissingProviderToken"),
        (403, "BadEnvironmentKeyIdInToken"), (403, "BadEnvironmentKeyInToken"))),
]


@case()
def answers():
    """Each answer does to push, token and connection what the table says."""
    with Gateway() as gateway, fleet(gateway, len(ANSWERS)) as servers:
        for s, (status, reason, more, *_) in zip(servers, ANSWERS):
            s.device = token()
            answer = {"status": status, **({"reason": reason} if reason else {}), **more}
            gateway.tell("rules", answers={s.device: [answer, {"status": 200}]})
            visit(s, s.device)
            tell(s, "secret")

        def happens(s, row):
            gateway.pushes(s.device, 2 if AGAIN in row else 1)
            if PAUSED in row:
                gateway.wait(1, "lost", conn=s.conn)
            else:
                s.settle()
            tell(s, "secret", room="good")

        def outcome(s, row):
            tries = gateway.pushes(s.device)
            check(len(tries) == (2 if AGAIN in row else 1), len(tries), "requests")
            check(len(ids(tries)) == 1, "its ids changed")
            check(s.metric("devices") == (1 if GONE in row else 2), s.metric("devices"), "devices")
            if PAUSED in row:
                check(s.metric("connected") == 0 and len(gateway.pushes(s.good)) == 1, "there is no pause")
                check(s.log().count(" warn ") - s.log().count("ulimit") == 1, "not one alarm:", s.log())
            else:
                conn = gateway.pushes(s.good, 2)[1]["conn"]
                check((conn == s.conn) == (NEW not in row), "connection", s.conn, "and then", conn)
                check(NEW in row or not s.alarm(), "an alarm:", s.alarm())
        each(servers, ANSWERS, happens)
        each(servers, ANSWERS, outcome)


@pushing(proven=True)
def two_errors_500(gateway, s):
    """Two in a row on one connection: a new one."""
    bad = {"status": 500, "reason": "InternalServerError"}
    gateway.tell("rules", answers={s.good: [bad, bad, {"status": 200}]})
    tell(s, "secret", room="good")
    where = [p["conn"] == s.conn for p in gateway.pushes(s.good, 4)]
    check(where == [True, True, True, False], where)


@pushing(proven=True, rows=[("from the start", {"proven": False}), ("later", {})])
def wrong_environment(gateway, s, name):
    """BadDeviceToken for all from the start, or for most of them later: no more than a few are dropped, and there is
    an alarm."""
    phones(s, 40)
    gateway.tell("rules", answer={"status": 400, "reason": "BadDeviceToken"})
    tell(s, "secret")
    until(s.alarm, "no alarm", SOON)
    gone = s.metric('tokens_removed_total{status="400"}')
    check(gone <= (20 if name == "later" else 0), gone, "tokens are dropped")


@pushing(proven=True)
def registered_again(gateway, s):
    """A token that comes again while its push is in flight survives the 410 for the old one."""
    b, = phones(s, 1)
    then = int(time.time() * 1000)
    gateway.tell("rules", answers={b: [{**UNREGISTERED, "timestamp": then + 2, "hold": True}, {"status": 200}]})
    tell(s, "secret")
    gateway.pushes(b, 1)
    visit(s, b)
    gateway.tell("release")
    s.settle()
    check(s.metric("devices") == 2, "the token is gone")
    tell(s, "secret again")
    gateway.pushes(b, 2)


# ---------------------------------------------------------------------------
# What a gateway may do to a connection
# ---------------------------------------------------------------------------

@pushing(proven=True, rows=[("one", {}, []), ("two", {}, [{"last": 0x7fffffff}]),
                            ("three", {}, [{"last": 0x7fffffff}, {"back": 0}])])
def goaway(gateway, s, name, before):
    """Streams above its last id are sent again at once, those below wait for their answers: none twice."""
    phones(s, 8)
    gateway.tell("rules", answer={"hold": True})
    tell(s, "secret")
    first = gateway.wait(9, "request")[1:]
    gateway.tell("rules", answer={"status": 200})
    for early in before:
        gateway.tell("goaway", **early)
    gateway.tell("goaway", back=6, reason="Shutdown", close=True)
    again = gateway.wait(12, "request")[9:]   # the three above
    check(ids(again) == ids(first[5:]), "others were sent again")
    check(all(p["conn"] != s.conn for p in again), "on the old connection")
    until(lambda: s.metric("ok_total") == 4, "they are not answered")
    check(s.metric("in_flight") == 5, s.metric("in_flight"), "in flight")   # the five below, on the old connection
    gateway.tell("release")
    s.settle()
    gateway.wait(1, "lost", conn=s.conn)
    check(len(gateway.all("request")) == 12, len(gateway.all("request")), "requests")
    check(s.metric("ok_total") == 9, s.metrics())
    check("Shutdown" in s.log(), "the reason is not in the log")


@pushing(proven=True)
def late_reader(gateway, s):
    """A gateway has answered all and closed before we read the first answer: what we write in between meets a reset, and
    the answers behind it are heard nevertheless."""
    phones(s, 40)   # what the socket holds, whatever its pieces take
    gateway.tell("rules", answer={"hold": True, "shape": "ping"})
    tell(s, "secret")
    gateway.wait(41, "request")
    s.signal(signal.SIGSTOP)
    gateway.tell("release")
    gateway.tell("drop")
    s.signal(signal.SIGCONT)
    until(lambda: s.metric("ok_total") == 41, "they are not answered")
    s.settle()
    check(len(gateway.all("request")) == 41, len(gateway.all("request")), "requests")


@pushing(quick=True, rows=[("an error", {}, {"code": 11}), ("nothing was looked at", {}, {"last": 0})])
def goaway_for_good(gateway, s, name, how):
    """A gateway that does not want us is asked again after a while; nothing is lost."""
    phones(s, 1)
    gateway.tell("rules", answer={"hold": True})
    tell(s, "secret")
    gateway.wait(1, "request")
    gateway.tell("rules", answer={"status": 200})
    gateway.tell("goaway", **how, close=True)
    s.wait_log("it does not want us; trying again in 1 s")
    first, again = gateway.wait(2, "request")
    check(again["conn"] != first["conn"] and ids([again]) == ids([first]), first, again)
    s.settle()
    check(s.metric("ok_total") == 1, s.metrics())


@pushing(answer={"never": True})
def goaway_at_once(gateway, s):
    """A gateway that takes leave of each connection in good form, but before it has answered anything, is not asked
    again and again without a pause."""
    phones(s, 1)
    tell(s, "secret")
    for n in 1, 2, 3:
        gateway.wait(1, "request", conn=n)
        gateway.tell("goaway", last=0x7fffffff)
        gateway.tell("goaway", last=0, close=True)
    first, *_, third = gateway.all("accept")[:3]
    check(third["at"] - first["at"] > 2, "three connections in", third["at"] - first["at"], "s")   # 1 s + 2 s - 25 %


@pushing(proven=True)
def refused_streams(gateway, s):
    """RST_STREAM 7, then 5 for the same stream: sent once more, not twice."""
    devices = phones(s, 20)
    gateway.tell("rules", answers={d: [{"rst": [7, 5]}, {"status": 200}] for d in devices[:10]})
    tell(s, "secret")
    gateway.pushes(n=31)
    s.settle()
    for i, device in enumerate(devices):
        check(len(gateway.pushes(device)) == (2 if i < 10 else 1), i, len(gateway.pushes(device)), "requests")
    check({p["conn"] for p in gateway.pushes()} == {s.conn}, "another connection")


@pushing(apple=True, quick=True)
def limits(gateway, s):
    """One stream at first, 1000 after the first answer, one after each rejection: never too many, none lost."""
    devices = phones(s, 120)
    gateway.tell("rules", answers={d: [UNREGISTERED] for d in devices[::17]})
    tell(s, "secret")
    until(lambda: s.answered(200) + s.answered(410) == 120, "not all", SOON)
    s.settle()
    for device in devices:
        tries = [p["answer"] for p in gateway.pushes(device)]
        check(sum(a != "rst" for a in tries) == 1, tries)
    check(s.metric("devices") == 112 and s.metric("streams_max") in (1, 1000), s.metrics())


@pushing(proven=True, rows=[
    ("late", {"refill": 0.15}, 40), ("one octet", {"settings": {"4": 1}}, 1),
    ("4095 octets", {"settings": {"4": 4095}, "refill": 0.05}, 12), ("no header table", {"settings": {"1": 0}}, 2),
    ("wider", {"settings": {"4": 200}, "refill": None}, 1),   # no WINDOW_UPDATE, but another INITIAL_WINDOW_SIZE
])
def small_windows(gateway, s, name, n):
    """More payload than the windows take: it waits, and all of it arrives. A header table that may not be: well."""
    text = "secret" * (10 if name == "one octet" else 1000)
    devices = phones(s, n)
    tell(s, text)
    if name == "wider":
        until(lambda: s.metric("in_flight") == 1, "it is not sent")
        gateway.tell("settings", values={"4": 65535})
    for device in devices:
        body = aps(gateway.pushes(device, 1)[0])["alert"]["body"]
        check(text.startswith(body.rstrip("…")), body)
    s.settle()
    check(s.metric("retried_total") == 0, "some were sent again")
    if name == "no header table":   # the first block says so
        check([p["block"][:4] for p in gateway.pushes()] == ["2083", "8387", "8387"], gateway.pushes())


@pushing(settings={"4": 10}, refill=None)
def early_answer(gateway, s):
    """One that comes before the window let all of the payload through: the stream is ended, or it would count for ever;
    unless the gateway has done so."""
    for n, more in (1, ""), (2, "0000040300000000{:02x}00000000"):
        b, = phones(s, 1, f"room {n}")
        tell(s, "secret", room=f"room {n}")
        until(lambda: s.metric("in_flight") == 1, "it is not sent")
        stream = 2 * n - 1
        gateway.tell("raw", hex=f"000001010{4 if more else 5}000000{stream:02x}88" + more.format(stream))
        s.settle()
        gateway.tell("ping")
        gateway.wait(n, "pong")
        check([e["stream"] for e in gateway.all("reset")] == [1], gateway.all("reset"))
    check(s.metric("ok_total") == 2 and s.metric("retried_total") == 0, s.metrics())


@pushing(proven=True)
def many_error_bodies(gateway, s):
    """More than 65535 octets of them: xchat pays for what it has read."""
    phones(s, 120)
    gateway.tell("rules", answer={"status": 400, "body": json.dumps({"reason": "BadPriority", "x": "x" * 900})})
    tell(s, "secret")
    until(lambda: s.answered(400) == 120, "some are not answered", SOON)
    check({p["conn"] for p in gateway.pushes()} == {s.conn}, "another connection")


HELD = object()   # the stream of the push that is in flight, in hexadecimal
WRONG = [
    ("frame too long", "004001000000000001"), ("SETTINGS of 5", "0000050400000000000000000000"),
    ("SETTINGS on a stream", "000000040000000001"), ("PING of 7", "00000706000000000000000000000000"),
    ("RST_STREAM of 3", "0000030300", HELD, "000000"), ("WINDOW_UPDATE of 3", "000003080000000000000000"),
    ("WINDOW_UPDATE too far", "0000040800000000007fffffff" * 2), ("GOAWAY of 7", "00000707000000000000000000000000"),
    ("PUSH_PROMISE", "0000050504", HELD, "0000000288"), ("CONTINUATION alone", "0000010904", HELD, "88"),
    ("HEADERS interrupted", "0000010100", HELD, "88", "0000080600000000000000000000000000"),
    ("too much padding", "0000020009", HELD, "0200"), ("an integer that ends early", "0000010105", HELD, "7f"),
    ("an endless integer", "0000080105", HELD, "7fffffffffffffff"), ("an empty index", "0000010105", HELD, "80"),
    ("a string that is too long", "0000030105", HELD, "48ff00"), ("HTTP/1", b"HTTP/1.1 400 Bad Request\r\n\r\n".hex()),
]
FINE = [
    ("an unknown frame", "000003f0ff00000000010203"), ("PRIORITY", "0000050200", HELD, "0000000010"),
    ("nothing but padding", "0000010008", HELD, "00"), ("an unknown setting", "000006040000000000000800000001"),
    ("nothing on an old stream", "000000000100000001"), ("RST_STREAM of an old stream", "00000403000000000100000005"),
    ("window of an old stream", "00000408000000000100000001"), ("PING", "0000080600000000000102030405060708"),
    ("padded and prioritised", "00000a012c", HELD, "03000000000f88000000", "0000000001", HELD),
    ("size update over our limit", "0000040105", HELD, "3fe11f88"), ("raw status", "0000050105", HELD, "0803323030"),
    ("literal name", "00000d0105", HELD, "00073a73746174757303323030"),
    ("Huffman name", "00000a0105", HELD, "0085b8848d36a3821001"), ("dynamic status", "0000010105", HELD, "be"),
    ("status in two frames", "0000030100", HELD, "080331", "0000020904", HELD, "3030"),   # 100: not the last one
]


@case()
def raw_bytes():
    """Frames that break the rules end the connection, and the push is sent on another one; odd but good ones do not."""
    with Gateway() as gateway, fleet(gateway, len(WRONG + FINE), quick=False) as servers:
        gateway.tell("rules", answer={"hold": True})
        for s in servers:
            tell(s, "secret", room="good")
        for s in servers:
            s.stream = f"{gateway.pushes(s.good, 2)[1]['stream']:08x}"
        gateway.tell("rules", answer={"status": 200})
        for s, (_, *parts) in zip(servers, WRONG + FINE):
            gateway.tell("raw", conn=s.conn, hex="".join(s.stream if p is HELD else p for p in parts))

        def ends(s, row):
            gateway.wait(1, "lost", conn=s.conn)
            check(gateway.pushes(s.good, 3)[2]["conn"] != s.conn, "the connection lives")
            s.settle()

        def lives(s, row):
            gateway.tell("ping", conn=s.conn)
            gateway.wait(1, "pong", conn=s.conn)
            gateway.tell("release", conn=s.conn)
            s.settle()
            check(len(gateway.pushes(s.good)) == 2, "it is sent again")
            check(s.metric("unknown_total") == (row[0] == "dynamic status"), s.metric("unknown_total"), "unknown")
        each(servers[len(WRONG):], FINE, lives)
        each(servers, WRONG, ends)
        gateway.events = [e for e in gateway.events if e["event"] != "error"]   # it is the one who errs here


@pushing("--verbose", proven=True, rows=[("mute", {}, {"mute": True}), ("no answer", {}, {"answer": {"never": True}}),
                            ("reset", {}, {"answer": {"never": True}})])
def no_answer(gateway, s, name, rules):
    """Not a byte: a PING, the end. PINGs but no answer: the stream is cancelled. A reset. Then each is sent again,
    with the same ids."""
    phones(s, 2)   # three without an answer would end the connection
    gateway.tell("rules", **rules)
    tell(s, "secret")
    gateway.pushes(n=3)
    if name == "reset":
        gateway.tell("reset")
    else:
        gateway.wait(1, "ping", conn=s.conn)
    if name == "mute":
        gateway.wait(1, "lost", conn=s.conn)
    if name == "no answer":
        check({r["code"] for r in gateway.wait(2, "reset", conn=s.conn)} == {8}, "not CANCEL")
    gateway.tell("rules", mute=False, answer={"status": 200})
    first, again = gateway.pushes()[1:3], gateway.pushes(n=5)[3:]
    s.settle()
    check(len(ids(first)) == 2 and ids(again) == ids(first), first, again)
    check(len(gateway.pushes()) == 5 and s.metric("retried_total") == 2, s.metrics())


@pushing(proven=True)
def answered_while_we_stood_still(gateway, s):
    """The machine stops for longer than an answer may take; the answers are there when it goes on: none is asked for again."""
    gateway.tell("rules", answer={"status": 200, "hold": True})
    known = phones(s, 20)
    tell(s, "secret")
    for device in known:
        gateway.pushes(device, 1)
    s.signal(signal.SIGSTOP)
    begin = time.monotonic()
    gateway.tell("release")
    until(lambda: time.monotonic() > begin + 2 * SLOW, "")   # a quick one gives up after a second and a half
    s.signal(signal.SIGCONT)
    s.settle()
    check(s.answered(200) == 21 and len(gateway.pushes()) == 21, s.metrics())


# ---------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------

@case()
def restarts():
    """Devices, their rooms and counts live on after kill -9 and SIGTERM; a forgotten one stays forgotten."""
    with directory() as d, Gateway() as gateway:
        b, c, gone = token(), token(), token()
        with Xchat(gateway, "--data", d) as s:
            visit(s, b, c, gone)
            visit(s, b, room="other")
            with contextlib.closing(Ws(s)) as ws:
                ws.login("Eve", "room", device_token=gone)
                ws.send_json(type="logout", forget_device=True)
                ws.fence()
            tell(s, "secret 1")
            gateway.pushes(b, 1)
            s.settle()
            s.crash()
        for room, device, n in ("other", b, 2), ("room", b, 3):   # after a crash, and after a stop
            with Xchat(gateway, "--data", d) as s:
                check(s.metric("devices") == 2, s.metric("devices"), "devices")
                tell(s, f"secret {n}", room=room)
                push = gateway.pushes(device, n)[-1]
                check(text_and_badge(push) == (f"secret {n}", n), push["body"])
                s.settle()
        check(text_and_badge(gateway.pushes(c, 2)[-1]) == ("secret 3", 2), gateway.pushes(c))
        check(not gateway.pushes(gone), "a push to one who was forgotten")
        with Xchat(gateway, "--data", d) as s:
            s.metrics()   # it is tidied before the first answer
            with open(os.path.join(d, "devices")) as file:
                lines = [json.loads(line) for line in file]
        check(sorted((line["token"], line["room"], line["unread"]) for line in lines) ==
              [(b, "rooms/other", 3), (b, "rooms/room", 3), (c, "rooms/room", 2)], lines)


@case()
def queue():
    """What was not sent, or not answered, before SIGTERM is sent after the next start; once that is done, no more."""
    with directory() as d, Gateway(answer={"never": True}) as gateway:
        with Xchat(closed_port(), "--data", d) as s:
            b, = phones(s, 1)
            tell(s, "secret")
            until(lambda: s.metric("queued") == 1, "nothing is queued")
        with Xchat(gateway, "--data", d) as s:
            gateway.pushes(b, 1)
        gateway.tell("rules", answer={"status": 200})
        for _ in range(2):
            with Xchat(gateway, "--data", d) as s:
                pushes = gateway.pushes(b, 2)
                s.settle()
        check(len(gateway.pushes()) == 2 and len(ids(pushes)) == 1, gateway.pushes())
        check(text_and_badge(pushes[-1]) == ("secret", 1), pushes[-1]["body"])


@case()
def stop_before_it_is_dead():
    """A server that stops does not wait until a silent connection is dead: what was said since it was last heard is pushed
    after the next start."""
    with directory() as d, Gateway() as gateway:
        with Xchat(gateway, "--data", d, "--ping", "2") as s:
            b, bob = token(), Ws(s, answer_pings=False)
            bob.login("Bob", "room", device_token=b)
            tell(s, "secret")
            while bob.event()[0] != 9:   # a ping
                pass
        with Xchat(gateway, "--data", d) as s:
            push, = gateway.pushes(b, 1)
            check(text_and_badge(push) == ("secret", 1), push["body"])


@case()
def no_start():
    """--check, and a start that fails, leave what waits to the next start."""
    with directory() as d, Gateway() as gateway:
        with Xchat(closed_port(), "--data", d) as s:
            b, = phones(s, 1)
            tell(s, "secret")
            until(lambda: s.metric("queued") == 1, "nothing is queued")
        for line, wanted in (["--check"], 0), (["--bind", f"127.0.0.1:{closed_port()}"], 1):
            status, out, err = run("--data", d, "--apns", "https://localhost:1", "--apns-topic", TOPIC, *LOGIN, *line)
            check(status == wanted, line, status, out, err)
        with Xchat(gateway, "--data", d):
            gateway.pushes(b, 1)


@case()
def news_in_an_old_push():
    """A push that has waited for long, and gets another text, waits as long as a new one."""
    with directory() as d:
        path = os.path.join(d, "devices")

        def kept():   # what is left by a server that never reaches its gateway
            with Xchat(closed_port(), "--data", d) as s:
                if s.metric("devices") == 0:
                    phones(s, 1)
                tell(s, "secret")
                until(lambda: s.metric("queued") == 1, "nothing is queued")
            with open(path) as file:
                return json.loads(file.read())
        line = kept()
        with open(path, "w") as file:
            json.dump({**line, "expires": int(time.time()) + 600}, file, separators=(",", ":"))
            file.write("\n")
        again = kept()
        check(again["unread"] == 2 and again["uuid"] == line["uuid"], again)
        check(again["expires"] >= line["expires"] - 1, "it has", again["expires"] - time.time(), "s left")


@case()
def clock_set_right():
    """A router boots in 1970, and learns what time it is while a push waits: that waits on, and Apple may keep it for a week."""
    with tempfile.TemporaryDirectory() as t, Gateway() as gateway:
        faults = Faults(t)
        faults.wall = 100000
        with Xchat(gateway, quick=True, env=faults.env) as s:
            b, = phones(s, 1)
            tell(s, "secret")
            s.wait_log("warn.*--apns.*certificate is not yet valid", SOON)
            faults.wall = 0
            headers = dict(gateway.pushes(b, 1)[0]["headers"])
            week = int(headers["apns-expiration"]) - time.time()
            check(abs(week - 7 * 86400) < 60, "Apple may keep it for", week, "s")


@case()
def devices_that_cannot_be_kept():
    """A list that cannot be written is said to be, and is written once it can be; pushes do not wait for that. One that
    cannot be read keeps the server from starting, and damaged lines are left out."""
    with directory() as d, Gateway() as gateway:
        path = os.path.join(d, "devices")
        os.makedirs(path + ".new")   # where the new list should be
        with Xchat(gateway, "--data", d, quick=True) as s:
            s.wait_log("devices cannot be written: Is a directory")
            b, = phones(s, 1)
            s.wait_log("devices cannot be stored")
            tell(s, "secret")
            gateway.pushes(b, 1)
            os.rmdir(path + ".new")
            until(lambda: os.path.exists(path) and b in open(path).read(), "it is never stored", SOON)
            c, = phones(s, 1)
            s.crash()
        with open(path, "a") as file:
            file.write('no JSON\n{"token":"x"}\n{"token":"' + b)
        with Xchat(gateway, "--data", d) as s:
            check(s.metric("devices") == 2, s.metrics())
            tell(s, "secret again")
            gateway.pushes(b, 2), gateway.pushes(c, 1)
        os.unlink(path)
        os.mkdir(path)
        status, out, err = run("--data", d, *HTTPS, *LOGIN)
        check(status == 1 and "devices cannot be read: Is a directory" in err, status, out, err)


@case()
def device_behind_half_a_line():
    """A disk that was full leaves half a line, and no new list could be written either: who comes next is not lost."""
    with directory() as d, tempfile.TemporaryDirectory() as t, Gateway() as gateway:
        faults = Faults(t)
        with Xchat(gateway, "--data", d, quick=True, env=faults.env) as s:
            faults.set(room=20, write_errno=errno.ENOSPC)
            phones(s, 1)
            s.wait_log("(?s)devices cannot be stored.*devices cannot be written")
            faults.none()
            b, = phones(s, 1)
            s.crash()
        faults.set(room=20, write_errno=errno.EIO)   # a part of the new list fits
        with Xchat(gateway, "--data", d, env=faults.env) as s:
            s.wait_log("devices cannot be written: No space left on device")
            faults.none()
            tell(s, "secret")
            gateway.pushes(b, 1)


# ---------------------------------------------------------------------------
# People who run it
# ---------------------------------------------------------------------------

def push_test(port, *options, device=None):
    return run("--apns", f"https://localhost:{port}", "--apns-ca", CERTIFICATE, "--apns-topic", TOPIC, *LOGIN, *options,
               "--push-test", device or token(), "My first push test!")


PLAIN = [   # an answer, and one of the words for people that --push-test says then
    (400, "BadTopic", "topic"), (400, "TopicDisallowed", "topic"), (400, "DeviceTokenNotForTopic", "topic|app"),
    (400, "BadDeviceToken", "environment|sandbox"), (403, "InvalidProviderToken", "key"),
    (403, "ExpiredProviderToken", "clock|time"), (403, "BadEnvironmentKeyInToken", "environment|sandbox"),
    (403, "BadCertificate", "certificate"), (410, "Unregistered", "uninstalled|no longer|gone|dead|removed"),
    (413, "PayloadTooLarge", "long|large|big"), (429, "TooManyRequests", "many"),
    (500, "InternalServerError", "later|again"), (503, "Shutdown", "later|again"),
]


@case()
def push_test_answers():
    """--push-test sends the golden payload, says in plain words what came of it, and ends with 0 or 1."""
    with Gateway() as gateway:
        device, said = "ed8c1c155a6daf448f610ae749eec794be551f8d1b145448711eea973583f820", set()
        status, out, err = push_test(gateway.port, device=device.upper())
        check(status == 0 and "accepted" in out, status, out, err)
        push, = gateway.pushes(device, 1)
        check(push["body"] == '{"aps":{"alert":"My first push test!","sound":"default"}}', push["body"])

        def says(code, reason, words):
            gateway.tell("rules", answer={"status": code, "reason": reason})
            status, out, err = push_test(gateway.port, device=device)
            plain = out.replace(str(code), "").replace(reason, "")
            good = status == 1 and re.search(words, plain) and plain.count(" ") > 3
            check(good, f"status {status}, no {words!r} in", out, err)
            said.add(plain)
        each_row(says, PLAIN)
        check(len(said) >= 8, "they are not told apart:", said)


@case()
def push_test_beside_a_server():
    """Who tries --push-test while a server runs that has sent nothing yet makes no second JWT necessary."""
    with directory() as d, Gateway() as gateway:
        gateway.tell("rules", update_every=1200)
        with Xchat(gateway, "--data", d) as s:
            b, = phones(s, 1)
            status, out, err = push_test(gateway.port, "--data", d)
            check(status == 0, status, out, err)
            tell(s, "secret")
            gateway.pushes(b, 1)
            s.settle()
            check(s.answered(200) == 1 and not s.alarm(), s.log())


@case()
def push_test_failures():
    """A gateway that is not there, or whom we do not trust; a bad token; no --apns."""
    status, out, err = push_test(closed_port())
    check(status == 1 and re.search("connect|reach|refused", out + err), status, out, err)
    with Gateway() as gateway:
        status, out, err = push_test(gateway.port, "--apns-ca", OTHER)
        check(status == 1 and re.search("certificate|trust|verif", out + err), status, out, err)
        check(not gateway.pushes(), "it was told all the same")
    status, out, err = push_test(1, device="nonsense")
    check(status in (1, 2) and out + err, status, out, err)
    status, out, err = run("--push-test", token(), "text")
    check(status == 2 and "--apns" in err, status, out, err)


@case()
def push_test_without_an_answer():
    """A stream that is ended, a gateway that is silent, a signal: all are told by the status."""
    with Gateway(answer={"rst": [8]}) as gateway:
        status, out, err = push_test(gateway.port)
        check(status == 1 and "no answer" in out, status, out, err)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        line = ["--apns", f"https://localhost:{listener.getsockname()[1]}", "--apns-ca", CERTIFICATE, "--apns-topic", TOPIC,
                *LOGIN, "--push-test", token()]
        for wanted in "not sent: no (answer|connection)", "":
            program = subprocess.Popen([*WRAP, fast(), *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                       env=environment())
            with listener.accept()[0]:
                if not wanted:
                    program.terminate()
                out, err = program.communicate(timeout=SOON)
            good = re.match(wanted, out) if wanted else out == ""
            check(program.returncode == 1 and good, program.returncode, out, err)


HTTPS = ["--apns", "https://localhost:1", "--apns-topic", TOPIC]


@case(rows=[
    ("no topic", [*HTTPS[:2], *LOGIN], "--apns-topic"), ("a scheme", ["--apns", "http://localhost", *LOGIN], "--apns"),
    ("no login", HTTPS, "--apns-(key|cert)"), ("no team", [*HTTPS, *LOGIN[:4]], "--apns-team-id"),
    ("not a key", [*HTTPS, "--apns-key", __file__, *LOGIN[2:]], "--apns-key"),
    ("no such key", [*HTTPS, "--apns-key", "/nosuch", *LOGIN[2:]], "--apns-key"),
    ("content", ["--push-content", "some"], "--push-content"), ("admin for all", ["--admin", "0.0.0.0:0"], "--admin"),
])
def options(name, line, words):
    """What cannot be is said at the start, in a line that names the option."""
    status, out, err = run(*line)
    check(status in (1, 2) and re.search(words, err.splitlines()[-1]), status, out, err)


@pushing()
def metrics(gateway, s):
    """/metrics and /health of --admin; nothing of them for those who chat."""
    b, c = phones(s, 2)
    gateway.tell("rules", answers={c: [UNREGISTERED]})
    for name in "queued in_flight devices connected sent_total ok_total retried_total unknown_total".split():
        check(s.metrics()[name] == (2 if name == "devices" else 0), name, s.metrics())
    tell(s, "secret")
    gateway.pushes(n=2)
    s.settle()
    found = s.metrics()
    for name, value in {"connected": 1, "streams_max": 1000, "sent_total": 2, "ok_total": 1, "devices": 1,
                        'responses_total{status="200"}': 1, 'responses_total{status="410"}': 1,
                        'tokens_removed_total{status="410"}': 1, 'tokens_removed_total{status="400"}': 0,
                        'dropped_total{why="expired"}': 0, 'dropped_total{why="overflow"}': 0}.items():
        check(found[name] == value, name, "is", found[name])
    with contextlib.closing(Http(s, at=1)) as admin, contextlib.closing(Http(s)) as chat:
        check(admin.ask("/health").status == 200 and chat.ask("/metrics").status == 404)


# ---------------------------------------------------------------------------
# Much of it
# ---------------------------------------------------------------------------

def crowd(s, devices, together=50):
    """Many phones come and go, some at a time."""
    for begin in range(0, len(devices), together):
        socks = []
        for device in devices[begin:begin + together]:
            socks.append(socket.create_connection(s.address()[1], DEADLINE))
            login = {"type": "login", "client_name": "Bob", "room_id": "room", "device_token": device}
            socks[-1].sendall(get("/", *UPGRADE) + frame(TEXT, json.dumps(login)) + close_frame(1000))
        for sock in socks:
            heard = b""
            while data := sock.recv(1 << 16):
                heard += data
            check(b"client_list" in heard, heard[-300:])
            sock.close()


RESETS = [1500, 4321, 7777]   # which requests end their connection


@pushing("--max-clients", "20000", quick=True, brief=True, apple=True, goaway_every=1000, reset_at=RESETS)
def ten_thousand(gateway, s):
    """10,000 pushes over connections that end all the time: each arrives once, or once more after a reset."""
    many = 10000 if not WRAP else 1000   # valgrind takes its time
    devices = [token() for _ in range(many)]
    gateway.tell("rules", answers={d: [UNREGISTERED] for d in devices[many // 20::many // 10]})
    crowd(s, devices)
    check(s.metric("devices") == many, s.metric("devices"), "devices")
    begin = time.monotonic()
    tell(s, "secret")
    until(lambda: s.answered(200) + s.answered(410) >= many, "some are missing", 30 * SLOW)
    s.settle()
    took = time.monotonic() - begin
    cut = {p["conn"] for p in gateway.pushes() if p["answer"] == "cut"}
    given_up = {(e["conn"], e["stream"]) for e in gateway.all("given_up")}   # by us: where all is slow, after a time-out
    arrived = {}
    for push in gateway.pushes():
        if push["answer"] != "rst":
            arrived.setdefault(push["token"], []).append(push)
    check(len(arrived) == many, many - len(arrived), "are lost")
    check(len(cut) == sum(n <= len(gateway.pushes()) for n in RESETS), "resets:", cut, "of", len(gateway.pushes()))
    stalled = re.search("it answers no more|no answer to a PING", "\n".join(s.lines))   # whole connections are given up then
    for pushes in arrived.values():
        check(len(ids(pushes)) == 1, "ids changed", pushes)
        kept = [p for p in pushes if p["conn"] not in cut and (p["conn"], p["stream"]) not in given_up]
        check(len(kept) <= 1 or stalled, "twice without need:", pushes)
    check(s.metric("devices") == many - 10, s.metric("devices"))
    if FIGURES:
        print(f"{many} pushes: {took:.1f} s, {sum(len(p) > 1 for p in arrived.values())} twice,",
              len(gateway.all("accept")), "connections", file=sys.stderr)


def p99(s, seconds=1):
    """Milliseconds from a word to its echo, while words are also pushed."""
    ann, bob, times = Ws(s), Ws(s), []
    ann.login("Ann", "room")
    bob.login("Bob", "room")
    ann.expect("login")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.monotonic()
        ann.say("secret")
        for client in bob, ann:
            client.expect("say")
        times.append(time.monotonic() - begin)
    return sorted(times)[len(times) * 99 // 100] * 1000


@case(serial=True)
def latency():
    """Those who chat do not notice a gateway that is silent, down, or refuses everything."""
    with Gateway(answer={"status": 500, "reason": "InternalServerError"}) as gateway, Server("--rate", "0") as none, \
            socket.create_server(("127.0.0.1", 0)) as listener, Xchat(listener.getsockname()[1]) as silent, \
            Xchat(closed_port()) as down, Xchat(gateway) as refused:
        for s in silent, down, refused:
            phones(s, 50)
            tell(s, "secret")
        gateway.pushes(n=50)
        down.wait_log("warn.*apns", SOON)
        servers = {"no push": none, "silent": silent, "down": down, "refused": refused}
        figures = {name: p99(s) for name, s in servers.items()}
        listener.close()   # or `silent` would wait for it when it stops
    if FIGURES:
        print("p99 in ms:", ", ".join(f"{k} {v:.2f}" for k, v in figures.items()), file=sys.stderr)
    for name, value in figures.items():
        check(value < max(10 * figures["no push"], 20 * SLOW), name, "p99 is", value, "ms;", figures)


if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if a != "figures"]
    raise SystemExit(main())
