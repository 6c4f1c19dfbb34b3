#include "output.h"

static size_t padded(size_t size)
{
  return (sizeof(struct output_record) + size + 7) & ~(size_t)7;
}

void output_add(struct output *output, int source, uint64_t time_ns, const char *data, size_t size)
{
  size_t need = padded(size);
  if (output->tail + need > output->room) {
    size_t used = output->tail - output->head;
    if (output->head) {
      memmove(output->data, output->data + output->head, used);
      output->origin += output->head;
      output->head = 0;
      output->tail = used;
    }
    if (used + need > output->room / 4 * 3) {
      output->room = (used + need) * 2;
      output->data = must_realloc(output->data, output->room);
    }
  }
  struct output_record record = { .size = (uint32_t)size, .source = (uint32_t)source, .time_ns = time_ns };
  memcpy(output->data + output->tail, &record, sizeof record);
  memcpy(output->data + output->tail + sizeof record, data, size);
  output->tail += need;
  output->end += size;
}

bool output_is_full(const struct output *output)
{
  return output->tail - output->head >= OUTPUT_MOST;
}

static const struct output_record *record_at(const struct output *output, size_t at)
{
  return (const struct output_record *)(output->data + at);
}

int output_find(const struct output *output, uint64_t position, uint64_t *cursor, struct err *err)
{
  uint64_t here = output->start;
  size_t at = output->head;
  if (position < here)
    return err_set(err, ERR_INVALID, "output before position %llu is freed already", (unsigned long long)here);
  while (at < output->tail && here < position) {
    here += record_at(output, at)->size;
    at += padded(record_at(output, at)->size);
  }
  if (here != position)
    return err_set(err, ERR_INVALID, "no output begins at position %llu", (unsigned long long)position);
  *cursor = output->origin + at;
  return 0;
}

uint64_t output_end_cursor(const struct output *output)
{
  return output->origin + output->tail;
}

const struct output_record *output_read(const struct output *output, uint64_t *cursor, const char **data)
{
  size_t at = (size_t)(*cursor - output->origin);
  if (at >= output->tail)
    return NULL;
  const struct output_record *record = record_at(output, at);
  *data = (const char *)(record + 1);
  *cursor += padded(record->size);
  return record;
}

void output_drop(struct output *output, uint64_t cursor)
{
  while (output->head < output->tail) {
    const struct output_record *record = record_at(output, output->head);
    if (output->start + record->size > output->trimmed || output->origin + output->head + padded(record->size) > cursor)
      return;
    output->start += record->size;
    output->head += padded(record->size);
  }
  output->origin += output->head;
  output->head = output->tail = 0;
  free(output->data);
  output->data = NULL;
  output->room = 0;
}

void output_free(struct output *output)
{
  free(output->data);
  *output = (struct output){ 0 };
}
