#include "frame.h"

#include <endian.h>

static const char TRAILER[FRAME_TRAILER] = { '\xa5', '\xc3', '\x9e', '\x7b' };

static uint16_t get_u16(const char *from)
{
  uint16_t value;
  memcpy(&value, from, sizeof value);
  return le16toh(value);
}

uint32_t get_u32(const char *from)
{
  uint32_t value;
  memcpy(&value, from, sizeof value);
  return le32toh(value);
}

uint64_t get_u64(const char *from)
{
  uint64_t value;
  memcpy(&value, from, sizeof value);
  return le64toh(value);
}

void put_u16(char *to, uint16_t value)
{
  value = htole16(value);
  memcpy(to, &value, sizeof value);
}

void put_u32(char *to, uint32_t value)
{
  value = htole32(value);
  memcpy(to, &value, sizeof value);
}

void put_u64(char *to, uint64_t value)
{
  value = htole64(value);
  memcpy(to, &value, sizeof value);
}

void frame_encode(struct buffer *out, const struct frame *frame)
{
  char header[FRAME_HEADER];
  put_u32(header, FRAME_MAGIC);
  put_u32(header + 4, frame->size);
  header[8] = (char)frame->type;
  header[9] = (char)frame->flags;
  put_u16(header + 10, frame->source);
  put_u32(header + 12, frame->id);
  put_u64(header + 16, frame->seq);
  put_u64(header + 24, frame->time_ns);
  buffer_add(out, header, sizeof header);
  buffer_add(out, frame->payload, frame->size);
  buffer_add(out, TRAILER, sizeof TRAILER);
}

void frame_parser_init(struct frame_parser *parser)
{
  *parser = (struct frame_parser){ .buffer = must_alloc(FRAME_WHOLE) };
}

void frame_parser_free(struct frame_parser *parser)
{
  free(parser->buffer);
  *parser = (struct frame_parser){ 0 };
}

char *frame_room(struct frame_parser *parser, size_t *room)
{
  if (parser->start == parser->end)
    parser->start = parser->end = 0;
  else if (parser->start > 0) {
    memmove(parser->buffer, parser->buffer + parser->start, parser->end - parser->start);
    parser->end -= parser->start;
    parser->start = 0;
  }
  *room = FRAME_WHOLE - parser->end;
  return parser->buffer + parser->end;
}

void frame_filled(struct frame_parser *parser, size_t size)
{
  parser->end += size;
}

static void skip(struct frame_parser *parser, size_t size)
{
  parser->start += size;
  parser->skipped += size;
}

/* Bring what may be the beginning of a frame to the front: everything before a magic number cannot be one. */
static void skip_to_magic(struct frame_parser *parser)
{
  while (parser->end - parser->start >= 4 && get_u32(parser->buffer + parser->start) != FRAME_MAGIC) {
    const char *from = parser->buffer + parser->start + 1;
    size_t left = parser->end - parser->start - 1;
    const char *found = memchr(from, (char)(FRAME_MAGIC & 0xff), left);
    skip(parser, found ? (size_t)(found - from) + 1 : left + 1);
  }
}

bool frame_next(struct frame_parser *parser, struct frame *frame)
{
  for (;;) {
    skip_to_magic(parser);
    const char *at = parser->buffer + parser->start;
    size_t held = parser->end - parser->start;
    if (held < FRAME_HEADER)
      return false;
    uint32_t size = get_u32(at + 4);
    if (size > FRAME_PAYLOAD) {
      skip(parser, 1);
      continue;
    }
    size_t whole = FRAME_HEADER + (size_t)size + FRAME_TRAILER;
    if (held < whole)
      return false;
    if (memcmp(at + FRAME_HEADER + size, TRAILER, FRAME_TRAILER) != 0) {
      skip(parser, whole);
      continue;
    }
    *frame = (struct frame){
      .type = (uint8_t)at[8],
      .flags = (uint8_t)at[9],
      .source = get_u16(at + 10),
      .id = get_u32(at + 12),
      .seq = get_u64(at + 16),
      .time_ns = get_u64(at + 24),
      .payload = at + FRAME_HEADER,
      .size = size,
    };
    parser->start += whole;
    return true;
  }
}
