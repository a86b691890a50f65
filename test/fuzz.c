/* Fuzz target for everything that strangers can send: HTTP heads, WebSocket frames,
 * JSON and chat messages, through the same functions that the loop calls; what gateways
 * of push answer; what back ends order; and the files of a history and of devices, which
 * a crash or a bad disk may have damaged.
 *
 * The first byte of an input chooses how it travels; the rest is what one connection
 * sends, cut into reads of that size. The descriptor is -1: nothing is really written,
 * and the connection ends when something is sent. Or the rest is two files (0x40), a
 * token (0x50), push (0x60), or back ends (0xe0).
 *
 *     clang -fsanitize=fuzzer,address,undefined test/fuzz.c -lssl -lcrypto
 */
#define main xchat_main
#include "../xchat.c"
#undef main

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

static struct conn *listener;
static char dir[64];

static void clean(void) {
    char path[80];
    static const char *const names[] = {"/devices", "/rooms/f", "/rooms", ""};
    for (size_t i = 0; i < 4; i++) snprintf(path, sizeof path, "%s%s", dir, names[i]), remove(path);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    char *none[] = {"xchat", NULL};
    clock_read();
    options_read(1, none);
    opt.max_message = 2000;
    opt.rate = 0;
    http.callers.key = caller_key;
    history_init(NULL);
    rooms.by_name.key = room_key;
    rooms.unsaid = chat_unsaid;
    loop.flush = rooms_flush;
    page_init();
    backend_init((const uint8_t[]){127, 0, 0, 1}, 2300, 7272);
    snprintf(dir, sizeof dir, "%s/xchat-fuzz-XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    if (mkdtemp(dir) == NULL || atexit(clean) != 0) abort();
    listener = xcalloc(sizeof *listener);
    listener->state = (void *)(uintptr_t)&page_site;
    return 0;
}

static struct conn *connect_one(void) {
    struct conn *c = conn_new(-1, &http_listener, NULL, false);
    http_accepted(listener, c);
    return c;
}

static void lay(uint64_t start, const uint8_t *p, size_t n) {
    char name[40];
    snprintf(name, sizeof name, "rooms/f/%016llx.log", (unsigned long long)start);
    int fd = openat(histories.dir_fd, name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, p, n) != (ssize_t)n) abort();
    close(fd);
}

/* Whatever is in the files: reading forth and back finds the same messages, each id is
 * one to resume from, and what is said then is there, behind all of them. */
static void fuzz_history(const uint8_t *data, size_t size) {
    histories.dir_fd = open(dir, O_RDONLY | O_DIRECTORY);
    mkdirat(histories.dir_fd, "rooms", 0700), mkdirat(histories.dir_fd, "rooms/f", 0700);
    size_t split = size * data[0] / 256, shift = data[1] & 3;   /* overlap, fit, or leave a gap */
    lay(0, data + 2, split > 2 ? split - 2 : 0);
    if (split > 2) lay(split - 2 + (shift == 3 ? 1 : shift == 2 && split > 3 ? -1u : 0), data + split, size - split);
    struct history *h = history_open(S("rooms/f"));
    char said[] = "{\"type\":\"say\",\"id\":\"00000000-0000000000000000\"}";
    uint64_t back = h->end, end = h->end, forth = h->base;
    size_t n = 0, m = 0;
    for (slice line; history_before(h, &back, &line); n++) {
        char id[ID_BYTES + 1];
        history_id(histories.seen, back + line.len + 1, id);
        if (history_position(h, slice_of(id)) < 0) abort();
    }
    for (slice line; history_next(h, &forth, end, &line); m++) continue;
    if (n != m || forth != end) abort();
    history_add(h, slice_of(said), said + 20);
    if (!history_commit(h)) abort();
    history_forget(h);
    back = h->end;
    slice line;
    if (!history_before(h, &back, &line) || back != end || !slice_eq(line, slice_of(said))) abort();
    while (h->segments > 0) {
        unlinkat(histories.dir_fd, history_file_path(h, h->segment[0]).text, 0);
        history_drop(h, 1);
    }
    history_close(h);
    close(histories.dir_fd);
    histories.dir_fd = -1;
}

/* What a gateway may answer (HTTP/2 or error packets), the feedback service tell, and a
 * damaged DIR/devices hold. The first byte chooses which; of the first two the rest is a
 * script: an opcode, and for some how much of what follows belongs to it. Between two steps
 * all lists must be whole. */

/* A client's end of TLS, shaken hands, that swallows what is sent. Each connection borrows it. */
static SSL *shaken(void) {
    static SSL *ends[2];
    for (int i = 0; i < 2 && ends[1] == NULL; i++) {
        SSL_CTX *tls = SSL_CTX_new(i == 0 ? TLS_client_method() : TLS_server_method());
        SSL_CTX_set_max_proto_version(tls, TLS1_2_VERSION);
        if (SSL_CTX_set_cipher_list(tls, "AECDH-AES128-SHA:@SECLEVEL=0") != 1) abort();   /* needs no certificate */
        SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
        ends[i] = SSL_new(tls);
        SSL_CTX_free(tls);
        SSL_set_quiet_shutdown(ends[i], 1);
        if (i == 0) continue;
        BIO *there = BIO_new(BIO_s_mem()), *back = BIO_new(BIO_s_mem());
        BIO_up_ref(there), BIO_up_ref(back);
        SSL_set_bio(ends[0], back, there), SSL_set_bio(ends[1], there, back);
        SSL_set_connect_state(ends[0]), SSL_set_accept_state(ends[1]);
        for (int n = 0; n < 4; n++) SSL_do_handshake(ends[0]), SSL_do_handshake(ends[1]);
        if (!SSL_is_init_finished(ends[0])) abort();
    }
    SSL_set_shutdown(ends[0], 0);
    if (BIO_reset(SSL_get_wbio(ends[0])) != 1) abort();
    SSL_up_ref(ends[0]);
    return ends[0];
}

static void check_list(const struct list *l, bool sent) {
    const struct push *last = NULL;
    uint32_t n = 0;
    for (const struct push *p = l->first; p != NULL; last = p, p = p->next, n++) {
        const struct subscription *s = push_place(p);
        if (p->prev != last || (!sent && s != NULL && s->waiting != p)) abort();
        if (sent && (p->payload.len == 0 || p->unsent > p->payload.len)) abort();
        if (p->token.len < TOKEN_MIN || p->token.len > TOKEN_MAX || p->reply.len > REPLY_MAX) abort();
    }
    if (n != l->n || last != l->last) abort();
}

static size_t subscriptions(void) {
    size_t n = 0, m = 0;
    for (size_t i = 0; i < push.devices.cap; i++) {
        const struct device *d = push.devices.slot[i];
        for (const struct subscription *s = d != NULL ? d->first : NULL; s != NULL; s = s->also, n++)
            if (s->device != d || (s->waiting != NULL && push_place(s->waiting) != s)) abort();
    }
    for (size_t i = 0; i < push.audiences.cap; i++) {
        const struct audience *a = push.audiences.slot[i];
        if (a != NULL && a->first == NULL) abort();
        for (const struct subscription *s = a != NULL ? a->first : NULL; s != NULL; s = s->next, m++)
            if (s->audience != a) abort();
    }
    if (n != m) abort();
    return n;
}

static void check_push(void) {
    check_list(&push.later, false);
    check_list(&push.queue, false);
    if (push.later.n + push.queue.n > PUSH_QUEUE + STREAMS_MAX) abort();
    for (uint32_t i = 0; i < loop.n; i++) {
        const struct gate *g = loop.conn[i]->proto == &gate_proto ? loop.conn[i]->state : NULL;
        if (g == NULL) continue;
        check_list(&g->sent, true);
        bool odd = g->window > INT32_MAX || g->window < 0 || g->block.len > BLOCK_MAX;
        if (odd && !loop.conn[i]->closing) abort();
        if (!push.binary && g->sent.n > STREAMS_MAX) abort();
    }
    subscriptions();
}

static const char *const phones[] = {
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "bb000000bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
    "cc000000000000cc", "dd000000dddddddddddddddddddddddddddddddddddddddddddddddddddddddd",
};

static slice phone_room(uint8_t byte) { return (byte & 16) != 0 ? S("rooms/a") : S("rooms/\"long\"-name-of-a-room"); }

static void phone_said(uint8_t byte) {
    static uint32_t number;
    struct buf b = {0};
    buf_printf(&b, "{\"from_client_name\":\"A&amp;n\",\"from_client_id\":\"7f00\",\"content\":\"<b>x</b>%*s\",", (byte & 7) * 700, "\\u0001");
    buf_printf(&b, "\"id\":\"00000000-%016x\"}", ++number);
    push_said(phone_room(byte), buf_slice(&b));
    buf_free(&b);
}

static struct conn *phone_gate(void) {
    struct conn *c = conn_new(-1, &gate_proto, NULL, true);
    c->ssl = shaken();
    gate_opened(c, NULL);
    return c;
}

/* The end of a script: nothing may be left. */
static void push_clean(void) {
    for (uint32_t i = 0; i < loop.n; i++) conn_lost(loop.conn[i], "fuzzed");
    loop_settle();
    if (loop.n != 0 || push.gate != NULL) abort();
    check_push();
    for (size_t i = 0; push.devices.n > 0; i = (i + 1) & (push.devices.cap - 1)) {
        struct device *d = push.devices.slot[i & (push.devices.cap - 1)];
        if (d != NULL) d->online = 0, push_forget(d);
        if (push.devices.cap == 0) break;
    }
    if (push.audiences.n != 0) abort();
    while (push.queue.n > 0) push_free(queue_take(push.queue.first));
    while (push.later.n > 0) push_free(queue_take(push.later.first));
    buf_free(&push.lines);
    push.redial_ms = push.pause_ms = push.fails = push.n_verdicts = 0;
    push.proved = false;
}

/* `kind`: 0 HTTP/2; 1 and 2 the binary protocol, in formats 0 and 2. */
static void fuzz_gateway(int kind, const uint8_t *data, size_t size) {
    struct device *held[64];
    size_t n_held = 0;
    struct conn *c = NULL;
    push.binary = kind != 0;
    opt.apns_format = kind == 2 ? 2 : 0;
    for (size_t i = 0; i < 8; i++) {
        struct device *d = device_hold(slice_of(phones[i % 4]), i % 4 == 1 ? S("u") : S(""));
        device_join(d, phone_room((uint8_t)(i < 4 ? 16 : 0)));
        push_offline(d);
    }
    for (size_t at = 0; at + 1 < size;) {
        uint8_t op = data[at] & 15, arg = data[at + 1];
        at += 2;
        size_t n = arg & 127u;
        if (n > size - at) n = size - at;
        slice rest = {(const char *)data + at, n};
        if (push.gate == NULL && op < 8) c = phone_gate();
        if (c == NULL) c = phone_gate();
        if (op < 4 && n > 0 && !c->closing) { /* bytes as they are */
            buf_add(&c->in, rest);
            conn_feed_kept(c);
            at += n;
        } else if (op < 7 && !c->closing && n >= 3) {   /* a frame that is well formed */
            static const uint8_t types[] = {H2_DATA, H2_HEADERS, H2_HEADERS, H2_RST, H2_SETTINGS, H2_PING, H2_GOAWAY, H2_WINDOW, H2_MORE};
            int type = types[(uint8_t)rest.p[0] % sizeof types];
            bool none = type == H2_SETTINGS || type == H2_PING || type == H2_GOAWAY;
            h2_frame(&c->in, type, (uint8_t)rest.p[1], none ? 0 : (uint32_t)(uint8_t)rest.p[2], slice_cut(rest, 3));
            conn_feed_kept(c);
            at += n;
        } else if (op == 7 && !push.binary && !c->closing) {
            h2_frame(&c->in, H2_SETTINGS, 0, 0, S("\0\4\0\0\xff\xff\0\3\0\0\0\x20"));
            conn_feed_kept(c);
        } else if (op == 8 || op == 9) phone_said(arg);
        else if (op == 10 && n_held < 64)
            push_join(held[n_held++] = push_online(slice_of(phones[arg % 4]), arg & 4 ? S("v") : arg & 8 ? S("u") : S("")),
                      phone_room(arg));
        else if (op == 11 && n_held > 0) {
            if ((arg & 1) != 0) push_forget(held[n_held - 1]);
            push_offline(held[--n_held]);
        } else if (op == 12) {
            now.ms += 1 << (arg & 15), now.wall += (1 << (arg & 15)) / 1000;
            if ((arg & 16) != 0 && c->state != NULL) ((struct gate *)c->state)->heard_ms = now.ms;
            for (uint32_t i = 0; i < loop.n; i++)
                if (!loop.conn[i]->closing) gate_tick(loop.conn[i]);
            push_tick();
        } else if (op == 13 && !c->closing) {
            if ((arg & 3) == 0) gate_drain(c);
            else if ((arg & 3) == 1) conn_lost(c, "lost");
            else conn_close(c, "closed");
        } else if (op == 14) loop_settle(), c = push.gate;
        else if (c->out.len > OUT_HIGH) buf_clear(&c->out);
        check_push();
    }
    while (n_held > 0) push_offline(held[--n_held]);
}

static void fuzz_feedback(const uint8_t *data, size_t size) {
    for (size_t i = 0; i < 4; i++) {
        struct device *d = device_hold(slice_of(phones[i]), S(""));
        device_join(d, phone_room(0));
        push_offline(d);
    }
    struct conn *c = conn_new(-1, &feedback_proto, NULL, true);
    c->ssl = shaken();
    for (size_t at = 0; at < size && !c->closing; at += 7) {
        buf_add(&c->in, (slice){(const char *)data + at, size - at < 7 ? size - at : 7});
        conn_feed_kept(c);
        check_push();
    }
}

static void devices_read(void) {
    data_lines("devices", device_read, (struct json_field[]){
        {.name = "token"}, {.name = "at"}, {.name = "unread"}, {.name = "uid"}, {.name = "room"}, {.name = "payload"},
        {.name = "id"}, {.name = "uuid"}, {.name = "expires"}}, 9);
    check_push();
}

/* What was read and written is read again as the same. */
static void fuzz_devices(const uint8_t *data, size_t size) {
    histories.dir_fd = open(dir, O_RDONLY | O_DIRECTORY);
    int fd = openat(histories.dir_fd, "devices", O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size) abort();
    close(fd);
    devices_read();
    size_t n = push.devices.n, m = subscriptions();
    opt.data = dir;
    devices_compact(true);
    opt.data = NULL;
    push_clean();
    devices_read();
    if (push.devices.n != n || subscriptions() != m) abort();
    unlinkat(histories.dir_fd, "devices", 0);
    close(histories.dir_fd);
    close(push.file);
    push.file = histories.dir_fd = -1;
}

/* There is --apns, but nobody dials. */
static void push_ready(void) {
    clock_read();
    opt.apns = "https://fuzz", opt.apns_topic = "t";
    push.dial = (struct dial){.host = "fuzz", .addresses = 1, .busy = true};
    push.feedback.busy = true;
    push.devices.key = device_key, push.audiences.key = audience_key;
    push.file = -1;
}

static void fuzz_push(const uint8_t *data, size_t size) {
    if (size < 2) return;
    push_ready();
    push.named = (data[0] & 8) == 0, push.full = push.named && (data[0] & 16) == 0;
    if ((data[0] & 7) < 3) fuzz_gateway(data[0] & 7, data + 1, size - 1);
    else if ((data[0] & 7) == 3) fuzz_feedback(data + 1, size - 1);
    else if ((data[0] & 7) == 4) fuzz_devices(data + 1, size - 1);
    push_clean();
    opt.apns = NULL;
}

/* A token as it comes; or, after a 0, its head and its claims with a line end between, which are
 * signed here: what they hold is looked at only then. */
static void fuzz_token(slice text) {
    struct buf bytes = {0}, again = {0};
    if (base64url_read(text, &bytes)) base64url(&again, buf_slice(&bytes));
    if (again.len > 0 && !slice_eq(buf_slice(&again), text)) abort();   /* one way to write it */
    buf_clear(&again);
    chat.n_secrets = 2;
    for (int i = 0; i < 2; i++) memset(chat.secrets[i].text, 'a' + i, chat.secrets[i].len = SECRET_MIN);
    bool sign = text.len > 0 && *text.p == '\0';
    if (sign) {
        slice claims = slice_cut(text, 1), head = slice_split(&claims, '\n');
        base64url(&again, head), buf_addc(&again, '.');
        base64url(&again, claims);
        pass_sign(&again, &chat.secrets[1]);
    } else buf_add(&again, text);
    buf_clear(&chat.uid);
    const char *why = pass_check(buf_slice(&again), S("room"));
    if (why == NULL && (!sign || chat.uid.len == 0 || chat.uid.len > ROOM_MAX_BYTES || !utf8_valid(buf_slice(&chat.uid)))) abort();
    if (why != NULL && sign && strcmp(why, "bad signature") == 0) abort();
    chat.n_secrets = 0;
    buf_free(&bytes), buf_free(&again);
}

/* What back ends may send: packets to the gateway, lines to the register, requests to the
 * administrator's site, while chat clients come and go. The first byte of a script says which
 * secrets there are, whether others can reach the address of the gateway, and whether there
 * is --apns; then follow steps: an opcode and who it is about, a length, and as much that
 * belongs to it. The first client has number 21; 21 and 24 are in room 9 to begin with. */

static const char *const api_paths[] = {
    "send", "bind", "unbind", "join", "leave", "kick", "push", "clients", "rooms", "history",
};

/* The connection of this protocol that is meant, or a new one if there are not so many; chat clients are as
 * if they had come from a page. All can be written to, and borrow their TLS. */
static struct conn *one_of(const struct proto *proto, unsigned which) {
    static struct conn peers = {.state = NULL};
    unsigned n = 0;
    for (uint32_t i = 0; i < loop.n; i++)
        if (loop.conn[i]->proto == proto && !loop.conn[i]->closing && n++ == which) return loop.conn[i];
    struct conn *c = conn_new(-1, proto, NULL, false);
    c->ssl = shaken();
    if (proto == &gateway_proto || proto == &register_proto) {
        peers.state = (void *)(uintptr_t)proto;
        peer_accepted(&peers, c);
        return c;
    }
    peers.state = proto == &http_proto ? (void *)(uintptr_t)&admin_site : (void *)(uintptr_t)&page_site;
    http_accepted(&peers, c);
    struct request upgrade = {.method = S("GET"), .target = S("/?a=1&b"), .path = S("/"), .query = S("a=1&b"),
                              .lines = S("Host: h\r\nCookie: a=%41; =\r\n")};
    for (int i = 0; i < HEADERS; i++) upgrade.header[i] = S("");
    if (proto == &chat_proto) page_site.upgraded(c, &upgrade);
    return c;
}

static void feed(struct conn *c, slice s, size_t step) {
    while (s.len > 0 && !c->closing) {
        size_t n = s.len < step ? s.len : step;
        buf_add(&c->in, slice_take(s, n));
        s = slice_cut(s, n);
        if (!conn_paused(c)) conn_feed_kept(c);
    }
}

/* A client is in its rooms as they have it, speaks in one of them, and has the inbox of its user. */
static void check_client(const struct client *cl) {
    bool seat = cl->seat == NULL, inbox = cl->more->inbox == NULL;
    if (cl->c->state != cl || (cl->more->inbox == NULL) != (cl->more->uid == NULL)) abort();
    for (const struct member *m = cl->c->joined; m != NULL; m = m->also) {
        const struct member *in = m->room->first;
        while (in != NULL && in != m) in = in->next;
        if (in == NULL || m->c != cl->c || m->room->end - m->cursor > m->room->log.len) abort();
        if (table_find(&rooms.by_name, room_key(m->room)) != m->room) abort();
        if (slice_starts(room_key(m->room), S("rooms/")) != (m != cl->more->inbox)) abort();
        seat |= m == cl->seat, inbox |= m == cl->more->inbox;
    }
    if (!seat || !inbox || (cl->seat != NULL && !cl->named) || room_count(cl->c) > ROOMS_PER_CLIENT) abort();
    if (cl->more->uid != NULL && !slice_eq(room_name(cl->more->inbox->room), slice_of(cl->more->uid))) abort();
    slice session = buf_slice(&cl->more->session);
    if (session.len > SESSION_MAX + 1000) abort();
    if (!php_valid(session, backend.key.len > 0) && memchr(session.p, ':', session.len) != NULL) abort();
}

/* Who is in a room knows of it; peers are all there, and have as many clients as say so. Who is
 * `listed` is in the set of clients, and nobody else is. */
static void check_backend(void) {
    if (opt.apns != NULL) check_push();
    uint32_t workers = 0;
    size_t listed = 0;
    for (size_t i = 0; i < backend.set.n; i++) listed += backend.set.client[i]->listed;
    if (listed != backend.set.n) abort();
    for (const struct peer *p = backend.peers; p != NULL; p = p->next) {
        uint32_t served = 0;
        if (p->c->state != p || loop.conn[p->c->slot] != p->c) abort();
        if (p->c->proto != (p->gateway ? &gateway_proto : &register_proto)) abort();
        if (p->gateway && p->worker && !p->known) abort();
        for (size_t i = 0; i < chat.clients.cap; i++) {
            const struct client *cl = chat.clients.slot[i];
            served += cl != NULL && cl->more->worker == p;
        }
        if (served != p->clients || (served > 0 && !(p->gateway && p->worker))) abort();
        workers += served;
    }
    for (size_t i = 0; i < chat.clients.cap; i++) {
        const struct client *cl = chat.clients.slot[i];
        if (cl == NULL) continue;
        check_client(cl);
        listed -= cl->listed;
        if (cl->more->worker != NULL) workers--;
    }
    if (workers != 0 || listed != 0) abort();   /* a worker that is none; a client that is gone */
    for (size_t i = 0; i < rooms.by_name.cap; i++) {
        const struct room *r = rooms.by_name.slot[i];
        const struct member *last = NULL;
        for (const struct member *m = r != NULL ? r->first : NULL; m != NULL; last = m, m = m->next)
            if (m->room != r || m->prev != last || room_member(r, m->c) != m) abort();
        if (r != NULL && r->last != last) abort();
    }
}

/* What unserialize() would be given: valid stays valid, as JSON too. */
static void fuzz_php(slice one, slice two) {
    struct buf b = {0}, json = {0};
    struct json_field f = {.name = "v"};
    size_t at;
    bool both = php_valid(one, true) && php_valid(two, true);
    if (php_valid(one, false) && !php_valid(one, true)) abort();
    if (php_json(one, &b)) {
        buf_printf(&json, "{\"v\":%.*s}", F(buf_slice(&b)));
        const char *why = json_pick(buf_slice(&json), &f, 1, &at);
        if (why != NULL && strcmp(why, "nested too deeply") != 0) abort();
    }
    buf_clear(&b);
    if (both && *one.p == 'a' && *two.p == 'a') {
        php_merge(one, two, &b);
        if (!php_valid(buf_slice(&b), true) || b.len > one.len + two.len + 20 * (one.len + two.len)) abort();
    }
    buf_clear(&b);
    php_key(&b, one);
    if (!php_valid(buf_slice(&b), false)) abort();
    buf_clear(&b);
    php_form(&b, one, '&');
    if (!php_valid(buf_slice(&b), false)) abort();
    buf_free(&b), buf_free(&json);
}

/* A packet: its command, who it is about, its flag, and how much of what follows is ext_data. */
static void fuzz_packet(struct conn *c, slice s, size_t step) {
    static const unsigned char cmds[] = {
        5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 20, 21, 22, 23, 24, 25, 26, 27, 28, 200, 202, 203, 204,
    };
    const unsigned char *u = (const unsigned char *)s.p;
    struct buf b = {0};
    buf_be(&b, PACKET_HEAD - 4 + s.len, 4), buf_be(&b, cmds[u[0] % sizeof cmds], 1);
    buf_be(&b, 0, 8), buf_be(&b, 0, 4), buf_be(&b, u[1] & 15u ? 20u + (u[1] & 15u) : u[1], 4), buf_be(&b, u[2], 1);
    buf_be(&b, 0, 2), buf_be(&b, u[3], 4);
    buf_add(&b, slice_cut(s, 4));
    feed(c, buf_slice(&b), step);
    buf_free(&b);
}

static void fuzz_api(struct conn *c, unsigned which, slice s, size_t step) {
    struct buf b = {0};
    const char *path = api_paths[(unsigned char)*s.p % (sizeof api_paths / sizeof *api_paths)];
    bool get = ((unsigned char)*s.p & 64) != 0;
    s = slice_cut(s, 1);
    buf_printf(&b, "%s /api/%s?%.*s", get ? "GET" : "POST", path, get ? (int)s.len : 0, s.p);
    buf_add(&b, S(" HTTP/1.1\r\nHost: localhost\r\n"));
    buf_printf(&b, "%sContent-Type: application/%s\r\n", which & 1 ? "" : "Authorization: Bearer k\r\n",
               which & 2 ? "x-www-form-urlencoded" : "json");
    buf_printf(&b, "Content-Length: %zu\r\n\r\n", get ? 0 : s.len);
    if (!get) buf_add(&b, s);
    feed(c, buf_slice(&b), step);
    buf_free(&b);
}

static void fuzz_time(unsigned arg) {
    now.ms += 1 << (arg & 15), now.wall += (1 << (arg & 15)) / 1000;
    loop_tick();
}

static void fuzz_step(unsigned op, unsigned which, slice s) {
    size_t step = which & 8 ? 1 : SIZE_MAX;
    struct buf b = {0};
    unsigned id = which & 7;
    if (op == 0) feed(one_of(&gateway_proto, id % 3), s, step);
    else if ((op == 1 || op == 2) && s.len >= 4) fuzz_packet(one_of(&gateway_proto, id % 3), s, step);
    else if (op == 3) {   /* one that knows the secret, a worker maybe */
        buf_printf(&b, "{\"secret_key\":\"%.*s\",\"worker_key\":\"w%u\"}", F(secret_text(&backend.key)), (unsigned)s.len);
        struct buf packet = {0};
        buf_printf(&packet, "%c%c%c%c%.*s", which & 4 ? 22 : 21, 0, 1, 0, F(buf_slice(&b)));
        fuzz_packet(one_of(&gateway_proto, id % 3), buf_slice(&packet), step);
        buf_free(&packet);
    } else if (op == 4) feed(one_of(&register_proto, id % 3), s, step);
    else if (op == 5) {
        buf_printf(&b, "{\"event\":\"%s_connect\",\"address\":\"%.*s\",\"secret_key\":\"%.*s\"}\n",
                   which & 4 ? "gateway" : "worker", F(s), F(secret_text(&backend.key)));
        feed(one_of(&register_proto, id % 3), buf_slice(&b), step);
    } else if (op == 6) feed(one_of(&http_proto, id % 2), s, step);
    else if (op == 7 && s.len > 0) fuzz_api(one_of(&http_proto, 0), which, s, step);
    else if (op == 8 && s.len > 0) chat_message(one_of(&chat_proto, id), s);
    else if (op == 9 && s.len > 0) {
        buf_printf(&b, "{\"type\":\"login\",\"client_name\":\"n\",\"room_id\":%d}", *s.p);
        chat_message(one_of(&chat_proto, id), buf_slice(&b));
    } else if (op == 10) feed(one_of(&chat_proto, id), s, step);
    else if (op == 11) fuzz_php(slice_take(s, s.len * which / 16), slice_cut(s, s.len * which / 16)), fuzz_php(s, s);
    else if (op == 12) fuzz_time(which);
    else if (op == 13 && loop.n > 0) (which & 8 ? conn_lost : conn_close)(loop.conn[s.len % loop.n], "fuzzed");
    else loop_settle();
    buf_free(&b);
}

static void fuzz_backend(const uint8_t *data, size_t size) {
    if (size < 1) return;
    if ((data[0] & 1) != 0) memcpy(backend.key.text, "sekret", backend.key.len = 6);
    if ((data[0] & 2) != 0) memcpy(api.key.text, "k", api.key.len = 1);
    opt.gateway = (data[0] & 4) != 0 ? "g" : NULL;
    backend.address[3] = (data[0] & 8) != 0 ? 2 : 1;
    if ((data[0] & 16) != 0) push_ready(), push.binary = false, rooms.said = push_said;
    chat.last_number = 20;
    for (unsigned i = 0; i < 4; i++) {
        struct conn *c = one_of(&chat_proto, i);
        if (i % 3 == 0) chat_message(c, S("{\"type\":\"login\",\"client_name\":\"A\",\"room_id\":\"9\"}"));
    }
    for (size_t at = 1; at + 1 < size;) {
        unsigned op = data[at] & 15, which = data[at] >> 4;
        size_t n = data[at + 1];
        at += 2;
        if (n > size - at) n = size - at;
        fuzz_step(op, which, (slice){(const char *)data + at, n});
        check_backend();
        at += n;
    }
    loop_settle();
    check_backend();
    for (uint32_t i = 0; i < loop.n; i++) conn_lost(loop.conn[i], "fuzzed");
    loop_settle();
    if (backend.peers != NULL) abort();
    backend.key.len = api.key.len = 0;
    if (opt.apns != NULL) push_clean();
    opt.apns = NULL, rooms.said = NULL;
}

/* What one connection of a browser sends. */
static void fuzz_stranger(const uint8_t *data, size_t size) {
    size_t step = (size_t)(data[0] & 0x3f) + 1;
    struct conn *c = connect_one();
    if ((data[0] & 0x80) != 0) {   /* skip the upgrade, which random bytes never pass */
        page_site.upgraded(c, &(struct request){0});
        if ((data[0] & 0x40) != 0) {   /* and the frames too */
            chat_message(c, S("{\"type\":\"login\",\"client_name\":\"fuzz\",\"room_id\":\"1\"}"));
            chat_message(c, (slice){(const char *)data + 1, size - 1});
            step = size;
        }
    }
    for (size_t at = 1; at < size && !c->closing && step < size; at += step) {
        size_t n = size - at < step ? size - at : step;
        buf_add(&c->in, (slice){(const char *)data + at, n});
        conn_feed_kept(c);
        if (c->in.len > opt.max_head + 2 * step) abort();   /* what is kept is bounded */
    }
    conn_lost(c, "fuzzed");
    loop_settle();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1) return 0;
    if ((data[0] & 0xf0) == 0x50) {
        fuzz_token((slice){(const char *)data + 1, size - 1});
        return 0;
    }
    if ((data[0] & 0xe0) == 0x60) {
        fuzz_push(data + 1, size - 1);
        return 0;
    }
    if ((data[0] & 0xc0) == 0x40) {
        if (size > 4) fuzz_history(data + 1, size - 1);
        return 0;
    }
    if ((data[0] & 0xe0) == 0xe0) fuzz_backend(data + 1, size - 1);
    else fuzz_stranger(data, size);
    if (loop.n != 0 || http.connections != 0 || rooms.by_name.n != 0 || chat.clients.n != 0) abort();
    return 0;
}
