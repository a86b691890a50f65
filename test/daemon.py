"""Being a good service: --check, privileges, a supervisor, figures."""

import contextlib
import ctypes
import grp
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time

from harness import (CERTIFICATE, ROOT, SLOW, TEXT, WRAP, Http, Server, Skip, Ws, case, check, command,
                     environment, frame, join, main, new_room, run, trusting, until)

OTHER = os.path.join(os.path.dirname(CERTIFICATE), "other.pem")


@contextlib.contextmanager
def place(mode=0o755):
    """A directory of our own, for others to look into."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, mode)
        yield directory


def refused(status, cause, *options, env=None):
    """It does not start: this status, and a last line on stderr that matches the cause."""
    got, out, err = run(*options, env=env)
    check(got == status and out == "", f"status {got}, wanted {status}:", err, out)
    check(re.search(cause, err.splitlines()[-1]), "the line does not name", cause, "but says", err)


def rooted():
    if os.geteuid() != 0:
        raise Skip("only root can become somebody else")


def chats(s, at=0, room=None):
    """Two can talk through this listener."""
    ann, bob = join(s, room or new_room(), "Ann", "Bob", at=at)
    ann.say("hello")
    bob.expect("say", content="hello")
    ann.close(), bob.close()


# ---------------------------------------------------------------------------
# --check
# ---------------------------------------------------------------------------

PUSH = ["--apns", "https://localhost:1", "--apns-topic", "x", "--apns-key-id", "x", "--apns-team-id", "x"]


def memory(*options):
    """What --check says: the figures of its lines, and the sum, in MiB."""
    status, out, err = run("--check", *options)
    check(status == 0, status, err)
    figures = [float(n) for n in re.findall(r"(?m)^ +([0-9.]+) MiB  ", out)]
    check(len(figures) >= 3 and "good" in out and "in all" in out.splitlines()[-1], out)
    return figures[:-1], figures[-1]


@case()
def check_is_good():
    """Status 0, the directory is there, and ports, lock and socket file are free again."""
    with place() as directory:
        options = ["-b", "127.0.0.1:0", "-b", f"unix:{directory}/chat", "--tls-cert", CERTIFICATE,
                   "--data", f"{directory}/data", "--admin", "127.0.0.1:0"]
        for _ in range(2):
            memory(*options)
            check(os.listdir(directory) == ["data"], os.listdir(directory))
        with Server(*options) as s:
            chats(s)


@case()
def check_adds_up():
    """The parts make the sum, and each limit shows in it."""
    small = ["--max-clients", "100", "--max-rooms", "100", "--backlog", "65536", "--max-message", "4096"]
    parts, least = memory(*small)
    check(abs(sum(parts) + 16 - least) < 1 and 20 < least < 300, parts, least)
    for more in ("--max-clients", "200"), ("--max-rooms", "200"), ("--backlog", "131072"), ("--max-message", "65536"):
        check(memory(*small, *more)[1] > 1.1 * least, more)
    check(memory(*small, "--tls-cert", CERTIFICATE)[1] > least + 3, "TLS costs nothing")
    check(memory(*small, *PUSH, "--apns-key", os.path.join(ROOT, "test", "apns.p8"))[1] > least + 50, "nor do phones")


@case()
def check_beside_a_server():
    """Its port is taken and its directory is locked: one line with the cause, and it does not notice."""
    with place() as data, Server("--data", data) as s:
        refused(1, f"--port {s.port}: Address (already )?in use", "--check", "--port", s.port)
        refused(1, f"--data {data}: another server uses it", "--check", "--data", data)
        chats(s)


@case(rows=[
    ("option", 2, "--rate", ["--rate", "x"]),
    ("certificate", 1, "--tls-cert /nosuch", ["--tls-cert", "/nosuch"]),
    ("key of another", 1, "--tls-key", ["--tls-cert", CERTIFICATE, "--tls-key", OTHER]),
    ("key for pushes", 1, "--apns-key /nosuch", [*PUSH, "--apns-key", "/nosuch"]),
    ("directory", 1, "--data /nosuch/data", ["--data", "/nosuch/data"]),
    ("no directory", 1, f"--data {CERTIFICATE}", ["--data", CERTIFICATE]),
    ("address", 1, "192.0.2.1", ["--bind", "192.0.2.1"]),
    ("user", 1, "--user nosuch", ["--user", "nosuch"]),
    ("user is root", 1, "--user root", ["--user", "root"]),
    ("group", 1, "--user nobody:nosuch", ["--user", "nobody:nosuch"]),
    ("chroot without user", 2, "--chroot needs --user", ["--chroot", "/tmp"]),
])
def check_refuses(name, status, cause, options):
    """What would keep it from starting is said as at a start."""
    refused(status, cause, "--check", *options)
    refused(status, cause, *options)


# ---------------------------------------------------------------------------
# Privileges
# ---------------------------------------------------------------------------

def proc_status(s, field):
    with open(f"/proc/{s.pid}/status") as file:
        return re.search(rf"(?m)^{field}:\s*(.*)$", file.read())[1].split()


@case()
def no_new_privileges(s):
    """A set-uid program would not help an intruder."""
    if not os.path.exists("/proc/self/status"):
        raise Skip("no /proc here")
    until(lambda: proc_status(s, "NoNewPrivs") == ["1"], "it may gain privileges")


NO_LEAKS = {"ASAN_OPTIONS": "detect_leaks=0"}  # who changes users cannot look into itself


@case()
def becomes_a_user():
    """All ids and groups are that user's, and so is history, from the first file on; the key may be root's."""
    rooted()
    nobody = pwd.getpwnam("nobody")
    with place() as directory:
        key, data = directory + "/key.pem", directory + "/data"
        shutil.copy(CERTIFICATE, key)
        os.chmod(key, 0o600)
        os.mkdir(data, 0o700)
        os.chown(data, nobody.pw_uid, nobody.pw_gid)
        for i in range(2):
            with Server("--user", "nobody:daemon", "--data", data, "--tls-cert", key, env=NO_LEAKS) as s:
                until(lambda: proc_status(s, "Uid") == [str(nobody.pw_uid)] * 4, proc_status(s, "Uid"))
                check(proc_status(s, "Gid") == [str(grp.getgrnam("daemon").gr_gid)] * 4, proc_status(s, "Gid"))
                check("0" not in proc_status(s, "Groups"), proc_status(s, "Groups"))
                ann = join(s, "room", "Ann")
                ann.say(f"word {i}")
                ann.expect("say")
                s.signal(signal.SIGHUP)
                s.wait_log(r"warn.*--tls-cert.*(?i:permission)")
                chats(s)
        for path, _, files in os.walk(data):
            for name in [path, *(os.path.join(path, file) for file in files)]:
                check(os.stat(name).st_uid == nobody.pw_uid, name, "is not the user's")
        os.chown(data, 0, 0)
        refused(1, "--data.*ermission", "--user", "nobody", "--data", data, env=NO_LEAKS)


def copied(program, place):
    """A copy to be run. Another process writes it: of ours, what another case starts would have the file open for
    writing until it runs, and such a program is busy."""
    subprocess.run(["cp", program, place], check=True)
    return os.path.join(place, os.path.basename(program)) if os.path.isdir(place) else place


@case()
def not_root_cannot():
    """Who is not root cannot use --user, and hears so."""
    rooted()
    if WRAP or not shutil.which("setpriv"):
        raise Skip("needs setpriv, and no valgrind or emulator around it")
    with place() as directory:
        program = copied(command()[-1], directory)
        done = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
                               program, "--user", "nobody"], env=environment(NO_LEAKS),
                              capture_output=True, text=True, timeout=10 * SLOW)
    check(done.returncode == 1 and re.search("--user nobody: .*permitted", done.stderr), done)


@case()
def sees_no_other_files():
    """--chroot: its root is that directory; chat, history and the end work. --data outside is refused."""
    rooted()
    nobody = pwd.getpwnam("nobody")
    with place() as directory, place() as outside:
        os.mkdir(directory + "/data")
        os.chown(directory + "/data", nobody.pw_uid, nobody.pw_gid)
        os.chown(outside, nobody.pw_uid, nobody.pw_gid)
        with Server("--user", "nobody", "--chroot", directory, "--data", directory + "/data", env=NO_LEAKS) as s:
            until(lambda: os.readlink(f"/proc/{s.pid}/root") == directory, os.readlink(f"/proc/{s.pid}/root"))
            chats(s, room="room")
        check(os.listdir(directory + "/data/rooms") == ["room"], os.listdir(directory))
        refused(1, "--chroot.*--data.*must lie in it", "--user", "nobody", "--chroot", directory, "--data", outside,
                env=NO_LEAKS)
        refused(1, "--chroot /nosuch: No such", "--user", "nobody", "--chroot", "/nosuch", env=NO_LEAKS)


def landlock():
    """Does this kernel have it, and may we use it? (valgrind does not know it.)"""
    with contextlib.suppress(OSError, AttributeError):
        return not WRAP and ctypes.CDLL(None).syscall(444, None, 0, 1) > 0
    return False


@case()
def reads_only_what_it_needs():
    """SIGHUP takes a certificate that was replaced where it was, but not, with Landlock, one from elsewhere."""
    with place() as good, place() as elsewhere:
        shutil.copy(CERTIFICATE, good + "/cert.pem")
        shutil.copy(OTHER, elsewhere)
        with Server("--tls-cert", good + "/cert.pem", "--data", good + "/data") as s:
            chats(s)
            shutil.copy(OTHER, good + "/new.pem")
            os.rename(good + "/new.pem", good + "/cert.pem")
            s.signal(signal.SIGHUP)
            s.wait_log("files read again")
            Ws(s, tls=trusting(OTHER, check_hostname=False))
            os.symlink(elsewhere + "/other.pem", good + "/link.pem")
            os.rename(good + "/link.pem", good + "/cert.pem")
            s.signal(signal.SIGHUP)
            s.wait_log("warn.*--tls-cert.*(?i:permission)" if landlock() else "(?s)(files read again.*){2}")
        check("data" in os.listdir(good))


# ---------------------------------------------------------------------------
# A supervisor
# ---------------------------------------------------------------------------

@contextlib.contextmanager
def supervisor(name):
    """The socket of one, at a path or, with '@', an abstract name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0"))
        sock.settimeout(10 * SLOW)
        yield sock


@case()
def tells_the_supervisor():
    """READY=1 once it listens, WATCHDOG=1 at half the time, STOPPING=1 at the signal."""
    with place() as directory:
        for name in f"{directory}/notify", f"@xchat-{os.getpid()}-{time.monotonic_ns()}":
            with supervisor(name) as sock:
                with Server(env={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "2000000"}) as s:
                    check(sock.recv(99) == b"READY=1")
                    chats(s)
                    for _ in range(3):
                        begin = time.monotonic()
                        check(sock.recv(99) == b"WATCHDOG=1")
                        check(time.monotonic() - begin < 2 * SLOW, "too late:", time.monotonic() - begin)
                    s.signal(signal.SIGTERM)
                    last = sock.recv(99)
                    check((sock.recv(99) if last == b"WATCHDOG=1" else last) == b"STOPPING=1")
                    check(s.wait_end() == 0)


@case()
def impatient_supervisor():
    """Half the time of a second is not a second."""
    with place() as directory, supervisor(directory + "/notify") as sock:
        with Server(env={"NOTIFY_SOCKET": directory + "/notify", "WATCHDOG_USEC": "1000000"}):
            check(sock.recv(99) == b"READY=1" and sock.recv(99) == b"WATCHDOG=1")
            begin = time.monotonic()
            for _ in range(4):
                check(sock.recv(99) == b"WATCHDOG=1")
            check(time.monotonic() - begin < 3.5 * SLOW, "too late:", time.monotonic() - begin)


@case()
def supervisor_is_not_served_for_ever():
    """One that does not read, is not there, or wants no watchdog: the server goes on."""
    with place() as directory:
        name = directory + "/notify"
        with supervisor(name), Server(env={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1"}) as s:
            time.sleep(1.5)
            chats(s)
        with Server(env={"NOTIFY_SOCKET": "/nosuch/socket"}) as s:
            s.wait_log("NOTIFY_SOCKET /nosuch/socket")
            chats(s)
        os.unlink(name)
        another = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}
        with supervisor(name) as sock, Server(env=another):
            check(sock.recv(99) == b"READY=1")
            sock.settimeout(1.5)
            with contextlib.suppress(TimeoutError):
                check(False, "it sent", sock.recv(99))


@contextlib.contextmanager
def given(*sockets):
    """How Server gets sockets from 3 on, as systemd passes them."""
    fds = tuple(os.dup(sock.fileno()) for sock in sockets)   # those of a shell have one digit
    mover = f"""import os, sys
high = [os.dup(os.dup2(fd, 100 + i)) for i, fd in enumerate({fds})]
for i in range(len(high)):
    os.dup2(100 + i, 3 + i)
os.environ.update(LISTEN_FDS=str(len(high)), LISTEN_PID=str(os.getpid()))
os.execvp(sys.argv[1], sys.argv[1:])"""
    try:
        yield {"shell": f'exec {sys.executable} -c {shlex.quote(mover)} "$@"', "pass_fds": fds}
    finally:
        for fd in fds:
            os.close(fd)


@case()
def sockets_are_given():
    """They take the place of --bind, outlive a restart with those who wait, and their file stays."""
    with place() as directory, socket.socket() as tcp, socket.socket(socket.AF_UNIX) as local:
        tcp.bind(("127.0.0.1", 0))
        local.bind(directory + "/chat")
        for sock in tcp, local:
            sock.listen(5)
        for _ in range(2):
            early = socket.create_connection(tcp.getsockname())
            early.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            with given(tcp, local) as how, Server("--bind", "192.0.2.1", **how) as s:
                s.wait_log("(?s)(listening.*given.*){2}")
                check(s.listeners[:1] == ["127.0.0.1:%d" % tcp.getsockname()[1]], s.listeners)
                check(s.tls[0] or b"ok\n" in early.recv(999), "who came before it was not served")
                early.close()
                chats(s)
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(directory + "/chat")
                    client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                    check(b"ok\n" in client.recv(999))
                with open(f"/proc/{s.pid}/fdinfo/3") as info:
                    check(int(re.search(r"flags:\s+(\d+)", info.read())[1], 8) & os.O_CLOEXEC, "it would be inherited")
            check(stat.S_ISSOCK(os.stat(directory + "/chat").st_mode))


@case()
def left_to_the_successor():
    """Who comes when the server is told to stop waits on the socket for the next one, and is not hung up on."""
    with socket.socket() as tcp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen(50)
        tcp.settimeout(5 * SLOW)
        for _ in range(8):   # it is about what it is doing just then
            with given(tcp) as how, Server(**how) as s:
                chats(s)
                s.signal(signal.SIGSTOP)
                late = [socket.create_connection(tcp.getsockname()) for _ in range(20)]
                s.signal(signal.SIGTERM)
                s.signal(signal.SIGCONT)
                check(s.wait_end() == 0)
            for client in late:
                tcp.accept()[0].close()
                client.close()


@case()
def sockets_that_are_given_speak_tls():
    """As those of --bind do, if there is a certificate, but for those of this machine alone."""
    with place() as directory, socket.socket() as tcp, socket.socket(socket.AF_UNIX) as local:
        tcp.bind(("127.0.0.1", 0))
        local.bind(directory + "/chat")
        for sock in tcp, local:
            sock.listen(5)
        with given(tcp, local) as how, Server("--tls-cert", CERTIFICATE, **how) as s:
            s.wait_log(r"(?s)listening on 127\.0\.0\.1:\d+ \(TLS\) \(given\).*listening on unix \(given\)")
            check(s.tls == [True, False], s.tls)
            chats(s)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(directory + "/chat")
                client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                check(b"ok\n" in client.recv(999), "not in plain text")


@case()
def sockets_of_another():
    """Variables for another process are not ours; a descriptor that does not listen is refused."""
    with Server(env={"LISTEN_FDS": "3", "LISTEN_PID": "1"}) as s:
        chats(s)
    with socket.socket() as deaf, given(deaf) as how:
        done = subprocess.run(command(shell=how["shell"]), env=environment(), pass_fds=how["pass_fds"],
                              capture_output=True, text=True, timeout=10 * SLOW)
    check(done.returncode == 1 and "LISTEN_FDS: descriptor 3" in done.stderr, done)


@case()
def installs_over_a_running_one():
    """A new version takes the place of one that runs; that one goes on until it is restarted."""
    with place() as directory:
        shutil.copy(os.path.join(ROOT, "Makefile"), directory)
        open(os.path.join(directory, "xchat.c"), "w").close()
        copied(shutil.which("sleep"), os.path.join(directory, "xchat"))    # any program will do
        install = ["make", "-C", directory, "install", "DESTDIR=" + directory, "PREFIX=/usr"]
        subprocess.run(install, check=True, capture_output=True)
        running = subprocess.Popen([os.path.join(directory, "usr/bin/xchat"), "600"])
        try:
            again = subprocess.run(install, capture_output=True, text=True)
            check(again.returncode == 0 and running.poll() is None, "over a running one:", again.stderr)
        finally:
            running.kill(), running.wait()


# ---------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------

def figures(s):
    """All of /metrics, each line of the form Prometheus reads."""
    with contextlib.closing(Http(s, at=1)) as http:
        answer = http.ask("/metrics")
    check(answer.status == 200 and answer.headers["content-type"].startswith("text/plain"), answer)
    lines = answer.body.decode().splitlines()
    for line in lines:
        check(re.fullmatch(r'[a-z_]+(\{[a-z]+="[a-z0-9]+"\})? -?[0-9.]+', line), line)
    return {line.split()[0]: float(line.split()[1]) for line in lines}


@case("--admin", "127.0.0.1:0", "--rate", "1", "--burst", "4", "--ping", "1", "--max-clients", "4")
def metrics(s):
    """What happens is counted: connections, clients, rooms, messages, bytes, refusals, ends."""
    s.wait_log("(?s)(listening.*){2}")
    first = figures(s)
    for name in ("clients", "rooms", "connections_refused_total", "messages_received_total", 'closed_total{why="slow"}',
                 "history_write_failures_total"):
        check(first["xchat_" + name] == 0, name, first)
    ann, bob = join(s, "room", "Ann", "Bob")
    ann.say("x" * 1000)
    for client in ann, bob:
        client.expect("say")
    bob.login("Bob", "room")
    ann.expect("login")
    then = figures(s)
    for name, value in {"connections": 3, "clients": 2, "rooms": 1, "messages_received_total": 4,
                        "messages_delivered_total": 4}.items():  # that Bob came, twice, to Ann; the word, to both
        check(then["xchat_" + name] == value, name, "is", then["xchat_" + name])
    check(1000 < then["xchat_history_written_bytes_total"] < 2000, then)
    check(then["xchat_received_bytes_total"] > 1000 and then["xchat_sent_bytes_total"] > 2000, then)
    check(abs(then["process_start_time_seconds"] + then["xchat_uptime_seconds"] - time.time()) < 3 + 2 * SLOW, then)
    check("process_resident_memory_bytes" not in then or 1e6 < then["process_resident_memory_bytes"] < 1e10, then)
    ann.send(frame(TEXT, '{"type":"ping"}') * 6)
    with contextlib.closing(Ws(s)), contextlib.closing(Ws(s)), contextlib.closing(Ws(s, open=False)) as late:
        check(late.ask("/health").status == 503)
    bob.answer_pings = False
    bob.expect_close(4408, skip=True)
    until(lambda: Http(s).ask("/health").status == 200, "the places are not free again")
    last = figures(s)
    for name in "messages_rate_limited_total", "connections_refused_total", 'closed_total{why="silent"}':
        check(last["xchat_" + name] >= 1, name, last)
    check(last["xchat_clients"] < 2 and last["xchat_messages_received_total"] >= 9, last)


if __name__ == "__main__":
    raise SystemExit(main())
