"""Operation: options, limits, listeners, proxies, HTTP, signals, logs."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time

from harness import (PING, SLOW, TEXT, UPGRADE, WRAP, Bystander, Http, Server, Skip, Stream, Ws,
                     answer_and_end, case, check, close_frame, command, expect_nothing, frame, get, instrumented,
                     join, main, new_room, run, until)

# ---------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------

NUMBERS = [  # option, default, least, most
    ("--port", 7272, 0, 65535),
    ("--max-message", 65536, 128, 1 << 24),
    ("--max-head", 8192, 256, 1 << 20),
    ("--max-clients", 10000, 1, 1000000),
    ("--max-per-address", 256, 0, 1000000),
    ("--rate", 50, 0, 1000000),
    ("--burst", 100, 1, 1000000),
    ("--max-rooms", 65536, 1, 1 << 24),
    ("--backlog", 1048576, 4096, 1 << 28),
    ("--ping", 25, 1, 86400),
    ("--timeout", 10, 1, 3600),
]


def refused(status, cause, *options, env=None):
    """It does not start: this status, and one line on stderr that matches the cause."""
    got, out, err = run(*options, env=env)
    check(got == status, f"status {got}, wanted {status}:", err)
    check(out == "" and re.fullmatch(r"[ -~]+\n", err), "wanted one line on stderr, got", repr(err), repr(out))
    check(re.search(cause, err), "the line does not name", cause, "but says", err)


@case()
def help():
    """--help goes to stdout, names every option with its default, and fits a screen."""
    for flag in "-h", "--help":
        status, out, err = run(flag)
        check(status == 0 and err == "", status, err)
        check(len(out.splitlines()) <= 54 and max(map(len, out.splitlines())) <= 100, "does not fit:", out)
        for option, default, _, _ in NUMBERS:
            check(re.search(rf"\n .*{option} .*\({default}\)\n", out), option, "or its default is not in --help")
        for option in "--bind", "--trust-proxy", "--verbose", "--help", "--version":
            check(option in out, option, "is not in --help")


@case()
def version():
    """One line with the name and a number."""
    for flag in "-V", "--version":
        status, out, err = run(flag)
        check(status == 0 and err == "" and re.fullmatch(r"xchat \S*\d\S*.*\n", out), status, out, err)


@case(rows=[(option, least, most) for option, _, least, most in NUMBERS])
def ranges(option, least, most):
    """Each number is taken up to both ends of its range and refused past them."""
    for value in {least, most} - {65535 if option == "--port" else None}:  # that one may be taken
        with Server(option, value):
            pass
    for value in least - 1, most + 1, 2**32 + least:
        refused(2, option, option, value)


@case(rows=[(repr(text), text) for text in (
    "", " ", "x", "5x", "+5", "-5", " 5", "5 ", "0x400", "1e3", "5.0", "5,5", str(2**64 + 5), "9" * 1000,
    "--help", "\u0665")])
def not_a_number(name, text):
    """All numbers go through one reader, which takes digits and nothing else."""
    refused(2, "--max-rooms", "--max-rooms", text)


@case(rows=[
    ("unknown long", ["--nosuch"], "--nosuch"),
    ("unknown short", ["-x"], "-x"),
    ("beginning of one", ["--max-mess", "1024"], "--max-mess"),
    ("value missing", ["--port"], "--port"),
    ("unknown after good ones", ["-v", "--port", "0", "--nosuch"], "--nosuch"),
    ("no option", ["file"], "file"),
    ("nothing", [""], ""),
    ("control characters", ["--\x1b[2J\n"], ""),
    ("flag with a value", ["--verbose=1"], "--verbose"),
    ("port of bind", ["--bind", "127.0.0.1:65536"], "--bind"),
    ("port of bind no number", ["--bind", "127.0.0.1:x"], "--bind"),
    ("port without colon", ["--bind", "[::1]7272"], "--bind"),
    ("half an IPv6 address", ["--bind", "[::1"], "--bind"),
    ("unix without path", ["--bind", "unix:"], "--bind"),
    ("unix path too long", ["--bind", "unix:/tmp/" + "x" * 200], "--bind"),
    ("no address", ["--bind", ""], "--bind"),
    ("origin with a slash", ["--origin", "https://a.example,https://b.example/"], "--origin"),
    ("origin without a scheme", ["--origin", "a.example"], "--origin"),
    ("origin of nobody", ["--origin", "https://"], "--origin"),
    ("no proxy", ["--trust-proxy", ""], "--trust-proxy"),
    ("proxy by name", ["--trust-proxy", "proxy"], "--trust-proxy"),
    ("proxy /33", ["--trust-proxy", "10.0.0.0/33"], "--trust-proxy"),
    ("proxy /129", ["--trust-proxy", "::/129"], "--trust-proxy"),
    ("proxy /-1", ["--trust-proxy", "10.0.0.0/-1"], "--trust-proxy"),
    ("proxy /", ["--trust-proxy", "10.0.0.0/"], "--trust-proxy"),
    ("a long key id", ["--apns-key-id", "x" * 33], "--apns-key-id: over 32 bytes"),
    ("a long team id", ["--apns-team-id=" + "x" * 33], "--apns-team-id: over 32 bytes"),
    ("a long topic", ["--apns-topic", "x" * 256], "--apns-topic: over 255 bytes"),
    ("proxy /8x", ["--trust-proxy", "10.0.0.0/8x"], "--trust-proxy"),
])
def wrong_options(name, options, word):
    """Status 2 and one line that names what was wrong."""
    refused(2, word, *options)


@case()
def options_from_the_environment():
    """XCHAT_ and the name in capitals; the command line wins; a wrong one is refused by name."""
    with Server(env={"XCHAT_MAX_ROOMS": "1"}) as s:
        ann, late = join(s, "one", "Ann"), Ws(s)
        late.send_json(type="login", client_name="Bob", room_id="two")
        late.expect_error("limit")
        ann.expect_nothing()
    with Server("--max-rooms", "2", env={"XCHAT_MAX_ROOMS": "1"}) as s:
        expect_nothing(join(s, "one", "Ann"), join(s, "two", "Ann"))
    refused(2, "--max-rooms", env={"XCHAT_MAX_ROOMS": "many"})
    refused(2, "--port", env={"XCHAT_PORT": "65536"})
    for text in "false", "no", "", "2":
        refused(2, "--fsync", env={"XCHAT_FSYNC": text})
    with Server("--verbose", env={"XCHAT_CHECK": "0", "XCHAT_FSYNC": "1", "XCHAT_VERBOSE": "off"}):
        pass
    with Server(env={"XCHAT_NOSUCH": "1", "XCHAT_PORT": "0", "XCHAT_VERSION": "0.1"}):
        pass


@case()
def short_options():
    """-p, -b and -v are --port, --bind and --verbose."""
    with Server("-p", "0", "-b", "127.0.0.1", "-v") as s:
        join(s, "room", "Ann")


@case()
def cannot_start():
    """Status 1 and one line with the cause: port taken, address not ours, no such directory."""
    with Server() as s:
        refused(1, f"--port {s.port}: Address (already )?in use", "--port", s.port)
        refused(1, "192.0.2.1", "--bind", "192.0.2.1")
        refused(1, "--bind a..b, --port", "--bind", "a..b")   # which no name can be
        refused(1, "/nosuch/socket.*: No such file", "--bind", "unix:/nosuch/socket")
        join(s, "room", "Ann")


# ---------------------------------------------------------------------------
# Limits, at and past their value
# ---------------------------------------------------------------------------

def ping_of(size):
    """A JSON message of so many bytes that is answered with a pong."""
    text = '{"type":"ping","x":"%s"}'
    return text % ("x" * (size - len(text) + 2))


@case("--max-message", "2000")
def max_message(s):
    """2,000 bytes are answered, 2,001 end with 1009, in one frame or in two."""
    for cut in 2000, 1000, 1:
        def send(size):
            ann = Ws(s)
            text = ping_of(size)
            ann.send(frame(TEXT, text[:cut], fin=cut >= size) + (frame(0, text[cut:]) if cut < size else b""))
            return ann
        send(2000).expect("pong")
        send(2001).expect_close(1009)
    s.wait_log("--max-message")


@case("--max-head", "2000")
def max_head(s):
    """A head of 2,000 bytes is answered, of 2,001 it is 431."""
    def head(size):
        return get("/health", "X: " + "x" * (size - len(get("/health", "X: "))))
    http = Http(s)
    http.send(head(2000) * 2)
    check([http.answer().status for _ in range(2)] == [200, 200])
    check(answer_and_end(s, head(2001)).status == 431)


def upgrade_status(s, *lines, **stream):
    """What a handshake is answered with: (status, connection, headers)."""
    ws = Ws(s, open=False, **stream)
    answer = ws.ask("/", *UPGRADE, *lines)
    return answer.status, ws, answer.headers


@case("--max-clients", "3")
def max_clients(s):
    """The fourth is told when to come back, and may as soon as one has left."""
    clients = [Ws(s) for _ in range(3)]
    status, late, headers = upgrade_status(s)
    check(status == 503 and headers.get("retry-after", "").isdigit(), status, headers)
    late.expect_end()
    clients[0].send(close_frame(1000))
    clients[0].expect_close(1000)
    until(lambda: upgrade_status(s)[0] == 101, "the place is not free again")
    for client in clients[1:]:
        client.fence()


@case("--max-clients", "2")
def full_house(s):
    """Who is one of so many is served, though more have come behind; and who was too many, if somebody has gone since."""
    first, second, third = Ws(s), Http(s), Http(s)
    check((answer := second.ask("/health")).status == 200, answer)
    check((answer := third.ask("/health")).status == 503, answer)
    third.expect_end()
    third = Http(s)
    second.reset()
    first.fence()
    check((answer := third.ask("/health")).status == 200, answer)


@case("--max-clients", "2", "--max-per-address", "3", "--admin", "127.0.0.1:0")
def orders_in_a_full_house(s):
    """Who is over a limit may not chat, but look at the figures, and kick somebody."""
    ann, bob = join(s, "room", "Ann", "Bob")
    check(upgrade_status(s)[0] == 503)
    with contextlib.closing(Http(s, at="admin")) as full, contextlib.closing(Http(s, at="admin")) as refused:
        for http in full, refused:
            check((answer := http.ask("/metrics")).status == 200, answer)
        kick = '{"client_id":"%s"}' % bob.id
        full.send(get("/api/kick", f"Content-Length: {len(kick)}", method="POST") + kick.encode())
        check((answer := full.answer()).status == 200, answer)
    bob.expect_close(4001)
    ann.expect("logout")


@case("--max-per-address", "0", shell="ulimit -n 256")
def max_clients_by_descriptors(s):
    """Of 256 descriptors 64 are kept: 192 clients come in, and one more is told to wait."""
    fit = int(s.wait_log(r"--max-clients: only (\d+) fit")[1])
    check(fit == 192 or instrumented(), fit)   # valgrind keeps some for itself
    clients = [Ws(s) for _ in range(fit)]
    check(upgrade_status(s)[0] == 503)
    for client in clients:
        client.fence()


@case("--max-per-address", "2")
def max_per_address(s):
    """The third of one address is refused; another address is not its fault."""
    clients = [Ws(s) for _ in range(2)]
    status, late, _ = upgrade_status(s)
    check(status == 429, status)
    late.expect_end()
    others = [Ws(s, source="127.0.0.2") for _ in range(2)]
    check(upgrade_status(s, source="127.0.0.2")[0] == 429)
    clients[0].reset()
    until(lambda: upgrade_status(s)[0] == 101, "the place is not free again")
    for client in (clients[1], *others):
        client.fence()


@case("--max-per-address", "0")
def no_limit_per_address(s):
    """0 is no limit: 300 are more than the default allows."""
    clients = [Ws(s) for _ in range(300)]
    clients[-1].fence()


@case("--rate", "1", "--burst", "5")
def rate_and_burst(s):
    """Five messages at once are fine, five more are refused, and whoever goes on is out."""
    ann = Ws(s)
    ann.send(frame(TEXT, '{"type":"ping"}') * 40)
    answers = []
    while True:
        opcode, event = ann.event()
        if opcode != TEXT:
            break
        answers.append(event.get("code") or event["type"])
    check(answers == ["pong"] * 5 + ["rate_limited"] * (len(answers) - 5) and 5 <= len(answers) - 5 <= 6, answers)
    check(event[:2] == b"\x03\xf0" and len(event) > 2, "closed with", event)
    ann.expect_end()
    s.wait_log("--rate")


@case("--rate", "20", "--burst", "2")
def rate_comes_back(s):
    """A token every 50 ms, and never more than the burst."""
    ann = Ws(s)
    for _ in range(2):
        ann.send(frame(TEXT, '{"type":"ping"}') * 3)
        for answer in "pong", "pong", "error":
            ann.expect(answer)
        time.sleep(0.4)


@case("--rate", "0")
def no_rate_limit(s):
    """0 is no limit."""
    ann = Ws(s)
    ann.send(frame(TEXT, '{"type":"ping"}') * 3000)
    for _ in range(3000):
        ann.expect("pong")


@case("--max-rooms", "2")
def max_rooms(s):
    """A third room is refused until one is empty; those that exist can be entered."""
    ann, bob = join(s, "one", "Ann"), join(s, "two", "Bob")
    late = Ws(s)
    late.send_json(type="login", client_name="Late", room_id="three")
    late.expect_error("limit", "rooms")
    late.login("Late", "two")
    bob.expect("login")
    late.send_json(type="login", client_name="Late", room_id="three")
    late.expect_error("limit", "rooms")
    bob.expect_nothing()
    ann.send_json(type="logout")
    ann.expect("logout")
    ann.login("Ann", "three")
    late.send_json(type="login", client_name="Late", room_id="one")
    late.expect_error("limit", "rooms")


@case(rows=[("in a room", False), ("in private", True)])
def backlog_up_to_its_value(name, private):
    """Who is no more than that behind stays, and gets all of it."""
    with tempfile.TemporaryDirectory() as directory:
        with Server("--bind", f"unix:{directory}/chat", "--rate", "0") as s:  # of which the kernel keeps little
            mute, ann = join(s, "room", "Mute", "Ann")
            for _ in range(17):  # with what is around them 17 words are just below 1 MiB
                ann.say("x" * 61000, to=mute.id if private else "all")
                ann.expect("say")
            for _ in range(17):
                mute.expect("say")
            mute.expect_nothing()


@case("--backlog", "4096")
def much_at_once(s):
    """Who reads is not behind, however much came for it in one round."""
    ann, bob = join(s, "room", "Ann", "Bob")
    word = '{"type":"say","to_client_id":"%s","content":"%s"}' % (bob.id, "x" * 900)
    ann.send(frame(TEXT, word) * 60)
    for client in ann, bob:
        for _ in range(60):
            client.expect("say")


@case("--backlog", "65536", "--rate", "0", around=Bystander)
def backlog_of_private_words(s):
    """Whispers to one who does not read are bounded as well: 1013, and the sender hears that he is gone."""
    ann = join(s, "room", "Ann")
    mute = Ws(s, rcvbuf=4096)
    mute.login("Mute", "elsewhere")
    word = frame(TEXT, '{"type":"say","to_client_id":"%s","content":"%s"}' % (mute.id, "x" * 60000))
    heard = 0
    with s.memory_grows_at_most(12288):
        for said in range(400):
            ann.send(word)
            message = ann.message()
            if message["type"] == "error":
                break
    check(message.get("code") == "no_such_client", str(message)[:200])
    while heard < said:
        heard += mute.message()["type"] == "say"   # each that was not refused
    mute.expect_close(1013, skip=True)


@case("--rate", "0", "--max-per-address", "0", serial=True)
def memory_comes_back(s):
    """After 600 clients with big words in many rooms have left, what is resident is as before."""
    def crowd():
        clients = [Ws(s) for _ in range(600)]
        for i, client in enumerate(clients):
            client.login("n" * 64, f"room {i % 60}")
            client.say("x" * 20000)
        for client in clients:
            client.fence()
            client.close()
        until(lambda: len(join(s, "room 0", "Ann").fence().early) == 0, "somebody is left")
    crowd()
    before = s.status("VmRSS")
    crowd()
    after = s.status("VmRSS")
    check(not before or after - before < 2048, f"{before} KiB before, {after} after")


# ---------------------------------------------------------------------------
# Listeners
# ---------------------------------------------------------------------------

def ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as why:
        raise Skip(f"no IPv6 here ({why})") from None


def chats(s, at=0):
    """Two can talk through this listener."""
    ann, bob = join(s, new_room(), "Ann", "Bob", at=at)
    ann.say("hello")
    bob.expect("say", content="hello")
    ann.close(), bob.close()


@case()
def unix_socket():
    """A path instead of an address; the file goes when the server does."""
    with tempfile.TemporaryDirectory() as directory:
        path = directory + "/chat"
        with Server("--bind", "unix:" + path) as s:
            check(s.listeners == ["unix:" + path], s.listeners)
            chats(s)
            check(Http(s).ask("/health").body == b"ok\n")
        check(not os.path.exists(path), "the socket file is left")


@case()
def stale_unix_socket():
    """A file that a crashed server left is replaced; one that is served, or is no socket, is not."""
    with tempfile.TemporaryDirectory() as directory:
        path = directory + "/chat"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        with Server("--bind", "unix:" + path) as s:
            refused(1, path, "--bind", "unix:" + path)
            chats(s)
        with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waits:
            busy.bind(directory + "/busy")
            busy.listen(0)
            waits.connect(directory + "/busy")   # there is no room for another one
            refused(1, directory + "/busy", "--bind", "unix:" + directory + "/busy")
            check(os.path.exists(directory + "/busy"), "the socket of a program that is busy was removed")
        with open(path, "w") as file:
            file.write("precious")
        refused(1, path, "--bind", "unix:" + path)
        with open(path) as file:
            check(file.read() == "precious", "the file was overwritten")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:   # which cannot be connected to either
            other.bind(directory + "/log")
            refused(1, directory + "/log", "--bind", "unix:" + directory + "/log")
            check(os.path.exists(directory + "/log"), "another program's socket was removed")


@case()
def ipv6_listener():
    """[::1] with a port, and without."""
    ipv6()
    for address in "[::1]:0", "::1":
        with Server("--bind", address) as s:
            check(re.fullmatch(r"\[::1\]:\d+", s.listeners[0]), s.listeners)
            chats(s)


@case()
def several_listeners():
    """Each has its own address and port, all lead to the same rooms."""
    ipv6()
    with tempfile.TemporaryDirectory() as directory:
        with Server("-b", "127.0.0.1", "-b", "[::1]:0", "-b", "127.0.0.2:0", "-b", f"unix:{directory}/chat") as s:
            check(len(s.listeners) == 4, s.listeners)
            for at in range(4):
                chats(s, at)
            ann, bob = join(s, "room", "Ann"), Ws(s, at=1)
            bob.login("Bob", "room")
            ann.expect("login", client_name="Bob")


@case(*["--bind", "127.0.0.1:0"] * 16, "--admin", "127.0.0.1:0", "--gateway", "127.0.0.1:0")
def most_listeners(s):
    """As many as there can be: each is heard."""
    check(len(set(s.listeners)) == 18, s.listeners)
    for at in range(16):
        chats(s, at)
    with contextlib.closing(Http(s, at="admin")) as http:
        check(http.ask("/health").status == 200)


@case(rows=[("loopback", "127.0.0.1", "::1"), ("all addresses", "0.0.0.0", "::")])
def both_stacks_on_one_port(name, v4, v6):
    """IPv4 and IPv6 may have the same port, since the IPv6 socket takes only its own."""
    ipv6()
    with Server() as probe:
        port = probe.port
    with Server("-p", port, "-b", v4, "-b", v6) as s:
        check(s.listeners == [f"{v4}:{port}", f"[{v6}]:{port}"], s.listeners)
        chats(s, 0)
        chats(s, 1)


@case(env={"XCHAT_BIND": None})
def every_address_by_default(s):
    """Without --bind: IPv4 and IPv6, on one port."""
    ipv6()
    s.wait_log("(?s)listening on.*listening on")
    check(sorted(s.listeners) == [f"0.0.0.0:{s.port}", f"[::]:{s.port}"], s.listeners)
    chats(s, 0)
    chats(s, 1)


@case()
def name_with_an_address_twice():
    """Several lines of /etc/hosts may say the same of a name: one listener, and no "address in use" by itself."""
    with tempfile.TemporaryDirectory() as directory:
        with open(directory + "/hosts", "w") as hosts:
            hosts.write("127.0.0.1 localhost chat.test\n127.0.0.1 chat.test\n127.0.0.2 chat.test\n")
        inside = f"mount --bind {directory}/hosts /etc/hosts"
        if subprocess.run(["sh", "-c", f"unshare -m sh -c '{inside}'"], capture_output=True).returncode != 0:
            return   # some containers allow no /etc/hosts of one's own; unit.c does what needs none
        with Server("-b", "chat.test", shell=f"exec unshare -m sh -c '{inside} && exec \"$@\"' sh \"$@\"") as s:
            s.wait_log("(?s)listening on.*listening on")
            check(sorted(s.listeners) == [f"127.0.0.{n}:{s.port}" for n in (1, 2)], s.listeners)
            chats(s, 0)
            chats(s, 1)


@case("-b", "::1", "--max-per-address", "1")
def ipv6_peer_is_an_address(s):
    """Peers on IPv6 are counted as well."""
    ipv6()
    first = Ws(s)
    check(upgrade_status(s)[0] == 429)
    first.fence()


# ---------------------------------------------------------------------------
# Behind a proxy
# ---------------------------------------------------------------------------

HOPS = ", ".join(f"203.0.113.{i}" for i in range(100))
PROXIED = [  # X-Forwarded-For lines of one client, of another, and whether both count as the same address
    ("the same address", ["192.0.2.1"], ["192.0.2.1"], True),
    ("two addresses", ["192.0.2.1"], ["192.0.2.2"], False),
    ("none is the proxy itself", [], ["127.0.0.1"], True),
    ("what the client wrote himself stands left", ["192.0.2.66, 192.0.2.1"], ["192.0.2.67, 192.0.2.1"], True),
    ("the rightmost counts", ["192.0.2.66, 192.0.2.1"], ["192.0.2.66, 192.0.2.2"], False),
    ("proxies of ours are skipped", ["192.0.2.1, 10.1.2.3, 10.1.2.4"], ["192.0.2.1"], True),
    ("but only at the right", ["192.0.2.1, 10.1.2.3, 192.0.2.2"], ["192.0.2.2"], True),
    ("two lines are one list", ["192.0.2.66", "192.0.2.1"], ["192.0.2.1"], True),
    ("two lines, the second of ours", ["192.0.2.1", "10.1.2.3"], ["192.0.2.1"], True),
    ("100 hops", [HOPS + ", 192.0.2.1"], ["192.0.2.1"], True),
    ("100 hops of ours", ["192.0.2.1" + ", 10.0.0.1" * 100], ["192.0.2.1"], True),
    ("white space", ["192.0.2.66 ,\t192.0.2.1 "], ["192.0.2.1"], True),
    ("IPv6 counts by /64", ["2001:db8:1:2::1"], ["2001:db8:1:2:ffff::2"], True),
    ("another /64", ["2001:db8:1:2::1"], ["2001:db8:1:3::1"], False),
    ("IPv6 proxy of ours", ["2001:db8:1:2::1, fd00::1"], ["2001:db8:1:2::1"], True),
    ("IPv4 in IPv6", ["::ffff:192.0.2.1"], ["192.0.2.1"], True),
    *((f"garbage {text[:20]!r}", [text], ["127.0.0.1"], True) for text in (
        "garbage", ",", ", , ,", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1.2.3.4/8", "::1::", "unknown", "_hidden",
        "x" * 4000, "\xff")),
    ("garbage hides what stands left of it", ["192.0.2.1, garbage"], ["127.0.0.1"], True),
]
TRUSTED = ["--trust-proxy", "127.0.0.0/8", "--trust-proxy", "10.0.0.0/8", "--trust-proxy", "fd00::/8"]


@case(rows=PROXIED)
def forwarded_for(name, one, other, same):
    """The address is the rightmost that is not a proxy of ours, as seen by the limit per address."""
    with Server("--max-per-address", "1", *TRUSTED) as s:
        check(upgrade_status(s, *(f"X-Forwarded-For: {line}" for line in one))[0] == 101)
        status = upgrade_status(s, *(f"X-Forwarded-For: {line}" for line in other))[0]
        check(status == (429 if same else 101), status)


@case("--max-per-address", "1", "--trust-proxy", "10.0.0.0/8", "--trust-proxy", "127.0.0.2/32")
def forwarded_for_by_strangers(s):
    """Who is no proxy of ours cannot choose an address."""
    first = Ws(s, "/", "X-Forwarded-For: 192.0.2.1")
    check(upgrade_status(s, "X-Forwarded-For: 192.0.2.2")[0] == 429)
    proxied = [Ws(s, "/", f"X-Forwarded-For: 192.0.2.{i}", source="127.0.0.2") for i in (1, 2)]
    check(upgrade_status(s, "X-Forwarded-For: 192.0.2.1", source="127.0.0.2")[0] == 429)
    for ws in (first, *proxied):
        ws.fence()


@case("--max-per-address", "1", *TRUSTED)
def kept_connection_of_a_proxy(s):
    """It counts for the client it served last, whoever was before."""
    http = Http(s)
    for i in range(50):
        check(http.ask("/health", f"X-Forwarded-For: 192.0.2.{i}").status == 200)
    for i in range(49):
        check(upgrade_status(s, f"X-Forwarded-For: 192.0.2.{i}")[0] == 101, "192.0.2.", i)
    check(upgrade_status(s, "X-Forwarded-For: 192.0.2.49")[0] == 429)
    http.close()
    until(lambda: upgrade_status(s, "X-Forwarded-For: 192.0.2.49")[0] == 101, "the place is not free again")


@case("-v", *TRUSTED)
def forwarded_for_in_the_log(s):
    """The log names the client, not the proxy."""
    ws = Ws(s, "/", "X-Forwarded-For: 192.0.2.66, 2001:db8::7")
    ws.login("Ann", "room")
    ws.close()
    s.wait_log(r"2001:db8::7")
    check("192.0.2.66" not in s.log(), s.log())


# ---------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------

@case()
def page_and_health(s):
    """GET / is the page with a strict policy, /health says ok; HEAD is the same without a body."""
    http = Http(s)
    page = http.ask("/")
    check(page.status == 200 and page.headers["content-type"] == "text/html; charset=utf-8", page.headers)
    check("default-src 'none'" in page.headers["content-security-policy"], page.headers)
    check(b"<html" in page.body.lower(), page.body[:200])
    health = http.ask("/health")
    check(health.status == 200 and health.body == b"ok\n", health)
    for path, answer in ("/", page), ("/health", health):
        head = http.ask(path, method="HEAD")
        check(head.status == 200 and {**head.headers, "date": 0} == {**answer.headers, "date": 0}, head, answer.headers)
    check(http.ask("/health").status == 200, "a body came after HEAD")


@case(rows=[(method, method) for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "get", "XYZ")])
def other_methods(s, name, method):
    """405, and Allow says what would have been right."""
    http = Http(s)
    for path in "/", "/health":
        answer = http.ask(path, method=method)
        check(answer.status == 405 and answer.headers.get("allow") == "GET, HEAD", answer)


@case()
def not_found(s):
    """404, and the connection stays."""
    http = Http(s)
    for path in "/nosuch", "/index.html", "/health/x", "/favicon.ico":
        check(http.ask(path).status == 404, path)
    check(http.ask("/nosuch", method="HEAD").status == 404)
    check(http.ask("/health?x=1").status == 200)
    check(http.ask("/health").status == 200)


@case(rows=[("Connection: close", "1.1", ["Connection: close"], True), ("keep-alive by default", "1.1", [], False),
            ("close in a list", "1.1", ["Connection: x, Close"], True), ("HTTP/1.0", "1.0", [], True),
            ("keep-alive", "1.1", ["Connection: keep-alive"], False)])
def keep_alive(s, name, version, lines, ends):
    """The connection is kept unless the client is old or says otherwise."""
    http = Http(s)
    check(http.ask("/health", *lines, version=version).status == 200)
    if ends:
        http.expect_end()
    else:
        check(http.ask("/health").status == 200)


@case()
def old_and_brief_clients(s):
    """HTTP/1.0 needs no Host, and who ends his side after asking still gets the answer."""
    for raw in b"GET /health HTTP/1.0\r\n\r\n", get("/health"), get("/nosuch") * 10 + get("/health"):
        http = Http(s)
        http.send(raw)
        http.sock.shutdown(socket.SHUT_WR)
        answers = [http.answer() for _ in range(raw.count(b"HTTP/1"))]
        check(answers[-1].body == b"ok\n", answers)
        http.expect_end()


@case("--timeout", "1")
def idle_keep_alive_ends(s):
    """A kept connection that asks nothing more is closed."""
    http = Http(s)
    http.ask("/health")
    http.expect_end()


@case(around=Bystander)
def pipelining(s):
    """1,000 requests at once, read slowly through a small window: all answers, in order."""
    http = Http(s, rcvbuf=4096)
    paths = ["/health", "/nosuch", "/"]
    requests = b"".join(get(paths[i % 3]) for i in range(1000))
    sender = threading.Thread(target=http.send, args=(requests,))  # it will have to wait for us
    sender.start()
    statuses = [http.answer().status for _ in range(1000)]
    sender.join()
    check(statuses == [(200, 404, 200)[i % 3] for i in range(1000)], "wrong answers")


@case()
def upgrade_behind_requests(s):
    """A handshake may come behind other requests on one connection, and frames right behind it."""
    ws = Ws(s, open=False)
    ws.send(get("/health") + get("/nosuch") + get("/any/path?at=all", *UPGRADE) + frame(TEXT, '{"type":"ping"}'))
    check([ws.answer().status for _ in range(2)] == [200, 404])
    ws.finish_handshake()
    ws.expect("pong")


# ---------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------

@case(rows=[("SIGTERM", signal.SIGTERM), ("SIGINT", signal.SIGINT)])
def stopping(name, number):
    """In the middle of talk: everybody gets 1001 behind whole frames, and the status is 0."""
    with Server("--rate", "0") as s:
        clients = join(s, "room", *(f"n{i}" for i in range(8)))
        idle = [Ws(s) for _ in range(20)]
        http = Http(s)

        def talk(client):
            word = frame(TEXT, '{"type":"say","to_client_id":"all","content":"x"}')
            with contextlib.suppress(OSError):  # the other thread closes when it has heard 1001
                while client.send(word * 10):
                    time.sleep(0.002)
        threads = [threading.Thread(target=talk, args=(c,)) for c in clients[:4]]
        for thread in threads:
            thread.start()
        clients[7].expect("say")
        begin = time.monotonic()
        s.signal(number)
        for client in clients + idle:
            client.expect_close(1001, skip=True)
        http.expect_end()
        http.close()
        for thread in threads:
            thread.join()
        check(s.wait_end() == 0, "status", s.process.returncode)
        check(time.monotonic() - begin < 5 * SLOW, "it took", time.monotonic() - begin)


def stuffed(s):
    """Have a client that does not read, with more for it than the kernel takes."""
    mute, ann = Ws(s, rcvbuf=4096), join(s, "room", "Ann")
    mute.login("Mute", "room")
    ann.expect("login")
    word = frame(TEXT, '{"type":"say","to_client_id":"all","content":"%s"}' % ("x" * 60000))
    for _ in range(150):
        ann.send(word)
        ann.expect("say")


@case("--rate", "0", "--backlog", str(64 << 20))
def stopping_does_not_wait_for_ever(s):
    """One that does not read is waited for, but not longer than five seconds, and nobody new comes in."""
    stuffed(s)
    idle = Ws(s)
    begin = time.monotonic()
    s.signal(signal.SIGTERM)
    idle.expect_close(1001)
    try:
        Stream(s).expect_end()
    except ConnectionRefusedError:
        pass
    check(s.wait_end(5 * SLOW) == 0, "status", s.process.returncode)
    check(time.monotonic() - begin > 1, "what was under way was not waited for")


@case("--rate", "0", "--backlog", str(64 << 20))
def second_signal(s):
    """Who asks twice does not want to wait: status 1 at once."""
    stuffed(s)
    idle = Ws(s)
    s.signal(signal.SIGTERM)
    idle.expect_close(1001)
    begin = time.monotonic()
    s.signal(signal.SIGTERM)
    s.want_status = 1
    check(s.wait_end() == 1, "status", s.process.returncode)
    check(time.monotonic() - begin < SLOW, "it took", time.monotonic() - begin)


@case("--rate", "0")
def harmless_signals(s):
    """SIGHUP and SIGPIPE in the middle of writes lose and break nothing."""
    ann, bob = join(s, "room", "Ann", "Bob")
    for i in range(300):
        s.signal((signal.SIGHUP, signal.SIGPIPE)[i % 2])
        ann.say(f"word {i}" + "x" * 2000)
    for client in ann, bob:
        for i in range(300):
            client.expect("say", content=f"word {i}" + "x" * 2000)


# ---------------------------------------------------------------------------
# Logs
# ---------------------------------------------------------------------------

STAMP = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d")
NASTY = ["\r\n2026-11-23 09:01:00 forged line", "\x1b[2J\x1b]0;owned\x07", "\0", "\x7f\x9b31m", "\u202e\u2028\u0085",
         "x" * 10240, "%s%n%d", "\\n"]
HEADS = [b"GET /%s HTTP/1.1\r\nHost: a\r\n\r\n",
         b"%s / HTTP/1.1\r\nHost: a\r\n\r\n",
         b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n",
         b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: %s\r\n\r\n",
         b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: %s\r\n\r\n",
         b"%s\r\n\r\n"]


@case("-v", "--rate", "0", "--trust-proxy", "127.0.0.1/32")
def log_injection(s):
    """Line ends, escape sequences, NULs and 10 KB from strangers never reach a terminal as they are."""
    for text in NASTY:
        for head in HEADS:
            http = Http(s)
            http.send(head % text.encode())
            http.more()
        for name, room in (text, "room"), ("Ann", text), (text[:60], "room"), ("Ann", text[:100] + "room"):
            ws = Ws(s, "/any", "User-Agent: x")
            ws.send_json(type="login", client_name=name, room_id=room)
            ws.message()
            ws.send(close_frame(1000, text[:40]))
            ws.expect_close(1000)
    lines = s.log().split("\n")
    check(len(lines) > 20, "a verbose log is expected to tell more than", lines)
    for line in lines:
        check(STAMP.match(line), "a line without a time stamp:", line[:200])
        check(all(" " <= c <= "~" for c in line), "not printable:", repr(line[:200]))
        check(len(line) < 1000, "a line of", len(line))
        check("forged" not in line[:40], line)


@case("-v", "-v", "-v", "--rate", "20", "--burst", "20")
def contents_are_not_logged(s):
    """Whatever is said, however it fails, at any verbosity: the log does not repeat it."""
    ann, bob = join(s, "room", "Ann", "Bob")
    secret = "xyzzy-plugh"
    ann.say(secret, ref=secret)
    ann.say(secret, to=bob.id)
    ann.say(secret, to=secret)
    ann.say([secret])
    ann.send_json(type=secret)
    ann.send(frame(TEXT, '{"%s":"%s"' % (secret, secret)))
    Ws(s).say(secret)
    ann.send(frame(PING, secret))
    ann.send(frame(TEXT, '{"type":"say","content":"%s"}' % secret) * 60)  # into the rate limit
    while ann.more():
        pass
    bob.send(frame(TEXT, secret.encode() + b"\xff"))
    bob.expect_close(1007, skip=True)
    expect_nothing(Ws(s))
    check(secret not in s.log(), [line for line in s.log().split("\n") if secret in line])


@case("--rate", "0")
def quiet_log(s):
    """Without --verbose, ordinary life is no news: a hundred clients come and go without a line each."""
    for _ in range(100):
        join(s, "room", "Ann").close()
    join(s, "other", "Ann", "Bob")
    check(len(s.log().split("\n")) < 20, s.log()[-1000:])


# ---------------------------------------------------------------------------
# Descriptors
# ---------------------------------------------------------------------------

@case()
def descriptors_run_out():
    """64 descriptors, 200 connections held: those inside go on, no busy loop, a line in the log, and it recovers."""
    with Server("--max-per-address", "0", "--timeout", "60", shell="ulimit -n 64") as s:
        ann, bob = join(s, "room", "Ann", "Bob")
        held = [Stream(s) for _ in range(200)]
        ann.say("with all of them waiting")
        bob.expect("say")
        before, begin = s.cpu_seconds(), time.monotonic()
        while time.monotonic() - begin < 1.5:
            ann.fence()
            time.sleep(0.1)
        used = s.cpu_seconds() - before
        check(instrumented() or used < 0.3, f"{used:.2f} s of processor time in 1.5 s of waiting")
        s.wait_log(r"(?i)descriptor|too many open files|EMFILE|max-clients")
        check(len(s.log().split("\n")) < 30, "the log is flooded:", s.log()[-1000:])
        for stream in held:
            stream.close()
        join(s, "room 2", "Carl", "Dora")


@case("--verbose", "--trust-proxy", "127.0.0.1")
def forwarded_for_of_an_earlier_request(s):
    """A proxy keeps its connections: a request without the header is its own, not that of who came before."""
    stream = Http(s)
    stream.send(get("/health", "X-Forwarded-For: 192.0.2.7"))
    check(stream.answer().status == 200)
    stream.send(get("/health"))
    check(stream.answer().status == 200)
    s.wait_log(r"192\.0\.2\.7:0: GET /health(.|\n)*127\.0\.0\.1:\d+: GET /health")


@case()
def stderr_is_closed():
    """Without a stderr, no client's socket may become descriptor 2 and get the log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = command("-v", "--bind", f"127.0.0.1:{port}")
    if WRAP[:1] == ["valgrind"]:  # which itself wants a stderr
        line = line[len(WRAP):]
    server = subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *line])
    try:
        def answers():
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0
        until(answers, "it does not listen")
        check(os.readlink(f"/proc/{server.pid}/fd/2") == "/dev/null", "descriptor 2 is something else")
    finally:
        server.terminate()
        server.wait()


@case()
def one_address_takes_all_descriptors():
    """Connections that are refused or closing hold descriptors too: one address must not get them all."""
    with Server("--max-per-address", "10", shell="ulimit -n 256") as s:
        join(s, "room", "Ann", source="127.0.0.3")
        held = []
        for _ in range(5):
            for _ in range(300):
                stream = Stream(s)
                stream.send(b"garbage\r\n\r\n")
                held.append(stream)
            newcomer = Ws(s, source="127.0.0.2")
            newcomer.fence()
            newcomer.close()
        for stream in held:
            stream.close()


@case()
def full_house_keeps_descriptors_for_files():
    """Those who are too many, and come all at once, take none of those that are kept for the history."""
    with tempfile.TemporaryDirectory() as data, \
            Server("--data", data, "--max-per-address", "0", shell="ulimit -n 256") as s:
        ann = join(s, "room", "Ann")
        held = [Stream(s) for _ in range(191)]
        ann.fence()
        s.signal(signal.SIGSTOP)
        held += [socket.create_connection(s.address()[1]) for _ in range(300)]
        ann.say("hello")
        s.signal(signal.SIGCONT)
        ann.expect("say", content="hello")
        ann.login("Ann", "another room")
        check("Too many open files" not in s.log(), s.log())
        for stream in held:
            stream.close()


if __name__ == "__main__":
    raise SystemExit(main())
