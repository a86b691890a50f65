/* load.c - the load generator: every figure of the README comes from here.
 *
 *     cc -O2 -o load test/load.c -lssl -lcrypto
 *     ./load --pid $(pidof xchat) --clients 100 --senders 10 --window 8
 *
 * One process plays all clients. Client i sits in room --first + i mod --rooms
 * (there is no room 0), is named u<i>, and connects to /<room>, for test/floor.c.
 * The first --senders clients talk, so they are spread evenly over the rooms.
 * Past 20,000 clients the next 127.0.0.x is taken, for a port is only a number.
 * With --tls 1 they speak TLS, and believe any certificate.
 *
 *     closed loop   each sender keeps --window messages under way and says the
 *                   next one when its own comes back: the most a server can
 *                   do, and what CPU each delivery costs it
 *     open loop     --rate messages a second in all, at even distances, even
 *                   if the server falls behind: the latency people see
 *     idle          --senders 0: connect, log in, weigh the server, leave
 *     orders        besides, a back end tells --orders users a second something,
 *                   at even distances, on one connection to the port --gateway:
 *                   client i is bound to user u<i>, and they take turns
 *
 * A delivery is one message at one member. The content of a message begins
 * with a stamp, 29 characters that JSON and HTML leave alone:
 *
 *      0     1         6            14                   29
 *      +-----+---------+-------------+---------------------+--------
 *      |  ~  | sender  |  sequence   | time sent, in ns    | ----...
 *      +-----+---------+-------------+---------------------+--------
 *              20 bits     32 bits          60 bits           filling
 *
 * four bits a letter, `a` to `p`; orders have sender 0xfffff. On the way in there is
 * no JSON: memchr finds the `~`. In the open loop, and of orders, the time is when the
 * message was due, so a server (or generator) that falls behind cannot hide it.
 *
 * What is proven, for each receiver, over the whole run and not only over the
 * measured window:
 *
 *     lost        a sequence number of a sender that never came
 *     duplicate   one that came twice
 *     late        one that came after a higher one of the same sender
 *     orders      members that saw another order than the first one of their
 *                 room: a running hash of all they saw is compared at the end
 *     stray       messages of another room
 *
 * The first three are a window of the last 64 numbers for each pair of sender
 * and receiver, as IPsec has it against replay (RFC 4303, 3.4.3).
 *
 * What is read from /proc (Linux; elsewhere these keys are -1):
 *
 *     cpu         run time of all threads of --pid, exactly over the window
 *     memory      private dirty and resident memory of --pid before the first
 *                 connection and after the last log-in, when nothing moves.
 *                 Socket buffers are the kernel's and not in it.
 *
 * The generator shares the machine with what it measures, so it is cheap: 256
 * KB a read, one look at the clock a read, one write for all that a read gives
 * cause to say. Pin the two to different cores (test/bench does) and mind
 * `load_cpu`: at 100 the generator was the limit, and deliveries_s says
 * nothing about the server.
 *
 * Output is one line of key=value. Status 0: all went well; 1: a promise was
 * broken (lost, duplicate, late, orders, stray, closed); 2: the run could not
 * be done.
 */
#define _POSIX_C_SOURCE 200809L

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define STAMP       29              /* bytes of a stamp */
#define BACK_END    0xfffffu        /* who sends orders, in a stamp */
#define PACKET_HEAD 28              /* bytes, and the commands of the gateway that are used */
enum { IS_ONLINE = 11, BIND_UID = 12, SEND_TO_UID = 14 };
#define READ_SIZE   (256 * 1024)
#define LOOK        4096            /* bytes of a frame that are looked at */
#define HEAD_MAX    10              /* of an unmasked frame: RFC 6455, 5.2 */
#define PER_ADDRESS 20000           /* connections from one source address */
#define EVENTS      1024
#define SLOWEST_US  5000000         /* latencies above are only in max_us */
#define SETTLE_NS   100000000       /* this long nothing came: all is idle */
#define TIDY_NS     1500000000      /* ...and it gave back to the system what it could, once a second */
#define GIVE_UP_NS  5000000000      /* this long nothing came: it never will */

/* --- Waiting --------------------------------------------------------------- *
 * The same three functions for epoll and for poll: open, tell, wait. A client
 * is known to both by its number. */

#if defined(__linux__) && !defined(LOAD_POLL)
#include <sys/epoll.h>
static int waiter;
static bool wait_open(size_t clients) {
    (void)clients;
    return (waiter = epoll_create1(0)) >= 0;
}
static bool wait_tell(int fd, size_t number, bool new, bool wants_write) {
    struct epoll_event e = { .events = EPOLLIN | (wants_write ? EPOLLOUT : 0), .data.u64 = number };
    return epoll_ctl(waiter, new ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &e) == 0;
}
static void wait_some(int timeout_ms, void (*ready)(size_t number)) {
    struct epoll_event events[EVENTS];
    int n = epoll_wait(waiter, events, EVENTS, timeout_ms);
    for (int i = 0; i < n; i++) ready((size_t)events[i].data.u64);
}
#else
static struct pollfd *waiter;
static nfds_t waiting;
static bool wait_open(size_t clients) {
    return (waiter = calloc(clients, sizeof *waiter)) != NULL;
}
static bool wait_tell(int fd, size_t number, bool new, bool wants_write) {
    if (new && number >= waiting) waiting = (nfds_t)number + 1;
    waiter[number] = (struct pollfd){ .fd = fd, .events = POLLIN };
    if (wants_write) waiter[number].events |= POLLOUT;
    return true;
}
static void wait_some(int timeout_ms, void (*ready)(size_t number)) {
    if (poll(waiter, waiting, timeout_ms) <= 0) return;
    for (size_t i = 0; i < waiting; i++)
        if (waiter[i].revents) ready(i);
}
#endif

/* --- State ---------------------------------------------------------------- */

enum state { CONNECTING, UPGRADING, LOGGING_IN, PRESENT, GONE };

/* What a receiver knows of a sender. Bit n of `seen`: number last - n came. */
struct track { uint64_t last, seen; };

struct client {
    int fd;
    SSL *ssl;                       /* or NULL */
    enum state state;
    bool wants_write;
    size_t number, room;            /* rooms from 0 here, from --first on the wire */
    uint64_t sent;                  /* number of the last message said */
    uint64_t order;                 /* running hash of all that was received */
    struct track *tracks;           /* of the senders of the room, see track_of */
    struct track told;              /* of the back end */
    uint64_t ordered;               /* number of the last order to it */
    uint32_t connection;            /* its number at the gateway */
    uint64_t skip;                  /* bytes of a frame to pass over unread */
    char *carry;                    /* the incomplete frame at the end of a read */
    size_t carry_len;
    char *out;                      /* what the socket did not take yet */
    size_t out_len, out_cap;
};

/* The options; `--clients 7` sets `clients`. All are whole numbers. */
static struct {
    uint64_t port, gateway, pid, clients, rooms, first, senders, per_room, window, rate, orders, size,
             measure_ms, warmup_ms, connecting, tls;
} opt = { .port = 7272, .clients = 100, .rooms = 1, .first = 1, .senders = 1, .window = 1, .size = 64,
          .measure_ms = 5000, .warmup_ms = 500, .connecting = 64 };

static struct {
    struct client *clients;         /* and behind them the back end's connection */
    size_t opened, logged_in;       /* counts of clients */
    SSL_CTX *tls;
    uint64_t now_ns;                /* when the latest read returned */
    uint64_t received;              /* bytes, without what TLS adds */
    bool saying;                    /* the closed loop goes on */
    bool measuring;                 /* within the window */
    uint64_t ordered;               /* orders so far, */
    double order_ns;                /* and when the next one is due */
    char *template;                 /* the payload of a message, but for the stamp */
    size_t template_len, stamp_at;
    uint32_t mask;
} load;

/* One counter a microsecond up to SLOWEST_US, then one for all above: the
 * simplest histogram there is, and the part in use stays in the cache. */
static struct {
    struct latency {
        uint32_t us[SLOWEST_US + 1];
        uint64_t n, max_ns;
    } chat, told;                   /* in the window */
    uint64_t all;                   /* since the first message */
    uint64_t lost, duplicate, late, orders, stray, closed;
} result;

static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

static void *xcalloc(size_t count, size_t size) {
    void *p = calloc(count, size);
    if (!p) die("out of memory");
    return p;
}

static uint64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* --- The stamp ------------------------------------------------------------ */

static void put_letters(char *p, size_t count, uint64_t value) {
    while (count-- > 0) { p[count] = (char)('a' + (value & 15)); value >>= 4; }
}

/* False if one of them is not from `a` to `p`. */
static bool get_letters(const char *p, size_t count, uint64_t *value) {
    unsigned wrong = 0;
    uint64_t v = 0;
    for (size_t i = 0; i < count; i++) {
        unsigned letter = (unsigned)(unsigned char)p[i] - 'a';
        wrong |= letter;
        v = v << 4 | (letter & 15);
    }
    *value = v;
    return wrong < 16;
}

/* --- Sending -------------------------------------------------------------- */

static void gone(struct client *c, const char *why) {
    if (c->state == GONE) return;
    if (result.closed++ == 0) fprintf(stderr, "load: u%zu: %s\n", c->number, why);
    close(c->fd);
    c->state = GONE;
}

static void queue(struct client *c, const void *bytes, size_t len) {
    if (c->out_len + len > c->out_cap) {
        c->out_cap = 2 * (c->out_len + len);
        if (!(c->out = realloc(c->out, c->out_cap))) die("out of memory");
    }
    memcpy(c->out + c->out_len, bytes, len);
    c->out_len += len;
}

/* A masked frame. The mask changes, so that no server gets by without
 * unmasking. No payload of ours needs a 64-bit length. */
static void queue_frame(struct client *c, unsigned opcode, const char *payload, size_t len) {
    unsigned char head[8] = { (unsigned char)(0x80 | opcode), (unsigned char)(0x80 | len) };
    size_t size = 2;
    if (len >= 126) {
        head[1] = 0x80 | 126;
        head[2] = (unsigned char)(len >> 8);
        head[3] = (unsigned char)(len & 255);
        size = 4;
    }
    load.mask = load.mask * 1664525u + 1013904223u;
    memcpy(head + size, &load.mask, 4);
    queue(c, head, size + 4);
    queue(c, payload, len);
    char *masked = c->out + c->out_len - len;
    for (size_t i = 0; i < len; i++) masked[i] = (char)(masked[i] ^ head[size + (i & 3)]);
}

/* What became of a call of TLS, as send() and recv() would tell it. */
static ssize_t tls_result(struct client *c, int n) {
    int error = n > 0 ? SSL_ERROR_NONE : SSL_get_error(c->ssl, n);
    if (n > 0 || error == SSL_ERROR_ZERO_RETURN) return n > 0 ? n : 0;
    errno = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE ? EAGAIN : EPROTO;
    ERR_clear_error();
    return -1;
}

static ssize_t sock_send(struct client *c, const char *p, size_t len) {
    if (!c->ssl) return send(c->fd, p, len, MSG_NOSIGNAL);
    return tls_result(c, SSL_write(c->ssl, p, (int)len));
}

static ssize_t sock_recv(struct client *c, char *p, size_t len) {
    if (!c->ssl) return recv(c->fd, p, len, 0);
    return tls_result(c, SSL_read(c->ssl, p, (int)len));
}

static void flush(struct client *c) {
    if (c->state == GONE) return;
    if (c->out_len > 0) {
        ssize_t n = sock_send(c, c->out, c->out_len);
        if (n < 0 && errno != EAGAIN && errno != EINTR) { gone(c, strerror(errno)); return; }
        if (n > 0) {
            c->out_len -= (size_t)n;
            memmove(c->out, c->out + n, c->out_len);
        }
    }
    if (c->wants_write == (c->out_len > 0)) return;
    c->wants_write = c->out_len > 0;
    if (!wait_tell(c->fd, c->number, false, c->wants_write)) die("wait: %s", strerror(errno));
}

static void template_prepare(void) {
    static const char before[] =
        "{\"type\":\"say\",\"to_client_id\":\"all\",\"to_client_name\":\"all\",\"content\":\"";
    load.stamp_at = sizeof before - 1;
    load.template_len = load.stamp_at + opt.size + 2;
    load.template = xcalloc(1, load.template_len + 1);
    memset(load.template, '-', load.template_len);
    memcpy(load.template, before, sizeof before - 1);
    memcpy(load.template + load.template_len - 2, "\"}", 2);
}

/* Say the next message of c; the caller flushes. */
static void say(struct client *c, uint64_t time_ns) {
    char *stamp = load.template + load.stamp_at;
    stamp[0] = '~';
    put_letters(stamp + 1, 5, c->number);
    put_letters(stamp + 6, 8, ++c->sent);
    put_letters(stamp + 14, 15, time_ns);
    queue_frame(c, 1, load.template, load.template_len);
}

/* --- Receiving ------------------------------------------------------------ */

/* Senders of a room are its members 0, 1, 2 ... by number / rooms. */
static struct track *track_of(struct client *receiver, uint64_t sender) {
    return &receiver->tracks[sender / opt.rooms];
}

/* Any number but the next one. */
static void track_gap(struct track *t, uint64_t sequence) {
    if (sequence > t->last) {
        uint64_t step = sequence - t->last;
        result.lost += step - 1;
        t->seen = step < 64 ? t->seen << step | 1 : 1;
        t->last = sequence;
        return;
    }
    uint64_t back = t->last - sequence;
    if (back >= 64 || (t->seen >> back & 1)) { result.duplicate++; return; }
    t->seen |= (uint64_t)1 << back;
    result.lost--;                          /* it was only late */
    result.late++;
}

static void delivered(struct client *c, const char *stamp) {
    uint64_t sender, sequence, time_ns;

    if (!get_letters(stamp + 1, 5, &sender) || !get_letters(stamp + 6, 8, &sequence)
        || !get_letters(stamp + 14, 15, &time_ns)
        || (sender != BACK_END && (sender >= opt.senders || load.clients[sender].room != c->room))) {
        result.stray++;
        return;
    }
    bool order = sender == BACK_END;
    struct track *t = order ? &c->told : track_of(c, sender);
    if (sequence == t->last + 1) { t->last = sequence; t->seen = t->seen << 1 | 1; }
    else track_gap(t, sequence);
    if (!order) c->order = (c->order ^ (sender << 36 | sequence)) * 0x9e3779b97f4a7c15u;
    if (!order) c->order ^= c->order >> 29;
    result.all++;

    uint64_t latency_ns = load.now_ns > time_ns ? load.now_ns - time_ns : 0;
    uint64_t us = latency_ns / 1000;
    if (sender == c->number && load.saying) say(c, load.now_ns);
    if (!load.measuring) return;
    struct latency *l = order ? &result.told : &result.chat;
    l->n++;
    l->us[us < SLOWEST_US ? us : SLOWEST_US]++;
    if (latency_ns > l->max_ns) l->max_ns = latency_ns;
}

static bool holds(const char *p, size_t len, const char *word) {
    size_t n = strlen(word);
    for (const char *end = p + len; (p = memchr(p, word[0], (size_t)(end - p))) != NULL; p++) {
        if ((size_t)(end - p) < n) return false;
        if (memcmp(p, word, n) == 0) return true;
    }
    return false;
}

/* The second half of the client's id, the first that stands in the answer to its log-in; 0 if none does. */
static uint32_t connection_read(const char *p, size_t len) {
    static const char name[] = "\"client_id\":\"";
    char digits[9] = "";
    for (size_t i = 0; i + sizeof name + 20 <= len; i++)
        if (memcmp(p + i, name, sizeof name - 1) == 0) {
            memcpy(digits, p + i + sizeof name - 1 + 12, 8);
            break;
        }
    return (uint32_t)strtoul(digits, NULL, 16);
}

/* One frame; of a long one only the first LOOK bytes. */
static void frame_read(struct client *c, unsigned opcode, const char *p, size_t len) {
    if (opcode == 1) {
        const char *stamp = memchr(p, '~', len);
        if (stamp && (size_t)(p + len - stamp) >= STAMP) { delivered(c, stamp); return; }
        if (len == 15 && memcmp(p, "{\"type\":\"ping\"}", 15) == 0)
            queue_frame(c, 1, "{\"type\":\"pong\"}", 15);
        else if (c->state == LOGGING_IN && holds(p, len, "\"client_list\"")) {
            c->state = PRESENT;
            c->connection = connection_read(p, len);
            load.logged_in++;
        } else if (len > 15 && memcmp(p, "{\"type\":\"error\"", 15) == 0) {
            die("u%zu was answered %.*s", c->number, (int)len, p);
        }
    } else if (opcode == 9) {
        queue_frame(c, 10, p, len < 126 ? len : 125);
    } else if (opcode == 8) {
        char why[64];
        unsigned code = len < 2 ? 1005 : (unsigned)(unsigned char)p[0] << 8 | (unsigned char)p[1];
        snprintf(why, sizeof why, "closed by the server with %u", code);
        gone(c, why);
    }
}

/* The answer to the upgrade. Returns its size, 0 for "need more". */
static size_t upgraded(struct client *c, const char *p, size_t len) {
    char login[128];
    size_t size = 4;
    while (size <= len && memcmp(p + size - 4, "\r\n\r\n", 4) != 0) size++;
    if (size > len) return 0;
    if (memcmp(p, "HTTP/1.1 101 ", 13) != 0) die("u%zu: no upgrade: %.40s", c->number, p);
    /* A server that only repeats what it hears (nchan) gives the answer that is waited for like this. */
    int n = snprintf(login, sizeof login, "{\"type\":\"login\",\"client_name\":\"u%zu\","
                     "\"room_id\":\"%zu\",\"client_list\":{}}", c->number, c->room + opt.first);
    queue_frame(c, 1, login, (size_t)n);
    c->state = LOGGING_IN;
    return size;
}

/* One unit from the front of the input. Returns its size as far as it is
 * there (the rest goes to c->skip), 0 for "need more". */
static size_t unit_read(struct client *c, const char *p, size_t len) {
    const unsigned char *u = (const unsigned char *)p;
    size_t head = 2;
    uint64_t size;

    if (c->state == UPGRADING) return upgraded(c, p, len);
    if (len < 2) return 0;
    size = u[1];
    if (size >= 126) head = size == 126 ? 4 : 10;
    if (len < head) return 0;
    if (head > 2) {
        size = 0;
        for (size_t i = 2; i < head; i++) size = size << 8 | u[i];
    }
    size_t look = size < LOOK ? (size_t)size : LOOK;
    if (len - head < look) return 0;
    frame_read(c, u[0] & 15u, p + head, look);
    if (size <= len - head) return head + (size_t)size;
    c->skip = size - (len - head);
    return len;
}

/* Room is left in front of the shared buffer for what was carried over, so
 * that what was read never moves. */
static void receive(struct client *c) {
    static char shared[HEAD_MAX + LOOK + READ_SIZE];
    char *p = shared + HEAD_MAX + LOOK;
    ssize_t n = sock_recv(c, p, READ_SIZE);

    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) { gone(c, n < 0 ? strerror(errno) : "end of the connection"); return; }
    load.received += (uint64_t)n;
    load.now_ns = clock_ns();
    size_t len = (size_t)n, pass = c->skip < len ? (size_t)c->skip : len;
    c->skip -= pass;
    p += pass;
    len -= pass;
    if (c->carry_len > 0) {
        memcpy(p -= c->carry_len, c->carry, c->carry_len);
        len += c->carry_len;
        c->carry_len = 0;
    }
    while (len > 0 && c->state != GONE) {
        size_t used = unit_read(c, p, len);
        if (used == 0) break;
        p += used;
        len -= used;
    }
    if (c->state == GONE || len == 0) return;
    if (len > HEAD_MAX + LOOK) die("u%zu: endless answer to the upgrade", c->number);
    if (!c->carry) c->carry = xcalloc(1, HEAD_MAX + LOOK);
    memcpy(c->carry, p, c->carry_len = len);
}

/* --- Coming and going ----------------------------------------------------- */

static void open_next(void) {
    struct client *c = &load.clients[load.opened];
    struct sockaddr_in from = { .sin_family = AF_INET }, to = from;
    int one = 1;

    c->number = load.opened++;
    c->room = c->number % opt.rooms;
    c->wants_write = true;
    if ((c->fd = socket(AF_INET, SOCK_STREAM, 0)) < 0) die("socket: %s", strerror(errno));
    (void)fcntl(c->fd, F_SETFL, O_NONBLOCK);
    (void)setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    from.sin_addr.s_addr = htonl((uint32_t)(INADDR_LOOPBACK + c->number / PER_ADDRESS));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port = htons((uint16_t)opt.port);
    if (opt.clients > PER_ADDRESS && bind(c->fd, (struct sockaddr *)&from, sizeof from) < 0)
        die("bind: %s", strerror(errno));
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) < 0 && errno != EINPROGRESS)
        die("connect: %s", strerror(errno));
    if (!wait_tell(c->fd, c->number, true, true)) die("wait: %s", strerror(errno));
}

static void connected(struct client *c) {
    char request[256];
    int error = 0;
    socklen_t len = sizeof error;

    if (getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &len) < 0 || error != 0)
        die("u%zu: connect: %s", c->number, strerror(error));
    if (load.tls && !((c->ssl = SSL_new(load.tls)) && SSL_set_fd(c->ssl, c->fd))) die("out of memory");
    if (load.tls) SSL_set_connect_state(c->ssl);
    int n = snprintf(request, sizeof request, "GET /%zu HTTP/1.1\r\nHost: 127.0.0.1:%" PRIu64 "\r\n"
                     "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                     "Sec-WebSocket-Key: dGhlIGxvYWQgb2YgeGNoYQ==\r\n\r\n", c->room + opt.first, opt.port);
    queue(c, request, (size_t)n);
    c->state = UPGRADING;
}

/* ---- The back end. ---- */

/* One of the packets that GatewayClient writes. */
static void queue_packet(struct client *c, unsigned command, uint32_t connection, const char *ext, const char *body) {
    char head[PACKET_HEAD] = { 0 };
    size_t ext_len = strlen(ext), len = PACKET_HEAD + ext_len + strlen(body);
    for (int i = 0; i < 4; i++) {
        head[i] = (char)(len >> (24 - 8 * i));
        head[17 + i] = (char)(connection >> (24 - 8 * i));
        head[24 + i] = (char)(ext_len >> (24 - 8 * i));
    }
    head[4] = (char)command;
    head[21] = 1;                   /* the body is text */
    queue(c, head, sizeof head);
    queue(c, ext, ext_len);
    queue(c, body, len - PACKET_HEAD - ext_len);
}

/* Connects, says which client is which user, and waits until that is known. */
static void back_end_open(void) {
    struct client *c = &load.clients[opt.clients];
    struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons((uint16_t)opt.gateway) };
    char uid[24], answer[8];
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    *c = (struct client){ .fd = socket(AF_INET, SOCK_STREAM, 0), .state = PRESENT, .number = opt.clients };
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&to, sizeof to) < 0) die("--gateway: %s", strerror(errno));
    for (size_t i = 0; i < opt.clients; i++) {
        snprintf(uid, sizeof uid, "u%zu", i);
        queue_packet(c, BIND_UID, load.clients[i].connection, uid, "");
    }
    queue_packet(c, IS_ONLINE, load.clients[0].connection, "", "");
    for (size_t done = 0; done < c->out_len; ) {
        ssize_t n = send(c->fd, c->out + done, c->out_len - done, MSG_NOSIGNAL);
        if (n < 0) die("--gateway: %s", strerror(errno));
        done += (size_t)n;
    }
    c->out_len = 0;
    if (recv(c->fd, answer, 8, MSG_WAITALL) != 8 || memcmp(answer, "\0\0\0\4i:1;", 8) != 0)
        die("--gateway: u0 is not online");
    (void)fcntl(c->fd, F_SETFL, O_NONBLOCK);
    if (!wait_tell(c->fd, c->number, true, false)) die("wait: %s", strerror(errno));
}

/* The next user is told something; the caller flushes. */
static void order(struct client *c, struct client *user, uint64_t time_ns) {
    char body[] = "{\"type\":\"order\",\"text\":\"~----------------------------"
                  "-----------------------------------\"}";
    char ext[24], *stamp = strchr(body, '~');
    put_letters(stamp + 1, 5, BACK_END);
    put_letters(stamp + 6, 8, ++user->ordered);
    put_letters(stamp + 14, 15, time_ns);
    snprintf(ext, sizeof ext, "[\"u%zu\"]", user->number);
    queue_packet(c, SEND_TO_UID, 0, ext, body);
}

static void ready(size_t number) {
    struct client *c = &load.clients[number];
    char unwanted[64];
    if (c->state == GONE) return;
    if (number == opt.clients) {
        if (recv(c->fd, unwanted, sizeof unwanted, 0) == 0) gone(c, "closed by the gateway");
    } else if (c->state == CONNECTING) connected(c);
    else do receive(c); while (c->ssl && c->state != GONE && SSL_pending(c->ssl) > 0);
    flush(c);
}

/* Until nothing has come for quiet_ns, or result.all has reached target. */
static void wait_quiet(uint64_t quiet_ns, uint64_t target) {
    load.now_ns = clock_ns();
    while (result.all < target && clock_ns() - load.now_ns < quiet_ns) wait_some(10, ready);
}

static void connect_all(void) {
    load.now_ns = clock_ns();
    while (load.logged_in < opt.clients) {
        while (load.opened < opt.clients && load.opened - load.logged_in < opt.connecting)
            open_next();
        wait_some(100, ready);
        if (result.closed > 0) die("closed while logging in");
        if (clock_ns() - load.now_ns > GIVE_UP_NS)
            die("only %zu of %" PRIu64 " could log in", load.logged_in, opt.clients);
    }
}

/* --- What the server uses ------------------------------------------------- */

/* Run time of all its threads in ns; the first number of schedstat. */
static double server_cpu_ns(void) {
    char path[64 + 256];
    double total = -1, one;
    snprintf(path, sizeof path, "/proc/%" PRIu64 "/task", opt.pid);
    DIR *tasks = opt.pid ? opendir(path) : NULL;
    for (struct dirent *d; tasks && (d = readdir(tasks)) != NULL; ) {
        if (d->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "/proc/%" PRIu64 "/task/%s/schedstat", opt.pid, d->d_name);
        FILE *f = fopen(path, "r");
        if (!f) continue;
        if (fscanf(f, "%lf", &one) == 1) total = (total < 0 ? 0 : total) + one;
        fclose(f);
    }
    if (tasks) closedir(tasks);
    return total;
}

/* A line of smaps_rollup, in bytes; -1 if there is none. */
static double server_memory(const char *key) {
    char path[64], line[256];
    double kb, found = -1;
    snprintf(path, sizeof path, "/proc/%" PRIu64 "/smaps_rollup", opt.pid);
    FILE *f = opt.pid ? fopen(path, "r") : NULL;
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, key, strlen(key)) == 0 && sscanf(line + strlen(key), "%lf", &kb) == 1)
            found = kb * 1024;
    if (f) fclose(f);
    return found;
}

static double own_cpu_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* --- The run -------------------------------------------------------------- */

/* All orders that are due by now; returns how long until the next one. */
static double give_orders(uint64_t now) {
    struct client *c = &load.clients[opt.clients];
    if (load.order_ns == 0) load.order_ns = (double)now;
    for (; load.order_ns <= (double)now && c->state != GONE; load.order_ns += 1e9 / (double)opt.orders)
        order(c, &load.clients[load.ordered++ % opt.clients], (uint64_t)load.order_ns);
    flush(c);
    return load.order_ns - (double)now;
}

/* Talk until end_ns. In the open loop senders take turns and *due_ns is when
 * the next message is due; below a millisecond it spins. */
static void talk_until(uint64_t end_ns, double *due_ns, size_t *turn) {
    double distance = opt.rate ? 1e9 / (double)opt.rate : 0;
    for (uint64_t now; (now = clock_ns()) < end_ns; ) {
        while (opt.rate && *due_ns <= (double)now) {
            struct client *c = &load.clients[(*turn)++ % opt.senders];
            if (c->state != GONE) say(c, (uint64_t)*due_ns);
            flush(c);
            *due_ns += distance;
        }
        double wait_ns = opt.rate ? *due_ns - (double)now : 1e7;
        double order_ns = opt.orders ? give_orders(now) : 1e7;
        if (wait_ns > order_ns) wait_ns = order_ns;
        if (wait_ns > (double)(end_ns - now)) wait_ns = (double)(end_ns - now);
        wait_some((int)(wait_ns / 1e6), ready);
    }
}

/* Count what is still missing and compare the orders, when all is over. */
static void check_all(void) {
    for (size_t i = 0; i < opt.clients; i++) {
        struct client *c = &load.clients[i];
        for (size_t s = c->room; s < opt.senders; s += opt.rooms)
            result.lost += load.clients[s].sent - track_of(c, s)->last;
        result.lost += c->ordered - c->told.last;
        result.orders += c->order != load.clients[c->room].order;
    }
}

static uint64_t percentile_us(const struct latency *l, double part) {
    uint64_t before = 0, rank = (uint64_t)(part * (double)l->n);
    for (uint64_t us = 0; us < SLOWEST_US; us++)
        if ((before += l->us[us]) > rank) return us;
    return l->max_ns / 1000;
}

static void run_and_report(void) {
    double due_ns = (double)clock_ns(), cpu, own;
    size_t turn = 0;
    uint64_t expected = 0, start_ns;

    load.saying = opt.rate == 0;
    load.now_ns = clock_ns();
    for (size_t s = 0; load.saying && s < opt.senders; s++) {
        for (uint64_t w = 0; w < opt.window; w++) say(&load.clients[s], load.now_ns);
        flush(&load.clients[s]);
    }
    talk_until(clock_ns() + opt.warmup_ms * 1000000, &due_ns, &turn);
    start_ns = clock_ns();
    load.measuring = true;
    cpu = server_cpu_ns();
    own = own_cpu_ns();
    talk_until(start_ns + opt.measure_ms * 1000000, &due_ns, &turn);
    double span_ns = (double)(clock_ns() - start_ns), count = (double)result.chat.n, told = (double)result.told.n;
    cpu = cpu < 0 ? -1 : server_cpu_ns() - cpu;
    own = own_cpu_ns() - own;
    load.measuring = false;
    printf(" deliveries=%.0f deliveries_s=%.0f p50_us=%" PRIu64 " p99_us=%" PRIu64 " max_us=%.0f"
           " cpu_us=%.4f server_cpu=%.1f load_cpu=%.1f", count, count / span_ns * 1e9,
           percentile_us(&result.chat, 0.50), percentile_us(&result.chat, 0.99), (double)result.chat.max_ns / 1000,
           cpu < 0 || count < 1 ? -1 : cpu / (count + told) / 1000, cpu < 0 ? -1 : 100 * cpu / span_ns,
           100 * own / span_ns);
    if (opt.orders)
        printf(" told=%.0f told_s=%.0f told_p50_us=%" PRIu64 " told_p99_us=%" PRIu64, told, told / span_ns * 1e9,
               percentile_us(&result.told, 0.50), percentile_us(&result.told, 0.99));

    load.saying = false;
    for (size_t i = 0; i < opt.clients; i++) {
        for (size_t s = i % opt.rooms; s < opt.senders; s += opt.rooms)
            expected += load.clients[s].sent;
        expected += load.clients[i].ordered;
    }
    wait_quiet(GIVE_UP_NS, expected);
    wait_quiet(SETTLE_NS, UINT64_MAX);              /* for duplicates behind the last */
    check_all();
}

/* --- Options and main ----------------------------------------------------- */

static const struct { const char *name; uint64_t *value, min, max; const char *help; } options[] = {
    { "--port",       &opt.port,       1, 65535, "of the server on 127.0.0.1" },
    { "--gateway",    &opt.gateway,    0, 65535, "the server's inner port, for --orders" },
    { "--pid",        &opt.pid,        0, 1u << 30, "of the server, to weigh it" },
    { "--clients",    &opt.clients,    1, 1u << 20, "how many connect" },
    { "--rooms",      &opt.rooms,      1, 1u << 20, "how many rooms they are spread over" },
    { "--first",      &opt.first,      1, 1u << 20, "number of the first of them" },
    { "--senders",    &opt.senders,    0, 1u << 20, "how many of them talk" },
    { "--per-room",   &opt.per_room,   0, 1u << 20, "or: how many of each room talk" },
    { "--window",     &opt.window,     1, 1u << 20, "messages each sender has under way" },
    { "--rate",       &opt.rate,       0, 1000000, "or: messages a second in all (open loop)" },
    { "--orders",     &opt.orders,     0, 1000000, "and besides: sendToUid() a second" },
    { "--size",       &opt.size,       STAMP, 60000, "bytes of content" },
    { "--measure-ms", &opt.measure_ms, 1, 86400000, "length of the measured window" },
    { "--warmup-ms",  &opt.warmup_ms,  0, 86400000, "talk before it" },
    { "--connecting", &opt.connecting, 1, 4096, "log-ins under way at a time" },
    { "--tls",        &opt.tls,        0, 1, "speak TLS" },
};
#define OPTIONS (sizeof options / sizeof options[0])

static void options_read(int argc, char **argv) {
    for (int i = 1; i < argc; i += 2) {
        size_t o = 0;
        char *end = NULL;
        while (o < OPTIONS && strcmp(argv[i], options[o].name) != 0) o++;
        if (o == OPTIONS) {
            for (o = 0; o < OPTIONS; o++)
                fprintf(stderr, "  %-13s N  %s (%" PRIu64 ")\n", options[o].name, options[o].help,
                        *options[o].value);
            die("no such option: %s", argv[i]);
        }
        uint64_t value = i + 1 < argc ? strtoull(argv[i + 1], &end, 10) : 0;
        if (!end || *end || end == argv[i + 1] || value < options[o].min || value > options[o].max)
            die("%s: %" PRIu64 " to %" PRIu64, argv[i], options[o].min, options[o].max);
        *options[o].value = value;
    }
    if (opt.per_room) opt.senders = opt.per_room * opt.rooms;
    if (opt.senders > opt.clients) die("--senders: more than clients");
    if (opt.orders && !opt.gateway) die("--orders: no --gateway");
}

/* Fewer descriptors than clients are better found out before the start. */
static void descriptors_raise(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0) return;
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < opt.clients + 16)
        die("--clients: the limit of descriptors is %" PRIu64, (uint64_t)limit.rlim_cur);
}

int main(int argc, char **argv) {
    options_read(argc, argv);
    descriptors_raise();
    template_prepare();
    load.clients = xcalloc(opt.clients + 1, sizeof *load.clients);
    for (size_t i = 0; i < opt.clients; i++)
        load.clients[i].tracks = xcalloc(opt.senders / opt.rooms + 1, sizeof(struct track));
    if (opt.tls && !(load.tls = SSL_CTX_new(TLS_client_method()))) die("out of memory");
    if (opt.tls) SSL_CTX_set_mode(load.tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    if (!wait_open(opt.clients + 1)) die("wait: %s", strerror(errno));

    double dirty = server_memory("Private_Dirty:"), resident = server_memory("Rss:");
    double cpu = server_cpu_ns(), clients = (double)opt.clients;
    uint64_t start_ns = clock_ns();
    connect_all();
    double span_ns = (double)(clock_ns() - start_ns);
    if (opt.orders) back_end_open();
    wait_quiet(opt.senders > 0 ? SETTLE_NS : TIDY_NS, UINT64_MAX);
    printf("clients=%.0f rooms=%" PRIu64 " senders=%" PRIu64 " logins_s=%.0f login_cpu_us=%.1f"
           " dirty_each=%.0f rss_each=%.0f login_bytes=%.0f", clients, opt.rooms, opt.senders,
           clients / span_ns * 1e9, cpu < 0 ? -1 : (server_cpu_ns() - cpu) / clients / 1000,
           dirty < 0 ? -1 : (server_memory("Private_Dirty:") - dirty) / clients,
           resident < 0 ? -1 : (server_memory("Rss:") - resident) / clients, (double)load.received / clients);
    if (opt.senders > 0) run_and_report();
    printf(" lost=%" PRIu64 " duplicate=%" PRIu64 " late=%" PRIu64 " orders=%" PRIu64
           " stray=%" PRIu64 " closed=%" PRIu64 "\n", result.lost, result.duplicate, result.late,
           result.orders, result.stray, result.closed);
    return (result.lost | result.duplicate | result.late | result.orders | result.stray
            | result.closed) != 0;
}
