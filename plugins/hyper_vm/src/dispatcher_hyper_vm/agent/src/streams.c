/* Streams: bytes of processes and connections on their way to the host and from it, each within its credit. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>

#define STDIN_WINDOW (64 * 1024)

struct stream *stream_find(struct agent *agent, uint32_t id)
{
  for (struct stream *stream = agent->streams; stream; stream = stream->next)
    if (stream->id == id)
      return stream;
  return NULL;
}

static void grant(struct agent *agent, struct stream *stream)
{
  if (stream->taken + STDIN_WINDOW - stream->granted < STDIN_WINDOW / 4)
    return;
  stream->granted = stream->taken + STDIN_WINDOW;
  link_frame(agent, &(struct frame){ .type = CREDIT, .id = stream->id, .seq = stream->granted });
}

struct stream *stream_open(struct agent *agent, const struct request *request, enum stream_kind kind, struct err *err)
{
  int64_t id = json_number(request->body, "stream", 0);
  if (id <= 0 || id > UINT32_MAX || stream_find(agent, (uint32_t)id)) {
    err_set(err, ERR_INVALID, "the request names no new stream");
    return NULL;
  }
  struct stream *stream = must_alloc(sizeof *stream);
  stream->id = (uint32_t)id;
  stream->kind = kind;
  stream->credit = WINDOW;
  stream->socket.fd = -1;
  stream->wants_stdin = kind == STREAM_CONNECT || json_bool(request->body, "stdin", false);
  stream->next = agent->streams;
  agent->streams = stream;
  if (stream->wants_stdin)
    grant(agent, stream);
  return stream;
}

void stream_close(struct agent *agent, struct stream *stream)
{
  for (struct stream **at = &agent->streams; *at; at = &(*at)->next)
    if (*at == stream) {
      *at = stream->next;
      break;
    }
  if (stream->process)
    stream->process->stream = NULL;
  watch_close(agent, &stream->socket);
  buffer_free(&stream->in);
  free(stream);
}

void stream_reset(struct agent *agent, struct stream *stream, const char *reason)
{
  link_frame(agent, &(struct frame){
    .type = RESET, .id = stream->id, .payload = reason, .size = (uint32_t)strlen(reason) });
  stream_close(agent, stream);
}

void stream_end(struct agent *agent, struct stream *stream, int code)
{
  char number[4];
  put_u32(number, (uint32_t)code);
  link_frame(agent, &(struct frame){
    .type = END, .id = stream->id, .seq = stream->sent, .payload = number, .size = code < 0 ? 0 : sizeof number });
  stream->ended = true;
}

void streams_close_all(struct agent *agent)
{
  while (agent->streams)
    stream_close(agent, agent->streams);
}

/* ------------------------------------------------------------------------------------------------ towards the guest */
static struct watch *target(struct stream *stream)
{
  switch (stream->kind) {
  case STREAM_EXEC: return stream->process ? &stream->process->in : NULL;
  case STREAM_ATTACH: return stream->container ? &stream->container->first.in : NULL;
  case STREAM_CONNECT: return stream->connecting ? NULL : &stream->socket;
  default: return NULL;
  }
}

static void close_input(struct agent *agent, struct stream *stream)
{
  if (stream->in_closed)
    return;
  stream->in_closed = true;
  if (stream->kind == STREAM_CONNECT) {
    shutdown(stream->socket.fd, SHUT_WR);
  } else if (stream->kind == STREAM_EXEC && stream->process && stream->process->terminal < 0) {
    watch_close(agent, &stream->process->in);
  } else if (stream->kind == STREAM_ATTACH && stream->container->stdin_once) {
    struct process *first = &stream->container->first;
    if (first->terminal < 0)
      watch_close(agent, &first->in);
  }
}

/* Pass on what the host sent, as far as the other side takes it. What it will never take is dropped. */
static void feed(struct agent *agent, struct stream *stream)
{
  struct watch *to = target(stream);
  if (stream->kind == STREAM_CONNECT && stream->connecting)
    return;
  while (stream->in_start < stream->in.size) {
    size_t left = stream->in.size - stream->in_start;
    ssize_t done = (ssize_t)left;
    if (to && to->fd >= 0 && !stream->in_closed) {
      done = write(to->fd, stream->in.data + stream->in_start, left);
      if (done < 0 && errno == EINTR)
        continue;
      if (done < 0 && errno == EAGAIN)
        break;
      if (done < 0) {
        if (stream->kind != STREAM_CONNECT)
          watch_close(agent, to);
        done = (ssize_t)left;
      }
    }
    stream->in_start += (size_t)done;
    stream->taken += (uint64_t)done;
  }
  if (stream->in_start == stream->in.size) {
    buffer_free(&stream->in);
    stream->in_start = 0;
    if (stream->in_ending)
      close_input(agent, stream);
  }
  if (!stream->in_ending)
    grant(agent, stream);
}

void process_in_ready(struct agent *agent, struct watch *watch, uint32_t events)
{
  (void)events;
  for (struct stream *stream = agent->streams; stream; stream = stream->next)
    if (stream->in.size && target(stream) == watch)
      feed(agent, stream);
}

static bool connection_is_over(const struct stream *stream)
{
  return stream->kind == STREAM_CONNECT && stream->ended && stream->in_closed;
}

void stream_frame(struct agent *agent, const struct frame *frame)
{
  struct stream *stream = stream_find(agent, frame->id);
  if (!stream)
    return;
  switch (frame->type) {
  case DATA:
    if (!stream->wants_stdin || stream->in_ending)
      return;
    if (frame->seq != stream->received + frame->size || frame->seq > stream->granted) {
      stream_reset(agent, stream, "data came out of order, or without credit");
      return;
    }
    stream->received = frame->seq;
    buffer_add(&stream->in, frame->payload, frame->size);
    feed(agent, stream);
    break;
  case CREDIT:
    if (frame->seq > stream->credit)
      stream->credit = frame->seq;
    break;
  case END:
    stream->in_ending = true;
    feed(agent, stream);
    if (connection_is_over(stream))
      stream_close(agent, stream);
    break;
  case RESET:
    stream_close(agent, stream);
    break;
  }
}

/* -------------------------------------------------------------------------------------------------- towards the host */
static size_t may_send(struct agent *agent, const struct stream *stream)
{
  if (!link_has_room(agent) || stream->credit <= stream->sent)
    return 0;
  uint64_t credit = stream->credit - stream->sent;
  return credit < OUTPUT_RECORD ? (size_t)credit : OUTPUT_RECORD;
}

static void send_data(struct agent *agent, struct stream *stream, int source, uint64_t time_ns, const char *data,
                      size_t size)
{
  stream->sent += size;
  link_frame(agent, &(struct frame){
    .type = DATA, .id = stream->id, .source = (uint16_t)source, .seq = stream->sent, .time_ns = time_ns,
    .payload = data, .size = (uint32_t)size });
}

static void pause_source(struct agent *agent, struct source *source, bool pause)
{
  if (source->watch.fd < 0 || source->paused == pause)
    return;
  source->paused = pause;
  watch_change(agent, &source->watch, pause ? 0 : EPOLLIN);
}

static bool is_drained(const struct process *process)
{
  return process->out[0].watch.fd < 0 && process->out[1].watch.fd < 0;
}

/* Read once. Returns what read(2) did, or -EAGAIN where the reader has to wait for the host. */
static ssize_t read_source(struct agent *agent, struct source *source, bool whatever)
{
  char data[OUTPUT_RECORD];
  struct process *process = source->process;
  size_t room = sizeof data;
  if (process->is_first) {
    if (!whatever && output_is_full(&process->container->output))
      room = 0;
  } else if (process->stream) {
    room = may_send(agent, process->stream);
  }
  if (!room) {
    pause_source(agent, source, true);
    return -EBUSY;
  }
  ssize_t got = read(source->watch.fd, data, room);
  if (got < 0)
    return -errno;
  if (got > 0 && process->is_first)
    output_add(&process->container->output, (int)source->kind, now_ns(), data, (size_t)got);
  else if (got > 0 && process->stream)
    send_data(agent, process->stream, (int)source->kind, 0, data, (size_t)got);
  return got;
}

void source_ready(struct agent *agent, struct watch *watch, uint32_t events)
{
  struct source *source = (struct source *)watch; /* its first member */
  (void)events;
  ssize_t got = read_source(agent, source, false);
  if (got == 0 || (got < 0 && got != -EAGAIN && got != -EINTR && got != -EBUSY)) /* EIO: the terminal's other end */
    watch_close(agent, watch);
}

/* After the exit: what is in the pipes is all that there is. */
void process_drain(struct agent *agent, struct process *process)
{
  size_t most = 4 * 1024 * 1024; /* somebody else may hold the pipe, and go on writing */
  for (int i = 0; i < 2; i++) {
    struct source *source = &process->out[i];
    while (source->watch.fd >= 0) {
      ssize_t got = read_source(agent, source, true);
      if (got == -EINTR)
        continue;
      if (got == -EBUSY)
        break;
      most -= got > 0 && (size_t)got < most ? (size_t)got : 0;
      if (got <= 0 || most < OUTPUT_RECORD)
        watch_close(agent, &source->watch);
    }
  }
  process->drained = is_drained(process);
}

void process_close(struct agent *agent, struct process *process)
{
  watch_close(agent, &process->in);
  for (int i = 0; i < 2; i++)
    watch_close(agent, &process->out[i].watch);
  if (process->terminal >= 0)
    close(process->terminal);
  process->terminal = -1;
}

static bool pump_output(struct agent *agent, struct stream *stream)
{
  struct output *output = &stream->container->output;
  const char *data;
  uint64_t next = stream->cursor;
  const struct output_record *record = output_read(output, &next, &data);
  if (!record) {
    if (stream->container->status == EXITED)
      stream_end(agent, stream, stream->kind == STREAM_ATTACH ? stream->container->code : -1);
    return false;
  }
  if (!link_has_room(agent) || stream->credit - stream->sent < record->size)
    return false;
  send_data(agent, stream, (int)record->source, record->time_ns, data, record->size);
  stream->cursor = next;
  return true;
}

static bool pump_connection(struct agent *agent, struct stream *stream)
{
  char data[OUTPUT_RECORD];
  size_t room = stream->connecting ? 0 : may_send(agent, stream);
  if (!room)
    return false;
  ssize_t got = read(stream->socket.fd, data, room);
  if (got < 0 && (errno == EAGAIN || errno == EINTR))
    return false;
  if (got <= 0) {
    stream_end(agent, stream, -1);
    return false;
  }
  send_data(agent, stream, SOURCE_NONE, 0, data, (size_t)got);
  return true;
}

static bool pump_command(struct agent *agent, struct stream *stream)
{
  struct process *process = stream->process;
  if (!process)
    return false;
  if (process->exited && !process->drained)
    process_drain(agent, process);
  else if (may_send(agent, stream))
    for (int i = 0; i < 2; i++)
      pause_source(agent, &process->out[i], false);
  if (process->exited && process->drained)
    stream_end(agent, stream, process->code);
  return false;
}

static bool pump(struct agent *agent, struct stream *stream)
{
  switch (stream->kind) {
  case STREAM_EXEC: return pump_command(agent, stream);
  case STREAM_CONNECT: return pump_connection(agent, stream);
  default: return pump_output(agent, stream);
  }
}

/* Free what was read and trimmed; let a container go on that had to wait for it. */
static void drop_output(struct agent *agent, struct container *container)
{
  uint64_t slowest = UINT64_MAX;
  for (struct stream *stream = agent->streams; stream; stream = stream->next)
    if (stream->container == container && !stream->ended && (stream->kind == STREAM_OUTPUT || stream->kind == STREAM_ATTACH))
      slowest = stream->cursor < slowest ? stream->cursor : slowest;
  output_drop(&container->output, slowest);
  if (!output_is_full(&container->output))
    for (int i = 0; i < 2; i++)
      pause_source(agent, &container->first.out[i], false);
}

bool streams_pump(struct agent *agent)
{
  size_t before = agent->link.queue.size;
  for (bool moved = true; moved && link_has_room(agent);) {
    moved = false;
    for (struct stream *stream = agent->streams; stream; stream = stream->next)
      if (!stream->ended)
        moved |= pump(agent, stream);
  }
  for (struct stream *stream = agent->streams, *next; stream; stream = next) {
    next = stream->next;
    struct process *process = stream->process;
    if (connection_is_over(stream) || (stream->ended && stream->kind != STREAM_CONNECT)) {
      stream_close(agent, stream);
      if (process && process->exited)
        command_forget(agent, process);
    }
  }
  for (struct container *container = agent->containers; container; container = container->next) {
    drop_output(agent, container);
    for (struct process *process = container->commands, *next; process; process = next) {
      next = process->next;
      if (process->exited && !process->stream)
        command_forget(agent, process);
    }
  }
  return agent->link.queue.size > before;
}

/* ------------------------------------------------------------------------------------------------------- connections */
static int connect_to(struct agent *agent, struct stream *stream);

static void connection_failed(struct agent *agent, struct stream *stream, int number)
{
  struct err err;
  watch_close(agent, &stream->socket);
  if (stream->family == AF_INET) {
    stream->family = AF_INET6;
    if (connect_to(agent, stream) == 0)
      return;
  }
  err_set(&err, ERR_INVALID, "cannot connect to port %d of the pod: %s", stream->port, strerror(number));
  link_reply_error(agent, stream->request, &err);
  stream_close(agent, stream);
}

static void connection_ready(struct agent *agent, struct watch *watch, uint32_t events)
{
  struct stream *stream = (struct stream *)((char *)watch - offsetof(struct stream, socket));
  (void)events;
  if (stream->connecting) {
    int number = 0;
    socklen_t size = sizeof number;
    getsockopt(watch->fd, SOL_SOCKET, SO_ERROR, &number, &size);
    if (number) {
      connection_failed(agent, stream, number);
      return;
    }
    stream->connecting = false;
    struct buffer body = { 0 };
    buffer_format(&body, "{}");
    link_reply(agent, stream->request, &body);
    buffer_free(&body);
  }
  feed(agent, stream); /* streams_pump reads */
}

static int connect_to(struct agent *agent, struct stream *stream)
{
  struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_port = htons(stream->port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
  struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_port = htons(stream->port), .sin6_addr = IN6ADDR_LOOPBACK_INIT };
  bool is_v4 = stream->family == AF_INET;
  int fd = socket(stream->family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0)
    return -1;
  if (connect(fd, is_v4 ? (struct sockaddr *)&v4 : (struct sockaddr *)&v6, is_v4 ? sizeof v4 : sizeof v6) < 0 &&
      errno != EINPROGRESS) {
    close(fd);
    return -1;
  }
  stream->connecting = true;
  stream->socket = (struct watch){ .fd = fd, .ready = connection_ready };
  watch_add(agent, &stream->socket, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
  return 0;
}

HANDLER(command_connect)
{
  int64_t port = json_number(request->body, "port", 0);
  (void)reply;
  if (port <= 0 || port > 65535)
    return err_set(err, ERR_INVALID, "there is no port %lld", (long long)port);
  struct stream *stream = stream_open(agent, request, STREAM_CONNECT, err);
  if (!stream)
    return -1;
  stream->port = (uint16_t)port;
  stream->request = request->id;
  stream->family = AF_INET;
  if (connect_to(agent, stream) < 0) {
    stream->family = AF_INET6;
    if (connect_to(agent, stream) < 0) {
      stream_close(agent, stream);
      return err_set(err, ERR_INVALID, "cannot connect to port %d of the pod: %s", (int)port, strerror(errno));
    }
  }
  return 1;
}

static struct container *named(struct agent *agent, const struct request *request, struct err *err)
{
  struct container *container = container_find(agent, json_string(request->body, "container", ""));
  if (!container)
    err_set(err, ERR_NOT_FOUND, "there is no such container");
  return container;
}

HANDLER(command_output)
{
  (void)reply;
  uint64_t cursor, after = (uint64_t)json_number(request->body, "after", 0);
  struct container *container = named(agent, request, err);
  if (!container || output_find(&container->output, after, &cursor, err) < 0)
    return -1;
  struct stream *stream = stream_open(agent, request, STREAM_OUTPUT, err);
  if (!stream)
    return -1;
  stream->container = container;
  stream->cursor = cursor;
  stream->sent = after;
  stream->credit = after + WINDOW;
  return 0;
}

HANDLER(command_attach)
{
  (void)reply;
  struct container *container = named(agent, request, err);
  if (!container)
    return -1;
  if (container->status == EXITED)
    return err_set(err, ERR_STATE, "the container has exited");
  struct stream *stream = stream_open(agent, request, STREAM_ATTACH, err);
  if (!stream)
    return -1;
  stream->container = container;
  stream->cursor = output_end_cursor(&container->output);
  return 0;
}

HANDLER(command_trim)
{
  (void)reply;
  struct container *container = named(agent, request, err);
  if (!container)
    return -1;
  uint64_t position = (uint64_t)json_number(request->body, "position", 0);
  if (position > container->output.trimmed)
    container->output.trimmed = position; /* streams_pump frees it */
  return 0;
}
