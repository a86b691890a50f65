/* Fuzz target for everything that strangers can send: HTTP heads, WebSocket frames,
 * JSON and chat messages, through the same functions that the loop calls.
 *
 * The first byte of an input chooses how it travels; the rest is what one connection
 * sends, cut into reads of that size. The descriptor is -1: nothing is really written,
 * and the connection ends when something is sent.
 *
 *     clang -fsanitize=fuzzer,address,undefined test/fuzz.c -lssl -lcrypto
 */
#define main xchat_main
#include "../xchat.c"
#undef main

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

static struct conn *listener;

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
    listener = xcalloc(sizeof *listener);
    listener->state = (void *)(uintptr_t)&page_site;
    return 0;
}

static struct conn *connect_one(void) {
    struct conn *c = conn_new(-1, &http_listener, NULL);
    http_accepted(listener, c);
    return c;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1) return 0;
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
