/* Breaks the system under the program it is preloaded into, as a test asks for it:
 *
 *     cc -shared -fPIC -o fault.so fault.c -ldl
 *     FAULTS=table LD_PRELOAD=./fault.so xchat --data DIR
 *
 * The file `table` holds the ints below and is shared memory: the test turns a
 * fault on and off while the program runs. There are two kinds: a disk that gets full or
 * breaks (ROOM to SYNCS), and one CALL, of those that follow, that fails from the NTH on.
 * And the clocks, so that nobody needs to wait. */
#define _DEFAULT_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef RTLD_NEXT
#define RTLD_NEXT ((void *)-1L)
#define RTLD_DEFAULT ((void *)0)
#endif

enum {
    ROOM,           /* so many bytes can be written; -1: no limit */
    WRITE_ERRNO,    /* what a write fails with when no room is left; 0: it is short for ever */
    SYNC_ERRNO,     /* what fsync and fdatasync fail with, or 0 */
    TRUNCATE_ERRNO, /* what ftruncate fails with, or 0 */
    DIE,            /* SIGKILL as soon as the room is used up */
    WRITES,         /* how many writes and syncs there were */
    SYNCS,
    LATER,          /* so many seconds later than it is, says the clock that never goes back */
    SNDBUF,         /* how much the kernel holds of what accepted sockets send; 0: as ever */
    WALL,           /* what time() says, up to the year 2106; 0: the truth */
    CALL,           /* one of those below; 0: none */
    NTH,            /* the so many-th from now on fails... */
    TIMES,          /* ...and as many as that, together */
    HOW,            /* its errno, or CUT */
    CALLS,          /* how many of this call there were... */
    STRUCK,         /* ...and how many of them failed */
    COUNT
};
enum { CUT = -1 };  /* it reads or writes one byte only */

/* Those with several names are one; reading and writing is told apart by what it is done to. */
enum {
    NO_CALL, MALLOC, RECV, SEND, FILE_READ, FILE_WRITE, LOG, ACCEPT, OPEN, SYNC, CUT_FILE, STAT, RENAME, MAKE_DIRECTORY,
    SOCKET, CONNECT, SOCKETPAIR, FORK, NAME_OF_SOCKET, SHUTDOWN, FCNTL, EPOLL_CREATE, EPOLL_CTL, EPOLL_WAIT, POLL,
    TLS_NEW, TLS_CONTEXT, TLS_READ, TLS_WRITE, DIGEST, RANDOM
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

/* 0: this call may go on. Otherwise what HOW says, and errno. */
static int strikes(int call)
{
    if (!table || call == NO_CALL || table[CALL] != call)
        return 0;
    table[CALLS]++;
    if (table[TIMES] <= 0 || --table[NTH] > 0)
        return 0;
    table[NTH] = 1;
    table[TIMES]--;
    table[STRUCK]++;
    if (table[HOW] > 0)
        errno = table[HOW];
    return table[HOW];
}

/* What is read from or written to there. */
static int kind(int fd, int of_socket, int of_file)
{
    struct stat st;
    if (!table || (table[CALL] != of_socket && table[CALL] != of_file && table[CALL] != LOG))
        return NO_CALL;
    if (fd == 2)
        return of_socket == SEND ? LOG : NO_CALL;
    if (fstat(fd, &st) != 0)
        return NO_CALL;
    return S_ISSOCK(st.st_mode) ? of_socket : S_ISREG(st.st_mode) ? of_file : NO_CALL;
}

static int on_disk(int fd)
{
    struct stat st;
    return table && fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
}

/* How many of n bytes may be written; -1 and errno when none. */
static ssize_t allowed(int fd, size_t n)
{
    int how = n > 0 ? strikes(kind(fd, SEND, FILE_WRITE)) : 0;
    if (how != 0)
        return how == CUT ? 1 : -1;
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

/* The same of reading. */
static ssize_t wanted(int fd, size_t n)
{
    int how = n > 0 ? strikes(kind(fd, RECV, FILE_READ)) : 0;
    return how == 0 ? (ssize_t)n : how == CUT ? 1 : -1;
}

ssize_t read(int fd, void *p, size_t n)
{
    ssize_t (*real)(int, void *, size_t);
    *(void **)&real = dlsym(RTLD_NEXT, "read");
    ssize_t may = wanted(fd, n);
    return may < 0 ? -1 : real(fd, p, (size_t)may);
}

ssize_t recv(int fd, void *p, size_t n, int flags)
{
    ssize_t (*real)(int, void *, size_t, int);
    *(void **)&real = dlsym(RTLD_NEXT, "recv");
    ssize_t may = wanted(fd, n);
    return may < 0 ? -1 : real(fd, p, (size_t)may, flags);
}

ssize_t send(int fd, const void *p, size_t n, int flags)
{
    ssize_t (*real)(int, const void *, size_t, int);
    *(void **)&real = dlsym(RTLD_NEXT, "send");
    ssize_t may = allowed(fd, n);
    return may < 0 ? -1 : real(fd, p, (size_t)may, flags);
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

#define PREAD(NAME, OFFSET)                                                                   \
    ssize_t NAME(int fd, void *p, size_t n, OFFSET at)                                        \
    {                                                                                         \
        ssize_t (*real)(int, void *, size_t, OFFSET);                                         \
        *(void **)&real = dlsym(RTLD_NEXT, #NAME);                                            \
        ssize_t may = wanted(fd, n);                                                          \
        return may < 0 ? -1 : real(fd, p, (size_t)may, at);                                   \
    }
PREAD(pread, off_t)
PREAD(pread64, long long)

#define TRUNCATE(NAME, OFFSET)                                                                \
    int NAME(int fd, OFFSET to)                                                               \
    {                                                                                         \
        int (*real)(int, OFFSET);                                                             \
        *(void **)&real = dlsym(RTLD_NEXT, #NAME);                                            \
        if (on_disk(fd) && table[TRUNCATE_ERRNO]) {                                           \
            errno = table[TRUNCATE_ERRNO];                                                    \
            return -1;                                                                        \
        }                                                                                     \
        if (strikes(CUT_FILE))                                                                \
            return -1;                                                                        \
        return real(fd, to);                                                                  \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, long long)

#define SYNCING(NAME)                                                                            \
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
        if (strikes(SYNC))                                                                    \
            return -1;                                                                        \
        return real(fd);                                                                      \
    }
SYNCING(fsync)
SYNCING(fdatasync)

int accept(int fd, struct sockaddr *a, socklen_t *n)
{
    int (*real)(int, struct sockaddr *, socklen_t *);
    *(void **)&real = dlsym(RTLD_NEXT, "accept");
    int got = strikes(ACCEPT) ? -1 : real(fd, a, n), size = table ? table[SNDBUF] : 0;
    if (got >= 0 && size > 0)
        setsockopt(got, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    return got;
}

/* Those with a mode only if a file is made. */
#define OPENING(NAME, PARAMETERS, ...)                                                        \
    int NAME(PARAMETERS const char *path, int flags, ...)                                     \
    {                                                                                         \
        int (*real)(PARAMETERS const char *, int, ...);                                       \
        va_list args;                                                                         \
        *(void **)&real = dlsym(RTLD_NEXT, #NAME);                                            \
        va_start(args, flags);                                                                \
        int mode = flags & O_CREAT ? va_arg(args, int) : 0;                                   \
        va_end(args);                                                                         \
        return strikes(OPEN) ? -1 : real(__VA_ARGS__, flags, mode);                           \
    }
#define DIRECTORY int dir,
OPENING(open, , path)
OPENING(open64, , path)
OPENING(openat, DIRECTORY, dir, path)
OPENING(openat64, DIRECTORY, dir, path)

#define CONTROL(NAME)                                                                         \
    int NAME(int fd, int what, ...)                                                           \
    {                                                                                         \
        int (*real)(int, int, ...);                                                           \
        va_list args;                                                                         \
        *(void **)&real = dlsym(RTLD_NEXT, #NAME);                                            \
        va_start(args, what);                                                                 \
        void *value = va_arg(args, void *); /* or a number, or nothing */                     \
        va_end(args);                                                                         \
        return strikes(FCNTL) ? -1 : real(fd, what, value);                                   \
    }
CONTROL(fcntl)
CONTROL(fcntl64)
CONTROL(__fcntl_time64) /* 32-bit programs that know times behind 2038 */

/* A call that fails, and nothing else. */
#define FAILING(CALL, RESULT, NAME, PARAMETERS, ARGUMENTS, FAILED)                            \
    RESULT NAME PARAMETERS                                                                    \
    {                                                                                         \
        static RESULT (*real) PARAMETERS;                                                     \
        if (!real)                                                                            \
            *(void **)&real = dlsym(RTLD_NEXT, #NAME);                                        \
        return strikes(CALL) ? FAILED : real ARGUMENTS;                                       \
    }
FAILING(OPEN, FILE *, fopen, (const char *path, const char *mode), (path, mode), NULL)
FAILING(OPEN, FILE *, fopen64, (const char *path, const char *mode), (path, mode), NULL)
FAILING(STAT, int, fstatat, (int fd, const char *path, struct stat *st, int flags), (fd, path, st, flags), -1)
FAILING(STAT, int, fstatat64, (int fd, const char *path, void *st, int flags), (fd, path, st, flags), -1)
FAILING(STAT, int, __fstatat64_time64, (int fd, const char *path, void *st, int flags), (fd, path, st, flags), -1)
FAILING(RENAME, int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), -1)
FAILING(MAKE_DIRECTORY, int, mkdirat, (int fd, const char *path, mode_t mode), (fd, path, mode), -1)
FAILING(SOCKET, int, socket, (int domain, int type, int protocol), (domain, type, protocol), -1)
FAILING(CONNECT, int, connect, (int fd, const struct sockaddr *a, socklen_t n), (fd, a, n), -1)
FAILING(SOCKETPAIR, int, socketpair, (int domain, int type, int protocol, int pair[2]), (domain, type, protocol, pair), -1)
FAILING(FORK, pid_t, fork, (void), (), -1)
FAILING(NAME_OF_SOCKET, int, getsockname, (int fd, struct sockaddr *a, socklen_t *n), (fd, a, n), -1)
FAILING(NAME_OF_SOCKET, int, getpeername, (int fd, struct sockaddr *a, socklen_t *n), (fd, a, n), -1)
FAILING(SHUTDOWN, int, shutdown, (int fd, int how), (fd, how), -1)
FAILING(EPOLL_CREATE, int, epoll_create1, (int flags), (flags), -1)
FAILING(EPOLL_CTL, int, epoll_ctl, (int e, int what, int fd, struct epoll_event *event), (e, what, fd, event), -1)
FAILING(EPOLL_WAIT, int, epoll_wait, (int e, struct epoll_event *events, int n, int ms), (e, events, n, ms), -1)
FAILING(POLL, int, poll, (struct pollfd *p, nfds_t n, int ms), (p, n, ms), -1)

/* OpenSSL's. It keeps errors in a queue of its own. */
static int mishap(int result)
{
    void (*begin)(void), (*set)(int, int, const char *, ...);
    *(void **)&begin = dlsym(RTLD_DEFAULT, "ERR_new");
    *(void **)&set = dlsym(RTLD_DEFAULT, "ERR_set_error");
    if (begin && set)
        begin(), set(20 /* of TLS */, 68 /* internal error */, NULL);
    return result;
}
FAILING(TLS_NEW, void *, SSL_new, (void *context), (context), NULL)
FAILING(TLS_CONTEXT, void *, SSL_CTX_new, (const void *method), (method), NULL)
FAILING(TLS_READ, int, SSL_read, (void *ssl, void *p, int n), (ssl, p, n), mishap(-1))
FAILING(TLS_WRITE, int, SSL_write, (void *ssl, const void *p, int n), (ssl, p, n), mishap(-1))
FAILING(DIGEST, void *, SHA1, (const void *p, size_t n, void *md), (p, n, md), NULL)
FAILING(DIGEST, void *, SHA256, (const void *p, size_t n, void *md), (p, n, md), NULL)
FAILING(RANDOM, int, RAND_bytes, (void *p, int n), (p, n), 0)

/* A 32-bit program that knows times behind 2038 calls the clocks by other names. */
struct timespec64 {
    long long tv_sec;
    long tv_nsec[2]; /* one of the two */
};

#define CLOCKS(GETTIME, TIMESPEC, TIME, SECONDS)                                              \
    int GETTIME(clockid_t clock, TIMESPEC *t)                                                 \
    {                                                                                         \
        int (*real)(clockid_t, TIMESPEC *);                                                   \
        *(void **)&real = dlsym(RTLD_NEXT, #GETTIME);                                         \
        int failed = real(clock, t);                                                          \
        if (table && !failed && clock == CLOCK_MONOTONIC)                                     \
            t->tv_sec += table[LATER];                                                        \
        return failed;                                                                        \
    }                                                                                         \
    SECONDS TIME(SECONDS *to)                                                                 \
    {                                                                                         \
        TIMESPEC now;                                                                         \
        GETTIME(CLOCK_REALTIME, &now);                                                        \
        SECONDS t = table && table[WALL] ? (SECONDS)(unsigned)table[WALL] : now.tv_sec;       \
        if (to)                                                                               \
            *to = t;                                                                          \
        return t;                                                                             \
    }
CLOCKS(clock_gettime, struct timespec, time, time_t)
CLOCKS(__clock_gettime64, struct timespec64, __time64, long long)

FAILING(MALLOC, void *, malloc, (size_t n), (n), NULL)
FAILING(MALLOC, void *, calloc, (size_t n, size_t size), (n, size), NULL)
FAILING(MALLOC, void *, realloc, (void *p, size_t n), (p, n), NULL)
