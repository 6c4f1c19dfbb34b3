/* cgroup v2: one group for the pod with its limits, one for each container below it. */
#include "agent.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <sys/mount.h>
#include <sys/stat.h>

static const char *const CONTROLLERS[] = { "cpu", "memory", "pids", "io", "cpuset", "hugetlb" };
#define CONTROLLER_COUNT 6

static void path_of(char to[400], const char *path, const char *file)
{
  snprintf(to, 400, CGROUP_FOLDER "/%s%s%s", path, *path && *file ? "/" : "", file);
}

static int put(const char *path, const char *file, const char *text, struct err *err)
{
  char whole[400];
  path_of(whole, path, file);
  return write_file(AT_FDCWD, whole, text, err);
}

static char *get(const char *path, const char *file)
{
  char whole[400];
  path_of(whole, path, file);
  return read_file(AT_FDCWD, whole, 64 * 1024, NULL);
}

/* Let groups below `path` have all controllers that there are; returns which. */
static unsigned hand_down(const char *path)
{
  unsigned handed = 0;
  struct err err;
  cleanup_free char *list = get(path, "cgroup.controllers");
  char *rest = list;
  for (char *word; rest && (word = strsep(&rest, " \n"));)
    for (int i = 0; i < CONTROLLER_COUNT; i++) {
      char text[20];
      snprintf(text, sizeof text, "+%s", CONTROLLERS[i]);
      if (strcmp(word, CONTROLLERS[i]) == 0 && put(path, "cgroup.subtree_control", text, &err) == 0)
        handed |= 1u << i;
    }
  return handed;
}

int cgroup_make(const char *path, struct err *err)
{
  char whole[400];
  path_of(whole, path, "");
  if (mkdir(whole, 0755) < 0 && errno != EEXIST)
    return err_errno(err, errno, "cannot make the cgroup %s", path);
  return 0;
}

int cgroups_begin(struct agent *agent, struct err *err)
{
  if (mount("cgroup2", CGROUP_FOLDER, "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
    return err_errno(err, errno, "cannot mount cgroup2");
  /* Only the root of all groups may have both processes and groups with controllers. */
  if (agent->on_host && (cgroup_make("agent", err) < 0 || put("agent", "cgroup.procs", "0", err) < 0))
    return -1;
  agent->controllers = hand_down("");
  if (cgroup_make("pod", err) < 0)
    return -1;
  hand_down("pod");
  return 0;
}

/* ------------------------------------------------------------------------------------------------------------ limits */
struct setting {
  char file[64], text[256];
};

struct settings {
  struct setting list[64];
  int count;
};

static int add(struct settings *settings, struct err *err, const char *file, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

static int add(struct settings *settings, struct err *err, const char *file, const char *format, ...)
{
  if (settings->count == 64)
    return err_set(err, ERR_INVALID, "there are too many limits");
  struct setting *setting = &settings->list[settings->count++];
  va_list args;
  snprintf(setting->file, sizeof setting->file, "%s", file);
  va_start(args, format);
  vsnprintf(setting->text, sizeof setting->text, format, args);
  va_end(args);
  return 0;
}

/* A limit in OCI: 0 or absent says nothing, negative is none at all. */
static int add_limit(struct settings *settings, struct err *err, const char *file, int64_t value)
{
  if (value < 0)
    return add(settings, err, file, "max");
  return value ? add(settings, err, file, "%" PRId64, value) : 0;
}

static int from_memory(struct settings *settings, const struct json *memory, struct err *err)
{
  int64_t limit = json_number(memory, "limit", 0), swap = json_number(memory, "swap", 0);
  if (add_limit(settings, err, "memory.max", limit) < 0)
    return -1;
  /* OCI counts memory and swap together, as cgroup v1 did; v2 counts swap alone. */
  if (swap > 0 && limit > 0 && swap >= limit)
    return add(settings, err, "memory.swap.max", "%" PRId64, swap - limit);
  if (swap < 0)
    return add(settings, err, "memory.swap.max", "max");
  return add_limit(settings, err, "memory.low", json_number(memory, "reservation", 0));
}

static int from_cpu(struct settings *settings, const struct json *cpu, struct err *err)
{
  int64_t shares = json_number(cpu, "shares", 0), quota = json_number(cpu, "quota", 0);
  int64_t period = json_number(cpu, "period", 0);
  const char *cpus = json_string(cpu, "cpus", ""), *mems = json_string(cpu, "mems", "");
  if (shares > 0) {
    shares = shares < 2 ? 2 : shares > 262144 ? 262144 : shares;
    if (add(settings, err, "cpu.weight", "%" PRId64, 1 + (shares - 2) * 9999 / 262142) < 0)
      return -1;
  }
  if (period <= 0)
    period = 100000;
  if (quota > 0 && add(settings, err, "cpu.max", "%" PRId64 " %" PRId64, quota, period) < 0)
    return -1;
  if (quota < 0 && add(settings, err, "cpu.max", "max %" PRId64, period) < 0)
    return -1;
  if (*cpus && add(settings, err, "cpuset.cpus", "%s", cpus) < 0)
    return -1;
  return *mems ? add(settings, err, "cpuset.mems", "%s", mems) : 0;
}

static int from_unified(struct settings *settings, const struct json *unified, struct err *err)
{
  for (const struct json *item = unified ? unified->first : NULL; item; item = item->next) {
    bool good = item->type == JSON_STRING && strncmp(item->key, "cgroup.", 7) != 0 && strlen(item->key) < 60;
    for (const char *c = item->key; good && *c; c++)
      good = islower((unsigned char)*c) || isdigit((unsigned char)*c) || *c == '.' || *c == '_';
    if (!good || !strchr(item->key, '.'))
      return err_set(err, ERR_INVALID, "%.60s is no cgroup setting", item->key);
    if (add(settings, err, item->key, "%s", item->string) < 0)
      return -1;
  }
  return 0;
}

static int from_hugepages(struct settings *settings, const struct json *list, struct err *err)
{
  for (; list; list = list->next) {
    char file[64];
    const char *size = json_string(list, "pageSize", "");
    if (!*size || strlen(size) > 20 || strspn(size, "0123456789KMGB") != strlen(size))
      return err_set(err, ERR_INVALID, "there is no such page size");
    snprintf(file, sizeof file, "hugetlb.%s.max", size);
    if (add(settings, err, file, "%" PRId64, json_number(list, "limit", 0)) < 0)
      return -1;
  }
  return 0;
}

int cgroup_limit(struct agent *agent, const char *path, const struct json *resources, struct err *err)
{
  struct settings settings = { .count = 0 };
  (void)agent;
  if (from_memory(&settings, json_get(resources, "memory"), err) < 0 ||
      from_cpu(&settings, json_get(resources, "cpu"), err) < 0 ||
      add_limit(&settings, err, "pids.max", json_number(json_get(resources, "pids"), "limit", 0)) < 0 ||
      from_hugepages(&settings, json_list(resources, "hugepageLimits"), err) < 0 ||
      from_unified(&settings, json_get(resources, "unified"), err) < 0)
    return -1;
  for (int i = 0; i < settings.count; i++) {
    struct setting *setting = &settings.list[i];
    cleanup_free char *old = get(path, setting->file);
    if (!old && strncmp(setting->file, "memory.swap", 11) == 0) { /* a kernel without swap: no limit is needed */
      settings.list[i--] = settings.list[--settings.count];
      continue;
    }
    if (put(path, setting->file, setting->text, err) < 0) {
      err->kind = old ? ERR_INVALID : ERR_UNSUPPORTED;
      struct err ignored;
      while (i-- > 0) /* what was there before is in `text` by now */
        put(path, settings.list[i].file, settings.list[i].text, &ignored);
      return -1;
    }
    snprintf(setting->text, sizeof setting->text, "%s", old ? old : "");
  }
  return 0;
}

/* -------------------------------------------------------------------------------------------------------------- life */
int cgroup_open(const char *path, struct err *err)
{
  char whole[400];
  path_of(whole, path, "");
  int fd = open(whole, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0)
    err_errno(err, errno, "cannot open the cgroup %s", path);
  return fd;
}

void cgroup_kill(const char *path)
{
  struct err err;
  if (put(path, "cgroup.kill", "1", &err) < 0)
    say("%s", err.text);
}

bool cgroup_is_empty(const char *path)
{
  return cgroup_number(path, "cgroup.events", "populated") == 0;
}

int cgroup_remove(const char *path)
{
  char whole[400];
  path_of(whole, path, "");
  DIR *folder = opendir(whole);
  for (struct dirent *entry; folder && (entry = readdir(folder));) {
    char below[400];
    if (entry->d_type != DT_DIR || entry->d_name[0] == '.')
      continue;
    snprintf(below, sizeof below, "%s/%s", path, entry->d_name);
    cgroup_remove(below);
  }
  if (folder)
    closedir(folder);
  return rmdir(whole) < 0 && errno != ENOENT ? -1 : 0;
}

/* ------------------------------------------------------------------------------------------------------------- usage */
static uint64_t find_number(const char *text, const char *key)
{
  size_t size = strlen(key);
  for (const char *line = text; line && *line; line = strchr(line, '\n'), line = line ? line + 1 : NULL) {
    if (!size)
      return strtoull(line, NULL, 10);
    if (strncmp(line, key, size) == 0 && line[size] == ' ')
      return strtoull(line + size + 1, NULL, 10);
  }
  return 0;
}

uint64_t cgroup_number(const char *path, const char *file, const char *key)
{
  cleanup_free char *text = get(path, file);
  return find_number(text, key);
}

void cgroup_usage(const char *path, struct buffer *out)
{
  cleanup_free char *stat = get(path, "memory.stat");
  uint64_t memory = cgroup_number(path, "memory.current", ""), inactive = find_number(stat, "inactive_file");
  const struct {
    const char *name;
    uint64_t value;
  } figures[] = {
    { "cpu_ns", cgroup_number(path, "cpu.stat", "usage_usec") * 1000 },
    { "memory", memory },
    { "working_set", memory > inactive ? memory - inactive : 0 },
    { "rss", find_number(stat, "anon") },
    { "peak", cgroup_number(path, "memory.peak", "") },
    { "faults", find_number(stat, "pgfault") },
    { "major_faults", find_number(stat, "pgmajfault") },
    { "swap", cgroup_number(path, "memory.swap.current", "") },
    { "pids", cgroup_number(path, "pids.current", "") },
    { "oom_kills", cgroup_number(path, "memory.events", "oom_kill") },
  };
  buffer_add(out, "{", 1);
  for (size_t i = 0; i < sizeof figures / sizeof *figures; i++)
    buffer_format(out, "%s\"%s\":%" PRIu64, i ? "," : "", figures[i].name, figures[i].value);
  buffer_add(out, "}", 1);
}
