/* The file systems of a container, made in its own mount namespace while its root is still a folder of ours.
 *
 * What is in the image and in volumes is hostile: destinations are resolved within the container's root, sources within
 * their volume, both by openat2(2), and mounts are moved onto descriptors, not paths.
 */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

struct options {
  uint64_t set, clear;
  unsigned long propagation;
  bool is_bind, is_recursive, all_read_only;
  char data[1024];
};

static const struct {
  const char *name;
  uint64_t set, clear;
} FLAGS[] = {
  { "ro", MOUNT_ATTR_RDONLY, 0 }, { "rw", 0, MOUNT_ATTR_RDONLY }, { "nosuid", MOUNT_ATTR_NOSUID, 0 },
  { "suid", 0, MOUNT_ATTR_NOSUID }, { "nodev", MOUNT_ATTR_NODEV, 0 }, { "dev", 0, MOUNT_ATTR_NODEV },
  { "noexec", MOUNT_ATTR_NOEXEC, 0 }, { "exec", 0, MOUNT_ATTR_NOEXEC }, { "nodiratime", MOUNT_ATTR_NODIRATIME, 0 },
  { "diratime", 0, MOUNT_ATTR_NODIRATIME }, { "relatime", 0, 0 }, { "defaults", 0, 0 }, { "async", 0, 0 },
  { "noatime", MOUNT_ATTR_NOATIME, MOUNT_ATTR__ATIME }, { "strictatime", MOUNT_ATTR_STRICTATIME, MOUNT_ATTR__ATIME },
  { "nosymfollow", MOUNT_ATTR_NOSYMFOLLOW, 0 },
};

static const struct {
  const char *name;
  unsigned long kind;
} PROPAGATIONS[] = {
  { "private", MS_PRIVATE }, { "rprivate", MS_PRIVATE }, { "slave", MS_SLAVE }, { "rslave", MS_SLAVE },
  { "shared", MS_SHARED }, { "rshared", MS_SHARED }, { "unbindable", MS_UNBINDABLE }, { "runbindable", MS_UNBINDABLE },
};

static unsigned long propagation_of(const char *name)
{
  for (size_t i = 0; i < sizeof PROPAGATIONS / sizeof *PROPAGATIONS; i++)
    if (strcmp(PROPAGATIONS[i].name, name) == 0)
      return PROPAGATIONS[i].kind;
  return 0;
}

static int read_option(struct options *options, const char *word, struct err *err)
{
  for (size_t i = 0; i < sizeof FLAGS / sizeof *FLAGS; i++)
    if (strcmp(FLAGS[i].name, word) == 0) {
      options->set = (options->set & ~FLAGS[i].clear) | FLAGS[i].set;
      options->clear |= FLAGS[i].clear;
      return 0;
    }
  if (propagation_of(word)) {
    options->propagation = propagation_of(word);
  } else if (strcmp(word, "bind") == 0 || strcmp(word, "rbind") == 0) {
    options->is_bind = true;
    options->is_recursive |= *word == 'r';
  } else if (strcmp(word, "rro") == 0) {
    options->set |= MOUNT_ATTR_RDONLY;
    options->all_read_only = true;
  } else {
    size_t used = strlen(options->data);
    if (used + strlen(word) + 2 > sizeof options->data)
      return err_set(err, ERR_INVALID, "the options of a mount are too long");
    snprintf(options->data + used, sizeof options->data - used, "%s%s", used ? "," : "", word);
  }
  return 0;
}

/* ---------------------------------------------------------------------------------------------------------- resolving */
static int open2(int folder, const char *path, int flags, uint64_t resolve)
{
  struct open_how how = { .flags = (uint64_t)flags | O_CLOEXEC, .resolve = resolve };
  return (int)syscall(SYS_openat2, folder, *path ? path : ".", &how, sizeof how);
}

int open_in_root(int root, const char *path, int flags)
{
  return open2(root, path, flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
}

/* Open the last folder of `path` in the root, making what is missing. `last` becomes the name of what is in it. */
static int open_parent(int root, const char *path, const char **last, struct err *err)
{
  char part[4096];
  size_t end = strlen(path);
  while (end && path[end - 1] == '/')
    end--;
  size_t cut = end;
  while (cut && path[cut - 1] != '/')
    cut--;
  if (!end || end >= sizeof part || end - cut > 255)
    return err_set(err, ERR_INVALID, "%.100s is no place for a mount", path);
  *last = path + cut;
  int folder = open_in_root(root, "/", O_PATH | O_DIRECTORY);
  for (size_t at = 0; folder >= 0 && at < cut;) {
    size_t size = strcspn(path + at, "/");
    if (at + size > cut)
      size = cut - at;
    snprintf(part, sizeof part, "%.*s", (int)(at + size), path);
    if (size) {
      int next = open_in_root(root, part, O_PATH | O_DIRECTORY);
      if (next < 0 && errno == ENOENT) {
        snprintf(part, sizeof part, "%.*s", (int)size, path + at);
        if (mkdirat(folder, part, 0755) < 0 && errno != EEXIST) {
          close(folder);
          return err_errno(err, errno, "cannot make the folder %.200s in the container", path);
        }
        snprintf(part, sizeof part, "%.*s", (int)(at + size), path);
        next = open_in_root(root, part, O_PATH | O_DIRECTORY);
      }
      close(folder);
      folder = next;
    }
    at += size + 1;
  }
  if (folder < 0)
    return err_errno(err, errno, "cannot open the folder of %.200s in the container", path);
  return folder;
}

static int open_target(int root, const char *path, bool is_folder, struct err *err)
{
  int target = open_in_root(root, path, O_PATH);
  const char *last;
  char name[256];
  if (target >= 0)
    return target;
  if (errno != ENOENT)
    return err_errno(err, errno, "cannot open %.200s in the container", path);
  cleanup_fd int folder = open_parent(root, path, &last, err);
  if (folder < 0)
    return -1;
  snprintf(name, sizeof name, "%.*s", (int)strcspn(last, "/"), last);
  if (is_folder ? mkdirat(folder, name, 0755) < 0 : mknodat(folder, name, S_IFREG | 0644, 0) < 0)
    return err_errno(err, errno, "cannot make the mount point %.200s in the container", path);
  target = open_in_root(root, path, O_PATH);
  return target < 0 ? err_errno(err, errno, "cannot open %.200s in the container", path) : target;
}

/* Sources are paths of the guest. Within a volume or a set of files no link may lead out of it. */
static int open_source(const char *path, struct err *err)
{
  static const char *const FOLDERS[] = { VOLUMES_FOLDER "/", FILES_FOLDER "/", SHARE_FOLDER "/" };
  uint64_t plain = RESOLVE_NO_SYMLINKS;
  int source = -1;
  for (int i = 0; i < 3; i++) {
    size_t size = strlen(FOLDERS[i]);
    if (strncmp(path, FOLDERS[i], size) != 0)
      continue;
    char whole[256];
    size_t name = strcspn(path + size, "/");
    snprintf(whole, sizeof whole, "%.*s", (int)(size + name), path);
    const char *rest = path + size + name;
    rest += strspn(rest, "/");
    cleanup_fd int folder = open2(AT_FDCWD, whole, O_PATH, plain);
    source = folder < 0 || !*rest ? take_fd(&folder) : open2(folder, rest, O_PATH, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS);
    if (source < 0)
      err_errno(err, errno, "cannot open the source of a mount, %.200s", path);
    if (source < 0 && errno == ENOENT)
      err->kind = ERR_NOT_FOUND;
    return source;
  }
  source = open2(AT_FDCWD, path, O_PATH, plain);
  return source < 0 ? err_errno(err, errno, "cannot open the source of a mount, %.200s", path) : source;
}

/* ------------------------------------------------------------------------------------------------------------- mounts */
static int set_attributes(int mount, const struct options *options, bool all, const char *where, struct err *err)
{
  struct mount_attr attr = { .attr_set = options->set, .attr_clr = options->clear };
  if (options->set & MOUNT_ATTR__ATIME)
    attr.attr_clr |= MOUNT_ATTR__ATIME;
  if (!attr.attr_set && !attr.attr_clr)
    return 0;
  if (syscall(SYS_mount_setattr, mount, "", AT_EMPTY_PATH | (all ? AT_RECURSIVE : 0), &attr, sizeof attr) < 0)
    return err_errno(err, errno, "cannot set the options of the mount at %.200s", where);
  return 0;
}

static int set_propagation(int mount, unsigned long kind, const char *where, struct err *err)
{
  struct mount_attr attr = { .propagation = kind };
  if (syscall(SYS_mount_setattr, mount, "", AT_EMPTY_PATH | AT_RECURSIVE, &attr, sizeof attr) < 0)
    return err_errno(err, errno, "cannot set the propagation of the mount at %.200s", where);
  return 0;
}

static int bind_mount(int root, const char *from, const char *to, const struct options *options, struct err *err)
{
  struct stat what;
  cleanup_fd int source = open_source(from, err);
  if (source < 0)
    return -1;
  unsigned flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | (options->is_recursive ? AT_RECURSIVE : 0);
  cleanup_fd int tree = (int)syscall(SYS_open_tree, source, "", flags);
  if (tree < 0 || fstat(source, &what) < 0)
    return err_errno(err, errno, "cannot bind %.200s", from);
  if (set_attributes(tree, options, options->all_read_only, to, err) < 0 ||
      set_propagation(tree, options->propagation ? options->propagation : MS_PRIVATE, to, err) < 0)
    return -1;
  cleanup_fd int target = open_target(root, to, S_ISDIR(what.st_mode), err);
  if (target < 0)
    return -1;
  if (syscall(SYS_move_mount, tree, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH) < 0)
    return err_errno(err, errno, "cannot mount %.200s at %.200s", from, to);
  return 0;
}

static int type_mount(int root, const char *type, const char *to, const struct options *options, struct err *err)
{
  static const char *const KNOWN[] = { "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup2", "devtmpfs" };
  char place[64];
  bool known = false;
  for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++)
    known |= strcmp(type, KNOWN[i]) == 0;
  if (!known)
    return err_set(err, ERR_UNSUPPORTED, "the agent makes no mounts of type %.30s", type);
  cleanup_fd int target = open_target(root, to, true, err);
  if (target < 0)
    return -1;
  snprintf(place, sizeof place, "/proc/self/fd/%d", target);
  if (mount(type, place, type, 0, options->data) < 0)
    return err_errno(err, errno, "cannot mount %s at %.200s", type, to);
  cleanup_fd int made = open_in_root(root, to, O_PATH);
  if (made < 0)
    return err_errno(err, errno, "cannot open the mount at %.200s", to);
  return set_attributes(made, options, false, to, err);
}

static int make_mount(int root, const struct json *item, struct err *err)
{
  struct options options = { .is_bind = false };
  const char *type = json_string(item, "type", ""), *to = json_string(item, "destination", "");
  for (const struct json *word = json_list(item, "options"); word; word = word->next)
    if (word->type != JSON_STRING || read_option(&options, word->string, err) < 0)
      return err->kind ? -1 : err_set(err, ERR_INVALID, "an option of the mount at %.100s is no text", to);
  if (*to != '/')
    return err_set(err, ERR_INVALID, "%.100s is no absolute path", to);
  if (options.is_bind || strcmp(type, "bind") == 0)
    return bind_mount(root, json_string(item, "source", ""), to, &options, err);
  return type_mount(root, strcmp(type, "cgroup") == 0 ? "cgroup2" : type, to, &options, err);
}

/* ------------------------------------------------------------------------------------------------------------ devices */
static int make_node(int root, const char *path, mode_t mode, unsigned major, unsigned minor, uid_t uid, gid_t gid,
                     struct err *err)
{
  const char *last;
  cleanup_fd int folder = open_parent(root, path, &last, err);
  if (folder < 0)
    return -1;
  if (mknodat(folder, last, mode, makedev(major, minor)) < 0)
    return errno == EEXIST ? 0 : err_errno(err, errno, "cannot make the device %.100s", path);
  if (fchmodat(folder, last, mode & 07777, 0) < 0 || fchownat(folder, last, uid, gid, AT_SYMLINK_NOFOLLOW) < 0)
    return err_errno(err, errno, "cannot make the device %.100s", path);
  return 0;
}

static int make_devices(int root, const struct json *linux, struct err *err)
{
  static const struct {
    const char *path;
    unsigned major, minor;
  } ALWAYS[] = { { "/dev/null", 1, 3 }, { "/dev/zero", 1, 5 }, { "/dev/full", 1, 7 }, { "/dev/random", 1, 8 },
                 { "/dev/urandom", 1, 9 }, { "/dev/tty", 5, 0 } };
  static const char *const LINKS[][2] = { { "/proc/self/fd", "fd" }, { "/proc/self/fd/0", "stdin" },
                                          { "/proc/self/fd/1", "stdout" }, { "/proc/self/fd/2", "stderr" },
                                          { "pts/ptmx", "ptmx" } };
  for (size_t i = 0; i < sizeof ALWAYS / sizeof *ALWAYS; i++)
    if (make_node(root, ALWAYS[i].path, S_IFCHR | 0666, ALWAYS[i].major, ALWAYS[i].minor, 0, 0, err) < 0)
      return -1;
  cleanup_fd int dev = open_in_root(root, "/dev", O_PATH | O_DIRECTORY);
  for (size_t i = 0; i < sizeof LINKS / sizeof *LINKS; i++)
    if (symlinkat(LINKS[i][0], dev, LINKS[i][1]) < 0 && errno != EEXIST)
      return err_errno(err, errno, "cannot make /dev/%s", LINKS[i][1]);
  for (const struct json *item = json_list(linux, "devices"); item; item = item->next) {
    const char *type = json_string(item, "type", "c"), *serial = json_string(item, "serial", NULL);
    unsigned major = (unsigned)json_number(item, "major", 0), minor = (unsigned)json_number(item, "minor", 0);
    char name[32];
    if (serial && !disk_find(serial, name, &major, &minor))
      return err_set(err, ERR_NOT_FOUND, "there is no disk with the serial number %.40s", serial);
    mode_t kind = serial || *type == 'b' ? S_IFBLK : *type == 'p' ? S_IFIFO : S_IFCHR;
    if (make_node(root, json_string(item, "path", ""), kind | ((mode_t)json_number(item, "fileMode", 0666) & 0777), major,
                  minor, (uid_t)json_number(item, "uid", 0), (gid_t)json_number(item, "gid", 0), err) < 0)
      return -1;
  }
  return 0;
}

/* ---------------------------------------------------------------------------------- after the root has become our own */
static int make_read_only(const char *path, struct err *err)
{
  struct mount_attr attr = { .attr_set = MOUNT_ATTR_RDONLY };
  cleanup_fd int tree = (int)syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
  if (tree < 0)
    return errno == ENOENT || errno == ENOTDIR ? 0 : err_errno(err, errno, "cannot open %.100s", path);
  if (syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attr, sizeof attr) < 0 ||
      syscall(SYS_move_mount, tree, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH) < 0)
    return err_errno(err, errno, "cannot make %.100s read-only", path);
  return 0;
}

static int mask(const char *path, struct err *err)
{
  struct stat what;
  if (stat(path, &what) < 0)
    return errno == ENOENT || errno == ENOTDIR ? 0 : err_errno(err, errno, "cannot look at %.100s", path);
  if (S_ISDIR(what.st_mode) ? mount("tmpfs", path, "tmpfs", MS_RDONLY, "size=0k") < 0
                            : mount("/dev/null", path, NULL, MS_BIND, NULL) < 0)
    return err_errno(err, errno, "cannot mask %.100s", path);
  return 0;
}

static int set_sysctls(const struct json *sysctls, struct err *err)
{
  for (const struct json *item = sysctls; item; item = item->next) {
    char path[256];
    int used = snprintf(path, sizeof path, "/proc/sys/%.200s", item->key);
    for (char *c = path + 10; used > 0 && *c; c++)
      if (*c == '.')
        *c = '/';
    if (item->type != JSON_STRING || strstr(path, "//") || write_file(AT_FDCWD, path, item->string, err) < 0)
      return err->kind ? -1 : err_set(err, ERR_INVALID, "%.60s is no sysctl", item->key);
  }
  return 0;
}

static int enter_root(struct err *err)
{
  cleanup_fd int old = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (old < 0 || syscall(SYS_pivot_root, ".", ".") < 0)
    return err_errno(err, errno, "cannot change the root");
  /* Nobody else's mounts may go with the old root, which lies above the new one now. */
  if (fchdir(old) < 0 || mount(NULL, ".", NULL, MS_REC | MS_SLAVE, NULL) < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
    return err_errno(err, errno, "cannot leave the old root");
  return 0;
}

int mounts_make(const struct child *child, struct err *err)
{
  const struct json *linux = json_get(child->spec, "linux"), *item;
  unsigned long propagation = propagation_of(json_string(linux, "rootfsPropagation", ""));
  /* Slaves of the agent's mounts: what it mounts later can be seen, what the container mounts stays its own. */
  bool shared = propagation == MS_SHARED;
  if (mount(NULL, "/", NULL, MS_REC | (shared ? MS_SHARED : MS_SLAVE), NULL) < 0)
    return err_errno(err, errno, "cannot set the propagation of mounts");
  if (mount(NULL, CONTAINERS_FOLDER, NULL, MS_PRIVATE, NULL) < 0 || /* pivot_root(2) refuses a shared parent */
      mount(child->rootfs, child->rootfs, NULL, MS_BIND | MS_REC, NULL) < 0)
    return err_errno(err, errno, "cannot make the container's root a mount");
  cleanup_fd int root = open(child->rootfs, O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (root < 0 || fchdir(root) < 0 || set_propagation(root, MS_PRIVATE, "/", err) < 0)
    return root < 0 ? err_errno(err, errno, "cannot open the container's root") : -1;
  for (item = json_list(child->spec, "mounts"); item; item = item->next)
    if (make_mount(root, item, err) < 0)
      return -1;
  if (make_devices(root, linux, err) < 0 || enter_root(err) < 0)
    return -1;
  if (propagation && mount(NULL, "/", NULL, propagation, NULL) < 0)
    return err_errno(err, errno, "cannot set the propagation of the root");
  if (set_sysctls(json_list(linux, "sysctl"), err) < 0)
    return -1;
  for (item = json_list(linux, "readonlyPaths"); item; item = item->next)
    if (item->type == JSON_STRING && make_read_only(item->string, err) < 0)
      return -1;
  for (item = json_list(linux, "maskedPaths"); item; item = item->next)
    if (item->type == JSON_STRING && mask(item->string, err) < 0)
      return -1;
  cleanup_fd int own = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
  struct options options = { .set = json_bool(json_get(child->spec, "root"), "readonly", false) ? MOUNT_ATTR_RDONLY : 0 };
  return own < 0 ? err_errno(err, errno, "cannot open the root") : set_attributes(own, &options, false, "/", err);
}
