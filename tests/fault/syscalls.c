/* Calls of a process that fail to order: LD_PRELOAD this, with SYSCALLS_CONTROL naming the control file.

   Control file, all fields int64, little-endian; written by the test, read live here (tests/fault/syscalls.py):

     slot  0        1 where this library has mapped it
     slot  1        disk: bytes that may be allocated under the prefix; 0 for no limit
     slot  2        disk: bytes allocated since the file was made; kept here
     slot  3        clock: nanoseconds added to CLOCK_REALTIME
     slot  4        clock: nanoseconds since 1970 at which it stands still; 0 for a clock that runs
     slot  8 + 8k   rule k, one for each kind of call:
         +0   armed: the call to fail, counted from 1 as in `seen`; 0 for none
         +1   errno
         +2   1: every call from there on fails, 0: that one only
         +3   seen: calls of the kind so far
         +4   failed: calls that were failed so far
         +5   least size in bytes (allocations only)
     byte 512       prefix of the paths that rules and disk are about, NUL-terminated
     byte 2048      whose allocations count, NUL-terminated: part of an object file's name; or @symbol for the one that
                    defines it, which is the executable itself where an interpreter has no shared library
     byte 3072      the call that failed last and its path, NUL-terminated

   Kinds: 0 write (whatever changes a file or a name), 1 fsync, 2 read, 3 allocation.

   A write counts against the disk by what it adds behind the file's allocated bytes; what reaches the limit is written
   in part, as by a kernel, and what is beyond fails with ENOSPC. Unlinking and cutting give space back; making a file
   longer without writing takes none. Reads through a map pass unseen. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { WRITE, FSYNC, READ, ALLOCATION };
enum { ARMED, ERRNO, FOR_GOOD, SEEN, FAILED, SIZE_MIN };
enum { MAPPED, DISK_LIMIT, DISK_USED, CLOCK_OFFSET, CLOCK_FROZEN };

static volatile int64_t *control;
static const char *prefix, *object;
static char *told;

__attribute__((constructor)) static void map_control(void)
{
    const char *path = getenv("SYSCALLS_CONTROL");
    if (!path)
        return;
    int file = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (file < 0)
        return;
    void *at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    syscall(SYS_close, file);
    if (at == MAP_FAILED)
        return;
    prefix = (const char *)at + 512;
    object = (const char *)at + 2048;
    told = (char *)at + 3072;
    __atomic_store_n((int64_t *)at, 1, __ATOMIC_SEQ_CST);
    control = at;
}

static int64_t get(int slot)
{
    return __atomic_load_n(&control[slot], __ATOMIC_SEQ_CST);
}

/* The errno that this call of a kind fails with, or 0. */
static int due(int kind, const char *name, const char *path)
{
    int rule = 8 + 8 * kind;
    int64_t number = __atomic_add_fetch(&control[rule + SEEN], 1, __ATOMIC_SEQ_CST);
    int64_t armed = get(rule + ARMED);
    if (!armed || number < armed || (number > armed && !get(rule + FOR_GOOD)))
        return 0;
    __atomic_add_fetch(&control[rule + FAILED], 1, __ATOMIC_SEQ_CST);
    size_t at = 0;
    for (const char *c = name; *c && at < 60; c++)
        told[at++] = *c;
    told[at++] = ' ';
    for (const char *c = path; *c && at < 900; c++)
        told[at++] = *c;
    told[at] = 0;
    return (int)get(rule + ERRNO);
}

static int is_ours(const char *path)
{
    return prefix && prefix[0] && path && !strncmp(path, prefix, strlen(prefix));
}

/* Whether an open file is under the prefix; its path as the kernel has it. */
static int find(int file, char *path)
{
    char link[32];
    if (!control || !prefix[0])
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (size < 0)
        return 0;
    path[size] = 0;
    return is_ours(path);
}

static void give_back(int64_t bytes)
{
    __atomic_sub_fetch(&control[DISK_USED], bytes, __ATOMIC_SEQ_CST);
}

/* The bytes of a file that have space on the disk, as if all holes were at its end. */
static int64_t allocated(const struct stat *found)
{
    int64_t blocks = (int64_t)found->st_blocks * 512;
    return blocks < found->st_size ? blocks : found->st_size;
}

/* How much of a write of `size` bytes up to `end` the disk takes: all of it, a part, or -1 for nothing. */
static int64_t room(int file, int64_t end, int64_t size)
{
    struct stat found;
    if (fstat(file, &found) || !S_ISREG(found.st_mode) || end <= allocated(&found))
        return size;
    int64_t growth = end - allocated(&found), limit = get(DISK_LIMIT);
    int64_t used = __atomic_add_fetch(&control[DISK_USED], growth, __ATOMIC_SEQ_CST);
    if (!limit || used <= limit)
        return size;
    int64_t over = used - limit;
    if (over > growth)
        over = growth;
    give_back(over);
    return over < size ? size - over : -1;
}

static int64_t end_of(int file, int64_t size)
{
    struct stat found;
    off_t at = lseek(file, 0, SEEK_CUR);
    int flags = fcntl(file, F_GETFL);
    if (flags >= 0 && flags & O_APPEND && !fstat(file, &found))
        at = found.st_size;
    return at < 0 ? size : at + size;
}

#define FAIL(kind, name, path) \
    do { \
        int code = due(kind, name, path); \
        if (code) { \
            errno = code; \
            return -1; \
        } \
    } while (0)

/* Writing */

ssize_t write(int file, const void *bytes, size_t size)
{
    char path[PATH_MAX];
    if (find(file, path)) {
        FAIL(WRITE, "write", path);
        int64_t taken = room(file, end_of(file, (int64_t)size), (int64_t)size);
        if (taken < 0) {
            errno = ENOSPC;
            return -1;
        }
        size = (size_t)taken;
    }
    return syscall(SYS_write, file, bytes, size);
}

ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t offset)
{
    char path[PATH_MAX];
    if (find(file, path)) {
        FAIL(WRITE, "pwrite", path);
        int64_t taken = room(file, offset + (int64_t)size, (int64_t)size);
        if (taken < 0) {
            errno = ENOSPC;
            return -1;
        }
        size = (size_t)taken;
    }
    return syscall(SYS_pwrite64, file, bytes, size, offset);
}

ssize_t pwrite(int file, const void *bytes, size_t size, off_t offset)
{
    return pwrite64(file, bytes, size, offset);
}

static ssize_t some(int file, const struct iovec *parts, int count, int64_t size, int64_t offset)
{
    ssize_t done = 0;
    for (int index = 0; index < count && size > 0; index++) {
        size_t length = parts[index].iov_len < (size_t)size ? parts[index].iov_len : (size_t)size;
        ssize_t wrote = offset < 0 ? syscall(SYS_write, file, parts[index].iov_base, length)
                                   : syscall(SYS_pwrite64, file, parts[index].iov_base, length, offset + done);
        if (wrote < 0)
            return done ? done : -1;
        done += wrote;
        size -= wrote;
        if ((size_t)wrote < length)
            break;
    }
    return done;
}

static int64_t total(const struct iovec *parts, int count)
{
    int64_t size = 0;
    for (int index = 0; index < count; index++)
        size += (int64_t)parts[index].iov_len;
    return size;
}

ssize_t writev(int file, const struct iovec *parts, int count)
{
    char path[PATH_MAX];
    if (find(file, path)) {
        FAIL(WRITE, "writev", path);
        int64_t size = total(parts, count), taken = room(file, end_of(file, size), size);
        if (taken < 0) {
            errno = ENOSPC;
            return -1;
        }
        if (taken < size)
            return some(file, parts, count, taken, -1);
    }
    return syscall(SYS_writev, file, parts, count);
}

ssize_t pwritev64(int file, const struct iovec *parts, int count, off64_t offset)
{
    char path[PATH_MAX];
    if (find(file, path)) {
        FAIL(WRITE, "pwritev", path);
        int64_t size = total(parts, count), taken = room(file, offset + size, size);
        if (taken < 0) {
            errno = ENOSPC;
            return -1;
        }
        if (taken < size)
            return some(file, parts, count, taken, offset);
    }
    return syscall(SYS_pwritev, file, parts, count, (unsigned long)offset, 0UL);
}

ssize_t pwritev(int file, const struct iovec *parts, int count, off_t offset)
{
    return pwritev64(file, parts, count, offset);
}

int posix_fallocate64(int file, off64_t offset, off64_t size)
{
    char path[PATH_MAX];
    if (find(file, path)) {
        int code = due(WRITE, "fallocate", path);
        if (code)
            return code;
        int64_t taken = room(file, offset + size, size);
        if (taken < size) {
            struct stat found;
            if (taken > 0 && !fstat(file, &found) && offset + taken > allocated(&found))
                give_back(offset + taken - allocated(&found)); /* all or nothing */
            return ENOSPC;
        }
    }
    return syscall(SYS_fallocate, file, 0, offset, size) ? errno : 0;
}

int posix_fallocate(int file, off_t offset, off_t size)
{
    return posix_fallocate64(file, offset, size);
}

int ftruncate64(int file, off64_t size)
{
    char path[PATH_MAX];
    struct stat found;
    if (find(file, path) && !fstat(file, &found)) {
        FAIL(WRITE, "ftruncate", path);
        if (syscall(SYS_ftruncate, file, size))
            return -1;
        if (size < allocated(&found))
            give_back(allocated(&found) - size);
        return 0;
    }
    return (int)syscall(SYS_ftruncate, file, size);
}

int ftruncate(int file, off_t size)
{
    return ftruncate64(file, size);
}

/* Names */

int rename(const char *from, const char *to)
{
    struct stat replaced;
    int64_t freed = 0;
    if (control && is_ours(to)) {
        FAIL(WRITE, "rename", to);
        if (!stat(to, &replaced) && S_ISREG(replaced.st_mode))
            freed = allocated(&replaced);
    }
    if (syscall(SYS_rename, from, to))
        return -1;
    if (freed)
        give_back(freed);
    return 0;
}

int unlink(const char *path)
{
    struct stat found;
    int64_t freed = 0;
    if (control && is_ours(path)) {
        FAIL(WRITE, "unlink", path);
        if (!stat(path, &found) && S_ISREG(found.st_mode))
            freed = allocated(&found);
    }
    if (syscall(SYS_unlink, path))
        return -1;
    if (freed)
        give_back(freed);
    return 0;
}

int mkdir(const char *path, mode_t mode)
{
    if (control && is_ours(path))
        FAIL(WRITE, "mkdir", path);
    return (int)syscall(SYS_mkdir, path, mode);
}

static int opened(const char *path, int flags, mode_t mode)
{
    if (control && flags & O_CREAT && is_ours(path))
        FAIL(WRITE, "open", path);
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

#define MODE(flags, mode) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

int open(const char *path, int flags, ...)
{
    MODE(flags, mode)
    return opened(path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    MODE(flags, mode)
    return opened(path, flags, mode);
}

/* Fsync */

int fsync(int file)
{
    char path[PATH_MAX];
    if (find(file, path))
        FAIL(FSYNC, "fsync", path);
    return (int)syscall(SYS_fsync, file);
}

int fdatasync(int file)
{
    char path[PATH_MAX];
    if (find(file, path))
        FAIL(FSYNC, "fdatasync", path);
    return (int)syscall(SYS_fdatasync, file);
}

/* Reading */

ssize_t read(int file, void *bytes, size_t size)
{
    char path[PATH_MAX];
    if (control && get(8 + 8 * READ + ARMED) && find(file, path))
        FAIL(READ, "read", path);
    return syscall(SYS_read, file, bytes, size);
}

ssize_t pread64(int file, void *bytes, size_t size, off64_t offset)
{
    char path[PATH_MAX];
    if (control && get(8 + 8 * READ + ARMED) && find(file, path))
        FAIL(READ, "pread", path);
    return syscall(SYS_pread64, file, bytes, size, offset);
}

ssize_t pread(int file, void *bytes, size_t size, off_t offset)
{
    return pread64(file, bytes, size, offset);
}

/* Allocations, of callers in the named object file only. */

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);

/* Whether a caller's object file is the one that `object` names. A program's own name is argv[0], which proves nothing;
   where it was loaded does. */
static int is_starved(const Dl_info *from)
{
    Dl_info defines;
    if (object[0] != '@')
        return from->dli_fname && strstr(from->dli_fname, object);
    return dladdr(dlsym(RTLD_DEFAULT, object + 1), &defines) && defines.dli_fbase == from->dli_fbase;
}

static int starves(size_t size, void *caller)
{
    static __thread int inside;
    Dl_info from;
    int code = 0;
    if (!control || !object[0] || inside || size < (size_t)get(8 + 8 * ALLOCATION + SIZE_MIN))
        return 0;
    inside = 1;
    if (dladdr(caller, &from) && is_starved(&from))
        code = due(ALLOCATION, "malloc", from.dli_fname);
    inside = 0;
    if (code)
        errno = ENOMEM;
    return code;
}

void *malloc(size_t size)
{
    return starves(size, __builtin_return_address(0)) ? NULL : __libc_malloc(size);
}

void *calloc(size_t count, size_t size)
{
    return starves(count * size, __builtin_return_address(0)) ? NULL : __libc_calloc(count, size);
}

void *realloc(void *at, size_t size)
{
    return starves(size, __builtin_return_address(0)) ? NULL : __libc_realloc(at, size);
}

/* The wall clock. CLOCK_MONOTONIC and CLOCK_BOOTTIME run on, as they do when an operator sets a clock. */

static int shifts(clockid_t clock)
{
    return control && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    if (syscall(SYS_clock_gettime, clock, now))
        return -1;
    if (shifts(clock)) {
        int64_t frozen = get(CLOCK_FROZEN);
        int64_t ns = frozen ? frozen : now->tv_sec * 1000000000LL + now->tv_nsec;
        ns += get(CLOCK_OFFSET);
        now->tv_sec = ns / 1000000000LL;
        now->tv_nsec = ns % 1000000000LL;
    }
    return 0;
}

int gettimeofday(struct timeval *now, void *zone)
{
    struct timespec exact;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &exact))
        return -1;
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now)
{
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now)
        *now = exact.tv_sec;
    return exact.tv_sec;
}

/* A wait until a time of the wall clock is the kernel's, whose clock is not shifted: the time is shifted back. A clock
   that stands still never reaches any time, for the kernel's would have stood still as well; nothing waits that long
   here, so it is waited for by the running clock. */
static const struct timespec *kernel_time(const struct timespec *until, struct timespec *shifted)
{
    struct timespec real;
    int64_t frozen, ns;
    if (!control)
        return until;
    ns = until->tv_sec * 1000000000LL + until->tv_nsec - get(CLOCK_OFFSET);
    frozen = get(CLOCK_FROZEN);
    if (frozen) {
        syscall(SYS_clock_gettime, CLOCK_REALTIME, &real);
        ns += real.tv_sec * 1000000000LL + real.tv_nsec - frozen;
    }
    if (ns < 0)
        ns = 0;
    shifted->tv_sec = ns / 1000000000LL;
    shifted->tv_nsec = ns % 1000000000LL;
    return shifted;
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until)
{
    static int (*next)(sem_t *, const struct timespec *);
    struct timespec shifted;
    if (!next)
        next = (int (*)(sem_t *, const struct timespec *))dlsym(RTLD_NEXT, "sem_timedwait");
    return next(semaphore, kernel_time(until, &shifted));
}
