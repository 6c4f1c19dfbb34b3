/* The loop, and how it begins: as process 1 of a guest, or, in tests, of fresh namespaces on a host. */
#include "agent.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>

#define IDLE_MS 1000 /* an edge of the port that was missed costs at most this */
#define JOB_MS 4

void watch_change(struct agent *agent, struct watch *watch, uint32_t events)
{
  struct epoll_event event = { .events = events, .data.ptr = watch };
  if (watch->fd < 0 || watch->events == events)
    return;
  int act = !events ? EPOLL_CTL_DEL : watch->events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
  if (epoll_ctl(agent->epoll, act, watch->fd, &event) < 0)
    say("cannot watch a descriptor: %s", strerror(errno));
  watch->events = events;
}

void watch_add(struct agent *agent, struct watch *watch, uint32_t events)
{
  watch->events = 0;
  watch_change(agent, watch, events);
}

void watch_close(struct agent *agent, struct watch *watch)
{
  if (watch->fd < 0)
    return;
  watch_change(agent, watch, 0);
  close(watch->fd);
  watch->fd = -1;
}

struct job *job_add(struct agent *agent, uint32_t request, const char *what, uint64_t wait_ns,
                    int (*step)(struct agent *, struct job *, struct err *), void (*stop)(struct agent *, struct job *),
                    void *state)
{
  struct job *job = must_alloc(sizeof *job);
  *job = (struct job){ .request = request, .what = what, .deadline_ns = uptime_ns() + wait_ns, .step = step, .stop = stop,
                       .state = state, .next = agent->jobs };
  agent->jobs = job;
  return job;
}

static void step_jobs(struct agent *agent)
{
  for (struct job *job = agent->jobs; job; job = job->next) {
    struct err err = { 0 };
    int done = job->done ? 1 : job->step(agent, job, &err);
    if (done == 0 && uptime_ns() > job->deadline_ns)
      done = err_set(&err, ERR_FAILED, "%s took too long", job->what);
    if (done < 0)
      link_reply_error(agent, job->request, &err);
    job->done = done != 0;
  }
  for (struct job **at = &agent->jobs; *at;) {
    struct job *job = *at;
    if (!job->done) {
      at = &job->next;
      continue;
    }
    *at = job->next;
    if (job->stop)
      job->stop(agent, job);
    free(job);
  }
}

static int pause_ms(const struct agent *agent)
{
  int pause = agent->link.edge ? IDLE_MS : -1;
  for (const struct job *job = agent->jobs; job; job = job->next)
    if (!job->passive)
      return JOB_MS;
    else
      pause = IDLE_MS;
  return pause;
}

static void signals_ready(struct agent *agent, struct watch *watch, uint32_t events)
{
  struct signalfd_siginfo info;
  (void)events;
  while (read(watch->fd, &info, sizeof info) == sizeof info)
    ;
  children_reap(agent);
}

static _Noreturn void loop(struct agent *agent)
{
  for (;;) {
    struct epoll_event events[64];
    int count = epoll_wait(agent->epoll, events, 64, pause_ms(agent));
    for (int i = 0; i < count; i++) {
      struct watch *watch = events[i].data.ptr;
      if (watch->fd >= 0 && watch->events)
        watch->ready(agent, watch, events[i].events);
    }
    if (count <= 0 && agent->link.edge && agent->link.watch.fd >= 0)
      agent->link.watch.ready(agent, &agent->link.watch, EPOLLIN);
    step_jobs(agent);
    bool moved = true;
    while (moved && agent->link.queue.size == agent->link.queue_start) {
      moved = streams_pump(agent);
      link_flush(agent);
    }
    link_flush(agent);
  }
}

static int begin(struct agent *agent, const char *root, const char *socket_path, struct err *err)
{
  sigset_t blocked;
  struct rlimit files = { AGENT_FILES, 1048576 };
  if (setrlimit(RLIMIT_NOFILE, &files) < 0 && getrlimit(RLIMIT_NOFILE, &files) == 0) {
    files.rlim_cur = files.rlim_max < AGENT_FILES ? files.rlim_max : AGENT_FILES;
    if (setrlimit(RLIMIT_NOFILE, &files) < 0)
      return err_errno(err, errno, "cannot raise the limit of open files");
  }
  sigfillset(&blocked);
  sigprocmask(SIG_SETMASK, &blocked, NULL);
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGCHLD);
  agent->epoll = epoll_create1(EPOLL_CLOEXEC);
  agent->signals = (struct watch){ .fd = signalfd(-1, &blocked, SFD_CLOEXEC | SFD_NONBLOCK), .ready = signals_ready };
  if (agent->epoll < 0 || agent->signals.fd < 0)
    return err_errno(err, errno, "cannot make the loop");
  watch_add(agent, &agent->signals, EPOLLIN);
  if (socket_path && link_open(agent, socket_path, err) < 0) /* the path is the host's: before the root changes */
    return -1;
  if (boot(agent, root, err) < 0)
    return -1;
  return socket_path ? 0 : link_open(agent, NULL, err);
}

int main(int argc, char **argv)
{
  static const struct option OPTIONS[] = {
    { "socket", required_argument, NULL, 's' }, { "root", required_argument, NULL, 'r' }, { 0 }
  };
  const char *socket_path = NULL, *root = "/";
  struct agent agent = { .holder_user = -1, .pids = -1, .link.watch.fd = -1, .link.listener.fd = -1 };
  struct err err;
  int option;
  opterr = 0; /* the kernel gives process 1 whatever it does not know itself */
  while ((option = getopt_long(argc, argv, "", OPTIONS, NULL)) != -1) {
    if (option == 's')
      socket_path = optarg;
    else if (option == 'r')
      root = optarg;
  }
  agent.on_host = socket_path != NULL;
  if (getpid() != 1) {
    fprintf(stderr, "agent: this is process 1 of a guest\n");
    return 2;
  }
  if (begin(&agent, root, socket_path, &err) < 0) {
    say("%s", err.text);
    return 1; /* in a guest the kernel panics, and the virtual machine ends */
  }
  loop(&agent);
}
