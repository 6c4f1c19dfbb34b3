/* Volumes: disks by serial number, tmpfs, and the one 9p export of the pod. Each at VOLUMES_FOLDER/NAME. */
#include "agent.h"

#include <errno.h>
#include <sys/mount.h>
#include <sys/stat.h>

struct wanted {
  char name[NAME_MOST + 1], serial[64], filesystem[16], options[128];
  bool read_only, has_owner;
  mode_t mode;
  uid_t uid;
  gid_t gid;
};

static struct volume **find(struct agent *agent, const char *name)
{
  struct volume **at = &agent->volumes;
  while (*at && strcmp((*at)->name, name) != 0)
    at = &(*at)->next;
  return at;
}

static void remember(struct agent *agent, const char *name)
{
  struct volume *volume = must_alloc(sizeof *volume);
  snprintf(volume->name, sizeof volume->name, "%s", name);
  volume->next = agent->volumes;
  agent->volumes = volume;
}

static int make_target(const char *name, char path[128], struct err *err)
{
  snprintf(path, 128, VOLUMES_FOLDER "/%s", name);
  if (mkdir(path, 0755) < 0 && errno != EEXIST)
    return err_errno(err, errno, "cannot make %s", path);
  return 0;
}

static int step_disk(struct agent *agent, struct job *job, struct err *err)
{
  const struct wanted *wanted = job->state;
  char name[32], node[64], path[128];
  unsigned major, minor;
  if (!disk_find(wanted->serial, name, &major, &minor))
    return 0;
  int ready = disk_node(name, major, minor, node, err);
  if (ready <= 0)
    return ready;
  if (make_target(wanted->name, path, err) < 0)
    return -1;
  unsigned long flags = MS_NODEV | (wanted->read_only ? MS_RDONLY : 0);
  if (mount(node, path, wanted->filesystem, flags, wanted->options) < 0)
    return err_errno(err, errno, "cannot mount the %s file system of disk %s", wanted->filesystem, wanted->serial);
  if (wanted->has_owner && (chown(path, wanted->uid, wanted->gid) < 0 || chmod(path, wanted->mode) < 0))
    return err_errno(err, errno, "cannot give the root of disk %s its owner", wanted->serial);
  remember(agent, wanted->name);
  struct buffer body = { 0 };
  buffer_format(&body, "{}");
  link_reply(agent, job->request, &body);
  buffer_free(&body);
  return 1;
}

static void stop_disk(struct agent *agent, struct job *job)
{
  (void)agent;
  free(job->state);
}

static int mount_disk(struct agent *agent, const struct request *request, const char *name, struct err *err)
{
  static const char *const KNOWN[] = { "ext4", "erofs", "xfs", "btrfs" };
  const char *filesystem = json_string(request->body, "filesystem", "ext4");
  for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++)
    if (strcmp(filesystem, KNOWN[i]) == 0) {
      struct wanted *wanted = must_alloc(sizeof *wanted);
      snprintf(wanted->name, sizeof wanted->name, "%s", name);
      snprintf(wanted->serial, sizeof wanted->serial, "%s", json_string(request->body, "serial", ""));
      snprintf(wanted->filesystem, sizeof wanted->filesystem, "%s", filesystem);
      snprintf(wanted->options, sizeof wanted->options, "%s", json_string(request->body, "options", ""));
      wanted->read_only = json_bool(request->body, "read_only", false);
      wanted->has_owner = json_get(request->body, "mode") && !wanted->read_only;
      wanted->mode = (mode_t)json_number(request->body, "mode", 0755) & 07777;
      wanted->uid = (uid_t)json_number(request->body, "uid", 0);
      wanted->gid = (gid_t)json_number(request->body, "gid", 0);
      job_add(agent, request->id, "waiting for a disk", DISK_WAIT_NS, step_disk, stop_disk, wanted);
      return 1;
    }
  return err_set(err, ERR_UNSUPPORTED, "the guest mounts no file system of type %.20s", filesystem);
}

static int mount_tmpfs(const struct request *request, const char *path, struct err *err)
{
  char options[128], size[40] = "";
  long long bytes = (long long)json_number(request->body, "size", 0);
  if (bytes > 0)
    snprintf(size, sizeof size, ",size=%lld", bytes);
  snprintf(options, sizeof options, "mode=%o,uid=%u,gid=%u%s", (unsigned)json_number(request->body, "mode", 01777) & 07777,
           (unsigned)json_number(request->body, "uid", 0), (unsigned)json_number(request->body, "gid", 0), size);
  if (mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, options) < 0)
    return err_errno(err, errno, "cannot mount a tmpfs");
  return 0;
}

static int mount_share(struct agent *agent, const struct request *request, struct err *err)
{
  const char *tag = json_string(request->body, "tag", "");
  const char *source = agent->on_host ? "tmpfs" : tag, *type = agent->on_host ? "tmpfs" : "9p";
  const char *options = agent->on_host ? "" : "trans=virtio,version=9p2000.L,msize=131072,access=client,posixacl";
  if (mount(source, SHARE_FOLDER, type, MS_NODEV, options) < 0)
    return err_errno(err, errno, "cannot mount the export %.40s", tag);
  return 0;
}

HANDLER(command_mount)
{
  const char *name = json_string(request->body, "name", ""), *kind = json_string(request->body, "kind", "");
  char path[128];
  (void)reply;
  if (!name_is_valid(name))
    return err_set(err, ERR_INVALID, "%.70s is no name of a volume", name);
  if (*find(agent, name))
    return 0;
  if (strcmp(kind, "disk") == 0)
    return mount_disk(agent, request, name, err);
  if (strcmp(kind, "share") == 0) {
    if (mount_share(agent, request, err) < 0)
      return -1;
  } else if (strcmp(kind, "tmpfs") == 0) {
    if (make_target(name, path, err) < 0 || mount_tmpfs(request, path, err) < 0)
      return -1;
  } else {
    return err_set(err, ERR_INVALID, "%.20s is no kind of volume", kind);
  }
  remember(agent, name);
  return 0;
}

HANDLER(command_unmount)
{
  const char *name = json_string(request->body, "name", "");
  char path[128];
  struct volume **at = find(agent, name), *volume = *at;
  (void)reply;
  if (!volume)
    return 0;
  snprintf(path, sizeof path, strcmp(name, "share") == 0 ? SHARE_FOLDER : VOLUMES_FOLDER "/%s", name);
  if (umount2(path, 0) < 0 && errno != EINVAL) {
    bool busy = errno == EBUSY;
    err_errno(err, errno, "cannot unmount the volume %s", name);
    if (busy)
      err->kind = ERR_STATE;
    return -1;
  }
  if (strcmp(name, "share") != 0)
    rmdir(path);
  *at = volume->next;
  free(volume);
  return 0;
}
