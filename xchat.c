/* xchat: a small chat server. JSON over WebSocket, and a page to talk from. Existing
 * workerman-chat pages and the xchat iOS app work with it unchanged.
 *
 *     cc -O2 -o xchat xchat.c -lssl -lcrypto && ./xchat
 *
 * then open http://localhost:7272/ in two windows and talk.
 *
 * Contents. The file reads bottom-up: what is called stands above its caller.
 *
 *      1. Bytes               slices, growable buffers, UTF-8, clock, log
 *      2. JSON                strict reader that borrows, writer that escapes
 *      3. Tables              one hash table, for rooms, clients, addresses
 *      4. The loop            connections around one poll(2): read, write, close
 *      5. HTTP and WebSocket  request heads, the upgrade, frames, close codes
 *      6. History             files of lines: nothing that was seen is lost
 *      7. Rooms               a room is a log, a member is a cursor in it
 *      8. Push                phones whose app is asleep are woken, through Apple
 *      9. Chat                login, say, logout: the protocol people know
 *     10. Back end            orders from a site in PHP: GatewayClient, workers
 *     11. HTTP API            the same for everybody else
 *     12. Page                the built-in web client, one HTML file
 *     13. Main                options, listeners, privileges, signals
 *
 * The life of one message, from a browser's "hello" to a hundred screens:
 *
 *     poll(2) wakes       loop_run        a client's socket has bytes
 *     read                conn_read       up to 64 KB, into one shared buffer
 *     cut into frames     ws_feed         unmask, check UTF-8: one text message
 *     understand          chat_message    check the rate, pick fields out of the JSON
 *     answer              chat_say        HTML-escape, write one JSON object
 *     keep                room_say        a line of history, with an id
 *        ... other ready sockets have their turn in this round ...
 *     store               history_commit  one write() a room, to its file
 *     append, once        room_publish    one encoded frame, to the room's log
 *     remember absent     push_said       phones that are not connected get a push
 *     send                room_flush      one send() a member, from its cursor to the
 *                         conn_flush      end of the log, however much has come
 *
 * Ten messages in one round still cost one send() a member, and a member who does
 * not read costs one integer, not a queue. That is the whole trick.
 *
 * Three words about memory: who OWNS something frees it; an argument is BORROWED,
 * valid until the callee returns; unless the callee TAKES it, and owns it then.
 *
 * Copyright (c) 2026 the xchat authors
 * SPDX-License-Identifier: MIT
 */
#if defined(__linux__) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE        /* chroot(), initgroups(), syscall(); others than Linux show them anyway */
#endif
#define _FILE_OFFSET_BITS 64   /* files over 2 GB on 32-bit machines... */
#define _TIME_BITS 64          /* ...and times behind January 2038 */
#include <arpa/inet.h>
#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <math.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <openssl/ecdsa.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/sha.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

/* OpenSSL 3 takes the end of TCP without a goodbye of TLS for an error, unless it is told. */
#ifndef SSL_OP_IGNORE_UNEXPECTED_EOF
#define SSL_OP_IGNORE_UNEXPECTED_EOF 0
#endif

/* Linux can wait for many without looking at each (chapter 4); -DXCHAT_PURE_POLL does
 * without that, as other systems must. */
#if defined(__linux__) && !defined(XCHAT_PURE_POLL)
#include <sys/epoll.h>
#define PARKING 1
#else
#define PARKING 0
#endif

/* Linux lets a process give up what it will not need (chapter 13). */
#ifdef __linux__
#include <sys/prctl.h>
#include <sys/syscall.h>
static void no_new_privileges(void) { prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); }   /* by set-uid programs */
#else
static void no_new_privileges(void) {}
#endif
#if defined(__linux__) && defined(__has_include) && !defined(XCHAT_NO_LANDLOCK)
#if __has_include(<linux/landlock.h>) && defined(SYS_landlock_restrict_self)
#include <linux/landlock.h>
#define LANDLOCK 1
#endif
#endif

/* Tests let the minutes of chapter 8 pass faster. */
#ifndef PUSH_SPEED
#define PUSH_SPEED 1
#endif

#if defined(__GNUC__)
#define PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define PRINTF(text, first)
#endif

/* glibc keeps large blocks in its heap once it has freed one, between the small ones
 * of a thousand clients. We want them back with the system after every peak, but not
 * after each log-in: that would cost a third of it. */
#ifdef __GLIBC__
#include <malloc.h>
static void memory_init(void) { mallopt(M_MMAP_THRESHOLD, 65536), mallopt(M_TRIM_THRESHOLD, 4 << 20); }
static void memory_trim(void) { malloc_trim(0); }
#else
static void memory_init(void) {}
static void memory_trim(void) {}
#endif

/* The limits a user may set: chapter 13 fills them in before anything else runs,
 * the others only read them. */
static struct {
    uint32_t port, max_message, max_head, max_clients, max_per_address, max_rooms, version, help;
    uint32_t rate, burst, backlog, ping_s, timeout_s, retain, segment, fsync, verbose, apns_format, check;
    const char *data, *tls_cert, *tls_key;
    const char *apns, *apns_cert, *apns_key, *apns_key_id, *apns_team_id, *apns_topic, *apns_ca;
    const char *apns_passphrase_file, *push_content, *push_test, *push_text, *admin, *user, *chroot, *origin;
    const char *gateway, *reg, *join, *gateway_key_file, *admin_key_file, *make_token;
} opt;

/* Limits that nobody has asked to change yet. */
enum {
    NAME_MAX_BYTES = 64, ROOM_MAX_BYTES = 128, REF_MAX_BYTES = 64,
    ROOMS_PER_CLIENT = 64,
    KEPT_ROOMS = 2,           /* of these, for what a client does itself: its room, its user's inbox */
    SECRET_MIN = 16, SECRET_MAX = 1024,
    LEEWAY_S = 30, PASS_S = 86400,   /* how far clocks may be apart; how long --make-token lasts */
    JSON_DEPTH = 32,          /* arrays and objects inside each other */
    FRAGMENTS_MAX = 10000,    /* frames that make up one message */
    READ_BYTES = 65536,       /* read from one connection in one round, or from a file */
    HISTORY_MAX = 200,        /* messages in one answer... */
    HISTORY_BYTES = 262144,   /* ...and bytes, unless one message is longer */
    REPLAY_BYTES = 32768,     /* in one piece of a longer one, about... */
    REPLAY_MAX = 65536,       /* ...and at most, unless one message is longer */
    MEMORY_BYTES = 32768,     /* of history kept for a room without --data... */
    IDLE_LOGS = 1024,         /* ...and for how many empty rooms */
    LINE_MAX_BYTES = 7 << 24, /* of history: an escaped message, whatever --max-message */
    FILE_NAME_BYTES = 200,    /* file systems take 255 */
    REFUSED_MAX = 8,          /* connections beyond a limit that get an answer, at a time */
    ACCEPTED_MAX = 16,        /* connections that one listener accepts in one round */
    TLS_RECORD = 16384,       /* bytes that TLS encrypts, and we hand to it, at once */
    OUT_HIGH = 65536,         /* who has more unread answers is not read from */
    TICKETS_MAX = 16,         /* messages of TLS itself that a gateway may send in one round */
    PARKED_READY = 1024,      /* parked connections that are handled in one round */
    TICK_MS = 1000,           /* how often deadlines are looked at */
    MOVED_MANY = 64,          /* so many connections that came or went may leave holes in the heap */
    CLOSE_MS = 5000,          /* to send the rest, and to see the peer go */
    LOG_LINE_MAX = 480        /* bytes; the rest is cut */
};

/* ==========================================================================
 * 1. Bytes
 * ==========================================================================
 *
 * C strings end at the first NUL and do not know their length; what comes from a
 * network holds NULs and has a length. So text is a SLICE here: pointer and length,
 * passed by value, into memory that somebody else owns.
 *
 *     GET /health HTTP/1.1\r\n...        never NUL-terminated: print a slice with
 *         ^-----^  p, len 7              "%.*s" and F(s)
 *
 * What grows is a BUFFER, which owns its bytes and can lose its front:
 *
 *           p                off           off + len           cap
 *     | cap | dropped        | live bytes  | room to grow      |
 *
 * A connection has several, empty as long as it is idle: so `cap` is kept in front of the bytes.
 * Dropping moves `off`; bytes move back to p only when more than half of the space is
 * dropped, so about once in their life. Every buffer that the network can fill has a
 * limit elsewhere; out of memory ends the program, with a line in the log.
 *
 * Owns: the clock of this round. Calls: libc, OpenSSL. Called by: everybody.
 */

typedef struct {
    const char *p;
    size_t len;
} slice;

#define S(literal) ((slice){"" literal "", sizeof(literal) - 1})
#define F(s) (int)(s).len, (s).p

static slice slice_of(const char *s) { return (slice){s, strlen(s)}; }
static slice slice_take(slice s, size_t n) { return assert(n <= s.len), (slice){s.p, n}; }
static slice slice_cut(slice s, size_t n) { return assert(n <= s.len), (slice){s.p + n, s.len - n}; }
static bool slice_eq(slice a, slice b) { return a.len == b.len && memcmp(a.p, b.p, a.len) == 0; }
static bool slice_starts(slice s, slice head) { return s.len >= head.len && memcmp(s.p, head.p, head.len) == 0; }
static char lower(char c) { return c >= 'A' && c <= 'Z' ? (char)(c + ('a' - 'A')) : c; }
static char upper(char c) { return c >= 'a' && c <= 'z' ? (char)(c - ('a' - 'A')) : c; }
static bool is_alnum(char c) { return (lower(c) >= 'a' && lower(c) <= 'z') || (c >= '0' && c <= '9'); }

static bool slice_eqcase(slice a, slice b) {
    size_t i = 0;
    while (i < a.len && i < b.len && lower(a.p[i]) == lower(b.p[i])) i++;
    return a.len == b.len && i == a.len;
}

/* Without blanks and tabs at both ends. */
static slice slice_trim(slice s) {
    while (s.len > 0 && (*s.p == ' ' || *s.p == '\t')) s = slice_cut(s, 1);
    while (s.len > 0 && (s.p[s.len - 1] == ' ' || s.p[s.len - 1] == '\t')) s.len--;
    return s;
}

/* Takes what stands before the first `at` off `rest`, and the `at` with it. */
static slice slice_split(slice *rest, char at) {
    const char *end = memchr(rest->p, at, rest->len);
    slice head = slice_take(*rest, end != NULL ? (size_t)(end - rest->p) : rest->len);
    *rest = slice_cut(*rest, head.len + (end != NULL ? 1 : 0));
    return head;
}

/* At most 15 digits of this base; -1 for anything else. */
static int64_t slice_number(slice s, int base) {
    int64_t n = s.len > 0 && s.len <= 15 ? 0 : -1;
    for (size_t i = 0; i < s.len && n >= 0; i++) {
        char c = lower(s.p[i]);
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : base;
        n = digit < base ? n * base + digit : -1;
    }
    return n;
}

/* The clock is read once a round, so that a round happens at one time. */
static struct {
    int64_t ms;      /* monotonic: for deadlines */
    time_t wall;     /* what a person's watch says... */
    char text[20];   /* ...as "2026-11-23 09:00:00", local time */
} now;

static void clock_read(void) {
    struct timespec t;
    struct tm tm;
    time_t wall = time(NULL);
    clock_gettime(CLOCK_MONOTONIC, &t);
    now.ms = (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
    if (wall != now.wall && localtime_r(&wall, &tm) != NULL)
        strftime(now.text, sizeof now.text, "%Y-%m-%d %H:%M:%S", &tm);
    now.wall = wall;
}

/* One event, one line on stderr. Control characters would let a peer write lines of its
 * own, and bytes above 0x7e differ between terminals: both are \xHH. errno stays. */
PRINTF(2, 3) static void log_line(const char *level, const char *format, ...) {
    char raw[LOG_LINE_MAX], line[4 * LOG_LINE_MAX + 64];
    int saved = errno, at = snprintf(line, sizeof line, "%s %-5s ", now.text, level);
    va_list args;
    va_start(args, format);
    int n = vsnprintf(raw, sizeof raw, format, args);
    va_end(args);
    for (int i = 0; i < n && i < LOG_LINE_MAX - 1; i++) {
        bool plain = raw[i] >= ' ' && raw[i] <= '~' && raw[i] != '\\';
        at += snprintf(line + at, sizeof line - (size_t)at, plain ? "%c" : "\\x%02x", (unsigned char)raw[i]);
    }
    at += snprintf(line + at, sizeof line - (size_t)at, n >= LOG_LINE_MAX ? "...\n" : "\n");
    while (write(STDERR_FILENO, line, (size_t)at) < 0 && errno == EINTR) continue;
    errno = saved;
}

#define log_info(...) log_line("info", __VA_ARGS__)
#define log_warn(...) log_line("warn", __VA_ARGS__)
#define log_debug(...) (opt.verbose ? log_line("debug", __VA_ARGS__) : (void)0)
#define die(...) (log_line("error", __VA_ARGS__), exit(1))     /* cannot start, or go on */
#define usage(...) (log_line("error", __VA_ARGS__), exit(2))   /* a wrong option */

enum { BUF_HEAD = 8 };   /* bytes in front of p, with `cap` as the last of them */

struct buf {
    char *p;
    uint32_t off, len;
};

static void *xrealloc(void *p, size_t n) {
    if ((p = realloc(p, n)) == NULL) die("out of memory (%zu bytes)", n);
    return p;
}

/* OpenSSL needs memory for a hash; what it leaves there without is not one, and may be a secret. */
static void sha256(slice s, unsigned char hash[SHA256_DIGEST_LENGTH]) {
    if (SHA256((const unsigned char *)s.p, s.len, hash) == NULL) die("out of memory (SHA-256)");
}

static void *xcalloc(size_t n) { return memset(xrealloc(NULL, n), 0, n); }
static slice buf_slice(const struct buf *b) { return b->len > 0 ? (slice){b->p + b->off, b->len} : S(""); }

static uint32_t buf_cap(const struct buf *b) {
    return b->p != NULL ? *(uint32_t *)(void *)(b->p - sizeof(uint32_t)) : 0;
}

static void buf_free(struct buf *b) {
    if (b->p != NULL) free(b->p - BUF_HEAD);
    *b = (struct buf){0};
}

/* Makes room for n more bytes, and has less than twice what was in it at most. Returns where the caller
 * writes them; it adds to `len`. */
static char *buf_room(struct buf *b, size_t n) {
    size_t need = b->len + n, cap = buf_cap(b), twice = 2 * (need < cap ? need : cap);
    size_t more = need < 2 * cap ? twice : (need + 271) / 256 * 256 - 16;
    if (need > INT32_MAX) die("a buffer of %zu bytes is beyond every limit", need);
    if (b->off + need > cap) {
        bool fits = need <= cap && b->off >= cap / 2;
        if (b->len > 0) memmove(b->p, b->p + b->off, b->len);
        b->off = 0;
        if (fits) return b->p + b->len;
        if (more > INT32_MAX) more = INT32_MAX;
        b->p = (char *)xrealloc(b->p != NULL ? b->p - BUF_HEAD : NULL, BUF_HEAD + more) + BUF_HEAD;
        *(uint32_t *)(void *)(b->p - sizeof(uint32_t)) = (uint32_t)more;
    }
    return b->p + b->off + b->len;
}

static void buf_add(struct buf *b, slice s) {
    if (s.len == 0) return;
    memcpy(buf_room(b, s.len), s.p, s.len);
    b->len += (uint32_t)s.len;
}

static void buf_addc(struct buf *b, char c) { buf_add(b, (slice){&c, 1}); }

/* Appends a number of so many bytes, the highest first, as networks have it. */
static void buf_be(struct buf *b, uint64_t number, int bytes) {
    while (bytes-- > 0) buf_addc(b, (char)(number >> 8 * bytes));
}

static uint32_t be32(const char *p) {
    const unsigned char *u = (const unsigned char *)p;
    return (uint32_t)u[0] << 24 | (uint32_t)u[1] << 16 | (uint32_t)u[2] << 8 | u[3];
}

PRINTF(2, 3) static void buf_printf(struct buf *b, const char *format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    b->len += (uint32_t)vsnprintf(buf_room(b, (size_t)n + 1), (size_t)n + 1, format, again);
    va_end(again);
    va_end(args);
}

/* Forgets n bytes at the front. */
static void buf_drop(struct buf *b, size_t n) {
    assert(n <= b->len);
    b->len -= (uint32_t)n;
    b->off = b->len > 0 ? b->off + (uint32_t)n : 0;
}

static void buf_clear(struct buf *b) { buf_drop(b, b->len); }

/* UTF-8 (RFC 3629), checked as the bytes come; zeroed between two characters.
 *
 *     first byte   following bytes          why the second byte is special
 *     00..7f       -
 *     c2..df       1                        c0, c1 would be overlong
 *     e0..ef       2   e0: then a0..bf      shorter ones would be overlong
 *                      ed: then 80..9f      above are the surrogates
 *     f0..f4       3   f0: then 90..bf      shorter ones would be overlong
 *                      f4: then 80..8f      above U+10FFFF
 */
struct utf8 {
    uint8_t missing, min, max;   /* following bytes to come, and what the next may be */
};

/* False at the first byte that no valid text could have there. At the end of the
 * text `missing` must be 0. */
static bool utf8_feed(struct utf8 *u, slice s) {
    for (size_t i = 0; i < s.len; i++) {
        for (uint64_t eight; u->missing == 0 && s.len - i > 8; i += 8) {   /* plain ASCII */
            memcpy(&eight, s.p + i, 8);
            if ((eight & 0x8080808080808080u) != 0) break;
        }
        unsigned char c = (unsigned char)s.p[i];
        if (u->missing > 0) {
            if (c < u->min || c > u->max) return false;
            *u = (struct utf8){(uint8_t)(u->missing - 1), 0x80, 0xbf};
        } else if (c >= 0x80) {
            if (c < 0xc2 || c > 0xf4) return false;
            u->missing = c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : 1;
            u->min = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
            u->max = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
        }
    }
    return true;
}

static bool utf8_valid(slice s) {
    struct utf8 u = {0};
    return utf8_feed(&u, s) && u.missing == 0;
}

/* ==========================================================================
 * 2. JSON
 * ==========================================================================
 *
 * A message is one JSON object (RFC 8259). We look at a handful of its fields and
 * must reject it as a whole when anything in it is wrong. One walk over the text does
 * both: it checks every byte, and notes where the wanted values stand. Nothing is
 * copied, nothing is allocated:
 *
 *     {"type":"say", "content":"a\u00e9b", "extra":[1,{}]}
 *             ^---^            ^--------^
 *             raw values: slices of the input, quotes included
 *
 * The only stack is one bit per open bracket, 1 for an object and 0 for an array, so
 * a million "[" cost what 33 of them cost: the limit is reached.
 *
 * Strings are decoded when somebody wants their text, into a buffer of the caller.
 *
 * Owns: nothing. Calls: 1 Bytes. Called by: 6 History, 7 Rooms, 8 Push, 9 Chat, 10 Back end, 11 HTTP API.
 * Promises: never reads outside the text, never recurses.
 */

struct json {          /* a reader */
    slice rest;
    const char *why;   /* once set: what is wrong at its front */
};

struct json_field {
    const char *name;  /* wanted */
    slice raw;         /* found: a slice of the text; p is NULL when it is missing */
};

static bool json_fail(struct json *j, const char *why) {
    if (j->why == NULL) j->why = why;
    return false;
}

/* Is one of these characters next? */
static bool json_at(const struct json *j, const char *set) {
    return j->rest.len > 0 && *j->rest.p != '\0' && strchr(set, *j->rest.p) != NULL;
}

/* Skips such characters, `most` of them; returns how many. */
static size_t json_skip(struct json *j, const char *set, size_t most) {
    size_t n = 0;
    for (; n < most && json_at(j, set); n++) j->rest = slice_cut(j->rest, 1);
    return n;
}

static void json_space(struct json *j) { json_skip(j, " \t\n\r", SIZE_MAX); }
static bool json_digits(struct json *j) { return json_skip(j, "0123456789", SIZE_MAX) > 0; }

/* Takes this character if it comes next, behind white space. */
static bool json_take(struct json *j, const char *c) {
    json_space(j);
    return j->why == NULL && json_skip(j, c, 1) > 0;
}

/* The \uXXXX at the front, or -1. */
static int64_t json_unit(slice s) {
    return s.len >= 6 && s.p[0] == '\\' && s.p[1] == 'u' ? slice_number((slice){s.p + 2, 4}, 16) : -1;
}

/* Decodes one character of a string: `text` moves behind it, `out` gets its UTF-8 bytes.
 * Returns how many; 0 for a bad escape. A half of a surrogate pair is only right beside
 * the other one (RFC 8259, section 7). */
static size_t json_char(slice *text, char out[4]) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    static const unsigned char head[] = {0, 0, 0xc0, 0xe0, 0xf0};
    char c = text->len > 1 && *text->p == '\\' ? text->p[1] : '\0';
    const char *plain = c != '\0' ? strchr(from, c) : NULL;
    size_t used = *text->p != '\\' ? 1 : plain != NULL ? 2 : 6, n = 1;
    out[0] = plain != NULL ? to[plain - from] : *text->p;
    if (used == 6) {
        int64_t code = json_unit(*text), low = code >= 0xd800 && code < 0xdc00 ? json_unit(slice_cut(*text, 6)) : -1;
        if (low >= 0xdc00 && low < 0xe000) code = 0x10000 + (code - 0xd800) * 0x400 + (low - 0xdc00), used = 12;
        if (code < 0 || (code >= 0xd800 && code < 0xe000)) return 0;
        n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
        for (size_t i = n; i-- > 0; code >>= 6)
            out[i] = (char)(i > 0 ? 0x80 | (code & 0x3f) : head[n] | code);
    }
    *text = slice_cut(*text, used);
    return n;
}

/* What follows the quote that begins a string. */
static bool json_string(struct json *j) {
    char out[4];
    while (j->rest.len > 0 && *j->rest.p != '"') {
        if ((unsigned char)*j->rest.p < 0x20) return json_fail(j, "raw control character in a string");
        if (*j->rest.p != '\\') j->rest = slice_cut(j->rest, 1);
        else if (json_char(&j->rest, out) == 0)
            return json_fail(j, "bad escape, or half a surrogate pair, in a string");
    }
    return json_skip(j, "\"", 1) > 0 || json_fail(j, "string without an end");
}

/* -? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)? */
static bool json_number(struct json *j) {
    json_skip(j, "-", 1);
    bool zero = json_skip(j, "0", 1) > 0, ok = json_digits(j) != zero;
    if (ok && json_skip(j, ".", 1) > 0) ok = json_digits(j);
    if (ok && json_skip(j, "eE", 1) > 0) {
        json_skip(j, "+-", 1);
        ok = json_digits(j);
    }
    return ok || json_fail(j, "bad number");
}

/* A string, a number, true, false or null. */
static bool json_scalar(struct json *j) {
    const slice words[] = {S("true"), S("false"), S("null")};
    if (json_skip(j, "\"", 1) > 0) return json_string(j);
    if (json_at(j, "-0123456789")) return json_number(j);
    for (size_t i = 0; i < 3; i++)
        if (slice_starts(j->rest, words[i])) return j->rest = slice_cut(j->rest, words[i].len), true;
    return json_fail(j, j->rest.len > 0 ? "a value was expected" : "the text ends too early");
}

/* The key of a member, and its colon; returns the raw key. */
static slice json_key(struct json *j) {
    json_space(j);
    slice key = j->rest;
    if (json_skip(j, "\"", 1) == 0) json_fail(j, "a key in quotes was expected");
    else json_string(j);
    key.len -= j->rest.len;
    if (!json_take(j, ":")) json_fail(j, "':' was expected");
    return key;
}

static slice json_inside(slice raw) { return (slice){raw.p + 1, raw.len - 2}; }

/* Is this raw string the text `name`? "\u0074ype" is "type". */
static bool json_is(slice raw, const char *name) {
    if (raw.len < 2 || *raw.p != '"') return false;
    slice rest = json_inside(raw), wanted = slice_of(name);
    char utf8[4] = "";
    if (memchr(rest.p, '\\', rest.len) == NULL) return slice_eq(rest, wanted);   /* most are so */
    while (rest.len > 0) {
        slice c = {utf8, json_char(&rest, utf8)};
        if (!slice_starts(wanted, c)) return false;
        wanted = slice_cut(wanted, c.len);
    }
    return wanted.len == 0;
}

/* Checks the whole text and finds the wanted fields of its object; of a key that
 * comes twice the last one wins. Returns NULL, or what is wrong at byte *at. */
static const char *json_pick(slice text, struct json_field *fields, size_t n, size_t *at) {
    struct json j = {text, utf8_valid(text) ? NULL : "not UTF-8"};
    uint64_t objects = 0;   /* bit 0: is the innermost open bracket an object? */
    int depth = 0;
    slice name = S(""), start = S("");   /* the member of the outer object that we are in */
    do {
        slice key = (objects & 1) != 0 ? json_key(&j) : S("");
        json_space(&j);
        if (depth == 0 && !json_at(&j, "{")) json_fail(&j, "an object was expected");
        if (depth == 1) name = key, start = j.rest;
        bool object = json_take(&j, "{");
        if (object || json_take(&j, "[")) {
            if (++depth > JSON_DEPTH) json_fail(&j, "nested too deeply");
            objects = objects << 1 | (object ? 1 : 0);
            json_space(&j);
            if (!json_at(&j, object ? "}" : "]")) continue;
        } else {
            json_scalar(&j);
        }
        /* Behind a value: close brackets until there is a next value. */
        while (depth > 0 && j.why == NULL) {
            for (size_t i = 0; i < n && depth == 1; i++)
                if (json_is(name, fields[i].name)) fields[i].raw = slice_take(start, start.len - j.rest.len);
            if (json_take(&j, ",")) break;
            if (!json_take(&j, objects & 1 ? "}" : "]")) json_fail(&j, "',' or a closing bracket was expected");
            depth--, objects >>= 1;
        }
    } while (depth > 0 && j.why == NULL);
    json_space(&j);
    if (j.rest.len > 0) json_fail(&j, "text behind the object");
    *at = text.len - j.rest.len;
    return j.why;
}

/* Takes the next value off `rest`, what is inside the brackets of an array or object that was
 * checked; the keys of an object are passed over. False: there is none. */
static bool json_each(slice *rest, slice *value) {
    struct json j = {*rest, NULL};
    do {   /* once more behind a key */
        int depth = 0;
        json_skip(&j, ",: \t\n\r", SIZE_MAX);
        *value = j.rest;
        while (j.rest.len > 0 && (depth > 0 || !json_at(&j, ",: \t\n\r"))) {
            if (json_skip(&j, "\"", 1) > 0) json_string(&j);
            else if (json_skip(&j, "[{", 1) > 0) depth++;
            else if (json_skip(&j, "]}", 1) > 0) depth--;
            else j.rest = slice_cut(j.rest, 1);
        }
        value->len -= j.rest.len;
        json_space(&j);
    } while (json_at(&j, ":"));
    *rest = j.rest;
    return value->len > 0;
}

/* A number in the shortest of the forms that read back: 1.50 is "1.5", 1e3 is "1000".
 * False for one that a double cannot hold. */
static bool json_number_text(slice raw, struct buf *b) {
    char text[64] = "";
    memcpy(text, raw.p, raw.len < sizeof text ? raw.len : 0);
    double value = strtod(text, NULL);
    errno = 0;
    strtoll(text, NULL, 10);
    bool whole = strpbrk(text, ".eE") == NULL && errno == 0;
    if (*text == '\0' || !isfinite(value)) return false;
    if (!whole) snprintf(text, sizeof text, "%.15g", value);
    if (strtod(text, NULL) != value) snprintf(text, sizeof text, "%.17g", value);
    buf_add(b, slice_of(text));
    return true;
}

/* Appends the text of a raw value as PHP would turn it into a string: true is "1";
 * false, null and nothing are "". False for an array, an object and an impossible number. */
static bool json_text(slice raw, struct buf *b) {
    char c = raw.p != NULL ? *raw.p : 'n';
    slice rest = c == '"' ? json_inside(raw) : c == 't' ? S("1") : S("");
    while (rest.len > 0) {
        slice tail = rest, plain = slice_split(&tail, '\\');
        buf_add(b, plain);
        rest = slice_cut(rest, plain.len);
        if (rest.len > 0) b->len += (uint32_t)json_char(&rest, buf_room(b, 4));
    }
    return c == '-' || (c >= '0' && c <= '9') ? json_number_text(raw, b) : c != '{' && c != '[';
}

/* The same in an emptied buffer, and nothing at all for what has no text. */
static slice json_get(slice raw, struct buf *b) {
    buf_clear(b);
    if (!json_text(raw, b)) buf_clear(b);
    return buf_slice(b);
}

/* ---- Writing. A message is built in a buffer, from the outside in:
 *
 *     buf_addc(b, '{');                      {
 *     json_add(b, "type", S("say"));         {"type":"say"
 *     buf_addc(b, '}');                      {"type":"say"}
 *
 * Text stays UTF-8. The clients of this protocol put names and contents into their
 * pages as HTML, so text of people becomes HTML on its way in (html_escape). ---- */

static const struct escapes {
    const char *from, *to[8];   /* characters, and what stands for each */
    bool controls;              /* are other control characters escaped? */
    bool breaks;                /* are two different line ends in a row one? */
} json_escapes = {"\"\\\b\f\n\r\t", {"\\\"", "\\\\", "\\b", "\\f", "\\n", "\\r", "\\t"}, true, false},
  php_escapes = {"\"\\\b\f\n\r\t/", {"\\\"", "\\\\", "\\b", "\\f", "\\n", "\\r", "\\t", "\\/"}, true, false},
  html_escapes = {"&<>\"'", {"&amp;", "&lt;", "&gt;", "&quot;", "&#039;"}, false, false},
  html_breaks = {"&<>\"'\n\r", {"&amp;", "&lt;", "&gt;", "&quot;", "&#039;", "<br />\n", "<br />\r"}, false, true};

/* Appends s, escaped; what needs no change is copied in long pieces. */
static void escape(struct buf *b, slice s, const struct escapes *e) {
    size_t run = 0;
    for (size_t i = 0; i < s.len; i++) {
        unsigned char c = (unsigned char)s.p[i];
        if (c >= 0x80 || c == ' ' || is_alnum((char)c)) continue;   /* most of what people write */
        const char *at = c != '\0' ? strchr(e->from, c) : NULL;
        if (at == NULL && (c >= 0x20 || !e->controls)) continue;
        buf_add(b, (slice){s.p + run, i - run});
        if (at != NULL) buf_add(b, slice_of(e->to[at - e->from]));
        else buf_printf(b, "\\u%04x", c);
        run = i + 1;
        if (e->breaks && (c == '\n' || c == '\r') && run < s.len && s.p[run] == '\n' + '\r' - c) i++;
    }
    buf_add(b, slice_cut(s, run));
}

static void json_quote(struct buf *b, slice s) {
    buf_addc(b, '"');
    escape(b, s, &json_escapes);
    buf_addc(b, '"');
}

/* What stands in front of a key, or of a value in an array: a comma, unless it is the first. */
static void json_comma(struct buf *b) {
    char last = b->len > 0 ? b->p[b->off + b->len - 1] : '{';
    if (last != '{' && last != '[') buf_addc(b, ',');
}

/* The key of a member, and its colon; the value is up to the caller. */
static void json_name(struct buf *b, const char *name) {
    json_comma(b);
    json_quote(b, slice_of(name));
    buf_addc(b, ':');
}

static void json_add(struct buf *b, const char *name, slice value) {
    json_name(b, name);
    json_quote(b, value);
}

/* Appends text as HTML. If `breaks`, each line end (\n, \r\n, \n\r or \r) gets a
 * "<br />" in front, and stays. */
static void html_escape(struct buf *b, slice s, bool breaks) { escape(b, s, breaks ? &html_breaks : &html_escapes); }

/* Appends what html_escape() was given, but without tags. */
static void html_text(struct buf *b, slice s) {
    while (s.len > 0) {
        slice rest = s, tag = *s.p == '<' ? slice_split(&rest, '>') : S("");
        size_t i = 0;
        while (*s.p == '&' && html_escapes.to[i] != NULL && !slice_starts(s, slice_of(html_escapes.to[i]))) i++;
        bool entity = *s.p == '&' && html_escapes.to[i] != NULL;
        if (tag.len == 0) buf_addc(b, entity ? html_escapes.from[i] : *s.p);
        s = tag.len > 0 ? rest : slice_cut(s, entity ? strlen(html_escapes.to[i]) : 1);
    }
}

/* ==========================================================================
 * 3. Tables
 * ==========================================================================
 *
 * Rooms, clients and addresses are found by name in a hash table with linear probing:
 * an item stands in the slot its hash names or, if that is taken, in the next free one
 * behind it (slot 0 follows the last).
 *
 * Emptying a slot would cut off the items that were pushed behind it. So the hole is
 * filled from behind, as long as something there may move:
 *
 *     slot    1   2   3   4   5          a, b, d hash to 1; c to 4
 *           | a | b | d | c |   |        remove a: b may move to 1, then d to 2;
 *           | b | d |   | c |   |        c is at home, and 5 is empty: done
 *
 * Names come from strangers, who could choose a thousand that hash alike: the hash is
 * a cryptographic one, keyed with random bytes. It is not fast, but looking up is rare.
 *
 * Owns: the key of the hash. Calls: 1 Bytes.
 * Called by: 5 HTTP and WebSocket, 6 History, 7 Rooms, 8 Push, 9 Chat.
 */

enum { TABLE_KEY_MAX = 400 };   /* a device token; "rooms/" and a name have less */

static struct {
    unsigned char secret[16];
} tables;

struct table {
    slice (*key)(const void *item);   /* the key, at most TABLE_KEY_MAX bytes, is in the item */
    void **slot;
    size_t cap, n;                    /* cap is 0 or a power of two */
};

/* Nobody may learn the lower half, which chooses the slot. */
static uint64_t table_hash(slice key) {
    char text[sizeof tables.secret + TABLE_KEY_MAX];
    unsigned char hash[SHA256_DIGEST_LENGTH];
    uint64_t n;
    assert(key.len <= TABLE_KEY_MAX);
    memcpy(text, tables.secret, sizeof tables.secret);
    memcpy(text + sizeof tables.secret, key.p, key.len);
    sha256((slice){text, sizeof tables.secret + key.len}, hash);
    memcpy(&n, hash, sizeof n);
    return n;
}

static size_t table_home(const struct table *t, slice key) { return (size_t)table_hash(key) & (t->cap - 1); }

/* The slot where an item of this key is, or where it would go. */
static size_t table_slot(const struct table *t, slice key) {
    size_t i = table_home(t, key);
    while (t->slot[i] != NULL && !slice_eq(t->key(t->slot[i]), key)) i = (i + 1) & (t->cap - 1);
    return i;
}

/* The item of this key, or NULL. */
static void *table_find(const struct table *t, slice key) { return t->cap > 0 ? t->slot[table_slot(t, key)] : NULL; }

/* One item after the other, in no order; `at` begins as 0. NULL: that were all. */
static void *table_next(const struct table *t, size_t *at) {
    while (*at < t->cap && t->slot[*at] == NULL) (*at)++;
    return *at < t->cap ? t->slot[(*at)++] : NULL;
}

static void table_resize(struct table *t, size_t cap) {
    struct table next = {t->key, xcalloc(cap * sizeof(void *)), cap, t->n};
    size_t at = 0;
    for (void *item; (item = table_next(t, &at)) != NULL;) next.slot[table_slot(&next, t->key(item))] = item;
    free(t->slot);
    *t = next;
}

/* Borrows the item until it is removed. Its key must not be in the table. */
static void table_add(struct table *t, void *item) {
    if ((t->n + 1) * 4 > t->cap * 3) table_resize(t, t->cap > 0 ? t->cap * 2 : 8);
    t->slot[table_slot(t, t->key(item))] = item;
    t->n++;
}

/* Takes out the item of this key, which must be there. */
static void table_remove(struct table *t, slice key) {
    size_t mask = t->cap - 1, hole = table_slot(t, key);
    for (size_t i = (hole + 1) & mask; t->slot[i] != NULL; i = (i + 1) & mask) {
        /* May it move? Not if its home is between the hole and where it is. */
        if (((i - table_home(t, t->key(t->slot[i]))) & mask) < ((i - hole) & mask)) continue;
        t->slot[hole] = t->slot[i];
        hole = i;
    }
    t->slot[hole] = NULL;
    t->n--;
    if (t->cap > 8 && t->n * 8 < t->cap) table_resize(t, t->cap / 2);
}

/* ==========================================================================
 * 4. The loop
 * ==========================================================================
 *
 * A server waits for many sockets at once and must never wait for one of them. All
 * that has a descriptor is a `struct conn`, and poll(2) says who is ready:
 *
 *     loop.pfd    | listener | browser | phone | browser | ...
 *     loop.polled |    o     |    o    |   o   |    o    | ...
 *
 * Its flaw is that it looks at every descriptor at every wake-up: with ten thousand of
 * them it does little else. Where there is epoll(7), all but the listeners are parked
 * in an epoll set, which remembers who is ready; and that set has a descriptor itself,
 * which stands in the poll set for all of them. The loop stays the same.
 *
 * A protocol is a chapter that supplies a `struct proto`: one function that consumes
 * input, and a few for the turning points of a connection's life. HTTP becomes
 * WebSocket by swapping that pointer. The CONSUME CONTRACT of every parser of a stream:
 *
 *     > 0   so many bytes were consumed, call again if some are left
 *     = 0   need more bytes; nothing was consumed
 *     < 0   the peer broke the protocol; the connection is closing
 *
 * One ROUND: poll; read and handle all that is ready; once a second look at the
 * deadlines; then write what came together; and only then free what has ended.
 *
 * Input is read into one buffer that all share, and only an incomplete tail is kept
 * with the connection: an idle one owns no buffer. A peer that does not read our
 * answers is not read from either, so what it makes us say is bounded by OUT_HIGH and
 * one answer; a worker is (chapter 10), and has a bound of its own.
 *
 * Ending is marking. conn_close() says: send the rest, then end. conn_lost() says:
 * nothing can be sent any more. At the end of the round the protocol's `closed` runs,
 * once, and then:
 *
 *     closing --- rest sent ---> FIN sent --- peer's FIN, or 5 s ---> freed
 *
 * To wait for the peer's FIN, and read what still comes, matters: closing a socket
 * with unread input makes the kernel send a reset, which can destroy our last words
 * (a close frame, a 431) on their way.
 *
 * TLS (RFC 8446, by OpenSSL) hides below reading and writing, and the handshake below
 * that. Only now and then it shows: it may have to write before it can read, or to read
 * before it can write; and bytes that it could not send it has encrypted already, so
 * just those must be offered again, whatever else has come up.
 *
 * Owns: the poll set, all connections, the read buffer, the certificate. Calls: 1 Bytes.
 * Called by: all below. Promises: nothing is freed in the middle of a round.
 */

struct addr {        /* IPv4 is kept as ::ffff:a.b.c.d, so that there is one kind */
    uint8_t ip[16];
    uint16_t port;
    bool local;      /* a Unix-domain socket: no address at all */
};

struct conn;
struct member;       /* chapter 7's */

struct proto {
    const char *name;
    ssize_t (*feed)(struct conn *c, char *p, size_t n);        /* consumes input; may write into it */
    void (*accepted)(struct conn *listener, struct conn *c);   /* a listener's: c is new */
    void (*message)(struct conn *c, slice text);               /* a WebSocket's: a text came */
    void (*tick)(struct conn *c);                              /* a second has passed */
    void (*stop)(struct conn *c);                              /* the server ends; NULL: close it */
    void (*closed)(struct conn *c);                            /* it ends: leave, queue last words */
    void (*freed)(struct conn *c);                             /* its descriptor is closed */
    bool (*refill)(struct conn *c);                            /* `out` is empty: has it more for it? */
    slice (*peek)(struct conn *c);                             /* what to send when there is no more */
    void (*sent)(struct conn *c, size_t n);                    /* n bytes of that went out */
};

struct conn {
    const struct proto *proto;
    void *state;                   /* the protocol's */
    struct member *joined;         /* the rooms it is in */
    const char *why;               /* why it ends, for the log */
    struct buf in, out;            /* input that is no whole unit yet; private output */
    int64_t deadline_ms;           /* the protocol's; a listener accepts nothing before it */
    SSL *ssl;                      /* NULL: plain text */
    int fd;
    uint32_t slot;                 /* where it stands in loop.conn... */
    uint32_t place;                /* ...and, unless it is parked, in the poll set */
    uint32_t searched;             /* bytes of `in` that were looked at already */
    struct addr peer;
    uint8_t events;                /* what it waits for */
    bool dirty : 1, closing : 1, swept : 1, fin_sent : 1, eof : 1, lost : 1;
    bool parked : 1;                           /* in the epoll set */
    bool first : 1;                            /* it is heard before the others, and though it does not read */
    bool blocked : 1;                          /* the kernel's send buffer is full */
    bool spoke : 1;                            /* something was sent: it is connected, and TLS has begun */
    bool muted : 1;                            /* TLS must read before it can write */
    bool owes : 1;                             /* what it has in `out` is also what was said in its rooms */
    bool hello : 1;                            /* TLS is to begin; a listener's: with all it accepts */
    bool plain : 1;                            /* but it did not: the peer does not speak TLS */
    bool given : 1;                            /* a listener's: it is not ours, nor is its file */
    bool counted : 1, proxy : 1, refused : 1, crowded : 1, expected : 1;   /* chapter 5's */
};

static struct {
    struct conn **conn;            /* all */
    uint32_t n, cap;
    struct pollfd *pfd;            /* those in the poll set... */
    struct conn **polled;          /* ...and who they are; NULL: the epoll set */
    uint32_t n_polled, polled_cap;
    bool gaps;                     /* somebody has left the poll set: poll_close_up() */
    uint32_t moved;                /* connections that came or went, since memory was given back to the system */
    int epoll;                     /* 0: none */
    struct conn **dirty;           /* those that have something to write or to end, after this round */
    uint32_t n_dirty, dirty_cap;
    bool (*flush)(void);           /* chapter 7's: send what rooms have gathered */
    void (*tick)(void);            /* chapter 8's: a second has passed */
    int64_t tick_ms;               /* next look at the deadlines */
    int64_t stop_ms;               /* when stopping: the end, whatever is left */
    volatile sig_atomic_t signals; /* SIGTERM or SIGINT: so many came */
    volatile sig_atomic_t hangups; /* SIGHUP */
    void (*reload)(void);          /* chapter 13's: read the files again */
    SSL_CTX *tls;                  /* our certificate */
    char chunk[READ_BYTES];        /* everybody's input */
    char text[INET6_ADDRSTRLEN + 10];   /* addr_text()'s */
    unsigned long long received, sent;   /* bytes, without those of TLS */
} loop;

static const uint8_t addr_v4[12] = {[10] = 0xff, [11] = 0xff};

static bool addr_is_v4(const struct addr *a) { return memcmp(a->ip, addr_v4, 12) == 0; }

static struct addr addr_of(const struct sockaddr_storage *sa) {
    struct addr a = {.local = sa->ss_family == AF_UNIX};
    const struct sockaddr_in *v4 = (const void *)sa;
    const struct sockaddr_in6 *v6 = (const void *)sa;
    bool four = sa->ss_family == AF_INET;
    if (a.local) return a;
    memcpy(a.ip, four ? addr_v4 : v6->sin6_addr.s6_addr, 12);
    memcpy(a.ip + 12, four ? (const void *)&v4->sin_addr : v6->sin6_addr.s6_addr + 12, 4);
    a.port = ntohs(four ? v4->sin_port : v6->sin6_port);
    return a;
}

/* Did this address of a name come before? /etc/hosts may have it in several lines. */
static bool addr_again(const struct addrinfo *list, const struct addrinfo *ai) {
    struct addr a = addr_of((const void *)ai->ai_addr), earlier;
    for (; list != ai; list = list->ai_next)
        if (earlier = addr_of((const void *)list->ai_addr), memcmp(a.ip, earlier.ip, sizeof a.ip) == 0) return true;
    return false;
}

/* Reads an address without a port: "192.0.2.1", "2001:db8::1". */
static bool addr_parse(slice s, struct addr *a) {
    char text[INET6_ADDRSTRLEN] = "";
    *a = (struct addr){0};
    if (s.len >= sizeof text) return false;
    memcpy(text, s.p, s.len);
    memcpy(a->ip, addr_v4, 12);
    return inet_pton(AF_INET, text, a->ip + 12) == 1 || inet_pton(AF_INET6, text, a->ip) == 1;
}

/* For the log: "192.0.2.1:4711", "[2001:db8::1]:4711", "unix". Valid until called again. */
static const char *addr_text(const struct addr *a) {
    char ip[INET6_ADDRSTRLEN] = "";
    bool v4 = addr_is_v4(a);
    inet_ntop(v4 ? AF_INET : AF_INET6, a->ip + (v4 ? 12 : 0), ip, sizeof ip);
    snprintf(loop.text, sizeof loop.text, v4 ? "%s:%u" : "[%s]:%u", ip, a->port);
    return a->local ? "unix" : loop.text;
}

/* ---- The poll set. ---- */

static uint32_t poll_add(int fd, short events, struct conn *c) {
    if (loop.n_polled == loop.polled_cap) {
        loop.polled_cap = loop.polled_cap > 0 ? loop.polled_cap * 2 : 16;
        loop.pfd = xrealloc(loop.pfd, loop.polled_cap * sizeof *loop.pfd);
        loop.polled = xrealloc(loop.polled, loop.polled_cap * sizeof *loop.polled);
    }
    loop.pfd[loop.n_polled] = (struct pollfd){.fd = fd, .events = events};
    loop.polled[loop.n_polled] = c;
    return loop.n_polled++;
}

/* The others stay in the order in which they came: what a back end orders first, by a connection of
 * its own each time, is done first. */
static void poll_close_up(void) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < loop.n_polled; i++) {
        if (loop.pfd[i].fd < 0) continue;
        if (i > n && loop.polled[i] != NULL) loop.polled[i]->place = n;
        loop.pfd[n] = loop.pfd[i];
        loop.polled[n++] = loop.polled[i];
    }
    loop.n_polled = n;
    loop.gaps = false;
}

#if PARKING
static_assert(EPOLLIN == POLLIN && EPOLLOUT == POLLOUT && EPOLLHUP == POLLHUP && EPOLLERR == POLLERR, "the same");

/* Parks a connection, or changes what it waits for. False: it cannot be parked. */
static bool park(struct conn *c) {
    struct epoll_event e = {.events = (uint32_t)c->events, .data.ptr = c};
    if (loop.epoll == 0) {
        loop.epoll = epoll_create1(EPOLL_CLOEXEC);
        if (loop.epoll > 0) poll_add(loop.epoll, POLLIN, NULL);
    }
    return epoll_ctl(loop.epoll, c->parked ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, c->fd, &e) == 0;
}

/* Closing would do, but a child that looks up a name may have the descriptor too. */
static void unpark(const struct conn *c) { epoll_ctl(loop.epoll, EPOLL_CTL_DEL, c->fd, &(struct epoll_event){0}); }

static void park_ready(void (*ready)(struct conn *c, short events)) {
    struct epoll_event e[PARKED_READY];
    int n = epoll_wait(loop.epoll, e, PARKED_READY, 0);
    for (int k = 0; k < 2 * n; k++) {   /* all `first` ones, then the others */
        struct conn *c = e[k % n].data.ptr;
        if (c->first == (k < n)) ready(c, (short)e[k % n].events);
    }
}
#else
static bool park(struct conn *c) { return (void)c, false; }
static void unpark(const struct conn *c) { (void)c; }
static void park_ready(void (*ready)(struct conn *c, short events)) { (void)ready; }
#endif

/* Takes the descriptor; it is `parked` if that can be. The connection ends by
 * conn_close() or conn_lost(). */
static struct conn *conn_new(int fd, const struct proto *proto, void *state, bool parked) {
    if (loop.n == loop.cap) {
        loop.cap += loop.cap / 4 + 16;
        loop.conn = xrealloc(loop.conn, loop.cap * sizeof *loop.conn);
    }
    struct conn *c = xcalloc(sizeof *c);
    *c = (struct conn){.fd = fd, .proto = proto, .state = state, .events = POLLIN};
    c->slot = loop.n++;
    loop.moved++;
    loop.conn[c->slot] = c;
    c->parked = parked && park(c);
    if (!c->parked) c->place = poll_add(fd, POLLIN, c);
    return c;
}

/* Has this connection looked after before the round ends. */
static void conn_touch(struct conn *c) {
    if (c->dirty) return;
    c->dirty = true;
    if (loop.n_dirty == loop.dirty_cap)
        loop.dirty = xrealloc(loop.dirty, (loop.dirty_cap = 2 * loop.dirty_cap + 16) * sizeof *loop.dirty);
    loop.dirty[loop.n_dirty++] = c;
}

/* Ends a connection once its output is sent. `why` is a literal; the first counts. */
static void conn_close(struct conn *c, const char *why) {
    if (c->why == NULL) c->why = why;
    c->closing = true;
    conn_touch(c);
}

/* Ends a connection that cannot be written to any more. */
static void conn_lost(struct conn *c, const char *why) {
    c->lost = true;
    conn_close(c, why);
}

static bool conn_paused(const struct conn *c) { return c->out.len > OUT_HIGH && !c->first; }

static uint8_t conn_interest(const struct conn *c) {
    bool listens = c->proto->accepted != NULL;
    bool reads = c->closing ? !c->eof : listens ? now.ms >= c->deadline_ms : !conn_paused(c) || c->muted;
    /* TLS has something of its own to say first, such as a new key: poll would report the rest again and again. */
    if (c->blocked && c->ssl != NULL && SSL_in_init(c->ssl)) reads = false;
    return (uint8_t)((reads ? POLLIN : 0) | (c->blocked ? POLLOUT : 0));
}

/* Tells the kernel what this connection waits for now. What epoll does not take is polled. */
static void conn_watch(struct conn *c) {
    uint8_t events = conn_interest(c);
    if (events == c->events) return;
    c->events = events;
    if (!c->parked) loop.pfd[c->place].events = events;
    else if (!park(c)) unpark(c), c->parked = false, c->place = poll_add(c->fd, events, c);
}

/* ---- TLS. ---- */

/* Which protocol follows: there is one. A client that offers others only is refused. */
static int tls_choose(SSL *ssl, const unsigned char **out, unsigned char *len, const unsigned char *list, unsigned n,
                      void *unused) {
    static const unsigned char ours[] = "\x08http/1.1";
    unsigned char *chosen;
    (void)ssl, (void)unused;
    int result = SSL_select_next_proto(&chosen, len, ours, sizeof ours - 1, list, n);
    *out = chosen;
    return result == OPENSSL_NPN_NEGOTIATED ? SSL_TLSEXT_ERR_OK : SSL_TLSEXT_ERR_ALERT_FATAL;
}

/* The memory of OpenSSL, too, is had, or it is the end: what it could not set up when it was needed first is
 * missing for good, and no handshake would succeed any more. exit() would have it clean up what it is at. */
static void *tls_realloc(void *p, size_t n, const char *file, int line) {
    (void)file, (void)line;
    if (n == 0) return free(p), NULL;
    if ((p = realloc(p, n)) == NULL) log_line("error", "out of memory (%zu bytes of OpenSSL)", n), _exit(1);
    return p;
}

static void *tls_malloc(size_t n, const char *file, int line) { return tls_realloc(NULL, n, file, line); }

/* The passphrase of a key, or OpenSSL would ask at the terminal. */
static int tls_passphrase(char *text, int size, int writing, void *phrase) {
    int len = phrase != NULL ? (int)strlen(phrase) : -1;
    (void)writing;
    if (len > size) len = -1;
    if (len > 0) memcpy(text, phrase, (size_t)len);
    return len;
}

/* What every TLS connection has in common. `phrase` is borrowed, for as long as it lives. */
static SSL_CTX *tls_new(const SSL_METHOD *method, const char *phrase) {
    SSL_CTX *tls = SSL_CTX_new(method);
    if (tls == NULL) die("out of memory (TLS)");
    SSL_CTX_set_min_proto_version(tls, TLS1_2_VERSION);
    SSL_CTX_set_options(tls, SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE);
    SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                     SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_clear_mode(tls, SSL_MODE_AUTO_RETRY);   /* new keys without end would keep SSL_read() from returning */
    SSL_CTX_set_session_cache_mode(tls, SSL_SESS_CACHE_OFF);   /* tickets are kept by the clients */
    SSL_CTX_set_default_passwd_cb(tls, tls_passphrase);
    SSL_CTX_set_default_passwd_cb_userdata(tls, (void *)(uintptr_t)phrase);
    return tls;
}

/* What OpenSSL, or else the system, has to complain about: a text that lasts. */
static const char *tls_why(SSL *ssl) {
    long verdict = ssl != NULL ? SSL_get_verify_result(ssl) : X509_V_OK;
    const char *why = ERR_reason_error_string(ERR_peek_error());
    if (verdict != X509_V_OK) return X509_verify_cert_error_string(verdict);
    if (why != NULL && strcmp(why, "interrupted or cancelled") == 0) return "it needs a passphrase";
    return why != NULL ? why : errno != 0 ? strerror(errno) : "connection reset";
}

/* Has it show this certificate, with its chain, and its key. NULL, or what is wrong with them. */
static const char *tls_identify(SSL_CTX *tls, const char *cert, const char *key) {
    ERR_clear_error();
    bool ok = SSL_CTX_use_certificate_chain_file(tls, cert) == 1 &&
              SSL_CTX_use_PrivateKey_file(tls, key, SSL_FILETYPE_PEM) == 1 && SSL_CTX_check_private_key(tls) == 1;
    return ok ? NULL : tls_why(NULL);
}

/* Reads our certificate and its key. NULL, or what is wrong; then those in use stay. */
static const char *tls_load(const char *cert, const char *key) {
    SSL_CTX *tls = tls_new(TLS_server_method(), NULL);
    SSL_CTX_set_alpn_select_cb(tls, tls_choose, NULL);
    SSL_CTX_set_options(tls, SSL_OP_IGNORE_UNEXPECTED_EOF);   /* browsers end so, and apps that are ended */
    const char *why = tls_identify(tls, cert, key);
    SSL_CTX_free(why != NULL ? tls : loop.tls);
    if (why == NULL) loop.tls = tls;
    return why;
}

/* Looks at the first byte: 22 begins TLS. Who begins with plain text gets an answer.
 * Returns what recv() said. */
static ssize_t tls_begin(struct conn *c) {
    char first;
    ssize_t n = recv(c->fd, &first, 1, MSG_PEEK);
    if (n != 1) return n;
    c->hello = false;
    c->plain = first != 22;
    if (c->plain) return n;
    c->ssl = SSL_new(loop.tls);
    if (c->ssl == NULL || SSL_set_fd(c->ssl, c->fd) != 1) die("out of memory (TLS)");
    SSL_set_accept_state(c->ssl);
    return n;
}

/* What SSL_read() or SSL_write() returned, as recv() and send() would have. */
static ssize_t tls_result(struct conn *c, int n) {
    int error = n > 0 ? SSL_ERROR_NONE : SSL_get_error(c->ssl, n);
    if (error == SSL_ERROR_NONE) return n;
    bool bare = error == SSL_ERROR_SYSCALL && n == 0 && SSL_is_server(c->ssl);   /* so OpenSSL 1.1.1 says it */
    if (error == SSL_ERROR_ZERO_RETURN || bare) return 0;
    bool wait = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE;
    if (!wait) conn_lost(c, tls_why(c->ssl));
    errno = wait ? EAGAIN : ECONNRESET;
    if (error == SSL_ERROR_WANT_WRITE) c->blocked = true, conn_touch(c);
    return -1;
}

/* ---- Reading and writing. ---- */

static ssize_t conn_recv(struct conn *c, char *p, size_t n) {
    ssize_t first = c->hello ? tls_begin(c) : 1;
    if (first != 1 || c->ssl == NULL) return first != 1 ? first : recv(c->fd, p, n, 0);
    if (c->muted) conn_touch(c);
    c->muted = false;
    ERR_clear_error();
    BIO *bio = SSL_get_rbio(c->ssl);
    uint64_t before;
    int got, turns = SSL_is_server(c->ssl) ? 1 : TICKETS_MAX;
    /* Of a gateway we read on: behind its tickets may be its last words, which are gone once we have
     * written to who hung up. */
    do before = BIO_number_read(bio), got = SSL_read(c->ssl, p, (int)n);
    while (got < 0 && BIO_number_read(bio) > before && --turns > 0);
    return tls_result(c, got);
}

static ssize_t conn_send(struct conn *c, slice s) {
    if (c->ssl == NULL) return send(c->fd, s.p, s.len, 0);
    ERR_clear_error();
    ssize_t n = tls_result(c, SSL_write(c->ssl, s.p, (int)s.len));
    c->muted = n < 0 && errno == EAGAIN && !c->blocked;
    return n;
}

/* Lets the protocol consume; returns how much it took. */
static size_t conn_feed(struct conn *c, char *p, size_t n) {
    size_t done = 0;
    while (done < n && !c->closing && !conn_paused(c)) {
        ssize_t k = c->proto->feed(c, p + done, n - done);
        if (k <= 0) break;
        done += (size_t)k;
    }
    return c->closing ? n : done;
}

/* Feeds what was kept, with what has come since. */
static void conn_feed_kept(struct conn *c) {
    buf_drop(&c->in, conn_feed(c, c->in.p + c->in.off, c->in.len));
    if (c->in.len == 0) buf_free(&c->in);
}

static void conn_read(struct conn *c) {
    ssize_t n = conn_recv(c, loop.chunk, sizeof loop.chunk);
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) conn_lost(c, "connection reset");
    if (n == 0) c->eof = true, conn_close(c, "peer hung up");
    if (n <= 0 || c->closing) return;   /* who is closing is read, but not heard */
    loop.received += (size_t)n;
    bool kept = c->in.len > 0;
    size_t done = kept ? 0 : conn_feed(c, loop.chunk, (size_t)n);
    buf_add(&c->in, (slice){loop.chunk + done, (size_t)n - done});
    if (kept) conn_feed_kept(c);
}

/* Writes what the socket takes now. False when it takes no more. */
static bool conn_write(struct conn *c, slice s, size_t *written) {
    ssize_t n = conn_send(c, s);
    bool again = n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR || errno == ENOBUFS);
    *written = n > 0 ? (size_t)n : 0;
    loop.sent += *written;
    c->spoke = c->spoke || n > 0;
    c->blocked = !c->muted && (again || (c->ssl == NULL && n >= 0 && (size_t)n < s.len));
    if (n <= 0 && !again) conn_lost(c, "connection reset");   /* 0: TLS, to who had said goodbye before */
    if (c->blocked) conn_touch(c);   /* so that poll waits for room */
    return !c->blocked && !c->muted && !c->lost;
}

/* Sends what there is: the private queue, with what the protocol adds to it, then what
 * the protocol lends. It may add once a round, so that others have their turn too. */
static void conn_flush(struct conn *c) {
    bool more = !c->blocked && !c->muted && !c->lost && !c->fin_sent, refilled = false;
    while (more) {
        if (c->out.len == 0 && refilled) {
            c->blocked = true;   /* not really: poll will say so at once */
            conn_touch(c);
            return;
        }
        if (c->out.len == 0 && c->proto->refill != NULL) refilled = c->proto->refill(c);
        bool private = c->out.len > 0;
        slice s = private ? buf_slice(&c->out) : c->proto->peek != NULL ? c->proto->peek(c) : S("");
        if (s.len == 0) return;
        size_t written;
        if (c->ssl != NULL && s.len > TLS_RECORD) s.len = TLS_RECORD;
        more = conn_write(c, s, &written);
        if (c->ssl != NULL && !private && !more) {   /* just this must be offered again: now it is private */
            buf_add(&c->out, slice_cut(s, written));
            written = s.len;
        }
        if (private) buf_drop(&c->out, written);
        else c->proto->sent(c, written);
        c->owes = c->owes && c->out.len > 0;
    }
}

/* ---- Listening. ---- */

static int fd_prepare(int fd) {
    int one = 1, flags = fcntl(fd, F_GETFL);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    /* A round gathers what belongs together; waiting for more (Nagle) would only add
     * delay. Best effort: a Unix-domain socket knows no TCP. */
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return flags < 0 ? -1 : fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

/* Accepts some of those who wait: others have their turn too, and those who are too many hold
 * descriptors until the round ends. Who comes when we are to stop is left to a successor, who may have
 * the same socket. */
static void listener_ready(struct conn *l) {
    for (int i = 0; i < ACCEPTED_MAX && loop.signals == 0; i++) {
        struct sockaddr_storage from = {.ss_family = AF_UNIX};
        socklen_t len = sizeof from;
        int fd = accept(l->fd, (struct sockaddr *)&from, &len);
        if (fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)) {
            /* It stays in the queue, and poll would report it again at once, for ever. */
            log_warn("accept: %s; pausing for a second", strerror(errno));
            l->deadline_ms = now.ms + TICK_MS;
            conn_touch(l);
            return;
        }
        if (fd < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
        if (fd < 0) continue;   /* ECONNABORTED and the like: that one has gone */
        struct conn *c = conn_new(fd, l->proto, NULL, true);
        c->peer = addr_of(&from);
        c->hello = l->hello;
        l->proto->accepted(l, c);
        if (fd_prepare(fd) != 0) conn_lost(c, "fcntl failed");
    }
}

/* Takes a socket that listens. NULL with errno, or the listener. */
static struct conn *listen_with(int fd, bool tls, const struct proto *proto, const void *state) {
    struct sockaddr_storage bound;
    socklen_t len = sizeof bound;
    if (fd_prepare(fd) != 0 || getsockname(fd, (struct sockaddr *)&bound, &len) != 0) return NULL;
    struct conn *l = conn_new(fd, proto, (void *)(uintptr_t)state, false);
    l->peer = addr_of(&bound);
    l->hello = tls && !l->peer.local;
    return l;
}

/* Listens at one address. NULL with errno, or the listener. */
static struct conn *listen_at(const struct addrinfo *ai, bool tls, const struct proto *proto, const void *state) {
    int one = 1, fd = socket(ai->ai_family, SOCK_STREAM, 0), error;
    struct conn *l = NULL;
    if (fd < 0) return NULL;
    /* The first lets a restart not wait for old connections to be forgotten; without
     * the second IPv6 would take the port of IPv4 too. */
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (ai->ai_family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
    if (bind(fd, ai->ai_addr, ai->ai_addrlen) == 0 && listen(fd, 4096) == 0) l = listen_with(fd, tls, proto, state);
    if (l != NULL) return l;
    error = errno;
    close(fd);
    errno = error;
    return NULL;
}

/* Listens on a Unix-domain socket. A file left behind by a server that died is
 * replaced, one that is answered is not. NULL, or what went wrong. */
static const char *listen_unix(const char *path, const struct proto *proto, const void *state, const char *label) {
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    struct addrinfo ai = {.ai_family = AF_UNIX, .ai_addr = (struct sockaddr *)&sa, .ai_addrlen = sizeof sa};
    struct stat st;
    if (strlen(path) >= sizeof sa.sun_path) return strerror(ENAMETOOLONG);
    memcpy(sa.sun_path, path, strlen(path));
    int probe = socket(AF_UNIX, SOCK_STREAM, 0);
    fd_prepare(probe);   /* who lets others wait is alive, but not to be waited for */
    if (stat(path, &st) == 0 && S_ISSOCK(st.st_mode) && connect(probe, ai.ai_addr, sizeof sa) != 0 &&
        errno == ECONNREFUSED) unlink(path);
    if (probe >= 0) close(probe);
    if (listen_at(&ai, false, proto, state) == NULL) return strerror(errno);
    log_info("listening on unix:%s%s", path, label);
    return NULL;
}

/* Listens on every address of this host; "" is every address there is. All get the
 * same port, also when the kernel is to choose one. NULL, or what went wrong. */
static const char *listen_tcp(const char *host, uint16_t port, bool tls, const struct proto *proto, const void *state,
                              const char *label) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *list;
    int error = getaddrinfo(*host != '\0' ? host : NULL, "0", &hints, &list), failed = EADDRNOTAVAIL;
    if (error != 0) return gai_strerror(error);
    for (struct addrinfo *ai = list; ai != NULL; ai = ai->ai_next) {
        if (addr_again(list, ai)) continue;
        if (ai->ai_family == AF_INET) ((struct sockaddr_in *)(void *)ai->ai_addr)->sin_port = htons(port);
        else ((struct sockaddr_in6 *)(void *)ai->ai_addr)->sin6_port = htons(port);
        struct conn *l = listen_at(ai, tls, proto, state);
        if (l == NULL && (errno == EAFNOSUPPORT || errno == EADDRNOTAVAIL)) continue;   /* no IPv6, say */
        failed = l == NULL ? errno : 0;
        if (l == NULL) break;
        port = l->peer.port;
        log_info("listening on %s%s%s", addr_text(&l->peer), tls ? " (TLS)" : "", label);
    }
    freeaddrinfo(list);
    return failed != 0 ? strerror(failed) : NULL;
}

/* ---- Connecting. Looking up a name may take a minute, and libc cannot do that by the
 * way. So a child process does, and tells the address over a socket. ---- */

struct dial {
    const char *host, *port;
    uint32_t attempt, addresses;   /* which of the addresses of this host to take; how many there are */
    SSL_CTX *tls;                  /* NULL: plain text */
    const char *alpn;              /* the protocol to agree on, behind its length; or NULL */
    const struct proto *proto;     /* of the connection, if there will be one */
    void (*done)(struct conn *c, const char *why);   /* there it is; or NULL, and why not */
    bool busy;
};

struct address {
    struct sockaddr_storage sa;
    socklen_t len;
    uint32_t n;                    /* it is one of so many; 0: none */
};

static void dial_look_up(const struct dial *d, int fd) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list, *ai;
    struct address a;
    for (uint32_t i = 0; i < loop.n; i++) close(loop.conn[i]->fd);   /* a peer must see us close it */
    for (int i = 0; i < 3; i++) close(i), signal((int[]){SIGTERM, SIGINT, SIGHUP}[i], SIG_DFL);   /* be no trouble */
    alarm(30);
    memset(&a, 0, sizeof a);
    if (getaddrinfo(d->host, d->port, &hints, &list) != 0 || list == NULL) _exit(1);
    for (ai = list; ai != NULL; ai = ai->ai_next) a.n++;
    ai = list;
    for (uint32_t i = d->attempt % a.n; i > 0; i--) ai = ai->ai_next;
    a.len = ai->ai_addrlen;
    memcpy(&a.sa, ai->ai_addr, a.len);
    freeaddrinfo(list);
    _exit(write(fd, &a, sizeof a) != sizeof a);
}

/* Begins TLS, and believes nobody but the host. */
static SSL *dial_tls(const struct dial *d, int fd) {
    SSL *ssl = SSL_new(d->tls);
    bool ok = ssl != NULL && SSL_set_fd(ssl, fd) == 1;
    bool number = ok && X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), d->host) == 1;
    if (!number) ok = ok && SSL_set1_host(ssl, d->host) == 1 && SSL_set_tlsext_host_name(ssl, d->host) == 1;
    if (ok && d->alpn != NULL) SSL_set_alpn_protos(ssl, (const unsigned char *)d->alpn, (unsigned)strlen(d->alpn));
    if (!ok) die("out of memory (TLS)");
    SSL_set_connect_state(ssl);
    return ssl;
}

/* The address has come: the socket is made, and is the caller's of dial() from now on. */
static ssize_t dial_feed(struct conn *from, char *p, size_t n) {
    struct dial *d = from->state;
    struct address a;
    struct conn *c = NULL;
    if (n < sizeof a) return 0;
    memcpy(&a, p, sizeof a);
    int fd = socket(a.sa.ss_family, SOCK_STREAM, 0);
    bool ok = fd >= 0 && fd_prepare(fd) == 0 &&
              (connect(fd, (struct sockaddr *)&a.sa, a.len) == 0 || errno == EINPROGRESS);
    const char *why = strerror(errno);
    if (!ok && fd >= 0) close(fd);
    if (!ok) d->attempt++;
    if (ok) {
        c = conn_new(fd, d->proto, NULL, true);
        c->peer = addr_of(&a.sa);
        c->blocked = true;   /* until it is connected */
        c->ssl = d->tls != NULL ? dial_tls(d, fd) : NULL;
        conn_touch(c);
    }
    conn_close(from, "address found");
    from->state = NULL;
    d->addresses = a.n;
    d->busy = false;
    d->done(c, why);
    return (ssize_t)n;
}

/* `closed` of those that only read, too: there is nothing to wait for. */
static void dial_closed(struct conn *from) {
    struct dial *d = from->state;
    from->eof = true;
    if (d == NULL) return;
    d->busy = false;
    d->done(NULL, "there is no address for this name");
}

static const struct proto dial_proto = {.name = "look-up", .feed = dial_feed, .closed = dial_closed};

/* Begins to connect; `done` is called once, but not before this returns. Borrows it until then. */
static void dial(struct dial *d) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) != 0) return;   /* not `busy`: try again later */
    d->busy = true;
    pid_t child = fork();   /* if it fails, nobody answers */
    if (child == 0) dial_look_up(d, pair[1]);
    close(pair[1]);
    fd_prepare(pair[0]);
    conn_new(pair[0], &dial_proto, d, true);
}

/* ---- The end of a round. ---- */

/* `closed` of listeners. The file goes while the socket still answers: afterwards it
 * may be a successor's. */
static void listener_closed(struct conn *l) {
    struct sockaddr_un sa = {.sun_family = AF_UNSPEC};
    socklen_t len = sizeof sa - 1;
    if (l->peer.local && !l->given && getsockname(l->fd, (struct sockaddr *)&sa, &len) == 0) unlink(sa.sun_path);
}

static void conn_free(struct conn *c) {
    SSL_free(c->ssl);
    loop.moved++;
    if (c->parked) unpark(c);
    close(c->fd);
    if (c->proto->freed != NULL) c->proto->freed(c);
    loop.conn[c->slot] = loop.conn[--loop.n];
    loop.conn[c->slot]->slot = c->slot;
    if (!c->parked) loop.pfd[c->place].fd = -1, loop.gaps = true;
    buf_free(&c->in);
    buf_free(&c->out);
    free(c);
}

/* Writes for one connection, and moves it on towards its end. */
static void conn_settle(struct conn *c) {
    if (c->closing && !c->swept) {
        c->swept = true;
        c->deadline_ms = now.ms + CLOSE_MS;
        if (c->proto->closed != NULL) c->proto->closed(c);
        log_debug("%s: %s ended: %s", addr_text(&c->peer), c->proto->name, c->why);
    }
    conn_flush(c);
    if (!c->closing && c->in.len > 0 && !conn_paused(c)) {   /* it was paused */
        conn_feed_kept(c);
        /* Who asks for a lot and reads fast has one turn in a round; what a WebSocket asks is short. */
        if (conn_paused(c) && c->proto->message == NULL) c->blocked = true;
    }
    if (c->out.len == 0) buf_free(&c->out);
    if (c->out.len == 0 && c->swept && !c->lost && !c->fin_sent) {
        if (c->ssl != NULL) SSL_shutdown(c->ssl);
        shutdown(c->fd, SHUT_WR);
        c->fin_sent = true;
    }
    conn_watch(c);
    bool over = c->lost || c->proto->accepted != NULL || (c->fin_sent && c->eof);
    if (c->swept && over && !c->dirty) conn_free(c);
}

/* Rooms first, since most members have nothing else to send. A connection that ends
 * can make a room speak again, so this goes on until nothing is left. */
static void loop_settle(void) {
    while (loop.flush() || loop.n_dirty > 0)
        while (loop.n_dirty > 0) {
            struct conn *c = loop.dirty[--loop.n_dirty];
            c->dirty = false;
            conn_settle(c);
        }
}

/* Once a second every deadline is looked at. That is O(N), some ten nanoseconds for
 * each connection, and nothing here needs better than a second. */
static void loop_tick(void) {
    loop.tick_ms = now.ms + TICK_MS;
    for (uint32_t i = 0; i < loop.n; i++) {
        struct conn *c = loop.conn[i];
        if (c->swept && now.ms >= c->deadline_ms) conn_lost(c, "too slow to go");
        else if (!c->closing && c->proto->tick != NULL) c->proto->tick(c);
    }
    if (loop.tick != NULL) loop.tick();
}

/* The first signal says goodbye to everybody, the second ends the program on the spot. */
static void loop_signal(int number) {
    (void)number;
    if (loop.signals++ > 0) _exit(1);
}

static void loop_hangup(int number) {
    (void)number;
    loop.hangups = 1;
}

/* Has every connection end; loop_run() returns when all have gone, or after a little
 * less than CLOSE_MS. */
static void loop_stop(void) {
    log_info("stopping");
    loop.stop_ms = now.ms + CLOSE_MS - TICK_MS - 100;
    loop.tick_ms = now.ms;   /* chapter 13 passes it on */
    loop.flush();   /* what was said goes out before the goodbye */
    for (uint32_t i = 0; i < loop.n; i++) {
        struct conn *c = loop.conn[i];
        if (c->proto->stop != NULL && !c->closing) c->proto->stop(c);
        else conn_close(c, "server is stopping");
    }
}

static bool loop_stopping(void) { return loop.stop_ms != 0; }

static void loop_figures(struct buf *b) {
    buf_printf(b, "xchat_received_bytes_total %llu\nxchat_sent_bytes_total %llu\n", loop.received, loop.sent);
}

/* Has the next tick come at this time, unless it comes sooner. */
static void loop_wake(int64_t at_ms) { loop.tick_ms = at_ms < loop.tick_ms ? at_ms : loop.tick_ms; }

static void conn_ready(struct conn *c, short events) {
    if ((events & POLLOUT) != 0) {
        c->blocked = false;
        conn_touch(c);
    }
    /* TLS may read after it wrote. */
    if ((events & ~POLLOUT) == 0 && (c->ssl == NULL || (conn_interest(c) & POLLIN) == 0)) return;
    if (c->proto->accepted != NULL) listener_ready(c);
    else conn_read(c);   /* for POLLHUP and POLLERR too: it tells what happened */
}

/* Runs until a signal, and then until everything has ended. A signal that comes between the look
 * for it and poll() is seen at the next tick. */
static void loop_run(void) {
    while (loop.n > 0 && (loop.stop_ms == 0 || now.ms < loop.stop_ms)) {
        bool asked = loop.hangups > 0 || (loop.signals > 0 && loop.stop_ms == 0);
        int64_t wait_ms = asked ? 0 : loop.tick_ms - now.ms;
        if (loop.gaps) poll_close_up();
        int ready = poll(loop.pfd, loop.n_polled, wait_ms > 0 ? (int)wait_ms : 0);
        clock_read();
        /* All `first` ones, then the others; those accepted meanwhile stand behind. */
        for (uint32_t i = 0, n = loop.n_polled; ready > 0 && i < 2 * n; i++) {
            struct conn *c = loop.polled[i % n];
            short events = loop.pfd[i % n].revents;
            if (events == 0 || (c != NULL && c->first) != (i < n)) continue;
            ready--;
            if (c != NULL) conn_ready(c, events);
            else park_ready(conn_ready);
        }
        if (loop.signals > 0 && loop.stop_ms == 0) loop_stop();
        if (loop.hangups > 0) loop.hangups = 0, loop.reload();
        if (now.ms >= loop.tick_ms) loop_tick();
        loop_settle();
    }
}

/* ==========================================================================
 * 5. HTTP and WebSocket
 * ==========================================================================
 *
 * A browser can open one kind of lasting connection: it asks by HTTP/1.1 (RFC 9112) to
 * change to WebSocket (RFC 6455), and a hash proves that both mean it:
 *
 *     GET / HTTP/1.1                        HTTP/1.1 101 Switching Protocols
 *     Host: chat.example:7272               Upgrade: websocket
 *     Upgrade: websocket             -->    Connection: Upgrade
 *     Connection: Upgrade                   Sec-WebSocket-Accept: base64(SHA-1(
 *     Sec-WebSocket-Version: 13                 key + a fixed text))
 *     Sec-WebSocket-Key: 16 bytes, base64
 *
 * TCP carries bytes, not messages. So each message travels in frames (section 5.2):
 *
 *      0               1               2               3
 *      0 1 2 3 4 5 6 7 0 1 2 3 4 5 6 7 0 1 2 3 4 5 6 7 0 1 2 3 4 5 6 7
 *     +-+-----+-------+-+-------------+-------------------------------+
 *     |F| RSV |opcode |M| length (7)  |  126: length in 2 more bytes  |
 *     |I|  0  |       |A|             |  127: length in 8 more bytes  |
 *     |N|     |       |S|             |  always the shortest form     |
 *     +-+-----+-------+-+-------------+-------------------------------+
 *     | mask: 4 bytes, from clients always, from servers never        |
 *     +---------------------------------------------------------------+
 *     | payload[i] ^ mask[i % 4] ...                                  |
 *     +---------------------------------------------------------------+
 *
 * A text may come in fragments: FIN is 0 on all but the last, and those behind the
 * first have opcode 0. Control frames (opcode 8 and up) may stand between them; they
 * are never fragmented and carry at most 125 bytes.
 *
 * Payload is unmasked where it lies, and checked as UTF-8 as it comes; only what comes
 * in pieces is copied. Parsing is strict: what HTTP once allowed and nobody sends
 * (folded headers, bare line feeds) is how requests are smuggled past proxies.
 *
 * Owns: the count of connections, in all and by address; the trusted proxies.
 * Calls: 1 Bytes, 3 Tables, 4 The loop. Called by: 7 Rooms, 9 Chat, 10 Back end, 11 HTTP API,
 * 12 Page, 13 Main.
 * Promises: a close frame is sent before TCP ends, unless the peer has hung up.
 */

/* The headers that mean something to us; http_parse() has their names. Those before
 * CONNECTION may stand only once. */
enum header {
    HOST, LENGTH, ENCODING, WS_KEY, WS_VERSION, ORIGIN, CONTENT_TYPE, AUTHORIZATION, EXPECT, CONNECTION, UPGRADE,
    FORWARDED, HEADERS
};

struct request {
    slice method, target, path;   /* path: target without the query, and without... */
    slice host;                   /* ...the host, which may stand in front of it */
    slice query, lines, body;     /* behind its '?'; all header lines, each with its CR LF */
    int64_t length;               /* of the body */
    slice header[HEADERS];        /* S("") for what is missing */
    bool keep;                    /* the connection may go on after the answer */
    bool close, upgrade;          /* words of its Connection headers */
};

struct site {   /* what a listener serves: its `state`, and that of its HTTP connections */
    void (*request)(struct conn *c, const struct request *q);   /* answers by http_reply() */
    void (*upgraded)(struct conn *c, const struct request *q);   /* or NULL; sets proto, and a state: first struct ws */
    int64_t body;   /* how long that of a request may be */
    bool (*allowed)(struct conn *c, struct request *q);   /* or NULL; false: it has been answered */
};

struct ws {
    struct buf text;         /* the fragments of a message so far */
    uint32_t left;           /* payload of the current frame still to come; 0: a head comes */
    uint8_t mask[4];         /* of that frame, from the byte on that comes next */
    struct utf8 utf8;
    uint8_t opcode : 4;
    bool fin : 1, peer_closed : 1;
    bool behind : 1;         /* too far: what it was not sent is not kept for it any longer */
    uint16_t fragments;      /* of the current message; 0: there is none */
    uint16_t close_code;     /* to close with; 0: nobody said */
};

enum { WS_CONTINUATION, WS_TEXT, WS_BINARY, WS_CLOSE = 8, WS_PING, WS_PONG };

/* Close codes (section 7.4.1; those from 4000 on are ours). */
enum {
    WS_GOING_AWAY = 1001, WS_PROTOCOL_ERROR = 1002, WS_NOT_TEXT = 1003, WS_NO_CODE = 1005, WS_BAD_UTF8 = 1007,
    WS_POLICY = 1008, WS_TOO_BIG = 1009, WS_TRY_AGAIN = 1013, WS_KICKED = 4001, WS_SILENT = 4408
};

struct caller {   /* an address, and how many connections it has */
    uint8_t net[16];
    uint32_t n;
};

static struct {
    uint32_t connections, refused, n_proxies;   /* refused: not counted, but not closed yet */
    int64_t logged_ms;   /* the last line about somebody who was refused */
    unsigned long long turned_away, slow, silent;   /* over a limit of connections; closed for that */
    struct table callers;
    struct cidr {
        struct addr base;
        int64_t bits;
    } proxies[16];
} http;

static slice caller_key(const void *item) { return (slice){item, sizeof ((struct caller *)0)->net}; }

/* Counts this connection, in all and for its address, or no longer. False: it is refused, there are too
 * many, or (`crowded`) of its address. One person has 2^64 addresses of IPv6: a /64 is one caller. */
static bool http_count(struct conn *c, bool enter) {
    struct caller wanted = {.net[15] = c->peer.local}, *caller;
    uint32_t most = opt.max_per_address > 0 && !c->peer.local ? opt.max_per_address : UINT32_MAX;
    http.refused -= c->refused ? 1 : 0;
    c->refused = false;
    if (c->counted == enter) return true;
    memcpy(wanted.net, c->peer.ip, addr_is_v4(&c->peer) ? 16 : 8);
    caller = table_find(&http.callers, caller_key(&wanted));
    c->crowded = caller != NULL && caller->n >= most;
    c->refused = enter && (c->crowded || http.connections >= opt.max_clients);
    http.refused += c->refused ? 1 : 0;
    if (c->refused) return false;
    if (caller == NULL) {
        caller = memcpy(xcalloc(sizeof wanted), &wanted, sizeof wanted);
        table_add(&http.callers, caller);
    }
    c->counted = enter;
    http.connections = enter ? http.connections + 1 : http.connections - 1;
    caller->n = enter ? caller->n + 1 : caller->n - 1;
    if (caller->n > 0) return true;
    table_remove(&http.callers, caller_key(&wanted));
    free(caller);
    return true;
}

/* "192.0.2.0/24", "2001:db8::/32" or one address. NULL, or what is wrong with it. */
static const char *http_trust(const char *text) {
    slice rest = slice_of(text), address = slice_split(&rest, '/');
    struct cidr *proxy = &http.proxies[http.n_proxies];
    if (http.n_proxies == sizeof http.proxies / sizeof *proxy) return "too many";
    if (!addr_parse(address, &proxy->base)) return "an address was expected, with or without '/' and bits";
    int64_t all = addr_is_v4(&proxy->base) ? 32 : 128;
    proxy->bits = strchr(text, '/') != NULL ? slice_number(rest, 10) : all;
    if (proxy->bits < 0 || proxy->bits > all) return "the number of bits behind '/' is wrong";
    proxy->bits += 128 - all;
    http.n_proxies++;
    return NULL;
}

static bool http_trusts(const struct addr *a) {
    for (const struct cidr *p = http.proxies; p < http.proxies + http.n_proxies; p++) {
        int64_t bit = 0;
        while (bit < p->bits && ((p->base.ip[bit / 8] ^ a->ip[bit / 8]) << bit % 8 & 0x80) == 0) bit++;
        if (bit == p->bits) return true;
    }
    return a->local;
}

/* ---- Request heads. ---- */

/* Is the token in this comma-separated list? */
static bool http_has_token(slice list, slice token) {
    while (list.len > 0)
        if (slice_eqcase(slice_trim(slice_split(&list, ',')), token)) return true;
    return false;
}

static bool http_is_token(slice s) {
    size_t n = 0;
    while (n < s.len && (is_alnum(s.p[n]) || (s.p[n] != '\0' && strchr("!#$%&'*+-.^_`|~", s.p[n]) != NULL))) n++;
    return n > 0 && n == s.len;
}

/* No DEL, and no character below `least` but `also`. */
static bool is_text(slice s, unsigned char least, char also) {
    size_t n = 0;
    while (n < s.len && ((unsigned char)s.p[n] >= least || s.p[n] == also) && s.p[n] != 0x7f) n++;
    return n == s.len;
}

/* "GET /path HTTP/1.1": one space twice, a path (or, as if to a proxy, an http: URL), a version we know. */
static bool http_start(slice line, struct request *q) {
    q->method = slice_split(&line, ' ');
    q->target = slice_split(&line, ' ');
    q->query = q->target;
    q->path = slice_split(&q->query, '?');
    q->keep = slice_eq(line, S("HTTP/1.1"));
    slice rest = q->path, scheme = slice_split(&rest, ':');
    if (http_has_token(S("http,https"), scheme) && slice_starts(rest, S("//"))) {
        q->path = rest = slice_cut(rest, 2);
        q->host = slice_split(&rest, '/');
        q->path = q->host.len < q->path.len ? slice_cut(q->path, q->host.len) : S("/");
        if (q->host.len == 0) return false;
    }
    return (q->keep || slice_eq(line, S("HTTP/1.0"))) && http_is_token(q->method) &&
           slice_starts(q->path, S("/")) && is_text(q->target, '!', '!');
}

/* Without any port. */
static slice http_name(slice host) {
    size_t n = host.len;
    while (n > 0 && host.p[n - 1] >= '0' && host.p[n - 1] <= '9') n--;
    return n > 0 && n < host.len && host.p[n - 1] == ':' ? slice_take(host, n - 1) : host;
}

/* Behind a proxy the client is the last in X-Forwarded-For that is no trusted proxy
 * itself; those in front of it are only what the client wrote. False: all are proxies.
 * Some proxies name the port as well: "192.0.2.1:4711", "[2001:db8::1]:4711". */
static bool http_client(slice list, struct addr *client) {
    for (struct addr hop; list.len > 0;) {
        size_t at = list.len;
        while (at > 0 && list.p[at - 1] != ',') at--;
        slice text = slice_trim(slice_cut(list, at)), ip = http_name(text);
        if (slice_starts(ip, S("[")) && ip.p[ip.len - 1] == ']') ip = (slice){ip.p + 1, ip.len - 2};
        if (!addr_parse(text, &hop) && !addr_parse(ip, &hop)) return true;
        *client = hop;
        if (!http_trusts(&hop)) return true;
        list.len = at > 0 ? at - 1 : 0;
    }
    return false;
}

/* Reads a complete head, in which CR LF ends every line. NULL, or what is wrong. */
static const char *http_parse(slice head, struct request *q) {
    static const char *const names[HEADERS] = {
        "Host", "Content-Length", "Transfer-Encoding", "Sec-WebSocket-Key", "Sec-WebSocket-Version", "Origin",
        "Content-Type", "Authorization", "Expect", "Connection", "Upgrade", "X-Forwarded-For",
    };
    slice line = slice_split(&head, '\n');
    http_start(slice_take(line, line.len - 1), q);   /* which http_head_end() has found good */
    for (size_t i = 0; i < HEADERS; i++) q->header[i] = S("");
    q->lines = slice_take(head, head.len - 2);
    while (head.len > 2) {
        slice value = slice_split(&head, '\n'), name = slice_split(&value, ':');
        if (value.len == 0 || !http_is_token(name)) return "bad header line\n";
        value = slice_trim(slice_take(value, value.len - 1));   /* without the CR */
        if (!is_text(value, ' ', '\t')) return "control character in a header\n";
        for (size_t i = 0; i < HEADERS; i++) {
            if (!slice_eqcase(name, slice_of(names[i]))) continue;
            if ((q->header[i].len > 0 || value.len == 0) && i < CONNECTION) return "a header comes twice, or empty\n";
            if (i == CONNECTION) {
                q->close |= http_has_token(value, S("close"));
                q->upgrade |= http_has_token(value, S("Upgrade"));
            }
            struct addr hop;   /* of several lines the last that names a client counts */
            if (i != FORWARDED || q->header[i].len == 0 || http_client(value, &hop)) q->header[i] = value;
        }
    }
    q->length = q->header[LENGTH].len > 0 ? slice_number(q->header[LENGTH], 10) : 0;
    if (q->length < 0 || q->header[ENCODING].len > 0) return "a body needs a Content-Length, in digits\n";
    if (q->header[HOST].len == 0 && q->keep) return "a Host header is needed\n";
    if (q->host.len > 0) q->header[HOST] = q->host;   /* RFC 9112, 3.2.2 */
    if (!q->keep) q->header[EXPECT] = S("");   /* HTTP/1.0 knows no 100 */
    q->keep = q->keep && !q->close;
    return NULL;
}

/* The length of the head that starts at p, with its empty line; 0 if that has not come,
 * -1 if it can never be one. Looks at each byte once: a peer may drip them. */
static ssize_t http_head_end(struct conn *c, const char *p, size_t n) {
    struct request q;
    if (!http_is_token((slice){p, 1})) return -1;   /* a TLS hello, for example */
    for (size_t i = c->searched; i < n; i++) {
        if (p[i] == '\0' || (p[i] == '\n' && p[i - 1] != '\r')) return -1;   /* at 0 is a letter, so... */
        if (p[i] == '\n' && p[i - 2] == '\n') return (ssize_t)i + 1;   /* ...i is at least 2 here */
        if (p[i] == '\n' && memchr(p, '\n', i) == NULL && !http_start((slice){p, i - 1}, &q)) return -1;
    }
    c->searched = (uint32_t)n;
    return 0;
}

/* The peer gets --timeout, and a second for each KB, to take what there is for it and to ask. */
static void http_wait(struct conn *c) { c->deadline_ms = now.ms + (int64_t)opt.timeout_s * 1000 + c->out.len; }

/* Queues a response; `extra` is header lines, each with its CR LF. */
static void http_reply(struct conn *c, const struct request *q, const char *status, slice extra, slice body) {
    const char *next = q->keep ? "keep-alive" : strncmp(status, "426", 3) == 0 ? "close, upgrade" : "close";
    buf_printf(&c->out, "HTTP/1.1 %s\r\nContent-Length: %zu\r\nConnection: %s\r\n%.*s\r\n", status, body.len, next,
               F(extra));
    if (!slice_eq(q->method, S("HEAD"))) buf_add(&c->out, body);
    http_wait(c);
    log_debug("%s: %.*s %.*s: %s", addr_text(&c->peer), F(q->method), F(q->path), status);   /* no query */
    conn_touch(c);
    if (!q->keep) conn_close(c, status);
}

#define PLAIN "Content-Type: text/plain\r\n"

/* Answers what gets no further, and ends the connection: -1. Of many, some are logged. */
static int http_refuse(struct conn *c, const char *status, slice extra, const char *why) {
    if (now.ms - http.logged_ms >= TICK_MS) {
        http.logged_ms = now.ms;
        log_info("%s: %s: %.*s", addr_text(&c->peer), status, (int)strlen(why) - 1, why);
    }
    http_reply(c, &(struct request){.method = S("-"), .path = S("-")}, status, extra, slice_of(why));
    return -1;
}

/* Without the port that goes without saying. */
static slice http_host(slice host, slice port) {
    size_t n = host.len > port.len ? host.len - port.len : 0;
    return n > 0 && slice_eq(slice_cut(host, n), port) ? slice_take(host, n) : host;
}

/* Any page can have its reader's browser connect to any server, which must look whose page
 * that is (Origin, RFC 6454): ours, or one of --origin. Without that option a page from another
 * port of our host is ours, too: that of workerman-chat is. Apps send none, or where they go. */
static bool http_welcome(const struct conn *c, const struct request *q) {
    slice origin = q->header[ORIGIN], host = origin, scheme = slice_split(&host, ':'), list = slice_of(opt.origin);
    bool tls = http_has_token(S("https,wss"), scheme), plain = http_has_token(S("http,ws"), scheme);
    slice port = tls ? S(":443") : S(":80"), own = slice_starts(host, S("//")) ? slice_cut(host, 2) : S("");
    if (origin.len == 0 || http_has_token(list, origin) || http_has_token(list, S("*"))) return true;
    slice here = q->header[HOST];
    if (own.len == 0 || !(tls || plain)) return false;
    if (list.len == 0) return slice_eqcase(http_name(own), http_name(here));
    return (tls || c->ssl == NULL) && slice_eqcase(http_host(own, port), http_host(here, port));
}

/* The upgrade (RFC 6455, section 4.2). */
static int ws_upgrade(struct conn *c, const struct request *q) {
    unsigned char text[60], hash[SHA_DIGEST_LENGTH], accept[4 * (SHA_DIGEST_LENGTH / 3 + 1) + 1];
    const struct site *site = c->state;
    slice key = q->header[WS_KEY];
    bool key_ok = key.len == 24 && slice_eq(slice_cut(key, 22), S("=="));
    for (size_t i = 0; key_ok && i < 22; i++) key_ok = is_alnum(key.p[i]) || key.p[i] == '+' || key.p[i] == '/';
    if (!slice_eq(q->method, S("GET")) || !q->keep || !q->upgrade)
        return http_refuse(c, "400 Bad Request", S(PLAIN), "an upgrade is a GET with 'Connection: Upgrade'\n");
    if (!slice_eq(q->header[WS_VERSION], S("13")))
        return http_refuse(c, "426 Upgrade Required",
                           S(PLAIN "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"), "wrong version\n");
    if (!key_ok) return http_refuse(c, "400 Bad Request", S(PLAIN), "Sec-WebSocket-Key: 16 bytes in base64\n");
    if (site->upgraded == NULL) return http_refuse(c, "400 Bad Request", S(PLAIN), "there is no WebSocket here\n");
    if (!http_welcome(c, q)) return http_refuse(c, "403 Forbidden", S(PLAIN), "a page not of --origin asks\n");
    memcpy(text, key.p, 24);
    memcpy(text + 24, "258EAFA5-E914-47DA-95CA-C5AB0DC85B11", 36);
    if (SHA1(text, sizeof text, hash) == NULL) die("out of memory (SHA-1)");
    EVP_EncodeBlock(accept, hash, sizeof hash);
    buf_printf(&c->out, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
               "Connection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n", accept);
    conn_touch(c);
    site->upgraded(c, q);
    log_debug("%s: is a %s client", addr_text(&c->peer), c->proto->name);
    return 0;
}

/* `freed` of HTTP, and of what it was upgraded to: until then it holds a descriptor. */
static void http_freed(struct conn *c) { http_count(c, false); }

/* Behind a proxy each request may come from somebody else. Before that is looked at it is the proxy's. */
static void http_proxied(struct conn *c) {
    struct sockaddr_storage proxy = {.ss_family = AF_UNIX};
    socklen_t len = sizeof proxy;
    http_count(c, false);
    if (getpeername(c->fd, (struct sockaddr *)&proxy, &len) == 0) c->peer = addr_of(&proxy);
}

static int http_answer(struct conn *c, const struct request *q) {
    const struct site *site = c->state;
    if (c->proxy) http_client(q->header[FORWARDED], &c->peer);
    if (!http_count(c, true) && site->allowed == NULL) {   /* nobody has made room for it; orders are heard */
        c->eof = true;   /* do not wait for the peer: it has nothing more to say */
        http.turned_away++;
        const char *status = c->crowded ? "429 Too Many Requests" : "503 Service Unavailable";
        const char *why = c->crowded ? "over --max-per-address\n" : "over --max-clients\n";
        return http_refuse(c, status, S(PLAIN "Retry-After: 5\r\n"), why);
    }
    if (http_has_token(q->header[UPGRADE], S("websocket"))) return ws_upgrade(c, q);
    site->request(c, q);
    return 0;
}

static ssize_t http_feed(struct conn *c, char *p, size_t n) {
    if (c->plain) return http_refuse(c, "400 Bad Request", S(PLAIN), "this port speaks TLS: use https:// or wss://\n");
    bool blank = c->searched == 0 && *p == '\r';   /* skipped before a head (RFC 9112, 2.2) */
    if (blank && (n == 1 || p[1] == '\n')) return n == 1 ? 0 : 2;
    ssize_t end = http_head_end(c, p, n);
    struct request q = {0};
    if (end >= 0 && (end > 0 ? (size_t)end : n) > opt.max_head)
        return http_refuse(c, "431 Request Header Fields Too Large", S(PLAIN), "the head is over --max-head\n");
    if (c->spoke && c->in.len == 0) http_wait(c);   /* on a connection that was kept a request begins */
    if (end == 0) return 0;
    c->searched = 0;
    const char *why = end > 0 ? http_parse((slice){p, (size_t)end}, &q) : "this is not HTTP/1.1\n";
    const struct site *site = c->state;
    if (why == NULL && q.length > 0 && site->body == 0) why = "no body is taken here\n";
    if (why != NULL) return http_refuse(c, "400 Bad Request", S(PLAIN), why);
    if (q.length > site->body) return http_refuse(c, "413 Content Too Large", S(PLAIN), "the body is too long\n");
    if (c->proxy) http_proxied(c);
    if (site->allowed != NULL && !site->allowed(c, &q)) return -1;   /* before the body is waited for */
    q.body = slice_cut((slice){p, n}, (size_t)end);
    bool expected = (int64_t)q.body.len < q.length;
    if (expected && !c->expected && slice_eqcase(q.header[EXPECT], S("100-continue")))
        buf_add(&c->out, S("HTTP/1.1 100 Continue\r\n\r\n")), conn_touch(c);
    c->expected = expected;
    if (expected) return 0;
    q.body.len = (size_t)q.length;
    return http_answer(c, &q) < 0 ? -1 : end + (ssize_t)q.length;
}

static void http_tick(struct conn *c) {
    if (now.ms < c->deadline_ms) return;
    if (c->out.len > 0) conn_lost(c, "reads too slowly");
    else if (c->in.len == 0) conn_close(c, "nothing asked");
    else http_refuse(c, "408 Request Timeout", S(PLAIN), "the request took longer than --timeout\n");
}

/* A long last answer has a second for each KB, too. */
static void http_closed(struct conn *c) { c->deadline_ms += c->out.len; }

static const struct proto http_proto = {
    .name = "http", .feed = http_feed, .tick = http_tick, .closed = http_closed, .freed = http_freed,
};

static void http_accepted(struct conn *l, struct conn *c) {
    c->proto = &http_proto;
    c->state = l->state;
    c->proxy = http_trusts(&c->peer);
    if (!c->proxy) http_count(c, true);
    /* Who is refused anyway must not hold a descriptor for long. */
    c->deadline_ms = now.ms + (c->refused ? TICK_MS : (int64_t)opt.timeout_s * 1000);
    if (!c->refused || http.refused <= REFUSED_MAX) return;
    http.turned_away++;
    conn_lost(c, c->crowded ? "over --max-per-address" : "over --max-clients");
}

static const struct proto http_listener = {
    .name = "listener", .accepted = http_accepted, .tick = conn_touch, .closed = listener_closed,
};

static void http_figures(struct buf *b) {
    buf_printf(b, "xchat_connections %u\nxchat_connections_refused_total %llu\n", http.connections, http.turned_away);
    buf_printf(b, "xchat_closed_total{why=\"slow\"} %llu\nxchat_closed_total{why=\"silent\"} %llu\n",
               http.slow, http.silent);
}

/* ---- Frames. ---- */

/* Appends a server's frame to a buffer: a connection's own, or a room's log. */
static void ws_append(struct buf *b, int opcode, slice payload) {
    int more = payload.len < 126 ? 0 : payload.len < 65536 ? 2 : 8;
    buf_addc(b, (char)(0x80 | opcode));
    buf_addc(b, (char)(more == 0 ? payload.len : more == 2 ? 126 : 127));
    buf_be(b, payload.len, more);
    buf_add(b, payload);
}

/* How many bytes of length follow the first two; and the length they give. */
static size_t ws_more(const char *p) { return (p[1] & 0x7f) == 126 ? 2 : (p[1] & 0x7f) == 127 ? 8 : 0; }

static uint64_t ws_length(const char *p) {
    uint64_t len = ws_more(p) > 0 ? 0 : p[1] & 0x7f;
    for (size_t i = 0; i < ws_more(p); i++) len = len << 8 | (unsigned char)p[2 + i];
    return len;
}

/* The whole size of a frame that ws_append() wrote. */
static size_t ws_frame_size(const char *p) { return 2 + ws_more(p) + (size_t)ws_length(p); }

/* Ends a connection with a close frame: -1. `why` is a literal, for the log and the peer. */
static int ws_close(struct conn *c, uint16_t code, const char *why) {
    struct ws *ws = c->state;
    if (!c->closing) ws->close_code = code;
    if (code == WS_TRY_AGAIN) ws->behind = true;
    conn_close(c, why);
    return -1;
}

/* The last thing in `closed` of a WebSocket protocol: goodbye, to whom is left to hear it. */
static void ws_end(struct conn *c) {
    struct ws *ws = c->state;
    uint16_t code = ws->close_code != 0 ? ws->close_code : WS_GOING_AWAY;
    char payload[125] = {(char)(code >> 8), (char)(code & 0xff)};
    size_t n = code == WS_NO_CODE ? 0 : 2;
    if (!ws->peer_closed) n += (size_t)snprintf(payload + 2, sizeof payload - 2, "%s", c->why);
    if (!ws->peer_closed && ws->close_code != 0)
        log_info("%s: closed with %u: %s", addr_text(&c->peer), code, c->why);
    http.slow += !ws->peer_closed && code == WS_TRY_AGAIN;
    http.silent += !ws->peer_closed && code == WS_SILENT;
    if (!c->lost && !c->eof) ws_append(&c->out, WS_CLOSE, (slice){payload, n});
    buf_free(&ws->text);
}

/* May it be sent more? Only who does not take what is for it is too far behind: it may be all of this round. */
static bool ws_takes(struct conn *c) {
    if (c->out.len > opt.backlog) conn_flush(c);
    if (c->out.len > opt.backlog) ws_close(c, WS_TRY_AGAIN, "more than --backlog unread");
    return !c->closing;
}

/* Sends a text to this client alone. */
static void ws_text(struct conn *c, slice text) {
    if (ws_takes(c)) ws_append(&c->out, WS_TEXT, text);
    conn_touch(c);
}

/* A whole control frame, unmasked. Returns 0, or -1 if it is wrong. */
static int ws_control(struct conn *c, slice payload) {
    struct ws *ws = c->state;
    const unsigned char *u = (const unsigned char *)payload.p;
    if (ws->opcode == WS_PING) ws_append(&c->out, WS_PONG, payload);
    conn_touch(c);
    if (ws->opcode != WS_CLOSE) return 0;
    int code = payload.len == 0 ? WS_NO_CODE : payload.len == 1 ? 0 : u[0] << 8 | u[1];
    bool known = (code >= 1000 && code <= 1014 && (code < 1004 || code > 1006)) || (code >= 3000 && code <= 4999);
    if (payload.len > 0 && !known) return ws_close(c, WS_PROTOCOL_ERROR, "bad close code");
    if (payload.len > 2 && !utf8_valid(slice_cut(payload, 2))) return ws_close(c, WS_BAD_UTF8, "bad UTF-8");
    ws->peer_closed = true;
    ws_close(c, (uint16_t)code, "closed by the client");
    return 0;
}

/* Reads a frame header into c->state, per the consume contract: its size, 0 or -1. */
static int ws_head(struct conn *c, const char *p, size_t n) {
    struct ws *ws = c->state;
    if ((p[0] & 0x70) != 0 || (p[0] & 7) > 2) return ws_close(c, WS_PROTOCOL_ERROR, "reserved bit or opcode");
    if (n < 2) return 0;
    size_t more = ws_more(p);
    bool control = (p[0] & 8) != 0;
    ws->opcode = (uint8_t)p[0] & 15u;
    ws->fin = (p[0] & 0x80) != 0;
    if ((p[1] & 0x80) == 0) return ws_close(c, WS_PROTOCOL_ERROR, "frame without a mask");
    if (control && (!ws->fin || more > 0)) return ws_close(c, WS_PROTOCOL_ERROR, "long or fragmented control");
    if (ws->opcode == WS_BINARY) return ws_close(c, WS_NOT_TEXT, "binary is not taken here");
    if (!control && (ws->opcode == WS_CONTINUATION) != (ws->fragments > 0))
        return ws_close(c, WS_PROTOCOL_ERROR, "fragment out of order");
    if (n < 2 + more) return 0;
    uint64_t len = ws_length(p);
    if ((more == 2 && len < 126) || (more == 8 && (len < 65536 || len >> 63 != 0)))
        return ws_close(c, WS_PROTOCOL_ERROR, "length not in its shortest form");
    if (!control && (len > opt.max_message || len + ws->text.len > opt.max_message))
        return ws_close(c, WS_TOO_BIG, "message over --max-message");
    if (n < 6 + more + (control ? len : 0)) return 0;   /* a control frame: wait for all of it */
    if (!control && ++ws->fragments > FRAGMENTS_MAX) return ws_close(c, WS_POLICY, "too many fragments");
    ws->left = (uint32_t)len;
    memcpy(ws->mask, p + 2 + more, 4);
    return (int)(6 + more);
}

/* Payload of a text, unmasked. A whole message in one piece is handed on where it is. */
static int ws_payload(struct conn *c, slice part) {
    struct ws *ws = c->state;
    bool complete = ws->left == 0 && ws->fin;
    if (!utf8_feed(&ws->utf8, part) || (complete && ws->utf8.missing > 0))
        return ws_close(c, WS_BAD_UTF8, "text is not UTF-8");
    if (!complete || ws->text.len > 0) buf_add(&ws->text, part);
    if (!complete) return 0;
    c->proto->message(c, ws->text.len > 0 ? buf_slice(&ws->text) : part);
    buf_free(&ws->text);
    ws->fragments = 0;
    return 0;
}

/* The `feed` of every WebSocket protocol. */
static ssize_t ws_feed(struct conn *c, char *p, size_t n) {
    struct ws *ws = c->state;
    int head = ws->left > 0 ? 0 : ws_head(c, p, n);
    if (head < 0 || (head == 0 && ws->left == 0)) return head;
    p += head, n -= (size_t)head;
    size_t take = n < ws->left ? n : ws->left;
    uint8_t mask[8];
    memcpy(mask, ws->mask, 4), memcpy(mask + 4, ws->mask, 4);
    for (size_t i = 0; i < take; i++) p[i] = (char)(p[i] ^ (char)mask[i & 3]);
    memcpy(ws->mask, mask + (take & 3), 4);
    ws->left -= (uint32_t)take;
    int result = ws->opcode < WS_CLOSE ? ws_payload(c, (slice){p, take}) : ws_control(c, (slice){p, take});
    return result < 0 ? -1 : head + (ssize_t)take;
}

/* ==========================================================================
 * 6. History
 * ==========================================================================
 *
 * What anybody has seen must not be forgotten, not even by a server that is killed. So
 * each room has a log of lines, one JSON object each, just as they were sent; a position
 * in it counts all bytes ever said:
 *
 *     DIR/rooms/lobby/0000000000000000.log    {"type":"say", ... "id":"9f0c33a1-00000000000000b4"}
 *                                             {"type":"say", ... "id":"9f0c33a1-0000000000000173"}
 *                     0000000000100043.log    {"type":"say", ... "id":"9f0c33a1-0000000000100102"}
 *
 * A file is named by the position of its first byte. The id of a message is the epoch,
 * a number that is another one whenever the log was opened (the end of a log may get
 * lost, and other lines come to stand there), and the position just BEHIND its line. So
 * to find everything since an id is to read from there on, if the line in front has that
 * id; and a line says itself where it belongs: one that does not is damaged, and skipped.
 *
 * What was said in a round is written by one pwrite() at its end, before anybody is
 * sent it. If that fails, nothing was said, and the file is cut back. A crash can leave
 * one torn line at the end: it is cut off when the log is opened again.
 *
 * A file is open only while it is read or written, so a thousand rooms need no
 * descriptors. Without --data the newest lines are kept in memory, in the same form.
 *
 * Owns: the files in --data, the logs. Calls: 1 Bytes, 2 JSON, 3 Tables.
 * Called by: 7 Rooms, 8 Push, 9 Chat, 11 HTTP API, 12 Page, 13 Main.
 * Promises: what history_commit() has confirmed survives kill -9; with --fsync, the
 * loss of power too.
 */

enum { ID_BYTES = 25 };            /* 8 hex digits, '-', 16 hex digits */
enum { UNREAD = -2 };              /* no position, but one that cannot be looked for now */

struct history {
    uint64_t base, end;            /* positions of what is kept */
    uint64_t newest;               /* behind the last good line... */
    uint32_t newest_epoch, epoch;  /* ...which has this one; and that of the next */
    struct buf lines;              /* said in this round, to be written */
    struct buf tail;               /* without --data: the bytes from base to end */
    uint64_t *segment;             /* with it: the positions where files begin */
    size_t segments;
    bool unknown;                  /* its files cannot be looked at: nobody may enter */
    bool failing, damaged;         /* said so in the log */
    struct idle *idle;             /* where it waits, while it is not in use */
    uint8_t key_len;
    char key[];                    /* "rooms/" or "users/", and a name */
};

static struct {
    int dir_fd;                        /* of --data, or -1 */
    struct table logs;
    struct idle {
        struct history *log;
        uint64_t since;
    } idle[IDLE_LOGS];                 /* without --data: not in use since closing number... */
    uint64_t closings;
    uint64_t forgotten;                /* without --data: new logs begin behind all that are gone */
    struct window {                    /* the bytes read last */
        const struct history *of;
        uint64_t at;                   /* their position */
        slice bytes;                   /* in `block`, or in the log's tail */
    } window;
    struct buf block;
    uint32_t seen;                     /* history_place(): the epoch of that line */
    unsigned long long written, failures;   /* bytes, and writes that failed */
} histories;

static slice history_key(const void *item) {
    const struct history *h = item;
    return (slice){h->key, h->key_len};
}

static void history_id(uint32_t epoch, uint64_t position, char id[ID_BYTES + 1]) {
    snprintf(id, ID_BYTES + 1, "%08x-%016llx", (unsigned)epoch, (unsigned long long)position);
}

/* The id of the newest message. */
static void history_newest(const struct history *h, char id[ID_BYTES + 1]) {
    history_id(h->newest_epoch, h->newest, id);
}

/* Of 16 hex digits; -1 if they are none, and for what no file can be as long as. */
static int64_t history_number(slice s) {
    int64_t high = slice_number(slice_take(s, 8), 16), low = slice_number(slice_cut(s, 8), 16);
    return high < 0 || high > INT32_MAX || low < 0 ? -1 : high << 32 | low;
}

/* ---- Files. ---- */

struct path {
    char text[480];
};

/* The path of the room's directory, or of a file in it. All but letters, digits, '-' and
 * '_' is %XX, so that no name leads out. One too long for a file system is its hash. */
static struct path history_path(const struct history *h, const char *file) {
    unsigned char hash[SHA256_DIGEST_LENGTH];
    struct path path;
    slice name = history_key(h), space = slice_split(&name, '/');
    size_t start = (size_t)snprintf(path.text, sizeof path.text, "%.*s/", F(space)), n = start;
    for (size_t i = 0; i < name.len; i++) {
        char c = name.p[i];
        const char *format = is_alnum(c) || c == '-' || c == '_' ? "%c" : "%%%02X";
        n += (size_t)snprintf(path.text + n, sizeof path.text - n, format, (unsigned char)c);
    }
    if (n - start > FILE_NAME_BYTES) {
        sha256(name, hash);
        n = start + (size_t)snprintf(path.text + start, 3, "%%%%");
        for (size_t i = 0; i < sizeof hash; i++) n += (size_t)snprintf(path.text + n, 3, "%02x", hash[i]);
    }
    snprintf(path.text + n, sizeof path.text - n, "%s%s", *file != '\0' ? "/" : "", file);
    return path;
}

/* The path of the file that begins at this position. */
static struct path history_file_path(const struct history *h, uint64_t start) {
    char file[32];
    snprintf(file, sizeof file, "%016llx.log", (unsigned long long)start);
    return history_path(h, file);
}

static int history_openat(struct path path, int flags) {
    return openat(histories.dir_fd, path.text, flags | O_CLOEXEC | O_NONBLOCK, 0640);   /* a pipe must not stop us */
}

/* If it is open. errno stays as it was. */
static void history_close_file(int fd) {
    int error = errno;
    if (fd >= 0) close(fd);
    errno = error;
}

/* Forgets the n oldest files. */
static void history_drop(struct history *h, size_t n) {
    h->segments -= n;
    memmove(h->segment, h->segment + n, h->segments * sizeof *h->segment);
    h->base = h->segments > 0 ? h->segment[0] : h->end;
}

/* Which file holds the byte at this position: the last that does not begin behind it. */
static size_t history_file(const struct history *h, uint64_t at) {
    size_t low = 0, high = h->segments;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        *(h->segment[middle] <= at ? &low : &high) = middle;
    }
    return low;
}

/* A file is not what it should be: what is left is what is newer. */
static void history_lose(struct history *h, uint64_t at) {
    size_t i = history_file(h, at);
    log_warn("%s is gone, or too short: it and what is older is left out", history_file_path(h, h->segment[i]).text);
    history_drop(h, i + 1);
}

/* Reads the bytes from `from` to `to`, which are in one file, into the window. False, with
 * errno: ENOENT if the file has gone, or does not have them. */
static bool history_load(const struct history *h, uint64_t from, uint64_t to) {
    size_t n = (size_t)(to - from);
    uint64_t start = h->segment[history_file(h, from)];
    int fd = history_openat(history_file_path(h, start), O_RDONLY);
    if (buf_cap(&histories.block) > READ_BYTES) buf_free(&histories.block);   /* a long line was in it */
    char *p = buf_room(&histories.block, n);
    size_t len = 0;
    ssize_t got = fd >= 0 ? 1 : -1;
    for (; got > 0 && len < n; len += got > 0 ? (size_t)got : 0)   /* it may come in pieces */
        got = pread(fd, p + len, n - len, (off_t)(from - start + len));
    if (got >= 0) errno = ENOENT;
    history_close_file(fd);
    histories.window = (struct window){h, from, {p, len == n ? n : 0}};
    return len == n;
}

/* Finds the line that begins at a position, or if `back` the one that ends there, with
 * its line end. It lasts until the next call. What is longer than any line comes in
 * pieces. False: it cannot be read; if its file has gone, it is left out from now on. */
static bool history_line(struct history *h, uint64_t at, bool back, slice *line) {
    bool files = histories.dir_fd >= 0;
    size_t i = files ? history_file(h, back ? at - 1 : at) : 0;
    uint64_t low = files ? h->segment[i] : h->base, high = i + 1 < h->segments ? h->segment[i + 1] : h->end;
    if (!files) histories.window = (struct window){h, low, buf_slice(&h->tail)};
    for (size_t want = READ_BYTES;;) {
        struct window in = histories.window;
        bool hit = in.of == h && at >= in.at && at <= in.at + in.bytes.len;
        size_t split = hit ? (size_t)(at - in.at) : 0, n = 0;
        slice w = !hit ? S("") : back ? slice_take(in.bytes, split) : slice_cut(in.bytes, split);
        while (n < w.len && (n == 0 || w.p[back ? w.len - 1 - n : n - 1] != '\n')) n++;
        bool whole = back ? n < w.len || at - n == low : at + n == high || (n > 0 && w.p[n - 1] == '\n');
        *line = (slice){back ? w.p + w.len - n : w.p, n};
        if (whole || n >= LINE_MAX_BYTES) return true;
        while (want <= n) want *= 2;
        uint64_t from = !back ? at : at - low > want ? at - want : low;
        uint64_t to = back ? at : high - at > want ? at + want : high;
        if (to - from > n && history_load(h, from, to)) continue;
        if (errno == ENOENT) history_lose(h, from);
        return false;
    }
}

/* Where this message of ours ends, as its id says; -1: it is none. */
static int64_t history_place(slice line) {
    struct json_field id = {.name = "id"};
    char again[ID_BYTES + 1];
    size_t where;
    if (json_pick(line, &id, 1, &where) != NULL || id.raw.len != ID_BYTES + 2) return -1;
    histories.seen = (uint32_t)slice_number((slice){id.raw.p + 1, 8}, 16);   /* of no number: not the same as text */
    int64_t at = history_number((slice){id.raw.p + 10, 16});
    history_id(histories.seen, (uint64_t)at, again);
    return json_is(id.raw, again) ? at : -1;
}

/* Is this line, or text, the next that was stored since the log was opened, behind this position? Then that moves on.
 * What a back end says besides may have an id of its own, or that of an earlier one. */
static bool history_follows(const struct history *h, slice line, uint64_t *at) {
    int64_t end = history_place(line);
    if (end <= (int64_t)*at || end > (int64_t)h->end || histories.seen != h->epoch) return false;
    *at = (uint64_t)end;
    return true;
}

/* ---- Opening. ---- */

static int history_compare(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void history_add_file(struct history *h, uint64_t start) {
    h->segment = xrealloc(h->segment, (h->segments + 1) * sizeof *h->segment);
    h->segment[h->segments++] = start;
    if (h->segments == 1) h->base = start;
}

/* Finds the files of a room, oldest first. False, with errno, if that is not possible now. */
static bool history_find(struct history *h) {
    int fd = history_openat(history_path(h, ""), O_RDONLY | O_DIRECTORY);
    if (fd < 0) return errno == ENOENT;
    DIR *dir = fdopendir(fd);
    if (dir == NULL) die("out of memory (directory)");
    errno = 0;
    for (struct dirent *e; (e = readdir(dir)) != NULL; errno = 0) {
        slice name = slice_of(e->d_name);
        int64_t start = name.len == 20 ? history_number(slice_take(name, 16)) : -1;
        if (start >= 0 && strcmp(strrchr(history_file_path(h, (uint64_t)start).text, '/') + 1, e->d_name) == 0)
            history_add_file(h, (uint64_t)start);
    }
    int error = errno;
    closedir(dir);
    if (h->segments > 0) qsort(h->segment, h->segments, sizeof *h->segment, history_compare);
    return errno = error, error == 0;
}

/* Finds where the log begins and ends: at the last gap, and the last line end. False, with
 * errno, if that is not possible now. */
static bool history_measure(struct history *h) {
    struct stat st;
    slice line;
    for (size_t i = h->segments; i-- > 0;) {
        if (fstatat(histories.dir_fd, history_file_path(h, h->segment[i]).text, &st, 0) != 0) return false;
        uint64_t behind = h->segment[i] + (S_ISREG(st.st_mode) ? (uint64_t)st.st_size : 0);
        if (i + 1 == h->segments) h->end = behind;
        else if (behind < h->segment[i + 1]) {
            history_lose(h, h->segment[i]);
            break;
        }
    }
    uint64_t start = h->segments > 0 ? h->segment[h->segments - 1] : 0, end = h->end;
    h->base = h->segments > 0 ? h->segment[0] : 0;
    for (; h->end > start; h->end -= line.len) {
        if (!history_line(h, h->end, true, &line)) return false;
        if (line.p[line.len - 1] == '\n') break;
    }
    if (h->end == end) return true;
    histories.window.of = NULL;   /* it has bytes that go */
    struct path path = history_file_path(h, start);
    log_warn("%s: %llu bytes of a torn last line cut off", path.text, (unsigned long long)(end - h->end));
    int fd = history_openat(path, O_WRONLY);
    if (fd < 0 || ftruncate(fd, (off_t)(h->end - start)) != 0) log_warn("%s: %s", path.text, strerror(errno));
    history_close_file(fd);
    return true;
}

/* Goes over lines up to a position, forth or back, to a message; see history_line(). */
static bool history_step(struct history *h, uint64_t *at, uint64_t upto, bool back, slice *line) {
    while (*at >= h->base && (back ? *at > upto : *at < upto) && history_line(h, *at, back, line)) {
        uint64_t end = back ? *at : *at + line->len;
        *at = back ? *at - line->len : end;
        if (history_place(*line) == (int64_t)end) return line->len--, true;   /* without its line end */
        if (!h->damaged) log_warn("%.*s: damaged lines are left out; one ends at byte %llu of its history",
                                  F(history_key(h)), (unsigned long long)end);
        h->damaged = true;
    }
    return false;
}

/* Finds the newest message before a position: moves *at to where its line begins.
 * False: there is none. */
static bool history_before(struct history *h, uint64_t *at, slice *line) {
    return history_step(h, at, h->base, true, line);
}

/* Finds the oldest message between two positions, and moves *at behind it. False:
 * there is none; if *at is not `upto` then, something has got lost. */
static bool history_next(struct history *h, uint64_t *at, uint64_t upto, slice *line) {
    return history_step(h, at, upto, false, line);
}

/* Opens the files of a log. False, with errno, if that is not possible now. */
static bool history_open_files(struct history *h) {
    uint32_t random;
    slice line;
    if (RAND_bytes((unsigned char *)&random, sizeof random) != 1) die("no random bytes");
    h->epoch = h->newest_epoch = random >> 2;
    if (!history_find(h) || !history_measure(h)) return false;
    uint64_t at = h->newest = h->end;
    if (!history_before(h, &at, &line)) return at <= h->base;
    h->newest = at + line.len + 1;
    h->newest_epoch = histories.seen;
    h->epoch = histories.seen + 1 + random % 4096;   /* so that ids increase */
    return true;
}

/* The log of "rooms/" or "users/" and a name: found, opened or made. It is the caller's
 * until history_close(). Look at `unknown` before letting anybody in. */
static struct history *history_open(slice key) {
    struct history *h = table_find(&histories.logs, key);
    if (h != NULL) {
        *h->idle = (struct idle){0};
        return h;
    }
    h = xcalloc(sizeof *h + key.len);
    h->key_len = (uint8_t)key.len;
    memcpy(h->key, key.p, key.len);
    h->epoch = h->newest_epoch = (uint32_t)(table_hash(key) >> 32);   /* the ids of two rooms are not alike */
    h->base = h->end = h->newest = histories.forgotten;
    table_add(&histories.logs, h);
    h->unknown = histories.dir_fd >= 0 && !history_open_files(h);
    if (h->unknown) log_warn("--data: %.*s cannot be read: %s", F(key), strerror(errno));
    return h;
}

static void history_free(struct history *h) {
    if (histories.dir_fd < 0 && h->end > histories.forgotten) histories.forgotten = h->end;
    if (histories.window.of == h) histories.window.of = NULL;
    table_remove(&histories.logs, history_key(h));
    buf_free(&h->lines);
    buf_free(&h->tail);
    free(h->segment);
    free(h);
}

/* The room is empty. Files stay; of the logs in memory those used last do. */
static void history_close(struct history *h) {
    struct idle *place = histories.idle;   /* the oldest, or a free one: since 0 */
    if (histories.dir_fd >= 0 || h->tail.len == 0 || buf_cap(&h->tail) > 4 * MEMORY_BYTES) {
        history_free(h);
        return;
    }
    for (struct idle *i = place; i < histories.idle + IDLE_LOGS; i++)
        if (i->since < place->since) place = i;
    if (place->log != NULL) history_free(place->log);
    *place = (struct idle){h, ++histories.closings};
    h->idle = place;
}

/* ---- Writing. ---- */

/* Queues a line for this round's write. The text must not hold a line end; its id is
 * written at `id`, where there are ID_BYTES. */
static void history_add(struct history *h, slice text, char *id) {
    char again[ID_BYTES + 1];
    history_id(h->epoch, h->end + h->lines.len + text.len + 1, again);
    memcpy(id, again, ID_BYTES);
    buf_add(&h->lines, text);
    buf_addc(&h->lines, '\n');
}

/* Makes the entries of a directory survive the loss of power. */
static bool history_sync(struct path dir) {
    int fd = opt.fsync ? history_openat(dir, O_RDONLY | O_DIRECTORY) : -1;
    bool ok = !opt.fsync || (fd >= 0 && fsync(fd) == 0);
    history_close_file(fd);
    return ok;
}

/* Begins a new file at the end of the log. Returns it, or -1. */
static int history_create(struct history *h) {
    struct path dir = history_path(h, ""), spaces = dir, path = history_file_path(h, h->end);
    if (mkdirat(histories.dir_fd, dir.text, 0750) != 0 && errno != EEXIST) return -1;
    int fd = history_openat(path, O_WRONLY | O_CREAT | O_EXCL);
    spaces.text[strcspn(spaces.text, "/")] = '\0';
    if (fd >= 0 && (!history_sync(dir) || !history_sync(spaces))) {
        unlinkat(histories.dir_fd, path.text, 0);
        history_close_file(fd);
        return -1;
    }
    if (fd >= 0) history_add_file(h, h->end);
    return fd;
}

/* Opens the file that is to be appended to, with its end where it should be; or -1. */
static int history_open_last(struct history *h) {
    uint64_t start = h->segments > 0 ? h->segment[h->segments - 1] : h->end;
    off_t size = (off_t)(h->end - start);
    struct stat st;
    if (h->segments == 0 || h->end - start >= opt.segment) return history_create(h);
    int fd = history_openat(history_file_path(h, start), O_WRONLY);
    if (fd < 0 && errno != ENOENT) return -1;
    bool whole = fd >= 0 && fstat(fd, &st) == 0 && st.st_size >= size;
    if (whole && (st.st_size == size || ftruncate(fd, size) == 0)) return fd;
    history_close_file(fd);
    if (whole) return -1;
    if (size > 0) history_lose(h, start);
    else h->segments--;   /* nothing was in it */
    return history_create(h);
}

static bool history_write(struct history *h) {
    int fd = history_open_last(h);
    if (fd < 0) return false;
    off_t at = (off_t)(h->end - h->segment[h->segments - 1]);
    slice lines = buf_slice(&h->lines);
    ssize_t n = pwrite(fd, lines.p, lines.len, at);
    if (n >= 0) errno = ENOSPC;   /* which is what a short write means */
    bool ok = n == (ssize_t)lines.len && (!opt.fsync || fdatasync(fd) == 0);
    int error = errno;
    if (!ok && ftruncate(fd, at) != 0) log_warn("%.*s: ftruncate: %s", F(history_key(h)), strerror(errno));
    errno = error;
    history_close_file(fd);
    return ok;
}

/* Stores what was queued. The queue itself is left to the caller, until
 * history_forget(). False: nothing of it was stored. */
static bool history_commit(struct history *h) {
    if (h->lines.len == 0) return true;
    bool ok = histories.dir_fd < 0 || history_write(h);
    if (!ok && !h->failing) log_warn("--data: %.*s cannot be stored: %s", F(history_key(h)), strerror(errno));
    if (ok && h->failing) log_info("--data: %.*s is stored again", F(history_key(h)));
    h->failing = !ok;
    histories.failures += !ok;
    if (!ok) return false;
    histories.written += h->lines.len;
    h->newest = h->end += h->lines.len;
    h->newest_epoch = h->epoch;
    if (histories.dir_fd < 0) buf_add(&h->tail, buf_slice(&h->lines));
    slice kept = buf_slice(&h->tail);   /* the newest line in any case */
    for (slice rest = kept; kept.len > MEMORY_BYTES && rest.len > 0; slice_split(&rest, '\n')) kept = rest;
    if (histories.dir_fd < 0) h->base = h->end - kept.len;
    buf_drop(&h->tail, h->tail.len - kept.len);
    if (buf_cap(&h->tail) > 4 * MEMORY_BYTES && h->tail.len <= MEMORY_BYTES) {   /* a long line was in it */
        struct buf fresh = {0};
        buf_add(&fresh, buf_slice(&h->tail));
        buf_free(&h->tail);
        h->tail = fresh;
    }
    while (h->segments > 1 && h->end - h->segment[1] >= opt.retain) {
        unlinkat(histories.dir_fd, history_file_path(h, h->segment[0]).text, 0);
        history_drop(h, 1);
    }
    return true;
}

static void history_forget(struct history *h) { buf_free(&h->lines); }

static void history_figures(struct buf *b) {
    buf_printf(b, "xchat_history_written_bytes_total %llu\nxchat_history_write_failures_total %llu\n",
               histories.written, histories.failures);
}

/* The position in an id of a message here, or of one just in front of what is kept; or -1, or UNREAD. */
static int64_t history_position(struct history *h, slice id) {
    char again[ID_BYTES + 1];
    slice line;
    int64_t epoch = id.len == ID_BYTES ? slice_number(slice_take(id, 8), 16) : -1;
    int64_t at = epoch >= 0 ? history_number(slice_cut(id, 9)) : -1;
    if (at < (int64_t)h->base || at > (int64_t)h->end) return -1;
    /* Who saw no message yet has missed nothing that is not here. The epoch of a log
     * without any message is not kept. */
    if (at == 0 && histories.dir_fd >= 0) return 0;
    history_id((uint32_t)epoch, (uint64_t)at, again);
    if (!slice_eq(id, slice_of(again))) return -1;
    if ((uint64_t)at == h->newest) return epoch == h->newest_epoch ? at : -1;
    bool first = (uint64_t)at == h->base;   /* then the line behind must do, instead of its own */
    if (first && (uint64_t)at == h->end) return -1;
    if (!history_line(h, (uint64_t)at, !first, &line)) return errno == ENOENT ? -1 : UNREAD;
    bool ours = history_place(line) == at + (first ? (int64_t)line.len : 0);
    return ours && histories.seen == epoch ? at : -1;
}

/* ---- Other files in the data directory. ---- */

/* Replaces a file as a whole: whatever happens, there is the old one or the new one. */
static bool data_write(const char *name, slice text) {
    char fresh[64];
    snprintf(fresh, sizeof fresh, "%s.new", name);
    int fd = openat(histories.dir_fd, fresh, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd >= 0) errno = ENOSPC;   /* write() sets none if a part fits */
    bool ok = fd >= 0 && write(fd, text.p, text.len) == (ssize_t)text.len && fsync(fd) == 0 &&
              renameat(histories.dir_fd, fresh, histories.dir_fd, name) == 0;
    if (!ok) log_warn("--data: %s cannot be written: %s", name, strerror(errno));
    if (fd >= 0) close(fd);
    return ok;
}

/* Hands on the wanted fields of each line of a file that is JSON, if there is such a file.
 * Those that are missing are empty, and not NULL. False, after a line in the log: it cannot
 * be read, or not to its end. */
static bool data_lines(const char *name, void (*take)(struct json_field *f), struct json_field *f, size_t n) {
    struct buf file = {0};
    size_t where;
    int fd = openat(histories.dir_fd, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    bool ok = fd >= 0 || errno == ENOENT;
    for (ssize_t got = 1; fd >= 0 && got > 0; file.len += got > 0 ? (uint32_t)got : 0)
        ok = (got = read(fd, buf_room(&file, READ_BYTES), READ_BYTES)) >= 0;
    if (!ok) log_warn("--data: %s cannot be read: %s", name, strerror(errno));
    if (fd >= 0) close(fd);
    for (slice rest = buf_slice(&file); rest.len > 0;) {
        for (size_t i = 0; i < n; i++) f[i].raw = S("");
        if (json_pick(slice_split(&rest, '\n'), f, n, &where) == NULL) take(f);
    }
    buf_free(&file);
    return ok;
}

/* Opens the data directory, unless `dir` is NULL, for this server alone. */
static void history_init(const char *dir) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET}, holder = lock;
    histories.logs.key = history_key;
    histories.dir_fd = -1;
    if (dir == NULL) return;
    if (mkdir(dir, 0750) != 0 && errno != EEXIST) die("--data %s: %s", dir, strerror(errno));
    histories.dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int fd = histories.dir_fd < 0 ? -1 : history_openat((struct path){"lock"}, O_RDWR | O_CREAT);
    if (fd < 0) die("--data %s: %s", dir, strerror(errno));
    if (opt.push_test == NULL && fcntl(fd, F_SETLK, &lock) != 0) {   /* it stays locked as long as it stays open */
        bool known = fcntl(fd, F_GETLK, &holder) == 0 && holder.l_type != F_UNLCK;
        die("--data %s: another server uses it (process %ld)", dir, known ? (long)holder.l_pid : -1L);
    }
    for (const char **space = (const char *[]){"rooms", "users", NULL}; *space != NULL; space++) {
        bool made = mkdirat(histories.dir_fd, *space, 0750) == 0 || errno == EEXIST;
        fd = made ? openat(histories.dir_fd, *space, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
        if (fd < 0) die("--data %s/%s: %s", dir, *space, strerror(errno));
        close(fd);
    }
    if (opt.fsync && fsync(histories.dir_fd) != 0) die("--data %s: %s", dir, strerror(errno));
}

/* ==========================================================================
 * 7. Rooms
 * ==========================================================================
 *
 * A message to a room of a hundred could be put into a hundred queues, long ones where
 * readers are slow. Instead a room is a LOG of encoded frames, and a member is a CURSOR:
 *
 *        dropped      kept: at most --backlog bytes
 *     - - - - - - +-------+-------+---------+-------+-------+
 *                 | frame | frame | frame   | frame | frame |
 *     - - - - - - +-------+-------+---------+-------+-------+
 *                 ^           ^             ^               ^ end
 *                 Carl        Bob           Ann is on       Dora and 96 others
 *                                           her way         have everything
 *
 * To broadcast is to append one frame. At the end of a round each member gets one send()
 * from its cursor to the end, however many messages came; when all have got there, the
 * log is empty again. A slow member holds nobody back: when the log would grow past
 * --backlog its front is dropped, and who had not read that is closed with 1013.
 *
 * Private frames (an answer, a ping) wait in the connection's own queue and go first.
 * But TCP may take half a frame, and nothing may come between its halves: then the
 * other half is moved to the private queue, and the cursor stands between frames again.
 *
 * What is to be remembered is a line of history first (chapter 6). Once it is stored, it
 * is a frame in the log, which may be sent. If it cannot be stored, its author is told,
 * and nobody has seen it. A member who was away begins in the past: it is sent the
 * history up to the moment when it came, piece by piece as it reads, and then the log
 * from that moment on: nothing is missed and nothing comes twice.
 *
 * A client may be in several rooms, with a member, and its cursor, for each. The inbox
 * of a user is a room too, in which all connections of the user are, and nobody else.
 *
 * Owns: the rooms, their logs, who is in which.
 * Calls: 1 Bytes, 2 JSON, 3 Tables, 4 The loop, 5 HTTP and WebSocket, 6 History.
 * Called by: 9 Chat, 10 Back end, 11 HTTP API, 12 Page, 13 Main.
 * Promises: all members of a room see the same messages in the same order.
 */

struct room {
    struct history *past;         /* what was said here */
    struct buf log;               /* encoded frames */
    uint32_t end;                 /* its end: bytes ever said here, modulo 2^32, as TCP counts */
    uint32_t flushed;             /* what `end` was when members were last sent to */
    struct member *first, *last;  /* in order of joining */
    uint32_t n;                   /* of them */
    struct room *older, *newer;   /* in order of being made */
    struct room *next_grown;
    bool grown;                   /* is in rooms.grown */
};

struct member {
    struct conn *c;
    struct room *room;
    uint32_t cursor;              /* sent up to here, on the scale of room->end */
    uint32_t heard;               /* where the history ended, modulo 2^32, when its client, up to date, was heard */
    struct replay {
        uint64_t at, upto;
    } *replay;                    /* or NULL: what it is sent first, in the room's history */
    struct member *prev, *next;   /* in the room */
    struct member *also;          /* the same client's place in another room */
};

static struct {
    struct table by_name;
    struct room *grown;           /* have something to send, or nobody to send to */
    struct room *last;            /* room_publish_next()'s, in this round */
    struct room *oldest, *newest;
    void (*unsaid)(slice text);   /* chapter 9's: this could not be stored */
    void (*said)(slice key, slice text);   /* chapter 8's, or NULL: this was, in the room of this key */
    unsigned long long delivered; /* copies for members */
} rooms;

static slice room_key(const void *item) { return history_key(((const struct room *)item)->past); }
static slice room_name(const struct room *r) { return slice_cut(room_key(r), 6); }

/* What this member was not sent yet. */
static slice member_unread(const struct member *m) {
    slice log = buf_slice(&m->room->log);
    return slice_cut(log, log.len - (m->room->end - m->cursor));
}

/* `peek` of every protocol whose connections can be members. One that is closing gets
 * nothing more: it will ask for what it missed, and that only works if it has seen
 * nothing behind the gap. */
static slice room_peek(struct conn *c) {
    for (struct member *m = c->joined; m != NULL && !c->closing; m = m->also)
        if (m->cursor != m->room->end) return member_unread(m);
    return S("");
}

/* Has the room looked after before the round ends. */
static void room_touch(struct room *r) {
    if (r->grown) return;
    r->grown = true;
    r->next_grown = rooms.grown;
    rooms.grown = r;
}

/* `sent` of the same: n bytes of what room_peek() lent have gone out. */
static void room_sent(struct conn *c, size_t n) {
    struct member *m = c->joined;
    while (m->cursor == m->room->end) m = m->also;
    slice unread = member_unread(m);
    size_t frames = n == unread.len ? n : 0;   /* up to the end of a frame */
    while (frames < n) frames += ws_frame_size(unread.p + frames);
    buf_add(&c->out, slice_cut(slice_take(unread, frames), n));
    m->cursor += (uint32_t)frames;
    /* Who catches up later, between flushes, may be the last to do so. */
    if (m->cursor == m->room->end && m->room->flushed == m->room->end) room_touch(m->room);
}

/* Drops what every member was sent. An empty log gives its memory back. */
static void room_trim(struct room *r) {
    uint32_t unread = 0;
    for (struct member *m = r->first; m != NULL; m = m->next)
        if (r->end - m->cursor > unread) unread = r->end - m->cursor;
    buf_drop(&r->log, r->log.len - unread);
    if (r->log.len == 0) buf_free(&r->log);
}

/* Who is closing gets nothing more from here: what it was not sent can be pushed. */
static void room_flush(struct room *r) {
    for (struct member *m = r->first; m != NULL; m = m->next)
        if (!m->c->closing) conn_flush(m->c);
    r->flushed = r->end;
    room_trim(r);
}

/* Puts a text into the log. If a lot has come in this round everybody is sent it now, so
 * that only the slow can be far behind; and if it is still too much, the front goes,
 * with those who have not read it. */
static void room_append(struct room *r, slice text) {
    size_t need = text.len + 10, keep = need > opt.backlog ? 0 : opt.backlog - need;
    if (r->end - r->flushed + need > opt.backlog / 4) room_flush(r);
    for (struct member *m = r->log.len > keep ? r->first : NULL; m != NULL; m = m->next) {
        if (r->end - m->cursor <= keep) continue;
        m->cursor = r->end;
        ws_close(m->c, WS_TRY_AGAIN, "more than --backlog behind in a room");
    }
    if (r->log.len > keep) room_trim(r);
    r->end -= r->log.len;
    ws_append(&r->log, WS_TEXT, text);
    r->end += r->log.len;
    rooms.delivered += r->n;
    room_touch(r);
}

/* Stores what was said since the last time, and then puts it into the log. False: it
 * was not stored, and the authors were told. */
static bool room_commit(struct room *r) {
    bool ok = history_commit(r->past);
    for (slice rest = buf_slice(&r->past->lines); rest.len > 0;) {
        slice line = slice_split(&rest, '\n');
        if (ok) room_append(r, line);
        else rooms.unsaid(line);
        if (ok && rooms.said != NULL) rooms.said(room_key(r), line);
    }
    history_forget(r->past);
    return ok;
}

/* The loop calls this in every round; true if there was something to do. */
static bool rooms_flush(void) {
    bool any = rooms.grown != NULL;
    rooms.last = NULL;
    while (rooms.grown != NULL) {
        struct room *r = rooms.grown;
        rooms.grown = r->next_grown;
        room_commit(r);
        r->grown = false;
        room_flush(r);
        if (r->first != NULL) continue;
        table_remove(&rooms.by_name, room_key(r));
        *(r->older != NULL ? &r->older->newer : &rooms.oldest) = r->newer;
        *(r->newer != NULL ? &r->newer->older : &rooms.newest) = r->older;
        history_close(r->past);
        buf_free(&r->log);
        free(r);
    }
    return any;
}

/* Says a text in a room, to be remembered: everybody in it is sent it once it is
 * stored. Its id is written into it at `id`, where there are ID_BYTES. */
static void room_say(struct room *r, slice text, char *id) {
    if (r->past->lines.len > opt.backlog / 4) room_commit(r);
    history_add(r->past, text, id);
    room_touch(r);
}

/* Is what this frame of a room's log says remembered? The position is that of the one before; at first 0, or more. */
static bool frame_kept(const struct room *r, slice frame, uint64_t *at) {
    return history_follows(r->past, slice_cut(frame, 2 + ws_more(frame.p)), at);
}

/* Puts what is unread into the client's own queue. Who is still being sent the past will find there
 * what is remembered; who is closing gets nothing, since there may be a gap in front of it. */
static void member_settle(struct member *m) {
    uint64_t at = m->replay != NULL ? m->replay->upto : 0;
    for (slice rest = member_unread(m), frame; rest.len > 0 && !m->c->closing; rest = slice_cut(rest, frame.len)) {
        frame = slice_take(rest, m->replay == NULL ? rest.len : ws_frame_size(rest.p));
        if (m->replay == NULL || !frame_kept(m->room, frame, &at)) buf_add(&m->c->out, frame);
        if (m->replay == NULL) m->c->owes = true;
    }
    if (m->replay != NULL) m->replay->upto = m->room->past->end;
    m->cursor = m->room->end;
    conn_touch(m->c);
}

/* Says a text that only matters now. `except`, if not NULL, is a member who is not sent it. */
static void room_publish(struct room *r, slice text, struct member *except) {
    room_commit(r);
    if (except != NULL) member_settle(except);
    room_append(r, text);
    if (except != NULL) except->cursor = r->end, rooms.delivered--;
}

/* The same, behind all that was published so in other rooms: who is in two of them hears it in
 * this order, as long as it reads. */
static void room_publish_next(struct room *r, slice text, struct member *except) {
    if (rooms.last != NULL && rooms.last != r) room_flush(rooms.last);
    rooms.last = r;
    room_publish(r, text, except);
}

/* The room of this name, made if need be and if `make`; NULL when there is none, or when
 * there are --max-rooms. `space` is "rooms/", or "users/" for an inbox. It lasts until the
 * end of a round in which nobody is in it. */
static struct room *room_get(slice space, slice name, bool make) {
    char text[TABLE_KEY_MAX];
    slice key = {text, space.len + name.len};
    if (name.len > ROOM_MAX_BYTES) return NULL;
    memcpy(text, space.p, space.len);
    memcpy(text + space.len, name.p, name.len);
    struct room *r = table_find(&rooms.by_name, key);
    if (r != NULL || !make || rooms.by_name.n >= opt.max_rooms) return r;
    r = xcalloc(sizeof *r);
    r->older = rooms.newest;
    rooms.newest = *(r->older != NULL ? &r->older->newer : &rooms.oldest) = r;
    r->past = history_open(key);
    table_add(&rooms.by_name, r);
    room_touch(r);
    return r;
}

/* The two ways to ask for one: a room to be in, or to speak in; a room to look at. */
static struct room *room_open(slice space, slice name) { return room_get(space, name, true); }
static struct room *room_find(slice space, slice name) { return room_get(space, name, false); }

/* How many clients are in a room, or NULL, without those who are going. */
static size_t room_clients(const struct room *r) {
    size_t n = 0;
    for (const struct member *m = r != NULL ? r->first : NULL; m != NULL; m = m->next) n += !m->c->closing;
    return n;
}

/* The next newer room that somebody is in, and no inbox, or the oldest; NULL: there is none. */
static struct room *room_next(const struct room *r) {
    struct room *next = r != NULL ? r->newer : rooms.oldest;
    while (next != NULL && (room_clients(next) == 0 || !slice_starts(room_key(next), S("rooms/")))) next = next->newer;
    return next;
}

/* Its place in this room, or NULL. */
static struct member *room_member(const struct room *r, const struct conn *c) {
    struct member *m = c->joined;
    while (m != NULL && m->room != r) m = m->also;
    return m;
}

/* In how many rooms it is. */
static size_t room_count(const struct conn *c) {
    size_t n = 0;
    for (const struct member *m = c->joined; m != NULL; m = m->also) n++;
    return n;
}

/* Puts a client into a room, unless it is there: it hears what is said from now on. Returns its
 * place, which lasts until room_leave(), or NULL if it would be in more than `most` rooms. */
static struct member *room_join(struct room *r, struct conn *c, size_t most) {
    struct member **at = &c->joined;
    while (*at != NULL && (*at)->room != r) at = &(*at)->also;
    if (*at != NULL || room_count(c) >= most) return *at;
    room_commit(r);
    struct member *m = *at = xcalloc(sizeof *m);
    *m = (struct member){.c = c, .room = r, .cursor = r->end, .prev = r->last, .heard = (uint32_t)r->past->end};
    *(r->last != NULL ? &r->last->next : &r->first) = m;
    r->last = m;
    r->n++;
    return m;
}

/* Has a member sent the history from a position on, before all else; or not any longer. */
static void member_replay(struct member *m, uint64_t at, bool any) {
    if (any) m->replay = xrealloc(m->replay, sizeof *m->replay);
    else free(m->replay), m->replay = NULL;
    if (any) *m->replay = (struct replay){at, m->room->past->end};
    conn_touch(m->c);
}

/* Takes a client out of a room, and frees its place. What was said before is still
 * sent to it, unless its connection is closing, or it was still in the past: then only what is
 * not remembered is. */
static void room_leave(struct member *m) {
    struct room *r = m->room;
    struct member **at = &m->c->joined;
    room_commit(r);
    member_settle(m);
    while (*at != m) at = &(*at)->also;
    *at = m->also;
    *(m->prev != NULL ? &m->prev->next : &r->first) = m->next;
    *(m->next != NULL ? &m->next->prev : &r->last) = m->prev;
    r->n--;
    room_touch(r);
    free(m->replay);
    free(m);
}

static void rooms_figures(struct buf *b) {
    buf_printf(b, "xchat_rooms %zu\nxchat_messages_delivered_total %llu\n", (size_t)rooms.by_name.n, rooms.delivered);
}

/* ==========================================================================
 * 8. Push
 * ==========================================================================
 *
 * iOS stops an app in the background. Whoever it belongs to can only be reached by
 * asking Apple (APNs) to show a notification. So we remember which phones, by their
 * DEVICE TOKENS, are in which rooms, whether connected or not, and what is said in a
 * room is pushed to those of which no connection is open. A push is a doorbell: it may
 * be late, or never come; the app connects, and reads what it missed (chapter 6).
 *
 *     devices --< subscriptions >-- audiences, one a room
 *                      |
 *                      | what is said within a second or two is one push
 *                      v
 *     queue --- when it is due --> sent, at a gateway --- answered --> gone
 *       ^                               |
 *       '------- to be tried again -----'
 *
 * A gateway speaks one of two protocols over TLS. Apple's of today is HTTP/2 (RFC
 * 9113), of which we need little: a connection of streams, one for each push, all in
 * frames:
 *
 *     +-----------------+--------+--------+-+------------------+-- - -
 *     |   length (24)   |  type  | flags  |R|  stream id (31)  | payload
 *     +-----------------+--------+--------+-+------------------+-- - -
 *
 *     --> "PRI * ..." SETTINGS            <-- SETTINGS (so many streams at a time)
 *     --> 1 HEADERS, 1 DATA               <-- 1 HEADERS :status 200
 *     --> 3 HEADERS, 3 DATA               <-- 3 HEADERS :status 410, 3 DATA {"reason": ...}
 *
 * Header fields are packed (HPACK, RFC 7541). We send them unpacked, which is allowed,
 * and ask the peer to keep no table of fields; then the status, the only one we look
 * at, can be read without one, since it comes first.
 *
 * The old one, which private gateways still speak, is one packet after the other
 * without an answer, until there is an error: then the gateway names the push that
 * was wrong, and has thrown away all behind it, so these are sent once more:
 *
 *     --> 02 length (4), then items: number (1), length (2), bytes
 *         1 token, 2 payload, 3 identifier, 4 expiration, 5 priority
 *     --> 00 token with its length (2), payload with its length (2): older still
 *     <-- 08 status identifier (4)
 *
 * When a connection breaks, the fate of what was sent on it is unknown. It is sent
 * again; since it has the id of its message as collapse-id, the phone shows it once.
 *
 * Owns: devices, their subscriptions, the pushes and the gateways.
 * Calls: 1 Bytes, 2 JSON, 3 Tables, 4 The loop, 6 History. Called by: 9 Chat, 10 Back end,
 * 11 HTTP API, 12 Page, 13 Main.
 * Promises: chat never waits for a push; all queues are bounded; tokens are not logged.
 */

#define PUSH_SECONDS(n) ((n) * 1000 / PUSH_SPEED)

enum {
    TOKEN_MIN = 8, TOKEN_MAX = 400,   /* hex digits */
    PAYLOAD_MAX = 4096, HTML_MAX = 6 * PAYLOAD_MAX,   /* in HTML a byte may take six: &#039; */
    DEVICES_MAX = 20000,
    PUSH_QUEUE = 20000,               /* pushes that wait; then the oldest goes */
    MISSED_MAX = 50,                  /* messages looked at when a silent phone is given up */
    PUSH_MERGE_MS = 1000,             /* what comes in this time is one push */
    PUSH_EXPIRE_MS = 7 * 86400000,    /* Apple keeps it so long for a phone that is off */
    PUSH_TRIES = 6,
    PUSH_OUT = 262144,                /* bytes that wait for the socket: no more are added */
    STREAMS_MAX = 1000,               /* unanswered at a time, whatever the peer allows */
    REPLY_MAX = 1024, BLOCK_MAX = 65536,
    SENT_MAX = 2048, SENT_MS = 5000,  /* binary: kept that long in case of an error */
    FRESH_MS = 2000,                  /* binary: younger ones are lost with the connection */
    CONNECT_MS = 10000,               /* until a gateway has said its first word */
    DRAIN_MS = 30000,                 /* for the last answers on a connection */
    JWT_MS = 50 * 60000,              /* then a new one is made... */
    JWT_AGAIN_MS = 20 * 60000,        /* ...but never sooner than this */
    VERDICTS = 20                     /* about so many tokens we remember if they were good */
};

struct device {
    struct subscription *first;       /* its rooms; NULL: forgotten, but still connected */
    struct buf token, uid;            /* its user, or empty */
    int64_t registered_ms;            /* wall clock */
    uint32_t online, unread;          /* connections; messages missed since the last one */
};

struct audience {                     /* the phones of a room */
    struct subscription *first;
    struct buf key;                   /* as the room's */
    struct buf title, body, uid;      /* what was said last, by whom... */
    char id[ID_BYTES + 1];            /* ...and its id; "": not known */
    size_t fits;                      /* so much of the body fits into a push */
};

struct subscription {
    struct device *device;
    struct audience *audience;
    struct subscription *next, *also; /* of the same room; of the same phone */
    struct push *waiting;             /* to be sent, until when more is merged into it; or NULL */
    const void *newest;               /* the last that was made; only to be compared */
    uint64_t seen;                    /* so far in the history its connections got that have ended beside others */
};

struct push {
    struct push *prev, *next;         /* in the queue, or in those that a gateway was sent */
    const void *audience;             /* of which room; only to be compared. NULL: of none */
    struct buf token, payload;        /* empty: not written yet */
    struct buf reply;                 /* the body of the answer */
    int64_t due_ms;                   /* when to send it; then, when it was sent */
    bool late;                        /* in push.later */
    int64_t until_ms;                 /* it may wait */
    int64_t registered_ms;            /* on the wall clock */
    int64_t window;                   /* HTTP/2: what its stream may still carry, less what all may at first */
    uint32_t id, unsent, tries;       /* of its stream, or identifier; bytes of the payload */
    uint32_t badge;                   /* in the payload */
    int status;                       /* answered so far */
    char uuid[37], collapse[ID_BYTES + 1];   /* its own id; that of the message */
};

struct list {
    struct push *first, *last;
    uint32_t n;
};

/* The state of a connection to a gateway. */
struct gate {
    struct list sent;                 /* without an answer yet, oldest first */
    int64_t window, initial;          /* HTTP/2: bytes we may send; of a new stream */
    int64_t asked_ms;                 /* a PING is out since then, or 0 */
    int64_t drain_ms;                 /* no new streams; over at this time. 0: not so */
    uint32_t next_id, limit, owed;    /* streams at a time; bytes to allow the peer again */
    uint32_t block_of;                /* the stream whose header block is not complete, or 0 */
    struct buf block;                 /* what came of it */
    int64_t born_ms, heard_ms;        /* when connecting began; when it last sent something... */
    int64_t answered_ms;              /* ...and an answer; or 0 */
    uint32_t timeouts, errors, refused;   /* in a row */
    int error;                        /* what it has done wrong, to be told */
    bool ready, resize, block_ends, orderly;   /* SETTINGS came; table size 0 is to be said;
                                                  that block is the end; it ends as it should */
};

/* What is counted, for /metrics, and its name there. */
enum count { SENT, ACCEPTED, RETRIED, UNKNOWN, EXPIRED, OVERFLOWED, REFUSED, GONE_410, GONE_400, COUNTS };

static const char *const count_names[COUNTS] = {
    "sent_total", "ok_total", "retried_total", "unknown_total", "dropped_total{why=\"expired\"}",
    "dropped_total{why=\"overflow\"}", "dropped_total{why=\"refused\"}", "tokens_removed_total{status=\"410\"}",
    "tokens_removed_total{status=\"400\"}",
};

static struct {
    struct table devices, audiences;  /* by token; by the key of the room */
    struct list queue, later;         /* due; or not yet, in any order */
    uint32_t all;                     /* pushes: these, and those that gateways were sent */
    struct dial dial, feedback;       /* to the gateway; to the feedback service */
    char host[256], port[8], next_port[8];   /* of --apns; of the feedback service */
    struct conn *gate;                /* the gateway that new ones are sent to, or NULL */
    int64_t redial_ms, pause_ms;      /* not before then: connect; send */
    int64_t feedback_ms;              /* when to ask that again */
    uint32_t fails, next_id;          /* connections that failed, in a row; binary: the last identifier */
    bool binary, full, named;         /* --apns; --push-content */
    bool failing;                     /* said so in the log: devices are not stored */
    int64_t alarm_ms;                 /* not before then: say that no push will do */
    EVP_PKEY *key;                    /* for tokens that prove who we are (JWT, RFC 7519) */
    uint64_t key_hash;                /* tells it from others */
    struct buf jwt;                   /* the one in use, or empty... */
    int64_t jwt_ms, jwt_iat;          /* ...and when it was made, also on the wall clock */
    int64_t cert_ms;                  /* when to look at our certificate again */
    bool proved;                      /* a push was accepted: topic and environment are right */
    struct verdict {
        uint32_t token;
        bool bad;
    } verdicts[VERDICTS];
    uint32_t n_verdicts;              /* the newest is the last */
    int file;                         /* the list of devices, or -1 */
    uint32_t file_lines, kept_lines;  /* in it; when it was written anew */
    int64_t compact_ms;               /* not before then: write it anew */
    struct buf lines;                 /* to be added to it */
    struct buf text, token;           /* decoded fields */
    int64_t start_ms;                 /* of --push-test */
    uint64_t count[COUNTS], latency_ms, responses[600];   /* of all answers; by status */
} push;

static slice device_key(const void *item) { return buf_slice(&((const struct device *)item)->token); }
static slice audience_key(const void *item) { return buf_slice(&((const struct audience *)item)->key); }

static int64_t wall_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* The place of a phone in this audience, or NULL. */
static struct subscription *device_in(const struct device *d, const void *audience) {
    struct subscription *s = d->first;
    while (s != NULL && s->audience != audience) s = s->also;
    return s;
}

/* ---- Pushes, one by one: in the queue, in the order in which they are to be sent, and in
 * the lists of what was sent. ---- */

static void list_add(struct list *l, struct push *before, struct push *p) {
    p->prev = before;
    p->next = before != NULL ? before->next : l->first;
    *(p->prev != NULL ? &p->prev->next : &l->first) = p;
    *(p->next != NULL ? &p->next->prev : &l->last) = p;
    l->n++;
}

static struct push *list_remove(struct list *l, struct push *p) {
    assert((p->prev == NULL) == (p == l->first) && (p->next == NULL) == (p == l->last));
    *(p->prev != NULL ? &p->prev->next : &l->first) = p->next;
    *(p->next != NULL ? &p->next->prev : &l->last) = p->prev;
    l->n--;
    return p;
}

/* The push of this id, or NULL. They are answered in about the order of the list. */
static struct push *list_find(const struct list *l, uint32_t id) {
    struct push *p = l->first;
    while (p != NULL && p->id != id) p = p->next;
    return p;
}

/* A push to this token, for push_free(). It needs a payload. */
static struct push *push_new(slice token) {
    struct push *p = xcalloc(sizeof *p);
    unsigned char r[16];
    push.all++;
    buf_add(&p->token, token);
    p->until_ms = now.ms + PUSH_EXPIRE_MS;
    if (RAND_bytes(r, sizeof r) != 1) die("no random bytes");
    r[6] = (r[6] & 0x0f) | 0x40, r[8] = (r[8] & 0x3f) | 0x80;   /* RFC 9562, version 4 */
    for (int i = 0, n = 0; i < 16; i++)
        n += snprintf(p->uuid + n, 4, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", r[i]);
    return p;
}

/* When it expires on the wall clock, which may be set right while it waits. */
static int64_t push_expires(const struct push *p) { return now.wall + (p->until_ms - now.ms) / 1000; }

static void push_free(struct push *p) {
    push.all--;
    buf_free(&p->token), buf_free(&p->payload), buf_free(&p->reply);
    free(p);
}

/* Ends a push that nobody was shown. */
static void push_drop(struct push *p, enum count why) {
    push.count[why]++;
    push_free(p);
}

/* The subscription that a push is for, if there still is one, or NULL. */
static struct subscription *push_place(const struct push *p) {
    const struct device *d = table_find(&push.devices, buf_slice(&p->token));
    return d != NULL ? device_in(d, p->audience) : NULL;
}

/* Queues a push, of this subscription or NULL: 0 is before all others. */
static void queue_add(struct push *p, struct subscription *s, int64_t due_ms) {
    p->due_ms = due_ms;
    p->late = due_ms > 0;
    if (p->late) list_add(&push.later, push.later.last, p);
    else list_add(&push.queue, NULL, p);
    if (s != NULL) s->waiting = p;
}

static struct push *queue_take(struct push *p) {
    struct subscription *s = push_place(p);
    if (s != NULL) s->waiting = NULL;
    assert(p != (p->late ? push.queue.first : push.later.first));
    return list_remove(p->late ? &push.later : &push.queue, p);
}

/* ---- Devices. Each change is a line added to a file, which is written anew when most of
 * its lines are outdated. ---- */

/* Takes "<0A1B 2c3d>" as "0a1b2c3d". False: that is no device token. */
static bool token_parse(slice s, struct buf *b) {
    buf_clear(b);
    for (; s.len > 0 && b->len <= TOKEN_MAX; s = slice_cut(s, 1)) {
        if (*s.p == ' ' || *s.p == '<' || *s.p == '>') continue;
        if (slice_number(slice_take(s, 1), 16) < 0) return false;
        buf_addc(b, lower(*s.p));
    }
    return b->len >= TOKEN_MIN && b->len <= TOKEN_MAX && b->len % 2 == 0;
}

/* Queues the line that says what a device is now: one without rooms if it is gone. `s`, if
 * not NULL, is a subscription of it; `p` what it could not be sent, or NULL. */
static void device_write(const struct device *d, const struct subscription *s, const struct push *p) {
    struct buf *b = &push.lines;
    if (opt.data == NULL) return;
    push.file_lines++;
    buf_printf(b, "{\"at\":%lld,\"unread\":%u", d->first != NULL ? (long long)d->registered_ms : 0, d->unread);
    json_add(b, "token", device_key(d));
    if (d->uid.len > 0) json_add(b, "uid", buf_slice(&d->uid));
    if (s != NULL) json_add(b, "room", audience_key(s->audience));
    if (p != NULL && p->payload.len > 0) {
        json_add(b, "payload", buf_slice(&p->payload));
        json_add(b, "id", slice_of(p->collapse));
        json_add(b, "uuid", slice_of(p->uuid));
        buf_printf(b, ",\"expires\":%lld", (long long)push_expires(p));
    }
    buf_add(b, S("}\n"));
}

/* Writes what was queued. Who cannot be kept is told of all the same, until we end. */
static void devices_store(void) {
    slice s = buf_slice(&push.lines);
    if (s.len == 0) return;
    ssize_t n = write(push.file, s.p, s.len);
    bool ok = n == (ssize_t)s.len;
    if (!ok && !push.failing) log_warn("--data: devices cannot be stored: %s", strerror(n < 0 ? errno : ENOSPC));
    push.failing = !ok;
    buf_free(&push.lines);
    if (ok) return;
    push.file_lines = UINT32_MAX / 2;     /* write all of it again, when that is possible */
    buf_addc(&push.lines, '\n');          /* and nothing behind half a line */
}

/* Writes a whole new file instead of the old one; at the end with all that waits. */
static void devices_compact(bool end) {
    if (opt.data == NULL) return;
    buf_clear(&push.lines);
    push.file_lines = 0;
    push.compact_ms = now.ms + PUSH_SECONDS(60);
    size_t at = 0;
    for (const struct device *d; (d = table_next(&push.devices, &at)) != NULL;)
        for (struct subscription *s = d->first; s != NULL; s = s->also) device_write(d, s, end ? s->waiting : NULL);
    push.kept_lines = push.file_lines;
    bool ok = data_write("devices", buf_slice(&push.lines));
    int fd = ok ? history_openat((struct path){"devices"}, O_WRONLY | O_APPEND) : -1;
    if (fd >= 0 && push.file >= 0) close(push.file);
    if (fd >= 0) push.file = fd;
    buf_free(&push.lines);
    if (fd < 0) push.file_lines = UINT32_MAX / 2, buf_addc(&push.lines, '\n');   /* as in devices_store() */
}

/* Takes a subscription out of its room, with what waits for it; its device is the caller's task. */
static void subscription_free(struct subscription *s) {
    struct subscription **at = &s->audience->first;
    if (s->waiting != NULL) push_free(queue_take(s->waiting));
    while (*at != s) at = &(*at)->next;
    *at = s->next;
    if (s->audience->first == NULL) {
        table_remove(&push.audiences, audience_key(s->audience));
        buf_free(&s->audience->key), buf_free(&s->audience->title);
        buf_free(&s->audience->body), buf_free(&s->audience->uid);
        free(s->audience);
    }
    free(s);
}

/* Gives back a device, and frees it if nobody needs it any more. */
static void push_offline(struct device *d) {
    if (--d->online > 0 || d->first != NULL) return;
    table_remove(&push.devices, device_key(d));
    buf_free(&d->token), buf_free(&d->uid);
    free(d);
}

/* Ends all subscriptions of a phone. */
static void push_forget(struct device *d) {
    d->online++;   /* so that it stays until the end of this */
    for (struct subscription *s; (s = d->first) != NULL;) {
        d->first = s->also;
        subscription_free(s);
    }
    device_write(d, NULL, NULL);
    push_offline(d);
}

/* The same for its holder, in place of push_offline(). */
static void push_give_up(struct device *d) { d->online--, push_forget(d); }

/* The device of this token, new if need be, for the caller until push_offline(). If it has
 * gone to another user it leaves the rooms of the first. NULL: there are too many. */
static struct device *device_hold(slice token, slice uid) {
    struct device *d = table_find(&push.devices, token);
    if (d == NULL) {
        if (push.devices.n >= DEVICES_MAX) return NULL;
        d = xcalloc(sizeof *d);
        buf_add(&d->token, token);
        table_add(&push.devices, d);
    }
    d->online++;
    if (!slice_eq(buf_slice(&d->uid), uid)) {
        if (d->first != NULL) push_forget(d);
        buf_clear(&d->uid);
        buf_add(&d->uid, uid);
    }
    return d;
}

/* Subscribes a phone to the room of this key, as its newest, and ends the oldest of its
 * subscriptions, if these are too many. */
static struct subscription *device_join(struct device *d, slice room) {
    struct audience *a = table_find(&push.audiences, room);
    struct subscription *s = device_in(d, a), **at = &d->first;
    if (a == NULL) {
        a = xcalloc(sizeof *a);
        buf_add(&a->key, room);
        table_add(&push.audiences, a);
    }
    if (s == NULL) {
        s = xcalloc(sizeof *s);
        *s = (struct subscription){.device = d, .audience = a, .next = a->first};
        a->first = s;
    }
    size_t n = 0;
    while (*at != NULL)
        if (*at == s) *at = s->also;
        else at = &(*at)->also, n++;
    *at = s;
    s->also = NULL;
    if (n < ROOMS_PER_CLIENT) return s;
    struct subscription *oldest = d->first;
    d->first = oldest->also;
    subscription_free(oldest);
    return s;
}

/* The phone of a client that has logged in: it is there, and has missed nothing. NULL: it
 * cannot be kept, or there is no --apns. */
static struct device *push_online(slice token, slice uid) {
    struct device *d = opt.apns != NULL ? device_hold(token, uid) : NULL;
    if (d == NULL) return NULL;
    for (struct subscription *s = d->first; s != NULL; s = s->also) {
        if (s->waiting != NULL) push_free(queue_take(s->waiting));
        if (d->online == 1) s->seen = 0;
    }
    d->registered_ms = wall_ms();
    d->unread = 0;
    return d;
}

/* From now on it is in this room, connected or not. */
static void push_join(struct device *d, slice room) {
    device_write(d, device_join(d, room), NULL);
    devices_store();
    if (opt.fsync && opt.data != NULL && fdatasync(push.file) != 0) log_warn("--data: devices: %s", strerror(errno));
}

/* From now on it is not, if it was. The file knows no such line: it forgets all, and has the others anew. */
static void push_part(struct device *d, slice room) {
    struct subscription *s = device_in(d, table_find(&push.audiences, room)), **at = &d->first, *first;
    if (s == NULL) return;
    while (*at != s) at = &(*at)->also;
    *at = s->also;
    subscription_free(s);
    first = d->first, d->first = NULL;
    device_write(d, NULL, NULL);
    d->first = first;
    for (s = first; s != NULL; s = s->also) device_write(d, s, s->waiting);
    devices_store();
}

/* Is this the user that the phone has come with last? */
static bool push_of(const struct device *d, slice uid) { return slice_eq(buf_slice(&d->uid), uid); }

/* Makes room in the queue: if there are too many the oldest goes. */
static void push_room(void) {
    if (push.queue.n + push.later.n >= PUSH_QUEUE)
        push_drop(queue_take(push.queue.n > 0 ? push.queue.first : push.later.first), OVERFLOWED);
}

/* Queues a push to a subscription, which waits for its payload. */
static struct push *push_queue(struct subscription *s) {
    struct push *p = push_new(device_key(s->device));
    s->newest = p;
    p->audience = s->audience;
    p->registered_ms = s->device->registered_ms;
    push_room();
    queue_add(p, s, now.ms + PUSH_MERGE_MS);
    return p;
}

/* Takes up a line of the file. */
static void device_read(struct json_field *f) {
    int64_t at = slice_number(f[1].raw, 10), unread = slice_number(f[2].raw, 10);
    if (!token_parse(json_get(f[0].raw, &push.text), &push.token)) return;
    struct device *d = device_hold(buf_slice(&push.token), json_get(f[3].raw, &push.text));
    struct subscription *s = NULL;
    if (d == NULL) return;
    slice room = json_get(f[4].raw, &push.text);
    if (at <= 0) push_forget(d);
    else d->registered_ms = at;
    if (unread >= 0) d->unread = (uint32_t)unread;
    if (at > 0 && room.len > 6 && room.len <= 6 + ROOM_MAX_BYTES) s = device_join(d, room);
    if (s != NULL && s->waiting == NULL && f[6].raw.len == ID_BYTES + 2 && f[7].raw.len == 38) {
        struct push *p = push_queue(s);
        json_text(f[5].raw, &p->payload);
        memcpy(p->collapse, f[6].raw.p + 1, ID_BYTES);
        memcpy(p->uuid, f[7].raw.p + 1, 36);
        int64_t left_ms = (slice_number(f[8].raw, 10) - now.wall) * 1000;
        if (left_ms < PUSH_EXPIRE_MS) p->until_ms = now.ms + left_ms;
    }
    push_offline(d);
}

/* ---- What is said becomes pushes. Of a room only the last message is kept here: it is
 * what all of its phones will be shown. ---- */

/* Is this of the user whose phone that is? */
static bool push_own(const struct device *d, const struct audience *a) {
    return d->uid.len > 0 && slice_eq(buf_slice(&a->uid), buf_slice(&d->uid));
}

/* Writes the payload for this phone, with as much of the text as is known to fit. */
static void push_write(struct buf *b, const struct subscription *s) {
    const struct audience *a = s->audience;
    bool named = push.named && !push_own(s->device, a);   /* the last one may be its user's own */
    buf_clear(b);
    buf_add(b, S("{\"aps\":{\"alert\":{"));
    if (named) json_add(b, "title", buf_slice(&a->title));
    if (named) json_add(b, "body", push.full ? slice_take(buf_slice(&a->body), a->fits) : S("New message"));
    else json_add(b, "loc-key", S("NEW_MESSAGE"));
    if (named && push.full && a->fits < a->body.len) b->len--, buf_add(b, S("\xe2\x80\xa6\""));
    buf_printf(b, "},\"badge\":%u,\"sound\":\"default\"", s->device->unread);
    if (push.named) json_add(b, "thread-id", slice_cut(audience_key(a), 6));
    buf_add(b, S("}}"));
}

static size_t push_limit(void) { return !push.binary ? PAYLOAD_MAX : opt.apns_format == 2 ? 2048 : 256; }

/* Writes the payload of a push that waits, unless it has the last message and the badge already:
 * as much of the text as fits. */
static void push_fill(struct push *p) {
    const struct subscription *s = push_place(p);
    struct audience *a = s != NULL ? s->audience : NULL;
    if (a == NULL || *a->id == '\0' || (strcmp(a->id, p->collapse) == 0 && p->badge == s->device->unread)) return;
    p->badge = s->device->unread;   /* which other rooms count for, too */
    memcpy(p->collapse, a->id, sizeof p->collapse);
    push_write(&p->payload, s);
    while (p->payload.len > push_limit() && a->fits > 0 && push.full) {
        size_t less = (p->payload.len - push_limit() + 5) / 6;   /* a byte has become six at the most: \u0001 */
        a->fits -= less < a->fits ? less : a->fits;
        while (a->fits > 0 && (buf_slice(&a->body).p[a->fits] & 0xc0) == 0x80) a->fits--;   /* between characters */
        push_write(&p->payload, s);
    }
    device_write(s->device, NULL, NULL);
}

/* The phone of this subscription has missed so many messages. */
static void push_tell(struct subscription *s, uint32_t n) {
    s->device->unread += n;
    if (s->waiting == NULL) push_queue(s);
    s->waiting->until_ms = now.ms + PUSH_EXPIRE_MS;
    int64_t soon_ms = now.ms + PUSH_SECONDS(10);
    if (s->waiting->tries > 0 && s->waiting->due_ms > soon_ms) s->waiting->due_ms = soon_ms;   /* it is news again */
    s->waiting->tries = 0;
}

/* This was said last. False: it cannot be read. */
static bool push_keep(struct audience *a, slice line) {
    struct json_field f[] = {{.name = "from_client_name"}, {.name = "content"}, {.name = "from_uid"}, {.name = "id"}};
    size_t where;
    if (json_pick(line, f, 4, &where) != NULL || f[3].raw.p == NULL) return false;
    buf_clear(&a->title), buf_clear(&a->body);
    html_text(&a->title, json_get(f[0].raw, &push.text));
    slice content = json_get(f[1].raw, &push.text);
    const char *end = slice_starts(content, S("<b>")) ? memchr(content.p + 3, '/', content.len - 3) : NULL;
    if (end != NULL) content = slice_cut(content, (size_t)(end - content.p) + 3);   /* "<b>says to you: </b>" */
    html_text(&a->body, slice_take(content, content.len < HTML_MAX ? content.len : HTML_MAX));
    json_get(f[2].raw, &a->uid);
    memcpy(a->id, f[3].raw.p + 1, ID_BYTES);
    a->fits = a->body.len;
    return true;
}

/* `said` of the rooms. */
static void push_said(slice key, slice line) {
    struct audience *a = table_find(&push.audiences, key);
    if (a == NULL || !push_keep(a, line)) return;
    for (struct subscription *s = a->first; s != NULL; s = s->next)
        if (s->device->online == 0 && !push_own(s->device, a)) push_tell(s, 1);
}

/* Writes a payload that shows this text, or as much of it as fits. */
static void push_alert(struct buf *b, slice text) {
    text.len = text.len < push_limit() ? text.len : push_limit();   /* which is too long still */
    for (size_t less = 0;; less = (b->len - push_limit() + 5) / 6) {   /* as in push_fill() */
        text.len -= less < text.len ? less : text.len;
        while (text.len > 0 && less > 0 && (text.p[text.len] & 0xc0) == 0x80) text.len--;
        buf_clear(b);
        buf_add(b, S("{\"aps\":{"));
        json_add(b, "alert", text);
        json_add(b, "sound", S("default"));
        buf_add(b, S("}}"));
        if (b->len <= push_limit()) return;
    }
}

/* Shows a text on these phones, connected or not: the one of this token, or all of a user, or
 * all in the room of this key; what is not wanted is empty. Returns how many they are. */
static uint32_t push_show(slice token, slice uid, slice room, slice text) {
    struct audience *a = room.len > 0 ? table_find(&push.audiences, room) : NULL;
    struct buf tokens = {0}, payload = {0};   /* first, since to queue a push may make another go */
    size_t at = 0;
    push_alert(&payload, text);
    if (token.len > 0) buf_add(&tokens, token), buf_addc(&tokens, ' ');
    for (const struct device *d; (d = table_next(&push.devices, &at)) != NULL;)
        if (uid.len > 0 ? d->first != NULL && slice_eq(buf_slice(&d->uid), uid) : a != NULL && device_in(d, a) != NULL)
            buf_add(&tokens, device_key(d)), buf_addc(&tokens, ' ');
    uint32_t n = 0;
    for (slice rest = buf_slice(&tokens); rest.len > 0; n++) {
        struct push *p = push_new(slice_split(&rest, ' '));
        const struct device *d = table_find(&push.devices, buf_slice(&p->token));
        if (d != NULL) p->registered_ms = d->registered_ms;
        buf_add(&p->payload, buf_slice(&payload));
        push_room();
        queue_add(p, NULL, now.ms);
    }
    buf_free(&tokens);
    buf_free(&payload);
    return n;
}

/* A connection of a phone is ending, and what came behind this position in a room may not have
 * reached it; its own words, those of the client `self`, did. If it is the last one, and none that
 * ended before it got that (when the network changes the old one stays for a while), it is told. */
static void push_missed(struct device *d, struct history *h, uint64_t since, slice self) {
    struct subscription *s = device_in(d, table_find(&push.audiences, history_key(h)));
    struct json_field f[] = {{.name = "from_client_id"}, {.name = "from_uid"}};
    uint64_t at = h->end;
    uint32_t n = 0;
    size_t where;
    slice line;
    if (s == NULL) return;
    since = s->seen = since > s->seen ? since : s->seen;
    if (d->online != 1) return;
    for (int i = 0; i < MISSED_MAX && at > since && history_before(h, &at, &line) && at >= since; i++) {
        if (*s->audience->id == '\0' && !push_keep(s->audience, line)) continue;   /* nobody was told of it */
        f[0].raw = f[1].raw = S("  ");
        bool ok = json_pick(line, f, 2, &where) == NULL && !slice_eq(json_inside(f[0].raw), self);
        if (ok && !(d->uid.len > 0 && slice_eq(json_inside(f[1].raw), buf_slice(&d->uid)))) n++;
    }
    if (n > 0) push_tell(s, n);
}

/* ---- Who we are: a token (JWT, RFC 7519) that our key has signed (ES256), one for all
 * connections. Apple wants it renewed within an hour, and not too often. ---- */

/* RFC 4648, section 5, without padding. */
static void base64url(struct buf *b, slice s) {
    char *p = buf_room(b, 4 * (s.len / 3 + 1) + 1);
    int n = EVP_EncodeBlock((unsigned char *)p, (const unsigned char *)s.p, (int)s.len);
    while (n > 0 && p[n - 1] == '=') n--;
    for (int i = 0; i < n; i++) p[i] = p[i] == '+' ? '-' : p[i] == '/' ? '_' : p[i];
    b->len += (uint32_t)n;
}

/* Appends the bytes of it; false for what base64url() would not write. */
static bool base64url_read(slice s, struct buf *b) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    uint32_t bits = 0;
    for (size_t i = 0; i < s.len; i++) {
        const char *at = memchr(digits, s.p[i], 64);
        if (at == NULL) return false;
        bits = bits << 6 | (uint32_t)(at - digits);
        if (i % 4 > 0) buf_addc(b, (char)(bits >> (6 - i % 4 * 2)));
    }
    return s.len % 4 != 1 && (bits & (s.len % 4 == 2 ? 15 : s.len % 4 == 3 ? 3 : 0)) == 0;
}

/* OpenSSL wraps the two numbers of a signature in DER; JWT has them bare, of 32 bytes each. */
static bool jwt_bare(const unsigned char *der, size_t n, unsigned char bare[64]) {
    ECDSA_SIG *sig = d2i_ECDSA_SIG(NULL, &der, (long)n);
    bool ok = sig != NULL && BN_bn2binpad(ECDSA_SIG_get0_r(sig), bare, 32) == 32 &&
              BN_bn2binpad(ECDSA_SIG_get0_s(sig), bare + 32, 32) == 32;
    ECDSA_SIG_free(sig);
    return ok;
}

static void jwt_make(struct buf *jwt, int64_t iat) {
    unsigned char der[160], bare[64];
    size_t n = sizeof der;
    char json[100];   /* an id has up to 32 bytes */
    snprintf(json, sizeof json, "{\"alg\":\"ES256\",\"kid\":\"%s\"}", opt.apns_key_id);
    base64url(jwt, slice_of(json));
    buf_addc(jwt, '.');
    snprintf(json, sizeof json, "{\"iss\":\"%s\",\"iat\":%lld}", opt.apns_team_id, (long long)iat);
    base64url(jwt, slice_of(json));
    EVP_MD_CTX *sign = EVP_MD_CTX_new();
    bool ok = sign != NULL && EVP_DigestSignInit(sign, NULL, EVP_sha256(), NULL, push.key) == 1 &&
              EVP_DigestSign(sign, der, &n, (const unsigned char *)buf_slice(jwt).p, jwt->len) == 1;
    EVP_MD_CTX_free(sign);
    if (!ok || !jwt_bare(der, n, bare)) die("--apns-key: cannot sign");
    buf_addc(jwt, '.');
    base64url(jwt, (slice){(char *)bare, sizeof bare});
}

/* Takes up the one that is kept, unless we had that before. */
static void jwt_read(struct json_field *f) {
    int64_t iat = slice_number(f[2].raw, 10), age_ms = wall_ms() - iat * 1000;
    char key[17];
    snprintf(key, sizeof key, "%016llx", (unsigned long long)push.key_hash);
    bool ours = json_is(f[0].raw, opt.apns_key_id) && json_is(f[1].raw, opt.apns_team_id) && json_is(f[4].raw, key);
    if (!ours || age_ms < 0 || age_ms >= JWT_MS || iat == push.jwt_iat || !json_text(f[3].raw, &push.jwt)) return;
    push.jwt_ms = now.ms - age_ms;
    push.jwt_iat = iat;
}

/* The token. It is kept over restarts, and shared with a --push-test. */
static slice jwt_get(void) {
    struct json_field f[] = {{"key_id", S("")}, {"team_id", S("")}, {"iat", S("")}, {"jwt", S("")}, {"key", S("")}};
    struct buf json = {0};
    if (push.jwt.len > 0 && now.ms - push.jwt_ms < JWT_MS) return buf_slice(&push.jwt);
    buf_clear(&push.jwt);
    if (opt.data != NULL) data_lines("apns-jwt", jwt_read, f, 5);
    if (push.jwt.len > 0) return buf_slice(&push.jwt);
    jwt_make(&push.jwt, now.wall);
    push.jwt_ms = now.ms;
    push.jwt_iat = now.wall;
    buf_printf(&json, "{\"key_id\":\"%s\",\"team_id\":\"%s\",\"iat\":%lld,\"jwt\":\"%.*s\",\"key\":\"%016llx\"}",
               opt.apns_key_id, opt.apns_team_id, (long long)now.wall, F(buf_slice(&push.jwt)),
               (unsigned long long)push.key_hash);
    if (opt.data != NULL) data_write("apns-jwt", buf_slice(&json));
    buf_free(&json);
    return buf_slice(&push.jwt);
}

/* ---- What becomes of a push. ---- */

static int64_t push_jitter(int64_t ms) {
    unsigned char random = 0;
    RAND_bytes(&random, 1);
    return now.ms + ms * (192 + random / 2) / 256;   /* 75 to 125 % */
}

/* Queues a push once more, unless there is a newer one, or the phone was there since. */
static void push_again(struct push *p, int64_t due_ms) {
    struct subscription *s = push_place(p);
    bool seen = s != NULL && (s->newest != p || s->device->registered_ms != p->registered_ms);
    if (seen || (s == NULL && p->audience != NULL)) {
        push_free(p);
        return;
    }
    p->status = 0;
    buf_free(&p->reply);
    push.count[RETRIED]++;
    queue_add(p, s, due_ms);
}

/* Tries a push again, later each time. */
static void push_retry(struct push *p) {
    static const int delays[PUSH_TRIES] = {0, 2, 10, 60, 300, 900};
    if (opt.push_test != NULL) puts("not sent: there was no answer"), exit(1);
    if (++p->tries >= PUSH_TRIES) push_drop(p, REFUSED);
    else push_again(p, push_jitter(PUSH_SECONDS(delays[p->tries])));
}

/* Those behind this one, or all, were not even looked at: they are sent again, before all
 * others. */
static void push_rewind(struct list *sent, const struct push *last) {
    while (sent->last != last) push_again(list_remove(sent, sent->last), 0);
}

/* Something is set up wrong, and every push would fail: says so, now and then, and may wait. */
static void push_alarm(const char *reason, const char *words, bool wait) {
    if (now.ms >= push.alarm_ms) log_warn("--apns: %s: %s; devices are kept", reason, words);
    if (now.ms >= push.alarm_ms) push.alarm_ms = now.ms + PUSH_SECONDS(300);
    if (wait) push.pause_ms = now.ms + PUSH_SECONDS(300);
}

/* No connection could be made, or one is of no more use: says so, and waits. */
static void gate_failed(const char *why, bool early) {
    int wait_s = push.fails < 6 ? 1 << push.fails : 60;
    if (opt.push_test != NULL) printf("not sent: %s\n", why), exit(1);
    if (early && wait_s < 10) wait_s = 10;   /* it seems not to like us */
    push.fails++;
    push.redial_ms = push_jitter(PUSH_SECONDS(wait_s));
    log_warn("--apns %s: %s; trying again in %d s", opt.apns, why, wait_s);
}

/* No new streams: another connection takes over, and this one waits for its answers. */
static void gate_drain(struct conn *c) {
    struct gate *g = c->state;
    if (g->drain_ms == 0) g->drain_ms = now.ms + DRAIN_MS;
    g->orderly = true;
    if (push.gate == c) push.gate = NULL;
}

/* Remembers whether the token of this push was good. False: so many were bad lately that the fault must be ours. */
static bool push_judge(const struct push *p, bool bad) {
    struct verdict v = {0, bad};
    uint32_t i = 0, n_bad = 0;
    for (slice s = buf_slice(&p->token); s.len > 0; s = slice_cut(s, 1)) v.token = v.token * 31 + (uint8_t)*s.p;
    while (i < push.n_verdicts && push.verdicts[i].token != v.token) i++;
    if (i == VERDICTS) memmove(push.verdicts, push.verdicts + 1, --i * sizeof v);   /* the oldest goes */
    else if (i == push.n_verdicts) push.n_verdicts++;
    push.verdicts[i] = v;
    for (i = 0; i < push.n_verdicts; i++) n_bad += push.verdicts[i].bad;
    return push.proved && 2 * n_bad <= push.n_verdicts;
}

/* A push was accepted: what is set up is right. */
static void push_done(struct push *p) {
    push_judge(p, false);
    push.count[ACCEPTED]++;
    push.fails = 0;
    push.proved = true;
    push_free(p);
}

/* What answers mean, for us and for people; the first row that fits counts. The binary
 * protocol has numbers from 0 to 255, and we call their reason "error". */
enum fate { DONE, DEAD, SUSPECT, DROP, LATER, ONCE_MORE, RECONNECT, RENEW, CONFIG };   /* from LATER on: not yet */

static const struct answer {
    const char *reason;
    int least, most;
    enum fate fate;
    const char *words;
} answers[] = {
    {"error", 0, 0, DONE, "no error"},
    {"error", 1, 1, LATER, "there is trouble at the gateway"},
    {"error", 2, 2, DROP, "no device token"},
    {"error", 3, 3, CONFIG, "no topic: is this the right certificate?"},
    {"error", 4, 4, DROP, "no payload"},
    {"error", 5, 5, DEAD, "a device token of a wrong size"},
    {"error", 6, 6, CONFIG, "a topic of a wrong size"},
    {"error", 7, 7, DROP, "the payload is too long"},
    {"error", 8, 8, SUSPECT, "the token is dead, or of the other environment (sandbox)"},
    {"error", 10, 10, DONE, "it is going down"},
    {"error", 255, 255, ONCE_MORE, "it could not read that"},
    {NULL, 200, 299, DONE, "accepted"},
    {"Unregistered", 0, 999, DEAD, "the app is no longer on that phone: the token is dead"},
    {"ExpiredToken", 0, 999, DEAD, "the token has expired: it is dead"},
    {NULL, 410, 410, DEAD, "the token is dead"},
    {"BadDeviceToken", 0, 999, SUSPECT, "no such token there: it is dead, or of the other environment (sandbox)"},
    {"DeviceTokenNotForTopic", 0, 999, SUSPECT, "the token is of another app than --apns-topic"},
    {"BadTopic", 0, 999, CONFIG, "--apns-topic is wrong: it is the app's bundle id"},
    {"MissingTopic", 0, 999, CONFIG, "--apns-topic is needed"},
    {"TopicDisallowed", 0, 999, CONFIG, "this key or certificate may not push to the app of --apns-topic"},
    {"BadCertificate", 0, 999, CONFIG, "the certificate of --apns-cert is expired, revoked or of another kind"},
    {"BadCertificateEnvironment", 0, 999, CONFIG, "--apns-cert is for the other environment (sandbox or production)"},
    {"BadEnvironmentKeyIdInToken", 0, 999, CONFIG, "--apns-key is for the other environment (sandbox or production)"},
    {"BadEnvironmentKeyInToken", 0, 999, CONFIG, "--apns-key is for the other environment (sandbox or production)"},
    {"InvalidProviderToken", 0, 999, CONFIG, "wrong key: --apns-key, --apns-key-id and --apns-team-id do not match, "
                                           "or the clock is wrong"},
    {"MissingProviderToken", 0, 999, CONFIG, "--apns-cert is needed, or --apns-key with --apns-key-id"},
    {"Forbidden", 0, 999, CONFIG, "this is not allowed with this key or certificate"},
    {"ExpiredProviderToken", 0, 999, RENEW, "the clock is wrong: our token counts as too old"},
    {"TooManyProviderTokenUpdates", 0, 999, RECONNECT, "new tokens came too often; do several servers use this key?"},
    {"UnrelatedKeyIdInToken", 0, 999, RECONNECT, "this key has nothing to do with the one used before"},
    {"IdleTimeout", 0, 999, RECONNECT, "the connection was idle for too long"},
    {"Shutdown", 0, 999, RECONNECT, "the server is going down: try again later"},
    {"PayloadTooLarge", 0, 999, DROP, "the text is too long"},
    {NULL, 429, 429, LATER, "too many pushes to this phone: try again later"},
    {NULL, 500, 599, LATER, "there is trouble at the gateway: try again later"},
    {NULL, 0, 999, DROP, "not accepted"},
};

/* Takes a push that was answered. Ends the connection, if it is of no more use. A dead token
 * is forgotten, unless it was registered again since then (in `since_ms`, if that is known). */
static void push_answered(struct conn *c, struct push *p, int status, slice reason, int64_t since_ms) {
    const struct answer *a = answers;
    struct gate *g = c->state;
    while (status < a->least || status > a->most || (a->reason != NULL && !slice_eq(reason, slice_of(a->reason)))) a++;
    enum fate fate = a->fate;
    list_remove(&g->sent, p);
    if (fate != DONE || status < 200) log_info("apns: %.8s...: %d %.*s: %s", p->token.p, status, F(reason), a->words);
    if (opt.push_test != NULL) printf("%d %.*s: %s\n", status, F(reason), a->words), exit(fate != DONE);
    g->answered_ms = now.ms;
    g->refused = 0;
    g->errors = status == 500 ? g->errors + 1 : 0;
    if (fate == ONCE_MORE) fate = p->tries == 0 ? LATER : DROP;
    if (fate == RENEW && now.ms - push.jwt_ms < JWT_AGAIN_MS) fate = CONFIG;
    bool leave = (fate >= RECONNECT || g->errors >= 2) && g->drain_ms == 0;   /* of one that was left this is no news */
    if (leave && fate == RENEW) buf_clear(&push.jwt);
    if (leave && fate == CONFIG) push_alarm(a->reason, a->words, true);
    if (leave && fate != CONFIG) gate_failed(a->words, false);
    if (leave) gate_drain(c);   /* other answers may be on their way */
    bool dead = fate == DEAD || (fate == SUSPECT && push_judge(p, true));
    if (fate == SUSPECT && !dead && push.n_verdicts >= 3)   /* who is in the chat could bring that about: do not wait */
        push_alarm(a->reason, "most tokens are refused: check --apns (environment), --apns-topic", !push.proved);
    struct device *d = dead ? table_find(&push.devices, buf_slice(&p->token)) : NULL;
    if (d != NULL && (since_ms > 0 ? d->registered_ms <= since_ms : d->registered_ms == p->registered_ms)) {
        push.count[status == 410 ? GONE_410 : GONE_400]++;
        push_forget(d);
    }
    if (fate == DONE) push_done(p);
    else if (fate >= RENEW) push_again(p, 0);   /* which is not its fault */
    else if (fate >= LATER) push_retry(p);
    else push_drop(p, REFUSED);
}

/* ---- The binary protocol. ---- */

static void binary_item(struct buf *b, int number, slice data) {
    buf_be(b, (uint64_t)number, 1);
    buf_be(b, data.len, 2);
    buf_add(b, data);
}

/* Appends the packet of a push. Its token has 32 bytes. */
static void binary_packet(struct buf *b, const struct push *p) {
    char token[32];
    slice payload = buf_slice(&p->payload);
    const char *hex = buf_slice(&p->token).p;
    for (size_t i = 0; i < sizeof token; i++) token[i] = (char)slice_number((slice){hex + 2 * i, 2}, 16);
    if (opt.apns_format == 0) {
        binary_item(b, 0, (slice){token, sizeof token});   /* here 0 is the command */
        buf_be(b, payload.len, 2);
        buf_add(b, payload);
        return;
    }
    buf_be(b, 2, 1);
    buf_be(b, 56 + payload.len, 4);
    binary_item(b, 1, (slice){token, sizeof token});
    binary_item(b, 2, payload);
    buf_be(b, 0x030004, 3), buf_be(b, p->id, 4);
    buf_be(b, 0x040004, 3), buf_be(b, (uint64_t)push_expires(p), 4);
    buf_be(b, 0x050001, 3), buf_be(b, 10, 1);   /* now */
}

/* An error packet: the push it names was the last that was looked at. */
static ssize_t binary_feed(struct conn *c, char *p, size_t n) {
    struct gate *g = c->state;
    if (n < 6) return 0;
    struct push *named = p[0] == 8 ? list_find(&g->sent, be32(p + 2)) : NULL;
    int status = (unsigned char)p[1];
    conn_close(c, p[0] == 8 ? "error packet" : "it does not speak the binary protocol");
    if (named == NULL) return log_info("apns: error %d, of no push that is known", status), 6;
    g->orderly = true;
    while (g->sent.first != named) push_done(list_remove(&g->sent, g->sent.first));
    push_rewind(&g->sent, named);
    push_answered(c, named, status, S("error"), 0);
    return 6;
}

/* Pushes that no error has come for are taken as accepted after a while. */
static void binary_tick(struct conn *c) {
    struct gate *g = c->state;
    struct push *p;
    while ((p = g->sent.first) != NULL && c->out.len == 0) {
        int64_t age = now.ms - p->due_ms;
        if (opt.push_test != NULL && age >= FRESH_MS) puts("sent, and no error came back"), exit(0);
        if (age < (g->sent.n > SENT_MAX ? SENT_MS : 12 * SENT_MS)) break;
        push_done(list_remove(&g->sent, p));
    }
    if (p != NULL && now.ms - p->due_ms > PUSH_SECONDS(90)) conn_lost(c, "it takes nothing");
    bool quiet = c->out.len == 0 && (p == NULL || now.ms - g->sent.last->due_ms > FRESH_MS);
    if (g->drain_ms != 0 && quiet) conn_close(c, "new keys");
}

/* The feedback service tells which tokens are dead: time (4), length (2), token. */
static ssize_t feedback_feed(struct conn *c, char *p, size_t n) {
    size_t len = n >= 6 ? be32(p + 2) & 0xffff : 0;
    c->deadline_ms = now.ms + PUSH_SECONDS(30);
    if (n < 6 || n < 6 + len) return 0;
    buf_clear(&push.text);
    for (size_t i = 0; i < len; i++) buf_printf(&push.text, "%02x", (unsigned char)p[6 + i]);
    struct device *d = len <= TOKEN_MAX / 2 ? table_find(&push.devices, buf_slice(&push.text)) : NULL;
    if (d != NULL && d->registered_ms <= (int64_t)be32(p) * 1000) push.count[GONE_410]++, push_forget(d);
    return (ssize_t)(6 + len);
}

static void feedback_tick(struct conn *c) {
    if (now.ms >= c->deadline_ms) conn_lost(c, "it says nothing");
}

static const struct proto feedback_proto = {
    .name = "feedback", .feed = feedback_feed, .tick = feedback_tick, .closed = dial_closed,
};

static void feedback_opened(struct conn *c, const char *why) {
    if (c != NULL) c->deadline_ms = now.ms + PUSH_SECONDS(30);
    else log_info("apns feedback: %s", why), push.feedback_ms = now.ms + (int64_t)3600 * 1000;
}

/* ---- HPACK (RFC 7541). ---- */

/* A number in the low bits of a byte whose others are the pattern; `most` is all of those bits. */
static void hpack_number(struct buf *b, int pattern, size_t most, size_t n) {
    buf_addc(b, (char)(pattern | (int)(n < most ? n : most)));
    if (n < most) return;
    for (n -= most; n >= 128; n >>= 7) buf_addc(b, (char)(n | 128));
    buf_addc(b, (char)n);
}

/* A field that is not to be remembered; its name is in the table of section A, or spelled out. */
static void hpack_field(struct buf *b, int pattern, size_t index, const char *name, const char *value) {
    hpack_number(b, pattern, 15, index);
    if (index == 0) hpack_number(b, 0, 127, strlen(name)), buf_add(b, slice_of(name));
    hpack_number(b, 0, 127, strlen(value));
    buf_add(b, slice_of(value));
}

/* Takes a number off the block; -1: it is cut short, or too large. */
static int64_t hpack_take(slice *s, uint8_t most) {
    int64_t n = s->len > 0 ? (uint8_t)*s->p & most : -1;
    if (s->len > 0) *s = slice_cut(*s, 1);
    if (n != most) return n;
    for (int shift = 0; shift < 35 && s->len > 0; shift += 7) {
        uint8_t c = (uint8_t)*s->p;
        *s = slice_cut(*s, 1);
        n += (int64_t)(c & 127) << shift;
        if (c < 128) return n <= INT32_MAX ? n : -1;
    }
    return -1;
}

static bool hpack_take_string(slice *s, slice *text, bool *huffman) {
    *huffman = s->len > 0 && (*s->p & 0x80) != 0;
    int64_t n = hpack_take(s, 127);
    if (n < 0 || (uint64_t)n > s->len) return false;
    *text = slice_take(*s, (size_t)n);
    *s = slice_cut(*s, (size_t)n);
    return true;
}

/* Three digits; 0 for anything else. Of the Huffman code (section B) these are ten:
 *
 *     0 00000   1 00001   2 00010   3 011001   4 011010 ... 9 011111
 */
static int hpack_digits(slice s, bool huffman) {
    uint32_t bits = 0;
    int status = 0;
    size_t used = 0;
    if (!huffman) return s.len == 3 && slice_number(s, 10) > 0 ? (int)slice_number(s, 10) : 0;
    for (size_t i = 0; i < 4; i++) bits = bits << 8 | (i < s.len ? (uint8_t)s.p[i] : 0xffu);   /* ones are padding */
    for (int i = 0; i < 3; i++) {
        uint32_t six = bits >> 26;
        if (six >= 6 && (six < 25 || six > 31)) return 0;
        status = status * 10 + (int)(six < 6 ? six / 2 : six - 22);
        bits = six < 6 ? bits << 5 | 31 : bits << 6 | 63;
        used += six < 6 ? 5 : 6;
    }
    return s.len == (used + 7) / 8 && bits == UINT32_MAX ? status : 0;
}

/* The status in a header block; 0: it is in a table, which we do not keep; -1: the block
 * makes no sense. A field begins with 1 and an index in the table; or with 01, 0000 or 0001
 * and the index of its name, or 0 and the name, and then its value; or it is 001 and the
 * size of the table. */
static int hpack_status(slice s) {
    static const int known[] = {200, 204, 206, 304, 400, 404, 500};   /* 8 to 14 of the static table */
    slice text;
    bool huffman;
    while (s.len > 0) {
        int c = (uint8_t)*s.p;
        bool whole = c >= 128, size = (c & 0xe0) == 0x20;
        int64_t index = hpack_take(&s, whole ? 127 : c >= 64 ? 63 : size ? 31 : 15);
        bool status = index >= 8 && index <= 14;
        if (index < 0 || (index == 0 && whole)) return -1;
        if (size) continue;
        if (index > 61) return 0;
        if (whole && status) return known[index - 8];
        if (whole) continue;
        if (index == 0) {
            if (!hpack_take_string(&s, &text, &huffman)) return -1;
            status = slice_eq(text, huffman ? S("\xb8\x84\x8d\x36\xa3") : S(":status"));
        }
        if (!hpack_take_string(&s, &text, &huffman)) return -1;
        if (status) return hpack_digits(text, huffman);
    }
    return -1;
}

/* ---- HTTP/2 (RFC 9113). ---- */

enum { H2_DATA, H2_HEADERS, H2_PRIORITY, H2_RST, H2_SETTINGS, H2_PROMISE, H2_PING, H2_GOAWAY, H2_WINDOW, H2_MORE };
enum { H2_END = 1, H2_ACK = 1, H2_BLOCK_END = 4, H2_PADDED = 8, H2_PRIORITIZED = 0x20 };
enum { H2_PROTOCOL = 1, H2_FLOW = 3, H2_SIZE = 6, H2_REFUSED, H2_CANCEL, H2_COMPRESSION, H2_FRAME_MAX = 16384 };

static void h2_frame(struct buf *b, int type, int flags, uint32_t id, slice payload) {
    buf_be(b, payload.len, 3);
    buf_be(b, (uint64_t)type, 1);
    buf_be(b, (uint64_t)flags, 1);
    buf_be(b, id, 4);
    buf_add(b, payload);
}

/* The same, for a payload of one number of 32 bits. */
static void h2_number(struct conn *c, int type, uint32_t id, uint32_t number) {
    char be[] = {(char)(number >> 24), (char)(number >> 16), (char)(number >> 8), (char)number};
    h2_frame(&c->out, type, 0, id, (slice){be, sizeof be});
    conn_touch(c);
}

/* Sends as much of the payload as the windows let through. */
static void h2_data(struct conn *c, struct push *p) {
    struct gate *g = c->state;
    int64_t of_stream = g->initial + p->window, most = of_stream < g->window ? of_stream : g->window;
    slice rest = slice_cut(buf_slice(&p->payload), p->payload.len - p->unsent);
    if (rest.len == 0 || most <= 0) return;
    if ((int64_t)rest.len > most) rest.len = (size_t)most;   /* less than a frame holds */
    p->unsent -= (uint32_t)rest.len;
    p->window -= (int64_t)rest.len;
    g->window -= (int64_t)rest.len;
    h2_frame(&c->out, H2_DATA, p->unsent == 0 ? H2_END : 0, p->id, rest);
    conn_touch(c);
}

/* Appends the header block of a push. */
static void h2_block(struct buf *b, const struct push *p, slice jwt) {
    char text[16 + TOKEN_MAX];   /* our JWTs are shorter than 300 */
    buf_add(b, S("\x83\x87"));   /* :method POST, :scheme https */
    snprintf(text, sizeof text, "/3/device/%.*s", F(buf_slice(&p->token)));
    hpack_field(b, 0, 4, ":path", text);
    hpack_field(b, 0, 1, ":authority", push.dial.host);
    snprintf(text, sizeof text, "bearer %.*s", F(jwt));
    if (jwt.len > 0) hpack_field(b, 0x10, 23, "authorization", text);   /* a secret: 0x10 */
    hpack_field(b, 0, 31, "content-type", "application/json");
    snprintf(text, sizeof text, "%u", p->payload.len);
    hpack_field(b, 0, 28, "content-length", text);
    hpack_field(b, 0, 0, "apns-topic", opt.apns_topic);
    hpack_field(b, 0, 0, "apns-push-type", "alert");
    hpack_field(b, 0, 0, "apns-id", p->uuid);
    snprintf(text, sizeof text, "%lld", (long long)push_expires(p));
    hpack_field(b, 0, 0, "apns-expiration", text);
    hpack_field(b, 0, 0, "apns-priority", "10");
    if (*p->collapse != '\0') hpack_field(b, 0, 0, "apns-collapse-id", p->collapse);
}

static void h2_request(struct conn *c, struct push *p) {
    struct gate *g = c->state;
    struct buf block = {0};
    if (g->resize) buf_addc(&block, 0x20);   /* the peer keeps no table, and waits for us to know */
    g->resize = false;
    h2_block(&block, p, push.key != NULL ? jwt_get() : S(""));
    p->id = g->next_id;
    g->next_id += 2;
    p->window = 0;
    p->unsent = p->payload.len;
    h2_frame(&c->out, H2_HEADERS, H2_BLOCK_END, p->id, buf_slice(&block));
    h2_data(c, p);
    buf_free(&block);
}

/* The answer to a push is complete. */
static void h2_answer(struct conn *c, struct push *p) {
    struct json_field f[] = {{.name = "reason", .raw = S("")}, {.name = "timestamp", .raw = S("")}};
    struct gate *g = c->state;
    size_t where;
    bool told = json_pick(buf_slice(&p->reply), f, 2, &where) == NULL && f[0].raw.len > 2 && *f[0].raw.p == '"';
    slice reason = told ? json_inside(f[0].raw) : S("");
    g->timeouts = 0;
    if (p->unsent > 0) h2_number(c, H2_RST, p->id, H2_CANCEL);   /* or the stream would stay open */
    push.latency_ms += (uint64_t)(now.ms - p->due_ms);
    push.responses[p->status > 0 && p->status < 600 ? p->status : 0]++;
    push.count[UNKNOWN] += p->status < 0;
    int status = p->status >= 0 ? p->status : p->reply.len == 0 ? 200 : 0;
    push_answered(c, p, p->status == 0 ? 500 : status, reason, slice_number(f[1].raw, 10));
}

static int h2_settings(struct conn *c, slice s) {
    struct gate *g = c->state;
    if (s.len % 6 != 0) return H2_SIZE;
    for (; s.len > 0; s = slice_cut(s, 6)) {
        int what = (uint8_t)s.p[1] | (uint8_t)s.p[0] << 8;
        uint32_t value = be32(s.p + 2);
        if (what == 1 && value < 4096) g->resize = true;
        if (what == 3) g->limit = value < STREAMS_MAX ? value : STREAMS_MAX;
        if (what == 4 && value > INT32_MAX) return H2_FLOW;
        if (what == 4) g->initial = value;   /* of those there are, too */
    }
    h2_frame(&c->out, H2_SETTINGS, H2_ACK, 0, S(""));
    g->ready = true;
    conn_touch(c);
    for (struct push *p = g->sent.first; p != NULL; p = p->next) h2_data(c, p);
    return 0;
}

/* Those above the last stream were not looked at. */
static int h2_goaway(struct conn *c, slice s) {
    struct gate *g = c->state;
    struct push *last = g->sent.last;
    if (s.len < 8) return H2_SIZE;
    slice debug = slice_take(slice_cut(s, 8), s.len < 200 ? s.len - 8 : 192);
    log_info("apns: goodbye from the gateway, code %u %.*s", be32(s.p + 4), F(debug));
    while (last != NULL && last->id > (be32(s.p) & INT32_MAX)) last = last->prev;
    push_rewind(&g->sent, last);
    bool unwanted = be32(s.p + 4) != 0 || g->answered_ms == 0;
    if (unwanted && g->drain_ms == 0) gate_failed("it does not want us", false);
    gate_drain(c);
    return 0;
}

/* A header block is complete. */
static int h2_headers(struct conn *c, struct push *p) {
    struct gate *g = c->state;
    bool trailers = p == NULL || p->status != 0;
    int status = trailers ? 0 : hpack_status(buf_slice(&g->block));
    buf_free(&g->block);
    g->block_of = 0;
    if (status < 0) return H2_COMPRESSION;
    if (!trailers && (status >= 200 || status == 0)) p->status = status > 0 ? status : -1;   /* not 1xx */
    if (p != NULL && g->block_ends) h2_answer(c, p);
    return 0;
}

/* Takes padding and priority off a payload. */
static bool h2_strip(int flags, slice *s) {
    size_t pad = (flags & H2_PADDED) != 0 && s->len > 0 ? (uint8_t)*s->p : 0;
    size_t front = ((flags & H2_PADDED) != 0 ? 1u : 0u) + ((flags & H2_PRIORITIZED) != 0 ? 5u : 0u);
    if (front + pad > s->len) return false;
    *s = slice_take(slice_cut(*s, front), s->len - front - pad);
    return true;
}

/* Handles a frame. Returns 0, or the code of an error that ends the connection. */
static int h2_handle(struct conn *c, int type, int flags, uint32_t id, slice s) {
    struct gate *g = c->state;
    struct push *p = id != 0 ? list_find(&g->sent, id) : NULL;
    bool first = g->block_of == 0;
    if ((!g->ready && type != H2_SETTINGS) || type == H2_PROMISE) return H2_PROTOCOL;
    if (first ? type == H2_MORE : type != H2_MORE || id != g->block_of) return H2_PROTOCOL;
    bool of_all = type == H2_SETTINGS || type == H2_PING || type == H2_GOAWAY;
    if ((id == 0) != of_all && type < H2_MORE && type != H2_WINDOW) return H2_PROTOCOL;
    if ((type == H2_RST || type == H2_WINDOW) && s.len != 4) return H2_SIZE;
    switch (type) {
    case H2_DATA:
        g->owed += (uint32_t)s.len;
        if (g->owed >= H2_FRAME_MAX) h2_number(c, H2_WINDOW, 0, g->owed), g->owed = 0;
        if (!h2_strip(flags & H2_PADDED, &s)) return H2_PROTOCOL;
        if (p != NULL && p->reply.len + s.len <= REPLY_MAX) buf_add(&p->reply, s);
        if (p != NULL && (flags & H2_END) != 0) h2_answer(c, p);
        return 0;
    case H2_HEADERS:
    case H2_MORE:
        if (first && !h2_strip(flags, &s)) return H2_PROTOCOL;
        if (first) g->block_of = id, g->block_ends = (flags & H2_END) != 0;
        if (g->block.len + s.len > BLOCK_MAX) return H2_PROTOCOL;
        buf_add(&g->block, s);
        return (flags & H2_BLOCK_END) != 0 ? h2_headers(c, p) : 0;
    case H2_RST:
        if (p == NULL) return 0;
        p->unsent = 0;
        if (p->status != 0) return h2_answer(c, p), 0;   /* the rest of the answer would not matter */
        list_remove(&g->sent, p);
        if (be32(s.p) != H2_REFUSED) push_retry(p);
        else push_again(p, 0);
        if (++g->refused > 2 * STREAMS_MAX && g->drain_ms == 0) gate_failed("it refuses all", false), gate_drain(c);
        return 0;
    case H2_SETTINGS: return (flags & H2_ACK) != 0 ? 0 : h2_settings(c, s);
    case H2_PING:
        if (s.len != 8) return H2_SIZE;
        if ((flags & H2_ACK) == 0) h2_frame(&c->out, H2_PING, H2_ACK, 0, s), conn_touch(c);
        return 0;
    case H2_GOAWAY: return h2_goaway(c, s);
    case H2_WINDOW:
        if (id != 0 && p == NULL) return 0;
        *(p != NULL ? &p->window : &g->window) += be32(s.p) & INT32_MAX;
        if ((be32(s.p) & INT32_MAX) == 0) return H2_PROTOCOL;
        if (g->window > INT32_MAX || (p != NULL && g->initial + p->window > INT32_MAX)) return H2_FLOW;
        for (p = g->sent.first; p != NULL; p = p->next) h2_data(c, p);
        return 0;
    default: return 0;
    }
}

static ssize_t h2_feed(struct conn *c, char *p, size_t n) {
    struct gate *g = c->state;
    if (n < 9) return 0;
    size_t len = be32(p) >> 8;
    if (len <= H2_FRAME_MAX && n < 9 + len) return 0;
    g->asked_ms = 0;   /* a sign of life */
    g->error = len > H2_FRAME_MAX ? H2_SIZE : h2_handle(c, (uint8_t)p[3], (uint8_t)p[4], be32(p + 5) & INT32_MAX,
                                                        (slice){p + 9, len});
    if (g->error == 0) return (ssize_t)(9 + len);
    conn_close(c, g->ready ? "it broke the rules of HTTP/2" : "it does not speak HTTP/2");
    return -1;
}

/* Who does not answer: a push, or nothing at all. While answers come more may be there: we may have stood still. */
static void h2_tick(struct conn *c) {
    struct gate *g = c->state;
    int64_t quiet = now.ms - g->heard_ms;
    for (struct push *p = g->answered_ms < now.ms ? g->sent.first : NULL, *next; p != NULL; p = next) {
        next = p->next;
        if (now.ms - p->due_ms < PUSH_SECONDS(30)) continue;
        h2_number(c, H2_RST, p->id, H2_CANCEL);
        list_remove(&g->sent, p);
        push_retry(p);
        g->timeouts++;
    }
    if (g->timeouts >= 3) conn_lost(c, "it answers no more");
    else if (g->asked_ms != 0 && now.ms - g->asked_ms >= PUSH_SECONDS(15)) conn_lost(c, "no answer to a PING");
    else if (g->drain_ms != 0 && (g->sent.n == 0 || now.ms >= g->drain_ms)) conn_close(c, "all is answered");
    else if (g->ready && g->asked_ms == 0 && quiet >= (g->sent.n > 0 ? PUSH_SECONDS(15) : PUSH_SECONDS(3600))) {
        g->asked_ms = now.ms;
        h2_frame(&c->out, H2_PING, 0, 0, S("areyouok"));
        conn_touch(c);
    }
}

/* ---- Gateways. ---- */

/* May this gateway be sent one more? */
static bool gate_takes(const struct conn *c, const struct push *p) {
    const struct gate *g = c->state;
    bool room = !c->closing && g->ready && c->out.len < PUSH_OUT;
    return room && (push.binary ? g->sent.n < PUSH_QUEUE : g->sent.n < g->limit && g->window >= p->payload.len);
}

/* Has a gateway send a push. */
static void gate_send(struct conn *c, struct push *p) {
    struct gate *g = c->state;
    list_add(&g->sent, g->sent.last, queue_take(p));
    p->due_ms = now.ms;
    push.count[SENT]++;
    if (push.binary) p->id = ++push.next_id != 0 ? push.next_id : ++push.next_id;
    if (push.binary) binary_packet(&c->out, p);
    else h2_request(c, p);
    conn_touch(c);
    if (g->next_id >= INT32_MAX - 1) gate_drain(c);   /* no more numbers for streams */
}

/* Sends what is due, as far as there is somebody who takes it. */
static void push_pump(void) {
    for (struct push *p; (p = push.queue.first) != NULL && push.pause_ms <= now.ms;) {
        if (loop_stopping()) break;
        push_fill(p);
        bool fits = (!push.binary || p->token.len == 64) && p->payload.len <= push_limit();
        if (!fits) log_info("apns: %.8s...: its token has not 32 bytes, or the names are too long", p->token.p);
        if (!fits || p->until_ms <= now.ms) {
            push_drop(queue_take(p), fits ? EXPIRED : REFUSED);
            continue;
        }
        if (push.gate == NULL && now.ms < push.redial_ms) loop_wake(push.redial_ms);
        else if (push.gate == NULL && !push.dial.busy) {
            push.redial_ms = now.ms + 100;
            dial(&push.dial);
        }
        if (push.gate == NULL || !gate_takes(push.gate, p)) break;
        gate_send(push.gate, p);
    }
    devices_store();
}

static ssize_t gate_heard(struct conn *c, char *p, size_t n) {
    return push.binary ? binary_feed(c, p, n) : h2_feed(c, p, n);
}

/* When we cannot write any more, the last answers, or the reason, may have come already; a record may hold no more
 * than a half of one. */
static void gate_last_words(struct conn *c) {
    char chunk[4096];
    ssize_t n = 1, done = 0;
    for (int turns = 0; n > 0 && turns < 2 * STREAMS_MAX; turns++) {
        while (c->in.len > 0 && (done = gate_heard(c, c->in.p + c->in.off, c->in.len)) > 0)
            buf_drop(&c->in, (size_t)done);
        n = done < 0 ? 0 : conn_recv(c, chunk, sizeof chunk);
        if (n > 0) buf_add(&c->in, (slice){chunk, (size_t)n});
    }
}

/* Binary: with TLS 1.3 we have sent already when a gateway says that it does not want our certificate: it ends TLS with
 * an alert, and has looked at nothing. */
static bool gate_refused(const struct conn *c) {
    const struct gate *g = c->state;
    bool alert = SSL_in_init(c->ssl) && (SSL_get_shutdown(c->ssl) & SSL_RECEIVED_SHUTDOWN) != 0;
    return alert && g->heard_ms == 0 && !g->orderly && now.ms - g->born_ms < CONNECT_MS;
}

/* `closed` of both protocols. */
static void gate_closed(struct conn *c) {
    struct gate *g = c->state;
    bool begun = c->spoke && g->ready;
    if (push.gate == c) push.gate = NULL;
    char last[8] = {[7] = (char)g->error};
    if (!push.binary && !c->lost && !c->eof) h2_frame(&c->out, H2_GOAWAY, 0, 0, (slice){last, sizeof last});
    if (c->lost && begun) gate_last_words(c);
    begun = begun && !gate_refused(c);
    bool failed = !g->orderly && !loop_stopping(), heard = BIO_number_read(SSL_get_rbio(c->ssl)) > 0;
    if (failed && !heard && ++push.dial.attempt % push.dial.addresses != 0) push.redial_ms = now.ms;
    else if (failed) gate_failed(c->why, heard && !begun);
    if (!begun) push_rewind(&g->sent, NULL);
    for (struct push *p; (p = g->sent.last) != NULL;) {   /* of two to one phone the newer stays */
        bool over = push.binary && c->out.len == 0 && (loop_stopping() || now.ms - p->due_ms > FRESH_MS);
        list_remove(&g->sent, p);
        if (over) push_done(p);
        else push_retry(p);
    }
    c->eof = true;
    c->state = NULL;
    buf_free(&g->block);
    free(g);
    push_pump();
}

static ssize_t gate_feed(struct conn *c, char *p, size_t n) {
    ((struct gate *)c->state)->heard_ms = now.ms;
    ssize_t done = gate_heard(c, p, n);
    if (done > 0) push_pump();
    return done;
}

static void gate_tick(struct conn *c) {
    struct gate *g = c->state;
    bool begun = c->spoke && g->ready;
    for (struct push *p = begun ? NULL : g->sent.first; p != NULL; p = p->next) p->due_ms = now.ms;   /* not sent yet */
    if (!begun && now.ms - g->born_ms >= CONNECT_MS) conn_lost(c, "no connection, or no SETTINGS, in time");
    else if (begun && push.binary) binary_tick(c);
    else if (begun) h2_tick(c);
}

/* The server stops: what was sent may still be answered. */
static void gate_stop(struct conn *c) {
    struct gate *g = c->state;
    gate_drain(c);
    g->drain_ms = now.ms + 2000;
    if (!c->spoke) conn_lost(c, "server is stopping");
    else if (g->sent.n == 0 || push.binary) conn_close(c, "server is stopping");
}

static const struct proto gate_proto = {.name = "apns", .feed = gate_feed, .tick = gate_tick,
                                        .closed = gate_closed, .stop = gate_stop};

/* `done` of the dial. */
static void gate_opened(struct conn *c, const char *why) {
    if (c == NULL && !loop_stopping()) gate_failed(why, false);
    if (c == NULL) return;
    struct gate *g = c->state = xcalloc(sizeof *g);
    *g = (struct gate){.window = 65535, .initial = 65535, .limit = STREAMS_MAX, .next_id = 1, .born_ms = now.ms};
    g->ready = push.binary;
    push.gate = c;
    if (!push.binary) {   /* no table of header fields, no pushes of the server's own */
        buf_add(&c->out, S("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"));
        h2_frame(&c->out, H2_SETTINGS, 0, 0, S("\0\1\0\0\0\0\0\2\0\0\0\0"));
    }
    push_pump();
}

/* ---- In all. ---- */

/* So many days our certificate is still good for; -1: there is none. */
static int push_days(void) {
    X509 *cert = push.dial.tls != NULL ? SSL_CTX_get0_certificate(push.dial.tls) : NULL;
    int days = -1, seconds;
    if (cert != NULL) ASN1_TIME_diff(&days, &seconds, NULL, X509_get0_notAfter(cert));
    return days;
}

/* Says so when it is nearly over, once a day: the server may run for longer than that. */
static void push_watch(void) {
    push.cert_ms = now.ms + (int64_t)86400 * 1000;
    if (opt.apns_cert != NULL && push_days() < 30) log_warn("--apns-cert: it expires in %d days", push_days());
}

/* `tick` of the loop. */
static void push_tick(void) {
    if (push.binary && push.devices.n > 0 && now.ms >= push.feedback_ms && !push.feedback.busy) {
        push.feedback_ms = now.ms + (int64_t)86400 * 1000;
        dial(&push.feedback);
    }
    if (now.ms >= push.cert_ms) push_watch();
    for (struct push *p = push.later.first, *next; p != NULL; p = next) {
        next = p->next;
        if (p->due_ms > now.ms) continue;
        list_add(&push.queue, push.queue.last, list_remove(&push.later, p));
        p->late = false;
    }
    push_pump();
    if (opt.push_test != NULL && now.ms - push.start_ms >= PUSH_SECONDS(60))
        puts("not sent: no answer in a minute"), exit(1);
    if (push.file_lines / 4 > push.kept_lines + 1000 && now.ms >= push.compact_ms) devices_compact(false);
}

/* Appends the figures, as Prometheus reads them. */
static void push_metrics(struct buf *b) {
    const struct gate none = {0}, *g = push.gate != NULL ? push.gate->state : &none;
    int64_t queued = push.queue.n + push.later.n;
    const struct {
        const char *name;
        int64_t value;
    } gauges[] = {
        {"queued", queued}, {"in_flight", push.all - queued}, {"devices", (int64_t)push.devices.n},
        {"connected", g->ready}, {"streams_max", g->limit}, {"certificate_days", push_days()},
        {"jwt_age_seconds", push.jwt.len > 0 ? (now.ms - push.jwt_ms) / 1000 : -1},
    };
    for (size_t i = 0; i < sizeof gauges / sizeof *gauges; i++)
        buf_printf(b, "xchat_push_%s %lld\n", gauges[i].name, (long long)gauges[i].value);
    buf_printf(b, "xchat_push_answer_seconds_sum %.3f\n", (double)push.latency_ms / 1000);
    for (int i = 0; i < COUNTS; i++)
        buf_printf(b, "xchat_push_%s %llu\n", count_names[i], (unsigned long long)push.count[i]);
    for (int i = 0; i < 600; i++)
        if (push.responses[i] > 0) buf_printf(b, "xchat_push_responses_total{status=\"%d\"} %llu\n", i,
                                              (unsigned long long)push.responses[i]);
}

/* Reads the passphrase of --apns-key, from a file (its first line) or the environment. False:
 * there is none in the file. */
static bool push_passphrase(char *phrase, size_t size) {
    const char *given = getenv("XCHAT_APNS_PASSPHRASE"), *name = opt.apns_passphrase_file;
    FILE *f = name != NULL ? fopen(name, "r") : NULL;
    if (f != NULL) setvbuf(f, NULL, _IONBF, 0);   /* so that nothing is left of it */
    errno = f != NULL ? 0 : errno;
    bool ok = name == NULL || (f != NULL && fgets(phrase, (int)size, f) != NULL);
    if (!ok) log_warn("--apns-passphrase-file %s: %s", name, errno != 0 ? strerror(errno) : "it is empty");
    if (f != NULL) fclose(f);
    if (name == NULL && given != NULL) snprintf(phrase, size, "%s", given);
    phrase[strcspn(phrase, "\r\n")] = '\0';
    return ok;
}

/* Reads the key of --apns-key. NULL, or what is wrong with it. */
static const char *push_load_key(char *phrase) {
    FILE *f = fopen(opt.apns_key, "r");
    if (f == NULL) return strerror(errno);
    ERR_clear_error();
    EVP_PKEY *key = PEM_read_PrivateKey(f, NULL, tls_passphrase, phrase);
    bool ok = key != NULL && EVP_PKEY_base_id(key) == EVP_PKEY_EC && EVP_PKEY_bits(key) == 256;
    const char *why = ok ? NULL : key != NULL ? "not a P-256 key, as Apple's .p8 files have it" : tls_why(NULL);
    fclose(f);
    unsigned char *der = NULL, hash[SHA256_DIGEST_LENGTH];
    int n = ok ? i2d_PUBKEY(key, &der) : 0;
    if (n > 0) sha256((slice){(const char *)der, (size_t)n}, hash);
    OPENSSL_free(der);
    uint64_t id = 0;
    if (n > 0) memcpy(&id, hash, sizeof id);
    if (ok && id != push.key_hash) buf_clear(&push.jwt);   /* what the old key has signed is no good */
    if (ok) push.key_hash = id;
    EVP_PKEY_free(ok ? push.key : key);
    if (ok) push.key = key;
    return why;
}

/* Reads certificates and keys. False, after a line in the log: something is wrong, and all stays as it was. */
static bool push_load(void) {
    char phrase[256] = "";
    if (!push_passphrase(phrase, sizeof phrase)) return false;
    char *secret = *phrase != '\0' ? phrase : NULL;
    SSL_CTX *tls = tls_new(TLS_client_method(), secret);
    const char *why = NULL, *key = opt.apns_key != NULL && opt.apns_key_id == NULL ? opt.apns_key : opt.apns_cert;
    ERR_clear_error();
    SSL_CTX_set_verify(tls, SSL_VERIFY_PEER, NULL);
    bool trust = opt.apns_ca != NULL ? SSL_CTX_load_verify_locations(tls, opt.apns_ca, NULL) == 1
                                     : SSL_CTX_set_default_verify_paths(tls) == 1;
    if (!trust) log_warn("--apns-ca %s: %s", opt.apns_ca != NULL ? opt.apns_ca : "", why = tls_why(NULL));
    else if (opt.apns_cert != NULL && (why = tls_identify(tls, opt.apns_cert, key)) != NULL)
        log_warn("--apns-cert %s, --apns-key %s: %s", opt.apns_cert, key, why);
    else if (opt.apns_key_id != NULL && (why = push_load_key(secret)) != NULL)
        log_warn("--apns-key %s: %s", opt.apns_key, why);
    OPENSSL_cleanse(phrase, sizeof phrase);
    SSL_CTX_set_default_passwd_cb_userdata(tls, NULL);
    SSL_CTX_free(why != NULL ? tls : push.dial.tls);
    if (why != NULL) return false;
    push.dial.tls = push.feedback.tls = tls;
    push_watch();
    return true;
}

/* Reads the keys again; what is connected with the old ones is replaced. */
static bool push_reload(void) {
    if (opt.apns == NULL || !push_load()) return opt.apns == NULL;
    if (push.gate != NULL) gate_drain(push.gate);
    push.pause_ms = push.alarm_ms = push.redial_ms = push.n_verdicts = 0;
    push.proved = false;
    return true;
}

/* Understands --apns, and checks what goes with it. */
static void push_target(void) {
    slice rest = slice_of(opt.apns);
    push.binary = slice_starts(rest, S("binary://"));
    bool known = push.binary || slice_starts(rest, S("https://"));
    rest = slice_cut(rest, known ? (push.binary ? 9 : 8) : 0);
    if (rest.len > 0 && rest.p[rest.len - 1] == '/') rest.len--;
    slice host = slice_split(&rest, ':');
    int64_t port = rest.len > 0 ? slice_number(rest, 10) : push.binary ? 2195 : 443;
    if (!known || host.len == 0 || host.len >= sizeof push.host || port < 1 || port > 65534)
        usage("--apns: '%s' is not https://HOST[:PORT] or binary://HOST[:PORT]", opt.apns);
    memcpy(push.host, host.p, host.len);
    snprintf(push.port, sizeof push.port, "%d", (int)port);
    snprintf(push.next_port, sizeof push.next_port, "%d", (int)port + 1);
    if (!push.binary && opt.apns_topic == NULL) usage("--apns-topic is needed: the app's bundle id");
    if (opt.apns_key_id != NULL && (opt.apns_key == NULL || opt.apns_team_id == NULL))
        usage("--apns-key-id needs --apns-key and --apns-team-id");
    if (opt.apns_key_id == NULL && opt.apns_cert == NULL)
        usage("--apns needs --apns-cert, or --apns-key with --apns-key-id and --apns-team-id");
    if (opt.apns_format == 1) usage("--apns-format: 0 or 2");
    push.dial = (struct dial){push.host, push.port, .proto = &gate_proto, .done = gate_opened};
    push.dial.alpn = push.binary ? NULL : "\x02h2";
    push.feedback = (struct dial){push.host, push.next_port, .proto = &feedback_proto, .done = feedback_opened};
}

/* Reads the keys, if --apns is given. False, after a line in the log: that is not possible. */
static bool push_init(void) {
    push.devices.key = device_key;
    push.audiences.key = audience_key;
    push.file = -1;
    push.start_ms = now.ms;
    push.full = strcmp(opt.push_content, "full") == 0;
    push.named = push.full || strcmp(opt.push_content, "name") == 0;
    if (!push.named && strcmp(opt.push_content, "none") != 0) usage("--push-content: full, name or none");
    if (opt.push_test != NULL && opt.apns == NULL) usage("--push-test needs --apns");
    if (opt.apns == NULL) return true;
    push_target();
    return push_load();
}

/* Reads what the data directory knows of phones. False, after a line in the log: it cannot. */
static bool push_restore(void) {
    if (opt.apns == NULL || opt.data == NULL || opt.push_test != NULL) return true;
    return data_lines("devices", device_read, (struct json_field[]){
        {.name = "token"}, {.name = "at"}, {.name = "unread"}, {.name = "uid"}, {.name = "room"}, {.name = "payload"},
        {.name = "id"}, {.name = "uuid"}, {.name = "expires"}}, 9);
}

/* Keeps what could not be sent, for the next start. */
static void push_stop(void) {
    for (struct push *p = push.queue.first; p != NULL; p = p->next) push_fill(p);
    for (struct push *p = push.later.first; p != NULL; p = p->next) push_fill(p);
    devices_compact(true);
}

/* --push-test: sends one push, and says what came of it. */
static void push_try(void) {
    if (!token_parse(slice_of(opt.push_test), &push.token))
        usage("--push-test: '%s' is no device token", opt.push_test);
    struct push *p = push_new(buf_slice(&push.token));
    push_alert(&p->payload, slice_of(opt.push_text != NULL ? opt.push_text : "Hello from xchat"));
    queue_add(p, NULL, 0);
    push_pump();
    loop_run();
}

/* ==========================================================================
 * 9. Chat
 * ==========================================================================
 *
 * What people see: names, rooms, messages. Each WebSocket text is one JSON object:
 *
 *     client --> server                         server --> client
 *     login   client_name, room_id,             login   client_id, client_name, time
 *             since or history,                         (and client_list: it is you)
 *             device_token, token
 *     say     to_client_id or to_uid,           say     from_client_id, content, ...
 *             to_client_name, content                   and an id, if it is kept
 *     history before, count                     history messages, more
 *     logout  forget_device                     logout  from_client_id, ...
 *     ping, pong                                ping, pong; error   code, message
 *
 * Logging in, in this order: those in the room hear `login`; the client joins; it gets
 * the same with a client_list, from which it learns its own id. What it says to "all"
 * comes back to it through the room, like to everybody: so it knows that it was heard,
 * and stored. A `ref` of its own choice comes back with it.
 *
 * Who comes back logs in with `since`, the last id it has seen, and gets what it missed
 * before anything new. If part of that has been dropped, it is told so, and gets all
 * there is.
 *
 * A name is a label that anybody may take. With --jwt-secret-file each login needs a PASS,
 * a token (JWT, RFC 7519) that somebody who has the secret has signed:
 *
 *     eyJhbGciOiJIUzI1NiJ9 . eyJzdWIiOiI0MiJ9 . o2xQLeZs...
 *     {"alg":"HS256"}        {"sub":"42"}       HMAC-SHA-256 of all before this dot
 *
 * `sub` is the user, `name` its name, `rooms` where it may go. A token names its own
 * algorithm; servers that believe it take "none". Here there is one: HS256.
 *
 * client_id is 20 hex digits, which clients use as an HTML id:
 *
 *     7f000001 1c68 8d2f01a7     IPv4 address, port, and connection number: that starts
 *                                anywhere, so a restart does not give old ids away
 *
 * Names and contents go out as HTML (chapter 2), since clients put them into their
 * pages as they come. That escaping must never be dropped.
 *
 * Clients of the old server were never told what was wrong. These are: a message is
 * done, or answered with an `error` that names the field. Clients ignore what they do
 * not know.
 *
 * Owns: the clients and their ids, the secrets. Calls: all above.
 * Called by: 10 Back end, 11 HTTP API, 12 Page, 13 Main.
 * Promises: bad input hurts nobody but its sender.
 */

struct more {               /* what few clients have, all owned but for the pointers to other structs */
    char *name;             /* if it is a long one, or NULL */
    char *uid;              /* the user it has proved to be, or NULL: client_identify() */
    struct member *inbox;   /* its place in its user's inbox, or NULL */
    struct device *phone;   /* if it has told its device token, and there is --apns; or NULL */
    struct buf session;     /* as the back end set it, in PHP's words */
    struct peer *worker;    /* this one serves it, or NULL */
};

struct client {
    struct ws ws;           /* must be first */
    struct conn *c;
    struct member *seat;    /* in the room it speaks in; NULL before login */
    struct more *more;      /* owned; or chat.none, which stays empty: client_more() */
    int64_t busy_ns;        /* until then its messages take: chat_allow() */
    uint32_t number;        /* the second half of its id */
    uint8_t silences : 2;   /* times --ping since it was last heard */
    bool listed : 1;        /* chapter 10's: it is in the set of clients */
    bool newer : 1;         /* there was a login since its session was set */
    bool taken : 1;         /* it is served by a worker, if there is one */
    bool grouped : 1;       /* has been in a room */
    bool number_room : 1;   /* named its room by a number */
    bool named : 1;         /* has a name, that of its last login... */
    char name[19];          /* ...in HTML, here or, if it is longer, in `more` */
};

/* What happens to a client, in the numbers of the Gateway protocol. */
enum { ON_CONNECT = 1, ON_MESSAGE = 3, ON_CLOSE = 4, ON_WEBSOCKET = 205 };

/* The fields we look at; chat_message() has their names in the same order. */
enum field {
    TYPE, REF, CLIENT_NAME, ROOM_ID, TO_CLIENT_ID, TO_UID, TO_CLIENT_NAME, CONTENT,
    SINCE, INBOX_SINCE, HISTORY, BEFORE, COUNT, DEVICE_TOKEN, FORGET_DEVICE, TOKEN, FIELDS
};

struct secret {
    const char *file;   /* of --jwt-secret-file */
    size_t len;
    char text[SECRET_MAX];
};

static struct {
    struct table clients;          /* by number */
    uint32_t last_number;
    struct more none;
    char id[21];                   /* client_id()'s; all begin with address and port of the gateway */
    bool (*event)(struct client *cl, int event, slice text);   /* chapter 10's: has it been dealt with? */
    void (*greet)(struct client *cl, const struct request *q);   /* chapter 10's: there is a new one */
    struct json_field f[FIELDS];   /* of the message at hand */
    slice ref;                     /* its ref, raw JSON, or empty */
    struct buf text, html, name;   /* decoded fields */
    struct buf token;              /* a device token */
    struct buf pass, uid;          /* a part of a pass, decoded; who a login is from, or empty */
    struct secret secrets[2];      /* two while one replaces the other */
    uint32_t n_secrets;
    struct buf json;               /* the answer being written */
    unsigned long long received, limited;   /* messages, and those over --rate */
} chat;

static slice client_key(const void *item) { return (slice){(const char *)&((const struct client *)item)->number, 4}; }

static slice client_uid(const struct client *cl) { return slice_of(cl->more->uid != NULL ? cl->more->uid : ""); }

/* Its id, until the next is asked for. Who is no client has one as well. */
static slice client_id(const struct client *cl) {
    for (int i = 0; i < 8 && cl->c != NULL; i++) chat.id[12 + i] = "0123456789abcdef"[cl->number >> (28 - 4 * i) & 15];
    return cl->c != NULL ? (slice){chat.id, 20} : S("00000000000000000000");
}

/* The client of this number, or NULL. */
static struct client *client_numbered(uint32_t number) {
    return table_find(&chat.clients, client_key(&(struct client){.number = number}));
}

/* The client of this id, or NULL. */
static struct client *client_find(slice id) {
    int64_t number = id.len == 20 ? slice_number(slice_cut(id, 12), 16) : -1;
    struct client *cl = number >= 0 ? client_numbered((uint32_t)number) : NULL;
    return cl != NULL && slice_eq(client_id(cl), id) ? cl : NULL;
}

/* One client after the other; `at` begins as 0. NULL: that were all. */
static struct client *client_next(size_t *at) { return table_next(&chat.clients, at); }

/* The same as cl->more, to be changed. */
static struct more *client_more(struct client *cl) {
    if (cl->more == &chat.none) cl->more = xcalloc(sizeof *cl->more);
    return cl->more;
}

/* Its name, as HTML; empty before login. */
static slice client_name(const struct client *cl) {
    return slice_of(cl->more->name != NULL ? cl->more->name : cl->name);
}

static void client_rename(struct client *cl, slice name) {
    bool fits = name.len < sizeof cl->name;
    free(cl->more->name), cl->more->name = NULL;
    char *copy = fits ? cl->name : (client_more(cl)->name = xcalloc(name.len + 1));
    snprintf(copy, name.len + 1, "%.*s", F(name));
    cl->named = true;
}

/* Frees what it owns. */
static void client_clear(struct client *cl) {
    free(cl->more->name), free(cl->more->uid);
    buf_free(&cl->more->session);
    if (cl->more != &chat.none) free(cl->more);
}

/* Puts a client into a room, see room_join(); some places are kept for what it does itself. */
static struct member *client_join(struct client *cl, struct room *r, size_t kept) {
    struct member *m = room_join(r, cl->c, ROOMS_PER_CLIENT - kept);
    cl->grouped = cl->grouped || m != NULL;
    return m;
}

/* Puts all that a client was sent in rooms into its own queue; if it is still in the past, what is not
 * remembered of that. What it has not read when it is closing is for its phone. */
static void client_settle(struct client *cl) {
    for (struct member *m = cl->c->closing ? NULL : cl->c->joined; m != NULL; m = m->also) {
        room_commit(m->room);
        member_settle(m);
    }
}

/* Says a text to a client, or `raw` bytes, behind all that. */
static void client_tell(struct client *cl, slice text, bool raw) {
    struct conn *c = cl->c;
    client_settle(cl);
    if (c->closing) return;
    if (!raw) ws_text(c, text);
    else if (ws_takes(c)) buf_add(&c->out, text), conn_touch(c);
}

/* ---- Answers are written in chat.json. ---- */

static void chat_begin(slice type) {
    buf_clear(&chat.json);
    buf_addc(&chat.json, '{');
    json_add(&chat.json, "type", type);
}

static slice chat_end(void) {
    buf_addc(&chat.json, '}');
    return buf_slice(&chat.json);
}

/* The sender's own mark goes back as it came. */
static slice chat_end_ref(void) {
    if (chat.ref.len > 0) json_name(&chat.json, "ref");
    buf_add(&chat.json, chat.ref);
    return chat_end();
}

/* Adds who it is from, under the names this type has for that. */
static void chat_add_from(const struct client *cl, const char *id_name, const char *name_name) {
    json_add(&chat.json, id_name, client_id(cl));
    json_add(&chat.json, name_name, client_name(cl));
}

static void chat_add_time(void) { json_add(&chat.json, "time", slice_of(now.text)); }

/* Tells a client what was wrong with the message of this ref. Not in chat.json, where
 * another answer may be half written. */
static void chat_refuse(struct client *cl, const char *code, slice message, slice ref) {
    struct buf json = {0};
    buf_add(&json, S("{\"type\":\"error\""));
    json_add(&json, "code", slice_of(code));
    json_add(&json, "message", message);
    if (ref.len > 0) json_name(&json, "ref");
    buf_add(&json, ref);
    buf_addc(&json, '}');
    ws_text(cl->c, buf_slice(&json));
    buf_free(&json);
}

/* The same for the message at hand. Returns false, for its callers. */
PRINTF(3, 4) static bool chat_error(struct client *cl, const char *code, const char *format, ...) {
    char message[200];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    chat_refuse(cl, code, slice_of(message), chat.ref);
    return false;
}

/* Puts the text of a field into b. With a limit it is a name: short, and without
 * control characters. False after an error. */
static bool chat_field(struct client *cl, enum field field, struct buf *b, size_t limit) {
    const char *name = chat.f[field].name;
    buf_clear(b);
    if (!json_text(chat.f[field].raw, b)) return chat_error(cl, "bad_field", "%s must be text", name);
    if (limit == 0) return true;
    if (b->len > limit) return chat_error(cl, "too_long", "%s is longer than %zu bytes", name, limit);
    if (!is_text(buf_slice(b), ' ', ' '))
        return chat_error(cl, "bad_field", "%s holds a control character", name);
    return true;
}

/* A field that holds a number from `min` to HISTORY_MAX; `missing` if there is none.
 * False after an error. */
static bool chat_count(struct client *cl, enum field field, int64_t min, int64_t missing, int64_t *count) {
    slice raw = chat.f[field].raw;
    *count = raw.p != NULL ? slice_number(raw, 10) : missing;
    if (raw.p == NULL || (*count >= min && *count <= HISTORY_MAX)) return true;
    return chat_error(cl, "bad_field", "%s must be a number from %d to %d", chat.f[field].name, (int)min, HISTORY_MAX);
}

/* ---- The past. Lines of history go out as they are, some in one message. ---- */

static void past_begin(struct buf *b, const struct room *r) {
    bool inbox = slice_starts(room_key(r), S("users/"));
    buf_clear(b);
    buf_add(b, S("{\"type\":\"history\""));
    json_add(b, inbox ? "to_uid" : "room_id", room_name(r));
    buf_add(b, S(",\"messages\":["));
}

static void past_add(struct buf *b, slice line) {
    json_comma(b);
    buf_add(b, line);
}

static void past_end(struct buf *b, bool more) { buf_add(b, more ? S("],\"more\":true") : S("],\"more\":false")); }

/* `refill` of the chat: the next piece of what a client has missed. Live messages wait
 * in the room's log until it has got the last one. */
static bool chat_refill(struct conn *c) {
    struct member *m = c->joined;
    struct buf json = {0};
    bool more = true;
    slice line;
    while (m != NULL && m->replay == NULL) m = m->also;
    if (m == NULL || c->closing) return false;
    struct replay *replay = m->replay;
    past_begin(&json, m->room);
    size_t empty = json.len;
    uint64_t at = replay->at;
    while (json.len < REPLAY_BYTES && (more = history_next(m->room->past, &at, replay->upto, &line))) {
        if (json.len > empty && json.len + line.len > REPLAY_MAX) break;
        past_add(&json, line);
        replay->at = at;
    }
    if (!more) replay->at = at;   /* behind what was damaged */
    if (!more && at != replay->upto) ws_close(c, WS_TRY_AGAIN, "the history it was sent is gone");
    past_end(&json, replay->at < replay->upto);
    if (c->closing || replay->at == replay->upto) member_replay(m, 0, false);
    buf_addc(&json, '}');
    if (!c->closing) ws_append(&c->out, WS_TEXT, buf_slice(&json));
    buf_free(&json);
    return true;
}

/* Writes the newest `count` messages before a position, as one message without its end. False:
 * there are such messages, but none that can be read now. */
static bool past_last(struct buf *json, const struct room *r, uint64_t before, int64_t count) {
    struct buf lines = {0};   /* the newest first, as they are found */
    size_t len[HISTORY_MAX], n = 0;
    slice line;
    bool more;
    while ((more = history_before(r->past, &before, &line)) && n < (size_t)count &&
           (n == 0 || lines.len + line.len <= HISTORY_BYTES)) {
        buf_add(&lines, line);
        len[n++] = line.len;
    }
    past_begin(json, r);
    for (size_t end = lines.len; n-- > 0;) {
        end -= len[n];
        past_add(json, slice_take(slice_cut(buf_slice(&lines), end), len[n]));
    }
    bool unread = !more && before > r->past->base, none = lines.len == 0;
    past_end(json, more || unread);
    buf_free(&lines);
    return !(unread && none);
}

/* Where the message of this id begins in a room: an id stands behind its message. -1: there is none; or UNREAD. */
static int64_t past_before(struct room *r, slice id) {
    int64_t at = history_position(r->past, id);
    uint64_t before = (uint64_t)at;
    slice line;
    if (at >= 0) history_before(r->past, &before, &line);
    return at < 0 ? at : (int64_t)before;
}

/* The position of the id in a field; -1 if it is none of this room; or UNREAD, also without an id. */
static int64_t past_position(const struct room *r, enum field field) {
    slice raw = chat.f[field].raw;
    if (r->past->unknown) return UNREAD;
    return raw.p != NULL && *raw.p == '"' ? history_position(r->past, json_inside(raw)) : -1;
}

/* Adds the newest id of a room to the answer to a login and, if the client named the
 * last one it knows in `since`, whether all behind `at`, its position, is there. */
static void past_add_newest(const struct room *r, enum field since, int64_t at, const char *id_name,
                            const char *recovered) {
    char id[ID_BYTES + 1];
    history_newest(r->past, id);
    json_add(&chat.json, id_name, slice_of(id));
    if (chat.f[since].raw.p == NULL) return;
    json_name(&chat.json, recovered);
    buf_add(&chat.json, at >= 0 ? S("true") : S("false"));
}

/* Has the client sent what is behind that position, or all there is. */
static void past_resume(struct member *m, enum field since, int64_t at) {
    if (chat.f[since].raw.p != NULL) member_replay(m, at >= 0 ? (uint64_t)at : m->room->past->base, true);
}

/* A page of the past was asked for. */
static bool chat_history(struct client *cl) {
    int64_t count;
    slice id = chat.f[BEFORE].raw;
    if (cl->seat == NULL) return chat_error(cl, "not_logged_in", "history needs a login first");
    if (!chat_count(cl, COUNT, 1, 50, &count)) return false;
    struct room *r = cl->seat->room;
    room_commit(r);
    int64_t at = id.p == NULL ? (int64_t)r->past->end : *id.p == '"' ? past_before(r, json_inside(id)) : -1;
    if (at == UNREAD || (at >= 0 && !past_last(&chat.json, r, (uint64_t)at, count)))
        return chat_error(cl, "storage", "the history of this room cannot be read now");
    if (at < 0) return chat_error(cl, "bad_field", "before must be the id of a message of this room");
    ws_text(cl->c, chat_end_ref());
    return true;
}

/* `unsaid` of the rooms: tells the author of a message that it was not stored. */
static void chat_unsaid(slice text) {
    struct json_field f[] = {{.name = "from_client_id"}, {.name = "ref"}};
    size_t at;
    const char *why = json_pick(text, f, 2, &at);
    struct client *cl = why == NULL && f[0].raw.p != NULL ? client_find(json_inside(f[0].raw)) : NULL;
    if (cl == NULL) return;
    chat_refuse(cl, "storage", S("the message could not be stored, and nobody got it"),
                f[1].raw.p != NULL ? f[1].raw : S(""));
}

/* ---- Secrets, and passes. ---- */

static slice secret_text(const struct secret *s) { return (slice){s->text, s->len}; }

/* Takes as long for a wrong text as for the right one. */
static bool secret_is(const struct secret *s, slice text) {
    return text.len == s->len && CRYPTO_memcmp(s->text, text.p, text.len) == 0;
}

/* Reads the file of an option, without its line end. If that is NULL there is nothing to do. False,
 * after a line in the log: the secret stays as it was. */
static bool secret_load(const char *option, const char *file, struct secret *s, size_t least) {
    char text[SECRET_MAX + 3] = "";   /* with a line end, and one too many */
    if (file == NULL) return true;
    FILE *f = fopen(file, "r");
    size_t n = f != NULL && setvbuf(f, NULL, _IONBF, 0) == 0 ? fread(text, 1, sizeof text, f) : 0;
    const char *why = f == NULL || ferror(f) ? strerror(errno) : NULL;
    if (f != NULL) fclose(f);
    if (n > 0 && text[n - 1] == '\n') n -= n > 1 && text[n - 2] == '\r' ? 2 : 1;
    if (why == NULL && (n < least || n > SECRET_MAX)) why = "it is too short, or longer than 1024 bytes";
    if (why == NULL) memcpy(s->text, text, sizeof s->text), s->len = n;
    else log_warn("%s %s: %s", option, file, why);
    OPENSSL_cleanse(text, sizeof text);
    return why == NULL;
}

/* `take` of --jwt-secret-file. */
static const char *pass_file(const char *value) {
    if (chat.n_secrets == 2) return "two are enough";
    chat.secrets[chat.n_secrets++].file = value;
    return NULL;
}

/* The file of the secret of this number, from 0 on; or NULL. */
static const char *pass_name(uint32_t i) { return i < chat.n_secrets ? chat.secrets[i].file : NULL; }

/* Reads the secrets. False, after a line in the log: one stays as it was. */
static bool pass_load(void) {
    bool ok = true;
    for (uint32_t i = 0; pass_name(i) != NULL; i++)
        ok &= secret_load("--jwt-secret-file", pass_name(i), &chat.secrets[i], SECRET_MIN);
    return ok;
}

/* Appends the signature of what is there. */
static void pass_sign(struct buf *b, const struct secret *s) {
    unsigned char mac[SHA256_DIGEST_LENGTH], *text = (unsigned char *)b->p + b->off;
    if (HMAC(EVP_sha256(), s->text, (int)s->len, text, b->len, mac, NULL) == NULL) die("HMAC-SHA-256 fails");
    buf_addc(b, '.');
    base64url(b, (slice){(char *)mac, sizeof mac});
    OPENSSL_cleanse(mac, sizeof mac);
}

/* Decodes a part into chat.pass and finds its fields. False: it is no JSON object. */
static bool pass_part(slice part, struct json_field *f, size_t n) {
    size_t at;
    buf_clear(&chat.pass);
    return base64url_read(part, &chat.pass) && json_pick(buf_slice(&chat.pass), f, n, &at) == NULL;
}

/* Seconds since 1970, or NAN. A number is ended by what stands behind it. */
static double pass_time(slice raw, double missing) {
    bool number = raw.p != NULL && (*raw.p == '-' || (*raw.p >= '0' && *raw.p <= '9'));
    return raw.p == NULL ? missing : number ? strtod(raw.p, NULL) : (double)NAN;
}

/* False: this is no text, or of another length, or has control characters. */
static bool pass_text(slice raw, struct buf *b, size_t least, size_t most) {
    if (raw.p == NULL) return least == 0;
    slice text = json_get(raw, b);
    return *raw.p == '"' && text.len >= least && text.len <= most && is_text(text, ' ', ' ');
}

/* Does the list have this room, or a beginning of it and "*"? NULL, or what is wrong. */
static const char *pass_rooms(slice list, slice room) {
    struct json j = {list, NULL};
    bool found = false, good = json_take(&j, "[");
    while (good && !json_take(&j, "]")) {
        json_take(&j, ","), json_space(&j);
        slice raw = j.rest;
        good = json_skip(&j, "\"", 1) > 0 && json_string(&j);
        slice name = json_get(slice_take(raw, raw.len - j.rest.len), &chat.html);
        bool open = name.len > 0 && name.p[name.len - 1] == '*';
        found |= open ? slice_starts(room, slice_take(name, name.len - 1)) : slice_eq(room, name);
    }
    return !good ? "rooms must be a list of texts" : found ? NULL : "room not allowed";
}

/* Does this token open this room? NULL, and who and under what name is in chat.uid and
 * chat.name; or what is wrong. Before its signature nothing of it is looked at. */
static const char *pass_check(slice token, slice room) {
    enum { SUB, NAME, ROOMS, EXP, NBF, CLAIMS };
    struct json_field head[] = {{.name = "alg"}, {.name = "crit"}};   /* no crit is known: RFC 7515, 4.1.11 */
    struct json_field f[] = {{.name = "sub"}, {.name = "name"}, {.name = "rooms"}, {.name = "exp"}, {.name = "nbf"}};
    slice rest = token, header = slice_split(&rest, '.'), claims = slice_split(&rest, '.');
    bool good = false;
    if (rest.len == 0) return token.len == 0 ? "missing" : "it is no HS256 token";
    for (struct secret *s = chat.secrets; s < chat.secrets + chat.n_secrets; s++) {
        buf_clear(&chat.pass);
        buf_add(&chat.pass, slice_take(token, token.len - rest.len - 1));
        pass_sign(&chat.pass, s);
        good |= chat.pass.len == token.len && CRYPTO_memcmp(chat.pass.p, token.p, token.len) == 0;
        OPENSSL_cleanse(chat.pass.p, chat.pass.len);
    }
    if (!good) return "bad signature";
    if (!pass_part(header, head, 2) || !json_is(head[0].raw, "HS256") || head[1].raw.p != NULL)
        return "it is no HS256 token";
    if (!pass_part(claims, f, CLAIMS)) return "its claims are no JSON object";
    double wall = (double)now.wall, end = pass_time(f[EXP].raw, wall), start = pass_time(f[NBF].raw, wall);
    if (isnan(end) || isnan(start)) return "exp and nbf must be numbers";
    if (wall >= end + LEEWAY_S) return "expired";
    if (wall < start - LEEWAY_S) return "not valid yet";
    if (!pass_text(f[SUB].raw, &chat.uid, 1, ROOM_MAX_BYTES)) return "sub must be text of 1 to 128 bytes";
    if (!pass_text(f[NAME].raw, &chat.name, 0, NAME_MAX_BYTES)) return "name must be text of up to 64 bytes";
    return f[ROOMS].raw.p != NULL ? pass_rooms(f[ROOMS].raw, room) : NULL;
}

/* --make-token: USER[,NAME[,ROOM...]] becomes a token for a day, made with the first secret. */
static void pass_print(void) {
    slice list = slice_of(opt.make_token), sub = slice_split(&list, ','), name = slice_split(&list, ',');
    slice rest = list, room = slice_split(&rest, ',');
    struct buf *json = &chat.json, *token = &chat.text;
    if (chat.n_secrets == 0) usage("--make-token needs --jwt-secret-file");
    buf_printf(json, "{\"exp\":%lld", (long long)now.wall + PASS_S);
    json_add(json, "sub", sub);
    if (name.len > 0) json_add(json, "name", name);
    if (list.len > 0) json_name(json, "rooms");
    for (char c = '['; list.len > 0; c = ',') buf_addc(json, c), json_quote(json, slice_split(&list, ','));
    buf_add(json, room.len > 0 ? S("]}") : S("}"));
    buf_add(token, S("eyJhbGciOiJIUzI1NiJ9."));   /* {"alg":"HS256"} */
    base64url(token, buf_slice(json));
    pass_sign(token, chat.secrets);
    const char *why = pass_check(buf_slice(token), room);
    if (why != NULL) usage("--make-token: %s", why);
    printf("%.*s\n", F(buf_slice(token)));
}

/* ---- Rooms. ---- */

/* Leaves the room; the others hear of it. */
static void chat_leave(struct client *cl) {
    struct room *r = cl->seat->room;
    room_leave(cl->seat);
    cl->seat = NULL;
    chat_begin(S("logout"));
    chat_add_from(cl, "from_client_id", "from_client_name");
    chat_add_time();
    room_publish(r, chat_end(), NULL);
}

/* Tells the room, and then the client itself, who it is; enters the room between the
 * two, unless it is there already. `newest` messages of the past follow, or what it has
 * missed since an id that it named; -1: nothing was asked for. */
static void chat_enter(struct client *cl, struct room *r, int64_t newest) {
    chat_begin(S("login"));
    chat_add_from(cl, "client_id", "client_name");
    chat_add_time();
    room_publish(r, chat_end(), cl->seat);
    if (cl->seat == NULL) cl->seat = client_join(cl, r, 0);
    chat.json.len--;   /* open the object again: now the copy for the client */
    int64_t at = past_position(r, SINCE);
    struct member *inbox = cl->more->inbox;
    int64_t inbox_at = inbox != NULL ? past_position(inbox->room, INBOX_SINCE) : -1;
    if (inbox != NULL) member_settle(inbox);   /* inbox_id counts that in */
    past_add_newest(r, SINCE, at, "id", "recovered");
    if (inbox != NULL) past_add_newest(inbox->room, INBOX_SINCE, inbox_at, "inbox_id", "inbox_recovered");
    json_name(&chat.json, "client_list");
    buf_addc(&chat.json, '{');
    for (struct member *m = r->first; m != NULL; m = m->next) {
        const struct client *other = m->c->state;
        if (!other->named) continue;   /* the back end has brought it here */
        json_add(&chat.json, client_id(other).p, client_name(other));
    }
    buf_addc(&chat.json, '}');
    ws_text(cl->c, chat_end_ref());
    past_resume(cl->seat, SINCE, at);
    if (inbox != NULL) past_resume(inbox, INBOX_SINCE, inbox_at);
    if (newest < 0 || chat.f[SINCE].raw.p != NULL) return;
    member_replay(cl->seat, 0, false);   /* it no longer wants what it asked for before */
    past_last(&chat.json, r, r->past->end, newest);   /* what can be read of it */
    ws_text(cl->c, chat_end());
}

/* Reads the device token of a login into chat.token. False after an error. */
static bool chat_phone(struct client *cl) {
    buf_clear(&chat.token);
    if (chat.f[DEVICE_TOKEN].raw.p == NULL) return true;
    if (!chat_field(cl, DEVICE_TOKEN, &chat.text, 0)) return false;
    if (token_parse(buf_slice(&chat.text), &chat.token)) return true;
    return chat_error(cl, "bad_field", "device_token must be %d to %d hex digits, two a byte", TOKEN_MIN, TOKEN_MAX);
}

/* The phone of a client, unless it has come with another user since; or NULL. */
static struct device *client_phone(const struct client *cl) {
    struct device *d = cl->more->phone;
    return d != NULL && push_of(d, client_uid(cl)) ? d : NULL;
}

/* The phone of this token is in the client's room from now on, and in its user's inbox,
 * whether it is connected or not. */
static void chat_subscribe(struct client *cl, slice token) {
    struct device *old = cl->more->phone, *d = push_online(token, client_uid(cl));
    for (struct member *m = cl->c->joined; d != NULL && m != NULL; m = m->also) push_join(d, room_key(m->room));
    if (old != NULL) push_offline(old);
    client_more(cl)->phone = d;
}

/* From now on this client is this user, or nobody (""), and in the user's inbox, and so is its
 * phone. If the inbox cannot be opened now, the next call may do it. */
static void client_identify(struct client *cl, slice uid) {
    bool same = slice_eq(client_uid(cl), uid);
    struct device *phone = client_phone(cl);
    struct more *more = same && uid.len == 0 ? cl->more : client_more(cl);
    if (!same && more->inbox != NULL) room_leave(more->inbox), more->inbox = NULL;
    if (!same) free(more->uid), more->uid = uid.len > 0 ? memcpy(xcalloc(uid.len + 1), uid.p, uid.len) : NULL;
    struct room *inbox = more->uid != NULL && more->inbox == NULL ? room_open(S("users/"), uid) : NULL;
    if (inbox != NULL && !inbox->past->unknown) more->inbox = room_join(inbox, cl->c, ROOMS_PER_CLIENT);
    if (!same && phone != NULL) chat_subscribe(cl, device_key(phone));
}

static bool chat_login(struct client *cl) {
    if (!chat_field(cl, CLIENT_NAME, &chat.name, NAME_MAX_BYTES)) return false;
    if (!chat_phone(cl) || !chat_field(cl, ROOM_ID, &chat.text, ROOM_MAX_BYTES)) return false;
    int64_t newest;
    if (!chat_count(cl, HISTORY, 0, -1, &newest)) return false;
    slice room = buf_slice(&chat.text);
    if (room.len == 0 || slice_eq(room, S("0")))
        return chat_error(cl, "bad_field", "room_id must name a room, and not be empty or 0");
    const char *why = chat.n_secrets > 0 ? pass_check(json_get(chat.f[TOKEN].raw, &chat.html), room) : NULL;
    if (why != NULL) return chat_error(cl, "unauthorized", "token: %s", why);
    struct room *r = room_open(S("rooms/"), room);
    slice uid = chat.n_secrets > 0 ? buf_slice(&chat.uid) : client_uid(cl);
    struct room *inbox = uid.len > 0 ? room_open(S("users/"), uid) : r;
    if (r == NULL || inbox == NULL)
        return chat_error(cl, "limit", "there are already %u rooms (--max-rooms)", opt.max_rooms);
    if (past_position(r, SINCE) == UNREAD || past_position(inbox, INBOX_SINCE) == UNREAD)
        return chat_error(cl, "storage", "the history of this room, or of your inbox, cannot be read now");
    int most = cl->more->inbox != NULL ? ROOMS_PER_CLIENT : ROOMS_PER_CLIENT - 1;
    if (room_member(r, cl->c) == NULL && room_count(cl->c) - (cl->seat != NULL) >= (size_t)most)
        return chat_error(cl, "limit", "you are in %d rooms already", most);
    struct room *left = cl->seat != NULL && cl->seat->room != r ? cl->seat->room : NULL;
    if (left != NULL) chat_leave(cl), room_flush(left);   /* who is in both rooms is told this first */
    if (cl->seat == NULL) cl->seat = room_member(r, cl->c);   /* the back end may have brought it there */
    client_identify(cl, uid);
    buf_clear(&chat.html);
    html_escape(&chat.html, buf_slice(&chat.name), false);
    client_rename(cl, buf_slice(&chat.html));
    cl->number_room = chat.f[ROOM_ID].raw.p != NULL && *chat.f[ROOM_ID].raw.p != '"';
    cl->newer = true;
    chat_enter(cl, r, newest);
    if (chat.token.len > 0) chat_subscribe(cl, buf_slice(&chat.token));
    return true;
}

static bool chat_logout(struct client *cl) {
    slice forget = chat.f[FORGET_DEVICE].raw;
    if (cl->seat == NULL) return chat_error(cl, "not_logged_in", "logout needs a login first");
    if (client_phone(cl) != NULL && forget.p != NULL && *forget.p == 't') {
        push_give_up(cl->more->phone);
        cl->more->phone = NULL;
        devices_store();
    }
    chat_leave(cl);
    buf_free(&cl->more->session);
    chat.json.len--;   /* what the others got, with the ref, is the answer */
    ws_text(cl->c, chat_end_ref());
    return true;
}

/* ---- Messages. ---- */

/* Writes a `say`, up to the time. `to` is the value of the field `to_name`; `heading` is
 * HTML that stands before the content. */
static void chat_write_say(const struct client *cl, const char *to_name, slice to, slice heading) {
    struct buf *html = &chat.html;
    buf_clear(html);
    buf_add(html, heading);
    html_escape(html, buf_slice(&chat.text), true);
    chat_begin(S("say"));
    chat_add_from(cl, "from_client_id", "from_client_name");
    if (cl->more->uid != NULL) json_add(&chat.json, "from_uid", slice_of(cl->more->uid));
    json_add(&chat.json, to_name, to);
    json_add(&chat.json, "content", buf_slice(html));
    chat_add_time();
}

/* Says what chat_write_say() wrote in a room, to be remembered. */
static void chat_publish(struct room *r) {
    json_add(&chat.json, "id", S("00000000-0000000000000000"));   /* room_say() knows it */
    size_t id = chat.json.len - 1 - ID_BYTES;
    slice text = chat_end_ref();
    room_say(r, text, chat.json.p + chat.json.off + id);
}

/* What was said in private is shown to both sides, with the heading that pages have
 * always shown: "says to you", and "you say to ...". This is the sender's copy. */
static const slice says_to_you = {"<b>\xe5\xaf\xb9\xe4\xbd\xa0\xe8\xaf\xb4: </b>", 18};

static void chat_echo(struct client *cl, const char *to_name, slice to, const char *id) {
    struct buf heading = {0};
    buf_add(&heading, S("<b>\xe4\xbd\xa0\xe5\xaf\xb9"));
    html_escape(&heading, buf_slice(&chat.name), false);
    buf_add(&heading, S("\xe8\xaf\xb4: </b>"));
    chat_write_say(cl, to_name, to, buf_slice(&heading));
    if (id != NULL) json_add(&chat.json, "id", slice_of(id));
    ws_text(cl->c, chat_end_ref());
    buf_free(&heading);
}

/* To one client, now. */
static bool chat_whisper(struct client *cl) {
    char id[20];
    buf_clear(&chat.text);
    json_text(chat.f[TO_CLIENT_ID].raw, &chat.text);
    struct client *to = client_find(buf_slice(&chat.text));
    if (to == NULL || !ws_takes(to->c))
        return chat_error(cl, "no_such_client", "to_client_id: nobody of that id is here");
    if (!chat_field(cl, TO_CLIENT_NAME, &chat.name, 0) || !chat_field(cl, CONTENT, &chat.text, 0)) return false;
    memcpy(id, client_id(to).p, sizeof id);
    chat_write_say(cl, "to_client_id", (slice){id, sizeof id}, says_to_you);
    ws_text(to->c, chat_end());
    chat_echo(cl, "to_client_id", (slice){id, sizeof id}, NULL);
    return true;
}

/* To a user: to all connections of the user, and to those that come later. */
static bool chat_letter(struct client *cl) {
    char id[ID_BYTES + 1];
    if (!chat_field(cl, TO_UID, &chat.text, ROOM_MAX_BYTES)) return false;
    if (chat.text.len == 0) return chat_error(cl, "bad_field", "to_uid must name a user");
    struct room *inbox = room_open(S("users/"), buf_slice(&chat.text));
    if (inbox == NULL) return chat_error(cl, "limit", "there are already %u rooms (--max-rooms)", opt.max_rooms);
    if (inbox->past->unknown) return chat_error(cl, "storage", "the inbox of this user cannot be read now");
    if (!chat_field(cl, TO_CLIENT_NAME, &chat.name, 0) || !chat_field(cl, CONTENT, &chat.text, 0)) return false;
    chat_write_say(cl, "to_uid", room_name(inbox), says_to_you);
    chat_publish(inbox);
    if (!room_commit(inbox)) return false;
    history_newest(inbox->past, id);
    chat_echo(cl, "to_uid", room_name(inbox), id);
    return true;
}

/* Somebody of this name who is no client says a text: in a room, in the inbox of a user, or,
 * if `r` is NULL, to one client. False: it could not be stored; else its id, if it has one, is
 * in `id`. */
static bool chat_announce(struct room *r, struct client *to, slice name, slice text, char id[ID_BYTES + 1]) {
    struct client nobody = {.more = &chat.none};
    buf_clear(&chat.html), buf_clear(&chat.text);
    html_escape(&chat.html, name, false);
    client_rename(&nobody, buf_slice(&chat.html));
    buf_add(&chat.text, text);
    bool inbox = r != NULL && slice_starts(room_key(r), S("users/"));
    chat.ref = S("");
    *id = '\0';
    slice whom = r == NULL ? client_id(to) : inbox ? room_name(r) : S("all");
    chat_write_say(&nobody, inbox ? "to_uid" : "to_client_id", whom, r == NULL || inbox ? says_to_you : S(""));
    client_clear(&nobody);
    if (r == NULL) return client_tell(to, chat_end(), false), true;
    chat_publish(r);
    if (!room_commit(r)) return false;
    history_newest(r->past, id);
    return true;
}

static bool chat_say(struct client *cl) {
    slice to = chat.f[TO_CLIENT_ID].raw;
    if (cl->seat == NULL) return chat_error(cl, "not_logged_in", "say needs a login first");
    if (to.p == NULL && chat.f[TO_UID].raw.p != NULL) return chat_letter(cl);
    if (to.p == NULL || *to.p != '"')
        return chat_error(cl, "bad_field", "to_client_id must be \"all\" or the id of a client, in quotes");
    if (!json_is(to, "all")) return chat_whisper(cl);
    if (!chat_field(cl, CONTENT, &chat.text, 0)) return false;
    chat_write_say(cl, "to_client_id", S("all"), S(""));
    chat_publish(cl->seat->room);
    return true;
}

/* As if each message took 1/--rate seconds, one after the other (the generic cell rate algorithm):
 * who is more than --burst of them ahead of the clock is refused, and who has them go on all the
 * same is shown out at twice that. */
static bool chat_allow(struct client *cl) {
    if (opt.rate == 0) return true;
    int64_t now_ns = now.ms * 1000000, each = 1000000000 / opt.rate, burst = each * opt.burst;
    cl->busy_ns = (cl->busy_ns > now_ns ? cl->busy_ns : now_ns) + each;
    if (cl->busy_ns <= now_ns + burst) return true;
    chat.limited++;
    if (cl->busy_ns <= now_ns + 2 * burst)
        return chat_error(cl, "rate_limited", "dropped: more than %u messages a second (--rate)", opt.rate);
    ws_close(cl->c, WS_POLICY, "over --rate for too long");
    return false;
}

static void chat_message(struct conn *c, slice text) {
    static const char *const names[FIELDS] = {
        "type", "ref", "client_name", "room_id", "to_client_id", "to_uid", "to_client_name", "content",
        "since", "inbox_since", "history", "before", "count", "device_token", "forget_device", "token",
    };
    struct client *cl = c->state;
    size_t at;
    chat.received++;
    for (size_t i = 0; i < FIELDS; i++) chat.f[i] = (struct json_field){.name = names[i]};
    const char *why = json_pick(text, chat.f, FIELDS, &at);
    slice ref = chat.f[REF].raw, type = chat.f[TYPE].raw;
    for (size_t i = TO_CLIENT_ID; i < FIELDS; i++)   /* null is as good as nothing */
        if (chat.f[i].raw.p != NULL && *chat.f[i].raw.p == 'n') chat.f[i].raw = (slice){0};
    buf_clear(&chat.text);
    bool ref_ok = why != NULL || ref.p == NULL ||
                  (*ref.p == '"' && json_text(ref, &chat.text) && chat.text.len <= REF_MAX_BYTES);
    chat.ref = why == NULL && ref.p != NULL && ref_ok ? ref : S("");
    if (!chat_allow(cl) || chat.event(cl, ON_MESSAGE, text)) return;
    if (why != NULL) chat_error(cl, "bad_json", "byte %zu: %s", at, why);
    else if (!ref_ok) chat_error(cl, "bad_field", "ref must be text of at most %d bytes", REF_MAX_BYTES);
    else if (json_is(type, "say")) chat_say(cl);
    else if (json_is(type, "login")) chat_login(cl);
    else if (json_is(type, "history")) chat_history(cl);
    else if (json_is(type, "logout")) chat_logout(cl);
    else if (json_is(type, "ping")) chat_begin(S("pong")), ws_text(c, chat_end_ref());
    else if (!json_is(type, "pong"))
        chat_error(cl, "bad_type", "type must be one of login, say, history, logout, ping, pong");
}

/* ---- The life of a client. ---- */

/* After each --ping of silence we ask, in both languages a client may know; after
 * three without any sign of life it has gone. */
static void chat_tick(struct conn *c) {
    struct client *cl = c->state;
    if (now.ms < c->deadline_ms) return;
    c->deadline_ms = now.ms + (int64_t)opt.ping_s * 1000;   /* also when we stood still */
    if (++cl->silences == 3) {
        ws_close(c, WS_SILENT, "silent for too long");
        return;
    }
    ws_append(&c->out, WS_PING, S(""));
    ws_text(c, S("{\"type\":\"ping\"}"));
}

/* `feed` of the chat. Whatever comes is a sign of life; what was kept, and no more, is none. */
static ssize_t chat_feed(struct conn *c, char *p, size_t n) {
    if (n == c->searched) return 0;
    ((struct client *)c->state)->silences = 0;
    c->deadline_ms = now.ms + (int64_t)opt.ping_s * 1000;
    for (struct member *m = c->out.len == 0 ? c->joined : NULL; m != NULL; m = m->also)
        if (m->replay == NULL && m->cursor == m->room->end) m->heard = (uint32_t)m->room->past->end;
    ssize_t used = ws_feed(c, p, n);
    c->searched = used == 0 ? (uint32_t)n : 0;
    return used;
}

/* How long are the messages to be remembered, as lines, that this member was not sent. */
static uint32_t chat_unsent(const struct member *m) {
    uint32_t n = 0;
    uint64_t at = 0;
    for (slice rest = member_unread(m), frame; rest.len > 0; rest = slice_cut(rest, frame.len)) {
        frame = slice_take(rest, ws_frame_size(rest.p));
        if (frame_kept(m->room, frame, &at)) n += (uint32_t)ws_length(frame.p) + 1;
    }
    return n;
}

/* The phone of a client is gone: what it was not sent is pushed (what came in the round in which
 * it went, say), and if it went without a word, or that cannot be told, also all since it was last heard. */
static void chat_absent(struct client *cl) {
    bool silent = cl->c->lost || cl->c->blocked || cl->c->owes || cl->silences > 0 || cl->ws.behind;
    for (struct member *m = cl->c->joined; m != NULL; m = m->also) {
        struct history *past = m->room->past;
        uint32_t unheard = (uint32_t)past->end - m->heard, unsent = silent ? unheard : chat_unsent(m);
        uint64_t since = past->end - (unsent < unheard ? unsent : unheard);
        if (m->replay != NULL && m->replay->at < since) since = m->replay->at;
        room_commit(m->room);
        push_missed(cl->more->phone, past, since, client_id(cl));
    }
    push_offline(cl->more->phone);
}

static void chat_closed(struct conn *c) {
    struct client *cl = c->state;
    if (cl->more->phone != NULL) chat_absent(cl);
    bool known = chat.event(cl, ON_CLOSE, S(""));
    if (cl->seat != NULL && !known) chat_leave(cl);
    while (c->joined != NULL) room_leave(c->joined);
    table_remove(&chat.clients, client_key(cl));
    ws_end(c);
    client_clear(cl);
    free(cl);
    c->state = NULL;
}

static const struct proto chat_proto = {
    .name = "chat", .feed = chat_feed, .message = chat_message, .tick = chat_tick, .closed = chat_closed,
    .freed = http_freed, .refill = chat_refill, .peek = room_peek, .sent = room_sent,
};

/* `upgraded` of the chat's site: this connection is a client from now on. */
static void chat_upgraded(struct conn *c, const struct request *q) {
    struct client *cl = xcalloc(sizeof *cl);
    *cl = (struct client){.c = c, .more = &chat.none};
    do cl->number = ++chat.last_number;
    while (client_numbered(cl->number) != NULL);
    table_add(&chat.clients, cl);
    c->state = cl;
    c->proto = &chat_proto;
    c->deadline_ms = now.ms + (int64_t)opt.ping_s * 1000;
    chat.greet(cl, q);
}

static void chat_figures(struct buf *b) {
    buf_printf(b, "xchat_clients %zu\nxchat_messages_received_total %llu\nxchat_messages_rate_limited_total %llu\n",
               chat.clients.n, chat.received, chat.limited);
}

/* Address (IPv4) and port of the gateway, or what stands for it, go into the ids. `event` and
 * `greet` belong to the back end: see struct chat. */
static void chat_init(const uint8_t gateway[6], bool (*event)(struct client *cl, int event, slice text),
                      void (*greet)(struct client *cl, const struct request *q)) {
    uint32_t random;
    chat.clients.key = client_key;
    snprintf(chat.id, sizeof chat.id, "%02x%02x%02x%02x%02x%02x%08x", gateway[0], gateway[1], gateway[2], gateway[3],
             gateway[4], gateway[5], 0);
    chat.event = event;
    chat.greet = greet;
    if (RAND_bytes((unsigned char *)&random, sizeof random) != 1) die("no random bytes");
    chat.last_number = random;
}

/* ==========================================================================
 * 10. Back end
 * ==========================================================================
 *
 * A site has users, orders, rights: that is not our business, but the site's, and it
 * wants to tell us who is who, and to speak in rooms. Sites made for GatewayWorker do so
 * in PHP, through a library (GatewayClient) that talks to what are three kinds of
 * processes there. We are all three:
 *
 *     PHP page ---- where are you? ---> REGISTER   lines of JSON
 *         |                             ^  ^
 *         |         this is my address -'  '- tell me of all addresses
 *         |                             |  |
 *         '- packets -> GATEWAY --------'  WORKER, a PHP process, if there is one,
 *                       (this is us)  <--- comes by itself; is told of all that clients
 *                                          do, from the handshake on, and answers by
 *                                          packets; then our own chat is silent
 *
 * A packet, in which all numbers have their highest byte first:
 *
 *     0        4   5    9    11    15    17       21   22     24       28
 *     | length |cmd| IP |port| IP  |port | client |flag| port |ext len | ext | body
 *     |        |   | ours    | client's  | number |    | ours |        |
 *
 * The first halves of ids of clients are our address: so PHP knows whom to ask about one.
 * Replies, and some of what is in packets, are PHP values as serialize() writes them:
 *
 *     N;   b:1;   i:-5;   d:0.5;   s:3:"abc";   a:1:{i:0;s:1:"x";}      no blanks, and
 *     lengths in bytes. unserialize() makes objects of what begins with O or C, and
 *     runs their code: so nothing like that gets into a session, where PHP would read it.
 *
 * A chat room is a group, a user's inbox has all connections of the user. Sessions are what
 * PHP keeps for a client here; of a client of our own chat it has room and name.
 *
 * Who can reach these ports has power over everybody: they are for this machine, or for
 * those who know a secret.
 *
 * Owns: the secrets, those connected to gateway and register. Calls: all above.
 * Called by: 11 HTTP API, 13 Main. Promises: what is malformed hurts nobody but its sender.
 */

/* The commands, with their names there; those to a worker are chapter 9's. */
enum {
    SEND_TO_ONE = 5, SEND_TO_ALL, KICK, DESTROY, UPDATE_SESSION, GET_ALL_CLIENT_SESSIONS, IS_ONLINE, BIND_UID,
    UNBIND_UID, SEND_TO_UID, GET_CLIENT_ID_BY_UID, BATCH_GET_CLIENT_ID_BY_UID, JOIN_GROUP = 20, LEAVE_GROUP,
    SEND_TO_GROUP, GET_CLIENT_SESSIONS_BY_GROUP, GET_CLIENT_COUNT_BY_GROUP, SELECT, GET_GROUP_ID_LIST, UNGROUP,
    BATCH_GET_CLIENT_COUNT_BY_GROUP, WORKER_CONNECT = 200, WORKER_PING, GATEWAY_CLIENT_CONNECT,
    GET_SESSION_BY_CLIENT_ID, SET_SESSION
};

enum { PLAIN_TEXT = 1, AS_IT_IS = 2 };   /* flags: the body is no PHP value; it has its WebSocket frame already */

enum {
    PACKET_HEAD = 28, PACKET_MAX = 10 << 20,
    PHP_DEPTH = 32,           /* arrays inside each other */
    SESSION_MAX = 32768,      /* bytes */
    PEERS_MAX = 256,          /* connections to gateway and register */
    STRANGER_BYTES = 65536,   /* of a packet or line, from who did not show the secret... */
    STRANGER_MS = 10000,      /* ...and the time to do so */
    PEER_MS = 30000,          /* for the rest of a packet or line */
    WORKER_BACKLOG = 16 << 20,   /* unread bytes of a worker, who is shut out then */
    REJOIN_MS = 1000, PEER_PING_MS = 25000,
    PENDING_MAX = 64 << 20,   /* bytes of packets that are not complete, of all */
    NAMES_MAX = 65536,        /* rooms or users that one packet asks for */
    PAIRS_MAX = 1024,         /* in a session that is merged: each is looked for among the others */
    ANSWER_MAX = 16 << 20     /* bytes of a reply */
};

/* ---- Reading PHP values. A slice of them is read from its front, piece by piece. ---- */

struct php {
    char type;       /* one of N b i d s a O, or '}' where an array or object ends */
    slice text;      /* the bytes of a string, the digits of a number, the class of an object */
    int64_t pairs;   /* of an array or object: their number; they follow */
};

struct php_walk {    /* through a value, and all that is in it */
    slice rest;
    int depth;
    int64_t left[PHP_DEPTH + 1];   /* keys and values still to come, at each depth */
    bool key;                      /* what was read last is a key */
};

/* An integer of PHP has at most 19 digits. */
static bool php_digits(slice s) {
    struct json j = {s, NULL};
    json_skip(&j, "-", 1);
    return json_skip(&j, "0123456789", 19) > 0 && j.rest.len == 0;
}

/* A float that JSON has as well; it has no INF and NAN. */
static bool php_float(slice s) {
    struct json j = {s, NULL};
    return s.len < 32 && json_number(&j) && j.rest.len == 0;
}

/* Takes this character off the front, if it is there. */
static bool php_skip(slice *s, char c) {
    bool ok = s->len > 0 && *s->p == c;
    if (ok) *s = slice_cut(*s, 1);
    return ok;
}

/* Takes a scalar, or the beginning of an array up to its '{', off the front. False: that is not
 * what comes. Lengths are checked against what there is; so an array cannot claim more pairs
 * than there are bytes. */
static bool php_read(slice *s, struct php *v) {
    if (s->len < 2 || s->p[1] != (*s->p == 'N' ? ';' : ':')) return false;
    *v = (struct php){*s->p, S(""), 0};
    *s = slice_cut(*s, 2);
    if (v->type == 'N') return true;
    if (strchr("bidsaO", v->type) == NULL || v->type == '\0') return false;
    if (strchr("bid", v->type) != NULL) {
        if (memchr(s->p, ';', s->len) == NULL) return false;
        v->text = slice_split(s, ';');
        if (v->type == 'b') return slice_eq(v->text, S("0")) || slice_eq(v->text, S("1"));
        if (v->type == 'i') return php_digits(v->text);
        slice size = slice_starts(v->text, S("-")) ? slice_cut(v->text, 1) : v->text;
        return php_float(v->text) || slice_eq(size, S("INF")) || slice_eq(v->text, S("NAN"));
    }
    int64_t n = slice_number(slice_split(s, ':'), 10);
    if (v->type != 'a') {
        if (!php_skip(s, '"') || n < 0 || n > (int64_t)s->len) return false;
        v->text = slice_take(*s, (size_t)n);
        *s = slice_cut(*s, (size_t)n);
        if (!php_skip(s, '"') || !php_skip(s, v->type == 's' ? ';' : ':')) return false;
        if (v->type == 's') return true;
        n = slice_number(slice_split(s, ':'), 10);
    }
    v->pairs = n;
    return n >= 0 && n <= (int64_t)s->len && php_skip(s, '{');
}

/* The next piece on a walk, which begins as {.rest = ..., .left = {1}}. False at its end, or
 * where something is wrong: then depth and left[0] are not both 0. */
static bool php_next(struct php_walk *w, struct php *v) {
    int64_t *left = &w->left[w->depth];
    w->key = w->depth > 0 && *left > 0 && *left % 2 == 0;
    if (*left == 0) {
        *v = (struct php){'}', S(""), 0};
        return w->depth > 0 && php_skip(&w->rest, '}') && w->depth-- > 0;
    }
    if (!php_read(&w->rest, v) || (w->key && v->type != 'i' && v->type != 's')) return false;
    --*left;
    if (v->type != 'a' && v->type != 'O') return true;
    if (w->depth == PHP_DEPTH) return false;
    w->left[++w->depth] = 2 * v->pairs;
    return true;
}

/* Takes a whole value off the front, as it is written. Empty: there is none, or one with objects that
 * are not wanted. */
static slice php_take(slice *s, bool objects) {
    struct php_walk w = {.rest = *s, .left = {1}};
    struct php v;
    while (php_next(&w, &v))
        if (v.type == 'O' && !objects) return S("");
    slice value = slice_take(*s, w.depth == 0 && w.left[0] == 0 ? s->len - w.rest.len : 0);
    *s = slice_cut(*s, value.len);
    return value;
}

/* Is this one value, and nothing behind it? */
static bool php_valid(slice s, bool objects) { return php_take(&s, objects).len > 0 && s.len == 0; }

/* What is inside the brackets of an array that was checked; nothing, if it is none. */
static slice php_inside(slice array) {
    struct php v;
    bool ok = php_read(&array, &v) && v.type == 'a';
    return ok ? slice_take(array, array.len - 1) : S("");
}

/* Takes a pair off what php_inside() returned: key and value as they are written. False: there is none. */
static bool php_each(slice *rest, slice *key, slice *value) {
    *key = php_take(rest, true);
    *value = php_take(rest, true);
    return value->len > 0;
}

/* The value of this key (as it is written) among such pairs; empty: there is none. It is looked
 * for at *next first, which is moved behind it: two arrays mostly have the same order. */
static slice php_find(slice pairs, slice key, slice *next) {
    slice k, value;
    for (slice rest = *next; php_each(&rest, &k, &value) && slice_eq(k, key);) return *next = rest, value;
    while (php_each(&pairs, &k, &value))
        if (slice_eq(k, key)) return *next = pairs, value;
    return S("");
}

/* Is this the inside of a list, with the keys 0, 1, 2...? */
static bool php_is_list(slice rest, int64_t pairs) {
    struct php key;
    int64_t i = 0;
    while (i < pairs && php_read(&rest, &key) && key.type == 'i' && slice_number(key.text, 10) == i &&
           php_take(&rest, true).len > 0) i++;
    return i == pairs;
}

/* ---- Writing them. ---- */

/* Bytes as they are: their number makes quotes inside harmless. */
static void php_string(struct buf *b, slice s) {
    buf_printf(b, "s:%zu:\"", s.len);
    buf_add(b, s);
    buf_add(b, S("\";"));
}

/* A key that looks like an integer is one: "77" and 77 are the same group. */
static void php_key(struct buf *b, slice s) {
    char again[24] = "";
    if (php_digits(s)) memcpy(again, s.p, s.len), snprintf(again, sizeof again, "%lld", strtoll(again, NULL, 10));
    if (s.len > 0 && slice_eq(slice_of(again), s)) buf_printf(b, "i:%s;", again);
    else php_string(b, s);
}

/* A key that is a name, and text. */
static void php_pair(struct buf *b, const char *name, slice value) {
    php_string(b, slice_of(name));
    php_string(b, value);
}

/* Makes an array of what stands behind the first `start` bytes, n pairs: their number, which is only
 * known now, goes in front of them. */
static void php_array(struct buf *b, size_t start, size_t n) {
    char head[32];
    size_t len = (size_t)snprintf(head, sizeof head, "a:%zu:{", n);
    char *pairs = buf_room(b, len) - (b->len - start);
    memmove(pairs + len, pairs, b->len - start);
    memcpy(pairs, head, len);
    b->len += (uint32_t)len;
    buf_addc(b, '}');
}

/* Appends a value as json_encode() writes it, where a list is an array and all other arrays are
 * objects. False: there is no JSON for it, and what was appended is of no use. */
static bool php_json(slice s, struct buf *b) {
    char in[PHP_DEPTH + 1] = "";   /* at each depth 'l' for a list, 'a' for another array, 'O' for an object */
    struct php_walk w = {.rest = s, .left = {1}};
    struct php v;
    if (!php_valid(s, true) || !utf8_valid(s)) return false;
    while (php_next(&w, &v)) {
        if (w.key && in[w.depth] == 'O' && slice_starts(v.text, S("\0"))) {   /* not public */
            php_take(&w.rest, true);
            w.left[w.depth]--;
            continue;
        }
        if (w.key) json_comma(b);
        if (w.key && in[w.depth] == 'l') continue;
        if (v.type == 's' || w.key) buf_addc(b, '"'), escape(b, v.text, &php_escapes), buf_addc(b, '"');
        else if (v.type == 'N') buf_add(b, S("null"));
        else if (v.type == 'b') buf_add(b, *v.text.p == '1' ? S("true") : S("false"));
        else if (v.type == '}') buf_addc(b, in[w.depth + 1] == 'l' ? ']' : '}');
        else if (v.type == 'i' || v.type == 'd') {
            if (!php_float(v.text)) return false;
            for (size_t i = 0; i < v.text.len; i++) buf_addc(b, lower(v.text.p[i]));
        } else {
            in[w.depth] = v.type == 'a' && php_is_list(w.rest, v.pairs) ? 'l' : v.type;
            buf_addc(b, in[w.depth] == 'l' ? '[' : '{');
            if (v.type == 'O') json_add(b, "__PHP_Incomplete_Class_Name", v.text);
        }
        if (w.key) buf_addc(b, ':');
    }
    return true;
}

/* Appends what array_replace_recursive() makes of two arrays that were checked: what has the
 * same key in both is replaced, or, if both are arrays, merged in the same way. */
static bool php_merge(slice old, slice add, struct buf *b) {
    struct merge {
        slice old, add, old_left, add_left;   /* pairs of both; those still to be written */
        slice old_next, add_next;             /* php_find()'s */
        size_t start, n;                      /* where those written begin, and their number */
    } in[PHP_DEPTH + 1];
    slice key, value;
    size_t left = PAIRS_MAX;
    old = php_inside(old), add = php_inside(add);
    in[0] = (struct merge){old, add, old, add, old, add, b->len, 0};
    for (int depth = 0; depth >= 0;) {
        struct merge *at = &in[depth];
        bool first = left > 0 && php_each(&at->old_left, &key, &value);
        if (left == 0 || (!first && !php_each(&at->add_left, &key, &value))) {
            php_array(b, at->start, at->n);
            depth--;
            continue;
        }
        slice other = first ? php_find(at->add, key, &at->add_next) : php_find(at->old, key, &at->old_next);
        if (!first && other.len > 0) continue;   /* it was written */
        buf_add(b, key);
        at->n++, left--;
        if (*value.p == 'a' && *other.p == 'a') {
            old = php_inside(value), add = php_inside(other);
            in[++depth] = (struct merge){old, add, old, add, old, add, b->len, 0};
        } else buf_add(b, other.len > 0 ? other : value);
    }
    return left > 0;
}

/* ---- Those who are connected: to the gateway, or to the register. ---- */

static struct {
    struct secret key;
    struct peer *peers;        /* all, the oldest first */
    struct conn *joined;       /* our connection to another register, or NULL */
    struct dial join;
    char host[256], register_port[8];   /* of that */
    uint8_t address[6];        /* of the gateway: IPv4 and port, as ids of clients have it... */
    char address_text[24];     /* ...and as the register does */
    uint16_t port;             /* of the chat */
    struct set {
        struct client **client;   /* in order of being added; each is `listed` */
        size_t n, cap;
    } set;
    int64_t join_ms;           /* not before then: connect to it; or say that we live */
    struct buf text;           /* a message that had to be written */
    struct buf name;           /* a value of JSON, decoded */
    struct buf json;           /* ext_data of the packet at hand: ext_json() */
} backend;

struct peer {
    struct conn *c;
    struct peer *next;
    bool gateway;          /* it is connected to that */
    bool known;            /* it has shown the secret, or needs not */
    bool worker;           /* and wants to be told of clients, or, at the register, of addresses */
    uint32_t clients;      /* of this worker */
    struct buf name;       /* the key of a worker; the address of a gateway, at the register */
    int64_t ping_ms;       /* when it is told next that we live; 0: it needs not be told */
    int64_t heard_ms;      /* when its last packet came, or it itself */
};

/* Who goes if there are too many: the oldest stranger; else who has not asked for anything for longest,
 * since PHP keeps connections, and makes a new one if that has gone; or else the newcomer. */
static struct peer *peer_least(struct peer *newcomer) {
    struct peer *goes = newcomer;
    for (struct peer *p = backend.peers; p != newcomer && (goes == newcomer || goes->known); p = p->next) {
        bool stays = p->c->closing || (p->known && (!p->gateway || p->worker));
        if (!stays && (goes == newcomer || !p->known || p->heard_ms < goes->heard_ms)) goes = p;
    }
    return goes;
}

/* `accepted` of both; the listener's state is the protocol. Who is to go is heard first: what has come
 * may be the secret, and an order; then it may be another who goes. */
static void peer_accepted(struct conn *l, struct conn *c) {
    struct peer *peer = c->state = xcalloc(sizeof *peer), **at = &backend.peers;
    c->proto = l->state;
    peer->c = c;
    peer->heard_ms = now.ms;
    peer->gateway = strcmp(c->proto->name, "gateway") == 0;
    peer->known = peer->gateway && backend.key.len == 0;
    c->deadline_ms = peer->known ? 0 : now.ms + STRANGER_MS;
    uint32_t older = 0;
    for (; *at != NULL; at = &(*at)->next) older += !(*at)->c->closing || (*at)->c->out.len > 0;
    *at = peer;
    if (older < PEERS_MAX) return;
    struct peer *goes, *heard = NULL;
    while ((goes = peer_least(peer)) != heard && goes != peer)
        if (conn_read((heard = goes)->c), heard->c->closing) return;   /* it went by itself */
    conn_lost(goes->c, "too many connections of back ends");
}

/* The worker behind this one, or the first; NULL: there is none. */
static struct peer *worker_next(const struct peer *p, bool gateway) {
    struct peer *next = p != NULL ? p->next : backend.peers;
    while (next != NULL && (next->gateway != gateway || !next->worker || next->c->closing)) next = next->next;
    return next;
}

/* What has come is no whole packet or line: the rest has a while to come. */
static ssize_t peer_wait(struct conn *c) {
    size_t all = 0;
    for (const struct peer *p = backend.peers; p != NULL; p = p->next) all += p->c->in.len;
    if (all > PENDING_MAX) return conn_close(c, "too much that is not complete"), -1;
    if (c->deadline_ms == 0) c->deadline_ms = now.ms + PEER_MS;
    return 0;
}

/* `tick` of both: who is slow is shut out, and a worker is pinged. */
static void peer_tick(struct conn *c) {
    static const char ping[PACKET_HEAD] = {[3] = PACKET_HEAD, [4] = (char)WORKER_PING, [21] = PLAIN_TEXT};
    struct peer *peer = c->state;
    if (c->deadline_ms != 0 && now.ms >= c->deadline_ms) conn_close(c, "too slow");
    bool stuck = c->out.len > OUT_HIGH && !peer->worker;   /* it does not read its answers */
    if (stuck && c->deadline_ms == 0) c->deadline_ms = now.ms + PEER_MS;
    if (!stuck && peer->known && c->in.len == 0) c->deadline_ms = 0;
    if (peer->ping_ms == 0 || now.ms < peer->ping_ms) return;
    peer->ping_ms = now.ms + PEER_PING_MS;
    buf_add(&c->out, (slice){ping, sizeof ping});
    conn_touch(c);
}

/* ---- The register. ---- */

/* Sends the list of all gateways, us first. Two may say that they have the same address, or that
 * they have ours; it is listed once, since PHP would send everything twice. */
static void register_list(struct conn *c) {
    struct buf *b = &c->out;
    if (b->len > WORKER_BACKLOG) conn_lost(c, "a worker that does not read");
    buf_add(b, S("{\"event\":\"broadcast_addresses\",\"addresses\":["));
    if (opt.gateway != NULL) json_quote(b, slice_of(backend.address_text));
    for (const struct peer *p = backend.peers; p != NULL; p = p->next) {
        const struct peer *same = backend.peers;
        slice name = buf_slice(&p->name);
        while (same != p && (same->gateway || !slice_eq(buf_slice(&same->name), name))) same = same->next;
        bool ours = opt.gateway != NULL && slice_eq(name, slice_of(backend.address_text));
        if (p->gateway || name.len == 0 || ours || same != p) continue;
        json_comma(b);
        json_quote(b, name);
    }
    buf_add(b, S("]}\n"));
    conn_touch(c);
}

/* Tells all who have asked, on every change; they stay connected for that. */
static void register_broadcast(void) {
    for (struct peer *p = NULL; (p = worker_next(p, false)) != NULL;) register_list(p->c);
}

/* The address of a peer, without its port. */
static slice peer_ip(const struct addr *a) { return http_name(slice_of(addr_text(a))); }

/* A whole line. NULL, or why the connection ends. A ping needs no secret, and any line stops the
 * clock that runs against strangers: so it always was. */
static const char *register_line(struct conn *c, slice line) {
    struct peer *peer = c->state;
    struct json_field f[] = {{.name = "event"}, {.name = "address"}, {.name = "secret_key"}};
    size_t at;
    if (json_pick(line, f, 3, &at) != NULL || json_get(f[0].raw, &backend.name).len == 0) {
        buf_printf(&c->out, "Bad request for Register service. Request info(IP:%.*s, Request Buffer:%.*s). "
                   "See http://doc2.workerman.net/register-auth-timeout.html\n", F(peer_ip(&c->peer)), F(line));
        return "no request to a register";
    }
    bool gateway = json_is(f[0].raw, "gateway_connect"), worker = json_is(f[0].raw, "worker_connect");
    c->deadline_ms = 0;
    if (json_is(f[0].raw, "ping")) return NULL;
    if (!gateway && !worker) return "unknown event";
    if (!secret_is(&backend.key, json_get(f[2].raw, &backend.name))) return "wrong secret key";
    peer->known = true;
    peer->worker |= worker;
    if (worker) return register_list(c), NULL;
    slice address = json_get(f[1].raw, &backend.name);
    if (address.len == 0 || address.len > NAME_MAX_BYTES) return "no address";
    buf_clear(&peer->name), buf_add(&peer->name, address);
    register_broadcast();
    return NULL;
}

/* `feed` of the register. */
static ssize_t register_feed(struct conn *c, char *p, size_t n) {
    slice rest = {p, n}, line = slice_split(&rest, '\n');
    if (line.len == n) return n > STRANGER_BYTES ? conn_close(c, "too long a line"), -1 : peer_wait(c);
    if (line.len > 0 && line.p[line.len - 1] == '\r') line.len--;
    const char *why = register_line(c, line);
    return why != NULL ? conn_close(c, why), -1 : (ssize_t)(n - rest.len);
}

/* `closed` of both. A worker's clients get another one when there is something to tell. */
static void backend_closed(struct conn *c) {
    struct peer *peer = c->state, **at = &backend.peers;
    bool listed = !peer->gateway && peer->name.len > 0;
    size_t i = 0;
    for (struct client *cl; peer->clients > 0 && (cl = client_next(&i)) != NULL;)
        if (cl->more->worker == peer) cl->more->worker = NULL;
    while (*at != peer) at = &(*at)->next;
    *at = peer->next;
    buf_free(&peer->name);
    free(peer);
    c->state = NULL;
    if (listed) register_broadcast();
}

static const struct proto register_proto = {
    .name = "register", .feed = register_feed, .tick = peer_tick, .closed = backend_closed,
};

/* ---- Another register that we tell our address. ---- */

/* It has nothing to say that we would want to know. */
static ssize_t join_feed(struct conn *c, char *p, size_t n) { return (void)c, (void)p, (ssize_t)n; }

/* `closed`: the register forgets us at once, and we come back in a second. */
static void join_closed(struct conn *c) {
    c->eof = true;
    backend.join.attempt += !c->spoke;   /* it was never connected: try its next address */
    backend.joined = NULL;
    backend.join_ms = now.ms + REJOIN_MS;
    log_warn("--join %s: %s; trying again", opt.join, c->why);
}

static const struct proto join_proto = {.name = "join", .feed = join_feed, .closed = join_closed};

/* `done` of the dial: it is connected, or `c` is NULL. */
static void join_opened(struct conn *c, const char *why) {
    backend.joined = c;
    backend.join_ms = now.ms + (c != NULL ? PEER_PING_MS : REJOIN_MS);
    if (c == NULL) log_warn("--join %s: %s", opt.join, why);
    if (c == NULL) return;
    buf_printf(&c->out, "{\"event\":\"gateway_connect\", \"address\":\"%s\", \"secret_key\":", backend.address_text);
    json_quote(&c->out, secret_text(&backend.key));
    buf_add(&c->out, S("}\n"));
}

static void join_tick(void) {
    if (now.ms < backend.join_ms || backend.join.busy || loop_stopping()) return;
    backend.join_ms = now.ms + (backend.joined != NULL ? PEER_PING_MS : REJOIN_MS);
    if (backend.joined == NULL) {
        dial(&backend.join);
    } else if (strncmp(backend.host, "127.0.0.1", 9) != 0) {
        buf_add(&backend.joined->out, S("{\"event\":\"ping\"}\n"));
        conn_touch(backend.joined);
    }
}

/* ---- Sessions. They go back to PHP as the bytes that came; a login changes two of their keys. ---- */

/* A name that can be that of a room or a user. PHP takes "0" for none. */
static bool name_ok(slice s) {
    return s.len > 0 && s.len <= ROOM_MAX_BYTES && !slice_eq(s, S("0")) && utf8_valid(s) && is_text(s, ' ', ' ');
}

/* The session is this from now on; it is no part of the old one. */
static void session_keep(struct client *cl, slice session) {
    buf_free(&cl->more->session);
    buf_add(&client_more(cl)->session, session);
    cl->newer = false;
}

/* The session of a client: what the back end has set, and what a login since then has changed, unless
 * there is too much to merge. Pages expect the room as the login had it, as a number or as text. */
static slice session_get(struct client *cl) {
    struct buf login = {0}, merged = {0};
    if (cl->seat == NULL || !cl->newer) return buf_slice(&cl->more->session);
    php_string(&login, S("room_id"));
    (cl->number_room ? php_key : php_string)(&login, room_name(cl->seat->room));
    php_pair(&login, "client_name", client_name(cl));
    php_array(&login, 0, 2);
    if (php_merge(buf_slice(&cl->more->session), buf_slice(&login), &merged)) session_keep(cl, buf_slice(&merged));
    buf_free(&login), buf_free(&merged);
    return buf_slice(&cl->more->session);
}

/* The value of this key in a session, if it is text or an integer; else its text is empty. */
static struct php session_value(slice pairs, slice key) {
    struct php v;
    slice value = php_find(pairs, key, &pairs);
    bool ok = php_read(&value, &v) && (v.type == 'i' || v.type == 's');
    return ok ? v : (struct php){'N', S(""), 0};
}

/* The room of this name, made if need be; NULL if it cannot be one, or cannot be used now. */
static struct room *group_open(slice name) {
    struct room *r = name_ok(name) ? room_open(S("rooms/"), name) : NULL;
    return r != NULL && !r->past->unknown ? r : NULL;
}

/* Puts a client, and its phone, into a room; NULL: it is in too many. `kept` as for client_join(). */
static struct member *gateway_join(struct client *cl, struct room *r, size_t kept) {
    bool new = room_member(r, cl->c) == NULL;
    struct member *m = client_join(cl, r, kept);
    if (new && m != NULL && client_phone(cl) != NULL) push_join(cl->more->phone, room_key(r));
    return m;
}

/* Replaces the session, and has the chat go by it: room and name are what it says. The client is
 * not taken out of the room it was in, since that is a group for PHP, and nobody said so; nor put
 * back into it, if somebody took it out, because a worker sends the whole session after each event. */
static void session_set(struct client *cl, slice session) {
    slice pairs = php_inside(session);
    struct php name = session_value(pairs, S("s:11:\"client_name\";"));   /* may be empty, as at a login */
    struct php room = session_value(pairs, S("s:7:\"room_id\";"));
    bool good = name.type != 'N' && name.text.len <= (size_t)6 * NAME_MAX_BYTES && utf8_valid(name.text) &&
                is_text(name.text, ' ', ' ');
    struct room *r = good ? group_open(room.text) : NULL;
    slice old = session_value(php_inside(buf_slice(&cl->more->session)), S("s:7:\"room_id\";")).text;
    bool out = cl->seat == NULL && cl->named && slice_eq(old, room.text);   /* it was taken out of this one */
    size_t kept = cl->more->inbox == NULL;   /* a place for that, as at a login */
    cl->seat = r == NULL ? NULL : out ? room_member(r, cl->c) : gateway_join(cl, r, kept);
    cl->number_room = room.type == 'i';
    if (cl->seat != NULL) client_rename(cl, name.text);
    session_keep(cl, session);
}

/* UPDATE_SESSION and SET_SESSION: merges one into it, or replaces it, if it can be one. A text
 * without any ':', and none at all, is kept as well: PHP programs put such things there, and get
 * them back. An object would be made by unserialize() in whoever asks for the session: only those
 * who have shown a secret may store one. */
static void session_order(struct client *cl, slice session, bool update) {
    bool objects = backend.key.len > 0, plain = !update && memchr(session.p, ':', session.len) == NULL;
    slice old = update ? session_get(cl) : S("");
    struct buf merged = {0};
    if (session.len > SESSION_MAX || !(php_valid(session, objects) || plain)) {
        log_warn("gateway: a session is refused: it is too long, no PHP value, or has objects in it");
        return;
    }
    bool arrays = slice_starts(old, S("a:")) && *session.p == 'a';
    bool fits = !arrays || (php_merge(old, session, &merged) && merged.len <= SESSION_MAX);
    if (!fits) log_warn("gateway: a session would have over %d bytes, or %d values", SESSION_MAX, PAIRS_MAX);
    else if (arrays || old.len == 0) session_set(cl, arrays ? buf_slice(&merged) : session);
    buf_free(&merged);
}

/* ---- Sets of clients. ---- */

/* Makes the set an empty one. Nobody is in it twice. It lasts until a client that is in it has
 * gone (worker_event()), which is not before its maker returns. */
static struct set *set_new(void) {
    struct set *set = &backend.set;
    while (set->n > 0) set->client[--set->n]->listed = false;
    return set;
}

/* Adds a client, unless that is NULL, going, or was added before. */
static void set_add(struct set *set, struct client *cl) {
    if (cl == NULL || cl->c->closing || cl->listed) return;
    cl->listed = true;
    if (set->n == set->cap) set->client = xrealloc(set->client, (set->cap = 2 * set->cap + 8) * sizeof(void *));
    set->client[set->n++] = cl;
}

/* Adds who is in a room or inbox of this name. */
static void set_add_room(struct set *set, slice space, slice name) {
    const struct room *r = room_find(space, name);
    for (struct member *m = r != NULL ? r->first : NULL; m != NULL; m = m->next) set_add(set, m->c->state);
}

static int set_order(const void *a, const void *b) {
    return (int32_t)((*(struct client *const *)a)->number - (*(struct client *const *)b)->number);
}

/* Adds all clients that are not in it, the oldest first. */
static void set_add_all(struct set *set) {
    size_t n = set->n, at = 0;
    for (struct client *cl; (cl = client_next(&at)) != NULL;) set_add(set, cl);
    if (set->n > n) qsort(set->client + n, set->n - n, sizeof(void *), set_order);
}

/* The client of this number, unless it is going; or NULL. */
static struct client *gateway_client(int64_t number) {
    struct client *cl = number >= 0 && number <= UINT32_MAX ? client_numbered((uint32_t)number) : NULL;
    return cl != NULL && !cl->c->closing ? cl : NULL;
}

/* ---- Packets. ---- */

struct packet {        /* borrowed from what came */
    int cmd, flag;
    uint32_t number;   /* of the client that it is about, or 0 */
    slice ext;         /* a group, a uid, a session, or JSON: enum ext */
    slice body;        /* the message */
};

/* The value of this name in a JSON object, if it is an array or object; or else empty. */
static slice ext_field(slice json, const char *name) {
    struct json_field f = {.name = name};
    size_t at;
    const char *why = json_pick(json, &f, 1, &at);
    return why == NULL && f.raw.p != NULL && (*f.raw.p == '[' || *f.raw.p == '{') ? f.raw : S("");
}

/* ext_data that is a JSON array or object, until the next is asked for; or else empty. An array
 * has to be in an object, or json_pick() does not take it. */
static slice ext_json(slice ext) {
    buf_clear(&backend.json);
    buf_add(&backend.json, S("{\"list\":"));
    buf_add(&backend.json, ext);
    buf_addc(&backend.json, '}');
    return ext_field(buf_slice(&backend.json), "list");
}

/* What is inside the brackets of these. */
static slice ext_inside(slice raw) { return raw.len > 0 ? json_inside(raw) : raw; }
static slice ext_list(slice json, const char *name) { return ext_inside(ext_field(json, name)); }

/* Takes the next value off such a list, as text that lasts until the next is asked for: uids and
 * groups may be numbers there. */
static bool ext_each(slice *rest, slice *text) {
    slice value;
    if (!json_each(rest, &value)) return false;
    *text = json_get(value, &backend.name);
    return true;
}

/* Adds the clients whose numbers these are. */
static void set_add_numbers(struct set *set, slice rest) {
    for (slice text; ext_each(&rest, &text);) set_add(set, gateway_client(slice_number(text, 10)));
}

/* The message of a packet, as clients get it: what is no text in PHP becomes JSON. False, after a
 * line in the log: there is none that can be sent. */
static bool packet_message(const struct packet *p, slice *message) {
    bool plain = (p->flag & PLAIN_TEXT) != 0;
    buf_clear(&backend.text);
    bool ok = plain || (p->body.len <= opt.backlog && php_json(p->body, &backend.text));
    *message = plain ? p->body : buf_slice(&backend.text);
    bool good = (p->flag & AS_IT_IS) != 0 || utf8_valid(*message);   /* browsers hang up at once */
    if (ok && good && message->len + 10 <= opt.backlog) return true;
    log_warn("gateway: a message is dropped: it is longer than --backlog, not UTF-8, or cannot be JSON");
    return false;
}

/* SEND_TO_ALL, SEND_TO_UID, SEND_TO_GROUP. Who is in two of the groups hears it twice: that is
 * what the library's users are used to. */
static void gateway_send(const struct packet *p) {
    struct set *set = set_new();
    bool raw = (p->flag & AS_IT_IS) != 0, all = p->cmd == SEND_TO_ALL, users = p->cmd == SEND_TO_UID;
    slice message, name, json = ext_json(p->ext), chosen = all ? ext_field(json, "connections") : S("");
    bool some = chosen.len > 0;   /* and be it "[]" */
    if (!packet_message(p, &message)) return;
    set_add_numbers(set, some ? ext_inside(chosen) : ext_list(json, "exclude"));
    size_t first = some ? 0 : set->n;   /* behind those who are excluded */
    if (all && !some) set_add_all(set);
    for (size_t i = first; all && i < set->n; i++) client_tell(set->client[i], message, raw);
    if (all) return;
    for (slice rest = users ? ext_inside(json) : ext_list(json, "group"); ext_each(&rest, &name);) {
        struct room *r = room_find(users ? S("users/") : S("rooms/"), name);
        struct member *one = r != NULL && set->n == 1 ? room_member(r, (*set->client)->c) : NULL;
        if (r != NULL && set->n <= 1 && !raw) room_publish_next(r, message, one);   /* once for all of them */
        else for (struct member *m = r != NULL ? r->first : NULL; m != NULL; m = m->next) {
            struct client *cl = m->c->state;
            if (!cl->listed) client_tell(cl, message, raw);
        }
    }
}

/* Says the message of a packet to one client. */
static void gateway_tell(const struct packet *p, struct client *cl) {
    slice message;
    if (packet_message(p, &message)) client_tell(cl, message, (p->flag & AS_IT_IS) != 0);
}

/* Takes a client, and its phone, out of a room; if it speaks there, others hear of it, unless all go. Its session
 * stays what it is. */
static void gateway_leave(struct client *cl, struct member *m, bool all) {
    bool seat = cl->seat == m;
    if (client_phone(cl) != NULL) push_part(cl->more->phone, room_key(m->room));
    if (seat) session_get(cl);
    if (seat && !all && (!cl->taken || worker_next(NULL, true) == NULL)) {
        chat_leave(cl);
        return;
    }
    if (seat) cl->seat = NULL;
    room_leave(m);
}

/* Shows a client out, behind all that it was sent; of that only what it does not take now is copied. */
static void gateway_kick(struct client *cl) {
    for (struct member *m = cl->c->joined; m != NULL; m = m->also) room_commit(m->room);
    conn_flush(cl->c);
    client_settle(cl);
    ws_close(cl->c, WS_KICKED, "kicked by the back end");
}

/* Does what is about one client. */
static void gateway_do(const struct packet *p, struct client *cl) {
    struct room *r;
    struct member *m;
    switch (p->cmd) {
    case SEND_TO_ONE: gateway_tell(p, cl); break;
    case KICK:   /* closeClient() without a message has null there */
        if ((p->flag & PLAIN_TEXT) != 0 || !slice_eq(p->body, S("N;"))) gateway_tell(p, cl);
        gateway_kick(cl);
        break;
    case DESTROY: conn_flush(cl->c), conn_lost(cl->c, "destroyed by the back end"); break;   /* what can be sent is */
    case UPDATE_SESSION: case SET_SESSION: session_order(cl, p->ext, p->cmd == UPDATE_SESSION); break;
    case BIND_UID: if (name_ok(p->ext)) client_identify(cl, p->ext); break;
    case UNBIND_UID: client_identify(cl, S("")); break;
    case JOIN_GROUP: if ((r = group_open(p->ext)) != NULL) gateway_join(cl, r, KEPT_ROOMS); break;
    case LEAVE_GROUP:
        r = room_find(S("rooms/"), p->ext);
        if (r != NULL && (m = room_member(r, cl->c)) != NULL) gateway_leave(cl, m, false);
    }
}

/* ---- Replies. Each appends one PHP value. ---- */

/* A client's groups, as SELECT has them: null for one that never was in any. */
static void reply_groups(struct buf *b, const struct client *cl) {
    size_t start = b->len, n = 0;
    for (const struct member *m = cl->c->joined; m != NULL; m = m->also) {
        if (m == cl->more->inbox) continue;
        php_key(b, room_name(m->room));
        php_string(b, room_name(m->room));
        n++;
    }
    if (cl->grouped) php_array(b, start, n);
    else buf_add(b, S("N;"));
}

/* What SELECT wants to know of one client. */
static void reply_fields(struct buf *b, struct client *cl, slice fields) {
    size_t start = b->len, n = 0;
    for (slice name; b->len <= ANSWER_MAX && ext_each(&fields, &name); n++) {
        php_key(b, name);
        if (slice_eq(name, S("session"))) php_string(b, session_get(cl));
        else if (slice_eq(name, S("uid")) && cl->more->uid != NULL) php_string(b, slice_of(cl->more->uid));
        else if (slice_eq(name, S("groups"))) reply_groups(b, cl);
        else buf_add(b, S("N;"));
    }
    php_array(b, start, n);
}

/* Adds those that SELECT means: who meets any of its conditions; without one, all clients. */
static void set_add_where(struct set *set, slice where) {
    slice any = ext_inside(where), groups = ext_list(where, "groups"), uids = ext_list(where, "uid"), name;
    if (!json_each(&any, &name)) set_add_all(set);
    for (size_t i = 0; i < NAMES_MAX && ext_each(&groups, &name); i++) set_add_room(set, S("rooms/"), name);
    for (size_t i = 0; i < NAMES_MAX && ext_each(&uids, &name); i++) set_add_room(set, S("users/"), name);
    set_add_numbers(set, ext_list(where, "connection_id"));
}

/* Of several clients: their numbers, in a list; or as keys, with what was asked for. */
static void reply_clients(struct buf *b, const struct packet *p) {
    struct set *set = set_new();
    size_t start = b->len, n = 0;
    slice json = p->cmd == SELECT ? ext_json(p->ext) : S(""), fields = ext_list(json, "fields");
    if (p->cmd == GET_ALL_CLIENT_SESSIONS) set_add_all(set);
    else if (p->cmd != SELECT)
        set_add_room(set, p->cmd == GET_CLIENT_SESSIONS_BY_GROUP ? S("rooms/") : S("users/"), p->ext);
    else if (*json.p == '{') set_add_where(set, ext_field(json, "where"));
    for (; n < set->n && b->len <= ANSWER_MAX; n++) {
        struct client *cl = set->client[n];
        if (p->cmd == GET_CLIENT_ID_BY_UID) buf_printf(b, "i:%zu;", n);
        buf_printf(b, "i:%u;", cl->number);
        if (p->cmd == SELECT) reply_fields(b, cl, fields);
        else if (p->cmd != GET_CLIENT_ID_BY_UID) php_string(b, session_get(cl));
    }
    php_array(b, start, n);
}

/* The batch forms: for each name the same answer as if asked alone. */
static void reply_batch(struct buf *b, const struct packet *p) {
    size_t start = b->len, n = 0;
    for (slice name, rest = ext_inside(ext_json(p->ext)); b->len <= ANSWER_MAX && ext_each(&rest, &name); n++) {
        php_key(b, name);
        if (p->cmd == BATCH_GET_CLIENT_COUNT_BY_GROUP)
            buf_printf(b, "i:%zu;", room_clients(room_find(S("rooms/"), name)));
        else reply_clients(b, &(struct packet){.cmd = GET_CLIENT_ID_BY_UID, .ext = name});
    }
    php_array(b, start, n);
}

/* The rooms that have clients; the oldest first. They are groups that somebody is in. */
static void reply_rooms(struct buf *b) {
    size_t start = b->len, n = 0;
    for (struct room *r = NULL; (r = room_next(r)) != NULL;) {
        buf_printf(b, "i:%zu;", n++);
        php_key(b, room_name(r));
    }
    php_array(b, start, n);
}

/* Does what a packet says. If it asks something, the answer is appended, also if there is no such
 * client (NULL): the library would wait for it for ever. False: it has none. */
static bool gateway_ask(const struct packet *p, struct client *cl, struct buf *b) {
    struct room *r = p->cmd == UNGROUP ? room_find(S("rooms/"), p->ext) : NULL;
    struct set *all = set_new();
    size_t n;
    switch (p->cmd) {
    case SEND_TO_ALL: case SEND_TO_UID: case SEND_TO_GROUP: gateway_send(p); return false;
    case UNGROUP:
        set_add_room(all, S("rooms/"), p->ext);   /* who is going stays: its phone is told the rest */
        for (size_t i = 0; i < all->n; i++) gateway_leave(all->client[i], room_member(r, all->client[i]->c), true);
        return false;
    case GET_ALL_CLIENT_SESSIONS: case GET_CLIENT_ID_BY_UID: case GET_CLIENT_SESSIONS_BY_GROUP: case SELECT:
        reply_clients(b, p);
        return true;
    case BATCH_GET_CLIENT_ID_BY_UID: case BATCH_GET_CLIENT_COUNT_BY_GROUP: reply_batch(b, p); return true;
    case IS_ONLINE: buf_add(b, cl != NULL ? S("i:1;") : S("i:0;")); return true;
    case GET_CLIENT_COUNT_BY_GROUP:   /* without a group: of all */
        n = p->ext.len > 0 ? room_clients(room_find(S("rooms/"), p->ext)) : 0;
        for (size_t at = 0; p->ext.len == 0 && (cl = client_next(&at)) != NULL;) n += !cl->c->closing;
        buf_printf(b, "i:%zu;", n);
        return true;
    case GET_GROUP_ID_LIST: reply_rooms(b); return true;
    case GET_SESSION_BY_CLIENT_ID:
        if (cl != NULL) buf_add(b, session_get(cl));
        if (b->len == 0) buf_add(b, cl != NULL ? S("a:0:{}") : S("N;"));
        return true;
    default:
        if (cl != NULL) gateway_do(p, cl);
        return false;
    }
}

/* ---- Workers. ---- */

/* `event` of the chat: tells the worker of a client what happened to it. That is the one it has,
 * or else the one with the fewest clients. False: it has none, and the chat has to deal with it. */
static bool worker_event(struct client *cl, int event, slice body) {
    const struct addr *peer = &cl->c->peer;
    if (event == ON_CLOSE && cl->listed) set_new();   /* it is about to be freed */
    if (!cl->taken) return false;
    if (cl->more->worker != NULL && cl->more->worker->c->closing) cl->more->worker->clients--, cl->more->worker = NULL;
    struct peer *best = NULL, *p = cl->more->worker == NULL ? worker_next(NULL, true) : NULL;
    for (; p != NULL; p = worker_next(p, true))
        if (best == NULL || p->clients < best->clients) best = p;
    if (best != NULL) best->clients++, client_more(cl)->worker = best;
    if (cl->more->worker == NULL) return false;
    struct buf *b = &cl->more->worker->c->out;
    if (b->len > WORKER_BACKLOG) conn_lost(cl->more->worker->c, "a worker that does not read");
    slice session = session_get(cl);
    buf_be(b, PACKET_HEAD + session.len + body.len, 4);
    buf_be(b, (uint64_t)event, 1);
    buf_add(b, (slice){(const char *)backend.address, sizeof backend.address});
    buf_be(b, addr_is_v4(peer) ? be32((const char *)peer->ip + 12) : 0, 4);   /* there is no room for IPv6 */
    buf_be(b, peer->port, 2);
    buf_be(b, cl->number, 4);
    buf_be(b, event == ON_WEBSOCKET ? 0 : PLAIN_TEXT, 1);
    buf_be(b, backend.port, 2);
    buf_be(b, session.len, 4);
    buf_add(b, session);
    buf_add(b, body);
    conn_touch(cl->more->worker->c);
    if (event == ON_CLOSE) cl->more->worker->clients--;
    return true;
}

/* Undoes what application/x-www-form-urlencoded does (URL Standard), into an emptied buffer. */
static void form_decode(slice s, struct buf *b) {
    buf_clear(b);
    for (size_t i = 0; i < s.len; i++) {
        int64_t code = s.p[i] == '%' && s.len - i > 2 ? slice_number((slice){s.p + i + 1, 2}, 16) : -1;
        buf_addc(b, code >= 0 ? (char)code : s.p[i] == '+' ? ' ' : s.p[i]);
        if (code >= 0) i += 2;
    }
}

/* Takes a pair "name=value" off a form, a query or cookies, and decodes both. False: there is none. */
static bool form_each(slice *rest, char mark, struct buf *name, struct buf *value) {
    if (rest->len == 0) return false;
    while (php_skip(rest, ' ')) continue;   /* behind the ';' of a cookie; at the end they belong to the value */
    slice pair = slice_split(rest, mark), head = slice_split(&pair, '=');
    form_decode(head, name);
    form_decode(pair, value);
    return true;
}

/* The name that PHP's variables have then: no blanks in front, and others, and dots, as '_'. */
static void php_rename(struct buf *name) {
    while (name->len > 0 && name->p[name->off] == ' ') buf_drop(name, 1);
    for (size_t i = name->off; i < name->off + name->len && name->p[i] != '['; i++)
        if (name->p[i] == ' ' || name->p[i] == '.') name->p[i] = '_';
}

/* Appends such pairs as a PHP array; those without a name are left out, as PHP does. */
static void php_form(struct buf *b, slice rest, char mark) {
    struct buf name = {0}, value = {0};
    size_t start = b->len, n = 0;
    while (form_each(&rest, mark, &name, &value)) {
        php_rename(&name);
        if (name.len == 0) continue;
        php_key(b, buf_slice(&name));
        php_string(b, buf_slice(&value));
        n++;
    }
    php_array(b, start, n);
    buf_free(&name), buf_free(&value);
}

/* Writes what PHP has in $_GET, $_SERVER and $_COOKIE after this request. */
static void worker_request(struct buf *b, const struct client *cl, const struct request *q) {
    slice cookies = S("");
    php_string(b, S("get"));
    php_form(b, q->query, '&');
    php_string(b, S("server"));
    size_t start = b->len, n = 9;
    php_pair(b, "QUERY_STRING", q->query);
    php_pair(b, "REQUEST_METHOD", q->method);
    php_pair(b, "REQUEST_URI", q->target);
    php_pair(b, "SERVER_PROTOCOL", S("HTTP/1.1"));
    php_pair(b, "SERVER_NAME", q->header[HOST]);
    buf_add(b, S("s:12:\"CONTENT_TYPE\";N;"));
    php_pair(b, "REMOTE_ADDR", peer_ip(&cl->c->peer));
    buf_printf(b, "s:11:\"REMOTE_PORT\";i:%u;s:11:\"SERVER_PORT\";i:%u;", cl->c->peer.port, backend.port);
    for (slice rest = q->lines; rest.len > 0; n++) {   /* Accept-Language is HTTP_ACCEPT_LANGUAGE there */
        slice value = slice_split(&rest, '\n'), header = slice_split(&value, ':');
        value = slice_trim(slice_take(value, value.len - 1));
        if (slice_eqcase(header, S("Cookie"))) cookies = value;
        buf_printf(b, "s:%zu:\"HTTP_", 5 + header.len);
        for (size_t i = 0; i < header.len; i++) buf_addc(b, header.p[i] == '-' ? '_' : upper(header.p[i]));
        buf_add(b, S("\";"));
        php_string(b, value);
    }
    php_array(b, start, n);
    php_string(b, S("cookie"));
    php_form(b, cookies, ';');
    php_array(b, 0, 3);
}

/* `greet` of the chat: a new client, which a worker takes if there is one. To a worker it is news
 * in two steps, TCP and then the handshake. */
static void worker_greet(struct client *cl, const struct request *q) {
    struct buf request = {0};
    cl->taken = worker_next(NULL, true) != NULL;
    if (!cl->taken) return;
    worker_event(cl, ON_CONNECT, S(""));
    worker_request(&request, cl, q);
    worker_event(cl, ON_WEBSOCKET, buf_slice(&request));
    buf_free(&request);
}

/* WORKER_CONNECT: it replaces an older one of its name at its address, which has lost its way. */
static void worker_connect(struct conn *c, slice name) {
    static const uint8_t here[] = {127, 0, 0, 1};
    struct peer *peer = c->state;
    peer->worker = true;
    c->first = true;   /* it asks by another connection: what it ordered has to be done then, busy as it may be */
    if (memcmp(backend.address, here, sizeof here) != 0) peer->ping_ms = now.ms + PEER_PING_MS;
    buf_clear(&peer->name);
    buf_add(&peer->name, name);
    for (struct peer *p = NULL; (p = worker_next(p, true)) != NULL;)
        if (p != peer && slice_eq(buf_slice(&p->name), name) && memcmp(p->c->peer.ip, c->peer.ip, 16) == 0)
            conn_close(p->c, "there is a new worker of this name");
    size_t at = 0;   /* who came while there was none, and has not logged in, speaks to a worker: not to us */
    for (struct client *cl; (cl = client_next(&at)) != NULL;)
        if (!cl->taken && !cl->named) ws_close(cl->c, WS_GOING_AWAY, "there is a worker now");
    log_info("%s: worker %.*s", addr_text(&c->peer), F(name));
}

/* ---- The gateway. ---- */

/* May whoever sent this packet do so? The first has to show the secret; and if a later one shows
 * some, even where none is needed, that must be the right one. It has to be text: PHP compares
 * types as well. */
static bool gateway_greet(struct conn *c, const struct packet *p) {
    struct json_field f[] = {{.name = "secret_key"}, {.name = "worker_key"}};
    struct peer *peer = c->state;
    size_t at;
    if (p->cmd != WORKER_CONNECT && p->cmd != GATEWAY_CLIENT_CONNECT) return peer->known;
    bool json = json_pick(p->body, f, 2, &at) == NULL && f[0].raw.p != NULL && *f[0].raw.p == '"';
    if (!json || !secret_is(&backend.key, json_get(f[0].raw, &backend.name))) return false;
    peer->known = true;
    if (p->cmd == WORKER_CONNECT) worker_connect(c, json_get(f[1].raw, &backend.name));
    return true;
}

/* `feed` of the gateway. ext_data that would end behind the packet ends with it. */
static ssize_t gateway_feed(struct conn *c, char *p, size_t n) {
    struct peer *peer = c->state;
    uint32_t len = n >= 4 ? be32(p) : PACKET_HEAD;
    peer->heard_ms = now.ms;
    if (len < PACKET_HEAD || len > (peer->known ? PACKET_MAX : STRANGER_BYTES))
        return conn_close(c, "no packet has this length"), -1;
    if (n < len) return peer_wait(c);
    struct packet packet = {.cmd = (unsigned char)p[4], .flag = p[21], .number = be32(p + 17)};
    struct buf reply = {0};
    uint32_t ext = be32(p + 24), all = len - PACKET_HEAD;
    packet.ext = (slice){p + PACKET_HEAD, ext < all ? ext : all};
    packet.body = (slice){p + PACKET_HEAD + packet.ext.len, all - packet.ext.len};
    if (!gateway_greet(c, &packet)) return conn_close(c, "wrong secret key"), -1;
    c->deadline_ms = 0;
    bool asked = gateway_ask(&packet, gateway_client(packet.number), &reply);
    if (reply.len > ANSWER_MAX || (asked && c->out.len > WORKER_BACKLOG)) conn_close(c, "it asked for too much");
    else if (asked) buf_be(&c->out, reply.len, 4), buf_add(&c->out, buf_slice(&reply)), conn_touch(c);
    buf_free(&reply);
    buf_free(&backend.json);   /* may be large */
    return c->closing ? -1 : (ssize_t)len;
}

static const struct proto gateway_proto = {
    .name = "gateway", .feed = gateway_feed, .tick = peer_tick, .closed = backend_closed,
};

static const struct proto backend_listener = {
    .name = "listener", .accepted = peer_accepted, .tick = conn_touch, .closed = listener_closed,
};

/* Reads the secret, at the start and at SIGHUP: secret_load(). */
static bool backend_load(void) { return secret_load("--gateway-key-file", opt.gateway_key_file, &backend.key, 1); }

/* Gets ready. The first two are the address of the gateway, or what stands for it; the last is the
 * port of the chat. A wrong --join ends the program. */
static void backend_init(const uint8_t ip[4], uint16_t port, uint16_t chat_port) {
    memcpy(backend.address, ip, 4);
    backend.address[4] = (uint8_t)(port >> 8);
    backend.address[5] = (uint8_t)port;
    snprintf(backend.address_text, sizeof backend.address_text, "%u.%u.%u.%u:%u", ip[0], ip[1], ip[2], ip[3], port);
    backend.port = chat_port;
    chat_init(backend.address, worker_event, worker_greet);
    if (opt.join == NULL) return;
    slice rest = slice_of(opt.join), host = slice_split(&rest, ':');
    int64_t number = slice_number(rest, 10);
    if (opt.gateway == NULL) usage("--join needs --gateway");
    if (host.len == 0 || host.len >= sizeof backend.host || number < 1 || number > 65535)
        usage("--join: '%s' is not HOST:PORT", opt.join);
    memcpy(backend.host, host.p, host.len);
    snprintf(backend.register_port, sizeof backend.register_port, "%d", (int)number);
    backend.join = (struct dial){backend.host, backend.register_port, .proto = &join_proto, .done = join_opened};
}

/* ==========================================================================
 * 11. HTTP API
 * ==========================================================================
 *
 * What the back end can order in PHP, anybody can who can send an HTTP request. Each call
 * is a path; its fields come in a query, in a form or in a JSON object; the answer is JSON:
 *
 *     POST /api/send HTTP/1.1                        HTTP/1.1 200 OK
 *     Authorization: Bearer the-secret          -->  Content-Type: application/json
 *     Content-Type: application/json
 *     Content-Length: 33                             {"ok":true,"id":"9f0c33a1-..."}
 *
 *     {"room":"lobby","message":"hello"}
 *
 * Text is said as if by a client: it is stored, has its id, and is pushed. A JSON object is
 * sent to those who are there as it is. An error has the status that HTTP has for it, and
 * says in JSON what was wrong.
 *
 * Owns: the request at hand. Calls: all above. Called by: 12 Page, 13 Main.
 * Promises: who is not allowed to ask is told so before we read on.
 */

enum { API_BYTES = 1 << 20 };   /* of a request's body */

/* The fields of all calls; api_read() has their names in the same order. */
enum api_field { A_ROOM, A_UID, A_CLIENT, A_MESSAGE, A_MSG, A_NAME, A_TOKEN, A_BEFORE, A_COUNT, API_FIELDS };

static const char *const api_names[API_FIELDS] = {
    "room", "uid", "client_id", "message", "msg", "name", "device_token", "before", "count",
};

static struct {
    struct conn *c;                    /* who asks now... */
    const struct request *q;           /* ...and what */
    struct buf value[API_FIELDS];      /* fields of that, as text; empty if not given */
    bool given[API_FIELDS];
    slice raw;                         /* the message, if it is a JSON array or object */
    struct secret key;
    struct buf json;                   /* the answer being written; empty between requests */
} api;

/* The text of a field, until the next request; it may hold NULs. */
static slice api_value(enum api_field field) { return buf_slice(&api.value[field]); }

/* ---- Answers. What a call returns is of no interest: false is just what api_fail() returns, so
 * that a check and its refusal are one line. ---- */

#define BAD "400 Bad Request"
#define UNAVAILABLE "503 Service Unavailable"
#define api_bad(...) api_fail(BAD, "bad_field", __VA_ARGS__)

/* Answers with what api.json holds. */
static bool api_reply(const char *status, const char *more_headers) {
    char headers[128];
    snprintf(headers, sizeof headers, "Content-Type: application/json\r\nCache-Control: no-store\r\n%s", more_headers);
    buf_addc(&api.json, '\n');
    http_reply(api.c, api.q, status, slice_of(headers), buf_slice(&api.json));
    buf_free(&api.json);   /* it may be long */
    return true;
}

/* Answers with an error: a word for programs, and a text for people. Returns false. */
PRINTF(3, 4) static bool api_fail(const char *status, const char *code, const char *format, ...) {
    char message[200];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    buf_addc(&api.json, '{');
    json_add(&api.json, "code", slice_of(code));
    json_add(&api.json, "message", slice_of(message));
    buf_addc(&api.json, '}');
    bool secret = strcmp(code, "unauthorized") == 0, method = strcmp(code, "bad_method") == 0;
    api_reply(status, secret ? "WWW-Authenticate: Bearer\r\n" : !method ? "" :
              *message == 'G' ? "Allow: GET\r\n" : "Allow: POST\r\n");
    return false;
}

/* Answers that all is well, and how many there were; of nothing, if `what` is NULL. */
static bool api_done(const char *what, size_t n) {
    buf_add(&api.json, S("{\"ok\":true"));
    if (what != NULL) buf_printf(&api.json, ",\"%s\":%zu", what, n);
    buf_addc(&api.json, '}');
    return api_reply("200 OK", "");
}

/* ---- Who may ask. ---- */

/* Reads the secret, at the start and at SIGHUP: secret_load(). */
static bool api_load(void) { return secret_load("--admin-key-file", opt.admin_key_file, &api.key, 1); }

/* Does a Host header name this machine, as only a program on it would? */
static bool api_is_here(slice host) {
    struct addr a;
    slice name = http_name(host);
    return slice_eq(name, S("[::1]")) || slice_eqcase(name, S("localhost")) ||
           (addr_parse(name, &a) && addr_is_v4(&a) && a.ip[12] == 127);
}

/* The media type of a body, without parameters (charset=...). */
static slice api_type(const struct request *q) {
    slice type = q->header[CONTENT_TYPE];
    return slice_trim(slice_split(&type, ';'));
}

/* `allowed` of the administrator's site. Who shows no secret must be on this machine, and
 * no page that a browser there has from elsewhere: neither directly (Origin), nor under a
 * name that means us by now (Host). And a page can send forms without being asked whether it
 * may, but no JSON. */
static bool api_allowed(struct conn *c, struct request *q) {
    slice key = q->header[AUTHORIZATION], scheme = slice_split(&key, ' '), host = q->header[HOST];
    slice origin = q->header[ORIGIN], site = origin;
    bool keep = q->keep, proved = slice_eqcase(scheme, S("Bearer")) && secret_is(&api.key, slice_trim(key));
    if (slice_eq(q->path, S("/health")) && q->length == 0) return true;
    api.c = c;
    api.q = q;
    q->keep = false;   /* a body may be on its way */
    if (api.key.len > 0 && !proved)
        return api_fail("401 Unauthorized", "unauthorized", "the key is missing or wrong (--admin-key-file)");
    if (api.key.len == 0 && !c->peer.local && host.len > 0 && !api_is_here(host))
        return api_fail("403 Forbidden", "forbidden", "Host must be 127.x.x.x, [::1] or localhost");
    slice_split(&site, '/');   /* http: or https: */
    bool web = slice_starts(origin, S("http://")) || slice_starts(origin, S("https://"));
    if (origin.len > 0 && !(web && slice_eqcase(slice_cut(site, 1), host)))
        return api_fail("403 Forbidden", "forbidden", "pages of other sites are not answered (Origin)");
    if (origin.len > 0 && slice_eq(q->method, S("POST")) && !slice_eqcase(api_type(q), S("application/json")))
        return api_fail("415 Unsupported Media Type", "bad_request", "pages must send application/json");
    q->keep = keep;
    return true;
}

/* ---- What is asked for. ---- */

/* Reads the fields of a JSON object. Of the message also an array or object is taken, as it is. */
static bool api_read_json(slice body) {
    struct json_field f[API_FIELDS];
    size_t at;
    for (int i = 0; i < API_FIELDS; i++) f[i] = (struct json_field){.name = api_names[i]};
    const char *why = json_pick(body, f, API_FIELDS, &at);
    if (why != NULL) return api_fail(BAD, "bad_request", "byte %zu: %s", at, why);
    api.raw = S("");
    for (int i = 0; i < API_FIELDS; i++) {
        slice raw = f[i].raw;
        api.given[i] = raw.p != NULL && *raw.p != 'n';   /* null is as good as nothing */
        buf_clear(&api.value[i]);
        if (json_text(raw, &api.value[i])) continue;
        if (i != A_MESSAGE || (*raw.p != '{' && *raw.p != '[')) return api_bad("%s must be text", api_names[i]);
        api.raw = raw;
    }
    return true;
}

/* Reads the fields of the request: of its query if it is a GET, else of its body. A form is written
 * as JSON first. False, after an answer: they cannot be read. */
static bool api_read(void) {
    struct buf json = {0}, name = {0}, value = {0};
    bool post = slice_eq(api.q->method, S("POST"));
    bool form = !post || slice_eqcase(api_type(api.q), S("application/x-www-form-urlencoded"));
    slice rest = post ? api.q->body : api.q->query;
    if (!form || (post && slice_starts(rest, S("{")))) return api_read_json(rest);   /* curl calls all a form */
    buf_addc(&json, '{');
    while (form_each(&rest, '&', &name, &value)) {
        json_comma(&json), json_quote(&json, buf_slice(&name));
        buf_addc(&json, ':'), json_quote(&json, buf_slice(&value));
    }
    buf_addc(&json, '}');
    bool ok = api_read_json(buf_slice(&json));
    buf_free(&json), buf_free(&name), buf_free(&value);
    return ok;
}

/* The client that was asked for; NULL after an answer. */
static struct client *api_client(void) {
    struct client *cl = client_find(api_value(A_CLIENT));
    if (cl != NULL && !cl->c->closing) return cl;
    if (!api.given[A_CLIENT]) api_bad("client_id is missing");
    else api_fail("404 Not Found", "no_such_client", "client_id: nobody of that id is here");
    return NULL;
}

/* The room or inbox that was asked for, made if need be; NULL after an answer. */
static struct room *api_room(enum api_field field) {
    slice name = api_value(field);
    bool ok = name_ok(name);
    struct room *r = ok ? room_open(field == A_ROOM ? S("rooms/") : S("users/"), name) : NULL;
    if (!ok) api_fail(BAD, name.len > ROOM_MAX_BYTES ? "too_long" : "bad_field",
                      "%s must be 1 to %d bytes of text, and not 0", api_names[field], ROOM_MAX_BYTES);
    else if (r == NULL) api_fail(UNAVAILABLE, "limit", "there are %u rooms (--max-rooms)", opt.max_rooms);
    else if (r->past->unknown) api_fail(UNAVAILABLE, "storage", "the history cannot be read now");
    return r == NULL || r->past->unknown ? NULL : r;
}

/* False, after an answer: not one and only one of these fields is there. */
static bool api_target(enum api_field a, enum api_field b, enum api_field c) {
    return api.given[a] + api.given[b] + api.given[c] == 1 ||
           api_bad("one of %s, %s and %s is needed", api_names[a], api_names[b], api_names[c]);
}

/* ---- The calls. ---- */

/* /api/send: text becomes a `say` that is remembered, as if somebody had said it; JSON is for
 * programs, and only for those that are there. */
static bool api_send(void) {
    char id[ID_BYTES + 1];
    if (!api_target(A_ROOM, A_UID, A_CLIENT)) return false;
    if (!api.given[A_MESSAGE]) return api_bad("message is missing");
    if (api.value[A_MESSAGE].len > opt.max_message || api.raw.len > opt.max_message)
        return api_fail("413 Content Too Large", "too_long", "message is over --max-message (%u)", opt.max_message);
    struct client *cl = api.given[A_CLIENT] ? api_client() : NULL;
    struct room *r = api.given[A_CLIENT] ? NULL : api_room(api.given[A_ROOM] ? A_ROOM : A_UID);
    if (cl == NULL && r == NULL) return false;
    if (api.raw.len > 0) {
        if (cl != NULL) client_tell(cl, api.raw, false);
        else room_publish_next(r, api.raw, NULL);
        return api_done("sent", cl != NULL ? !cl->c->closing : room_clients(r));
    }
    slice name = api.given[A_NAME] ? api_value(A_NAME) : S("system");
    if (name.len > NAME_MAX_BYTES || !is_text(name, ' ', ' ')) return api_bad("name is no text of at most 64 bytes");
    if (!chat_announce(r, cl, name, api_value(A_MESSAGE), id))
        return api_fail(UNAVAILABLE, "storage", "the message could not be stored, and nobody got it");
    if (r == NULL) return api_done("sent", !cl->c->closing);   /* it may have been too slow for that */
    buf_printf(&api.json, "{\"ok\":true,\"id\":\"%s\"}", id);
    return api_reply("200 OK", "");
}

/* /api/bind, /api/unbind: who a client is, for the site. */
static bool api_bind(void) {
    struct client *cl = api_client();
    bool bind = slice_eq(api.q->path, S("/api/bind"));
    if (cl == NULL || (bind && api_room(A_UID) == NULL)) return false;
    client_identify(cl, bind ? api_value(A_UID) : S(""));
    return api_done(NULL, 0);
}

/* /api/join, /api/leave: in which rooms it is, besides that of its login. */
static bool api_join(void) {
    struct client *cl = api_client();
    struct room *r = cl != NULL ? api_room(A_ROOM) : NULL;
    bool join = slice_eq(api.q->path, S("/api/join"));
    if (r == NULL) return false;
    struct member *m = join ? gateway_join(cl, r, KEPT_ROOMS) : room_member(r, cl->c);
    if (join && m == NULL)
        return api_fail("409 Conflict", "limit", "this client is in %d rooms already", ROOMS_PER_CLIENT - KEPT_ROOMS);
    if (!join && m != NULL) gateway_leave(cl, m, false);
    return api_done(NULL, 0);
}

/* /api/kick: a client, or all connections of a user. */
static bool api_kick(void) {
    struct set *set = set_new();
    if (api.given[A_CLIENT] == api.given[A_UID]) return api_bad("one of client_id and uid is needed");
    if (api.value[A_MESSAGE].len > opt.max_message || api.raw.len > opt.max_message)
        return api_fail("413 Content Too Large", "too_long", "message is over --max-message (%u)", opt.max_message);
    if (api.given[A_UID]) set_add_room(set, S("users/"), api_value(A_UID));
    else set_add(set, api_client());
    if (api.given[A_CLIENT] && set->n == 0) return false;
    for (size_t i = 0; i < set->n; i++) {
        struct client *cl = set->client[i];
        if (api.given[A_MESSAGE]) client_tell(cl, api.raw.len > 0 ? api.raw : api_value(A_MESSAGE), false);
        gateway_kick(cl);
    }
    return api_done("kicked", set->n);
}

/* /api/push: to phones, whether somebody is connected or not. */
static bool api_push(void) {
    slice text = api_value(api.given[A_MESSAGE] ? A_MESSAGE : A_MSG);
    struct buf token = {0}, key = {0};
    if (!api_target(A_UID, A_TOKEN, A_ROOM)) return false;
    if (text.len == 0) return api_bad("message (or msg) must be text");
    if (opt.apns == NULL) return api_fail(UNAVAILABLE, "unavailable", "there is no --apns");
    if (!api.given[A_TOKEN] && !name_ok(api_value(api.given[A_ROOM] ? A_ROOM : A_UID)))
        return api_bad("this is no room or user");
    if (api.given[A_TOKEN] && !token_parse(api_value(A_TOKEN), &token))
        return buf_free(&token), api_bad("this is no device_token");
    if (api.given[A_ROOM]) buf_printf(&key, "rooms/%.*s", F(api_value(A_ROOM)));
    uint32_t n = push_show(buf_slice(&token), api_value(A_UID), buf_slice(&key), text);
    buf_free(&token);
    buf_free(&key);
    return api_done("phones", n);
}

/* /api/clients: all, or those of a room or user; one a line. */
static bool api_clients(void) {
    struct buf *b = &api.json;
    struct set *set = set_new();
    if (api.given[A_ROOM]) set_add_room(set, S("rooms/"), api_value(A_ROOM));
    else if (api.given[A_UID]) set_add_room(set, S("users/"), api_value(A_UID));
    else set_add_all(set);
    buf_add(b, S("{\"clients\":["));
    for (size_t i = 0; i < set->n; i++) {
        const struct client *cl = set->client[i];
        json_comma(b);
        buf_add(b, S("\n{"));
        json_add(b, "client_id", client_id(cl));
        if (cl->named) json_add(b, "name", client_name(cl));
        if (cl->seat != NULL) json_add(b, "room", room_name(cl->seat->room));
        if (cl->more->uid != NULL) json_add(b, "uid", slice_of(cl->more->uid));
        json_add(b, "address", slice_of(addr_text(&cl->c->peer)));
        json_name(b, "groups");
        buf_addc(b, '[');
        for (const struct member *m = cl->c->joined; m != NULL; m = m->also)
            if (m != cl->more->inbox) json_comma(b), json_quote(b, room_name(m->room));
        buf_add(b, S("]}"));
    }
    buf_add(b, S("]}"));
    return api_reply("200 OK", "");
}

/* /api/rooms: those that somebody is in; one a line. */
static bool api_rooms(void) {
    char id[ID_BYTES + 1];
    struct buf *b = &api.json;
    buf_add(b, S("{\"rooms\":["));
    for (struct room *r = NULL; (r = room_next(r)) != NULL;) {
        history_newest(r->past, id);
        json_comma(b);
        buf_add(b, S("\n{"));
        json_add(b, "room", room_name(r));
        buf_printf(b, ",\"clients\":%zu", room_clients(r));
        json_add(b, "id", slice_of(id));
        buf_addc(b, '}');
    }
    buf_add(b, S("]}"));
    return api_reply("200 OK", "");
}

/* /api/history: as the chat answers it. */
static bool api_history(void) {
    struct room *r = api_room(A_ROOM);
    if (r == NULL) return false;
    room_commit(r);
    int64_t at = api.given[A_BEFORE] ? past_before(r, api_value(A_BEFORE)) : (int64_t)r->past->end;
    int64_t count = api.given[A_COUNT] ? slice_number(api_value(A_COUNT), 10) : 50;
    if (at == -1) return api_bad("before must be the id of a message of this room");
    if (count < 1 || count > HISTORY_MAX) return api_bad("count must be a number from 1 to %d", HISTORY_MAX);
    if (at == UNREAD || !past_last(&api.json, r, (uint64_t)at, count)) {
        buf_clear(&api.json);
        return api_fail(UNAVAILABLE, "storage", "the history cannot be read now");
    }
    buf_addc(&api.json, '}');
    return api_reply("200 OK", "");
}

/* Answers the administrator what begins with /api/. False: it is something else. */
static bool api_request(struct conn *c, const struct request *q) {
    static const struct {
        const char *path, *method;
        bool (*answer)(void);
    } calls[] = {
        {"/api/send", "POST", api_send}, {"/api/bind", "POST", api_bind}, {"/api/unbind", "POST", api_bind},
        {"/api/join", "POST", api_join}, {"/api/leave", "POST", api_join}, {"/api/kick", "POST", api_kick},
        {"/api/push", "POST", api_push}, {"/api/clients", "GET", api_clients}, {"/api/rooms", "GET", api_rooms},
        {"/api/history", "GET", api_history},
    };
    api.c = c;
    api.q = q;
    if (!slice_starts(q->path, S("/api/"))) return false;
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        if (!slice_eq(q->path, slice_of(calls[i].path))) continue;
        if (!slice_eq(q->method, slice_of(calls[i].method)))
            api_fail("405 Method Not Allowed", "bad_method", "%s is the only method here", calls[i].method);
        else if (api_read()) calls[i].answer();
        return true;
    }
    api_fail("404 Not Found", "not_found", "there is no such call");
    return true;
}

/* ==========================================================================
 * 12. Page
 * ==========================================================================
 *
 * The built-in web client: one HTML file without any outside resource, here
 * line by line. It is a program of its own, in JavaScript, at the other end of
 * the protocol of chapter 9; read it as such.
 *
 * It keeps to two rules. Names and contents come as HTML and are turned back
 * into text, then shown as text: nothing that was received becomes markup. And
 * the Content-Security-Policy lets the browser run just this script and this
 * style, named by their SHA-256, so that a hole in the first rule is no way in.
 *
 * Owns:      the page
 * Calls:     1 Bytes, 4 The loop, 5 HTTP and WebSocket, 6 History, 7 Rooms, 8 Push, 9 Chat, 11 HTTP API
 * Called by: 13 Main
 * Promises:  no path ever reaches the file system
 */

static const char *const page_lines[] = {
    "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>xchat</title><link rel='icon' href='data:,'>",
    "<meta name='viewport' content='width=device-width, initial-scale=1'><style>",
    ":root { color-scheme: light dark; --back: #f2f4f8; --card: #fff; --text: #1b2330; --on: #fff; --soft: #56606f;",
    "  --line: #d3dae5; --accent: #1d5fc0; --own: #d5e6ff; --private: #eadcff; --warn: #ffefcc; --bad: #a5201a }",
    "@media (prefers-color-scheme: dark) { :root { --back: #12161c; --card: #1e252f; --text: #e7ebf1; --on: #0b1a30;",
    "  --soft: #b4bdcb; --line: #3a4553; --accent: #8ab8ff; --own: #1d3d69; --private: #443066; --warn: #4a3810;",
    "  --bad: #ffb4ab } } * { box-sizing: border-box; margin: 0 } #net { background: var(--warn) }",
    "body { display: grid; grid: auto minmax(0, 1fr) / minmax(0, 1fr) 16rem; height: 100dvh; color: var(--text);",
    "  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; background: var(--back) }",
    "header, aside, footer, dialog, .line, button, input, textarea, #faces { color: inherit; border-radius: 0;",
    "  background: var(--card); border: 0 solid var(--line) } h1, a { color: var(--accent) }",
    "button, input, textarea { font: inherit; padding: .4rem .8rem; border-width: 1px; border-radius: .6rem;",
    "  min-width: 0 } .main { background: var(--accent); border-color: var(--accent); color: var(--on) }",
    ":focus-visible { outline: 3px solid var(--accent); outline-offset: -2px } time { white-space: nowrap }",
    "button:enabled, summary { cursor: pointer } h1, #status, #whom { flex: 1; font-size: inherit }",
    "header, #net, #to { display: flex; align-items: center; gap: .6rem; padding: 0 1rem } :disabled { opacity: .6 }",
    "h1, #me, #whom { max-height: 4.35em; overflow: auto } #me { max-width: 50% }",
    "#status:not(:empty) { padding: .8rem 0 } main { display: grid; grid: minmax(0, 1fr) / minmax(0, 1fr) }",
    "#talk { overflow: hidden auto; overflow-anchor: none; padding: 1rem } .line, .system { margin-bottom: .6rem }",
    ".line { width: fit-content; max-width: min(85%,42rem); padding: .4rem .9rem .5rem; box-shadow: 0 1px 2px #0002;",
    "  border-radius: .3rem 1rem 1rem } .own { margin-left: auto; border-radius: 1rem .3rem 1rem 1rem }",
    ".own, [aria-current], li button:enabled:hover { background: var(--own) } .system { text-align: center }",
    ".private { background: var(--private) } .pending { opacity: .6; outline: 1px dashed }",
    ".head, .system, #to { font-size: .85rem; color: var(--soft) } .head > :not(:empty) { margin-right: .6rem }",
    ".text { white-space: pre-wrap; unicode-bidi: plaintext } header, #to, aside [open] { grid-column: 1 / -1 }",
    "footer { display: grid; grid: auto auto / 1fr auto; gap: .4rem .6rem; align-items: end; position: relative;",
    "  border-width: 1px 0 0; padding: .4rem 1rem .8rem } summary { padding: .5rem } .why { color: var(--bad) }",
    "#to { padding: 0 .6rem; border-radius: .6rem; min-height: 2.6rem } .head > bdi, summary { font-weight: 600 }",
    "#faces { position: absolute; right: 1rem; bottom: 100%; width: 13.5rem; border-width: 1px }",
    "#faces button { width: 3.2rem; border: 0; font-size: 1.2rem } ul { list-style: none; padding: 0 0 .5rem }",
    "textarea { max-height: 35vh; resize: none; field-sizing: content } li button { width: 100%; text-align: start;",
    "  border: 0 } aside { overflow-y: auto; padding: .5rem; border-width: 0 0 0 1px }",
    "dialog { margin: auto; padding: 1.5rem; border-radius: 1rem; width: min(22rem, 90vw) }",
    "dialog form, dialog label { display: grid; gap: .8rem } header { border-width: 0 0 1px; padding: .5rem 1rem }",
    "@media (max-width: 700px) { body { grid: auto auto minmax(0, 1fr) / minmax(0, 1fr) } aside { grid-row: 2;",
    "  display: grid; grid: auto / 1fr 1fr; max-height: 50vh; padding: 0 .5rem; border-width: 0 0 1px } }",
    "</style></head><body><header><h1 id='where'>xchat</h1><button id='me'>Your name</button></header>",
    "<main><div id='talk' role='region' tabindex='0'></div>",
    "<div id='net'><p id='status' role='status'></p><button id='retry' hidden>Try now</button></div>",
    "<footer><div id='to'><label id='whom' for='text'></label><button id='all' hidden>To everyone</button>",
    "<details><summary>Emoji</summary><div id='faces'></div></details></div>",
    "<textarea id='text' rows='1'></textarea><button id='send' class='main' disabled>Send</button></footer></main>",
    "<aside><details><summary>Rooms</summary><ul id='rooms'></ul></details>",
    "<details><summary><span>Members</span> <span id='count'></span></summary><ul id='members'></ul></details>",
    "</aside><dialog id='hello' aria-labelledby='title'><form method='dialog'><h2 id='title'>Join the chat</h2>",
    "<label><span>Your name</span><input id='name' required pattern='.*\\S.*' autocomplete='nickname'></label>",
    "<label><span>Room</span><input id='room' required></label><p id='why' class='why' role='alert'></p>",
    "<button class='main' value='go'>Enter</button></form></dialog>",
    "<script>'use strict';",
    "const ZH = { 'Try now': '重试', 'Emoji': '表情', 'Send': '发送', 'Rooms': '房间', 'Other room...': '其他房间…',",
    "  'Enter': '进入', 'Room': '房间', 'Members': '成员', 'Join the chat': '加入聊天', 'Your name': '你的名字',",
    "  'Messages': '消息', 'Room %': '房间 %', ' (you)': '（你）', '% came in': '% 进来了', '% left': '% 离开了',",
    "  'To everyone': '对所有人说', 'Private to %': '悄悄对 % 说', 'Not sent: ': '没有发出：', 'too long': '太长了',",
    "  'Connecting...': '正在连接…', 'Offline: your text is kept.': '离线，文字会保留', 'Edit again': '重新编辑',",
    "  'Some messages are gone.': '有些消息已经丢失', 'connection lost': '连接断开', 'has left': '对方已经离开',",
    "  'Connection closed: ': '连接被服务器关闭：', 'too fast': '说得太快了', 'cannot be saved': '服务器无法保存',",
    "  'token: missing': '需要登录凭证', 'token: expired': '凭证已过期', 'token: room not allowed': '不能进入' },",
    "  PLAIN = { too_long: 'too long', no_such_client: 'has left', rate_limited: 'too fast',",
    "  storage: 'cannot be saved' }, CHARS = { amp: '&', lt: '<', gt: '>', quot: '\"', '#039': '\\'' };",
    "const ALL = { id: 'all', name: 'all' }, MAX_LINES = 500, wide = matchMedia('(min-width: 701px)');",
    "const NO_RETRY = [1002, 1003, 1007, 1009, 4001];   // our fault, or thrown out: stay away",
    "const zh = /^zh/i.test(navigator.language), t = text => zh && ZH[text] || text;",
    "const [clock, calendar] = [undefined, 'medium'].map(dateStyle =>",
    "  new Intl.DateTimeFormat(navigator.language, { dateStyle, timeStyle: 'short' }));",
    "const $ = Object.fromEntries([...document.querySelectorAll('[id]')].map(e => [e.id, e]));   // by id",
    "let ws, timer, heard, tries = 0;      // connection, next attempt, last word, attempts so far",
    "let ready = false, start, me;         // in a room and up to date, since when, our client id",
    "let want, asked, here, to = ALL;      // { name, room } wished, asked for, granted; the ear",
    "// A room's log: its lines, read out as they come; pending: ref -> { line, to, d }, said and not yet heard",
    "// back; last: the id to resume from; more: whether there are older ones than those on the page.",
    "const newLog = () => ({ box: make('div', '', [], { role: 'log' }), pending: new Map() });",
    "const logs = new Map(['1', '2', '3', '4'].map(room => [room, newLog()]));",
    "let log = newLog(), older = '', shift = 0, atEnd = true, lastTop = 0, unread = 0;",
    "const members = new Map(), mine = new Set(), sizes = new ResizeObserver(follow);   // items by id; all our ids",
    "let store = {}; try { store = localStorage || {}; } catch (e) { /* forbidden: nothing is remembered */ }",
    "function keep(key, value) {           // for this visit, if that is full",
    "  try { store[key] = value; } catch (e) { store = { ...store, [key]: value }; }",
    "}",
    "// Text: what people write becomes text nodes, never markup.",
    "function make(tag, className, kids = [], more = {}) {",
    "  const e = Object.assign(document.createElement(tag), { className, ...more });",
    "  e.append(...[kids].flat()); return e;",
    "}",
    "const button = (onclick, kids, more) => make('button', '', kids, { onclick, ...more });",
    "function decode(key, html) {          // takes back the escaping, and the mark at a line end",
    "  if (typeof html !== 'string') return html;",
    "  // Private content starts with <b>who speaks to whom: </b>; the bubble has its own way.",
    "  return html.replace(/^<b>[^<]*<[/]b>/, '').replace(/<br [/]>(\\r\\n?|\\n\\r?)?/g, '\\n')",
    "    .replace(/&(amp|lt|gt|quot|#039);/g, (all, name) => CHARS[name]);",
    "}",
    "function linked(text) {               // odd parts are links: ASCII, no full stop at the end",
    "  const parts = text.split(/(https?:[/][/][!-;=?-~]*[a-z0-9/=&#%_~+-])/i), rel = 'noopener noreferrer';",
    "  return parts.map((href, i) => i % 2 ? make('a', '', href, { href, rel, target: '_blank' }) : href);",
    "}",
    "// A name is in <bdi>: if it is right-to-left, the rest stays in order.",
    "const phrase = (text, name) => t(text).split(/(%)/).map(s => s === '%' ? make('bdi', '', name) : s);",
    "// The wire has the server's local time and no zone; login sets shift, the way to our clock.",
    "const parse = time => Date.parse(time.replace(' ', 'T') + 'Z');",
    "function stamp(time) {                // with the date, unless it is today's",
    "  const when = new Date(time ? parse(time) + shift : Date.now()), today = new Date().setHours(0, 0, 0, 0);",
    "  return make('time', '', (when < today ? calendar : clock).format(when), { title: when.toLocaleString() });",
    "}",
    "// The log of a room. Whatever changes its size, we follow: once a frame, however many lines came.",
    "function follow() {",
    "  if (atEnd) $.talk.scrollTop = $.talk.scrollHeight, lastTop = $.talk.scrollTop;   // lower in a shorter log",
    "  lookBack();",
    "}",
    "function lookBack() {                 // near the top: ask for older ones, once at a time",
    "  const { box, more } = log, before = box.querySelector('[data-id]')?.dataset.id;",
    "  if (ready && more && !older && box.children.length <= 9 * MAX_LINES && $.talk.scrollTop <= 300)",
    "    post({ type: 'history', before, ref: older = newRef() });",
    "}",
    "function addLine(line) {              // what is not confirmed yet stays below the rest",
    "  const lines = log.box.children, most = (atEnd ? 1 : 10) * MAX_LINES;     // room to look back",
    "  log.box.insertBefore(line, log.pending.values().next().value?.line);",
    "  for (; lines.length > most; [older, log.more] = ['', true]) lines[0].remove();",
    "}",
    "function system(text, name, time) {   // of a crowd coming or going only five lines stay",
    "  const run = [...log.box.children].slice(-5);",
    "  if (run.length === 5 && run.every(e => e.className === 'system')) run[0].remove();",
    "  addLine(make('p', 'system', [...phrase(text, name), ' ', stamp(time)]));",
    "}",
    "function render(d, quiet) {           // a `say`; a quiet one is not read out",
    "  const id = d.to_client_id, name = members.get(id)?.textContent || '';",
    "  const whom = id === 'all' ? '' : phrase('Private to %', name), own = mine.has(d.from_client_id) ? 'own' : '';",
    "  const head = [make('bdi', '', d.from_client_name), make('span', '', whom), stamp(d.time)];",
    "  const kids = [make('p', 'head', head), make('p', 'text', linked(d.content))];",
    "  const line = make('article', `line ${own} ${whom && 'private'}`, kids, { ariaLive: quiet ? 'off' : null });",
    "  if (d.id) line.dataset.id = d.id;",
    "  return line;",
    "}",
    "function show(d, quiet) {             // what comes again is shown once, where it comes now",
    "  log.box.querySelector(`[data-id='${d.id}']`)?.remove(); log.pending.get(d.ref)?.line.remove();",
    "  log.pending.delete(d.ref); addLine(render(d, quiet));",
    "  if (d.id) log.last = here.id = d.id;",
    "  if (document.hidden && !quiet && !mine.has(d.from_client_id)) setUnread(unread + 1);",
    "}",
    "function fail(ref, why) {",
    "  const { line, to, d } = log.pending.get(ref);    // to the same ear: private words must not slip out",
    "  const edit = () => { line.remove(); choose(to, ($.text.value && $.text.value + '\\n') + d.content); };",
    "  log.pending.delete(ref); line.classList.remove('pending'); line.ariaLive = 'polite';",
    "  line.append(make('p', 'why', [t('Not sent: '), why, ' ', button(edit, t('Edit again'))]));",
    "}",
    "function setUnread(n) { document.title = ((unread = n) ? `(${n}) ` : '') + $.where.textContent + ' - xchat'; }",
    "// Rooms, members, whom we talk to.",
    "function ask(why) {                   // for a name and a room",
    "  if (!$.hello.open) [$.name.value, $.room.value] = [want.name, want.room], $.hello.showModal();",
    "  $.why.textContent = why;",
    "}",
    "function go(name, room) { want = { name, room }; if (ws?.readyState === 1) login(); else connect(); }",
    "// On a phone the drawers close after use.",
    "function fold() { for (const d of document.querySelectorAll('aside details')) d.open = wide.matches; }",
    "function enter(room) {",
    "  if (!logs.has(room)) logs.set(room, newLog());",
    "  log = logs.get(room); $.talk.replaceChildren(log.box); sizes.observe(log.box); atEnd = true;",
    "  const rooms = [...logs.keys()].map(name => button(() => go(want.name, name), make('bdi', '', name),",
    "    { ariaCurrent: name === room ? 'page' : null })), other = button(() => ask(''), t('Other room...'));",
    "  $.rooms.replaceChildren(...[...rooms, other].map(b => make('li', '', b)));",
    "  $.where.replaceChildren(...phrase('Room %', room)); setUnread(unread);",
    "  history.replaceState(null, '', '?room_id=' + encodeURIComponent(room));",
    "  choose($.text.value ? to : ALL);    // what is half written keeps its ear",
    "}",
    "function putMember(id, name) {        // a new one, or a new name",
    "  const li = members.get(id) || $.members.appendChild(make('li', '')), disabled = id === me;",
    "  const kids = [make('bdi', '', name), disabled ? t(' (you)') : ''];",
    "  li.replaceChildren(button(() => choose({ id, name }), kids, { disabled }));",
    "  members.set(id, li); $.count.textContent = members.size;",
    "}",
    "function choose(whom, text = $.text.value) {",
    "  to = whom; $.all.hidden = to === ALL; $.to.className = to === ALL ? '' : 'private';",
    "  $.whom.replaceChildren(...phrase(to === ALL ? 'To everyone' : 'Private to %', to.name));",
    "  $.text.value = text; $.text.focus(); fold();",
    "}",
    "function say() {",
    "  const content = $.text.value, ref = newRef();",
    "  if (!ready || asked || !content.trim()) return;",
    "  const d = { type: 'say', to_client_id: to.id, to_client_name: to.name, content, ref };",
    "  const line = render({ ...d, from_client_id: me, from_client_name: here.name }, true);",
    "  line.classList.add('pending');      // and read out when it is confirmed",
    "  log.box.append(line); log.pending.set(ref, { line, to, d }); post(d); $.text.value = ''; atEnd = true;",
    "}",
    "// The connection.",
    "function newRef() { return crypto.getRandomValues(new Uint32Array(4)).join('-'); }",
    "function post(message) { if (ws.readyState === 1) ws.send(JSON.stringify(message)); }",
    "function setStatus(text) {            // no text: all is well",
    "  $.status.textContent = text; ready = !text; $.send.disabled = !ready; $.retry.hidden = ws.readyState < 2;",
    "}",
    "function login() {                    // one at a time: what comes then belongs to its room",
    "  if (asked) return;",
    "  const next = ready || !log.pending.size ? want : here;   // what was under way comes first, where it belongs",
    "  const { name, room } = asked = Object.assign(next, { ref: newRef(), since: logs.get(next.room)?.last });",
    "  const token = store.xchatToken || undefined, { ref, since } = asked;",
    "  post({ type: 'login', client_name: name, room_id: room, ref, since, history: 50, token });",
    "}",
    "function connect() {",
    "  if (ws?.readyState < 2) return;",
    "  if (ws?.readyState === 2 && ws.onclose) { ws.onclose = null; lost({}); }   // not to be told of it later",
    "  clearTimeout(timer); asked = null; heard = Date.now();",
    "  ws = new WebSocket(location.href.replace(/^http/, 'ws').replace(/[?#].*/, ''));",
    "  ws.onopen = login; ws.onclose = lost; setStatus(t('Connecting...'));",
    "  ws.onmessage = e => { const d = JSON.parse(e.data, decode); heard = Date.now(); on[d.type]?.(d); };",
    "}",
    "function lost({ code, reason }) {",
    "  const stay = NO_RETRY.includes(code);",
    "  if (ready && Date.now() - start > 10000) tries = 0;",
    "  for (const [ref, said] of log.pending)           // a client id ends with its connection",
    "    if (stay || said.to !== ALL) fail(ref, t('connection lost'));",
    "  setStatus(stay ? t('Connection closed: ') + (reason || code) : t('Offline: your text is kept.'));",
    "  const wait = code === 1008 ? 30000 : Math.min(30000, 500 * 2 ** tries++);",
    "  timer = stay ? 0 : setTimeout(connect, wait * (0.5 + Math.random()));    // not everybody at once",
    "}",
    "function watch() {                    // a dead network closes nothing: ask, later give up",
    "  const quiet = Date.now() - heard;   // not a number before the first connection",
    "  if (quiet > 30000 && quiet < 75000) post({ type: 'ping' });",
    "  if (quiet >= 75000 && ws.readyState < 2) { ws.onclose = null; ws.close(); lost({}); }",
    "}",
    "function welcome(d) {                 // our login, answered: it has the member list",
    "  const moved = here?.room !== asked.room;",
    "  [me, start, here, older, ready] = [d.client_id, Date.now(), asked, '', false]; mine.add(me);",
    "  shift = Math.round((start - parse(d.time)) / 900000) * 900000;   // time zones differ by quarters",
    "  $.me.textContent = here.name = d.client_name; keep('xchatName', here.name);   // a token may know another one",
    "  here.id = d.id; members.clear(); $.members.replaceChildren();",
    "  for (const [id, name] of Object.entries(d.client_list)) putMember(id, name);",
    "  if (moved) enter(here.room);",
    "  if (d.recovered === false) addLine(make('p', 'system gone', t('Some messages are gone.')));",
    "}",
    "const on = { __proto__: null, ping() { post({ type: 'pong' }); },   // one for each type of message",
    "  say(d) {                            // ids of a room are near each other; others are of an inbox or a group",
    "    const far = parseInt(d.id, 16) - parseInt(here?.id, 16);",
    "    if (!(far >= 0 && far <= 4096)) delete d.id;",
    "    show(d);",
    "  },",
    "  login(d) {",
    "    if (d.client_list) return welcome(d);",
    "    if (!members.has(d.client_id)) system('% came in', d.client_name, d.time);",
    "    putMember(d.client_id, d.client_name);",
    "  },",
    "  logout({ from_client_id: id, from_client_name: name, time }) {",
    "    members.get(id)?.remove(); if (members.delete(id)) system('% left', name, time);",
    "    $.count.textContent = members.size;",
    "  },",
    "  history(d) {                        // older ones for lookBack, or what follows a login",
    "    if (d.ref) {                      // if not for this room or these lines any more: not shown",
    "      if (d.ref !== older) return;",
    "      const below = $.talk.scrollHeight - $.talk.scrollTop;",
    "      log.box.prepend(...d.messages.map(m => render(m, true)));",
    "      $.talk.scrollTop = $.talk.scrollHeight - below;              // the reader's place",
    "      older = ''; log.more = d.more; return;",
    "    }",
    "    d.messages.forEach(m => show(m, !here.since));",
    "    if (here.since && d.more) return; // another part of the resume is to come",
    "    if (!here.since) log.more = d.more;            // without since, it was the newest 50",
    "    log.last = here.id; setStatus(''); follow();",
    "    for (const said of log.pending.values()) post(said.d);         // these were never stored",
    "    asked = null; if (want !== here) login();      // meanwhile another wish came",
    "  },",
    "  error({ ref, code, message }) {",
    "    if (log.pending.has(ref)) fail(ref, t(PLAIN[code]) || message);",
    "    else if (ref === older) [older, log.more] = ['', code !== 'bad_field'];",
    "    else if (asked && ref === asked.ref) {",
    "      const passed = asked !== want; asked = null;   // another wish came meanwhile",
    "      if (passed && !ready) for (const said of log.pending.keys()) fail(said, t(message));",
    "      if (passed) return login();",
    "      if (code === 'storage' && !ready) {            // its disk may be better later",
    "        ws.onclose = null; ws.close(); lost({});",
    "        return setStatus(t(message));",
    "      }",
    "      ask(t(message)); if (!ready) setStatus(t(message));",
    "    }",
    "  },",
    "};",
    "// What the person does. Who is sent here with #token=..., keeps it.",
    "const given = new URLSearchParams(location.hash.slice(1)).get('token'); onhashchange = () => location.reload();",
    "if (given !== null) keep('xchatToken', given);",
    "$.me.onclick = () => ask(''); $.all.onclick = () => choose(ALL); $.send.onclick = say;",
    "$.hello.onclose = () => {             // by its button, or by Escape",
    "  if ($.hello.returnValue) go($.name.value.trim(), $.room.value);",
    "  else if (!here) ask($.why.textContent);",
    "  else if ($.why.textContent) {     // another one was refused: back, unless we are still there",
    "    const back = !ready && want !== here && ws.readyState === 1; want = here; if (back) login();",
    "  }",
    "  $.hello.returnValue = '';",
    "};",
    "// While an input method composes, Enter is not 13.",
    "$.text.onkeydown = e => { if (e.keyCode === 13 && !e.shiftKey) { e.preventDefault(); say(); } };",
    "$.talk.onscroll = () => {             // what else lowers scrollTop was followed",
    "  const { scrollHeight, scrollTop, clientHeight } = $.talk;",
    "  atEnd = scrollHeight - scrollTop - clientHeight < 50 || atEnd && scrollTop >= lastTop;",
    "  lastTop = scrollTop; lookBack();",
    "};",
    "$.faces.append(...[...'😀😂😊😍😎🤔😢😡👍👏🙏🎉'].map(face => button(() => {",
    "  $.text.setRangeText(face, $.text.selectionStart, $.text.selectionEnd, 'end'); $.text.focus();",
    "}, face)));",
    "document.onvisibilitychange = () => { if (!document.hidden && here) setUnread(0); };",
    "addEventListener('online', () => { if (timer) connect(); }); $.retry.onclick = connect;",
    "addEventListener('pagehide', () => ws?.close());   // or we stay as a ghost",
    "sizes.observe($.talk); setInterval(watch, 10000); wide.onchange = fold; fold();",
    "for (const e of document.querySelectorAll('h2, button, span, summary'))",
    "  if (!e.children.length) e.textContent = t(e.textContent);",
    "if (zh) document.documentElement.lang = 'zh-CN'; $.talk.ariaLabel = t('Messages');",
    "want = { name: store.xchatName || '', room: new URLSearchParams(location.search).get('room_id') || '1' };",
    "if (want.name) connect(); else ask('');",
    "</script></body></html>",
};

static struct {
    struct buf html, headers;
    int64_t started_ms;   /* when the server started... */
    time_t started;       /* ...also by the wall clock */
} page;

/* Lets the browser run what stands after this tag of the page, by its hash. */
static void page_add_source(const char *directive, const char *tag) {
    const char *start = strstr(page.html.p, tag) + strlen(tag), *end = strstr(start, "</s");
    unsigned char hash[SHA256_DIGEST_LENGTH], text[4 * (SHA256_DIGEST_LENGTH / 3 + 1) + 1];
    sha256((slice){start, (size_t)(end - start)}, hash);
    EVP_EncodeBlock(text, hash, sizeof hash);
    buf_printf(&page.headers, "; %s 'sha256-%s'", directive, text);
}

static void page_init(void) {
    page.started = now.wall, page.started_ms = now.ms;
    for (size_t i = 0; i < sizeof page_lines / sizeof *page_lines; i++) buf_printf(&page.html, "%s\n", page_lines[i]);
    buf_add(&page.headers, S("Content-Type: text/html; charset=utf-8\r\nCache-Control: no-cache\r\n"
                             "X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
                             "Content-Security-Policy: default-src 'none'; connect-src 'self'; img-src data:; "
                             "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"));
    page_add_source("script-src", "<script>");
    page_add_source("style-src", "<style>");
    buf_add(&page.headers, S("\r\n"));
}

/* All figures. Those of the process have the names that every program gives them. */
static void page_figures(struct buf *b) {
    FILE *f = fopen("/proc/self/statm", "r");   /* on Linux, and not behind --chroot */
    long pages = 0;
    loop_figures(b), http_figures(b), history_figures(b), rooms_figures(b), chat_figures(b), push_metrics(b);
    buf_printf(b, "process_start_time_seconds %lld\nxchat_uptime_seconds %lld\n", (long long)page.started,
               (long long)(now.ms - page.started_ms) / 1000);
    if (f != NULL && fscanf(f, "%*d %ld", &pages) == 1)
        buf_printf(b, "process_resident_memory_bytes %lld\n", (long long)pages * sysconf(_SC_PAGESIZE));
    if (f != NULL) fclose(f);
}

/* `request` of both sites: that of the chat, and --admin, which has the figures and takes orders. */
static void page_request(struct conn *c, const struct request *q) {
    bool admin = ((const struct site *)c->state)->allowed != NULL;
    struct buf figures = {0};
    if (admin && api_request(c, q)) return;
    if (!slice_eq(q->method, S("GET")) && !slice_eq(q->method, S("HEAD")))
        http_reply(c, q, "405 Method Not Allowed", S(PLAIN "Allow: GET, HEAD\r\n"),
                   S("only GET and HEAD are answered here\n"));
    else if (slice_eq(q->path, S("/")))
        http_reply(c, q, "200 OK", buf_slice(&page.headers), buf_slice(&page.html));
    else if (slice_eq(q->path, S("/health"))) http_reply(c, q, "200 OK", S(PLAIN), S("ok\n"));
    else if (admin && slice_eq(q->path, S("/metrics"))) {
        page_figures(&figures);
        http_reply(c, q, "200 OK", S("Content-Type: text/plain; version=0.0.4\r\n"), buf_slice(&figures));
        buf_free(&figures);
    } else http_reply(c, q, "404 Not Found", S(PLAIN), S("there is a page at / and nothing else\n"));
}

static const struct site page_site = {page_request, chat_upgraded, 0, NULL};
static const struct site admin_site = {page_request, NULL, API_BYTES, api_allowed};

/* ==========================================================================
 * 13. Main
 * ==========================================================================
 *
 * Every option is one row of a table: its names, range, default and help. One loop
 * reads the command line by it, one the environment (--max-head is XCHAT_MAX_HEAD
 * there), and one prints --help. What is not in the table or not in its range is
 * refused with status 2; what keeps the server from starting ends it with status 1;
 * both in one line that names the option.
 *
 * A signal only counts (see chapter 4), so that all else is done at one place and time.
 *
 * What needs root comes first: keys are read, ports taken. What needs --user's rights is
 * done with them: files in --data are its own from the beginning. Then all is given up
 * that is not needed any more, for good, and only then does a stranger's byte come in.
 *
 *     keys, certificates -> --data (as --user) -> ports -> Landlock -> --chroot -> --user
 *
 * A supervisor (systemd) may have opened the ports for us, and wants to hear how we are.
 *
 * Owns: the options, the list of listeners, the user. Calls: all above. Called by: the shell.
 */

static struct {
    const char *binds[16];
    uint32_t n_binds;
    uint64_t given;   /* one bit for each option: it was on the command line */
    uid_t uid;        /* of --user */
    int notify;       /* the supervisor's socket, or 0 */
    int64_t watchdog_ms, alive_ms;   /* how often it wants to hear from us, or 0; when next */
    bool stopping;    /* it knows */
} mains;

static const char *take_bind(const char *value) {
    if (mains.n_binds == sizeof mains.binds / sizeof *mains.binds) return "too many";
    mains.binds[mains.n_binds++] = value;
    return NULL;
}

/* A browser says "https://example.org" and no more: what has a path would never be met. */
static const char *take_origin(const char *value) {
    for (slice rest = slice_of(value); rest.len > 0;) {
        slice one = slice_trim(slice_split(&rest, ',')), host = one;
        slice_split(&host, ':');
        bool named = slice_starts(host, S("//")) && host.len > 2 && memchr(host.p + 2, '/', host.len - 2) == NULL;
        if (!named && !slice_eq(one, S("*")) && !slice_eq(one, S("null"))) return "it takes https://HOST,... or *";
    }
    return NULL;
}

static struct option {
    const char *name, *arg;                   /* arg: what stands behind it; NULL: nothing */
    char letter;
    uint32_t *number, min, max, initial;      /* where a number goes, or that it was given... */
    const char *(*take)(const char *value);   /* ...or who takes a text; NULL, or what is wrong... */
    const char **text;                        /* ...or where it goes, and `max` is its length, or 0 */
    const char *help;
} options[] = {
    {"port", "N", 'p', &opt.port, 0, 65535, 7272, NULL, NULL, "port to listen on; 0 picks a free one"},
    {"bind", "ADDR", 'b', NULL, 0, 0, 0, take_bind, NULL, "ADDR[:PORT], tls:.., plain:.., unix:PATH; repeatable"},
    {"max-message", "BYTES", 0, &opt.max_message, 128, 1 << 24, 65536, NULL, NULL, "longest message"},
    {"max-head", "BYTES", 0, &opt.max_head, 256, 1 << 20, 8192, NULL, NULL, "longest HTTP request head"},
    {"max-clients", "N", 0, &opt.max_clients, 1, 1000000, 10000, NULL, NULL, "connections at a time"},
    {"max-per-address", "N", 0, &opt.max_per_address, 0, 1000000, 256, NULL, NULL, "of these, of one address; 0: any"},
    {"max-rooms", "N", 0, &opt.max_rooms, 1, 1 << 24, 65536, NULL, NULL, "rooms at a time"},
    {"rate", "N", 0, &opt.rate, 0, 1000000, 50, NULL, NULL, "messages a second and client; 0: any"},
    {"burst", "N", 0, &opt.burst, 1, 1000000, 100, NULL, NULL, "messages at once and client"},
    {"backlog", "BYTES", 0, &opt.backlog, 4096, 1 << 28, 1 << 20, NULL, NULL, "how far a client may fall behind"},
    {"data", "DIR", 0, NULL, 0, 0, 0, NULL, &opt.data, "keep history in files there (in memory)"},
    {"retain", "BYTES", 0, &opt.retain, 4096, 4000000000, 1 << 24, NULL, NULL, "history kept of each room"},
    {"segment", "BYTES", 0, &opt.segment, 4096, 1 << 30, 1 << 20, NULL, NULL, "of it in one file"},
    {"fsync", NULL, 0, &opt.fsync, 0, 1, 0, NULL, NULL, "keep it through a loss of power too"},
    {"tls-cert", "FILE", 0, NULL, 0, 0, 0, NULL, &opt.tls_cert, "speak TLS, with this certificate chain"},
    {"tls-key", "FILE", 0, NULL, 0, 0, 0, NULL, &opt.tls_key, "its key (in the same file)"},
    {"apns", "URL", 0, NULL, 0, 0, 0, NULL, &opt.apns, "push by https://api.push.apple.com or binary://HOST"},
    {"apns-cert", "FILE", 0, NULL, 0, 0, 0, NULL, &opt.apns_cert, "with this certificate, and its key"},
    {"apns-key", "FILE", 0, NULL, 0, 0, 0, NULL, &opt.apns_key, "key of that, or the .p8 file of..."},
    {"apns-key-id", "ID", 0, NULL, 0, 32, 0, NULL, &opt.apns_key_id, "...this key, for HTTP/2"},
    {"apns-team-id", "ID", 0, NULL, 0, 32, 0, NULL, &opt.apns_team_id, "of this team"},
    {"apns-passphrase-file", "FILE", 0, NULL, 0, 0, 0, NULL, &opt.apns_passphrase_file, "of the key"},
    {"apns-topic", "TOPIC", 0, NULL, 0, 255, 0, NULL, &opt.apns_topic, "bundle id of the app"},
    {"apns-ca", "FILE", 0, NULL, 0, 0, 0, NULL, &opt.apns_ca, "trust these to vouch for the gateway (the system's)"},
    {"apns-format", "N", 0, &opt.apns_format, 0, 2, 2, NULL, NULL, "binary packets: command 0 or 2"},
    {"push-content", "WHAT", 0, NULL, 0, 0, 0, NULL, &opt.push_content, "shown: full, name or none (full)"},
    {"push-test", "TOKEN", 0, NULL, 0, 0, 0, NULL, &opt.push_test, "push one TEXT there, say what came of it, and end"},
    {"admin", "ADDR", 0, NULL, 0, 0, 0, NULL, &opt.admin, "ADDR:PORT of this machine, for orders and /metrics"},
    {"admin-key-file", "FILE", 0, NULL, 0, 0, 0, NULL, &opt.admin_key_file, "bearer key for --admin, at any address"},
    {"gateway", "ADDR", 0, NULL, 0, 0, 0, NULL, &opt.gateway, "inner port for GatewayClient: IPv4:PORT"},
    {"register", "ADDR", 0, NULL, 0, 0, 0, NULL, &opt.reg, "register for GatewayClient: ADDR:PORT"},
    {"join", "ADDR", 0, NULL, 0, 0, 0, NULL, &opt.join, "tell this register of us: HOST:PORT"},
    {"gateway-key-file", "FILE", 0, NULL, 0, 0, 0, NULL, &opt.gateway_key_file, "secret key of these three"},
    {"trust-proxy", "CIDR", 0, NULL, 0, 0, 0, http_trust, NULL, "proxy whose X-Forwarded-For counts; repeatable"},
    {"origin", "LIST", 0, NULL, 0, 0, 0, take_origin, &opt.origin, "whose pages may come too: https://HOST,... or *"},
    {"jwt-secret-file", "FILE", 0, NULL, 0, 0, 0, pass_file, NULL, "logins need HS256 tokens; two while it changes"},
    {"make-token", "USER", 0, NULL, 0, 0, 0, NULL, &opt.make_token, "print one for USER[,NAME[,ROOM...]], and end"},
    {"ping", "SECONDS", 0, &opt.ping_s, 1, 86400, 25, NULL, NULL, "silence before a ping; three and it is gone"},
    {"timeout", "SECONDS", 0, &opt.timeout_s, 1, 3600, 10, NULL, NULL, "time for a whole HTTP request"},
    {"user", "NAME", 0, NULL, 0, 0, 0, NULL, &opt.user, "NAME[:GROUP] to become once all is open"},
    {"chroot", "DIR", 0, NULL, 0, 0, 0, NULL, &opt.chroot, "then see no other files"},
    {"check", NULL, 0, &opt.check, 0, 1, 0, NULL, NULL, "try all this, say how much memory it may take, and end"},
    {"verbose", NULL, 'v', &opt.verbose, 0, 1, 0, NULL, NULL, "log every connection"},
    {"version", NULL, 'V', &opt.version, 0, 1, 0, NULL, NULL, "print the version"},
    {"help", NULL, 'h', &opt.help, 0, 1, 0, NULL, NULL, "print this"},
};

enum { N_OPTIONS = sizeof options / sizeof *options };

static void options_print(void) {
    puts("xchat: a small chat server. Once it runs, open http://localhost:7272/\n\n"
         "Options (or environment: --max-head is XCHAT_MAX_HEAD there):");
    for (const struct option *o = options; o < options + N_OPTIONS; o++) {
        const char dash[] = {o->letter != 0 ? '-' : ' ', o->letter != 0 ? o->letter : ' ', '\0'};
        int n = printf("  %s --%s %s", dash, o->name, o->arg != NULL ? o->arg : "");
        printf("%*s%s", n < 30 ? 30 - n : 1, "", o->help);
        if (o->number != NULL && o->arg != NULL) printf(" (%u)", o->initial);
        putchar('\n');
    }
    puts("\nExamples:\n  xchat --data /var/lib/xchat\n  xchat --bind 127.0.0.1 --trust-proxy 127.0.0.1");
}

static void option_set(struct option *o, const char *value) {
    int64_t number = slice_number(slice_of(value), 10);
    const char *why = o->take != NULL ? o->take(value) : NULL;
    if (why != NULL) usage("--%s: '%s': %s", o->name, value, why);
    if (o->number != NULL && (number < o->min || number > o->max))
        usage("--%s: '%s' is not a number from %u to %u", o->name, value, o->min, o->max);
    if (o->number != NULL) *o->number = (uint32_t)number;
    if (o->text != NULL && *value == '\0') usage("--%s: %s is missing", o->name, o->arg);
    if (o->text != NULL && o->max > 0 && strlen(value) > o->max) usage("--%s: over %u bytes", o->name, o->max);
    if (o->text != NULL) *o->text = value;
    mains.given |= (uint64_t)1 << (o - options);
}

/* Reads argument i: --name value, --name=value or -x value. Returns how many it took. */
static int option_read(int argc, char **argv, int i) {
    slice value = slice_of(argv[i]), name = value;
    bool is_long = slice_starts(value, S("--"));
    if (is_long) value = slice_cut(value, 2), name = slice_split(&value, '=');
    for (struct option *o = options; o < options + N_OPTIONS; o++) {
        char letter[] = {'-', o->letter, '\0'};
        if (!slice_eq(name, slice_of(is_long ? o->name : letter)) || (!is_long && o->letter == 0)) continue;
        bool joined = is_long && strchr(argv[i], '=') != NULL;
        if (o->arg == NULL && joined) usage("--%s takes no value", o->name);
        if (o->arg != NULL && !joined && i + 1 == argc) usage("--%s: %s is missing", o->name, o->arg);
        option_set(o, o->arg == NULL ? "1" : joined ? value.p : argv[i + 1]);
        return o->arg == NULL || joined ? 1 : 2;
    }
    if (opt.push_test == NULL || opt.push_text != NULL || *argv[i] == '-')
        usage("%s: no such option; --help lists them", argv[i]);
    opt.push_text = argv[i];
    return 1;
}

/* The command line goes before the environment. */
static void options_read(int argc, char **argv) {
    opt.push_content = "full", opt.origin = "";
    for (struct option *o = options; o < options + N_OPTIONS; o++)
        if (o->number != NULL) *o->number = o->initial;
    for (int i = 1; i < argc;) i += option_read(argc, argv, i);
    if (opt.help) options_print(), exit(0);
    if (opt.version) puts("xchat 0.1"), exit(0);
    for (struct option *o = options; o < options + N_OPTIONS - 2; o++) {   /* XCHAT_VERSION may be anything */
        char name[40];
        int n = snprintf(name, sizeof name, "XCHAT_%s", o->name);
        for (int i = 0; i < n; i++) name[i] = name[i] == '-' ? '_' : upper(name[i]);
        const char *value = getenv(name);
        if (value != NULL && (mains.given >> (o - options) & 1) == 0) option_set(o, value);   /* a flag: 0 or 1 */
    }
}

/* Every client is a descriptor. Takes as many as the system allows, and keeps some for
 * listeners, files, the back end, and for telling those who are too many. */
static void limit_clients(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0) getrlimit(RLIMIT_NOFILE, &limit);
    uint64_t files = limit.rlim_cur, kept = opt.gateway != NULL || opt.reg != NULL ? 64 + PEERS_MAX : 64;
    uint64_t most = files - (files >= 4 * kept ? kept : files / 4);
    if (opt.max_clients <= most) return;
    log_info("--max-clients: only %u fit into the limit of open files (ulimit -n)", (unsigned)most);
    opt.max_clients = (uint32_t)most;
}

/* Listens at an address given by an option: "unix:/path", "127.0.0.1", "127.0.0.1:80",
 * "[::1]:80" or "::1", where HTTP is spoken with "tls:" or "plain:" in front; NULL is every
 * address. Returns the listener. */
static struct conn *listen_on(const char *option, const char *spec, const struct proto *proto, const void *state) {
    slice host = slice_of(spec != NULL ? spec : ""), port = S("");
    bool web = proto == &http_listener, plain = slice_starts(host, S("plain:")), tls = slice_starts(host, S("tls:"));
    if (plain || tls) slice_split(&host, ':');
    bool local = slice_starts(host, S("unix:")) && web, bracket = slice_starts(host, S("["));
    if (tls && opt.tls_cert == NULL) usage("%s: '%s' needs --tls-cert", option, spec);
    if (tls && (local || !web)) usage("%s: '%s': there is no TLS here", option, spec);
    tls = opt.tls_cert != NULL && !plain && web;
    const char *colon = strchr(host.p, ':');
    char name[108] = "", label[16] = "";
    if (local) host = slice_cut(host, 5);
    else if (bracket) port = slice_cut(host, 1), host = slice_split(&port, ']');
    else if (colon != NULL && colon == strrchr(colon, ':')) port = slice_of(colon), host.len -= port.len;
    int64_t number = port.len == 0 ? opt.port : *port.p == ':' ? slice_number(slice_cut(port, 1), 10) : -1;
    bool bad = number < 0 || number > 65535 || host.len >= sizeof name || (bracket && strchr(host.p, ']') == NULL);
    if (bad || (spec != NULL && host.len == 0)) usage("%s: '%s' is not ADDR, ADDR:PORT or unix:PATH", option, spec);
    memcpy(name, host.p, host.len);
    struct addr a;
    bool four = addr_parse(slice_of(name), &a) && addr_is_v4(&a) && memcmp(a.ip + 12, "\0\0\0", 4) != 0;
    if (state == &gateway_proto && (!four || port.len == 0))
        usage("%s: '%s' is not IPv4:PORT, as ids have it", option, spec);
    /* Without a key whoever gets there may do anything, so they are for this machine alone. */
    bool here = local || (four && a.ip[12] == 127) || strcmp(name, "::1") == 0 || strcmp(name, "localhost") == 0;
    const char *key = web ? opt.admin_key_file : opt.gateway_key_file;
    if (state != &page_site && !here && key == NULL)
        usage("%s: '%s' is not of this machine (127.0.0.1, ::1...): that needs %s", option, spec,
              web ? "--admin-key-file" : "--gateway-key-file");
    if (state != &page_site) snprintf(label, sizeof label, " (%s)", option + 2);
    uint32_t before = loop.n;
    const char *why = local ? listen_unix(name, proto, state, label) :
                      listen_tcp(name, (uint16_t)number, tls, proto, state, label);
    if (why != NULL) die("%s %s, --port %u: %s", option, spec != NULL ? spec : "(all)", opt.port, why);
    return loop.conn[before];
}

/* Reads the certificate, when we start, and again at SIGHUP. False: it stays as it was. */
static bool load_files(void) {
    if (opt.tls_key != NULL && opt.tls_cert == NULL) usage("--tls-key needs --tls-cert");
    const char *key = opt.tls_key != NULL ? opt.tls_key : opt.tls_cert;
    const char *why = opt.tls_cert != NULL ? tls_load(opt.tls_cert, key) : NULL;
    if (why != NULL) log_warn("--tls-cert %s, --tls-key %s: %s", opt.tls_cert, key, why);
    bool keys = backend_load();
    return api_load() && keys && why == NULL;
}

static void reload_files(void) {
    bool secrets = pass_load(), pushes = push_reload();   /* whatever else is wrong: one may have to go */
    if (load_files() && pushes && secrets) log_info("SIGHUP: files read again");
}

/* ---- Privileges. ---- */

/* Finds --user, and takes its groups, for good: root needs none. */
static void user_find(void) {
    const char *group = strchr(opt.user, ':');
    char name[64];
    snprintf(name, sizeof name, "%.*s", (int)strcspn(opt.user, ":"), opt.user);
    const struct passwd *pw = getpwnam(name);
    const struct group *gr = group != NULL ? getgrnam(group + 1) : NULL;
    if (pw == NULL || pw->pw_uid == 0 || (group != NULL && gr == NULL))
        die("--user %s: there is no such user or group, or it is root", opt.user);
    gid_t gid = gr != NULL ? gr->gr_gid : pw->pw_gid;
    mains.uid = pw->pw_uid;
    if (initgroups(name, gid) != 0 || setgid(gid) != 0) die("--user %s: %s", opt.user, strerror(errno));
}

/* With whose rights files are opened, until all of root's are given up. */
static void user_switch(uid_t uid) {
    if (opt.user != NULL && seteuid(uid) != 0) die("--user %s: %s", opt.user, strerror(errno));
}

/* A directory that is open and lies outside would be a way out of --chroot. */
static void chroot_enter(void) {
    char *root = realpath(opt.chroot, NULL), *data = realpath(opt.data != NULL ? opt.data : opt.chroot, NULL);
    size_t n = root != NULL ? strlen(root) : 0;
    bool inside = n > 0 && data != NULL && strncmp(data, root, n) == 0 && (data[n] == '/' || data[n] == '\0');
    if (n > 0 && !inside) die("--chroot %s: --data %s must lie in it", opt.chroot, opt.data);
    if (n == 0 || chroot(root) != 0 || chdir("/") != 0) die("--chroot %s: %s", opt.chroot, strerror(errno));
    free(root), free(data);
}

#ifdef LANDLOCK
/* Allows these rights beneath a directory. */
static void landlock_allow(int set, const char *dir, uint64_t rights) {
    struct landlock_path_beneath_attr rule = {rights, open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
    if (rule.parent_fd < 0) return;
    syscall(SYS_landlock_add_rule, set, LANDLOCK_RULE_PATH_BENEATH, &rule, 0);
    close(rule.parent_fd);
}

/* The same for the directory that a file is in (it may be replaced by another), and for that
 * of what it points at. */
static void landlock_allow_file(int set, const char *file, uint64_t rights) {
    char dir[4096], *real = realpath(file, NULL);
    for (const char *at = file; at != NULL; at = at == file ? real : NULL) {
        const char *slash = strrchr(at, '/');
        snprintf(dir, sizeof dir, "%.*s/", slash != NULL ? (int)(slash - at) : 1, slash != NULL ? at : ".");
        landlock_allow(set, dir, rights);
    }
    free(real);
}

/* Takes away the files that we do not need; where the kernel has Landlock (Linux 5.13). */
static void landlock_enter(void) {
    const uint64_t look = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR, all = (1 << 13) - 1;
    const struct landlock_ruleset_attr attr = {.handled_access_fs = all};   /* what its first version knew */
    int set = (int)syscall(SYS_landlock_create_ruleset, &attr, sizeof attr, 0);
    if (set < 0) return;
    /* To look up names, libc reads what only it knows, and may load code for it. */
    const char *const system[] = {"/etc", "/run", "/usr", "/lib", "/lib64", "/nix", "/gnu", "/proc"};
    for (size_t i = 0; i < sizeof system / sizeof *system; i++) landlock_allow(set, system[i], look);
    if (opt.chroot != NULL) landlock_allow(set, opt.chroot, look);
    if (opt.data != NULL) landlock_allow(set, opt.data, all & ~(uint64_t)LANDLOCK_ACCESS_FS_EXECUTE);
    landlock_allow_file(set, "/etc/resolv.conf", look);
    for (const struct option *o = options; o < options + N_OPTIONS; o++)   /* for SIGHUP */
        if (o->text != NULL && *o->text != NULL && strcmp(o->arg, "FILE") == 0)
            landlock_allow_file(set, *o->text, look);
    for (uint32_t i = 0; pass_name(i) != NULL; i++) landlock_allow_file(set, pass_name(i), look);
    for (uint32_t i = 0; i < loop.n; i++) {   /* a socket's file goes when we end */
        struct sockaddr_un sa = {0};
        socklen_t len = sizeof sa - 1;
        if (getsockname(loop.conn[i]->fd, (struct sockaddr *)&sa, &len) == 0 && sa.sun_family == AF_UNIX &&
            !loop.conn[i]->given)
            landlock_allow_file(set, sa.sun_path, LANDLOCK_ACCESS_FS_REMOVE_FILE);
    }
    if (syscall(SYS_landlock_restrict_self, set, 0) != 0) log_warn("Landlock: %s", strerror(errno));
    close(set);
}
#else
static void landlock_enter(void) {}
#endif

/* Gives up what is not needed from now on. */
static void privileges_drop(void) {
    no_new_privileges();
    landlock_enter();
    if (opt.chroot != NULL) chroot_enter();
    if (opt.user != NULL && (setuid(mains.uid) != 0 || setuid(0) == 0 || seteuid(0) == 0))
        die("--user %s: root cannot be left for good", opt.user);
}

/* ---- The supervisor. ---- */

/* Tells it, if there is one. Best effort: it looks after us, not we after it. */
static void notify(const char *text) {
    if (mains.notify > 0) send(mains.notify, text, strlen(text), 0);
}

/* Connects to it now: its socket may be out of reach later. A name with '@' is no file. */
static void notify_open(void) {
    const char *path = getenv("NOTIFY_SOCKET"), *usec = getenv("WATCHDOG_USEC"), *pid = getenv("WATCHDOG_PID");
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    size_t n = path != NULL ? strlen(path) : 0;
    bool ours = pid == NULL || slice_number(slice_of(pid), 10) == getpid();
    int64_t us = usec != NULL && ours ? slice_number(slice_of(usec), 10) : 0;
    int fd = n > 0 && n < sizeof sa.sun_path ? socket(AF_UNIX, SOCK_DGRAM, 0) : -1;
    if (fd < 0) return;
    memcpy(sa.sun_path, path, n);
    if (*path == '@') *sa.sun_path = '\0';
    socklen_t len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n);
    mains.notify = fd_prepare(fd) == 0 && connect(fd, (struct sockaddr *)&sa, len) == 0 ? fd : 0;
    mains.watchdog_ms = us > 0 ? us / 2000 : 0;
    if (mains.notify == 0) log_warn("NOTIFY_SOCKET %s: %s", path, strerror(errno)), close(fd);
}

/* `tick` of the loop: as long as it runs, we are well. */
static void main_tick(void) {
    if (opt.apns != NULL) push_tick();
    if (opt.join != NULL) join_tick();
    if (loop.moved >= MOVED_MANY) loop.moved = 0, memory_trim();
    if (loop_stopping() && !mains.stopping) mains.stopping = true, notify("STOPPING=1");
    if (mains.watchdog_ms == 0) return;
    if (now.ms >= mains.alive_ms) notify("WATCHDOG=1"), mains.alive_ms = now.ms + mains.watchdog_ms;
    loop_wake(mains.alive_ms);
}

/* The sockets it listens on for us, from 3 on, take the place of --bind. How many there are. */
static int64_t listen_given(void) {
    const char *pid = getenv("LISTEN_PID"), *fds = getenv("LISTEN_FDS");
    bool ours = pid != NULL && fds != NULL && slice_number(slice_of(pid), 10) == getpid();
    int64_t n = ours ? slice_number(slice_of(fds), 10) : 0;
    for (int fd = 3; fd < 3 + n; fd++) {
        int listens = 0;
        socklen_t len = sizeof listens;
        bool ok = getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &len) == 0 && listens != 0;
        struct conn *l = ok ? listen_with(fd, opt.tls_cert != NULL, &http_listener, &page_site) : NULL;
        if (l == NULL) die("LISTEN_FDS: descriptor %d is no socket that listens", fd);
        l->given = true;
        log_info("listening on %s%s (given)", addr_text(&l->peer), l->hello ? " (TLS)" : "");
    }
    unsetenv("LISTEN_PID"), unsetenv("LISTEN_FDS"), unsetenv("LISTEN_FDNAMES");
    return n;
}

/* --check: how much memory the limits allow. A growing buffer may be twice as large as what is
 * in it, escaping makes a message up to seven times as long. */
static void check_memory(void) {
    uint64_t message = (uint64_t)opt.max_message * 7, backlog = opt.backlog > message ? opt.backlog : message;
    uint64_t list = (uint64_t)opt.max_clients * (6 * NAME_MAX_BYTES + 32), tls = opt.tls_cert != NULL ? 51200 : 0;
    uint64_t in = READ_BYTES + opt.max_head + opt.max_message, tail = opt.data != NULL ? 0 : (uint64_t)4 * MEMORY_BYTES;
    uint64_t client = sizeof(struct conn) + sizeof(struct client) + sizeof(struct more) + (size_t)6 * NAME_MAX_BYTES +
                      ROOMS_PER_CLIENT * sizeof(struct member);
    const struct {
        uint64_t n, bytes;
        const char *what;
    } parts[] = {
        {opt.max_clients, client + tls + 2 * (in + 2 * backlog + list), "clients (--max-message, --backlog, names)"},
        {opt.max_rooms, sizeof(struct room) + sizeof(struct history) + 3 * backlog + tail, "rooms (--backlog)"},
        {opt.data == NULL ? IDLE_LOGS : 0, tail, "empty rooms, for what was said in them"},
        {opt.apns != NULL ? PUSH_QUEUE : 0, (uint64_t)5 * PAYLOAD_MAX, "phones"},
    };
    double all = 16;
    puts("options, files and ports are good. Memory, if everybody did the worst that the limits allow:");
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        double mib = (double)parts[i].n * (double)parts[i].bytes / (1 << 20);
        all += mib;
        if (mib > 0) printf("%12.1f MiB  %u %s\n", mib, (unsigned)parts[i].n, parts[i].what);
    }
    printf("%12.1f MiB  in all, with 16 for the program\n", all);
}

/* Of those ignored, write() says two as well; and who looks up a name is not waited for. */
static void signals_set(void) {
    static const int ignored[] = {SIGPIPE, SIGXFSZ, SIGCHLD};
    struct sigaction stop = {.sa_handler = loop_signal}, hangup = {.sa_handler = loop_hangup};
    sigaction(SIGTERM, &stop, NULL), sigaction(SIGINT, &stop, NULL), sigaction(SIGHUP, &hangup, NULL);
    for (int i = 0; i < 3; i++) sigaction(ignored[i], &(struct sigaction){.sa_handler = SIG_IGN}, NULL);
}

int main(int argc, char **argv) {
    int fd = open("/dev/null", O_RDWR);   /* if stderr is closed, no socket must take its place */
    while (fd >= 0 && fd < 3) fd = open("/dev/null", O_RDWR);
    close(fd);
    memory_init();
    CRYPTO_set_mem_functions(tls_malloc, tls_realloc, NULL);
    clock_read();
    options_read(argc, argv);
    if (!pass_load()) return 1;
    if (opt.make_token != NULL) return pass_print(), 0;
    limit_clients();
    if (RAND_bytes(tables.secret, sizeof tables.secret) != 1) die("no random bytes");
    notify_open();
    http.callers.key = caller_key;
    rooms.by_name.key = room_key;
    rooms.unsaid = chat_unsaid;
    loop.flush = rooms_flush;
    loop.reload = reload_files;
    if (opt.chroot != NULL && opt.user == NULL) usage("--chroot needs --user: root finds a way out");
    if (opt.user != NULL) user_find();
    if (!load_files() || !push_init()) return 1;
    user_switch(mains.uid);
    history_init(opt.data);
    if (!push_restore()) return 1;
    user_switch(0);
    rooms.said = opt.apns != NULL ? push_said : NULL;
    loop.tick = main_tick;
    page_init();
    signals_set();
    if (opt.push_test != NULL) return push_try(), 1;
    bool given = listen_given() > 0;
    for (uint32_t i = 0; !given && (i == 0 || i < mains.n_binds); i++)   /* without --bind the first is NULL */
        listen_on("--bind", mains.binds[i], &http_listener, &page_site);
    if (opt.admin != NULL) listen_on("--admin", opt.admin, &http_listener, &admin_site);
    if (opt.reg != NULL) listen_on("--register", opt.reg, &backend_listener, &register_proto);
    struct addr chat_at = loop.conn[0]->peer, id = {.ip = {[12] = 127, [15] = 1}, .port = chat_at.port};
    if (opt.gateway != NULL) id = listen_on("--gateway", opt.gateway, &backend_listener, &gateway_proto)->peer;
    backend_init(id.ip + 12, id.port, chat_at.port);
    if (opt.check) loop.tick = NULL, loop_signal(0), loop_run();   /* gives the ports back, removes their files */
    privileges_drop();
    if (opt.check) return check_memory(), 0;
    if (opt.apns != NULL) devices_compact(false);   /* what waited is taken over from now on, and not sooner */
    notify("READY=1");
    loop_run();
    if (opt.apns != NULL) push_stop();
    log_info("stopped");
    return 0;
}
