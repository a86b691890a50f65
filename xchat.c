/* xchat: a small chat server. JSON over WebSocket, and a page to talk from. Existing
 * workerman-chat pages and the xchat iOS app work with it unchanged.
 *
 *     cc -O2 -o xchat xchat.c -lssl -lcrypto && ./xchat
 *
 * then open http://localhost:7272/ in two windows and talk.
 *
 * Contents. The file reads bottom-up: what is called stands above its caller. (The
 * numbers left out are those of chapters still to come.)
 *
 *      1. Bytes               slices, growable buffers, UTF-8, clock, log
 *      2. JSON                strict reader that borrows, writer that escapes
 *      3. Tables              one hash table, for rooms, clients, addresses
 *      4. The loop            connections around one poll(2): read, write, close
 *      5. HTTP and WebSocket  request heads, the upgrade, frames, close codes
 *      6. History             files of lines: nothing that was seen is lost
 *      7. Rooms               a room is a log, a member is a cursor in it
 *      9. Chat                login, say, logout: the protocol people know
 *     12. Page                the built-in web client, one HTML file
 *     13. Main                options, listeners, signals
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
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define _FILE_OFFSET_BITS 64   /* files over 2 GB on 32-bit machines */
#include <arpa/inet.h>
#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
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

#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/rand.h>
#include <openssl/sha.h>
#include <openssl/ssl.h>

/* Linux can wait for many without looking at each (chapter 4); -DXCHAT_PURE_POLL does
 * without that, as other systems must. */
#if defined(__linux__) && !defined(XCHAT_PURE_POLL)
#include <sys/epoll.h>
#define PARKING 1
#else
#define PARKING 0
#endif

#if defined(__GNUC__)
#define PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define PRINTF(text, first)
#endif

/* glibc keeps large blocks in its heap once it has freed one, between the small ones
 * of a thousand clients. We want them back with the system after every peak. */
#ifdef __GLIBC__
#include <malloc.h>
static void memory_init(void) { mallopt(M_MMAP_THRESHOLD, 65536); }
#else
static void memory_init(void) {}
#endif

/* The limits a user may set: chapter 13 fills them in before anything else runs,
 * the others only read them. */
static struct {
    uint32_t port, max_message, max_head, max_clients, max_per_address, max_rooms;
    uint32_t rate, burst, backlog, ping_s, timeout_s, retain, segment, fsync, verbose;
    const char *data, *tls_cert, *tls_key;
} opt;

/* Limits that nobody has asked to change yet. */
enum {
    NAME_MAX_BYTES = 64, ROOM_MAX_BYTES = 128, REF_MAX_BYTES = 64,
    ROOMS_PER_CLIENT = 64,
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
    TLS_RECORD = 16384,       /* bytes that TLS encrypts, and we hand to it, at once */
    OUT_HIGH = 65536,         /* who has more unread answers is not read from */
    PARKED_READY = 1024,      /* parked connections that are handled in one round */
    TICK_MS = 1000,           /* how often deadlines are looked at */
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
 *     p                off           off + len           cap
 *     | dropped        | live bytes  | room to grow      |
 *
 * Dropping moves `off`; bytes move back to p only when more than half of the space is
 * dropped, so about once in their life. Every buffer that the network can fill has a
 * limit elsewhere; out of memory ends the program, with a line in the log.
 *
 * Owns: the clock of this round. Calls: libc. Called by: everybody.
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

/* At most 10 digits of this base; -1 for anything else. */
static int64_t slice_number(slice s, int base) {
    int64_t n = s.len > 0 && s.len <= 10 ? 0 : -1;
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

/* One event, one line on stderr. Control characters would let a peer write lines of
 * its own, and bytes above 0x7e mean different things to different terminals: both
 * are shown as \xHH. errno stays as it was. */
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

struct buf {
    char *p;
    uint32_t off, len, cap;
};

static void *xrealloc(void *p, size_t n) {
    if ((p = realloc(p, n)) == NULL) die("out of memory (%zu bytes)", n);
    return p;
}

static void *xcalloc(size_t n) { return memset(xrealloc(NULL, n), 0, n); }
static slice buf_slice(const struct buf *b) { return b->len > 0 ? (slice){b->p + b->off, b->len} : S(""); }

static void buf_free(struct buf *b) {
    free(b->p);
    *b = (struct buf){0};
}

/* Makes room for n more bytes and returns where they go; the caller writes them and
 * adds to `len`. */
static char *buf_room(struct buf *b, size_t n) {
    size_t need = b->len + n, cap = need < 2 * (size_t)b->cap ? 2 * (size_t)b->cap : (need + 63) / 64 * 64;
    if (need > INT32_MAX) die("a buffer of %zu bytes is beyond every limit", need);
    if (b->off + need > b->cap) {
        bool fits = need <= b->cap && b->off >= b->cap / 2;
        if (cap > INT32_MAX) cap = INT32_MAX;
        char *p = fits ? b->p : xrealloc(NULL, cap);
        if (b->len > 0) memmove(p, b->p + b->off, b->len);
        if (!fits) free(b->p);
        *b = (struct buf){p, 0, b->len, fits ? b->cap : (uint32_t)cap};
    }
    return b->p + b->off + b->len;
}

static void buf_add(struct buf *b, slice s) {
    if (s.len == 0) return;
    memcpy(buf_room(b, s.len), s.p, s.len);
    b->len += (uint32_t)s.len;
}

static void buf_addc(struct buf *b, char c) { buf_add(b, (slice){&c, 1}); }

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
 * PHP clients know no types: json_text() turns numbers, true and null into text as
 * PHP would.
 *
 * Owns: nothing. Calls: 1 Bytes. Called by: 6 History, 9 Chat.
 * Promises: never reads outside the text, never recurses.
 */

struct json {          /* a reader */
    const char *p, *end;
    const char *why;   /* once set: what is wrong at p */
};

struct json_field {
    const char *name;  /* wanted */
    slice raw;         /* found: a slice of the text; p is NULL when it is missing */
};

static bool json_fail(struct json *j, const char *why) {
    if (j->why == NULL) j->why = why;
    return false;
}

static void json_space(struct json *j) {
    while (j->p < j->end && (*j->p == ' ' || *j->p == '\t' || *j->p == '\n' || *j->p == '\r')) j->p++;
}

/* Takes c if it comes next, behind white space. */
static bool json_take(struct json *j, char c) {
    json_space(j);
    bool here = j->why == NULL && j->p < j->end && *j->p == c;
    j->p += here ? 1 : 0;
    return here;
}

/* The \uXXXX at p, or -1. */
static int64_t json_unit(const char *p, const char *end) {
    return end - p >= 6 && p[0] == '\\' && p[1] == 'u' ? slice_number((slice){p + 2, 4}, 16) : -1;
}

/* Goes behind the escape at p. A half of a surrogate pair is only right beside the
 * other one (RFC 8259, section 7). */
static bool json_escape(struct json *j) {
    char c = j->end - j->p >= 2 ? j->p[1] : '\0';
    if (c != '\0' && strchr("\"\\/bfnrt", c) != NULL) return j->p += 2, true;
    int64_t unit = json_unit(j->p, j->end);
    if (unit < 0) return json_fail(j, "bad escape in a string");
    j->p += 6;
    if (unit < 0xd800 || unit > 0xdfff) return true;
    int64_t low = unit < 0xdc00 ? json_unit(j->p, j->end) : -1;
    if (low < 0xdc00 || low > 0xdfff) return json_fail(j, "lone surrogate in a string");
    j->p += 6;
    return true;
}

static bool json_string(struct json *j) {
    for (j->p++; j->p < j->end && *j->p != '"';) {
        if ((unsigned char)*j->p < 0x20) return json_fail(j, "raw control character in a string");
        if (*j->p != '\\') j->p++;
        else if (!json_escape(j)) return false;
    }
    if (j->p == j->end) return json_fail(j, "string without an end");
    j->p++;
    return true;
}

static size_t json_digits(struct json *j) {
    const char *start = j->p;
    while (j->p < j->end && *j->p >= '0' && *j->p <= '9') j->p++;
    return (size_t)(j->p - start);
}

static bool json_is_next(const struct json *j, const char *set) {
    return j->p < j->end && *j->p != '\0' && strchr(set, *j->p) != NULL;
}

/* -? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)? */
static bool json_number(struct json *j) {
    if (*j->p == '-') j->p++;
    bool zero = json_is_next(j, "0");
    size_t digits = json_digits(j);
    bool ok = digits > 0 && (digits == 1 || !zero);
    if (ok && json_is_next(j, ".")) j->p++, ok = json_digits(j) > 0;
    if (ok && json_is_next(j, "eE")) {
        j->p++;
        if (json_is_next(j, "+-")) j->p++;
        ok = json_digits(j) > 0;
    }
    return ok || json_fail(j, "bad number");
}

/* A string, a number, true, false or null. */
static bool json_scalar(struct json *j) {
    slice rest = {j->p, (size_t)(j->end - j->p)}, words[] = {S("true"), S("false"), S("null")};
    if (json_is_next(j, "\"")) return json_string(j);
    if (json_is_next(j, "-0123456789")) return json_number(j);
    for (size_t i = 0; i < 3; i++)
        if (slice_starts(rest, words[i])) return j->p += words[i].len, true;
    return json_fail(j, rest.len > 0 ? "a value was expected" : "the text ends too early");
}

/* The key of a member, and its colon; returns the raw key. */
static slice json_key(struct json *j) {
    json_space(j);
    slice key = {j->p, 0};
    if (!json_is_next(j, "\"")) json_fail(j, "a key in quotes was expected");
    else if (json_string(j)) key.len = (size_t)(j->p - key.p);
    if (!json_take(j, ':')) json_fail(j, "':' was expected");
    return key;
}

/* One whole value, at most `levels` brackets inside each other. Returns its raw text;
 * look at j->why before using it. */
static slice json_value(struct json *j, int levels) {
    uint64_t objects = 0;   /* bit 0: is the innermost open bracket an object? */
    int depth = 0;
    json_space(j);
    slice raw = {j->p, 0};
    do {
        bool object = json_take(j, '{');
        if (object || json_take(j, '[')) {
            if (++depth > levels) json_fail(j, "nested too deeply");
            objects = objects << 1 | (object ? 1 : 0);
            if (!json_take(j, object ? '}' : ']')) {
                if (object) json_key(j);
                continue;
            }
            depth--, objects >>= 1;
        } else {
            json_scalar(j);
        }
        /* Behind a value: close brackets until there is a next value. */
        while (depth > 0 && j->why == NULL && !json_take(j, ',')) {
            if (!json_take(j, objects & 1 ? '}' : ']')) json_fail(j, "',' or a closing bracket was expected");
            depth--, objects >>= 1;
        }
        if (depth > 0 && (objects & 1)) json_key(j);
    } while (depth > 0 && j->why == NULL);
    raw.len = (size_t)(j->p - raw.p);
    return raw;
}

/* Decodes one character of a checked string: `text` moves behind it, `out` gets its
 * UTF-8 bytes. Returns how many. */
static size_t json_char(slice *text, char out[4]) {
    static const char from[] = "bfnrt", to[] = "\b\f\n\r\t";
    size_t used = *text->p != '\\' ? 1 : text->p[1] != 'u' ? 2 : 6, n = 1;
    const char *plain = used == 2 ? strchr(from, text->p[1]) : NULL;
    out[0] = plain != NULL ? to[plain - from] : text->p[used == 2 ? 1 : 0];
    if (used == 6) {
        uint32_t code = (uint32_t)json_unit(text->p, text->p + 6);
        if (code >= 0xd800 && code <= 0xdbff) {
            code = 0x10000 + ((code - 0xd800) << 10) + ((uint32_t)json_unit(text->p + 6, text->p + 12) - 0xdc00);
            used = 12;
        }
        n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
        static const unsigned char head[] = {0, 0, 0xc0, 0xe0, 0xf0};
        for (size_t i = n; i-- > 0; code >>= 6)
            out[i] = (char)(i > 0 ? 0x80 | (code & 0x3f) : head[n] | code);
    }
    *text = slice_cut(*text, used);
    return n;
}

static slice json_inside(slice raw) { return (slice){raw.p + 1, raw.len - 2}; }

/* Is this raw string the text `name`? "\u0074ype" is "type". */
static bool json_is(slice raw, const char *name) {
    if (raw.len < 2 || *raw.p != '"') return false;
    slice rest = json_inside(raw), wanted = slice_of(name);
    char utf8[4] = "";
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
    struct json j = {text.p, text.p + text.len, utf8_valid(text) ? NULL : "not UTF-8"};
    if (!json_take(&j, '{')) json_fail(&j, "an object was expected");
    if (!json_take(&j, '}')) {
        do {
            slice key = json_key(&j), raw = j.why == NULL ? json_value(&j, JSON_DEPTH - 1) : S("");
            for (size_t i = 0; i < n && j.why == NULL; i++)
                if (json_is(key, fields[i].name)) fields[i].raw = raw;
        } while (json_take(&j, ','));
        if (!json_take(&j, '}')) json_fail(&j, "',' or '}' was expected");
    }
    json_space(&j);
    if (j.p != j.end) json_fail(&j, "text behind the object");
    *at = (size_t)(j.p - text.p);
    return j.why;
}

/* A number in the shortest of the forms that read back: 1.50 is "1.5", 1e3 is "1000".
 * False for one that a double cannot hold. */
static bool json_number_text(slice raw, struct buf *b) {
    char text[64] = "";
    memcpy(text, raw.p, raw.len < sizeof text ? raw.len : 0);
    double value = strtod(text, NULL);
    errno = 0;
    strtoll(text, NULL, 10);
    bool whole = strpbrk(text, ".eE") == NULL && errno == 0 && strcmp(text, "-0") != 0;
    bool ok = *text != '\0' && isfinite(value);
    if (ok && !whole) snprintf(text, sizeof text, "%.15g", value);
    if (ok && !whole && strtod(text, NULL) != value) snprintf(text, sizeof text, "%.17g", value);
    if (ok) buf_add(b, slice_of(text));
    return ok;
}

/* Appends the text of a raw value as PHP would turn it into a string: true is "1";
 * false, null and nothing are "". False for an array, an object and an impossible number. */
static bool json_text(slice raw, struct buf *b) {
    char c = raw.p != NULL ? *raw.p : 'n';
    slice rest = c == '"' ? json_inside(raw) : c == 't' ? S("1") : S("");
    while (rest.len > 0) {
        const char *escape = memchr(rest.p, '\\', rest.len);
        size_t plain = escape != NULL ? (size_t)(escape - rest.p) : rest.len;
        buf_add(b, slice_take(rest, plain));
        rest = slice_cut(rest, plain);
        if (escape != NULL) b->len += (uint32_t)json_char(&rest, buf_room(b, 4));
    }
    return c == '-' || (c >= '0' && c <= '9') ? json_number_text(raw, b) : c != '{' && c != '[';
}

/* ---- Writing. A message is built in a buffer, from the outside in:
 *
 *     buf_addc(b, '{');                      {
 *     json_add(b, "type", S("say"));         {"type":"say"
 *     buf_addc(b, '}');                      {"type":"say"}
 *
 * Text stays UTF-8. The clients of this protocol put names and contents into their
 * pages as HTML, so text of people becomes HTML on its way in (html_escape). ---- */

struct escapes {
    const char *from, *to[7];   /* characters, and what stands for each */
    bool controls;              /* are other control characters escaped? */
};

static const struct escapes json_escapes = {
    "\"\\\b\f\n\r\t", {"\\\"", "\\\\", "\\b", "\\f", "\\n", "\\r", "\\t"}, true};
static const struct escapes html_escapes = {"&<>\"'", {"&amp;", "&lt;", "&gt;", "&quot;", "&#039;"}, false};

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
    }
    buf_add(b, slice_cut(s, run));
}

static void json_quote(struct buf *b, slice s) {
    buf_addc(b, '"');
    escape(b, s, &json_escapes);
    buf_addc(b, '"');
}

/* A key, with a comma in front unless it is the first. */
static void json_name(struct buf *b, const char *name) {
    if (b->len > 0 && b->p[b->off + b->len - 1] != '{') buf_addc(b, ',');
    json_quote(b, slice_of(name));
    buf_addc(b, ':');
}

static void json_add(struct buf *b, const char *name, slice value) {
    json_name(b, name);
    json_quote(b, value);
}

/* Appends text as HTML. If `breaks`, each line end (\n, \r\n, \n\r or \r) gets a
 * "<br />" in front, and stays. */
static void html_escape(struct buf *b, slice s, bool breaks) {
    for (size_t n = 0; s.len > 0; n = 0) {
        while (n < s.len && !(breaks && (s.p[n] == '\n' || s.p[n] == '\r'))) n++;
        escape(b, slice_take(s, n), &html_escapes);
        s = slice_cut(s, n);
        if (s.len == 0) return;
        bool pair = s.len > 1 && (s.p[1] == '\n' || s.p[1] == '\r') && s.p[1] != s.p[0];
        buf_add(b, S("<br />"));
        buf_add(b, slice_take(s, pair ? 2 : 1));
        s = slice_cut(s, pair ? 2 : 1);
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
 * Deletion is the part that everybody gets wrong. Emptying a slot would cut off the
 * items that were pushed behind it; a "was here" mark would fill the table with marks.
 * So the hole is filled from behind, as long as something there may move:
 *
 *     slot    1   2   3   4   5          a, b, d hash to 1; c to 4
 *           | a | b | d | c |   |        remove a: b may move to 1, then d to 2;
 *           | b | d |   | c |   |        c is at home, and 5 is empty: done
 *
 * Names come from strangers, who could choose a thousand that hash alike: the hash is
 * keyed with random bytes. A cryptographic one is not fast, but looking up is rare.
 *
 * Owns: the key of the hash. Calls: 1 Bytes.
 * Called by: 5 HTTP and WebSocket, 6 History, 7 Rooms, 9 Chat.
 */

enum { TABLE_KEY_MAX = 6 + ROOM_MAX_BYTES };   /* "rooms/" and a name */

static struct {
    unsigned char secret[16];
} tables;

struct table {
    slice (*key)(const void *item);   /* the key, at most TABLE_KEY_MAX bytes, is in the item */
    void **slot;
    size_t cap, n;                    /* cap is 0 or a power of two */
};

static size_t table_home(const struct table *t, slice key) {
    unsigned char text[sizeof tables.secret + TABLE_KEY_MAX], hash[SHA256_DIGEST_LENGTH];
    size_t home;
    assert(key.len <= TABLE_KEY_MAX);
    memcpy(text, tables.secret, sizeof tables.secret);
    memcpy(text + sizeof tables.secret, key.p, key.len);
    SHA256(text, sizeof tables.secret + key.len, hash);
    memcpy(&home, hash, sizeof home);
    return home & (t->cap - 1);
}

/* The slot where an item of this key is, or where it would go. */
static size_t table_slot(const struct table *t, slice key) {
    size_t i = table_home(t, key);
    while (t->slot[i] != NULL && !slice_eq(t->key(t->slot[i]), key)) i = (i + 1) & (t->cap - 1);
    return i;
}

/* The item of this key, or NULL. */
static void *table_find(const struct table *t, slice key) {
    return t->cap > 0 ? t->slot[table_slot(t, key)] : NULL;
}

static void table_resize(struct table *t, size_t cap) {
    struct table next = {t->key, xcalloc(cap * sizeof(void *)), cap, t->n};
    for (size_t i = 0; i < t->cap; i++)
        if (t->slot[i] != NULL) next.slot[table_slot(&next, t->key(t->slot[i]))] = t->slot[i];
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
 * one answer.
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
    struct conn *next;             /* in loop.dirty */
    struct buf in, out;            /* input that is no whole unit yet; private output */
    int64_t heard_ms;              /* when the peer last sent something */
    int64_t deadline_ms;           /* the protocol's; a listener accepts nothing before it */
    SSL *ssl;                      /* NULL: plain text */
    int fd;
    uint32_t slot;                 /* where it stands in loop.conn... */
    uint32_t place;                /* ...and, unless it is parked, in the poll set */
    uint32_t searched;             /* bytes of `in` that were looked at already */
    struct addr peer;
    short events;                  /* what it waits for */
    bool dirty : 1, closing : 1, swept : 1, fin_sent : 1, eof : 1, lost : 1;
    bool parked : 1;                           /* in the epoll set */
    bool blocked : 1;                          /* the kernel's send buffer is full */
    bool muted : 1;                            /* TLS must read before it can write */
    bool hello : 1;                            /* TLS is to begin; a listener's: with all it accepts */
    bool plain : 1;                            /* but it did not: the peer does not speak TLS */
    bool counted : 1, proxy : 1, refused : 1;  /* chapter 5's */
};

static struct {
    struct conn **conn;            /* all */
    uint32_t n, cap;
    struct pollfd *pfd;            /* those in the poll set... */
    struct conn **polled;          /* ...and who they are; NULL: the epoll set */
    uint32_t n_polled, polled_cap;
    int epoll;                     /* 0: none */
    struct conn *dirty;            /* has something to write or to end, after this round */
    bool (*flush)(void);           /* chapter 7's: send what rooms have gathered */
    int64_t tick_ms;               /* next look at the deadlines */
    int64_t stop_ms;               /* when stopping: the end, whatever is left */
    volatile sig_atomic_t signals; /* SIGTERM or SIGINT: so many came */
    volatile sig_atomic_t hangups; /* SIGHUP */
    void (*reload)(void);          /* chapter 13's: read the files again */
    SSL_CTX *tls;                  /* our certificate */
    char chunk[READ_BYTES];        /* everybody's input */
    char text[INET6_ADDRSTRLEN + 10];   /* addr_text()'s */
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

static void park_ready(void (*ready)(struct conn *c, short events)) {
    struct epoll_event e[PARKED_READY];
    int n = epoll_wait(loop.epoll, e, PARKED_READY, 0);
    for (int i = 0; i < n; i++) ready(e[i].data.ptr, (short)e[i].events);
}
#else
static bool park(struct conn *c) { return (void)c, false; }
static void park_ready(void (*ready)(struct conn *c, short events)) { (void)ready; }
#endif

/* Takes the descriptor; it is `parked` if that can be. The connection ends by
 * conn_close() or conn_lost(). */
static struct conn *conn_new(int fd, const struct proto *proto, void *state, bool parked) {
    if (loop.n == loop.cap) {
        loop.cap = loop.cap > 0 ? loop.cap * 2 : 16;
        loop.conn = xrealloc(loop.conn, loop.cap * sizeof *loop.conn);
    }
    struct conn *c = xcalloc(sizeof *c);
    *c = (struct conn){.fd = fd, .proto = proto, .state = state, .heard_ms = now.ms, .events = POLLIN};
    c->slot = loop.n++;
    loop.conn[c->slot] = c;
    c->parked = parked && park(c);
    if (!c->parked) c->place = poll_add(fd, POLLIN, c);
    return c;
}

/* Has this connection looked after before the round ends. */
static void conn_touch(struct conn *c) {
    if (c->dirty) return;
    c->dirty = true;
    c->next = loop.dirty;
    loop.dirty = c;
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

static bool conn_paused(const struct conn *c) { return c->out.len > OUT_HIGH; }

static short conn_interest(const struct conn *c) {
    bool listens = c->proto->accepted != NULL;
    bool reads = c->closing ? !c->eof : listens ? now.ms >= c->deadline_ms : !conn_paused(c) || c->muted;
    return (short)((reads ? POLLIN : 0) | (c->blocked ? POLLOUT : 0));
}

/* Tells the kernel what this connection waits for now. */
static void conn_watch(struct conn *c) {
    short events = conn_interest(c);
    if (events == c->events) return;
    c->events = events;
    if (!c->parked) loop.pfd[c->place].events = events;
    else park(c);
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

static int tls_no_passphrase(char *text, int size, int writing, void *unused) {
    (void)text, (void)size, (void)writing, (void)unused;
    return -1;   /* or OpenSSL would ask at the terminal */
}

/* Reads our certificate, with its chain, and its key. NULL, or what is wrong with them;
 * then those in use stay. */
static const char *tls_load(const char *cert, const char *key) {
    SSL_CTX *tls = SSL_CTX_new(TLS_server_method());
    if (tls == NULL) die("out of memory (TLS)");
    ERR_clear_error();
    SSL_CTX_set_min_proto_version(tls, TLS1_2_VERSION);
    SSL_CTX_set_options(tls, SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE);
    SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                     SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_session_cache_mode(tls, SSL_SESS_CACHE_OFF);   /* tickets are kept by the clients */
    SSL_CTX_set_alpn_select_cb(tls, tls_choose, NULL);
    SSL_CTX_set_default_passwd_cb(tls, tls_no_passphrase);
    if (SSL_CTX_use_certificate_chain_file(tls, cert) == 1 &&
        SSL_CTX_use_PrivateKey_file(tls, key, SSL_FILETYPE_PEM) == 1 && SSL_CTX_check_private_key(tls) == 1) {
        SSL_CTX_free(loop.tls);
        loop.tls = tls;
        return NULL;
    }
    const char *why = ERR_reason_error_string(ERR_peek_error());
    SSL_CTX_free(tls);
    return why != NULL ? why : "cannot be read";
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
    if (error == SSL_ERROR_ZERO_RETURN) return 0;
    errno = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE ? EAGAIN : ECONNRESET;
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
    return tls_result(c, SSL_read(c->ssl, p, (int)n));
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
    c->heard_ms = now.ms;
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
    c->blocked = !c->muted && (again || (c->ssl == NULL && n >= 0 && (size_t)n < s.len));
    if (n < 0 && !again) conn_lost(c, "connection reset");
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

/* Accepts some of those who wait; others have their turn too. */
static void listener_ready(struct conn *l) {
    for (int i = 0; i < 64; i++) {
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

/* Listens at one address. NULL with errno, or the listener. */
static struct conn *listen_at(const struct addrinfo *ai, bool tls, const struct proto *proto, const void *state) {
    int one = 1, fd = socket(ai->ai_family, SOCK_STREAM, 0), error;
    struct sockaddr_storage bound;
    socklen_t len = sizeof bound;
    if (fd < 0) return NULL;
    /* The first lets a restart not wait for old connections to be forgotten; without
     * the second IPv6 would take the port of IPv4 too. */
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (ai->ai_family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
    if (bind(fd, ai->ai_addr, ai->ai_addrlen) == 0 && listen(fd, 4096) == 0 && fd_prepare(fd) == 0 &&
        getsockname(fd, (struct sockaddr *)&bound, &len) == 0) {
        struct conn *l = conn_new(fd, proto, (void *)(uintptr_t)state, false);
        l->peer = addr_of(&bound);
        l->hello = tls;
        return l;
    }
    error = errno;
    close(fd);
    errno = error;
    return NULL;
}

/* Listens on a Unix-domain socket. A file left behind by a server that died is
 * replaced, one that is answered is not. NULL, or what went wrong. */
static const char *listen_unix(const char *path, const struct proto *proto, const void *state) {
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    struct addrinfo ai = {.ai_family = AF_UNIX, .ai_addr = (struct sockaddr *)&sa, .ai_addrlen = sizeof sa};
    struct stat st;
    if (strlen(path) >= sizeof sa.sun_path) return strerror(ENAMETOOLONG);
    memcpy(sa.sun_path, path, strlen(path));
    int probe = socket(AF_UNIX, SOCK_STREAM, 0);
    if (stat(path, &st) == 0 && S_ISSOCK(st.st_mode) && connect(probe, ai.ai_addr, sizeof sa) != 0 &&
        errno == ECONNREFUSED) unlink(path);
    if (probe >= 0) close(probe);
    if (listen_at(&ai, false, proto, state) == NULL) return strerror(errno);
    log_info("listening on unix:%s", path);
    return NULL;
}

/* Listens on every address of this host; "" is every address there is. All get the
 * same port, also when the kernel is to choose one. NULL, or what went wrong. */
static const char *listen_tcp(const char *host, uint16_t port, bool tls, const struct proto *proto, const void *state) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *list;
    int error = getaddrinfo(*host != '\0' ? host : NULL, "0", &hints, &list), failed = EADDRNOTAVAIL;
    if (error != 0) return gai_strerror(error);
    for (struct addrinfo *ai = list; ai != NULL; ai = ai->ai_next) {
        if (ai->ai_family == AF_INET) ((struct sockaddr_in *)(void *)ai->ai_addr)->sin_port = htons(port);
        else ((struct sockaddr_in6 *)(void *)ai->ai_addr)->sin6_port = htons(port);
        struct conn *l = listen_at(ai, tls, proto, state);
        if (l == NULL && (errno == EAFNOSUPPORT || errno == EADDRNOTAVAIL)) continue;   /* no IPv6, say */
        failed = l == NULL ? errno : 0;
        if (l == NULL) break;
        port = l->peer.port;
        log_info("listening on %s%s", addr_text(&l->peer), tls ? " (TLS)" : "");
    }
    freeaddrinfo(list);
    return failed != 0 ? strerror(failed) : NULL;
}

/* ---- The end of a round. ---- */

/* `closed` of listeners. The file goes while the socket still answers: afterwards it
 * may be a successor's. */
static void listener_closed(struct conn *l) {
    struct sockaddr_un sa = {.sun_family = AF_UNSPEC};
    socklen_t len = sizeof sa - 1;
    if (l->peer.local && getsockname(l->fd, (struct sockaddr *)&sa, &len) == 0) unlink(sa.sun_path);
}

static void conn_free(struct conn *c) {
    SSL_free(c->ssl);
    close(c->fd);
    if (c->proto->freed != NULL) c->proto->freed(c);
    loop.conn[c->slot] = loop.conn[--loop.n];
    loop.conn[c->slot]->slot = c->slot;
    if (!c->parked) {   /* closing has taken it out of the epoll set, but not out of this */
        loop.pfd[c->place] = loop.pfd[--loop.n_polled];
        loop.polled[c->place] = loop.polled[loop.n_polled];
        if (loop.polled[c->place] != NULL) loop.polled[c->place]->place = c->place;
    }
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
    if (!c->closing && c->in.len > 0 && !conn_paused(c)) conn_feed_kept(c);   /* it was paused */
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
    while (loop.flush() || loop.dirty != NULL)
        for (struct conn *c; (c = loop.dirty) != NULL;) {
            loop.dirty = c->next;
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
    loop.flush();   /* what was said goes out before the goodbye */
    for (uint32_t i = 0; i < loop.n; i++) conn_close(loop.conn[i], "server is stopping");
}

static void conn_ready(struct conn *c, short events) {
    if ((events & POLLOUT) != 0) {
        c->blocked = false;
        conn_touch(c);
    }
    if ((events & ~POLLOUT) == 0 && c->ssl == NULL) return;   /* TLS may read after it wrote */
    if (c->proto->accepted != NULL) listener_ready(c);
    else conn_read(c);   /* for POLLHUP and POLLERR too: it tells what happened */
}

/* Runs until a signal, and then until everything has ended. A signal that comes just
 * before poll() is seen at the next tick. */
static void loop_run(void) {
    while (loop.n > 0 && (loop.stop_ms == 0 || now.ms < loop.stop_ms)) {
        int64_t wait_ms = loop.tick_ms - now.ms;
        int ready = poll(loop.pfd, loop.n_polled, wait_ms > 0 ? (int)wait_ms : 0);
        clock_read();
        for (uint32_t i = 0; ready > 0; i++) {   /* those accepted meanwhile stand behind */
            short events = loop.pfd[i].revents;
            if (events == 0) continue;
            ready--;
            if (loop.polled[i] != NULL) conn_ready(loop.polled[i], events);
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
 * Payload is unmasked where it lies, and checked as UTF-8 as it comes. A text that
 * arrived in one piece is handed on in the read buffer; only pieces are collected.
 * Parsing is strict: what HTTP once allowed and nobody sends (folded headers, bare line
 * feeds) is how requests are smuggled past proxies.
 *
 * Owns: the count of connections, in all and by address; the trusted proxies.
 * Calls: 1 Bytes, 3 Tables, 4 The loop. Called by: 7 Rooms, 9 Chat, 12 Page, 13 Main.
 * Promises: a close frame is sent before TCP ends, unless the peer has hung up.
 */

/* The headers that mean something to us; http_parse() has their names. Those before
 * CONNECTION may stand only once. */
enum header { HOST, LENGTH, ENCODING, WS_KEY, WS_VERSION, CONNECTION, UPGRADE, FORWARDED, HEADERS };

struct request {
    slice method, target, path;   /* path: target without the query */
    slice header[HEADERS];        /* S("") for what is missing */
    bool keep;                    /* the connection may go on after the answer */
    bool close, upgrade;          /* words of its Connection headers */
};

struct site {   /* what a listener serves: its `state`, and that of its HTTP connections */
    void (*request)(struct conn *c, const struct request *q);   /* answers by http_reply() */
    void (*upgraded)(struct conn *c);   /* sets proto, and a state that begins with struct ws */
};

struct ws {
    struct buf text;         /* the fragments of a message so far */
    uint64_t left;           /* payload of the current frame still to come */
    uint8_t mask[4], phase;  /* of that frame, and which byte of it comes next */
    struct utf8 utf8;
    uint16_t fragments;      /* of the current message */
    uint16_t close_code;     /* to close with; 0: nobody said */
    uint8_t opcode;
    bool fin, in_frame, in_text, peer_closed;
};

enum { WS_CONTINUATION, WS_TEXT, WS_BINARY, WS_CLOSE = 8, WS_PING, WS_PONG };

/* Close codes (section 7.4.1; those from 4000 on are ours). */
enum {
    WS_GOING_AWAY = 1001, WS_PROTOCOL_ERROR = 1002, WS_NOT_TEXT = 1003, WS_NO_CODE = 1005, WS_BAD_UTF8 = 1007,
    WS_POLICY = 1008, WS_TOO_BIG = 1009, WS_TRY_AGAIN = 1013, WS_SILENT = 4408
};

struct caller {   /* an address, and how many connections it has */
    uint8_t net[16];
    uint32_t n;
};

static struct {
    uint32_t connections, refused, n_proxies;
    int64_t logged_ms;   /* the last line about somebody who was refused */
    struct table callers;
    struct cidr {
        struct addr base;
        int64_t bits;
    } proxies[16];
} http;

static slice caller_key(const void *item) { return (slice){item, sizeof ((struct caller *)0)->net}; }

/* Counts this connection, in all and for its address, or no longer. False: its address
 * has too many. One person has one IPv4 address but 2^64 of IPv6: there a whole /64 is
 * one caller. */
static bool http_count(struct conn *c, bool enter) {
    struct caller wanted = {.n = 0}, *caller = NULL;
    bool by_address = opt.max_per_address > 0 && !c->peer.local;
    if (c->counted == enter) return true;
    memcpy(wanted.net, c->peer.ip, addr_is_v4(&c->peer) ? 16 : 8);
    if (by_address) caller = table_find(&http.callers, caller_key(&wanted));
    if (enter && caller != NULL && caller->n >= opt.max_per_address) return false;
    if (by_address && caller == NULL) {
        caller = memcpy(xcalloc(sizeof wanted), &wanted, sizeof wanted);
        table_add(&http.callers, caller);
    }
    c->counted = enter;
    http.connections = enter ? http.connections + 1 : http.connections - 1;
    if (caller != NULL) caller->n = enter ? caller->n + 1 : caller->n - 1;
    if (caller == NULL || caller->n > 0) return true;
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
    bool trusted = a->local;
    for (const struct cidr *p = http.proxies; p < http.proxies + http.n_proxies && !trusted; p++) {
        int64_t bit = 0;
        while (bit < p->bits && ((p->base.ip[bit / 8] ^ a->ip[bit / 8]) << bit % 8 & 0x80) == 0) bit++;
        trusted = bit == p->bits;
    }
    return trusted;
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

/* "GET /path HTTP/1.1": one space twice, a path, a version we know. */
static bool http_start(slice line, struct request *q) {
    q->method = slice_split(&line, ' ');
    q->target = slice_split(&line, ' ');
    slice rest = q->target;
    q->path = slice_split(&rest, '?');
    q->keep = slice_eq(line, S("HTTP/1.1"));
    return (q->keep || slice_eq(line, S("HTTP/1.0"))) && http_is_token(q->method) &&
           slice_starts(q->target, S("/")) && is_text(q->target, '!', '!');
}

/* Behind a proxy the client is the last in X-Forwarded-For that is no trusted proxy
 * itself; those in front of it are only what the client wrote. False: all are proxies. */
static bool http_client(slice list, struct addr *client) {
    for (struct addr hop; list.len > 0;) {
        size_t at = list.len;
        while (at > 0 && list.p[at - 1] != ',') at--;
        if (!addr_parse(slice_trim(slice_cut(list, at)), &hop)) return true;
        *client = hop;
        if (!http_trusts(&hop)) return true;
        list.len = at > 0 ? at - 1 : 0;
    }
    return false;
}

/* Reads a complete head, in which CR LF ends every line. NULL, or what is wrong. */
static const char *http_parse(slice head, struct request *q) {
    static const char *const names[HEADERS] = {
        "Host", "Content-Length", "Transfer-Encoding", "Sec-WebSocket-Key", "Sec-WebSocket-Version",
        "Connection", "Upgrade", "X-Forwarded-For",
    };
    slice line = slice_split(&head, '\n');
    if (!http_start(slice_take(line, line.len - 1), q)) return "bad request line\n";
    for (size_t i = 0; i < HEADERS; i++) q->header[i] = S("");
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
    bool body = q->header[LENGTH].len > 0 && !slice_eq(q->header[LENGTH], S("0"));
    if (body || q->header[ENCODING].len > 0) return "no body is taken here\n";
    if (q->header[HOST].len == 0 && q->keep) return "a Host header is needed\n";
    q->keep = q->keep && !q->close;
    return NULL;
}

/* The length of the head that starts at p, with its empty line; 0 if that has not come,
 * -1 if it can never be one. Looks at each byte once: a peer may drip them. */
static ssize_t http_head_end(struct conn *c, const char *p, size_t n) {
    struct request q;
    if (!http_is_token((slice){p, 1})) return -1;   /* a TLS hello, for example */
    for (size_t i = c->searched; i < n; i++) {
        if (p[i] == '\0' || (p[i] == '\n' && (i == 0 || p[i - 1] != '\r'))) return -1;
        if (p[i] == '\n' && i >= 3 && p[i - 2] == '\n') return (ssize_t)i + 1;
        if (p[i] == '\n' && memchr(p, '\n', i) == NULL && !http_start((slice){p, i - 1}, &q)) return -1;
    }
    c->searched = (uint32_t)n;
    return 0;
}

/* Queues a response; `extra` is header lines, each with its CR LF. The reader gets
 * --timeout, and a second for each KB, to take it and to ask again. */
static void http_reply(struct conn *c, const struct request *q, const char *status, slice extra, slice body) {
    buf_printf(&c->out, "HTTP/1.1 %s\r\nContent-Length: %zu\r\nConnection: %s\r\n%.*s\r\n", status, body.len,
               q->keep ? "keep-alive" : "close", F(extra));
    if (!slice_eq(q->method, S("HEAD"))) buf_add(&c->out, body);
    c->deadline_ms = now.ms + (int64_t)opt.timeout_s * 1000 + c->out.len;
    log_debug("%s: %.*s %.*s: %s", addr_text(&c->peer), F(q->method), F(q->target), status);
    conn_touch(c);
    if (!q->keep) conn_close(c, status);
}

#define PLAIN "Content-Type: text/plain\r\n"

/* Answers what is no request, or gets no further, and ends the connection: returns -1.
 * There is a line in the log, but not for each of many. */
static int http_refuse(struct conn *c, const char *status, slice extra, const char *why) {
    if (now.ms - http.logged_ms >= TICK_MS) {
        http.logged_ms = now.ms;
        log_info("%s: %s: %.*s", addr_text(&c->peer), status, (int)strlen(why) - 1, why);
    }
    http_reply(c, &(struct request){.method = S("-"), .target = S("-")}, status, extra, slice_of(why));
    return -1;
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
    memcpy(text, key.p, 24);
    memcpy(text + 24, "258EAFA5-E914-47DA-95CA-C5AB0DC85B11", 36);
    SHA1(text, sizeof text, hash);
    EVP_EncodeBlock(accept, hash, sizeof hash);
    buf_printf(&c->out, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
               "Connection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n", accept);
    conn_touch(c);
    site->upgraded(c);
    log_debug("%s: is a %s client", addr_text(&c->peer), c->proto->name);
    return 0;
}

static void http_enter(struct conn *c) {
    c->refused = !http_count(c, true);
    http.refused += c->refused ? 1 : 0;
}

/* `freed` of HTTP, and of what it was upgraded to: until then it holds a descriptor. */
static void http_freed(struct conn *c) {
    http_count(c, false);
    http.refused -= c->refused ? 1 : 0;
    c->refused = false;
}

static int http_answer(struct conn *c, const struct request *q) {
    const struct site *site = c->state;
    if (c->proxy) {   /* each request may come from somebody else */
        struct sockaddr_storage proxy = {.ss_family = AF_UNIX};
        socklen_t len = sizeof proxy;
        http_freed(c);
        if (getpeername(c->fd, (struct sockaddr *)&proxy, &len) == 0) c->peer = addr_of(&proxy);
        http_client(q->header[FORWARDED], &c->peer);
        http_enter(c);
    }
    if (c->refused || http.connections > opt.max_clients) {
        c->eof = true;   /* do not wait for the peer: it has nothing more to say */
        const char *status = c->refused ? "429 Too Many Requests" : "503 Service Unavailable";
        const char *why = c->refused ? "over --max-per-address\n" : "over --max-clients\n";
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
    if (end == 0) return 0;
    c->searched = 0;
    const char *why = end > 0 ? http_parse((slice){p, (size_t)end}, &q) : "this is not HTTP/1.1\n";
    if (why != NULL) return http_refuse(c, "400 Bad Request", S(PLAIN), why);
    return http_answer(c, &q) < 0 ? -1 : end;
}

static void http_tick(struct conn *c) {
    if (now.ms < c->deadline_ms) return;
    if (c->out.len > 0) conn_lost(c, "reads too slowly");
    else if (c->in.len == 0) conn_close(c, "nothing asked");
    else http_refuse(c, "408 Request Timeout", S(PLAIN), "the request took longer than --timeout\n");
}

static const struct proto http_proto = {
    .name = "http", .feed = http_feed, .tick = http_tick, .freed = http_freed,
};

static void http_accepted(struct conn *l, struct conn *c) {
    c->proto = &http_proto;
    c->state = l->state;
    c->proxy = http_trusts(&c->peer);
    if (!c->proxy) http_enter(c);
    /* Who is refused anyway must not hold a descriptor for long. */
    c->deadline_ms = now.ms + (c->refused ? TICK_MS : (int64_t)opt.timeout_s * 1000);
    if (c->refused && http.refused > REFUSED_MAX) conn_lost(c, "over --max-per-address");
}

static const struct proto http_listener = {
    .name = "listener", .accepted = http_accepted, .tick = conn_touch, .closed = listener_closed,
};

/* ---- Frames. ---- */

/* Appends a server's frame to a buffer: a connection's own, or a room's log. */
static void ws_append(struct buf *b, int opcode, slice payload) {
    unsigned char head[10] = {(unsigned char)(0x80 | opcode)};
    size_t more = payload.len < 126 ? 0 : payload.len < 65536 ? 2 : 8;
    uint64_t len = payload.len;
    head[1] = (unsigned char)(more == 0 ? len : more == 2 ? 126 : 127);
    for (size_t i = more; i > 0; i--, len >>= 8) head[1 + i] = (unsigned char)len;
    buf_add(b, (slice){(char *)head, 2 + more});
    buf_add(b, payload);
}

/* How many bytes of length follow the first two; and the length they give. */
static size_t ws_more(const unsigned char *u) { return (u[1] & 0x7f) == 126 ? 2 : (u[1] & 0x7f) == 127 ? 8 : 0; }

static uint64_t ws_length(const unsigned char *u) {
    uint64_t len = ws_more(u) > 0 ? 0 : u[1] & 0x7f;
    for (size_t i = 0; i < ws_more(u); i++) len = len << 8 | u[2 + i];
    return len;
}

/* The whole size of a frame that ws_append() wrote. */
static size_t ws_frame_size(const char *p) {
    const unsigned char *u = (const unsigned char *)p;
    return 2 + ws_more(u) + (size_t)ws_length(u);
}

/* Ends a WebSocket connection with a close frame; `why` is a literal, for the log and
 * for the peer. Returns -1. */
static int ws_close(struct conn *c, uint16_t code, const char *why) {
    if (!c->closing) ((struct ws *)c->state)->close_code = code;
    conn_close(c, why);
    return -1;
}

/* The last thing in `closed` of a WebSocket protocol: says goodbye, if anybody is left
 * to hear it, and frees what frames needed. */
static void ws_end(struct conn *c) {
    struct ws *ws = c->state;
    uint16_t code = ws->close_code != 0 ? ws->close_code : WS_GOING_AWAY;
    char payload[125] = {(char)(code >> 8), (char)(code & 0xff)};
    size_t n = code == WS_NO_CODE ? 0 : 2;
    if (!ws->peer_closed) n += (size_t)snprintf(payload + 2, sizeof payload - 2, "%s", c->why);
    if (!ws->peer_closed && ws->close_code != 0)
        log_info("%s: closed with %u: %s", addr_text(&c->peer), code, c->why);
    if (!c->lost && !c->eof) ws_append(&c->out, WS_CLOSE, (slice){payload, n});
    buf_free(&ws->text);
}

/* Sends a text to this client alone. */
static void ws_text(struct conn *c, slice text) {
    if (c->out.len > opt.backlog) ws_close(c, WS_TRY_AGAIN, "more than --backlog unread");
    if (!c->closing) ws_append(&c->out, WS_TEXT, text);
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
    const unsigned char *u = (const unsigned char *)p;
    if ((u[0] & 0x70) != 0 || (u[0] & 7) > 2) return ws_close(c, WS_PROTOCOL_ERROR, "reserved bit or opcode");
    if (n < 2) return 0;
    size_t more = ws_more(u);
    bool control = (u[0] & 8) != 0;
    ws->opcode = u[0] & 15;
    if ((u[1] & 0x80) == 0) return ws_close(c, WS_PROTOCOL_ERROR, "frame without a mask");
    if (control && (u[0] < 0x80 || more > 0)) return ws_close(c, WS_PROTOCOL_ERROR, "long or fragmented control");
    if (ws->opcode == WS_BINARY) return ws_close(c, WS_NOT_TEXT, "binary is not taken here");
    if (!control && (ws->opcode == WS_CONTINUATION) != ws->in_text)
        return ws_close(c, WS_PROTOCOL_ERROR, "fragment out of order");
    if (n < 2 + more) return 0;
    ws->left = ws_length(u);
    if ((more == 2 && ws->left < 126) || (more == 8 && (ws->left < 65536 || ws->left >> 63 != 0)))
        return ws_close(c, WS_PROTOCOL_ERROR, "length not in its shortest form");
    if (!control && (ws->left > opt.max_message || ws->left + ws->text.len > opt.max_message))
        return ws_close(c, WS_TOO_BIG, "message over --max-message");
    if (n < 6 + more) return 0;
    if (!control && ++ws->fragments > FRAGMENTS_MAX) return ws_close(c, WS_POLICY, "too many fragments");
    if (!control) ws->fin = (u[0] & 0x80) != 0, ws->in_frame = ws->in_text = true;
    memcpy(ws->mask, u + 2 + more, 4);
    ws->phase = 0;
    return (int)(6 + more);
}

/* Payload of a text, unmasked. A whole message in one piece is handed on where it is. */
static int ws_payload(struct conn *c, slice part) {
    struct ws *ws = c->state;
    ws->in_frame = ws->left > 0;
    bool complete = !ws->in_frame && ws->fin;
    if (!utf8_feed(&ws->utf8, part) || (complete && ws->utf8.missing > 0))
        return ws_close(c, WS_BAD_UTF8, "text is not UTF-8");
    if (!complete || ws->text.len > 0) buf_add(&ws->text, part);
    if (!complete) return 0;
    c->proto->message(c, ws->text.len > 0 ? buf_slice(&ws->text) : part);
    buf_free(&ws->text);
    ws->in_text = false;
    ws->fragments = 0;
    return 0;
}

/* The `feed` of every WebSocket protocol. */
static ssize_t ws_feed(struct conn *c, char *p, size_t n) {
    struct ws *ws = c->state;
    int head = ws->in_frame ? 0 : ws_head(c, p, n);
    if (head < 0 || (head == 0 && !ws->in_frame)) return head;
    p += head, n -= (size_t)head;
    size_t take = n < ws->left ? n : (size_t)ws->left;
    if (!ws->in_frame && take < ws->left) return 0;   /* a control frame: wait for all of it */
    for (size_t i = 0; i < take; i++) p[i] = (char)(p[i] ^ (char)ws->mask[ws->phase++ & 3]);
    ws->left -= take;
    int result = ws->in_frame ? ws_payload(c, (slice){p, take}) : ws_control(c, (slice){p, take});
    return result < 0 ? -1 : head + (ssize_t)take;
}

/* ==========================================================================
 * 6. History
 * ==========================================================================
 *
 * Who was away wants to read what was said, and what anybody has seen must not be
 * forgotten, not even by a server that is killed. So each room has a log of lines, one
 * JSON object each, just as they were sent; a position in it counts all bytes ever said:
 *
 *     DIR/rooms/lobby/0000000000000000.log    {"type":"say", ... "id":"9f0c33a1-00000000000000b4"}
 *                                             {"type":"say", ... "id":"9f0c33a1-0000000000000173"}
 *                     0000000000100043.log    {"type":"say", ... "id":"9f0c33a1-0000000000100102"}
 *
 * A file is named by the position of its first byte. The id of a message is the epoch,
 * a number that is another one whenever the log was opened, and the position just BEHIND
 * its line. So to find everything since an id is to read from there on, if the line in
 * front has that id; and a line says itself where it belongs: one that does not is
 * damaged, and skipped. Nothing else is stored. (Epochs matter when the end of a log was
 * lost, with the power say: other lines come to stand where clients saw the lost ones.)
 *
 * What was said in a round is written by one pwrite() at its end, before anybody is
 * sent it. If that fails, nothing was said, and the file is cut back. A crash can leave
 * one torn line at the end: it is cut off when the log is opened again.
 *
 * A file is open only while it is read or written, so a thousand rooms need no
 * descriptors, and one that somebody has deleted is noticed. Without --data the newest
 * lines of each room are kept in memory, in the same form.
 *
 * Owns: the files in --data, the logs. Calls: 1 Bytes, 2 JSON, 3 Tables.
 * Called by: 7 Rooms, 9 Chat, 13 Main.
 * Promises: what history_commit() has confirmed survives kill -9; with --fsync, the
 * loss of power too.
 */

enum { ID_BYTES = 25 };            /* 8 hex digits, '-', 16 hex digits */

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
    struct history *older, *newer; /* among those not in use, without --data */
    uint8_t key_len;
    char key[];                    /* "rooms/" or "users/", and a name */
};

static struct {
    int dir_fd;                        /* of --data, or -1 */
    struct table logs;
    struct history *oldest, *newest;   /* not in use, without --data */
    size_t idle;
    uint32_t epoch;                    /* without --data: part of that of all logs... */
    uint64_t forgotten;                /* ...so a new one begins behind all that are gone */
    const struct history *window_of;   /* the bytes read last: of this log... */
    uint64_t window_at;                /* ...from this position on */
    slice window;                      /* in `block`, or in the log's tail */
    struct buf block;
    uint32_t seen;                     /* history_ours(): the epoch of that line */
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

/* 16 hex digits; -1 for anything else, and for what no file can be as long as. */
static int64_t history_number(slice s) {
    int64_t high = s.len == 16 ? slice_number(slice_take(s, 8), 16) : -1;
    int64_t low = s.len == 16 ? slice_number(slice_cut(s, 8), 16) : -1;
    return high < 0 || high > INT32_MAX || low < 0 ? -1 : high << 32 | low;
}

/* ---- Files. ---- */

struct path {
    char text[480];
};

/* The path of the room's directory, or of a file in it. Letters, digits, '-' and '_'
 * stand for themselves, all else is %XX, so that no name leads out. One too long for
 * a file system is replaced by its hash. */
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
        SHA256((const unsigned char *)name.p, name.len, hash);
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
    histories.window_of = h;
    if (histories.dir_fd < 0) {
        histories.window_at = h->base;
        histories.window = buf_slice(&h->tail);
        return true;
    }
    uint64_t start = h->segment[history_file(h, from)];
    int fd = history_openat(history_file_path(h, start), O_RDONLY);
    if (histories.block.cap > READ_BYTES) buf_free(&histories.block);   /* a long line was in it */
    char *p = buf_room(&histories.block, n);
    ssize_t got = fd >= 0 ? pread(fd, p, n, (off_t)(from - start)) : -1;
    int error = got < 0 ? errno : ENOENT;
    if (fd >= 0) close(fd);
    histories.window_at = from;
    histories.window = (slice){p, got == (ssize_t)n ? n : 0};
    errno = error;
    return got == (ssize_t)n;
}

/* Finds the line that begins at a position, or if `back` the one that ends there, with
 * its line end. It lasts until the next call. What is longer than any line comes in
 * pieces. False: it cannot be read; if its file has gone, it is left out from now on. */
static bool history_line(struct history *h, uint64_t at, bool back, slice *line) {
    bool files = histories.dir_fd >= 0;
    size_t i = files ? history_file(h, back ? at - 1 : at) : 0;
    uint64_t low = files ? h->segment[i] : h->base, high = i + 1 < h->segments ? h->segment[i + 1] : h->end;
    for (size_t want = READ_BYTES;;) {
        slice w = histories.window;
        bool in = histories.window_of == h && (at > histories.window_at || (!back && at == histories.window_at)) &&
                  at <= histories.window_at + w.len;
        size_t split = in ? (size_t)(at - histories.window_at) : 0, n = 0;
        w = !in ? S("") : back ? slice_take(w, split) : slice_cut(w, split);
        if (back) while (n < w.len && (n == 0 || w.p[w.len - 1 - n] != '\n')) n++;
        else while (n < w.len && (n == 0 || w.p[n - 1] != '\n')) n++;
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

/* Is this a message of ours, which ends at this position? */
static bool history_ours(slice line, uint64_t end) {
    struct json_field id = {.name = "id"};
    char wanted[ID_BYTES + 1];
    size_t where;
    if (json_pick(line, &id, 1, &where) != NULL || id.raw.p == NULL || id.raw.len != ID_BYTES + 2) return false;
    int64_t epoch = slice_number((slice){id.raw.p + 1, 8}, 16);
    histories.seen = (uint32_t)epoch;
    history_id(histories.seen, end, wanted);
    return epoch >= 0 && json_is(id.raw, wanted);
}

/* The same, and the log is told if it is not. */
static bool history_whole(struct history *h, slice line, uint64_t end) {
    bool ours = history_ours(line, end);
    if (!ours && !h->damaged) log_warn("%.*s: damaged lines are left out; one ends at byte %llu of its history",
                                       F(history_key(h)), (unsigned long long)end);
    h->damaged = h->damaged || !ours;
    return ours;
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
    DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
    if (dir == NULL && fd < 0) return errno == ENOENT;
    if (dir == NULL) return close(fd), errno = ENOMEM, false;
    errno = 0;
    for (struct dirent *e; (e = readdir(dir)) != NULL; errno = 0) {
        slice name = slice_of(e->d_name);
        int64_t start = name.len == 20 ? history_number(slice_take(name, 16)) : -1;
        if (start < 0) continue;
        struct path path = history_file_path(h, (uint64_t)start);
        if (slice_eq(slice_of(strrchr(path.text, '/') + 1), name)) history_add_file(h, (uint64_t)start);
    }
    int error = errno;
    closedir(dir);
    if (h->segments > 0) qsort(h->segment, h->segments, sizeof *h->segment, history_compare);
    errno = error;
    return error == 0;
}

/* Finds where the log begins and ends: from the last gap to the last line end. False,
 * with errno, if that is not possible now. */
static bool history_measure(struct history *h) {
    struct stat st;
    slice line;
    for (size_t i = 0; i < h->segments; i++) {
        uint64_t start = h->segment[i];
        if (fstatat(histories.dir_fd, history_file_path(h, start).text, &st, 0) != 0) return false;
        h->end = start + (S_ISREG(st.st_mode) ? (uint64_t)st.st_size : 0);
        if (i + 1 == h->segments || h->end >= h->segment[i + 1]) continue;
        history_lose(h, start);
        i = (size_t)-1;   /* look at the others again */
    }
    uint64_t start = h->segments > 0 ? h->segment[h->segments - 1] : 0, end = h->end;
    h->base = h->segments > 0 ? h->segment[0] : 0;
    for (; h->end > start; h->end -= line.len) {
        if (!history_line(h, h->end, true, &line)) return false;
        if (line.p[line.len - 1] == '\n') break;
    }
    if (h->end == end) return true;
    histories.window_of = NULL;   /* it has bytes that go */
    struct path path = history_file_path(h, start);
    log_warn("%s: %llu bytes of a torn last line cut off", path.text, (unsigned long long)(end - h->end));
    int fd = history_openat(path, O_WRONLY);
    if (fd < 0 || ftruncate(fd, (off_t)(h->end - start)) != 0) log_warn("%s: %s", path.text, strerror(errno));
    if (fd >= 0) close(fd);
    return true;
}

/* Finds the newest message before a position: moves *at to where its line begins, which
 * lasts as history_line() says. False: there is none. */
static bool history_before(struct history *h, uint64_t *at, slice *line) {
    while (*at > h->base && history_line(h, *at, true, line)) {
        *at -= line->len;
        if (!history_whole(h, *line, *at + line->len)) continue;
        line->len--;   /* its line end */
        return true;
    }
    return false;
}

/* Finds the oldest message between two positions, and moves *at behind it. False:
 * there is none; if *at is not `upto` then, something has got lost. */
static bool history_next(struct history *h, uint64_t *at, uint64_t upto, slice *line) {
    while (*at >= h->base && *at < upto && history_line(h, *at, false, line)) {
        *at += line->len;
        if (!history_whole(h, *line, *at)) continue;
        line->len--;
        return true;
    }
    return false;
}

/* Takes a log in memory out of those that are not in use, or puts it there. */
static void history_idle(struct history *h, bool idle) {
    if (!idle) {
        *(h->older != NULL ? &h->older->newer : &histories.oldest) = h->newer;
        *(h->newer != NULL ? &h->newer->older : &histories.newest) = h->older;
    }
    h->older = idle ? histories.newest : NULL;
    h->newer = NULL;
    if (idle) *(h->older != NULL ? &h->older->newer : &histories.oldest) = h, histories.newest = h;
    histories.idle = idle ? histories.idle + 1 : histories.idle - 1;
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
    unsigned char hash[SHA256_DIGEST_LENGTH];
    if (h != NULL) return history_idle(h, false), h;
    h = xcalloc(sizeof *h + key.len);
    h->key_len = (uint8_t)key.len;
    memcpy(h->key, key.p, key.len);
    SHA256((const unsigned char *)key.p, key.len, hash);   /* the ids of two rooms are not alike */
    memcpy(&h->epoch, hash, sizeof h->epoch);
    h->epoch = h->newest_epoch = h->epoch ^ histories.epoch;
    h->base = h->end = h->newest = histories.forgotten;
    table_add(&histories.logs, h);
    h->unknown = histories.dir_fd >= 0 && !history_open_files(h);
    if (h->unknown) log_warn("--data: %.*s cannot be read: %s", F(key), strerror(errno));
    return h;
}

static void history_free(struct history *h) {
    if (histories.dir_fd < 0 && h->end > histories.forgotten) histories.forgotten = h->end;
    if (histories.window_of == h) histories.window_of = NULL;
    table_remove(&histories.logs, history_key(h));
    buf_free(&h->lines);
    buf_free(&h->tail);
    free(h->segment);
    free(h);
}

/* The room is empty. Files stay; of the logs in memory those used last do. */
static void history_close(struct history *h) {
    if (histories.dir_fd >= 0 || h->tail.len == 0 || h->tail.cap > 4 * MEMORY_BYTES) {
        history_free(h);
        return;
    }
    history_idle(h, true);
    if (histories.idle <= IDLE_LOGS) return;
    h = histories.oldest;
    history_idle(h, false);
    history_free(h);
}

/* ---- Writing. ---- */

/* Queues a line for this round's write. The text must not hold a line end; its id is
 * written into it at `id`, where there are ID_BYTES. */
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
    if (fd >= 0) close(fd);
    return ok;
}

/* Begins a new file at the end of the log. Returns it, or -1. */
static int history_create(struct history *h) {
    struct path dir = history_path(h, ""), spaces = dir, path = history_file_path(h, h->end);
    if (mkdirat(histories.dir_fd, dir.text, 0750) != 0 && errno != EEXIST) return -1;
    int fd = history_openat(path, O_WRONLY | O_CREAT | O_EXCL);
    *strchr(spaces.text, '/') = '\0';
    if (fd < 0 || (history_sync(dir) && history_sync(spaces))) {
        if (fd >= 0) history_add_file(h, h->end);
        return fd;
    }
    int error = errno;
    close(fd);
    unlinkat(histories.dir_fd, path.text, 0);
    errno = error;
    return -1;
}

/* Opens the file that is to be appended to, and makes sure it ends where it should.
 * Returns it, or -1. */
static int history_open_last(struct history *h) {
    uint64_t start = h->segments > 0 ? h->segment[h->segments - 1] : h->end;
    off_t size = (off_t)(h->end - start);
    struct stat st;
    if (h->segments == 0 || h->end - start >= opt.segment) return history_create(h);
    int fd = history_openat(history_file_path(h, start), O_WRONLY);
    if (fd < 0 && errno != ENOENT) return -1;
    if (fd >= 0 && fstat(fd, &st) == 0 && st.st_size >= size) {
        if (st.st_size == size || ftruncate(fd, size) == 0) return fd;
        close(fd);
        return -1;
    }
    if (fd >= 0) close(fd);
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
    int error = n >= 0 ? ENOSPC : errno;   /* which is what a short write means */
    bool ok = n == (ssize_t)lines.len;
    if (ok && opt.fsync && fdatasync(fd) != 0) ok = false, error = errno;
    if (!ok && ftruncate(fd, at) != 0) log_warn("%.*s: ftruncate: %s", F(history_key(h)), strerror(errno));
    close(fd);
    errno = error;
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
    if (!ok) return false;
    h->newest = h->end += h->lines.len;
    h->newest_epoch = h->epoch;
    if (histories.window_of == h && histories.dir_fd < 0) histories.window_of = NULL;
    if (histories.dir_fd < 0) buf_add(&h->tail, buf_slice(&h->lines));
    while (h->tail.len > MEMORY_BYTES) {
        slice tail = buf_slice(&h->tail), line = slice_split(&tail, '\n');
        if (tail.len == 0) break;   /* the newest is kept whatever its length */
        buf_drop(&h->tail, line.len + 1);
        h->base += line.len + 1;
    }
    if (h->tail.cap > 4 * MEMORY_BYTES && h->tail.len <= MEMORY_BYTES) {   /* a long line was in it */
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

/* The position in an id, or -1 if it is not that of a message here, or of one that stood
 * just in front of what is kept. */
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
    if ((first && (uint64_t)at == h->end) || !history_line(h, (uint64_t)at, !first, &line)) return -1;
    bool ours = history_ours(line, (uint64_t)at + (first ? line.len : 0));
    return ours && histories.seen == epoch ? at : -1;
}

/* Opens the data directory, unless `dir` is NULL, for this server alone. */
static void history_init(const char *dir) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET}, holder = lock;
    histories.logs.key = history_key;
    histories.dir_fd = -1;
    if (RAND_bytes((unsigned char *)&histories.epoch, sizeof histories.epoch) != 1) die("no random bytes");
    if (dir == NULL) return;
    if (mkdir(dir, 0750) != 0 && errno != EEXIST) die("--data %s: %s", dir, strerror(errno));
    histories.dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int fd = histories.dir_fd < 0 ? -1 : history_openat((struct path){"lock"}, O_RDWR | O_CREAT);
    if (fd < 0) die("--data %s: %s", dir, strerror(errno));
    if (fcntl(fd, F_SETLK, &lock) != 0) {   /* it stays locked as long as it stays open */
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
 * A message to a room of a hundred could be put into a hundred queues. That is a
 * hundred copies, and a long queue for every slow reader. Instead a room is a LOG of
 * encoded frames, and a member is a CURSOR in it:
 *
 *        dropped      kept: at most --backlog bytes
 *     - - - - - - +-------+-------+---------+-------+-------+
 *                 | frame | frame | frame   | frame | frame |
 *     - - - - - - +-------+-------+---------+-------+-------+
 *                 ^           ^             ^               ^ end
 *                 Carl        Bob           Ann is on       Dora and 96 others
 *                                           her way         have everything
 *
 * To broadcast is to append one frame, once. After the handlers of a round have run,
 * each member gets one send() from its cursor to the end, however many messages came.
 * When all cursors are at the end, the log is empty again.
 *
 * A slow member costs its cursor and holds nobody back. When the log would grow past
 * --backlog its front is dropped, and who had not read that part is closed with 1013:
 * it comes back.
 *
 * Private frames (an answer, a ping) wait in the connection's own queue and go first.
 * But TCP may take half a frame, and nothing may come between its halves: then the
 * other half is moved to the private queue, and the cursor stands between frames again.
 *
 * What is to be remembered is a line of history first (chapter 6). At the end of the
 * round it is stored, and only then is it a frame in the log, which may be sent. If it
 * cannot be stored, its author is told, and nobody has seen it.
 *
 * A member who was away begins in the past: it is sent the history up to the moment
 * when it came, piece by piece as it reads, and then the log from that moment on. So
 * nothing is missed and nothing comes twice, whatever is said meanwhile.
 *
 * A client may be in several rooms, with one member, one cursor, for each. Private
 * messages to a user are a room too, in a name space of its own: the user's inbox, in
 * which all connections of the user are, and nobody else.
 *
 * Owns: the rooms, their logs, who is in which.
 * Calls: 1 Bytes, 3 Tables, 4 The loop, 5 HTTP and WebSocket, 6 History.
 * Called by: 9 Chat, 13 Main.
 * Promises: all members of a room see the same messages in the same order.
 */

struct room {
    struct history *past;         /* what was said here */
    struct buf log;               /* encoded frames */
    uint64_t end;                 /* its end, counted from the first byte ever said here */
    uint64_t flushed;             /* what `end` was when members were last sent to */
    struct member *first, *last;  /* in order of joining */
    struct room *next_grown;
    bool grown;                   /* is in rooms.grown */
    uint8_t key_len;
    char key[];                   /* "rooms/" or "users/", and a name */
};

struct member {
    struct conn *c;
    struct room *room;
    uint64_t cursor;              /* sent up to here, on the scale of room->end */
    struct replay {
        uint64_t at, upto;
    } *replay;                    /* or NULL: what it is sent first, in the room's history */
    struct member *prev, *next;   /* in the room */
    struct member *also;          /* the same client's place in another room */
};

static struct {
    struct table by_name;
    struct room *grown;           /* have something to send, or nobody to send to */
    void (*unsaid)(slice text);   /* chapter 9's: this could not be stored */
} rooms;

static slice room_key(const void *item) {
    const struct room *r = item;
    return (slice){r->key, r->key_len};
}

static slice room_name(const struct room *r) { return slice_cut(room_key(r), 6); }

/* What this member was not sent yet. */
static slice member_unread(const struct member *m) {
    slice log = buf_slice(&m->room->log);
    return slice_cut(log, log.len - (size_t)(m->room->end - m->cursor));
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
    m->cursor += frames;
    /* Who catches up later, between flushes, may be the last to do so. */
    if (m->cursor == m->room->end && m->room->flushed == m->room->end) room_touch(m->room);
}

/* Drops what every member was sent. An empty log gives its memory back. */
static void room_trim(struct room *r) {
    uint64_t least = r->end;
    for (struct member *m = r->first; m != NULL; m = m->next)
        if (m->cursor < least) least = m->cursor;
    buf_drop(&r->log, r->log.len - (size_t)(r->end - least));
    if (r->log.len == 0) buf_free(&r->log);
}

static void room_flush(struct room *r) {
    for (struct member *m = r->first; m != NULL; m = m->next) conn_flush(m->c);
    r->flushed = r->end;
    room_trim(r);
}

/* Makes room for `need` bytes in the log. If a lot has come in this round everybody is
 * sent it now, so that only the slow can be far behind; and if it is still too much,
 * the front goes, with those who have not read it. */
static void room_make_room(struct room *r, size_t need) {
    size_t keep = need > opt.backlog ? 0 : opt.backlog - need;
    if (r->end - r->flushed + need > opt.backlog / 4) room_flush(r);
    if (r->log.len <= keep) return;
    for (struct member *m = r->first; m != NULL; m = m->next) {
        if (m->cursor >= r->end - keep) continue;
        m->cursor = r->end;
        ws_close(m->c, WS_TRY_AGAIN, "more than --backlog behind in a room");
    }
    room_trim(r);
}

static void room_append(struct room *r, slice text) {
    room_make_room(r, text.len + 10);
    size_t before = r->log.len;
    ws_append(&r->log, WS_TEXT, text);
    r->end += r->log.len - before;
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
    }
    history_forget(r->past);
    return ok;
}

/* The loop calls this in every round; true if there was something to do. */
static bool rooms_flush(void) {
    bool any = rooms.grown != NULL;
    while (rooms.grown != NULL) {
        struct room *r = rooms.grown;
        rooms.grown = r->next_grown;
        room_commit(r);
        r->grown = false;
        room_flush(r);
        if (r->first != NULL) continue;
        table_remove(&rooms.by_name, room_key(r));
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

/* Puts what is unread into the client's own queue. Who is still being sent the past
 * will find it there: what else it was has no meaning for one who comes again or goes.
 * Who is closing gets nothing, since there may be a gap in front of it. */
static void member_settle(struct member *m) {
    if (m->replay != NULL) m->replay->upto = m->room->past->end;
    else if (!m->c->closing) buf_add(&m->c->out, member_unread(m));
    m->cursor = m->room->end;
    conn_touch(m->c);
}

/* Says a text that only matters now: one frame, appended once. `except`, if not NULL,
 * is a member who does not get it. */
static void room_publish(struct room *r, slice text, struct member *except) {
    room_commit(r);
    if (except != NULL) member_settle(except);
    room_append(r, text);
    if (except != NULL) except->cursor = r->end;
}

/* The room of this name, made if need be; NULL when there are --max-rooms. `space` is
 * "rooms/", or "users/" for an inbox. It lasts until the end of a round in which nobody
 * is in it. */
static struct room *room_open(slice space, slice name) {
    char text[TABLE_KEY_MAX];
    slice key = {text, space.len + name.len};
    assert(name.len <= ROOM_MAX_BYTES && space.len == 6);
    memcpy(text, space.p, space.len);
    memcpy(text + space.len, name.p, name.len);
    struct room *r = table_find(&rooms.by_name, key);
    if (r != NULL || rooms.by_name.n >= opt.max_rooms) return r;
    r = xcalloc(sizeof *r + key.len);
    r->key_len = (uint8_t)key.len;
    memcpy(r->key, key.p, key.len);
    r->past = history_open(key);
    table_add(&rooms.by_name, r);
    room_touch(r);
    return r;
}

/* Puts a client into a room: it hears what is said from now on. Returns its place
 * there, which lasts until room_leave(), or NULL if it is in too many rooms. */
static struct member *room_join(struct room *r, struct conn *c) {
    size_t n = 0;
    struct member **at = &c->joined;
    for (; *at != NULL; at = &(*at)->also) n++;
    if (n >= ROOMS_PER_CLIENT) return NULL;
    room_commit(r);
    struct member *m = *at = xcalloc(sizeof *m);
    *m = (struct member){.c = c, .room = r, .cursor = r->end, .prev = r->last};
    *(r->last != NULL ? &r->last->next : &r->first) = m;
    r->last = m;
    return m;
}

/* Has a member sent the history from this position on, before all else; or, if there is
 * none, no longer. */
static void member_replay(struct member *m, uint64_t at, bool any) {
    if (any) m->replay = xrealloc(m->replay, sizeof *m->replay);
    else free(m->replay), m->replay = NULL;
    if (any) *m->replay = (struct replay){at, m->room->past->end};
    conn_touch(m->c);
}

/* Takes a client out of a room, and frees its place. What was said before is still
 * sent to it, unless its connection is closing, or it was still in the past. */
static void room_leave(struct member *m) {
    struct room *r = m->room;
    struct member **at = &m->c->joined;
    room_commit(r);
    member_settle(m);
    while (*at != m) at = &(*at)->also;
    *at = m->also;
    *(m->prev != NULL ? &m->prev->next : &r->first) = m->next;
    *(m->next != NULL ? &m->next->prev : &r->last) = m->prev;
    room_touch(r);
    free(m->replay);
    free(m);
}

/* ==========================================================================
 * 9. Chat
 * ==========================================================================
 *
 * What people see: names, rooms, messages. Each WebSocket text is one JSON object:
 *
 *     client --> server                         server --> client
 *     login   client_name, room_id,             login   client_id, client_name, time
 *             since or history                          (and client_list: it is you)
 *     say     to_client_id or to_uid,           say     from_client_id, content, ...
 *             to_client_name, content                   and an id, if it is kept
 *     history before, count                     history messages, more
 *     logout                                    logout  from_client_id, ...
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
 * Owns: the clients and their ids. Calls: all above. Called by: 12 Page, 13 Main.
 * Promises: bad input hurts nobody but its sender.
 */

struct client {
    struct ws ws;           /* must be first */
    struct conn *c;
    struct member *seat;    /* in the room it speaks in; NULL before login */
    struct member *inbox;   /* its place in its user's inbox, or NULL */
    char *uid;              /* the user it has proved to be, owned, or NULL; set before login */
    char *name;             /* HTML, owned; NULL before login */
    int64_t filled_ms;      /* when tokens were last added */
    int32_t tokens;         /* thousandths of messages it may send now: chat_allow() */
    uint32_t silences;      /* times --ping since it was last heard */
    char id[21];
};

/* The fields we look at; chat_message() has their names in the same order. */
enum field {
    TYPE, REF, CLIENT_NAME, ROOM_ID, TO_CLIENT_ID, TO_UID, TO_CLIENT_NAME, CONTENT,
    SINCE, INBOX_SINCE, HISTORY, BEFORE, COUNT, FIELDS
};

static struct {
    struct table clients;          /* by id */
    uint32_t last_number;
    uint16_t port;                 /* part of every id */
    struct json_field f[FIELDS];   /* of the message at hand */
    slice ref;                     /* its ref, raw JSON, or empty */
    struct buf text, html, name;   /* decoded fields */
    struct buf json;               /* the answer being written */
} chat;

static slice client_key(const void *item) { return (slice){((const struct client *)item)->id, 20}; }

/* The client of this id, or NULL. */
static struct client *client_find(slice id) { return id.len == 20 ? table_find(&chat.clients, id) : NULL; }

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
    json_add(&chat.json, id_name, client_key(cl));
    json_add(&chat.json, name_name, slice_of(cl->name));
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
    buf_add(b, S("{\"type\":\"history\""));
    json_add(b, inbox ? "to_uid" : "room_id", room_name(r));
    buf_add(b, S(",\"messages\":["));
}

static void past_add(struct buf *b, slice line) {
    if (b->p[b->off + b->len - 1] != '[') buf_addc(b, ',');
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

/* Sends the newest `count` messages before a position, in one message. */
static void chat_send_last(struct client *cl, uint64_t before, int64_t count, bool asked) {
    const struct room *r = cl->seat->room;
    struct buf lines = {0}, json = {0};   /* the newest first, as they are found */
    size_t len[HISTORY_MAX], n = 0;
    slice line;
    bool more;
    while ((more = history_before(r->past, &before, &line)) && n < (size_t)count &&
           (n == 0 || lines.len + line.len <= HISTORY_BYTES)) {
        buf_add(&lines, line);
        len[n++] = line.len;
    }
    past_begin(&json, r);
    for (size_t end = lines.len; n-- > 0;) {
        end -= len[n];
        past_add(&json, slice_take(slice_cut(buf_slice(&lines), end), len[n]));
    }
    past_end(&json, more);
    if (asked && chat.ref.len > 0) json_name(&json, "ref");
    if (asked) buf_add(&json, chat.ref);
    buf_addc(&json, '}');
    ws_text(cl->c, buf_slice(&json));
    buf_free(&lines);
    buf_free(&json);
}

/* The position of the id in a field; -1 if it is none of this room. */
static int64_t past_position(const struct room *r, enum field field) {
    slice raw = chat.f[field].raw;
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
    slice line;
    if (cl->seat == NULL) return chat_error(cl, "not_logged_in", "history needs a login first");
    if (!chat_count(cl, COUNT, 1, 50, &count)) return false;
    struct room *r = cl->seat->room;
    room_commit(r);
    bool from_end = chat.f[BEFORE].raw.p == NULL;
    int64_t at = from_end ? (int64_t)r->past->end : past_position(r, BEFORE);
    if (at < 0) return chat_error(cl, "bad_field", "before must be the id of a message of this room");
    uint64_t before = (uint64_t)at;
    if (!from_end) history_before(r->past, &before, &line);   /* an id stands behind its message */
    chat_send_last(cl, before, count, true);
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
    struct room *inbox = cl->uid != NULL ? room_open(S("users/"), slice_of(cl->uid)) : NULL;
    if (inbox != NULL && !inbox->past->unknown && cl->inbox == NULL) cl->inbox = room_join(inbox, cl->c);
    chat_begin(S("login"));
    chat_add_from(cl, "client_id", "client_name");
    chat_add_time();
    room_publish(r, chat_end(), cl->seat);
    if (cl->seat == NULL) cl->seat = room_join(r, cl->c);
    chat.json.len--;   /* open the object again: now the copy for the client */
    int64_t at = past_position(r, SINCE);
    int64_t inbox_at = cl->inbox != NULL ? past_position(cl->inbox->room, INBOX_SINCE) : -1;
    past_add_newest(r, SINCE, at, "id", "recovered");
    if (cl->inbox != NULL) past_add_newest(cl->inbox->room, INBOX_SINCE, inbox_at, "inbox_id", "inbox_recovered");
    json_name(&chat.json, "client_list");
    buf_addc(&chat.json, '{');
    for (struct member *m = r->first; m != NULL; m = m->next) {
        const struct client *other = m->c->state;
        json_add(&chat.json, other->id, slice_of(other->name));
    }
    buf_addc(&chat.json, '}');
    ws_text(cl->c, chat_end_ref());
    past_resume(cl->seat, SINCE, at);
    if (cl->inbox != NULL) past_resume(cl->inbox, INBOX_SINCE, inbox_at);
    if (newest < 0 || chat.f[SINCE].raw.p != NULL) return;
    member_replay(cl->seat, 0, false);   /* it no longer wants what it asked for before */
    chat_send_last(cl, r->past->end, newest, false);
}

static bool chat_login(struct client *cl) {
    if (!chat_field(cl, CLIENT_NAME, &chat.name, NAME_MAX_BYTES)) return false;
    if (!chat_field(cl, ROOM_ID, &chat.text, ROOM_MAX_BYTES)) return false;
    int64_t newest;
    if (!chat_count(cl, HISTORY, 0, -1, &newest)) return false;
    slice room = buf_slice(&chat.text);
    if (room.len == 0 || slice_eq(room, S("0")))
        return chat_error(cl, "bad_field", "room_id must name a room, and not be empty or 0");
    struct room *r = room_open(S("rooms/"), room);
    if (r == NULL) return chat_error(cl, "limit", "there are already %u rooms (--max-rooms)", opt.max_rooms);
    if (r->past->unknown) return chat_error(cl, "storage", "the history of this room cannot be read now");
    if (cl->seat != NULL && cl->seat->room != r) chat_leave(cl);
    buf_clear(&chat.html);
    html_escape(&chat.html, buf_slice(&chat.name), false);
    buf_addc(&chat.html, '\0');
    cl->name = xrealloc(cl->name, chat.html.len);
    memcpy(cl->name, buf_slice(&chat.html).p, chat.html.len);
    chat_enter(cl, r, newest);
    return true;
}

static bool chat_logout(struct client *cl) {
    if (cl->seat == NULL) return chat_error(cl, "not_logged_in", "logout needs a login first");
    chat_leave(cl);
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
    if (cl->uid != NULL) json_add(&chat.json, "from_uid", slice_of(cl->uid));
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
    buf_clear(&chat.text);
    json_text(chat.f[TO_CLIENT_ID].raw, &chat.text);
    struct client *to = client_find(buf_slice(&chat.text));
    if (to == NULL || to->c->closing)
        return chat_error(cl, "no_such_client", "to_client_id: nobody of that id is here");
    if (!chat_field(cl, TO_CLIENT_NAME, &chat.name, 0) || !chat_field(cl, CONTENT, &chat.text, 0)) return false;
    chat_write_say(cl, "to_client_id", client_key(to), says_to_you);
    ws_text(to->c, chat_end());
    chat_echo(cl, "to_client_id", client_key(to), NULL);
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

/* A token bucket: --rate tokens a second flow in, up to --burst; a message takes one,
 * a refused one too, and who digs on below minus --burst is shown out. */
static bool chat_allow(struct client *cl) {
    if (opt.rate == 0) return true;
    int64_t full = (int64_t)opt.burst * 1000, tokens = cl->tokens + (now.ms - cl->filled_ms) * opt.rate;
    cl->tokens = (int32_t)(tokens < full ? tokens : full) - 1000;
    cl->filled_ms = now.ms;
    if (cl->tokens >= 0) return true;
    if (cl->tokens >= -full)
        return chat_error(cl, "rate_limited", "dropped: more than %u messages a second (--rate)", opt.rate);
    ws_close(cl->c, WS_POLICY, "over --rate for too long");
    return false;
}

static void chat_message(struct conn *c, slice text) {
    static const char *const names[FIELDS] = {
        "type", "ref", "client_name", "room_id", "to_client_id", "to_uid", "to_client_name", "content",
        "since", "inbox_since", "history", "before", "count",
    };
    struct client *cl = c->state;
    size_t at;
    for (size_t i = 0; i < FIELDS; i++) chat.f[i] = (struct json_field){.name = names[i]};
    const char *why = json_pick(text, chat.f, FIELDS, &at);
    slice ref = chat.f[REF].raw, type = chat.f[TYPE].raw;
    for (size_t i = TO_CLIENT_ID; i < FIELDS; i++)   /* null is as good as nothing */
        if (chat.f[i].raw.p != NULL && *chat.f[i].raw.p == 'n') chat.f[i].raw = (slice){0};
    buf_clear(&chat.text);
    bool ref_ok = why != NULL || ref.p == NULL ||
                  (*ref.p == '"' && json_text(ref, &chat.text) && chat.text.len <= REF_MAX_BYTES);
    chat.ref = why == NULL && ref.p != NULL && ref_ok ? ref : S("");
    if (!chat_allow(cl)) return;
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
    int64_t silences = (now.ms - c->heard_ms) / ((int64_t)opt.ping_s * 1000);
    bool ask = silences > cl->silences;
    cl->silences = (uint32_t)silences;
    if (silences >= 3) ws_close(c, WS_SILENT, "silent for too long");
    else if (ask) {
        ws_append(&c->out, WS_PING, S(""));
        ws_text(c, S("{\"type\":\"ping\"}"));
    }
}

static void chat_closed(struct conn *c) {
    struct client *cl = c->state;
    if (cl->seat != NULL) chat_leave(cl);
    if (cl->inbox != NULL) room_leave(cl->inbox);
    table_remove(&chat.clients, client_key(cl));
    ws_end(c);
    free(cl->uid);
    free(cl->name);
    free(cl);
    c->state = NULL;
}

static const struct proto chat_proto = {
    .name = "chat", .feed = ws_feed, .message = chat_message, .tick = chat_tick, .closed = chat_closed,
    .freed = http_freed, .refill = chat_refill, .peek = room_peek, .sent = room_sent,
};

/* `upgraded` of the chat's site: this connection is a client from now on. */
static void chat_upgraded(struct conn *c) {
    struct client *cl = xcalloc(sizeof *cl);
    *cl = (struct client){.c = c, .tokens = (int32_t)opt.burst * 1000, .filled_ms = now.ms};
    do snprintf(cl->id, sizeof cl->id, "7f000001%04x%08x", chat.port, ++chat.last_number);
    while (client_find(client_key(cl)) != NULL);
    table_add(&chat.clients, cl);
    c->state = cl;
    c->proto = &chat_proto;
}

/* `port` goes into the ids; the address is that of this machine to itself. */
static void chat_init(uint16_t port) {
    chat.clients.key = client_key;
    chat.port = port;
    if (RAND_bytes((unsigned char *)&chat.last_number, sizeof chat.last_number) != 1) die("no random bytes");
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
 * Calls:     1 Bytes, 5 HTTP and WebSocket, 9 Chat
 * Called by: 13 Main
 * Promises:  no path ever reaches the file system
 */

static const char *const page_lines[] = {
    "<!DOCTYPE html>",
    "<html lang='en'><head><meta charset='utf-8'><title>xchat</title>",
    "<meta name='viewport' content='width=device-width, initial-scale=1'>",
    "<link rel='icon' href='data:,'><style>",
    ":root { color-scheme: light dark; --back: #f2f4f8; --card: #fff; --text: #1b2330; --soft:",
    "  #56606f; --line: #d3dae5; --accent: #1d5fc0; --on: #fff; --own: #d5e6ff; --private: #eadcff;",
    "  --warn: #ffefcc; --bad: #a5201a }",
    "@media (prefers-color-scheme: dark) { :root { --back: #12161c; --card: #1e252f; --text:",
    "  #e7ebf1; --soft: #b4bdcb; --line: #3a4553; --accent: #8ab8ff; --on: #0b1a30; --own: #1d3d69;",
    "  --private: #443066; --warn: #4a3810; --bad: #ffb4ab } }",
    "* { box-sizing: border-box; margin: 0 } [hidden], .head > :empty { display: none !important }",
    ":focus-visible { outline: 3px solid var(--accent); outline-offset: -2px }",
    ":disabled { opacity: .6; cursor: default }",
    "body { display: grid; grid: auto minmax(0, 1fr) / minmax(0, 1fr) 16rem; height: 100dvh; font:",
    "  16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; color: var(--text); background:",
    "  var(--back) }",
    "header, aside, form, dialog, .line, button, input, textarea, #faces { color: inherit;",
    "  background: var(--card); border: 0 solid var(--line); border-radius: 0 }",
    "button, input, textarea { font: inherit; border-width: 1px; border-radius: .6rem; padding:",
    "  .4rem .8rem; min-width: 0 }",
    "button:enabled, summary { cursor: pointer }",
    ".main { background: var(--accent); border-color: var(--accent); color: var(--on) }",
    "header, #net, #to { display: flex; align-items: center; gap: .6rem; padding: 0 1rem }",
    "header { grid-column: 1 / -1; border-width: 0 0 1px; padding: .5rem 1rem }",
    "h1, #status, #whom { flex: 1; font-size: inherit } h1, a { color: var(--accent) }",
    "main { display: flex; flex-direction: column; min-height: 0 }",
    "#talk { flex: 1; overflow: hidden auto; overflow-anchor: none; padding: 1rem }",
    ".line { width: fit-content; max-width: min(85%, 42rem); margin-bottom: .6rem; padding: .4rem",
    "  .9rem .5rem; border-radius: .3rem 1rem 1rem; box-shadow: 0 1px 2px #0002 }",
    ".own { margin-left: auto; background: var(--own); border-radius: 1rem .3rem 1rem 1rem }",
    ".private { background: var(--private) } .pending { opacity: .6; outline: 1px dashed }",
    ".text { white-space: pre-wrap; unicode-bidi: plaintext } time { white-space: nowrap }",
    ".head, .system, #to { font-size: .85rem; color: var(--soft) }",
    ".head > * { margin-right: .6rem } .head > bdi, summary { font-weight: 600 }",
    ".system { text-align: center; margin-bottom: .6rem } #net { background: var(--warn) }",
    ".why { color: var(--bad) } #status:not(:empty) { padding: .8rem 0 }",
    "#composer { display: grid; grid: auto auto / 1fr auto; gap: .4rem .6rem; align-items: end;",
    "  padding: .4rem 1rem .8rem; border-width: 1px 0 0; position: relative }",
    "#to { grid-column: 1 / -1; padding: 0 .6rem; border-radius: .6rem; min-height: 2.6rem }",
    "textarea { max-height: 35vh; resize: none; field-sizing: content } summary { padding: .5rem }",
    "#faces button { width: 3.2rem; border: 0; font-size: 1.2rem }",
    "#faces { position: absolute; right: 1rem; bottom: 100%; width: 13.5rem; border-width: 1px }",
    "aside { overflow-y: auto; padding: .5rem; border-width: 0 0 0 1px }",
    "ul { list-style: none; padding: 0 0 .5rem }",
    "li button { width: 100%; border: 0; text-align: start }",
    "li button:enabled:hover, [aria-current] { background: var(--own) }",
    "dialog { margin: auto; padding: 1.5rem; border-radius: 1rem; width: min(22rem, 90vw) }",
    "dialog form, dialog label { display: grid; gap: .8rem }",
    "@media (max-width: 700px) { body { grid: auto auto minmax(0, 1fr) / minmax(0, 1fr) } aside {",
    "  grid-row: 2; display: grid; grid: auto / 1fr 1fr; max-height: 50vh; padding: 0 .5rem;",
    "  border-width: 0 0 1px } aside [open] { grid-column: 1 / -1 } }",
    "</style></head><body>",
    "<header><h1 id='where'>xchat</h1><button id='me' type='button'>Your name</button></header>",
    "<main><div id='talk' role='region' tabindex='0'></div>",
    "<div id='net'><p id='status' role='status'></p>",
    "<button id='retry' type='button' hidden>Try now</button></div>",
    "<form id='composer'><div id='to'><label id='whom' for='text'></label>",
    "<button id='all' type='button' hidden>To everyone</button>",
    "<details><summary>Emoji</summary><div id='faces'>&#x1f600;&#x1f602;&#x1f60a;&#x1f60d;",
    "&#x1f60e;&#x1f914;&#x1f622;&#x1f621;&#x1f44d;&#x1f44f;&#x1f64f;&#x1f389;</div>",
    "</details></div><textarea id='text' rows='1'></textarea>",
    "<button id='send' class='main' disabled>Send</button></form></main>",
    "<aside><details><summary>Rooms</summary><ul id='rooms'></ul></details>",
    "<details><summary><span>Members</span> <span id='count'></span></summary>",
    "<ul id='members'></ul></details></aside>",
    "<dialog id='hello' aria-labelledby='title'><form method='dialog'>",
    "<h2 id='title'>Join the chat</h2><label><span>Your name</span>",
    "<input id='name' required pattern='.*[^ ].*' autocomplete='nickname'></label>",
    "<label><span>Room</span><input id='room' required></label>",
    "<p id='why' class='why' role='alert'></p><button class='main' value='go'>Enter</button>",
    "</form></dialog>",
    "<script>",
    "'use strict';",
    "const ZH = {",
    "  'Try now': '重试', 'Emoji': '表情', 'Send': '发送', 'Rooms': '房间', 'Members': '成员',",
    "  'Other room...': '其他房间…', 'Join the chat': '加入聊天', 'Your name': '你的名字',",
    "  'Room': '房间', 'Enter': '进入', ' (you)': '（你）', 'Room %': '房间 %',",
    "  '% came in': '% 进来了', '% left': '% 离开了', 'To everyone': '对所有人说',",
    "  'Private to %': '悄悄对 % 说', 'Not sent: ': '没有发出：', 'Edit again': '重新编辑',",
    "  'Messages': '消息', 'Connecting...': '正在连接…', 'connection lost': '连接断开',",
    "  'Offline: your text is kept.': '离线，文字会保留',",
    "  'Connection closed: ': '连接被服务器关闭：', 'too long': '太长了',",
    "  'has left': '对方已经离开', 'too fast': '说得太快了', 'cannot be saved': '服务器无法保存',",
    "  'Some messages are gone.': '有些消息已经丢失',",
    "};",
    "const PLAIN = { too_long: 'too long', no_such_client: 'has left', rate_limited: 'too fast',",
    "  storage: 'cannot be saved' };",
    "const zh = /^zh/i.test(navigator.language), t = text => zh && ZH[text] || text;",
    "const $ = id => document.getElementById(id);",
    "const [clock, calendar] = [undefined, 'medium'].map(dateStyle =>",
    "  new Intl.DateTimeFormat(navigator.language, { dateStyle, timeStyle: 'short' }));",
    "const ALL = { id: 'all', name: 'all' }, MAX_LINES = 500, ROOMS = ['1', '2', '3', '4'];",
    "const wide = matchMedia('(min-width: 701px)');",
    "const NO_RETRY = [1002, 1003, 1007, 1009, 4001];   // our fault, or thrown out: stay away",
    "const CHARS = { amp: 38, lt: 60, gt: 62, quot: 34, '#039': 39 };",
    "let ws, timer, heard, tries = 0;      // connection, next attempt, last word, attempts so far",
    "let ready = false, start, me;         // in a room and up to date, since when, our client id",
    "let want, asked, here, to = ALL;      // { name, room } wished, asked for, granted; the ear",
    "// A room's log: its lines; pending: ref -> { line, to, d }, said and not yet heard back;",
    "// last: the id to resume from; more: whether there are older ones than those on the page.",
    "const newLog = () => ({ box: make('div', ''), pending: new Map() });",
    "let log = newLog(), older = '', shift = 0, atEnd = true, lastTop = 0, unread = 0;",
    "const members = new Map(), logs = new Map(), mine = new Set();   // by id, by room, own ids",
    "let store = {};                       // where storage is forbidden nothing is remembered",
    "try { store = localStorage; } catch (e) { /* as said */ }",
    "// Text: what people write becomes text nodes, never markup.",
    "function make(tag, cls, ...kids) {",
    "  const e = Object.assign(document.createElement(tag), { className: cls });",
    "  e.append(...kids);",
    "  return e;",
    "}",
    "function button(onclick, ...kids) {",
    "  return Object.assign(make('button', '', ...kids), { type: 'button', onclick });",
    "}",
    "function decode(html) {               // takes back the escaping, and the mark at a line end",
    "  return html.replace(/<br [/]>(\\r\\n?|\\n\\r?)?/g, '\\n')",
    "    .replace(/&(amp|lt|gt|quot|#039);/g, (all, name) => String.fromCharCode(CHARS[name]));",
    "}",
    "function linked(text) {               // odd parts are links: ASCII, no full stop at the end",
    "  const parts = text.split(/(https?:[/][/][!-;=?-~]*[a-z0-9/=&#%_~+-])/i);",
    "  const link = { target: '_blank', rel: 'noopener noreferrer' };",
    "  return parts.map((s, i) => i % 2 ? Object.assign(make('a', '', s), link, { href: s }) : s);",
    "}",
    "function phrase(text, name) {         // <bdi>: a right-to-left name leaves the rest in order",
    "  const [before, after] = t(text).split('%');",
    "  return [before, make('bdi', '', name), after];",
    "}",
    "// The wire has the server's local time and no zone; login sets shift, the way to our clock.",
    "function parse(time) { return Date.parse(time.replace(' ', 'T') + 'Z'); }",
    "function stamp(time) {                // with the date, unless it is today's",
    "  const when = new Date(time ? parse(time) + shift : Date.now()), day = when.toDateString();",
    "  const text = (day === new Date().toDateString() ? clock : calendar).format(when);",
    "  return Object.assign(make('time', '', text), { title: when.toLocaleString() });",
    "}",
    "// The log of a room.",
    "function follow() {                   // one layout a frame, however many lines came",
    "  const box = $('talk');",
    "  requestAnimationFrame(() => { if (atEnd) box.scrollTop = box.scrollHeight; lookBack(); });",
    "}",
    "function lookBack() {                 // near the top: ask for older ones, once at a time",
    "  const before = log.box.querySelector('[data-id]')?.dataset.id, n = log.box.children.length;",
    "  if (!ready || !log.more || older || n > 9 * MAX_LINES || $('talk').scrollTop > 300) return;",
    "  post({ type: 'history', before, ref: older = newRef() });",
    "}",
    "function addLine(line) {              // what is not confirmed yet stays below the rest",
    "  const kids = log.box.children, most = (atEnd ? 1 : 10) * MAX_LINES;     // room to look back",
    "  log.box.insertBefore(line, log.pending.values().next().value?.line);",
    "  for (; kids.length > most; log.more = true) kids[0].remove();",
    "  follow();",
    "}",
    "function system(text, time) {         // of a crowd coming or going only five lines stay",
    "  const run = [...log.box.children].slice(-5);",
    "  if (run.length === 5 && run.every(e => e.className === 'system')) run[0].remove();",
    "  addLine(make('p', 'system', ...text, ' ', stamp(time)));",
    "}",
    "function bubble(kind, from, whom, time, text) {",
    "  const note = whom.id === 'all' ? '' : phrase('Private to %', whom.name);",
    "  const head = make('p', 'head', make('bdi', '', from), make('span', '', ...note), time);",
    "  const body = make('p', 'text', ...linked(text));",
    "  return make('article', 'line ' + kind + (note && ' private'), head, body);",
    "}",
    "function render(d, quiet) {           // a `say`; a quiet one is not read out",
    "  const id = d.to_client_id, name = members.get(id)?.textContent || '';",
    "  // Private content starts with <b>who speaks to whom: </b>; the bubble has its own way.",
    "  const html = id === 'all' ? d.content : d.content.replace(/^<b>[^<]*<[/]b>/, '');",
    "  const from = decode(d.from_client_name), kind = mine.has(d.from_client_id) ? 'own' : '';",
    "  const line = bubble(kind, from, { id, name }, stamp(d.time), decode(html));",
    "  if (quiet) line.ariaLive = 'off';",
    "  if (d.id) line.dataset.id = d.id;",
    "  return line;",
    "}",
    "function show(d, quiet) {             // what comes again is shown once, where it comes now",
    "  const again = log.box.querySelector(`[data-id='${d.id}']`), said = log.pending.get(d.ref);",
    "  again?.remove(); said?.line.remove(); log.pending.delete(d.ref);",
    "  addLine(render(d, quiet));",
    "  if (d.id) log.last = here.id = d.id;",
    "  if (document.hidden && !quiet && !mine.has(d.from_client_id)) setUnread(unread + 1);",
    "}",
    "function fail(ref, why) {",
    "  const { line, to, d } = log.pending.get(ref);",
    "  const again = button(() => {        // to the same ear: private words must not slip out",
    "    line.remove(); choose(to, [$('text').value, d.content].filter(Boolean).join('\\n'));",
    "  }, t('Edit again'));",
    "  log.pending.delete(ref); line.classList.remove('pending'); line.ariaLive = 'polite';",
    "  line.append(make('p', 'why', t('Not sent: '), why, ' ', again));",
    "  follow();",
    "}",
    "function setUnread(n) {",
    "  unread = n;",
    "  document.title = (n ? '(' + n + ') ' : '') + $('where').textContent + ' - xchat';",
    "}",
    "// Rooms, members, whom we talk to.",
    "function ask(why) {                   // for a name and a room",
    "  [$('name').value, $('room').value, $('why').textContent] = [want.name, want.room, why];",
    "  if (!$('hello').open) $('hello').showModal();",
    "}",
    "function go(name, room) {",
    "  want = { name, room };",
    "  if (ws && ws.readyState === 1) login(); else connect();",
    "}",
    "function fold() {                     // on a phone the drawers close after use",
    "  document.querySelectorAll('aside details').forEach(d => { d.open = wide.matches; });",
    "}",
    "function roomItem(room) {",
    "  const b = button(() => go(here.name, room), make('bdi', '', room));",
    "  if (room === here.room) b.setAttribute('aria-current', 'page');",
    "  return make('li', '', b);",
    "}",
    "function enter(room) {",
    "  log = logs.get(room) || newLog();",
    "  log.box.role = 'log';               // screen readers read out what is added",
    "  logs.set(room, log); $('talk').replaceChildren(log.box); atEnd = true; follow();",
    "  const rooms = [...new Set([...ROOMS, ...logs.keys()])].map(roomItem);",
    "  const other = make('li', '', button(() => ask(''), t('Other room...')));",
    "  $('rooms').replaceChildren(...rooms, other);",
    "  $('where').replaceChildren(...phrase('Room %', room));",
    "  history.replaceState(null, '', '?room_id=' + encodeURIComponent(room));",
    "  setUnread(unread);",
    "  choose($('text').value ? to : ALL); // what is half written keeps its ear",
    "}",
    "function putMember(id, name) {        // a new one, or a new name",
    "  const li = members.get(id) || make('li', ''), you = id === me ? t(' (you)') : '';",
    "  li.replaceChildren(button(() => choose({ id, name }), make('bdi', '', name), you));",
    "  li.firstChild.disabled = id === me;",
    "  if (!members.has(id)) $('members').append(li);",
    "  members.set(id, li); $('count').textContent = members.size;",
    "}",
    "function choose(whom, text = $('text').value) {",
    "  to = whom;",
    "  const all = to === ALL;",
    "  $('all').hidden = all; $('to').className = all ? '' : 'private';",
    "  $('whom').replaceChildren(...all ? [t('To everyone')] : phrase('Private to %', to.name));",
    "  $('text').value = text; $('text').focus(); fold();",
    "}",
    "function say() {",
    "  const content = $('text').value, ref = newRef();",
    "  if (!ready || asked || !content.trim()) return;",
    "  const line = bubble('own pending', here.name, to, stamp(), content);",
    "  const d = { type: 'say', to_client_id: to.id, to_client_name: to.name, content, ref };",
    "  line.ariaLive = 'off';              // it is read out when it is confirmed",
    "  log.box.append(line); log.pending.set(ref, { line, to, d }); post(d);",
    "  $('text').value = ''; atEnd = true; follow();",
    "}",
    "// The connection.",
    "function newRef() { return crypto.getRandomValues(new Uint32Array(4)).join('-'); }",
    "function post(message) { if (ws.readyState === 1) ws.send(JSON.stringify(message)); }",
    "function setStatus(text, retry) {     // no text: all is well",
    "  ready = !text; $('status').textContent = text;",
    "  $('retry').hidden = !retry; $('send').disabled = !ready;",
    "}",
    "function login() {                    // one at a time: what comes then belongs to its room",
    "  if (asked) return;",
    "  asked = Object.assign(want, { ref: newRef(), since: logs.get(want.room)?.last });",
    "  const { name, room, ref, since } = asked;        // history counts only without since",
    "  post({ type: 'login', client_name: name, room_id: room, ref, since, history: 50 });",
    "}",
    "function connect() {",
    "  if (ws && ws.readyState < 2) return;",
    "  clearTimeout(timer); asked = null; setStatus(t('Connecting...')); heard = Date.now();",
    "  ws = new WebSocket(location.href.replace(/^http/, 'ws').replace(/[?#].*/, ''));",
    "  ws.onopen = login; ws.onclose = lost;",
    "  ws.onmessage = e => {",
    "    const d = JSON.parse(e.data);",
    "    heard = Date.now();",
    "    if (Object.hasOwn(on, d.type)) on[d.type](d);",
    "  };",
    "}",
    "function lost(e) {",
    "  const stay = NO_RETRY.includes(e.code);",
    "  if (ready && Date.now() - start > 10000) tries = 0;",
    "  for (const [ref, said] of log.pending)           // a client id ends with its connection",
    "    if (stay || said.to !== ALL) fail(ref, t('connection lost'));",
    "  if (stay) return setStatus(t('Connection closed: ') + (e.reason || e.code), true);",
    "  setStatus(t('Offline: your text is kept.'), true);",
    "  const wait = e.code === 1008 ? 30000 : Math.min(30000, 500 * 2 ** tries++);",
    "  timer = setTimeout(connect, wait * (0.5 + Math.random()));    // not everybody at once",
    "}",
    "function watch() {                    // a dead network closes nothing: ask, later give up",
    "  const quiet = Date.now() - heard;",
    "  if (!ws || ws.readyState > 1 || quiet < 30000) return;",
    "  if (quiet < 75000) return post({ type: 'ping' });",
    "  ws.onclose = null;                  // it would come much later",
    "  ws.close(); lost({});",
    "}",
    "function welcome(d) {                 // our login, answered: it has the member list",
    "  const moved = !here || here.room !== asked.room;",
    "  [me, start, here, asked, older, ready] = [d.client_id, Date.now(), asked, null, '', false];",
    "  shift = Math.round((start - parse(d.time)) / 900000) * 900000;  // zones differ by quarters",
    "  $('me').textContent = store.xchatName = here.name;",
    "  members.clear(); $('members').replaceChildren(); mine.add(me); here.id = d.id;",
    "  for (const [id, name] of Object.entries(d.client_list)) putMember(id, decode(name));",
    "  if (moved) enter(here.room);",
    "  if (d.recovered === false) addLine(make('p', 'system gone', t('Some messages are gone.')));",
    "  if (want !== here) login();         // meanwhile another wish came",
    "}",
    "const on = {                          // one function for each type of message",
    "  ping() { post({ type: 'pong' }); },",
    "  login(d) {",
    "    const name = decode(d.client_name);",
    "    if (d.client_list) return welcome(d);",
    "    if (!members.has(d.client_id)) system(phrase('% came in', name), d.time);",
    "    putMember(d.client_id, name);",
    "  },",
    "  logout(d) {",
    "    if (!members.has(d.from_client_id)) return;",
    "    members.get(d.from_client_id).remove(); members.delete(d.from_client_id);",
    "    $('count').textContent = members.size;",
    "    system(phrase('% left', decode(d.from_client_name)), d.time);",
    "  },",
    "  say(d) { show(d); },",
    "  history(d) {                        // older ones for lookBack, or what follows a login",
    "    if (d.ref) {",
    "      const talk = $('talk'), below = talk.scrollHeight - talk.scrollTop;",
    "      log.box.prepend(...d.messages.map(m => render(m, true)));",
    "      talk.scrollTop = talk.scrollHeight - below;  // the reader's place",
    "      [older, log.more] = ['', d.more];",
    "      return follow();",
    "    }",
    "    d.messages.forEach(m => show(m, !here.since));",
    "    if (here.since && d.more) return; // another part of the resume is to come",
    "    if (!here.since) log.more = d.more;",
    "    log.last = here.id; setStatus(''); follow();",
    "    for (const said of log.pending.values()) post(said.d);   // these were never stored",
    "  },",
    "  error(d) {",
    "    if (log.pending.has(d.ref)) fail(d.ref, PLAIN[d.code] ? t(PLAIN[d.code]) : d.message);",
    "    else if (d.ref === older) [older, log.more] = ['', d.code === 'rate_limited'];",
    "    else if (asked && asked.ref === d.ref) { asked = null; ask(d.message); }",
    "  },",
    "};",
    "// What the person does.",
    "$('me').onclick = () => ask('');",
    "$('all').onclick = () => choose(ALL);",
    "$('retry').onclick = connect;",
    "$('hello').onclose = () => {          // by its button, or by Escape",
    "  if ($('hello').returnValue) go($('name').value.trim(), $('room').value);",
    "  else if (here) want = here;",
    "  else ask($('why').textContent);",
    "  $('hello').returnValue = '';",
    "};",
    "$('composer').onsubmit = e => { e.preventDefault(); say(); };",
    "$('text').onkeydown = e => {          // while an input method composes, Enter is not 13",
    "  if (e.keyCode !== 13 || e.shiftKey) return;",
    "  e.preventDefault(); say();",
    "};",
    "$('talk').onscroll = () => {          // only the reader lowers scrollTop, new lines never do",
    "  const box = $('talk'), gap = box.scrollHeight - box.scrollTop - box.clientHeight;",
    "  atEnd = gap < 50 || atEnd && box.scrollTop >= lastTop;",
    "  lastTop = box.scrollTop; lookBack();",
    "};",
    "function insert(face) {",
    "  $('text').setRangeText(face, $('text').selectionStart, $('text').selectionEnd, 'end');",
    "  $('text').focus();",
    "}",
    "const faces = $('faces').textContent.match(/[^ \\n]/gu);",
    "$('faces').replaceChildren(...faces.map(face => button(() => insert(face), face)));",
    "new ResizeObserver(follow).observe($('talk'));",
    "document.onvisibilitychange = () => { if (!document.hidden && here) setUnread(0); };",
    "addEventListener('online', () => { if (timer) connect(); });",
    "addEventListener('pagehide', () => { if (ws) ws.close(); });    // or we stay as a ghost",
    "setInterval(watch, 10000);",
    "for (const e of document.querySelectorAll('h2, button, span, summary'))",
    "  if (!e.children.length) e.textContent = t(e.textContent);",
    "if (zh) document.documentElement.lang = 'zh-CN';",
    "$('talk').ariaLabel = t('Messages');",
    "wide.onchange = fold;",
    "fold();",
    "const query = new URLSearchParams(location.search);",
    "want = { name: store.xchatName || '', room: query.get('room_id') || '1' };",
    "if (want.name) connect(); else ask('');",
    "</script></body></html>",
};

static struct {
    struct buf html, headers;
} page;

/* What stands between two tags of the page. */
static slice page_part(const char *open, const char *close) {
    const char *start = strstr(page.html.p, open) + strlen(open);
    return (slice){start, (size_t)(strstr(start, close) - start)};
}

static void page_add_source(const char *directive, slice part) {
    unsigned char hash[SHA256_DIGEST_LENGTH], text[4 * (SHA256_DIGEST_LENGTH / 3 + 1) + 1];
    SHA256((const unsigned char *)part.p, part.len, hash);
    EVP_EncodeBlock(text, hash, sizeof hash);
    buf_printf(&page.headers, "; %s 'sha256-%s'", directive, text);
}

static void page_init(void) {
    for (size_t i = 0; i < sizeof page_lines / sizeof *page_lines; i++)
        buf_printf(&page.html, "%s\n", page_lines[i]);
    buf_add(&page.headers, S("Content-Type: text/html; charset=utf-8\r\nCache-Control: no-cache\r\n"
                             "X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
                             "Content-Security-Policy: default-src 'none'; connect-src 'self'; img-src data:; "
                             "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"));
    page_add_source("script-src", page_part("<script>", "</script>"));
    page_add_source("style-src", page_part("<style>", "</style>"));
    buf_add(&page.headers, S("\r\n"));
}

/* `request` of the chat's site. */
static void page_request(struct conn *c, const struct request *q) {
    if (!slice_eq(q->method, S("GET")) && !slice_eq(q->method, S("HEAD")))
        http_reply(c, q, "405 Method Not Allowed", S(PLAIN "Allow: GET, HEAD\r\n"),
                   S("only GET and HEAD are answered here\n"));
    else if (slice_eq(q->path, S("/")))
        http_reply(c, q, "200 OK", buf_slice(&page.headers), buf_slice(&page.html));
    else if (slice_eq(q->path, S("/health"))) http_reply(c, q, "200 OK", S(PLAIN), S("ok\n"));
    else http_reply(c, q, "404 Not Found", S(PLAIN), S("there is a page at / and nothing else\n"));
}

static const struct site page_site = {page_request, chat_upgraded};

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
 * Owns: the options, the list of listeners. Calls: all above. Called by: the shell.
 */

static struct {
    const char *binds[16];
    uint32_t n_binds;
    uint64_t given;   /* one bit for each option: it was on the command line */
} mains;

static const char *take_bind(const char *value) {
    if (mains.n_binds == sizeof mains.binds / sizeof *mains.binds) return "too many";
    mains.binds[mains.n_binds++] = value;
    return NULL;
}

static const char *take_version(const char *value) {
    puts("xchat 0.1");
    exit(value != NULL);
}

static const char *take_help(const char *value);   /* prints the table it is in */

static struct option {
    const char *name, *arg;                   /* arg: what stands behind it; NULL: nothing */
    char letter;
    uint32_t *number, min, max, initial;      /* where a number goes, or that it was given... */
    const char *(*take)(const char *value);   /* ...or who takes a text; NULL, or what is wrong... */
    const char **text;                        /* ...or where it goes */
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
    {"trust-proxy", "CIDR", 0, NULL, 0, 0, 0, http_trust, NULL, "proxy whose X-Forwarded-For counts; repeatable"},
    {"ping", "SECONDS", 0, &opt.ping_s, 1, 86400, 25, NULL, NULL, "silence before a ping; three and it is gone"},
    {"timeout", "SECONDS", 0, &opt.timeout_s, 1, 3600, 10, NULL, NULL, "time for a whole HTTP request"},
    {"verbose", NULL, 'v', &opt.verbose, 0, 1, 0, NULL, NULL, "log every connection"},
    {"version", NULL, 'V', NULL, 0, 0, 0, take_version, NULL, "print the version"},
    {"help", NULL, 'h', NULL, 0, 0, 0, take_help, NULL, "print this"},
};

enum { N_OPTIONS = sizeof options / sizeof *options };

static const char *take_help(const char *value) {
    puts("xchat: a small chat server. Once it runs, open http://localhost:7272/\n\n"
         "Options (or environment: --max-head is XCHAT_MAX_HEAD there):");
    for (const struct option *o = options; o < options + N_OPTIONS; o++) {
        const char dash[] = {o->letter != 0 ? '-' : ' ', o->letter != 0 ? o->letter : ' ', '\0'};
        int n = printf("  %s --%s %s", dash, o->name, o->arg != NULL ? o->arg : "");
        printf("%*s%s", 27 - n, "", o->help);
        if (o->number != NULL && o->arg != NULL) printf(" (%u)", o->initial);
        putchar('\n');
    }
    puts("\nExamples:\n  xchat --port 8080\n  xchat --bind unix:/run/xchat.sock --trust-proxy 127.0.0.1");
    exit(value != NULL);
}

static void option_set(struct option *o, const char *value) {
    int64_t number = value != NULL ? slice_number(slice_of(value), 10) : 1;
    const char *why = o->take != NULL ? o->take(value) : NULL;
    if (why != NULL) usage("--%s: '%s': %s", o->name, value, why);
    if (o->number != NULL && (number < o->min || number > o->max))
        usage("--%s: '%s' is not a number from %u to %u", o->name, value, o->min, o->max);
    if (o->number != NULL) *o->number = (uint32_t)number;
    if (o->text != NULL && value != NULL && *value == '\0') usage("--%s: %s is missing", o->name, o->arg);
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
        option_set(o, o->arg == NULL ? NULL : joined ? value.p : argv[i + 1]);
        return o->arg == NULL || joined ? 1 : 2;
    }
    usage("%s: no such option; --help lists them", argv[i]);
    return 0;
}

/* The command line goes before the environment. */
static void options_read(int argc, char **argv) {
    for (struct option *o = options; o < options + N_OPTIONS; o++)
        if (o->number != NULL) *o->number = o->initial;
    for (int i = 1; i < argc;) i += option_read(argc, argv, i);
    for (struct option *o = options; o < options + N_OPTIONS; o++) {
        char name[40];
        int n = snprintf(name, sizeof name, "XCHAT_%s", o->name);
        for (int i = 0; i < n; i++) name[i] = name[i] == '-' ? '_' : name[i] >= 'a' ? (char)(name[i] - 32) : name[i];
        const char *value = getenv(name);
        bool flag = o->arg == NULL;   /* set by any value but 0 */
        bool given = (mains.given >> (o - options) & 1) != 0;
        if (value == NULL || given || (flag && (o->number == NULL || strcmp(value, "0") == 0))) continue;
        option_set(o, flag ? NULL : value);
    }
}

/* Every client is a descriptor. Takes as many as the system allows, and keeps some for
 * listeners, and for telling those who are too many. */
static void limit_clients(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0) getrlimit(RLIMIT_NOFILE, &limit);
    uint64_t files = limit.rlim_cur, most = files - (files >= 256 ? 64 : files / 4);
    if (opt.max_clients <= most) return;
    log_info("--max-clients: only %u fit into the limit of open files (ulimit -n)", (unsigned)most);
    opt.max_clients = (uint32_t)most;
}

/* One --bind: "unix:/path", "127.0.0.1", "127.0.0.1:80", "[::1]:80" or "::1", with
 * "tls:" or "plain:" in front; NULL is every address. */
static void listen_on(const char *spec) {
    slice host = slice_of(spec != NULL ? spec : ""), port = S("");
    bool plain = slice_starts(host, S("plain:")), tls = slice_starts(host, S("tls:"));
    if (plain || tls) slice_split(&host, ':');
    if (tls && opt.tls_cert == NULL) usage("--bind: '%s' needs --tls-cert", spec);
    tls = opt.tls_cert != NULL && !plain;
    bool local = slice_starts(host, S("unix:")), bracket = slice_starts(host, S("["));
    const char *colon = strchr(host.p, ':'), *why;
    char name[108] = "";
    if (local) host = slice_cut(host, 5);
    else if (bracket) port = slice_cut(host, 1), host = slice_split(&port, ']');
    else if (colon != NULL && colon == strrchr(colon, ':')) port = slice_of(colon), host.len -= port.len;
    int64_t number = port.len == 0 ? opt.port : *port.p == ':' ? slice_number(slice_cut(port, 1), 10) : -1;
    bool bad = number < 0 || number > 65535 || host.len >= sizeof name || (bracket && strchr(host.p, ']') == NULL);
    if (bad || (spec != NULL && host.len == 0)) usage("--bind: '%s' is not ADDR, ADDR:PORT or unix:PATH", spec);
    memcpy(name, host.p, host.len);
    if (local) why = listen_unix(name, &http_listener, &page_site);
    else why = listen_tcp(name, (uint16_t)number, tls, &http_listener, &page_site);
    if (why != NULL) die("--bind %s, --port %u: %s", spec != NULL ? spec : "(all)", opt.port, why);
}

/* Reads the certificate, when we start, and again at SIGHUP. False: it stays as it was. */
static bool load_files(void) {
    if (opt.tls_key != NULL && opt.tls_cert == NULL) usage("--tls-key needs --tls-cert");
    const char *key = opt.tls_key != NULL ? opt.tls_key : opt.tls_cert;
    const char *why = opt.tls_cert != NULL ? tls_load(opt.tls_cert, key) : NULL;
    if (why != NULL) log_warn("--tls-cert %s, --tls-key %s: %s", opt.tls_cert, key, why);
    return why == NULL;
}

static void reload_files(void) {
    if (load_files()) log_info("SIGHUP: files read again");
}

int main(int argc, char **argv) {
    struct sigaction stop = {.sa_handler = loop_signal}, ignore = {.sa_handler = SIG_IGN};
    struct sigaction hangup = {.sa_handler = loop_hangup};
    int fd = open("/dev/null", O_RDWR);   /* if stderr is closed, no socket must take its place */
    while (fd >= 0 && fd < 3) fd = open("/dev/null", O_RDWR);
    close(fd);
    memory_init();
    clock_read();
    options_read(argc, argv);
    limit_clients();
    if (RAND_bytes(tables.secret, sizeof tables.secret) != 1) die("no random bytes");
    history_init(opt.data);
    http.callers.key = caller_key;
    rooms.by_name.key = room_key;
    rooms.unsaid = chat_unsaid;
    loop.flush = rooms_flush;
    loop.reload = reload_files;
    if (!load_files()) return 1;
    page_init();
    sigaction(SIGTERM, &stop, NULL);
    sigaction(SIGINT, &stop, NULL);
    sigaction(SIGPIPE, &ignore, NULL);
    sigaction(SIGXFSZ, &ignore, NULL);   /* write() says it too */
    sigaction(SIGHUP, &hangup, NULL);
    if (mains.n_binds == 0) listen_on(NULL);
    for (uint32_t i = 0; i < mains.n_binds; i++) listen_on(mains.binds[i]);
    chat_init(loop.conn[0]->peer.port);
    loop_run();
    log_info("stopped");
    return 0;
}
