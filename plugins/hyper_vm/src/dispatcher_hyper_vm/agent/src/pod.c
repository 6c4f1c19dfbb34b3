/* What holds for the pod as a whole: its setup in one message, processors, memory, the end. */
#include "agent.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#define CPUS_FOLDER "/sys/devices/system/cpu"

static int set_clock(int64_t time_ns, struct err *err)
{
  struct timespec now = { .tv_sec = time_ns / 1000000000, .tv_nsec = time_ns % 1000000000 };
  if (time_ns > 0 && clock_settime(CLOCK_REALTIME, &now) < 0)
    return err_errno(err, errno, "cannot set the clock");
  return 0;
}

/* Clones of a template share the state of their random generator: credit fresh bytes, and have it start from them. */
static int add_entropy(const char *data, size_t size, struct err *err)
{
  if (!size)
    return 0;
  if (size > 4096)
    return err_set(err, ERR_INVALID, "that is too much entropy");
  cleanup_free struct rand_pool_info *info = must_alloc(sizeof *info + size);
  info->entropy_count = (int)size * 8;
  info->buf_size = (int)size;
  memcpy(info->buf, data, size);
  cleanup_fd int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
  if (fd < 0 || ioctl(fd, RNDADDENTROPY, info) < 0 || ioctl(fd, RNDRESEEDCRNG) < 0)
    return err_errno(err, errno, "cannot seed the random generator");
  return 0;
}

static int set_sysctls(const struct json *sysctls, struct err *err)
{
  for (const struct json *item = sysctls ? sysctls->first : NULL; item; item = item->next) {
    char path[256] = "/proc/sys/";
    size_t at = strlen(path);
    if (item->type != JSON_STRING || strlen(item->key) > 200 || strstr(item->key, ".."))
      return err_set(err, ERR_INVALID, "%.60s is no sysctl", item->key);
    /* As sysctl(8) has it: whichever of "." and "/" comes first separates, and the other is part of a name. */
    char separator = item->key[strcspn(item->key, "./")];
    for (const char *c = item->key; *c; c++)
      path[at++] = separator == '.' && *c == '.' ? '/' : separator == '.' && *c == '/' ? '.' : *c;
    path[at] = 0;
    if (write_file(AT_FDCWD, path, item->string, err) < 0)
      return -1;
  }
  return 0;
}

static int set_names(const struct json *setup, struct err *err)
{
  const char *name = json_string(setup, "hostname", ""), *machine = json_string(setup, "machine_id", "");
  if (*name && sethostname(name, strlen(name)) < 0)
    return err_errno(err, errno, "cannot set the host name");
  if (*machine) {
    cleanup_fd int fd = open(POD_FOLDER "/machine-id", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0444);
    if (fd < 0 || dprintf(fd, "%s\n", machine) < 0)
      return err_errno(err, errno, "cannot write the machine id");
  }
  return 0;
}

static int mount_shm(struct agent *agent, int64_t size, struct err *err)
{
  char options[64];
  snprintf(options, sizeof options, "mode=1777,size=%lld", (long long)size);
  unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
  if (mount("shm", SHM_FOLDER, "tmpfs", flags | (agent->prepared ? MS_REMOUNT : 0), options) < 0)
    return err_errno(err, errno, "cannot mount the shared memory");
  return 0;
}

/* ------------------------------------------------------------------------------------------------ the pod's namespaces */
/* The first process of the pod's process namespace: reaps what loses its parent, and waits for ever. */
static _Noreturn void hold(int ready)
{
  sigset_t all;
  sigfillset(&all);
  prctl(PR_SET_NAME, "pod");
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  setsid();
  char go;
  if (read(ready, &go, 1) < 0) /* closed once our ids are mapped */
    _exit(1);
  close_range(0, ~0u, 0);
  for (;;) {
    while (waitpid(-1, NULL, WNOHANG) > 0)
      ;
    siginfo_t info;
    sigwaitinfo(&all, &info);
  }
}

static int write_mappings(pid_t pid, const char *file, const struct json *list, struct err *err)
{
  char path[64];
  struct buffer text = { 0 };
  for (; list; list = list->next) {
    const struct json *from = list->first, *to = from ? from->next : NULL, *size = to ? to->next : NULL;
    if (!size)
      return err_set(err, ERR_INVALID, "an id mapping has three numbers");
    buffer_format(&text, "%lld %lld %lld\n", (long long)from->number, (long long)to->number, (long long)size->number);
  }
  buffer_add(&text, "", 1);
  snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
  int done = write_file(AT_FDCWD, path, text.data, err);
  buffer_free(&text);
  return done;
}

static int start_holder(struct agent *agent, const struct json *setup, struct err *err)
{
  bool pids = json_bool(setup, "pod_pid", false), user = json_list(setup, "uid_mappings") != NULL;
  int ready[2];
  if (agent->holder || (!pids && !user))
    return 0;
  if (pipe2(ready, O_CLOEXEC) < 0)
    return err_errno(err, errno, "cannot make the pod's namespaces");
  cleanup_fd int from = ready[0], to = ready[1];
  struct clone_args args = {
    .flags = (pids ? CLONE_NEWPID : 0) | (user ? CLONE_NEWUSER | CLONE_NEWIPC | CLONE_NEWUTS : 0), .exit_signal = SIGCHLD };
  pid_t pid = (pid_t)syscall(SYS_clone3, &args, sizeof args);
  if (pid < 0)
    return err_errno(err, errno, "cannot make the pod's namespaces");
  if (pid == 0) {
    close(to);
    hold(from);
  }
  agent->holder = pid;
  agent->holder_has_pids = pids;
  agent->holder_has_user = user;
  if (!user)
    return 0;
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/ns/user", pid);
  agent->holder_user = open(path, O_RDONLY | O_CLOEXEC);
  if (agent->holder_user < 0)
    return err_errno(err, errno, "cannot open the pod's user namespace");
  if (write_mappings(pid, "uid_map", json_list(setup, "uid_mappings"), err) < 0)
    return -1;
  return write_mappings(pid, "gid_map", json_list(setup, "gid_mappings"), err);
}

HANDLER(command_setup)
{
  const struct json *setup = request->body;
  (void)reply;
  if (add_entropy(request->blob, request->blob_size, err) < 0 ||
      (!agent->on_host && set_clock(json_number(setup, "time_ns", 0), err) < 0) ||
      set_names(setup, err) < 0 || network_setup(agent, setup, err) < 0 ||
      set_sysctls(json_get(setup, "sysctls"), err) < 0 ||
      mount_shm(agent, json_number(setup, "shm_bytes", 64 << 20), err) < 0 ||
      cgroup_limit(agent, "pod", json_get(setup, "resources"), err) < 0 || start_holder(agent, setup, err) < 0)
    return -1;
  agent->prepared = true;
  return 0;
}

/* ------------------------------------------------------------------------------------------------- processors, memory */
static bool set_online(int cpu, bool online)
{
  char path[100];
  struct err err;
  snprintf(path, sizeof path, CPUS_FOLDER "/cpu%d/online", cpu);
  if (access(path, F_OK) < 0)
    return online && cpu == 0; /* the first one cannot be switched off */
  return write_file(AT_FDCWD, path, online ? "1" : "0", &err) == 0;
}

HANDLER(command_online)
{
  int64_t wanted = json_number(request->body, "cpus", 1);
  struct err ignored;
  char path[64];
  if (wanted < 1)
    return err_set(err, ERR_INVALID, "a guest has one processor at least");
  snprintf(path, sizeof path, CPUS_FOLDER "/cpu0");
  for (int cpu = 0; access(path, F_OK) == 0; snprintf(path, sizeof path, CPUS_FOLDER "/cpu%d", ++cpu))
    set_online(cpu, cpu < wanted);
  /* Memory that is plugged in from now on comes online by itself, and can be taken away again. */
  if (write_file(AT_FDCWD, "/sys/devices/system/memory/auto_online_blocks", "online_movable", &ignored) < 0 && agent->on_host)
    say("this kernel plugs no memory");
  buffer_format(reply, "\"cpus\":%ld", sysconf(_SC_NPROCESSORS_ONLN));
  return 0;
}

HANDLER(command_release_memory)
{
  struct err ignored;
  (void)request, (void)reply, (void)err;
  sync();
  if (!agent->on_host && write_file(AT_FDCWD, "/proc/sys/vm/drop_caches", "3", &ignored) < 0)
    say("%s", ignored.text);
  return 0;
}

HANDLER(command_power_off)
{
  (void)request, (void)reply;
  agent->closing = true;
  cgroup_kill("pod");
  for (int i = 0; i < 500 && !cgroup_is_empty("pod"); i++) {
    while (waitpid(-1, NULL, WNOHANG) > 0)
      ;
    usleep(2000);
  }
  sync();
  for (struct volume *volume = agent->volumes; volume; volume = volume->next) {
    char path[128];
    snprintf(path, sizeof path, VOLUMES_FOLDER "/%s", volume->name);
    umount2(path, 0);
  }
  for (struct container *container = agent->containers; container; container = container->next) {
    char path[300];
    snprintf(path, sizeof path, "%s/rootfs", container->folder);
    umount2(path, 0);
    snprintf(path, sizeof path, "%s/upper", container->folder);
    umount2(path, 0);
  }
  sync();
  reboot(RB_POWER_OFF);
  return err_errno(err, errno, "cannot switch off");
}
