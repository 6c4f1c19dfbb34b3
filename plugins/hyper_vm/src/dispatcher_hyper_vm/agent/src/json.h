/* JSON as the host sends it, and as the agent answers. */
#ifndef JSON_H
#define JSON_H

#include "base.h"

enum json_type { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT };

/* A value. Members of arrays and objects are linked; a string is ended by a zero, and holds none. */
struct json {
  enum json_type type;
  int64_t number; /* whole numbers only; a fraction is cut off, what is too large is the largest */
  const char *string;
  const char *key;
  struct json *first, *next;
};

/* A parsed text, which owns all of its values. */
struct json_doc {
  struct json *root;
  struct json_block *blocks;
};

/* Lone low surrogates (PEP 383) become the bytes that they stand for. Depth is limited to 32. */
int json_parse(struct json_doc *doc, const char *text, size_t size, struct err *err);
void json_free(struct json_doc *doc);

/* Lookups take NULL for "not there", and give NULL, or `otherwise`, when the member is absent or of another type. */
const struct json *json_get(const struct json *object, const char *key);
const struct json *json_list(const struct json *object, const char *key); /* first member of an array or object */
const char *json_string(const struct json *object, const char *key, const char *otherwise);
int64_t json_number(const struct json *object, const char *key, int64_t otherwise);
bool json_bool(const struct json *object, const char *key, bool otherwise);
size_t json_count(const struct json *value);

/* Adds a string with its quotes. What is not ASCII is written byte by byte as lone surrogates where it is not UTF-8. */
void json_quote(struct buffer *out, const char *text);

#endif
