/* The root of a container: an image that nobody can write, and a layer above it. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>

/* Let the files of a mount appear with the ids of the pod's user namespace. */
static int map_ids(const char *path, int user_ns, struct err *err)
{
  struct mount_attr attr = { .attr_set = MOUNT_ATTR_IDMAP, .userns_fd = (uint64_t)user_ns };
  cleanup_fd int tree = (int)syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
  if (tree < 0 || syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attr, sizeof attr) < 0)
    return err_errno(err, errno, "cannot map the ids of %s", path);
  if (syscall(SYS_move_mount, tree, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH) < 0)
    return err_errno(err, errno, "cannot place %s", path);
  return 0;
}

static int mount_layer(const char *what, const char *path, const char *type, unsigned long flags, const char *options,
                       struct err *err)
{
  if (mkdir(path, 0700) < 0 && errno != EEXIST)
    return err_errno(err, errno, "cannot make %s", path);
  if (mount(what, path, type, flags, options) < 0)
    return err_errno(err, errno, "cannot mount the %s of the container", type ? type : "folder");
  return 0;
}

/* The layer's own folder gets what the image's root has: it is what the container sees as "/". */
static int make_layer(const char *lower, const char *data, const char *work, struct err *err)
{
  struct stat root;
  if (stat(lower, &root) < 0)
    return err_errno(err, errno, "cannot look at the image");
  if ((mkdir(data, 0755) < 0 && errno != EEXIST) || (mkdir(work, 0700) < 0 && errno != EEXIST))
    return err_errno(err, errno, "cannot prepare the writable layer");
  /* The mark of an earlier mount, of a creation that failed later on, would keep this one away. */
  char mark[260];
  snprintf(mark, sizeof mark, "%s/work/incompat/volatile/dirty", work);
  unlink(mark);
  *strrchr(mark, '/') = 0;
  rmdir(mark);
  if (chown(data, root.st_uid, root.st_gid) < 0 || chmod(data, root.st_mode & 07777) < 0)
    return err_errno(err, errno, "cannot prepare the writable layer");
  return 0;
}

int rootfs_mount(const char *folder, const char *lower, const char *upper, bool is_folder, int user_ns, struct err *err)
{
  char low[200], up[200], root[200], data[220], work[220], options[800];
  snprintf(low, sizeof low, "%s/lower", folder);
  snprintf(up, sizeof up, "%s/upper", folder);
  snprintf(root, sizeof root, "%s/rootfs", folder);
  snprintf(data, sizeof data, "%s/data", up);
  snprintf(work, sizeof work, "%s/work", up);
  if (mount_layer(lower, low, is_folder ? NULL : "erofs", is_folder ? MS_BIND : MS_RDONLY, NULL, err) < 0)
    return -1;
  /* Without a disk for it the layer is memory: a place for the mount points that an image lacks. */
  if (mount_layer(upper ? upper : "tmpfs", up, upper ? "ext4" : "tmpfs", MS_NODEV, upper ? "noauto_da_alloc" : "mode=755", err) < 0)
    return -1;
  /* The image alone is mapped: what is written is owned by the ids of the pod. */
  if (user_ns >= 0 && map_ids(low, user_ns, err) < 0)
    return -1;
  if (make_layer(low, data, work, err) < 0)
    return -1;
  /* volatile: the layer ends with the container; nothing in it has to survive a crash of the guest. */
  snprintf(options, sizeof options, "lowerdir=%s,upperdir=%s,workdir=%s,volatile", low, data, work);
  return mount_layer("overlay", root, "overlay", 0, options, err);
}

int rootfs_unmount(const char *folder)
{
  static const char *const PARTS[] = { "rootfs", "upper", "lower" };
  char path[200];
  for (int i = 0; i < 3; i++) {
    snprintf(path, sizeof path, "%s/%s", folder, PARTS[i]);
    while (umount2(path, 0) == 0)
      ;
    if (errno == EBUSY)
      return -1;
    rmdir(path);
  }
  rmdir(folder);
  return 0;
}
