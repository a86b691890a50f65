"""nginx in front, with the lines that the README gives for it, and nothing else that matters."""

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import textwrap
import time

from harness import (CERTIFICATE, DEADLINE, PING, PONG, ROOT, UPGRADE, Http, Skip, Ws, case, check, frame, join, main,
                     until)

# What a distribution's nginx.conf has around it, in a directory of ours and in one process.
AROUND = """
daemon off; master_process off; pid {directory}/pid; error_log {directory}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off; client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    {server}
}}
"""


@functools.lru_cache
def snippet():
    """The block of the README, without its margin."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        return textwrap.dedent(re.search(r"\n( +# /etc/nginx/conf\.d.*\n(?: .*\n)+)", file.read())[1])


def replaced(text, *pairs):
    """Each of these must stand there: only what depends on the machine is replaced."""
    for old, new in pairs:
        check(old in text, "the README does not have", old)
        text = text.replace(old, new)
    return text


class Proxied:
    """What clients of nginx connect to: as a Server, for Http and Ws."""

    def __init__(self, port):
        self.port, self.tls, self.streams = port, [True], set()

    def address(self, at=0):
        return socket.AF_INET, ("127.0.0.1", self.port)

    def index(self, at):
        return at


@contextlib.contextmanager
def nginx(s, *changes):
    """nginx before this server."""
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if not program:
        raise Skip("nginx is not here")
    with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        server = replaced(snippet(), ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
                          ("127.0.0.1:7272", f"127.0.0.1:{s.port}"), ("/etc/xchat/fullchain.pem", CERTIFICATE),
                          ("/etc/xchat/key.pem", CERTIFICATE), *changes)
        with open(directory + "/nginx.conf", "w", encoding="utf-8") as file:
            file.write(AROUND.format(directory=directory, server=server))
        probe.close()
        line = [program, "-p", directory, "-e", directory + "/error.log", "-c", directory + "/nginx.conf"]
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        front = Proxied(port)
        try:
            def answers():
                with open(directory + "/error.log") as log:
                    check(process.poll() is None, "nginx ended:", log.read()[-500:])
                with socket.socket() as client:
                    return client.connect_ex(("127.0.0.1", port)) == 0
            until(lambda: os.path.exists(directory + "/error.log"), "nginx does not start", 4 * DEADLINE)
            until(answers, "nginx does not listen", 4 * DEADLINE)
            yield front
        finally:
            for stream in list(front.streams):
                stream.close()
            process.send_signal(signal.SIGTERM)
            process.wait()


TRUST = ["--trust-proxy", "127.0.0.1"]


@case(*TRUST)
def page_and_chat(s):
    """The page comes over TLS; people inside and outside talk; long words come through whole."""
    with nginx(s) as front:
        page = Http(front).ask("/")
        check(page.status == 200 and b"<html" in page.body.lower(), page.status)
        ann, bob = join(front, "room", "Ann", "Bob")
        carl = Ws(s)
        carl.login("Carl", "room")
        for client in ann, bob:
            client.expect("login", client_name="Carl")
        for word in "hello", "x" * 60000:
            ann.say(word)
            for client in ann, bob, carl:
                client.expect("say", content=word)
        bob.close(), carl.close()
        s.signal(signal.SIGTERM)
        ann.expect_close(1001, skip=True)
        check(s.wait_end() == 0, "status", s.process.returncode)


@case("-v", "--max-per-address", "1", *TRUST)
def real_addresses(s):
    """Limits and log see who is in front of nginx, whatever the client says of itself."""
    with nginx(s) as front:
        first = Ws(front, source="127.0.0.2")
        for lie in [], ["X-Forwarded-For: 192.0.2.9"], ["X-Forwarded-For: 127.0.0.1"]:
            late = Ws(front, open=False, source="127.0.0.2")
            check(late.ask("/", *UPGRADE, *lie).status == 429, lie)
        Ws(front, source="127.0.0.3").login("Bob", "room")
        first.fence()
    s.wait_log(r"127\.0\.0\.2:0: is a chat client(.|\n)*127\.0\.0\.3:0: is a chat client")
    check("192.0.2.9" not in s.log(), s.log())


@case("--max-per-address", "1", *TRUST)
def addresses_with_ports(s):
    """Some proxies say the client's port, too: each of these is one client, however it is written."""
    def answer(*hops):
        return Ws(s, open=False).ask("/", *UPGRADE, "X-Forwarded-For: " + ", ".join(hops)).status
    for hops in ["192.0.2.1:4711"], ["[2001:db8::1]:4711"], ["192.0.2.2"], ["2001:db8:1::80"], ["192.0.2.3:1", "127.0.0.1:2"]:
        check(answer(*hops) == 101, hops, "is taken for another")
    for hops in ["192.0.2.1"], ["192.0.2.1:9"], ["2001:db8::1"], ["[2001:db8::1]"], ["192.0.2.2:1"], ["192.0.2.3"]:
        check(answer(*hops) == 429, hops, "is not known again")
    for garbage in "192.0.2.4:", "[192.0.2.5", "[]", "]", "[", "[:1", ":80", "192.0.2.6:x", "[2001:db8::2]:x":
        check(answer(garbage) in (101, 429), garbage)
    check(answer("[") == 429, "garbage is not the proxy itself")


@case("--ping", "1", *TRUST)
def silent_for_long(s):
    """A connection on which nobody speaks lives longer than nginx's patience, since --ping is shorter than that."""
    patience = int(re.search(r"proxy_read_timeout (\d+)s", snippet())[1])
    check(patience > 2 * 25, "the README's proxy_read_timeout is", patience, "and --ping is 25")
    with nginx(s, (f"proxy_read_timeout {patience}s", "proxy_read_timeout 3s")) as front:
        ann = join(front, "room", "Ann")
        begin = time.monotonic()
        while time.monotonic() - begin < 3.5:  # pings are all there is
            while ann.next_frame()[0] != PING:
                pass
            ann.send(frame(PONG))
        ann.say("still here")
        while ann.message()["type"] != "say":
            pass


if __name__ == "__main__":
    raise SystemExit(main())
