"""The chat protocol: who hears what, in which words.

The transcripts and tables hold what existing clients (a PHP chat's web page and an
iOS app) have seen on the wire for years, with the few places where this server is
wiser on purpose: it answers what cannot be done with an error instead of silence,
escapes a name once, and somebody who logs in again leaves the room he was in.
"""

import concurrent.futures
import datetime
import json
import re
import threading
import time

from harness import (BINARY, PING, PONG, SLOW, TEXT, Server, Ws, case, check, close_frame,
                     expect_nothing, frame, join, main, new_room)

ID = re.compile(r"[0-9a-f]{20}")
TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")

# What follows "type" in each message of the server, in this order. "client_list" is
# only in the answer to one's own login, "recovered" if that had a "since", "ref" only
# where the client sent one, "id" in that answer and in what is said to all.
FIELDS = {
    "login": ["client_id", "client_name", "time", "id", "recovered", "client_list", "ref"],
    "say": ["from_client_id", "from_client_name", "to_client_id", "content", "time", "id", "ref"],
    "logout": ["from_client_id", "from_client_name", "time", "ref"],
    "error": ["code", "message", "ref"],
    "pong": ["ref"],
}

# ---------------------------------------------------------------------------
# Transcripts
# ---------------------------------------------------------------------------
#
#   A> text          A sends this text frame, byte for byte
#   A< [type, ...]   A gets a message with these values in the order of FIELDS, without
#                    time and error sentence, which differ. A,B< both get it.
#   A!               A's connection is reset
#
# "$A" is A's client id, <Neil> a name as HTML. The order is per client, and in the end
# there is nothing left.

SCENES = r'''
# login_and_broadcast: the newcomer gets the list, the others the news, and all hear all
A> {"type":"login","client_name":"Alice","room_id":"1"}
A< ["login","$A","Alice",{"$A":"Alice"}]
B> {"type":"login","client_name":"Bob","room_id":"1"}
A< ["login","$B","Bob"]
B< ["login","$B","Bob",{"$A":"Alice","$B":"Bob"}]
A> {"type":"say","to_client_id":"all","to_client_name":"all","content":"hello"}
A,B< ["say","$A","Alice","all","hello"]

# private_say: a copy for the recipient, another for the sender; the name is what the sender wrote
A> {"type":"login","client_name":"Alice","room_id":"1"}
A< ["login","$A","Alice",{"$A":"Alice"}]
B> {"type":"login","client_name":"Bob","room_id":"1"}
A< ["login","$B","Bob"]
B< ["login","$B","Bob",{"$A":"Alice","$B":"Bob"}]
C> {"type":"login","client_name":"Carl","room_id":"1"}
A,B< ["login","$C","Carl"]
C< ["login","$C","Carl",{"$A":"Alice","$B":"Bob","$C":"Carl"}]
A> {"type": "say", "to_client_id": "$B", "to_client_name": "Bob", "content": "psst"}
B< ["say","$A","Alice","$B","<b>\u5bf9\u4f60\u8bf4: </b>psst"]
A< ["say","$A","Alice","$B","<b>\u4f60\u5bf9Bob\u8bf4: </b>psst"]
A> {"type": "say", "to_client_id": "$B", "to_client_name": "<i>&\"'Bob", "content": "x\ny"}
B< ["say","$A","Alice","$B","<b>\u5bf9\u4f60\u8bf4: </b>x<br />\ny"]
A< ["say","$A","Alice","$B","<b>\u4f60\u5bf9&lt;i&gt;&amp;&quot;&#039;Bob\u8bf4: </b>x<br />\ny"]
A> {"type": "say", "to_client_id": "$B", "content": "x"}
B< ["say","$A","Alice","$B","<b>\u5bf9\u4f60\u8bf4: </b>x"]
A< ["say","$A","Alice","$B","<b>\u4f60\u5bf9\u8bf4: </b>x"]

# private_say_to_oneself: both copies, the recipient's first
A> {"type":"login","client_name":"Alice","room_id":"1"}
A< ["login","$A","Alice",{"$A":"Alice"}]
A> {"type":"say","to_client_id":"$A","to_client_name":"Alice","content":"me"}
A< ["say","$A","Alice","$A","<b>\u5bf9\u4f60\u8bf4: </b>me"]
A< ["say","$A","Alice","$A","<b>\u4f60\u5bf9Alice\u8bf4: </b>me"]

# private_say_crosses_rooms: whoever knows an id may talk to it, also when its owner left his room
A> {"type":"login","client_name":"Alice","room_id":"1"}
A< ["login","$A","Alice",{"$A":"Alice"}]
B> {"type":"login","client_name":"Bob","room_id":"2"}
B< ["login","$B","Bob",{"$B":"Bob"}]
A> {"type":"say","to_client_id":"$B","to_client_name":"Bob","content":"hi"}
B< ["say","$A","Alice","$B","<b>\u5bf9\u4f60\u8bf4: </b>hi"]
A< ["say","$A","Alice","$B","<b>\u4f60\u5bf9Bob\u8bf4: </b>hi"]
B> {"type":"logout"}
B< ["logout","$B","Bob"]
A> {"type":"say","to_client_id":"$B","to_client_name":"Bob","content":"hi"}
B< ["say","$A","Alice","$B","<b>\u5bf9\u4f60\u8bf4: </b>hi"]
A< ["say","$A","Alice","$B","<b>\u4f60\u5bf9Bob\u8bf4: </b>hi"]

# names: escaped once wherever they appear; a later login sees them in the list
B> {"type":"login","client_name":"Bob","room_id":"7"}
B< ["login","$B","Bob",{"$B":"Bob"}]
A> {"type":"login","client_name":"<b>\"O'Neil\" & co</b> \u98de\u9c7c \ud83d\ude00 a/b\\c","room_id":"7"}
A< ["login","$A","<Neil>",{"$B":"Bob","$A":"<Neil>"}]
B< ["login","$A","<Neil>"]
A> {"type":"say","to_client_id":"all","to_client_name":"all","content":"hi"}
A,B< ["say","$A","<Neil>","all","hi"]
A> {"type":"say","to_client_id":"$B","to_client_name":"Bob","content":"hi"}
B< ["say","$A","<Neil>","$B","<b>\u5bf9\u4f60\u8bf4: </b>hi"]
A< ["say","$A","<Neil>","$B","<b>\u4f60\u5bf9Bob\u8bf4: </b>hi"]
C> {"type":"login","client_name":"Carl","room_id":"7"}
A,B< ["login","$C","Carl"]
C< ["login","$C","Carl",{"$B":"Bob","$A":"<Neil>","$C":"Carl"}]
A!
B,C< ["logout","$A","<Neil>"]

# name_types: what is not a string is as PHP would print it; none at all is fine
W> {"type":"login","client_name":"Watch","room_id":"8"}
W< ["login","$W","Watch",{"$W":"Watch"}]
A> {"type":"login","room_id":"8"}
A< ["login","$A","",{"$W":"Watch","$A":""}]
W< ["login","$A",""]
B> {"type":"login","client_name":"","room_id":"8"}
B< ["login","$B","",{"$W":"Watch","$A":"","$B":""}]
W,A< ["login","$B",""]
C> {"type":"login","client_name":5,"room_id":"8"}
C< ["login","$C","5",{"$W":"Watch","$A":"","$B":"","$C":"5"}]
W,A,B< ["login","$C","5"]
B!
W,A,C< ["logout","$B",""]
D> {"type":"login","client_name":null,"room_id":"8"}
D< ["login","$D","",{"$W":"Watch","$A":"","$C":"5","$D":""}]
W,A,C< ["login","$D",""]
E> {"type":"login","client_name":false,"room_id":"8"}
E< ["login","$E","",{"$W":"Watch","$A":"","$C":"5","$D":"","$E":""}]
W,A,C,D< ["login","$E",""]
F> {"type":"login","client_name":true,"room_id":"8"}
F< ["login","$F","1",{"$W":"Watch","$A":"","$C":"5","$D":"","$E":"","$F":"1"}]
W,A,C,D,E< ["login","$F","1"]

# relogin_same_room: a new name, the same place; one copy for oneself, the news for the others
A> {"type":"login","client_name":"Ann","room_id":"10"}
A< ["login","$A","Ann",{"$A":"Ann"}]
B> {"type":"login","client_name":"Bob","room_id":"10"}
A< ["login","$B","Bob"]
B< ["login","$B","Bob",{"$A":"Ann","$B":"Bob"}]
A> {"type":"login","client_name":"Anna","room_id":"10"}
A< ["login","$A","Anna",{"$A":"Anna","$B":"Bob"}]
B< ["login","$A","Anna"]
A> {"type":"say","to_client_id":"all","content":"me again"}
A,B< ["say","$A","Anna","all","me again"]

# relogin_other_room: leaves the old room, which is told, and is heard in the new one only
B> {"type":"login","client_name":"Bob","room_id":"10"}
B< ["login","$B","Bob",{"$B":"Bob"}]
C> {"type":"login","client_name":"Carl","room_id":"20"}
C< ["login","$C","Carl",{"$C":"Carl"}]
A> {"type":"login","client_name":"Ann","room_id":"10"}
A< ["login","$A","Ann",{"$B":"Bob","$A":"Ann"}]
B< ["login","$A","Ann"]
A> {"type":"login","client_name":"Anna","room_id":"20"}
B< ["logout","$A","Ann"]
C< ["login","$A","Anna"]
A< ["login","$A","Anna",{"$C":"Carl","$A":"Anna"}]
A> {"type":"say","to_client_id":"all","to_client_name":"all","content":"from A"}
A,C< ["say","$A","Anna","all","from A"]
B> {"type":"say","to_client_id":"all","to_client_name":"all","content":"from B"}
B< ["say","$B","Bob","all","from B"]
D> {"type":"login","client_name":"Dora","room_id":"10"}
D< ["login","$D","Dora",{"$B":"Bob","$D":"Dora"}]
B< ["login","$D","Dora"]
A!
C< ["logout","$A","Anna"]
E> {"type":"login","client_name":"Eve","room_id":"20"}
E< ["login","$E","Eve",{"$C":"Carl","$E":"Eve"}]
C< ["login","$E","Eve"]

# relogin_refused: a login that cannot be done changes nothing
A> {"type":"login","client_name":"Ann","room_id":"10"}
A< ["login","$A","Ann",{"$A":"Ann"}]
B> {"type":"login","client_name":"Bob","room_id":"10"}
A< ["login","$B","Bob"]
B< ["login","$B","Bob",{"$A":"Ann","$B":"Bob"}]
A> {"type":"login","client_name":"Other","room_id":""}
A< ["error","bad_field"]
A> {"type":"login","client_name":["Other"],"room_id":"10"}
A< ["error","bad_field"]
A> {"type":"say","to_client_id":"all","content":"still here"}
A,B< ["say","$A","Ann","all","still here"]

# logout: the others are told, oneself gets an answer, and the connection stays for another login
A> {"type":"login","client_name":"Ann","room_id":"1"}
A< ["login","$A","Ann",{"$A":"Ann"}]
B> {"type":"login","client_name":"Bob","room_id":"1"}
A< ["login","$B","Bob"]
B< ["login","$B","Bob",{"$A":"Ann","$B":"Bob"}]
A> {"type":"logout","ref":"bye"}
A< ["logout","$A","Ann","bye"]
B< ["logout","$A","Ann"]
B> {"type":"say","to_client_id":"all","content":"alone"}
B< ["say","$B","Bob","all","alone"]
A> {"type":"say","to_client_id":"all","content":"anyone?"}
A< ["error","not_logged_in"]
A> {"type":"logout"}
A< ["error","not_logged_in"]
A> {"type":"login","client_name":"Ann","room_id":"1"}
A< ["login","$A","Ann",{"$B":"Bob","$A":"Ann"}]
B< ["login","$A","Ann"]

# room_types: the number 1 is the string "1"; "01", " 1" and 1.5 are not
W> {"type":"login","client_name":"Watch","room_id":"1"}
W< ["login","$W","Watch",{"$W":"Watch"}]
A> {"type":"login","client_name":"A","room_id":1}
A< ["login","$A","A",{"$W":"Watch","$A":"A"}]
W< ["login","$A","A"]
A!
W< ["logout","$A","A"]
B> {"type":"login","client_name":"B","room_id":1.0}
B< ["login","$B","B",{"$W":"Watch","$B":"B"}]
W< ["login","$B","B"]
B!
W< ["logout","$B","B"]
C> {"type":"login","client_name":"C","room_id":true}
C< ["login","$C","C",{"$W":"Watch","$C":"C"}]
W< ["login","$C","C"]
D> {"type":"login","client_name":"D","room_id":"01"}
D< ["login","$D","D",{"$D":"D"}]
E> {"type":"login","client_name":"E","room_id":" 1"}
E< ["login","$E","E",{"$E":"E"}]
F> {"type":"login","client_name":"F","room_id":1.5}
F< ["login","$F","F",{"$F":"F"}]
F> {"type":"say","to_client_id":"all","content":"hello"}
F< ["say","$F","F","all","hello"]
G> {"type":"login","client_name":"G","room_id":"1.5"}
G< ["login","$G","G",{"$F":"F","$G":"G"}]
F< ["login","$G","G"]
H> {"type":"login","client_name":"H","room_id":-1}
H< ["login","$H","H",{"$H":"H"}]
I> {"type":"login","client_name":"I","room_id":12345678901234567890}
I< ["login","$I","I",{"$I":"I"}]
I> {"type":"say","to_client_id":"all","content":"hello"}
I< ["say","$I","I","all","hello"]
J> {"type":"login","client_name":"J","room_id":"\u5927\u5385 \"x\"/y"}
J< ["login","$J","J",{"$J":"J"}]
K> {"type":"login","client_name":"K","room_id":"a b"}
K< ["login","$K","K",{"$K":"K"}]
K> {"type":"say","to_client_id":"all","content":"hello"}
K< ["say","$K","K","all","hello"]

# accepted_oddities: white space around, the last of two equal keys, any order, extra fields
A> {"type":"login","client_name":"Alice","room_id":1}
A< ["login","$A","Alice",{"$A":"Alice"}]
A> {"type":"pong"}
A>   {"type" : "say" , "to_client_id":"all", "content":"white space"}
A< ["say","$A","Alice","all","white space"]
A> {"type":"say","to_client_id":"all","content":"dup1","content":"dup2"}
A< ["say","$A","Alice","all","dup2"]
A> {"content":"order","to_client_id":"all","type":"say","extra":{"x":[1]}}
A< ["say","$A","Alice","all","order"]
A> {"\u0074ype":"\u0073ay","to_client_id":"a\u006cl","content":"escaped keys"}
A< ["say","$A","Alice","all","escaped keys"]

# ref: comes back in answers and errors, to all in a say to all, to the sender alone in a private one
A> {"type":"login","client_name":"Ann","room_id":"1","ref":"login-1"}
A< ["login","$A","Ann",{"$A":"Ann"},"login-1"]
B> {"type":"login","client_name":"Bob","room_id":"1","ref":"\"<&>' \u98de/\\"}
A< ["login","$B","Bob"]
B< ["login","$B","Bob",{"$A":"Ann","$B":"Bob"},"\"<&>' \u98de/\\"]
A> {"type":"say","to_client_id":"all","content":"hello","ref":"say-1"}
A,B< ["say","$A","Ann","all","hello","say-1"]
A> {"type":"say","to_client_id":"$B","to_client_name":"Bob","content":"psst","ref":"say-2"}
A< ["say","$A","Ann","$B","<b>\u4f60\u5bf9Bob\u8bf4: </b>psst","say-2"]
B< ["say","$A","Ann","$B","<b>\u5bf9\u4f60\u8bf4: </b>psst"]
A> {"type":"say","to_client_id":"$A","to_client_name":"Ann","content":"me","ref":"say-3"}
A< ["say","$A","Ann","$A","<b>\u5bf9\u4f60\u8bf4: </b>me"]
A< ["say","$A","Ann","$A","<b>\u4f60\u5bf9Ann\u8bf4: </b>me","say-3"]
A> {"type":"ping","ref":"0123456789012345678901234567890123456789012345678901234567890123"}
A< ["pong","0123456789012345678901234567890123456789012345678901234567890123"]
A> {"type":"ping","ref":""}
A< ["pong",""]
A> {"type":"pong","ref":"no answer"}
A> {"type":"login","client_name":"Ann","room_id":"2","ref":"login-2"}
A< ["login","$A","Ann",{"$A":"Ann"},"login-2"]
B< ["logout","$A","Ann"]

# ping_pong: a client's ping is answered, before a login too; its pong is not
A> {"type":"ping"}
A< ["pong"]
A> {"type":"pong"}
A> {"type":"login","client_name":"Ann","room_id":"1"}
A< ["login","$A","Ann",{"$A":"Ann"}]
A> {"type":"ping"}
A< ["pong"]
'''.replace("<Neil>", r"&lt;b&gt;&quot;O&#039;Neil&quot; &amp; co&lt;/b&gt; \u98de\u9c7c \ud83d\ude00 a/b\\c")


def unify(wanted, got, ids):
    """Equal, if "$A" stands for the same client id everywhere."""
    if isinstance(wanted, str) and re.fullmatch(r"\$[A-Z]", wanted):
        return isinstance(got, str) and ID.fullmatch(got) and ids.setdefault(wanted, got) == got
    if isinstance(wanted, list):
        return isinstance(got, list) and len(wanted) == len(got) and all(
            unify(w, g, ids) for w, g in zip(wanted, got))
    if isinstance(wanted, dict):  # as a list, for the order matters
        return isinstance(got, dict) and unify(
            [list(i) for i in wanted.items()], [list(i) for i in got.items()], ids)
    return type(wanted) is type(got) and wanted == got


def values(message):
    """The values of a message in order, once its form is proved."""
    fields = FIELDS[message["type"]]
    check(list(message) == ["type"] + [f for f in fields if f in message], "order of fields:", message)
    check(not {*fields} - {*message} - {"client_list", "ref", "id", "recovered"}, "missing fields:", message)
    stored = message["type"] == "say" and message["to_client_id"] == "all"
    check(("id" in message) == (stored or "client_list" in message), "id:", message)
    check(re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{16}", message.get("id", "0" * 8 + "-" + "0" * 16)), "id:", message)
    check(TIME.fullmatch(message.get("time", "2026-11-23 09:01:00")), "time:", message)
    return [v for k, v in message.items() if k not in ("time", "message", "id")]


def play(s, script):
    clients, ids = {}, {}
    for number, line in enumerate(script, 1):
        who, act, rest = re.fullmatch(r"([A-Z,]+)([><!]) ?(.*)", line).groups()
        for name in who.split(","):
            client = clients[name] = clients.get(name) or Ws(s)
            if act == ">":
                client.send(frame(TEXT, re.sub(r"\$[A-Z]", lambda m: ids[m[0]], rest)))
                client.fence()  # handled, before anybody else says something
            elif act == "!":
                clients.pop(name).reset()
            else:
                got = values(client.message())
                check(unify(json.loads(rest), got, ids), f"step {number}: {name} wanted {rest}, got {got}", ids)
    expect_nothing(*clients.values())


def scene(name, script):
    def run(s):
        play(s, script)
    run.__name__ = name
    case()(run)


for text in SCENES.split("\n# ")[1:]:
    title, *steps = text.strip("\n").split("\n")
    scene("scene_" + title.split(":")[0], steps)

# ---------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------

HTML = [  # name, as said, as heard: &<>"' become entities, also those of entities
    ("plain", "hello", "hello"),
    ("script", "<script>alert(\"x\")</script> & 'q'",
     "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; &#039;q&#039;"),
    ("entities are escaped again", "&amp; &lt; &#39;", "&amp;amp; &amp;lt; &amp;#39;"),
    ("quotes", "'\"`", "&#039;&quot;`"),
    ("slashes", "back\\slash /slash/ http://a/b", "back\\slash /slash/ http://a/b"),
    ("beyond ASCII", "\U0001F600 \u00e9 \u4f60\u597d \u2028\u2029", "\U0001F600 \u00e9 \u4f60\u597d \u2028\u2029"),
    ("right-to-left and zero-width marks", "\u202eabc\u200b\ufeff", "\u202eabc\u200b\ufeff"),
    ("nothing is trimmed", "  a  ", "  a  "),
    ("empty", "", ""),
    ("zero", "0", "0"),
]
LINES = [  # each line end, however written, gets a <br /> in front and stays
    ("LF, CRLF, CR, LFCR", "a\nb\r\nc\rd\n\re", "a<br />\nb<br />\r\nc<br />\rd<br />\n\re"),
    ("two of each", "\n\nb\r\n\r\nc\r\rd\n\r\n\re",
     "<br />\n<br />\nb<br />\r\n<br />\r\nc<br />\r<br />\rd<br />\n\r<br />\n\re"),
    ("pairs are taken from the left", "\r\r\n\r", "<br />\r<br />\r\n<br />\r"),
    ("at the ends", "\na\n", "<br />\na<br />\n"),
    ("other white space is none", "\t\v\f\u0085\u2028", "\t\v\f\u0085\u2028"),
    ("controls", "\t\b\f\x01\x1f\x7f", "\t\b\f\x01\x1f\x7f"),
    ("NUL", "\0nul", "\0nul"),
]


@case(rows=HTML + LINES)
def content(s, name, said, heard):
    """Contents reach everybody as HTML that cannot do anything."""
    ann, bob = join(s, new_room(), "Ann", "Bob")
    ann.say(said)
    for client in ann, bob:
        client.expect("say", content=heard)
    ann.say(said, to=bob.id)
    bob.expect("say", content="<b>\u5bf9\u4f60\u8bf4: </b>" + heard)
    ann.expect("say", content="<b>\u4f60\u5bf9\u8bf4: </b>" + heard)


@case(rows=[row for row in HTML if len(row[1].encode()) <= 64])
def name_escaping(s, name, said, heard):
    """A name is escaped like a content, and once: in the list, the news, each word and the end."""
    room = new_room()
    watch, ann = join(s, room, "Watch"), Ws(s)
    answer = ann.login(said, room)
    check(answer["client_name"] == heard, answer)
    check(answer["client_list"] == {watch.id: "Watch", ann.id: heard}, answer)
    watch.expect("login", client_name=heard)
    ann.say("x")
    watch.expect("say", from_client_name=heard)
    ann.close()
    watch.expect("logout", from_client_name=heard)


@case(rows=[
    ("number", '"content":5', "5"),
    ("fraction", '"content":1.50', "1.5"),
    ("negative", '"content":-12', "-12"),
    ("true", '"content":true', "1"),
    ("false", '"content":false', ""),
    ("null", '"content":null', ""),
    ("missing", '"no":"content"', ""),
])
def content_types(s, name, field, heard):
    """What is not a string becomes one: the page calls string functions on it."""
    ann = join(s, new_room(), "Ann")
    ann.send(frame(TEXT, '{"type":"say","to_client_id":"all",%s}' % field))
    ann.expect("say", content=heard)


@case()
def raw_on_the_wire(s):
    """UTF-8 and '/' are sent as they are, controls escaped, and there is no white space."""
    ann = join(s, "room", "Ann")
    ann.say("\u4f60\U0001F600/\x01\x1f\x7f\\\t")
    opcode, payload = ann.next_frame()
    check(opcode == TEXT)
    check('"content":"\u4f60\U0001F600/\\u0001\\u001f\x7f\\\\\\t"'.encode() in payload, payload)
    bare = re.sub(rb'"[^"]*"', b"", payload.replace(b'\\"', b""))
    check(not re.search(rb"\s", bare), payload)


@case()
def white_space_around(s):
    """Of JSON's four kinds, before and behind."""
    ann = join(s, "room", "Ann")
    ann.send(frame(TEXT, ' \n\t\r{"type":"say","to_client_id":"all","content":"x"}\n '))
    ann.expect("say", content="x")


@case()
def fragments_and_interleaved_ping(s):
    """A message in pieces, cut inside a character, with a ping in between, is one message."""
    ann = join(s, "room", "Ann")
    raw = '{"type":"say","to_client_id":"all","content":"\u4f60\u597d"}'.encode()
    cut = raw.index("\u597d".encode()) + 1
    ann.send(frame(TEXT, raw[:cut], fin=0) + frame(PING, b"between") + frame(0, b"", fin=0) + frame(0, raw[cut:]))
    check(ann.event() == (PONG, b"between"))
    ann.expect("say", content="\u4f60\u597d")


# ---------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------

NAME64 = "\u4f60" * 21 + "a"
ROOM128 = "\u4f60" * 42 + "ab"

BAD_JSON = [  # label, text: each is refused as a whole, so there is no ref to give back
    ("words", "not json"),
    ("cut off", '{"type":"say"'),
    ("an empty frame", ""),
    ("only white space", " \n"),
    ("a lone surrogate", '{"type":"ping","x":"\\ud800"}'),
    ("a line end in a string", '{"type":"ping","x":"a\nb"}'),
    ("single quotes", "{'type':'ping'}"),
    ("a trailing comma", '{"type":"ping",}'),
    ("a byte order mark", '\ufeff{"type":"ping"}'),
    ("two objects", '{"type":"ping"}{"type":"ping"}'),
]
BAD = [  # label, fields, code, words of the message
    ("no type", {"a": 1}, "bad_type", "type"),
    ("unknown type", {"type": "nosuch"}, "bad_type", "type"),
    ("type in capitals", {"type": "SAY", "to_client_id": "all", "content": "x"}, "bad_type", "type"),
    ("type of the server", {"type": "error"}, "bad_type", "type"),
    *((f"type {t!r}", {"type": t}, "bad_type", "type") for t in (1, 0, None, True, ["say"], "")),

    ("login without room", {"type": "login", "client_name": "C"}, "bad_field", "room_id"),
    *((f"room {r!r}", {"type": "login", "client_name": "C", "room_id": r}, "bad_field", "room_id")
      for r in (None, 0, 0.0, "0", "", False, [], {}, [1, 2], {"a": 1}, "a\x00b", "a\nb", "\x1b[2J")),
    ("room of 129 bytes", {"type": "login", "client_name": "C", "room_id": ROOM128 + "b"},
     "too_long", "room_id", "128"),
    *((f"name {n!r}", {"type": "login", "client_name": n, "room_id": "1"}, "bad_field", "client_name")
      for n in (["Carl"], {"a": "b"}, "a\x00b", "a\nb", "\x1b[2J")),
    ("name of 65 bytes", {"type": "login", "client_name": NAME64 + "b", "room_id": "1"},
     "too_long", "client_name", "64"),

    *((f"to {t!r}", {"type": "say", "to_client_id": t, "content": "x"}, "bad_field", "to_client_id")
      for t in (None, 0, True, ["all"], {})),
    ("to nobody", {"type": "say", "content": "x"}, "bad_field", "to_client_id"),
    *((f"to unknown {t!r}", {"type": "say", "to_client_id": t, "content": "x"}, "no_such_client")
      for t in ("7f00000108fc0000ffff", "0a00000108fc00000001", "zzzzzzzzzzzzzzzzzzzz", "short", "",
                "ALL", "all ", "all\0")),
    *((f"content {c!r}", {"type": "say", "to_client_id": "all", "content": c}, "bad_field", "content")
      for c in (["x"], {"x": 1})),
]


@case("--rate", "0", rows=BAD_JSON + [(t, t) for t in ("[]", "null", "false", "0", "5", "true", "[1,2]", '"hello"')])
def bad_json(s, name, text):
    """What is not one JSON object is refused, and the connection goes on."""
    ann, bob = join(s, new_room(), "Ann", "Bob")
    ann.send(frame(TEXT, text))
    ann.expect_error("bad_json")
    expect_nothing(ann, bob)


@case("--rate", "0", rows=BAD)
def errors(s, name, fields, code, *words):
    """Every error names its code, the field, the limit if there is one, and gives the ref back."""
    ann, bob = join(s, new_room(), "Ann", "Bob")
    ann.send_json(fields)
    ann.expect_error(code, *words)
    ann.send_json({**fields, "ref": "r-1"})
    check(list(ann.expect_error(code, *words, ref="r-1")) == ["type"] + FIELDS["error"], "order of fields")
    ann.say("still here")
    for client in ann, bob:
        client.expect("say", content="still here")


@case()
def name_of_the_recipient(s):
    """to_client_name only has a meaning in a private say, and must be text there."""
    ann = join(s, "room", "Ann")
    for name in ["Bob"], {"a": "b"}:
        ann.send_json(type="say", to_client_id="all", to_client_name=name, content="x")
        ann.expect("say", content="x")
        ann.send_json(type="say", to_client_id=ann.id, to_client_name=name, content="x")
        ann.expect_error("bad_field", "to_client_name")
    ann.expect_nothing()


@case(rows=[
    ("say", {"type": "say", "to_client_id": "all", "content": "x"}),
    ("private say", {"type": "say", "to_client_id": "7f00000108fc00000001", "content": "x"}),
    ("logout", {"type": "logout"}),
])
def before_login(s, name, fields):
    """Only a login, ping and pong mean something to a stranger."""
    ann = Ws(s)
    ann.send_json(fields)
    ann.expect_error("not_logged_in")
    ann.send_json({**fields, "ref": "r-2"})
    ann.expect_error("not_logged_in", ref="r-2")


@case(rows=[("letters", "r" * 64), ("UTF-8", NAME64), ("what JSON has to escape", '"' * 64), ("controls", "\1" * 64)])
def longest_ref(s, name, ref):
    """64 bytes, counted when JSON is decoded: some clients escape all they can."""
    ann = join(s, new_room(), "Ann")
    ann.send(frame(TEXT, json.dumps({"type": "ping", "ref": ref})))
    ann.expect("pong", ref=ref)


@case(rows=[("65 bytes", "r" * 65), ("65 bytes of UTF-8", "\u4f60" * 21 + "ab"), ("number", 1), ("array", ["r"])])
def bad_ref(s, name, ref):
    """A ref that is too long or no string is an error itself, and does not come back."""
    ann = join(s, new_room(), "Ann")
    for kind in "ping", "say", "login":
        ann.send_json(type=kind, to_client_id="all", content="x", client_name="Ann", room_id="room", ref=ref)
        ann.expect_error("bad_field", "ref", "64")
    ann.expect_nothing()


@case()
def longest_name_and_room(s):
    """64 and 128 bytes of UTF-8 are allowed, counted before escaping."""
    for name, room in ("n" * 64, "r" * 128), (NAME64, ROOM128), ("&" * 64, "<" * 128):
        ann, bob = join(s, room, name, name)
        ann.say("x")
        bob.expect("say", from_client_name=name.replace("&", "&amp;"))


@case("--rate", "1", "--burst", "3")
def rate_limited(s):
    """Past the burst a message is refused, with its ref, and not sent to anybody."""
    ann, bob = join(s, "room", "Ann", "Bob")
    for word in "one", "two":
        ann.say(word)
    ann.say("three", ref="r-3")
    answers = sorted((ann.message() for _ in range(3)), key=lambda m: m["type"])  # an error may overtake a room
    check([m.get("content") or m["code"] for m in answers] == ["rate_limited", "one", "two"], answers)
    check(answers[0]["ref"] == "r-3" and "rate" in answers[0]["message"], answers[0])
    for word in "one", "two":
        bob.expect("say", content=word)
    bob.expect_nothing()


@case("--max-rooms", "1")
def limit(s):
    """A limit of the server is named in the message."""
    ann, late = join(s, "first", "Ann"), Ws(s)
    late.send_json(type="login", client_name="Late", room_id="second", ref="r-4")
    late.expect_error("limit", "rooms", ref="r-4")
    ann.expect_nothing()


# ---------------------------------------------------------------------------
# Identity, time, order
# ---------------------------------------------------------------------------

@case("--max-per-address", "0")
def client_ids(s):
    """20 hex digits: address, port, number; all different, and the same in every message."""
    clients = join(s, "room", *(f"n{i}" for i in range(20)))
    check(all(ID.fullmatch(c.id) for c in clients), clients[0].id)
    check(len({c.id for c in clients}) == 20, "ids are not unique")
    check(all(c.id[:8] == "7f000001" for c in clients), "the address in", clients[0].id)


@case()
def ids_are_not_reused(s):
    """Not for another client, and not after a restart on the same port."""
    seen = [join(s, f"room {i}", "Ann").id for i in range(3)]
    gone = join(s, "room", "Gone")
    gone.close()
    seen += [gone.id, join(s, "room", "New").id]
    s.stop()
    with Server("--port", s.port) as again:
        seen += [join(again, f"room {i}", "Ann").id for i in range(3)]
    check(len(set(seen)) == len(seen), seen)


@case(env={"TZ": "XST-05:30"})
def time_is_local(s):
    """YYYY-MM-DD HH:MM:SS, in the server's zone (here half past five hours east)."""
    zone = datetime.timezone(datetime.timedelta(hours=5, minutes=30))
    said = Ws(s).login("Ann", "room")["time"]
    off = datetime.datetime.now(zone) - datetime.datetime.strptime(said, "%Y-%m-%d %H:%M:%S").replace(tzinfo=zone)
    check(abs(off.total_seconds()) < 60, said)


@case()
def list_is_in_order_of_joining(s):
    """Also after somebody in the middle has left, and came back as the last."""
    clients = join(s, "room", *"abcdefgh")
    for gone in clients[2], clients[5]:
        gone.close()
        clients[7].expect("logout", from_client_id=gone.id)
    back = Ws(s)
    names = list(back.login("c", "room")["client_list"].values())
    check(names == [*"abdegh", "c"], names)


@case("--rate", "0")
def everybody_sees_the_same_order(s):
    """Four speak at once; all, the four included, hear one order, each speaker's own kept."""
    clients = join(s, "room", *"abcdefg")
    threads = [threading.Thread(target=lambda c=c, n=n: [c.say(f"{n} {i}") for i in range(150)])
               for n, c in zip("abcd", clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    heard = [[m["content"] for m in (c.expect("say") for _ in range(600))] for c in clients[1:]]
    check(all(h == heard[0] for h in heard), "the order differs")
    for n in "abcd":
        check([h for h in heard[0] if h[0] == n] == [f"{n} {i}" for i in range(150)], f"{n}'s words changed places")
    expect_nothing(*clients[1:])


@case("--rate", "0")
def private_frames_keep_their_order(s):
    """Answers, private words and errors to one client come in the order of their causes."""
    ann, bob = join(s, "room", "Ann", "Bob")
    for i in range(200):
        ann.send_json(type="ping", ref=f"p{i}")
        ann.say(f"s{i}", to=bob.id, ref=f"s{i}")
        ann.send_json(type="nosuch", ref=f"e{i}")
    refs = [ann.message()["ref"] for _ in range(600)]
    check(refs == [f"{kind}{i}" for i in range(200) for kind in "pse"], refs[:9])
    for i in range(200):
        bob.expect("say", content=f"<b>\u5bf9\u4f60\u8bf4: </b>s{i}")


# ---------------------------------------------------------------------------
# Ends, pings, and the clients we know
# ---------------------------------------------------------------------------

@case(rows=[
    ("reset", lambda c: c.reset()),
    ("end without a close frame", lambda c: c.close()),
    ("half an end", lambda c: c.sock.shutdown(1)),
    ("close frame", lambda c: c.send(close_frame(1000))),
    ("in the middle of a frame", lambda c: (c.send(frame(TEXT, b"x" * 99)[:50]), c.close())),
    ("in the middle of a message", lambda c: (c.send(frame(TEXT, b"x", fin=0)), c.close())),
    ("a fault", lambda c: c.send(frame(3))),
    ("binary", lambda c: c.send(frame(BINARY, b"x"))),
])
def members_hear_of_an_end(s, name, end):
    """However a connection ends, the room is told once."""
    ann, bob = join(s, new_room(), "Ann", "Bob")
    end(bob)
    ann.expect("logout", from_client_id=bob.id, from_client_name="Bob")
    ann.expect_nothing()


@case()
def closing(s):
    """The close code comes back, and TCP is ended by the server."""
    for sent, code in (close_frame(1000, "bye"), 1000), (close_frame(4321), 4321), (frame(8), None):
        ann = join(s, "room", "Ann")
        ann.send(sent)
        ann.expect_close(code)


def survive(client, kind, seconds):
    """Read for so long, answering one kind of ping; both kinds must come."""
    seen, end = set(), time.monotonic() + seconds
    while time.monotonic() < end:
        opcode, event = client.event()
        check(opcode == PING or event == {"type": "ping"}, "wanted pings, got", event)
        seen.add(opcode)
        if opcode == kind:
            client.send(frame(PONG, event) if kind == PING else frame(TEXT, '{"type":"pong"}'))
    check(seen == {PING, TEXT}, "both kinds of ping are wanted, got", seen)


@case("--ping", "1")
def pings(s):
    """After a second of silence both pings come; either answer keeps a client, logged in or not."""
    clients = [Ws(s, answer_pings=False), Ws(s, answer_pings=False), join(s, "room", "Ann", answer_pings=False)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(survive, clients, (TEXT, PING, PING), (3.5, 3.5, 3.5)))  # 3 s without an answer are the end


@case("--ping", "1", rows=[("nothing", b""), ("half a frame", frame(TEXT, '{"type":"pong"}')[:5])])
def silence(s, name, begun):
    """Three times that without any sign of life: 4408, and the room is told."""
    ann = join(s, name, "Ann")
    mute, begin = Ws(s, answer_pings=False), time.monotonic()
    mute.login("Mute", name)
    mute.send(begun)
    for _ in range(4):   # two pings, each in two languages
        mute.event()
        ann.fence()
    mute.expect_close(4408)
    check(2.5 < time.monotonic() - begin < 3 + 2 * SLOW, "it took", time.monotonic() - begin)
    ann.expect("login", client_id=mute.id)
    ann.expect("logout", from_client_id=mute.id)


@case()
def the_ios_app(s):
    """Its handshake, its JSON (blanks removed, "\\/"), its heartbeat, and its way to leave: 1002."""
    app = Ws(s, open=False)
    app.send(b"GET / HTTP/1.1\r\nHost: 127.0.0.1:7272\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
             b"Sec-WebSocket-Key: c2l4dGVlbiBieXRlcyAuLg==\r\nSec-WebSocket-Version: 13\r\n"
             b"Origin: http://127.0.0.1:7272\r\n\r\n" + frame(TEXT, '{"type":"ping"}'))
    app.finish_handshake()
    check("sec-websocket-protocol" not in app.handshake.headers, app.handshake)
    app.expect("pong")
    app.send(frame(TEXT, r'{"room_id":"1","client_name":"Ann","type":"login"}'))
    me = app.expect("login", client_name="Ann")
    check(isinstance(me["client_list"], dict), me)
    app.send(frame(TEXT, r'{"content":"http:\/\/a\/b","to_client_id":"all","to_client_name":"","type":"say"}'))
    app.expect("say", from_client_id=me["client_id"], content="http://a/b")
    app.send(close_frame(1002, "\u7528\u6237\u5173\u95ed"))
    app.expect_close(1002)


@case()
def the_web_page(s):
    """A browser's handshake, JSON made by hand with a number for the room, and reconnecting at once."""
    origin = "Origin: http%s://localhost:55151" % ("s" * s.tls[0])   # it comes from a port of its own
    for _ in range(3):
        page = Ws(s, "/", origin, "Cookie: a=b", "Pragma: no-cache",
                  "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits", "User-Agent: Mozilla/5.0")
        check("sec-websocket-extensions" not in page.handshake.headers, page.handshake)
        page.send(frame(TEXT, '{"type":"login","client_name":"Tom","room_id":1}'))
        message = page.expect("login", client_name="Tom")
        check(list(message["client_list"].values()) == ["Tom"], message)
        page.send(frame(TEXT, '{"type":"say","to_client_id":"all","to_client_name":"all","content":"hi\\n"}'))
        page.expect("say", content="hi<br />\n", to_client_id="all")
        page.send(frame(TEXT, '{"type":"pong"}'))
        page.send(close_frame(1001))
        page.expect_close(1001)


if __name__ == "__main__":
    raise SystemExit(main())
