"""Faults made common: each system call of a short session fails once, the first, the second, the third...

    FAULT_STEP=1 python3 test/faults.py

A session is people who come, talk, look back, go; orders by HTTP and from a back end; SIGHUP. It is
held again and again, and the n-th call of one kind (fault.c) fails, for every n until a session ends
without that. Whatever fails, there are these promises:

    nobody waits for ever, and what people get is right, or their connection ends
    who has a connection of his own notices nothing, and newcomers are served as before
    what anybody was told is stored (it has an id) is in the history, also after a restart
    only without memory the server ends, with status 1 and a line that says why

Every FAULT_STEP-th call is tried, from a random one on; 1 tries them all, which takes minutes.
"""

import contextlib
import errno
import functools
import json
import math
import os
import random
import re
import shlex
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time

from harness import (CERTIFICATE, DEADLINE, ROOT, WRAP, XCHAT, Faults, Http, Server, Skip, Ws, case, check, each_row, frame,
                     get, join, main, until)
from inner import COUNT_BY_GROUP, SEND_TO_GROUP, Inner

STEP = int(os.environ.get("FAULT_STEP", "25"))
CUT = Faults.CUT
TRIED = {}   # {(case, call, how): times}

# These may end the server, by a line that says so.
MORTAL = "malloc", "SSL_new", "SSL_CTX_new", "SHA256", "RAND_bytes"
LAST_WORDS = r"error (out of memory \(.*\)|no random bytes|HMAC-SHA-256 fails)$"

# These are nothing that anybody could notice.
HARMLESS = "log", "accept", "shutdown", "poll", "epoll_wait", "epoll_ctl", "epoll_create1"
HARMLESS_ERRORS = errno.EINTR, errno.EAGAIN, CUT   # for a call that may be repeated

# How those may be told of a fault who it has struck.
TOLD = re.compile(r"the connection ended|wanted a message, got opcode 8|(wanted|login) .*'type': 'error'"
                  r"|.*answered by Answer\(status=5\d\d")

OPTIONS = ("--rate", "0", "--max-per-address", "0", "--bind", "plain:127.0.0.1:0", "--bind", "tls:127.0.0.1:0",
           "--tls-cert", CERTIFICATE, "--admin", "127.0.0.1:0", "--gateway", "127.0.0.1:0")


class Life(Server):
    """A server that need not begin to listen; then `begun` is False."""

    def __init__(self, *options, **more):
        try:
            self.begun = False
            super().__init__(*options, **more)
            self.begun = True
        except AssertionError:
            pass


class World:
    """A server, what it has stored, and two people whom no fault of others concerns."""

    def __init__(self, directory, *options, program=None):
        self.data, self.options = os.path.join(directory, "data"), options
        self.shell = f'shift && set -- {shlex.quote(program)} "$@"' if program else None   # in place of ours
        self.faults = Faults(directory)
        self.acknowledged = {}   # {room: {id: content}}
        self.start()

    def begin(self):
        """It may fail."""
        self.s, self.pair = Life("--data", self.data, *OPTIONS, *self.options, env=self.faults.env, shell=self.shell), []

    def start(self):
        self.faults.none()
        self.begin()
        check(self.s.begun, "it does not start any more:", self.s.log())
        self.pair = join(self.s, "bystanders", "by", "stander", source="127.0.0.99")
        for room, stored in self.acknowledged.items():
            self.remembers(room, stored)
        self.acknowledged = {}

    def remembers(self, room, stored):
        """Somebody who comes finds all of it; he."""
        eve = Ws(self.s)
        eve.login("Eve", room, history=200)
        found = {m["id"]: m["content"] for m in hear(eve, "history")["messages"]}
        lost = {i: c for i, c in stored.items() if found.get(i) != c}
        check(not lost, "acknowledged, and not in the history of", room + ":", lost, "but", found)
        return eve

    @property
    def hurt(self):
        """May somebody notice?"""
        f = self.faults
        harmless = f.CALLS[f.call] in HARMLESS or f.how in HARMLESS_ERRORS and f.CALLS[f.call] != "file write"
        return f.struck > 0 and not harmless

    def unconcerned(self):
        """The bystanders still talk."""
        word = str(random.random())
        for speaker in self.pair[:1]:
            speaker.say(word)
        for client in self.pair:
            client.expect("say", content=word)

    def dead(self):
        """It answers, or it has ended (which takes time, when a sanitizer looks for leaks)."""
        try:
            with contextlib.closing(Http(self.s)) as http:
                return http.ask("/health").status != 200
        except (AssertionError, ConnectionError):
            self.s.wait_end()
            return True

    def bury(self, words=LAST_WORDS):
        """It has ended, as it may; what has it said?"""
        status = self.s.wait_end()
        self.s.want_status, self.s.asked_to_stop = 1, True
        check(status == 1 and re.search(words, self.s.log()), "ended with", status)
        self.stop()

    def stop(self):
        for client in self.pair:
            client.close()
        fault = self.s.stop()
        check(not fault, fault)

    def renew(self):
        """Something was wrong: forget it all."""
        self.s.kill()
        self.acknowledged = {}
        self.start()


@contextlib.contextmanager
def world(*options, program=None):
    if WRAP:
        raise Skip("valgrind has the memory, and it would take hours")
    with tempfile.TemporaryDirectory(prefix="xchat") as directory:
        w = World(directory, *options, program=program)
        try:
            yield w
            w.stop()
            w.start()   # which looks for all that was acknowledged
            w.stop()
        finally:
            w.s.kill()


def hear(client, type, hurt=False, **fields):
    """The next message that is no news of who comes and goes, which must be this one. If a fault has struck,
    there may be others, such as what comes of a step that was not waited for."""
    while True:
        message = client.message()
        if message["type"] == type and all(message.get(k) == v for k, v in fields.items()):
            return message
        passed = hurt and message["type"] != "error" or message["type"] in ("login", "logout")
        check(passed, "wanted", type, fields, "got", str(message)[:500])


class Session:
    """Its steps are the methods without an underscore, in this order."""

    def __init__(self, w, room):
        self._w, self._room, self._stored, self._clients = w, room, w.acknowledged.setdefault(room, {}), []

    def _come(self, name, at=0, **login):
        client = Ws(self._w.s, at=at)
        self._clients.append(client)
        client.login(name, self._room, **login)
        return client

    def _said(self, *clients, **fields):
        """Each of them hears it; the id."""
        for client in clients:
            message = hear(client, "say", self._w.hurt, **fields)
            self._stored[message["id"]] = message["content"]
        return message["id"]

    def _end(self):
        for client in self._clients:
            client.close()

    def _run(self, steps):
        """What follows a step that failed may fail for want of it."""
        w, struck, mortal = self._w, False, self._w.faults.CALLS[self._w.faults.call] in MORTAL
        for step in steps:
            try:
                getattr(self, step)()
            except (AssertionError, AttributeError, OSError) as error:
                told = TOLD.match(str(error)) if isinstance(error, AssertionError) else type(error) is not TimeoutError
                check(told and w.hurt, f"{step}: {type(error).__name__} {error}")
            if w.faults.struck and not struck:
                if mortal and w.dead():
                    return
                w.unconcerned()
                w.remembers(self._room, self._stored).close()
                struck = True

    def ann_comes(self):
        self.ann = self._come("Ann")

    def bob_comes(self):
        self.bob = self._come("Bob")

    def say(self):
        self.ann.say("hello")
        self.first = self._said(self.ann, self.bob, content="hello")

    def fragments(self):
        self.bob.send(frame(1, '{"type":"say","to_client_id":"all",', fin=0) + frame(0, '"content":"pieces"}'))
        self._said(self.bob, self.ann, content="pieces")

    def whisper(self):
        self.bob.say("a secret", to=self.ann.id)
        hear(self.bob, "say", self._w.hurt)   # who says it is told if there is no Ann
        hear(self.ann, "say", self._w.hurt)

    def look_back(self):
        self.bob.send_json(type="history", count=5)
        hear(self.bob, "history", self._w.hurt)

    def page(self):
        http = Http(self._w.s)
        check(http.ask("/").status == 200, "no page")
        http.close()

    def order(self):
        body = json.dumps({"room": self._room, "message": "from the site"}).encode()
        http = Http(self._w.s, at="admin")
        http.send(get("/api/send", "Content-Type: application/json", f"Content-Length: {len(body)}", method="POST") + body)
        answer = http.answer()
        check(answer.status == 200, "order answered by", answer)
        self._stored[json.loads(answer.body)["id"]] = "from the site"
        check(http.ask("/metrics").status == 200, "no figures")
        http.close()
        self._said(self.ann, self.bob, content="from the site")

    def back_end(self):
        inner = Inner(self._w.s)
        inner.tell(SEND_TO_GROUP, ext=json.dumps({"group": [self._room], "exclude": None}), body='{"type":"order"}')
        count = inner.ask(COUNT_BY_GROUP, ext=self._room)
        # One may be lost, and somebody who looked for what is stored may not have gone yet.
        check(re.fullmatch(r"i:\d;" if self._w.faults.struck else "i:2;", count), "a wrong count:", count)
        inner.close()
        hear(self.ann, "order", self._w.hurt)
        hear(self.bob, "order", self._w.hurt)

    def over_tls(self):
        carl = self._come("Carl", at=1, since=self.first)
        contents = [m["content"] for m in hear(carl, "history", self._w.hurt)["messages"]]
        check(self._w.hurt or contents[-1] == list(self._stored.values())[-1], "he missed", contents)
        carl.say("x" * 20000)
        self._said(carl, self.ann, content="x" * 20000)

    def reload(self):
        before = len(self._w.s.lines)
        self._w.s.signal(signal.SIGHUP)
        self.page()   # if it came just before poll(), that would wait
        if self._w.faults.call != Faults.CALLS.index("log"):
            until(lambda: len(self._w.s.lines) > before or self._w.s.log_ended, "nothing is said of SIGHUP")

    def leave(self):
        self.bob.reset()
        self.ann.send_json(type="logout")
        for client in self._clients:
            client.close()

    def come_back(self):
        self.ann = self._come("Ann", since=self.first)
        hear(self.ann, "history", self._w.hurt)


STEPS = [name for name in vars(Session) if not name.startswith("_")]
PLAIN = [name for name in STEPS if name not in ("over_tls", "reload")]
SHORT = "ann_comes", "bob_comes", "say", "look_back"


@functools.lru_cache
def used(call):
    """The portable loop does without epoll."""
    with open(XCHAT, "rb") as program:
        return not call.startswith("epoll") or call.encode() in program.read()


def session(w, call, how, n, times, steps, kind=Session):
    """Hold it. Has the fault struck?"""
    one = kind(w, f"{call} {how} {n}")
    w.faults.fail(call, how, n, times)
    one._run(steps)
    struck, calls = w.faults.struck, w.faults.calls
    w.faults.none()
    if call in MORTAL and w.dead():
        w.bury()
        w.start()
    else:
        w.remembers(one._room, one._stored).close()
        w.unconcerned()
    one._end()
    check(calls or not used(call), call, "is not intercepted")
    return struck


def life(w, call, how, n, times, steps):
    """The same with a server that is started for it, and stopped."""
    w.stop()
    w.faults.fail(call, how, n, times)
    w.begin()
    if w.s.begun:
        one = Session(w, f"{call} {how} {n}")
        one._run(steps)
        one._end()
        w.s.signal(signal.SIGTERM)
    if w.s.wait_end() == 1 and (call in MORTAL or not w.s.begun):
        w.bury(LAST_WORDS if w.s.begun else r"(error|warn ) .*$")
    else:
        w.stop()
    struck, calls = w.faults.struck, w.faults.calls
    w.start()
    check(calls or not used(call), call, "is not intercepted")
    return struck


class Stranger(Session):
    """Who is the first to want TLS."""

    def page_over_tls(self):
        http = Http(self._w.s, at=1)
        check(http.ask("/").status == 200, "no page")
        http.close()


def first(w, call, how, n, times, steps):
    """A session with a server that has just begun, and another one, of which nothing fails."""
    w.s.kill()
    w.start()
    struck = session(w, call, how, n, times, steps, Stranger)
    session(w, call, how, Faults.EVER, times, steps, Stranger)
    return struck


def every(*rows, factor=1, how_to=session, options=(), steps=STEPS, world=world):
    """A case that tries every STEP-th call of each row: (call, what it fails with...); or with a `factor` every
    so many STEP-th."""
    def register(function):
        def whole():
            with world(*options) as w:
                each_row(lambda name, call, how: tries(w, call, how), [(f"{call} {name_of(how)}", call, how)
                                                                      for call, *hows in rows for how in hows])

        def tries(w, call, how):
            step = math.ceil(STEP * factor if STEP > 1 else factor)
            n, tried = random.randrange(step) + 1, 0
            try:
                while how_to(w, call, how, n, 1, steps):
                    n, tried = n + step, tried + 1
                TRIED[function.__name__, call, how] = tried
            except (AssertionError, OSError) as error:
                log = w.s.log()
                w.renew()
                raise AssertionError(f"number {n}: {type(error).__name__} {error}; {log[-1500:]}") from error
        whole.__name__ = function.__name__
        case()(whole)
        return function
    return register


def name_of(how):
    return "cut" if how == CUT else errno.errorcode[how]


# ---------------------------------------------------------------------------
# One call
# ---------------------------------------------------------------------------

@every(("recv", errno.ECONNRESET, errno.EINTR, errno.EAGAIN, CUT),
       ("send", errno.EPIPE, errno.EINTR, errno.EAGAIN, errno.ENOBUFS, CUT))
def sockets():
    """Reading and writing, plain and below TLS."""


@every(("accept", errno.ECONNABORTED, errno.EMFILE),
       ("fcntl", errno.EINVAL),
       ("shutdown", errno.ENOTCONN),
       ("poll", errno.EINTR, errno.ENOMEM),
       ("epoll_wait", errno.EINTR),
       ("epoll_ctl", errno.ENOMEM, errno.ENOSPC),
       ("log", errno.EINTR, errno.EAGAIN, CUT))
def loop():
    """Connections come, are waited for, and go."""


@every(("open", errno.EMFILE, errno.EIO),
       ("file read", errno.EIO, CUT),
       ("file write", errno.ENOSPC, CUT),
       ("mkdirat", errno.ENOSPC),
       ("fstatat", errno.EIO),
       ("fsync", errno.EIO), options=("--fsync",))
def files():
    """Of the history."""


@every(("SSL_new", errno.ENOMEM),
       ("SSL_CTX_new", errno.ENOMEM),
       ("SSL_read", errno.EIO),
       ("SSL_write", errno.EIO),
       ("SHA256", errno.ENOMEM),
       ("RAND_bytes", errno.ENOMEM))
def openssl():
    """What OpenSSL does for us."""


@every(("malloc", errno.ENOMEM), steps=PLAIN)
def memory():
    """All that is allocated without TLS."""


@every(("malloc", errno.ENOMEM), factor=61)
def memory_of_tls():
    """A handshake alone takes thousands."""


@every(("malloc", errno.ENOMEM), factor=0.2, how_to=first, steps=("page_over_tls",))
def memory_of_first_handshake():
    """What OpenSSL sets up when it is needed first, and never again."""


@every(("open", errno.EMFILE), ("file read", errno.EIO), ("mkdirat", errno.ENOSPC),
       ("fcntl", errno.EINVAL), ("socket", errno.EMFILE), ("epoll_create1", errno.EMFILE), ("fsync", errno.EIO),
       ("RAND_bytes", errno.ENOMEM), ("SHA256", errno.ENOMEM), ("SSL_CTX_new", errno.ENOMEM),
       ("getsockname", errno.ENOBUFS), how_to=life, steps=SHORT, options=("--fsync",))
def lives():
    """From the start to the end: it refuses to start, in so many words, or is as good as any."""


@every(("malloc", errno.ENOMEM), factor=199, how_to=life, steps=SHORT)
def memory_of_lives():
    """The same of what is allocated: most of it to read the certificate."""


# ---------------------------------------------------------------------------
# Connections of ours: to a gateway that pushes to phones
# ---------------------------------------------------------------------------

class Gate:
    """It takes what it is sent once, by the binary protocol, and ends the connection."""

    def __init__(self):
        self.got, self.context = b"", ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(CERTIFICATE)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        with contextlib.suppress(OSError):   # it was shut down
            while True:
                sock = self.listener.accept()[0]
                sock.settimeout(DEADLINE)
                with sock, contextlib.suppress(OSError), self.context.wrap_socket(sock, server_side=True) as tls:
                    self.got += tls.recv(16384)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join(DEADLINE)
        self.listener.close()


class Call(Session):
    """A phone is told of what it missed, whatever fails once, as time goes by."""

    def phone_comes(self):
        self.token = os.urandom(32).hex()
        self.bob = self._come("Bob", device_token=self.token)

    def phone_goes(self):
        self.bob.close()

    def ann_comes(self):
        self.ann = self._come("Ann")
        self.ann.fence()

    def say(self):
        self.ann.say(self.token[:30], ref=self.bob.id)   # who has never come will not be told
        self._said(self.ann, content=self.token[:30])
        end = time.monotonic() + 4 * DEADLINE
        while self.token[:30].encode() not in self._w.gate.got:
            check(time.monotonic() < end, "no answer of the gateway")
            self._w.faults.later += 3
            self._w.unconcerned()   # and so the server looks at its clock


CALL = [name for name in vars(Call) if not name.startswith("_")]


@contextlib.contextmanager
def calling():
    with contextlib.closing(Gate()) as gate:
        with world("--apns", f"binary://localhost:{gate.listener.getsockname()[1]}", "--apns-cert", CERTIFICATE,
                   "--apns-ca", CERTIFICATE) as w:
            w.gate = gate
            yield w


@every(("socketpair", errno.EMFILE), ("fork", errno.EAGAIN), ("socket", errno.EMFILE), ("connect", errno.ENETUNREACH),
       ("fcntl", errno.EINVAL), ("epoll_ctl", errno.ENOSPC), ("SSL_new", errno.ENOMEM), ("SSL_write", errno.EIO),
       ("SSL_read", errno.EIO), ("file write", errno.ENOSPC), ("SHA256", errno.ENOMEM),
       how_to=functools.partial(session, kind=Call), steps=CALL, world=calling)
def calls():
    """From looking up the gateway's name on."""


# ---------------------------------------------------------------------------
# All calls
# ---------------------------------------------------------------------------

GROWTH = "need < 2 * cap ? twice : (need + 271) / 256 * 256 - 16"


def tight():
    """The source, where buffers have room for what is in them, and not one byte more."""
    with open(os.path.join(ROOT, "xchat.c")) as source:
        text = source.read()
    check(text.count(GROWTH) == 1, "buffers grow in another way")
    return text.replace(GROWTH, "need")


def compiled(text):
    """The program of this source, under ASan."""
    made = os.path.join(ROOT, "test", "build", f"tight-{os.getpid()}")
    flags = "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    done = subprocess.run([*shlex.split(os.environ.get("CC", "cc")), *shlex.split(flags), "-x", "c", "-o", made, "-",
                           "-lssl", "-lcrypto"], input=text.encode(), capture_output=True)
    check(done.returncode == 0, done.stderr.decode())
    return made


def drops(w):
    """Sessions in which all comes in single bytes, and one with little room in the kernel."""
    for call in "recv", "send", "file read":
        session(w, call, CUT, 1, Faults.EVER, STEPS)
    w.faults.sndbuf = 1
    session(w, "log", CUT, 1, Faults.EVER, STEPS)


@case()
def single_bytes():
    """Every read and every write is of one byte; the kernel takes little."""
    tight()   # whether there still is one
    with world() as w:
        drops(w)


def tight_buffers():
    """The same with buffers that are always full, under ASan."""
    program = compiled(tight())
    try:
        with world(program=program) as w:
            drops(w)
    finally:
        os.unlink(program)


if STEP == 1:   # to compile it takes a while
    case()(tight_buffers)


if __name__ == "__main__":
    status = main()
    print(f"# {sum(TRIED.values())} calls failed, of {len(TRIED)} kinds", *TRIED.items() if STEP == 1 else "", sep="\n")
    raise SystemExit(status)
