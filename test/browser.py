#!/usr/bin/env python3
"""The built-in page in a real browser.

Usage: browser.py [path of xchat]     (or the environment variable XCHAT; default: the repository's)

Starts the server on a free port and two headless Chromiums (an English one, Ann's, and a Chinese
one, Bob's), and drives them through chromedriver's plain HTTP interface. For each case one line:
"ok NAME", "FAIL NAME: why" or "skip NAME: why"; the status is 1 when something failed. Nothing
here sleeps for a fixed time: every step waits for what it needs, up to a deadline.
"""
import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CERTIFICATE = os.path.join(ROOT, "test", "localhost.pem")
WAIT = 6.0 * float(os.environ.get("XCHAT_SLOW", "1"))  # seconds a condition may take before it counts as broken
WRAP = shlex.split(os.environ.get("XCHAT_WRAP", ""))    # what has to stand in front of the program
if WRAP[:1] == ["valgrind"]:                            # or need not: a browser is slow enough
    WRAP = []
CASES = []


class Failed(Exception):
    pass


def case(function):
    CASES.append(function)
    return function


def until(condition, what, seconds=WAIT):
    """The first true result of condition(); fails with its last result."""
    end = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > end:
            raise Failed("waited %g s for: %s (last: %r)" % (seconds, what, result))
        time.sleep(0.02)        # the pace of asking, not a guess how long the thing takes


def same(got, expected, what):
    if got != expected:
        raise Failed("%s: %r instead of %r" % (what, got, expected))


def end_process(process, signal_number=signal.SIGTERM):
    """Stops what we started: its whole group, since a browser has children."""
    for number in (signal_number, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
        try:
            process.wait(6)
            return
        except subprocess.TimeoutExpired:
            pass


def port_from(log, process, pattern, seconds):
    """Waits until a program says in its log on which port it listens."""
    def look():
        with open(log, errors="replace") as f:
            text = f.read()
        found = re.search(pattern, text)
        if not found and process.poll() is not None:
            raise Failed("%s did not start: %s" % (process.args[0], text[-300:].strip()))
        return found
    return int(until(look, "port of " + process.args[0], seconds).group(1))


class Server:
    """The program under test. It can be killed and started again on the same port and data."""

    def __init__(self, binary, directory):
        self.binary, self.directory, self.port, self.count = binary, directory, 0, 0
        self.data = os.path.join(directory, "data")
        self.start()

    def start(self):
        self.count += 1
        log = os.path.join(self.directory, "server%d.log" % self.count)
        with open(log, "w") as f:
            self.process = subprocess.Popen(
                [*WRAP, self.binary, "--port", str(self.port), "--rate", "0", "--max-message", "8192",
                 "--data", self.data, "--bind", "plain:127.0.0.1", "--bind", "tls:127.0.0.1:0",
                 "--tls-cert", CERTIFICATE],
                stdin=subprocess.DEVNULL, stdout=f, stderr=f, start_new_session=True)
        self.port = port_from(log, self.process, r"listening on 127\.0\.0\.1:(\d+)\n", WAIT)
        self.tls_port = port_from(log, self.process, r"listening on 127\.0\.0\.1:(\d+) \(TLS\)", WAIT)

    def stop(self, signal_number=signal.SIGTERM):
        end_process(self.process, signal_number)

    def freeze(self):
        """From now on the server reads nothing and answers nothing; `stop` still works."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self):
        os.killpg(self.process.pid, signal.SIGCONT)


class Guest:
    """A third person without a browser: a bare WebSocket that speaks the chat protocol."""

    def __init__(self, port, name, room):
        self.socket = socket.create_connection(("127.0.0.1", port), WAIT)
        self.socket.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
                            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                            b"Sec-WebSocket-Key: " + base64.b64encode(os.urandom(16)) +
                            b"\r\n\r\n")
        self.file = self.socket.makefile("rb")
        while self.file.readline() not in (b"\r\n", b""):
            pass
        self.send(type="login", client_name=name, room_id=room)
        self.id = self.read("login")["client_id"]

    def send(self, **message):
        data = json.dumps(message).encode()
        size = (bytes([0x80 | len(data)]) if len(data) < 126
                else b"\xfe" + len(data).to_bytes(2, "big"))
        self.socket.sendall(b"\x81" + size + b"\0\0\0\0" + data)    # masked with zeros

    def read(self, kind):
        """The next message of that type."""
        while True:
            head = self.file.read(2)
            if len(head) < 2:
                raise Failed("the guest was disconnected")
            size = head[1]
            if size > 125:
                size = int.from_bytes(self.file.read(2 if size == 126 else 8), "big")
            payload = self.file.read(size)
            message = json.loads(payload) if head[0] == 0x81 else {"type": "control frame"}
            if message["type"] == kind:
                return message

    def say(self, text):
        self.send(type="say", to_client_id="all", to_client_name="all", content=text)

    def close(self):
        self.file.close()
        self.socket.close()


class Driver:
    """chromedriver, spoken to over HTTP."""

    def __init__(self, chromedriver, directory):
        log = os.path.join(directory, "chromedriver.log")
        # All that the browsers leave behind lands in a directory that is deleted at the end.
        env = dict(os.environ, HOME=directory, TMPDIR=directory)
        with open(log, "w") as f:
            self.process = subprocess.Popen([chromedriver, "--port=0"], stdin=subprocess.DEVNULL,
                                            stdout=f, stderr=f, env=env, start_new_session=True)
        port = port_from(log, self.process, r"started successfully on port (\d+)", 10)
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def call(self, method, path, body=None):
        self.connection.request(method, path, None if body is None else json.dumps(body),
                                {"Content-Type": "application/json"})
        value = json.loads(self.connection.getresponse().read())["value"]
        if isinstance(value, dict) and "error" in value and "message" in value:
            raise Failed("%s %s: %s" % (method, path, value["message"].split("\n")[0]))
        return value

    def stop(self):
        self.connection.close()
        end_process(self.process)


def spki(path):
    """The hash by which Chromium knows a key: of its SubjectPublicKeyInfo, which for P-256 begins as here."""
    with open(path) as file:
        der = ssl.PEM_cert_to_DER_cert(file.read().partition("-----BEGIN PRIVATE")[0].strip())
    start = der.index(bytes.fromhex("3059301306072a8648ce3d0201"))
    return base64.b64encode(hashlib.sha256(der[start:start + 91]).digest()).decode()


class Browser:
    """One Chromium with one person in front of it."""
    ENTER, TAB, ESCAPE, LEFT = "\ue007", "\ue004", "\ue00c", "\ue012"
    ELEMENT = "element-6066-11e4-a52e-4f735466cecf"     # a fixed name in the WebDriver standard

    def __init__(self, driver, chromium, directory, language):
        self.driver, self.url = driver, None
        profile = tempfile.mkdtemp(prefix="profile-", dir=directory)
        options = {"binary": chromium, "args": [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", "--window-size=1000,700", "--lang=" + language,
            "--accept-lang=" + language, "--user-data-dir=" + profile,
            # The test's own CA and certificate, and no other that is unknown:
            "--ignore-certificate-errors-spki-list=" + spki(CERTIFICATE)]}
        capabilities = {"browserName": "chrome", "goog:chromeOptions": options,
                        "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = driver.call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self.path = "/session/" + session["sessionId"]

    def call(self, method, path, body=None):
        return self.driver.call(method, self.path + path, body)

    def js(self, script, *args):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def cdp(self, command, **params):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def find(self, selector):
        return self.call("POST", "/element",
                         {"using": "css selector", "value": selector})[self.ELEMENT]

    def click(self, selector):
        self.call("POST", "/element/%s/click" % self.find(selector), {})

    def type(self, selector, text):
        self.call("POST", "/element/%s/value" % self.find(selector), {"text": text})

    def press(self, key):
        """A key for whatever has the focus."""
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": [
            {"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]}]})

    def text(self, selector):
        """The visible text of all that match, or None if nothing does."""
        return self.js("const e = [...document.querySelectorAll(arguments[0])];"
                       "return e.length ? e.map(x => x.innerText).join('\\n') : null", selector)

    def lines(self, selector=".text"):
        return self.js("return [...document.querySelectorAll('#talk ' + arguments[0])]"
                       ".map(x => x.innerText)", selector)

    def members(self):
        return self.js("return [...document.querySelectorAll('#members bdi')]"
                       ".map(x => x.textContent)")

    def open(self, room=None):
        self.call("POST", "/url", {"url": self.url + ("?room_id=" + room if room else "")})

    def online(self):
        return self.js("return !document.getElementById('send').disabled")

    def enter(self, name, room):
        """Come into a room under a name, through the form."""
        self.open(room)
        until(lambda: self.js("return document.getElementById('hello').open") or self.online(),
              "the page to come up")
        if not self.online() or self.text("#me") != name:
            if self.online():
                self.click("#me")
            self.js("document.getElementById('name').value = ''")
            self.type("#name", name + self.ENTER)
        until(lambda: self.online() and name in self.members(), "%s in room %s" % (name, room))

    def say(self, text):
        self.type("#text", text + self.ENTER)

    def sees(self, text, selector=".text"):
        until(lambda: text in self.lines(selector),
              "%r among %r" % (text, self.lines(selector)[-3:]))

    def log(self, kind):
        return self.call("POST", "/se/log", {"type": kind})

    def close(self):
        try:
            self.call("DELETE", "")
        except (Failed, OSError, http.client.HTTPException):
            pass        # it is gone already; its driver is stopped next


# ---- The cases. Each gets Ann's browser and Bob's, the server, and a room of its own. ----

def meet(ann, bob, room):
    """Both in one room, each seeing the other."""
    ann.enter("Ann", room)
    bob.enter("Bob", room)
    until(lambda: "Bob" in ann.members(), "Bob in Ann's member list")


@case
def name_form(ann, bob, server, room):
    ann.open(room)
    until(lambda: ann.js("return document.getElementById('hello').open"), "the name form")
    same(ann.js("return document.activeElement.id"), "name", "what has the focus")
    ann.press(ann.ESCAPE)       # without a name there is nothing to go back to: it asks again
    until(lambda: ann.js("return document.getElementById('hello').open"), "the form after Escape")
    ann.type("#name", "\u3000")  # the space of a Chinese keyboard is no name either
    same(ann.js("return document.getElementById('name').checkValidity()"), False, "a name of nothing but spaces")
    ann.type("#name", "Ann" + ann.ENTER)
    until(ann.online, "Ann online")
    same(ann.members(), ["Ann"], "members")
    until(lambda: ann.js("return document.activeElement.id") == "text", "focus in the composer")
    ann.open(room)              # the second time nobody asks
    until(ann.online, "Ann online again, without a form")
    same(ann.text("#me"), "Ann", "remembered name")


@case
def talk_both_ways(ann, bob, server, room):
    meet(ann, bob, room)
    ann.say("hello Bob")
    bob.sees("hello Bob")
    bob.say("hello Ann")
    ann.sees("hello Ann")
    ann.sees("hello Bob", ".own .text")
    same(ann.lines(), ["hello Bob", "hello Ann"], "Ann's log")
    same(bob.lines(".own .text"), ["hello Ann"], "Bob's own")
    until(lambda: ann.lines(".pending") == [], "nothing pending")
    same(bool(re.search(r"\d:\d\d", ann.text("#talk article time"))), True, "a time is shown")
    same(ann.text("#text"), "", "composer after sending")


@case
def lines_and_symbols(ann, bob, server, room):
    meet(ann, bob, room)
    text = "one\ntwo  \\ \"q\" 'a' \t& &amp; &#039; <br /> \u4f60\u597d"
    ann.js("document.getElementById('text').value = arguments[0]", text)
    ann.type("#text", ann.ENTER)
    until(lambda: bob.js("return document.querySelector('#talk .text')"), "the message")
    for who in (ann, bob):
        same(who.js("return document.querySelector('#talk .text').textContent"), text, "text")


@case
def members_follow(ann, bob, server, room):
    ann.enter("Ann", room)
    guest = Guest(server.port, "Carl", room)
    until(lambda: ann.members() == ["Ann", "Carl"], "Carl in the list")
    same(ann.text("#count"), "2", "count")
    ann.sees("Carl", ".system bdi")
    guest.send(type="login", client_name="Carla", room_id=room)
    until(lambda: ann.members() == ["Ann", "Carla"], "Carl's new name in the list")
    guest.close()
    until(lambda: ann.members() == ["Ann"], "Carla gone from the list")
    until(lambda: "Carla" in ann.lines(".system bdi"), "a line that Carla left")


@case
def private_talk(ann, bob, server, room):
    meet(ann, bob, room)
    guest = Guest(server.port, "Carl", room)
    until(lambda: len(ann.members()) == 3, "Carl in the list")
    ann.js("[...document.querySelectorAll('#members button')]"
           ".find(b => b.textContent === 'Bob').focus()")
    ann.press(ann.ENTER)
    until(lambda: ann.text("#whom") == "Private to Bob", "whom Ann talks to")
    ann.say("only for you")
    bob.sees("only for you", ".private:not(.own) .text")
    ann.sees("only for you", ".private.own:not(.pending) .text")
    ann.click("#all")
    same(ann.text("#whom"), "To everyone", "whom Ann talks to")
    ann.say("for all")
    same(guest.read("say")["content"], "for all", "the first thing that Carl hears")
    same(ann.lines(), ["only for you", "for all"], "Ann's log")
    guest.close()


@case
def html_is_text(ann, bob, server, room):
    name = "<img src=x onerror=hit=1>&lt;b>\"'"
    bob.enter("Bob", room)
    ann.enter(name, room)
    text = "<script>hit=1</script><img src=x onerror='hit=1'><b>\"&amp;</b>"
    ann.say(text)
    bob.sees(text)
    bob.sees(name, ".head bdi")
    guest = Guest(server.port, name, room)
    bob.sees(name, ".system bdi")
    guest.close()
    until(lambda: len(bob.members()) == 2, "the guest gone")
    same(bob.members(), ["Bob", name], "members")
    bob.click("#members button:enabled")
    same(bob.text("#whom bdi"), name, "whom Bob talks to")
    bob.say("<i>x</i>")
    ann.sees("<i>x</i>", ".private .text")
    same(bob.lines(".private .head span bdi"), [name], "name in the private mark")
    for who in (ann, bob):
        same(who.js("return [typeof hit, document.querySelectorAll('#talk :is(img, script, b, i),"
                    " #members :is(img, b), #whom img').length]"), ["undefined", 0], "markup")
    ann.enter("Ann", room)      # the later cases want the plain name


@case
def links(ann, bob, server, room):
    meet(ann, bob, room)
    ann.say("see http://a.example/x?y=1&z='2', (https://b.example/) javascript:alert(1) "
            "\u770bhttps://c.example/d\u3002 http:// ftp://e.example")
    until(bob.lines, "the message")
    same(bob.js("return [...document.querySelectorAll('#talk .text a')].map(a => "
                "[a.getAttribute('href'), a.textContent, a.target, a.rel].join(' '))"),
         ["%s %s _blank noopener noreferrer" % (url, url) for url in
          ("http://a.example/x?y=1&z='2", "https://b.example/", "https://c.example/d")], "links")


@case
def room_switch(ann, bob, server, room):
    meet(ann, bob, room)
    ann.say("in the first room")
    until(lambda: ann.lines(".own:not(.pending) .text"), "Ann's message")
    ann.click("#rooms li:nth-child(2) button")
    until(lambda: ann.text("#rooms [aria-current]") == "2", "room 2 marked")
    same(ann.js("return location.search"), "?room_id=2", "address")
    same((ann.members(), ann.lines()), (["Ann"], []), "members and log of room 2")
    until(lambda: bob.members() == ["Bob"], "Ann gone from Bob's list")
    bob.say("unheard")
    bob.sees("unheard", ".own:not(.pending) .text")
    same(ann.lines(), [], "what Ann hears in room 2")
    ann.click("#rooms li:last-child button")
    ann.js("document.getElementById('room').value = ''")
    ann.type("#room", room + ann.ENTER)     # another room, by its name
    until(lambda: sorted(ann.members()) == ["Ann", "Bob"], "both in the first room again")
    until(lambda: ann.lines() == ["in the first room", "unheard"], "what Ann missed there")
    bob.say("heard")
    ann.sees("heard")
    same(ann.lines(".own .text"), ["in the first room"], "Ann's own")


@case
def room_comes_in_pieces(ann, bob, server, room):
    """From far down in one room to a shorter one, of which much was missed: one sees its end."""
    short, texts = room + "-short", ["x" * 200 + " %d" % i for i in range(300)]
    ann.enter("Ann", short)
    ann.say("only line")
    ann.sees("only line", ".own:not(.pending) .text")
    guests = [Guest(server.port, "Carl", name) for name in (short, room)]
    ann.js("go(want.name, arguments[0])", room)
    until(lambda: ann.text("#where") == "Room " + room and ann.online(), "the other room")
    for text in texts:
        for guest in guests:
            guest.say(text)
            guest.read("say")
    ann.sees(texts[-1])
    ann.js("const real = ws.onmessage, held = []; go(want.name, arguments[0]); ws.onmessage = e => {"
           "  held.push(e); if (!e.data.includes('\"history\"') || !e.data.endsWith('\"more\":false}')) return;"
           "  const frame = requestAnimationFrame; ws.onmessage = real; real(held.shift());"
           "  frame(() => setTimeout(() => { real(held.shift());"   # the first piece, when the room was drawn without
           "    frame(() => frame(() => held.forEach(real))); })); }", short)
    until(lambda: ann.text("#where") == "Room " + short and texts[-1] in ann.lines() and ann.online(), "all of it")
    until(lambda: ann.js("const t = document.getElementById('talk');"
                         "return t.scrollHeight - t.scrollTop - t.clientHeight < 2"), "the end")
    for guest in guests:
        guest.close()


@case
def unread_title(ann, bob, server, room):
    meet(ann, bob, room)
    plain = ann.js("return document.title")
    place = ann.call("POST", "/window/minimize", {})
    until(lambda: ann.js("return document.hidden"), "Ann's window hidden")
    for text in ("one", "two"):
        bob.say(text)
    until(lambda: ann.js("return document.title") == "(2) " + plain, "two unread in the title")
    ann.call("POST", "/window/rect", place)
    until(lambda: ann.js("return document.title") == plain, "the plain title")
    same(ann.lines(), ["one", "two"], "what was said meanwhile")
    ann.call("POST", "/window/minimize", {})
    until(lambda: ann.js("return document.hidden"), "Ann's window hidden again")
    ann.js("ws.close()")
    until(lambda: bob.members() == ["Bob"], "Ann gone from Bob's list")
    bob.say("three")            # missed, and fetched when Ann's page is back by itself
    until(lambda: ann.js("return document.title") == "(1) " + plain, "one unread in the title")
    ann.open(room)              # a page that was just loaded has missed nothing
    until(lambda: ann.lines() == ["one", "two", "three"], "the history")
    same(ann.js("return [document.hidden, document.title]"), [True, plain], "hidden, title")
    ann.call("POST", "/window/rect", place)


@case
def errors_are_shown(ann, bob, server, room):
    meet(ann, bob, room)
    ann.click("#members button:enabled")
    bob.open("elsewhere")
    until(lambda: ann.members() == ["Ann"], "Bob gone")
    ann.say("are you there?")
    until(lambda: "Not sent: " in (ann.text(".line .why") or ""), "the error at the message")
    ann.click(".line .why button")
    same((ann.js("return document.getElementById('text').value"), ann.text("#whom"), ann.lines()),
         ("are you there?", "Private to Bob", []), "the message back in the composer")
    ann.click("#me")            # a name that is too long is refused in the form
    ann.js("document.getElementById('name').value = ''")
    ann.type("#name", "x" * 65 + ann.ENTER)
    until(lambda: "64" in (ann.text("#why") or ""), "the error in the form")
    ann.press(ann.ESCAPE)
    until(lambda: not ann.js("return document.getElementById('hello').open"), "the form closed")
    same(ann.text("#me"), "Ann", "the name that still counts")


@case
def message_over_the_limit(ann, bob, server, room):
    meet(ann, bob, room)
    old = ann.js("const old = me; ws.close(); return old")
    until(lambda: ann.online() and ann.js("return me") != old, "being online again")
    ann.js("document.getElementById('text').value = 'x'.repeat(9000)")
    ann.type("#text", ann.ENTER)
    until(lambda: "Not sent: " in (ann.text(".line .why") or ""), "the sign that it was not sent")
    until(lambda: ann.text("#status"), "the reason for the closing")
    closed = ann.js("dispatchEvent(new Event('online')); return ws.readyState")
    same(closed, 3, "the connection, when there is a network again")
    same(ann.js("return document.getElementById('retry').checkVisibility()"), True, "a way back")
    ann.click("#retry")
    until(ann.online, "Ann online again")


@case
def restart_and_reconnect(ann, bob, server, room):
    meet(ann, bob, room)
    ann.say("before")
    bob.sees("before")
    server.stop(signal.SIGKILL)
    for who in (ann, bob):
        offline(who)
    ann.say("half a thought")           # Enter does nothing now, and the text stays
    same(ann.js("return document.getElementById('text').value"), "half a thought", "composer")
    same(ann.lines(), ["before"], "Ann's log")
    server.start()
    for who in (ann, bob):
        until(who.online, "being online again", 10)
        same(who.text("#status"), "", "status")
    until(lambda: sorted(bob.members()) == sorted(ann.members()) == ["Ann", "Bob"], "both back")
    ann.type("#text", ann.ENTER)
    bob.sees("half a thought")
    same(ann.lines(), ["before", "half a thought"], "Ann's log")


def offline(who):
    until(lambda: not who.online() and who.text("#status"), "the offline sign")


def scroll(who, top):
    who.js("document.getElementById('talk').scrollTop = arguments[0]", top)


@case
def history_on_join(ann, bob, server, room):
    guest = Guest(server.port, "Carl", room)
    texts = ["line %d" % i for i in range(130)]
    for text in texts:
        guest.say(text)
        guest.read("say")
    guest.close()
    ann.enter("Ann", room)
    same(ann.lines(), texts[-50:], "what Ann sees at first")
    same(ann.lines(".head > bdi"), ["Carl"] * 50, "who said it")
    until(lambda: ann.js("const t = document.getElementById('talk');"
                         "return t.scrollHeight - t.scrollTop - t.clientHeight < 2"), "the end")
    ann.say("and I")
    ann.sees("and I", ".own:not(.pending) .text")
    # What cannot be read now is not the end. Scrolling up brings older ones, and what one is reading stays where it is.
    # (It may ask more than once: what the log's new size leads to may come only after we have scrolled.)
    ann.js("[refused, sent] = [0, []]; const send = post; post = m => refused < 0 || m.type !== 'history' ? (sent.push(m.type),"
           "send(m)) : (refused++, on.error({ code: 'storage', message: 'No.', ref: m.ref }));")
    scroll(ann, 50)
    until(lambda: ann.js("return refused > 0"), "a request")
    place = ("return [...document.querySelectorAll('#talk .text')]"
             ".find(e => e.innerText === 'line 80').getBoundingClientRect().top")
    before = ann.js("refused = -1; document.getElementById('talk').scrollTop = 100;" + place)
    until(lambda: len(ann.lines()) == 101, "50 older ones")
    same(abs(ann.js(place) - before) < 2, True, "line 80 is where it was")
    for number in range(5):     # there are only 30 more, and then the page does not ask again
        scroll(ann, number % 2)
        until(lambda: len(ann.lines()) == 131, "all")
    same(ann.lines(), texts + ["and I"], "the whole conversation")
    same(ann.js("return sent.filter(t => t === 'history').length"), 2, "requests")


@case
def killed_while_talking(ann, bob, server, room):
    meet(ann, bob, room)
    for number in range(3):
        ann.say("a%d" % number)
        bob.say("b%d" % number)
    ann.sees("b2")
    bob.sees("b2", ".own:not(.pending) .text")
    said = sorted(ann.lines())
    server.freeze()
    ann.say("never read")       # it reaches the server's machine, not the server
    bob.say("nor this")
    ann.sees("never read", ".own.pending .text")
    server.stop(signal.SIGKILL)
    for who, text in ((ann, "typed meanwhile"), (bob, "the same for Bob")):
        offline(who)
        same(len(who.lines(".pending")), 1, "messages on their way")
        who.say(text)           # Enter waits for the connection
    server.start()
    for who in (ann, bob):
        until(who.online, "being online again", 10)
        who.type("#text", who.ENTER)
    said = sorted(said + ["never read", "nor this", "typed meanwhile", "the same for Bob"])
    for who in (ann, bob):
        until(lambda: sorted(who.lines()) == said and not who.lines(".pending"), "all, once")
    same(ann.lines(), bob.lines(), "Ann's and Bob's conversation")
    same(ann.lines(".own .text"), ["a0", "a1", "a2", "never read", "typed meanwhile"], "her own")
    same((ann.lines(".gone"), ann.lines(".why")), ([], []), "complaints")
    talk = ann.lines()
    bob.open(room)              # and that is what somebody new sees
    until(lambda: bob.lines() == talk, "the same conversation in the history")


@case
def lost_receipt(ann, bob, server, room):
    """What the server stored, but could not confirm, is not said a second time."""
    meet(ann, bob, room)
    ann.say("first")
    ann.sees("first", ".own:not(.pending) .text")
    ann.js("ws.onmessage = null")
    ann.say("once")
    ann.say("twice <b>")
    bob.sees("twice <b>")
    same(ann.lines(".pending .text"), ["once", "twice <b>"], "not confirmed")
    ann.js("ws.close()")
    until(lambda: not ann.lines(".pending"), "the confirmation")
    bob.say("three times")
    for who in (ann, bob):
        who.sees("three times", ":not(.pending) > .text")
        same(who.lines(), ["first", "once", "twice <b>", "three times"], "conversation")
    same(ann.lines(".own .text"), ["first", "once", "twice <b>"], "Ann's own")


@case
def said_before_going_on(ann, bob, server, room):
    """What was under way when the connection ended is said in its own room, also by who has gone to another meanwhile."""
    meet(ann, bob, room)
    ann.say("first")            # so that both have something to resume from
    bob.sees("first")
    server.freeze()
    ann.say("only for this room")
    ann.sees("only for this room", ".own.pending .text")
    ann.js("const real = login, other = arguments[0];"     # a click when the login is sent and not answered yet
           "login = () => { login = real; real(); go(want.name, other); }", room + "-other")
    server.stop(signal.SIGKILL)
    server.start()
    until(lambda: ann.text("#where") == "Room %s-other" % room and ann.online(), "Ann in the other room", 10)
    until(lambda: ann.lines() or "only for this room" in bob.lines(), "the message, somewhere")
    same((ann.lines(), bob.lines()), ([], ["first", "only for this room"]), "what is in the other room, and in this one")
    ann.js("go(want.name, arguments[0])", room)
    until(lambda: ann.text("#where") == "Room " + room and ann.online(), "Ann in the first room again")
    for who in (ann, bob):
        who.js("tries = 0")     # so much went wrong here that they would wait for long
    server.freeze()
    ann.say("and this")
    ann.sees("and this", ".own.pending .text")
    ann.js("heard -= 80000; watch(); go(want.name, arguments[0])", room + "-other")     # a click while she is offline
    server.stop(signal.SIGKILL)
    server.start()
    until(lambda: ann.text("#where") == "Room %s-other" % room and ann.online(), "Ann in the other room", 10)
    until(bob.online, "Bob online again", 10)
    bob.sees("and this")
    ann.js("go(want.name, arguments[0])", room)
    until(lambda: ann.text("#where") == "Room " + room and ann.online(), "Ann in the first room once more")
    server.freeze()
    ann.say("refused")
    ann.sees("refused", ".own.pending .text")
    ann.js("heard -= 80000; watch(); tries = 0; here.name = 'x'.repeat(65); go('Ann', arguments[0])", room + "-other")
    server.stop(signal.SIGKILL)
    server.start()              # who is not let in there any more is where she wants to be all the same
    until(lambda: ann.text("#where") == "Room %s-other" % room and ann.online(), "Ann in the other room", 10)
    same(ann.js("return [...logs.get(arguments[0]).box.querySelectorAll('.why')].length", room), 1, "the sign at it")


@case
def refused_room_given_up(ann, bob, server, room):
    """Who is refused in another room, loses the connection and gives that room up, is in the room before again."""
    ann.enter("Ann", room)
    ann.js("go(want.name, 'x'.repeat(200))")
    until(lambda: ann.text("#why") and ann.online(), "the refusal")
    ann.js("ws.close()")
    until(lambda: ann.text("#status") == ann.text("#why"), "the same when it is back")
    ann.press(ann.ESCAPE)
    until(ann.online, "Ann online again")
    same((ann.text("#where"), ann.members(), ann.text("#status")), ("Room " + room, ["Ann"], ""), "where she is")


@case
def wishes_in_a_hurry(ann, bob, server, room):
    """Who wishes something while the answer to another wish is under way gets it, whatever the answer is."""
    ann.enter("Ann", room)
    server.freeze()
    ann.js("go(want.name, 'x'.repeat(200)); go(want.name, arguments[0])", room + "-a")
    server.thaw()
    until(lambda: ann.text("#where") == "Room %s-a" % room and ann.online(), "the last room, after one that is refused")
    same(ann.js("return document.getElementById('hello').open"), False, "a form")
    server.freeze()
    ann.js("go(want.name, arguments[0])", room + "-b")
    ann.click("#me")            # a form opened and given up takes nothing back
    ann.press(ann.ESCAPE)
    until(lambda: not ann.js("return document.getElementById('hello').open"), "the form closed")
    server.thaw()
    until(lambda: ann.text("#where") == "Room %s-b" % room and ann.online() and ann.js("return !asked"), "room b")
    server.freeze()
    ann.js("go(want.name, 'x'.repeat(200))")
    ann.click("#me")
    ann.js("document.getElementById('name').value = ''")
    ann.type("#name", "Anna")
    server.thaw()
    until(lambda: ann.text("#why"), "the refusal in the open form")
    same(ann.js("return document.getElementById('name').value"), "Anna", "what was typed in it")
    ann.press(ann.ESCAPE)
    until(lambda: not ann.js("return document.getElementById('hello').open"), "the form closed again")
    same((ann.text("#me"), ann.text("#where"), ann.online()), ("Ann", "Room %s-b" % room, True), "who and where she is")


@case
def private_is_not_repeated(ann, bob, server, room):
    """The client id that a private message was for is gone with the connection."""
    meet(ann, bob, room)
    ann.click("#members button:enabled")
    server.freeze()
    ann.say("psst")
    ann.sees("psst", ".private.pending .text")
    server.stop(signal.SIGKILL)
    until(lambda: "Not sent: " in (ann.text(".private .why") or ""), "the sign at the message")
    server.start()
    for who in (ann, bob):
        until(who.online, "being online again", 10)
    ann.click("#all")
    ann.say("aloud")
    bob.sees("aloud")
    same((bob.lines(), ann.lines(".pending")), (["aloud"], []), "what Bob hears")


@case
def storage_error(ann, bob, server, room):
    meet(ann, bob, room)
    ann.js("post = m => { if (m.type === 'say')"       # a full disk, made up in the page
           " setTimeout(() => on.error({ code: 'storage', message: 'No.', ref: m.ref })); }")
    ann.say("for ever")
    until(lambda: "Not sent: cannot be saved" in (ann.text(".line .why") or ""), "the error")
    same(ann.lines(".pending"), [], "messages on their way")
    ann.click(".line .why button")
    same((ann.js("return document.getElementById('text').value"), ann.lines()), ("for ever", []),
         "the message back in the composer")


@case
def storage_that_comes_back(ann, bob, server, room):
    """Whose room cannot be read after a restart comes in by herself when it can."""
    meet(ann, bob, room)
    ann.say("one")
    bob.sees("one")
    server.stop(signal.SIGKILL)
    folder = os.path.join(server.data, "rooms", room)
    os.rename(folder, folder + "-away")
    os.symlink(room, folder)    # leads nowhere, but is there
    server.start()
    until(lambda: "cannot be read" in ann.text("#status"), "the reason", 10)
    os.unlink(folder)
    os.rename(folder + "-away", folder)
    for who in (ann, bob):
        until(who.online, "being online again", 20)
        same((who.js("return document.getElementById('hello').open"), who.lines()), (False, ["one"]), "form, log")


@case
def data_is_gone(ann, bob, server, room):
    meet(ann, bob, room)
    for text in ("one", "two"):
        ann.say(text)
        bob.sees(text)
    backup = os.path.join(server.directory, "backup")
    shutil.copytree(server.data, backup)
    ann.say("three")
    bob.sees("three")
    server.stop(signal.SIGKILL)
    shutil.rmtree(server.data)
    server.start()
    for who, text in ((ann, "Some messages are gone."),
                      (bob, "\u6709\u4e9b\u6d88\u606f\u5df2\u7ecf\u4e22\u5931")):
        until(lambda: who.online() and who.lines(".gone") == [text], "the line about the loss", 10)
        same(who.lines(), ["one", "two", "three"], "what was on the screen")
    bob.say("four")
    for who in (ann, bob):
        until(lambda: who.lines(":not(.pending) > .text") == ["one", "two", "three", "four"],
              "the conversation to go on")
    scroll(ann, 0)
    server.stop(signal.SIGKILL)
    shutil.rmtree(server.data)
    os.rename(backup, server.data)      # the ids we know lie beyond the end of this
    server.start()
    for who in (ann, bob):
        until(lambda: who.online() and len(who.lines(".gone")) == 2, "another such line", 10)
        same(sorted(who.lines()), ["four", "one", "three", "two"], "everything, once")
    ann.say("five")
    bob.sees("five")
    ann.open(room)
    until(lambda: ann.lines() == ["one", "two", "five"], "the history as it is now")


@case
def old_messages_have_a_date(ann, bob, server, room):
    line = json.dumps({"type": "say", "from_client_id": "7f00000108fc00000001",
                       "from_client_name": "Zoe &amp; Co", "to_client_id": "all",
                       "content": "long ago", "time": "2024-02-03 12:05:06",
                       "id": "00c0ffee-%016x" % 0}, separators=(",", ":")) + "\n"
    folder = os.path.join(server.data, "rooms", room)
    os.makedirs(folder)
    with open(os.path.join(folder, "epoch"), "w") as f:
        f.write("00c0ffee\n")
    with open(os.path.join(folder, "%016x.log" % 0), "w") as f:
        f.write(line.replace("-%016x" % 0, "-%016x" % len(line)))
    ann.enter("Ann", room)
    ann.sees("long ago")
    same(ann.lines(".head bdi"), ["Zoe & Co"], "who said it")
    same("2024" in ann.text("#talk article time"), True, "a year at an old message")
    ann.say("now")
    ann.sees("now", ".own:not(.pending) .text")
    same("20" in ann.lines(".own time")[0].split(":")[0], False, "a year at a new one")


@case
def dead_network(ann, bob, server, room):
    """A server that is only stopped closes nothing; the page has to notice by itself."""
    ann.enter("Ann", room)
    server.freeze()
    try:
        ann.js("heard -= 80000; watch()")       # as after 80 seconds without a word
        until(lambda: not ann.online() and ann.text("#status"), "the offline sign")
    finally:
        server.thaw()
    until(ann.online, "Ann online again")


class Gate:
    """A way to the server on which what comes from it can be held back, for the connections there are."""

    def __init__(self, port):
        self.open, self.port = [], port
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            client, server = self.listener.accept()[0], socket.create_connection(("127.0.0.1", self.port))
            self.open.append(threading.Event())
            self.open[-1].set()
            for way in (client, server, None), (server, client, self.open[-1]):
                threading.Thread(target=self.pump, args=way, daemon=True).start()

    @staticmethod
    def pump(source, target, is_open):
        data = b"-"
        with contextlib.suppress(OSError):      # one of the two has gone
            while data:
                data = source.recv(65536)
                if is_open:
                    is_open.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@case
def slow_goodbye(ann, bob, server, room):
    """A connection that ends when the next one is there already says nothing about that."""
    gate, before = Gate(server.port), ann.url
    ann.url = "http://127.0.0.1:%d/" % gate.listener.getsockname()[1]
    try:
        ann.enter("Ann", room)
        for held in gate.open:
            held.clear()
        ann.js("old = ws; ws.close(); go(want.name, arguments[0])", room + "-other")
        until(lambda: ann.online() and ann.text("#where") == "Room %s-other" % room, "Ann in the other room")
        for held in gate.open:
            held.set()
        until(lambda: ann.js("return old.readyState") == 3, "the end of the first", 20)
        same((ann.online(), ann.text("#status")), (True, ""), "status")
    finally:
        ann.url = before
        ann.open(room)
        ann.log("performance")      # of requests, for a later case


@case
def wishes_while_offline(ann, bob, server, room):
    """Another name, and then another room: both are wanted when the server is there again."""
    ann.enter("Ann", room)
    server.freeze()
    try:
        ann.js("heard -= 80000; watch()")
        ann.click("#me")
        ann.js("document.getElementById('name').value = ''")
        ann.type("#name", "Anna" + ann.ENTER)
        ann.click("#rooms li:nth-child(2) button")
    finally:
        server.thaw()
    until(ann.online, "Ann online again")
    same((ann.text("#me"), ann.members(), ann.text("#where")), ("Anna", ["Anna"], "Room 2"), "name and room")


@case
def narrow_screen(ann, bob, server, room):
    meet(ann, bob, room)
    bob.say("w" * 300)
    ann.sees("w" * 300)
    guest = Guest(server.port, "n" * 64, room)
    guest.say("https://long.example/" + "p" * 300)
    until(lambda: len(ann.lines()) == 2, "the long link")
    ann.cdp("Emulation.setDeviceMetricsOverride", width=320, height=560, deviceScaleFactor=1,
            mobile=True)
    try:
        until(lambda: ann.js("return innerWidth === 320 && !document.querySelector('aside [open]')"),
              "a width of 320, and closed drawers")
        width = "return document.documentElement.scrollWidth"
        same(ann.js(width), 320, "width of the page")
        for drawer in (1, 2):
            ann.click("aside details:nth-child(%d) summary" % drawer)
            same(ann.js(width), 320, "width with drawer %d open" % drawer)
        ann.js("[...document.querySelectorAll('#members button')].at(-1).click()")
        same(ann.js("return document.querySelectorAll('aside [open]').length"), 0, "open drawers")
        same(ann.js(width), 320, "width with a private talk")
        ann.js("document.getElementById('text').value = ''")
        ann.say("from the phone")
        ann.sees("from the phone", ".own:not(.pending) .text")
        same(ann.js("const r = document.getElementById('send').getBoundingClientRect();"
                    "return r.right <= 320 && r.bottom <= 560"), True, "send button in sight")
    finally:
        ann.cdp("Emulation.clearDeviceMetricsOverride")
        guest.close()


@case
def long_names(ann, bob, server, room):
    """Names as long as they may be leave the place to what is said."""
    room += "-" + "r" * 100
    ann.enter("W" * 64, room)
    guest = Guest(server.port, "M" * 64, room)
    until(lambda: len(ann.members()) == 2, "the guest in the list")
    ann.click("#members button:enabled")
    for width, height in (1000, 700), (320, 560):
        ann.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700)
        try:
            until(lambda: ann.js("return innerWidth === arguments[0]", width), "that width")
            until(lambda: ann.js("""
                const [t, s] = ['talk', 'send'].map(id => document.getElementById(id).getBoundingClientRect());
                return t.height > 0.4 * innerHeight && s.bottom <= innerHeight"""), f"room to read, {width} wide")
        finally:
            ann.cdp("Emulation.clearDeviceMetricsOverride")
    guest.close()
    ann.enter("Ann", room)      # the later cases want the plain name


@case
def nothing_can_be_remembered(ann, bob, server, room):
    """Where the browser's storage is full, or there is none (in a WebView, say), one can talk all the same."""
    ann.open()
    ann.js("for (let n = 1 << 22; n >= 1; n /= 2) try { for (let i = 0;; i++) localStorage[n + '-' + i] = 'x'.repeat(n); }"
           " catch (e) { }")
    try:
        ann.enter("Ann with a long name", room)
        ann.say("full")
        ann.sees("full", ".own:not(.pending) .text")
    finally:
        ann.js("localStorage.clear()")
    hidden = ann.cdp("Page.addScriptToEvaluateOnNewDocument",
                     source="Object.defineProperty(window, 'localStorage', { value: null })")
    try:
        ann.enter("Ann", room)
        ann.say("none")
        ann.sees("none", ".own:not(.pending) .text")
    finally:
        ann.cdp("Page.removeScriptToEvaluateOnNewDocument", **hidden)


@case
def chinese_texts(ann, bob, server, room):
    bob.enter("Bob", room)
    same((bob.text("#send"), bob.text("#whom"), bob.js("return document.documentElement.lang")),
         ("\u53d1\u9001", "\u5bf9\u6240\u6709\u4eba\u8bf4", "zh-CN"), "Bob's texts")
    bob.click("#me")
    same(re.search("[A-Za-z]", bob.text("#hello")), None, "English in Bob's form")
    bob.press(bob.ESCAPE)
    ann.enter("Ann", room)
    same((ann.text("#send"), ann.js("return document.documentElement.lang")), ("Send", "en"),
         "Ann's texts")
    until(lambda: "\u8fdb\u6765\u4e86" in (bob.text(".system") or ""), "a line that Ann came")


@case
def emoji(ann, bob, server, room):
    meet(ann, bob, room)
    ann.type("#text", "ab")
    ann.press(ann.LEFT)
    ann.click("#to summary")
    ann.click("#faces button")
    ann.press(ann.ENTER)
    bob.sees("a\U0001f600b")
    ann.click("#to summary")


@case
def long_log_and_crowd(ann, bob, server, room):
    ann.enter("Ann", room)
    guests = [Guest(server.port, "guest %d" % i, room) for i in range(200)]
    until(lambda: ann.text("#count") == "201", "201 members")
    same(len(ann.lines(".system")) <= 5, True, "at most five lines about a crowd")
    for i in range(1000):
        guests[0].say("line %d" % i)
    ann.sees("line 999")
    same(len(ann.lines(".text")) <= 500, True, "a capped log")
    at_end = ("const t = document.getElementById('talk');"
              "return t.scrollHeight - t.scrollTop - t.clientHeight < 2")
    until(lambda: ann.js(at_end), "the log at its end")
    scroll(ann, 2000)
    until(lambda: not ann.js("return atEnd"), "the page to notice the scrolling")
    guests[1].say("unseen")
    ann.sees("unseen")
    same(ann.js("return document.getElementById('talk').scrollTop"), 2000, "reader's place")
    while ann.lines()[0] != "line 0":   # what the cap cut off comes back when one looks for it
        first = ann.lines()[0]
        scroll(ann, 0)
        until(lambda: ann.lines()[0] != first, "older ones than " + first)
    texts = ["line %d" % i for i in range(1000)] + ["unseen"]
    same([pair for pair in zip(ann.lines(), texts) if pair[0] != pair[1]][:1], [], "difference")
    same(len(ann.lines()), 1001, "number of lines")
    scroll(ann, 1000000)
    until(lambda: ann.js("return atEnd"), "the page to notice that Ann is at the end")
    guests[1].say("seen")
    until(lambda: len(ann.lines()) <= 500 and ann.lines()[-1] == "seen", "a capped log again")
    # Older ones that come when those they were for have been cut off are not put in front of the rest.
    scroll(ann, 2000)
    until(lambda: not ann.js("return atEnd"), "the page to notice the scrolling")
    while len(ann.lines()) < 600:
        shown = len(ann.lines())
        scroll(ann, 0)
        until(lambda: len(ann.lines()) > shown, "older ones")
    scroll(ann, 1000)
    ann.js("held = []; real = ws.onmessage;"
           "ws.onmessage = e => { if (JSON.parse(e.data).type === 'history') held.push(e); else real(e); }")
    scroll(ann, 0)
    until(lambda: ann.js("return held.length"), "an answer")
    scroll(ann, 1000000)
    until(lambda: ann.js("return atEnd"), "the page to notice that Ann is at the end")
    guests[1].say("and again")
    until(lambda: len(ann.lines()) <= 500, "a capped log once more")
    ann.js("ws.onmessage = real; held.forEach(real)")
    texts += ["seen", "and again"]
    same([pair for pair in zip(reversed(ann.lines()), reversed(texts)) if pair[0] != pair[1]][:1], [], "difference")
    while len(ann.lines()) < 600:
        shown = len(ann.lines())
        scroll(ann, 0)
        until(lambda: len(ann.lines()) > shown, "older ones, asked for again")
    for guest in guests:
        guest.close()
    until(lambda: ann.members() == ["Ann"], "all gone")


@case
def long_and_short_lines(ann, bob, server, room):
    """When a long line is cut off, the log gets shorter; one is at its end all the same, whatever comes next."""
    ann.enter("Ann", room)
    guest, text = Guest(server.port, "Carl", room), "w" + " w" * 700
    for i in range(510):
        guest.say(text if i % 2 else "short")
    guest.say("last")
    until(lambda: ann.lines()[-1:] == ["last"] and ann.js("return atEnd && log.box.children.length === 500"), "all")
    ann.js("const d = { from_client_name: 'Carl', to_client_id: 'all', time: '2026-01-01 00:00:00' };"
           "const say = content => on.say({ ...d, content });"
           "const first = () => log.box.children[0].innerText.length; while (first() < 500) say('short');"
           "requestAnimationFrame(() => requestAnimationFrame(() => { say('short');"
           "  setTimeout(() => say(arguments[0])); }))", text)     # when that was drawn, and before its scroll event
    until(lambda: ann.lines()[-1] == text, "the long one")
    until(lambda: ann.js("const t = document.getElementById('talk');"
                         "return t.scrollHeight - t.scrollTop - t.clientHeight < 2"), "the end")
    guest.close()


@case
def keyboard_and_screen_reader(ann, bob, server, room):
    meet(ann, bob, room)
    same(ann.js("return document.querySelector('#talk > *').getAttribute('role')"), "log", "role")
    # Everything that can be used has a name for a screen reader.
    same(ann.js("const controls = 'button, input, textarea, summary, [tabindex]';"
                "return [...document.querySelectorAll(controls)].filter(e => !("
                "e.textContent.trim() || e.ariaLabel || e.labels && e.labels.length))"
                ".map(e => e.id || e.tagName)"), [], "controls without a name")
    ann.js("document.getElementById('me').focus()")
    reached = []
    for _ in range(30):
        ann.press(ann.TAB)
        reached.append(ann.js("const e = document.activeElement; return e.id || e.textContent"))
        if "Bob" in reached:
            break
    missing = [e for e in ("talk", "Emoji", "text", "send", "1", "4", "Bob") if e not in reached]
    same(missing, [], "not reached with the Tab key")
    same(ann.js("const s = getComputedStyle(document.activeElement);"
                "return s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2"), True,
         "visible focus")


@case
def dark_mode(ann, bob, server, room):
    ann.enter("Ann", room)
    color = "return getComputedStyle(document.body).backgroundColor"
    light = ann.js(color)
    ann.cdp("Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark"}])
    same(ann.js(color) != light, True, "another background in the dark")
    ann.cdp("Emulation.setEmulatedMedia", features=[])


@case
def nothing_from_elsewhere(ann, bob, server, room):
    """All requests of all the cases above went to the server under test."""
    for who in (ann, bob):
        urls = set()
        for entry in who.log("performance"):
            message = json.loads(entry["message"])["message"]
            params = message["params"]
            if message["method"] == "Network.requestWillBeSent":
                urls.add(params["request"]["url"])
            elif message["method"] == "Network.webSocketCreated":
                urls.add(params["url"])
        foreign = [u for u in urls if not re.match(
            r"(http|ws)://127\.0\.0\.1:%d/|data:|about:|chrome:" % server.port, u)]
        same(foreign, [], "requests to other places")
        same(bool(urls), True, "requests were seen at all")


@case
def over_tls(ann, bob, server, room):
    """The page by https, the chat by wss, beside one in plain text."""
    plain, bob.url = bob.url, "https://localhost:%d/" % server.tls_port
    try:
        meet(ann, bob, room)
        bob.say("in secret")
        ann.sees("in secret")
        ann.say("aloud")
        bob.sees("aloud")
    finally:
        bob.url = plain


@case
def token_in_the_address(ann, bob, server, room):
    """A server that wants tokens: none is refused in the form, #token=... is taken, kept and sent."""
    secret = os.path.join(server.directory, "secret")
    with open(secret, "w") as f:
        f.write("correct horse battery staple")
    guarded = [*WRAP, server.binary, "--port", "0", "--bind", "127.0.0.1", "--admin", "127.0.0.1:0",
               "--jwt-secret-file", secret]

    def token(who):
        return subprocess.run(guarded + ["--make-token", who], capture_output=True, text=True, check=True).stdout.strip()
    log = os.path.join(server.directory, "guarded.log")
    with open(log, "w") as f:
        process = subprocess.Popen(guarded, stdin=subprocess.DEVNULL, stdout=f, stderr=f, start_new_session=True)
    before = ann.url, bob.url
    try:
        url = "http://127.0.0.1:%d/" % port_from(log, process, r"listening on 127\.0\.0\.1:(\d+)", WAIT)
        ann.url = bob.url = url
        for who, why in (ann, "token: missing"), (bob, "\u9700\u8981\u767b\u5f55\u51ed\u8bc1"):
            who.open(room)
            who.type("#name", "Eve" + who.ENTER)
            until(lambda: who.text("#why") == why, "the error in the form")
            same(who.online(), False, "who has no token is in")
        ann.call("POST", "/url", {"url": "%s?room_id=%s#token=%s" % (url, room, token("ann,Ann A," + room))})
        until(lambda: ann.js("return document.getElementById('hello').open"), "the form again")
        ann.type("#name", "Eve" + ann.ENTER)        # her token knows better
        until(lambda: ann.online() and ann.members() == ["Ann A"], "Ann A in the room")
        same((ann.text("#me"), ann.js("return location.hash")), ("Ann A", ""), "her name; the token in the address")
        ann.say("hello")
        ann.sees("hello")
        ann.js("post({ type: 'say', to_uid: 'ann', content: 'a letter' })")
        ann.sees("a letter", ".private .text")      # its id is of her inbox, and no way to resume the room
        admin = port_from(log, process, r"listening on 127\.0\.0\.1:(\d+) \(admin\)", WAIT)
        for call, fields in ("join", {"client_id": ann.js("return me")}), ("send", {"message": "some news"}):
            connection = http.client.HTTPConnection("127.0.0.1", admin, timeout=WAIT)
            connection.request("POST", "/api/" + call, json.dumps({"room": "news", **fields}))
            same(connection.getresponse().status, 200, call)
            connection.close()
        ann.sees("some news")                       # its id is of another room
        old = ann.js("const old = me; ws.close(); return old")
        until(lambda: ann.online() and ann.js("return me") != old, "being online again")
        same((ann.lines(".gone"), ann.lines(":not(.private) > .text")), ([], ["hello", "some news"]), "after both")
        ann.js("store.xchatToken = ''; ws.close()")  # one that is good no longer: it says so, also behind the form
        until(lambda: ann.text("#why") == "token: missing", "the refusal in the form")
        ann.press(ann.ESCAPE)
        until(lambda: not ann.js("return document.getElementById('hello').open"), "the form gone")
        same((ann.text("#status"), ann.online()), ("token: missing", False), "status")
        ann.js("store.xchatToken = arguments[0]", token("ann,Ann A," + room))
        ann.open(room)                              # the token is kept
        until(lambda: ann.online() and ann.members() == ["Ann A"], "Ann A again")
        ann.open("elsewhere")
        until(lambda: "room not allowed" in (ann.text("#why") or ""), "the refusal in the form")
        ann.open(room)
        until(ann.online, "Ann A again")
        ann.js("location.hash = '#token='")         # and can be given back
        until(lambda: "missing" in (ann.text("#why") or ""), "the token gone")
    finally:
        ann.url, bob.url = before
        ann.open(room), bob.open(room)
        end_process(process)


@case
def clean_console(ann, bob, server, room):
    """No error in the console, but for connections tried while the server was down."""
    for who in (ann, bob):
        same([e["message"] for e in who.log("browser")
              if "WebSocket connection to" not in e["message"]], [], "console")


# ---- The runner. ----

def run(binary, chromium, chromedriver, directory):
    failed = 0
    stops = []
    try:
        server = Server(binary, directory)
        stops.append(server.stop)
        driver = Driver(chromedriver, directory)
        stops.append(driver.stop)
        browsers = []
        for language in ("en-US", "zh-CN"):
            browsers.append(Browser(driver, chromium, directory, language))
            browsers[-1].url = "http://127.0.0.1:%d/" % server.port
            stops.append(browsers[-1].close)
        for number, function in enumerate(CASES):
            name = "browser " + function.__name__.replace("_", " ")
            try:
                function(browsers[0], browsers[1], server, "case-%d" % number)
                print("ok " + name)
            except (Failed, OSError, http.client.HTTPException) as why:
                failed += 1
                print("FAIL %s: %s" % (name, why))
            sys.stdout.flush()
    finally:
        for stop in reversed(stops):
            stop()
    return failed


def main():
    default = os.path.join(ROOT, "xchat")
    binary = os.path.abspath(sys.argv[1] if len(sys.argv) > 1
                             else os.environ.get("XCHAT") or default)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        print("skip browser: no %s here" % ("chromedriver" if chromium else "chromium"))
        return 0
    directory = tempfile.mkdtemp(prefix="xchat-browser-")
    try:
        return 1 if run(binary, chromium, chromedriver, directory) else 0
    except (Failed, OSError, http.client.HTTPException) as why:
        print("FAIL browser start: %s" % why)
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
