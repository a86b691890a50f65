#!/usr/bin/python3
"""A stand-in for Apple's push service (HTTP/2) that does as it is told, and tells what it sees.

Run by push.py as a subprocess. Orders come as JSON lines on stdin, reports go as JSON lines to stdout,
and the end of stdin is the end. The h2 library speaks the protocol, and so polices the client too:
what breaks a rule of HTTP/2 (too many streams, a window overrun, a bad header block) is reported as
"error". What the library would never send is written as raw bytes.

    {"do": "rules", ...}     change RULES (below); those of SETTINGS hold for connections to come
    {"do": "release"}        answer what is held
    {"do": "goaway", "back": 2, "code": 0, "reason": "Shutdown", "close": true, "last": id}
                             GOAWAY whose last stream id is `back` below the newest; what is above it is
                             forgotten; `close` when all below is answered
    {"do": "settings", "values": {"3": 1}}, {"do": "ping"}, {"do": "close"}, {"do": "drop"}, {"do": "reset"},
    {"do": "raw", "hex": ...}

Orders are for the newest connection, or for that with the number `conn`. An answer is a dictionary:

    status, reason, timestamp, body   the body is JSON with reason and timestamp, unless `body` is given
    rst: [7, 5]      these RST_STREAMs instead
    hold: true       wait for "release"; never: true for ever
    cut: "reset" or "close"           end the connection instead
    shape            "split": the body in two DATA frames; "empty": END_STREAM comes in an empty DATA;
                     "continuation": one octet of the block in HEADERS, the rest in CONTINUATION;
                     "early": a status 103 comes first; "trailers": a second HEADERS ends it; "ping": a PING does
"""

import asyncio
import base64
import collections
import json
import logging
import os
import socket
import ssl
import struct
import sys
import time

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

RULES = {
    "settings": {"1": 4096, "3": 1000, "4": 65535, "5": 16384, "6": 8000},   # the first SETTINGS: Apple's
    "apple": False,      # one stream at first, 1000 after a 200, one again after a rejection
    "answers": {},       # token -> list of answers, one a request; the last one stays
    "answer": {"status": 200},   # to all other tokens
    "mute": False,       # nothing is sent any more, not even the ACK of a PING
    "vanish": False,     # close before SETTINGS
    "refill": 0,         # seconds until a WINDOW_UPDATE pays for DATA; None: never
    "max_age": None,     # 403 ExpiredProviderToken for an older JWT, in seconds
    "update_every": None,   # 429 TooManyProviderTokenUpdates for a second JWT within so many seconds
    "goaway_every": None,   # a GOAWAY with each so manieth request of a connection; it closes then
    "reset_at": [],      # a TCP reset at these requests, counted over all connections, before their answers
    "brief": False,      # requests are reported without headers and body
}
HERE = os.path.dirname(os.path.abspath(__file__))
connections = []
jwts = {}                # JWT -> when it was first seen
seen = 0                 # requests so far
reports = []


def report(event, **fields):
    """A line for the test. Lines of one round of the loop are written together."""
    if not reports:
        asyncio.get_running_loop().call_soon(write_reports)
    reports.append(json.dumps({"event": event, **fields}))


def write_reports():
    sys.stdout.write("\n".join(reports) + "\n")
    sys.stdout.flush()
    reports.clear()


def frame(kind, flags, stream, payload=b""):
    """One raw HTTP/2 frame."""
    return struct.pack(">IBBI", len(payload), kind, flags, stream)[1:] + payload


class Connection(asyncio.Protocol):
    def __init__(self):
        connections.append(self)
        self.number = len(connections)
        self.transport = None
        self.h2 = None
        self.requests = {}        # stream -> [headers, body] while it comes in
        self.held = {}            # stream -> answer, in the order they came
        self.newest = 0           # stream
        self.last = None          # of a GOAWAY
        self.count = 0            # requests
        self.limit = None         # MAX_CONCURRENT_STREAMS as announced
        self.unacked = 0          # SETTINGS
        self.closing = False      # once what is held is answered
        self.bodies = collections.deque()   # (stream, octets) for which there was no window
        self.heard = b""          # raw octets of an unfinished frame
        self.blocks = {}          # stream -> header block as it came
        report("accept", conn=self.number, at=time.monotonic())

    # -- the wire ----------------------------------------------------------

    def connection_made(self, transport):
        self.transport = transport
        tls = transport.get_extra_info("ssl_object")
        report("open", conn=self.number, alpn=tls.selected_alpn_protocol(), version=tls.version(),
               peer=tls.getpeercert())
        if RULES["vanish"]:
            return transport.close()
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        values = {int(k): v for k, v in RULES["settings"].items()}
        if RULES["apple"]:
            values[3] = 1
        self.limit = values.get(3)
        # Assigning single settings would not change the first SETTINGS frame.
        self.h2.local_settings = h2.settings.Settings(client=False, initial_values=values)
        self.h2.decoder.max_allowed_table_size = self.h2.local_settings.header_table_size
        self.h2.initiate_connection()
        self.unacked = 1
        self.flush()

    def data_received(self, data):
        if self.h2 is None:
            return
        self.look_at(data)
        try:
            events = self.h2.receive_data(data)
        except h2.exceptions.ProtocolError as error:
            report("error", conn=self.number, what=f"{type(error).__name__}: {error}")
            self.flush()
            return self.transport.close()
        for event in events:
            self.handle(event)
        self.flush()

    def connection_lost(self, error):
        report("lost", conn=self.number, error=str(error) if error else None)
        self.transport = None

    def flush(self):
        data = self.h2.data_to_send()
        if data:
            self.write(data)

    def write(self, data):
        if self.transport and not self.transport.is_closing() and not RULES["mute"]:
            self.transport.write(data)

    def look_at(self, data):
        """Keep header blocks as they came, for who compares them with a golden one; and report each RST_STREAM: h2 says
        nothing of one for a stream that was answered meanwhile."""
        self.heard += data
        if self.heard.startswith(b"PRI * "):
            self.heard = self.heard[24:]
        while len(self.heard) >= 9 and len(self.heard) >= 9 + (size := int.from_bytes(self.heard[:3], "big")):
            stream = int.from_bytes(self.heard[5:9], "big")
            if self.heard[3] == 3:
                report("given_up", conn=self.number, stream=stream)
            if self.heard[3] in (1, 9) and not RULES["brief"]:
                self.blocks[stream] = self.blocks.get(stream, b"") + self.heard[9:9 + size]
            self.heard = self.heard[9 + size:]

    def end(self, how):
        """Close, or without a goodbye in TLS ("drop"), or reset as a crashed machine would."""
        if self.transport is None:
            return
        if how == "drop":
            return self.transport.abort()
        if how == "reset":
            self.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.transport.abort()
        self.transport.close()

    # -- what comes in -----------------------------------------------------

    def handle(self, event):
        if isinstance(event, h2.events.RequestReceived):
            self.requests[event.stream_id] = [event.headers, b""]
            self.newest = event.stream_id
        elif isinstance(event, h2.events.DataReceived):
            if event.stream_id in self.requests:
                self.requests[event.stream_id][1] += event.data
            self.pay(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self.request(event.stream_id, *self.requests.pop(event.stream_id))
        elif isinstance(event, h2.events.StreamReset):
            self.held.pop(event.stream_id, None)
            report("reset", conn=self.number, stream=event.stream_id, code=int(event.error_code))
        elif isinstance(event, h2.events.PingReceived):
            report("ping", conn=self.number, at=time.monotonic())
        elif isinstance(event, h2.events.PingAckReceived):
            report("pong", conn=self.number, data=event.ping_data.hex())
        elif isinstance(event, h2.events.ConnectionTerminated):
            report("goaway", conn=self.number, code=int(event.error_code), last=event.last_stream_id)
        elif isinstance(event, h2.events.SettingsAcknowledged):
            self.unacked -= 1
            report("settings_ack", conn=self.number)
        elif isinstance(event, h2.events.RemoteSettingsChanged):
            report("settings", conn=self.number,
                   values={int(k): v.new_value for k, v in event.changed_settings.items()})
        elif isinstance(event, h2.events.WindowUpdated):
            bodies, self.bodies = self.bodies, collections.deque()
            for stream, data in bodies:
                self.send_body(stream, data)

    def pay(self, octets, stream):
        """WINDOW_UPDATEs for DATA, at once or later."""
        def now():
            if self.transport:
                self.safely(self.h2.acknowledge_received_data, octets, stream)
                self.flush()
        if RULES["refill"] == 0:
            self.h2.acknowledge_received_data(octets, stream)
        elif RULES["refill"] is not None:
            asyncio.get_running_loop().call_later(RULES["refill"], now)

    def request(self, stream, headers, body):
        global seen
        fields = dict(headers)
        token = fields[":path"].rpartition("/")[2]
        ignored = self.last is not None and stream > self.last
        seen += not ignored
        self.count += not ignored
        known = dict(conn=self.number, stream=stream, token=token, at=time.monotonic(), ignored=ignored,
                     id=fields.get("apns-id"), collapse=fields.get("apns-collapse-id"))
        if not RULES["brief"]:
            known.update(headers=[list(h) for h in headers], body=body.decode("utf-8", "backslashreplace"),
                         sensitive=[h[0] for h in headers if not h.indexable],
                         block=self.blocks.pop(stream, b"").hex())
        if ignored:
            return report("request", answer="ignored", **known)
        answer = self.judge(fields, token)
        cut = seen in RULES["reset_at"]
        report("request", answer="cut" if cut else answer.get("status") or next(iter(answer)), **known)
        if cut:
            return self.end("reset")
        if RULES["goaway_every"] and self.count == RULES["goaway_every"]:
            self.goaway(close=True)
        if answer.get("hold") or answer.get("never"):
            self.held[stream] = answer
        else:
            self.answer(stream, answer)

    def judge(self, fields, token):
        """The answer to a request."""
        jwt = fields.get("authorization", "").removeprefix("bearer ")
        now = time.time()
        if jwt and RULES["max_age"] is not None:
            claims = jwt.split(".")[1]
            age = now - json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["iat"]
            if age > RULES["max_age"]:
                return {"status": 403, "reason": "ExpiredProviderToken"}
        if jwt and RULES["update_every"] and jwt not in jwts and jwts \
                and now - max(jwts.values()) < RULES["update_every"]:
            return {"status": 429, "reason": "TooManyProviderTokenUpdates"}
        jwts.setdefault(jwt, now)
        if RULES["apple"] and self.limit == 1 and (self.unacked or self.held):
            return {"rst": [7, 5]}
        answers = RULES["answers"].get(token) or [RULES["answer"]]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    # -- what goes out -----------------------------------------------------

    def safely(self, call, *arguments, **named):
        """For what the library refuses because the client has ended the stream or the connection."""
        try:
            call(*arguments, **named)
            return True
        except h2.exceptions.FlowControlError:
            return False
        except (h2.exceptions.ProtocolError, KeyError):
            return True

    def answer(self, stream, answer):
        if "rst" in answer:
            self.safely(self.h2.reset_stream, stream, answer["rst"][0])
            self.flush()
            for code in answer["rst"][1:]:
                self.write(frame(3, 0, stream, struct.pack(">I", code)))
        elif "cut" in answer:
            self.end(answer["cut"])
        else:
            self.respond(stream, answer)
            if RULES["apple"]:
                limit = 1000 if answer["status"] == 200 else 1
                if limit != self.limit:
                    self.set({3: limit})
        self.flush()
        if self.closing and not any(held <= self.last for held in self.held):   # a reset would destroy the answers
            asyncio.get_running_loop().call_later(0.1, self.end, "close")

    def respond(self, stream, answer):
        content = {k: answer[k] for k in ("reason", "timestamp") if k in answer}
        body = answer.get("body", json.dumps(content) if content else "").encode()
        shape = answer.get("shape")
        if shape == "early":
            self.safely(self.h2.send_headers, stream, [(":status", "103"), ("link", "</>")])
        head = [(":status", str(answer["status"])), ("apns-id", "EABEAE54-14A8-11E5-B60B-1697F925EC7B")]
        ends = not body and shape not in ("empty", "trailers")
        self.flush()
        self.safely(self.h2.send_headers, stream, head, end_stream=ends)
        if shape == "continuation":
            data = self.h2.data_to_send()
            self.write(frame(1, data[4] & ~4, stream, data[9:10]) + frame(9, 4, stream, data[10:]))
        if shape == "trailers":
            self.safely(self.h2.send_data, stream, body)
            self.safely(self.h2.send_headers, stream, [("x-end", "1")], end_stream=True)
        elif shape == "split":
            self.safely(self.h2.send_data, stream, body[:len(body) // 2])
            self.safely(self.h2.send_data, stream, body[len(body) // 2:], end_stream=True)
        elif not ends:
            self.send_body(stream, body)
        if shape == "ping":
            self.h2.ping(b"question")

    def send_body(self, stream, data):
        if not self.safely(self.h2.send_data, stream, data, end_stream=True):
            self.bodies.append((stream, data))   # until the client pays

    def set(self, values):
        self.limit = values.get(3, self.limit)
        self.safely(self.h2.update_settings, values)
        self.unacked += 1
        self.flush()

    def goaway(self, back=0, code=0, reason=None, close=False, last=None):
        self.flush()
        number = self.newest - back if last is None else last
        debug = json.dumps({"reason": reason}).encode() if reason else b""
        self.write(frame(7, 0, 0, struct.pack(">II", number, code) + debug))
        if number < 0x7fffffff:
            self.last, self.closing = number, close
            for stream in [s for s in self.held if s > number]:
                del self.held[stream]
            if close and not self.held and not self.requests:
                asyncio.get_running_loop().call_later(0.1, self.end, "close")

    def release(self):
        for stream, answer in list(self.held.items()):
            if not answer.get("never"):
                del self.held[stream]
                self.answer(stream, {"status": 200, **answer})


def obey(order):
    do, number = order.pop("do"), order.pop("conn", None)
    chosen = connections[number - 1] if number else connections[-1] if connections else None
    if do == "rules":
        for name, value in order.items():
            if name in ("settings", "answers"):
                RULES[name].update(value)
            else:
                RULES[name] = value
    elif do == "release":
        for each in [chosen] if number else connections:
            each.release()
    elif do in ("close", "drop", "reset"):
        chosen.end(do)
    elif do == "goaway":
        chosen.goaway(**order)
    elif do == "settings":
        chosen.set({int(k): v for k, v in order["values"].items()})
    elif do == "ping":
        chosen.h2.ping(b"question")
        chosen.flush()
    elif do == "raw":
        chosen.flush()
        chosen.write(bytes.fromhex(order["hex"]))
    report("done", do=do)


async def main(rules):
    RULES["settings"].update(rules.pop("settings", {}))
    client_ca = rules.pop("client_ca", None)
    RULES.update(rules)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(os.path.join(HERE, "localhost.pem"))
    context.set_alpn_protocols(["h2"])
    if client_ca:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    logging.getLogger("asyncio").disabled = True   # it tells of clients that went
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, why: report("note", what=repr(why.get("exception") or why["message"])))
    server = await loop.create_server(Connection, "127.0.0.1", rules.get("port", 0), ssl=context)
    report("port", port=server.sockets[0].getsockname()[1])
    orders = asyncio.StreamReader(limit=1 << 26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        obey(json.loads(line))


if __name__ == "__main__":
    RULES["port"] = 0
    asyncio.run(main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}))
