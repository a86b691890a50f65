/* floor.c - the least a chat server can cost: the yardstick of test/bench.
 *
 *     cc -O2 -o floor test/floor.c -lcrypto && ./floor --port 0 --epoll --round
 *
 * A figure such as "0.2 microseconds of CPU a delivery" says little alone: it
 * depends on the machine, its kernel, and what else runs there. So the bench
 * measures xchat and this program in the same minute and prints the ratio.
 * What is left here is the part that no chat server can do without:
 *
 *     accept -> WebSocket handshake -> cut frames, unmask them -> send()
 *
 * There is no JSON, no name, no check, no limit, no timer. What xchat costs
 * above this is the price of what it does; what it costs below this is the
 * gain of how it does it.
 *
 * Four floors, by two flags:
 *
 *     --each   one send() per member and message: what most servers do
 *     --round  one send() per member and room in each round of the loop; the
 *              messages of a round are gathered in one buffer of the room
 *     --poll   the kernel scans all descriptors at each wake-up
 *     --epoll  it does not (Linux only)
 *
 * The wire, as far as test/load.c speaks it:
 *
 *     GET /17 HTTP/1.1 ...             the path is the room, by number
 *     {"type":"login" ...              answered to the sender alone, by a frame
 *                                      with "client_list" in it
 *     any other frame, 135 bytes       goes to all in the room, the sender too,
 *                                      padded by 70 blanks: 4 + 205 bytes
 *
 * xchat's own `say` to all is about 70 bytes longer than what came in (an id,
 * a name and a time are added), so both servers move the same bytes.
 *
 * The cheat, since this must not be taken for a server: frames are believed
 * to be complete text messages of an honest load generator, and a client that
 * does anything else is closed without a word. (Lengths are still checked:
 * a yardstick may be blunt, but must not read past its buffers.)
 */
#define _POSIX_C_SOURCE 200809L

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/evp.h>
#include <openssl/sha.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* The kernel's own poll set: one small function per thing it can do. */
#ifdef __linux__
#include <sys/epoll.h>
#define EVENTS 1024
static int set_open(void) { return epoll_create1(0); }
static int set_tell(int set, bool new, int fd, void *who, bool wants_write) {
    struct epoll_event e = { .events = EPOLLIN | (wants_write ? EPOLLOUT : 0), .data.ptr = who };
    return epoll_ctl(set, new ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &e);
}
static void set_wait(int set, void (*ready)(void *who)) {
    struct epoll_event events[EVENTS];
    int n = epoll_wait(set, events, EVENTS, -1);
    for (int i = 0; i < n; i++) ready(events[i].data.ptr);
}
#else
static int set_open(void) { errno = ENOSYS; return -1; }
static int set_tell(int set, bool new, int fd, void *who, bool wants_write) {
    (void)set; (void)new; (void)fd; (void)who; (void)wants_write;
    return -1;
}
static void set_wait(int set, void (*ready)(void *who)) { (void)set; (void)ready; }
#endif

#define READ_SIZE   65536
#define PAYLOAD_MAX (65535 - PAD)   /* of a frame from a client */
#define OUT_MAX     (16u << 20)     /* unsent bytes of a client, then closed */
#define PAD         70
#define ROOMS       65536

struct buffer { char *p; size_t len, cap; };

struct room {
    struct client **members;
    size_t count, cap;
    struct buffer gathered;         /* frames of this round, with --round */
};

struct client {
    int fd;
    bool doomed, wants_write;
    size_t place;                   /* in server.clients */
    size_t seat;                    /* in room->members */
    struct room *room;              /* NULL before the handshake */
    struct buffer in, out;          /* incomplete input, unsent output */
};

static struct {
    bool each, epoll, knock, some_doomed;
    int listener, set;
    struct client **clients;
    struct pollfd *polled;          /* [0] is the listener, [1 + place] a client */
    size_t count, cap;
    struct room *rooms[ROOMS];
    struct room **dirty;            /* rooms that gathered something this round */
    size_t dirty_count, dirty_cap;
} server;

static void die(const char *what) {
    fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* Grow an array of `size`-byte items so that it holds `need` of them. */
static void *grown(void *items, size_t *cap, size_t need, size_t size) {
    if (need <= *cap) return items;
    while (*cap < need) *cap = *cap ? *cap * 2 : 16;
    void *p = realloc(items, *cap * size);
    if (!p) die("memory");
    return p;
}

static void append(struct buffer *b, const void *bytes, size_t len) {
    if (len == 0) return;
    b->p = grown(b->p, &b->cap, b->len + len, 1);
    memcpy(b->p + b->len, bytes, len);
    b->len += len;
}

static void drop_front(struct buffer *b, size_t len) {
    b->len -= len;
    if (b->len > 0) { memmove(b->p, b->p + len, b->len); return; }
    free(b->p);
    *b = (struct buffer){0};
}

static void doom(struct client *c) {
    c->doomed = server.some_doomed = true;
}

static void want_write(struct client *c, bool yes) {
    if (c->wants_write == yes) return;
    c->wants_write = yes;
    server.polled[1 + c->place].events = (short)(yes ? POLLIN | POLLOUT : POLLIN);
    if (server.epoll && set_tell(server.set, false, c->fd, c, yes) < 0) die("epoll_ctl");
}

/* --- Sending -------------------------------------------------------------- */

/* The measured system call. What the socket does not take is kept, in order. */
static void put(struct client *c, const char *p, size_t len) {
    size_t sent = 0;
    if (c->doomed) return;
    if (c->out.len == 0) {
        ssize_t n = send(c->fd, p, len, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN && errno != EINTR) { doom(c); return; }
        sent = n > 0 ? (size_t)n : 0;
        if (sent == len) return;
    }
    append(&c->out, p + sent, len - sent);
    if (c->out.len > OUT_MAX) { doom(c); return; }
    want_write(c, true);
}

static void put_rest(struct client *c) {
    if (c->out.len == 0) return;
    ssize_t n = send(c->fd, c->out.p, c->out.len, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN && errno != EINTR) { doom(c); return; }
    if (n > 0) drop_front(&c->out, (size_t)n);
    if (c->out.len == 0) want_write(c, false);
}

static void gather(struct room *r, const char *frame, size_t len) {
    if (r->gathered.len == 0) {
        server.dirty = grown(server.dirty, &server.dirty_cap, server.dirty_count + 1,
                             sizeof *server.dirty);
        server.dirty[server.dirty_count++] = r;
    }
    append(&r->gathered, frame, len);
}

static void flush_rooms(void) {
    for (size_t i = 0; i < server.dirty_count; i++) {
        struct room *r = server.dirty[i];
        for (size_t m = 0; m < r->count; m++)
            put(r->members[m], r->gathered.p, r->gathered.len);
        r->gathered.len = 0;
    }
    server.dirty_count = 0;
}

/* --- Receiving ------------------------------------------------------------ */

static void handle_message(struct client *c, const char *payload, size_t len) {
    static const char login[] = "{\"type\":\"login\"";
    static const char answer[] = "\x81\x21{\"type\":\"login\",\"client_list\":{}}";
    _Static_assert(sizeof answer == 2 + 0x21 + 1, "the length byte of the answer");
    char frame[4 + PAYLOAD_MAX + PAD];
    size_t total = len + PAD, head = total < 126 ? 2 : 4;

    if (len >= sizeof login - 1 && memcmp(payload, login, sizeof login - 1) == 0) {
        put(c, answer, sizeof answer - 1);
        return;
    }
    frame[0] = (char)0x81;                  /* a whole text: RFC 6455, 5.2 */
    frame[1] = (char)(head == 2 ? total : 126);
    if (head == 4) { frame[2] = (char)(total >> 8); frame[3] = (char)(total & 255); }
    memcpy(frame + head, payload, len);
    memset(frame + head + len, ' ', PAD);
    if (!server.each) { gather(c->room, frame, head + total); return; }
    for (size_t m = 0; m < c->room->count; m++) put(c->room->members[m], frame, head + total);
}

/* One frame from p[0..len). Returns the bytes used, 0 for "need more". */
static size_t take_frame(struct client *c, char *p, size_t len) {
    const unsigned char *u = (const unsigned char *)p;
    size_t head = 6, size;

    if (len < head) return 0;
    size = u[1] & 127u;
    if (size == 126) { head = 8; size = (size_t)u[2] << 8 | u[3]; }
    if (!(u[1] & 128u) || (u[1] & 127u) == 127 || size > PAYLOAD_MAX) { doom(c); return 0; }
    if (len < head + size) return 0;
    for (size_t i = 0; i < size; i++) p[head + i] ^= p[head - 4 + (i & 3)];
    if (u[0] == 0x81) handle_message(c, p + head, size);
    else if (u[0] == 0x88) doom(c);
    return head + size;
}

static void join(struct client *c, size_t number) {
    if (!server.rooms[number]) server.rooms[number] = calloc(1, sizeof(struct room));
    struct room *r = server.rooms[number];
    if (!r) die("memory");
    r->members = grown(r->members, &r->cap, r->count + 1, sizeof(struct client *));
    c->room = r;
    c->seat = r->count;
    r->members[r->count++] = c;
}

/* The handshake, RFC 6455, 4.2.2. Returns the bytes used, 0 for "need more". */
static size_t take_handshake(struct client *c, const char *p, size_t len) {
    static const char magic[] = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    char head[1024], keyed[24 + sizeof magic], reply[256];
    unsigned char digest[SHA_DIGEST_LENGTH], accepted[32];
    size_t used = len < sizeof head - 1 ? len : sizeof head - 1;

    memcpy(head, p, used);
    head[used] = '\0';
    char *end = strstr(head, "\r\n\r\n"), *key = strstr(head, "Sec-WebSocket-Key: ");
    if (!end && used < sizeof head - 1) return 0;
    if (!end || !key || end - key < 19 + 24 || strncmp(head, "GET /", 5) != 0) {
        doom(c);
        return 0;
    }
    memcpy(keyed, key + 19, 24);
    memcpy(keyed + 24, magic, sizeof magic);
    SHA1((const unsigned char *)keyed, 24 + sizeof magic - 1, digest);
    EVP_EncodeBlock(accepted, digest, sizeof digest);
    int n = snprintf(reply, sizeof reply, "HTTP/1.1 101 Switching Protocols\r\n"
                     "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                     "Sec-WebSocket-Accept: %s\r\n\r\n", (char *)accepted);
    put(c, reply, (size_t)n);
    join(c, strtoul(head + 5, NULL, 10) % ROOMS);
    return (size_t)(end + 4 - head);
}

/* One recv() into a shared buffer; only an incomplete rest is kept by the
 * client, so an idle client owns no memory but its struct. */
static void client_ready(struct client *c) {
    static char shared[8 + PAYLOAD_MAX + READ_SIZE];
    size_t len = c->in.len, used = 0;

    if (c->doomed) return;
    put_rest(c);
    if (len > 0) memcpy(shared, c->in.p, len);
    ssize_t n = recv(c->fd, shared + len, READ_SIZE, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) { doom(c); return; }
    len += (size_t)n;
    while (used < len && !c->doomed) {
        size_t step = c->room ? take_frame(c, shared + used, len - used)
                              : take_handshake(c, shared + used, len - used);
        if (step == 0) break;
        used += step;
    }
    drop_front(&c->in, c->in.len);
    append(&c->in, shared + used, len - used);
}

/* --- Coming and going ----------------------------------------------------- */

static void accept_all(void) {
    for (;;) {
        int one = 1, fd = accept(server.listener, NULL, NULL);
        if (fd < 0) return;
        struct client *c = calloc(1, sizeof *c);
        if (!c || fcntl(fd, F_SETFL, O_NONBLOCK) < 0) die("accept");
        (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);   /* only speed */
        c->fd = fd;
        c->place = server.count;
        server.clients = grown(server.clients, &server.cap, server.count + 1, sizeof c);
        server.polled = realloc(server.polled, (server.cap + 1) * sizeof *server.polled);
        if (!server.polled) die("memory");
        server.clients[server.count++] = c;
        server.polled[server.count] = (struct pollfd){ .fd = fd, .events = POLLIN };
        if (server.epoll && set_tell(server.set, true, fd, c, false) < 0) die("epoll_ctl");
    }
}

/* Freed only here, between rounds, so a client stays valid during a round. */
static void sweep(void) {
    for (size_t i = server.count; server.some_doomed && i-- > 0; ) {
        struct client *c = server.clients[i];
        if (!c->doomed) continue;
        if (c->room) {
            struct client *last = c->room->members[--c->room->count];
            c->room->members[last->seat = c->seat] = last;
        }
        struct client *last = server.clients[--server.count];
        server.clients[last->place = i] = last;
        server.polled[1 + i] = server.polled[1 + server.count];
        close(c->fd);
        free(c->in.p);
        free(c->out.p);
        free(c);
    }
    server.some_doomed = false;
}

static void ready(void *who) {
    if (who) client_ready(who);
    else server.knock = true;               /* somebody at the listener */
}

static void poll_wait(void) {
    if (poll(server.polled, (nfds_t)(1 + server.count), -1) < 0) return;
    for (size_t i = 0; i < server.count; i++)
        if (server.polled[1 + i].revents) ready(server.clients[i]);
    if (server.polled[0].revents) ready(NULL);
}

static void listen_on(uint16_t port) {
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
    socklen_t len = sizeof address;
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);

    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) < 0
        || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 4096) < 0
        || getsockname(fd, (struct sockaddr *)&address, &len) < 0
        || fcntl(fd, F_SETFL, O_NONBLOCK) < 0) die("listen");
    server.listener = fd;
    if (!(server.polled = malloc(sizeof *server.polled))) die("memory");
    server.polled[0] = (struct pollfd){ .fd = fd, .events = POLLIN };
    fprintf(stderr, "listening on 127.0.0.1:%u\n", (unsigned)ntohs(address.sin_port));
}

int main(int argc, char **argv) {
    unsigned long port = 7272;

    server.each = true;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--port") == 0 && i + 1 < argc) port = strtoul(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--each") == 0) server.each = true;
        else if (strcmp(argv[i], "--round") == 0) server.each = false;
        else if (strcmp(argv[i], "--poll") == 0) server.epoll = false;
        else if (strcmp(argv[i], "--epoll") == 0) server.epoll = true;
        else {
            fprintf(stderr, "usage: floor [--port N] [--each|--round] [--poll|--epoll]\n");
            return 2;
        }
    }
    if (port > 65535) { fprintf(stderr, "floor: --port: 0 to 65535\n"); return 2; }
    listen_on((uint16_t)port);
    if (server.epoll) {
        server.set = set_open();
        if (set_tell(server.set, true, server.listener, NULL, false) < 0) die("epoll");
    }
    for (;;) {
        server.knock = false;
        if (server.epoll) set_wait(server.set, ready);
        else poll_wait();
        flush_rooms();
        if (server.knock) accept_all();
        sweep();
    }
}
