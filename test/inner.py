"""The inner port of the gateway, for tests: packets with a header of 28 bytes, answers in PHP's serialize()."""

import collections
import json
import re
import socket
import struct

from harness import Stream, Ws, check

# Commands (requests), and what a worker is told.
SEND_TO_ONE, SEND_TO_ALL, KICK, DESTROY, UPDATE_SESSION, ALL_SESSIONS, IS_ONLINE = 5, 6, 7, 8, 9, 10, 11
BIND_UID, UNBIND_UID, SEND_TO_UID, IDS_BY_UID, BATCH_IDS_BY_UID = 12, 13, 14, 15, 16
JOIN_GROUP, LEAVE_GROUP, SEND_TO_GROUP, SESSIONS_BY_GROUP, COUNT_BY_GROUP = 20, 21, 22, 23, 24
SELECT, GROUPS, UNGROUP, BATCH_COUNT, WORKER, HELLO, GET_SESSION, SET_SESSION = 25, 26, 27, 28, 200, 202, 203, 204
ON_CONNECT, ON_MESSAGE, ON_CLOSE, WORKER_PING, ON_HANDSHAKE = 1, 3, 4, 201, 205

HEAD = struct.Struct(">IBIHIHIBHI")


def octets(text):
    return text.encode() if isinstance(text, str) else text


def packet(cmd, conn=0, ext=b"", body=b"", flag=1):
    """A request: all other fields of the header are 0."""
    ext, body = octets(ext), octets(body)
    return HEAD.pack(28 + len(ext) + len(body), cmd, 0, 0, 0, 0, conn, flag, 0, len(ext)) + ext + body


def hello(key):
    return packet(HELLO, body=json.dumps({"secret_key": key}))


def number(client):
    """The connection number, which ends a client's id."""
    return client if isinstance(client, int) else int(client.id[12:], 16)


def php(value):
    """PHP's serialize() of what tests need."""
    if value is None:
        return "N;"
    if isinstance(value, bool):
        return f"b:{value:d};"
    if isinstance(value, int):
        return f"i:{value};"
    if isinstance(value, str):
        return f's:{len(value.encode())}:"{value}";'
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return f"a:{len(value)}:{{" + "".join(php(k) + php(v) for k, v in pairs) + "}"


class Inner(Stream):
    """A connection to the inner port."""

    def __init__(self, s, key=None):
        super().__init__(s, "gateway")
        if key is not None:
            self.send(hello(key))

    def tell(self, cmd, client=0, ext=b"", body=b"", flag=1):
        return self.send(packet(cmd, number(client), ext, body, flag))

    def reply(self):
        """The next answer, without its length."""
        answer = self.take(struct.unpack(">I", self.take(4))[0])
        check(answer, "an empty answer")
        return answer.decode()

    def ask(self, *request, **more):
        self.tell(*request, **more)
        return self.reply()

    def fence(self):
        """Wait until what was told before is done."""
        check(self.ask(IS_ONLINE) == "i:0;", "there is a client 0")
        return self

    def session(self, client):
        return self.ask(GET_SESSION, client)

    def look(self, *fields, where=()):
        return self.ask(SELECT, ext=json.dumps({"fields": fields, "where": where}))

    def numbers(self):
        """Of all clients, oldest first."""
        return [int(n) for n in re.findall(r"[{}]i:(\d+);", self.look())]


class Worker(Inner):
    """A business worker: it is told what happens to its clients."""

    Event = collections.namedtuple(
        "Event", "length cmd ip port client_ip client_port conn flag gateway_port ext_len ext body raw")

    def __init__(self, s, name, key=""):
        super().__init__(s)
        self.server = s
        self.tell(WORKER, body=json.dumps({"worker_key": name, "secret_key": key}))

    def event(self, cmd=None, client=None):
        raw = self.take(4)
        raw += self.take(struct.unpack(">I", raw)[0] - 4)
        fields = HEAD.unpack_from(raw)
        event = self.Event(*fields, raw[28:28 + fields[-1]].decode(), raw[28 + fields[-1]:], raw)
        check(cmd in (None, event.cmd), "wanted", cmd, "got", event)
        if cmd != WORKER_PING:
            address = f"{socket.inet_ntoa(struct.pack('>I', event.ip))}:{event.port}"
            check(address == self.server.gateway and event.gateway_port == self.server.port, "from", event)
            check(client is None or event.client_port == client.sock.getsockname()[1], "not of this client:", event)
        return event

    def newcomer(self, *who, **more):
        """A client that was given to this worker."""
        client = Ws(self.server, *who, **more)
        client.conn = self.event(ON_CONNECT, client).conn
        check(self.event(ON_HANDSHAKE, client).conn == client.conn)
        return client

    def none(self):
        """Nothing has come."""
        self.fence()
