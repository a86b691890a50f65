"""History: what was said stays, and whoever comes back gets what he missed, once.

A position in a room is an id, "<epoch>-<offset>": the offset is where the line of the
message ends in the room's log. Clients must not look into it; the tests of the files
do, for it is what makes an id findable.

    CRASH_ROUNDS    how often the server is killed in crash_test (default 10)
    HISTORY_MIB     how much history big_history has (default 32; 1024 takes half a minute)
"""

import bisect
import contextlib
import errno
import json
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from harness import (CLOSE, DEADLINE, SLOW, TEXT, TROUBLE, UPGRADE, WRAP, Faults, Http, Server, Skip, Ws, case,
                     check, expect_nothing, explain, frame, get, join, main, new_room, run, until)

CRASH_ROUNDS = int(os.environ.get("CRASH_ROUNDS", "10"))
HISTORY_MIB = int(os.environ.get("HISTORY_MIB", "32"))

ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{16}")
EPOCH = "0badcafe"  # of the logs that are laid by hand
SAY = ["type", "from_client_id", "from_client_name", "to_client_id", "content", "time", "id", "ref"]
HISTORY = ["type", "room_id", "messages", "more", "ref"]


# ---------------------------------------------------------------------------
# Servers with a memory
# ---------------------------------------------------------------------------

def scratch():
    """Where directories are made: in memory, if there is much of it, for it is the server that is tested."""
    with contextlib.suppress(OSError):
        free = os.statvfs("/dev/shm")
        if free.f_bavail * free.f_bsize > 2 << 30 and not os.environ.get("TMPDIR"):
            return "/dev/shm"
    return None


@contextlib.contextmanager
def directory():
    """A directory that does not exist before nor after."""
    with tempfile.TemporaryDirectory(prefix="xchat", dir=scratch()) as parent:
        os.chmod(parent, 0o755)
        yield os.path.join(parent, "data")


def stored(*options, rows=((),), **server):
    """A case whose server keeps history in files: f(s, directory), or so with each row, which starts
    with its name."""
    def register(function):
        def whole():
            faults = []
            with directory() as d, Server("--data", d, "--rate", "0", *options, **server) as s:
                for row in rows:
                    try:
                        function(s, d, *row)
                    except AssertionError as error:
                        faults.append(f"[{row[0]}] {explain(error)}" if row else explain(error))
            check(not faults, "; ".join(faults))
        whole.__name__ = function.__name__
        case()(whole)
        return function
    return register


def both(*options):
    """A case that holds with files and with memory alone: f(s) with either server."""
    def register(function):
        def whole():
            with directory() as d:
                for name, mode in ("files", ["--data", d]), ("memory", []):
                    try:
                        with Server("--rate", "0", *mode, *options) as s:
                            function(s)
                    except AssertionError as error:
                        raise AssertionError(f"[{name}] {explain(error)}") from error
        whole.__name__ = function.__name__
        case()(whole)
        return function
    return register


def kill(s):
    """kill -9, which nobody shall complain about; a sanitizer's report still counts."""
    s.kill()
    s.want_status, s.asked_to_stop = s.process.returncode, True
    check(not TROUBLE.search(s.log()), s.log()[-2000:])


@contextlib.contextmanager
def faulty(*options):
    """(server, directory, faults)"""
    with directory() as d:
        faults = Faults(os.path.dirname(d))
        with Server("--data", d, "--rate", "0", *options, env=faults.env) as s:
            fill(s, "first", 1)
            if not faults.writes:
                raise Skip("what this program writes cannot be intercepted")
            yield s, d, faults


# ---------------------------------------------------------------------------
# Talking
# ---------------------------------------------------------------------------

def place(id):
    check(isinstance(id, str) and ID.fullmatch(id), "not an id:", id)
    return int(id[9:], 16)


def form(message, fields):
    """These fields, in this order; the last may be missing."""
    check(list(message) in (fields, fields[:-1]), "wanted the fields", fields, "in", str(message)[:500])
    return message


NEWS = "login", "logout"  # who comes and goes, which no case here is about


def hear(client, type="say", **fields):
    """The next message that is no news, which must be of this type and have these fields."""
    message = client.message()
    while message["type"] in NEWS and "client_list" not in message:
        message = client.message()
    good = message["type"] == type and all(message.get(k) == v for k, v in fields.items())
    check(good, "wanted", type, fields, "got", str(message)[:500])
    return message


def say_or_storage(client, said):
    """The next message is a `say`, which is added to a list, or an error that it was not stored."""
    message = client.message()
    while message["type"] in NEWS:
        message = client.message()
    check(message["type"] == "say" or message.get("code") == "storage", message)
    if message["type"] == "say":
        said.append(message)
    return message["type"] == "say"


def quiet(*clients):
    """Nobody gets anything but news."""
    for client in clients:
        client.fence()
    for client in clients:
        client.fence()
        check(all(m["type"] in NEWS for m in client.early), "wanted nothing, got", list(client.early)[:3])
        client.early.clear()


def talk(client, n, text="word %d", **more):
    """A client says so much at once; the messages as he gets them."""
    said = []
    for first in range(0, n, 100):
        words = [text % i if "%" in text else text for i in range(first, min(first + 100, n))]
        client.send(b"".join(frame(TEXT, json.dumps(
            {"type": "say", "to_client_id": "all", "content": w, **more}, ensure_ascii=False)) for w in words))
        for word in words:
            said.append(form(hear(client), SAY))
    return said


def fill(s, room, n, text="word %d"):
    """Somebody comes, says so much, and goes."""
    ann = join(s, room, "Ann")
    said = talk(ann, n, text)
    ann.send(frame(CLOSE))
    ann.expect_close(None, skip=True)   # so she has left the room
    return said


class Entry:
    """A login, and what history it brought."""

    def __init__(self, where, room, name="Eve", **asked):
        self.client = client = where if isinstance(where, Ws) else Ws(where)
        self.answer = client.login(name, room, **asked)
        wanted = ["type", "client_id", "client_name", "time", "id",
                  *["recovered"] * ("since" in asked), "client_list", *["ref"] * ("ref" in asked)]
        check(list(self.answer) == wanted, "wanted the fields", wanted, "in", self.answer)
        place(self.answer["id"])
        self.id, self.recovered, self.frames = self.answer["id"], self.answer.get("recovered"), []
        more = "since" in asked or "history" in asked
        while more:
            self.frames.append(form(hear(client, "history", room_id=room), HISTORY[:-1]))
            check(type(self.frames[-1]["more"]) is bool, self.frames[-1]["more"])
            more = "since" in asked and self.frames[-1]["more"]
        self.messages = [m for f in self.frames for m in f["messages"]]
        for message in self.messages:
            form(message, SAY)
        ids = [m["id"] for m in self.messages]
        check(ids == sorted(set(ids)), "ids do not increase:", ids[:5])


def page(client, **asked):
    """The answer to one wish for history."""
    client.send_json(type="history", **asked)
    answer = form(hear(client, "history"), HISTORY)
    check(answer.get("ref") == asked.get("ref"), "ref of", answer)
    check(len(answer["messages"]) <= asked.get("count", 50), "too many:", len(answer["messages"]))
    return answer


def scroll(client, before=None, **asked):
    """Everything before an id, by going back page by page to the very beginning."""
    pages, more = [], True
    while more:
        answer = page(client, **asked, **({"before": before} if before else {}))
        more = answer["more"]
        check(answer["messages"] or not more, "there is more, but no way to it from", before)
        pages.insert(0, answer["messages"])
        before = answer["messages"][0]["id"] if answer["messages"] else None
    return [m for p in pages for m in p]


def same(got, wanted, *what):
    """Equal lists of messages; a short complaint if not."""
    def name(messages):
        return [f"{m['id'][-6:]} {m['content'][:12]}" for m in messages]
    if got != wanted:
        got, wanted = name(got), name(wanted)
        at = next((i for i, (g, w) in enumerate(zip(got, wanted)) if g != w), min(len(got), len(wanted)))
        check(False, *what, f"got {len(got)} messages, wanted {len(wanted)}; at {at}:", got[at:at + 3], "wanted",
              wanted[at:at + 3])


# ---------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------

def room_path(d, room):
    """A room's directory: its name, percent-encoded."""
    return os.path.join(d, "rooms", re.sub(rb"[^A-Za-z0-9_-]", lambda m: b"%%%02X" % m[0][0], room.encode()).decode())


def segments(d, room):
    """[(offset of the first byte, path)] of a room's files."""
    path = room_path(d, room)
    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    check(all(re.fullmatch(r"[0-9a-f]{16}\.log", n) for n in names), "strange files:", names)
    return [(int(n[:16], 16), os.path.join(path, n)) for n in names]


def epoch(d, room):
    """Of the last line of a room that has not been damaged."""
    for _, path in reversed(segments(d, room)):  # the last may be empty after a crash
        with open(path, "rb") as file:
            found = re.findall(rb'"id":"([0-9a-f]{8})-[0-9a-f]{16}"', file.read())
        if found:
            return found[-1].decode()
    raise AssertionError(f"no line in {room}")


def stored_lines(d, room, after=0, torn=False):
    """The lines of a room's log that begin at `after` or later.

    Proves that the files follow one another, and that each line ends where its id
    says. With `torn` the last line may be incomplete; it is left out.
    """
    lines, end = [], None
    files = segments(d, room)
    for number, (base, path) in enumerate(files):
        check(end in (None, base), f"a gap or overlap: {end} is followed by {base}")
        if base + os.path.getsize(path) <= after:
            end = base + os.path.getsize(path)
            continue
        with open(path, "rb") as file:
            file.seek(max(0, after - base))
            data = file.read()
        end = base + max(0, after - base)
        *whole, rest = data.split(b"\n")
        for line in whole:
            end += len(line) + 1
            check(re.search(rb'"id":"[0-9a-f]{8}-%016x"' % end, line), "the line that ends at", end, line[:500])
            lines.append(line)
        check(not rest or torn and number == len(files) - 1, "no end of line:", rest[:200])
    return lines


def said_at(start, content, ref=None, epoch=EPOCH):
    """The line of a message as the server writes it, in a file where it starts here."""
    message = {"type": "say", "from_client_id": "7f00000108fc00000001", "from_client_name": "Ann",
               "to_client_id": "all", "content": content, "time": "2026-11-23 09:01:00",
               "id": epoch + "-" + "0" * 16, **({"ref": ref} if ref else {})}
    text = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    return text.replace(message["id"].encode(), f"{epoch}-{start + len(text):016x}".encode())


def parsed(lines):
    return [json.loads(line) for line in lines]


def lay(d, room, *files, start=0):
    """Write a room's log: each file a list of contents, or of bytes, which go in as they
    are. The messages in it."""
    path, messages = room_path(d, room), []
    os.makedirs(path)
    for items in files:
        with open(os.path.join(path, f"{start:016x}.log"), "wb") as file:
            for item in items:
                raw = isinstance(item, bytes)
                line = item if raw else said_at(start, item)
                messages += [] if raw else [json.loads(line)]
                file.write(line)
                start += len(line)
    return messages


def lay_bulk(d, room, size, segment=1 << 20, start=0):
    """Write about so many bytes of short messages, quickly. The ids of first and last."""
    path = room_path(d, room)
    os.makedirs(path)
    line = said_at(0, "x" * 60)
    head, tail = re.split(rb"[0-9a-f]{16}(?=\"})", line)
    first = start + len(line)
    for _ in range(size // segment or 1):
        count = segment // len(line)
        with open(os.path.join(path, f"{start:016x}.log"), "wb") as file:
            file.write(b"".join([b"%s%016x%s" % (head, start + i * len(line), tail) for i in range(1, count + 1)]))
        start += count * len(line)
    return f"{EPOCH}-{first:016x}", f"{EPOCH}-{start:016x}"


def refused(cause, *options, **more):
    """It does not start: status 1, and one line that names the cause."""
    status, out, err = run(*options, **more)
    check(status == 1, f"status {status}, wanted 1:", err)
    check(out == "" and re.fullmatch(r"[ -~]+\n", err), "wanted one line on stderr, got", repr(err), repr(out))
    check(cause in err, "the line does not name", cause, "but says", err)


# ---------------------------------------------------------------------------
# Forms
# ---------------------------------------------------------------------------

@both()
def forms(s):
    """Who gets an id, where it stands, and what comes before what."""
    first = Entry(s, "room", "Ann", ref="r-1")
    check(place(first.id) == 0 and not first.frames, "an empty room:", first.answer, first.frames)
    second = Entry(s, "room", "Bob", since="x", history=5)
    check(second.recovered is False and not second.messages, second.answer)
    check([f["more"] for f in second.frames] == [False], second.frames)
    ann, bob = first.client, second.client
    news = ann.expect("login", client_name="Bob")
    check("id" not in news and "recovered" not in news, news)
    ann.say("hello", ref="say-1")
    heard = [form(c.expect("say", content="hello", ref="say-1"), SAY) for c in (ann, bob)]
    check(heard[0] == heard[1], heard)
    bob.say("no ref")
    for client in ann, bob:
        form(client.expect("say", content="no ref"), SAY[:-1])
    ann.say("psst", to=bob.id, ref="say-2")
    check("id" not in bob.expect("say") and "id" not in ann.expect("say", ref="say-2"), "a private word has an id")
    answer = page(ann, count=1, ref="h-1")
    check(answer["room_id"] == "room" and answer["more"] is True, answer)
    same(answer["messages"], Entry(s, "room", history=1).messages)
    quiet(ann, bob)


@both()
def ids(s):
    """They have one width, increase, are the same for everybody, and their epoch is the room's."""
    clients = [join(s, room, "Ann") for room in ("one", "two", "three")]
    epochs = set()
    for room, ann in zip(("one", "two", "three"), clients):
        before = Entry(s, room).id
        ids = [m["id"] for m in talk(ann, 50)]
        check(all(ID.fullmatch(i) for i in ids), ids[0])
        check([before, *ids] == sorted({before, *ids}), "not increasing", before, ids[:5])
        check(len({i[:8] for i in [before, *ids]}) == 1, "epochs differ")
        check(Entry(s, room).id == ids[-1], "the newest is not", ids[-1])
        epochs.add(before[:8])
    check(len(epochs) == 3, "rooms share an epoch:", epochs)


@stored()
def history_n(s, d):
    """The newest n in one frame, and whether there are older ones."""
    nobody = Entry(s, "empty", history=50)
    check(not nobody.messages and nobody.frames[0]["more"] is False, nobody.frames)
    for room, size in ("few", 200), ("room", 201):
        said = fill(s, room, size)
        for n in 0, 1, 50, 200:
            eve = Entry(s, room, history=n)
            same(eve.messages, said[size - n:], f"history {n} of {size}:")
            check([f["more"] for f in eve.frames] == [n < size], f"history {n} of {size}: more:", eve.frames[0])
            check(eve.id == said[-1]["id"], eve.id)
    check(not Entry(s, "room").frames, "history that nobody asked for")
    same(Entry(s, "room", since=said[-3]["id"], history=10).messages, said[-2:], "since goes before history:")


@both()
def wrong_history(s):
    """A login that asks for too much, or for nothing we know, is refused and changes nothing."""
    ann, eve = join(s, "room", "Ann"), Ws(s)
    for n in 201, -1, 2**32, 2**64 + 5, 1e300, 1.5, [], {}, "x":
        eve.send_json(type="login", client_name="Eve", room_id="room", history=n, ref="r")
        eve.expect_error("bad_field", "history", ref="r")
    eve.say("x")
    eve.expect_error("not_logged_in")
    expect_nothing(ann, eve)
    ann.send_json(type="login", client_name="Ann", room_id="other", history=201)
    ann.expect_error("bad_field", "200")
    talk(ann, 1)
    check(len(Entry(s, "room", history=5).messages) == 1, "it did not stay in its room")


@both()
def before_login(s):
    """History is for members."""
    fill(s, "room", 3)
    eve = Ws(s)
    eve.send_json(type="history", room_id="room", count=5, ref="r")
    eve.expect_error("not_logged_in", ref="r")
    eve.login("Eve", "room")
    check(page(eve, count=5, room_id="other")["room_id"] == "room", "of another room")
    eve.send_json(type="logout")
    eve.expect("logout")
    eve.send_json(type="history", count=5)
    eve.expect_error("not_logged_in")


@stored("--segment", "4096")
def scroll_back(s, d):
    """Page by page, however large, to the very beginning; and only then there is no more."""
    said = fill(s, "room", 230)
    eve = Entry(s, "room", history=30)
    same(eve.messages, said[-30:])
    same(scroll(eve.client, eve.messages[0]["id"], count=50), said[:200])
    for count in 1, 7, 115, 200:
        same(scroll(eve.client, count=count), said, f"by {count}:")
    same(page(eve.client)["messages"], said[-50:], "the usual count:")
    same(page(eve.client, before=said[100]["id"])["messages"], said[50:100], "the usual count:")
    for at, count, more in (200, 200, False), (201, 200, True), (1, 5, False), (0, 5, False):
        answer = page(eve.client, before=said[at]["id"], count=count, ref=f"{at}")
        same(answer["messages"], said[max(0, at - count):at])
        check(answer["more"] is more, "before", at, "count", count, "more:", answer["more"])
    same(page(eve.client, before=eve.id, count=1)["messages"], said[-2:-1])
    start = page(eve.client, before=eve.id[:9] + "0" * 16, count=1)
    check(not start["messages"] and start["more"] is False, "before the beginning:", start)


@both()
def scroll_back_in_both(s):
    """With memory alone it is the same, as far as it goes."""
    ann = join(s, "room", "Ann")
    said = talk(ann, 100)
    for count in 1, 9, 100, 200:
        same(scroll(ann, count=count), said, f"by {count}:")
    said += talk(ann, 1)
    same(scroll(ann, said[-1]["id"], count=30), said[:-1])


@both()
def wrong_page(s):
    """A wish that makes no sense is an error with its ref, and the next one is answered."""
    ann = join(s, "room", "Ann")
    first, last = (m["id"] for m in talk(ann, 2))
    wrong = [{"count": c} for c in (0, 201, -1, 2**32 + 5, 1.5, 1e300, "x", [], {}, [5])]
    wrong += [{"before": b} for b in (
        "", "x", last[:-1], last + "0", last + " ", "-" + last[9:], last[:8] + "_" + last[9:],
        f"{last[:9]}{place(last) - 1:016x}", f"{last[:9]}{place(first) + 1:016x}", f"{last[:9]}{place(last) + 1:016x}",
        last[:9] + "f" * 16, last[:9] + "8" + "0" * 15, f"{int(last[:8], 16) ^ 1:08x}{last[8:]}",
        last[:9] + "-" + last[10:], last[:9] + "0x" + last[11:], 5, [last], {}, True)]
    for fields in wrong:
        ann.send_json(type="history", ref="r", **fields)
        ann.expect_error("bad_field", *fields, ref="r")
    check(len(page(ann, before=last)["messages"]) == 1)
    ann.expect_nothing()


# ---------------------------------------------------------------------------
# Resume
# ---------------------------------------------------------------------------

@both("--segment", "4096")
def since(s):
    """Whatever was the last id seen: exactly what came after it."""
    ann = join(s, "room", "Ann")
    start = Entry(s, "room").id
    said = talk(ann, 60)
    eve = Ws(s)
    eve.login("Eve", "elsewhere")
    for seen, id in enumerate([start, *(m["id"] for m in said)]):
        back = Entry(eve, "room", since=id, ref="r")
        check(back.recovered is True and back.id == said[-1]["id"], "since", id, "recovered:", back.recovered, back.id)
        same(back.messages, said[seen:], f"since message {seen}:")
    # What was said while one was there, and what was not, is one row.
    said += talk(ann, 1)
    hear(eve, id=said[-1]["id"])
    eve.close()
    said += talk(ann, 3)
    same(Entry(s, "room", since=said[-4]["id"]).messages, said[-3:])


@both()
def since_before_the_first_word(s):
    """The id of an empty room is one to resume from, also when nobody was left in it."""
    ann = Entry(s, "room")
    ann.client.close()
    quiet(join(s, "other", "Bob"))
    said = fill(s, "room", 2)
    back = Entry(s, "room", since=ann.id)
    same(back.messages, said)
    check(back.recovered is True, "all of it, but not recovered:", ann.id, "became", back.id)


@stored("--segment", "4096")
def since_of_long_ago(s, d):
    """Much is sent in several frames of 64 KiB, with `more` on all but the last."""
    said = fill(s, "room", 1500, "%d " + "x" * 150)
    eve = Entry(s, "room", since=said[0]["id"])
    check(eve.recovered is True, "not recovered")
    same(eve.messages, said[1:])
    sizes = [sum(len(json.dumps(m, separators=(",", ":"))) + 1 for m in f["messages"]) for f in eve.frames]
    check(max(sizes) <= 65536 and len(sizes) < 40, "sizes of the frames:", sizes)


@stored()
def long_lines(s, d):
    """A line that is longer than a frame should be has one of its own, everywhere."""
    ann = join(s, "room", "Ann")
    texts = ["small", "x" * 60000, "y" * 65000, "'" * 60000, "z" * 10, "&" * 65000, "end"]  # up to 390 KB as HTML
    said = [m for text in texts for m in talk(ann, 1, text)]
    check(len(said[3]["content"]) == 360000, "not escaped")
    eve = Entry(s, "room", since=said[0]["id"])
    same(eve.messages, said[1:])
    for part in eve.frames:
        size = sum(len(json.dumps(m, separators=(",", ":"))) + 1 for m in part["messages"])
        check(size <= 65536 or len(part["messages"]) == 1, "a frame of", size)
    for count in 1, 2, 200:
        same(scroll(eve.client, count=count), said, f"by {count}:")
    for n in 2, 7:
        eve = Entry(s, "room", history=n)
        check(eve.messages and len(eve.frames) == 1 and eve.frames[0]["more"], n, "gave", len(eve.messages))
        same(eve.messages, said[-len(eve.messages):])
        same(scroll(eve.client, eve.messages[0]["id"]) + eve.messages, said)


@stored()
def a_page_has_a_limit(s, d):
    """256 KiB of lines, even if more were asked for, and then there is more."""
    said = fill(s, "room", 200, "x" * 20000)
    eve = Entry(s, "room", history=200)
    size = sum(len(json.dumps(m, separators=(",", ":"))) + 1 for m in eve.messages)
    check(200000 < size <= 262144 and eve.frames[0]["more"] is True, "a page of", size)
    same(eve.messages, said[-len(eve.messages):])
    same(scroll(eve.client, eve.messages[0]["id"], count=200) + eve.messages, said)


def strange_ids(id):
    """Ids that were never given out in a room where `id` is the newest of more than one."""
    n = place(id)
    return [f"{int(id[:8], 16) ^ 1:08x}{id[8:]}", "00000000" + id[8:], "ffffffff" + id[8:],
            f"{id[:9]}{n - 1:016x}", f"{id[:9]}{n + 1:016x}", f"{id[:9]}{n + 1000000:016x}", f"{id[:9]}{1:016x}",
            id[:9] + "7" + "f" * 15, id[:9] + "8" + "0" * 15, id[:9] + "f" * 16, id[:9] + f"{2**32 + n:016x}",
            "", "x", "-", id[:8], id[:9], id[:-1], id + "0", " " + id, id + " ", id + "\n", id + "\0",
            id.replace("-", "_"), id[:9] + "-" + id[10:], id[:9] + "+" + id[10:], id[:9] + "0x" + id[11:],
            "g" + id[1:], "../" + id, "%00" + id, id * 2, "x" * 60000]


@both()
def strange_since(s):
    """What cannot be resumed is said to be so, and all there is follows."""
    ann = join(s, "room", "Ann")
    said = talk(ann, 5)
    eve = Ws(s)
    for id in strange_ids(said[-1]["id"]):
        back = Entry(eve, "room", since=id)
        check(back.recovered is False, "recovered since", id[:99])
        same(back.messages, said, f"since {id[:99]!r}:")
    for value in 5, 1.5, True, [], {}, [said[0]["id"]]:
        eve.send_json(type="login", client_name="Eve", room_id="room", since=value)
        answer = eve.message()  # either the field is wrong, or the id
        if answer["type"] == "login":
            check(answer["recovered"] is False, value, answer)
            same(eve.expect("history")["messages"], said)
        else:
            check(answer.get("code") == "bad_field" and "since" in answer["message"], value, answer)
    check("damaged" not in s.log(), "a strange id is taken for damage:", s.log())


@both()
def login_again(s):
    """In the same room for a new name, in another room, and back: the history of the one meant."""
    ann, bob = join(s, "one", "Ann"), join(s, "two", "Bob")
    one, two = talk(ann, 5, "one %d"), talk(bob, 5, "two %d")
    eve = Entry(s, "one", history=2)
    same(eve.messages, one[-2:])
    same(Entry(eve.client, "one", "Eva", history=3).messages, one[-3:])
    same(Entry(eve.client, "two", "Eva", since=two[1]["id"]).messages, two[2:])
    back = Entry(eve.client, "two", since=one[1]["id"])
    check(back.recovered is False, "the id of another room")
    same(back.messages, two)
    one += talk(ann, 2, "later %d")
    back = Entry(eve.client, "one", since=one[4]["id"])
    check(back.recovered is True)
    same(back.messages, one[5:])
    quiet(eve.client)


@both()
def private_words_are_not_kept(s):
    """They are in nobody's history, and do not move the newest id."""
    ann, bob = join(s, "room", "Ann", "Bob")
    said = talk(ann, 1)
    for to in bob.id, ann.id:
        ann.say("psst", to=to)
    ann.fence()
    eve = Entry(s, "room", history=10)
    check(eve.id == said[0]["id"], "the newest id moved")
    same(eve.messages, said)


class Chatter:
    """Talks in a room without a pause, or with one, and listens: what he hears is the truth."""

    def __init__(self, s, room, pause=0, text="x" * 20):
        self.client, self.pause, self.text = join(s, room, "Chatter", source="127.0.0.9"), pause, text
        self.heard, self.fault, self.over = [], None, threading.Event()
        self.thread = threading.Thread(target=self.talk)

    def talk(self):
        try:
            while not self.over.wait(self.pause):
                for _ in range(3):
                    self.client.say(self.text)
                missing = 3
                while missing:
                    message = self.client.message()
                    if message["type"] == "say":
                        missing -= message["from_client_id"] == self.client.id
                        self.heard.append(message["id"])
                    check(message["type"] in ("say", "login", "logout"), message)
        except (AssertionError, OSError, ValueError) as error:
            self.fault = f"the chatter was hurt: {error}"

    def __enter__(self):
        self.thread.start()
        until(lambda: self.heard or self.fault, "nothing is said")
        return self

    def __exit__(self, kind, error, trace):
        self.over.set()
        self.thread.join()
        check(not self.fault, self.fault, error or "")

    def prove(self, start, ids):
        """Exactly what was said after the id `start`, as far as it goes."""
        until(lambda: self.fault or not ids or self.heard[-1] >= ids[-1], f"the chatter has not heard of {ids[-1:]}")
        check(not self.fault, self.fault)
        at = bisect.bisect_right(self.heard, start)
        wanted = self.heard[at:at + len(ids)]
        bad = next((i for i, (g, w) in enumerate(zip(ids, wanted)) if g != w), None)
        about = slice(max(0, (bad or 0) - 1), (bad or 0) + 2)
        check(bad is None and len(ids) == len(wanted), f"gap or duplicate at {bad} of {len(ids)} since {start}:",
              ids[about], "wanted", wanted[about])


def listen(client, n):
    """The ids of the next n messages of a room."""
    ids = []
    while len(ids) < n:
        message = client.message()
        check(message["type"] in ("say", "login", "logout"), message)
        if message["type"] == "say":
            ids.append(message["id"])
    return ids


@both()
def hand_over(s):
    """From replay to live under constant talking: no gap and no duplicate, whatever was asked for."""
    with Chatter(s, "room") as chatter:
        until(lambda: len(chatter.heard) > 50, "nothing is said")
        eve = Ws(s)
        eve.login("Eve", "elsewhere")
        for i in range(40):
            behind = random.choice([1, 2, 10, 40])
            asked = [{"since": chatter.heard[-behind]}, {"history": behind}, {}][i % 3]
            back = Entry(eve, "room", **asked)
            ids = [m["id"] for m in back.messages]
            if "history" in asked:
                chatter.prove(ids[0], ids[1:])
            start = asked.get("since") or ids and ids[0] or back.id
            check(back.recovered is not False, "not recovered")
            check(ids[-1:] in ([], [back.id]), "the newest is", back.id, "but got", ids[-1:])
            chatter.prove(start, ids[start in ids:] + listen(eve, 10))
            if i % 2:  # in the same room again, or from another one
                Entry(eve, "elsewhere")


@stored("--backlog", "262144")
def hand_over_to_a_slow_reader(s, d):
    """A long replay to one who hardly reads costs the server no memory. If the room's backlog goes by
    meanwhile he may be closed, as others are; when he comes back he goes on where he was."""
    first, last = lay_bulk(d, "room", 8 << 20)
    with Chatter(s, "room", 0.001, "x" * 500) as chatter, s.memory_grows_at_most(3072):
        ids, live, comes = [first], 0, 0
        while live < 50:
            comes += 1
            check(comes < 20, "it gets no further")
            eve = Ws(s, rcvbuf=16384)
            eve.send_json(type="login", client_name="Eve", room_id="room", since=ids[-1])
            if comes == 1:
                heard = len(chatter.heard)
                until(lambda: len(chatter.heard) > heard + 1000, "the chatter is slow")  # 500 KB, two backlogs
            answer, began = eve.expect("login"), len(ids)
            check(answer["recovered"] is True, answer)
            with contextlib.suppress(AssertionError):
                while live < 50:
                    opcode, event = eve.event()
                    if opcode == CLOSE:
                        check(event[:2] == b"\x03\xf5", "closed:", event)
                        break
                    live += event["type"] == "say"
                    ids += [event["id"]] if event["type"] == "say" else [m["id"] for m in event.get("messages", [])]
            check(len(ids) > began, "nothing new")
            eve.close()
        old = ids.index(last) + 1
        check(ids == sorted(set(ids)) and old == place(last) // place(first), "the old ones:", old)
        chatter.prove(last, ids[old:])


@both("--backlog", "65536")
def slow_member_comes_back(s):
    """One who was closed for being too slow is told with `since` what he missed, or that some is gone."""
    ann, eve, said = join(s, "room", "Ann"), Ws(s, rcvbuf=4096), []
    eve.login("Eve", "room")
    while not re.search("--backlog", s.log()):
        said += talk(ann, 50, "x" * 3000)
        check(len(said) < 5000, "15 MB were not too much for it")
    heard = everything(eve)
    check(heard == [m["id"] for m in said[:len(heard)]] and heard, "heard before the end:", len(heard))
    back = Entry(s, "room", since=heard[-1])
    same(back.messages, said[len(heard):] if back.recovered else said[-len(back.messages):])


def everything(client, last=None):
    """The ids of all messages until the connection ends, or until the last one."""
    ids = []
    with contextlib.suppress(AssertionError):  # the end
        while not ids or ids[-1] != last:
            opcode, event = client.event()
            if opcode == CLOSE:
                break
            if event["type"] not in NEWS:
                ids += [m["id"] for m in event["messages"]] if event["type"] == "history" else [event["id"]]
    return ids


@stored("--retain", str(1 << 30), "--backlog", "65536")
def end_of_a_replay(s, d):
    """A client may do anything while his replay is on its way; nobody else is hurt."""
    first, last = lay_bulk(d, "room", 2 << 20)
    other = fill(s, "other", 3)
    ann = join(s, "room", "Ann")

    def begin():
        eve = Ws(s, rcvbuf=4096)
        eve.send_json(type="login", client_name="Eve", room_id="room", since=first)
        ann.expect("login")
        return eve

    def until_ref(eve, ref):
        """What is on its way, up to an answer."""
        message = eve.message()
        while message.get("ref") != ref:
            check(message["type"] in ("login", "history"), message)
            message = eve.message()
        return message

    for end in Ws.reset, Ws.close:
        end(begin())
        ann.expect("logout")

    eve = begin()
    eve.send_json(type="logout", ref="bye")
    ann.expect("logout")
    until_ref(eve, "bye")
    eve.expect_nothing()
    same(Entry(eve, "other", history=5).messages, other)

    eve = begin()  # into another room: the old replay ends, and only the new room is heard
    eve.send_json(type="login", client_name="Eve", room_id="other", since=other[0]["id"], ref="second")
    ann.expect("logout")
    until_ref(eve, "second")
    same(eve.expect("history", room_id="other")["messages"], other[1:])
    eve.expect_nothing()
    eve.close()

    eve = begin()  # the same room again, for other words: those are what counts
    eve.send_json(type="login", client_name="Eva", room_id="room", since=last, ref="second")
    ann.expect("login")
    eve.say("from the middle")
    said = ann.expect("say", content="from the middle")
    until_ref(eve, "second")
    check(everything(eve, said["id"]) == [said["id"]], "heard after the second login")
    quiet(eve, ann)

    eve = begin()  # talks, asks and pings in the middle of it
    for i in range(50):
        eve.say(f"word {i}")
        eve.send_json(type="ping", ref=f"p{i}")
    eve.send_json(type="history", count=3, ref="page")
    said = [ann.expect("say", content=f"word {i}") for i in range(50)]
    ids, answers = [], []
    while len(answers) < 51 or ids[-1] != said[-1]["id"]:
        message = eve.message()
        if message["type"] == "pong" or message.get("ref") == "page":
            answers.append(message["ref"])
        elif message["type"] == "history":
            ids += [m["id"] for m in message["messages"]]
        elif message["type"] == "say":
            ids.append(message["id"])
    check(answers == [*(f"p{i}" for i in range(50)), "page"], answers)
    check(ids == sorted(set(ids)) and len(ids) == place(last) // place(first) + 50, "ids:", len(ids))
    quiet(eve, ann)


@stored(rows=[
    ("logout", {"type": "logout"}),
    ("other room", {"type": "login", "client_name": "Eve", "room_id": "other"}),
    ("other room, with history", {"type": "login", "client_name": "Eve", "room_id": "other", "history": 5}),
    ("other name", {"type": "login", "client_name": "Eva"}),
    ("other name, with history", {"type": "login", "client_name": "Eva", "history": 5}),
])
def no_gap_before_the_end_of_a_replay(s, d, name, last_words):
    """What was said during a replay that is given up is not sent ahead of it: a client that resumes
    after the last id it has seen would miss what is between."""
    room = new_room()
    first, last = lay_bulk(d, room, 4 << 20)
    ann, eve = join(s, room, "Ann"), Ws(s, rcvbuf=4096)
    eve.send_json(type="login", client_name="Eve", room_id=room, since=first)
    ann.expect("login")
    said = [m["id"] for m in talk(ann, 5)]
    eve.send_json({"room_id": room, **last_words, "ref": "end"})
    ids, message = [first], {}
    while message.get("ref") != "end":
        message = eve.message()
        ids += [m["id"] for m in message.get("messages", [])]
        ids += [message["id"]] if message["type"] == "say" else []
    check(ids == sorted(set(ids)), "not in order")
    live = [i for i in ids if i in said]
    check(live == said[:len(live)] and (not live or last in ids), live, "were sent, but of what was said before",
          "only that up to", ids[-len(live) - 1])


def call(s, path, **fields):
    """A POST to the HTTP API."""
    http, body = Http(s, "admin"), json.dumps(fields).encode()
    http.send(get(f"/api/{path}", f"Content-Length: {len(body)}", method="POST") + body)
    check(http.answer().status == 200, path, fields)


@stored("--admin", "127.0.0.1:0", rows=[
    ("other name", "room", {"client_name": "Eva"}),
    ("other room", "room", {"room_id": "other"}),
    ("other name, long inbox", "uid", {"client_name": "Eva"}),
    ("other room, long inbox", "uid", {"room_id": "other"}),
])
def no_order_is_lost_in_a_replay(s, d, name, where, again):
    """What a site sends to those who are there, and is not kept, reaches one who is still sent the past,
    whatever he does meanwhile."""
    room = new_room()
    first, _ = lay_bulk(d, room, 4 << 20)
    ann, eve, asked = join(s, room, "Ann"), Ws(s, rcvbuf=4096), {"since": first}
    if where == "uid":
        os.rename(room_path(d, room), os.path.join(d, "users", room.replace(" ", "%20")))
        eve.login("Eve", room)
        ann.expect("login")
        call(s, "bind", client_id=eve.id, uid=room)
        asked = {"inbox_since": first}
    login = {"type": "login", "client_name": "Eve", "room_id": room}
    eve.send_json({**login, **asked})
    ann.expect("login")
    ann.say("said")
    for key in "cjld2cjxh0000qzrmn831i7rn", first, ann.expect("say")["id"]:   # all as long as an id of ours
        call(s, "send", message={"type": "order", "id": key}, **{where: room})
    eve.send_json({**login, **again})
    eve.say("end")
    heard = []
    while heard[-1:] != ["end"]:
        message = eve.message()
        heard.append(message.get("content", message["type"]))
    check(heard.count("order") == 3, "three orders were heard", heard.count("order"), "times")


@stored("--admin", "127.0.0.1:0")
def orders_in_a_replay(s, d):
    """What a site sends to a room and then to one client is heard in this order, also during a replay."""
    first, _ = lay_bulk(d, "room", 4 << 20)
    eve = Ws(s, rcvbuf=4096)
    eve.login("Eve", "room", since=first)
    for n in range(0, 10, 2):
        call(s, "send", message={"type": "order", "n": n}, room="room")
        call(s, "send", message={"type": "order", "n": n + 1}, client_id=eve.id)
    heard = []
    while len(heard) < 10:
        message = eve.message()
        heard += [message["n"]] if message["type"] == "order" else []
    check(heard == list(range(10)), heard)


@stored("--retain", str(8 << 20), "--backlog", str(64 << 20))
def history_goes_while_it_is_replayed(s, d):
    """Retention takes files that a slow reader still needs: he may lose the connection, but never a
    message without knowing."""
    first, last = lay_bulk(d, "room", 8 << 20)
    ann, eve = join(s, "room", "Ann"), Ws(s, rcvbuf=4096)
    eve.send_json(type="login", client_name="Eve", room_id="room", since=first)
    ann.expect("login")
    said = talk(ann, 130, "%d " + "y" * 60000)  # all but the newest of what was there is dropped
    recovered, length = eve.expect("login")["recovered"], place(first)
    ids = everything(eve, said[-1]["id"])
    truth = [f"{EPOCH}-{i:016x}" for i in range(2 * length, place(last) + 1, length)] + [m["id"] for m in said]
    check(ids and ids == truth[:len(ids)] or recovered is False, "a gap nobody was told of in", len(ids), "messages")


@stored("--segment", "4096", "--retain", "4096", "--backlog", "16384")
def no_word_behind_a_gap(s, d):
    """One whose replay is dropped while it logs in again hears nothing that was said behind that."""
    said = fill(s, "room", 10, "%d " + "x" * 500)
    bob = Ws(s)
    bob.send(b"".join(frame(TEXT, json.dumps(m)) for m in [
        dict(type="login", client_name="Bob", room_id="room", since=said[3]["id"]),
        dict(type="say", to_client_id="all", content="L" * 3850),
        dict(type="login", client_name="Bob", room_id="room", history=5)]))
    last, event = said[3], None
    while event is None or event[0] != CLOSE:
        event = bob.event()
        if event[0] == CLOSE or event[1]["type"] == "login" and event[1].get("recovered") is None:
            break
        for message in event[1].get("messages", [event[1]]):
            if message["type"] != "say":
                continue
            check(message not in said or said.index(message) == said.index(last) + 1, "a gap behind", last["content"][:2])
            check(message in said or last == said[-1], "a gap before the newest")
            last = message if message in said else last


@both()
def many_wishes(s):
    """One who asks for all history again and again, and never reads, costs no more than the backlog."""
    ann = join(s, "room", "Ann")
    talk(ann, 20, "x" * 1200)
    greedy = Ws(s, rcvbuf=4096)
    greedy.login("Greedy", "room")
    wish = frame(TEXT, '{"type":"history","count":200}')
    again = frame(TEXT, '{"type":"login","client_name":"Greedy","room_id":"room","history":200}')
    with s.memory_grows_at_most(4096):
        greedy.sock.settimeout(0.2)
        with contextlib.suppress(OSError):
            for _ in range(40):
                greedy.sock.sendall(wish * 50 + again)  # 24 KB for each: 48 MB in all
        check(Entry(s, "room", history=1).messages, "the others suffer")


@case()
def login_behind_pages():
    """A client that talks on while its answers wait may change its name as well."""
    with directory() as d, Server("--data", d, "--rate", "0", "--bind", f"unix:{os.path.dirname(d)}/socket") as s:
        ann = join(s, "room", "Ann")
        talk(ann, 20, "x" * 1200)
        for pages in range(1, 9):  # 27 KB each: some of these numbers let the server stop reading
            ann.send(frame(TEXT, '{"type":"history","count":200}') * pages + frame(
                TEXT, '{"type":"login","client_name":"Anna","room_id":"room","ref":"again"}'))
            for _ in range(pages):
                hear(ann, "history")
            hear(ann, "login", ref="again")
            talk(ann, 1)


@case()
def lowered_max_message():
    """What was said when messages could be longer is still read."""
    with directory() as d:
        with Server("--data", d, "--rate", "0") as s:
            ann = join(s, "room", "Ann")
            said = [m for size in (10, 60000, 10, 30000, 10) for m in talk(ann, 1, "'" * size)]
        with Server("--data", d, "--rate", "0", "--max-message", "1000") as s:
            eve = Entry(s, "room", since=said[0]["id"])
            check(eve.recovered is True, "not recovered")
            same(eve.messages, said[1:])
            same(scroll(eve.client, count=2), said, "page by page:")
            said += talk(eve.client, 1)
            same(Entry(s, "room", since=said[0]["id"]).messages, said[1:])


@both()
def rooms_do_not_mix(s):
    """Two rooms that talk at once have their own words only, live and in history."""
    rooms = {room: join(s, room, "Ann") for room in ("1", "2", "11")}
    for i in range(20):
        for room, client in rooms.items():
            client.say(f"{room}: {i}")
    for room, client in rooms.items():
        wanted = [f"{room}: {i}" for i in range(20)]
        check([client.expect("say")["content"] for _ in wanted] == wanted, "heard in", room)
        check([m["content"] for m in Entry(s, room, history=200).messages] == wanted, "history of", room)
        quiet(client)
        check([m["content"] for m in scroll(client, count=7)] == wanted, "scrolling back in", room)


# ---------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------

NAMES = ["a", "A", "/", "//", "/etc/passwd", ".", "..", "...", "../..", "../x", "a/../../x", "a/b", "a\\b", ".lock",
         "lock", "rooms", "epoch", "0000000000000000.log", "%", "%%", "%2F", "%2f", "%2e%2e", "%00", "%s%n", "a b", " ",
         "-", "--help", "~", "*", "?", "'", '"', "$(id)", "`id`", "a;b", "a|b", "&", "<", "C:", "inbox", "uid:1", "=",
         "@", ":", "_", "a\u00e9", "ae\u0301", "\u98de\u9c7c", "\U0001F600", "\u202eabc", "\u200b", "\u2028",
         "x" * 128, "\u98de" * 20]
LONG_NAMES = ["/" * 128, "%" * 128, "." * 128, "\u98de" * 42 + "ab", "\u98de" * 42 + "ac", "." * 127 + "/"]


def everything_under(parent):
    """All paths below a directory, relative to it."""
    return sorted(os.path.relpath(os.path.join(where, name), parent)
                  for where, dirs, files in os.walk(parent) for name in dirs + files)


@case()
def room_names():
    """No name, however spelled, leads out of its own directory, and each has its own history."""
    with directory() as d:
        said = {}
        with Server("--data", d, "--rate", "0") as s:
            ann = Ws(s)
            for room in NAMES + LONG_NAMES:
                ann.login("Ann", room)
                said[room] = talk(ann, 2, json.dumps(room)[:200].replace("%", "%%") + " %d")
            kill(s)
        paths = everything_under(os.path.dirname(d))
        strange = [p for p in paths if not re.fullmatch(
            r"data|data/lock|data/rooms|data/rooms/[!-.0-~]+(/[0-9a-f]{16}\.log)?|data/users", p)]
        check(not strange, "outside of DIR/rooms, or strange:", strange)
        for room in NAMES:
            same(parsed(stored_lines(d, room)), said[room], f"the file of {room!r}:")
        with Server("--data", d, "--rate", "0") as s:
            ann = Ws(s)
            for room, messages in said.items():
                same(Entry(ann, room, history=200).messages, messages, f"{room!r}:")


@case()
def room_numbers():
    """A room's number and its string are one room, after a restart too."""
    with directory() as d:
        with Server("--data", d, "--rate", "0") as s:
            ann = Ws(s)
            ann.send_json(type="login", client_name="Ann", room_id=7)
            ann.expect("login")
            said = talk(ann, 2)
        with Server("--data", d) as s:
            ann = Ws(s)
            ann.send_json(type="login", client_name="Ann", room_id=7, history=5)
            ann.expect("login")
            check(ann.expect("history")["room_id"] == "7")
            same(Entry(s, "7", history=5).messages, said)


@stored("--segment", "4096")
def lines_are_what_was_sent(s, d):
    """Byte for byte, one to a line, in the order everybody saw."""
    ann, bob = join(s, "room", "Ann\u98de\U0001F600<\"'&>", "Bob")
    contents = ["plain", "", "a\nb\r\nc", "\0\x01\x1f\x7f", "\u2028\u2029\ufeff", "\"\\/'<>&", "\\n", "},{", '"id":"x"',
                "\U0001F600" * 100, "x" * 5000, "]}", "\t\b\f"]
    for content in contents:
        ann.say(content, ref=content[:16])
    sent = [[c.next_frame()[1] for _ in contents] for c in (ann, bob)]
    check(sent[0] == sent[1], "two copies differ")
    lines = stored_lines(d, "room")
    check(lines == sent[0], "lines differ from what was sent:", [p for p in zip(lines, sent[0]) if p[0] != p[1]][:1])
    bob.send_json(type="history", count=200)
    whole = b'{"type":"history","room_id":"room","messages":[' + b",".join(lines) + b'],"more":false}'
    check(bob.next_frame()[1] == whole, "a history frame is not made of the lines")


@stored()
def tail_f(s, d):
    """Somebody may watch a room's file while it is written: whole lines, as soon as they are sent."""
    ann = join(s, "room", "Ann")
    talk(ann, 1)
    tail = subprocess.Popen(["tail", "-n", "+1", "-f", segments(d, "room")[0][1]], stdout=subprocess.PIPE)
    try:
        said = talk(ann, 20)
        check(len(stored_lines(d, "room")) == 21, "not written before it was sent")
        lines = [tail.stdout.readline() for _ in range(21)]
        same(parsed(lines)[1:], said)
    finally:
        tail.kill()
        tail.communicate()


@case(rows=[("SIGTERM", signal.SIGTERM), ("SIGINT", signal.SIGINT), ("kill -9", signal.SIGKILL)])
def restart(name, number):
    """History, epoch and ids go on where they were, and whoever was there gets what he missed."""
    with directory() as d:
        with Server("--data", d, "--rate", "0", "--segment", "4096") as s:
            said = fill(s, "room", 50)
            eve = Entry(s, "empty")
            empty = eve.id
            eve.client.close()
            s.signal(number)
            s.wait_end()
            s.asked_to_stop, s.want_status = True, s.process.returncode
            check(s.process.returncode == (-9 if number == signal.SIGKILL else 0), s.process.returncode)
        files = everything_under(d)
        with Server("--data", d, "--rate", "0", "--segment", "4096") as s:
            eve = Entry(s, "room", since=said[10]["id"])
            check(eve.recovered is True and eve.id == said[-1]["id"], eve.answer)
            same(eve.messages, said[11:])
            said += talk(eve.client, 50)
            check([m["id"] for m in said] == sorted({m["id"] for m in said}), "ids do not go on")
            ids = [m["id"] for m in said]
            check(ids == sorted(set(ids)), "ids do not increase over a restart:", ids[-5:])
            same(scroll(eve.client, count=40), said)
            same(parsed(stored_lines(d, "room")), said)
            again = Entry(s, "empty", since=empty)
            check(place(again.id) == 0 and not again.messages, again.answer)
        check(set(files) <= set(everything_under(d)), "files have gone")


@case()
def memory_has_no_past():
    """Without --data another run is another epoch, and says so."""
    with Server("--rate", "0") as s:
        said = fill(s, "room", 5)
    with Server("--rate", "0") as s:
        for id in said[-1]["id"], said[-1]["id"][:9] + "0" * 16:
            eve = Entry(s, "room", since=id)
            check(eve.recovered is False and not eve.messages, "recovered from nothing")
            eve.client.close()
        check(eve.id[:8] != said[0]["id"][:8], "the same epoch")


@case("--rate", "0")
def memory_is_bounded(s):
    """Without --data a room keeps its newest 32 KiB; what is gone is said to be."""
    ann = join(s, "room", "Ann")
    talk(ann, 100, "x" * 1000)
    with s.memory_grows_at_most(2048):
        said = talk(ann, 4000, "%d " + "x" * 1000)
    eve = Entry(s, "room", history=200)
    size = sum(len(json.dumps(m, separators=(",", ":"))) + 1 for m in eve.messages)
    check(16384 <= size <= 32768, size, "bytes are kept")
    check(eve.frames[0]["more"] is False, "more than there is")
    same(eve.messages, said[-len(eve.messages):])
    kept = len(eve.messages)
    for back, recovered in (kept - 1, True), (kept + 2, False), (kept + 500, False), (1, True):
        eve = Entry(s, "room", since=said[-back - 1]["id"])
        check(eve.recovered is recovered, "since", back, "back recovered:", eve.recovered)
        same(eve.messages, said[-min(back, kept):])
    long = talk(ann, 1, "y" * 60000)  # longer than what is kept
    eve = Entry(s, "room", since=long[0]["id"])
    check(eve.recovered is True and not eve.messages, eve.answer)
    eve = Entry(s, "room", since=said[-1]["id"])
    check(eve.messages == (long if eve.recovered else eve.messages[:1]), "a long line was missed silently")


@case("--rate", "0")
def memory_of_many_rooms(s):
    """Without --data a room that all have left is remembered for a while, until there are too many."""
    ann, rooms = Ws(s), {}
    for i in range(2000):
        ann.login("Ann", f"room {i}")
        rooms[f"room {i}"] = talk(ann, 1)
    back = Entry(ann, "room 1990", history=5)
    same(back.messages, rooms["room 1990"])
    back = Entry(ann, "room 0", since=rooms["room 0"][0]["id"][:9] + "0" * 16)
    check(back.recovered is False and not back.messages, "nothing is ever forgotten", back.answer)
    talk(ann, 1)
    back = Entry(ann, "room 0", since=rooms["room 0"][0]["id"])
    check(len(back.messages) == 1, "what was said after an old id", back.answer)


@case("--rate", "0", serial=True)
def memory_of_long_lines(s):
    """A long line is not remembered for a room that all have left."""
    ann, before = Ws(s), s.status("VmRSS")
    for i in range(100):
        ann.login("Ann", f"room {i}")
        talk(ann, 1, "'" * 60000)
    ann.login("Ann", "another")
    if before:
        until(lambda: s.status("VmRSS") < before + 10000, "long lines are kept")


@stored("--segment", "4096", "--retain", "16384")
def retention(s, d):
    """Old files go as a whole; the size stays bounded; who is older than the oldest is told."""
    ann = join(s, "room", "Ann")
    said = []
    for _ in range(30):
        said += talk(ann, 10, "%d " + "x" * 100)
        files = segments(d, "room")
        total = sum(os.path.getsize(p) for _, p in files)
        check(total <= 16384 + 4096, "the room has", total, "bytes in", len(files), "files")
        check(all(os.path.getsize(p) <= 4096 + 3000 for _, p in files), "a file is too large")
    check(total >= 8192 and files[0][0] > 0, "what is left:", total, files)
    kept = parsed(stored_lines(d, "room"))
    same(kept, said[-len(kept):])
    eve = Entry(s, "room", history=1)
    same(scroll(eve.client, count=9), kept)
    oldest = said[-len(kept) - 1]["id"]  # where the oldest file begins: nothing is missed since
    for id, recovered in (oldest, True), (kept[0]["id"], True), (said[0]["id"], False), \
            (said[-len(kept) - 2]["id"], False), (oldest[:9] + "0" * 16, False):
        back = Entry(s, "room", since=id)
        check(back.recovered is recovered, "since", id, "recovered:", back.recovered, "the oldest is", kept[0]["id"])
        same(back.messages, [m for m in kept if m["id"] > id])
    eve = Entry(s, "room")
    eve.client.send_json(type="history", before=said[0]["id"])  # long gone: an error or the end, but an answer
    answer = eve.client.message()
    check(answer.get("code") == "bad_field" or answer.get("messages") == [] and not answer["more"], answer)


@case()
def retention_is_lowered():
    """A smaller --retain after a restart takes effect with the next words; a larger one keeps."""
    with directory() as d:
        with Server("--data", d, "--rate", "0", "--segment", "4096") as s:
            said = fill(s, "room", 200)
        same(parsed(stored_lines(d, "room")), said)
        with Server("--data", d, "--rate", "0", "--segment", "4096", "--retain", "8192") as s:
            said += fill(s, "room", 50)
            kept = parsed(stored_lines(d, "room"))
            check(sum(os.path.getsize(p) for _, p in segments(d, "room")) <= 8192 + 4096, "not less")
            same(Entry(s, "room", history=200).messages, kept)
        same(kept, said[-len(kept):])


@stored("--segment", "4096", "--retain", "8192")
def lines_longer_than_a_file(s, d):
    """They are kept whole, one is kept even if it is more than all that may be."""
    ann = join(s, "room", "Ann")
    for size in 5000, 10, 4096, 60000, 10, 10:
        said = talk(ann, 1, "x" * size)
        same(Entry(s, "room", history=1).messages, said)
        kept = stored_lines(d, "room")
        same(parsed(kept)[-1:], said)
        check(sum(map(len, kept)) <= 8192 + 4096 + 65536, "too much is left")


# ---------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------

def prove_room(s, d, room, must, may=(), lost=None):
    """A damaged room: these messages are there, new ones get new ids, nothing comes twice."""
    eve = Entry(s, room, history=200)
    last = [m for m in eve.messages if m not in may]
    same(last, must[len(must) - len(last):], f"{room}:")
    got = scroll(eve.client, count=3)
    same([m for m in got if m not in may], must, f"{room}, by pages:")
    if lost is not None:
        s.wait_log(rf"(?m)^.*\b{room}\b.*\b{lost}\b|^.*\b{lost}\b.*\b{room}\b")
    new = talk(eve.client, 2, "new %d")
    ids = [m["id"] for m in must + new]
    check(ids == sorted(set(ids)), room, "new ids are not new:", ids[-3:])
    back = Entry(eve.client, room, since=(must or new)[-1]["id"])
    check(back.recovered is True, room, "not recovered since the last good one")
    same([m for m in back.messages if m not in may], new if must else new[2:], f"{room}, since:")
    start = Entry(eve.client, room, since=new[0]["id"][:9] + "0" * 16)
    same([m for m in start.messages if m not in may], must + new, f"{room}, since the beginning:")
    eve.client.close()
    return new


def damaged_rooms(rooms, *options):
    """Lay rooms {name: (files, change, must, may, lost)}; prove them, and again after a crash."""
    with directory() as d:
        for room, (files, change, *_) in rooms.items():
            lay(d, room, *files)
            if change:
                change(room_path(d, room))
        faults, new = [], {}
        for turn in 1, 2:
            with Server("--data", d, "--rate", "0", *options) as s:
                for room, (_, _, must, may, lost) in rooms.items():
                    try:
                        new[room] = new.get(room, []) + prove_room(
                            s, d, room, must + new.get(room, []), may, lost if turn == 1 else None)
                    except (AssertionError, OSError, ValueError) as error:
                        faults.append(f"[{room}, start {turn}] {error}")
                        check(s.process.poll() is None, "the server died:", *faults)
                kill(s)
        check(not faults, len(faults), "faults:\n    ", "\n    ".join(faults[:12]))


def rewrite(change, at=-1):
    """A change of one of a room's files: bytes to bytes."""
    def apply(path):
        name = os.path.join(path, sorted(n for n in os.listdir(path) if n.endswith(".log"))[at])
        with open(name, "rb") as file:
            data = file.read()
        with open(name, "wb") as file:
            file.write(change(data))
    return apply


WORDS = [f"w{i}" for i in range(10)]
LINES = []  # of WORDS in one file that starts at 0
for word in WORDS:
    LINES.append(said_at(sum(map(len, LINES)), word))
GOOD = parsed(LINES)


@case()
def torn_tail():
    """The last line cut anywhere: it goes, with its size in the log; all before it stays."""
    last = len(LINES[-1])
    rooms = {}
    for keep in sorted({*range(0, 4), *range(4, last - 45, 13), *range(last - 45, last)}):
        rooms[f"torn-{keep}"] = ([WORDS], rewrite(lambda data, k=keep: data[:len(data) - last + k]),
                                 GOOD[:-1], [], keep or None)
    for keep in 1, 40, last - 1:  # the only line, and the only line of the last file
        rooms[f"only-{keep}"] = ([["w0"]], rewrite(lambda data, k=keep: data[:k]), [], [], keep)
        rooms[f"file-{keep}"] = ([WORDS[:-1], ["w9"]], rewrite(lambda data, k=keep: data[:k]), GOOD[:-1], [], keep)
    damaged_rooms(rooms)


@case()
def bad_tail():
    """Zeros and garbage behind the last line, as power loss leaves them, a little and a lot."""
    rooms = {}
    for size in 1, 100, 4095, 4096, 65536, (1 << 20) + 17:
        rooms[f"zeros-{size}"] = ([WORDS], rewrite(lambda data, n=size: data + bytes(n)), GOOD, [], size)
        rooms[f"letters-{size}"] = ([WORDS], rewrite(lambda data, n=size: data + b"x" * n), GOOD, [], size)
        garbage = (b"\xff\x80{\"" * size)[:size]
        rooms[f"bytes-{size}"] = ([WORDS], rewrite(lambda data, g=garbage: data + g), GOOD, [], size)
        # With an end of line it may be damage in the middle as well.
        rooms[f"line-{size}"] = ([WORDS], rewrite(lambda data, n=size: data + bytes(n) + b"\n"), GOOD, [], None)
    rooms["zeros-in-place"] = ([WORDS], rewrite(lambda data: data[:-300] + bytes(300)), GOOD[:-2], [], None)
    rooms["all-zeros"] = ([WORDS], rewrite(lambda data: bytes(len(data))), [], [], None)
    halves = [WORDS[:5], WORDS[5:]]
    rooms["all-zeros-in-the-last"] = (halves, rewrite(lambda data: bytes(len(data))), GOOD[:5], [], None)
    rooms["empty"] = ([[]], None, [], [], None)
    rooms["empty-last"] = ([WORDS, []], None, GOOD, [], None)
    rooms["emptied"] = (halves, rewrite(lambda data: b""), GOOD[:5], [], None)
    damaged_rooms(rooms)


def fit(text, line):
    """As long as the line was, its end included."""
    text = text.encode() if isinstance(text, str) else text
    return text[:len(line) - 1].ljust(len(line) - 1) + b"\n"


DAMAGE = [  # name, line 4 becomes, which others it may take with it
    ("letters", lambda line: fit("x" * 999, line), []),
    ("spaces", lambda line: fit("", line), []),
    ("zeros", lambda line: bytes(len(line)), [5]),
    ("zeros-with-end", lambda line: bytes(len(line) - 1) + b"\n", []),
    ("no-end", lambda line: line[:-1] + b" ", [4, 5]),
    ("end-in-it", lambda line: line[:50] + b"\n" + line[51:], []),
    ("ends", lambda line: b"\n" * len(line), []),
    ("returns", lambda line: b"\r" * (len(line) - 1) + b"\n", []),
    ("not-utf8", lambda line: line.replace(b"w4", b"\xff\xfe"), []),
    ("surrogate", lambda line: line.replace(b"Ann", b"\xed\xa0\x80"), []),
    ("half", lambda line: fit(line[:100], line), []),
    ("control", lambda line: line.replace(b"w4", b"\x01\x02"), []),
    ("nul", lambda line: line.replace(b"w4", b"w\0"), []),
    ("nul-in-front", lambda line: b"\0" + line[1:], []),
    ("array", lambda line: fit("[1,2]", line), []),
    ("number", lambda line: fit("5", line), []),
    ("string", lambda line: fit('"text"', line), []),
    ("two", lambda line: fit('{"a":1},{"b":2}', line), []),
    ("leak", lambda line: fit('{"a":1}],"more":false}', line), []),
    ("other-object", lambda line: fit('{"a":1}', line), []),
    ("other-place", lambda line: re.sub(rb"-0000", b"-0001", line), []),
    ("deep", lambda line: fit("[" * 999, line), []),
    ("deep-objects", lambda line: fit('{"a":' * 99, line), []),
]


@case()
def damage_in_the_middle():
    """A damaged line is skipped and logged; what is around it is not lost."""
    rooms = {}
    for name, change, takes in DAMAGE:
        line = change(LINES[4])
        check(len(line) == len(LINES[4]), name)
        rooms["mid-" + name] = ([WORDS], rewrite(lambda data, l=line: data.replace(LINES[4], l)),
                                [m for i, m in enumerate(GOOD) if i != 4 and i not in takes],
                                [GOOD[i] for i in takes], None)
    for at, name in (0, "first"), (9, "last"):
        rooms[name] = ([WORDS], rewrite(lambda data, a=at: data.replace(LINES[a], fit("x", LINES[a]))),
                       GOOD[:at] + GOOD[at + 1:], [], None)
    for at in 3, 9:  # what is before an id that is damaged
        rooms[f"before-{at}"] = ([WORDS], rewrite(lambda data, a=at: data.replace(LINES[a], fit("x", LINES[a]))),
                                 GOOD[:at] + GOOD[at + 1:], [], None)
    for size in 1000, 70000, 300000, 1 << 20:  # a long line, as much of short ones, and in files of their own
        for name, files in [
                ("long", [["a", "b", b"x" * size + b"\n", "c"]]),
                ("short", [["a", "b", b"x\n" * (size // 2), "c"]]),
                ("file", [["a", "b"], [b"xxxxxxx\n" * (size // 8)], [b"yyy\n" * 100], ["c"]]),
                ("torn", [["a", "b", b"x" * size], ["c"]])]:   # no line end in a file that is not the last
            with directory() as d:
                rooms[f"{name}-{size}"] = (files, None, lay(d, "room", *files), [], None)
    rooms["nothing-good"] = ([[b"x" * 100000 + b"\n", b"\n" * 1000, b"{}\n" * 1000]], None, [], [], None)
    damaged_rooms(rooms)


@case()
def damage_is_logged():
    """A few times, naming the room; not once for every line that is bad and every reader."""
    with directory() as d:
        lay(d, "bad", ["a", b"x\n" * 3000, "b"])
        with Server("--data", d, "--rate", "0") as s:
            for _ in range(20):
                Entry(s, "bad", history=200)
            s.wait_log(r"\bbad\b")
            check(len(s.lines) <= 100, len(s.lines), "lines in the log")


@case()
def missing_file():
    """Lost in the middle: who was before the gap is told, who was after it does not notice."""
    with directory() as d:
        laid = lay(d, "room", *([f"{i} {j}" for j in range(5)] for i in range(4)))
        os.remove(segments(d, "room")[1][1])
        with Server("--data", d, "--rate", "0") as s:
            for seen in range(20):
                back = Entry(s, "room", since=laid[seen]["id"])
                left = [m for m in laid[seen + 1:] if m["content"][0] != "1"]
                if 3 < seen < 9:  # the id itself may be gone: then all there is follows
                    check(back.recovered is False, "recovered since", laid[seen]["content"])
                    same([m for m in back.messages if m["content"][0] in "23"], laid[10:])
                    continue
                check(back.recovered is (seen >= 9), "recovered since", laid[seen]["content"], ":", back.recovered)
                if seen >= 9:
                    same(back.messages, left, f"since {laid[seen]['content']}:")
                check(all(m in left or m["content"][0] == "0" for m in back.messages), "strange messages")
            eve = Entry(s, "room", history=3)
            seen = scroll(eve.client, count=3)
            same([m for m in seen if m["content"][0] in "23"], laid[10:])
            new = talk(eve.client, 1)
            check(new[0]["id"] > laid[-1]["id"], "an old id")


@case()
def strange_files():
    """What does not belong into a room's directory is left alone, and does no harm."""
    with directory() as d:
        laid = lay(d, "room", WORDS[:5], WORDS[5:])
        path = room_path(d, "room")
        for name in "notes", "x.log", "0.log", "00000000000000zz.log", "0000000000000005.log.bak", "epoch~", "-1.log", \
                "0000000000000000.LOG", "000000000000000A.log", "fffffffffffffffff.log", ".0000000000000000.log":
            with open(os.path.join(path, name), "w") as file:
                file.write("nothing\n")
        os.mkdir(os.path.join(path, "dir"))
        for name in "README", "..%2F", "%zz", "%2", "%2f", ".hidden":
            with open(os.path.join(d, "rooms", name), "w") as file:
                file.write("nothing\n")
        os.mkdir(os.path.join(d, "rooms", "%00"))
        before = everything_under(d)
        with Server("--data", d, "--rate", "0") as s:
            eve = Entry(s, "room", history=50)
            same(eve.messages, laid)
            new = talk(eve.client, 1)
            same(Entry(s, "room", since=laid[2]["id"]).messages, laid[3:] + new)
        check(set(before) <= set(everything_under(d)), "files have gone:", set(before) - set(everything_under(d)))


def last_line(change):
    """Changes the last line of the last file of a room."""
    def apply(path):
        with open(last_log(path), "r+b") as file:
            *lines, line, rest = file.read().split(b"\n")
            file.seek(0)
            file.write(b"\n".join([*lines, change(line), rest]))
            file.truncate()
    return apply


def every_line(path):
    for name in os.listdir(path):
        with open(os.path.join(path, name), "r+b") as file:
            data = file.read()
            file.seek(0)
            file.write(re.sub(rb"[^\n]", b"x", data))


@case(rows=[
    ("last line", last_line(lambda line: b"x" * len(line))),
    ("last line is longer", last_line(lambda line: line + b" ")),
    ("epoch of the last line", last_line(lambda line: line.replace(EPOCH.encode(), b"deadbeef"))),
    ("capital epoch", last_line(lambda line: line.replace(EPOCH.encode(), EPOCH.upper().encode()))),
    ("no id", last_line(lambda line: line.replace(b'"id"', b'"ID"'))),
    ("an id that is a number", last_line(lambda line: re.sub(rb'"id":"[^"]*"', b'"id":123456789012345678901234567', line))),
    ("every line", every_line),
])
def damaged_epoch(name, change):
    """The epoch of a log is that of its last line; damaged, no id that was given out is given out again."""
    with directory() as d:
        laid, files = lay(d, "room", WORDS[:5], WORDS[5:]), {}
        change(room_path(d, "room"))
        for _, path in segments(d, "room"):
            with open(path, "rb") as file:
                files[path] = file.read()
        before = {m["id"] for m in laid}
        for turn in 1, 2:
            with Server("--data", d, "--rate", "0") as s:
                eve = Entry(s, "room", history=200)
                check(all(m in laid or m["content"] in ("new", "word 0", "word 1") or m["id"].startswith("deadbeef")
                          for m in eve.messages), "strange messages", eve.messages)
                eve.client.say("new", ref="r")
                new = eve.client.expect("say")
                check(new["id"] not in before, "an old id:", new["id"])
                check(new["id"][:8] != EPOCH or new["id"] > laid[-1]["id"], "an old epoch, and no new place")
                before.add(new["id"])
                more = talk(eve.client, 2)
                back = Entry(s, "room", since=new["id"])
                check(back.recovered is True, "not recovered since a new one")
                same(back.messages, more)
                kill(s)
            for path, data in files.items():
                with open(path, "rb") as file:
                    check(file.read().startswith(data), "old lines were overwritten in", path)


def no_id_twice(s, d, room, said):
    """Goes on talking, there and after a crash: every id is new."""
    seen = {m["id"] for m in said}
    check(len(seen) == len(said), "twice in the beginning")
    ann = join(s, room, "Ann")

    def more(ann):
        for i in range(5):
            ann.say(f"more {i}", ref="r")
            if say_or_storage(ann, said):
                check(said[-1]["id"] not in seen, "an id twice:", said[-1])
                seen.add(said[-1]["id"])

    more(ann)
    eve = Entry(s, room, history=200)
    ids = [m["id"] for m in eve.messages]
    check(len(ids) == len(set(ids)), "twice in one history")
    scroll(eve.client, count=7)
    kill(s)
    for _ in range(2):
        with Server("--data", d, "--rate", "0", "--segment", "4096") as again:
            back = Entry(again, room, since=said[-1]["id"])
            check(back.recovered is False or not back.messages, "recovered, with", len(back.messages), "messages")
            more(back.client)
            last = said[-1]
            same(Entry(again, room, history=1).messages, [last])
            kill(again)


def last_log(path):
    return os.path.join(path, max(n for n in os.listdir(path) if n.endswith(".log")))


def first_log(path):
    return os.path.join(path, min(os.listdir(path)))


def append(path, text):
    with open(path, "a") as file:
        file.write(text)


@case(rows=[
    ("all files", lambda path: [os.remove(os.path.join(path, n)) for n in os.listdir(path) if n.endswith(".log")]),
    ("the last file", lambda path: os.remove(last_log(path))),
    ("the first file", lambda path: os.remove(first_log(path))),
    ("the room", lambda path: shutil.rmtree(path)),
    ("all rooms", lambda path: shutil.rmtree(os.path.dirname(path))),
    ("everything", lambda path: shutil.rmtree(os.path.dirname(os.path.dirname(path)))),
    ("moved away", lambda path: os.rename(path, path + "-old")),
    ("last file cut to nothing", lambda path: os.truncate(last_log(path), 0)),
    ("last file cut in a line", lambda path: os.truncate(last_log(path), 500)),
    ("somebody else wrote a line", lambda path: append(last_log(path), "hello\n")),
    ("somebody else wrote half a line", lambda path: append(last_log(path), "hel")),
])
def changed_while_running(name, change):
    """Files are deleted or cut behind the server's back: it goes on, and gives no id twice."""
    with directory() as d:
        with Server("--data", d, "--rate", "0", "--segment", "4096") as s:
            ann = join(s, "room", "Ann")
            said = talk(ann, 40)
            change(room_path(d, "room"))
            kept = os.path.isdir(d)
            for i in range(5):
                ann.say("then", ref="r")
                say_or_storage(ann, said)
            ann.close()
            if kept:
                no_id_twice(s, d, "room", said)
            else:
                Entry(s, "another")


@case()
def changed_while_stopped():
    """All files of a room are deleted: the ids of then do not come again."""
    with directory() as d:
        with Server("--data", d, "--rate", "0") as s:
            said = fill(s, "room", 10)
        for _, path in segments(d, "room"):
            os.remove(path)
        with Server("--data", d, "--rate", "0") as s:
            eve = Entry(s, "room", since=said[3]["id"])
            check(eve.recovered is False and not eve.messages, eve.answer)
            new = talk(eve.client, 10)
            check(not {m["id"] for m in said} & {m["id"] for m in new}, "ids twice")


@case()
def the_end_is_lost():
    """The newest file is deleted, or lost with the power: who saw it is not told that nothing is missing."""
    with directory() as d:
        with Server("--data", d, "--rate", "0", "--segment", "4096") as s:
            ann = join(s, "room", "Ann")   # one after another, or all would be in one file
            old = [m for i in range(40) for m in talk(ann, 1, "old" + "x" * 300)]
            kill(s)
        os.remove(last_log(room_path(d, "room")))
        with Server("--data", d, "--rate", "0", "--segment", "4096") as s:
            ann = Entry(s, "room", history=200)
            check(ann.messages == old[:len(ann.messages)] and ann.messages, "the rest has changed")
            left = len(ann.messages)
            new = talk(ann.client, 12, "new" + "x" * 300)
            check(not {m["id"] for m in old} & {m["id"] for m in new}, "ids twice")
            back = Entry(s, "room", since=old[-1]["id"])   # a line of the same length ends there now
            check(back.recovered is False, "told that nothing is missing")
            same(back.messages, old[:left] + new)
            back = Entry(s, "room", since=old[left - 1]["id"])
            check(back.recovered is True, "not recovered since what is left")
            same(back.messages, new)


@case()
def a_pipe_instead_of_a_file():
    """Nobody waits for one who writes into it."""
    with directory() as d:
        os.makedirs(room_path(d, "room"))
        os.mkfifo(os.path.join(room_path(d, "room"), "0" * 16 + ".log"))
        with Server("--data", d) as s:
            ann = Ws(s)
            ann.send_json(type="login", client_name="Ann", room_id="room")
            if ann.message()["type"] == "login":
                ann.say("hello", ref="r")
                ann.expect_error("storage", ref="r")
            talk(join(s, "another", "Ann"), 1)


@case()
def large_offsets():
    """Ids beyond 2, 4 and 2^53: of a room that has talked for long, on 32 bits too."""
    with directory() as d:
        laid = {}
        for start in 2**31 - 700, 2**32 - 700, 2**32, 2**53 - 700, 2**62:
            laid[f"{start}"] = lay(d, f"{start}", WORDS[:5], WORDS[5:], start=start)
        with Server("--data", d, "--rate", "0", "--segment", "4096") as s:
            for room, messages in laid.items():
                back = Entry(s, room, since=messages[2]["id"])
                check(back.recovered is True, room)
                same(back.messages, messages[3:], room)
                new = talk(back.client, 30)
                same(scroll(back.client, count=4), messages + new, room)
                back = Entry(s, room, since=EPOCH + "-" + "0" * 16)
                check(back.recovered is False, room, "lost nothing?")
                same(back.messages, messages + new, room)
                same(parsed(stored_lines(d, room)), messages + new, room)


@case()
def file_over_2_gib():
    """One file of 3 GiB, most of it a hole: its end is found, read and written."""
    with directory() as d:
        lay(d, "room", ["first"])
        path = segments(d, "room")[0][1]
        hole, lines = 3 << 30, [b"\n"]
        try:
            with open(path, "r+b") as file:
                file.truncate(hole)
                for i in range(300):
                    lines.append(said_at(hole + sum(map(len, lines)), f"word {i}"))
                file.seek(0, 2)
                file.write(b"".join(lines))
            if os.stat(path).st_blocks * 512 > 1 << 24:
                raise Skip("files cannot have holes here")
        except OSError as error:
            raise Skip(f"no such file here: {error}") from None
        laid = parsed(lines[1:])
        with Server("--data", d, "--rate", "0") as s:
            begin = time.monotonic()
            eve = Entry(s, "room", history=200)
            same(eve.messages, laid[-200:])
            same(Entry(s, "room", since=laid[0]["id"]).messages, laid[1:])
            ann = join(s, "room", "Ann")
            new = talk(ann, 3)
            same(Entry(s, "room", since=laid[-2]["id"]).messages, laid[-1:] + new)
            check(time.monotonic() - begin < 2 * SLOW, "it took", time.monotonic() - begin)


# ---------------------------------------------------------------------------
# The disk says no
# ---------------------------------------------------------------------------

def storm(s, d, breaks, mends, size=50, room="room"):
    """A disk breaks, and is mended: the sender is told, the others hear nothing, the server goes on."""
    ann, bob = join(s, room, "Ann", "Bob")
    first = talk(ann, 3)
    for message in first:
        hear(bob, id=message["id"])
    for storm in 1, 2:
        lines = len(s.lines)
        breaks()
        for i in range(20):
            ann.say("lost " + "x" * size, ref=f"lost-{i}")
        for i in range(20):
            hear(ann, "error", code="storage", ref=f"lost-{i}")
        bob.say("lost too " + "x" * size)
        check("ref" not in hear(bob, "error", code="storage"), "a ref from nowhere")
        quiet(ann, bob)
        ann.say("psst", to=bob.id)
        hear(bob), hear(ann)
        eve = Entry(s, room, history=200)
        same(eve.messages, first, "what a newcomer gets meanwhile:")
        check(eve.id == first[-1]["id"], "the newest id moved to", eve.id)
        eve.client.close()
        until(lambda: len(s.lines) > lines, "the log says nothing")
        check(len(s.lines) <= lines + 4, "much in the log:", s.lines[lines:])
        mends()
        after = talk(ann, 1, "after", ref="after")
        hear(bob, content="after", ref="after")
        more = talk(bob, 2)
        check([hear(ann) for _ in more] == more, "ann heard something else")
        first += after + more
        ids = [m["id"] for m in first]
        check(ids == sorted(set(ids)), "ids:", ids)
        same(parsed(stored_lines(d, room)), first, "the file:")
    kill(s)
    with Server("--data", d, "--rate", "0") as again:
        same(Entry(again, room, history=200).messages, first, "after a restart:")


def last_file(d, room):
    return segments(d, room)[-1][1]


@case(rows=[("nothing fits", 0), ("one byte fits", 1), ("a line fits, almost", 200), ("at a segment's end", None)])
def file_size_limit(name, spare):
    """`ulimit -f` under a running server, with its signal: the same as a full disk."""
    with directory() as d, Server("--data", d, "--rate", "0", *["--segment", "4096"] * (spare is None)) as s:
        soft, hard = resource.prlimit(s.pid, resource.RLIMIT_FSIZE)

        def breaks():
            limit = os.path.getsize(last_file(d, "room")) + spare if spare is not None else 0
            resource.prlimit(s.pid, resource.RLIMIT_FSIZE, (limit, hard))

        storm(s, d, breaks, lambda: resource.prlimit(s.pid, resource.RLIMIT_FSIZE, (soft, hard)), 200)


@case()
def file_size_limit_and_new_room():
    """When not even a room's first file can be written, the room works as soon as it can."""
    with directory() as d, Server("--data", d, "--rate", "0") as s:
        other = join(s, "other", "Bob")
        hard = resource.prlimit(s.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(s.pid, resource.RLIMIT_FSIZE, (0, hard))
        begin_room_in_trouble(s, lambda: resource.prlimit(s.pid, resource.RLIMIT_FSIZE, (hard, hard)))
        talk(other, 1)


def begin_room_in_trouble(s, mends, room="new room"):
    """A room that cannot be made: to come in, or to speak, is an error; later it is not."""
    ann = Ws(s)
    ann.send_json(type="login", client_name="Ann", room_id=room, ref="r")
    answer = ann.message()
    inside = answer["type"] == "login"
    check(inside or answer.get("code") == "storage" and answer.get("ref") == "r", "the login is answered by", answer)
    if inside:
        for _ in range(3):
            ann.say("lost", ref="lost")
            ann.expect_error("storage", ref="lost")
    mends()
    if not inside:
        ann.login("Ann", room)
    said = talk(ann, 3)
    eve = Entry(s, room, history=10)
    same(eve.messages, said)
    check(Entry(s, room, since=said[0]["id"]).recovered is True)


@contextlib.contextmanager
def small_disk(kib):
    """A disk of so many KiB, mounted."""
    if os.geteuid() != 0:
        raise Skip("only root can mount a small disk")
    with tempfile.TemporaryDirectory(prefix="xchat") as mounted:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k,nr_inodes=60", "xchat-test", mounted],
                              capture_output=True)
        if done.returncode:
            raise Skip("no small disk can be mounted: " + done.stderr.decode().strip())
        try:
            yield mounted
        finally:
            subprocess.run(["umount", "-l", mounted], check=True)


def fill_up(path):
    """Use every byte that is left, in this file."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@case()
def full_disk():
    """A disk without space: nothing is lost that was acknowledged, and it works on when there is space."""
    with small_disk(256) as disk, Server("--data", os.path.join(disk, "data"), "--rate", "0") as s:
        filler = os.path.join(disk, "filler")
        storm(s, os.path.join(disk, "data"), lambda: fill_up(filler), lambda: os.remove(filler), 9000)


@case()
def full_disk_and_new_room():
    """No space and no inode for a room."""
    with small_disk(256) as disk, Server("--data", os.path.join(disk, "data"), "--rate", "0") as s:
        filler = os.path.join(disk, "filler")
        fill_up(filler)
        begin_room_in_trouble(s, lambda: os.remove(filler), "without space")
        names = [os.path.join(disk, f"inode {i}") for i in range(100)]
        with contextlib.suppress(OSError):
            for name in names:
                open(name, "w").close()
        begin_room_in_trouble(s, lambda: [os.remove(n) for n in names if os.path.exists(n)], "without inode")


@contextlib.contextmanager
def as_nobody(d, *options):
    """A server that permissions stop: one of root's is run as somebody else."""
    os.mkdir(d)
    if os.geteuid() == 0:
        os.chown(d, 65534, 65534)
    with Server("--data", d, "--rate", "0", *options, shell=NOBODY) as s:
        yield s


NOBODY = "set -- %s -c %s \"$@\"" % (shlex.quote(sys.executable), shlex.quote(
    "import os,sys; os.getuid() or (os.setgroups([]), os.setgid(65534), os.setuid(65534));"
    " os.execvp(sys.argv[1], sys.argv[1:])"))


@case()
def read_only_room():
    """The next file cannot be made: an error, and all is well when it can."""
    with directory() as d, as_nobody(d, "--segment", "4096") as s:
        fill(s, "room", 1)
        path = room_path(d, "room")
        ann = join(s, "room", "Ann")
        said, lost = [], 0
        os.chmod(path, 0o555)
        for i in range(60):
            ann.say("x" * 200, ref="r")
            lost += not say_or_storage(ann, said)
        check(lost, "it wrote on in a directory that cannot be written")
        os.chmod(path, 0o755)
        said += talk(ann, 10)
        same(Entry(s, "room", history=200).messages[1:], said)
        same(parsed(stored_lines(d, "room"))[1:], said)


@case()
def read_only_rooms():
    """No new room can be made; the old ones do not mind."""
    with directory() as d, as_nobody(d) as s:
        old = join(s, "old", "Bob")
        talk(old, 1)
        os.chmod(os.path.join(d, "rooms"), 0o555)
        begin_room_in_trouble(s, lambda: (talk(old, 1), os.chmod(os.path.join(d, "rooms"), 0o755)))


@case()
def read_only_files():
    """History that can be read but not written is read."""
    with directory() as d:
        laid = lay(d, "room", WORDS)
        for where, dirs, files in os.walk(d):
            if os.geteuid() == 0:
                os.chown(where, 65534, 65534)
            for name in files:
                os.chmod(os.path.join(where, name), 0o444)
        if os.geteuid() == 0:
            os.rmdir(d) if not os.listdir(d) else None
        with Server("--data", d, "--rate", "0", shell=NOBODY) as s:
            ann = Ws(s)
            ann.send_json(type="login", client_name="Ann", room_id="room", history=200)
            answer = ann.message()
            if answer["type"] == "login":
                same(ann.expect("history")["messages"], laid)
                ann.say("lost", ref="r")
                ann.expect_error("storage", ref="r")
            else:
                check(answer.get("code") == "storage", answer)
            talk(join(s, "other", "Bob"), 1)


@stored()
def a_file_where_a_directory_should_be(s, d):
    """The room cannot be made until it has gone; nor a file where a directory is."""
    path = room_path(d, "new room")
    fill(s, "old", 1)
    with open(path, "w") as file:
        file.write("nothing\n")
    begin_room_in_trouble(s, lambda: os.remove(path))
    path = os.path.join(room_path(d, "dir"), "0" * 16 + ".log")
    os.makedirs(path)
    begin_room_in_trouble(s, lambda: os.path.isdir(path) and os.rmdir(path), "dir")
    talk(join(s, "old", "Ann"), 1)


@stored()
def one_room_in_trouble(s, d):
    """While one room cannot be written and another can, the log is not flooded."""
    with open(room_path(d, "bad"), "w") as file:
        file.write("nothing\n")
    bad, good = Ws(s), join(s, "good", "Ann")
    bad.send_json(type="login", client_name="Bob", room_id="bad")
    if bad.message()["type"] == "login":
        lines = len(s.lines)
        for _ in range(50):
            bad.say("x")
            hear(bad, "error", code="storage")
            talk(good, 1)
        until(lambda: len(s.lines) > lines, "the log says nothing")
        check(len(s.lines) < lines + 10, len(s.lines) - lines, "lines in the log for 50 messages")


@case()
def cannot_start():
    """Status 1 and one line that names the directory, whatever is wrong with it."""
    with directory() as d:
        refused("/nosuch/parent/data", "--data", "/nosuch/parent/data")
        with open(d, "w") as file:
            file.write("x")
        refused(d, "--data", d)
        refused(d + "/data", "--data", d + "/data")
        os.remove(d)
        os.mkdir(d)
        with open(os.path.join(d, "rooms"), "w") as file:
            file.write("x")
        refused(d, "--data", d)
        for name in set(os.listdir(d)):
            os.remove(os.path.join(d, name))
        os.mkdir(os.path.join(d, "lock"))
        refused(d, "--data", d)
        os.rmdir(os.path.join(d, "lock"))
        with Server("--data", d):
            pass
        check(run("--data", "")[0] in (1, 2), "an empty name")
        check(run("--data")[0] == 2, "no name")
        for option in "--retain", "--segment":
            for value in "4095", "-1", "x", "0", str(2**64 + 4096):
                check(run("--data", d, option, value)[0] == 2, option, value, "is taken")
            with Server("--data", d, option, "4096"):
                pass
        os.chmod(d, 0o555)
        if os.geteuid() == 0:
            os.remove(os.path.join(d, "lock"))
            with contextlib.suppress(AssertionError):
                with Server("--data", d, shell=NOBODY) as s:
                    raise Skip("a directory that cannot be written is no trouble")
        else:
            os.chmod(d, 0o755)
            os.remove(os.path.join(d, "lock"))
            os.chmod(d, 0o555)
            refused(d, "--data", d)


@case()
def two_servers():
    """The second on one directory refuses, by any path to it; after a crash the lock is free."""
    with directory() as d:
        with Server("--data", d, "--rate", "0") as s:
            said = fill(s, "room", 3)
            os.symlink(d, d + "-link")
            for path in d, d + "/", d + "-link", os.path.dirname(d) + "/./data":
                refused(path, "--data", path)
            said += fill(s, "room", 2)
            with Server("--data", d + "2"), Server():  # another one is nobody's business
                pass
            same(Entry(s, "room", history=10).messages, said)
            kill(s)
            with Server("--data", d + "-link") as again:
                refused(d, "--data", d)
                same(Entry(again, "room", history=10).messages, said)


@case()
def other_ways_to_name_it():
    """--data from the environment, relative to the working directory, made when it is not there."""
    with directory() as d:
        with Server(env={"XCHAT_DATA": d, "XCHAT_RATE": "0"}) as s:
            said = fill(s, "room", 2)
        with Server("--data", "data", cwd=os.path.dirname(d)) as s:
            same(Entry(s, "room", history=5).messages, said)
        check(os.stat(d).st_mode & 0o022 == 0, "everybody may write into it")


# ---------------------------------------------------------------------------
# Injected faults
# ---------------------------------------------------------------------------

@case(rows=[
    ("EIO", errno.EIO, 0), ("ENOSPC", errno.ENOSPC, 0), ("EDQUOT", errno.EDQUOT, 0),
    ("a piece, then EIO", errno.EIO, 30), ("a line and a piece, then ENOSPC", errno.ENOSPC, 300),
])
def failing_write(name, number, spare):
    """Whatever a write fails with, after whatever part of it."""
    with faulty() as (s, d, faults):
        storm(s, d, lambda: faults.set(write_errno=number, room=spare), faults.none, 400)


@case(rows=[("EMFILE", errno.EMFILE), ("EACCES", errno.EACCES), ("EIO", errno.EIO)])
def cannot_open(name, number):
    """While files cannot be opened nobody gets into their room, and nothing happens to them."""
    with faulty("--segment", "4096", "--admin", "127.0.0.1:0") as (s, d, faults):
        said = fill(s, "room", 40)
        ann = Ws(s)
        faults.fail("open", number)
        for _ in range(2):
            ann.send_json(type="login", client_name="Ann", room_id="room", history=5, ref="r")
            ann.expect_error("storage", "room", ref="r")
        s.wait_log("rooms/room cannot be read")
        faults.none()
        same(Entry(ann, "room", history=200).messages, said)
        said += talk(ann, 2)
        faults.fail("open", number)   # in the room: one message is refused, and older ones cannot be read
        ann.say("lost", ref="lost")
        ann.expect_error("storage", ref="lost")
        ann.send_json(type="history", count=20, ref="r")
        ann.expect_error("storage", "cannot be read now", ref="r")
        ann.send_json(type="history", before=said[20]["id"], ref="before")
        ann.expect_error("storage", "cannot be read now", ref="before")
        for query in "count=20", f"before={said[20]['id']}":
            answer = Http(s, at="admin").ask(f"/api/history?room=room&{query}")
            check(answer.status == 503 and b"storage" in answer.body, answer.status, answer.body)
        bob = Ws(s)
        bob.send_json(type="login", client_name="Bob", room_id="room", since=said[20]["id"])
        bob.expect_error("storage")
        bob.close()
        faults.none()
        same(page(ann, count=20)["messages"], said[-20:])
        said += talk(ann, 2)
        same(Entry(s, "room", history=200).messages, said)
        same(parsed(stored_lines(d, "room")), said)


@case()
def letters_that_are_not_stored():
    """A message to a user is stored and acknowledged, or refused: never both."""
    for content in "x", "'" * 60000:   # the second is longer than a quarter of --backlog
        with faulty() as (s, d, faults):
            ann = join(s, "room", "Ann")
            ann.say(content, to=None, to_uid="bob", ref="1")
            stored = ann.expect("say", ref="1", to_uid="bob")
            faults.set(write_errno=errno.ENOSPC, room=0)
            ann.say(content, to=None, to_uid="bob", ref="2")
            ann.expect_error("storage", ref="2")
            quiet(ann)
            faults.none()
            ann.say(content, to=None, to_uid="bob", ref="3")
            check(ann.expect("say", ref="3")["id"] > stored["id"], "no new id")


@case()
def short_writes():
    """Each write takes a few bytes only: messages are whole or refused."""
    for size in 1, 7, 100:
        with faulty() as (s, d, faults):
            ann = join(s, "room", "Ann")
            first, said = talk(ann, 2), []
            faults.room = size
            for i in range(30):
                ann.say(f"word {i}", ref=f"r{i}")
            for i in range(30):
                say_or_storage(ann, said)
            faults.none()
            said += talk(ann, 2)
            same(parsed(stored_lines(d, "room")), first + said, f"writes of {size}:")


@case()
def failing_sync():
    """fdatasync fails: what may not be on disk was neither sent nor acknowledged. Whether it is
    tried again, or refused until somebody has looked at the disk, is the server's choice."""
    with faulty("--fsync") as (s, d, faults):
        ann, bob = join(s, "room", "Ann", "Bob")
        said = talk(ann, 2)
        check([hear(bob) for _ in said] == said)
        faults.sync_errno = errno.EIO
        lines = len(s.lines)
        for i in range(20):
            ann.say("lost", ref="lost")
            hear(ann, "error", code="storage", ref="lost")
        quiet(ann, bob)
        until(lambda: len(s.lines) > lines, "the log says nothing")
        check(len(s.lines) <= lines + 3, "much in the log:", s.lines[lines:])
        same(Entry(s, "room", history=10).messages, said)
        same(parsed(stored_lines(d, "room")), said)
        faults.none()
        ann.say("perhaps", ref="perhaps")
        say_or_storage(ann, said)
        kill(s)
        with Server("--data", d, "--rate", "0", "--fsync") as again:
            eve = Entry(again, "room", history=10)
            same(eve.messages, said, "after a restart:")
            check(talk(eve.client, 1)[0]["id"] > said[-1]["id"], "an old id")
    with faulty() as (s, d, faults):  # nobody syncs who was not told to
        faults.sync_errno = errno.EIO
        before = faults.syncs
        talk(join(s, "room", "Ann"), 10)
        check(faults.syncs == before, "synced without --fsync")


@case()
def directories_that_cannot_be_synced():
    """With --fsync a new file counts once its directory is on disk: before, nothing was said, and no file stays."""
    with faulty("--fsync") as (s, d, faults):
        ann = join(s, "new", "Ann")
        faults.fail("fsync", errno.EIO)
        for _ in range(2):
            ann.say("lost", ref="lost")
            ann.expect_error("storage", ref="lost")
        check(not segments(d, "new"), "left are", segments(d, "new"))
        s.wait_log("rooms/new cannot be stored: (Input/output|I/O) error")
        faults.none()
        said = talk(ann, 2)
        same(parsed(stored_lines(d, "new")), said)
        faults.fail("fsync", errno.EIO)
        other = os.path.join(d, "other")
        status, _, err = run("--data", other, "--fsync", env=faults.env)
        check(status == 1 and re.search("--data.*(Input/output|I/O) error", err), status, err)


@case()
def torn_line_that_stays():
    """A torn line that cannot be cut off is said to be; nothing is stored behind it, until it can be."""
    with faulty() as (s, d, faults):
        laid = lay(d, "torn", [*WORDS, b'{"type":"say","fro'])
        faults.truncate_errno = errno.EIO
        eve = Entry(s, "torn", history=50)
        same(eve.messages, laid)
        s.wait_log("(?s)18 bytes of a torn last line.*rooms/torn/.*(Input/output|I/O) error")
        eve.client.say("lost", ref="lost")
        eve.client.expect_error("storage", ref="lost")
        faults.none()
        laid += talk(eve.client, 2)
        same(parsed(stored_lines(d, "torn")), laid)


@case()
def files_that_go():
    """Files of a room are removed while it is in use: what is newer is still there, and more can be said."""
    with directory() as d, Server("--data", d, "--rate", "0", "--segment", "4096") as s:
        ann = join(s, "room", "Ann")
        said = [m for _ in range(20) for m in talk(ann, 5)]   # a round has one write, to one file
        files = segments(d, "room")
        check(len(files) > 3, "few files", files)
        Entry(s, "other", history=5, name="Bob").client.say("what was read last is of another room")
        os.unlink(files[1][1])
        left = [m for m in said if place(m["id"]) > files[2][0]]
        same(Entry(s, "room", history=200).messages, left, "after one has gone:")
        s.wait_log(re.escape(files[1][1][len(d) + 1:]) + " is gone")
        eve = Entry(s, "room", since=said[0]["id"])
        check(eve.recovered is False, "recovered")
        same(eve.messages, left, "since the first:")
        shutil.rmtree(room_path(d, "room"))
        new = talk(ann, 2)
        same(parsed(stored_lines(d, "room")), new, "in a new file:")
        same(Entry(s, "room", history=200).messages, new, "after all have gone:")
        eve = Entry(s, "room", since=said[-1]["id"])
        check(eve.recovered is True, "who had heard all has missed nothing")
        same(eve.messages, new, "since the last:")


@case()
def cannot_cut():
    """A write fails half-way, and the half cannot be removed: later lines do not suffer from it."""
    with faulty() as (s, d, faults):
        ann, bob = join(s, "room", "Ann", "Bob")
        said = talk(ann, 3)
        faults.set(truncate_errno=errno.EIO, write_errno=errno.ENOSPC, room=50)
        for i in range(3):
            ann.say("lost", ref="lost")
            ann.expect_error("storage", ref="lost")
        faults.set(room=-1)  # there is space again, but what was cut off is still there
        for i in range(5):
            ann.say(f"perhaps {i}", ref=f"p{i}")
            say_or_storage(ann, said)
        faults.none()
        said += talk(ann, 3)
        check(len({m["id"] for m in said}) == len(said), "ids twice")
        same(Entry(s, "room", history=200).messages, said)
        kill(s)
        with Server("--data", d, "--rate", "0") as again:
            eve = Entry(again, "room", history=200)
            same(eve.messages, said, "after a restart:")
            said += talk(eve.client, 2)
            same(Entry(again, "room", since=said[0]["id"]).messages, said[1:])
            check(len({m["id"] for m in said}) == len(said), "ids twice")


@case(rows=[(f"after {n} bytes {' '.join(options)}", n, options)
            for n in (1, 100, 190, 1000, 1900, 3000, 5000) for options in ((), ("--fsync",))])
def dies_in_a_write(name, size, options):
    """Killed in the middle of a write: what was sent is there, once, and the rest can be said again."""
    with faulty("--segment", "4096", *options) as (s, d, faults):
        ann, bob = join(s, "room", "Ann", "Bob")
        said = talk(ann, 2)
        for message in said:
            hear(bob, id=message["id"])
        faults.set(die=1, room=size)
        heard = []
        with contextlib.suppress(AssertionError):
            for i in range(100):
                ann.say(f"word {i}", ref=f"r{i}")
            while True:
                heard.append(bob.expect("say"))
        s.wait_end()
        check(s.process.returncode == -9, s.process.returncode)
        kill(s)
        faults.none()
        with Server("--data", d, "--rate", "0", env=faults.env) as again:
            eve = Entry(again, "room", since=said[-1]["id"])
            check(eve.recovered is True, "not recovered")
            same(eve.messages[:len(heard)], heard, "what was seen:")
            refs = [m["ref"] for m in eve.messages]
            check(refs == [f"r{i}" for i in range(len(refs))], "order:", refs)
            said += eve.messages + talk(eve.client, 3)
            same(parsed(stored_lines(d, "room")), said)


@case()
def one_write_a_round():
    """However many messages come in at once, a room's file is written once a round, and synced once."""
    with faulty("--fsync") as (s, d, faults):
        ann = join(s, "room", "Ann")
        talk(ann, 1)
        words = b"".join(frame(TEXT, json.dumps({"type": "say", "to_client_id": "all", "content": f"{i}"}))
                         for i in range(400))
        writes, syncs = faults.writes, faults.syncs
        ann.send(words)  # 25 KB
        for _ in range(400):
            ann.expect("say")
        check(faults.writes - writes <= 60, faults.writes - writes, "writes for 400 messages")
        check(0 < faults.syncs - syncs <= 60, faults.syncs - syncs, "syncs for 400 messages")


@stored("--fsync")
def fsync(s, d):
    """It works with --fsync as without."""
    ann, bob = join(s, "room", "Ann", "Bob")
    said = talk(ann, 30)
    for message in said:
        bob.expect("say", id=message["id"])
    same(Entry(s, "room", history=200).messages, said)
    same(parsed(stored_lines(d, "room")), said)
    for i in range(20):  # several rooms in one round
        ann.login("Ann", f"room {i}")
        talk(ann, 1)


# ---------------------------------------------------------------------------
# Much
# ---------------------------------------------------------------------------

@stored()
def descriptors(s, d):
    """However many rooms are used, at once or one after another, few files are open."""
    fds = f"/proc/{s.pid}/fd"
    if not os.path.isdir(fds):
        raise Skip("no /proc")
    before, ann, rooms = len(os.listdir(fds)), Ws(s), {}
    for i in range(600):
        ann.login("Ann", f"room {i}")
        rooms[f"room {i}"] = talk(ann, 1)
    check(len(os.listdir(fds)) < before + 80, "open are", len(os.listdir(fds)), "before it were", before)
    clients = [join(s, f"room {i}", "Bob") for i in range(200)]
    for turn in range(2):
        for i, bob in enumerate(clients):
            rooms[f"room {i}"] += talk(bob, 1)
    check(len(os.listdir(fds)) < before + 200 + 80, "open are", len(os.listdir(fds)), "with 200 clients")
    for room in list(rooms)[::40]:
        same(Entry(s, room, history=5).messages, rooms[room])


@stored("--max-per-address", "0", shell="ulimit -n 120")
def few_descriptors(s, d):
    """With all descriptors in use by clients, who speaks is heard or gets an error; later all is well."""
    said = {f"room {i}": fill(s, f"room {i}", 1) for i in range(30)}
    clients = [join(s, f"room {i}", "Bob") for i in range(30)]
    more = []
    for _ in range(90):
        ws = Ws(s, open=False)
        ws.send(get("/", *UPGRADE))
        more.append(ws)
    for room, bob in zip(said, clients):
        for _ in range(2):
            bob.say("x", ref="r")
            say_or_storage(bob, said[room])
    for ws in more:
        ws.close()
    for room, bob in zip(said, clients):
        said[room] += talk(bob, 1)
        same(page(bob)["messages"], said[room])


@case(serial=True)
def many_rooms():
    """A directory with 10,000 rooms is opened within a second, and each room is there."""
    number = 1000 if WRAP else 10000
    with directory() as d:
        line = said_at(0, "hello")
        for i in range(number):
            path = os.path.join(d, "rooms", f"r{i}")
            os.makedirs(path)
            with open(os.path.join(path, "0" * 16 + ".log"), "wb") as file:
                file.write(line)
        begin = time.monotonic()
        with Server("--data", d, "--rate", "0") as s:
            took = time.monotonic() - begin
            check(took < SLOW, f"it took {took:.2f} s")
            for room in "r0", "r777", f"r{number - 1}":
                same(Entry(s, room, history=5).messages, parsed([line]))


def bytes_read(s):
    """What the server has read so far, from sockets too; None where nobody counts."""
    try:
        with open(f"/proc/{s.pid}/io") as io:
            return None if WRAP else int(re.search(r"rchar: (\d+)", io.read())[1])
    except OSError:
        return None


@case(serial=True)
def big_history():
    """A join in a room with much history reads no more than it sends, and one block."""
    with directory() as d:
        first, last = lay_bulk(d, "room", HISTORY_MIB << 20)
        with Server("--data", d, "--rate", "0", "--retain", str(1 << 30)) as s:
            eve, times = Ws(s), []
            eve.login("Eve", "elsewhere")
            n, length = place(last), place(first)
            # the newest so many, so many before a line in the middle, all since a line near the end
            for history, where in (50, None), (50, None), (200, None), (1, None), (50, n // length // 2), \
                    (None, n // length - 50), (None, n // length - 51):
                before, begin = bytes_read(s), time.monotonic()
                at = f"{EPOCH}-{(where or 0) * length:016x}"
                if where is None:
                    got = Entry(eve, "room", history=history).messages
                elif history:
                    got = page(eve, before=at, count=history)["messages"]
                else:
                    got = Entry(eve, "room", since=at).messages
                times.append(time.monotonic() - begin)
                end, count = (where - 1 if where and history else n // length), history or n // length - where
                check([place(m["id"]) // length for m in got] == [*range(end - count + 1, end + 1)], "wrong ones")
                if before is not None:
                    read, sent = bytes_read(s) - before, count * length
                    blocks = 2 if len(times) == 1 or where else 1  # to open the room, to find a place in it
                    check(read <= sent + 65536 * blocks + 4096,
                          f"read {read} bytes to send {sent} (history {history}, at line {where})")
            check(min(times) < 0.01 * SLOW and times[0] < 0.1 * SLOW, "it took", times)
            if HISTORY_MIB <= 64:
                check(len(Entry(eve, "room", since=first).messages) == n // length - 1, "not all")


# ---------------------------------------------------------------------------
# The crash test
# ---------------------------------------------------------------------------

PEOPLE, IN_FLIGHT = 10, 8
SAID = re.compile(rb'"id":"([0-9a-f]{8}-[0-9a-f]{16})","ref":"([^"]*)"}$')


class Member:
    """Talks at full speed, and does what a good client does when the server comes back: resumes
    after the last id he has seen, and says again what is neither acknowledged nor in the replay."""

    def __init__(self, name):
        self.name, self.last, self.spoken, self.at = name, None, 0, None
        self.owed = {}   # ref: frame, of what was not acknowledged yet
        self.heard = []  # lines, byte for byte, since the last proof
        self.talks, self.ws = True, None

    def come(self, s):
        self.ws, self.buffer, self.upgraded, self.live = Ws(s, open=False), b"", False, False
        resume = f',"since":"{self.last}"' if self.last else ""
        self.ws.send(get("/", *UPGRADE) + frame(
            TEXT, f'{{"type":"login","client_name":"{self.name}","room_id":"crash"{resume}}}'))

    def say(self):
        while self.talks and len(self.owed) < IN_FLIGHT:
            self.spoken += 1
            ref = f"{self.name}-{self.spoken}"
            text = "x" * random.choice((0, 1, 30, 100, 400))
            self.owed[ref.encode()] = words = frame(
                TEXT, f'{{"type":"say","to_client_id":"all","content":"{text}","ref":"{ref}"}}')
            self.ws.send(words)

    def hear(self):
        """Take what has come. False at the end of the connection."""
        try:
            data = self.ws.sock.recv(1 << 18, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except ConnectionError:
            data = b""
        self.buffer += data
        if not self.upgraded:
            head, end, rest = self.buffer.partition(b"\r\n\r\n")
            if not end:
                return bool(data)
            check(head.startswith(b"HTTP/1.1 101 "), head)
            self.upgraded, self.buffer = True, rest
        buffer, at = self.buffer, 0
        while len(buffer) - at >= 2:
            length, start = buffer[at + 1], at + 2
            if length > 125:
                width = 2 if length == 126 else 8
                length, start = int.from_bytes(buffer[start:start + width], "big"), start + width
            if len(buffer) < start + length:
                break
            at = start + length
            self.take(buffer[start - (2 if length < 126 else 4 if length < 65536 else 10)] & 15, buffer[start:at])
        self.buffer = buffer[at:]
        if self.live and data:
            self.say()
        return bool(data)

    def take(self, opcode, payload):
        if opcode == CLOSE:
            check(payload[:2] == b"\x03\xe9", f"{self.name} was closed:", payload)  # 1001: the server stops
            self.live = False
        elif opcode != TEXT:
            pass
        elif payload.startswith(b'{"type":"say",'):
            check(self.live, f"{self.name}: a live message before the end of the replay")
            self.note(payload)
        elif payload.startswith(b'{"type":"history",'):
            head, end = b'{"type":"history","room_id":"crash","messages":[', b'],"more":'
            check(payload.startswith(head) and not self.live, payload[:200])
            body, _, more = payload[len(head):].rpartition(end)
            for line in body.replace(b"},{", b"}\n{").split(b"\n") if body else []:
                self.note(line)
            check(more in (b"true}", b"false}"), payload[-50:])
            if more == b"false}":
                self.go_live()
        elif payload.startswith(b'{"type":"login",') and b'"client_list":' in payload:
            answer = json.loads(payload)
            wanted = True if self.last else None
            check(answer.get("recovered") is wanted, f"{self.name} resumes at {self.last}:", answer)
            if not self.last:
                self.last = self.start = answer["id"]
                self.go_live()
        else:
            check(payload.startswith((b'{"type":"login",', b'{"type":"logout",')), payload[:300])

    def go_live(self):
        self.live = True
        if self.owed:
            self.ws.send(b"".join(self.owed.values()))

    def note(self, line):
        id, ref = SAID.search(line).groups()
        self.last = id.decode()
        self.owed.pop(ref, None)
        self.heard.append(line)


class Truth:
    """What is in the files, and who has heard how much of it."""

    def __init__(self, d):
        self.d, self.lines, self.ids, self.refs, self.end = d, [], [], set(), 0

    def prove(self, members):
        """With the server dead: nothing twice, and each member has heard the next piece of it."""
        for line in stored_lines(self.d, "crash", self.end, torn=True):
            id, ref = SAID.search(line).groups()
            check(ref not in self.refs, "said once, stored twice:", line)
            check(not self.ids or self.ids[-1] < id.decode(), "ids do not increase:", id)
            self.lines.append(line)
            self.ids.append(id.decode())
            self.refs.add(ref)
            self.end = place(id.decode())
        for member in members:
            if member.at is None and member.last:
                member.at = bisect.bisect_right(self.ids, member.start)
            if not member.heard:
                continue
            wanted = self.lines[member.at:member.at + len(member.heard)]
            if member.heard != wanted:
                bad = next((i for i, (g, w) in enumerate(zip(member.heard, wanted)) if g != w), len(wanted))
                where = "is not in the file" if member.heard[bad] not in self.lines[-10000:] else \
                    f"but next is line {member.at + bad}"
                check(False, member.name, "heard", member.heard[bad][-80:], where, f"({bad} of {len(member.heard)})")
            member.at += len(member.heard)
            member.heard = []


def converse(members, seconds=None, done=None):
    """Let them talk for so long, until `done`, or until the server has gone."""
    poll, by_fd = select.poll(), {m.ws.sock.fileno(): m for m in members}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    end = time.monotonic() + (2 * DEADLINE if seconds is None else seconds)
    while by_fd and time.monotonic() < end and not (done and done()):
        for fd, _ in poll.poll(max(0, min(50, 1000 * (end - time.monotonic())))):
            if not by_fd[fd].hear():
                with contextlib.suppress(OSError):
                    by_fd[fd].ws.sock.shutdown(socket.SHUT_WR)  # the server waits for our end
                poll.unregister(fd)
                del by_fd[fd]


def rest(members):
    """What the kernel still has for them when the server is dead."""
    for member in members:
        while member.hear():
            pass
        member.ws.close()


@case(serial=True)
def crash_test():
    """Ten people talk at full speed, the server is killed at random moments, all come back: whatever
    anybody saw is stored once, everybody sees the same order, nothing is missed or comes twice."""
    with directory() as d:
        faults = Faults(os.path.dirname(d))
        options = ["--data", d, "--rate", "0", "--segment", "16384", "--retain", str(1 << 30)]
        with Server(*options) as s:
            port = s.port
        members, truth = [Member(f"p{i}") for i in range(PEOPLE)], Truth(d)
        for turn in range(CRASH_ROUNDS):
            way = "kill" if turn == 0 else ("kill", "torn", "kill", "torn", "stop")[turn % 5]
            s = Server(*options, "--port", port, env=faults.env)
            try:
                for member in members:
                    member.come(s)
                seconds = random.choice((0.01, 0.03, 0.15)) * random.random() * SLOW if turn else 0.1 * SLOW
                if way == "torn":  # in the middle of a write, after so many bytes
                    faults.set(die=1, room=random.randrange(1, random.choice((300, 3000, 100000))))
                    seconds = 0.3 * SLOW
                converse(members, seconds)
                if way == "stop":
                    s.signal(signal.SIGTERM)
                    converse(members)
                    check(s.wait_end() == 0, "SIGTERM under load: status", s.process.returncode)
                kill(s)
                rest(members)
                truth.prove(members)
            except (AssertionError, OSError, ValueError) as error:
                s.kill()
                raise AssertionError(f"round {turn} ({way}): {error}; {s.log()[-500:]}") from error
            finally:
                faults.none()
        check(len(truth.lines) > 10 * CRASH_ROUNDS, "they hardly talked:", len(truth.lines))
        with Server(*options, "--port", port) as s:
            for member in members:
                member.come(s)
                member.talks = False

            def all_is_said():
                newest = max(m.last or "" for m in members)
                return all(m.live and not m.owed and m.last == newest for m in members)

            converse(members, done=all_is_said)
            check(all_is_said(), "not acknowledged in the end:", [len(m.owed) for m in members])
            reader = Member("reader")  # all of it once more, from the beginning
            reader.last = reader.start = truth.ids[0]
            reader.talks = False
            reader.come(s)
            converse([reader], done=lambda: reader.live)
            kill(s)
        for member in members + [reader]:
            member.ws.close()
        truth.prove(members + [reader])
        check(all(m.at == len(truth.lines) for m in members + [reader]), "somebody has not heard all")
        check(len(truth.refs) == sum(m.spoken for m in members), len(truth.refs), "are stored, said were",
              sum(m.spoken for m in members))


if __name__ == "__main__":
    raise SystemExit(main())
