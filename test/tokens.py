"""Who may talk: logins with a token (JWT).

The tokens are made here, with nothing but hmac. What is wrong in one, byte for byte and type for
type, is in unit.c; here is what a client and an administrator see of it.
"""

import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import signal
import tempfile
import time

from harness import TEXT, Server, Ws, case, check, expect_nothing, frame, main, new_room, run, until

SECRET = "correct horse battery staple"
OTHER = "another secret, not the same"


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(sub="42", secret=SECRET, alg="HS256", hashed=hashlib.sha256, **claims):
    """A token as a back end would make it; a claim that is None is left out."""
    claims = {name: value for name, value in {"sub": sub, **claims}.items() if value is not None}
    text = ".".join(base64url(json.dumps(part).encode()) for part in ({"alg": alg, "typ": "JWT"}, claims))
    return text + "." + base64url(hmac.new(secret.encode(), text.encode(), hashed).digest())


@contextlib.contextmanager
def secrets(*texts):
    """Files with these secrets: their paths, and the options that name them."""
    with tempfile.TemporaryDirectory() as directory:
        paths = [os.path.join(directory, f"secret{i}") for i in range(len(texts))]
        for path, text in zip(paths, texts):
            write(path, text)
        yield paths, [word for path in paths for word in ("--jwt-secret-file", path)]


def write(path, text):
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


@contextlib.contextmanager
def guarded(*options, secret=SECRET, **server):
    with secrets(secret) as (_, words), Server(*words, *options, **server) as s:
        yield s


def refused_login(client, *words, room="room", **fields):
    """The login is answered with an error, and nothing else happens."""
    client.send_json(type="login", client_name="Eve", room_id=room, ref="r", **fields)
    client.expect_error("unauthorized", *words, ref="r")


def accepts(server, some_token):
    """Does somebody get in with it?"""
    client = Ws(server)
    client.send_json(type="login", client_name="Ann", room_id=new_room(), token=some_token)
    answer = client.message()
    client.close()
    return answer["type"] == "login"


@case()
def a_token_is_who_one_is():
    """`sub` is the user that others see and write to, `name` goes before what the client says."""
    with guarded() as s:
        ann, bob = Ws(s), Ws(s)
        answer = ann.login("ignored", "room", token=token("ann@example", name="Ann <3"))
        check(answer["client_name"] == "Ann &lt;3" and "inbox_id" in answer, answer)
        answer = bob.login("Bob", "room", token=token("bob", exp=int(time.time()) + 60))
        check(answer["client_name"] == "Bob", answer)
        ann.expect("login", client_name="Bob")
        bob.say("hello")
        for client in ann, bob:
            client.expect("say", from_uid="bob", from_client_name="Bob", content="hello")
        bob.send_json(type="say", to_uid="ann@example", to_client_name="Ann", content="psst")
        ann.expect("say", from_uid="bob", to_uid="ann@example")
        bob.expect("say", from_uid="bob", to_uid="ann@example")
        expect_nothing(ann, bob)


@case()
def letters_wait():
    """What is said to a user who is not there is sent when one comes who proves to be that user."""
    with guarded() as s:
        ann, bob = Ws(s), Ws(s)
        ann.login("Ann", "room", token=token("ann"))
        seen = bob.login("Bob", "other", token=token("bob"))["inbox_id"]
        bob.close()
        ann.send_json(type="say", to_uid="bob", to_client_name="Bob", content="one")
        ann.expect("say", to_uid="bob")
        eve = Ws(s)
        eve.login("Bob", "other", token=token("eve"), inbox_since=seen)
        bob = Ws(s)
        bob.login("Bob", "third", token=token("bob"), inbox_since=seen)
        messages = bob.expect("history", to_uid="bob", more=False)["messages"]
        check(len(messages) == 1 and messages[0]["content"].endswith("one"), messages)
        eve.fence()
        check(not any("one" in json.dumps(m) for m in eve.early), "another user got the letter:", eve.early)


@case()
def inbox_that_cannot_be_read():
    """Who cannot get into the own inbox now is told so, and gets in nowhere: letters would not be heard."""
    with tempfile.TemporaryDirectory() as d, guarded("--data", d) as s:
        ann, bob, path = Ws(s), Ws(s), os.path.join(d, "users", "bob")
        ann.login("Ann", "room", token=token("ann"))
        write(path, "no directory")
        bob.send_json(type="login", client_name="Bob", room_id="room", token=token("bob"))
        bob.expect_error("storage")
        expect_nothing(ann)
        os.unlink(path)
        check("inbox_id" in bob.login("Bob", "room", token=token("bob")), "no inbox")


@case()
def no_room_left_for_the_inbox():
    """An inbox counts for --max-rooms. Who cannot get into the own one is told so, and gets in nowhere."""
    with guarded("--max-rooms", "2") as s:
        ann, bob = Ws(s), Ws(s)
        check("inbox_id" in ann.login("Ann", "room", token=token("ann")), "no inbox")
        bob.send_json(type="login", client_name="Bob", room_id="room", token=token("bob"), ref="1")
        bob.expect_error("limit", "rooms", ref="1")
        expect_nothing(ann)
        check("inbox_id" in bob.login("Ann", "room", token=token("ann")), "no inbox for her other device")


@case()
def letters_before_their_id():
    """What `inbox_id` counts in has been sent before: who comes back with it as `inbox_since` has missed nothing."""
    with guarded() as s:
        ann = Ws(s)
        ann.login("Ann", "room", token=token("ann"))
        login = {"type": "login", "client_name": "Ann", "room_id": "other", "token": token("ann")}
        letter = {"type": "say", "to_uid": "ann", "to_client_name": "Ann", "content": "note to self"}
        ann.send(b"".join(frame(TEXT, json.dumps(message)) for message in (letter, login)))
        answers = [ann.message() for _ in range(3)]
        check([m["type"] for m in answers] == ["say", "say", "login"], answers)
        check({m.get("id", m.get("inbox_id")) for m in answers[:2]} == {answers[2]["inbox_id"]}, answers)


NOW = int(time.time())
REFUSED = [  # a name, what is sent, words of the answer
    ("none at all", {}, "missing"),
    ("null", {"token": None}, "missing"),
    ("empty", {"token": ""}, "missing"),
    ("a number", {"token": 5}, "no HS256 token"),
    ("an object", {"token": {"sub": "42"}}, "missing"),
    ("no token", {"token": "let me in"}, "no HS256 token"),
    ("another secret", {"token": token(secret=OTHER)}, "bad signature"),
    ("an empty secret", {"token": token(secret="")}, "bad signature"),
    ("a line end at the secret", {"token": token(secret=SECRET + "\n")}, "bad signature"),
    ("alg none, no signature", {"token": token(alg="none").rpartition(".")[0] + "."}, "no HS256 token"),
    ("alg none, signed", {"token": token(alg="none")}, "no HS256 token"),
    ("alg HS384", {"token": token(alg="HS384", hashed=hashlib.sha384)}, "bad signature"),
    ("alg HS512, signed by SHA-256", {"token": token(alg="HS512")}, "no HS256 token"),
    ("alg RS256, signed by SHA-256", {"token": token(alg="RS256")}, "no HS256 token"),
    ("padded", {"token": token() + "="}, "bad signature"),
    ("a blank behind", {"token": token() + " "}, "bad signature"),
    ("a NUL behind", {"token": token() + "\0"}, "bad signature"),
    ("expired", {"token": token(exp=NOW - 60)}, "expired"),
    ("not valid yet", {"token": token(nbf=NOW + 3600)}, "not valid yet"),
    ("exp is text", {"token": token(exp="never")}, "exp"),
    ("no sub", {"token": token(sub=None)}, "sub"),
    ("sub is a number", {"token": token(sub=42)}, "sub"),
    ("sub is long", {"token": token(sub="x" * 129)}, "sub"),
    ("sub has a line end", {"token": token(sub="4\n2")}, "sub"),
    ("name is long", {"token": token(name="x" * 65)}, "name"),
    ("rooms is text", {"token": token(rooms="room")}, "rooms"),
    ("another room", {"token": token(rooms=["other", "room 2"])}, "room not allowed"),
    ("64 KB", {"token": "x" * 60000}, "no HS256 token"),
    ("20,000 dots", {"token": "." * 20000}, "signature"),
]


@case()
def refusals():
    """`unauthorized` says what was wrong, tells nobody else, and leaves the client where it was."""
    with guarded("--rate", "0") as s:
        watcher = Ws(s)
        watcher.login("Watcher", "room", token=token("watcher"))
        for name, fields, words in REFUSED:
            try:
                eve = Ws(s)
                refused_login(eve, "token: ", words, **fields)
                eve.say("hello")
                eve.expect_error("not_logged_in")
                eve.login("Eve", new_room(), token=token("eve"))
                refused_login(eve, words, **fields)
                eve.say("still here")
                eve.expect("say", from_uid="eve", content="still here")
                expect_nothing(eve, watcher)
                eve.close()
            except AssertionError as error:
                raise AssertionError(f"[{name}] {error}") from None


@case(rows=[
    ("exact", ["red", "blue"], ["red", "blue"], ["re", "red2", "Red", "*", "green"]),
    ("beginnings", ["team-*", "7"], ["team-", "team-1", 7, "7"], ["team", "Team-1", "77", "xteam-"]),
    ("all", ["*"], ["red", "*", 1], []),
    ("none", [], [], ["red", "*"]),
    ("escapes", ["\u7ea2 \"1\"\\"], ["\u7ea2 \"1\"\\"], ["\u7ea2"]),
])
def rooms(name, allowed, inside, outside):
    """Only the rooms of the token's list, where a name with `*` behind is all that begin so."""
    with guarded() as s:
        ann = Ws(s)
        for room in inside:
            ann.login("Ann", room, token=token(rooms=allowed))
        for room in outside:
            refused_login(ann, "room not allowed", room=room, token=token(rooms=allowed))
        expect_nothing(ann)


@case()
def another_user_on_one_connection():
    """A login with another's token: new uid, new inbox, and the letters of the first go elsewhere."""
    with guarded() as s:
        phone, bob = Ws(s), Ws(s)
        bob.login("Bob", "room", token=token("bob"))
        phone.login("Ann", "room", token=token("ann"))
        bob.expect("login", client_name="Ann")
        first = phone.login("Carl", "room", token=token("carl"))
        bob.expect("login", client_name="Carl")
        for uid, content in (("ann", "for Ann"), ("carl", "for Carl")):
            bob.send_json(type="say", to_uid=uid, to_client_name="", content=content)
            bob.expect("say", to_uid=uid)
        check("for Carl" in phone.expect("say", to_uid="carl")["content"], "the letter")
        phone.say("it is me")
        phone.expect("say", from_uid="carl", from_client_name="Carl")
        bob.expect("say", from_uid="carl")
        check(phone.login("Ann", "room", token=token("ann"))["inbox_id"] != first["inbox_id"], "one inbox for two users")
        bob.expect("login", client_name="Ann")
        expect_nothing(phone, bob)


@case()
def expiry_ends_no_connection():
    """Who is in stays in; the next login needs a token that is still good."""
    with guarded("--rate", "0") as s:
        ann = Ws(s)
        short = token("ann", exp=int(time.time()) - 30 + 3)   # 30 s of leeway
        ann.login("Ann", "room", token=short)
        until(lambda: not accepts(s, short), "the token is good for ever", 10)
        ann.say("still here")
        ann.expect("say", content="still here", from_uid="ann")
        refused_login(ann, "expired", token=short)


@case()
def ignored_without_a_secret():
    """As ever: a name is a label; a token, whatever it is, changes nothing."""
    with Server() as s:
        ann, bob = Ws(s), Ws(s)
        check("inbox_id" not in ann.login("Ann", "room", token=token("ann", name="Eve")), "a token counts")
        bob.login("Bob", "room", token=["nonsense"])
        ann.expect("login", client_name="Bob")
        ann.say("hello")
        check("from_uid" not in bob.expect("say", from_client_name="Ann", content="hello"), "a uid without a proof")


@case()
def two_secrets_and_sighup():
    """While a secret is changed both are good; what SIGHUP cannot read stays as it was."""
    with secrets(SECRET, OTHER) as (paths, words), Server(*words, "--rate", "0") as s:
        old, new = token(), token(secret=OTHER)
        check(accepts(s, old) and accepts(s, new), "one of two secrets does not count")
        ann = Ws(s)
        ann.login("Ann", "room", token=old)
        write(paths[0], OTHER + "\n")
        check(accepts(s, old), "read without being told")
        s.signal(signal.SIGHUP)
        s.wait_log("files read again")
        check(not accepts(s, old) and accepts(s, new), "the old secret still counts")
        for bad in ("short", "", "x" * 2000, None):
            before = len(s.lines)
            if bad is None:
                os.remove(paths[0])
            else:
                write(paths[0], bad)
            s.signal(signal.SIGHUP)
            until(lambda: f"--jwt-secret-file {paths[0]}: " in "\n".join(s.lines[before:]), "no word of it in the log")
            check(accepts(s, new) and not accepts(s, token(secret=bad or "")), "after a bad file", bad)
        third = "the third of the secrets"
        write(paths[0], "short")
        write(paths[1], third)
        before = len(s.lines)
        s.signal(signal.SIGHUP)
        until(lambda: paths[0] in "\n".join(s.lines[before:]), "no word of it in the log")
        check(accepts(s, token(secret=third)) and accepts(s, new), "one bad file, and the other is not read")
        check("read again" not in "\n".join(s.lines[before:]), "all is well?")
        ann.say("still here")
        ann.expect("say", content="still here")


@case(rows=[
    ("line end", SECRET + "\n", SECRET), ("CR LF", SECRET + "\r\n", SECRET), ("one line end of two", SECRET + "\n\n", SECRET + "\n"),
    ("blanks count", f" {SECRET} \n", f" {SECRET} "), ("two lines", f"{SECRET}\n{OTHER}\n", f"{SECRET}\n{OTHER}"),
    ("16 bytes", "x" * 16 + "\n", "x" * 16), ("1,024 bytes", "x" * 1024 + "\r\n", "x" * 1024), ("NUL", "\0x" * 8, "\0x" * 8),
])
def secret_files(name, text, secret):
    """The secret is the file, but for a line end at its end."""
    with guarded(secret=text) as s:
        check(accepts(s, token(secret=secret)), "the secret is another")
        check(not accepts(s, token(secret=secret[1:])), "a part of the secret will do")


@case(rows=[("empty", ""), ("a line end", "\n"), ("15 bytes", "x" * 15 + "\n"), ("1,025 bytes", "x" * 1025),
            ("1 MB", "x" * (1 << 20)), ("missing", None)])
def bad_secret_files(name, text):
    """Status 1 and one line that names option and file, and nothing of what is in it."""
    with secrets(SECRET, text or "") as (paths, words):
        if text is None:
            os.remove(paths[1])
        for options in words, words[2:], [*words, "--make-token", "42"]:
            status, out, err = run(*options)
            check(status == 1 and out == "", status, out)
            check(re.fullmatch(r"[^\n]*--jwt-secret-file %s: [ -~]+\n" % re.escape(paths[1]), err), repr(err))
            check("xxx" not in err, "a secret in the log")


@case()
def unreadable_secret():
    """A directory is no file. The option may come from the environment, with what is wrong with it."""
    with tempfile.TemporaryDirectory() as directory:
        for options, env in (["--jwt-secret-file", directory], {}), ([], {"XCHAT_JWT_SECRET_FILE": directory}):
            status, _, err = run(*options, env=env)
            check(status == 1 and f"--jwt-secret-file {directory}: Is a directory" in err, status, err)
    with secrets(SECRET) as (paths, _), Server(env={"XCHAT_JWT_SECRET_FILE": paths[0]}) as s:
        check(accepts(s, token()) and not accepts(s, token(secret=OTHER)), "from the environment")


def made(words, who):
    status, out, err = run(*words, "--make-token", who)
    check(status == 0 and err == "" and re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", out), status, out, err)
    return out.strip()


@case()
def make_token():
    """--make-token prints what this server takes, also beside a running one; made with the first secret."""
    with secrets(SECRET, OTHER) as (_, words), tempfile.TemporaryDirectory() as data, \
            Server(*words, "--data", data) as s:
        words = [*words, "--data", data]
        plain = made(words, "42")
        part = plain.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        check(claims["sub"] == "42" and 86000 < claims["exp"] - time.time() < 87000 and len(claims) == 2, claims)
        check(plain.rpartition(".")[2] == base64url(hmac.new(SECRET.encode(), plain.rpartition(".")[0].encode(),
                                                             hashlib.sha256).digest()), "signed by another secret")
        ann = Ws(s)
        check(ann.login("x", "any", token=plain)["client_name"] == "x", "no name, but one binds")
        answer = ann.login("x", "b 1", token=made(words, 'a"n\u00fcn,Ann \u5b89,a,b*'))
        check(answer["client_name"] == "Ann \u5b89", answer)
        refused_login(ann, "room not allowed", room="c", token=made(words, "ann,Ann,a,b*"))
        check(ann.login("Eve", "c", token=made(words, "ann,,c"))["client_name"] == "Eve", "an empty name is none")


@case(rows=[("no user", ",Ann"), ("nothing", ""), ("a long user", "x" * 129), ("a long name", "42," + "x" * 65),
            ("a control character", "4\t2"), ("an empty room", "42,Ann,,a")])
def make_no_token(name, who):
    """Status 2 and one line for what would be no good token."""
    with secrets(SECRET) as (_, words):
        status, out, err = run(*words, "--make-token", who)
        check(status == 2 and out == "" and re.fullmatch(r"[^\n]*--make-token: [ -~]+\n", err), status, out, err)


@case()
def make_token_needs_a_secret():
    """Without --jwt-secret-file: status 2, and it is named. A third secret is too many."""
    status, out, err = run("--make-token", "42")
    check(status == 2 and out == "" and "--jwt-secret-file" in err, status, err)
    with secrets(SECRET, OTHER, SECRET) as (_, words):
        check(run(*words)[0] == 2, "three secrets")


@case()
def nothing_leaks():
    """No secret and no token in the log, however much is logged, nor where others see them (ps)."""
    with guarded("--verbose") as s:
        ann = Ws(s)
        good, bad = token("ann"), token(secret=OTHER)
        ann.login("Ann", "room", token=good)
        refused_login(ann, "signature", token=bad)
        s.signal(signal.SIGHUP)
        s.wait_log("files read again")
        with contextlib.suppress(OSError), open(f"/proc/{s.pid}/cmdline", "rb") as line:
            check(SECRET.encode() not in line.read(), "the secret is in the command line")
        for text in SECRET, good, bad, good.rpartition(".")[2]:
            check(text not in s.log(), "in the log:", text)


@case()
def guessing_is_limited():
    """A refused login is a message like others: who goes on is shown out."""
    with guarded("--rate", "1", "--burst", "5") as s:
        eve = Ws(s)
        for _ in range(12):
            eve.send_json(type="login", client_name="Eve", room_id="room", token=token(secret=OTHER))
        for _ in range(5):
            eve.expect_error("unauthorized", "signature")
        for _ in range(5):
            eve.expect_error("rate_limited")
        eve.expect_close(1008)


if __name__ == "__main__":
    raise SystemExit(main())
