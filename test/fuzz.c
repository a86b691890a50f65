/* Fuzz target for everything that strangers can send: HTTP heads, WebSocket frames,
 * JSON and chat messages, through the same functions that the loop calls; and for the
 * files of a history, which a crash or a bad disk may have damaged.
 *
 * The first byte of an input chooses how it travels; the rest is what one connection
 * sends, cut into reads of that size. The descriptor is -1: nothing is really written,
 * and the connection ends when something is sent. Or (0x40) the rest is two files.
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
    static const char *const names[] = {"/rooms/f", "/rooms", ""};
    for (size_t i = 0; i < 3; i++) snprintf(path, sizeof path, "%s%s", dir, names[i]), rmdir(path);
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
    chat_init(7272);
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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1) return 0;
    if ((data[0] & 0xc0) == 0x40) {
        if (size > 4) fuzz_history(data + 1, size - 1);
        return 0;
    }
    size_t step = (size_t)(data[0] & 0x3f) + 1;
    struct conn *c = connect_one();
    if ((data[0] & 0x80) != 0) {   /* skip the upgrade, which random bytes never pass */
        page_site.upgraded(c);
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
    if (loop.n != 0 || http.connections != 0 || rooms.by_name.n != 0 || chat.clients.n != 0) abort();
    return 0;
}
