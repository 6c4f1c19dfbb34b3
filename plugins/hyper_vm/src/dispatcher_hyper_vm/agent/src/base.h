/* What every part of the agent stands on: errors, cleanup, buffers. */
#ifndef BASE_H
#define BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What the host should do about an error; the names on the wire are in err.c. */
enum err_kind { ERR_NONE, ERR_INVALID, ERR_NOT_FOUND, ERR_EXISTS, ERR_STATE, ERR_LIMIT, ERR_UNSUPPORTED, ERR_FAILED };

/* The last argument of what can fail, which then returns a negative number. `text` is a sentence's beginning. */
struct err {
  enum err_kind kind;
  char text[400];
};

/* Fill *err and return -1. err_errno adds the words for `number`, and chooses ERR_LIMIT where no room is left. */
int err_set(struct err *err, enum err_kind kind, const char *format, ...) __attribute__((format(printf, 3, 4)));
int err_errno(struct err *err, int number, const char *format, ...) __attribute__((format(printf, 3, 4)));
const char *err_name(enum err_kind kind);

#define cleanup(function) __attribute__((cleanup(function)))
#define unused __attribute__((unused))
#define cleanup_fd cleanup(close_fd)
#define cleanup_free cleanup(free_memory)

static inline void close_fd(int *fd)
{
  if (*fd >= 0)
    close(*fd);
}

static inline void free_memory(void *pointer)
{
  free(*(void **)pointer);
}

static inline int take_fd(int *fd)
{
  int taken = *fd;
  *fd = -1;
  return taken;
}

/* Memory for the agent itself is never refused by a limit of the pod. Where there is none at all, nothing can go on. */
void *must_alloc(size_t size);
void *must_realloc(void *pointer, size_t size);
char *must_strdup(const char *text);

/* Bytes that grow. */
struct buffer {
  char *data;
  size_t size, room;
};

void buffer_add(struct buffer *buffer, const void *data, size_t size);
void buffer_format(struct buffer *buffer, const char *format, ...) __attribute__((format(printf, 2, 3)));
void buffer_free(struct buffer *buffer);

/* Nanoseconds of CLOCK_REALTIME; of CLOCK_MONOTONIC. */
uint64_t now_ns(void);
uint64_t uptime_ns(void);

/* Whole small files. `folder` may be AT_FDCWD. read_file ends what it returns with a zero that is not counted. */
int write_file(int folder, const char *path, const char *text, struct err *err);
char *read_file(int folder, const char *path, size_t most, size_t *size);

/* One line on the console. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
