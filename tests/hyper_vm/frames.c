/* The frame parser and the JSON reader of the agent behind a pipe, for tests: prints what it finds in standard input. */
#include "frame.h"
#include "json.h"

#include <unistd.h>

static void print_hex(const char *data, size_t size)
{
  for (size_t i = 0; i < size; i++)
    printf("%02x", (unsigned char)data[i]);
}

static void print_frame(const struct frame *frame)
{
  printf("frame %u %u %u %u %llu %llu ", frame->type, frame->flags, frame->source, frame->id, (unsigned long long)frame->seq,
         (unsigned long long)frame->time_ns);
  print_hex(frame->payload, frame->size);
  struct buffer again = { 0 };
  frame_encode(&again, frame);
  printf(" ");
  print_hex(again.data, again.size);
  printf("\n");
  buffer_free(&again);
}

static void print_json(const struct json *value)
{
  struct buffer out = { 0 };
  if (value->key)
    json_quote(&out, value->key);
  if (value->type == JSON_STRING)
    json_quote(&out, value->string);
  buffer_add(&out, "", 1);
  printf("(%d %lld %s", value->type, (long long)value->number, out.data);
  buffer_free(&out);
  for (const struct json *member = value->first; member; member = member->next)
    print_json(member);
  printf(")");
}

int main(int argc, char **argv)
{
  /* "json": one text. Otherwise frames, read in pieces of the given size. */
  size_t piece = argc > 1 ? (size_t)atol(argv[1]) : 0;
  if (argc > 1 && strcmp(argv[1], "json") == 0) {
    struct json_doc doc;
    struct err err = { 0 };
    size_t size;
    cleanup_free char *text = read_file(-1, "/dev/stdin", 1 << 22, &size);
    char *exact = must_alloc(size);
    memcpy(exact, text ? text : "", size);
    if (json_parse(&doc, exact, size, &err) < 0)
      printf("refused: %s", err.text);
    else
      print_json(doc.root);
    json_free(&doc);
    free(exact);
    printf("\n");
    return 0;
  }
  struct frame_parser parser;
  struct frame frame;
  frame_parser_init(&parser);
  for (;;) {
    size_t room;
    char *to = frame_room(&parser, &room);
    ssize_t got = read(STDIN_FILENO, to, piece && piece < room ? piece : room);
    if (got <= 0)
      break;
    frame_filled(&parser, (size_t)got);
    while (frame_next(&parser, &frame))
      print_frame(&frame);
  }
  printf("skipped %llu\n", (unsigned long long)parser.skipped);
  frame_parser_free(&parser);
  return 0;
}
