/* Small files from the host: ConfigMaps, Secrets, tokens, hosts, resolv.conf.
 *
 * A set is a folder. An atomic one is laid out as a kubelet does it: the files are in a folder of their own, "..data"
 * is a link to it, and each name is a link through "..data". A change is a new folder and one rename(2) of the link.
 */
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define STAGE "..stage" /* the folder that is being filled */
#define READ_MOST 65536  /* bytes of a file that the host may read */

static int open_below(int folder, const char *path, int flags, mode_t mode)
{
  /* Whatever is in the folder, nothing outside of it is touched. */
  struct open_how how = { .flags = (uint64_t)flags | O_CLOEXEC, .mode = mode, .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS };
  return (int)syscall(SYS_openat2, folder, path, &how, sizeof how);
}

static void remove_tree(int folder, const char *name)
{
  if (unlinkat(folder, name, 0) == 0 || errno == ENOENT)
    return;
  int fd = openat(folder, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  DIR *entries = fd < 0 ? NULL : fdopendir(fd);
  for (struct dirent *entry; entries && (entry = readdir(entries));)
    if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
      remove_tree(dirfd(entries), entry->d_name);
  if (entries)
    closedir(entries);
  unlinkat(folder, name, AT_REMOVEDIR);
}

static bool path_is_valid(const char *path)
{
  size_t size = strlen(path);
  if (!size || size > 1000 || *path == '/' || path[size - 1] == '/')
    return false;
  for (const char *part = path; part;) {
    const char *slash = strchr(part, '/');
    size_t length = slash ? (size_t)(slash - part) : strlen(part);
    if (!length || (length == 1 && *part == '.') || (length >= 2 && part[0] == '.' && part[1] == '.'))
      return false;
    part = slash ? slash + 1 : NULL;
  }
  return true;
}

/* Make what is missing of the folders above `path`, and give them the file's owner. */
static int make_parents(int folder, const char *path, uid_t uid, gid_t gid, struct err *err)
{
  char part[1024];
  for (const char *slash = strchr(path, '/'); slash; slash = strchr(slash + 1, '/')) {
    snprintf(part, sizeof part, "%.*s", (int)(slash - path), path);
    if (mkdirat(folder, part, 0755) == 0) {
      if (fchownat(folder, part, uid, gid, AT_SYMLINK_NOFOLLOW) < 0)
        return err_errno(err, errno, "cannot give away %.100s", part);
    } else if (errno != EEXIST) {
      return err_errno(err, errno, "cannot make the folder %.100s", part);
    }
  }
  return 0;
}

static int write_whole(int fd, const char *data, size_t size)
{
  while (size) {
    ssize_t done = write(fd, data, size);
    if (done < 0 && errno == EINTR)
      continue;
    if (done < 0)
      return -1;
    data += done;
    size -= (size_t)done;
  }
  return 0;
}

static int write_one(int folder, const struct json *file, const char *data, size_t size, struct err *err)
{
  const char *path = json_string(file, "path", ""), *link = json_string(file, "link", "");
  uid_t uid = (uid_t)json_number(file, "uid", 0);
  gid_t gid = (gid_t)json_number(file, "gid", 0);
  mode_t mode = (mode_t)json_number(file, "mode", 0644) & 07777;
  if (!path_is_valid(path))
    return err_set(err, ERR_INVALID, "%.100s is no path within a set of files", path);
  if (make_parents(folder, path, uid, gid, err) < 0)
    return -1;
  if (*link) {
    unlinkat(folder, path, 0);
    if (symlinkat(link, folder, path) < 0 || fchownat(folder, path, uid, gid, AT_SYMLINK_NOFOLLOW) < 0)
      return err_errno(err, errno, "cannot make the link %.100s", path);
    return 0;
  }
  cleanup_fd int fd = open_below(folder, path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW, 0600);
  if (fd < 0)
    return err_errno(err, errno, "cannot make the file %.100s", path);
  if (fchown(fd, uid, gid) < 0 || fchmod(fd, mode) < 0 || write_whole(fd, data, size) < 0)
    return err_errno(err, errno, "cannot write the file %.100s", path);
  return 0;
}

static int write_all(int folder, const struct request *request, struct err *err)
{
  size_t at = 0;
  for (const struct json *file = json_list(request->body, "files"); file; file = file->next) {
    int64_t size = json_number(file, "size", 0);
    if (size < 0 || (uint64_t)size > request->blob_size - at)
      return err_set(err, ERR_INVALID, "the request is shorter than its files");
    if (write_one(folder, file, request->blob + at, (size_t)size, err) < 0)
      return -1;
    at += (size_t)size;
  }
  return 0;
}

static int swap_link(int folder, const char *to, const char *name, struct err *err)
{
  remove_tree(folder, "..data_tmp");
  if (symlinkat(to, folder, "..data_tmp") < 0 || renameat(folder, "..data_tmp", folder, name) < 0)
    return err_errno(err, errno, "cannot swap the files");
  return 0;
}

/* Links for names that are new, away with names that are gone. `data` is the folder behind "..data". */
static int update_names(int folder, int data, struct err *err)
{
  DIR *entries = fdopendir(openat(data, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  for (struct dirent *entry; entries && (entry = readdir(entries));) {
    char to[300];
    if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
      continue;
    snprintf(to, sizeof to, "..data/%s", entry->d_name);
    if (symlinkat(to, folder, entry->d_name) < 0 && errno != EEXIST) {
      err_errno(err, errno, "cannot link %s", entry->d_name);
      closedir(entries);
      return -1;
    }
  }
  if (entries)
    closedir(entries);
  entries = fdopendir(openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  for (struct dirent *entry; entries && (entry = readdir(entries));)
    if (strncmp(entry->d_name, "..", 2) != 0 && strcmp(entry->d_name, ".") != 0 &&
        faccessat(data, entry->d_name, F_OK, AT_SYMLINK_NOFOLLOW) < 0)
      unlinkat(folder, entry->d_name, 0);
  if (entries)
    closedir(entries);
  return 0;
}

static int write_atomic(int folder, const struct request *request, struct err *err)
{
  char old[64] = "", name[64];
  if (json_bool(request->body, "first", true)) {
    remove_tree(folder, STAGE);
    if (mkdirat(folder, STAGE, 0755) < 0)
      return err_errno(err, errno, "cannot make a folder for the files");
  }
  cleanup_fd int stage = openat(folder, STAGE, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (stage < 0)
    return err_errno(err, errno, "no files were begun");
  if (write_all(stage, request, err) < 0)
    return -1;
  if (!json_bool(request->body, "last", true))
    return 0;
  ssize_t size = readlinkat(folder, "..data", old, sizeof old - 1);
  old[size < 0 ? 0 : size] = 0;
  snprintf(name, sizeof name, "..%llx", (unsigned long long)now_ns());
  if (renameat(folder, STAGE, folder, name) < 0)
    return err_errno(err, errno, "cannot place the files");
  if (swap_link(folder, name, "..data", err) < 0 || update_names(folder, stage, err) < 0)
    return -1;
  if (*old)
    remove_tree(folder, old);
  return 0;
}

HANDLER(command_files)
{
  const char *name = json_string(request->body, "name", "");
  char path[128];
  (void)agent, (void)reply;
  if (!name_is_valid(name))
    return err_set(err, ERR_INVALID, "%.70s is no name of a set of files", name);
  snprintf(path, sizeof path, FILES_FOLDER "/%s", name);
  if (mkdir(path, 0755) < 0 && errno != EEXIST)
    return err_errno(err, errno, "cannot make the folder %s", path);
  cleanup_fd int folder = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (folder < 0)
    return err_errno(err, errno, "cannot open the folder %s", path);
  return json_bool(request->body, "atomic", false) ? write_atomic(folder, request, err) : write_all(folder, request, err);
}

/* What a container wrote into a file of a set, such as its termination message: hex digits, at most `limit` bytes. */
HANDLER(command_read_file)
{
  const char *name = json_string(request->body, "name", ""), *file = json_string(request->body, "path", "");
  int64_t limit = json_number(request->body, "limit", READ_MOST);
  char path[128], block[4096];
  (void)agent;
  if (!name_is_valid(name) || !path_is_valid(file) || limit < 0 || limit > READ_MOST)
    return err_set(err, ERR_INVALID, "%.70s/%.100s is no file of a set, or too much of it is wanted", name, file);
  snprintf(path, sizeof path, FILES_FOLDER "/%s", name);
  cleanup_fd int folder = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  cleanup_fd int fd = folder < 0 ? -1 : open_below(folder, file, O_RDONLY | O_NONBLOCK | O_NOFOLLOW, 0);
  struct stat what;
  if (fd < 0 || fstat(fd, &what) < 0)
    return errno == ENOENT ? err_set(err, ERR_NOT_FOUND, "there is no file %.100s", file) : err_errno(err, errno, "cannot open %.100s", file);
  if (!S_ISREG(what.st_mode))
    return err_set(err, ERR_INVALID, "%.100s is no regular file", file);
  buffer_format(reply, "\"data\":\"");
  for (ssize_t size; limit > 0 && (size = read(fd, block, (size_t)limit < sizeof block ? (size_t)limit : sizeof block)) > 0; limit -= size)
    for (ssize_t i = 0; i < size; i++)
      buffer_format(reply, "%02x", (unsigned char)block[i]);
  buffer_format(reply, "\"");
  return 0;
}

HANDLER(command_remove_files)
{
  const char *name = json_string(request->body, "name", "");
  (void)agent, (void)reply;
  if (!name_is_valid(name))
    return err_set(err, ERR_INVALID, "%.70s is no name of a set of files", name);
  cleanup_fd int folder = open(FILES_FOLDER, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  remove_tree(folder, name);
  return 0;
}
