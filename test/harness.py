"""What the tests share: a server to talk to, clients that talk, and a runner.

A test file is a list of cases. A case is a small function; what it wants of the
server stands in its decorator, and `s` is that server, freshly started:

    @case("--rate", "0")
    def two_people_talk(s):
        "The least a chat must do."
        ann, bob = join(s, "room", "Ann", "Bob")
        ann.say("hello")
        bob.expect("say", from_client_name="Ann", content="hello")

Nothing here sleeps to wait for the server: a reader waits for bytes with a
deadline, and "nothing happens" is shown by a ping that comes back without
anything before it (see Ws.fence).

    XCHAT       the binary (default: ./xchat at the repository root)
    XCHAT_WRAP  a command in front of it, such as "valgrind --leak-check=full"
    XCHAT_SLOW  factor by which every deadline is longer (default 1)
    XCHAT_TLS   if it is set, all that is tested is tested over TLS
"""

import base64
import collections
import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import inspect
import itertools
import json
import mmap
import os
import re
import shlex
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
XCHAT = os.path.abspath(os.environ.get("XCHAT") or os.path.join(ROOT, "xchat"))
WRAP = shlex.split(os.environ.get("XCHAT_WRAP", ""))
SLOW = float(os.environ.get("XCHAT_SLOW", "1"))
CERTIFICATE = os.path.join(ROOT, "test", "localhost.pem")  # with its key; for nothing but tests
TLS = bool(os.environ.get("XCHAT_TLS"))
DEADLINE = 5 * SLOW  # for one answer of a server that has nothing else to do

# What a sanitizer or valgrind says when it has found something.
TROUBLE = re.compile(r"(ERROR|WARNING): \w+Sanitizer|LeakSanitizer|runtime error:|Assertion .* failed"
                     r"|ERROR SUMMARY: [1-9]|== (Invalid|Conditional jump|Use of uninit|Syscall param)|definitely lost")


class Skip(Exception):
    """Raised by a case that cannot run here; the text says why."""


def check(good, *what):
    """assert with a message built only from its arguments (and not lost under -O)."""
    if not good:
        raise AssertionError(" ".join(str(w) for w in what))


@functools.lru_cache
def instrumented():
    """True under valgrind or sanitizers, where memory and speed say nothing."""
    if WRAP:
        return True
    with open(XCHAT, "rb") as binary:
        return b"__asan_init" in binary.read()


@functools.lru_cache
def byte_order():
    """That of the program: one that is emulated may have the other than we."""
    with open(XCHAT, "rb") as binary:
        head = binary.read(6)
    return {1: "little", 2: "big"}[head[5]] if head[:4] == b"\x7fELF" else sys.byteorder


def until(condition, why, seconds=DEADLINE):
    """For what can only be looked at, such as /proc: look until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        check(time.monotonic() < end, why, f"(waited {seconds:g} s)")
        time.sleep(0.005)


# ---------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------

def command(*options, shell=None):
    """The command line. `shell` is set-up such as 'ulimit -n 64' done before."""
    line = [*WRAP, XCHAT, *map(str, options)]
    return ["sh", "-c", shell + ' && exec "$@"', "sh", *line] if shell else line


def environment(env=None):
    """Ours without XCHAT_*, which are options of the server, plus `env`. Whatever
    starts is on loopback and a free port, unless its command line says otherwise."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("XCHAT")}
    clean.update({"XCHAT_BIND": "127.0.0.1", "XCHAT_PORT": "0"}, **({"XCHAT_TLS_CERT": CERTIFICATE} if TLS else {}))
    clean.update(env or {})
    return {k: v for k, v in clean.items() if v is not None}


def run(*options, env=None):
    """Run to the end, for --help and refusals: (status, stdout, stderr)."""
    try:
        done = subprocess.run(command(*options), env=environment(env), stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=DEADLINE)
    except subprocess.TimeoutExpired as late:
        raise AssertionError(f"runs, and should not: {(late.stderr or b'').decode(errors='replace')}") from None
    check(not TROUBLE.search(done.stderr.decode(errors="replace")), done.stderr.decode(errors="replace"))
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def trusting(certificate=CERTIFICATE, **settings):
    """What a TLS client knows: that this certificate is good, and these settings."""
    context = ssl.create_default_context(cafile=certificate)
    for name, value in settings.items():
        setattr(context, name, value)
    return context


def openssl(name, *arguments):
    """What this function of the OpenSSL that Python has returns; pointers are c_void_p."""
    if not hasattr(ssl._ssl, "__file__"):
        raise Skip("the OpenSSL of this Python cannot be called")
    call = getattr(ctypes.CDLL(ssl._ssl.__file__), name)
    call.restype = ctypes.c_void_p
    return ctypes.c_void_p(call(*arguments))


def new_keys(tls, n, last=b"", ask=False):
    """The bytes by which a connection of openssl() changes its keys so many times, and then says this; the other side may be
    asked to do the same."""
    memory = openssl("BIO_new", openssl("BIO_s_mem"))
    openssl("SSL_set0_wbio", tls, memory)
    for _ in range(n):
        openssl("SSL_key_update", tls, int(ask))
        check(openssl("SSL_do_handshake", tls).value == 1, "no new key")
    if last:
        openssl("SSL_write", tls, last, len(last))
    flood = ctypes.create_string_buffer(64 * n + len(last) + 64)
    size = openssl("BIO_read", memory, flood, len(flood)).value
    return flood.raw[:size]


class Server:
    """One running xchat, on loopback and a port of its own choosing.

    with Server("--rate", "0") as s: ...   stops it, and fails if it had died,
    does not stop with status 0, or left a sanitizer's report on stderr.
    """

    def __init__(self, *options, env=None, shell=None, cwd=None, pass_fds=()):
        self.listeners = []         # as logged: "127.0.0.1:43211", "[::1]:43211", "unix:/path"
        self.tls = []               # is it a TLS port?
        self.labels = []            # "admin", "register", "gateway"; "" where people chat
        self.want_status = 0        # a case that ends the server in its own way changes this
        self.asked_to_stop = False
        self.streams = set()        # open connections of the case: they live until it ends
        self.lines = []             # of stderr
        self.log_ended = False
        self.news = threading.Condition()
        self.process = subprocess.Popen(command(*options, shell=shell), env=environment(env), cwd=cwd,
                                        pass_fds=pass_fds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.PIPE)
        self.pid = self.process.pid
        self.reader = threading.Thread(target=self.read_stderr, daemon=True)
        self.reader.start()
        inner = ("--admin", "--register", "--gateway")
        wanted = (sum(o in ("-b", "--bind") for o in options) or 1) + sum(o in inner for o in options)
        try:
            self.wait_log("(?s)" + "listening on.*" * wanted)
        except AssertionError:
            self.kill()
            raise

    def read_stderr(self):
        for raw in self.process.stderr:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            with self.news:
                self.lines.append(line)
                self.listeners += re.findall(r"listening on (\S+)", line)
                for words in re.findall(r"listening on \S+((?: \(\w+\))*)", line):
                    self.tls.append("(TLS)" in words)
                    self.labels.append(words.replace("(TLS)", "").strip(" ()"))
                self.news.notify_all()
        with self.news:
            self.log_ended = True
            self.news.notify_all()

    def log(self):
        with self.news:
            return "\n".join(self.lines)

    def wait_log(self, pattern, seconds=DEADLINE):
        """Until the log matches; the match."""
        def found():
            return re.search(pattern, "\n".join(self.lines))
        with self.news:
            self.news.wait_for(lambda: found() or self.log_ended, seconds)
            check(found(), f"the log has no {pattern!r}:", "\n".join(self.lines)[-2000:] or "(it is empty)")
            return found()

    def wait_end(self, seconds=DEADLINE):
        """Until the process has ended by itself; its status."""
        end = time.monotonic() + seconds
        self.reader.join(seconds)   # to wait for the process itself is to look every now and then
        try:
            status = self.process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s") from None
        self.reader.join(DEADLINE)
        return status

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join(DEADLINE)

    def signal(self, number):
        """With SIGSTOP: until it is so. What is sent then comes in one round, after SIGCONT."""
        self.asked_to_stop |= number in (signal.SIGTERM, signal.SIGINT)
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def stop(self):
        """SIGTERM, and everything there is to complain about as one text or None."""
        faults = []
        for stream in list(self.streams):
            stream.close()
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            status = self.wait_end(2 * DEADLINE)
            if status != self.want_status or not self.asked_to_stop:
                faults.append(f"the server {'stopped' if self.asked_to_stop else 'died'} with status {status}")
        except AssertionError as late:
            faults.append(f"after SIGTERM the server is {late}")
        self.kill()
        trouble = TROUBLE.search(self.log())
        if trouble:
            faults.append("\n    ".join(self.log()[trouble.start():].split("\n")[:9]))
        elif faults:
            faults.append("its last words: " + self.log()[-600:])
        return "; ".join(faults) or None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        fault = self.stop()
        if fault and kind is not Skip:
            raise AssertionError(f"{error}; {fault}" if error else fault) from error

    def index(self, at):
        """The number of a listener, which can be named by its label."""
        return self.labels.index(at) if isinstance(at, str) else at

    def address(self, at=0):
        """(family, address) of a listener, to connect to; always on loopback."""
        host, _, port = self.listeners[self.index(at)].rpartition(":")
        if host == "unix":
            return socket.AF_UNIX, port  # which is a path
        host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
        return (socket.AF_INET6 if "[" in host else socket.AF_INET), (host.strip("[]"), int(port))

    @property
    def port(self):
        return self.address()[1][1]

    @property
    def admin(self):
        """As logged, to be given to somebody: "127.0.0.1:43211"."""
        return self.listeners[self.index("admin")]

    @property
    def register(self):
        return self.listeners[self.index("register")]

    @property
    def gateway(self):
        return self.listeners[self.index("gateway")]

    def status(self, field):
        """A figure of /proc/PID/status in KiB, or None where there is none to trust."""
        if instrumented() or not os.path.exists(f"/proc/{self.pid}/status"):
            return None
        with open(f"/proc/{self.pid}/status") as status:
            return int(re.search(field + r":\s+(\d+)", status.read())[1])

    def cpu_seconds(self):
        """User and system time so far."""
        with open(f"/proc/{self.pid}/stat") as stat:
            ticks = stat.read().rpartition(")")[2].split()
        return (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")

    @contextlib.contextmanager
    def memory_grows_at_most(self, kib):
        """The peak inside the block, against what was resident before it."""
        before = self.status("VmRSS")
        yield
        after = self.status("VmHWM")
        if before and after:
            check(after - before <= kib, f"memory grew by {after - before} KiB, allowed are {kib}")


class Faults:
    """The system under a server, to be broken: see fault.c for the words."""

    WORDS = ["room", "write_errno", "sync_errno", "truncate_errno", "die", "writes", "syncs", "later",
             "sndbuf", "wall",
             "call", "nth", "times", "how", "calls", "struck"]
    CALLS = ["none", "malloc", "recv", "send", "file read", "file write", "log", "accept", "open", "fsync", "ftruncate",
             "fstatat", "renameat", "mkdirat", "socket", "connect", "socketpair", "fork", "getsockname", "shutdown",
             "fcntl", "epoll_create1", "epoll_ctl", "epoll_wait", "poll", "SSL_new", "SSL_CTX_new", "SSL_read",
             "SSL_write", "SHA256", "RAND_bytes"]
    CUT = -1    # an errno: one byte is read or written
    EVER = 2**31 - 1
    building = threading.Lock()

    @classmethod
    @functools.lru_cache
    def library(cls):
        here = os.path.join(ROOT, "test")
        os.makedirs(os.path.join(here, "build"), exist_ok=True)
        made = os.path.join(here, "build", f"fault-{os.getpid()}.so")
        done = subprocess.run([*shlex.split(os.environ.get("CC", "cc")), "-O1", "-shared", "-fPIC", "-o", made,
                               os.path.join(here, "fault.c"), "-ldl"], capture_output=True)
        check(done.returncode == 0, done.stderr.decode())
        final = os.path.join(here, "build", "fault.so")
        os.rename(made, final)
        return final

    def __init__(self, parent):
        with self.building:
            library = self.library()
        path = os.path.join(parent, "faults")
        with open(path, "wb") as table:
            table.write(bytes(4 * len(self.WORDS)))
        with open(path, "r+b") as table:
            self.__dict__["table"] = memoryview(mmap.mmap(table.fileno(), 0))
        self.none()
        # A sanitizer wants to be the first library, and works as the second one too.
        self.__dict__["env"] = {"LD_PRELOAD": library, "FAULTS": path, "ASAN_OPTIONS": ":".join(
            filter(None, [os.environ.get("ASAN_OPTIONS"), "verify_asan_link_order=0"]))}

    def __getattr__(self, word):
        at = 4 * self.WORDS.index(word)
        return int.from_bytes(self.table[at:at + 4], byte_order(), signed=True)

    def __setattr__(self, word, value):
        at = 4 * self.WORDS.index(word)
        self.table[at:at + 4] = value.to_bytes(4, byte_order(), signed=True)

    def set(self, **words):
        for word in sorted(words, key=lambda w: w == "room"):  # which arms the others
            setattr(self, word, words[word])

    def none(self):
        self.set(room=-1, write_errno=0, sync_errno=0, truncate_errno=0, die=0, sndbuf=0, wall=0, call=0)

    def fail(self, call, how, nth=1, times=EVER):
        """So many of these calls fail, from the n-th on."""
        self.call = 0
        self.set(nth=nth, times=times, how=how, calls=0, struck=0)
        self.call = self.CALLS.index(call)


# ---------------------------------------------------------------------------
# Bytes in and out
# ---------------------------------------------------------------------------

class Stream:
    """A TCP or Unix connection that is read with a deadline."""

    def __init__(self, server, at=0, source=None, rcvbuf=None, tls=None):
        """`at`: the number of the listener, or its label. `tls` is a context; without one, a TLS port
        is trusted. False: in plain text."""
        family, address = server.address(at)
        self.sock = socket.socket(family)
        self.sock.settimeout(DEADLINE)
        if rcvbuf:  # before connecting, so that the window is never larger
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        if family != socket.AF_UNIX:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if source:
            self.sock.bind((source, 0))
        self.sock.connect(address)
        if tls or tls is None and server.tls[server.index(at)]:
            self.sock = (tls or trusting()).wrap_socket(self.sock, server_hostname="localhost")
        self.streams = server.streams
        self.streams.add(self)
        self.buffer = b""
        self.ended = False

    def send(self, data):
        """False when the server has closed: what it said before is still to be read."""
        try:
            self.sock.sendall(data)
            return True
        except (ConnectionError, ssl.SSLError):
            return False
        except TimeoutError:
            raise AssertionError("the server does not read") from None

    def more(self, seconds=DEADLINE):
        """Read what there is. False at the end of the stream, reset or not."""
        self.sock.settimeout(seconds)
        try:
            data = b"" if self.ended else self.sock.recv(1 << 18)
        except TimeoutError:
            raise AssertionError(f"no answer in {seconds:g} s") from None
        except (ConnectionError, ssl.SSLError):
            data = b""
        self.sock.settimeout(DEADLINE)
        self.ended = self.ended or not data
        self.buffer += data
        return not self.ended

    def peek(self, n):
        while len(self.buffer) < n:
            check(self.more(), f"the connection ended with {self.buffer[:200]!r}, wanted {n} bytes")
        return self.buffer[:n]

    def take(self, n):
        data, self.buffer = self.peek(n), self.buffer[n:]
        return data

    def take_line_end(self, mark=b"\r\n\r\n"):
        """Everything up to and with `mark`."""
        while mark not in self.buffer:
            check(self.more(), f"the connection ended with {self.buffer[:200]!r}, wanted {mark!r}")
        return self.take(self.buffer.index(mark) + len(mark))

    def expect_end(self, seconds=DEADLINE):
        """The server closes, and says nothing more before it does."""
        while self.more(seconds):
            pass
        check(not self.buffer, "more came before the end:", self.buffer[:200])

    def close(self):
        with contextlib.suppress(OSError):   # now: a program that another case starts has a copy, until it runs
            self.sock.shutdown(socket.SHUT_WR)
        self.sock.close()
        self.streams.discard(self)

    def reset(self):
        """End with a TCP reset, as a crashed or unplugged peer would."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        ctypes.CDLL(None).connect(self.sock.fileno(), bytes(16), 16)   # AF_UNSPEC; now, as above
        self.sock.close()
        self.streams.discard(self)


# ---------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------

Answer = collections.namedtuple("Answer", "status headers body")


def get(path="/", *lines, method="GET", version="1.1"):
    """The bytes of a request; `lines` are header lines after Host."""
    head = [f"{method} {path} HTTP/{version}", "Host: localhost", *lines]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n"


class Http(Stream):
    def answer(self, method="GET"):
        """The next response. Header names in lower case; a repeated one is a fault."""
        head = self.take_line_end().decode("latin-1").split("\r\n")
        check(re.fullmatch(r"HTTP/1\.[01] \d{3} [ -~]+", head[0]), "status line", head[0])
        headers = {}
        for line in filter(None, head[1:]):
            name, colon, value = line.partition(":")
            check(colon and name.lower() not in headers, "header line", line)
            headers[name.lower()] = value.strip()
        status = int(head[0].split()[1])
        if method == "HEAD" or status == 101:
            return Answer(status, headers, b"")
        check("content-length" in headers, "no Content-Length in", head)
        return Answer(status, headers, self.take(int(headers["content-length"])))

    def ask(self, *request, **more):
        self.send(get(*request, **more))
        return self.answer(more.get("method", "GET"))


def answer_and_end(server, raw, seconds=DEADLINE):
    """Send raw bytes; one answer, then the end of the connection. For refusals."""
    with contextlib.closing(Http(server)) as http:
        http.send(raw)
        answer = http.answer()
        http.expect_end(seconds)
        return answer


# ---------------------------------------------------------------------------
# WebSocket
# ---------------------------------------------------------------------------

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
KEY = base64.b64encode(b"sixteen bytes ..").decode()
ACCEPT = base64.b64encode(hashlib.sha1(
    (KEY + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()).decode()
UPGRADE = ("Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13")


def masked(key, payload):
    """RFC 6455 5.3, as one exclusive or of two long numbers: Python is slow by the byte."""
    stream = (key * (len(payload) // 4 + 1))[:len(payload)]
    return (int.from_bytes(stream, "big") ^ int.from_bytes(payload, "big")).to_bytes(len(payload), "big")


def frame(opcode, payload=b"", fin=1, rsv=0, mask=b"\x12\xa4\x7e\x01", form=None, claim=None):
    """One frame, with every bit under control.

    mask   four bytes, or None for none
    form   7, 16 or 64 bits of length (default: the shortest that fits)
    claim  what the length says, when that is not the truth
    """
    if isinstance(payload, str):
        payload = payload.encode()
    length = len(payload) if claim is None else claim
    form = form or (7 if length < 126 else 16 if length < 65536 else 64)
    head = bytes([fin << 7 | rsv << 4 | opcode])
    bit = 0x80 if mask is not None else 0
    if form == 7:
        head += bytes([bit | length])
    elif form == 16:
        head += struct.pack(">BH", bit | 126, length)
    else:
        head += struct.pack(">BQ", bit | 127, length)
    return head + (payload if mask is None else mask + masked(mask, payload))


def close_frame(code, reason=""):
    return frame(CLOSE, struct.pack(">H", code) + (reason.encode() if isinstance(reason, str) else reason))


class Ws(Http):
    """A WebSocket client that also can misbehave.

    Every frame of the server is checked (final, unmasked, no reserved bits, no
    longer length than needed, UTF-8). Its pings are answered unless told not to.
    """

    def __init__(self, server, path="/", *lines, open=True, answer_pings=True, **stream):
        super().__init__(server, **stream)
        self.early = collections.deque()  # messages read while waiting for something else
        self.answer_pings = answer_pings
        self.id = self.handshake = None
        if open:
            self.send(get(path, *UPGRADE, *lines))
            self.finish_handshake()

    def finish_handshake(self):
        self.handshake = self.answer()
        check(self.handshake.status == 101, "handshake answered by", self.handshake)
        check(self.handshake.headers.get("sec-websocket-accept") == ACCEPT, self.handshake.headers)

    def next_frame(self):
        """(opcode, payload) of the next frame, whatever it is."""
        first, second = self.take(2)
        check(first & 0xF0 == 0x80, f"first byte {first:#x}: not final or with reserved bits")
        check(first & 15 in (TEXT, CLOSE, PING, PONG), f"opcode {first & 15}")
        check(second < 128, "a masked frame from the server")
        length = second
        if second == 126:
            length = struct.unpack(">H", self.take(2))[0]
            check(length > 125, f"length {length} in 16 bits")
        elif second == 127:
            length = struct.unpack(">Q", self.take(8))[0]
            check(length > 65535, f"length {length} in 64 bits")
        return first & 15, self.take(length)

    def event(self):
        """The next frame that is not the server's ping; texts as parsed JSON."""
        while True:
            opcode, payload = self.next_frame()
            if opcode == PING and self.answer_pings:
                self.send(frame(PONG, payload))
                continue
            return opcode, json.loads(payload.decode("utf-8")) if opcode == TEXT else payload

    # -- messages ----------------------------------------------------------

    def send_json(self, message=None, **fields):
        self.send(frame(TEXT, json.dumps(message or fields, ensure_ascii=False)))

    def message(self):
        """The next JSON message; a server's JSON ping is answered and skipped."""
        while True:
            if self.early:
                return self.early.popleft()
            opcode, message = self.event()
            check(opcode == TEXT, f"wanted a message, got opcode {opcode}", message)
            if message == {"type": "ping"} and self.answer_pings:
                self.send_json(type="pong")
                continue
            return message

    def expect(self, type, **fields):
        """The next message is of this type and has these fields, among others."""
        message = self.message()
        good = message.get("type") == type and all(message.get(k) == v for k, v in fields.items())
        check(good, "wanted", type, fields, "got", str(message)[:500])
        return message

    def expect_error(self, code, *words, ref=None):
        """An error whose sentence for people holds these words, and its ref."""
        message = self.expect("error", code=code)
        for word in words:
            check(word in message["message"], f"the message does not say {word!r}:", message)
        check(message.get("ref") == ref, "ref is not", ref, "in", message)
        return message

    def fence(self):
        """Wait until the server has handled all that was sent, and keep what came.

        One ping is not enough for "and nothing came": pong and broadcast may
        change places within one round of the server's loop, so there are two.
        """
        for payload in (b"fence 1", b"fence 2"):
            self.send(frame(PING, payload))
            while True:
                opcode, event = self.event()
                if opcode == PONG:
                    check(event == payload, "pong", event)
                    break
                check(opcode == TEXT, f"wanted a pong, got opcode {opcode}", event)
                if event != {"type": "ping"}:
                    self.early.append(event)
        return self

    def expect_nothing(self):
        self.fence()
        check(not self.early, "wanted nothing, got", list(self.early)[:3])

    def expect_close(self, *codes, skip=False):
        """A close frame with one of these codes, then the end of TCP; the reason."""
        opcode, event = self.event()
        while skip and opcode != CLOSE:
            opcode, event = self.event()
        check(opcode == CLOSE, f"wanted close {codes}, got opcode {opcode}", event)
        if codes == (None,):
            check(event == b"", "wanted an empty close frame, got", event)
        else:
            check(len(event) >= 2 and struct.unpack(">H", event[:2])[0] in codes, f"wanted close {codes}, got", event)
        self.expect_end()
        self.close()
        return event[2:].decode("utf-8")

    # -- chat --------------------------------------------------------------

    def login(self, name, room, **more):
        """Log in and take the answer; keeps `id`."""
        self.send_json(type="login", client_name=name, room_id=room, **more)
        while True:
            message = self.message()
            check(message["type"] in ("login", "logout", "say"), "login answered by", message)
            if "client_list" in message:
                self.id = message["client_id"]
                return message

    def say(self, content, to="all", **more):
        self.send_json(type="say", to_client_id=to, to_client_name="", content=content, **more)


ROOM_NUMBERS = itertools.count(1)


def new_room():
    """A room that nobody was in: somebody else's end may still be on its way to an old one."""
    return f"room {next(ROOM_NUMBERS)}"


def join(server, room, *names, **stream):
    """New clients in a room, one after another, with the news of it taken."""
    clients = []
    for name in names:
        newcomer = Ws(server, **stream)
        newcomer.login(name, room)
        for earlier in clients:
            earlier.expect("login", client_id=newcomer.id)
        clients.append(newcomer)
    return clients if len(names) > 1 else clients[0]


def expect_nothing(*clients):
    """None of them gets anything, whoever of them caused it."""
    for client in clients:
        client.fence()
    for client in clients:
        client.expect_nothing()


class Bystander:
    """Two people who keep talking while something happens to the server.

    Each word must arrive within a deadline, or the `with` block fails. They
    come from an address of their own, so that they never share in a limit.
    """

    def __init__(self, server, room="bystanders", patience=DEADLINE):
        self.pair = join(server, room, "by", "stander", source="127.0.0.99")
        self.patience, self.latencies, self.fault = patience, [], None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.talk)

    def talk(self):
        speaker = self.pair[0]
        try:
            while True:
                word = f"word {len(self.latencies)}"
                begin = time.monotonic()
                speaker.say(word)
                for client in self.pair:
                    client.expect("say", content=word)
                self.latencies.append(time.monotonic() - begin)
                check(self.latencies[-1] < self.patience, f"a word took {self.latencies[-1]:.2f} s")
                if self.over.wait(0.03):
                    return
        except (AssertionError, OSError, ValueError) as error:
            self.fault = f"a bystander was hurt: {error}"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, kind, error, trace):
        self.over.set()
        self.thread.join()
        for client in self.pair:
            client.close()
        if self.fault and kind is not Skip:
            raise AssertionError(f"{error}; {self.fault}" if error else self.fault) from error


# ---------------------------------------------------------------------------
# The runner
# ---------------------------------------------------------------------------

Case = collections.namedtuple("Case", "name function serial")
CASES = []


def case(*options, rows=None, serial=False, around=None, **server):
    """Register a case.

    options  of the server that is started for it, when the function takes `s`
    rows     a table: the function is called with each row (first column: a name)
    serial   needs the machine for itself (it measures, or takes all of it)
    around   a context manager of the server, such as Bystander, held meanwhile
    server   keywords of Server: env, shell, cwd
    """
    def register(function):
        def whole():
            if "s" not in inspect.signature(function).parameters:
                return each_row(function, rows)
            with Server(*options, **server) as s, around(s) if around else contextlib.nullcontext():
                each_row(function, rows, s)
        CASES.append(Case(function.__name__, whole, serial))
        return function
    return register


def explain(error):
    """What went wrong, and in which lines, but for those of this file."""
    lines = [f"{os.path.basename(f.filename)}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)
             if f.filename != __file__]
    kind = "" if type(error) is AssertionError else f"{type(error).__name__} "
    return f"{kind}{error} ({', '.join(lines[-2:])})" if lines else f"{kind}{error}"


def each_row(function, rows, s=None):
    """Call it for each row; what a row has opened is closed before the next."""
    faults, server = [], [s] if s else []
    for row in [()] if rows is None else rows:
        if s and s.process.poll() is not None:
            faults.append("the other rows had no server any more")
            break
        before = set(s.streams) if s else set()
        try:
            function(*server, *row)
        except (AssertionError, OSError, ValueError) as error:
            if rows is None:
                raise
            faults.append(f"[{row[0]}] {explain(error)}")
        for stream in set(s.streams) - before if s else ():
            stream.close()
    check(not faults, f"{len(faults)} of {len(rows or [1])} rows:", "\n    ".join(["", *faults]))


def main():
    """Run the cases whose name holds one of the arguments (default: all)."""
    prefix = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    wanted = [a for a in sys.argv[1:] if a != "--list"]
    cases = [c for c in CASES if not wanted or any(w in f"{prefix}.{c.name}" for w in wanted)]
    if "--list" in sys.argv:
        print("\n".join(f"{prefix}.{c.name}" for c in cases))
        return 0
    if not cases or not os.access(XCHAT, os.X_OK):
        print(f"{prefix}: " + (f"no program {XCHAT}" if cases else f"no case has {wanted}"), file=sys.stderr)
        return 1
    printing = threading.Lock()

    def verdict(one):
        try:
            one.function()
            line = f"ok {prefix}.{one.name}"
        except Skip as why:
            line = f"skip {prefix}.{one.name}: {why}"
        except Exception as error:  # a fault of the test itself is a failure too
            line = f"FAIL {prefix}.{one.name}: {explain(error)}"
        with printing:
            print(line, flush=True)
        return not line.startswith("FAIL")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        good = list(pool.map(verdict, [c for c in cases if not c.serial]))
    good += [verdict(c) for c in cases if c.serial]
    return 0 if all(good) else 1
