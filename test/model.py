"""People and a back end do whatever comes to mind, and each time a model says who must have heard what.

    MODEL_STEPS=20000 MODEL_SEED=7 python3 test/model.py

The model is what the README says, as short as can be: who is there, who is in which room in which order, who
speaks in which, who is which user with which phone, and what was said there. After each step everybody must have
heard what the model says, no more and no less, the phones of those who are away must have been told, and the back
end must see everybody where the model has them. A step is one deed or several that come in one packet, so that the
server has them in one round; what somebody hears of several may come in any order, and who is shown out meanwhile
may miss some of it.

A fault names its seed, which has the same things done again, and the last steps.
"""

import collections
import contextlib
import json
import os
import random
import signal
import socket
import struct
import tempfile

import harness
from harness import CERTIFICATE, CLOSE, SLOW, TEXT, Faults, Http, Server, Ws, case, check, frame, get, main, until
from inner import (BIND_UID, DESTROY, HEAD, IS_ONLINE, JOIN_GROUP, KICK, LEAVE_GROUP, ON_CLOSE, ON_CONNECT, ON_HANDSHAKE, ON_MESSAGE,
                   SEND_TO_ALL, SEND_TO_GROUP, SEND_TO_ONE,
                   SEND_TO_UID, SESSIONS_BY_GROUP, SET_SESSION, UNBIND_UID, UNGROUP, UPDATE_SESSION, Inner, Worker, packet, php)

CASES_HERE = len(harness.CASES)
from push import Gateway, Xchat   # noqa: E402
del harness.CASES[CASES_HERE:]   # its own cases are not wanted twice

STEPS = int(os.environ.get("MODEL_STEPS", str(int(2000 / SLOW))))
SEED = int(os.environ.get("MODEL_SEED", str(random.randrange(10**6))))
WITH_PHONES = ("--gateway", "127.0.0.1:0", "--bind", "plain:127.0.0.1:0", "--bind", "tls:127.0.0.1:0", "--tls-cert", CERTIFICATE)
OPTIONS = ("--admin", "127.0.0.1:0", "--rate", "0", "--max-per-address", "0", *WITH_PHONES)
ROOMS, USERS, MOST = ("r1", "r2", "7", "g1", "g2"), ("ann", "42"), 7
TOKENS = [f"{i:02x}" * 32 for i in range(3)]


class Person:
    """Somebody who is connected, and what he must have heard since the last step."""

    def __init__(self, ws, conn):
        self.ws, self.conn, self.uid, self.gone, self.to_send, self.expected = ws, conn, None, False, [], []
        self.name, self.named, self.seat = "", False, None   # `seat`: the room it speaks in
        self.groups, self.grouped = [], False   # the rooms it hears, in order of joining; if it ever was in one
        self.session = None   # or what PHP has
        self.phone = None

    def __repr__(self):
        return f"{self.conn}"


class Phone:
    """One that was heard of: connected or not, it is told what is said where it is subscribed."""

    def __init__(self):
        self.uid, self.keys, self.online, self.unread, self.waiting = None, set(), 0, 0, {}

    def forget(self):
        self.keys, self.waiting = set(), {}


def bare(content):
    """Without the heading of what is said in private."""
    return content.rpartition("</b>")[2]


def seen(m):
    """What matters of a message."""
    type = m["type"]
    if type == "login" and "client_list" in m:
        return "me", m["client_id"], m["client_name"], tuple(m["client_list"].items())
    if type == "login":
        return "login", m["client_id"], m["client_name"]
    if type == "logout":
        return "logout", m["from_client_id"], m["from_client_name"]
    if type == "say":
        whom = m.get("to_uid", m.get("to_client_id"))
        return "say", m["from_client_id"], m["from_client_name"], m.get("from_uid"), whom, bare(m["content"])
    if type == "error":
        return "error", m["code"]
    return type, m.get("n")


def past(words):
    """A history, be it of several pages."""
    return [("past", word) for word in words] or [("past", None)]


class Model:
    def __init__(self, dice, data, gateway=None):
        """`gateway`: where pushes go; then there are phones."""
        self.dice, self.data, self.s, self.gateway = dice, data, None, gateway
        self.phones, self.faults, self.pushed = {}, gateway and Faults(data), 0
        self.data = os.path.join(data, "data")
        self.said, self.letters, self.ids = {}, {}, {}   # {room: words}, {user: words}, {word: id} once somebody heard it
        self.count, self.log, self.alerts, self.unsure = 0, collections.deque(maxlen=12), [], {}
        self.new = {}   # {of letters?, name: what was said there since the last storm began}
        self.begins()

    def begins(self):
        """Nobody is there yet, but what was said before is not forgotten."""
        if self.gateway:
            self.s = Xchat(self.gateway, "--data", self.data, *WITH_PHONES, env=self.faults.env)
        else:
            self.s = Server("--data", self.data, *OPTIONS)
        self.inner = Inner(self.s)
        self.people, self.rooms, self.packets = [], {}, []
        self.phones = {token: phone for token, phone in self.phones.items() if phone.keys}
        for phone in self.phones.values():
            phone.online = 0
        probe = Ws(self.s)
        probe.login("probe", "probe")
        self.prefix = probe.id[:12]
        probe.close()
        until(lambda: self.inner.numbers() == [], "the probe does not go")

    def ends(self):
        if self.dice.random() < .5:
            return self.s.kill()
        fault = self.s.stop()
        check(not fault, fault)

    # -- what follows from what -------------------------------------------

    def id(self, p):
        return p.ws.id

    def stored(self, where, name, word, author, who=None):
        """`who`, as the user `author`, has said this in a room or to a user."""
        where.setdefault(name, []).append(word)
        self.new.setdefault((where is self.letters, name), []).append((word, who, author))
        for token, phone in self.phones.items():
            if token in self.unsure or phone.online or author is not None and author == phone.uid:
                continue
            if (where is self.letters, name) in phone.keys:
                phone.unread += 1
                phone.waiting[where is self.letters, name] = word

    def holds(self, p, token):
        """He has this phone, which is where he is, and has read all."""
        phone = self.phones.setdefault(token, Phone())
        phone.online += 1
        if phone.uid != p.uid:
            phone.forget()
        phone.uid, phone.unread, phone.waiting = p.uid, 0, {}
        phone.keys |= {(False, room) for room in p.groups} | ({(True, p.uid)} if p.uid else set())
        self.lets_go(p)
        p.phone = token

    def has_phone(self, p):
        """And it has not come with another user since."""
        return p.phone and self.phones[p.phone].uid == p.uid

    def lets_go(self, p):
        """A phone that nobody has, and that is subscribed to nothing, is not known any more."""
        phone = self.phones.get(p.phone)
        if phone:
            phone.online -= 1
            if not phone.online and not phone.keys:
                del self.phones[p.phone]
        p.phone = None

    def tell(self, room, event, *but):
        for p in self.rooms.get(room, ()):
            if p not in but:
                p.expected.append(event)

    def out_of(self, p, room):
        if room not in p.groups:
            return
        p.groups.remove(room)
        self.rooms[room].remove(p)
        if p.seat == room:
            p.seat = None
            self.tell(room, ("logout", self.id(p), p.name))

    def into(self, p, room):
        if room not in p.groups:
            p.groups.append(room)
            self.rooms.setdefault(room, []).append(p)
            p.grouped = True

    def leaves(self, p):
        p.gone = True
        self.lets_go(p)
        if p.seat:
            self.out_of(p, p.seat)
        for room in list(p.groups):
            self.out_of(p, room)
        self.people.remove(p)

    # -- what people do -----------------------------------------------------

    def comes(self):
        before = {p.conn for p in self.people}
        ws = Ws(self.s, at=self.dice.randrange(2))
        new = set(self.inner.numbers()) - before
        check(len(new) == 1, "the newcomer is one of", new)
        conn = new.pop()
        ws.id = self.prefix + f"{conn:08x}"
        self.people.append(Person(ws, conn))

    def say_to(self, p, message):
        p.to_send.append(frame(TEXT, json.dumps(message)))

    def login(self, p):
        room, name = self.dice.choice(ROOMS[:3]), f"name {self.dice.randrange(100)}"
        message, missed = {"type": "login", "client_name": name, "room_id": self.in_json(room)}, []
        for field, said, where in ("since", self.said, room), ("inbox_since", self.letters, p.uid):
            known = [word for word in said.get(where, ())[-40:] if word in self.ids]   # so they come as one page
            if known and self.may_look_back and self.dice.random() < .3:
                word = self.dice.choice(known)
                message[field] = self.ids[word]
                missed.append(said[where][said[where].index(word) + 1:])
        if p.seat and p.seat != room:
            self.out_of(p, p.seat)
        p.seat, p.name, p.named = room, name, True
        self.tell(room, ("login", self.id(p), name), p)
        self.into(p, room)
        p.session = {**(p.session or {}), "room_id": message["room_id"], "client_name": name}
        p.expected.append(("me", self.id(p), name, tuple((self.id(o), o.name) for o in self.rooms[room] if o.named)))
        if self.gateway and self.dice.random() < .5:
            message["device_token"] = self.dice.choice(TOKENS)
            self.holds(p, message["device_token"])
        self.one = self.one and len(missed) < 2   # which of the two comes first is not said
        for words in missed:
            p.expected += past(words)
        self.say_to(p, message)

    def in_json(self, room):
        return int(room) if room == "7" and self.dice.random() < .5 else room

    def logout(self, p):
        forget = self.dice.random() < .3
        self.say_to(p, {"type": "logout", "forget_device": forget})
        if not p.seat:
            return p.expected.append(("error", "not_logged_in"))
        if forget and self.has_phone(p):
            self.phones[p.phone].forget()
            self.lets_go(p)
        p.expected.append(("logout", self.id(p), p.name))
        self.out_of(p, p.seat)
        p.session = None

    def word(self):
        self.count += 1
        return f"word {self.count}"

    def say(self, p):
        word = self.word()
        self.say_to(p, {"type": "say", "to_client_id": "all", "content": word})
        if not p.seat:
            return p.expected.append(("error", "not_logged_in"))
        self.stored(self.said, p.seat, word, p.uid, p)
        self.tell(p.seat, ("say", self.id(p), p.name, p.uid, "all", word))

    def whisper(self, p):
        to, word = self.dice.choice(self.people), self.word()
        self.say_to(p, {"type": "say", "to_client_id": self.id(to), "content": word})
        if not p.seat:
            return p.expected.append(("error", "not_logged_in"))
        for one in to, p:
            one.expected.append(("say", self.id(p), p.name, p.uid, self.id(to), word))

    def letter(self, p, uid=None):
        uid, word = uid or self.dice.choice(USERS), self.word()
        self.say_to(p, {"type": "say", "to_uid": uid, "content": word})
        if not p.seat:
            return p.expected.append(("error", "not_logged_in"))
        event = "say", self.id(p), p.name, p.uid, uid, word
        self.write_to(uid, event, p)
        p.expected.append(event)

    def write_to(self, uid, event, who=None):
        """A letter: for all connections of the user, and for those that come later."""
        self.stored(self.letters, uid, event[-1], event[3], who)
        for p in self.people:
            if p.uid == uid:
                p.expected.append(event)

    def goes(self, p):
        """With what it sent before in the same packet."""
        self.send(p)
        self.dice.choice((p.ws.close, p.ws.reset if not p.to_send else p.ws.close, lambda: p.ws.send(frame(CLOSE))))()
        self.leaves(p)

    def look_back(self, p):
        count = self.dice.randrange(1, 20)
        self.say_to(p, {"type": "history", "count": count})
        p.expected += past(self.said.get(p.seat, [])[-count:]) if p.seat else [("error", "not_logged_in")]

    # -- what the back end does ---------------------------------------------

    def order(self, cmd, conn=0, ext=b"", body=b"", flag=1):
        self.packets.append(packet(cmd, conn, ext, body, flag))

    def message(self):
        self.count += 1
        return json.dumps({"type": "order", "n": self.count}), ("order", self.count)

    def some(self):
        return self.dice.sample(self.people, self.dice.randrange(len(self.people) + 1))

    def join(self, p):
        room = self.dice.choice(ROOMS)
        self.order(JOIN_GROUP, p.conn, room)
        self.put_into(p, room)

    def leave(self, p):
        room = self.dice.choice(ROOMS)
        self.order(LEAVE_GROUP, p.conn, room)
        self.take_out(p, room)

    def ungroup(self, p):
        room = self.dice.choice(ROOMS)
        self.order(UNGROUP, 0, room)
        for member in list(self.rooms.get(room, ())):   # all at once: nobody is left to hear of it
            member.seat = None if member.seat == room else member.seat
            self.take_out(member, room)

    def put_into(self, p, room):
        """With his phone."""
        if self.has_phone(p) and room not in p.groups:
            self.phones[p.phone].keys.add((False, room))
        self.into(p, room)

    def take_out(self, p, room):
        if self.has_phone(p) and room in p.groups:
            self.phones[p.phone].keys.discard((False, room))
        self.out_of(p, room)

    def bind(self, p):
        self.is_now(p, self.dice.choice(USERS))
        self.order(BIND_UID, p.conn, p.uid)

    def unbind(self, p):
        self.is_now(p, None)
        self.order(UNBIND_UID, p.conn)

    def is_now(self, p, uid):
        """Another user, and so is his phone."""
        if p.uid != uid:
            his = self.has_phone(p)
            p.uid = uid
            if his:
                self.holds(p, p.phone)

    def to_one(self, p):
        text, event = self.message()
        self.order(SEND_TO_ONE, p.conn, body=text)
        p.expected.append(event)

    def to_all(self, p):
        (text, event), some = self.message(), self.some()
        kind = self.dice.choice(("connections", "exclude", None))
        self.order(SEND_TO_ALL, ext=json.dumps({kind: {str(o.conn): o.conn for o in some}}) if kind else b"", body=text)
        for o in self.people:
            if not kind or (o in some) == (kind == "connections"):
                o.expected.append(event)

    def to_users(self, p):
        (text, event), uids = self.message(), self.dice.choices(USERS, k=self.dice.randrange(3))
        self.order(SEND_TO_UID, ext=json.dumps([int(u) if u == "42" else u for u in uids]), body=text)
        for uid in uids:
            for o in self.people:
                if o.uid == uid:
                    o.expected.append(event)

    def to_groups(self, p):
        (text, event), rooms, but = self.message(), self.dice.choices(ROOMS, k=2), self.some()
        excluded = {str(o.conn): o.conn for o in but} or None
        self.order(SEND_TO_GROUP, ext=json.dumps({"group": rooms, "exclude": excluded}), body=text)
        for room in rooms:
            self.tell(room, event, *but)

    def kick(self, p):
        text, event = self.message()
        silent = self.dice.random() < .5
        self.order(KICK, p.conn, body="N;" if silent else text, flag=0 if silent else 1)
        self.leaves(p)

    def destroy(self, p):
        self.order(DESTROY, p.conn)
        self.leaves(p)

    def site_says(self):
        """By HTTP: in a room, or to a user; stored, and so there for who comes later."""
        to, word = self.dice.choice((("room", self.dice.choice(ROOMS)), ("uid", self.dice.choice(USERS)))), self.word()
        self.ask("send", {to[0]: to[1], "message": word})
        whom = "all" if to[0] == "room" else to[1]
        event = "say", "0" * 20, "system", None, whom, word
        if to[0] == "room":
            self.stored(self.said, to[1], word, None)
            self.tell(to[1], event)
        else:
            self.write_to(to[1], event)

    def site_kicks(self):
        uid, (text, event) = self.dice.choice(USERS), self.message()
        theirs = [o for o in self.people if o.uid == uid]
        self.one = len(theirs) < 2
        check(self.ask("kick", {"uid": uid, "message": text})["kicked"] == len(theirs), "other people are shown out")
        for o in theirs:
            self.leaves(o)

    def site_pushes(self):
        kind, whom = self.dice.choice((("uid", self.dice.choice(USERS)), ("room", self.dice.choice(ROOMS))))
        self.count += 1
        theirs = [token for token, phone in self.phones.items()
                  if (phone.keys and phone.uid == whom if kind == "uid" else (False, whom) in phone.keys)]
        check(self.ask("push", {kind: whom, "message": f"alert {self.count}"})["phones"] == len(theirs), "not", theirs)
        self.alerts = [(token, f"alert {self.count}", None) for token in theirs]

    def ask(self, path, fields):
        body = json.dumps(fields).encode()
        lines = "Content-Type: application/json", f"Content-Length: {len(body)}"
        with contextlib.closing(Http(self.s, at="admin")) as http:
            http.send(get("/api/" + path, *lines, method="POST") + body)
            answer = http.answer()
        check(answer.status == 200, path, fields, "is answered by", answer)
        return json.loads(answer.body)

    def new_session(self, p):
        """The client speaks where it says, unless it was taken out of there; others are told nothing."""
        old, room, name = (p.session or {}).get("room_id"), self.dice.choice(ROOMS[:3]), f"name {self.dice.randrange(100)}"
        new = self.dice.choice([{"room_id": self.in_json(room), "client_name": name}] * 2 + [{"vip": "yes"}, {}])
        update = self.dice.random() < .5
        self.order(UPDATE_SESSION if update else SET_SESSION, p.conn, php(new))
        p.session = {**(p.session or {}), **new} if update else new
        if "room_id" not in p.session:
            p.seat = None
            return
        room = str(p.session["room_id"])
        if p.seat or not p.named or str(old) != room:
            self.put_into(p, room)
        p.seat = room if room in p.groups else None
        if p.seat:
            p.name, p.named = p.session["client_name"], True

    # -- a step ---------------------------------------------------------------

    OF_PEOPLE = [login] * 4 + [say] * 5 + [logout, whisper, letter, look_back]
    OF_BACK_END = ([join] * 3 + [leave] * 2 + [bind] * 2 + [new_session] * 3 + [to_groups] * 2 +
                   [unbind, ungroup, kick, destroy, to_one, to_all, to_users])

    def send(self, p):
        if p.to_send:
            p.ws.send(b"".join(p.to_send))
        p.to_send = []

    def step(self):
        d, everybody, many = self.dice, list(self.people), self.dice.choice((1, 1, 1, 2, 3, 6))
        self.one, self.in_order = many == 1, True   # so all that is heard has an order, or what the back end sends
        if not self.people or len(self.people) < MOST and d.random() < .15:
            self.log.append("comes")
            return self.comes()
        if d.random() < .003:
            self.log.append("ends, and begins again")
            self.ends()
            return self.begins()
        if d.random() < .05:
            self.log.append("storm")
            self.storm()
        elif d.random() < .5:
            self.people_do(d.choice(self.people), [d.choice(self.OF_PEOPLE) for _ in range(many)])
        elif d.random() < .15:
            deed = d.choice([self.site_says] * 3 + [self.site_kicks] + [self.site_pushes] * bool(self.gateway))
            self.one = True
            self.log.append(deed.__name__)
            deed()
        else:
            self.back_end_does([d.choice(self.OF_BACK_END) for _ in range(many)])
        for p in everybody:
            if p.gone:
                until(lambda: self.inner.ask(IS_ONLINE, p.conn) == "i:0;", f"{p} does not go")
        self.compare([p for p in everybody if not p.gone], {self.id(p) for p in everybody if p.gone})
        if self.gateway:
            self.compare_pushes()

    def storm(self):
        """All speak at once, some go or are shown out, and the back end sends: the server, which was stopped meanwhile, finds
        it in one round. In what order that was the history tells; everybody must have heard it in this one. Who goes reads
        on: what he has not heard then, his phone is told."""
        d, talkers, before = self.dice, [p for p in self.people if p.seat], {r: len(words) for r, words in self.said.items()}
        leaving = [p for p in self.people if d.random() < .2 and self.may_go(p)]
        kicked = [p for p in leaving if d.random() < .5]   # what they say might come too late
        talkers = [p for p in talkers if p not in kicked]
        rooms = {p.seat for p in talkers}
        writers = {uid: d.choice(talkers) for uid in USERS if talkers}   # one for each, or the order would not be known
        self.unsure, self.new = {p.phone: (p, set(self.phones[p.phone].keys)) for p in leaving if p.phone}, {}
        self.s.signal(signal.SIGSTOP)
        for p in d.sample(self.people, len(self.people)):
            for _ in range(d.randrange(1, 4) if p in talkers else 0):
                self.say(p)
            for uid in [uid for uid in writers if writers[uid] is p and d.random() < .5]:
                self.letter(p, uid)
            if p in kicked:
                self.kick(p)
            elif p in leaving:
                p.to_send.append(frame(CLOSE))
                self.leaves(p)
            self.send(p)
        for deed in d.choices((Model.to_one, Model.to_all, Model.to_users, Model.to_groups), k=3 if self.people else 0):
            deed(self, d.choice(self.people))
        d.shuffle(self.packets)
        self.inner.send(b"".join(self.packets))
        self.packets, self.one, self.in_order = [], False, False
        self.s.signal(signal.SIGCONT)
        self.inner.fence()
        for room in rooms:
            with contextlib.closing(Http(self.s, at="admin")) as http:
                found = json.loads(http.ask(f"/api/history?room={room}&count=200").body)["messages"]
            words, place = self.said[room][before.get(room, 0):], before.get(room, 0)
            order = [m["content"] for m in found if m["content"] in words]
            check(sorted(order) == sorted(words), "the history has", order, "and not", words)
            self.said[room][place:] = order
        for token, (p, keys) in self.unsure.items():
            self.missed(self.phones.get(token), p, keys)
        self.unsure = {}

    def may_go(self, p):
        """He is where his phone is, and nobody else has it: so it is known what he must have heard."""
        phone = self.phones.get(p.phone)
        return not phone or phone.online == 1 and phone.keys <= {(True, p.uid)} | {(False, room) for room in p.groups}

    def missed(self, phone, p, keys):
        """What he has not heard before the end, though it was said where his phone is subscribed, and not by him."""
        heard, opcode = set(), None
        while opcode != CLOSE:
            opcode, m = p.ws.event()
            heard |= {bare(m["content"])} if opcode == TEXT and m["type"] == "say" else set()
        for key in keys:
            unheard = [word for word, who, author in self.new.get(key, ())
                       if word not in heard and who is not p and (author is None or author != phone.uid)]
            phone.unread += len(unheard)
            if unheard:
                phone.waiting[key] = unheard[-1]

    def people_do(self, p, deeds):
        self.log.append((p, [deed.__name__ for deed in deeds]))
        goes = self.dice.random() < .1
        # What an earlier login has begun to look back on ends with the next one; who goes misses it, and so his phone has it.
        self.may_look_back = not goes and sum(deed in (Model.login, Model.logout) for deed in deeds) == 1
        for deed in deeds:
            deed(self, p)
        if goes:
            self.log.append((p, "goes"))
            return self.goes(p)
        self.send(p)
        p.ws.fence()

    def back_end_does(self, deeds):
        for deed in deeds:
            if self.people:
                p = self.dice.choice(self.people)
                self.log.append((p, deed.__name__))
                deed(self, p)
        self.inner.send(b"".join(self.packets))
        self.packets = []
        self.inner.fence()

    def compare(self, everybody, gone):
        for p in everybody:
            p.ws.fence()
            got = []
            while p.ws.early:
                m = p.ws.early.popleft()
                got += past(bare(x["content"]) for x in m["messages"]) if m["type"] == "history" else [seen(m)]
                if "id" in m and m["type"] == "say":
                    self.ids[got[-1][-1]] = m["id"]
            want = p.expected
            if not self.one:
                for room in p.groups:
                    heard = [e[-1] for e in got if e[0] == "say"]
                    words = [word for word in self.said.get(room, ())[-200:] if word in heard]
                    check(words == [word for word in heard if word in words], p, "has heard", heard, "and all others", words)
                got, want = self.loosely(got, gone), self.loosely(want, gone)
            check(got == want, f"{p} ({p.seat}, {p.groups}) has heard {got} and not {want}: too much is",
                  list((collections.Counter(got) - collections.Counter(want)).elements()), "and missing",
                  list((collections.Counter(want) - collections.Counter(got)).elements()))
            p.expected = []
        for r in [r for r, members in self.rooms.items() if not members]:
            del self.rooms[r]
        want = {p.conn: {"uid": p.uid, "groups": self.php_groups(p)} for p in self.people}
        got = self.inner.look("uid", "groups")
        check(got == php(want), "the back end sees", got, "and not", php(want))
        for room in ROOMS:
            got = self.inner.ask(SESSIONS_BY_GROUP, ext=room)
            want = php({p.conn: "" if p.session is None else php(p.session) for p in self.rooms.get(room, ())})
            check(got == want, "in", room, "are", got, "and not", want)

    def compare_pushes(self):
        want, self.alerts = self.alerts, []
        for token, phone in self.phones.items():
            want += [(token, word, phone.unread) for word in phone.waiting.values()]
            phone.waiting = {}
        if want or self.dice.random() < .05:
            self.faults.later += 3
            self.inner.fence()
            self.s.settle()
        pushes = self.gateway.pushes(n=self.pushed + len(want))
        got = []
        for push in pushes[self.pushed:]:
            aps = json.loads(push["body"])["aps"]
            got.append((push["token"], aps["alert"] if "badge" not in aps else bare(aps["alert"].get("body", "")), aps.get("badge")))
        self.pushed = len(pushes)
        if not self.one:   # which of several was the last is not known
            got, want = [(token, badge) for token, _, badge in got], [(token, badge) for token, _, badge in want]
        check(sorted(got, key=str) == sorted(want, key=str), "pushed was", got, "and not", want)

    def loosely(self, events, gone):
        """What the back end has sent is in order; and who is shown out goes at the end of the round, when others may
        have entered or left."""
        events = [e for e in events if not (e[0] == "logout" and e[1] in gone)]
        orders = [e for e in events if e[0] == "order"] if self.in_order else []
        return orders + sorted((e for e in events if e not in orders), key=str)

    @staticmethod
    def php_groups(p):
        if not p.grouped:
            return None
        return {int(g) if g == "7" else g: g for g in p.groups}


def do(n, gateway=None):
    with tempfile.TemporaryDirectory(prefix="xchat") as data:
        m = Model(random.Random(SEED), data, gateway)
        for i in range(n):
            try:
                m.step()
            except (AssertionError, OSError) as error:
                m.s.kill()
                raise AssertionError(f"seed {SEED}, step {i}: {type(error).__name__} {error}; after {list(m.log)}") from error
        m.ends()


class Staff:
    """Business workers, who come and go like everybody else, and the clients that they serve."""

    def __init__(self, dice, s):
        self.dice, self.s, self.inner, self.log = dice, s, Inner(s), collections.deque(maxlen=12)
        self.workers, self.clients, self.count = {}, [], 0   # {name: Worker}

    def step(self):
        deed = self.dice.choice([self.worker_comes, self.worker_goes] + [self.comes] * 3 + [self.speaks] * 5 + [self.goes])
        self.log.append(deed.__name__)
        client, want = deed() or (None, [])
        got = {worker: list(self.events(worker)) for worker in self.workers.values()}
        who = [worker for worker in got if got[worker]]
        load = {worker: sum(c.worker is worker for c in self.clients if c is not client) for worker in got}
        able = [client.worker] if client and client.worker in got else [w for w in got if load[w] == min(load.values())]
        if not client or not client.taken or not got:
            return check(not who, "nobody is to be told, but", got)
        check(who and who[0] in able and len(who) == 1, "not one of the right ones was told:", got, load)
        check(got[who[0]] == [(cmd, client.conn, body) for cmd, body in want], "told was", got, "and not", want)
        client.worker = who[0]

    @staticmethod
    def events(worker):
        """(command, connection, body) of what has come to it until now."""
        worker.tell(IS_ONLINE)
        while struct.unpack(">I", worker.peek(4))[0] >= HEAD.size:   # an answer is shorter
            event = worker.event()
            yield event.cmd, event.conn, event.body if event.cmd == ON_MESSAGE else b""
        worker.reply()

    def worker_comes(self):
        """One of three; if it is there already, the new one takes its place, but not its clients. Who came while there
        was none is sent away."""
        name = f"w:{self.dice.randrange(3)}"
        worker, old = Worker(self.s, name).fence(), self.workers.get(name)
        if old:
            old.expect_end()
        self.workers[name] = worker
        for client in [c for c in self.clients if not c.taken]:
            client.expect_close(1001)
            self.clients.remove(client)

    def worker_goes(self):
        if self.workers:
            worker = self.workers.pop(self.dice.choice(list(self.workers)))
            worker.sock.shutdown(socket.SHUT_WR)
            worker.expect_end()   # so it is known to have gone
            worker.close()

    def comes(self):
        if len(self.clients) >= MOST:
            return self.goes()
        before = set(self.inner.numbers())
        client = Ws(self.s)
        client.conn, = set(self.inner.numbers()) - before
        client.taken, client.worker = bool(self.workers), None
        self.clients.append(client)
        return client, [(ON_CONNECT, b""), (ON_HANDSHAKE, b"")]

    def speaks(self):
        """Nothing that the chat knows, so it says so, if it is asked."""
        if not self.clients:
            return None
        client, texts = self.dice.choice(self.clients), []
        for _ in range(self.dice.choice((1, 1, 3))):
            self.count += 1
            texts.append(f"no JSON {self.count}".encode())
        client.send(b"".join(frame(TEXT, text) for text in texts))
        client.fence()
        answers = 0 if client.taken and self.workers else len(texts)
        check([m["code"] for m in client.early] == ["bad_json"] * answers, "the chat says", list(client.early))
        client.early.clear()
        return client, [(ON_MESSAGE, text) for text in texts]

    def goes(self):
        if not self.clients:
            return None
        client = self.clients.pop(self.dice.randrange(len(self.clients)))
        self.dice.choice((client.close, client.reset))()
        until(lambda: self.inner.ask(IS_ONLINE, client.conn) == "i:0;", "it does not go")
        return client, [(ON_CLOSE, b"")]


@case()
def steps():
    """As many as MODEL_STEPS."""
    do(STEPS)


@case()
def phones():
    """A quarter of it with phones, and a gateway to which all is pushed."""
    with Gateway() as gateway:
        do(STEPS // 4, gateway)


@case(*OPTIONS)
def workers(s):
    """Each event comes to one worker, which is the client's until it goes."""
    staff = Staff(random.Random(SEED), s)
    for i in range(STEPS):
        try:
            staff.step()
        except (AssertionError, OSError, ValueError) as error:
            raise AssertionError(f"seed {SEED}, step {i}: {type(error).__name__} {error}; after {list(staff.log)}") from error


if __name__ == "__main__":
    raise SystemExit(main())
