#include "base.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <time.h>

static const char *const NAMES[] = { "", "invalid", "not_found", "exists", "state", "limit", "unsupported", "failed" };

const char *err_name(enum err_kind kind)
{
  return NAMES[kind];
}

int err_set(struct err *err, enum err_kind kind, const char *format, ...)
{
  va_list args;
  err->kind = kind;
  va_start(args, format);
  vsnprintf(err->text, sizeof err->text, format, args);
  va_end(args);
  return -1;
}

int err_errno(struct err *err, int number, const char *format, ...)
{
  va_list args;
  bool full = number == ENOMEM || number == ENOSPC || number == EDQUOT || number == EAGAIN;
  err->kind = full ? ERR_LIMIT : ERR_FAILED;
  va_start(args, format);
  int used = vsnprintf(err->text, sizeof err->text, format, args);
  va_end(args);
  if (used >= 0 && (size_t)used < sizeof err->text)
    snprintf(err->text + used, sizeof err->text - (size_t)used, ": %s", strerror(number));
  return -1;
}

void say(const char *format, ...)
{
  char line[500];
  va_list args;
  va_start(args, format);
  int size = vsnprintf(line, sizeof line - 1, format, args);
  va_end(args);
  if (size < 0)
    return;
  if ((size_t)size > sizeof line - 2)
    size = sizeof line - 2;
  line[size] = '\n';
  if (write(STDERR_FILENO, "agent: ", 7) < 0 || write(STDERR_FILENO, line, (size_t)size + 1) < 0)
    return;
}

static void *insist(void *pointer)
{
  if (!pointer) {
    say("out of memory");
    abort();
  }
  return pointer;
}

void *must_alloc(size_t size)
{
  return insist(calloc(1, size ? size : 1));
}

void *must_realloc(void *pointer, size_t size)
{
  return insist(realloc(pointer, size ? size : 1));
}

char *must_strdup(const char *text)
{
  return insist(strdup(text));
}

void buffer_add(struct buffer *buffer, const void *data, size_t size)
{
  if (buffer->size + size > buffer->room) {
    buffer->room = (buffer->size + size) * 2 + 64;
    buffer->data = must_realloc(buffer->data, buffer->room);
  }
  if (size)
    memcpy(buffer->data + buffer->size, data, size);
  buffer->size += size;
}

void buffer_format(struct buffer *buffer, const char *format, ...)
{
  char text[256];
  va_list args, again;
  va_start(args, format);
  va_copy(again, args);
  int size = vsnprintf(text, sizeof text, format, args);
  if (size >= 0 && (size_t)size < sizeof text) {
    buffer_add(buffer, text, (size_t)size);
  } else if (size >= 0) {
    cleanup_free char *large = must_alloc((size_t)size + 1);
    vsnprintf(large, (size_t)size + 1, format, again);
    buffer_add(buffer, large, (size_t)size);
  }
  va_end(again);
  va_end(args);
}

void buffer_free(struct buffer *buffer)
{
  free(buffer->data);
  *buffer = (struct buffer){ 0 };
}

static uint64_t clock_ns(clockid_t clock)
{
  struct timespec now;
  clock_gettime(clock, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t now_ns(void)
{
  return clock_ns(CLOCK_REALTIME);
}

uint64_t uptime_ns(void)
{
  return clock_ns(CLOCK_MONOTONIC);
}

int write_file(int folder, const char *path, const char *text, struct err *err)
{
  cleanup_fd int fd = openat(folder, path, O_WRONLY | O_CLOEXEC);
  if (fd < 0)
    return err_errno(err, errno, "cannot open %s", path);
  size_t size = strlen(text);
  if (write(fd, text, size) != (ssize_t)size)
    return err_errno(err, errno, "cannot write %.40s to %s", text, path);
  return 0;
}

char *read_file(int folder, const char *path, size_t most, size_t *size)
{
  cleanup_fd int fd = openat(folder, path, O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    return NULL;
  struct buffer buffer = { 0 };
  char part[4096];
  ssize_t got;
  while (buffer.size < most && (got = read(fd, part, sizeof part)) != 0) {
    if (got < 0 && errno == EINTR)
      continue;
    if (got < 0) {
      buffer_free(&buffer);
      return NULL;
    }
    buffer_add(&buffer, part, (size_t)got);
  }
  if (size)
    *size = buffer.size;
  buffer_add(&buffer, "", 1);
  return buffer.data;
}
