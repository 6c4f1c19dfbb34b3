#include "json.h"

#include <limits.h>

#define MAX_DEPTH 32
#define BLOCK (16 * 1024)

struct json_block {
  struct json_block *next;
  size_t used, room;
  char data[];
};

struct parser {
  const char *at, *end;
  struct json_doc *doc;
  struct err *err;
};

static void *arena(struct json_doc *doc, size_t size)
{
  size = (size + 15) & ~(size_t)15;
  struct json_block *block = doc->blocks;
  if (!block || block->room - block->used < size) {
    size_t room = size > BLOCK ? size : BLOCK;
    block = must_alloc(sizeof *block + room);
    block->room = room;
    block->next = doc->blocks;
    doc->blocks = block;
  }
  void *pointer = block->data + block->used;
  block->used += size;
  return pointer;
}

static int wrong(struct parser *p)
{
  return err_set(p->err, ERR_INVALID, "the request is not JSON");
}

static void skip(struct parser *p)
{
  while (p->at < p->end && (*p->at == ' ' || *p->at == '\n' || *p->at == '\t' || *p->at == '\r'))
    p->at++;
}

static int hex4(struct parser *p, unsigned *code)
{
  *code = 0;
  if (p->end - p->at < 4)
    return wrong(p);
  for (int i = 0; i < 4; i++) {
    char c = *p->at++;
    unsigned digit;
    if (c >= '0' && c <= '9')
      digit = (unsigned)(c - '0');
    else if ((c | 32) >= 'a' && (c | 32) <= 'f')
      digit = (unsigned)((c | 32) - 'a' + 10);
    else
      return wrong(p);
    *code = *code << 4 | digit;
  }
  return 0;
}

static char *put_utf8(char *to, unsigned code)
{
  if (code < 0x80) {
    *to++ = (char)code;
  } else if (code < 0x800) {
    *to++ = (char)(0xc0 | code >> 6);
    *to++ = (char)(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    *to++ = (char)(0xe0 | code >> 12);
    *to++ = (char)(0x80 | (code >> 6 & 0x3f));
    *to++ = (char)(0x80 | (code & 0x3f));
  } else {
    *to++ = (char)(0xf0 | code >> 18);
    *to++ = (char)(0x80 | (code >> 12 & 0x3f));
    *to++ = (char)(0x80 | (code >> 6 & 0x3f));
    *to++ = (char)(0x80 | (code & 0x3f));
  }
  return to;
}

/* The character behind "\u". */
static int escaped(struct parser *p, char **to)
{
  unsigned code, low;
  if (hex4(p, &code) < 0)
    return -1;
  if (code == 0)
    return err_set(p->err, ERR_INVALID, "a string of the request holds a zero byte");
  if (code >= 0xdc80 && code <= 0xdcff) { /* a byte that is not UTF-8 */
    *(*to)++ = (char)(code - 0xdc00);
    return 0;
  }
  if (code >= 0xd800 && code <= 0xdbff) {
    if (p->end - p->at < 6 || p->at[0] != '\\' || p->at[1] != 'u')
      return wrong(p);
    p->at += 2;
    if (hex4(p, &low) < 0)
      return -1;
    if (low < 0xdc00 || low > 0xdfff)
      return wrong(p);
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }
  *to = put_utf8(*to, code);
  return 0;
}

static int parse_string(struct parser *p, const char **string)
{
  if (p->at >= p->end || *p->at != '"')
    return wrong(p);
  const char *close = ++p->at;
  while (close < p->end && *close != '"')
    close += *close == '\\' ? 2 : 1;
  if (close >= p->end)
    return wrong(p);
  char *to = arena(p->doc, (size_t)(close - p->at) + 1);
  *string = to;
  while (*p->at != '"') {
    char c = *p->at++;
    if ((unsigned char)c < 0x20)
      return wrong(p);
    if (c != '\\') {
      *to++ = c;
      continue;
    }
    c = *p->at++;
    switch (c) {
    case '"': case '\\': case '/': *to++ = c; break;
    case 'b': *to++ = '\b'; break;
    case 'f': *to++ = '\f'; break;
    case 'n': *to++ = '\n'; break;
    case 'r': *to++ = '\r'; break;
    case 't': *to++ = '\t'; break;
    case 'u':
      if (escaped(p, &to) < 0)
        return -1;
      break;
    default: return wrong(p);
    }
  }
  p->at++;
  *to = 0;
  return 0;
}

static int parse_number(struct parser *p, int64_t *number)
{
  bool negative = p->at < p->end && *p->at == '-';
  if (negative)
    p->at++;
  if (p->at >= p->end || *p->at < '0' || *p->at > '9')
    return wrong(p);
  uint64_t value = 0;
  for (; p->at < p->end && *p->at >= '0' && *p->at <= '9'; p->at++) {
    unsigned digit = (unsigned)(*p->at - '0');
    value = value > ((uint64_t)INT64_MAX - digit) / 10 ? (uint64_t)INT64_MAX : value * 10 + digit;
  }
  while (p->at < p->end && (*p->at == '.' || *p->at == 'e' || *p->at == 'E' || *p->at == '+' || *p->at == '-' ||
                            (*p->at >= '0' && *p->at <= '9')))
    p->at++;
  *number = negative ? -(int64_t)value : (int64_t)value;
  return 0;
}

static int parse_word(struct parser *p, const char *word)
{
  size_t size = strlen(word);
  if ((size_t)(p->end - p->at) < size || memcmp(p->at, word, size) != 0)
    return wrong(p);
  p->at += size;
  return 0;
}

static int parse_value(struct parser *p, struct json *value, int depth);

static int parse_members(struct parser *p, struct json *parent, char close, int depth)
{
  struct json **tail = &parent->first;
  p->at++;
  skip(p);
  if (p->at < p->end && *p->at == close) {
    p->at++;
    return 0;
  }
  for (;;) {
    struct json *member = arena(p->doc, sizeof *member);
    *tail = member;
    tail = &member->next;
    skip(p);
    if (close == '}') {
      if (parse_string(p, &member->key) < 0)
        return -1;
      skip(p);
      if (p->at >= p->end || *p->at++ != ':')
        return wrong(p);
    }
    if (parse_value(p, member, depth + 1) < 0)
      return -1;
    skip(p);
    if (p->at >= p->end)
      return wrong(p);
    char c = *p->at++;
    if (c == close)
      return 0;
    if (c != ',')
      return wrong(p);
  }
}

static int parse_value(struct parser *p, struct json *value, int depth)
{
  if (depth > MAX_DEPTH)
    return err_set(p->err, ERR_INVALID, "the request is nested too deeply");
  skip(p);
  if (p->at >= p->end)
    return wrong(p);
  switch (*p->at) {
  case '{': value->type = JSON_OBJECT; return parse_members(p, value, '}', depth);
  case '[': value->type = JSON_ARRAY; return parse_members(p, value, ']', depth);
  case '"': value->type = JSON_STRING; return parse_string(p, &value->string);
  case 't': value->type = JSON_TRUE; return parse_word(p, "true");
  case 'f': value->type = JSON_FALSE; return parse_word(p, "false");
  case 'n': value->type = JSON_NULL; return parse_word(p, "null");
  default: value->type = JSON_NUMBER; return parse_number(p, &value->number);
  }
}

int json_parse(struct json_doc *doc, const char *text, size_t size, struct err *err)
{
  struct parser p = { .at = text, .end = text + size, .doc = doc, .err = err };
  *doc = (struct json_doc){ 0 };
  doc->root = arena(doc, sizeof *doc->root);
  if (parse_value(&p, doc->root, 0) < 0)
    return -1;
  skip(&p);
  return p.at == p.end ? 0 : wrong(&p);
}

void json_free(struct json_doc *doc)
{
  while (doc->blocks) {
    struct json_block *next = doc->blocks->next;
    free(doc->blocks);
    doc->blocks = next;
  }
  doc->root = NULL;
}

const struct json *json_get(const struct json *object, const char *key)
{
  if (!object || object->type != JSON_OBJECT)
    return NULL;
  for (const struct json *member = object->first; member; member = member->next)
    if (strcmp(member->key, key) == 0)
      return member;
  return NULL;
}

const struct json *json_list(const struct json *object, const char *key)
{
  const struct json *value = json_get(object, key);
  return value && (value->type == JSON_ARRAY || value->type == JSON_OBJECT) ? value->first : NULL;
}

const char *json_string(const struct json *object, const char *key, const char *otherwise)
{
  const struct json *value = json_get(object, key);
  return value && value->type == JSON_STRING ? value->string : otherwise;
}

int64_t json_number(const struct json *object, const char *key, int64_t otherwise)
{
  const struct json *value = json_get(object, key);
  return value && value->type == JSON_NUMBER ? value->number : otherwise;
}

bool json_bool(const struct json *object, const char *key, bool otherwise)
{
  const struct json *value = json_get(object, key);
  return value && (value->type == JSON_TRUE || value->type == JSON_FALSE) ? value->type == JSON_TRUE : otherwise;
}

size_t json_count(const struct json *value)
{
  size_t count = 0;
  for (const struct json *member = value ? value->first : NULL; member; member = member->next)
    count++;
  return count;
}

void json_quote(struct buffer *out, const char *text)
{
  buffer_add(out, "\"", 1);
  for (; *text; text++) {
    unsigned char c = (unsigned char)*text;
    if (c == '"' || c == '\\')
      buffer_format(out, "\\%c", c);
    else if (c < 0x20)
      buffer_format(out, "\\u%04x", c);
    else
      buffer_add(out, text, 1); /* the host reads what is not UTF-8 as PEP 383 says */
  }
  buffer_add(out, "\"", 1);
}
