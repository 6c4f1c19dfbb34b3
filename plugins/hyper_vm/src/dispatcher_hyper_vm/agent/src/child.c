/* A new process, from the agent's copy to its own program. Whatever it meets there is hostile: images, volumes, and for
 * an executed command the processes that run beside it already. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <termios.h>

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

static void tell(int sync, enum child_word word, const struct err *err)
{
  char message[sizeof err->text + 2] = { (char)word };
  size_t size = 1;
  if (err) {
    message[1] = (char)('0' + err->kind);
    size = 2 + strlen(err->text);
    memcpy(message + 2, err->text, size - 2);
  }
  if (send(sync, message, size, MSG_NOSIGNAL) < 0)
    _exit(125);
}

static int keep(int *fd, int from)
{
  if (*fd < 0)
    return 0;
  int high = fcntl(*fd, F_DUPFD_CLOEXEC, from);
  if (high >= 0)
    *fd = high;
  return high;
}

/* Nothing of the agent may be seen from within the container: not its memory, not its descriptors. */
static int leave_agent(struct child *child, struct err *err)
{
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
  setsid();
  if (prctl(PR_SET_DUMPABLE, 0) < 0)
    return err_errno(err, errno, "cannot hide from the container");
  int *const kept[] = { &child->sync, &child->in, &child->out, &child->error, &child->join, &child->join_user,
                        &child->join_ipc, &child->join_uts };
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  int high = (int)files.rlim_cur - 64; /* what is kept waits there while all others are closed */
  for (size_t i = 0; i < sizeof kept / sizeof *kept; i++)
    if (keep(kept[i], high) < 0)
      return err_errno(err, errno, "cannot keep a descriptor");
  close_range(3, (unsigned)high - 1, 0);
  char score[16];
  snprintf(score, sizeof score, "%d", (int)json_number(child->process, "oomScoreAdj", 0));
  return write_file(AT_FDCWD, "/proc/self/oom_score_adj", score, err);
}

static int enter_namespaces(const struct child *child, struct err *err)
{
  /* The user namespace comes last, with the credentials: mounts need the rights that we have now. */
  if (child->join >= 0 && setns(child->join, CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP) < 0)
    return err_errno(err, errno, "cannot enter the container");
  if (child->join_ipc >= 0 && setns(child->join_ipc, CLONE_NEWIPC) < 0)
    return err_errno(err, errno, "cannot enter the pod's IPC namespace");
  if (child->join_uts >= 0 && setns(child->join_uts, CLONE_NEWUTS) < 0)
    return err_errno(err, errno, "cannot enter the pod's UTS namespace");
  /* Its root is the cgroup that we are in already. */
  if (child->own_cgroup_ns && unshare(CLONE_NEWCGROUP) < 0)
    return err_errno(err, errno, "cannot make a cgroup namespace");
  const char *name = child->spec ? json_string(child->spec, "hostname", "") : "";
  bool own_uts = false;
  for (const struct json *item = json_list(json_get(child->spec, "linux"), "namespaces"); item; item = item->next)
    own_uts |= strcmp(json_string(item, "type", ""), "uts") == 0 && !json_get(item, "path");
  if (own_uts && *name && sethostname(name, strlen(name)) < 0)
    return err_errno(err, errno, "cannot set the host name");
  return 0;
}

/* ----------------------------------------------------------------------------------------------------------- terminal */
static int send_descriptor(int sync, int fd)
{
  char word = WORD_TERMINAL, control[CMSG_SPACE(sizeof fd)] = { 0 };
  struct iovec text = { .iov_base = &word, .iov_len = 1 };
  struct msghdr message = { .msg_iov = &text, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
  struct cmsghdr *header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof fd);
  memcpy(CMSG_DATA(header), &fd, sizeof fd);
  return sendmsg(sync, &message, MSG_NOSIGNAL) < 0 ? -1 : 0;
}

static int show_console(int slave, struct err *err)
{
  char path[64];
  int number, fd = open("/dev/console", O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (fd >= 0)
    close(fd);
  if (ioctl(slave, TIOCGPTN, &number) < 0)
    return 0;
  snprintf(path, sizeof path, "/dev/pts/%d", number);
  if (mount(path, "/dev/console", NULL, MS_BIND, NULL) < 0)
    return err_errno(err, errno, "cannot make /dev/console");
  return 0;
}

static int open_terminal(struct child *child, struct err *err)
{
  struct stat what;
  int unlocked = 0;
  cleanup_fd int master = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  /* What a running container has put there may be anything. */
  if (master < 0 || fstat(master, &what) < 0 || !S_ISCHR(what.st_mode) || what.st_rdev != makedev(5, 2))
    return err_set(err, ERR_INVALID, "the container has no /dev/pts for a terminal");
  if (ioctl(master, TIOCSPTLCK, &unlocked) < 0)
    return err_errno(err, errno, "cannot unlock the terminal");
  int slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (slave < 0)
    return err_errno(err, errno, "cannot open the terminal");
  uid_t uid = (uid_t)json_number(json_get(child->process, "user"), "uid", 0);
  if (child->join_user < 0 && fchown(slave, uid, (gid_t)-1) < 0)
    return err_errno(err, errno, "cannot give the terminal to the user");
  const struct json *size = json_get(child->process, "consoleSize");
  if (size) {
    struct winsize wanted = { .ws_row = (unsigned short)json_number(size, "height", 0),
                              .ws_col = (unsigned short)json_number(size, "width", 0) };
    ioctl(master, TIOCSWINSZ, &wanted);
  }
  if (child->spec && show_console(master, err) < 0)
    return -1;
  if (send_descriptor(child->sync, master) < 0)
    return err_errno(err, errno, "cannot hand over the terminal");
  if (ioctl(slave, TIOCSCTTY, 0) < 0)
    return err_errno(err, errno, "cannot take the terminal");
  child->in = child->out = child->error = slave;
  return 0;
}

static int place_streams(const struct child *child, struct err *err)
{
  const int from[] = { child->in, child->out, child->error };
  for (int i = 0; i < 3; i++)
    if (dup2(from[i], i) < 0)
      return err_errno(err, errno, "cannot place the standard streams");
  return 0;
}

/* ----------------------------------------------------------------------------------------------------------- the rest */
static int enter_folder(const struct child *child, struct err *err)
{
  char path[4096], part[4096], here[4096];
  snprintf(path, sizeof path, "%s", json_string(child->process, "cwd", "/"));
  if (*path != '/')
    return err_set(err, ERR_INVALID, "the working directory %.100s is not absolute", path);
  if (chdir(path) < 0 && errno == ENOENT && child->spec)
    for (char *slash = path; slash; slash = strchr(slash + 1, '/')) {
      const char *next = strchr(slash + 1, '/');
      snprintf(part, sizeof part, "%.*s", (int)(next ? next - path : (long)strlen(path)), path);
      if (mkdir(part, 0755) < 0 && errno != EEXIST)
        break;
    }
  if (chdir(path) < 0 && errno != EACCES)
    return err_errno(err, errno, "cannot enter the working directory %.200s", path);
  /* A directory outside of the root has no name in it. */
  if (!getcwd(here, sizeof here) || *here != '/')
    return err_set(err, ERR_INVALID, "the working directory %.100s is outside of the container", path);
  return 0;
}

static char **strings(const struct json *list)
{
  size_t count = 0;
  for (const struct json *item = list; item; item = item->next)
    count++;
  char **array = must_alloc((count + 1) * sizeof *array);
  count = 0;
  for (const struct json *item = list; item; item = item->next)
    if (item->type == JSON_STRING)
      array[count++] = must_strdup(item->string);
  return array;
}

static const char *search_path(char **env)
{
  for (; *env; env++)
    if (strncmp(*env, "PATH=", 5) == 0)
      return *env + 5;
  return DEFAULT_PATH;
}

/* Like execvpe(3), with the container's PATH. Returns only on an error, which errno tells. */
static void execute(char **args, char **env)
{
  int found = ENOENT;
  if (strchr(args[0], '/')) {
    execve(args[0], args, env);
    return;
  }
  for (const char *path = search_path(env); *args[0]; path++) {
    char file[4096];
    size_t size = strcspn(path, ":");
    snprintf(file, sizeof file, "%.*s%s%s", (int)size, path, size ? "/" : "", args[0]);
    execve(file, args, env);
    if (errno != ENOENT && errno != ENOTDIR)
      found = errno;
    path += size;
    if (!*path)
      break;
  }
  errno = found;
}

static int prepare(struct child *child, struct err *err)
{
  if (leave_agent(child, err) < 0 || enter_namespaces(child, err) < 0)
    return -1;
  if (child->spec && mounts_make(child, err) < 0)
    return -1;
  if (child->terminal && open_terminal(child, err) < 0)
    return -1;
  if (place_streams(child, err) < 0 || rlimits_set(child->process, err) < 0 || enter_folder(child, err) < 0)
    return -1;
  return credentials_set(child, err);
}

_Noreturn void child_run(struct child *child)
{
  struct err err = { 0 };
  char **args = strings(json_list(child->process, "args")), **env = strings(json_list(child->process, "env"));
  const char *folder = json_string(child->process, "cwd", "/");
  if (!args[0]) {
    err_set(&err, ERR_INVALID, "there is no command");
    tell(child->sync, WORD_ERROR, &err);
    _exit(125);
  }
  if (prepare(child, &err) < 0) {
    tell(child->sync, WORD_ERROR, &err);
    _exit(125);
  }
  if (child->spec) {
    char word;
    tell(child->sync, WORD_READY, NULL);
    if (recv(child->sync, &word, 1, 0) != 1 || word != WORD_START)
      _exit(125);
  }
  if (chdir(folder) < 0) {
    err_errno(&err, errno, "the user cannot enter the working directory %.200s", folder);
  } else {
    execute(args, env);
    err_errno(&err, errno, "exec: \"%.200s\"", args[0]);
  }
  err.kind = ERR_INVALID;
  tell(child->sync, WORD_NOT_EXECUTED, &err);
  _exit(127);
}
