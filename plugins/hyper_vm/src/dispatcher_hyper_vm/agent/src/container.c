/* The life of containers, from the agent's side. */
#include "agent.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define SETTLE_NS (10ull * 1000000000) /* until everything that was killed is gone */

static void process_sync_ready(struct agent *agent, struct watch *watch, uint32_t events);

struct container *container_find(struct agent *agent, const char *id)
{
  for (struct container *container = agent->containers; container; container = container->next)
    if (strcmp(container->id, id) == 0)
      return container;
  return NULL;
}

void container_state(const struct container *container, struct buffer *out)
{
  static const char *const NAMES[] = { "created", "running", "exited" };
  buffer_format(out, "{\"id\":");
  json_quote(out, container->id);
  buffer_format(out, ",\"status\":\"%s\",\"pid\":%d,\"started_ns\":%" PRIu64 ",\"finished_ns\":%" PRIu64
                ",\"exit_code\":%d,\"oom_killed\":%s,\"reason\":\"%s\",\"message\":", NAMES[container->status],
                container->status == EXITED ? 0 : container->first.pid, container->started_ns, container->finished_ns,
                container->code, container->oom_killed ? "true" : "false", container->start_failed ? "StartError" : "");
  json_quote(out, container->message);
  buffer_format(out, ",\"output_start\":%" PRIu64 ",\"output_end\":%" PRIu64 "}", container->output.start,
                container->output.end);
}

static void reply_state(struct agent *agent, uint32_t request, const struct container *container)
{
  struct buffer body = { 0 };
  buffer_format(&body, "{\"container\":");
  container_state(container, &body);
  buffer_format(&body, "}");
  link_reply(agent, request, &body);
  buffer_free(&body);
}

/* --------------------------------------------------------------------------------------------------------- processes */
struct pipes {
  int child[3], ours[3];
};

static void pipes_close(int fds[3])
{
  for (int i = 0; i < 3; i++)
    if (fds[i] >= 0)
      close(fds[i]);
}

static int make_pipes(struct pipes *pipes, bool terminal, bool wants_stdin, struct err *err)
{
  *pipes = (struct pipes){ { -1, -1, -1 }, { -1, -1, -1 } };
  for (int i = 0; !terminal && i < 3; i++) {
    int ends[2];
    if (i == 0 && !wants_stdin) {
      pipes->child[0] = open("/dev/null", O_RDONLY | O_CLOEXEC);
      continue;
    }
    if (pipe2(ends, O_CLOEXEC) < 0) {
      pipes_close(pipes->child);
      pipes_close(pipes->ours);
      return err_errno(err, errno, "cannot make pipes");
    }
    pipes->child[i] = ends[i == 0 ? 0 : 1];
    pipes->ours[i] = ends[i == 0 ? 1 : 0];
    fcntl(pipes->ours[i], F_SETFL, O_NONBLOCK);
  }
  return 0;
}

static void process_begin(struct process *process, struct container *container)
{
  *process = (struct process){ .container = container, .terminal = -1, .in.fd = -1, .sync.fd = -1 };
  for (int i = 0; i < 2; i++) {
    process->out[i].watch = (struct watch){ .fd = -1, .ready = source_ready };
    process->out[i].process = process;
    process->out[i].kind = i == 0 ? SOURCE_STDOUT : SOURCE_STDERR;
  }
}

static void adopt_pipes(struct agent *agent, struct process *process, const struct pipes *pipes)
{
  process->in = (struct watch){ .fd = pipes->ours[0], .ready = process_in_ready };
  watch_add(agent, &process->in, EPOLLOUT | EPOLLET);
  for (int i = 0; i < 2; i++) {
    process->out[i].watch.fd = pipes->ours[i + 1];
    watch_add(agent, &process->out[i].watch, EPOLLIN);
  }
}

static void adopt_terminal(struct agent *agent, struct process *process, int master)
{
  fcntl(master, F_SETFL, O_NONBLOCK);
  process->terminal = master;
  process->out[0].watch.fd = fcntl(master, F_DUPFD_CLOEXEC, 0);
  watch_add(agent, &process->out[0].watch, EPOLLIN);
  process->in = (struct watch){ .fd = fcntl(master, F_DUPFD_CLOEXEC, 0), .ready = process_in_ready };
  watch_add(agent, &process->in, EPOLLOUT | EPOLLET);
}

static int open_namespace(pid_t pid, const char *name, struct err *err)
{
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/ns/%s", pid, name);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  return fd < 0 ? err_errno(err, errno, "cannot open the %s namespace to join", name) : fd;
}

/* Start child_run in the cgroup, and in the process namespace `pids`, or in a new one with CLONE_NEWPID in `flags`. */
static pid_t spawn(struct agent *agent, struct child *child, const char *cgroup, uint64_t flags, int pids, struct err *err)
{
  cleanup_fd int leaf = cgroup_open(cgroup, err);
  if (leaf < 0)
    return -1;
  struct clone_args args = { .flags = flags | CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = (uint64_t)leaf };
  /* Only children are affected by setns(2) for a process namespace; ours comes back right afterwards. */
  if (pids >= 0 && setns(pids, CLONE_NEWPID) < 0)
    return err_errno(err, errno, "cannot enter the process namespace");
  pid_t pid = (pid_t)syscall(SYS_clone3, &args, sizeof args);
  int number = errno;
  if (pid == 0)
    child_run(child);
  if (pids >= 0 && setns(agent->pids, CLONE_NEWPID) < 0)
    say("cannot come back from a process namespace: %s", strerror(errno));
  return pid < 0 ? err_errno(err, number, "cannot start a process") : pid;
}

/* The same for both kinds of processes: pipes, the socket, the process itself. */
static int process_start(struct agent *agent, struct process *process, struct child *child, bool wants_stdin, uint64_t flags,
                         int pids, struct err *err)
{
  struct pipes pipes;
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
    return err_errno(err, errno, "cannot make a socket");
  cleanup_fd int theirs = ends[0], ours = ends[1];
  if (make_pipes(&pipes, child->terminal, wants_stdin, err) < 0)
    return -1;
  child->sync = theirs;
  child->in = pipes.child[0];
  child->out = pipes.child[1];
  child->error = pipes.child[2];
  process->pid = spawn(agent, child, process->cgroup, flags, pids, err);
  pipes_close(pipes.child);
  if (process->pid < 0) {
    process->pid = 0;
    pipes_close(pipes.ours);
    return -1;
  }
  fcntl(ours, F_SETFL, O_NONBLOCK);
  process->sync = (struct watch){ .fd = take_fd(&ours), .ready = process_sync_ready };
  watch_add(agent, &process->sync, EPOLLIN);
  if (!child->terminal)
    adopt_pipes(agent, process, &pipes);
  return 0;
}

/* -------------------------------------------------------------------------------------------------------------- create */
struct making {
  struct container *container;
  char *text;
  struct json_doc doc;
};

static bool id_is_valid(const char *id)
{
  size_t size = strlen(id);
  if (!size || size >= ID_MOST || !isalnum((unsigned char)*id))
    return false;
  for (; *id; id++)
    if (!isalnum((unsigned char)*id) && !strchr("_.-", *id))
      return false;
  return true;
}

static void container_free(struct agent *agent, struct container *container)
{
  for (struct container **at = &agent->containers; *at; at = &(*at)->next)
    if (*at == container) {
      *at = container->next;
      break;
    }
  for (struct stream *stream = agent->streams, *next; stream; stream = next) {
    next = stream->next;
    if (stream->container == container)
      stream_reset(agent, stream, "the container was deleted");
  }
  while (container->commands) {
    struct process *process = container->commands;
    process->exited = true;
    command_forget(agent, process);
  }
  process_close(agent, &container->first);
  output_free(&container->output);
  free(container->seccomp);
  free(container);
}

static int namespace_flags(struct agent *agent, const struct json *spec, struct child *child, uint64_t *flags, int *pids,
                           struct err *err)
{
  static const struct {
    const char *type;
    uint64_t flag;
  } KINDS[] = { { "mount", CLONE_NEWNS }, { "pid", CLONE_NEWPID }, { "ipc", CLONE_NEWIPC }, { "uts", CLONE_NEWUTS } };
  *flags = CLONE_NEWNS;
  for (const struct json *item = json_list(json_get(spec, "linux"), "namespaces"); item; item = item->next) {
    const char *type = json_string(item, "type", ""), *path = json_string(item, "path", "");
    bool known = false;
    if (strcmp(type, "cgroup") == 0 && !*path) {
      child->own_cgroup_ns = true;
      continue;
    }
    pid_t holder = agent->holder;
    if (strncmp(path, "container:", 10) == 0) {
      const struct container *other = container_find(agent, path + 10);
      if (!other || other->status == EXITED || !other->first.pid)
        return err_set(err, ERR_STATE, "the container whose processes are to be seen does not run");
      holder = other->first.pid;
    } else if (*path && strcmp(path, "pod") != 0) {
      return err_set(err, ERR_INVALID, "%.100s names no namespace", path);
    }
    if (*path && !holder)
      return err_set(err, ERR_STATE, "the pod was not set up with namespaces of its own");
    if (strcmp(type, "user") == 0 && strcmp(path, "pod") == 0 && agent->holder_has_user) {
      child->has_user = known = true;
      child->join_user = fcntl(agent->holder_user, F_DUPFD_CLOEXEC, 0);
    }
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
      if (strcmp(KINDS[i].type, type) != 0)
        continue;
      known = true;
      if (!*path) {
        *flags |= KINDS[i].flag;
        continue;
      }
      int fd = open_namespace(holder, type, err);
      if (fd < 0)
        return -1;
      if (KINDS[i].flag == CLONE_NEWPID)
        *pids = fd;
      else if (KINDS[i].flag == CLONE_NEWIPC)
        child->join_ipc = fd;
      else if (KINDS[i].flag == CLONE_NEWUTS)
        child->join_uts = fd;
      else
        close(fd);
    }
    if (!known)
      return err_set(err, ERR_UNSUPPORTED, "a container cannot have a %.20s namespace like that", type);
  }
  return 0;
}

static int begin_process(struct agent *agent, struct container *container, const struct json *body, struct err *err)
{
  const struct json *spec = json_get(body, "spec"), *linux = json_get(spec, "linux");
  char rootfs[ID_MOST + 64];
  uint64_t flags;
  cleanup_fd int pids = -1;
  snprintf(rootfs, sizeof rootfs, "%s/rootfs", container->folder);
  struct child child = {
    .spec = spec, .process = json_get(spec, "process"), .rootfs = rootfs, .seccomp = container->seccomp,
    .seccomp_size = container->seccomp_size, .terminal = json_bool(body, "terminal", false), .sync = -1, .in = -1, .out = -1,
    .error = -1, .join = -1, .join_user = -1, .join_ipc = -1, .join_uts = -1,
  };
  if (cgroup_make(container->cgroup, err) < 0 ||
      cgroup_limit(agent, container->cgroup, json_get(linux, "resources"), err) < 0)
    return -1;
  cleanup_fd int leaf = cgroup_open(container->cgroup, err);
  if (leaf < 0 || devices_allow(leaf, linux, err) < 0)
    return -1;
  int done = namespace_flags(agent, spec, &child, &flags, &pids, err);
  container->has_user = child.has_user;
  if (done == 0)
    done = process_start(agent, &container->first, &child, container->wants_stdin, flags, pids, err);
  cleanup_fd unused int user = child.join_user, ipc = child.join_ipc, uts = child.join_uts;
  return done;
}

static int find_disk(const char *serial, char node[64], struct err *err)
{
  char name[32];
  unsigned major, minor;
  if (!disk_find(serial, name, &major, &minor))
    return 0;
  return disk_node(name, major, minor, node, err);
}

static int step_create(struct agent *agent, struct job *job, struct err *err)
{
  struct making *making = job->state;
  struct container *container = making->container;
  const struct json *body = making->doc.root, *rootfs = json_get(body, "rootfs");
  const char *lower = json_string(rootfs, "lower", ""), *upper = json_string(rootfs, "upper", "");
  const char *folder = json_string(rootfs, "folder", "");
  char low[64] = "", up[64] = "";
  if (*folder && !agent->on_host)
    return err_set(err, ERR_UNSUPPORTED, "the root of a container is an image");
  if (!*folder) {
    int found = find_disk(lower, low, err);
    if (found > 0 && *upper)
      found = find_disk(upper, up, err);
    if (found <= 0)
      return found;
  }
  if (mkdir(container->folder, 0700) < 0 && errno != EEXIST)
    return err_errno(err, errno, "cannot make %s", container->folder);
  int user = -1;
  for (const struct json *item = json_list(json_get(json_get(body, "spec"), "linux"), "namespaces"); item; item = item->next)
    if (strcmp(json_string(item, "type", ""), "user") == 0)
      user = agent->holder_user;
  container->has_upper = *upper != 0;
  if (rootfs_mount(container->folder, *folder ? folder : low, *up ? up : NULL, *folder != 0, user, err) < 0 ||
      begin_process(agent, container, body, err) < 0)
    return -1;
  container->first.request = job->request; /* answered when it is ready */
  making->container = NULL;
  return 1;
}

/* Take away what a creation that failed has left. */
static void abandon(struct agent *agent, struct container *container)
{
  rootfs_unmount(container->folder);
  cgroup_remove(container->cgroup);
  container_free(agent, container);
}

static void stop_create(struct agent *agent, struct job *job)
{
  struct making *making = job->state;
  if (making->container)
    abandon(agent, making->container);
  json_free(&making->doc);
  free(making->text);
  free(making);
}

HANDLER(command_create)
{
  const char *id = json_string(request->body, "id", "");
  (void)reply;
  if (!id_is_valid(id))
    return err_set(err, ERR_INVALID, "%.70s is no id of a container", id);
  if (container_find(agent, id))
    return err_set(err, ERR_EXISTS, "there is a container with this id already");
  if (agent->closing)
    return err_set(err, ERR_STATE, "the guest is being switched off");
  struct container *container = must_alloc(sizeof *container);
  struct making *making = must_alloc(sizeof *making);
  process_begin(&container->first, container);
  container->first.is_first = container->is_making = true;
  snprintf(container->id, sizeof container->id, "%s", id);
  snprintf(container->folder, sizeof container->folder, CONTAINERS_FOLDER "/%s", id);
  snprintf(container->cgroup, sizeof container->cgroup, "pod/%s", id);
  snprintf(container->first.cgroup, sizeof container->first.cgroup, "%s", container->cgroup);
  container->wants_stdin = json_bool(request->body, "stdin", false);
  container->stdin_once = json_bool(request->body, "stdin_once", false);
  container->seccomp = must_alloc(request->blob_size);
  container->seccomp_size = request->blob_size;
  memcpy(container->seccomp, request->blob, request->blob_size);
  container->next = agent->containers;
  agent->containers = container;
  making->container = container;
  making->text = must_alloc(request->text_size);
  memcpy(making->text, request->text, request->text_size);
  struct err ignored;
  json_parse(&making->doc, making->text, request->text_size, &ignored); /* it was read before */
  job_add(agent, request->id, "waiting for a disk", DISK_WAIT_NS, step_create, stop_create, making);
  return 1;
}

/* ------------------------------------------------------------------------------------------- what new processes tell */
/* Told when the process is gone, and the container with it: the same id can be used again at once. */
static void creation_failed(struct container *container, const struct err *err)
{
  container->failure = *err;
  container->is_deleting = true;
}

static void executed(struct agent *agent, struct process *process)
{
  struct container *container = process->container;
  uint32_t request = process->request;
  if (process->is_first) {
    if (container->start_failed)
      return; /* answered with the exit */
    container->status = RUNNING;
    container->started_ns = now_ns();
    process->request = 0;
    reply_state(agent, request, container);
    return;
  }
  struct buffer body = { 0 };
  buffer_format(&body, "{\"pid\":%d}", process->pid);
  link_reply(agent, request, &body);
  buffer_free(&body);
  process->request = 0;
}

static void not_executed(struct agent *agent, struct process *process, const struct err *err)
{
  struct container *container = process->container;
  if (process->is_first && !container->is_making) {
    container->start_failed = true;
    snprintf(container->message, sizeof container->message, "%.190s", err->text);
  } else if (process->is_first) {
    creation_failed(container, err);
  } else {
    link_reply_error(agent, process->request, err);
    process->request = 0;
    if (process->stream)
      stream_close(agent, process->stream);
  }
}

static int receive(int sync, char *text, size_t size, int *fd)
{
  char control[CMSG_SPACE(sizeof *fd)];
  struct iovec into = { .iov_base = text, .iov_len = size - 1 };
  struct msghdr message = { .msg_iov = &into, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
  ssize_t got = recvmsg(sync, &message, MSG_CMSG_CLOEXEC);
  const struct cmsghdr *header = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
  if (header && header->cmsg_type == SCM_RIGHTS)
    memcpy(fd, CMSG_DATA(header), sizeof *fd);
  if (got >= 0)
    text[got] = 0;
  return (int)got;
}

static void hear(struct agent *agent, struct process *process)
{
  struct container *container = process->container;
  while (process->sync.fd >= 0) {
    char text[512];
    int fd = -1, got = receive(process->sync.fd, text, sizeof text, &fd);
    if (got < 0)
      return;
    if (got == 0) { /* closed: by an execve(2) that worked, or by the end of the process */
      watch_close(agent, &process->sync);
      if (process->request && !(process->is_first && container->is_making))
        executed(agent, process);
      return;
    }
    struct err err = { .kind = got > 1 ? (enum err_kind)(text[1] - '0') : ERR_FAILED };
    if (err.kind < ERR_INVALID || err.kind > ERR_FAILED)
      err.kind = ERR_FAILED;
    snprintf(err.text, sizeof err.text, "%.390s", got > 2 ? text + 2 : "");
    if (text[0] == WORD_TERMINAL && fd >= 0) {
      adopt_terminal(agent, process, fd);
    } else if (text[0] == WORD_READY && process->is_first) {
      uint32_t request = process->request;
      process->request = 0;
      container->is_making = false;
      reply_state(agent, request, container);
    } else if (text[0] == WORD_ERROR || text[0] == WORD_NOT_EXECUTED) {
      not_executed(agent, process, &err);
    }
  }
}

static void process_sync_ready(struct agent *agent, struct watch *watch, uint32_t events)
{
  (void)events;
  hear(agent, (struct process *)((char *)watch - offsetof(struct process, sync)));
}

HANDLER(command_start)
{
  struct container *container = container_find(agent, json_string(request->body, "id", ""));
  char word = WORD_START;
  if (!container || container->is_making || container->is_deleting)
    return err_set(err, ERR_NOT_FOUND, "there is no such container");
  if (container->status != CREATED) {
    buffer_format(reply, "\"container\":");
    container_state(container, reply);
    return 0;
  }
  if (container->first.request)
    return err_set(err, ERR_STATE, "the container is being started");
  if (container->first.sync.fd < 0 || send(container->first.sync.fd, &word, 1, MSG_NOSIGNAL) < 0)
    return err_errno(err, errno, "the container's process is gone");
  container->first.request = request->id;
  return 1;
}

/* ---------------------------------------------------------------------------------------------------------------- exit */
static void finish(struct agent *agent, struct container *container)
{
  struct buffer body = { 0 };
  process_drain(agent, &container->first);
  process_close(agent, &container->first);
  container->status = EXITED;
  if (container->start_failed)
    container->code = 128;
  container->oom_killed = container->code && cgroup_number(container->cgroup, "memory.events", "oom_kill") > 0;
  if (container->first.request) {
    reply_state(agent, container->first.request, container);
    container->first.request = 0;
  }
  buffer_format(&body, "{\"event\":\"exit\",\"container\":");
  container_state(container, &body);
  buffer_format(&body, "}");
  link_event(agent, &body);
  buffer_free(&body);
}

/* The first process is gone. What else there was goes with it, before anybody hears of the exit. */
static int step_settle(struct agent *agent, struct job *job, struct err *err)
{
  struct container *container = container_find(agent, job->state);
  (void)err;
  if (!container)
    return 1;
  if (!cgroup_is_empty(container->cgroup) && uptime_ns() < job->deadline_ns)
    return 0;
  if (container->is_deleting && container->is_making) {
    uint32_t request = container->first.request;
    struct err failure = container->failure;
    abandon(agent, container);
    link_reply_error(agent, request, &failure);
  } else {
    finish(agent, container);
  }
  return 1;
}

static void stop_settle(struct agent *agent, struct job *job)
{
  (void)agent;
  free(job->state);
}

void process_exited(struct agent *agent, struct process *process)
{
  struct container *container = process->container;
  hear(agent, process); /* its last words came before its end */
  process->exited = true;
  if (!process->is_first) {
    watch_close(agent, &process->sync);
    return; /* streams_pump sends what is left, and the code */
  }
  if (container->is_making && !container->is_deleting) {
    struct err err;
    err_set(&err, ERR_FAILED, "the container's process ended before it was ready");
    creation_failed(container, &err);
  }
  container->code = process->code;
  container->finished_ns = now_ns();
  if (!container->started_ns)
    container->started_ns = container->finished_ns;
  cgroup_kill(container->cgroup);
  job_add(agent, 0, "settling", SETTLE_NS, step_settle, stop_settle, must_strdup(container->id));
}

static struct process *find_process(struct agent *agent, pid_t pid)
{
  for (struct container *container = agent->containers; container; container = container->next) {
    if (container->first.pid == pid && !container->first.exited)
      return &container->first;
    for (struct process *process = container->commands; process; process = process->next)
      if (process->pid == pid && !process->exited)
        return process;
  }
  return NULL;
}

void children_reap(struct agent *agent)
{
  int status;
  pid_t pid;
  while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
    struct process *process = find_process(agent, pid);
    if (pid == agent->holder) {
      say("the holder of the pod's namespaces has ended");
      agent->holder = 0;
    }
    if (!process)
      continue; /* an orphan of somebody's */
    process->code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    process_exited(agent, process);
  }
}

/* ------------------------------------------------------------------------------------------------------------ commands */
void command_forget(struct agent *agent, struct process *process)
{
  for (struct process **at = &process->container->commands; *at; at = &(*at)->next)
    if (*at == process) {
      *at = process->next;
      break;
    }
  if (process->stream)
    process->stream->process = NULL;
  watch_close(agent, &process->sync);
  process_close(agent, process);
  cgroup_remove(process->cgroup); /* fails where it has left something running; gone with the container then */
  free(process);
}

void commands_kill_all(struct agent *agent)
{
  for (struct container *container = agent->containers; container; container = container->next)
    for (struct process *process = container->commands; process; process = process->next)
      if (!process->exited)
        cgroup_kill(process->cgroup);
}

static int start_command(struct agent *agent, struct process *process, const struct request *request, struct err *err)
{
  struct container *container = process->container;
  const struct json *body = request->body;
  struct child child = {
    .process = json_get(body, "process"), .seccomp = container->seccomp, .seccomp_size = container->seccomp_size,
    .terminal = json_bool(body, "terminal", false), .sync = -1, .in = -1, .out = -1, .error = -1, .join_user = -1,
    .join_ipc = -1, .join_uts = -1, .has_user = container->has_user,
  };
  snprintf(process->cgroup, sizeof process->cgroup, "%s/x%u", container->cgroup, ++agent->commands);
  cleanup_fd int first = (int)syscall(SYS_pidfd_open, container->first.pid, 0);
  cleanup_fd int pids = open_namespace(container->first.pid, "pid", err);
  cleanup_fd int user = container->has_user ? fcntl(agent->holder_user, F_DUPFD_CLOEXEC, 0) : -1;
  if (first < 0 || pids < 0)
    return err_set(err, ERR_STATE, "the container's process is gone");
  child.join = first;
  child.join_user = user;
  if (cgroup_make(process->cgroup, err) < 0)
    return -1;
  return process_start(agent, process, &child, json_bool(body, "stdin", false), 0, pids, err);
}

HANDLER(command_exec)
{
  struct container *container = container_find(agent, json_string(request->body, "container", ""));
  (void)reply;
  if (!container)
    return err_set(err, ERR_NOT_FOUND, "there is no such container");
  if (container->status != RUNNING || container->first.exited)
    return err_set(err, ERR_STATE, "the container does not run");
  struct stream *stream = stream_open(agent, request, STREAM_EXEC, err);
  if (!stream)
    return -1;
  struct process *process = must_alloc(sizeof *process);
  process_begin(process, container);
  process->request = request->id;
  process->next = container->commands;
  container->commands = process;
  process->stream = stream;
  stream->process = process;
  if (start_command(agent, process, request, err) < 0) {
    process->exited = true;
    stream_close(agent, stream);
    command_forget(agent, process);
    return -1;
  }
  return 1;
}

static struct process *target(struct agent *agent, const struct json *body, struct err *err)
{
  const struct json *number = json_get(body, "exec");
  if (number) {
    const struct stream *stream = stream_find(agent, (uint32_t)json_number(body, "exec", 0));
    if (!stream || !stream->process) {
      err_set(err, ERR_NOT_FOUND, "there is no such process");
      return NULL;
    }
    return stream->process;
  }
  struct container *container = container_find(agent, json_string(body, "container", ""));
  if (!container || container->is_making) {
    err_set(err, ERR_NOT_FOUND, "there is no such container");
    return NULL;
  }
  return &container->first;
}

HANDLER(command_signal)
{
  int number = (int)json_number(request->body, "signal", 0);
  struct process *process = target(agent, request->body, err);
  (void)reply;
  if (!process)
    return -1;
  if (number <= 0 || number > SIGRTMAX)
    return err_set(err, ERR_INVALID, "there is no signal %d", number);
  if (process->exited || !process->pid)
    return 0;
  if (json_bool(request->body, "all", false) && number == SIGKILL) {
    cgroup_kill(process->cgroup);
  } else if (kill(process->pid, number) < 0 && errno != ESRCH) {
    return err_errno(err, errno, "cannot send the signal %d", number);
  }
  return 0;
}

HANDLER(command_resize)
{
  struct process *process = target(agent, request->body, err);
  struct winsize size = { .ws_row = (unsigned short)json_number(request->body, "height", 0),
                          .ws_col = (unsigned short)json_number(request->body, "width", 0) };
  (void)reply;
  if (!process)
    return -1;
  if (process->terminal >= 0 && ioctl(process->terminal, TIOCSWINSZ, &size) < 0)
    return err_errno(err, errno, "cannot set the size of the terminal");
  return 0;
}

HANDLER(command_containers)
{
  bool any = false;
  (void)request, (void)err;
  buffer_format(reply, "\"containers\":[");
  for (struct container *container = agent->containers; container; container = container->next) {
    if (container->is_making)
      continue;
    if (any)
      buffer_add(reply, ",", 1);
    container_state(container, reply);
    any = true;
  }
  buffer_format(reply, "]");
  return 0;
}

HANDLER(command_update)
{
  const char *id = json_string(request->body, "container", "");
  const struct container *container = container_find(agent, id);
  (void)reply;
  if (*id && (!container || container->is_making))
    return err_set(err, ERR_NOT_FOUND, "there is no such container");
  return cgroup_limit(agent, container ? container->cgroup : "pod", json_get(request->body, "resources"), err);
}

/* -------------------------------------------------------------------------------------------------------------- delete */
static int step_delete(struct agent *agent, struct job *job, struct err *err)
{
  struct container *container = container_find(agent, job->state);
  (void)err;
  if (container) {
    if (!cgroup_is_empty(container->cgroup) || (container->first.pid && !container->first.exited) ||
        (container->first.pid && container->status != EXITED && !container->is_making))
      return 0;
    if (rootfs_unmount(container->folder) < 0 || cgroup_remove(container->cgroup) < 0)
      return 0;
    container_free(agent, container);
  }
  struct buffer body = { 0 };
  buffer_format(&body, "{}");
  link_reply(agent, job->request, &body);
  buffer_free(&body);
  return 1;
}

HANDLER(command_delete)
{
  struct container *container = container_find(agent, json_string(request->body, "id", ""));
  (void)reply;
  if (!container)
    return 0;
  if (container->is_making)
    return err_set(err, ERR_STATE, "the container is being created");
  container->is_deleting = true;
  cgroup_kill(container->cgroup);
  job_add(agent, request->id, "deleting the container", DISK_WAIT_NS, step_delete, stop_settle, must_strdup(container->id));
  return 1;
}
