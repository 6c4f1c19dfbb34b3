/* The connection to the host: greeting, messages, what waits to be sent. See frame.h. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>

bool link_has_room(const struct agent *agent)
{
  const struct link *link = &agent->link;
  return link->synced && link->queue.size - link->queue_start < QUEUE_MOST;
}

static void forget_session(struct agent *agent)
{
  struct link *link = &agent->link;
  link->synced = false;
  buffer_free(&link->queue);
  buffer_free(&link->message);
  link->queue_start = 0;
  link->message_id = 0;
  link->sent = link->received = 0;
  streams_close_all(agent);
  commands_kill_all(agent);
}

static void disconnected(struct agent *agent)
{
  struct link *link = &agent->link;
  forget_session(agent);
  if (link->edge)
    return; /* the port stays; the host may come back */
  watch_close(agent, &link->watch);
  watch_change(agent, &link->listener, EPOLLIN);
}

void link_flush(struct agent *agent)
{
  struct link *link = &agent->link;
  while (link->watch.fd >= 0 && link->queue_start < link->queue.size) {
    ssize_t done = write(link->watch.fd, link->queue.data + link->queue_start, link->queue.size - link->queue_start);
    if (done < 0 && errno == EINTR)
      continue;
    if (done < 0 && errno == EAGAIN)
      return;
    if (done <= 0) {
      disconnected(agent);
      return;
    }
    link->queue_start += (size_t)done;
  }
  if (link->queue_start == link->queue.size) {
    if (link->queue.room > QUEUE_MOST)
      buffer_free(&link->queue);
    link->queue.size = link->queue_start = 0;
  } else if (link->queue_start > QUEUE_MOST) {
    memmove(link->queue.data, link->queue.data + link->queue_start, link->queue.size - link->queue_start);
    link->queue.size -= link->queue_start;
    link->queue_start = 0;
  }
}

void link_frame(struct agent *agent, const struct frame *frame)
{
  if (agent->link.synced)
    frame_encode(&agent->link.queue, frame);
}

static void send_message(struct agent *agent, enum frame_type type, uint32_t id, const struct buffer *body)
{
  struct buffer whole = { 0 };
  char size[4];
  put_u32(size, (uint32_t)body->size);
  buffer_add(&whole, size, sizeof size);
  buffer_add(&whole, body->data, body->size);
  for (size_t at = 0; at < whole.size; at += FRAME_PAYLOAD) {
    size_t part = whole.size - at < FRAME_PAYLOAD ? whole.size - at : FRAME_PAYLOAD;
    struct frame frame = {
      .type = (uint8_t)type,
      .flags = at + part < whole.size ? FLAG_MORE : 0,
      .id = id,
      .seq = ++agent->link.sent,
      .payload = whole.data + at,
      .size = (uint32_t)part,
    };
    link_frame(agent, &frame);
  }
  buffer_free(&whole);
}

void link_reply(struct agent *agent, uint32_t request, const struct buffer *body)
{
  if (agent->link.synced && request)
    send_message(agent, REPLY, request, body);
}

void link_reply_error(struct agent *agent, uint32_t request, const struct err *err)
{
  struct buffer body = { 0 };
  buffer_format(&body, "{\"error\":{\"code\":\"%s\",\"message\":", err_name(err->kind));
  json_quote(&body, err->text);
  buffer_format(&body, "}}");
  link_reply(agent, request, &body);
  buffer_free(&body);
}

void link_event(struct agent *agent, const struct buffer *body)
{
  if (agent->link.synced)
    send_message(agent, EVENT, 0, body);
}

static void greet(struct agent *agent, const struct frame *frame)
{
  if (frame->size < NONCE + 4)
    return;
  forget_session(agent);
  agent->link.synced = true;
  uint16_t low = (uint8_t)frame->payload[16] | (uint16_t)((uint8_t)frame->payload[17] << 8);
  uint16_t high = (uint8_t)frame->payload[18] | (uint16_t)((uint8_t)frame->payload[19] << 8);
  uint16_t version = high < VERSION_MAX ? high : VERSION_MAX;
  if (version < low || version < VERSION_MIN)
    version = 0;
  struct buffer body = { 0 }, payload = { 0 };
  hello_body(agent, &body);
  char numbers[10];
  put_u16(numbers, version);
  put_u16(numbers + 2, VERSION_MIN);
  put_u16(numbers + 4, VERSION_MAX);
  put_u32(numbers + 6, (uint32_t)body.size);
  buffer_add(&payload, frame->payload, NONCE);
  buffer_add(&payload, numbers, sizeof numbers);
  buffer_add(&payload, body.data, body.size);
  link_frame(agent, &(struct frame){ .type = HELLO, .payload = payload.data, .size = (uint32_t)payload.size });
  buffer_free(&payload);
  buffer_free(&body);
}

static void take_request(struct agent *agent, const struct frame *frame)
{
  struct link *link = &agent->link;
  link->received++;
  if (frame->seq != link->received || (link->message.size && link->message_id != frame->id) ||
      link->message.size + frame->size > MESSAGE_REQUEST) {
    say("the host sent a request out of order; waiting for it to begin anew");
    forget_session(agent);
    return;
  }
  link->message_id = frame->id;
  buffer_add(&link->message, frame->payload, frame->size);
  if (frame->flags & FLAG_MORE)
    return;
  struct buffer message = link->message;
  link->message = (struct buffer){ 0 };
  command_run(agent, frame->id, message.data, message.size);
  buffer_free(&message);
}

static void link_ready(struct agent *agent, struct watch *watch, uint32_t events)
{
  struct link *link = &agent->link;
  struct frame frame;
  (void)events;
  while (watch->fd >= 0) {
    size_t room;
    char *to = frame_room(&link->parser, &room);
    ssize_t got = read(watch->fd, to, room);
    if (got < 0 && errno == EINTR)
      continue;
    if (got < 0 && errno == EAGAIN)
      break;
    if (got <= 0) { /* the host is away; what it had begun to send will be skipped */
      disconnected(agent);
      break;
    }
    frame_filled(&link->parser, (size_t)got);
    while (frame_next(&link->parser, &frame)) {
      if (frame.type == SYNC)
        greet(agent, &frame);
      else if (link->synced && frame.type == REQUEST)
        take_request(agent, &frame);
      else if (link->synced)
        stream_frame(agent, &frame);
    }
  }
}

static void listener_ready(struct agent *agent, struct watch *watch, uint32_t events)
{
  (void)events;
  int fd = accept4(watch->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0)
    return;
  agent->link.watch = (struct watch){ .fd = fd, .ready = link_ready };
  watch_add(agent, &agent->link.watch, EPOLLIN | EPOLLOUT | EPOLLET);
  watch_change(agent, watch, 0); /* one host at a time, as with QEMU's socket */
  link_ready(agent, &agent->link.watch, EPOLLIN);
}

int link_open(struct agent *agent, const char *socket_path, struct err *err)
{
  struct link *link = &agent->link;
  frame_parser_init(&link->parser);
  link->watch.fd = link->listener.fd = -1;
  if (!socket_path) {
    int fd = port_find(err);
    if (fd < 0)
      return -1;
    link->edge = true;
    link->watch = (struct watch){ .fd = fd, .ready = link_ready };
    watch_add(agent, &link->watch, EPOLLIN | EPOLLOUT | EPOLLET);
    return 0;
  }
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  cleanup_fd int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (strlen(socket_path) >= sizeof address.sun_path)
    return err_set(err, ERR_INVALID, "the path of the socket is too long");
  strcpy(address.sun_path, socket_path);
  if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 8) < 0)
    return err_errno(err, errno, "cannot listen on %s", socket_path);
  link->listener = (struct watch){ .fd = take_fd(&fd), .ready = listener_ready };
  watch_add(agent, &link->listener, EPOLLIN);
  return 0;
}
