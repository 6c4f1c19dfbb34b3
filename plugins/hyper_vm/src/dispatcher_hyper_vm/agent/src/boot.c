/* From a bare initramfs to a place where containers can be made. */
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#define MODULES_LIST "/lib/modules/load"
#define PORT_NAME "dispatcher.agent"
#define PORT_WAIT_NS (20ull * 1000000000)

static int mount_at(const char *type, const char *target, unsigned long flags, const char *options, struct err *err)
{
  mkdir(target, 0755);
  if (mount(type, target, type, flags, options) < 0 && errno != EBUSY)
    return err_errno(err, errno, "cannot mount %s", target);
  return 0;
}

/* pivot_root(2) wants the root to be a mount, which an initramfs is not: make it one. */
static int own_root(const char *root, struct err *err)
{
  if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 && errno != EINVAL)
    return err_errno(err, errno, "cannot make the root private");
  /* What is mounted on "/" itself cannot be seen from within: it needs another place to begin with. */
  const char *place = strcmp(root, "/") == 0 ? "/run" : root;
  if (mount(root, place, NULL, MS_BIND | MS_REC, NULL) < 0 || chdir(place) < 0)
    return err_errno(err, errno, "cannot bind the root");
  if (mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
    return err_errno(err, errno, "cannot move the root");
  return 0;
}

static int load_module(const char *path, struct err *err)
{
  cleanup_fd int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    return err_errno(err, errno, "cannot open %s", path);
  if (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)
    return err_errno(err, errno, "cannot load %s", path);
  return 0;
}

/* One path a line. A module that this kernel or machine has no use for is no reason to stop. */
static void load_modules(void)
{
  struct err err;
  cleanup_free char *list = read_file(AT_FDCWD, MODULES_LIST, 64 * 1024, NULL);
  char *rest = list;
  for (char *path; rest && (path = strsep(&rest, "\n"));) {
    if (*path && load_module(path, &err) < 0)
      say("%s", err.text);
    unlink(path); /* an initramfs is memory */
  }
}

static int make_devices(struct err *err)
{
  static const struct {
    const char *path;
    unsigned major, minor;
  } NODES[] = { { "/dev/null", 1, 3 }, { "/dev/random", 1, 8 }, { "/dev/urandom", 1, 9 }, { "/dev/kmsg", 1, 11 } };
  for (size_t i = 0; i < sizeof NODES / sizeof *NODES; i++)
    if (mknod(NODES[i].path, S_IFCHR | 0600, makedev(NODES[i].major, NODES[i].minor)) < 0 && errno != EEXIST)
      return err_errno(err, errno, "cannot make %s", NODES[i].path);
  return 0;
}

static int make_folders(struct err *err)
{
  static const char *const SHARED[] = { POD_FOLDER, CONTAINERS_FOLDER };
  if (mount_at("tmpfs", "/run", MS_NOSUID, "mode=755", err) < 0)
    return -1;
  for (int i = 0; i < 2; i++)
    if (mount_at("tmpfs", SHARED[i], MS_NOSUID, "mode=755", err) < 0)
      return -1;
  /* Mounts of volumes reach containers that ask for it; a container's root is nobody else's business. */
  if (mount(NULL, POD_FOLDER, NULL, MS_SHARED, NULL) < 0)
    return err_errno(err, errno, "cannot share " POD_FOLDER);
  static const char *const FOLDERS[] = { FILES_FOLDER, VOLUMES_FOLDER, SHARE_FOLDER, SHM_FOLDER, "/run/disks" };
  for (size_t i = 0; i < sizeof FOLDERS / sizeof *FOLDERS; i++)
    if (mkdir(FOLDERS[i], 0755) < 0)
      return err_errno(err, errno, "cannot make %s", FOLDERS[i]);
  return 0;
}

int boot(struct agent *agent, const char *root, struct err *err)
{
  umask(022);
  if (own_root(root, err) < 0 || mount_at("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, err) < 0)
    return -1;
  if (mount_at("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, err) < 0)
    return -1;
  if (mount_at(agent->on_host ? "tmpfs" : "devtmpfs", "/dev", MS_NOSUID, "mode=755", err) < 0 || make_devices(err) < 0)
    return -1;
  if (make_folders(err) < 0)
    return -1;
  /* A guest without memory kills what is in containers, never this process. */
  if (write_file(AT_FDCWD, "/proc/self/oom_score_adj", "-1000", err) < 0)
    say("%s", err->text);
  agent->pids = open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC);
  if (!agent->on_host) {
    load_modules();
    if (sethostname("guest", 5) < 0)
      say("cannot set the host name");
  }
  return cgroups_begin(agent, err);
}

/* The device node of our port: the kernel names it by numbers, its name is in sysfs. */
static int open_port(void)
{
  DIR *folder = opendir("/sys/class/virtio-ports");
  int fd = -1;
  for (struct dirent *entry; folder && fd < 0 && (entry = readdir(folder));) {
    char path[300];
    snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
    cleanup_free char *name = entry->d_name[0] == '.' ? NULL : read_file(AT_FDCWD, path, 100, NULL);
    if (!name || strncmp(name, PORT_NAME, sizeof PORT_NAME - 1) != 0)
      continue;
    snprintf(path, sizeof path, "/dev/%s", entry->d_name);
    fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
  }
  if (folder)
    closedir(folder);
  return fd;
}

int port_find(struct err *err)
{
  uint64_t deadline = uptime_ns() + PORT_WAIT_NS;
  for (;;) {
    int fd = open_port();
    if (fd >= 0)
      return fd;
    if (uptime_ns() > deadline)
      return err_set(err, ERR_NOT_FOUND, "there is no virtio-serial port named " PORT_NAME);
    usleep(1000);
  }
}
