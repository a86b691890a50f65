/* Proofs: cbmc takes all inputs up to a bound at once, and tells whether for any of them
 * something is read or written outside of what was given, overflows or does not end, or
 * a CHECK() below fails. test/prove runs it; it has the bounds, and the list of what of
 * xchat.c each proof needs: as that reads bottom-up, some functions can stand alone.
 *
 * any_...() return what was never set: that may be anything. Where a function hands on to a
 * larger part of the server, a stub here takes its place (test/prove puts it there),
 * and demands what that part relies on.
 */
#define CHECK(good, what) __CPROVER_assert(good, what)
#define ASSUME(good) __CPROVER_assume(good)

#include <stddef.h>

typedef struct ssl_st SSL;   /* OpenSSL is not needed, but would take long to read */
typedef struct ssl_ctx_st SSL_CTX;
struct conn;
int EVP_EncodeBlock(unsigned char *out, const unsigned char *p, int n);
enum { SHA256_DIGEST_LENGTH = 32 };
unsigned char *SHA256(const unsigned char *p, size_t n, unsigned char *hash);
void OPENSSL_cleanse(void *p, size_t n);

#include XCHAT

static int64_t any_number(void) { int64_t n; return n; }
static int any_int(void) { int n; return n; }
static bool any_bool(void) { bool is; return is; }

static void log_line(const char *level, const char *format, ...) { (void)level, (void)format; }

/* So many bytes, whatever they are, in memory of just their size. */
static slice any(size_t n) { return (slice){malloc(n), n}; }

/* For each length up to the bound, so that lengths are no variables: that is much faster. ALONE: for this one. */
#ifndef ALONE
#define ALONE least
#endif
#define PROVE(name, from) \
    void prove_##name(void) { for (size_t least = from, n = ALONE; n <= BOUND; n++) name(any(n)); }

/* Does this lie in that? Empty ones may point anywhere. */
static bool within(slice s, slice all) {
    return s.len == 0 || (__CPROVER_same_object(s.p, all.p) && s.p >= all.p && s.p + s.len <= all.p + all.len);
}

/* cbmc's own are made for large arrays. */
void *memcpy(void *restrict to, const void *restrict from, size_t n) {
    char *p = to;
    const char *q = from;
    CHECK(n == 0 || !__CPROVER_same_object(p, q) || p + n <= q || q + n <= p, "what is copied does not overlap");
    for (size_t i = 0; i < n; i++) p[i] = q[i];
    return to;
}

/* cbmc 5.12 has none. */
void *memchr(const void *p, int c, size_t n) {
    const unsigned char *u = p;
    for (size_t i = 0; i < n; i++)
        if (u[i] == (unsigned char)c) return (void *)(u + i);
    return NULL;
}

/* This one does not branch. */
char *strchr(const char *s, int c) {
    const char *found = NULL;
    for (; ; s++) {
        found = found == NULL && *s == (char)c ? s : found;
        if (*s == '\0') return (char *)found;
    }
}

void *realloc(void *old, size_t n) {
    CHECK(old == NULL, "buffers of proofs need not grow");
    return malloc(n);
}

#ifdef BYTES
/* RFC 3629 once more, by way of the number of each character. */
static bool plain_utf8(const unsigned char *u, size_t n) {
    static const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
    for (size_t i = 0, more; i < n; i += more + 1) {
        more = u[i] < 0x80 ? 0 : u[i] < 0xe0 ? 1 : u[i] < 0xf0 ? 2 : 3;
        uint32_t code = more == 0 ? u[i] : u[i] & (0x3fu >> more);
        if ((u[i] >= 0x80 && u[i] < 0xc0) || u[i] >= 0xf8 || more >= n - i) return false;
        for (size_t k = 1; k <= more; k++) {
            if (u[i + k] >> 6 != 2) return false;
            code = code << 6 | (u[i + k] & 0x3f);
        }
        if (code < least[more] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
    }
    return true;
}

static void utf8(slice s) {
    CHECK(utf8_valid(s) == plain_utf8((const unsigned char *)s.p, s.len), "UTF-8 is what RFC 3629 says");
}
PROVE(utf8, 0)

static void hex(slice s) {
    int64_t number = slice_number(s, 16), again = s.len > 0 ? 0 : -1;
    for (size_t i = 0; i < s.len && again >= 0; i++) {
        char c = s.p[i];
        bool digit = c >= '0' && c <= '9', letter = (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
        again = digit || letter ? again << 4 | ((c & 15) + (letter ? 9 : 0)) : -1;
    }
    CHECK(number == again, "the number that is written, or -1");
}
PROVE(hex, 0)
#endif

#ifdef JSON
static void json_numbers(slice s) {
    struct json j = {s, NULL};
    bool good = json_number(&j);
    CHECK(within(j.rest, s) && good == (j.why == NULL), "what is left is in the text");
    if (!good) return;
    char last = j.rest.len < s.len ? s.p[s.len - j.rest.len - 1] : 'x';
    CHECK(last >= '0' && last <= '9', "a number ends with a digit");
}
PROVE(json_numbers, 0)

/* What is behind the quote that begins a string: any escapes, whole and halves of pairs of them. */
static void json_strings(slice s) {
    struct json j = {s, NULL};
    bool good = json_string(&j);
    CHECK(within(j.rest, s) && good == (j.why == NULL), "what is left is in the text");
    if (good) CHECK(j.rest.len < s.len && s.p[s.len - j.rest.len - 1] == '"', "a string ends with a quote");
}
PROVE(json_strings, 0)
#endif

#ifdef TEXT
static slice whole;

static bool utf8_valid(slice s) { return (void)s, any_bool(); }

static bool json_is(slice raw, const char *name) {
    (void)name;
    bool quoted = raw.len < 2 || (*raw.p == '"' && raw.p[raw.len - 1] == '"');
    CHECK(within(raw, whole) && quoted, "it is a key of the text");
    return raw.len >= 2 && any_bool();
}

/* What json_strings and json_numbers have shown, and nothing more. */
static bool some(struct json *j, bool string) {
    slice s = j->rest;
    size_t n = (size_t)any_number();
    bool good = any_bool();
    CHECK(within(s, whole), "it is looked for in the text");
    ASSUME(n <= s.len);
    char last = n > 0 ? s.p[n - 1] : '\0';
    ASSUME(!good || (string ? last == '"' : last >= '0' && last <= '9'));
    j->rest = slice_cut(s, n);
    return good || json_fail(j, "not so");
}

static bool json_string(struct json *j) { return some(j, true); }
static bool json_number(struct json *j) { return some(j, false); }

static void json_texts(slice s) {
    struct json_field f = {"", {NULL, 0}};
    size_t at;
    whole = s;
    const char *why = json_pick(s, &f, 1, &at);
    CHECK(at <= s.len && (why != NULL || at == s.len), "all of it was read, or what is wrong is in it");
    CHECK(within(f.raw, s), "a field is in the text");
}
PROVE(json_texts, 0)
#endif

#ifdef BASE64
/* RFC 4648, section 4. */
int EVP_EncodeBlock(unsigned char *out, const unsigned char *p, int n) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    int at = 0;
    for (int i = 0; i < n; i += 3, at += 4) {
        uint32_t three = (uint32_t)p[i] << 16 | (i + 1 < n ? (uint32_t)p[i + 1] << 8 : 0) | (i + 2 < n ? p[i + 2] : 0);
        for (int k = 0; k < 4; k++)
            out[at + k] = (unsigned char)(k > n - i ? '=' : digits[three >> (18 - 6 * k) & 63]);
    }
    out[at] = '\0';
    return at;
}

static void base64(slice s) {
    struct buf text = {0}, back = {0};
    base64url(&text, s);
    CHECK(base64url_read(buf_slice(&text), &back) && slice_eq(buf_slice(&back), s), "what was written can be read");
}
PROVE(base64, 0)
#endif

#ifdef FORM
static void percent(slice s) {
    struct buf b = {0};
    form_decode(s, &b);
    CHECK(b.len <= s.len, "it does not get longer");
}
PROVE(percent, 0)
#endif

#ifdef WS
static struct ws *ws;
static struct conn *client;

static void join(void) {
    ws = calloc(1, sizeof *ws), client = calloc(1, sizeof *client);
    client->state = ws;
}

/* A header of any bytes, in the middle of anything. */
static void ws_header(slice s) {
    join();
    ws->fragments = any_bool() ? FRAGMENTS_MAX : any_bool();
    ws->text.len = (uint32_t)any_int();
    opt.max_message = (uint32_t)any_int();
    ASSUME(ws->text.len <= opt.max_message && opt.max_message <= INT32_MAX);
    int head = ws_head(client, s.p, s.len);
    CHECK(head == -1 || head == 0 || (head >= 6 && (size_t)head <= s.len), "what was consumed had come");
    CHECK((head < 0) == client->closing, "who breaks the rules is told so");
    if (head <= 0) return;
    bool control = (*s.p & 8) != 0;
    CHECK(control ? ws->left <= 125 : ws->left + ws->text.len <= opt.max_message, "it is in the limits");
    CHECK(!control || s.len - (size_t)head >= ws->left, "all of a control frame has come");
}
PROVE(ws_header, 1)

/* A text of any length, as a client writes its header: read as it was written. */
void prove_ws_length(void) {
    uint64_t len = (uint64_t)any_number();
    slice s = any(6 + (len < 126 ? 0 : len < 65536 ? 2 : 8));
    char *p = (char *)s.p;
    bool fits = len <= opt.max_message;
    size_t more = s.len - 6;
    p[0] = (char)0x81;
    p[1] = (char)(0x80 | (more == 0 ? len : more == 2 ? 126 : 127));
    for (size_t i = 0; i < more; i++) p[2 + i] = (char)(len >> 8 * (more - 1 - i));
    join();
    opt.max_message = (uint32_t)any_int();
    ASSUME(len <= INT64_MAX);
    fits = len <= opt.max_message;
    int head = ws_head(client, p, s.len);
    CHECK(head == (fits ? (int)s.len : -1), "it is taken just if it is in the limit");
    if (fits) CHECK(ws->left == len && ws->fin && ws->opcode == WS_TEXT, "length and kind are read as written");
    if (fits) CHECK(memcmp(ws->mask, p + 2 + more, 4) == 0, "so is the mask");
}
#endif

#ifdef MASK
static char was[BOUND];
static uint8_t mask[4];

static int ws_head(struct conn *c, const char *p, size_t n) {
    (void)c, (void)p, (void)n;
    CHECK(false, "no header is looked for in the middle of a frame");
    return -1;
}

static int ws_payload(struct conn *c, slice s) {
    (void)c;
    for (size_t i = 0; i < s.len; i++) CHECK(s.p[i] == (char)(was[i] ^ (char)mask[i % 4]), "each byte has its byte of the mask");
    return any_bool() ? -1 : 0;
}

static int ws_control(struct conn *c, slice s) { return ws_payload(c, s); }

/* The next bytes of a frame, however many are to come, with the mask where it has got to. */
static void unmask(slice s) {
    struct ws ws = {.left = (uint32_t)any_int(), .opcode = (uint8_t)(any_int() & 15)};
    struct conn c = {.state = &ws};
    uint32_t left = ws.left;
    ASSUME(left > 0);
    for (size_t i = 0; i < 4; i++) ws.mask[i] = mask[i] = (uint8_t)any_int();
    for (size_t i = 0; i < s.len; i++) was[i] = s.p[i];
    size_t take = s.len < left ? s.len : left;
    ssize_t n = ws_feed(&c, (char *)s.p, s.len);
    CHECK(n == -1 || n == (ssize_t)take, "what is of the frame is consumed");
    CHECK(ws.left == left - take, "and the rest of it is to come");
    for (size_t i = 0; i < 4; i++) CHECK(ws.mask[i] == mask[(i + take) % 4], "the mask goes on where it has got to");
    for (size_t i = take; i < s.len; i++) CHECK(s.p[i] == was[i], "what is behind the frame stays");
}
PROVE(unmask, 1)
#endif

#ifdef H2
static slice frame;

static int h2_handle(struct conn *c, int type, int flags, uint32_t id, slice s) {
    (void)c;
    CHECK(type >= 0 && type < 256 && flags >= 0 && flags < 256 && id <= INT32_MAX, "the fields are in their ranges");
    CHECK(within(s, frame) && s.len == frame.len - 9, "the payload is what is behind the head");
    CHECK(s.len == ((size_t)(uint8_t)frame.p[0] << 16 | (size_t)(uint8_t)frame.p[1] << 8 | (uint8_t)frame.p[2]),
          "and so long as it says");
    return any_bool() ? H2_PROTOCOL : 0;
}

static void h2_header(slice s) {
    struct gate g = {.ready = any_bool()};
    struct conn c = {.state = &g};
    size_t len = s.len >= 9 ? (size_t)be32(s.p) >> 8 : 0;
    frame = slice_take(s, s.len >= 9 + len ? 9 + len : s.len);
    ssize_t n = h2_feed(&c, (char *)s.p, s.len);
    CHECK(n == -1 || n == 0 || n == (ssize_t)(9 + len), "a frame is consumed as a whole");
    CHECK((n < 0) == c.closing && (n != 0 || s.len < 9 + len || s.len < 9), "only what is not whole is waited for");
}
PROVE(h2_header, 1)

static void h2_padding(slice s) {
    slice rest = s;
    bool good = h2_strip(any_int(), &rest);
    CHECK(good ? within(rest, s) : rest.p == s.p, "what is left is in the payload");
}
PROVE(h2_padding, 0)

static void hpack_strings(slice s) {
    slice rest = s, text;
    bool huffman, good = hpack_take_string(&rest, &text, &huffman);
    CHECK(within(rest, s), "what is left is in the block");
    if (good) CHECK(within(text, s) && text.len < s.len, "and so is a string");
}
PROVE(hpack_strings, 0)

/* A number of any bytes, in the bits that it has in any of the fields: as RFC 7541 says in section 5.1. */
static void hpack_numbers(slice s) {
    uint8_t most = (uint8_t)((16 << (any_int() & 3)) - 1);
    uint64_t again = s.len > 0 ? (uint8_t)s.p[0] & most : 0;
    bool whole = s.len > 0 && again < most;
    slice rest = s;
    size_t used = 1;
    for (; !whole && used < s.len && used < 6; used++) {
        again += (uint64_t)((uint8_t)s.p[used] % 128) << 7 * (used - 1);
        whole = (uint8_t)s.p[used] < 128;
    }
    int64_t n = hpack_take(&rest, most);
    CHECK(n == (whole && again <= INT32_MAX ? (int64_t)again : -1), "the number that is written, or -1");
    CHECK(within(rest, s), "what is left is in the block");
    if (n >= 0) CHECK(rest.len == s.len - used, "and is what stands behind the number");
}
PROVE(hpack_numbers, 0)

/* The status, from the first fields of a block of any bytes. */
static void hpack_first(slice s) {
    int status = hpack_status(s);
    CHECK(status >= -1 && status <= 999, "a status has three digits, or there is none");
}
PROVE(hpack_first, 0)
#endif

#ifdef GATEWAY
static slice packet_in;

static void look(const struct packet *p) {
    size_t len = be32(packet_in.p);
    CHECK(len >= PACKET_HEAD && len <= packet_in.len, "the packet has come");
    CHECK(within(p->ext, slice_take(packet_in, len)) && within(p->body, slice_take(packet_in, len)), "its parts too");
    CHECK(PACKET_HEAD + p->ext.len + p->body.len == len, "nothing is left out, or in both");
    CHECK(p->cmd >= 0 && p->cmd < 256, "a command is a byte");
}

static bool gateway_greet(struct conn *c, const struct packet *p) { return (void)c, look(p), any_bool(); }
static ssize_t peer_wait(struct conn *c) { return any_bool() ? 0 : (conn_close(c, "too much"), -1); }

static struct client *gateway_client(int64_t number) {
    CHECK(number >= 0 && number <= UINT32_MAX, "the number of a client");
    return NULL;
}

static bool gateway_ask(const struct packet *p, struct client *cl, struct buf *b) {
    look(p);
    (void)cl, (void)b;   /* replies are not looked at here */
    return false;
}

static void gateway(slice s) {
    struct peer peer = {.known = any_bool()};
    struct conn c = {.state = &peer};
    packet_in = s, loop.n_dirty = 0;
    ssize_t n = gateway_feed(&c, (char *)s.p, s.len);
    CHECK(n == -1 || n == 0 || (size_t)n == be32(s.p), "a packet is consumed as a whole");
    CHECK((n < 0) == c.closing, "who breaks the rules is told so");
}
PROVE(gateway, 1)
#endif

#ifdef PHP
/* One step of the walk, from anywhere: so any number of steps, at any depth, is safe, and
 * there are no more of them than there are bytes. */
static void php_step(slice s) {
    struct php_walk w = {.rest = s, .depth = any_int()};
    struct php v;
    ASSUME(w.depth >= 0 && w.depth <= PHP_DEPTH);
    int64_t left = any_number();
    ASSUME(left >= 0);
    w.left[w.depth] = left;
    int depth = w.depth;
    bool more = php_next(&w, &v);
    CHECK(w.depth >= 0 && w.depth <= PHP_DEPTH && w.depth >= depth - 1 && w.depth <= depth + 1, "the depth is in bounds");
    CHECK(w.left[w.depth] >= 0, "no less than nothing is to come");
    CHECK(within(w.rest, s), "what is left is in the value");
    if (!more) return;
    CHECK(w.rest.len < s.len && within(v.text, s), "a piece has been taken");
    CHECK(w.depth <= depth || (v.pairs >= 0 && (size_t)v.pairs <= s.len), "no more pairs than bytes");
}
PROVE(php_step, 0)

/* A whole value off the front of any bytes. */
static void php_values(slice s) {
    slice rest = s, value = php_take(&rest, any_bool());
    CHECK(within(value, s) && within(rest, s) && value.len + rest.len == s.len, "a value, and what is behind it");
    if (value.len == 0) return;
    char last = value.p[value.len - 1];
    CHECK(value.p == s.p && (last == ';' || last == '}'), "a value is at the front, and has an end");
}
PROVE(php_values, 0)
#endif

#ifdef APNS
static struct push *sent[3];
static struct gate *gate;
static size_t done, named;   /* how many were done; which is named, 3: none */

static void push_done(struct push *p) {
    CHECK(p == sent[done] && done < named, "those before it are accepted, in their order");
    done++;
}

static void push_rewind(struct list *l, const struct push *last) {
    CHECK(l == &gate->sent && last == sent[named] && done == named, "those behind it are sent again");
}

static void push_answered(struct conn *c, struct push *p, int status, slice reason, int64_t since_ms) {
    (void)c, (void)since_ms, (void)reason;
    CHECK(p == sent[named] && status >= 0 && status < 256, "it is answered itself");
    done = 4;
}

static void apns_error(slice s) {
    gate = calloc(1, sizeof *gate);
    struct conn c = {.state = gate};
    for (size_t i = 0; i < 3; i++) {
        sent[i] = malloc(sizeof *sent[i]);   /* anything may be in it */
        list_add(&gate->sent, gate->sent.last, sent[i]);
    }
    done = named = 0;
    if (s.len >= 6 && s.p[0] == 8) while (named < 3 && be32(s.p + 2) != sent[named]->id) named++;
    else named = 3;
    ssize_t n = binary_feed(&c, (char *)s.p, s.len);
    CHECK(n == (s.len < 6 ? 0 : 6) && c.closing == (n > 0), "the packet is the end");
    CHECK(n == 0 || done == (named < 3 ? 4 : 0), "the push that is named is answered, and no other");
}
PROVE(apns_error, 1)
#endif
