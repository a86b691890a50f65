/* Unit tests: xchat.c is included whole, so every function is in reach, and a small fake
 * operating system is put under it.
 *
 *     cc -g -o test/build/unit test/unit.c -lssl -lcrypto && test/build/unit [NAME...]
 *
 * A test is a function with a table: input, expected output, as a rule one line a case.
 * It prints "ok unit.NAME", or "FAIL unit.NAME: why" with the first case that failed.
 * Parsers of streams are fed whole, byte by byte, and cut in two at every position: what
 * they understand and what they answer must be the same.
 */
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE
#define _FILE_OFFSET_BITS 64   /* as xchat.c has them: too late there, behind the first header */
#define _TIME_BITS 64
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static ssize_t fake_recv(int fd, void *p, size_t n, int flags);
static ssize_t fake_send(int fd, const void *p, size_t n, int flags);
static ssize_t fake_write(int fd, const void *p, size_t n);
static int fake_getpeername(int fd, struct sockaddr *sa, socklen_t *len);
struct addrinfo;
static int fake_getaddrinfo(const char *host, const char *port, const struct addrinfo *hints, struct addrinfo **list);
static void fake_freeaddrinfo(struct addrinfo *list);
_Noreturn static void fake_exit(int status);

#define recv fake_recv
#define send fake_send
#define write fake_write
#define getpeername fake_getpeername
#define getaddrinfo fake_getaddrinfo
#define freeaddrinfo fake_freeaddrinfo
#define exit fake_exit
#define main xchat_main
#include "../xchat.c"
#undef recv
#undef send
#undef write
#undef getpeername
#undef getaddrinfo
#undef freeaddrinfo
#undef exit
#undef main

#if !defined(__SANITIZE_ADDRESS__) && defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) (void)(p)
#define ASAN_UNPOISON_MEMORY_REGION(p, n) (void)(p)
#endif

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* ---- Failures, and texts in tables. ---- */

static struct {
    unsigned failures;
    char why[400];   /* of the first */
} test;

PRINTF(1, 2) static void fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    if (test.failures++ == 0) vsnprintf(test.why, sizeof test.why, format, args);
    va_end(args);
}

#define CHECK(good, ...) ((good) ? (void)0 : fail(__VA_ARGS__))

/* For people: printable, and not too long. One of four texts that are used in turn. */
static const char *show(slice s) {
    static char texts[4][240];
    static unsigned turn;
    char *text = texts[turn++ % 4];
    size_t at = 0;
    for (size_t i = 0; i < s.len && at < sizeof texts[0] - 8; i++) {
        bool plain = s.p[i] >= ' ' && s.p[i] <= '~';
        at += (size_t)snprintf(text + at, 5, plain ? "%c" : "\\x%02x", (unsigned char)s.p[i]);
    }
    snprintf(text + at, 4, "%s", at < sizeof texts[0] - 8 ? "" : "...");
    return text;
}

static void check_text(const char *name, slice got, slice want) {
    if (!slice_eq(got, want)) fail("%s: got \"%s\", wanted \"%s\"", name, show(got), show(want));
}

/* Texts in the tables are spelled so that C leaves them readable: ' is a double quote, ~
 * an apostrophe, | a CR LF, @ a NUL. One of four copies, each in memory of just its size,
 * so that a sanitizer sees who reads beyond it. */
static slice spelled(const char *text) {
    static char *copies[4];
    static unsigned turn;
    struct buf b = {0};
    for (char c; (c = *text) != '\0'; text++) {
        if (c == '|') buf_add(&b, S("\r\n"));
        else buf_addc(&b, (char)(c == '\'' ? '"' : c == '~' ? '\'' : c == '@' ? '\0' : c));
    }
    char **copy = &copies[turn++ % 4];
    *copy = xrealloc(*copy, b.len + (b.len == 0 ? 1 : 0));
    slice s = {memcpy(*copy, buf_slice(&b).p, b.len), b.len};
    buf_free(&b);
    return s;
}

/* The same numbers in every run. */
static uint32_t random_below(uint32_t n) {
    static uint32_t state = 20261123;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state % n;
}

/* ---- The fake operating system. A socket with a negative number is a wire, the log is
 * kept in memory, exit() goes back to the test that expects it. ---- */

static struct wire {
    slice in;        /* what recv() will find */
    struct buf out;  /* what send() has taken */
    size_t takes;    /* how much more it will take */
    struct sockaddr_in6 peer;
} wires[8];

static struct {
    char log[4096];   /* the newest line */
    size_t log_len;
    jmp_buf back;
    bool catching;
} fake;

static struct wire *wire_of(int fd) { return &wires[-1 - fd]; }

/* What lies behind the bytes that were read must not be looked at. */
static ssize_t fake_recv(int fd, void *p, size_t n, int flags) {
    if (fd >= 0) return recv(fd, p, n, flags);
    struct wire *w = wire_of(fd);
    size_t take = w->in.len < n ? w->in.len : n;
    ASAN_UNPOISON_MEMORY_REGION(p, n);
    memcpy(p, w->in.p, take);
    if (n - take > 64) ASAN_POISON_MEMORY_REGION((char *)p + take, 64);
    w->in = slice_cut(w->in, take);
    return (ssize_t)take;
}

static ssize_t fake_send(int fd, const void *p, size_t n, int flags) {
    if (fd >= 0) return send(fd, p, n, flags);
    struct wire *w = wire_of(fd);
    n = n < w->takes ? n : w->takes;
    if (n == 0) return errno = EAGAIN, -1;
    buf_add(&w->out, (slice){p, n});
    w->takes -= n;
    return (ssize_t)n;
}

static ssize_t fake_write(int fd, const void *p, size_t n) {
    if (fd != STDERR_FILENO) return write(fd, p, n);
    fake.log_len = n < sizeof fake.log ? n : sizeof fake.log;
    memcpy(fake.log, p, fake.log_len);
    return (ssize_t)n;
}

static int fake_getpeername(int fd, struct sockaddr *sa, socklen_t *len) {
    memcpy(sa, &wire_of(fd)->peer, *len = sizeof wires[0].peer);
    return 0;
}

/* "three" has three addresses, whose ports tell them apart; no other name has any. */
static int fake_getaddrinfo(const char *host, const char *port, const struct addrinfo *hints, struct addrinfo **list) {
    static struct addrinfo ai[3];
    static struct sockaddr_in sa[3];
    (void)port, (void)hints;
    for (int i = 0; i < 3; i++) {
        sa[i] = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)(1 + i))};
        ai[i] = (struct addrinfo){.ai_family = AF_INET, .ai_addr = (void *)&sa[i], .ai_addrlen = sizeof *sa};
        ai[i].ai_next = i < 2 ? &ai[i + 1] : NULL;
    }
    *list = ai;
    return strcmp(host, "three") == 0 ? 0 : EAI_NONAME;
}

static void fake_freeaddrinfo(struct addrinfo *list) { (void)list; }

_Noreturn static void fake_exit(int status) {
    if (fake.catching) longjmp(fake.back, status + 1);
    printf("FAIL unit: exit(%d): %.*s", status, (int)fake.log_len, fake.log);
    exit(1);
}

/* A connection at the server's end of wire i. */
static struct conn *wire_open(int i, const struct proto *proto, void *state) {
    buf_free(&wires[i].out);
    wires[i].takes = SIZE_MAX;
    return conn_new(-1 - i, proto, state, false);
}

/* The peer says this, and a round ends. */
static void wire_feed(struct conn *c, slice s) {
    for (wire_of(c->fd)->in = s; wire_of(c->fd)->in.len > 0;) conn_read(c);
    ASAN_UNPOISON_MEMORY_REGION(loop.chunk, sizeof loop.chunk);
    loop_settle();
}

/* There is room in the socket again, for n bytes, and a round ends. */
static void wire_drain(struct conn *c, size_t n) {
    if (c->fd < 0) wire_of(c->fd)->takes = n;
    c->blocked = false;
    conn_touch(c);
    loop_settle();
}

static void wire_close(struct conn *c) {
    struct wire *w = wire_of(c->fd);
    c->eof = true;
    conn_close(c, "test over");
    wire_drain(c, SIZE_MAX);
    buf_free(&w->out);
}

static void check_empty(void) {
    CHECK(loop.n == 0 && rooms.by_name.n == 0 && http.connections == 0 && http.callers.n == 0,
          "left are %u connections, %u counted, %zu callers, %zu rooms", loop.n, http.connections,
          http.callers.n, rooms.by_name.n);
}

/* ---- 1. Bytes ---- */

static void test_slices(void) {
    static const struct {
        const char *text, *trimmed, *head, *rest;   /* split at ',' */
    } cases[] = {
        {"", "", "", ""}, {",", ",", "", ""}, {"a", "a", "a", ""}, {"a,", "a,", "a", ""},
        {",a", ",a", "", "a"}, {"a,b,c", "a,b,c", "a", "b,c"}, {" \t ", "", " \t ", ""},
        {" \t a b \t", "a b", " \t a b \t", ""}, {"\n a\r", "\n a\r", "\n a\r", ""},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        slice text = slice_of(cases[i].text), rest = text, head = slice_split(&rest, ',');
        check_text("trim", slice_trim(text), slice_of(cases[i].trimmed));
        check_text("split, head", head, slice_of(cases[i].head));
        check_text("split, rest", rest, slice_of(cases[i].rest));
    }
    CHECK(slice_eq(S("a\0b"), S("a\0b")), "equal with a NUL");
    CHECK(!slice_eq(S("a\0b"), S("a\0c")) && !slice_eq(S("a"), S("ab")), "not equal");
    CHECK(slice_eqcase(S("aZ[@"), S("Az[@")), "equal but for case");
    for (const char *c = "`a9{ |~", *want = "`A9{ |~"; *c != '\0'; c++, want++) CHECK(upper(*c) == *want, "upper '%c'", *c);
    CHECK(!slice_eqcase(S("["), S("{")) && !slice_eqcase(S("@"), S("`")), "no letters");
    CHECK(!slice_eqcase(S("a"), S("aa")) && !slice_eqcase(S("\xc9"), S("\xe9")), "other letters");
    CHECK(slice_starts(S("ab"), S("")) && slice_starts(S("ab"), S("ab")), "starts");
    CHECK(!slice_starts(S("a"), S("ab")) && !slice_starts(S("ba"), S("a")), "does not start");
}

static void test_numbers(void) {
    static const struct {
        const char *text;
        int base;
        int64_t want;
    } cases[] = {
        {"0", 10, 0}, {"7", 10, 7}, {"007", 10, 7}, {"4294967296", 10, 4294967296},
        {"999999999999999", 10, 999999999999999}, {"1000000000000000", 10, -1}, {"0000000000000001", 10, -1},
        {"", 10, -1}, {"-1", 10, -1}, {"+1", 10, -1}, {" 1", 10, -1}, {"1 ", 10, -1},
        {"1.0", 10, -1}, {"0x10", 10, -1}, {"1a", 10, -1}, {"/", 10, -1}, {":", 10, -1},
        {"ff", 16, 255}, {"FF", 16, 255}, {"0G", 16, -1}, {"g", 16, -1}, {"@", 16, -1},
        {"`", 16, -1}, {"ffffffffff", 16, 0xffffffffff}, {"0x1f", 16, -1},
        {"18446744073709551617", 10, -1},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        int64_t got = slice_number(slice_of(cases[i].text), cases[i].base);
        CHECK(got == cases[i].want, "\"%s\" is %lld", cases[i].text, (long long)got);
    }
    CHECK(slice_number(S("1\0"), 10) == -1, "a NUL is no digit");
}

/* Random steps against a flat array, where dropping is memmove(). */
static void test_buffers(void) {
    static char model[4000];
    struct buf b = {0};
    size_t len = 0, most = 0;
    for (unsigned step = 0; step < 20000; step++) {
        char piece[300];
        size_t n = random_below(random_below(8) == 0 ? sizeof piece : 20);
        unsigned what = len > 3500 ? 3 : random_below(random_below(200) == 0 ? 6 : 5);
        memset(piece, 'a' + (int)(step % 26), n);
        if (what == 0) buf_add(&b, (slice){piece, n});
        if (what == 2) buf_printf(&b, "%.*s", (int)n, piece);
        if (what == 0 || what == 2) memcpy(model + len, piece, n), len += n;
        if (what == 1) buf_addc(&b, 'c'), model[len++] = 'c';
        if (what == 3 && n < len) buf_drop(&b, n), len -= n, memmove(model, model + n, len);
        if (what == 4) memset(buf_room(&b, n + 1), 'x', n + 1);   /* not used in the end */
        if (what == 5) buf_free(&b), len = 0;
        most = len > most ? len : most;
        CHECK(slice_eq(buf_slice(&b), (slice){model, len}), "step %u (%u): bytes", step, what);
        CHECK(b.off + b.len <= buf_cap(&b) && (buf_cap(&b) == 0) == (b.p == NULL), "step %u: bounds", step);
        CHECK(buf_cap(&b) <= 4 * most + 1300, "%zu live bytes at most, but cap %u", most, buf_cap(&b));
    }
    CHECK(most > 1000, "too easy: %zu", most);
    buf_free(&b);
    buf_free(&b);
    for (unsigned i = 0; i < 100000; i++) {   /* a queue: what flows through must not pile up */
        buf_add(&b, S("0123456789"));
        if (b.len > 100) buf_drop(&b, 10);
    }
    CHECK(buf_cap(&b) <= 512, "a queue of 110 bytes takes %u", buf_cap(&b));
    for (unsigned i = 0; i < 3000; i++) {   /* what --check reckons with */
        size_t n = random_below(51);
        if (b.len + n > 1000) buf_drop(&b, b.len + n - 1000);
        buf_add(&b, (slice){model, n});
    }
    CHECK(buf_cap(&b) <= 2000, "a queue of 1000 bytes takes %u", buf_cap(&b));
    buf_clear(&b);
    CHECK(b.len == 0 && b.off == 0, "cleared");
    buf_free(&b);
}

static void test_log(void) {
    char text[600], want[100];
    errno = 4711;
    log_warn("a%cb\r\n\x1b[1m\\ \x7f\xe4~", 0);
    snprintf(want, sizeof want, "%s warn  a\\x00b\\x0d\\x0a\\x1b[1m\\x5c \\x7f\\xe4~\n", now.text);
    check_text("one line", (slice){fake.log, fake.log_len}, slice_of(want));
    CHECK(errno == 4711, "errno is lost");
    memset(text, 0xff, sizeof text);
    log_info("%.599s", text);   /* too long, and every byte becomes four */
    CHECK(fake.log_len == strlen(now.text) + 7 + 4 * (LOG_LINE_MAX - 1) + 4, "%zu", fake.log_len);
}

/* The other way to check UTF-8: decode, then look at the number. */
static bool utf8_simple(const unsigned char *p, size_t n) {
    static const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
    for (size_t i = 0, more; i < n; i += more + 1) {
        uint32_t c = p[i];
        more = c < 0x80 ? 0 : c >> 5 == 6 ? 1 : c >> 4 == 14 ? 2 : c >> 3 == 30 ? 3 : n;
        if (more >= n - i) return false;
        c = more == 0 ? c : c & (0x3fu >> more);
        for (size_t k = 1; k <= more; k++) {
            if (p[i + k] >> 6 != 2) return false;
            c = c << 6 | (p[i + k] & 0x3f);
        }
        if (c < least[more] || c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff)) return false;
    }
    return true;
}

/* Behind 0 to 17 plain bytes: those are taken eight at a time. */
static void check_utf8(const char *text, bool valid) {
    for (unsigned front = 0; front < 18; front++) {
        char padded[64];
        snprintf(padded, sizeof padded, "%.*s%s", (int)front, "abcdefghijklmnopq", text);
        slice s = spelled(padded);
        struct utf8 each = {0};
        bool ok = true;
        for (size_t i = 0; i < s.len; i++) ok = ok && utf8_feed(&each, (slice){s.p + i, 1});
        CHECK((ok && each.missing == 0) == valid, "%s, byte by byte", show(s));
        CHECK(utf8_valid(s) == valid, "%s", show(s));
        for (size_t cut = 0; cut <= s.len; cut++) {
            struct utf8 u = {0};
            ok = utf8_feed(&u, slice_take(s, cut)) && utf8_feed(&u, slice_cut(s, cut));
            CHECK((ok && u.missing == 0) == valid, "%s, cut at %zu", show(s), cut);
        }
    }
}

static void test_utf8(void) {
    static const char *const valid[] = {
        "", "kosme", "\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5", "@", "\x7f", "\xc2\x80",
        "\xdf\xbf", "\xe0\xa0\x80", "\xef\xbf\xbf", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf",
        "\xed\x9f\xbf", "\xee\x80\x80", "\xef\xbf\xbd", "\xef\xbb\xbf", "\xef\xb7\x90",
        "\xf0\x9f\x98\x80\xf0\x9f\x98\x80", "mnopqrst\xc3\xa4mnopqrstu\xc3\xa4",
    };
    static const char *const wrong[] = {
        "\x80", "\xbf", "\x80\xbf\x80", "a\x80", "\xc3", "\xc3 ", "\xe2\x82", "\xe2\x82 ",
        "\xf0\x9f\x98", "\xf0\x9f\x98 ", "\xf0\x9f", "\xf0", "\xc3\xc3\xa4", "\xc3\xa4\xa4",
        "abcdefgh\x80qrstuvwxyz", "\xc0\x80", "\xc0\xaf", "\xc1\xbf", "\xe0\x80\xaf",
        "\xe0\x9f\xbf", "\xf0\x80\x80\xaf", "\xf0\x8f\xbf\xbf", "\xf8\x88\x80\x80\x80",
        "\xf8\x80\x80\x80\xaf", "\xfc\x84\x80\x80\x80\x80", "\xfe", "\xff", "\xfe\xfe\xff\xff",
        "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xf7\xbf\xbf\xbf", "\xed\xa0\x80", "\xed\xaf\xbf",
        "\xed\xb0\x80", "\xed\xbf\xbf", "\xed\xa0\xbd\xed\xb8\x80",
    };
    for (size_t i = 0; i < COUNT(valid); i++) check_utf8(valid[i], true);
    for (size_t i = 0; i < COUNT(wrong); i++) check_utf8(wrong[i], false);
}

/* Every text of one, two and three bytes. (Of three, only one first byte that is ASCII:
 * behind it there is again a text of two.) */
static void test_utf8_exhaustive(void) {
    for (uint32_t code = 0; code < 1 << 24; code++) {
        if (code == 'b' << 16) code = 0x80 << 16;
        else if (code == 1 << 16) code = 'a' << 16;
        unsigned char t[] = {code >> 16 & 0xff, code >> 8 & 0xff, code & 0xff};
        size_t skip = code >= 1 << 16 ? 0 : code >= 1 << 8 ? 1 : 2;
        bool valid = utf8_valid((slice){(char *)t + skip, 3 - skip});
        CHECK(valid == utf8_simple(t + skip, 3 - skip), "%06x", code);
    }
}

/* ---- 2. JSON ---- */

/* Is this an object as a whole? The copy ends where the text does, for a sanitizer. */
static bool json_ok(slice text) {
    size_t at = 0;
    char *copy = memcpy(xrealloc(NULL, text.len + (text.len == 0 ? 1 : 0)), text.p, text.len);
    bool ok = json_pick((slice){copy, text.len}, NULL, 0, &at) == NULL;
    CHECK(at <= text.len, "%s: failed at %zu, behind the end", show(text), at);
    free(copy);
    return ok;
}

/* A list of texts, ended by NULL, or of values to be put into one. */
static void check_json(const char *const *list, const char *format, bool valid) {
    for (char text[200]; *list != NULL; list++) {
        snprintf(text, sizeof text, format, *list);
        CHECK(json_ok(spelled(text)) == valid, "%s", text);
    }
}

static void test_json(void) {
    static const char *const values[] = {
        "0", "-0", "1", "-1", "10", "0.5", "-0.0", "1e1", "1E1", "1e+1", "1e-01", "1.25e10", "0e0",
        "20e1", "123456789012345678901234567890", "1e999", "-1E-999", "true", "false", "null", "''",
        "'a'", "'~'", "'\\'\\\\\\/\\b\\f\\n\\r\\t'", "'\\u0041\\u00e9\\u20AC\\uFfFf'",
        "'\\ud83d\\ude00'", "'\\u0000'", "'\\uD800\\uDC00\\uDBFF\\uDFFF'", "'\x7f'",
        "'\xe2\x80\xa8\xc2\x85\xef\xbf\xbf\xf4\x8f\xbf\xbf'", "'\\\\u12'", "'//'", "[]", "{}",
        "[[]]", "[{}]", "[1,'a',null,[true],{}]", "{'a':1}", "[[],[[]],{}]", "{'a':{'b':[]},'':0}",
        "{'a':1,'a':2}", "\t\r\n [ \t\r\n1 , 2\n] ", " { 'a' : [ ] , 'b' : { } } ",
        "[{'a':[{'b':[0]}]},2]", "{'\\u0000':0}", NULL,
    };
    static const char *const texts[] = {"{}", " \t\r\n{ \t\r\n} \t\r\n", "{'a':1,'b':[2]}", NULL};
    check_json(values, "{'v':%s}", true);
    check_json(texts, "%s", true);
    slice all = spelled("{'a\\u00e9\\ud83d\\ude00':-1.5e+10,'b':[true,false,null,{'c':[]},"
                        "'\xf0\x9f\x98\x80'],'d':{}}");
    CHECK(json_ok(all), "a whole text");
    for (size_t n = 0; n < all.len; n++) CHECK(!json_ok(slice_take(all, n)), "only %zu bytes", n);
    for (size_t n = 1; n < all.len; n++) CHECK(!json_ok(slice_cut(all, n)), "without %zu bytes", n);
}

static void test_json_wrong(void) {
    static const char *const values[] = {
        "", " ", "01", "-", "-01", "00", "+1", ".5", "-.5", "1.", "1.e1", "1e", "1e+", "1e1.5",
        "1ee1", "0x1", "1_0", "1a", "--1", "1 2", "0e", "1.2.3", "1-", "NaN", "Infinity",
        "-Infinity", "undefined", "tru", "True", "nul", "nulll", "truefalse", "false0", "~a~", "a",
        "'", "'a", "'\\'", "'\\", "'\\x41'", "'\\~'", "'\\U0041'", "'\\u'", "'\\u12'", "'\\u12G4'",
        "'\\u+123'", "'\\u 123'", "'\\@'", "'\\ud800'", "'\\udc00'", "'\\ud800\\ud800'",
        "'\\ud800x'", "'\\ud800u12345'", "'\\ud800\\n'", "'\\ud800\\u0041'", "'\\ude00\\ud83d'", "'\\ud83d\\u'",
        "'\\ud800\\udbff'", "'\\ud800\\ue000'", "'\\ud83d\\ude0'", "'@'", "'\x01'", "'\x1f'",
        "'\n'", "'\t'", "'a' 'b'", "[", "]", "[1,]", "[,1]", "[,]", "[1 2]", "[1,,2]", "[1}",
        "[1:2]", "['a':1]", "[[]", "[]]", "{", "{]", "{'a'}", "{'a':}", "{'a':1,}", "{,}",
        "{'a' 1}", "{a:1}", "{~a~:1}", "{'a':1 'b':2}", "{'a'::1}", "{1:1}", "{'a':1,,'b':2}",
        "{[]:1}", "{null:1}", "{'a':1]", "{'a','b'}", "{}}", "{{}}", "[{]}", "{'\n':1}",
        "/**/1", "1//", "#1", "\f1", "\v1", "\xc2\xa0" "1", "\xe2\x80\xa8" "1", "1@", "@", "'\xff'",
        "'\xe4'", "'\xc0\x80'", "'\xed\xa0\x80'", "'\xf4\x90\x80\x80'", NULL,
    };
    static const char *const texts[] = {
        "", " ", "[]", "1", "'a'", "null", "{", "}", "{}x", "{}{}", "{},", "{}}", "{}@", "@{}",
        "\xef\xbb\xbf{}", "{}\xef\xbb\xbf", "{'a':1}/", "{} //", "{@}", "'{}'", "[{}]", "{'a':1},",
        "{}\x80", "\xff\xfe{@}@", NULL,
    };
    check_json(values, "{'v':%s}", false);
    check_json(texts, "%s", false);
}

/* 32 levels are fine, 33 are not. */
static void test_json_depth(void) {
    static const struct {
        const char *open, *close;
        unsigned levels, more;
    } kinds[] = {
        {"[", "]", 1, 0}, {"{'a':", "}", 1, 0}, {"[{'a':", "}]", 2, 0}, {"[1,", "]", 1, 0},
        {"[{},", ",[]]", 1, 1},
    };
    for (size_t k = 0; k < COUNT(kinds); k++)
        for (unsigned deep = 1; deep <= 70; deep++) {
            struct buf b = {0};
            buf_add(&b, S("{'v':"));
            for (unsigned i = 0; i < deep; i++) buf_add(&b, slice_of(kinds[k].open));
            buf_addc(&b, '0');
            for (unsigned i = 0; i < deep; i++) buf_add(&b, slice_of(kinds[k].close));
            buf_add(&b, (slice){"}", 2});   /* with its NUL */
            bool valid = 1 + deep * kinds[k].levels + kinds[k].more <= 32;
            CHECK(json_ok(spelled(b.p)) == valid, "%u times %s", deep, kinds[k].open);
            buf_free(&b);
        }
    struct buf b = {0};
    buf_add(&b, S("{\"a\":"));
    for (unsigned i = 0; i < 1000000; i++) buf_addc(&b, '[');
    CHECK(!json_ok(buf_slice(&b)), "a million times [");
    buf_free(&b);
}

/* The raw value of this name; of two the last one wins. */
static void test_json_pick(void) {
    static const struct {
        const char *text, *name, *raw;   /* raw "": missing */
    } cases[] = {
        {"{'a':'say'}", "a", "'say'"}, {"{ 'b' : 1 , 'a' : [ 2 ] , 'c' : 3 }", "a", "[ 2 ]"},
        {"{'a':1,'a':2}", "a", "2"}, {"{'\\u0061':1}", "a", "1"},
        {"{'a':1,'\\u0061':{}}", "a", "{}"}, {"{'A':1,'aa':2,'':3,' a':4}", "a", ""},
        {"{'a\\u0000':1,'\\u0000a':2}", "a", ""},
        {"{'b':{'a':1},'c':['a',{'a':2}],'d':'a'}", "a", ""}, {"{'a':null}", "a", "null"},
        {"{'a':-1.0e5}", "a", "-1.0e5"}, {"{'a':'\\''}", "a", "'\\''"}, {"{'':1}", "", "1"},
        {"{'\\u4f60':1}", "\xe4\xbd\xa0", "1"}, {"{'\xe4\xbd\xa0':1}", "\xe4\xbd\xa0", "1"},
        {"{'al':1}", "all", ""}, {"{'\\ud83d\\ude00':1}", "\xf0\x9f\x98\x80", "1"},
        {"{'all':1}", "al", ""}, {"{'\\/\\n':1}", "/\n", "1"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct json_field f = {cases[i].name, S("")};
        size_t at;
        CHECK(json_pick(spelled(cases[i].text), &f, 1, &at) == NULL, "%s: refused", cases[i].text);
        check_text(cases[i].text, f.raw, spelled(cases[i].raw));
    }
    CHECK(!json_is(S("true"), "true") && json_is(S("\"true\""), "true"), "a string is asked for");
}

static void test_json_text(void) {
    static const struct {
        const char *raw, *text;   /* NULL: none, and refused */
    } cases[] = {
        {NULL, ""}, {"null", ""}, {"false", ""}, {"true", "1"}, {"[]", NULL}, {"{}", NULL},
        {"''", ""}, {"'true'", "true"}, {"'a\\tb\\\\c\\/'", "a\tb\\c/"},
        {"'\\b\\f\\n\\r\\''", "\b\f\n\r'"}, {"'a\\u00e9b'", "a\xc3\xa9" "b"},
        {"'\\u0000\\u007F\\u0080\\u07ff'", "@\x7f\xc2\x80\xdf\xbf"},
        {"'\\u0800\\uffff'", "\xe0\xa0\x80\xef\xbf\xbf"},
        {"'\xe4\xbd\xa0\\n\xe4'", "\xe4\xbd\xa0\n\xe4"},
        {"'\\ud800\\udc00\\uDBFF\\uDFFF'", "\xf0\x90\x80\x80\xf4\x8f\xbf\xbf"}, {"0", "0"},
        {"1", "1"}, {"-12", "-12"}, {"1.50", "1.5"}, {"1.0", "1"}, {"1e3", "1000"}, {"0.1", "0.1"},
        {"-2.5e-1", "-0.25"}, {"0.30000000000000004", "0.30000000000000004"},
        {"123456789012345678", "123456789012345678"},
        {"9223372036854775807", "9223372036854775807"},
        {"-9223372036854775808", "-9223372036854775808"}, {"1e999", NULL}, {"-1e999", NULL},
        {"1e-999", "0"}, {"1e308", "1e+308"}, {"1.7e308", "1.7e+308"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        const char *name = cases[i].raw != NULL ? cases[i].raw : "(missing)";
        struct buf b = {0};
        bool ok = json_text(cases[i].raw != NULL ? spelled(cases[i].raw) : (slice){NULL, 0}, &b);
        CHECK(ok == (cases[i].text != NULL), "%s: %s", name, ok ? "accepted" : "refused");
        if (ok && cases[i].text != NULL) check_text(name, buf_slice(&b), spelled(cases[i].text));
        buf_free(&b);
    }
}

/* What is inside brackets: the values, each with a space behind it. */
static void test_json_each(void) {
    static const struct {
        const char *inside, *items;
    } cases[] = {
        {"", ""}, {" \t|", ""}, {"1", "1 "}, {"1,2", "1 2 "}, {" 1 |,\t2 ", "1 2 "}, {"''", "'' "}, {"[]", "[] "},
        {"{},[],[[]]", "{} [] [[]] "}, {"[1,[2,{'a':3}]],4", "[1,[2,{'a':3}]] 4 "},
        {"'a,b','c]','{'", "'a,b' 'c]' '{' "}, {"'\\'',1,'\\\\',2", "'\\'' 1 '\\\\' 2 "},
        {"'\\u0022,',3", "'\\u0022,' 3 "}, {"-1.5e+3,true,null", "-1.5e+3 true null "}, {"'a':1", "1 "},
        {"'a':1,'b':[2,3],'':{'d':{}}", "1 [2,3] {'d':{}} "}, {" 'k' : 'v:w' |, 'l'\t:\tnull ", "'v:w' null "},
        {"'[':'}',']':'{'", "'}' '{' "}, {"'\\':':{'\\'}':[']']}", "{'\\'}':[']']} "},
        {"['\\\\'],['\\']']", "['\\\\'] ['\\']'] "}, {"[ 1 , 2 ], { 'a' : 'b' }", "[ 1 , 2 ] { 'a' : 'b' } "},
        {"'~'", "'~' "},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct buf b = {0};
        slice value;
        for (slice rest = spelled(cases[i].inside); json_each(&rest, &value);)
            buf_printf(&b, "%.*s ", F(value));
        check_text(cases[i].inside, buf_slice(&b), spelled(cases[i].items));
        buf_free(&b);
    }
    struct buf b = {0};   /* what takes the square of its length would take hours here */
    slice value;
    for (unsigned i = 0; i < 1000000; i++) buf_add(&b, i % 2 == 0 ? S("1,") : S("[\"x\"],"));
    size_t n = 0;
    for (slice rest = slice_take(buf_slice(&b), b.len - 1); json_each(&rest, &value); n++) continue;
    CHECK(n == 1000000, "of a million %zu", n);
    struct buf one = {0};
    buf_printf(&one, "[%.*s0]", F(buf_slice(&b)));
    slice rest = buf_slice(&one);
    CHECK(json_each(&rest, &value) && value.len == one.len && rest.len == 0, "one that holds a million");
    buf_free(&b), buf_free(&one);
}

/* What is quoted is valid, and reads back the same. */
static void test_json_quote(void) {
    static const char *const some[] = {
        "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\\u0041", "\"", "plain",
    };
    struct buf text = {0}, raw = {0}, back = {0};
    json_quote(&raw, S("\"\\/\b\f\n\r\t\0\x01\x1f\x7f\xe4\xbd\xa0'<"));
    check_text("bytes", buf_slice(&raw), spelled("'\\'\\\\/\\b\\f\\n\\r\\t\\u0000\\u0001\\u001f\x7f"
                                                 "\xe4\xbd\xa0~<'"));
    for (unsigned round = 0; round < 2000; round++) {
        buf_clear(&text), buf_clear(&raw), buf_clear(&back);
        for (uint32_t n = random_below(20); n > 0; n--) {
            if (random_below(2) == 0) buf_addc(&text, (char)random_below(128));
            else buf_add(&text, slice_of(some[random_below(COUNT(some))]));
        }
        buf_addc(&raw, '{');
        json_add(&raw, "v", buf_slice(&text));
        buf_addc(&raw, '}');
        struct json_field v = {.name = "v"};
        size_t at;
        CHECK(json_pick(buf_slice(&raw), &v, 1, &at) == NULL, "%s is wrong", show(buf_slice(&raw)));
        CHECK(json_text(v.raw, &back), "%s is no text", show(buf_slice(&raw)));
        check_text("round trip", buf_slice(&back), buf_slice(&text));
    }
    buf_free(&text), buf_free(&raw), buf_free(&back);
}

static void test_html(void) {
    static const struct {
        const char *text, *plain, *broken;   /* broken: with <br /> */
    } cases[] = {
        {"", "", ""}, {"abc", "abc", "abc"}, {"&amp;", "&amp;amp;", "&amp;amp;"},
        {"@\t/`", "@\t/`", "@\t/`"},
        {"&<>'~", "&amp;&lt;&gt;&quot;&#039;", "&amp;&lt;&gt;&quot;&#039;"},
        {"a<b", "a&lt;b", "a&lt;b"}, {"\n", "\n", "<br />\n"}, {"\r", "\r", "<br />\r"},
        {"\r\n", "\r\n", "<br />\r\n"}, {"\n\r", "\n\r", "<br />\n\r"},
        {"\n\n", "\n\n", "<br />\n<br />\n"}, {"\r\r", "\r\r", "<br />\r<br />\r"},
        {"\n\r\n", "\n\r\n", "<br />\n\r<br />\n"},
        {"\r\n\r\n", "\r\n\r\n", "<br />\r\n<br />\r\n"},
        {"\r\n\n", "\r\n\n", "<br />\r\n<br />\n"},
        {"a\r\n<\nb", "a\r\n&lt;\nb", "a<br />\r\n&lt;<br />\nb"},
        {"\n\r\r\n", "\n\r\r\n", "<br />\n\r<br />\r\n"},
        {"\xe2\x80\xa8\xc2\x85", "\xe2\x80\xa8\xc2\x85", "\xe2\x80\xa8\xc2\x85"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct buf plain = {0}, broken = {0};
        html_escape(&plain, spelled(cases[i].text), false);
        html_escape(&broken, spelled(cases[i].text), true);
        check_text("plain", buf_slice(&plain), spelled(cases[i].plain));
        check_text("with breaks", buf_slice(&broken), spelled(cases[i].broken));
        buf_free(&plain), buf_free(&broken);
    }
}

/* ---- 3. Tables ---- */

static slice letter_key(const void *item) { return (slice){item, 1}; }

/* Few slots, many keys: nearly all collide, and what is at the end wraps to the front. */
static void test_tables(void) {
    unsigned wrapped = 0, moved = 0;
    for (unsigned round = 0; round < 60; round++) {
        struct table t = {.key = letter_key};
        unsigned n_keys = round % 20 == 0 ? 256 : 7, n = 0;
        char keys[256];
        bool in[256] = {false};
        tables.secret[0] = (unsigned char)round;   /* another order */
        for (unsigned step = 0; step < 7 * n_keys; step++) {
            unsigned k = step < 6 * n_keys ? random_below(n_keys) : step % n_keys;
            if (step >= 6 * n_keys && !in[k]) continue;   /* at the end all are taken out */
            keys[k] = (char)k;
            if (in[k]) table_remove(&t, letter_key(&keys[k]));
            else table_add(&t, &keys[k]);
            n = in[k] ? n - 1 : n + 1;
            in[k] = !in[k];
            CHECK(t.n == n && t.n * 4 <= t.cap * 3, "%zu items in %zu, not %u", t.n, t.cap, n);
            for (unsigned i = step % 16; i < n_keys; i += n_keys > 7 ? 16 : 1) {
                char key = (char)i;
                CHECK(table_find(&t, letter_key(&key)) == (in[i] ? &keys[i] : NULL), "key %u", i);
            }
            for (size_t i = 0; i < t.cap && n_keys == 7; i++) {
                size_t home = t.slot[i] != NULL ? table_home(&t, letter_key(t.slot[i])) : i;
                wrapped += home > i, moved += home != i;
            }
        }
        CHECK(t.n == 0 && t.cap == 8, "empty, but %zu slots", t.cap);
        for (size_t i = 0; i < t.cap; i++) CHECK(t.slot[i] == NULL, "slot %zu is not empty", i);
        free(t.slot);
    }
    CHECK(wrapped > 100 && moved > 1000, "too easy: %u wrapped, %u moved", wrapped, moved);
}

/* ---- 5. HTTP and WebSocket: addresses ---- */

static struct addr address(const char *text) {
    struct addr a;
    CHECK(addr_parse(slice_of(text), &a), "%s: no address", text);
    return a;
}

static void test_addresses(void) {
    static const char NO[] = "refused";
    static const struct {
        const char *text, *shown;
    } cases[] = {
        {"192.0.2.1", "192.0.2.1:80"}, {"0.0.0.0", "0.0.0.0:80"},
        {"255.255.255.255", "255.255.255.255:80"}, {"::1", "[::1]:80"}, {"::", "[::]:80"},
        {"2001:DB8::1", "[2001:db8::1]:80"}, {"::ffff:10.0.0.1", "10.0.0.1:80"},
        {"::ffff:a00:1", "10.0.0.1:80"}, {"", NO}, {"1.2.3", NO},
        {"fedc:ba98:7654:3210:fedc:ba98:255.255.255.255",
         "[fedc:ba98:7654:3210:fedc:ba98:ffff:ffff]:80"},
        {"1.2.3.4.5", NO}, {"256.0.0.1", NO}, {" 1.2.3.4", NO}, {"1.2.3.4:80", NO},
        {"[::1]", NO}, {"::1%lo", NO}, {"1::2::3", NO}, {"localhost", NO},
        {"1.2.3.4/8", NO}, {"-1.2.3.4", NO},
        {"0000:0000:0000:0000:0000:0000:0000:0000:0000:0000:0000:0001", NO},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct addr a;
        bool ok = addr_parse(slice_of(cases[i].text), &a);
        a.port = 80;
        const char *got = ok ? addr_text(&a) : "refused";
        check_text(cases[i].text, slice_of(got), slice_of(cases[i].shown));
    }
    struct sockaddr_in names[4];
    struct addrinfo list[4];
    for (size_t i = 0; i < COUNT(list); i++) {   /* 127.0.0.1, 127.0.0.1, 127.0.0.2, 127.0.0.1 */
        names[i] = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(i == 2 ? 0x7f000002 : 0x7f000001)};
        list[i] = (struct addrinfo){.ai_addr = (void *)&names[i], .ai_next = i < 3 ? &list[i + 1] : NULL};
        names[i].sin_port = htons((uint16_t)i);   /* that does not count */
        CHECK(addr_again(list, &list[i]) == (i == 1 || i == 3), "address %zu of a name", i);
    }
}

/* What dial() has said. */
static struct {
    int calls, with;   /* with a connection */
    const char *why;
} dialed;

static void dialed_done(struct conn *c, const char *why) {
    dialed.calls++, dialed.with += c != NULL, dialed.why = why;
    if (c != NULL) conn_lost(c, "test over");
}

/* Begins; to read from what is returned is to wait for the child. */
static struct conn *dialing(struct dial *d) {
    dial(d);
    struct conn *c = loop.conn[loop.n - 1];
    fcntl(c->fd, F_SETFL, 0);
    return c;
}

/* Which of its addresses is taken changes with each attempt; who has none is not waited for. */
static void test_dial(void) {
    static const struct proto none = {.name = "dialed"};
    struct address a;
    struct dial d = {"three", "1", .proto = &none, .done = dialed_done};
    for (d.attempt = 0; d.attempt < 7; d.attempt++) {
        struct conn *c = dialing(&d);
        CHECK(d.busy && recv(c->fd, &a, sizeof a, MSG_WAITALL) == (ssize_t)sizeof a && a.n == 3, "no address");
        int port = ntohs(((struct sockaddr_in *)(void *)&a.sa)->sin_port);
        CHECK(port == (int)d.attempt % 3 + 1, "attempt %u takes address %d", d.attempt, port);
        c->state = NULL;
        conn_lost(c, "test over"), loop_settle();
    }
    d.host = "none", d.busy = false;
    struct conn *c = dialing(&d);
    conn_read(c), loop_settle();
    CHECK(!d.busy && dialed.calls == 1 && strstr(dialed.why, "no address") != NULL, "%d calls", dialed.calls);
    while (waitpid(-1, NULL, WNOHANG) > 0) continue;
    check_empty();
}

/* What comes of an address, which may come in pieces. */
static void test_dial_feed(void) {
    static const struct {
        int family, error;
        const char *path;
    } cases[] = {{AF_UNIX, ENOENT, "/nosuch/socket"}, {AF_UNSPEC, EAFNOSUPPORT, ""}, {AF_INET, 0, NULL}};
    static const struct proto none = {.name = "dialed"};
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct dial d = {"host", "1", .proto = &none, .done = dialed_done, .busy = true};
        struct address a = {.len = sizeof(struct sockaddr_un), .n = 2};
        int listener = cases[i].path == NULL ? socket(AF_INET, SOCK_STREAM, 0) : -1;
        a.sa.ss_family = (sa_family_t)cases[i].family;
        if (cases[i].path != NULL) memcpy(((struct sockaddr_un *)(void *)&a.sa)->sun_path, cases[i].path, strlen(cases[i].path));
        else {
            ((struct sockaddr_in *)(void *)&a.sa)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
            a.len = sizeof(struct sockaddr_in);
            CHECK(bind(listener, (struct sockaddr *)&a.sa, a.len) == 0 && listen(listener, 1) == 0, "no listener");
            CHECK(getsockname(listener, (struct sockaddr *)&a.sa, &a.len) == 0, "no port");
        }
        memset(&dialed, 0, sizeof dialed);
        struct conn *c = wire_open(0, &dial_proto, &d);
        wire_feed(c, (slice){(char *)&a, 5});
        CHECK(dialed.calls == 0 && d.busy, "case %zu: half an address is one", i);
        wire_feed(c, (slice){(char *)&a + 5, sizeof a - 5});
        bool good = cases[i].error == 0;
        CHECK(dialed.calls == 1 && dialed.with == good && !d.busy && d.addresses == 2, "case %zu", i);
        CHECK(d.attempt == (good ? 0 : 1), "case %zu: the next address is number %u", i, d.attempt);
        if (!good) check_text("why", slice_of(dialed.why), slice_of(strerror(cases[i].error)));
        if (listener >= 0) close(listener);
        check_empty();
    }
}

/* A register is looked for at its next address when there was no connection, and only then. */
static void test_join_next(void) {
    for (int connects = 0; connects < 2; connects++) {
        uint32_t before = backend.join.attempt;
        struct conn *c = wire_open(0, &join_proto, NULL);
        wires[0].takes = connects ? SIZE_MAX : 0;
        join_opened(c, NULL);
        conn_touch(c), loop_settle();
        conn_lost(c, "connection reset"), loop_settle();
        CHECK(backend.join.attempt == before + !connects, "connected %d: %u to %u", connects, before, backend.join.attempt);
        check_empty();
    }
}

/* A passphrase that does not fit is none; without one OpenSSL must not ask at the terminal. */
static void test_passphrase(void) {
    char text[8] = "......", phrase[] = "1234";
    CHECK(tls_passphrase(text, 3, 0, phrase) == -1 && text[0] == '.', "too long");
    CHECK(tls_passphrase(text, 4, 0, NULL) == -1 && text[0] == '.', "none");
    CHECK(tls_passphrase(text, 4, 0, phrase) == 4 && memcmp(text, "1234.", 5) == 0, "it fits");
}

static void test_cidr(void) {
    static const struct {
        const char *cidr, *in[3], *out[3];
    } cases[] = {
        {"10.0.0.0/8", {"10.0.0.0", "10.255.0.1", "::ffff:10.1.2.3"}, {"11.0.0.0", "a00::"}},
        {"10.1.2.3/8", {"10.9.9.9"}, {"11.1.2.3"}},
        {"192.0.2.4/31", {"192.0.2.4", "192.0.2.5"}, {"192.0.2.6", "192.0.2.3"}},
        {"192.0.2.4/32", {"192.0.2.4"}, {"192.0.2.5", "::"}},
        {"192.0.2.4", {"192.0.2.4"}, {"192.0.2.5"}},
        {"::ffff:192.0.2.4", {"192.0.2.4"}, {"192.0.2.5"}},
        {"0.0.0.0/0", {"255.1.2.3", "0.0.0.0"}, {"::1"}},
        {"0.0.0.0/1", {"127.9.9.9"}, {"128.0.0.0"}}, {"::/0", {"2001:db8::1", "::"}, {NULL}},
        {"2001:db8::/32", {"2001:db8:ffff::1"}, {"2001:db9::"}},
        {"2001:db8::/31", {"2001:db9::"}, {"2001:dba::"}}, {"::1/128", {"::1"}, {"::", "::2"}},
        {"::1", {"::1"}, {"::3", "0.0.0.1"}}, {"::2/127", {"::2", "::3"}, {"::4", "::1"}},
    };
    static const char *const wrong[] = {
        "", "/", "/8", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/8/8", "10.0.0.0/ 8",
        "::/129", "::/a", "10.0.0", "localhost", "10.0.0.0/99999999999", "10.0.0.0:80", "[::1]/128",
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        CHECK(http_trust(cases[i].cidr) == NULL, "%s: refused", cases[i].cidr);
        for (size_t k = 0; k < 6; k++) {
            const char *text = k < 3 ? cases[i].in[k] : cases[i].out[k - 3];
            struct addr a = text != NULL ? address(text) : (struct addr){.local = true};
            CHECK(http_trusts(&a) == (k < 3 || a.local), "%s: %s", cases[i].cidr, addr_text(&a));
        }
        http.n_proxies = 0;
    }
    for (size_t i = 0; i < COUNT(wrong); i++)
        CHECK(http_trust(wrong[i]) != NULL && http.n_proxies == 0, "%s: accepted", wrong[i]);
    for (size_t i = 0; i <= COUNT(http.proxies); i++)
        CHECK((http_trust("::1") == NULL) == (i < COUNT(http.proxies)), "%zu proxies", i + 1);
}

/* Pages of which origins may connect: a + in front where they may. */
static void test_origins(void) {
    static const struct {
        const char *allowed, *host, *origins[16];
        bool tls;
    } cases[] = {
        {NULL, "chat.example:7272", {"+", "+http://chat.example:55151", "+http://chat.example", "+https://CHAT.example:1",
         "http://chat.example.evil:7272", "null", "http://chat.example:", "http://chat.example:1x", "file://", "http://:1",
         "http://xchat.example:7272", "ftp://chat.example:1"}, false},
        {NULL, "[::1]:7272", {"+http://[::1]:1", "+http://[::1]", "http://[::2]:7272", "http://[::1"}, false},
        {NULL, "2130706433:80", {"+http://2130706433", "+http://2130706433:1", "http://2130706434", "http://80"}, false},
        {NULL, "192.0.2.1", {"+http://192.0.2.1:80", "http://192.0.2.11", "http://192.0.2."}, false},
        {NULL, "chat.example", {"+https://chat.example:1", "+http://chat.example", "http://chat.example.evil:1"}, true},
        {"x://y", "chat.example:7272", {"+", "+http://chat.example:7272", "+https://chat.example:7272", "+HTTP://Chat.Example:7272",
         "+ws://chat.example:7272", "http://chat.example", "http://chat.example:727", "http://chat.example:72720",
         "http://chat.example:7272/", "http://chat.example.evil:7272", "http://evil.chat.example:7272", "null", "*",
         "chat.example:7272", "file://", "http:chat.example:7272"}, false},
        {"x://y", "chat.example", {"+http://chat.example", "+https://chat.example", "+http://chat.example:80",
         "+https://chat.example:443", "http://chat.example:443", "https://chat.example:80", "http://chat.example:7272",
         "http://", "https://", "http", ":", "://chat.example", "ftp://chat.example", "http://user@chat.example",
         "https://chat.example.evil", "https://chat.example "}, false},
        {"x://y", "chat.example:443", {"+https://chat.example", "+https://chat.example:443", "http://chat.example"}, false},
        {"x://y", "chat.example:80", {"+http://chat.example", "https://chat.example", "+http://chat.example:80"}, false},
        {"x://y", "chat.example", {"+https://chat.example", "+wss://chat.example", "http://chat.example", "ws://chat.example"}, true},
        {"x://y", "[::1]:7272", {"+http://[::1]:7272", "http://[::1]", "http://[::2]:7272"}, false},
        {"x://y", ":80", {"http://", "http://:443", "+http://:80"}, false},
        {"https://good.example", "h", {"+https://good.example", "+HTTPS://GOOD.example", "+http://h", "https://good.example.evil",
         "https://good.example:8443", "https://good.example:443", "http://good.example", "https://xgood.example",
         "https://good.exampl", "https://evil.example/https://good.example", "https://good.example, https://evil.example",
         "null", "good.example"}, false},
        {"https://a.example , app://b", "h", {"+https://a.example", "+app://b", "app://a", "app://", "http://a.example", ","}, false},
        {"*", "h", {"+null", "+https://any.example", "+nonsense", "+"}, false},
    };
    struct request q = {0};
    struct conn c = {0};
    for (size_t i = 0; i < COUNT(cases); i++) {
        opt.origin = cases[i].allowed != NULL ? cases[i].allowed : "";
        c.ssl = cases[i].tls ? (SSL *)(void *)&c : NULL;
        for (size_t k = 0; k < COUNT(cases->origins) && cases[i].origins[k] != NULL; k++) {
            const char *origin = cases[i].origins[k];
            q.header[HOST] = slice_of(cases[i].host);
            q.header[ORIGIN] = spelled(origin + (*origin == '+'));
            CHECK(http_welcome(&c, &q) == (*origin == '+'), "case %zu: %s", i, origin);
        }
    }
    opt.origin = "";
}

/* Two from one address are enough here, and a whole IPv6 network is one address. */
static void test_callers(void) {
    static const char *const peers[] = {
        "192.0.2.1", "192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2:0:0:1",
        "2001:db8:0:1::1",
        "192.0.2.1", "2001:db8::f00",   /* too many */
    };
    opt.max_per_address = 2;
    for (unsigned round = 0; round < 3; round++) {
        struct conn c[COUNT(peers)];
        for (size_t i = 0; i < COUNT(peers); i++) {
            c[i] = (struct conn){.peer = address(peers[i])};
            CHECK(http_count(&c[i], true) == (i < 6), "%s, number %zu", peers[i], i);
            CHECK(http_count(&c[i], true) == (i < 6), "%s, number %zu, again", peers[i], i);
        }
        CHECK(http.connections == 6 && http.callers.n == 4, "%u are counted", http.connections);
        for (size_t i = 0; i < COUNT(peers); i++) http_count(&c[i], false);
        check_empty();
    }
}

/* ---- Streams. What a parser understood is on the tape, what it answered on wire 0. ---- */

static struct buf tape;
static struct client tape_client;   /* chat_feed() wants one */

static void tape_message(struct conn *c, slice text) {
    (void)c;
    if (text.len > 126) buf_printf(&tape, "(%zu)|", text.len);
    else buf_printf(&tape, "%.*s|", F(text));
}

/* Leaves whatever rooms it is in. */
static void tape_closed(struct conn *c) {
    while (c->joined != NULL) room_leave(c->joined);
    ws_end(c);
}

static struct proto tape_proto;   /* the chat's, with these two */

static void tape_request(struct conn *c, const struct request *q) {
    buf_printf(&tape, "%.*s %.*s|", F(q->method), F(q->path));
    http_reply(c, q, "200 OK", S(""), S("body"));
}

static void tape_upgraded(struct conn *c, const struct request *q) {
    (void)q;
    c->proto = &tape_proto;
    c->state = &tape_client;
}

static struct site tape_site = {tape_request, tape_upgraded, 0, NULL};
static struct conn tape_listener = {.state = &tape_site};

enum { EACH_BYTE = -1, WHOLE = 0 };

/* Feeds a new connection, in two pieces or as said, and gives what it has sent. */
static void play(bool is_http, slice input, long cut, struct buf *sent) {
    struct conn *c = wire_open(0, &tape_proto, &tape_client);
    tape_client = (struct client){0};
    buf_clear(&tape);
    if (is_http) http_accepted(&tape_listener, c);
    for (size_t i = 0; cut == EACH_BYTE && i < input.len; i++)
        wire_feed(c, (slice){input.p + i, 1});
    if (cut >= 0) wire_feed(c, slice_take(input, cut > 0 ? (size_t)cut : input.len));
    if (cut > 0) wire_feed(c, slice_cut(input, (size_t)cut));
    buf_clear(sent);
    buf_add(sent, buf_slice(&wires[0].out));
    wire_close(c);
}

/* All ways to cut the input must give what it gave as a whole. A long one is only cut
 * near its ends. */
static void play_cut(const char *name, bool is_http, slice input, slice want_sent) {
    struct buf sent = {0}, want = {0};
    buf_add(&want, buf_slice(&tape));
    for (long cut = EACH_BYTE; cut < (long)input.len; cut++) {
        if (cut > 30 && cut < (long)input.len - 30) cut = (long)input.len - 30;
        play(is_http, input, cut, &sent);
        slice told = buf_slice(&tape), answer = buf_slice(&sent);
        if (slice_eq(told, buf_slice(&want)) && slice_eq(answer, want_sent)) continue;
        fail("%s, cut at %ld: tape %s, sent %s", name, cut, show(told), show(answer));
    }
    buf_free(&sent), buf_free(&want);
}

#define GET "GET / HTTP/1.1|Host: a|"
#define UP GET "Upgrade: websocket|Connection: Upgrade|"
#define VERSION "Sec-WebSocket-Version: 13|"
#define KEY "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==|"   /* the example of RFC 6455, 1.3 */

#define XFF "X-Forwarded-For: "

/* What is understood, and the status of each answer; inputs of which that is true. */
static const struct {
    const char *want, *inputs[48];
} http_cases[] = {
    {"", {"G", "|", "|\r", "GET", "GET / HTTP/1.1", GET, GET "\r"}},
    {"GET /|200", {
        GET "|", "GET / HTTP/1.0||", "|||" GET "|", GET "Connection: x, ClOsE||" GET "|",
        GET "Connection: close|Connection: x||" GET "|", GET "Content-Length: 0||",
        GET "X: a\tb \xe4|Y:|X:again||", "GET /?/b HTTP/1.1|hOST:\t a \t||",
        GET "Upgrade: websockets|" VERSION KEY "|", "GET http://a/ HTTP/1.1|Host: b||",
        "GET HTTPS://a:1 HTTP/1.1|Host: b||", "GET http://a?b/c HTTP/1.1|Host: b||", "GET http://a/ HTTP/1.0||",
    }},
    {"GET /|GET /|200 200", {GET "||" GET "|", GET "|" GET "||"}},
    {"GET /|200 400", {GET "|G@", GET "|\n"}},
    {"HEAD /a|200", {"HEAD /a?b=c HTTP/1.1|Host: a||", "HEAD http://a/a?b=c HTTP/1.1|Host: a||"}},
    {"DELETE /%00/../\xe4|200", {"DELETE /%00/../\xe4 HTTP/1.1|Host: a||"}},
    {"400", {   /* the first line */
        "\rG", "\n", " GET / HTTP/1.1|", "GET  / HTTP/1.1|", "GET /  HTTP/1.1|", "GET / HTTP/1.1 |",
        "GET /|", "GET|", "G|", "|G|", "GET / HTTP/1.2|", "GET / HTTP/2.0|", "GET / http/1.1|",
        "GET / HTTP/1.1\n", "GET a HTTP/1.1|", "GET * HTTP/1.1|", "GET ftp://a/ HTTP/1.1|",
        "GET http:///a HTTP/1.1|", "GET http://?a HTTP/1.1|", "GET http:/a HTTP/1.1|", "GET http HTTP/1.1|",
        "G\xc3\xa4T / HTTP/1.1|", "G(T / HTTP/1.1|", "GET /\x01 HTTP/1.1|", "GET /\x7f HTTP/1.1|",
        "GET /a\tb HTTP/1.1|", "GET /@ HTTP/1.1", "PRI * HTTP/2.0||SM||", "\x16\x03\x01\x02",
    }},
    {"400", {   /* the others */
        "GET / HTTP/1.1||", "GET http://a/ HTTP/1.1||", "GET / HTTP/1.1|Host:||", GET "Host: a||", GET "X : a||", GET "X||",
        GET ": a||", GET " X: a||", GET "X: a| b||", GET "X: a\n|", GET "X: a\rb||",
        GET "X: \x01||", GET "X: \x7f||", GET "X@: a|", GET "X: @|", GET "Content-Length: 1||",
        GET "Content-Length: -1||", GET "Content-Length:||", GET "Content-Length: 0, 0||",
        GET "Content-Length: 0|Content-Length: 0||", GET "Transfer-Encoding: chunked||",
    }},
    {"101", {
        UP VERSION KEY "|",
        GET "uPGRADE: h2c, WEBSOCKET|connection: keep-alive, uPGRADE|" VERSION KEY "|",
        GET "Upgrade: websocket|Connection: keep-alive|Connection: Upgrade|" VERSION KEY "|",
        GET "Upgrade: websocket|Connection: Upgrade|Connection: keep-alive|" VERSION KEY "|",
    }},
    {"x|101", {UP VERSION KEY "|\x81\x81@@@@x"}},
    {"426", {UP KEY "|", UP "Sec-WebSocket-Version: 8|" KEY "|"}},
    {"400", {   /* upgrades */
        UP VERSION "|", UP VERSION KEY KEY "|", GET "Upgrade: websocket|" VERSION KEY "|",
        GET "Upgrade: websocket|Connection: Upgraded|" VERSION KEY "|",
        UP VERSION "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j||",
        "GET / HTTP/1.0|Upgrade: websocket|Connection: Upgrade|" VERSION KEY "|",
        "POST / HTTP/1.1|Host: a|Upgrade: websocket|Connection: Upgrade|" VERSION KEY "|",
        UP VERSION "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQA=||",
        UP VERSION "Sec-WebSocket-Key: dGhlIHNhbXBsZ!Bub25jZQ==||",
    }},
};

static void test_http(void) {
    struct buf sent = {0}, got = {0};
    for (size_t i = 0; i < COUNT(http_cases); i++)
        for (const char *const *input = http_cases[i].inputs; *input != NULL; input++) {
            play(true, spelled(*input), WHOLE, &sent);
            buf_clear(&got);
            buf_add(&got, buf_slice(&tape));
            buf_addc(&sent, '\0');
            for (const char *at = sent.p; (at = strstr(at, "HTTP/1.1 ")) != NULL; at += 12)
                buf_printf(&got, "%s%.3s", at != sent.p ? " " : "", at + 9);
            check_text(*input, buf_slice(&got), slice_of(http_cases[i].want));
            sent.len--;
            play_cut(*input, true, spelled(*input), buf_slice(&sent));
        }
    play(true, spelled(UP VERSION KEY "|"), WHOLE, &sent);
    buf_addc(&sent, '\0');
    const char *accept = "\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n";
    CHECK(strstr(sent.p, accept) != NULL, "the example of the RFC");
    buf_free(&sent), buf_free(&got);
}

/* What becomes of who does not ask, or read, in time. */
static void test_http_late(void) {
    static const struct {
        const char *says;
        size_t takes;      /* of the answer */
        const char *sent;  /* its beginning */
    } cases[] = {
        {"", SIZE_MAX, ""}, {"GET / HT", SIZE_MAX, "HTTP/1.1 408 "}, {GET "|", SIZE_MAX, "HTTP/1.1 200 "}, {GET "|", 12, "HTTP/1.1 200"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct conn *c = wire_open(0, NULL, NULL);
        http_accepted(&tape_listener, c);
        wires[0].takes = cases[i].takes;
        wire_feed(c, spelled(cases[i].says));
        now.ms = c->deadline_ms - 1, loop_tick(), loop_settle();
        CHECK(!c->closing, "case %zu: too soon", i);
        now.ms += 1, loop_tick();
        CHECK(c->closing && c->lost == (cases[i].takes == 12), "case %zu: it may stay", i);
        loop_settle();
        slice sent = buf_slice(&wires[0].out), want = slice_of(cases[i].sent);
        CHECK(slice_starts(sent, want) && (want.len > 0 || sent.len == 0), "case %zu: %s", i, show(sent));
        if (loop.n > 0) wire_close(c);
        check_empty();
    }
}

/* Of many requests that came at once, no more are answered in a round than it takes to be paused, twice. */
static void test_http_turns(void) {
    struct buf many = {0};
    size_t n = 0, answer = 0;
    for (slice one = spelled(GET "|"); many.len + one.len <= READ_BYTES; n++) buf_add(&many, one);
    struct conn *c = wire_open(0, NULL, NULL);
    http_accepted(&tape_listener, c);
    wire_feed(c, buf_slice(&many));
    size_t sent = wires[0].out.len, rounds = 1;
    CHECK(sent > OUT_HIGH && sent < 2 * OUT_HIGH, "%zu bytes were sent in a round", sent);
    for (; (c->in.len > 0 || c->out.len > 0) && rounds < 10; rounds++) wire_drain(c, SIZE_MAX);
    buf_addc(&wires[0].out, '\0');
    for (const char *at = wires[0].out.p; (at = strstr(at, "HTTP/1.1 200 ")) != NULL; at++) answer++;
    CHECK(rounds < 10 && answer == n, "%zu of %zu answers after %zu rounds", answer, n, rounds);
    wire_close(c);
    check_empty();
    buf_free(&many);
}

/* Who is it, behind a proxy? 10/8 and fd00::/8 are ours. */
static void test_forwarded(void) {
    static const struct {
        const char *client, *peer, *lines;
    } cases[] = {
        {"192.0.2.1", "192.0.2.1", XFF "1.2.3.4|"}, {"10.0.0.1", "10.0.0.1", ""},
        {"1.2.3.4", "10.0.0.1", XFF "1.2.3.4|"}, {"1.2.3.4", "::ffff:10.0.0.1", XFF "1.2.3.4|"},
        {"2001:db8::1", "10.0.0.1", "x-forwarded-FOR:2001:db8::1|"},
        {"1.2.3.4", "10.0.0.1", XFF "6.6.6.6, 1.2.3.4|"},
        {"1.2.3.4", "10.0.0.1", XFF "1.2.3.4,10.0.0.2|"},
        {"1.2.3.4", "10.0.0.1", XFF "6.6.6.6 , 1.2.3.4 , fd00::2,10.0.0.2|"},
        {"10.0.0.1", "10.0.0.1", XFF "|"}, {"10.0.0.3", "10.0.0.1", XFF "10.0.0.3, 10.0.0.2|"},
        {"10.0.0.1", "10.0.0.1", XFF "junk|"}, {"10.0.0.1", "10.0.0.1", XFF ",,|"},
        {"10.0.0.2", "10.0.0.1", XFF "6.6.6.6, junk, 10.0.0.2|"},
        {"1.2.3.4", "10.0.0.1", XFF "6.6.6.6|" XFF "1.2.3.4|"},
        {"1.2.3.4", "10.0.0.1", XFF "1.2.3.4|" XFF "10.0.0.2|"},
        {"1.2.3.4", "fd00::1", XFF "::ffff:1.2.3.4|"}, {"1.2.3.4", "10.0.0.1", XFF "1.2.3.4:55|"},
        {"2001:db8::1", "10.0.0.1", XFF "[2001:db8::1]:55|"}, {"2001:db8::1", "10.0.0.1", XFF "[2001:db8::1]|"},
        {"2001:db8::55", "10.0.0.1", XFF "2001:db8::55|"}, {"10.0.0.1", "10.0.0.1", XFF "[|"},
        {"10.0.0.1", "10.0.0.1", XFF "[]|"}, {"10.0.0.1", "10.0.0.1", XFF "1.2.3.4:|"},
        {"10.0.0.1", "10.0.0.1", XFF ":55|"}, {"10.0.0.1", "10.0.0.1", XFF "[2001:db8::1]:x|"},
        {"5.6.7.8", "10.0.0.1", XFF "1.2.3.4||" GET XFF "5.6.7.8|"},
    };
    http_trust("10.0.0.0/8"), http_trust("fd00::/8");
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct conn *c = wire_open(0, &tape_proto, NULL);
        struct addr want = address(cases[i].client);
        char text[300];
        c->peer = address(cases[i].peer);
        wires[0].peer.sin6_family = AF_INET6;
        memcpy(&wires[0].peer.sin6_addr, c->peer.ip, 16);
        http_accepted(&tape_listener, c);
        snprintf(text, sizeof text, GET "%s|", cases[i].lines);
        wire_feed(c, spelled(text));
        bool right = memcmp(c->peer.ip, want.ip, 16) == 0;
        CHECK(right, "%s, %s: %s", cases[i].peer, cases[i].lines, addr_text(&c->peer));
        CHECK(http.connections == 1 && http.callers.n == 1, "%s: counted wrongly", cases[i].lines);
        wire_close(c);
    }
    check_empty();
}

/* ---- Frames. In the tables "81:hello" is a frame by its first byte and its payload,
 * "81*5" one of five times x, "=8100" bytes in hex; '|' stands between them. ---- */

static void add_frames(struct buf *b, const char *spec, bool masked) {
    static const char mask[] = {0x12, 0, (char)0xfe, (char)0x81};
    for (slice rest = slice_of(spec); rest.len > 0;) {
        slice item = slice_split(&rest, '|');
        bool raw = *item.p == '=', many = !raw && item.p[2] == '*';
        for (size_t i = 1; raw && i < item.len; i += 2)
            buf_addc(b, (char)slice_number((slice){item.p + i, 2}, 16));
        if (raw) continue;
        struct buf payload = {0};
        int64_t n = many ? slice_number(slice_cut(item, 3), 10) : 0;
        while (n-- > 0) buf_addc(&payload, 'x');
        if (!many) buf_add(&payload, slice_cut(item, 3));
        for (size_t i = 0; masked && i < payload.len; i++)
            payload.p[i] = (char)(payload.p[i] ^ mask[i % 4]);
        struct buf frame = {0};
        ws_append(&frame, 0, buf_slice(&payload));
        frame.p[0] = (char)slice_number(slice_take(item, 2), 16);
        if (masked) frame.p[1] = (char)(frame.p[1] | 0x80);
        size_t head = frame.len - payload.len;
        buf_add(b, slice_take(buf_slice(&frame), head));
        if (masked) buf_add(b, (slice){mask, 4});
        buf_add(b, slice_cut(buf_slice(&frame), head));
        buf_free(&payload), buf_free(&frame);
    }
}

/* The messages understood, the frames sent; and, if it must fail, the code of the close
 * frame that comes behind those. Then inputs of which that is true. */
static const struct {
    const char *tape, *out;
    unsigned code;
    const char *inputs[48];
} frames_cases[] = {
    {"", "", 0, {"=81", "=8180", "=81fe00800102", "01:a", "01:a|00:b", "8a:", "8a:pong", "8a*125"}},
    {"|", "", 0, {"81:", "01:|80:", "01:|00:|80:"}},
    {"a|", "", 0, {"81:a", "01:|80:a", "01:a|80:", "8a:x|81:a|8a:"}},
    {"hello|a|", "", 0, {"81:hello|81:a", "01:he|00:l|80:lo|81:a", "01:h|8a:x|80:ello|81:a"}},
    {"(127)|(200)|", "", 0, {"81*127|81*200", "01*126|80:x|01*127|80*73"}},
    {"(65535)|", "", 0, {"81*65535"}},
    {"(65536)|a|", "", 0, {"81*65536|81:a", "01*40000|80*25536|81:a", "01*65536|80:|81:a"}},
    {"(65536)|a|", "8a:ping", 0, {"01*65536|89:ping|80:|81:a"}}, {"", "8a:", 0, {"89:"}},
    {"a|", "8a:ping|8a*125", 0, {"89:ping|81:a|89*125", "01:|89:ping|89*125|80:a"}},
    {"\xe4\xbd\xa0|", "", 0, {"81:\xe4\xbd\xa0", "01:\xe4|00:\xbd|00:|80:\xa0"}},
    {"\xf0\x9f\x98\x80|", "8a:\xff", 0, {"01:\xf0\x9f|89:\xff|80:\x98\x80"}},
    {"", "88:", 0, {"88:", "88:|89:x", "01:a|88:|80:b"}},
    {"a|", "88:\x03\xe8", 0, {"81:a|88:\x03\xe8|81:b", "81:a|88:\x03\xe8" "bye"}},
    {"", "88:\x03\xeb", 0, {"88:\x03\xeb"}}, {"", "88:\x03\xef", 0, {"88:\x03\xef"}},
    {"", "88:\x03\xf6", 0, {"88:\x03\xf6"}}, {"", "88:\x0b\xb8", 0, {"88:\x0b\xb8"}},
    {"", "88:\x13\x87", 0, {"88:\x13\x87"}},
    {"", "", 1002, {   /* close codes that nobody may send */
        "88:x", "88:\x03\xe7", "88:\x03\xec", "88:\x03\xed", "88:\x03\xee", "88:\x03\xf7",
        "88:\x03\xf8", "88:\x07\xd0", "88:\x0b\xb7", "88:\x13\x88", "88:\xff\xff",
        "=8882000000000000",
    }},
    {"", "", 1002, {   /* no mask, reserved bits, reserved opcodes */
        "=8100", "=810161", "=8900", "c1:a", "a1:a", "91:a", "f1:a", "c9:a", "83:a", "84:", "85:",
        "86:", "87:", "8b:", "8c:", "8d:", "8e:", "8f:",
    }},
    {"", "", 1002, {   /* control frames and fragments as they must not be */
        "09:a", "08:", "0a:", "89*126", "88*126", "89*65536", "80:a", "00:a", "01:a|81:b",
        "01:a|01:b", "01:|01:",
    }},
    {"", "", 1002, {   /* lengths not in the shortest form, or beyond every sense */
        "=81fe007d", "=81fe0000", "=81ff000000000000ffff", "=81ff0000000000000000",
        "=81ff8000000000000000", "=81ffffffffffffffffff", "=81fffffffffffffffffc",
        "01:a|=80ffffffffffffffffff",
    }},
    {"a|", "", 1002, {"81:a|80:b", "81:a|=8100"}},
    {"", "", 1003, {"82:a", "82:", "02:a"}},
    {"", "", 1007, {
        "81:\xff", "81:\xed\xa0\x80", "81:\xe4\xbd", "01:\xff|80:", "01:\xe4|00:|80:a",
        "01:\xe4|80:", "01:\xf4\x90", "81:\xf4\x8f\xbf", "=81fe100012000000ed", "88:\x03\xe8\xff",
        "88:\x03\xe8ok \xe4\xbd",
    }},
    {"a|", "", 1007, {"81:a|81:\xc0\xaf"}}, {"", "8a:a", 1007, {"89:a|81:\x80"}},
    {"", "", 1009, {
        "=81ff0000000000010001", "=81ff0000000100000001", "=81ff7fffffffffffffff",
        "01*40000|80*25537", "01:a|00:b|=80ff7fffffffffffffff", "01*65536|80:a",
    }},
    {"a|", "", 1009, {"81:a|=81ff0000000000010001"}},
};

static void check_frames(size_t i, const char *input) {
    struct buf in = {0}, out = {0}, sent = {0};
    add_frames(&in, input, true);
    add_frames(&out, frames_cases[i].out, false);
    play(false, buf_slice(&in), WHOLE, &sent);
    check_text(input, buf_slice(&tape), slice_of(frames_cases[i].tape));
    slice all = buf_slice(&sent), end = slice_cut(all, sent.len < out.len ? sent.len : out.len);
    check_text(input, slice_take(all, all.len - end.len), buf_slice(&out));
    unsigned code = end.len < 4 ? 0 : (unsigned char)end.p[2] * 256u + (unsigned char)end.p[3];
    bool clean = end.len == 0 || (end.p[0] == (char)0x88 && ws_frame_size(end.p) == end.len);
    CHECK(code == frames_cases[i].code && clean, "%s: closed with %u, %s", input, code, show(end));
    play_cut(input, false, buf_slice(&in), all);
    buf_free(&in), buf_free(&out), buf_free(&sent);
}

static void test_frames(void) {
    for (size_t i = 0; i < COUNT(frames_cases); i++)
        for (const char *const *input = frames_cases[i].inputs; *input != NULL; input++)
            check_frames(i, *input);
    for (unsigned n = FRAGMENTS_MAX; n <= FRAGMENTS_MAX + 1; n++) {   /* a text of empty pieces */
        struct buf in = {0}, sent = {0};
        add_frames(&in, "01:a", true);
        for (unsigned i = 2; i < n; i++) add_frames(&in, "00:", true);
        add_frames(&in, "80:b", true);
        play(false, buf_slice(&in), WHOLE, &sent);
        check_text("fragments", buf_slice(&tape), n == FRAGMENTS_MAX ? S("ab|") : S(""));
        bool closed = sent.len > 4 && slice_eq((slice){sent.p + 2, 2}, S("\x03\xf0"));
        CHECK(closed == (n > FRAGMENTS_MAX), "%u fragments", n);
        buf_free(&in), buf_free(&sent);
    }
}

static void test_frame_sizes(void) {
    static const struct {
        size_t len;
        const char *head;
    } cases[] = {
        {0, "=8100"}, {1, "=8101"}, {125, "=817d"}, {126, "=817e007e"}, {127, "=817e007f"},
        {65535, "=817effff"}, {65536, "=817f0000000000010000"}, {1 << 24, "=817f0000000001000000"},
    };
    char *payload = xcalloc(1 << 24);
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct buf b = {0}, head = {0};
        add_frames(&head, cases[i].head, false);
        ws_append(&b, WS_TEXT, (slice){payload, cases[i].len});
        check_text(cases[i].head, slice_take(buf_slice(&b), head.len), buf_slice(&head));
        CHECK(b.len == head.len + cases[i].len, "%s: is %u bytes", cases[i].head, b.len);
        CHECK(ws_frame_size(b.p) == b.len, "%s: is read as %zu", cases[i].head, ws_frame_size(b.p));
        buf_free(&b), buf_free(&head);
    }
    free(payload);
}

/* ---- 7. Rooms ---- */

static struct ws people[COUNT(wires)];

static struct conn *person(int i, size_t takes) {
    people[i] = (struct ws){0};
    struct conn *c = wire_open(i, &tape_proto, &people[i]);
    wires[i].takes = takes;
    return c;
}

static struct member *join(const char *room, struct conn *c) {
    return room_join(room_open(S("rooms/"), slice_of(room)), c, ROOMS_PER_CLIENT);
}

static void say(const char *room, const char *text, struct member *except) {
    room_publish(room_open(S("rooms/"), slice_of(room)), slice_of(text), except);
}

/* The texts in these frames that begin with this letter, or all; a close frame is shown
 * as its code. Valid until called again. */
static slice heard(const struct buf *out, char only) {
    buf_clear(&tape);
    for (slice rest = buf_slice(out); rest.len > 0;) {
        size_t size = rest.len >= 4 ? ws_frame_size(rest.p) : 2;
        if (size > rest.len || size == 2) return S("(half a frame)");
        slice text = slice_cut(slice_take(rest, size), size > 127 ? 4 : 2);
        unsigned code = (unsigned char)text.p[0] * 256u + (unsigned char)text.p[1];
        if (*rest.p == (char)0x88) buf_printf(&tape, "(%u)", code);
        else if (only == 0 || *text.p == only) buf_printf(&tape, "%.*s|", F(text));
        rest = slice_cut(rest, size);
    }
    return buf_slice(&tape);
}

/* A log gives its memory back when the last member has read it, without another word. */
static void test_rooms_memory(void) {
    struct conn *c[] = {person(0, 10), person(1, SIZE_MAX)};
    join("r", c[0]), join("r", c[1]);
    struct room *r = room_open(S("rooms/"), S("r"));
    for (unsigned n = 0; n < 100; n++) say("r", "0123456789", NULL);
    loop_settle();
    CHECK(r->log.len > 1000, "the log has %u bytes, but one member has not read", r->log.len);
    wire_drain(c[0], SIZE_MAX);
    CHECK(heard(&wires[0].out, '0').len == 1100, "not all was sent");
    CHECK(r->log.p == NULL, "all have read, but the log keeps %u bytes", buf_cap(&r->log));
    wire_close(c[0]), wire_close(c[1]);
    check_empty();
}

/* What was said in the round of the signal is sent before the goodbye. */
static void test_rooms_stop(void) {
    struct conn *c = person(0, SIZE_MAX);
    join("r", c);
    say("r", "last words", NULL);
    loop_stop();
    loop_settle();
    check_text("the last it hears", heard(&wires[0].out, 0), S("last words|(1001)"));
    loop.stop_ms = 0;
    wire_close(c);
    check_empty();
}

static void test_rooms_except(void) {
    struct conn *c[] = {person(0, 3), person(1, SIZE_MAX)};
    struct member *m = join("r", c[0]);
    join("r", c[1]);
    say("r", "one", NULL);
    loop_settle();
    say("r", "two", NULL);
    say("r", "three", m);   /* half of "one" is sent, "two" is not */
    ws_text(c[0], S("four"));
    wire_drain(c[0], SIZE_MAX);
    check_text("the others", heard(&wires[1].out, 0), S("one|two|three|"));
    check_text("itself", heard(&wires[0].out, 0), S("one|two|four|"));
    wires[0].takes = 1;
    say("r", "five", NULL), loop_settle(), say("r", "six", NULL);
    room_leave(m);   /* with unread */
    say("r", "seven", NULL);
    wire_drain(c[0], SIZE_MAX);
    check_text("it left", heard(&wires[0].out, 0), S("one|two|four|five|six|"));
    CHECK(room_open(S("rooms/"), S("r"))->log.p == NULL, "the log is kept for one who left");
    say("r", "eight", NULL), ws_close(c[1], WS_POLICY, "test"), say("r", "nine", NULL);
    loop_settle();   /* who is closing must not hear what is behind a gap */
    check_text("closing", heard(&wires[1].out, 0), S("one|two|three|five|six|seven|(1008)"));
    wire_close(c[0]), wire_close(c[1]);
    check_empty();
}

/* A round for real sockets: collects what has come to each. */
static void pump(struct conn *c[3], const int peer[3], struct buf got[3], int first) {
    char piece[4096];
    for (int i = first; i < 3; i++) {
        wire_drain(c[i], 0);
        for (ssize_t k; (k = recv(peer[i], piece, sizeof piece, 0)) > 0;)
            buf_add(&got[i], (slice){piece, (size_t)k});
    }
}

/* Real sockets, with small buffers. The slow one is closed, the others get everything;
 * what the slow one has got are whole frames from the first on, and the reason. */
static void test_rooms_slow(void) {
    struct buf want = {0}, got[3] = {{0}, {0}, {0}};
    struct conn *c[3];
    int peer[3], small = 1, pair[2] = {-1, -1};
    opt.backlog = 4096;
    for (int i = 0; i < 3; i++) {
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0, "socketpair: %s", strerror(errno));
        setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
        fd_prepare(pair[0]), fd_prepare(pair[1]);
        people[i] = (struct ws){0};
        c[i] = conn_new(pair[0], &tape_proto, &people[i], false);
        peer[i] = pair[1];
        join("r", c[i]);
    }
    for (unsigned n = 0; n < 1000; n++) {
        char text[120];
        snprintf(text, sizeof text, "%0100u", n);
        buf_printf(&want, "%s|", text);
        say("r", text, NULL);
        CHECK(room_open(S("rooms/"), S("r"))->log.len <= opt.backlog, "the log is over --backlog");
        if (n % 5 == 0) pump(c, peer, got, 1);
    }
    CHECK(people[0].close_code == WS_TRY_AGAIN, "the slow one stays");
    CHECK(people[1].close_code == 0 && people[2].close_code == 0, "another one is closed");
    for (unsigned round = 0; round < 20; round++) pump(c, peer, got, 0);
    for (int i = 1; i < 3; i++) check_text("the others", heard(&got[i], 0), buf_slice(&want));
    slice slow = heard(&got[0], 0);
    size_t n = slow.len > 1000 ? slow.len - 6 : 0;
    check_text("the slow one's end", slice_cut(slow, n), S("(1013)"));
    CHECK(slice_starts(buf_slice(&want), slice_take(slow, n)), "before: %s", show(slow));
    for (int i = 0; i < 3; i++) close(peer[i]), conn_read(c[i]), loop_settle(), buf_free(&got[i]);
    check_empty();
    buf_free(&want);
}

static void test_rooms_many(void) {
    struct conn *c = person(0, 1), *other = person(1, SIZE_MAX);
    struct member *m[ROOMS_PER_CLIENT];
    struct buf all = {0};
    char name[16];
    opt.max_rooms = ROOMS_PER_CLIENT + 1;
    for (unsigned i = 0; i < ROOMS_PER_CLIENT; i++) {
        snprintf(name, sizeof name, "room%u|", i);
        CHECK((m[i] = join(name, c)) != NULL, "%s is refused", name);
    }
    CHECK(join("one more", c) == NULL && join("one more", other) != NULL, "rooms of a client");
    CHECK(room_open(S("rooms/"), S("another")) == NULL && room_open(S("rooms/"), S("room1|")) == m[1]->room, "--max-rooms");
    for (unsigned i = 0; i < ROOMS_PER_CLIENT; i += 3) room_leave(m[i]);
    for (unsigned i = 0; i < ROOMS_PER_CLIENT; i++) {
        snprintf(name, sizeof name, "room%u|", i);
        say(name, name, NULL);
    }
    wire_drain(c, 1);
    for (unsigned i = 0; i < 2000 && c->blocked; i++) wire_drain(c, 7);
    buf_add(&all, heard(&wires[0].out, 0)), buf_addc(&all, '\0');
    for (unsigned i = 0; i < ROOMS_PER_CLIENT; i++) {
        snprintf(name, sizeof name, "room%u|", i);
        bool left = i % 3 == 0, found = strstr(all.p, name) != NULL;
        CHECK(found != left, "%s: %s", name, left ? "still heard" : "missing");
    }
    CHECK(other->out.len == 0 && wires[1].out.len == 0, "heard what was said elsewhere");
    wire_close(c), wire_close(other), buf_free(&all);
    check_empty();
}

/* Random comings, goings and words, with sockets that take little. Everybody must hear in
 * each room what was said there from its coming to its going, and nothing else. */
static void test_rooms_random(void) {
    static const char *const names[] = {"a", "b", "c", "private"};
    struct buf want[4][4] = {{{0}}};   /* of a person, in a room; [3]: what is private */
    struct member *m[4][3] = {{NULL}};
    struct conn *c[4];
    for (int i = 0; i < 4; i++) c[i] = person(i, 20);
    for (unsigned step = 0; step < 8000; step++) {
        unsigned i = random_below(4), k = random_below(3), except = random_below(8);
        unsigned what = random_below(10);
        char text[300];
        int pad = (int)random_below(random_below(4) == 0 ? 180 : 9);
        snprintf(text, sizeof text, "%s%u %0*d", names[what == 2 ? 3 : k], step, pad, 0);
        if (what == 0 && m[i][k] == NULL) m[i][k] = join(names[k], c[i]);
        if (what == 1 && m[i][k] != NULL) room_leave(m[i][k]), m[i][k] = NULL;
        if (what == 2) ws_text(c[i], slice_of(text)), buf_printf(&want[i][3], "%s|", text);
        if (what == 3) wire_drain(c[i], random_below(random_below(2) == 0 ? 9 : 400));
        if (what == 4) loop_settle();
        if (what >= 5) say(names[k], text, except < 4 ? m[except][k] : NULL);
        for (unsigned to = 0; to < 4 && what >= 5; to++)
            if (m[to][k] != NULL && to != except) buf_printf(&want[to][k], "%s|", text);
    }
    for (unsigned i = 0; i < 4; i++) {
        wire_drain(c[i], SIZE_MAX);
        for (unsigned k = 0; k < 4; k++) {
            check_text(names[k], heard(&wires[i].out, *names[k]), buf_slice(&want[i][k]));
            CHECK(want[i][k].len > 1000, "too easy: %u bytes were said", want[i][k].len);
            buf_free(&want[i][k]);
        }
    }
    for (unsigned i = 0; i < 4; i++) wire_close(c[i]);
    check_empty();
}

/* A room is found only in its own space and under its whole name, and made only if that is wanted
 * and there may be one more. */
static void test_room_get(void) {
    char name[ROOM_MAX_BYTES + 1];
    memset(name, 'n', sizeof name);
    slice longest = {name, ROOM_MAX_BYTES}, longer = {name, ROOM_MAX_BYTES + 1};
    CHECK(room_find(S("rooms/"), S("a")) == NULL && rooms.by_name.n == 0, "found, or made by looking");
    struct room *a = room_open(S("rooms/"), S("a")), *user = room_open(S("users/"), S("a"));
    CHECK(a != NULL && user != NULL && a != user, "two spaces");
    CHECK(room_open(S("rooms/"), S("a")) == a && room_find(S("users/"), S("a")) == user, "found again");
    check_text("key", room_key(user), S("users/a"));
    check_text("name", room_name(a), S("a"));
    CHECK(room_find(S("rooms/"), S("a\0")) == NULL && room_find(S("rooms/"), S("")) == NULL, "part of a name");
    CHECK(room_open(S("rooms/"), longer) == NULL && room_find(S("rooms/"), longer) == NULL, "too long a name");
    CHECK(room_open(S("rooms/"), longest) != NULL, "the longest name");
    opt.max_rooms = 4;
    struct room *last = room_open(S("rooms/"), S("b"));
    CHECK(last != NULL && room_open(S("rooms/"), S("c")) == NULL && room_open(S("rooms/"), S("a")) == a, "--max-rooms");
    loop_settle();
    check_empty();
}

/* Who is in several rooms hears what is said to them in that order, even within one round. */
static void test_rooms_order(void) {
    struct conn *c = person(0, SIZE_MAX), *slow = person(1, 3);
    static const char *const said[] = {"a1", "b1", "a2", "c1", "c2", "b2", "a3"};
    struct buf want = {0};
    for (int i = 0; i < 3; i++)
        join((const char *[]){"c", "a", "b"}[i], c), join((const char *[]){"a", "b", "c"}[i], slow);
    for (size_t i = 0; i < COUNT(said); i++) {
        room_publish_next(room_open(S("rooms/"), (slice){said[i], 1}), slice_of(said[i]), NULL);
        buf_printf(&want, "%s|", said[i]);
        if (i == 4) loop_settle();
    }
    loop_settle();
    check_text("in order", heard(&wires[0].out, 0), buf_slice(&want));
    wire_drain(slow, SIZE_MAX);
    CHECK(heard(&wires[1].out, 0).len == want.len, "who is slow has lost something");
    wire_close(c), wire_close(slow), buf_free(&want);
    check_empty();
}

/* ---- With a clock that we set ---- */

/* Who does not take the last words, or does not go, is cut off after CLOSE_MS. */
static void test_too_slow_to_go(void) {
    for (size_t takes = 1; takes < 100; takes += 90) {
        struct conn *c = person(0, takes);
        join("r", c);
        ws_close(c, WS_POLICY, "first"), ws_close(c, WS_TOO_BIG, "second");
        loop_settle();
        wire_feed(c, S("\xff\xff garbage that nobody looks at"));
        now.ms += CLOSE_MS - 1, loop_tick(), loop_settle();
        CHECK(loop.n == 1 && c->swept && c->fin_sent == (takes > 1), "ended too early");
        now.ms += 1, loop_tick(), loop_settle();
        slice want = takes > 1 ? S("\x88\x07\x03\xf0" "first") : S("\x88");
        check_text("last words", buf_slice(&wires[0].out), want);
        check_empty();
    }
}

static struct conn *chatter(int i) {
    struct conn *c = wire_open(i, NULL, NULL);
    chat_upgraded(c, &(struct request){0});
    return c;
}

/* --rate 50 --burst 100: past 100 ahead of the clock an error, past 200 the end. */
static void test_rate(void) {
    static const struct {
        unsigned wait_ms, messages, pongs;   /* of these */
        bool closed;
    } cases[] = {
        {0, 100, 100, false}, {0, 1, 0, false}, {20, 1, 0, false}, {40, 2, 1, false},
        {40, 1, 1, false}, {1000, 51, 50, false}, {3600000, 150, 100, false}, {0, 50, 0, false},
        {19, 1, 0, true},
    };
    struct conn *c = chatter(0);
    for (size_t i = 0; i < COUNT(cases); i++) {
        unsigned pongs = 0, errors = 0;
        now.ms += cases[i].wait_ms;
        for (unsigned n = 0; n < cases[i].messages && !c->closing; n++)
            chat_message(c, S("{\"type\":\"ping\"}"));
        buf_clear(&wires[0].out);
        loop_settle();
        for (slice rest = heard(&wires[0].out, '{'); rest.len > 0;) {
            slice text = slice_split(&rest, '|');
            pongs += slice_eq(text, S("{\"type\":\"pong\"}"));
            errors += slice_starts(text, S("{\"type\":\"error\",\"code\":\"rate_limited\""));
        }
        CHECK(pongs == cases[i].pongs, "case %zu: %u pongs", i, pongs);
        CHECK(c->closing == cases[i].closed, "case %zu: closed?", i);
        unsigned refused = cases[i].messages - pongs - cases[i].closed;
        CHECK(errors == refused, "case %zu: %u errors", i, errors);
    }
    check_text("the end", heard(&wires[0].out, '-'), S("(1008)"));
    wire_close(c);
    opt.rate = 0;
    c = chatter(0);
    struct client *cl = c->state;
    for (unsigned n = 0; n < 3000; n++) CHECK(chat_allow(cl), "--rate 0: message %u is refused", n);
    wire_close(c);
}

/* What a client was sent since the last time, without times: the ids and the epoch of
 * clients and logs are replaced by '#'. */
static const char *news(int i) {
    static char text[4096];
    size_t n = 0;
    loop_settle();
    for (slice rest = heard(&wires[i].out, '{'); rest.len > 0;) {
        slice one = slice_split(&rest, '|');
        for (size_t k = 0; k < one.len && n + 2 < sizeof text; k++) {
            size_t hex = 0;
            while (k + hex < one.len && strchr("0123456789abcdef-: ", one.p[k + hex]) != NULL) hex++;
            if (hex >= 19) k += hex - 1, text[n++] = '#';
            else text[n++] = one.p[k];
        }
        text[n++] = '|';
    }
    text[n] = '\0';
    buf_clear(&wires[i].out);
    return text;
}

#define SAYS(heading, text) "{\"type\":\"say\",\"from_client_id\":\"#\",\"from_client_name\":\"Ann\",\"to_uid\":\"42\"," \
    "\"content\":\"<b>" heading ": </b>" text "\",\"time\":\"#\",\"id\":\"#\"}"
#define TO_YOU "\xe5\xaf\xb9\xe4\xbd\xa0\xe8\xaf\xb4"
#define TO_BOB "\xe4\xbd\xa0\xe5\xaf\xb9" "Bob\xe8\xaf\xb4"

/* A user's inbox: all connections of the user hear, and those that come later. */
static void test_inbox(void) {
    static const char *const login = "{\"type\":\"login\",\"client_name\":\"B\",\"room_id\":\"b\"%s}";
    char text[200], id[ID_BYTES + 1];
    struct conn *ann = chatter(0), *bob[2];
    chat_message(ann, S("{\"type\":\"login\",\"client_name\":\"Ann\",\"room_id\":\"users/42\"}"));
    news(0);
    for (int i = 0; i < 2; i++) {
        client_identify((bob[i] = chatter(1 + i))->state, S("42"));
        snprintf(text, sizeof text, login, "");
        chat_message(bob[i], slice_of(text));
    }
    CHECK(strstr(news(1), "\"inbox_id\":\"#\",\"client_list\"") != NULL, "no inbox_id");
    news(2);
    chat_message(ann, S("{\"type\":\"say\",\"to_uid\":42,\"to_client_name\":\"Bob\",\"content\":\"one\"}"));
    check_text("the sender", slice_of(news(0)), S(SAYS(TO_BOB, "one") "|"));
    check_text("a connection", slice_of(news(1)), S(SAYS(TO_YOU, "one") "|"));
    check_text("another", slice_of(news(2)), S(SAYS(TO_YOU, "one") "|"));
    history_newest(((struct client *)bob[1]->state)->more->inbox->room->past, id);
    wire_close(bob[0]), wire_close(bob[1]);
    chat_message(ann, S("{\"type\":\"say\",\"to_uid\":\"42\",\"to_client_name\":\"Bob\",\"content\":\"two\"}"));
    chat_message(ann, S("{\"type\":\"say\",\"to_uid\":\"43\",\"to_client_name\":\"\",\"content\":\"not his\"}"));
    news(0);
    /* He comes again: what he missed, once; the others hear nothing. */
    client_identify((bob[0] = chatter(1))->state, S("42"));
    snprintf(text, sizeof text, ",\"inbox_since\":\"%s\"", id);
    char again[300];
    snprintf(again, sizeof again, login, text);
    chat_message(bob[0], slice_of(again));
    const char *got = news(1);
    CHECK(strstr(got, "\"inbox_recovered\":true") != NULL, "not recovered: %s", got);
    got = strstr(got, "{\"type\":\"history\"");
    bob[0]->blocked = false;   /* poll says that there is room */
    check_text("missed", slice_of(got != NULL ? got : "nothing"),
               S("{\"type\":\"history\",\"to_uid\":\"42\",\"messages\":[" SAYS(TO_YOU, "two") "],\"more\":false}|"));
    check_text("Ann heard", slice_of(news(0)), S(""));
    /* No room is an inbox, and who is nobody has none. */
    chat_message(ann, S("{\"type\":\"history\"}"));
    check_text("a room of that name", slice_of(news(0)),
               S("{\"type\":\"history\",\"room_id\":\"users/42\",\"messages\":[],\"more\":false}|"));
    CHECK(((struct client *)ann->state)->more->inbox == NULL, "an inbox without a uid");
    static const struct {
        const char *fields, *code;
    } wrong[] = {
        {"'to_uid':'','content':'x'", "bad_field"}, {"'to_uid':[],'content':'x'", "bad_field"},
        {"'to_uid':'42','content':{}", "bad_field"}, {"'to_uid':'42','content':'x','to_client_name':[]", "bad_field"},
        {"'to_uid':'%0129d','content':'x'", "too_long"}, {"'to_uid':'a\\nb','content':'x'", "bad_field"},
        {"'to_uid':'another','content':'x'", "limit"},
    };
    for (size_t i = 0; i < COUNT(wrong); i++) {
        char code[40];
        snprintf(text, sizeof text, wrong[i].fields, 0);
        snprintf(again, sizeof again, "{'type':'say',%s}", text);
        opt.max_rooms = i + 1 == COUNT(wrong) ? (uint32_t)rooms.by_name.n : UINT32_MAX;
        chat_message(ann, spelled(again));
        snprintf(code, sizeof code, "\"code\":\"%s\"", wrong[i].code);
        CHECK(strstr(news(0), code) != NULL && *news(1) == '\0', "letter %zu", i);
    }
    chat_message(bob[0], S("{\"type\":\"say\",\"to_client_id\":\"all\",\"content\":\"x\"}"));
    CHECK(strstr(news(1), "\"from_uid\":\"42\"") != NULL, "his uid is not told");
    wire_close(ann), wire_close(bob[0]);
    check_empty();
}

/* ---- Passes. ---- */

/* A token, in memory of just its size. NULL for the head is the usual one. */
static slice minted(const char *head, const char *claims, const struct secret *key, struct buf *b) {
    slice parts[2] = {spelled(head != NULL ? head : "{'typ':'JWT','alg':'HS256'}"), spelled(claims)};
    struct buf text = {0};
    for (int i = 0; i < 2; i++) {
        if (i > 0) buf_addc(&text, '.');
        base64url(&text, parts[i]);
    }
    pass_sign(&text, key);
    buf_free(b);
    b->p = (char *)xrealloc(NULL, BUF_HEAD + text.len) + BUF_HEAD;
    ((uint32_t *)(void *)b->p)[-1] = text.len;
    memcpy(b->p, buf_slice(&text).p, b->len = text.len);
    buf_free(&text);
    return buf_slice(b);
}

static void keys(const char *one, const char *two) {
    chat.n_secrets = one == NULL ? 0 : two == NULL ? 1 : 2;
    memset(chat.secrets, 0, sizeof chat.secrets);
    for (uint32_t i = 0; i < chat.n_secrets; i++)
        memcpy(chat.secrets[i].text, i == 0 ? one : two, chat.secrets[i].len = strlen(i == 0 ? one : two));
}

/* "" for a token that is good. */
static void check_pass(slice token, const char *room, const char *want, const char *name) {
    const char *why = pass_check(token, slice_of(room));
    check_text(name, slice_of(why != NULL ? why : ""), slice_of(want));
}

/* Forth and back, and nothing is read that would not be written just so. */
static void test_base64url(void) {
    static const char *const wrong[] = {
        "Z", "Zg=", "Zg==", "Zh", "Zv", "Zm9", "Zm8=", "Zm9vY", "Zm 9v", "Zm9v|", "Zm9v@", "+/-_", "-_+/", "Zg.", "=", "Zm9v\xc3\xa9",
    };
    struct buf text = {0}, bytes = {0};
    for (size_t n = 0; n < 70; n++) {
        unsigned char random[70];
        for (size_t i = 0; i < n; i++) random[i] = (unsigned char)random_below(256);
        buf_clear(&text), buf_clear(&bytes);
        base64url(&text, (slice){(char *)random, n});
        CHECK(base64url_read(buf_slice(&text), &bytes) && slice_eq(buf_slice(&bytes), (slice){(char *)random, n}), "%zu", n);
    }
    for (uint32_t pair = 0; pair < 65536; pair++) {   /* of 65,536 pairs of characters 256 are a byte */
        char two[2] = {(char)(pair >> 8), (char)pair};
        buf_clear(&text), buf_clear(&bytes);
        if (!base64url_read((slice){two, 2}, &bytes)) continue;
        base64url(&text, buf_slice(&bytes));
        CHECK(slice_eq(buf_slice(&text), (slice){two, 2}), "%.2s is read as another", two);
    }
    for (size_t i = 0; i < COUNT(wrong); i++) CHECK(!base64url_read(spelled(wrong[i]), &bytes), "%s", wrong[i]);
    buf_free(&text), buf_free(&bytes);
}

/* The example of RFC 7515, appendix A.1, which has no sub and expired on 22 March 2011. */
static void test_pass_rfc(void) {
    slice token = S("eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9."
                    "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ."
                    "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk");
    struct buf key = {0};
    CHECK(base64url_read(S("AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"), &key),
          "its key");
    keys("", NULL);
    memcpy(chat.secrets[0].text, buf_slice(&key).p, chat.secrets[0].len = key.len);
    now.wall = 1300819380 + LEEWAY_S - 1;
    check_pass(token, "1", "sub must be text of 1 to 128 bytes", "A.1");
    now.wall++;
    check_pass(token, "1", "expired", "A.1, a second later");
    chat.secrets[0].text[0] ^= 1;
    check_pass(token, "1", "bad signature", "A.1 with another key");
    keys(NULL, NULL);
    buf_free(&key);
    clock_read();
}

static void test_pass(void) {
    static const char plain[] = "it is no HS256 token", sub[] = "sub must be text of 1 to 128 bytes",
        times[] = "exp and nbf must be numbers", name[] = "name must be text of up to 64 bytes",
        no_list[] = "rooms must be a list of texts", not_here[] = "room not allowed", object[] = "its claims are no JSON object";
    static const struct {
        const char *head, *claims, *want;   /* at 1,000,000 s, for the room "team 7" */
    } cases[] = {
        {NULL, "{'sub':'42'}", ""}, {"{'alg':'HS256'}", "{'sub':'42'}", ""}, {"{'alg':'\\u0048S256'}", "{'sub':'42'}", ""},
        {"{'alg':'none'}", "{'sub':'42'}", plain}, {"{'alg':'HS384'}", "{'sub':'42'}", plain},
        {"{'alg':'RS256'}", "{'sub':'42'}", plain}, {"{'alg':'hs256'}", "{'sub':'42'}", plain},
        {"{'alg':'HS2561'}", "{'sub':'42'}", plain}, {"{'alg':['HS256']}", "{'sub':'42'}", plain}, {"{}", "{'sub':'42'}", plain},
        {"{'alg':null}", "{'sub':'42'}", plain}, {"{'Alg':'HS256'}", "{'sub':'42'}", plain}, {"", "{'sub':'42'}", plain},
        {"{'alg':'HS256'", "{'sub':'42'}", plain}, {"['alg','HS256']", "{'sub':'42'}", plain},
        {"{'x':{'alg':'HS256'}}", "{'sub':'42'}", plain}, {"{'alg':'HS256','alg':'none'}", "{'sub':'42'}", plain},
        {"{'alg':'HS256','crit':['b64'],'b64':false}", "{'sub':'42'}", plain}, {"{'alg':'HS256','crit':null}", "{'sub':'42'}", plain},
        {NULL, "", object}, {NULL, "{'sub':'42'", object}, {NULL, "['42']", object}, {NULL, "{'sub':'42'}x", object},
        {NULL, "{'sub':'\xff'}", object}, {NULL, "'42'", object}, {NULL, "{'sub':'@'}", object},
        {NULL, "{}", sub}, {NULL, "{'sub':''}", sub}, {NULL, "{'sub':42}", sub}, {NULL, "{'sub':null}", sub},
        {NULL, "{'sub':['42']}", sub}, {NULL, "{'sub':{}}", sub}, {NULL, "{'sub':true}", sub}, {NULL, "{'sub':'4\\u0000'}", sub},
        {NULL, "{'sub':'4\\n2'}", sub}, {NULL, "{'sub':'\x7f'}", sub}, {NULL, "{'Sub':'42'}", sub}, {NULL, "{'x':{'sub':'42'}}", sub},
        {NULL, "{'sub':'42','exp':1000001}", ""}, {NULL, "{'sub':'42','exp':999971}", ""}, {NULL, "{'sub':'42','exp':999970}", "expired"},
        {NULL, "{'sub':'42','exp':0}", "expired"}, {NULL, "{'sub':'42','exp':-1e9}", "expired"}, {NULL, "{'sub':'42','exp':1e6}", ""},
        {NULL, "{'sub':'42','exp':999970.5}", ""}, {NULL, "{'sub':'42','exp':1e999}", ""},
        {NULL, "{'sub':'42','exp':'1000001'}", times}, {NULL, "{'sub':'42','exp':null}", times}, {NULL, "{'sub':'42','exp':true}", times},
        {NULL, "{'sub':'42','exp':[]}", times}, {NULL, "{'sub':'42','nbf':'0'}", times}, {NULL, "{'sub':'42','nbf':{}}", times},
        {NULL, "{'sub':'42','nbf':1000030}", ""}, {NULL, "{'sub':'42','nbf':1000031}", "not valid yet"},
        {NULL, "{'sub':'42','nbf':1.1e6}", "not valid yet"}, {NULL, "{'sub':'42','nbf':1e999}", "not valid yet"},
        {NULL, "{'sub':'42','exp':2000000,'exp':1}", "expired"}, {NULL, "{'sub':'42','nbf':0,'exp':2000000,'iat':'x','iss':7}", ""},
        {NULL, "{'sub':'42','name':'Ann'}", ""}, {NULL, "{'sub':'42','name':''}", ""}, {NULL, "{'sub':'42','name':7}", name},
        {NULL, "{'sub':'42','name':null}", name}, {NULL, "{'sub':'42','name':['Ann']}", name}, {NULL, "{'sub':'42','name':'A\\tn'}", name},
        {NULL, "{'sub':'42','rooms':['team 7']}", ""}, {NULL, "{'sub':'42','rooms': [ 'x' , 'team 7' ] }", ""},
        {NULL, "{'sub':'42','rooms':['*']}", ""}, {NULL, "{'sub':'42','rooms':['team*']}", ""}, {NULL, "{'sub':'42','rooms':['team 7*']}", ""},
        {NULL, "{'sub':'42','rooms':['\\u0074eam 7']}", ""}, {NULL, "{'sub':'42','rooms':[]}", not_here},
        {NULL, "{'sub':'42','rooms':['team']}", not_here}, {NULL, "{'sub':'42','rooms':['team 77']}", not_here},
        {NULL, "{'sub':'42','rooms':['Team*']}", not_here}, {NULL, "{'sub':'42','rooms':['team 7 *']}", not_here},
        {NULL, "{'sub':'42','rooms':['*7']}", not_here}, {NULL, "{'sub':'42','rooms':['']}", not_here},
        {NULL, "{'sub':'42','rooms':'team 7'}", no_list}, {NULL, "{'sub':'42','rooms':null}", no_list}, {NULL, "{'sub':'42','rooms':{}}", no_list},
        {NULL, "{'sub':'42','rooms':['team 7',7]}", no_list}, {NULL, "{'sub':'42','rooms':[7]}", no_list},
        {NULL, "{'sub':'42','rooms':[['team 7']]}", no_list}, {NULL, "{'sub':'42','rooms':[null]}", no_list},
    };
    struct buf b = {0};
    keys("sixteen bytes it", NULL);
    now.wall = 1000000;
    for (size_t i = 0; i < COUNT(cases); i++) {
        check_pass(minted(cases[i].head, cases[i].claims, chat.secrets, &b), "team 7", cases[i].want, cases[i].claims);
        if (*cases[i].want == '\0') check_text(cases[i].claims, buf_slice(&chat.uid), S("42"));
    }
    char claims[300];
    for (int sub_len = 127; sub_len < 131; sub_len++)
        for (int name_len = 63; name_len < 66; name_len++) {
            snprintf(claims, sizeof claims, "{'sub':'%0*d','name':'%0*d'}", sub_len, 0, name_len, 0);
            check_pass(minted(NULL, claims, chat.secrets, &b), "team 7", sub_len > 128 ? sub : name_len > 64 ? name : "", claims);
        }
    minted(NULL, "{'sub':'7','name':'A&\\u00fc'}", chat.secrets, &b);
    check_pass(buf_slice(&b), "team 7", "", "a name");
    check_text("its user", buf_slice(&chat.uid), S("7"));
    check_text("its name", buf_slice(&chat.name), S("A&\xc3\xbc"));
    buf_free(&b);
    keys(NULL, NULL);
    clock_read();
}

/* Whatever is changed in a token, it is no good any more; and with two secrets either will do. */
static void test_pass_forged(void) {
    static const char *const others[] = {
        "", ".", "..", "...", "a", "a.b", "a.b.", ".b.c", "a..c", "a.b.c", "a.b.c.d", "eyJhbGciOiJub25lIn0.eyJzdWIiOiI0MiJ9.",
        "eyJhbGciOiJub25lIn0.eyJzdWIiOiI0MiJ9", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiI0MiJ9.", "@", "@.@.@",
    };
    struct buf b = {0}, other = {0}, forged = {0};
    keys("sixteen bytes it", NULL);
    slice good = minted("{'alg':'HS256'}", "{'sub':'42'}", chat.secrets, &b);
    check_pass(good, "1", "", "unchanged");
    for (size_t i = 0; i <= good.len; i++) {
        CHECK(pass_check(slice_take(good, i), S("1")) != NULL || i == good.len, "the first %zu bytes", i);
        for (int c = 0; c < 256 && i < good.len; c++) {
            buf_free(&forged);
            buf_add(&forged, good);
            forged.p[i] = (char)c;
            CHECK(pass_check(buf_slice(&forged), S("1")) != NULL || c == (unsigned char)good.p[i], "byte %zu is %d", i, c);
        }
        buf_free(&forged);
        buf_add(&forged, slice_take(good, i)), buf_addc(&forged, 'A'), buf_add(&forged, slice_cut(good, i));
        CHECK(pass_check(buf_slice(&forged), S("1")) != NULL, "a letter before byte %zu", i);
    }
    for (size_t i = 0; i < COUNT(others); i++) CHECK(pass_check(spelled(others[i]), S("1")) != NULL, "%s", others[i]);
    /* A signature belongs to what it signs. */
    slice more = minted("{'alg':'HS256'}", "{'sub':'43'}", chat.secrets, &other);
    buf_free(&forged);
    buf_add(&forged, slice_take(good, good.len - 43)), buf_add(&forged, slice_cut(more, more.len - 43));
    check_pass(buf_slice(&forged), "1", "bad signature", "another's signature");

    keys("another secret it", "sixteen bytes it");
    check_pass(good, "1", "", "by the second secret");
    check_pass(minted(NULL, "{'sub':'42'}", chat.secrets, &other), "1", "", "by the first secret");
    keys("another secret it", NULL);
    check_pass(good, "1", "bad signature", "by a secret that has gone");
    keys("sixteen bytes i", NULL);
    check_pass(good, "1", "bad signature", "by a part of the secret");
    keys(NULL, NULL);
    buf_free(&b), buf_free(&other), buf_free(&forged);
}

/* Who comes back is sent one piece of history a round, so that others have their turn,
 * and what is new behind the last one. */
static void test_replay(void) {
    char dir[] = "/tmp/xchat-unit-XXXXXX", remove[80], text[1200], pieces[20] = "";
    CHECK(mkdtemp(dir) != NULL, "no directory");
    history_init(dir);
    struct conn *ann = chatter(0), *bob = chatter(1);
    chat_message(ann, S("{\"type\":\"login\",\"client_name\":\"Ann\",\"room_id\":\"r\"}"));
    opt.burst = 1000;
    for (int i = 0; i < 100; i++) {
        snprintf(text, sizeof text, "{\"type\":\"say\",\"to_client_id\":\"all\",\"content\":\"%01000d\"}", i);
        chat_message(ann, slice_of(text));
    }
    loop_settle();
    chat_message(bob, S("{\"type\":\"login\",\"client_name\":\"Bob\",\"room_id\":\"r\",\"since\":\"none\"}"));
    chat_message(ann, S("{\"type\":\"say\",\"to_client_id\":\"all\",\"content\":\"live\"}"));
    for (int round = 0; round < 6; round++) {
        loop_settle();
        size_t n = strlen(pieces);
        for (slice rest = heard(&wires[1].out, '{'); rest.len > 0 && n < sizeof pieces - 3;) {
            slice one = slice_split(&rest, '|'), more = S("\"more\":true}");
            bool history = slice_starts(one, S("{\"type\":\"history\""));
            pieces[n++] = !history ? one.p[9] : slice_eq(slice_cut(one, one.len - more.len), more) ? '+' : '.';
        }
        memcpy(pieces + n, "|", 2);
        buf_clear(&wires[1].out);
        bob->blocked = false;   /* poll says that there is room */
        conn_touch(bob);
    }
    check_text("pieces a round: login, history with more, without, say", slice_of(pieces), S("l+|+|+|.|s||"));
    wire_close(ann), wire_close(bob);
    check_empty();
    close(histories.dir_fd);
    snprintf(remove, sizeof remove, "rm -r %s", dir);
    CHECK(system(remove) == 0, "%s", remove);
    history_init(NULL);
}

/* Seconds at which a ping goes out, and '!' where the connection is closed. */
static void test_silence(void) {
    static const struct {
        unsigned heard_at[3];
        const char *want;
    } cases[] = {
        {{0}, "25 50 75!"}, {{10}, "35 60 85!"}, {{26, 51, 76}, "25 101 126 151!"},
        {{74}, "25 50 99 124 149!"}, {{24, 48, 72}, "97 122 147!"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct conn *c = chatter(0);
        struct buf got = {0};
        for (unsigned s = 1; s < 200 && !c->closing; s++) {
            now.ms += 1000;
            for (unsigned k = 0; k < 3; k++)
                if (s == cases[i].heard_at[k]) wire_feed(c, S("\x8a\x80\0\0\0\0"));
            buf_clear(&wires[0].out);
            loop_tick(), loop_settle();
            slice sent = buf_slice(&wires[0].out);
            if (sent.len == 0) continue;
            buf_printf(&got, "%s%u%s", got.len > 0 ? " " : "", s, c->closing ? "!" : "");
            if (c->closing) check_text("close", sent, S("\x88\x15\x11\x38silent for too long"));
            else check_text("pings", sent, S("\x89\0\x81\x0f{\"type\":\"ping\"}"));
        }
        check_text("seconds", buf_slice(&got), slice_of(cases[i].want));
        wire_close(c), buf_free(&got);
    }
}

/* ---- 10. Back end: PHP values ---- */

/* A value cut anywhere is none, whatever lies behind the cut; nothing of that may be read. */
static void check_php_cut(slice whole, bool objects) {
    for (size_t cut = 0; cut < whole.len; cut++) {
        char *exact = memcpy(xcalloc(cut + 1), whole.p, cut);
        ASAN_POISON_MEMORY_REGION(exact + cut, 1);
        CHECK(!php_valid((slice){exact, cut}, objects), "%s, cut to %zu bytes", show(whole), cut);
        ASAN_UNPOISON_MEMORY_REGION(exact + cut, 1);
        for (const char *behind = "{};:\"0"; *behind != '\0'; behind++) {
            exact[cut] = *behind;
            CHECK(!php_valid((slice){exact, cut}, objects), "%s, cut to %zu bytes, behind it %c", show(whole),
             cut, *behind);
        }
        free(exact);
    }
}

/* Valid with objects, valid without. Invalid ones stay so inside an array. */
static void test_php_valid(void) {
    static const char *const plain[] = {
        "N;", "b:0;", "b:1;", "i:0;", "i:-5;", "i:9223372036854775807;", "i:-9223372036854775808;", "d:0.1;", "d:-0;",
        "d:1.5E+300;", "d:INF;", "d:-INF;", "d:NAN;", "s:0:'';", "s:3:'abc';", "s:3:'';}';", "s:3:'@|';", "a:0:{}",
        "a:1:{i:0;N;}", "a:2:{i:0;i:1;s:1:'a';a:1:{i:-5;a:0:{}}}", "a:1:{s:4:'a:1:';s:3:'{};';}",
        "s:4:'\xe4\xbd\xa0\xff';",
    }, *const objects[] = {
        "O:8:'stdClass':0:{}", "O:8:'stdClass':1:{s:1:'x';i:1;}", "a:1:{i:0;O:1:'A':1:{s:4:'@A@p';a:0:{}}}",
    }, *const none[] = {
        "", ";", "N", "N:;", "n;", "b;", "b:2;", "b:;", "b:00;", "b:t;", "i:;", "i:-;", "i:1.0;", "i: 1;", "i:1 ;",
        "i:0x1;", "i:--1;", "i:10000000000000000000;", "d:;", "s:1:'';",
        "s:2:'a';", "s:0:';", "s:-1:'a';", "s:1:a;", "s:1:'a'", "s:1;'a';", "s:+1:'a';", "s: 1:'a';", "s:1:~a~;",
        "s::'';", "s:1:'ab';", "S:1:'a';", "s:18446744073709551615:'a';", "s:18446744073709551617:'a';",
        "s:4294967297:'a';", "s:999999999999999:'a';", "s:9223372036854775807:'a';", "a:1:{}", "a:0:{N;}", "a:0:{",
        "a:0:}", "a:0;", "a:1:{N;}", "a:1:{i:0;}", "a:-1:{}", "a:1:{i:0;N;i:1;N;}", "a:2:{i:0;N;}", "a:1:{N;N;}",
        "a:1:{b:1;N;}", "a:1:{d:1;N;}", "a:1:{a:0:{}N;}", "a:1:[i:0;N;]", "a:1:{i:0;N; }", "a::{}",
        "a:18446744073709551617:{i:0;N;}", "a:9223372036854775808:{}", "a:4294967297:{i:0;N;}",
        "a:999999999999999:{i:0;N;}", "a:4611686018427387904:{}", "C:1:'A':0:{}", "E:3:'A:B';", "R:1;", "r:1;",
        "o:1:{}", "O:8:'stdClass':1:{}", "O:8:'stdClass';", "O:8:'stdClass'", "O:8:'stdClass':",
        "O:9:'stdClass':0:{}", "O:0::0:{}", "O:-1:'A':0:{}", "O:+1:'A':0:{}", "P:1;", "@;", "@:1;", "@:@;",
        "\xff:1;", "U:1:'a';", ":;", "::;", "}", "{}",
    };
    for (size_t i = 0; i < COUNT(plain); i++) {
        slice s = spelled(plain[i]);
        CHECK(php_valid(s, false) && php_valid(s, true), "%s: refused", show(s));
        check_php_cut(s, true);
        struct buf two = {0};
        buf_add(&two, s), buf_add(&two, s);
        slice rest = buf_slice(&two);
        CHECK(!php_valid(rest, true), "%s, twice", show(s));
        CHECK(slice_eq(php_take(&rest, true), s) && slice_eq(rest, s), "%s: not one taken of two", show(s));
        buf_free(&two);
    }
    for (size_t i = 0; i < COUNT(objects); i++) {
        slice s = spelled(objects[i]);
        CHECK(php_valid(s, true) && !php_valid(s, false), "%s: an object", show(s));
        check_php_cut(s, true);
    }
    for (size_t i = 0; i < COUNT(none); i++) {
        struct buf in = {0};
        slice s = spelled(none[i]);
        CHECK(!php_valid(s, true) && !php_valid(s, false), "%s: accepted", show(s));
        buf_printf(&in, "a:1:{i:0;%.*s}", F(s));
        if (s.len > 0) CHECK(!php_valid(buf_slice(&in), true), "%s: accepted in an array", show(s));
        buf_free(&in);
    }
}

/* Arrays, objects or both, so deep inside each other. */
static slice php_nested(struct buf *b, unsigned deep, char kind, const char *inner) {
    buf_clear(b);
    for (unsigned i = 0; i < deep; i++)
        buf_add(b, kind == 'a' || (kind == 'b' && i % 2 == 0) ? S("a:1:{s:1:\"k\";") : S("O:1:\"A\":1:{s:1:\"k\";"));
    buf_add(b, slice_of(inner));
    for (unsigned i = 0; i < deep; i++) buf_addc(b, '}');
    return buf_slice(b);
}

static void test_php_depth(void) {
    struct buf b = {0}, json = {0};
    for (const char *kind = "aOb"; *kind != '\0'; kind++)
        for (unsigned deep = 1; deep <= PHP_DEPTH + 2; deep++) {
            slice s = php_nested(&b, deep, *kind, "i:7;");
            bool good = deep <= PHP_DEPTH;
            CHECK(php_valid(s, true) == good, "%c, %u deep", *kind, deep);
            CHECK(php_json(s, &json) == good, "%c, %u deep, as JSON", *kind, deep);
            s = php_nested(&b, deep, *kind, "a:0:{}");
            CHECK(php_valid(s, true) == (deep < PHP_DEPTH), "%c, %u deep, and an empty one", *kind, deep);
            buf_clear(&json);
        }
    buf_clear(&b);
    for (unsigned i = 0; i < 1000000; i++) buf_add(&b, S("a:1:{i:0;"));
    CHECK(!php_valid(buf_slice(&b), true), "a million deep");
    buf_clear(&b);
    buf_add(&b, S("a:1000000:{"));
    for (unsigned i = 0; i < 1000000; i++) buf_printf(&b, "i:%u;N;", i);
    buf_addc(&b, '}');
    CHECK(php_valid(buf_slice(&b), false), "a million long");
    buf_free(&b), buf_free(&json);
}

/* What looks like an integer of 64 bits, as PHP itself would write it, is one. */
static void test_php_key(void) {
    static const struct {
        const char *key, *want;
    } cases[] = {
        {"0", "i:0;"}, {"77", "i:77;"}, {"-5", "i:-5;"}, {"", "s:0:'';"}, {"-", "s:1:'-';"}, {"-0", "s:2:'-0';"},
        {"01", "s:2:'01';"}, {"00", "s:2:'00';"}, {"-01", "s:3:'-01';"}, {"+1", "s:2:'+1';"}, {" 1", "s:2:' 1';"},
        {"1 ", "s:2:'1 ';"}, {"1.0", "s:3:'1.0';"}, {"1e3", "s:3:'1e3';"}, {"--1", "s:3:'--1';"},
        {"1-", "s:2:'1-';"}, {"9223372036854775807", "i:9223372036854775807;"},
        {"9223372036854775808", "s:19:'9223372036854775808';"}, {"-9223372036854775807", "i:-9223372036854775807;"},
        {"-9223372036854775808", "i:-9223372036854775808;"},
        {"-9223372036854775809", "s:20:'-9223372036854775809';"},
        {"10000000000000000000", "s:20:'10000000000000000000';"},
        {"9999999999999999999", "s:19:'9999999999999999999';"}, {"1@", "s:2:'1@';"}, {"a", "s:1:'a';"},
        {"'", "s:1:''';"}, {"123456789012345678901234567890", "s:30:'123456789012345678901234567890';"},
        {"\xe4\xbd\xa0", "s:3:'\xe4\xbd\xa0';"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct buf b = {0};
        php_key(&b, spelled(cases[i].key));
        check_text(cases[i].key, buf_slice(&b), spelled(cases[i].want));
        buf_free(&b);
    }
}

/* What json_encode() of PHP makes of what unserialize() gives it. */
static void test_php_json(void) {
    static const struct {
        const char *php, *json;   /* NULL: there is none */
    } cases[] = {
        {"N;", "null"}, {"b:1;", "true"}, {"b:0;", "false"}, {"i:-5;", "-5"},
        {"i:9223372036854775807;", "9223372036854775807"}, {"d:0.5;", "0.5"}, {"d:1;", "1"}, {"d:-0;", "-0"},
        {"d:0.0001;", "0.0001"}, {"d:1.0E-5;", "1.0e-5"}, {"d:1.0E+17;", "1.0e+17"}, {"d:1.5E+300;", "1.5e+300"},
        {"d:1.2345678901234568E+17;", "1.2345678901234568e+17"}, {"d:INF;", NULL}, {"d:-INF;", NULL}, {"d:NAN;", NULL},
        {"a:1:{i:0;d:NAN;}", NULL}, {"d:abc;", NULL}, {"d:1E;", NULL}, {"d:0x10;", NULL}, {"d:-;", NULL},
        {"d:1,2;", NULL}, {"d:.;", NULL}, {"s:0:'';", "''"}, {"s:3:'a/b';", "'a\\/b'"},
        {"s:9:''\\\b\f\n\r\t\x01\x7f';", "'\\'\\\\\\b\\f\\n\\r\\t\\u0001\x7f'"}, {"s:2:'@~';", "'\\u0000~'"},
        {"s:9:'\xc3\xa9\xe4\xbd\xa0\xf0\x9f\x98\x80';", "'\xc3\xa9\xe4\xbd\xa0\xf0\x9f\x98\x80'"},
        {"s:1:'\xff';", NULL}, {"s:3:'\xed\xa0\x80';", NULL}, {"s:5:'[1,2]';", "'[1,2]'"},
        {"a:1:{s:1:'\xff';N;}", NULL}, {"a:0:{}", "[]"}, {"a:2:{i:0;i:1;i:1;i:2;}", "[1,2]"},
        {"a:2:{i:1;i:1;i:0;i:2;}", "{'1':1,'0':2}"}, {"a:1:{i:1;s:1:'a';}", "{'1':'a'}"},
        {"a:2:{i:0;s:1:'a';i:2;s:1:'b';}", "{'0':'a','2':'b'}"}, {"a:1:{i:-1;N;}", "{'-1':null}"},
        {"a:2:{i:0;N;s:1:'1';N;}", "{'0':null,'1':null}"}, {"a:1:{s:3:'a/'';i:1;}", "{'a\\/\\'':1}"},
        {"a:1:{s:0:'';N;}", "{'':null}"}, {"a:1:{s:1:'b';a:1:{s:1:'c';a:0:{}}}", "{'b':{'c':[]}}"},
        {"a:1:{i:0;a:1:{i:0;a:0:{}}}", "[[[]]]"},
        {"a:3:{i:0;a:1:{i:0;i:1;}i:1;a:1:{i:1;i:1;}i:2;i:3;}", "[[1],{'1':1},3]"},
        {"a:2:{i:0;s:1:'[';i:1;s:1:'{';}", "['[','{']"}, {"a:2:{s:1:'[';i:1;s:1:'{';i:2;}", "{'[':1,'{':2}"},
        {"a:1:{s:1:'@';i:1;}", "{'\\u0000':1}"}, {"O:8:'stdClass':0:{}", "{'__PHP_Incomplete_Class_Name':'stdClass'}"},
        {"O:8:'stdClass':2:{s:1:'a';i:1;s:1:'b';a:1:{i:0;i:1;}}",
         "{'__PHP_Incomplete_Class_Name':'stdClass','a':1,'b':[1]}"},
        {"O:1:'A':3:{s:1:'p';i:1;s:4:'@*@q';i:2;s:4:'@A@r';a:1:{i:0;i:3;}}",
         "{'__PHP_Incomplete_Class_Name':'A','p':1}"},
        {"a:2:{i:0;O:1:'A':2:{s:4:'@A@r';O:1:'B':0:{}s:1:'p';i:1;}i:1;i:2;}",
         "[{'__PHP_Incomplete_Class_Name':'A','p':1},2]"},
        {"C:1:'A':0:{}", NULL}, {"R:1;", NULL}, {"", NULL}, {"N;N;", NULL}, {"@:1;", NULL}, {"a:1:{i:0;@:1;}", NULL},
        {"a:5:{s:4:'type';s:3:'arr';s:1:'u';s:5:'\xe4\xbd\xa0/'';s:1:'n';a:5:{i:0;i:1;i:1;d:2.5;i:2;N;i:3;b:1;"
         "i:4;d:0.1;}s:1:'e';a:0:{}s:1:'o';O:8:'stdClass':1:{s:1:'p';i:1;}}",
         "{'type':'arr','u':'\xe4\xbd\xa0\\/\\'','n':[1,2.5,null,true,0.1],'e':[],"
         "'o':{'__PHP_Incomplete_Class_Name':'stdClass','p':1}}"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct buf b = {0};
        bool ok = php_json(spelled(cases[i].php), &b);
        CHECK(ok == (cases[i].json != NULL), "%s: %s", cases[i].php, ok ? "accepted" : "refused");
        if (ok && cases[i].json != NULL) check_text(cases[i].php, buf_slice(&b), spelled(cases[i].json));
        if (ok) {
            struct buf whole = {0};
            buf_printf(&whole, "{\"v\":%.*s}", F(buf_slice(&b)));
            CHECK(json_ok(buf_slice(&whole)), "%s is no JSON", show(buf_slice(&b)));
            buf_free(&whole);
        }
        buf_free(&b);
    }
}

static void check_merge(slice old, slice add, slice want) {
    struct buf b = {0};
    char name[80];
    snprintf(name, sizeof name, "%.30s + %.30s", show(old), show(add));
    php_merge(old, add, &b);
    check_text(name, buf_slice(&b), want);
    CHECK(php_valid(buf_slice(&b), true), "%s: no PHP value", name);
    buf_free(&b);
}

/* What array_replace_recursive() of PHP makes of two arrays. */
static void test_php_merge(void) {
    static const struct {
        const char *old, *add, *want;
    } cases[] = {
        {"a:0:{}", "a:0:{}", "a:0:{}"},
        {"a:1:{s:1:'a';i:1;}", "a:0:{}", "a:1:{s:1:'a';i:1;}"},
        {"a:0:{}", "a:1:{s:1:'a';i:1;}", "a:1:{s:1:'a';i:1;}"},
        {"a:3:{s:1:'a';i:1;s:1:'b';i:2;s:1:'c';i:3;}", "a:1:{s:1:'b';s:1:'x';}",
         "a:3:{s:1:'a';i:1;s:1:'b';s:1:'x';s:1:'c';i:3;}"},
        {"a:3:{s:1:'a';i:1;s:1:'b';i:2;s:1:'c';i:3;}", "a:3:{s:1:'c';i:4;s:1:'b';i:5;s:1:'a';i:6;}",
         "a:3:{s:1:'a';i:6;s:1:'b';i:5;s:1:'c';i:4;}"},
        {"a:2:{s:1:'a';i:1;s:1:'b';i:2;}", "a:2:{s:1:'c';i:3;s:1:'a';a:1:{i:0;i:1;}}",
         "a:3:{s:1:'a';a:1:{i:0;i:1;}s:1:'b';i:2;s:1:'c';i:3;}"},
        {"a:1:{s:1:'a';a:3:{i:0;i:1;i:1;i:2;i:2;i:3;}}", "a:1:{s:1:'a';a:1:{i:0;i:9;}}",
         "a:1:{s:1:'a';a:3:{i:0;i:9;i:1;i:2;i:2;i:3;}}"},
        {"a:1:{s:1:'a';a:1:{i:0;i:1;}}", "a:1:{s:1:'a';a:2:{i:1;i:2;i:0;i:3;}}",
         "a:1:{s:1:'a';a:2:{i:0;i:3;i:1;i:2;}}"},
        {"a:1:{s:1:'a';a:1:{i:0;i:1;}}", "a:1:{s:1:'a';i:5;}", "a:1:{s:1:'a';i:5;}"},
        {"a:1:{s:1:'a';i:5;}", "a:1:{s:1:'a';a:1:{i:0;i:1;}}", "a:1:{s:1:'a';a:1:{i:0;i:1;}}"},
        {"a:1:{i:5;s:1:'a';}", "a:2:{i:5;s:1:'b';i:6;s:1:'c';}", "a:2:{i:5;s:1:'b';i:6;s:1:'c';}"},
        {"a:2:{i:0;i:1;i:1;i:2;}", "a:1:{i:2;i:3;}", "a:3:{i:0;i:1;i:1;i:2;i:2;i:3;}"},
        {"a:1:{s:1:'a';a:2:{s:1:'b';a:2:{s:1:'c';i:1;s:1:'d';i:2;}s:1:'e';i:3;}}",
         "a:2:{s:1:'a';a:1:{s:1:'b';a:2:{s:1:'d';a:1:{i:0;i:4;}s:1:'f';i:5;}}s:1:'g';a:0:{}}",
         "a:2:{s:1:'a';a:2:{s:1:'b';a:3:{s:1:'c';i:1;s:1:'d';a:1:{i:0;i:4;}s:1:'f';i:5;}s:1:'e';i:3;}s:1:'g';"
         "a:0:{}}"},
        {"a:1:{s:1:'a';a:1:{s:1:'x';i:1;}}", "a:1:{s:1:'a';a:0:{}}", "a:1:{s:1:'a';a:1:{s:1:'x';i:1;}}"},
        {"a:1:{s:1:'a';a:0:{}}", "a:1:{s:1:'a';a:1:{s:1:'x';i:1;}}", "a:1:{s:1:'a';a:1:{s:1:'x';i:1;}}"},
        {"a:1:{s:1:'a';N;}", "a:2:{s:1:'a';N;s:1:'b';b:1;}", "a:2:{s:1:'a';N;s:1:'b';b:1;}"},
        {"a:2:{s:0:'';i:1;s:2:'5a';i:2;}", "a:2:{s:2:'5a';d:0.5;s:0:'';d:-0;}", "a:2:{s:0:'';d:-0;s:2:'5a';d:0.5;}"},
        {"a:2:{s:1:'a';a:2:{i:0;a:1:{i:0;i:1;}i:1;a:1:{i:0;i:2;}}s:1:'z';i:1;}",
         "a:2:{s:1:'z';i:2;s:1:'a';a:1:{i:1;a:2:{i:0;i:3;i:1;i:4;}}}",
         "a:2:{s:1:'a';a:2:{i:0;a:1:{i:0;i:1;}i:1;a:2:{i:0;i:3;i:1;i:4;}}s:1:'z';i:2;}"},
        {"a:1:{s:1:'k';s:3:'}{;';}", "a:2:{s:1:'k';s:6:'';i:1;';s:1:'}';a:0:{}}",
         "a:2:{s:1:'k';s:6:'';i:1;';s:1:'}';a:0:{}}"},
        {"a:7:{s:1:'k';s:1:'v';s:1:'n';i:1;s:1:'f';d:1.5;s:1:'t';b:1;s:1:'z';N;s:1:'l';a:2:{i:0;i:1;i:1;i:2;"
         "}s:1:'m';a:1:{s:1:'a';s:3:'\xe4\xbd\xa0';}}",
         "a:4:{s:1:'n';i:2;s:1:'l';a:2:{i:1;s:3:'two';i:2;s:5:'three';}s:1:'m';a:1:{s:1:'b';b:0;}s:3:'new';"
         "s:1:'x';}",
         "a:8:{s:1:'k';s:1:'v';s:1:'n';i:2;s:1:'f';d:1.5;s:1:'t';b:1;s:1:'z';N;s:1:'l';a:3:{i:0;i:1;i:1;s:3:'two';"
         "i:2;s:5:'three';}s:1:'m';a:2:{s:1:'a';s:3:'\xe4\xbd\xa0';s:1:'b';b:0;}s:3:'new';s:1:'x';}"},
        {"a:1:{s:1:'a';a:1:{i:0;i:1;}}", "a:1:{s:1:'a';O:8:'stdClass':1:{s:1:'x';i:1;}}",
         "a:1:{s:1:'a';O:8:'stdClass':1:{s:1:'x';i:1;}}"},
        {"a:1:{s:1:'a';O:8:'stdClass':1:{s:1:'x';i:1;}}", "a:1:{s:1:'a';a:1:{i:0;i:1;}}",
         "a:1:{s:1:'a';a:1:{i:0;i:1;}}"},
    };
    for (size_t i = 0; i < COUNT(cases); i++)
        check_merge(spelled(cases[i].old), spelled(cases[i].add), spelled(cases[i].want));
    struct buf old = {0}, add = {0}, want = {0};
    php_nested(&old, PHP_DEPTH, 'a', "i:1;"), php_nested(&add, PHP_DEPTH, 'a', "i:2;");
    check_merge(buf_slice(&old), buf_slice(&add), buf_slice(&add));
    php_nested(&add, PHP_DEPTH - 1, 'a', "a:2:{s:1:\"k\";i:2;s:1:\"n\";N;}");   /* a pair more in the innermost */
    check_merge(buf_slice(&old), buf_slice(&add), buf_slice(&add));
    /* Many keys, in the same order and in the reversed one: the old order stays. */
    for (int turn = 0; turn < 2; turn++) {
        enum { MANY = 1000 };
        buf_clear(&old), buf_clear(&add), buf_clear(&want);
        buf_printf(&old, "a:%d:{", MANY), buf_printf(&add, "a:%d:{", MANY + 1), buf_printf(&want, "a:%d:{", MANY + 1);
        for (int i = 0; i < MANY; i++) {
            buf_printf(&old, "i:%d;N;", i);
            buf_printf(&add, "i:%d;b:1;", turn == 0 ? i : MANY - 1 - i);
            buf_printf(&want, "i:%d;b:1;", i);
        }
        buf_addc(&old, '}'), buf_add(&add, S("s:0:\"\";N;}")), buf_add(&want, S("s:0:\"\";N;}"));
        check_merge(buf_slice(&old), buf_slice(&add), buf_slice(&want));
    }
    buf_free(&old), buf_free(&add), buf_free(&want);
}

static void test_form(void) {
    static const struct {
        const char *form, *pairs;   /* name=value and a space */
        char mark;
    } cases[] = {
        {"", "", '&'}, {"a", "a= ", '&'}, {"a=", "a= ", '&'}, {"a=1", "a=1 ", '&'}, {"a=1&b=2", "a=1 b=2 ", '&'},
        {"=", "= ", '&'}, {"=1", "=1 ", '&'}, {"a=b=c", "a=b=c ", '&'}, {"a=1&", "a=1 ", '&'}, {"&a", "= a= ", '&'},
        {"a&&b", "a= = b= ", '&'}, {"&", "= ", '&'}, {"a+b=c+d", "a b=c d ", '&'}, {"a%20b=%2b", "a b=+ ", '&'},
        {"%26=%3D", "&== ", '&'}, {"a=%e4%BD%a0", "a=\xe4\xbd\xa0 ", '&'}, {"a=%00b", "a=@b ", '&'},
        {"a=%", "a=% ", '&'}, {"a=%2", "a=%2 ", '&'}, {"a=%2&b=0", "a=%2 b=0 ", '&'}, {"a=%zz", "a=%zz ", '&'},
        {"a=%2z%41", "a=%2zA ", '&'}, {"a=%%41", "a=%A ", '&'}, {"a=%-1", "a=%-1 ", '&'}, {"a=%+1", "a=% 1 ", '&'},
        {"a=%ff", "a=\xff ", '&'}, {"a=1;b=2", "a=1;b=2 ", '&'}, {"a=1; b=2;c", "a=1 b=2 c= ", ';'},
        {"a=1&b", "a=1&b ", ';'}, {"a=1&a=2", "a=1 a=2 ", '&'},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct buf name = {0}, value = {0}, b = {0};
        for (slice rest = spelled(cases[i].form); form_each(&rest, cases[i].mark, &name, &value);) {
            buf_add(&b, buf_slice(&name)), buf_addc(&b, '=');
            buf_add(&b, buf_slice(&value)), buf_addc(&b, ' ');
        }
        check_text(cases[i].form, buf_slice(&b), spelled(cases[i].pairs));
        buf_free(&name), buf_free(&value), buf_free(&b);
    }
}

/* ---- 13. Main: options ---- */

/* The status that the program would end with; 0 when it goes on. */
static int options_status(int argc, const char *const *argv) {
    mains.given = 0;
    http.n_proxies = mains.n_binds = chat.n_secrets = 0;
    fake.log_len = 0;
    fake.catching = true;
    int status = setjmp(fake.back);
    if (status == 0) options_read(argc, (char **)(uintptr_t)argv);
    fake.catching = false;
    CHECK((status == 0) == (fake.log_len == 0), "not one line, but status %d", status - 1);
    return status > 0 ? status - 1 : 0;
}

/* One option with one value, as --name value, --name=value, -x value, and XCHAT_NAME. */
static void check_option(const struct option *o, const char *value, bool good) {
    char name[40], joined[80], variable[50] = "XCHAT_", letter[] = {'-', o->letter, '\0'};
    snprintf(name, sizeof name, "--%s", o->name);
    snprintf(joined, sizeof joined, "--%s=%s", o->name, value);
    for (size_t i = 0; o->name[i] != '\0'; i++) {
        char c = o->name[i];
        variable[6 + i] = (char)(c == '-' ? '_' : c - 'a' + 'A');
    }
    for (int way = 0; way < 4; way++) {
        const char *argv[] = {"xchat", way == 0 ? name : way == 1 ? joined : letter, value};
        if (way == 2 && o->letter == 0) continue;
        if (way == 3) setenv(variable, value, 1);
        int status = options_status((int[]){3, 2, 3, 1}[way], argv);
        unsetenv(variable);
        CHECK(status == (good ? 0 : 2), "%s, way %d: status %d", joined, way, status);
        bool taken = good && *o->number == strtoul(value, NULL, 10);
        CHECK(taken == good, "%s, way %d: it is %u", joined, way, *o->number);
    }
}

static void test_option_ranges(void) {
    static const char *const wrong[] = {
        "", "x", " 4096", "4096 ", "4096K", "+4096", "-1", "1e3", "0x1000", "4096.", "4294967296",
        "4294971392", "18446744073709551617", "18446744073709555712",
    };
    for (const struct option *o = options; o < options + N_OPTIONS; o++) {
        if (o->number == NULL || o->arg == NULL) continue;
        int64_t min = o->min, max = o->max, numbers[] = {min, min + 1, max, max + 1, min - 1};
        for (size_t i = 0; i < COUNT(numbers); i++) {
            char value[24];
            snprintf(value, sizeof value, "%lld", (long long)numbers[i]);
            check_option(o, value, i < 3);
        }
        for (size_t i = 0; i < COUNT(wrong); i++) check_option(o, wrong[i], false);
        CHECK(o->initial >= min && o->initial <= max, "--%s: the default is out of range", o->name);
    }
}

/* Command lines, split at blanks. */
static void test_option_forms(void) {
    static const char *const good[] = {
        "", "-p 1 --port=2", "-v", "--verbose", "-b ::1 -b unix:/a=b", "--bind=unix:/a=b",
        "--trust-proxy 10.0.0.0/8", "--origin *", "--origin=http://b:80,app://c",
        "--jwt-secret-file a", "--jwt-secret-file a --jwt-secret-file b",
    };
    static const char *const wrong[] = {
        "--trust-proxy 10.0.0.0/33", "--trust-proxy", "--origin", "--origin=", "--make-token=",
        "--jwt-secret-file", "--jwt-secret-file a --jwt-secret-file b --jwt-secret-file=c", "--port", "-p", "-p8080", "-p=8080", "--nope",
        "--por 80", "--Port 80", "--", "-", "--=", "--=1", "--verbose=1", "--verbose=",
        "--verbose 1", "a\n", "\xff", "port 8080", "verbose", "---p 8080", "---v", "p 8080", "=1",
    };
    for (size_t i = 0; i < COUNT(good) + COUNT(wrong); i++) {
        const char *argv[8] = {"xchat"}, *line = i < COUNT(good) ? good[i] : wrong[i - COUNT(good)];
        char text[80], *rest = text;
        int argc = 1;
        snprintf(text, sizeof text, "%s", line);
        while (*rest != '\0') {
            argv[argc++] = rest;
            rest += strcspn(rest, " ");
            if (*rest == ' ') *rest++ = '\0';
        }
        CHECK(options_status(argc, argv) == (i < COUNT(good) ? 0 : 2), "%s", line);
    }
    setenv("XCHAT_PORT", "1", 1), setenv("XCHAT_BIND", "::1", 1);
    CHECK(options_status(2, (const char *const[]){"x", "--port=2"}) == 0, "both are given");
    CHECK(opt.port == 2 && mains.n_binds == 1, "the command line goes first");
    unsetenv("XCHAT_PORT"), unsetenv("XCHAT_BIND");
    const char *many[35] = {"x"};
    for (size_t i = 1; i < COUNT(many); i++) many[i] = i % 2 == 1 ? "-b" : "::1";
    CHECK(options_status(33, many) == 0 && options_status(35, many) == 2, "16 times --bind");
}

/* ---- All of them ---- */

#define TEST(name) {#name, test_##name}

/* ---- Push. ---- */

#define GOLDEN_TOKEN "ed8c1c155a6daf448f610ae749eec794be551f8d1b145448711eea973583f820"
#define GOLDEN_PAYLOAD "{\"aps\":{\"alert\":\"My first push test!\",\"sound\":\"default\"}}"

/* "0aff" as bytes, in a block of just that size, so that a read past its end is noticed. */
static slice unhex(const char *hex, struct buf *b) {
    buf_free(b);
    for (; *hex != '\0'; hex += 2) {
        while (*hex == ' ') hex++;
        buf_addc(b, (char)slice_number((slice){hex, 2}, 16));
    }
    return buf_slice(b);
}

static bool is_hex(const struct buf *b, const char *hex) {
    struct buf want = {0};
    bool same = slice_eq(buf_slice(b), unhex(hex, &want));
    buf_free(&want);
    return same;
}

static struct push *golden_push(void) {
    struct push *p = push_new(S(GOLDEN_TOKEN));
    buf_add(&p->payload, S(GOLDEN_PAYLOAD));
    p->id = 42;
    p->until_ms = now.ms + (1700003600 - (int64_t)now.wall) * 1000;
    return p;
}

static void test_token(void) {
    static const struct {
        const char *text, *want;
    } cases[] = {
        {"0123abCD", "0123abcd"}, {"<0123 ABCD>", "0123abcd"}, {"0123abc", NULL}, {"0123abcde", NULL}, {"", NULL},
        {"012345", NULL}, {"0123/bcd", NULL}, {"0123abcd\n", NULL}, {"0123abcg", NULL}, {"0x12abcd", NULL},
    };
    struct buf b = {0};
    char longest[TOKEN_MAX + 3];
    for (size_t i = 0; i < COUNT(cases); i++) {
        bool ok = token_parse(slice_of(cases[i].text), &b);
        CHECK(ok == (cases[i].want != NULL), "\"%s\" is %d", cases[i].text, ok);
        if (ok) CHECK(slice_eq(buf_slice(&b), slice_of(cases[i].want)), "\"%s\"", cases[i].text);
    }
    memset(longest, 'a', sizeof longest);
    CHECK(token_parse((slice){longest, TOKEN_MAX}, &b), "the longest");
    CHECK(!token_parse((slice){longest, TOKEN_MAX + 2}, &b), "longer");
    buf_free(&b);
}

static void test_html_text(void) {
    static const char *const cases[] = {
        "", "plain", "<b>&amp;\"quoted\"'s</b>", "&", "&amp", "a<b>c", "line\nline", "&lt;b&gt;", "\xe4\xbd\xa0&\xf0\x9f\x98\x80",
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct buf html = {0}, text = {0};
        html_escape(&html, slice_of(cases[i]), true);
        html_text(&text, buf_slice(&html));
        CHECK(slice_eq(buf_slice(&text), slice_of(cases[i])), "\"%s\" came back as \"%.*s\"", cases[i], F(buf_slice(&text)));
        for (size_t n = 0; n <= html.len; n++) {   /* cut anywhere, it is only not read past its end */
            buf_clear(&text);
            html_text(&text, slice_take(buf_slice(&html), n));
        }
        buf_free(&html);
        buf_free(&text);
    }
}

static void test_binary(void) {
    struct push *p = golden_push();
    struct buf b = {0};
    opt.apns_format = 0;
    binary_packet(&b, p);
    CHECK(is_hex(&b, "000020" GOLDEN_TOKEN "00397b22617073223a7b22616c657274223a224d7920666972737420707573682074657374"
                     "21222c22736f756e64223a2264656661756c74227d7d"), "command 0");
    buf_clear(&b);
    opt.apns_format = 2;
    binary_packet(&b, p);
    CHECK(is_hex(&b, "0200000071010020" GOLDEN_TOKEN "0200397b22617073223a7b22616c657274223a224d79206669727374207075736820"
                     "7465737421222c22736f756e64223a2264656661756c74227d7d0300040000002a0400046553ff100500010a"), "command 2");
    buf_free(&b);
    push_free(p);
}

static void test_jwt(void) {
    static const struct {
        const char *der, *bare;
    } cases[] = {
        {"304502200ed1215379636c483c2f7f155807d402a3b228033af97c7e17819ac3169ea665022100c50a07d38c3c70e5d8f12daf084a5480a66590c5f293509a8f3f7f8a83a354d5",
         "0ed1215379636c483c2f7f155807d402a3b228033af97c7e17819ac3169ea665c50a07d38c3c70e5d8f12daf084a5480a66590c5f293509a8f3f7f8a83a354d5"},
        {"3046022100bcbc4751c4a8db3461867b83b7e1b46ef7e304ec1fa896aca6ae7c037fb2b638022100a0a6249899467a17f45b9c356bb9e21bf2158a661c057c87f2350cddd103042d",
         "bcbc4751c4a8db3461867b83b7e1b46ef7e304ec1fa896aca6ae7c037fb2b638a0a6249899467a17f45b9c356bb9e21bf2158a661c057c87f2350cddd103042d"},
        {"3043021f5be6e90b8ee49099cbd59277ececbf20bb0755c77343dec6c9a06f6507253c02201b6c510201896bda8acd8824b3dce3df7c671846d7c7f200daa81a3143c1306a",
         "005be6e90b8ee49099cbd59277ececbf20bb0755c77343dec6c9a06f6507253c1b6c510201896bda8acd8824b3dce3df7c671846d7c7f200daa81a3143c1306a"},
        {"3044022100be56be811ba6d123205522bcdb4bcc442693176a2f7f18f01da503ce0236c217021f653f1aa8abfe8207c17d189b278c7ab5e3eed1cf7df0616455f8057bf952cf",
         "be56be811ba6d123205522bcdb4bcc442693176a2f7f18f01da503ce0236c21700653f1aa8abfe8207c17d189b278c7ab5e3eed1cf7df0616455f8057bf952cf"},
    };
    struct buf b = {0}, jwt = {0};
    unsigned char bare[64];
    for (size_t i = 0; i < COUNT(cases); i++) {
        slice der = unhex(cases[i].der, &b);
        CHECK(jwt_bare((const unsigned char *)der.p, der.len, bare), "case %zu", i);
        CHECK(memcmp(unhex(cases[i].bare, &b).p, bare, 64) == 0, "case %zu", i);
    }
    CHECK(!jwt_bare((const unsigned char *)"\x30\x01", 2, bare), "no signature");
    EVP_PKEY_CTX *make = EVP_PKEY_CTX_new_id(EVP_PKEY_EC, NULL);   /* OpenSSL 3 can do that in one call */
    CHECK(EVP_PKEY_keygen_init(make) == 1 && EVP_PKEY_CTX_set_ec_paramgen_curve_nid(make, NID_X9_62_prime256v1) == 1 &&
          EVP_PKEY_keygen(make, &push.key) == 1, "no key");
    EVP_PKEY_CTX_free(make);
    opt.apns_key_id = "ABC123DEFG", opt.apns_team_id = "DEF123GHIJ";
    jwt_make(&jwt, 1437179036);
    CHECK(jwt.len == 184 && slice_starts(buf_slice(&jwt), S("eyJhbGciOiJFUzI1NiIsImtpZCI6IkFCQzEyM0RFRkcifQ."
          "eyJpc3MiOiJERUYxMjNHSElKIiwiaWF0IjoxNDM3MTc5MDM2fQ.")), "%.*s", F(buf_slice(&jwt)));

    /* One token for 50 minutes, whatever the clock on the wall does. */
    buf_free(&push.jwt);
    jwt_get();
    buf_clear(&b);
    buf_add(&b, buf_slice(&push.jwt));
    now.ms += JWT_MS - 1, now.wall += 86400;
    CHECK(slice_eq(jwt_get(), buf_slice(&b)), "made anew too soon");
    now.ms += 1;
    CHECK(!slice_eq(jwt_get(), buf_slice(&b)), "not made anew");
    clock_read();
    buf_free(&b), buf_free(&jwt), buf_free(&push.jwt);
    EVP_PKEY_free(push.key);
    push.key = NULL;
}

static void test_hpack(void) {
    static const struct {
        const char *hex;
        int status;
        size_t least;   /* as many bytes are needed to know */
    } cases[] = {
        {"88", 200, 1}, {"2088", 200, 2}, {"3fe11f88", 200, 4}, {"8c", 400, 1}, {"8d", 404, 1}, {"8e", 500, 1},
        {"4803343130", 410, 5}, {"0803343130", 410, 5}, {"08826820", 410, 4}, {"48826820", 410, 4},
        {"1803343130", 410, 5}, {"4883680cff", 403, 5}, {"4883684fff", 429, 5}, {"48836c0cff", 503, 5},
        {"4883682cff", 413, 5}, {"0c03343033", 403, 5}, {"00073a73746174757303323030", 200, 13},
        {"0085b8848d36a383680cff", 403, 11}, {"be", 0, 1}, {"80", -1, 0}, {"", -1, 0}, {"48026820", 0, 4},
        {"4882680d", 0, 4}, {"4883680cfe", 0, 5}, {"4883681fff", 0, 5}, {"0f0b01300803343130", 410, 9}, {"7fffffffffffff", -1, 0},
        {"208840851d752163499cc10ddc10e06da582d42f2c10e06d6bae02eac171f770be26f05e76ef", 200, 2},
        {"4882682040851d752163499cc10ddc10e06da582d42f2c10e06d6bae02eac171f770be26f05e76ef", 410, 4},
    };
    struct buf b = {0};
    for (size_t i = 0; i < COUNT(cases); i++) {
        slice block = unhex(cases[i].hex, &b);
        CHECK(hpack_status(block) == cases[i].status, "%s is %d", cases[i].hex, hpack_status(block));
        for (size_t n = 0; n < block.len; n++) {
            char *cut = memcpy(xcalloc(n + 1), block.p, n);
            int want = n >= cases[i].least ? cases[i].status : -1, got = hpack_status((slice){cut, n});
            if (cases[i].least > 0) CHECK(got == want, "%s cut at %zu is %d", cases[i].hex, n, got);
            free(cut);
        }
    }
    buf_free(&b);
    hpack_number(&b, 0, 31, 10), hpack_number(&b, 0, 31, 1337), hpack_number(&b, 0, 127, 126);
    hpack_number(&b, 0, 127, 127), hpack_number(&b, 0, 127, 200);
    CHECK(is_hex(&b, "0a1f9a0a7e7f007f49"), "numbers");
    buf_free(&b);
}

/* A text of any kind is cut between characters, so that little room is left, and in few steps. */
static void test_push_alert(void) {
    static const char *const pieces[] = {"x", "\"", "\001", "\xe5\xa5\xbd", "\xf0\x9f\x98\x80", "\\\xc3\xa9", "a\n"};
    for (size_t i = 0; i < COUNT(pieces); i++) {
        struct buf text = {0}, payload = {0};
        struct json_field f = {.name = "aps"};
        size_t at;
        push_alert(&payload, S("short"));
        CHECK(slice_eq(buf_slice(&payload), S("{\"aps\":{\"alert\":\"short\",\"sound\":\"default\"}}")), "%.*s", F(buf_slice(&payload)));
        while (text.len < 1000000) buf_add(&text, slice_of(pieces[i]));
        push_alert(&payload, buf_slice(&text));
        CHECK(payload.len <= push_limit() && payload.len + 12 > push_limit(), "case %zu: %u bytes", i, (unsigned)payload.len);
        CHECK(json_pick(buf_slice(&payload), &f, 1, &at) == NULL, "case %zu: no JSON", i);
        buf_free(&text), buf_free(&payload);
    }
}

/* Whose phone is told of what, and what it is shown. */
static void test_push_who(void) {
    static const struct {
        const char *key, *line;
        int ann, bob;              /* missed by the phones of Ann, a user, and Bob, who is none */
    } cases[] = {
        {"rooms/r", "{\"from_client_name\":\"Eve\",\"content\":\"1 &lt; 2\",\"id\":\"00000001-0000000000000001\"}", 1, 1},
        {"rooms/r", "{\"from_client_name\":\"Ann\",\"content\":\"x\",\"from_uid\":\"ann\",\"id\":\"00000001-0000000000000002\"}", 1, 2},
        {"users/ann", "{\"from_client_name\":\"Eve\",\"content\":\"<b>To you: </b>hi\",\"from_uid\":\"eve\","
                      "\"id\":\"00000002-0000000000000003\"}", 2, 2},
        {"rooms/other", "{\"from_client_name\":\"Eve\",\"content\":\"x\",\"id\":\"00000003-0000000000000004\"}", 2, 2},
        {"rooms/r", "no JSON", 2, 2}, {"rooms/r", "{}", 2, 2},
    };
    opt.apns = "https://unit";
    push.devices.key = device_key, push.audiences.key = audience_key;
    push.full = push.named = true;
    struct device *ann = push_online(S("aaaaaaaa"), S("ann")), *bob = push_online(S("bbbbbbbb"), S(""));
    push_join(ann, S("rooms/r")), push_join(ann, S("users/ann")), push_join(bob, S("rooms/r"));
    push_said(S("rooms/r"), slice_of(cases[0].line));
    CHECK(ann->unread == 0 && bob->unread == 0, "they are there");
    push_offline(ann), push_offline(bob);
    for (size_t i = 0; i < COUNT(cases); i++) {
        push_said(slice_of(cases[i].key), slice_of(cases[i].line));
        CHECK((int)ann->unread == cases[i].ann && (int)bob->unread == cases[i].bob, "case %zu: %u, %u", i, ann->unread, bob->unread);
    }
    CHECK(push.later.n == 3, "%u pushes", push.later.n);
    struct subscription *letter = device_in(ann, table_find(&push.audiences, S("users/ann")));
    push_fill(letter->waiting);
    slice payload = buf_slice(&letter->waiting->payload);
    CHECK(slice_eq(payload, S("{\"aps\":{\"alert\":{\"title\":\"Eve\",\"body\":\"hi\"},\"badge\":2,\"sound\":\"default\","
                              "\"thread-id\":\"ann\"}}")), "%.*s", F(payload));
    struct subscription *own = device_in(ann, table_find(&push.audiences, S("rooms/r")));
    push_fill(own->waiting);   /* Eve's words were missed; Ann's own, which came later, are not for showing */
    payload = buf_slice(&own->waiting->payload);
    CHECK(slice_eq(payload, S("{\"aps\":{\"alert\":{\"loc-key\":\"NEW_MESSAGE\"},\"badge\":2,\"sound\":\"default\","
                              "\"thread-id\":\"r\"}}")), "%.*s", F(payload));

    /* The phone gets another owner, and leaves the rooms of the first. */
    CHECK(push_online(S("aaaaaaaa"), S("eve")) == ann && ann->first == NULL && push.later.n == 1, "Ann's rooms are kept");
    push_offline(ann);
    push_forget(bob);
    CHECK(push.devices.n == 0 && push.audiences.n == 0 && push.later.n == 0, "something is left");
    opt.apns = NULL;
}

/* Gives back all pushes, and all devices that are there once. */
static void push_clear(void) {
    while (push.queue.n > 0) push_free(queue_take(push.queue.first));
    while (push.later.n > 0) push_free(queue_take(push.later.first));
    for (size_t i = 0; push.devices.n > 0; i = (i + 1) % push.devices.cap) {
        struct device *d = push.devices.slot[i];
        if (d != NULL && d->first != NULL) push_forget(d);
        else if (d != NULL) push_offline(d);
    }
    CHECK(push.audiences.n == 0, "%zu audiences are left", push.audiences.n);
    memset(push.count, 0, sizeof push.count);
    opt.apns = NULL;
}

static void push_begin(void) {
    opt.apns = "https://unit";
    push.devices.key = device_key, push.audiences.key = audience_key;
}

/* Of the rooms of a phone the oldest goes, and so it is with pushes; a phone that is one too many is
 * not kept. */
static void test_push_limits(void) {
    char text[40];
    push_begin();
    struct device *d = push_online(S("aaaaaaaa"), S(""));
    for (int i = 0; i <= ROOMS_PER_CLIENT; i++) {
        snprintf(text, sizeof text, "rooms/%d", i);
        struct subscription *s = device_join(d, slice_of(text));
        CHECK(s == device_join(d, slice_of(text)), "%s twice", text);
    }
    CHECK(push.audiences.n == ROOMS_PER_CLIENT, "%zu rooms", push.audiences.n);
    CHECK(table_find(&push.audiences, S("rooms/0")) == NULL && table_find(&push.audiences, S("rooms/1")) != NULL, "the wrong one");
    push_offline(d);

    for (unsigned i = 1; i < DEVICES_MAX; i++) {
        snprintf(text, sizeof text, "%08x", i);
        CHECK(push_online(slice_of(text), S("")) != NULL, "phone %u", i);
    }
    CHECK(push_online(S("bbbbbbbb"), S("")) == NULL && push.devices.n == DEVICES_MAX, "one too many");
    struct device *again = push_online(S("00000001"), S(""));
    CHECK(again != NULL && again->online == 2, "one of them again");
    push_offline(again);

    push_show(S("cccccccc"), S(""), S(""), S("x"));
    for (int i = 1; i < PUSH_QUEUE; i++) push_show(S("dddddddd"), S(""), S(""), S("x"));
    struct push *first = push.later.first;
    CHECK(push.later.n == PUSH_QUEUE && slice_starts(buf_slice(&first->token), S("cc")), "%u pushes", push.later.n);
    push_show(S("eeeeeeee"), S(""), S(""), S("x"));
    CHECK(push.later.n == PUSH_QUEUE && push.count[OVERFLOWED] == 1, "%u pushes", push.later.n);
    CHECK(slice_starts(buf_slice(&push.later.first->token), S("dd")), "the oldest is kept");
    CHECK(slice_starts(buf_slice(&push.later.last->token), S("ee")), "the newest is not kept");
    queue_add(queue_take(push.later.last), NULL, 0);   /* what is due has waited longer */
    push_show(S("ffffffff"), S(""), S(""), S("x"));
    CHECK(push.queue.n == 0 && push.later.n == PUSH_QUEUE && push.count[OVERFLOWED] == 2, "what is due is kept");
    push_clear();
}

/* A push is tried later each time, six times; not for who was there since, or has left. */
static void test_push_again(void) {
    static const int waits[] = {2, 10, 60, 300, 900};
    push_begin();
    struct push *p = push_new(S("aaaaaaaa"));
    for (size_t i = 0; i < COUNT(waits); i++) {
        p->status = 500;
        push_retry(p);
        int64_t wait = push.later.n == 1 ? push.later.first->due_ms - now.ms : 0;
        CHECK(wait >= waits[i] * 750 && wait <= waits[i] * 1250 && p->status == 0, "try %zu: in %lld ms", i, (long long)wait);
        queue_take(p);
    }
    push_retry(p);
    CHECK(push.later.n == 0 && push.count[REFUSED] == 1 && push.count[RETRIED] == 5, "it is tried for ever");

    struct device *d = push_online(S("bbbbbbbb"), S(""));
    struct subscription *s = device_join(d, S("rooms/r"));
    for (int way = 0; way < 4; way++) {   /* as it was; the phone was there; there is a newer one; it has left */
        p = queue_take(push_queue(s));
        if (way == 1) d->registered_ms++;
        if (way == 2) push_queue(s);
        if (way == 3) push_forget(d);
        push_again(p, now.ms + 5);
        CHECK(push.later.n == (way == 0 || way == 2) && (way == 3 || (s->waiting != NULL) == (way != 1)), "way %d", way);
        if (way == 0) CHECK(s->waiting == p && p->due_ms == now.ms + 5, "it is another one");
        while (push.later.n > 0) push_free(queue_take(push.later.first));
    }
    push_clear();
}

/* How long it is until the gateway is asked again. */
static void test_gate_failed(void) {
    static const struct {
        bool early;
        int wait_s;
    } cases[] = {{false, 1}, {false, 2}, {true, 10}, {false, 8}, {true, 16}, {false, 32}, {false, 60}, {true, 60}};
    char want[80];
    push_begin();
    push.fails = 0;
    for (size_t i = 0; i < COUNT(cases); i++) {
        gate_failed("unit", cases[i].early);
        snprintf(want, sizeof want, "--apns https://unit: unit; trying again in %d s\n", cases[i].wait_s);
        fake.log[fake.log_len] = '\0';
        CHECK(strstr(fake.log, want) != NULL, "case %zu: %s", i, fake.log);
        int64_t wait = push.redial_ms - now.ms;
        CHECK(wait >= cases[i].wait_s * 750 && wait <= cases[i].wait_s * 1250, "case %zu: %lld ms", i, (long long)wait);
    }
    push.fails = 0, push.redial_ms = 0;
    push_clear();
}

/* Binary: what no error has come for is taken as accepted after a minute, or sooner if there is much. A gateway
 * that takes nothing is given up, and so is a feedback service that says nothing. */
static void test_binary_tick(void) {
    static const struct {
        unsigned n;
        int64_t age_ms;
        bool unsent;
        unsigned left;
        bool lost;
    } cases[] = {
        {3, 12 * SENT_MS - 1, false, 3, false}, {3, 12 * SENT_MS, false, 0, false},
        {SENT_MAX + 2, SENT_MS - 1, false, SENT_MAX + 2, false}, {SENT_MAX + 2, SENT_MS, false, SENT_MAX, false},
        {1, 90000, true, 1, false}, {1, 90001, true, 1, true},
    };
    push_begin();
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct gate g = {0};
        struct conn *c = wire_open(0, &feedback_proto, &g);
        for (unsigned n = 0; n < cases[i].n; n++) list_add(&g.sent, g.sent.last, push_new(S("aaaaaaaa")));
        for (struct push *p = g.sent.first; p != NULL; p = p->next) p->due_ms = now.ms - cases[i].age_ms;
        if (cases[i].unsent) buf_addc(&c->out, 'x');
        binary_tick(c);
        CHECK(g.sent.n == cases[i].left && c->lost == cases[i].lost, "case %zu: %u are left, lost %d", i, g.sent.n, c->lost);
        CHECK(push.count[ACCEPTED] == cases[i].n - cases[i].left, "case %zu: accepted", i);
        while (g.sent.n > 0) push_free(list_remove(&g.sent, g.sent.first));
        push.count[ACCEPTED] = 0;
        c->state = NULL, conn_lost(c, "test over"), loop_settle();
    }
    struct conn *c = wire_open(0, &feedback_proto, NULL);
    feedback_opened(c, NULL);
    now.ms += PUSH_SECONDS(30) - 1, feedback_tick(c);
    CHECK(!c->closing, "given up too soon");
    now.ms += 1, feedback_tick(c);
    CHECK(c->lost, "waited for");
    loop_settle();
    push.proved = false, push.n_verdicts = 0;
    push_clear();
    check_empty();
}

/* What an answer means for the push, for our token, and for the connection. */
static void test_push_answers(void) {
    static const struct {
        int status;
        const char *reason;
        uint32_t tries;
        int64_t jwt_age_ms;
        uint32_t queue, later;   /* it is tried again: at once; or so */
        bool jwt, drain, pause;
        enum count count;
    } cases[] = {
        {200, "", 0, 0, 0, 0, true, false, false, ACCEPTED}, {10, "error", 0, 0, 0, 0, true, false, false, ACCEPTED},
        {403, "ExpiredProviderToken", 0, JWT_AGAIN_MS, 1, 0, false, true, false, RETRIED},
        {403, "ExpiredProviderToken", 0, JWT_AGAIN_MS - 1, 1, 0, true, true, true, RETRIED},
        {403, "InvalidProviderToken", 5, 0, 1, 0, true, true, true, RETRIED},
        {255, "error", 0, 0, 0, 1, true, false, false, RETRIED}, {255, "error", 1, 0, 0, 0, true, false, false, REFUSED},
        {429, "TooManyRequests", 4, 0, 0, 1, true, false, false, RETRIED}, {429, "", 5, 0, 0, 0, true, false, false, REFUSED},
        {503, "Shutdown", 0, 0, 0, 1, true, true, false, RETRIED}, {413, "PayloadTooLarge", 0, 0, 0, 0, true, false, false, REFUSED},
        {299, "Unregistered", 0, 0, 0, 0, true, false, false, ACCEPTED}, {999, "New", 0, 0, 0, 0, true, false, false, REFUSED},
    };
    push_begin();
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct gate g = {0};
        struct conn *c = wire_open(0, &feedback_proto, &g);
        struct push *p = push_new(S("aaaaaaaa"));
        list_add(&g.sent, NULL, p);
        p->tries = cases[i].tries;
        buf_clear(&push.jwt), buf_add(&push.jwt, S("x.y.z"));
        push.jwt_ms = now.ms - cases[i].jwt_age_ms, push.pause_ms = 0;
        push_answered(c, p, cases[i].status, slice_of(cases[i].reason), 0);
        CHECK(g.sent.n == 0 && push.queue.n == cases[i].queue && push.later.n == cases[i].later, "case %zu: queued", i);
        CHECK((push.jwt.len > 0) == cases[i].jwt && (g.drain_ms != 0) == cases[i].drain && (push.pause_ms > 0) == cases[i].pause,
              "case %zu: token %u, drain %d, pause %d", i, push.jwt.len, g.drain_ms != 0, push.pause_ms > 0);
        CHECK(push.count[cases[i].count] == 1, "case %zu: counted", i);
        c->state = NULL, conn_lost(c, "test over"), loop_settle();
        push_clear(), push_begin();
    }
    struct gate g = {0};   /* of two errors of its own in a row the second ends a connection */
    struct conn *c = wire_open(0, &feedback_proto, &g);
    for (int i = 0; i < 4; i++) {
        struct push *p = push_new(S("aaaaaaaa"));
        list_add(&g.sent, NULL, p);
        push_answered(c, p, i == 1 ? 200 : 500, S(""), 0);
        CHECK((g.drain_ms != 0) == (i == 3), "answer %d", i);
    }
    c->state = NULL, conn_lost(c, "test over"), loop_settle();
    buf_free(&push.jwt);
    push.fails = 0, push.redial_ms = push.pause_ms = push.alarm_ms = 0, push.proved = false, push.n_verdicts = 0;
    push_clear();
    check_empty();
}

/* Frames of HTTP/2, one after the other, and the error that the last one is. */
static void test_h2_errors(void) {
    static const struct {
        int error;
        struct {
            int type, flags;
            uint32_t id;
            const char *hex;
        } frames[3];
    } cases[] = {
        {0, {{H2_PING, 0, 0, "0102030405060708"}}}, {0, {{H2_SETTINGS, H2_ACK, 0, ""}}}, {0, {{0x20, 0xff, 9, "00"}}},
        {0, {{H2_RST, 0, 3, "00000008"}}}, {0, {{H2_WINDOW, 0, 3, "7fffffff"}}}, {0, {{H2_WINDOW, 0, 0, "7fff0000"}}},
        {0, {{H2_SETTINGS, 0, 0, "00047fffffff"}}}, {0, {{H2_DATA, H2_PADDED, 1, "01aa00"}}},
        {0, {{H2_HEADERS, H2_BLOCK_END | H2_PADDED | H2_PRIORITIZED, 1, "0100000000008800"}}},
        {0, {{H2_HEADERS, 0, 1, "48"}, {H2_MORE, H2_BLOCK_END, 1, "03343130"}}},
        {H2_PROTOCOL, {{H2_PROMISE, 0, 1, "00000002"}}}, {H2_PROTOCOL, {{H2_MORE, 0, 1, ""}}},
        {H2_PROTOCOL, {{H2_HEADERS, 0, 1, "48"}, {H2_DATA, 0, 1, ""}}}, {H2_PROTOCOL, {{H2_HEADERS, 0, 1, ""}, {H2_MORE, 0, 3, ""}}},
        {H2_PROTOCOL, {{H2_SETTINGS, 0, 1, ""}}}, {H2_PROTOCOL, {{H2_PING, 0, 1, "0102030405060708"}}},
        {H2_PROTOCOL, {{H2_DATA, 0, 0, ""}}}, {H2_PROTOCOL, {{H2_HEADERS, 0, 0, "88"}}}, {H2_PROTOCOL, {{H2_RST, 0, 0, "00000000"}}},
        {H2_PROTOCOL, {{H2_DATA, H2_PADDED, 1, ""}}}, {H2_PROTOCOL, {{H2_DATA, H2_PADDED, 1, "0200"}}},
        {H2_PROTOCOL, {{H2_HEADERS, H2_PRIORITIZED, 1, "00000000"}}}, {H2_PROTOCOL, {{H2_WINDOW, 0, 0, "80000000"}}},
        {H2_SIZE, {{H2_PING, 0, 0, "01020304050607"}}}, {H2_SIZE, {{H2_RST, 0, 1, "000000"}}}, {H2_SIZE, {{H2_WINDOW, 0, 0, "0000000001"}}},
        {H2_SIZE, {{H2_SETTINGS, 0, 0, "0004000000"}}}, {H2_SIZE, {{H2_GOAWAY, 0, 0, "00000000000000"}}},
        {H2_FLOW, {{H2_SETTINGS, 0, 0, "000480000000"}}}, {H2_FLOW, {{H2_WINDOW, 0, 0, "7fff0001"}}},
        {H2_FLOW, {{H2_WINDOW, 0, 1, "7fffffff"}}}, {H2_COMPRESSION, {{H2_HEADERS, H2_BLOCK_END, 1, "80"}}},
    };
    struct buf hex = {0};
    push_begin();
    for (size_t i = 0; i < COUNT(cases); i++)
        for (int ready = 0; ready < 2; ready++) {
            struct gate g = {.ready = ready == 1, .window = 65535, .initial = 65535, .limit = 100, .next_id = 3};
            struct conn *c = wire_open(0, &feedback_proto, &g);
            int error = 0;
            list_add(&g.sent, NULL, push_new(S("aaaaaaaa")));
            g.sent.first->id = 1, g.sent.first->due_ms = now.ms;
            for (int k = 0; k < 3 && error == 0 && cases[i].frames[k].hex != NULL; k++)
                error = h2_handle(c, cases[i].frames[k].type, cases[i].frames[k].flags, cases[i].frames[k].id,
                                  unhex(cases[i].frames[k].hex, &hex));
            bool first = ready == 1 || cases[i].frames[0].type == H2_SETTINGS;   /* nothing else may be the first */
            CHECK(error == (first ? cases[i].error : H2_PROTOCOL), "case %zu, %d: error %d", i, ready, error);
            while (g.sent.n > 0) push_free(list_remove(&g.sent, g.sent.first));
            buf_free(&g.block);
            c->state = NULL, conn_lost(c, "test over"), loop_settle();
        }
    buf_free(&hex);
    push_clear();
    check_empty();
}

/* A line of a file in --data, as data_lines() reads it. */
static void line_read(const char *line, void (*take)(struct json_field *f), struct json_field *f, size_t n) {
    size_t at;
    for (size_t i = 0; i < n; i++) f[i].raw = S("");
    slice text = spelled(line);
    CHECK(json_pick(text, f, n, &at) == NULL, "no JSON: %s", line);
    take(f);
}

/* What is kept of phones is taken up, and what cannot be that of one is left out. */
static void test_device_read(void) {
    static const struct {
        const char *line;
        size_t devices, rooms;
        uint32_t pushes, unread;   /* of aaaaaaaa */
    } cases[] = {
        {"{'token':'aaaaaaa','at':1,'room':'rooms/r'}", 0, 0, 0, 0}, {"{'at':1,'room':'rooms/r'}", 0, 0, 0, 0},
        {"{'token':'aaaaaaaa','at':1}", 0, 0, 0, 0}, {"{'token':'aaaaaaaa','at':1,'room':'rooms/'}", 0, 0, 0, 0},
        {"{'token':'aaaaaaaa','at':1,'unread':3,'room':'rooms/r'}", 1, 1, 0, 3},
        {"{'token':'aaaaaaaa','at':2,'unread':'x','room':'rooms/s'}", 1, 2, 0, 3},
        {"{'token':'bbbbbbbb','at':1,'unread':0,'room':'rooms/r'}", 2, 2, 0, 3},
        {"{'token':'aaaaaaaa','at':1,'unread':1,'room':'rooms/r','payload':'{}','id':'short',"
         "'uuid':'00000000-0000-4000-8000-000000000000','expires':5}", 2, 2, 0, 1},
        {"{'token':'aaaaaaaa','at':1,'unread':1,'room':'rooms/r','payload':'{}','id':'00000001-0000000000000001',"
         "'uuid':'short','expires':5}", 2, 2, 0, 1},
        {"{'token':'aaaaaaaa','at':1,'unread':1,'room':'rooms/r','payload':'{}','id':'00000001-0000000000000001',"
         "'uuid':'00000000-0000-4000-8000-000000000000','expires':5}", 2, 2, 1, 1},
        {"{'token':'aaaaaaaa','at':1,'unread':1,'room':'rooms/r','payload':'{}','id':'00000001-0000000000000002',"
         "'uuid':'00000000-0000-4000-8000-000000000000','expires':5}", 2, 2, 1, 1},   /* one waits already */
        {"{'token':'bbbbbbbb','at':0}", 1, 2, 1, 1}, {"{'token':'aaaaaaaa','at':-1}", 0, 0, 0, 0},
    };
    struct json_field f[] = {{.name = "token"}, {.name = "at"}, {.name = "unread"}, {.name = "uid"}, {.name = "room"},
                             {.name = "payload"}, {.name = "id"}, {.name = "uuid"}, {.name = "expires"}};
    char longest[200];
    push_begin();
    for (size_t i = 0; i < COUNT(cases); i++) {
        line_read(cases[i].line, device_read, f, COUNT(f));
        CHECK(push.devices.n == cases[i].devices && push.audiences.n == cases[i].rooms && push.later.n == cases[i].pushes,
              "case %zu: %zu phones, %zu rooms, %u pushes", i, push.devices.n, push.audiences.n, push.later.n);
        const struct device *d = table_find(&push.devices, S("aaaaaaaa"));
        CHECK((d != NULL ? d->unread : 0) == cases[i].unread, "case %zu: unread", i);
        const struct push *p = push.later.first;
        if (p != NULL) CHECK(strcmp(p->collapse, "00000001-0000000000000001") == 0 && p->uuid[14] == '4' && push_expires(p) == 5 &&
                             is_hex(&p->payload, "7b7d"), "case %zu: another push", i);
    }
    for (size_t more = 0; more < 2; more++) {
        snprintf(longest, sizeof longest, "{'token':'aaaaaaaa','at':1,'room':'rooms/%0*d'}", ROOM_MAX_BYTES + (int)more, 0);
        line_read(longest, device_read, f, COUNT(f));
        CHECK(push.devices.n == 1 - more, "a room of %zu bytes", ROOM_MAX_BYTES + more);
        push_clear(), push_begin();
    }
    push_clear();
}

/* The token that proves who we are is taken up again, if it is still good and of the same key. */
static void test_jwt_read(void) {
    static const struct {
        const char *id, *team, *key, *jwt;
        int age_s;
        bool good;
    } cases[] = {
        {"ID", "TEAM", "00000000000000ab", "'x.y.z'", 60, true}, {"I", "TEAM", "00000000000000ab", "'x.y.z'", 60, false},
        {"ID", "TEA", "00000000000000ab", "'x.y.z'", 60, false}, {"ID", "TEAM", "00000000000000ac", "'x.y.z'", 60, false},
        {"ID", "TEAM", "00000000000000ab", "[]", 60, false}, {"ID", "TEAM", "00000000000000ab", "'x.y.z'", -60, false},
        {"ID", "TEAM", "00000000000000ab", "'x.y.z'", JWT_MS / 1000 + 1, false},
        {"ID", "TEAM", "00000000000000ab", "'x.y.z'", JWT_MS / 1000 - 60, true},
    };
    struct json_field f[] = {{.name = "key_id"}, {.name = "team_id"}, {.name = "iat"}, {.name = "jwt"}, {.name = "key"}};
    opt.apns_key_id = "ID", opt.apns_team_id = "TEAM", push.key_hash = 0xab;
    for (size_t i = 0; i < COUNT(cases); i++) {
        char line[200];
        buf_free(&push.jwt);
        push.jwt_iat = 0;
        snprintf(line, sizeof line, "{'key_id':'%s','team_id':'%s','key':'%s','jwt':%s,'iat':%lld}", cases[i].id, cases[i].team,
                 cases[i].key, cases[i].jwt, (long long)(wall_ms() / 1000 - cases[i].age_s));
        line_read(line, jwt_read, f, COUNT(f));
        CHECK((push.jwt.len > 0) == cases[i].good, "case %zu", i);
        int64_t age_ms = now.ms - push.jwt_ms - cases[i].age_s * 1000;
        if (cases[i].good) CHECK(age_ms >= 0 && age_ms < 5000, "case %zu: its age is off by %lld ms", i, (long long)age_ms);
        buf_free(&push.jwt);   /* a gateway did not want it any more */
        line_read(line, jwt_read, f, COUNT(f));
        CHECK(push.jwt.len == 0, "case %zu: taken up again", i);
    }
    buf_free(&push.jwt);
    push.key_hash = 0;
}

/* Names short and long, one after the other; ids, and all that differ from one in a digit. */
static void test_who(void) {
    struct client *a = chatter(0)->state, *b = chatter(1)->state;
    char name[400], id[21];
    memset(name, 'n', sizeof name);
    for (size_t i = 0, len = 0; i < 12; i++, len = (size_t[]){384, 23, 24, 25, 0, 24, 384, 1, 22}[i % 9]) {
        client_rename(a, (slice){name, len});
        CHECK(slice_eq(client_name(a), (slice){name, len}) && client_name(b).len == 0, "a name of %zu bytes", len);
    }
    CHECK(a->named && !b->named && b->more == &chat.none, "who has no name has nothing");
    memcpy(id, client_id(b).p, sizeof id);
    id[20] = '\0';
    CHECK(b->number == a->number + 1 && client_find(slice_of(id)) == b && client_numbered(a->number) == a, "numbers");
    for (size_t i = 0; i < 20; i++) {
        char good = id[i], *wrong = "0aA g";
        for (; *wrong != '\0'; wrong++)
            if (id[i] = *wrong, *wrong != good) CHECK(client_find(slice_of(id)) != b, "%s is found", id);
        id[i] = good;
    }
    CHECK(client_find((slice){id, 19}) == NULL && client_find(S("")) == NULL, "a part of an id is found");
    wire_close(a->c), wire_close(b->c);
}

/* Who becomes another user leaves the inbox of the first, and so does the phone. */
static void test_identify(void) {
    struct conn *c = chatter(0);
    struct client *cl = c->state;
    opt.apns = "https://unit";
    push.devices.key = device_key, push.audiences.key = audience_key;
    push.file = -1;
    client_identify(cl, S(""));
    CHECK(cl->more->uid == NULL && c->joined == NULL, "nobody has an inbox");
    client_identify(cl, S("a"));
    struct member *inbox = cl->more->inbox;
    CHECK(strcmp(cl->more->uid, "a") == 0 && inbox != NULL && slice_eq(room_key(inbox->room), S("users/a")), "before login");
    client_identify(cl, client_uid(cl));
    CHECK(cl->more->inbox == inbox && inbox->also == NULL, "twice the same");
    chat_message(c, S("{\"type\":\"login\",\"client_name\":\"A\",\"room_id\":\"r\",\"device_token\":\"00112233445566778899\"}"));
    struct device *d = cl->more->phone;
    CHECK(cl->more->inbox == inbox && d != NULL && is_hex(&d->uid, "61"), "logged in");
    CHECK(device_in(d, table_find(&push.audiences, S("users/a"))) != NULL && push.audiences.n == 2, "%zu audiences", push.audiences.n);
    push_join(d, S("rooms/old"));

    client_identify(cl, S("b"));
    CHECK(strcmp(cl->more->uid, "b") == 0 && slice_eq(room_key(cl->more->inbox->room), S("users/b")) && cl->seat != NULL, "another");
    loop_settle();
    CHECK(table_find(&rooms.by_name, S("users/a")) == NULL && rooms.by_name.n == 2, "the old inbox is open");
    CHECK(cl->more->phone == d && d->online == 1 && is_hex(&d->uid, "62"), "the phone");
    CHECK(device_in(d, table_find(&push.audiences, S("users/b"))) != NULL, "the phone is not in the new inbox");
    CHECK(device_in(d, table_find(&push.audiences, S("rooms/r"))) != NULL, "the phone is not in the room");
    CHECK(push.audiences.n == 2, "the phone is in the rooms of another user");

    opt.max_rooms = 2;   /* no room for an inbox: without it, until there is */
    client_identify(cl, S("c"));
    CHECK(cl->more->inbox == NULL && strcmp(cl->more->uid, "c") == 0, "too many rooms");
    loop_settle();
    client_identify(cl, client_uid(cl));
    CHECK(cl->more->inbox != NULL, "the inbox is not opened later");
    client_identify(cl, S(""));
    CHECK(cl->more->uid == NULL && cl->more->inbox == NULL && d->uid.len == 0, "nobody again");
    push_forget(d);
    wire_close(c);
    CHECK(push.devices.n == 0 && push.audiences.n == 0, "something is left");
    opt.apns = NULL;
    buf_clear(&wires[0].out);
    check_empty();
}

/* A phone that goes before it was sent all it had asked for is told of the rest by pushes; one that only
 * leaves the room is still told, unless it wants to be forgotten. */
static void test_push_absent(void) {
    static const char *const forgets[] = {"", ",\"forget_device\":null", ",\"forget_device\":false", ",\"forget_device\":true"};
    char text[200], first[ID_BYTES + 1];
    push_begin();
    rooms.said = push_said;
    struct conn *ann = chatter(0), *bob;
    chat_message(ann, S("{\"type\":\"login\",\"client_name\":\"Ann\",\"room_id\":\"r\"}"));
    for (int i = 0; i < 3; i++) {
        chat_message(ann, S("{\"type\":\"say\",\"to_client_id\":\"all\",\"content\":\"x\"}"));
        loop_settle();
        if (i == 0) history_newest(ann->joined->room->past, first);
    }
    for (int reads = 0; reads < 2; reads++) {
        snprintf(text, sizeof text, "{\"type\":\"login\",\"client_name\":\"Bob\",\"room_id\":\"r\",\"since\":\"%s\","
                 "\"device_token\":\"0011223344\"}", first);
        bob = chatter(1);
        wires[1].takes = reads ? SIZE_MAX : 0;
        chat_message(bob, slice_of(text)), loop_settle();
        if (reads) wire_drain(bob, SIZE_MAX);
        const struct device *d = ((struct client *)bob->state)->more->phone;
        CHECK(d != NULL && d->unread == 0 && (bob->joined->replay == NULL) == reads, "logged in, %d", reads);
        ws_close(bob, WS_SILENT, "test"), loop_settle();
        CHECK(d->online == 0 && d->unread == (reads ? 0 : 2) && push.later.n == (reads ? 0 : 1), "%u unread", d->unread);
        wire_close(bob);
    }
    for (size_t i = 0; i < COUNT(forgets); i++) {
        bob = chatter(1);
        chat_message(bob, S("{\"type\":\"login\",\"client_name\":\"Bob\",\"room_id\":\"r\",\"device_token\":\"0011223344\"}"));
        snprintf(text, sizeof text, "{\"type\":\"logout\"%s}", forgets[i]);
        chat_message(bob, slice_of(text));
        wire_close(bob);
        CHECK(push.audiences.n == (i + 1 < COUNT(forgets)) && push.devices.n == push.audiences.n, "logout %zu", i);
    }
    wire_close(ann);
    rooms.said = NULL;
    push_clear();
    check_empty();
}

/* What all peers together may send without completing it. */
static void test_pending(void) {
    struct conn listener = {.state = (void *)(uintptr_t)&gateway_proto}, *c[2];
    for (int i = 0; i < 2; i++) peer_accepted(&listener, c[i] = wire_open(i, NULL, NULL));
    c[0]->in.len = PENDING_MAX / 2, c[1]->in.len = PENDING_MAX / 2;   /* no bytes are there; nobody looks */
    CHECK(peer_wait(c[1]) == 0 && !c[1]->closing && c[1]->deadline_ms == now.ms + PEER_MS, "too soon");
    c[1]->in.len++;
    CHECK(peer_wait(c[1]) == -1 && c[1]->closing && !c[0]->closing, "more is taken");
    for (int i = 0; i < 2; i++) c[i]->in.len = 0, wire_close(c[i]);
    check_empty();
}

/* A worker leaves before it is gone: its client is the other's then, and counted there alone, also when it ends. */
static void test_worker_leaves(void) {
    struct conn listener = {.state = (void *)(uintptr_t)&gateway_proto}, *c[2];
    struct client *cl = chatter(2)->state;
    struct peer *peer[2];
    for (int i = 0; i < 2; i++) {
        peer_accepted(&listener, c[i] = wire_open(i, NULL, NULL));
        peer[i] = c[i]->state;
        peer[i]->worker = true;
    }
    cl->taken = true;
    worker_event(cl, ON_MESSAGE, S("one"));
    CHECK(peer[0]->clients == 1 && peer[1]->clients == 0, "at first: %u, %u", peer[0]->clients, peer[1]->clients);
    conn_close(c[0], "it leaves");
    worker_event(cl, ON_MESSAGE, S("two"));
    CHECK(peer[0]->clients == 0 && peer[1]->clients == 1, "it left: %u, %u", peer[0]->clients, peer[1]->clients);
    wire_close(cl->c);
    CHECK(peer[1]->clients == 0, "the client ended: %u", peer[1]->clients);
    for (int i = 0; i < 2; i++) wire_close(c[i]);
    check_empty();
}

/* The golden header block of a request. */
static void test_h2_block(void) {
    unsigned char hash[SHA256_DIGEST_LENGTH];
    struct push *p = golden_push();
    struct buf b = {0}, want = {0};
    opt.apns_topic = "com.example.xchat";
    snprintf(push.host, sizeof push.host, "api.push.apple.com");
    push.dial.host = push.host;
    snprintf(p->uuid, sizeof p->uuid, "eabeae54-14a8-11e5-b60b-1697f925ec7b");
    snprintf(p->collapse, sizeof p->collapse, "room-1");
    h2_block(&b, p, S("eyJhbGciOiJFUzI1NiIsImtpZCI6IkFCQzEyM0RFRkcifQ.eyJpc3MiOiJERUYxMjNHSElKIiwiaWF0IjoxNDM3MTc5MDM2fQ."
                      "j--02ikJkIhutGPQCev8wkQ8mIakmJd1cVt9ZMX9ynICFWsp7zwNWS21XEjvajg-ZjynTdAXm-rM3KY60YShww"));
    CHECK(b.len == 486, "%u bytes", b.len);
    SHA256((const unsigned char *)buf_slice(&b).p, b.len, hash);
    slice sum = unhex("d0aefff31b39d8c7235893c44afd957722833e5f464971a3917a69ffcaf2e9cd", &want);
    CHECK(memcmp(hash, sum.p, sizeof hash) == 0, "the block is another");
    buf_free(&b), buf_free(&want);
    push_free(p);
}

static const struct {
    const char *name;
    void (*run)(void);
} tests[] = {
    TEST(slices), TEST(numbers), TEST(buffers), TEST(log), TEST(utf8), TEST(utf8_exhaustive),
    TEST(json), TEST(json_wrong), TEST(json_depth), TEST(json_pick), TEST(json_text), TEST(json_each),
    TEST(json_quote), TEST(html), TEST(tables), TEST(addresses), TEST(dial), TEST(dial_feed), TEST(join_next), TEST(passphrase), TEST(cidr), TEST(origins), TEST(callers),
    TEST(http), TEST(http_late), TEST(http_turns), TEST(forwarded), TEST(frames), TEST(frame_sizes),
    TEST(rooms_memory), TEST(rooms_stop), TEST(rooms_except), TEST(rooms_slow), TEST(rooms_many), TEST(rooms_random),
    TEST(room_get), TEST(rooms_order),
    TEST(too_slow_to_go), TEST(rate), TEST(inbox), TEST(replay), TEST(silence),
    TEST(base64url), TEST(pass_rfc), TEST(pass), TEST(pass_forged), TEST(who), TEST(identify),
    TEST(token), TEST(html_text), TEST(binary), TEST(jwt), TEST(hpack), TEST(h2_block), TEST(push_who), TEST(push_alert),
    TEST(push_limits), TEST(push_again), TEST(gate_failed), TEST(binary_tick), TEST(push_answers), TEST(h2_errors), TEST(device_read), TEST(jwt_read),
    TEST(push_absent), TEST(pending), TEST(worker_leaves),
    TEST(php_valid), TEST(php_depth), TEST(php_key), TEST(php_json), TEST(php_merge), TEST(form), TEST(option_ranges),
    TEST(option_forms),
};

int main(int argc, char **argv) {
    bool failed = false;
    clock_read();
    signal(SIGPIPE, SIG_IGN);
    http.callers.key = caller_key;
    history_init(NULL);
    rooms.by_name.key = room_key;
    rooms.unsaid = chat_unsaid;
    loop.flush = rooms_flush;
    backend_init((const uint8_t[]){127, 0, 0, 1}, 2300, 7272);
    tape_proto = chat_proto;
    tape_proto.message = tape_message, tape_proto.closed = tape_closed, tape_proto.tick = NULL;
    tape_proto.refill = NULL;
    for (size_t i = 0; i < COUNT(tests); i++) {
        bool wanted = argc == 1;
        for (int k = 1; k < argc; k++) wanted = wanted || strcmp(argv[k], tests[i].name) == 0;
        if (!wanted) continue;
        options_status(1, (const char *const[]){"xchat"});   /* the defaults */
        opt.verbose = false;
        now.ms = 1000000;
        test.failures = 0;
        tests[i].run();
        if (test.failures == 0) printf("ok unit.%s\n", tests[i].name);
        else {
            const char *why = show(slice_of(test.why));   /* the case may hold any bytes */
            printf("FAIL unit.%s: %s (%u failed)\n", tests[i].name, why, test.failures);
        }
        failed = failed || test.failures > 0;
        fflush(stdout);
    }
    return failed ? 1 : 0;
}
