"""The HTTP API at --admin: what each call does, who may call, and what it must survive.

A call is `good(s, "send", room="1", message="hi")`, which must be answered with 200 and gives the answer,
or `bad(s, 400, "bad_field", "send", ...)`, which must be refused so, in words. Most of what is asked for
is seen by chat clients: they are the judges.
"""

import concurrent.futures
import contextlib
import itertools
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse

import harness
from harness import (CERTIFICATE, DEADLINE, SLOW, TEXT, UPGRADE, Bystander, Http, Server, Skip, Ws, answer_and_end,
                     case, check, each_row, expect_nothing, get, join, main, new_room, run, until)

CASES_HERE = len(harness.CASES)
from push import Gateway, Xchat, aps, leave, token   # noqa: E402
del harness.CASES[CASES_HERE:]   # its own cases are not wanted twice

ADMIN = 1               # the second listener
MIB = 1 << 20           # of a body
NOBODY = "0" * 20       # who says what the API says
TO_YOU = "<b>对你说: </b>"
JSON, FORM = "application/json", "application/x-www-form-urlencoded"
SAY = ["type", "from_client_id", "from_client_name", "to_client_id", "content", "time", "id"]
ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{16}")


# ---------------------------------------------------------------------------
# Servers and calls
# ---------------------------------------------------------------------------

class Api(Server):
    """A server with --admin."""

    def __init__(self, *options, admin="127.0.0.1:0", **server):
        super().__init__("--rate", "0", "--admin", admin, *options, **server)
        self.wait_log(r"listening on \S+ .*admin")


def api(*options, rows=None, around=None, **server):
    """A case with such a server: f(s), or so with each row."""
    def register(function):
        def whole():
            with Api(*options, **server) as s, around(s) if around else contextlib.nullcontext():
                each_row(function, rows, s)
        whole.__name__ = function.__name__
        case()(whole)
        return function
    return register


@contextlib.contextmanager
def directory(name="data"):
    with tempfile.TemporaryDirectory(prefix="xchat") as parent:
        yield os.path.join(parent, name)


def stored(*options, **server):
    """A case with --data: f(s, directory)."""
    def register(function):
        def whole():
            with directory() as d, Api("--data", d, *options, **server) as s:
                function(s, d)
        whole.__name__ = function.__name__
        case()(whole)
        return function
    return register


def request(path, *lines, body=None, method=None, host="localhost", version="1.1"):
    """The bytes of a request; one with a body is a POST, and has its length."""
    method = method or ("GET" if body is None else "POST")
    head = [f"{method} {path} HTTP/{version}", *[f"Host: {host}"] * (host is not None), *lines]
    if body is not None and not any(line.lower().startswith("content-length") for line in lines):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + (body or b"")


def post(path, fields, *lines, type=JSON, **more):
    """A POST to /api/`path` of these fields, or of this body."""
    if isinstance(fields, dict):
        fields = json.dumps(fields) if type.startswith(JSON) else urllib.parse.urlencode(fields)
    body = fields.encode() if isinstance(fields, str) else fields
    return request("/api/" + path, *[f"Content-Type: {type}"] * bool(type), *lines, body=body, **more)


def ask(s, raw, at=ADMIN):
    """One request on a connection of its own; the answer."""
    with contextlib.closing(Http(s, at=at)) as http:
        http.send(raw)
        return http.answer("HEAD" if raw.startswith(b"HEAD") else "GET")


def parsed(answer, status, code=None):
    """The answer as a dictionary. It has this status and code, and the form of its kind."""
    check(answer.status == status, f"wanted {status}, got", answer)
    check(answer.headers.get("content-type", "").startswith(JSON), "the type is", answer.headers)
    check(not [h for h in answer.headers if h.startswith("access-control")], "CORS is opened:", answer.headers)
    fields = json.loads(answer.body.decode("utf-8"))
    if code:
        check(list(fields) == ["code", "message"] and fields["code"] == code, f"wanted {code}, got", fields)
        check(re.fullmatch(r"[ -~]{5,200}", fields["message"]), "the message is", repr(fields["message"]))
    return fields


def good(s, path, *lines, **fields):
    """A POST that is done; what the answer has besides "ok"."""
    fields = parsed(ask(s, post(path, fields, *lines)), 200)
    check(fields.pop("ok", None) is True, "not ok:", fields)
    return fields


def bad(s, status, code, path, *lines, **fields):
    """A POST that is refused; the words."""
    return parsed(ask(s, post(path, fields, *lines)), status, code)["message"]


def look(s, path, *lines, **query):
    """A GET; the answer, without a "type", which it may have in common with a message of the chat."""
    query = "?" + urllib.parse.urlencode(query) if query else ""
    fields = parsed(ask(s, request("/api/" + path + query, *lines)), 200)
    check(fields.pop("type", path) == path, "the type is another")
    return fields


def refused_look(s, code, path, **query):
    query = "?" + urllib.parse.urlencode(query) if query else ""
    return parsed(ask(s, request("/api/" + path + query)), 400, code)["message"]


def raw_text(client):
    """The bytes of the next message, as they came."""
    opcode, payload = client.next_frame()
    check(opcode == TEXT, "wanted a text, got", opcode, payload)
    return payload


def said(message, content, to="all", name="system"):
    """A `say` of the API, as it looks."""
    fields = ["to_uid" if f == "to_client_id" and "to_uid" in message else f for f in SAY]
    check(list(message) in (fields, fields[:-1]), "wanted the fields", fields, "in", message)
    check(message["type"] == "say" and message["from_client_id"] == NOBODY, message)
    check((message[fields[3]], message["content"], message["from_client_name"]) == (to, content, name), message)
    return message


def listed(s, **query):
    """/api/clients as client_id -> the rest."""
    return {c.pop("client_id"): c for c in look(s, "clients", **query)["clients"]}


def alive(s):
    """Whatever happened before, it does what it should."""
    ann = join(s, new_room(), "Ann")
    check("id" not in good(s, "send", client_id=ann.id, message="alive"), "an id for a private word")
    said(ann.message(), TO_YOU + "alive", ann.id)
    ann.close()


# ---------------------------------------------------------------------------
# Send
# ---------------------------------------------------------------------------

CONTENTS = [  # name, what is sent, what arrives
    ("plain", "hello", "hello"),
    ("unicode", "你好 \U0001f600 a/b", "你好 \U0001f600 a/b"),
    ("markup", "<b>&\"'</b>", "&lt;b&gt;&amp;&quot;&#039;&lt;/b&gt;"),
    ("lines", "x\ny\r\nz", "x<br />\ny<br />\r\nz"),
    ("escapes", "\t\\u0041 \\n %41+%2B", "\t\\u0041 \\n %41+%2B"),
    ("looks like a form", "a=1&b=2+3", "a=1&amp;b=2+3"),
    ("looks like JSON", '{"a":[1]}', "{&quot;a&quot;:[1]}"),
    ("a digit", "0", "0"),
    ("long", "x" * 50000, "x" * 50000),
]


@api(rows=[(f"{name}, {type}", type, text, html) for name, text, html in CONTENTS for type in (JSON, FORM)])
def send_to_room(s, name, type, text, html):
    """All in the room hear it, as they would hear each other; the id in the answer is the one they see."""
    room = new_room()
    ann, bob, other = *join(s, room, "Ann", "Bob"), join(s, new_room(), "Eve")
    fields = parsed(ask(s, post("send", {"room": room, "message": text}, type=type)), 200)
    check(list(fields) == ["ok", "id"] and fields["ok"] is True and ID.fullmatch(fields["id"]), fields)
    for client in ann, bob:
        check(said(client.message(), html)["id"] == fields["id"], "another id than", fields)
    other.expect_nothing()
    check(look(s, "history", room=room)["messages"][-1]["id"] == fields["id"], "it is not remembered")


@api()
def names_and_numbers(s):
    """A name of one's own is escaped; a room may be a number; the unknown is ignored; of two fields the last counts."""
    ann = join(s, "77", "Ann")
    for fields in {"room": 77}, {"room": "77", "to": "x", "Room": "1", "message ": 5}:
        good(s, "send", message="hi", **fields)
        said(ann.message(), "hi")
    for name, html in ("Wörld", "Wörld"), ("<i>&'\"", "&lt;i&gt;&amp;&#039;&quot;"), ("x" * 64, "x" * 64):
        good(s, "send", room="77", message="hi", name=name)
        said(ann.message(), "hi", name=html)
    twice = '{"room":"1","message":"a","room":"77","message":"b"}'
    for type in JSON, JSON + ";charset=utf-8", "", FORM:   # curl calls everything a form
        parsed(ask(s, post("send", twice, type=type)), 200)
        said(ann.message(), "b")
    long = "r" * 128
    bob = join(s, long, "Bob")
    good(s, "send", room=long, message="hi")
    said(bob.message(), "hi")
    expect_nothing(ann, bob)


@api()
def send_to_user(s):
    """All connections of a user hear it, wherever they are, and nobody else."""
    a, b, c = join(s, "1", "A"), join(s, "2", "B"), join(s, "1", "C", source="127.0.0.2")
    a.expect("login")
    for client in a, b:
        good(s, "bind", client_id=client.id, uid="ann/飞 1")
    for type in JSON, FORM:
        answer = parsed(ask(s, post("send", {"uid": "ann/飞 1", "message": "<hi>"}, type=type)), 200)
        for client in a, b:
            check(said(client.message(), TO_YOU + "&lt;hi&gt;", "ann/飞 1")["id"] == answer["id"], answer)
    expect_nothing(a, b, c)


@api()
def send_to_client(s):
    """One connection hears it now; it is not kept; nobody of that id is 404."""
    ann, bob = join(s, "1", "Ann", "Bob")
    for type in JSON, FORM:
        answer = ask(s, post("send", {"client_id": bob.id, "message": "psst", "name": "<B>"}, type=type))
        check(parsed(answer, 200)["ok"] is True and b'"id"' not in answer.body, answer)
        message = said(bob.message(), TO_YOU + "psst", bob.id, "&lt;B&gt;")
        check("id" not in message, "an id of what is not stored:", message)
    expect_nothing(ann, bob)
    check(look(s, "history", room="1")["messages"] == [], "it is stored")
    for id in NOBODY, "f" * 20, bob.id[:-1], bob.id + "0", "all", "x" * 3000:
        for path, more in ("send", {"message": "x"}), ("bind", {"uid": "u"}), ("unbind", {}), ("kick", {}), \
                ("join", {"room": "g"}), ("leave", {"room": "g"}):
            bad(s, 404, "no_such_client", path, client_id=id, **more)
    bob.close()
    ann.expect("logout")
    bad(s, 404, "no_such_client", "send", client_id=bob.id, message="too late")


@api()
def before_login(s):
    """Who has not logged in is a client too: listed, told, bound, put into groups, and kicked."""
    ann = Ws(s)
    ann.fence()
    (id, known), = listed(s).items()
    check(set(known) == {"address", "groups"} and known["groups"] == [], known)
    check(known["address"] == "%s:%d" % ann.sock.getsockname(), known)
    good(s, "send", client_id=id, message="hi")
    said(ann.message(), TO_YOU + "hi", id)
    good(s, "bind", client_id=id, uid="u")
    good(s, "join", client_id=id, room="g")
    check(listed(s)[id] == {**known, "uid": "u", "groups": ["g"]}, listed(s))
    for to in {"uid": "u"}, {"room": "g"}:
        check(good(s, "send", message={"to": to}, **to) == {"sent": 1})
        check(ann.message() == {"to": to})
    ann.say("x")
    ann.expect_error("not_logged_in")
    check(good(s, "kick", client_id=id) == {"kicked": 1})
    ann.expect_close(4001)


OBJECTS = [
    '{"type":"news","n":[1,2.50,-0,1e3],"x":null}', '{ "a" : "\\u00e9\\/ \\ud83d\\ude00" }', "[]", "{}",
    '["飞",{"a":{"b":[]}}]', '{"type":"say","content":"<b>raw</b>"}', '{"type":"ping"}', '{"a":1,"a":2}']


@api(rows=[(text, text) for text in OBJECTS])
def objects(s, name, text):
    """An object or array goes out as it came, byte for byte, to those who are there, and is not kept."""
    room = new_room()
    ann, bob = join(s, room, "Ann", "Bob")
    good(s, "bind", client_id=bob.id, uid=room)
    for to, clients in ({"room": room}, [ann, bob]), ({"uid": room}, [bob]), ({"client_id": ann.id}, [ann]):
        body = json.dumps(to)[:-1] + ',"message": ' + text + " }"
        answer = parsed(ask(s, post("send", body)), 200)
        check(answer == {"ok": True, "sent": len(clients)}, answer)
        for client in clients:
            check((got := raw_text(client)) == text.encode(), "it came as", got)
    for to in {"room": "nobody is here"}, {"uid": "nobody"}:
        check(good(s, "send", message=[], **to) == {"sent": 0})
    expect_nothing(ann, bob)
    check(look(s, "history", room=room)["messages"] == [], "it is stored")


@stored()
def objects_and_texts_in_order(s, d):
    """What goes out as it is and what is stored are heard in the order of the calls, also in one go."""
    ann = join(s, "1", "Ann")
    calls = [{"room": "1", "message": f"{i}" if i % 3 else {"n": i}} for i in range(60)]
    http = Http(s, at=ADMIN)
    http.send(b"".join(post("send", call) for call in calls))
    answers = [parsed(http.answer(), 200) for _ in calls]
    heard = [ann.message() for _ in calls]
    check([m["n"] if "n" in m else int(m["content"]) for m in heard] == list(range(60)), "the order is", heard)
    check([m.get("id") for m in heard] == [a.get("id") for a in answers], "the ids differ")


WRONG = [  # name, path, fields; whatever is wrong, it is a matter of a field
    ("nobody to send to", "send", {"message": "x"}),
    ("room and uid", "send", {"room": "1", "uid": "u", "message": "x"}),
    ("room and client_id", "send", {"room": "1", "client_id": NOBODY, "message": "x"}),
    ("uid and client_id", "send", {"uid": "u", "client_id": NOBODY, "message": "x"}),
    ("all three", "send", {"room": "1", "uid": "u", "client_id": NOBODY, "message": "x"}),
    ("no message", "send", {"room": "1"}),
    ("no message, to a user", "send", {"uid": "u"}),
    ("empty room", "send", {"room": "", "message": "x"}),
    ("empty uid", "send", {"uid": "", "message": "x"}),
    ("room is an array", "send", {"room": ["1"], "message": "x"}),
    ("room is an object", "send", {"room": {"1": 1}, "message": "x"}),
    ("uid is an object", "send", {"uid": {}, "message": "x"}),
    ("name is an array", "send", {"room": "1", "message": "x", "name": []}),
    ("bind nobody", "bind", {"uid": "u"}),
    ("bind to nobody", "bind", {"client_id": "$"}),
    ("bind to empty", "bind", {"client_id": "$", "uid": ""}),
    ("bind to an array", "bind", {"client_id": "$", "uid": []}),
    ("unbind nobody", "unbind", {}),
    ("join nowhere", "join", {"client_id": "$"}),
    ("join empty", "join", {"client_id": "$", "room": ""}),
    ("join an object", "join", {"client_id": "$", "room": {}}),
    ("join nobody", "join", {"room": "g"}),
    ("leave nowhere", "leave", {"client_id": "$"}),
    ("leave nobody", "leave", {"room": "g"}),
    ("kick nobody", "kick", {}),
    ("kick nobody with a word", "kick", {"message": "bye"}),
    ("kick two", "kick", {"client_id": "$", "uid": "u"}),
]


@api(rows=[(f"{name}, {type}", type, path, fields) for name, path, fields in WRONG for type in (JSON, FORM)
           if type == JSON or not any(isinstance(v, (list, dict)) for v in fields.values())])
def wrong_fields(s, name, type, path, fields):
    """Missing, empty, of another type, or two that exclude each other: bad_field, and nothing happens."""
    ann = join(s, room := new_room(), "Ann")
    fields = {k: ann.id if v == "$" else room if v == "1" else v for k, v in fields.items()}
    answer = ask(s, post(path, fields, type=type))
    if answer.status == 404 and "client_id" not in fields:
        parsed(answer, 404, "no_such_client")   # is as clear
    else:
        parsed(answer, 400, "bad_field")
    ann.expect_nothing()
    check(listed(s)[ann.id]["groups"] == [room] and "uid" not in listed(s)[ann.id], listed(s))


@api(rows=[(f"{path} {field}", path, field, more) for path, field, more in (
    ("send", "room", {"message": "x"}), ("send", "uid", {"message": "x"}), ("bind", "uid", {"client_id": "$"}),
    ("join", "room", {"client_id": "$"}))])
def long_names(s, name, path, field, more):
    """128 bytes are a name, 129 are not; bytes count, not letters."""
    ann = join(s, new_room(), "Ann")
    more = {k: ann.id if v == "$" else v for k, v in more.items()}
    for text in "x" * 128, "\u00e9" * 64, "\U0001f600" * 32:
        good(s, path, **{field: text}, **more)
    for text in "x" * 129, "\u00e9" * 64 + "x", "\U0001f600" * 33, "x" * 100000:
        message = bad(s, 400, "too_long", path, **{field: text}, **more)
        check(field in message, "the words do not name it:", message)
    ann.expect_nothing()


@api()
def forms(s):
    """Percent signs and plus signs are decoded, and what lacks a field or is not UTF-8 is refused."""
    ann = join(s, "a b+c&飞", "Ann")
    for body in ("room=a+b%2Bc%26%e9%A3%9E&message=x+%2b%3D%3d", "&&message=%78+%2B==&room=a%20b%2bc%26飞&",
                 "x=1&room=a+b%2Bc%26%E9%A3%9E&=&y&message=x%20%2B%3d="):
        parsed(ask(s, post("send", body, type=FORM)), 200)
        said(ann.message(), "x +==")
    parsed(ask(s, post("send", "room=a+b%2Bc%26%E9%A3%9E&message=hi", type=FORM + "; charset=UTF-8")), 200)
    said(ann.message(), "hi")
    parsed(ask(s, post("send", "room=a+b%2Bc%26%E9%A3%9E&message=5%+%zz+%4", type=FORM)), 200)
    said(ann.message(), "5% %zz %4")   # as PHP reads what is no escape
    parsed(ask(s, post("send", " room=a+b%2Bc%26%E9%A3%9E&message= as it is  ", type=FORM)), 200)   # curl -d encodes nothing
    said(ann.message(), " as it is  ")
    for body in ("", "%", "room", "room=&message=x", "room=1&message=%ff", "room=%C0%80&message=x", "Room=1&message=x",
                 "%72oom%=1&message=x", "room=1&message=%ed%a0%80", "room=1;message=x"):
        answer = ask(s, post("send", body, type=FORM))
        check(answer.status == 400 and json.loads(answer.body)["code"] in ("bad_request", "bad_field"), body, answer)
    ann.expect_nothing()


@api(rows=[(repr(body[:30]), body) for body in (
    "", " ", "x", "{", "[]", "5", "null", '"x"', "{}{}", '{"room":"1","message":"x"} x', "{'room':'1'}",
    '{"room":"1","message":"x"', '{"room":"1" "message":"x"}', '{"room":"1","message":"\n"}', "room=1&message=x",
    '{"room":"1","message":"\\ud83d"}', '{"room":"1","message":"\\x"}', '{"room":"1","message":01}', "\ufeff{}",
    '{"room":"1","message":' + "[" * 100000 + "]" * 100000 + "}", "[" * 500000, '{"a":' * 100000,
    b'{"room":"1","message":"\xff"}', b'{"room":"1","message":"\xed\xa0\x80"}', b'{"room":"\xc0\xaf","message":"x"}',
    b"\0",
    '{"room":"1","message":{"a":}}', '{"room":"1","message":{"a":[1,]}}')])
def not_json(s, name, body):
    """What is not one whole JSON object is refused, wherever it is broken, and nobody hears of it."""
    ann = join(s, room := new_room(), "Ann")
    body = body.replace('"1"', f'"{room}"') if isinstance(body, str) else body
    answer = ask(s, post("send", body))
    check(answer.status == 400 and json.loads(answer.body)["code"] in ("bad_request", "bad_field"), answer)
    ann.expect_nothing()


@api()
def unusual_values(s):
    """NUL, numbers, true and null where a text belongs: an answer of some kind, never a broken message."""
    ann = join(s, "1", "Ann")
    for value in r'"\u0000"', r'"a\u0000b"', "5", "-0", "1e999", "true", "false", "null", "9" * 5000:
        for body in ('"room":"1","message":%s', '"room":%s,"message":"x"', '"uid":%s,"message":"x"',
                     '"room":"1","message":"x","name":%s', '"client_id":%s,"message":"x"'):
            check(ask(s, post("send", "{" + body % value + "}")).status in (200, 400, 404), body, value)
    while ann.fence().early:
        check(ann.early.popleft()["type"] == "say")
    alive(s)


@api("--backlog", "65536", around=Bystander)
def big_messages(s):
    """A message of --max-message is said, a longer one refused; neither hurts anybody."""
    ann = join(s, "1", "Ann")
    for message in "x" * 65537, ["x" * 65533]:
        long = json.dumps({"room": "1", "message": message}, separators=(",", ":"))
        parsed(ask(s, post("send", long)), 413, "too_long")
    ann.expect_nothing()
    good(s, "send", room="1", message="x" * 65536)
    said(ann.message(), "x" * 65536)
    for text in "x" * 60000, "&" * 60000, "x" * 1000000, "&" * 1000000, {"x": "y" * 1000000}:
        for to in {"room": "1"}, {"client_id": ann.id}, {"uid": "u"}:
            answer = ask(s, post("send", {"message": text, **to}))
            check(answer.status in (200, 400, 404, 413, 503), answer)
    alive(s)


# ---------------------------------------------------------------------------
# What is stored
# ---------------------------------------------------------------------------

@case()
def stored_when_answered():
    """What was answered with an id is there after kill -9, for rooms nobody was in and users who were away."""
    with directory() as d:
        with Api("--data", d) as s:
            ann = join(s, "1", "Ann")
            room = [good(s, "send", room="1", message=f"{i}")["id"] for i in range(3)]
            heard = [ann.message() for _ in room]
            empty = good(s, "send", room="nobody there", message="x")["id"]
            first, second = (good(s, "send", uid="bob", message=f"{i}")["id"] for i in range(2))
            s.kill()
            s.want_status, s.asked_to_stop = s.process.returncode, True
        with Api("--data", d) as s:
            history = look(s, "history", room="1")
            check(history == {"room_id": "1", "messages": heard, "more": False}, history)
            check([m["id"] for m in heard] == room, "other ids:", room, heard)
            there = look(s, "history", room="nobody there")["messages"]
            check([(m["id"], m["content"]) for m in there] == [(empty, "x")], there)
            bob = join(s, "1", "Bob")
            good(s, "bind", client_id=bob.id, uid="bob")
            bob.send_json(type="login", client_name="Bob", room_id="1", inbox_since=first)
            check(bob.message().get("inbox_id") == second, "the newest letter is another")
            letter, = bob.expect("history")["messages"]
            check(said(letter, TO_YOU + "1", "bob")["id"] == second, letter)


@case()
def not_stored():
    """When the disk is full the answer is 503 storage, nobody sees it, and all is well when it is not."""
    with directory() as d, Api("--data", d) as s:
        ann = join(s, "1", "Ann")
        good(s, "bind", client_id=ann.id, uid="ann")
        good(s, "send", room="1", message="before"), good(s, "send", uid="ann", message="before")
        before = [ann.message(), ann.message()]
        soft, hard = resource.prlimit(s.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(s.pid, resource.RLIMIT_FSIZE, (0, hard))
        for to in {"room": "1"}, {"uid": "ann"}, {"room": "new"}, {"uid": "new"}:
            bad(s, 503, "storage", "send", message="lost", **to)
        http = Http(s, at=ADMIN)   # many in one go, among those that do not need the disk
        http.send(b"".join(post("send", {"room": "1", "message": "lost"}) +
                           post("send", {"room": "1", "message": {"n": i}}) for i in range(20)))
        for _ in range(20):
            parsed(http.answer(), 503, "storage")
            check(parsed(http.answer(), 200)["sent"] == 1)
        for i in range(20):
            check(ann.message() == {"n": i})
        ann.expect_nothing()
        resource.prlimit(s.pid, resource.RLIMIT_FSIZE, (soft, hard))
        for to in {"room": "1"}, {"uid": "ann"}, {"room": "new"}, {"uid": "new"}:
            good(s, "send", message="after", **to)
        check([ann.message()["content"] for _ in "12"] == ["after", TO_YOU + "after"], "something else was said")
        check([m["content"] for m in look(s, "history", room="1")["messages"]] == [before[0]["content"], "after"])
        check([m["content"] for m in look(s, "history", room="new")["messages"]] == ["after"])


@stored()
def callers_who_do_not_wait(s, d):
    """Who resets the connection behind a call leaves the server as it was; the others get theirs."""
    ann = join(s, "1", "Ann")
    for i in range(100):
        http = Http(s, at=ADMIN)
        http.send(post("send", {"room": "1", "message": "left"}) * (i % 3 + 1))
        http.reset() if i % 2 else http.close()
    http = Http(s, at=ADMIN)   # one who says that he has nothing more to ask is still answered
    http.send(post("send", {"room": "1", "message": "last"}))
    http.sock.shutdown(socket.SHUT_WR)
    last = parsed(http.answer(), 200)["id"]
    http.expect_end()
    while (message := ann.message())["id"] != last:
        said(message, "left")
    alive(s)


# ---------------------------------------------------------------------------
# Clients and what may be done to them
# ---------------------------------------------------------------------------

@api()
def bind(s):
    """A user from now on: in what it says, for what is said to it; another uid replaces it; unbind ends it."""
    ann, bob, again = *join(s, "1", "Ann", "Bob"), join(s, "2", "Bob")
    ann.say("before")
    check(["from_uid" in c.expect("say") for c in (ann, bob)] == [False, False])
    check(good(s, "bind", client_id=ann.id, uid="ann") == {})
    parsed(ask(s, post("bind", {"client_id": bob.id, "uid": "42"}, type=FORM)), 200)
    good(s, "bind", client_id=again.id, uid=42)   # the same user
    ann.say("now")
    for client in ann, bob:
        client.expect("say", content="now", from_uid="ann")
    ann.send_json(type="say", to_uid="42", to_client_name="Bob", content="psst")
    for client in bob, again:
        client.expect("say", content=TO_YOU + "psst", to_uid="42", from_uid="ann")
    ann.expect("say", to_uid="42", content="<b>你对Bob说: </b>psst")
    check({c["uid"] for c in listed(s).values()} == {"ann", "42"}, listed(s))
    good(s, "bind", client_id=bob.id, uid="other")
    for uid, client in ("42", again), ("other", bob):
        check(good(s, "send", uid=uid, message=[uid]) == {"sent": 1})
        check(client.message() == [uid])
    check(good(s, "unbind", client_id=ann.id) == {})
    ann.say("after")
    check(["from_uid" in c.expect("say", content="after") for c in (ann, bob)] == [False, False])
    check("uid" not in listed(s)[ann.id], listed(s))
    good(s, "unbind", client_id=ann.id)   # is as good as done
    bob.close()
    ann.expect("logout")
    check(good(s, "send", uid="other", message=[]) == {"sent": 0})
    expect_nothing(ann, again)


@api()
def bind_and_rebind(s):
    """Many users one after another, letters to each: only its own reach it, and nobody is left behind."""
    ann = join(s, "1", "Ann")
    for i in range(100):
        good(s, "bind", client_id=ann.id, uid=f"u{i}")
        good(s, "send", uid=f"u{i}", message="mine")
        good(s, "send", uid=f"u{i - 1}", message="not any more")
        said(ann.message(), TO_YOU + "mine", f"u{i}")
    ann.expect_nothing()
    check([r["room"] for r in look(s, "rooms")["rooms"]] == ["1"], "inboxes are listed:", look(s, "rooms"))


@api()
def join_and_leave(s):
    """In another room one hears what is said there, once, and still speaks in one's own."""
    ann, bob = join(s, "1", "Ann"), join(s, "g", "Bob")
    check(good(s, "join", client_id=ann.id, room="g") == {})
    for room in "g", "1":   # once more is the same
        good(s, "join", client_id=ann.id, room=room)
    parsed(ask(s, post("join", {"client_id": ann.id, "room": "7 7"}, type=FORM)), 200)
    good(s, "join", client_id=ann.id, room=7)
    check(listed(s)[ann.id] == {**listed(s)[ann.id], "groups": ["1", "g", "7 7", "7"], "room": "1"}, listed(s))
    bob.say("hello")
    for client in ann, bob:
        client.expect("say", content="hello")
    ann.say("to my own room")
    ann.expect("say", content="to my own room")
    expect_nothing(ann, bob)
    for room, clients in ("g", [ann, bob]), ("7", [ann]), ("7 7", [ann]):
        id = good(s, "send", room=room, message=room)["id"]
        for client in clients:
            check(said(client.message(), room)["id"] == id)
    check(list(listed(s, room="g")) == [bob.id, ann.id], "not who came first is first:", listed(s, room="g"))
    check(good(s, "leave", client_id=ann.id, room="g") == {})
    parsed(ask(s, post("leave", {"client_id": ann.id, "room": "7 7"}, type=FORM)), 200)
    bob.say("alone")
    bob.expect("say", content="alone")
    check(good(s, "send", room="7 7", message=[]) == {"sent": 0})
    check(listed(s)[ann.id]["groups"] == ["1", "7"], listed(s))
    expect_nothing(ann, bob)


@api()
def in_any_order(s):
    """Bound before the login, in a group that becomes the room, out of one's own room: each word comes once."""
    ann, bob = Ws(s), join(s, "1", "Bob")
    ann.fence()
    id, = set(listed(s)) - {bob.id}
    for _ in "12":
        good(s, "bind", client_id=id, uid="ann")
        good(s, "join", client_id=id, room="1")
    good(s, "send", uid="ann", message="early")
    said(ann.message(), TO_YOU + "early", "ann")
    ann.login("Ann", "1")
    bob.expect("login", client_id=id)
    good(s, "bind", client_id=id, uid="ann")
    good(s, "send", uid="ann", message="once"), good(s, "send", room="1", message="once")
    check({ann.message()["content"] for _ in "12"} == {TO_YOU + "once", "once"})
    said(bob.message(), "once")
    expect_nothing(ann, bob)
    good(s, "leave", client_id=id, room="1")   # the room it speaks in
    good(s, "leave", client_id=id, room="1")
    bob.say("without Ann")
    bob.fence()
    check([m for m in bob.early if m.get("content") == "without Ann"], "Bob does not hear himself")
    ann.fence()
    check(not [m for m in ann.early if m.get("content")], "who left hears it:", list(ann.early))
    check(listed(s)[id]["groups"] == [] and "room" not in listed(s, room="1").get(id, {}), listed(s))
    ann.early.clear(), bob.early.clear()
    for message in {"type": "say", "to_client_id": "all", "content": "x"}, {"type": "history"}, {"type": "logout"}:
        ann.send_json(message)
        ann.fence()   # whatever it is told, all is well after it
    ann.early.clear()
    check(ann.login("Anna", "1")["client_list"] == {bob.id: "Bob", id: "Anna"}, "the list is wrong")
    bob.fence()
    bob.early.clear()
    good(s, "send", room="1", message="again")
    for client in ann, bob:
        said(client.message(), "again")
    good(s, "unbind", client_id=id)
    good(s, "send", uid="ann", message="nobody hears it")
    expect_nothing(ann, bob)


@api()
def too_many_groups(s):
    """The 63rd is refused, the 62 stay, and one that is left makes room."""
    ann = join(s, "0 chat", "Ann")
    for i in range(61):
        good(s, "join", client_id=ann.id, room=f"g{i}")
    answer = ask(s, post("join", {"client_id": ann.id, "room": "one more"}))
    if answer.status == 200:   # if the room it chats in is not counted
        answer = ask(s, post("join", {"client_id": ann.id, "room": "and more"}))
    check(answer.status >= 400 and json.loads(answer.body)["code"] == "limit", answer)
    good(s, "join", client_id=ann.id, room="g7")   # it is in there
    good(s, "leave", client_id=ann.id, room="g7")
    good(s, "join", client_id=ann.id, room="in its place")
    check(len(listed(s)[ann.id]["groups"]) in (62, 63), listed(s))
    for room in "0 chat", "g0", "g60", "in its place":
        check(good(s, "send", room=room, message=[room]) == {"sent": 1})
        check(ann.message() == [room])
    ann.expect_nothing()


@api()
def full_and_on_the_move(s):
    """Who is in 62 groups has a place for a room, and one for an inbox, and may go to another room."""
    ann = Ws(s)
    ann.fence()
    id, = listed(s)
    for i in range(62):
        good(s, "join", client_id=id, room=f"g{i}")
    ann.login("Ann", "1")
    good(s, "bind", client_id=id, uid="ann")
    for room in "2", "1":
        ann.login("Ann", room)
        check(listed(s)[id]["room"] == room, listed(s))
    good(s, "send", uid="ann", message="still here")
    said(ann.message(), TO_YOU + "still here", "ann")


@api("--max-rooms", "3")
def too_many_rooms(s):
    """--max-rooms holds for the API too, and is told."""
    ann = join(s, "1", "Ann")
    for room in "2", "3":
        good(s, "join", client_id=ann.id, room=room)
    answer = ask(s, post("join", {"client_id": ann.id, "room": "4"}))
    check(answer.status >= 400 and json.loads(answer.body)["code"] == "limit", answer)
    check(listed(s)[ann.id]["groups"] == ["1", "2", "3"], listed(s))
    alive_rooms = [r["room"] for r in look(s, "rooms")["rooms"]]
    check(alive_rooms == ["1", "2", "3"], alive_rooms)


@api()
def kick(s):
    """A last word, as it is, then 4001 and the end; the room hears a logout."""
    ann, bob, cy, dora = join(s, "1", "Ann", "Bob", "Cy", "Dora")
    for long in "x" * 65537, {"text": "x" * 65530}:   # over --max-message: nobody is kicked
        parsed(ask(s, post("kick", {"client_id": bob.id, "message": long})), 413, "too_long")
    check(good(s, "kick", client_id=bob.id, message="<b>bye</b> 再见") == {"kicked": 1})
    check((got := raw_text(bob)) == "<b>bye</b> 再见".encode(), "the last word came as", got)
    bob.expect_close(4001)
    for client in ann, cy, dora:
        client.expect("logout", from_client_id=bob.id, from_client_name="Bob")
    for client in cy, dora:
        good(s, "bind", client_id=client.id, uid="two")
    check(parsed(ask(s, post("kick", {"uid": "two"}, type=FORM)), 200) == {"ok": True, "kicked": 2})
    for client in cy, dora:
        client.expect_close(4001, skip=True)
    check({ann.expect("logout")["from_client_id"] for _ in "12"} == {cy.id, dora.id})
    check(list(listed(s)) == [ann.id], listed(s))
    ann.expect_nothing()
    bad(s, 404, "no_such_client", "kick", client_id=bob.id)
    answer = ask(s, post("kick", {"uid": "two"}))
    check(answer.status == 404 or json.loads(answer.body) == {"ok": True, "kicked": 0}, answer)


@api("--backlog", "65536", rows=[("text", "x" * 60000), ("an object", {"type": "x", "text": "x" * 60000})])
def send_to_who_does_not_read(s, name, message):
    """What ends a connection that is too far behind is not sent, and does not count as sent."""
    mute, sent = Ws(s, rcvbuf=4096), [1]
    mute.login("Mute", "1")
    while sent[-1] == 1:
        check(len(sent) < 1000, "60 MB were not too much for it")
        sent.append(good(s, "send", client_id=mute.id, message=message)["sent"])
    check(sent[-1] == 0, "sent:", sent[-1])
    bad(s, 404, "no_such_client", "send", client_id=mute.id, message="x")


@api("--backlog", "65536")
def kick_who_does_not_read(s):
    """Who takes nothing is gone for the others at once, and for the server soon."""
    ann = join(s, "1", "Ann")
    mute = Ws(s, rcvbuf=4096)
    mute.login("Mute", "1")
    ann.expect("login")
    good(s, "kick", client_id=mute.id, message="x" * 50000)
    ann.expect("logout", from_client_id=mute.id)
    bad(s, 404, "no_such_client", "send", client_id=mute.id, message="x")
    check(list(listed(s)) == [ann.id], listed(s))


@api()
def sent_and_kicked(s):
    """What was sent right before, in the same round, is heard before the end."""
    ann = join(s, "room", "Ann")
    with contextlib.closing(Http(s, at=ADMIN)) as http:
        http.send(post("bind", {"client_id": ann.id, "uid": "ann"}) + post("send", {"uid": "ann", "message": {"n": 1}}) +
                  post("send", {"room": "room", "message": {"n": 2}}) + post("kick", {"uid": "ann"}))
        check(all(http.answer().status == 200 for _ in range(4)))
    heard = [ann.message()["n"] for _ in range(2)]
    check(heard == [1, 2], "came as", heard)
    ann.expect_close(4001)


@api()
def kicked_and_counted(s):
    """Who is kicked is not counted by what comes right behind it, in the same round."""
    ann, bob = join(s, "room", "Ann", "Bob")
    with contextlib.closing(Http(s, at=ADMIN)) as http:
        for client, left in (ann, 1), (bob, 0):
            http.send(post("kick", {"client_id": client.id}) + post("send", {"room": "room", "message": {"a": 1}}) +
                      request("/api/rooms"))
            check(parsed(http.answer(), 200)["kicked"] == 1)
            check(parsed(http.answer(), 200)["sent"] == left, "sent to others than", left)
            rooms = parsed(http.answer(), 200)["rooms"]
            check([room["clients"] for room in rooms] == [1] * left, "there are", rooms)


@api()
def clients(s):
    """All who are connected, oldest first, or those of a room or a user, by when they came there."""
    check(look(s, "clients") == {"clients": []}, look(s, "clients"))
    ann, bob, cy = *join(s, "房 1", "<Ann>", "Bob"), join(s, "2", "Cy", source="127.0.0.3")
    good(s, "bind", client_id=cy.id, uid="u&1")
    good(s, "bind", client_id=ann.id, uid="u&1")
    found = look(s, "clients")["clients"]
    check([c["client_id"] for c in found] == [ann.id, bob.id, cy.id], found)
    check(found[1] == {"client_id": bob.id, "name": "Bob", "room": "房 1", "groups": ["房 1"],
                       "address": "%s:%d" % bob.sock.getsockname()}, found[1])
    check(found[2]["address"].startswith("127.0.0.3:") and found[2]["uid"] == "u&1", found[2])
    check(found[0]["name"] in ("<Ann>", "&lt;Ann&gt;"), found[0])
    check(list(listed(s, room="房 1")) == [ann.id, bob.id], listed(s, room="房 1"))
    check(list(listed(s, uid="u&1")) == [cy.id, ann.id], "not who was bound first is first:", listed(s, uid="u&1"))
    for query in {"room": "nobody"}, {"uid": "nobody"}, {"room": "x" * 128}:
        check(look(s, "clients", **query) == {"clients": []}, query)
    ann.send_json(type="logout")
    ann.expect("logout")
    left = listed(s)[ann.id]
    check("room" not in left and left["groups"] == [], left)


@api()
def many_clients(s):
    """The list of 200 is whole."""
    crowd = [Ws(s) for _ in range(200)]
    crowd[-1].fence()
    until(lambda: len(listed(s)) == 200, f"{len(listed(s))} of 200 are listed")


@api()
def rooms(s):
    """Rooms somebody is in, oldest first, with the id of the newest message; a room that is empty is none."""
    check(look(s, "rooms") == {"rooms": []}, look(s, "rooms"))
    ann, bob = join(s, 'b"飞', "Ann", "Bob")
    cy = Ws(s)
    newest = cy.login("Cy", "a")["id"]
    good(s, "send", room="nobody is here", message="x")
    id = good(s, "send", room='b"飞', message="x")["id"]
    found = look(s, "rooms")["rooms"]
    check(found == [{"room": 'b"飞', "clients": 2, "id": id}, {"room": "a", "clients": 1, "id": newest}], found)
    cy.send_json(type="logout")
    cy.expect("logout")
    good(s, "join", client_id=bob.id, room="c")
    found = look(s, "rooms")["rooms"]
    check([(r["room"], r["clients"]) for r in found] == [('b"飞', 2), ("c", 1)], found)


@stored()
def history(s, d):
    """The newest first page, older ones by `before`, also of a room nobody is in, or ever was."""
    ann = join(s, "房 +1", "Ann")
    heard = []
    for i in range(60):
        ann.say(f"{i}") if i % 2 else good(s, "send", room="房 +1", message=f"{i}")
        heard.append(ann.expect("say", content=f"{i}"))
    for present in True, False:
        whole = look(s, "history", room="房 +1", count=200)
        check(whole == {"room_id": "房 +1", "messages": heard, "more": False}, str(whole)[:500])
        check(look(s, "history", room="房 +1") == {"room_id": "房 +1", "messages": heard[-50:], "more": True})
        pages, before = [], {}
        while True:
            page = look(s, "history", room="房 +1", count=20, **before)
            pages = page["messages"] + pages
            before = {"before": page["messages"][0]["id"]}
            if not page["more"]:
                break
        check(pages == heard, "the pages are not the whole")
        check(look(s, "history", room="房 +1", **before) == {"room_id": "房 +1", "messages": [], "more": False})
        check(look(s, "history", room="房 +1", count=1)["messages"] == heard[-1:])
        if present:
            ann.send_json(type="logout")
            ann.expect("logout")
    check(look(s, "history", room="never") == {"room_id": "never", "messages": [], "more": False})
    check(not os.path.exists(os.path.join(d, "rooms", "never")), "who looks makes no room")
    first = heard[0]["id"]
    for query in ({}, {"room": ""}, {"room": "1", "count": 0}, {"room": "1", "count": 201}, {"room": "1", "count": -1},
                  {"room": "1", "count": "x"}, {"room": "1", "count": "1e1"}, {"room": "1", "count": " 5"},
                  {"room": "1", "count": "5 "}, {"room": "1", "count": 2**64 + 5}, {"room": "1", "count": "0x10"},
                  {"room": "房 +1", "before": "x"}, {"room": "房 +1", "before": first[:-1]},
                  {"room": "房 +1", "before": first + "0"}, {"room": "房 +1", "before": "5"},
                  {"room": "房 +1", "before": first.replace("-", "_")}):
        refused_look(s, "bad_field", "history", **query)
    check("room" in refused_look(s, "too_long", "history", room="x" * 129))


@api(rows=[(query, query, room) for query, room in (
    ("room=a+b%2Bc", "a b+c"), ("room=a%20b%2bc", "a b+c"), ("x=1&room=%e9%A3%9E", "飞"), ("&room=r&", "r"),
    ("room=a=b", "a=b"), ("room=%", "%"), ("room=%4", "%4"), ("room=%zz", "%zz"), ("room=%ff", None),
    ("room=%c0%80", None), ("room", None),
    ("%72oom=r", "r"), ("room=%E9%A3", None), ("ROOM=r", None))])
def queries(s, name, query, room):
    """Percent signs and plus signs in a query are decoded; what is not UTF-8 then is refused."""
    answer = ask(s, request("/api/history?" + query))
    if room:
        check(parsed(answer, 200)["room_id"] == room, answer)
    else:
        check(answer.status == 400 and json.loads(answer.body)["code"] in ("bad_field", "bad_request"), answer)


# ---------------------------------------------------------------------------
# Push
# ---------------------------------------------------------------------------

@case()
def push():
    """An alert to the phones of a user, of a room, or to one, connected or not."""
    with Gateway() as gateway, Xchat(gateway) as s:
        a, b, c, d = (token() for _ in range(4))
        for device, room in (a, "1"), (b, "1"), (c, "2"):
            ws = Ws(s)
            ws.login("Bob", room, device_token=device)
            leave(ws)
        dora = Ws(s)   # stays, and is a user
        dora.login("Dora", "2")
        good(s, "bind", client_id=dora.id, uid="dora")
        dora.login("Dora", "2", device_token=d)
        for fields, phones in (({"room": "1", "message": 'secret 你好 "1"'}, {a, b}),
                               ({"uid": "dora", "msg": "secret 2"}, {d}),
                               ({"device_token": c.upper(), "message": "secret 3"}, {c}),
                               ({"room": "2", "msg": "secret 4"}, {c, d})):
            seen = len(gateway.pushes())
            check((got := good(s, "push", **fields)) == {"phones": len(phones)}, got, fields)
            new = gateway.pushes(n=seen + len(phones))[seen:]
            check({p["token"] for p in new} == phones and len(new) == len(phones), [p["token"] for p in new], fields)
            text = fields.get("message") or fields["msg"]
            alerts = [aps(p)["alert"] for p in new]
            check(all((a if isinstance(a, str) else a["body"]) == text for a in alerts), "the alerts are", alerts)
            s.settle()
        seen = len(gateway.pushes())
        for fields in {"room": "nobody", "message": "secret"}, {"uid": "nobody", "message": "secret"}:
            check(good(s, "push", **fields) == {"phones": 0}, fields)
        for fields in ({"room": "1"}, {"message": "secret"}, {"room": "1", "uid": "u", "message": "secret"},
                       {"room": "", "message": "secret"}, {"uid": "0", "message": "secret"}, {"uid": "x" * 129, "message": "secret"},
                       {"device_token": "xyz", "message": "secret"}, {"device_token": "", "message": "secret"},
                       {"device_token": a[:-1], "message": "secret"}, {"device_token": "a" * 1000, "message": "secret"},
                       {"room": "1", "device_token": a, "message": "secret"}, {"room": "1", "message": {"a": 1}}):
            answer = ask(s, post("push", fields))
            check(answer.status == 400 and json.loads(answer.body)["code"] in ("bad_field", "too_long"), fields, answer)
        s.settle()
        dora.expect_nothing()
        check(len(gateway.pushes()) == seen, "something else was pushed")


@case()
def push_to_a_forgotten_phone():
    """Who logs out with forget_device has no phone any more, though the connection goes on, or an older one of it does."""
    with Gateway() as gateway, Xchat(gateway) as s:
        eve, old, phone = Ws(s), Ws(s), token()
        for ws in old, eve:
            ws.login("Eve", "1")
            good(s, "bind", client_id=ws.id, uid="eve")
            ws.login("Eve", "1", device_token=phone)
        check(good(s, "push", uid="eve", message="secret") == {"phones": 1}, "it is not known")
        gateway.pushes(n=1)
        eve.send_json(type="logout", forget_device=True)
        eve.expect("logout")
        check(good(s, "push", uid="eve", message="secret") == {"phones": 0}, "a push to a forgotten phone")
        leave(old)
        eve.login("Eve", "1")
        good(s, "bind", client_id=eve.id, uid="other")   # and is no reason to remember it
        leave(eve)
        check(s.metric("devices") == 0, s.metric("devices"), "devices")


@api()
def push_without_gateway(s):
    """503 unavailable, if there is no --apns."""
    for type in JSON, FORM:
        parsed(ask(s, post("push", {"room": "1", "message": "x"}, type=type)), 503, "unavailable")


# ---------------------------------------------------------------------------
# Who may call
# ---------------------------------------------------------------------------

CALLS = [request("/api/rooms"), post("send", {"room": "1", "message": "heard"})]


@api(rows=[(host, host, ok) for host, ok in (
    ("localhost", True), ("localhost:7273", True), ("127.0.0.1", True), ("127.0.0.1:80", True), ("127.1.2.3", True),
    ("[::1]", True), ("[::1]:7273", True),
    ("evil.example", False), ("evil.example:7273", False), ("localhost.evil.example", False),
    ("127.0.0.1.evil.example", False), ("127.evil.example", False), ("127.0.0.1x", False), ("xlocalhost", False),
    ("localhost@evil.example", False), ("evil.example#localhost", False), ("[::1].evil", False), ("[::1", False),
    ("128.0.0.1", False), ("[::2]", False), ("192.0.2.1", False), ("127", False), ("127.0.0.1:80:evil", False),
    ("localhost:x", False), ("localhost,evil", False))])
def rebinding(s, host, _, ok):
    """A page whose name was made to point here is told by its Host, or the one in front of the path."""
    ann = join(s, room := new_room(), "Ann")
    for raw in (request("/api/rooms", host=host), request(f"http://{host}/api/rooms"),
                post("send", {"room": room, "message": "heard"}, host=host)):
        answer = ask(s, raw)
        check(answer.status == 200 if ok else answer.status in (400, 403), answer)
        if answer.status == 403:
            parsed(answer, 403, "forbidden")
    if ok:
        ann.expect("say", content="heard")
    ann.expect_nothing()


@case()
def unix_socket():
    """Whoever may open the socket may call, by any name."""
    with directory("admin") as path, Api(admin="unix:" + path) as s:
        ann = join(s, "1", "Ann")
        parsed(ask(s, post("send", {"room": "1", "message": "hi"}, host="any.example")), 200)
        said(ann.message(), "hi")
        strange = post("send", {"room": "1", "message": "x"}, "Origin: http://evil.example", host="any.example")
        parsed(ask(s, strange), 403, "forbidden")
        ann.expect_nothing()
        with contextlib.closing(Http(s, at=ADMIN)) as proxy:   # which keeps its connection
            for client in "192.0.2.1", "192.0.2.2":
                proxy.send(request("/api/rooms", f"X-Forwarded-For: {client}", host="any.example"))
                parsed(proxy.answer(), 200)


@api(rows=[(repr((host, origin)), host, origin, ok) for host, origin, ok in (
    ("localhost:7273", "http://localhost:7273", True), ("localhost", "http://localhost", True),
    ("localhost", "https://localhost", True), ("[::1]:1", "http://[::1]:1", True),
    ("localhost:7273", "http://localhost", False), ("localhost", "http://localhost:7273", False),
    ("localhost", "http://127.0.0.1", False), ("localhost", "null", False), ("localhost", "http://evil.example", False),
    ("localhost", "http://localhost.evil.example", False), ("localhost", "http://localhos", False),
    ("localhost", "http://xlocalhost", False), ("localhost", "localhost", False), ("localhost", "http://", False),
    ("localhost", "ftp://localhost", False), ("localhost", "file://localhost", False),
    ("localhost", "http://localhost/", False),
    ("localhost", "http://localhost@evil.example", False), ("localhost", "http://evil.example http://localhost", False),
    ("localhost", "http://localhost http://evil.example", False), ("evil.example", "http://evil.example", False))])
def origins(s, name, host, origin, ok):
    """A browser says whose page it is: only our own, and then only with JSON, which no simple form sends."""
    ann, line = join(s, room := new_room(), "Ann"), "Origin: " + origin
    check(ask(s, request("/api/rooms", line, host=host)).status == (200 if ok else 403))
    fields = {"room": room, "message": "heard"}
    for type in JSON, JSON + "; charset=utf-8", JSON.upper():
        answer = ask(s, post("send", json.dumps(fields), line, host=host, type=type))
        parsed(answer, 200 if ok else 403, None if ok else "forbidden")
        if ok:
            ann.expect("say", content="heard")
    for type in FORM, "text/plain", "multipart/form-data", "application/jsonx", "text/plain; application/json", None:
        answer = ask(s, post("send", json.dumps(fields) if type != FORM else fields, line, host=host, type=type))
        check(answer.status == (415 if ok else 403), type, answer)
    ann.expect_nothing()


@api(rows=[("of another Host", ["X: y"], "evil.example"),
           ("with another Origin", ["Origin: http://evil.example"], "localhost"),
           ("as a form", ["Origin: http://localhost", "Content-Type: text/plain"], "localhost")])
def smuggled(s, name, lines, host):
    """The body of a request that is refused is never read as the next one, which would have no Origin."""
    ann = join(s, room := new_room(), "Ann")
    inner = post("send", {"room": room, "message": "smuggled"})
    paths = "/api/send", "/api/rooms", "/nosuch", "/health"
    for method, path in itertools.product(("POST", "PUT", "GET"), paths):
        for expect in [], ["Expect: 100-continue"]:
            raw = request(path, *lines, *expect, method=method, body=inner, host=host)
            for cut in 0, len(raw) - len(inner):   # the head alone, or with the body
                http = Http(s, at=ADMIN)
                http.send(raw[:cut])
                ann.fence()
                http.send(raw[cut:])
                http.take_line_end()   # an answer, or that it wants the body
                ann.expect_nothing()
                http.close()


@api()
def preflight(s):
    """No page of somebody else is invited."""
    asks = "Access-Control-Request-Method: POST"
    answer = ask(s, request("/api/send", "Origin: http://evil.example", asks, method="OPTIONS"))
    check(answer.status in (403, 405) and not [h for h in answer.headers if h.startswith("access-control")], answer)
    http = Http(s, at=ADMIN)
    http.send(request("/api/rooms", "Origin: http://localhost", "Origin: http://evil.example"))
    check(http.answer().status in (400, 403), "two Origins are taken")


KEY = "correct horse/battery+staple="


@contextlib.contextmanager
def keyed(*options, key=KEY + "\n", **server):
    """(server, key file)"""
    with directory("key") as path:
        with open(path, "wb") as file:
            file.write(key.encode() if isinstance(key, str) else key)
        with Api("--admin-key-file", path, "-v", *options, **server) as s:
            yield s, path
            check(KEY[:15] not in s.log(), "the key is in the log")


def with_key(value, path="/api/rooms", **more):
    """A request with this Authorization."""
    raw = request(path, "Authorization: " + value, **more)
    return raw


@case()
def bearer():
    """With a key nothing but /health is answered without it, and no other will do."""
    with keyed() as (s, path):
        ann = join(s, "1", "Ann")
        for value in ("Bearer", "Bearer ", "Bearer x", "Bearer " + KEY[:-1], "Bearer " + KEY + "x",
                      "Bearer " + "x" * len(KEY),
                      "Bearer " + KEY.upper(), KEY, "Basic " + KEY, "Bearer" + KEY, "Bearer " + KEY * 50,
                      "Bearer " + KEY + ", Bearer x", "Bearer x " + KEY, "Digest Bearer " + KEY):
            for path, body in ("/api/rooms", None), ("/metrics", None), ("/nosuch", None), \
                    ("/api/send", b'{"room":"1","message":"x"}'):
                answer = ask(s, with_key(value, path, body=body))
                parsed(answer, 401, "unauthorized")
                check(answer.headers.get("www-authenticate", "").startswith("Bearer"), value, answer)
        for raw in CALLS:
            check(parsed(ask(s, raw), 401, "unauthorized"))
        two = request("/api/rooms", "Authorization: Bearer x", "Authorization: Bearer " + KEY)
        check(ask(s, two).status in (400, 401), "the second of two keys is taken")
        check(ask(s, request("/health")).body == b"ok\n")
        ann.expect_nothing()
        for scheme in "Bearer", "bearer", "BEARER":   # RFC 9110, 11.1: it has no case
            check(ask(s, with_key(f"{scheme} {KEY}")).status == 200, scheme)
        line = "Authorization: Bearer " + KEY
        good(s, "send", line, room="1", message="hi")
        said(ann.message(), "hi")
        check(ask(s, request("/metrics", line)).status == 200)
        check(ask(s, request("/nosuch", line)).status == 404)
        check(ask(s, request("/api/rooms", line, host="chat.example")).status == 200, "any Host will do with a key")
        fields = {"room": "1", "message": "x"}
        for origin, type, status in ("evil", JSON, 403), ("chat", JSON, 200), ("chat", FORM, 415):
            more = line, f"Origin: https://{origin}.example"
            answer = ask(s, post("send", fields, *more, host="chat.example", type=type))
            check(answer.status == status, origin, type, answer)
        said(ann.message(), "x")
        ann.expect_nothing()


@case()
def key_of_each_request():
    """On a kept connection each request needs the key, and a body that nobody may send is not awaited."""
    with keyed() as (s, path):
        http = Http(s, at=ADMIN)
        http.send(with_key("Bearer " + KEY))
        check(http.answer().status == 200)
        http.send(CALLS[0])
        check(http.answer().status == 401)
        for path in "/api/send", "/api/rooms", "/metrics", "/health", "/nosuch":
            for method in "POST", "GET":
                for expect in [], ["Expect: 100-continue"]:
                    with contextlib.closing(Http(s, at=ADMIN)) as http:
                        http.send(request(path, "Content-Length: 1000000", *expect, method=method))
                        check(http.answer().status in (400, 401, 413), method, path)


@case()
def refused_in_the_middle():
    """Who is still sending a body that nobody wants gets to read why."""
    with keyed() as (s, path):
        for size, key, status in (900000, "x", 401), (3000000, "x", 413), (3000000, KEY, 413):
            for _ in range(2):
                with contextlib.closing(Http(s, at=ADMIN)) as http:
                    http.send(with_key("Bearer " + key, "/api/send", body=b"x" * size))
                    check(http.answer().status == status, size)


@case(rows=[("none", KEY, True), ("LF", KEY + "\n", True), ("CR LF", KEY + "\r\n", True),
            ("1024 bytes", "k" * 1024, True), ("empty", "", False), ("LF only", "\n", False),
            ("CR LF only", "\r\n", False), ("1025 bytes", "k" * 1025, False),
            ("1 MiB", "k" * MIB, False), ("missing", None, False), ("a directory", "/", False)])
def key_files(name, key, ok):
    """A line end is no part of the key; a key that is none, or of over 1024 bytes, ends the start with status 1."""
    if ok:
        with keyed(key=key) as (s, path):
            check(ask(s, with_key("Bearer " + key.rstrip())).status == 200)
            check(ask(s, CALLS[0]).status == 401)
        return
    with directory("key") as path:
        os.mkdir(path) if key == "/" else key is not None and open(path, "w").write(key)
        status, out, err = run("--admin", "127.0.0.1:0", "--admin-key-file", path)
        check(status == 1 and out == "", status, out, err)
        check("--admin-key-file" in err.splitlines()[-1] and path in err.splitlines()[-1], err[-300:])
        check("kkkk" not in err, "the key is in the log")


@case()
def other_addresses():
    """Only with a key may others reach the port."""
    for address in "0.0.0.0:0", "[::]:0", "192.0.2.1:0":
        status, out, err = run("--admin", address)
        check(status == 2 and "--admin" in err and "--admin-key-file" in err, status, err)
    with keyed(admin="0.0.0.0:0") as (s, path):
        check(ask(s, CALLS[0]).status == 401)
        check(ask(s, with_key("Bearer " + KEY, host="192.0.2.1")).status == 200)
        check(ask(s, with_key("Bearer " + KEY)).status == 200)


@case()
def over_tls():
    """With --tls-cert the key is seen by nobody on the way; who wants the port in plain text says so."""
    for address, tls in ("127.0.0.1:0", True), ("plain:127.0.0.1:0", False):
        with keyed("--tls-cert", CERTIFICATE, admin=address) as (s, path):
            s.tls[ADMIN] = tls   # what the log says of it may stand elsewhere in the line
            check(ask(s, with_key("Bearer " + KEY)).status == 200)
            check(ask(s, CALLS[1]).status == 401)
            with contextlib.closing(Http(s, at=ADMIN, tls=False)) as http:
                http.send(with_key("Bearer " + KEY))
                check(http.answer().status == (400 if tls else 200), "in plain text")


@case()
def new_key():
    """SIGHUP reads the key again; from then on it is the other; a bad file leaves it as it was."""
    with keyed() as (s, path):
        ann = join(s, "1", "Ann")
        for key, works in (KEY + "2\n", KEY + "2"), ("", KEY + "2"), (KEY + "3", KEY + "3"):
            with open(path, "w") as file:
                file.write(key)
            lines = len(s.lines)
            s.signal(signal.SIGHUP)
            until(lambda: len(s.lines) > lines, "the log says nothing of SIGHUP")
            until(lambda: ask(s, with_key("Bearer " + works)).status == 200, "the key is another")
            for old in KEY, KEY + "2":
                check(ask(s, with_key("Bearer " + old)).status == (200 if old == works else 401), "an old key works")
        os.unlink(path)
        s.signal(signal.SIGHUP)
        s.wait_log("(?s)--admin-key-file.*--admin-key-file")
        check(ask(s, with_key("Bearer " + KEY + "3")).status == 200)
        ann.expect_nothing()


@api("--verbose")
def nothing_in_the_log(s):
    """What is said by the API is logged as little as what is said by clients, and no line can be forged."""
    ann, secret = join(s, "1", "Ann"), "xyzzy-plugh"
    for to in {"room": "1"}, {"client_id": ann.id}, {"uid": "u"}, {"room": ""}, {"client_id": "x"}:
        for type in JSON, FORM:
            ask(s, post("send", {"message": secret, "name": secret, **to}, type=type))
    ask(s, post("send", {"message": {"x": secret}, "room": "1"}))
    ask(s, post("send", '{"room":"1","message":"%s"' % secret))
    ask(s, post("bind", {"client_id": ann.id, "uid": "\r\n2026-01-01 00:00:00 forged\x1b[2J"}))
    ask(s, request("/api/history?room=%0d%0aforged%1b"))
    good(s, "kick", client_id=ann.id, message=secret)
    check(secret not in s.log(), [line for line in s.log().split("\n") if secret in line])
    for line in s.log().split("\n"):
        check(re.match(r"\d{4}-\d\d-\d\d", line) and re.fullmatch("[ -~]*", line), "a line is", repr(line))


# ---------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------

@api()
def cut_everywhere(s):
    """A call in two pieces, cut at every byte, and one in pieces of a byte, are what they are in one."""
    ann, http = join(s, "1", "Ann"), Http(s, at=ADMIN)
    raw = post("send", {"room": "1", "message": ["é"]})
    for cut in [*range(1, len(raw)), 0]:
        pieces = [raw[:cut], raw[cut:]] if cut else [raw[i:i + 1] for i in range(len(raw))]
        for piece in pieces:
            http.send(piece)
            ann.fence()   # the server has looked at it by then
        check(parsed(http.answer(), 200) == {"ok": True, "sent": 1}, "cut at", cut)
        check(ann.message() == ["é"])
    ann.expect_nothing()


@api(rows=[(str(lines), lines) for lines in (
    ["-1"], ["+5"], ["0x10"], ["1e3"], ["5, 5"], ["5 5"], ["5,"], ["5.0"], [""], ["5", "6"], ["5", "5"], ["٥"],
    ["9" * 20], [str(2**64)], [str(2**64 + 5)], ["9" * 500], [str(2**63)], [str(2**31)], [str(2**32)],
    [str(2**32 + 5)])])
def strange_lengths(s, name, lines):
    """A length that is none, or not one: 400; one that is too large: 413; and the end, whatever follows."""
    with contextlib.closing(Http(s, at=ADMIN)) as http:
        head = request("/api/send", f"Content-Type: {JSON}", *(f"Content-Length: {n}" for n in lines), method="POST")
        http.send(head + b'{"a":1}' + CALLS[0])
        status = http.answer().status
        http.expect_end()
    check(status == 400 or lines[0].isascii() and lines[0].isdigit() and len(lines) == 1 and status == 413, status)


@api(rows=[(str(lines), *lines) for lines in (
    ["Transfer-Encoding: chunked"], ["Transfer-Encoding: chunked", "Content-Length: 5"],
    ["Content-Length: 5", "Transfer-Encoding: chunked"], ["Transfer-Encoding: gzip, chunked"],
    ["Transfer-Encoding: identity", "Content-Length: 5"], ["Transfer-Encoding: x", "Content-Length: 0"],
    ["transfer-encoding:\tchunked"], ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"])])
def other_encodings(s, name, *lines):
    """Bodies have a length and nothing else: 400 and the end."""
    with contextlib.closing(Http(s, at=ADMIN)) as http:
        http.send(request("/api/send", *lines, f"Content-Type: {JSON}", method="POST") + b"0\r\n\r\n" + CALLS[0])
        check(http.answer().status == 400)
        http.expect_end()


@api()
def no_length(s):
    """A POST without a length is refused."""
    with contextlib.closing(Http(s, at=ADMIN)) as http:
        http.send(request("/api/send", f"Content-Type: {JSON}", method="POST"))
        check(http.answer().status in (400, 411))


@api(around=Bystander)
def largest_body(s):
    """1 MiB is taken; a byte more is refused before any of it has come, and costs no memory."""
    ann = join(s, "1", "Ann")
    body = b'{"room":"1","message":"hi"}'
    parsed(ask(s, post("send", body + b" " * (MIB - len(body)))), 200)
    said(ann.message(), "hi")
    for size in MIB + 1, 1 << 30:
        with contextlib.closing(Http(s, at=ADMIN)) as http:
            http.send(request("/api/send", f"Content-Type: {JSON}", f"Content-Length: {size}", method="POST"))
            check(http.answer().status == 413)
            http.expect_end()
    with s.memory_grows_at_most(4096):   # what is announced is not reserved
        for _ in range(100):
            Http(s, at=ADMIN).send(request("/api/send", f"Content-Length: {MIB}", method="POST") + b"{")
        join(s, "2", "Bob")
    ann.expect_nothing()


@api("--timeout", "1", around=Bystander)
def dripping(s):
    """Whoever sends a body, or a head, byte by byte has --timeout for all of it, and gains nothing with each byte."""
    body = post("send", {"room": "1", "message": "x" * 5000})
    split = body.index(b"\r\n\r\n") + 4
    dripping = {}   # connection -> what it has still to send
    for at_once, rest in ((body[:split], body[split:]), (b"", request("/api/rooms", "X: " + "x" * 5000)),
                          (body[:split + 1000], body[split + 1000:]), (post("send", {}) + body[:split], body[split:])):
        dripping[http := Http(s, at=ADMIN)] = rest
        http.send(at_once)
    begin = time.monotonic()
    while dripping:
        for http, rest in list(dripping.items()):
            http.send(rest[:1])
            dripping[http] = rest[1:]
            if select.select([http.sock], [], [], 0.02)[0]:
                answer = http.answer()
                if answer.status != 400:   # that of the first of two calls
                    check(answer.status == 408, answer)
                    http.expect_end()
                    check(time.monotonic() - begin > 0.9, "it was too early")
                    del dripping[http]
        check(time.monotonic() - begin < 2.5 * SLOW, f"{len(dripping)} go on after {time.monotonic() - begin:.1f} s")


@stored()
def pipelined(s, d):
    """Many calls in one go are answered in their order, those that wait for the disk as those that do not."""
    ann, http = join(s, "1", "Ann"), Http(s, at=ADMIN)
    calls = [(post("send", {"room": "1", "message": "x"}), 200), (request("/api/rooms"), 200),
             (request("/nosuch"), 404), (post("send", {"room": "1"}), 400), (request("/health"), 200),
             (post("bind", {"client_id": NOBODY, "uid": "u"}), 404),
             (post("send", {"room": "new", "message": "y" * 20000}), 200), (request("/api/send"), 405)]
    sender = threading.Thread(target=http.send, args=(b"".join(raw for raw, _ in calls) * 25,))
    sender.start()
    statuses = [http.answer().status for _ in range(25 * len(calls))]
    sender.join()
    check(statuses == [status for _, status in calls] * 25, statuses[:20])
    for _ in range(25):
        said(ann.message(), "x")
    ann.expect_nothing()
    http.send(post("send", {"room": "1", "message": "x"}) + request("/api/rooms", "Connection: close") + CALLS[1])
    check(parsed(http.answer(), 200)["id"] == parsed(http.answer(), 200)["rooms"][0]["id"])
    http.expect_end()
    ann.expect("say", content="x")
    ann.expect_nothing()


@stored()
def slow_reader(s, d):
    """Whoever asks for much and does not read gets no more memory than one answer or two."""
    for i in range(8):
        good(s, "send", room="1", message="x" * 60000)
    raw = request("/api/history?room=1&count=200")
    size = len(ask(s, raw).body)
    check(200000 < size < 400000, f"an answer has {size} bytes")
    with s.memory_grows_at_most(12288):
        http = Http(s, at=ADMIN, rcvbuf=4096)
        sender = threading.Thread(target=http.send, args=(raw * 300,))
        sender.start()
        for _ in range(20):
            alive(s)
        for _ in range(30):
            check(len(http.answer().body) == size)
        http.sock.shutdown(socket.SHUT_RDWR)
        sender.join()


@api()
def continue_first(s):
    """Who asks if a body is welcome is told; not, if it is not; and not twice."""
    body = b'{"room":"1","message":[]}'
    for line in "Expect: 100-continue", "expect: 100-Continue":
        with contextlib.closing(Http(s, at=ADMIN)) as http:
            for _ in range(2):
                http.send(post("send", "", line, f"Content-Length: {len(body)}"))
                check((head := http.take_line_end()) == b"HTTP/1.1 100 Continue\r\n\r\n", head)
                http.send(body[:9])
                http.send(body[9:])
                check(parsed(http.answer(), 200)["sent"] == 0)
    for raw, status in ((post("send", {}, "Expect: 100-continue", "Content-Length: 2000000", method="POST"), 413),
                        (request("/api/rooms", "Expect: 100-continue"), 200),
                        (request("/api/send", "Expect: 100-continue", "Content-Length: x", method="POST"), 400)):
        check((answer := ask(s, raw)).status == status, answer)
    with contextlib.closing(Http(s, at=ADMIN)) as http:   # the whole is there: it need not be told, but may
        http.send(post("send", {"room": "1", "message": []}, "Expect: 100-continue"))
        if b"100 Continue" not in (head := http.take_line_end()):
            http.buffer = head + http.buffer
        check(parsed(http.answer(), 200)["sent"] == 0)
    with contextlib.closing(Http(s, at=ADMIN)) as http:   # HTTP/1.0 does not know that answer
        http.send(post("send", "", "Expect: 100-continue", f"Content-Length: {len(body)}", version="1.0"))
        check(ask(s, request("/health")).status == 200)
        http.send(body)
        check(parsed(http.answer(), 200)["sent"] == 0)


@api()
def get_with_a_body(s):
    """The body of a GET is no request: it is skipped, or all ends there."""
    for method in "GET", "HEAD":
        with contextlib.closing(Http(s, at=ADMIN)) as http:
            http.send(request("/api/rooms", method=method, body=request("/nosuch")) + request("/health"))
            answer = http.answer(method)
            check(answer.status in (200, 400, 405), answer)
            if answer.status != 400:
                check(http.answer().body == b"ok\n", "the body was taken for a request")
            else:
                http.expect_end()


POSTS = ["send", "bind", "unbind", "join", "leave", "kick", "push"]


@api()
def methods(s):
    """405 and Allow for other methods, HEAD like GET but for the body."""
    for path in POSTS:
        for method in "GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "post":
            answer = ask(s, request("/api/" + path, method=method))
            check(answer.status == 405 and answer.headers["allow"] == "POST", path, method, answer)
            if method != "HEAD":
                parsed(answer, 405, "bad_method")
    for path in "api/clients", "api/rooms", "api/history?room=1", "metrics", "health":
        for method in "POST", "PUT", "DELETE", "OPTIONS", "get":
            answer = ask(s, request("/" + path, method=method, body=b""))
            check(answer.status == 405 and "GET" in answer.headers["allow"].split(", "), path, method, answer)
        whole, head = ask(s, request("/" + path)), ask(s, request("/" + path, method="HEAD"))
        check(head.status in (200, 405) and whole.status == 200, head)
        check(head.status == 405 or head.headers["content-length"] == whole.headers["content-length"], head, whole)


@api(rows=[(path, path) for path in (
    "/api", "/api/", "/api/nosuch", "/api/send/", "/api/send%2f", "//api/send", "/API/send", "/api/./send",
    "/api/../metrics", "/api/rooms%00", "/%61pi/rooms", "/api/rooms/1", "/api\\rooms", "/..%2f..%2fetc/passwd",
    "/api/sendx", "/api/sen")])
def unknown_paths(s, name, path):
    """404 for all that is not there, and nothing of the kind for a POST."""
    answers = ask(s, request(path)), ask(s, request(path, f"Content-Type: {JSON}", body=b'{"room":"1","message":[]}'))
    if path.startswith("/api/"):
        parsed(answers[0], 404, "not_found"), parsed(answers[1], 404, "not_found")
    check(answers[0].status == 404 and answers[1].status in (404, 405), answers)


@api()
def no_websocket_here(s):
    """The port is for calls alone, and the chat's port takes none of them, and no body."""
    with contextlib.closing(Http(s, at=ADMIN)) as http:
        http.send(get("/", *UPGRADE))
        answer = http.answer()
        check(answer.status == 400 and b"no WebSocket" in answer.body, answer)
    call = post("send", {"room": "1", "message": "x"})
    for raw in call, request("/", body=b"x"), request("/", body=b"x", method="GET"):
        check(answer_and_end(s, raw).status == 400)
    for raw in request("/api/rooms"), request("/api/clients"), request("/metrics"), request("/api/history?room=1"):
        check(ask(s, raw, at=0).status == 404)
    alive(s)


@api(around=Bystander)
def garbage(s):
    """What strangers send to any port."""
    for raw in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0" * 100,
                b"POST /api/send HTTP/1.1\nHost: a\n\n", b"POST /api/send HTTP/1.1\r\nHost : localhost\r\n\r\n",
                b"POST /api/send HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
                request("/api/send", "Host: localhost", body=b"{}"),
                b"POST /api/send HTTP/1.1\r\nHost: localhost\r\nContent-Length:\r\n 5\r\n\r\n",
                b"POST /api/send HTTP/1.1\r\nHost: localhost\r\nContent-Length\r\n\r\n"):
        with contextlib.closing(Http(s, at=ADMIN)) as http:
            http.send(raw)
            check(http.answer().status in (400, 403), raw)
            http.expect_end()
    check(ask(s, request("/api/rooms", "X: " + "x" * 10000)).status == 431)
    alive(s)


@stored("--max-rooms", "30", "--backlog", "65536")
def storm(s, d):
    """Three callers who do whatever comes to their mind, pipelined, to clients who come and go."""
    crowd, over = [], time.monotonic() + 1

    def calls(seed):
        dice, http = random.Random(seed), Http(s, at=ADMIN)
        while time.monotonic() < over:
            ids = [id for id, client in listed(s).items() if client.get("room") != "bystanders"] or [NOBODY]
            batch = []
            for _ in range(dice.randrange(1, 12)):
                values = {"room": [f"r{n}" for n in range(9)], "uid": ["u1", "u2", ""], "client_id": ids,
                          "message": ["x", [1], "x" * 9000], "msg": ["m"], "device_token": ["ab" * 32]}
                fields = {f: dice.choice(values[f]) for f in dice.sample(sorted(values), dice.randrange(1, 4))}
                path = dice.choice(POSTS + ["send", "bind", "join"] * 3 + ["clients", "rooms", "history"])
                query = urllib.parse.urlencode({k: v for k, v in fields.items() if k != "message"})
                batch.append(post(path, fields) if path in POSTS else request(f"/api/{path}?{query}"))
            http.send(b"".join(batch))
            for raw in batch:
                check((answer := http.answer()).status in (200, 400, 404, 409, 503), raw, answer)
    with Bystander(s), concurrent.futures.ThreadPoolExecutor(3) as pool:
        callers = [pool.submit(calls, seed) for seed in range(3)]
        dice = random.Random(9)
        while time.monotonic() < over:
            crowd.append(ws := Ws(s))
            ws.send_json(type="login", client_name="n", room_id=f"r{dice.randrange(9)}")
            ws.say("hello")
            time.sleep(0.005)   # a second of it, not so many
            if len(crowd) > 20:
                dice.choice((Ws.close, Ws.reset))(crowd.pop(dice.randrange(20)))
        for caller in callers:
            caller.result()
        for client in crowd:
            client.close()
    until(lambda: not listed(s), "somebody is left")
    alive(s)


# ---------------------------------------------------------------------------
# With curl
# ---------------------------------------------------------------------------

def curl(s, path, *options):
    """What curl prints for this call: (status, body)."""
    host, port = s.address(ADMIN)[1]
    line = ["curl", "-q", "-sS", "--noproxy", "*", "-m", str(DEADLINE), "-w", "\n%{http_code}", *options]
    done = subprocess.run([*line, f"http://{host}:{port}{path}"], capture_output=True, text=True)
    check(done.returncode == 0, done.stderr, line)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


@api()
def with_curl(s):
    """One of each, as a person would type it."""
    if not shutil.which("curl"):
        raise Skip("curl is not installed")
    ann, bob = join(s, "1", "Ann", "Bob")
    short, typed = ["-d", "room=1&message=hi&name=shop"], ["-H", "Content-Type: application/json", "-d"]
    for words in (short, ["-d", "room=1", "--data-urlencode", "message=hi", "-d", "name=shop"],
                  [*typed, '{"room":1,"message":"hi","name":"shop"}'],
                  [*short, "-H", "Expect: 100-continue"], [*short, "-0"]):
        status, body = curl(s, "/api/send", *words)
        check(status == 200 and json.loads(body)["ok"] is True, words, body)
        for client in ann, bob:
            check(said(client.message(), "hi", name="shop")["id"] == json.loads(body)["id"])
    for path, words, answer in (
            ("/api/bind", ["-d", f"client_id={ann.id}&uid=ann"], {"ok": True}),
            ("/api/join", ["-d", f"client_id={ann.id}&room=g"], {"ok": True}),
            ("/api/send", [*typed, '{"uid":"ann","message":[1]}'], {"ok": True, "sent": 1}),
            ("/api/leave", ["-d", f"client_id={ann.id}&room=g"], {"ok": True}),
            ("/api/unbind", ["-d", f"client_id={ann.id}"], {"ok": True}),
            ("/api/kick", ["-d", f"client_id={bob.id}&message=bye"], {"ok": True, "kicked": 1})):
        status, body = curl(s, path, *words)
        check(status == 200 and json.loads(body) == answer, path, body)
    check(ann.message() == [1])
    ann.expect("logout", from_client_id=bob.id)
    check([c["client_id"] for c in json.loads(curl(s, "/api/clients")[1])["clients"]] == [ann.id])
    check(json.loads(curl(s, "/api/rooms")[1])["rooms"][0]["room"] == "1")
    page = json.loads(curl(s, "/api/history", "-G", "--data-urlencode", "room=1", "-d", "count=2")[1])
    check(len(page["messages"]) == 2 and page["more"] is True, page)
    check(curl(s, "/api/push", "-d", "room=1&message=x")[0] == 503)
    check(curl(s, "/nosuch")[0] == 404 and curl(s, "/api/send")[0] == 405 and curl(s, "/health") == (200, "ok\n"))
    check(curl(s, "/api/rooms", "-I")[0] in (200, 405))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as big:
        for size, wanted in (MIB - 100, (200, 400, 413)), (2 * MIB, (413,)):
            big.truncate(0)
            big.write("x" * size)
            big.flush()
            check(curl(s, "/api/send", "-d", "room=g", "--data-urlencode", "message@" + big.name)[0] in wanted)


if __name__ == "__main__":
    raise SystemExit(main())
