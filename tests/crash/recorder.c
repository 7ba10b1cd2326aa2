/* An LD_PRELOAD library that writes down what one process does to the files below one folder: every write with its
 * bytes, every change of a name, and the beginning and the end of every fsync, in one order.
 *
 * It never changes what a call does or returns, and it never keeps silent about what it can't follow: a call that
 * would change a file behind its back (a writable shared mapping, a copy inside the kernel, a second process, a full
 * trace) sets a bit in the trace's header, and whoever reads the trace has to refuse it.
 *
 *     CRASH_TRACE_FILE    the trace: a file made beforehand, whose size is the most that is recorded
 *     CRASH_TRACE_FOLDER  absolute path without links; what is below it is recorded, lock.mdb excepted
 *
 * The trace, little-endian:
 *
 *     0  8  magic "CRASHTR1"
 *     8  8  end: all records below it are whole. Whoever maps the file may read it at any time.
 *    16  8  the process id of the recorded process, 0 before its first record
 *    24  8  bits of `enum blind`: why the trace can't be trusted; 0 if it can
 *    32  .  records, each a multiple of 8 bytes long:
 *
 *     0  4  length of the record in bytes, padding included
 *     4  2  kind (enum kind)
 *     6  2  1 if the write is durable by itself once it returned (O_DSYNC, O_SYNC)
 *     8  8  operation: what ties an END to its beginning
 *    16  8  file: a number per open(), which the END of the OPEN gives
 *    24  8  offset of a write; the new size of a TRUNCATE, the least size after an ALLOCATE; the flags of an OPEN; the result of an END
 *    32  8  length of the payload in bytes
 *    40  .  payload: bytes of a write; path of an OPEN, MKDIR, UNLINK or FSYNC; both paths of a RENAME, with a NUL
 *
 * A record of a beginning is in the trace before the system call, its END after it: what happened at any instant lies
 * between "nothing of it" and "all of it" for the operations without an END. lock.mdb is left out because LMDB makes
 * it anew when the first process opens the environment, so what a power cut leaves of it never counts. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <unistd.h>

#define HEADER_BYTES 32
#define RECORD_BYTES 40
#define DESCRIPTORS_MAX 65536

enum kind { END = 0, OPEN = 1, WRITE = 2, TRUNCATE = 3, FSYNC = 4, RENAME = 5, UNLINK = 6, MKDIR = 7, ALLOCATE = 8 };

enum blind {
    TRACE_FULL = 1,
    OTHER_PROCESS = 2,
    SHARED_MAPPING = 4,
    UNKNOWN_CALL = 8,
    RELATIVE_PATH = 16,
    DESCRIPTOR_TOO_HIGH = 32,
};

struct record {
    uint32_t size;
    uint16_t kind;
    uint16_t durable;
    uint64_t operation;
    uint64_t file;
    uint64_t offset;
    uint64_t length;
};

struct header {
    char magic[8];
    _Atomic uint64_t end;
    _Atomic uint64_t process;
    _Atomic uint64_t blind;
};

struct descriptor {
    uint64_t file; /* 0: not below the folder */
    int durable, folder;
    char *path;
};

static struct header *trace;
static uint64_t trace_bytes;
static char folder[PATH_MAX];
static size_t folder_length;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t operations, files;
static struct descriptor descriptors[DESCRIPTORS_MAX];


static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

/* The next definition of a function, looked up once per place: dlsym may allocate, and these calls are everywhere. */
#define REAL(name)                                                                                                     \
    (__extension__({                                                                                                   \
        static __typeof__(&name) found;                                                                                \
        if (!found) found = (__typeof__(&name))real(#name);                                                            \
        found;                                                                                                         \
    }))

__attribute__((constructor)) static void set_up(void) {
    const char *path = getenv("CRASH_TRACE_FILE"), *root = getenv("CRASH_TRACE_FOLDER");
    struct stat found;
    if (!path || !root || strlen(root) >= sizeof folder) return;
    int at = REAL(open)(path, O_RDWR | O_CLOEXEC);
    if (at < 0 || fstat(at, &found) || found.st_size < HEADER_BYTES) abort();
    void *map = mmap(NULL, (size_t)found.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, at, 0);
    if (map == MAP_FAILED) abort();
    REAL(close)(at);
    trace_bytes = (uint64_t)found.st_size;
    strcpy(folder, root);
    folder_length = strlen(folder);
    trace = map;
}

static void blind(enum blind why) {
    if (trace) atomic_fetch_or(&trace->blind, (uint64_t)why);
}

/* Whether the path is recorded. A relative one could be anywhere, so nobody may use one for what counts. */
static int is_ours(const char *path) {
    if (!trace || !path) return 0;
    if (strncmp(path, folder, folder_length) || (path[folder_length] != '/' && path[folder_length] != 0)) return 0;
    const char *name = strrchr(path, '/');
    return !name || strcmp(name, "/lock.mdb");
}

static struct descriptor *known(int fd) {
    if (!trace || fd < 0 || fd >= DESCRIPTORS_MAX || !descriptors[fd].file) return NULL;
    return &descriptors[fd];
}

/* Append a record; 0 in `operation` begins a new one. Returns the operation. errno is left as it was. */
static uint64_t note(enum kind kind, uint64_t operation, uint64_t file, uint64_t offset, int durable,
                     const struct iovec *pieces, int count) {
    int saved = errno;
    uint64_t length = 0, nobody = 0, self = (uint64_t)getpid();
    for (int i = 0; i < count; i++) length += pieces[i].iov_len;
    uint64_t size = (RECORD_BYTES + length + 7) & ~(uint64_t)7;
    if (!atomic_compare_exchange_strong(&trace->process, &nobody, self) && nobody != self) {
        blind(OTHER_PROCESS);
        errno = saved;
        return operation;
    }
    pthread_mutex_lock(&lock);
    if (!operation) operation = ++operations;
    uint64_t end = atomic_load(&trace->end);
    if (end + size > trace_bytes || size > UINT32_MAX) {
        blind(TRACE_FULL);
    } else {
        char *at = (char *)trace + end;
        struct record made = {(uint32_t)size, (uint16_t)kind, (uint16_t)durable, operation, file, offset, length};
        memcpy(at, &made, RECORD_BYTES);
        at += RECORD_BYTES;
        for (int i = 0; i < count; i++) {
            memcpy(at, pieces[i].iov_base, pieces[i].iov_len);
            at += pieces[i].iov_len;
        }
        atomic_store(&trace->end, end + size);
    }
    pthread_mutex_unlock(&lock);
    errno = saved;
    return operation;
}

static uint64_t note_path(enum kind kind, const char *path, uint64_t flags) {
    struct iovec piece = {(void *)path, strlen(path)};
    return note(kind, 0, 0, flags, 0, &piece, 1);
}

static void note_end(uint64_t operation, uint64_t file, int64_t result) {
    note(END, operation, file, (uint64_t)result, 0, NULL, 0);
}

/* ---- opening and closing ------------------------------------------------------------------------------------- */

typedef int (*opener)(const char *, int, ...);

static int do_open(opener call, const char *path, int flags, mode_t mode) {
    if (!is_ours(path)) return call(path, flags, mode);
    int directory = (flags & O_DIRECTORY) != 0, writes = (flags & O_ACCMODE) != O_RDONLY;
    if (!directory && !writes && !(flags & O_CREAT)) return call(path, flags, mode);
    if (flags & (O_APPEND | O_TRUNC)) blind(UNKNOWN_CALL);
    if ((flags & O_TMPFILE) == O_TMPFILE) blind(UNKNOWN_CALL);
    uint64_t operation = note_path(OPEN, path, (uint64_t)flags);
    int fd = call(path, flags, mode), saved = errno;
    uint64_t file = 0;
    if (fd >= DESCRIPTORS_MAX) {
        blind(DESCRIPTOR_TOO_HIGH);
    } else if (fd >= 0) {
        pthread_mutex_lock(&lock);
        file = ++files;
        pthread_mutex_unlock(&lock);
        free(descriptors[fd].path);
        descriptors[fd] = (struct descriptor){file, (flags & O_DSYNC) != 0, directory, strdup(path)};
    }
    note_end(operation, file, fd < 0 ? -1 : 0);
    errno = saved;
    return fd;
}

static mode_t mode_of(int flags, va_list rest) {
    return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? (mode_t)va_arg(rest, int) : 0;
}

#define DEFINE_OPEN(name)                                                                                              \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = mode_of(flags, rest);                                                                            \
        va_end(rest);                                                                                                  \
        return do_open((opener)REAL(name), path, flags, mode);                                                        \
    }
DEFINE_OPEN(open)
DEFINE_OPEN(open64)

typedef int (*opener_at)(int, const char *, int, ...);

static int do_openat(opener_at call, int at, const char *path, int flags, mode_t mode) {
    if (trace && path && path[0] != '/' && known(at)) blind(RELATIVE_PATH);
    if (is_ours(path)) return do_open((opener)REAL(open64), path, flags, mode);
    return call(at, path, flags, mode);
}

#define DEFINE_OPENAT(name)                                                                                            \
    int name(int at, const char *path, int flags, ...) {                                                               \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = mode_of(flags, rest);                                                                            \
        va_end(rest);                                                                                                  \
        return do_openat((opener_at)REAL(name), at, path, flags, mode);                                               \
    }
DEFINE_OPENAT(openat)
DEFINE_OPENAT(openat64)

int creat(const char *path, mode_t mode) {
    if (is_ours(path)) blind(UNKNOWN_CALL);
    return REAL(creat)(path, mode);
}

int close(int fd) {
    struct descriptor *found = known(fd);
    /* Forgotten first: another thread may get the number while this call returns. */
    if (found) found->file = 0;
    return REAL(close)(fd);
}

/* ---- writing ------------------------------------------------------------------------------------------------- */

static uint64_t note_write(const struct descriptor *at, off_t offset, const struct iovec *pieces, int count) {
    return note(WRITE, 0, at->file, (uint64_t)offset, at->durable, pieces, count);
}

ssize_t write(int fd, const void *data, size_t count) {
    struct descriptor *at = known(fd);
    if (!at) return REAL(write)(fd, data, count);
    struct iovec piece = {(void *)data, count};
    uint64_t operation = note_write(at, lseek(fd, 0, SEEK_CUR), &piece, 1);
    ssize_t done = REAL(write)(fd, data, count);
    note_end(operation, 0, done);
    return done;
}

ssize_t writev(int fd, const struct iovec *pieces, int count) {
    struct descriptor *at = known(fd);
    if (!at) return REAL(writev)(fd, pieces, count);
    uint64_t operation = note_write(at, lseek(fd, 0, SEEK_CUR), pieces, count);
    ssize_t done = REAL(writev)(fd, pieces, count);
    note_end(operation, 0, done);
    return done;
}

#define DEFINE_PWRITE(name, type)                                                                                      \
    ssize_t name(int fd, const void *data, size_t count, type offset) {                                                \
        struct descriptor *at = known(fd);                                                                             \
        if (!at) return REAL(name)(fd, data, count, offset);                                                           \
        struct iovec piece = {(void *)data, count};                                                                    \
        uint64_t operation = note_write(at, offset, &piece, 1);                                                        \
        ssize_t done = REAL(name)(fd, data, count, offset);                                                            \
        note_end(operation, 0, done);                                                                                  \
        return done;                                                                                                   \
    }
DEFINE_PWRITE(pwrite, off_t)
DEFINE_PWRITE(pwrite64, off64_t)

#define DEFINE_PWRITEV(name, type)                                                                                     \
    ssize_t name(int fd, const struct iovec *pieces, int count, type offset) {                                         \
        struct descriptor *at = known(fd);                                                                             \
        if (!at) return REAL(name)(fd, pieces, count, offset);                                                         \
        uint64_t operation = note_write(at, offset, pieces, count);                                                    \
        ssize_t done = REAL(name)(fd, pieces, count, offset);                                                          \
        note_end(operation, 0, done);                                                                                  \
        return done;                                                                                                   \
    }
DEFINE_PWRITEV(pwritev, off_t)
DEFINE_PWRITEV(pwritev64, off64_t)

#define DEFINE_TRUNCATE(name, type)                                                                                    \
    int name(int fd, type size) {                                                                                      \
        struct descriptor *at = known(fd);                                                                             \
        if (!at) return REAL(name)(fd, size);                                                                          \
        uint64_t operation = note(TRUNCATE, 0, at->file, (uint64_t)size, 0, NULL, 0);                                  \
        int done = REAL(name)(fd, size);                                                                               \
        note_end(operation, 0, done);                                                                                  \
        return done;                                                                                                   \
    }
DEFINE_TRUNCATE(ftruncate, off_t)
DEFINE_TRUNCATE(ftruncate64, off64_t)

/* It answers with an error's number, not with -1. Where the filesystem can't do it, the C library writes zeros. */
#define DEFINE_ALLOCATE(name, type)                                                                                    \
    int name(int fd, type offset, type length) {                                                                       \
        struct descriptor *at = known(fd);                                                                             \
        if (!at) return REAL(name)(fd, offset, length);                                                                \
        uint64_t operation = note(ALLOCATE, 0, at->file, (uint64_t)(offset + length), 0, NULL, 0);                     \
        int failed = REAL(name)(fd, offset, length);                                                                   \
        note_end(operation, 0, -failed);                                                                               \
        return failed;                                                                                                 \
    }
DEFINE_ALLOCATE(posix_fallocate, off_t)
DEFINE_ALLOCATE(posix_fallocate64, off64_t)

/* ---- fsync --------------------------------------------------------------------------------------------------- */

#define DEFINE_FSYNC(name)                                                                                             \
    int name(int fd) {                                                                                                 \
        struct descriptor *at = known(fd);                                                                             \
        if (!at) return REAL(name)(fd);                                                                                \
        struct iovec piece = {at->path, at->folder ? strlen(at->path) : 0};                                            \
        uint64_t operation = note(FSYNC, 0, at->file, 0, 0, &piece, 1);                                                \
        int done = REAL(name)(fd);                                                                                     \
        note_end(operation, 0, done);                                                                                  \
        return done;                                                                                                   \
    }
DEFINE_FSYNC(fsync)
DEFINE_FSYNC(fdatasync)

/* ---- names --------------------------------------------------------------------------------------------------- */

int rename(const char *before, const char *after) {
    if (!is_ours(before) && !is_ours(after)) return REAL(rename)(before, after);
    struct iovec pieces[2] = {{(void *)before, strlen(before) + 1}, {(void *)after, strlen(after)}};
    uint64_t operation = note(RENAME, 0, 0, 0, 0, pieces, 2);
    int done = REAL(rename)(before, after);
    note_end(operation, 0, done);
    return done;
}

int unlink(const char *path) {
    if (!is_ours(path)) return REAL(unlink)(path);
    uint64_t operation = note_path(UNLINK, path, 0);
    int done = REAL(unlink)(path);
    note_end(operation, 0, done);
    return done;
}

int rmdir(const char *path) {
    if (!is_ours(path)) return REAL(rmdir)(path);
    uint64_t operation = note_path(UNLINK, path, 0);
    int done = REAL(rmdir)(path);
    note_end(operation, 0, done);
    return done;
}

int mkdir(const char *path, mode_t mode) {
    if (!is_ours(path)) return REAL(mkdir)(path, mode);
    uint64_t operation = note_path(MKDIR, path, 0);
    int done = REAL(mkdir)(path, mode);
    note_end(operation, 0, done);
    return done;
}

/* ---- what would go past the recorder --------------------------------------------------------------------------- */

#define BLIND_FD(type, name, parameters, arguments, fd)                                                                \
    type name parameters {                                                                                             \
        if (known(fd)) blind(UNKNOWN_CALL);                                                                            \
        return REAL(name) arguments;                                                                                   \
    }
#define BLIND_PATH(type, name, parameters, arguments, path)                                                            \
    type name parameters {                                                                                             \
        if (is_ours(path)) blind(UNKNOWN_CALL);                                                                        \
        return REAL(name) arguments;                                                                                   \
    }
#define BLIND_AT(type, name, parameters, arguments, at, path)                                                          \
    type name parameters {                                                                                             \
        if (is_ours(path) || known(at)) blind(UNKNOWN_CALL);                                                           \
        return REAL(name) arguments;                                                                                   \
    }
BLIND_FD(int, dup, (int fd), (fd), fd)
BLIND_FD(int, dup2, (int fd, int to), (fd, to), fd)
BLIND_FD(int, dup3, (int fd, int to, int flags), (fd, to, flags), fd)
BLIND_FD(ssize_t, pwritev2, (int fd, const struct iovec *p, int n, off_t o, int f), (fd, p, n, o, f), fd)
BLIND_FD(ssize_t, pwritev64v2, (int fd, const struct iovec *p, int n, off64_t o, int f), (fd, p, n, o, f), fd)
BLIND_FD(int, fallocate, (int fd, int m, off_t o, off_t n), (fd, m, o, n), fd)
BLIND_FD(int, fallocate64, (int fd, int m, off64_t o, off64_t n), (fd, m, o, n), fd)
BLIND_FD(ssize_t, sendfile, (int fd, int from, off_t *o, size_t n), (fd, from, o, n), fd)
BLIND_FD(ssize_t, sendfile64, (int fd, int from, off64_t *o, size_t n), (fd, from, o, n), fd)
BLIND_FD(ssize_t, copy_file_range, (int from, off64_t *a, int fd, off64_t *b, size_t n, unsigned f),
         (from, a, fd, b, n, f), fd)
BLIND_FD(ssize_t, splice, (int from, off64_t *a, int fd, off64_t *b, size_t n, unsigned f), (from, a, fd, b, n, f), fd)
BLIND_PATH(int, truncate, (const char *path, off_t n), (path, n), path)
BLIND_PATH(int, truncate64, (const char *path, off64_t n), (path, n), path)
BLIND_PATH(int, remove, (const char *path), (path), path)
BLIND_PATH(int, link, (const char *from, const char *path), (from, path), path)
BLIND_PATH(int, symlink, (const char *from, const char *path), (from, path), path)
BLIND_AT(int, mkdirat, (int at, const char *path, mode_t m), (at, path, m), at, path)
BLIND_AT(int, unlinkat, (int at, const char *path, int f), (at, path, f), at, path)
BLIND_AT(int, linkat, (int a, const char *from, int at, const char *path, int f), (a, from, at, path, f), at, path)
BLIND_AT(int, symlinkat, (const char *from, int at, const char *path), (from, at, path), at, path)
BLIND_AT(int, renameat, (int a, const char *from, int at, const char *path), (a, from, at, path), at, path)
BLIND_AT(int, renameat2, (int a, const char *from, int at, const char *path, unsigned f), (a, from, at, path, f), at,
         path)

/* A shared mapping that can be written to changes the file without a call; an msync of one has nothing to say here. */
#define DEFINE_MMAP(name, type)                                                                                        \
    void *name(void *at, size_t length, int protection, int flags, int fd, type offset) {                              \
        if (known(fd) && (flags & (MAP_SHARED | MAP_SHARED_VALIDATE)) && (protection & PROT_WRITE))                    \
            blind(SHARED_MAPPING);                                                                                     \
        return REAL(name)(at, length, protection, flags, fd, offset);                                                  \
    }
DEFINE_MMAP(mmap, off_t)
DEFINE_MMAP(mmap64, off64_t)
