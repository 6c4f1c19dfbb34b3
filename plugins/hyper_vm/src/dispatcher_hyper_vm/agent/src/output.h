/* What a container has written, by position, until the host says that it is on record.
 *
 * A record is what one read(2) brought: its bytes, their source and the time. Positions count bytes of all sources.
 */
#ifndef OUTPUT_H
#define OUTPUT_H

#include "base.h"

#define OUTPUT_MOST (2 * 1024 * 1024) /* then the container has to wait; more than what the host trims at a time */
#define OUTPUT_RECORD (16 * 1024)

struct output {
  char *data;
  size_t head, tail, room;
  uint64_t origin;     /* the cursor of data[0] */
  uint64_t start, end; /* positions before the first and behind the last record */
  uint64_t trimmed;    /* position up to which the host wants none of it again */
};

struct output_record {
  uint32_t size;
  uint32_t source;
  uint64_t time_ns;
};

void output_add(struct output *output, int source, uint64_t time_ns, const char *data, size_t size);
bool output_is_full(const struct output *output);

/* The cursor of the record behind `position`. It stays valid until output_drop passes it. */
int output_find(const struct output *output, uint64_t position, uint64_t *cursor, struct err *err);
uint64_t output_end_cursor(const struct output *output);

/* The record at a cursor with its bytes, or NULL at the end. Moves the cursor behind it. */
const struct output_record *output_read(const struct output *output, uint64_t *cursor, const char **data);

/* Free records that are trimmed and lie before `cursor`. */
void output_drop(struct output *output, uint64_t cursor);
void output_free(struct output *output);

#endif
