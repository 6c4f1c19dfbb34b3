/* Disks by their serial numbers: the order in which the kernel names them means nothing. */
#include "agent.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

bool name_is_valid(const char *name)
{
  size_t size = strlen(name);
  if (!size || size > NAME_MOST || !isalnum((unsigned char)name[0]))
    return false;
  for (; *name; name++)
    if (!islower((unsigned char)*name) && !isdigit((unsigned char)*name) && *name != '-')
      return false;
  return true;
}

static bool same(const char *found, size_t size, const char *serial)
{
  while (size && (found[size - 1] == '\n' || found[size - 1] == ' ' || found[size - 1] == 0))
    size--;
  while (size && *found == ' ')
    found++, size--;
  return size == strlen(serial) && memcmp(found, serial, size) == 0;
}

static bool has_serial(const char *disk, const char *serial)
{
  char path[128];
  size_t size;
  snprintf(path, sizeof path, "/sys/block/%s/device/vpd_pg80", disk); /* SCSI: four bytes of header */
  cleanup_free char *page = read_file(AT_FDCWD, path, 512, &size);
  if (page && size > 4)
    return same(page + 4, size - 4, serial);
  snprintf(path, sizeof path, "/sys/block/%s/serial", disk); /* virtio-blk */
  cleanup_free char *text = read_file(AT_FDCWD, path, 128, &size);
  return text && same(text, size, serial);
}

int disk_find(const char *serial, char name[32], unsigned *major, unsigned *minor)
{
  DIR *folder = opendir("/sys/block");
  int found = 0;
  for (struct dirent *entry; folder && !found && (entry = readdir(folder));) {
    char path[128];
    if (entry->d_name[0] == '.' || strlen(entry->d_name) >= 32 || !has_serial(entry->d_name, serial))
      continue;
    snprintf(path, sizeof path, "/sys/block/%s/dev", entry->d_name);
    cleanup_free char *numbers = read_file(AT_FDCWD, path, 32, NULL);
    if (numbers && sscanf(numbers, "%u:%u", major, minor) == 2) {
      snprintf(name, 32, "%s", entry->d_name);
      found = 1;
    }
  }
  if (folder)
    closedir(folder);
  return found;
}

int disk_node(const char *name, unsigned major, unsigned minor, char path[64], struct err *err)
{
  snprintf(path, 64, "/run/disks/%s", name);
  unlink(path); /* the name may have been another disk's before */
  if (mknod(path, S_IFBLK | 0600, makedev(major, minor)) < 0)
    return err_errno(err, errno, "cannot make a node for the disk");
  /* A disk that was plugged in just now is in /sys a moment before it can be used. */
  cleanup_fd int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  if (fd < 0 && errno != ENXIO && errno != ENODEV)
    return err_errno(err, errno, "cannot open the disk %s", name);
  return fd >= 0;
}
