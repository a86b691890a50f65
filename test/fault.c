/* Breaks the system under the program it is preloaded into, as a test asks for it:
 *
 *     cc -shared -fPIC -o fault.so fault.c -ldl
 *     FAULTS=table LD_PRELOAD=./fault.so xchat --data DIR
 *
 * The file `table` holds the ints below and is shared memory: the test turns a
 * fault on and off while the program runs. Of files, only regular ones have faults; and the
 * clocks, so that nobody needs to wait. */
#define _DEFAULT_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef RTLD_NEXT
#define RTLD_NEXT ((void *)-1L)
#endif

enum {
    ROOM,           /* so many bytes can be written; -1: no limit */
    WRITE_ERRNO,    /* what a write fails with when no room is left; 0: it is short for ever */
    SYNC_ERRNO,     /* what fsync and fdatasync fail with, or 0 */
    TRUNCATE_ERRNO, /* what ftruncate fails with, or 0 */
    DIE,            /* SIGKILL as soon as the room is used up */
    WRITES,         /* how many writes and syncs there were */
    SYNCS,
    OPEN_ERRNO,     /* what openat fails with, or 0 */
    LATER,          /* so many seconds later than it is, says the clock that never goes back */
    ACCEPT_ERRNO,   /* what accept fails with... */
    ACCEPTS,        /* ...the next so many times */
    WALL,           /* what time() says, up to the year 2106; 0: the truth */
    ALLOCATE,       /* the so many-th realloc from now on fails; 0: none */
    COUNT
};
static volatile int *table;

__attribute__((constructor)) static void start(void)
{
    const char *path = getenv("FAULTS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *p = fd < 0 ? MAP_FAILED
                     : mmap(NULL, COUNT * sizeof(int), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd >= 0)
        close(fd);
    if (p != MAP_FAILED)
        table = p;
}

static int on_disk(int fd)
{
    struct stat st;
    return table && fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
}

/* How many of n bytes may be written; -1 and errno when none. */
static ssize_t allowed(int fd, size_t n)
{
    if (!on_disk(fd))
        return (ssize_t)n;
    table[WRITES]++;
    if (table[ROOM] < 0 || n == 0)
        return (ssize_t)n;
    if (table[ROOM] == 0 && table[WRITE_ERRNO]) {
        errno = table[WRITE_ERRNO];
        return -1;
    }
    return (size_t)table[ROOM] < n ? table[ROOM] : (ssize_t)n;
}

/* After a write of n bytes. */
static ssize_t written(int fd, ssize_t n)
{
    if (n > 0 && on_disk(fd) && table[ROOM] >= 0 && (table[WRITE_ERRNO] || table[DIE])) {
        table[ROOM] -= (int)n;
        if (table[ROOM] <= 0 && table[DIE])
            kill(getpid(), SIGKILL);
    }
    return n;
}

ssize_t write(int fd, const void *p, size_t n)
{
    ssize_t (*real)(int, const void *, size_t);
    *(void **)&real = dlsym(RTLD_NEXT, "write");
    ssize_t may = allowed(fd, n);
    return may < 0 ? -1 : written(fd, real(fd, p, (size_t)may));
}

ssize_t writev(int fd, const struct iovec *v, int n)
{
    ssize_t (*real)(int, const struct iovec *, int);
    *(void **)&real = dlsym(RTLD_NEXT, "writev");
    if (!on_disk(fd) || n == 0)
        return real(fd, v, n);
    ssize_t sum = 0; /* piece by piece: a short one ends it */
    for (int i = 0; i < n; i++) {
        ssize_t got = write(fd, v[i].iov_base, v[i].iov_len);
        if (got < 0)
            return sum ? sum : -1;
        sum += got;
        if ((size_t)got < v[i].iov_len)
            break;
    }
    return sum;
}

/* The types of two names for each: off_t of a 32-bit program is long or long long. */
#define PWRITE(NAME, OFFSET)                                                                  \
    ssize_t NAME(int fd, const void *p, size_t n, OFFSET at)                                  \
    {                                                                                         \
        ssize_t (*real)(int, const void *, size_t, OFFSET);                                   \
        *(void **)&real = dlsym(RTLD_NEXT, #NAME);                                            \
        ssize_t may = allowed(fd, n);                                                         \
        return may < 0 ? -1 : written(fd, real(fd, p, (size_t)may, at));                      \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, long long)

#define TRUNCATE(NAME, OFFSET)                                                                \
    int NAME(int fd, OFFSET to)                                                               \
    {                                                                                         \
        int (*real)(int, OFFSET);                                                             \
        *(void **)&real = dlsym(RTLD_NEXT, #NAME);                                            \
        if (on_disk(fd) && table[TRUNCATE_ERRNO]) {                                           \
            errno = table[TRUNCATE_ERRNO];                                                    \
            return -1;                                                                        \
        }                                                                                     \
        return real(fd, to);                                                                  \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, long long)

#define SYNC(NAME)                                                                            \
    int NAME(int fd)                                                                          \
    {                                                                                         \
        int (*real)(int);                                                                     \
        *(void **)&real = dlsym(RTLD_NEXT, #NAME);                                            \
        if (on_disk(fd)) {                                                                    \
            table[SYNCS]++;                                                                   \
            if (table[SYNC_ERRNO]) {                                                          \
                errno = table[SYNC_ERRNO];                                                    \
                return -1;                                                                    \
            }                                                                                 \
        }                                                                                     \
        return real(fd);                                                                      \
    }
SYNC(fsync)
SYNC(fdatasync)

#define OPENAT(NAME)                                                                          \
    int NAME(int dir, const char *path, int flags, ...)                                       \
    {                                                                                         \
        int (*real)(int, const char *, int, ...);                                             \
        va_list args;                                                                         \
        *(void **)&real = dlsym(RTLD_NEXT, #NAME);                                            \
        va_start(args, flags);                                                                \
        int mode = flags & O_CREAT ? va_arg(args, int) : 0;                                   \
        va_end(args);                                                                         \
        if (table && table[OPEN_ERRNO]) {                                                     \
            errno = table[OPEN_ERRNO];                                                        \
            return -1;                                                                        \
        }                                                                                     \
        return real(dir, path, flags, mode);                                                  \
    }
OPENAT(openat)
OPENAT(openat64)

int clock_gettime(clockid_t clock, struct timespec *t)
{
    int (*real)(clockid_t, struct timespec *);
    *(void **)&real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, t);
    if (table && !failed && clock == CLOCK_MONOTONIC)
        t->tv_sec += table[LATER];
    return failed;
}

int accept(int fd, struct sockaddr *from, socklen_t *len)
{
    int (*real)(int, struct sockaddr *, socklen_t *);
    *(void **)&real = dlsym(RTLD_NEXT, "accept");
    if (!table || table[ACCEPTS] <= 0)
        return real(fd, from, len);
    table[ACCEPTS]--;
    errno = table[ACCEPT_ERRNO];
    return -1;
}

time_t time(time_t *to)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    time_t t = table && table[WALL] ? (time_t)(unsigned)table[WALL] : now.tv_sec;
    if (to)
        *to = t;
    return t;
}

#ifndef NO_REALLOC /* a sanitizer has its own */
void *realloc(void *p, size_t n)
{
    static void *(*real)(void *, size_t);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "realloc");
    if (table && table[ALLOCATE] > 0 && --table[ALLOCATE] == 0) {
        errno = ENOMEM;
        return NULL;
    }
    return real(p, n);
}
#endif
