"""TLS: the same chat, and what is special when its bytes are encrypted.

The whole of chat.py runs over TLS too (see test/run). The certificates in this
directory are for these tests and nothing else: everybody has their keys.
"""

import base64
import contextlib
import ctypes
import functools
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time

from harness import (ACCEPT, CERTIFICATE, CLOSE, DEADLINE, SLOW, TEXT, UPGRADE, Bystander, Http, Server, Skip, Stream,
                     Ws, case, check, frame, get, instrumented, join, main, new_keys, openssl, run, trusting, until)

OTHER = os.path.join(os.path.dirname(CERTIFICATE), "other.pem")
TLS = ("--tls-cert", CERTIFICATE)


def subject(s):
    """The name in the certificate that is served now."""
    context = trusting(OTHER)
    context.load_verify_locations(CERTIFICATE)
    with contextlib.closing(Stream(s, tls=context)) as stream:
        return dict(field[0] for field in stream.sock.getpeercert()["subject"])["commonName"]


def refused(s, **settings):
    """Why a client with these settings does not get in."""
    try:
        Stream(s, tls=trusting(**settings)).close()
    except (ssl.SSLError, ConnectionError) as error:
        return str(error)
    raise AssertionError(f"{settings} was let in")


@case(*TLS, rows=[("1.2", ssl.TLSVersion.TLSv1_2), ("1.3", ssl.TLSVersion.TLSv1_3)])
def versions(s, name, version):
    """The page and the chat, over each version."""
    context = trusting(minimum_version=version, maximum_version=version)
    http = Http(s, tls=context)
    check(http.sock.version() == "TLSv" + name, http.sock.version())
    check(b"<title>" in http.ask().body, "no page")
    ann, bob = join(s, "room", "Ann", "Bob", tls=context)
    ann.say("hello")
    bob.expect("say", content="hello")


@case(*TLS)
def old_versions(s):
    """TLS 1.1 is refused, and the log of it is quiet."""
    context = trusting(minimum_version=ssl.TLSVersion.TLSv1, maximum_version=ssl.TLSVersion.TLSv1_1)
    with contextlib.suppress(ssl.SSLError):
        context.set_ciphers("ALL:@SECLEVEL=0")
    try:
        Stream(s, tls=context)
        raise AssertionError("TLS 1.1 was let in")
    except (ssl.SSLError, ConnectionError):
        pass
    join(s, "room", "Ann")


@case(*TLS)
def next_protocol(s):
    """http/1.1 is chosen of several; who speaks none of ours is refused; who does not ask is let in."""
    for offer, chosen in (["h2", "http/1.1"], "http/1.1"), (["http/1.1"], "http/1.1"), ([], None):
        context = trusting()
        if offer:
            context.set_alpn_protocols(offer)
        http = Http(s, tls=context)
        check(http.sock.selected_alpn_protocol() == chosen, offer, "gave", http.sock.selected_alpn_protocol())
        check(http.ask("/health").body == b"ok\n")
    context = trusting()
    context.set_alpn_protocols(["h2"])
    try:
        Stream(s, tls=context)
        raise AssertionError("h2 alone was let in")
    except ssl.SSLError:
        pass


@case(*TLS)
def tickets(s):
    """A client that comes again resumes its session, also after many others."""
    for version in ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3:
        context = trusting(minimum_version=version, maximum_version=version)
        http = Http(s, tls=context)
        http.ask("/health")   # in 1.3 the ticket comes behind the handshake
        session = http.sock.session
        raw = socket.create_connection(s.address()[1], DEADLINE)
        again = context.wrap_socket(raw, server_hostname="localhost", session=session)
        check(again.session_reused, version, "was not resumed")
        again.close()


@case(*TLS)
def plain_text_on_a_tls_port(s):
    """A readable answer, and the end."""
    for raw in get(), b"\r\n\r\n" + get(), b"GET", b"\0\0\0\0", b"\x17\x03\x03":
        http = Http(s, tls=False)
        http.send(raw)
        answer = http.answer()
        check(answer.status == 400 and b"https://" in answer.body and b"wss://" in answer.body, raw, answer)
        http.expect_end()


@case(*TLS, "--timeout", "1", around=Bystander)
def broken_hellos(s):
    """A hello that is cut, garbled, or followed by garbage hurts nobody."""
    hello, streams, before = hello_bytes(), [], descriptors(s)
    for raw in hello[:1], hello[:5], hello[:-1], hello[:40] + b"\xff" * 500, b"\x16" * 70000, \
            b"\x16\x03\x01\xff\xff" + b"x" * 70000, hello + b"\x15\x03\x03\x00\x02\x02\x28", hello + b"\0" * 100:
        stream = Stream(s, tls=False)
        stream.send(raw)
        streams.append(stream)
    for stream in streams:
        while stream.more(5 * SLOW):   # at the deadline, or before
            pass
        stream.close()
    until(lambda: descriptors(s) == before, "descriptors are left")


def hello_bytes():
    """A client's first flight."""
    inside, outside = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting().wrap_bio(inside, outside, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outside.read()


def descriptors(s):
    """How many the server has open; None where that cannot be seen."""
    path = f"/proc/{s.pid}/fd"
    return None if instrumented() or not os.path.isdir(path) else len(os.listdir(path))


@case(*TLS)
def byte_by_byte(s):
    """A handshake and a request may come in pieces of one byte."""
    inside, outside = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting().wrap_bio(inside, outside, server_hostname="localhost")
    raw = socket.create_connection(s.address()[1], DEADLINE)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def flush():
        for byte in outside.read():
            raw.send(bytes([byte]))

    def patiently(step):
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                flush()
                inside.write(raw.recv(1))
    patiently(client.do_handshake)
    client.write(get("/health"))
    flush()
    answer = b""
    while not answer.endswith(b"ok\n"):
        answer += patiently(client.read)
    raw.close()


@case(*TLS, "--timeout", "2", "--max-per-address", "0", serial=True)
def stalled_handshakes(s):
    """500 who begin and say nothing more: nobody else notices, and all are gone at the deadline."""
    first = Http(s)   # with which the epoll set has come
    first.ask("/health")
    before = descriptors(s)
    with Bystander(s, patience=DEADLINE) as talking:
        stalled = [socket.create_connection(s.address()[1]) for _ in range(500)]
        for i, sock in enumerate(stalled):
            sock.send(hello_bytes()[:100] if i % 2 else b"")
        for sock in stalled:
            sock.settimeout(10 * SLOW)
            with contextlib.suppress(ConnectionError):
                while sock.recv(4096):
                    pass
            sock.close()
    check(len(talking.latencies) > 10, "the talk stood still")
    until(lambda: descriptors(s) == before, "descriptors are left")


@case(*TLS, "--backlog", "16777216", "--max-message", "1000000", "--rate", "0")
def slow_reader(s):
    """What TLS has encrypted but could not send is sent before anything else: nothing is mixed up."""
    ann, eve = join(s, "room", "Ann", "Eve", rcvbuf=4096)
    words = ["%d " % i * (i * 37 % 5000) for i in range(900)] + ["x" * 900000]   # 9 MB: more than sockets take
    for i, word in enumerate(words):
        ann.say(word)
        if i % 7 == 0:   # private answers for the one who does not read
            eve.send_json(type="ping", ref=str(i))
        ann.expect("say", content=word)
    heard, pongs = [], []
    while len(heard) < len(words):
        message = eve.message()
        if message["type"] == "pong":
            pongs.append(int(message["ref"]))
        elif message["type"] == "say":
            heard.append(message["content"])
    check(heard == words, "the words are not the same")
    check(pongs == sorted(pongs), pongs)


@case(*TLS, serial=True)
def asks_faster_than_it_reads(s):
    """Who reads slowly is not read from, also when the kernel has just taken a little of what waits."""
    many, read = Http(s, rcvbuf=4096), 0
    before = s.status("VmRSS")
    while before and read < 1 << 26:
        many.sock.settimeout(0)
        with contextlib.suppress(ssl.SSLWantWriteError):
            while True:
                many.sock.send(get() * 400)
        many.sock.settimeout(DEADLINE)
        read += len(many.sock.recv(1 << 16))
    grown = (s.status("VmRSS") or 0) - (before or 0)
    check(grown < 512, f"memory grew by {grown} KiB")


@case(*TLS, serial=True)
def new_keys_without_end(s):
    """Who does nothing but change keys has one turn in a round, as everybody."""
    ann, eve = Ws(s), socket.create_connection(s.address()[1])
    tls = openssl("SSL_new", openssl("SSL_CTX_new", openssl("TLS_client_method")))
    openssl("SSL_set_fd", tls, eve.fileno())
    check(openssl("SSL_connect", tls).value == 1, "no handshake")
    flood = new_keys(tls, 1000 if instrumented() else 20000, get("/health"))
    eve.sendall(flood)
    begin = time.monotonic()
    ann.fence()
    waited = time.monotonic() - begin
    answer = ctypes.create_string_buffer(1 << 16)
    check(openssl("SSL_read", tls, answer, len(answer)).value > 0 and b"200 OK" in answer.raw, "no answer")
    flooded = time.monotonic() - begin
    eve.close()
    check(waited < flooded / 2, f"another waited {waited:.3f} s of {flooded:.3f} s")


@case(*TLS, serial=True)
def new_keys_unread(s):
    """Who asks for new keys and reads none is not listened to until there is room for one; nobody is busy with that."""
    eve = socket.socket()
    for option, size in (socket.SO_RCVBUF, 4096), (socket.SO_SNDBUF, 1 << 16):
        eve.setsockopt(socket.SOL_SOCKET, option, size)
    eve.connect(s.address()[1])
    tls = openssl("SSL_new", openssl("SSL_CTX_new", openssl("TLS_client_method")))
    openssl("SSL_set_fd", tls, eve.fileno())
    check(openssl("SSL_connect", tls).value == 1, "no handshake")
    upgrade = get("/", *UPGRADE)
    openssl("SSL_write", tls, upgrade, len(upgrade))
    eve.settimeout(SLOW)
    with contextlib.suppress(TimeoutError):
        for _ in range(1 if instrumented() else 40):   # 3 to 5 MB, until our system keeps no more of them
            eve.sendall(new_keys(tls, 10000, ask=True))

    def quiet():
        before = s.cpu_seconds()
        time.sleep(0.5)
        return s.cpu_seconds() - before < 0.1
    until(quiet, "it is still busy", DEADLINE)
    join(s, "room", "Ann")
    eve.close()


@case(*TLS)
def large_input(s):
    """Messages over many records, and many messages in one record."""
    ann, bob = join(s, "room", "Ann", "Bob")
    ann.say("x" * 60000)
    bob.expect("say", content="x" * 60000)
    ann.send(b"".join(frame(TEXT, '{"type":"ping","ref":"%d"}' % i) for i in range(90)))
    ann.expect("say")
    for i in range(90):
        ann.expect("pong", ref=str(i))


@case(*TLS)
def goodbye(s):
    """A close frame, and TLS's own goodbye, come before the end; who just hangs up hurts nobody."""
    ann, bob, eve = join(s, "room", "Ann", "Bob", "Eve")
    ann.sock.suppress_ragged_eofs = False
    ann.send(frame(CLOSE, b"\x03\xe8"))
    check(ann.next_frame() == (CLOSE, b"\x03\xe8"), "no close frame")
    check(ann.sock.recv(10) == b"", "no goodbye of TLS")   # raises if there was none
    bob.expect("logout", from_client_id=ann.id)
    eve.reset()
    bob.expect("logout", from_client_id=eve.id)
    last = Ws(s)
    last.login("Last", "room")
    bob.expect("login")
    raw = socket.socket(fileno=os.dup(last.sock.fileno()))
    raw.shutdown(socket.SHUT_WR)   # without TLS's goodbye
    bob.expect("logout", from_client_id=last.id)
    raw.close()


@case(*TLS, "--rate", "0", "--backlog", str(64 << 20))
def goodbye_and_reset(s):
    """Who says goodbye with a lot unread, and then resets, is gone, and the server goes on."""
    mute, ann = Ws(s, rcvbuf=4096), join(s, "room", "Ann")
    mute.login("Mute", "room")
    ann.expect("login")
    for _ in range(150):
        ann.say("x" * 60000)
        ann.expect("say")
    mute.sock.settimeout(0)
    with contextlib.suppress(ssl.SSLError):   # what was said stands in front of the server's goodbye
        mute.sock.unwrap()
    ann.expect("logout", from_client_id=mute.id)
    mute.reset()
    ann.fence()


@case()
def new_certificate():
    """SIGHUP: a new certificate for who comes, and nobody is dropped. A bad one changes nothing, and the log says so."""
    with tempfile.TemporaryDirectory() as d:
        path = os.path.join(d, "cert.pem")
        shutil.copy(CERTIFICATE, path)
        with Server("--tls-cert", path) as s:
            ann, bob = join(s, "room", "Ann", "Bob")
            check(subject(s) == "localhost", subject(s))
            shutil.copy(OTHER, path)
            check(subject(s) == "localhost", "read without being told")
            s.signal(signal.SIGHUP)
            s.wait_log("read again")
            check(subject(s) == "other", "the old certificate is served")
            with open(path, "w") as file:
                file.write("nothing\n")
            s.signal(signal.SIGHUP)
            s.wait_log(f"(?m)warn.*--tls-cert {path}")
            check(subject(s) == "other", "the last good certificate has gone")
            ann.say("hello")
            bob.expect("say", content="hello")


@case()
def two_ports():
    """Plain text and TLS side by side, in one room; a port of each kind in any order."""
    with Server(*TLS, "--bind", "plain:127.0.0.1:0", "--bind", "127.0.0.1:0", "--bind", "tls:[::1]:0") as s:
        check(s.tls == [False, True, True], s.tls)
        ann, bob, eve = (Ws(s, at=at) for at in range(3))
        for client, name in (ann, "Ann"), (bob, "Bob"), (eve, "Eve"):
            client.login(name, "room")
        ann.say("hello")
        eve.expect("say", content="hello")


@case(rows=[(option, option, address) for option, address in (
    ("--bind", "tls:unix:/tmp/nosuch/socket"), ("--register", "tls:127.0.0.1:0"), ("--gateway", "tls:127.0.0.1:0"))])
def never_tls(name, option, address):
    """What would be served in plain text all the same is refused."""
    status, _, err = run(*TLS, option, address)
    check(status == 2 and f"{option}: '{address}'" in err.splitlines()[-1], status, err)


@case()
def files():
    """Status 1 and one line that names the option when certificate and key cannot be used."""
    with tempfile.TemporaryDirectory() as d:
        with open(CERTIFICATE) as file:
            certificate, _, key = file.read().partition("-----BEGIN PRIVATE KEY-----")
        paths = {}
        ed25519 = base64.b64encode(bytes.fromhex("302e020100300506032b657004220420") + os.urandom(32)).decode()
        begin, end = "-----BEGIN PRIVATE KEY-----", "\n-----END PRIVATE KEY-----\n"
        for name, text in ("cert", certificate), ("key", begin + key), ("empty", ""), ("ed25519", begin + "\n" + ed25519 + end):
            paths[name] = os.path.join(d, name)
            with open(paths[name], "w") as file:
                file.write(text)
        with Server("--tls-cert", paths["cert"], "--tls-key", paths["key"]) as s:
            join(s, "room", "Ann")
        for options in (["--tls-cert", "/nosuch/file"], ["--tls-cert", paths["empty"]], ["--tls-cert", paths["cert"]],
                        ["--tls-cert", paths["cert"], "--tls-key", OTHER], ["--tls-cert", d],
                        ["--tls-cert", paths["cert"], "--tls-key", paths["ed25519"]],   # a key of another kind
                        ["--tls-cert", paths["cert"], "--tls-key", paths["empty"]]):
            status, _, err = run(*options)
            check(status == 1 and err.count("\n") == 1 and "--tls-cert" in err, options, status, err)
        for options in ["--bind", "tls:127.0.0.1"], ["--tls-cert", ""], ["--tls-key", CERTIFICATE]:
            status, _, err = run(*options)
            check(status == 2 and err.count("\n") == 1, options, status, err)


# ---------------------------------------------------------------------------
# The clients of others. A browser is in browser.py (over_tls), nginx in proxy.py.
# ---------------------------------------------------------------------------

def outside(*line, say=b""):
    """(status, all it prints) of a program that is not ours."""
    if not shutil.which(line[0]):
        raise Skip(f"{line[0]} is not installed")
    try:
        done = subprocess.run(list(map(str, line)), input=say, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=2 * DEADLINE)
    except subprocess.TimeoutExpired as late:
        raise AssertionError(f"{line} does not end: {late.output}") from None
    return done.returncode, done.stdout.decode(errors="replace")


@contextlib.contextmanager
def of_a_ca(*options):
    """(server, CA, another CA): between CA and certificate is one that clients do not know, so it has to be sent."""
    with tempfile.TemporaryDirectory() as d:
        def new(name, by=None, *more):
            signed = ("-CA", f"{d}/{by}.pem", "-CAkey", f"{d}/{by}.key") if by else ()
            status, out = outside("openssl", "req", "-x509", "-nodes", "-newkey", "ec",
                                  "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", 9, "-subj", f"/CN={name}", "-keyout", f"{d}/{name}.key",
                                  "-out", f"{d}/{name}.pem", *signed, *more)
            check(status == 0, out)
        new("root"), new("stranger"), new("middle", "root")
        new("localhost", "middle", "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=CA:FALSE")
        with open(f"{d}/chain.pem", "wb") as chain:
            for name in "localhost", "middle":
                with open(f"{d}/{name}.pem", "rb") as file:
                    chain.write(file.read())
        with Server("--tls-cert", f"{d}/chain.pem", "--tls-key", f"{d}/localhost.key", *options) as s:
            yield s, f"{d}/root.pem", f"{d}/stranger.pem"


@case()
def openssl_s_client():
    """It verifies the chain, and speaks TLS 1.2 and 1.3; an older one, another CA, a second handshake are refused."""
    with of_a_ca() as (s, ca, stranger):
        client = functools.partial(outside, "openssl", "s_client", "-connect", f"127.0.0.1:{s.port}", "-servername",
                                   "localhost", "-verify_hostname", "localhost", "-verify_return_error")
        asking = get("/health", "Connection: close")
        for version in "-tls1_2", "-tls1_3":
            status, out = client("-CAfile", ca, version, "-ign_eof", "-alpn", "h2,http/1.1", say=asking)
            check(status == 0 and "Verify return code: 0" in out and out.find("\nok\n") > 0, status, out)
            check("ALPN protocol: http/1.1" in out and "Secure Renegotiation IS" in out, out)
            status, out = client("-CAfile", stranger, version, say=asking)
            check(status != 0 and "\nok\n" not in out, "another CA:", out)
        status, out = client("-CAfile", ca, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0", say=asking)
        check(status != 0 and "\nok\n" not in out, "TLS 1.1:", out)
        status, out = client("-CAfile", ca, "-tls1_2", say=b"R\n")
        check("RENEGOTIATING" in out and "no renegotiation" in out, "renegotiation:", out)
        ann, bob = join(s, "room", "Ann", "Bob", tls=trusting(ca))
        ann.say("hello")
        bob.expect("say", content="hello")


@case()
def curl():
    """The page, a kept connection and an upgrade; it refuses us where it does not know the CA."""
    with of_a_ca() as (s, ca, stranger):
        site = f"https://localhost:{s.port}"
        client = functools.partial(outside, "curl", "-sS", "--resolve", f"localhost:{s.port}:127.0.0.1",
                                   "--max-time", DEADLINE)
        status, out = client("--cacert", ca, site + "/", site + "/health", "-w", "[%{http_code} %{num_connects}]")
        check(status == 0 and "<title>" in out and "[200 1]" in out and out.endswith("ok\n[200 0]"), status, out[-300:])
        status, out = client("--cacert", stranger, site + "/")
        check(status == 60, "another CA:", status, out)
        lines = [word for line in UPGRADE for word in ("-H", line)]
        status, out = client("--cacert", ca, "--http1.1", "-i", "--max-time", SLOW, *lines, site + "/")
        check("HTTP/1.1 101 " in out and ACCEPT in out, "upgrade:", status, out)


@case(*TLS, serial=True)
def memory(s):
    """An idle TLS client costs little; what those who left had is there for others."""
    clients = join(s, "room", "Ann")
    before = s.status("VmRSS")
    if before is None:
        return
    many = [Ws(s) for _ in range(200)]
    for i, client in enumerate(many):
        client.login("Eve", f"room {i}")
    each = (s.status("VmRSS") - before) / 200
    check(each < 16, f"{each:.1f} KiB each")
    for client in many:
        client.close()
    peak = s.status("VmRSS")
    again = [Ws(s) for _ in range(200)]
    until(lambda: s.status("VmRSS") < peak + 500, "memory of those who left is not used again")
    check(len(again) == 200)
    clients.close()


if __name__ == "__main__":
    raise SystemExit(main())
