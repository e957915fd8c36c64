/* System calls that write, of which one fails: loaded before a process (LD_PRELOAD).
 *
 * Counted are calls on files under a folder. After fault_arm(folder, number, error, lasting) the call of
 * that number fails with `error`, and all behind it if `lasting`; error -1: a write that writes the half.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long wanted = 0, counted = 0;
static int error_number = 0, lasts = 0;

void fault_arm(const char *place, long number, int error, int lasting) {
    snprintf(folder, sizeof folder, "%s", place);
    wanted = number;
    counted = 0;
    error_number = error;
    lasts = lasting;
}

long fault_count(void) { return counted; }

static int inside(const char *path) {
    return folder[0] && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int is_file_inside(int fd) {
    char link[64], place[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, place, sizeof place - 1);
    if (length <= 0) return 0;
    place[length] = 0;
    return inside(place);
}

static int inside_at(int fd, const char *path) {
    if (!path) return 0;
    return path[0] == '/' || fd == AT_FDCWD ? inside(path) : is_file_inside(fd);
}

/* Whether this call fails; a call that cannot be short does not when one is to be. */
static int fails(int can_be_short) {
    counted++;
    if (!wanted || counted < wanted || (counted > wanted && !lasts)) return 0;
    if (error_number == -1) return can_be_short;
    errno = error_number;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    if (is_file_inside(fd) && fails(size > 1)) {
        if (error_number != -1) return -1;
        size /= 2;
    }
    return REAL(write)(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    if (is_file_inside(fd) && fails(size > 1)) {
        if (error_number != -1) return -1;
        size /= 2;
    }
    return REAL(pwrite64)(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (is_file_inside(fd) && fails(count > 1)) {
        if (error_number != -1) return -1;
        count /= 2;
    }
    return REAL(writev)(fd, parts, count);
}

#define ON_FILE(name, parameters, given) \
    int name parameters { \
        if (is_file_inside(fd) && fails(0)) return -1; \
        return REAL(name) given; \
    }

ON_FILE(fsync, (int fd), (fd))
ON_FILE(fdatasync, (int fd), (fd))
ON_FILE(ftruncate, (int fd, off_t size), (fd, size))
ON_FILE(ftruncate64, (int fd, off64_t size), (fd, size))

#define ON_PATH(name, parameters, path, given) \
    int name parameters { \
        if (inside(path) && fails(0)) return -1; \
        return REAL(name) given; \
    }

ON_PATH(rename, (const char *from, const char *to), to, (from, to))
ON_PATH(link, (const char *from, const char *to), to, (from, to))
ON_PATH(mkdir, (const char *path, mode_t mode), path, (path, mode))
ON_PATH(chmod, (const char *path, mode_t mode), path, (path, mode))

#define ON_PATH_AT(name, parameters, fd, path, given) \
    int name parameters { \
        if (inside_at(fd, path) && fails(0)) return -1; \
        return REAL(name) given; \
    }

ON_PATH_AT(renameat, (int a, const char *from, int b, const char *to), b, to, (a, from, b, to))
ON_PATH_AT(renameat2, (int a, const char *from, int b, const char *to, unsigned flags), b, to,
           (a, from, b, to, flags))
ON_PATH_AT(linkat, (int a, const char *from, int b, const char *to, int flags), b, to,
           (a, from, b, to, flags))
ON_PATH_AT(mkdirat, (int fd, const char *path, mode_t mode), fd, path, (fd, path, mode))

#define MODE_OF(flags, mode) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list more; \
        va_start(more, flags); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        MODE_OF(flags, mode) \
        if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && inside(path) && fails(0)) return -1; \
        return REAL(name)(path, flags, mode); \
    }

OPENS(open)
OPENS(open64)

#define OPENS_AT(name) \
    int name(int fd, const char *path, int flags, ...) { \
        MODE_OF(flags, mode) \
        if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && inside_at(fd, path) && fails(0)) return -1; \
        return REAL(name)(fd, path, flags, mode); \
    }

OPENS_AT(openat)
OPENS_AT(openat64)
