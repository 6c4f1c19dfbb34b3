/* Figures of everything, in one pass. */
#include "agent.h"

#include <fcntl.h>
#include <inttypes.h>
#include <sys/vfs.h>

static uint64_t memory_figure(const char *text, const char *key)
{
  const char *at = text ? strstr(text, key) : NULL;
  return at ? strtoull(at + strlen(key), NULL, 10) * 1024 : 0;
}

/* Local timer interrupts of all processors: an idle guest that has many of them ticks. */
static uint64_t timer_interrupts(void)
{
  cleanup_free char *text = read_file(AT_FDCWD, "/proc/interrupts", 256 * 1024, NULL);
  char *at = text ? strstr(text, "LOC:") : NULL;
  uint64_t sum = 0;
  for (char *end = at ? at + 4 : NULL; end; ) {
    uint64_t count = strtoull(end, &at, 10);
    if (at == end)
      break;
    sum += count;
    end = at;
  }
  return sum;
}

static void add_memory(struct buffer *out)
{
  cleanup_free char *memory = read_file(AT_FDCWD, "/proc/meminfo", 16384, NULL);
  cleanup_free char *own = read_file(AT_FDCWD, "/proc/self/status", 16384, NULL);
  buffer_format(out, "\"time_ns\":%" PRIu64 ",\"memory_total\":%" PRIu64 ",\"memory_available\":%" PRIu64
                ",\"agent_rss\":%" PRIu64 ",\"timer_interrupts\":%" PRIu64, now_ns(), memory_figure(memory, "MemTotal:"),
                memory_figure(memory, "MemAvailable:"), memory_figure(own, "VmRSS:"), timer_interrupts());
}

static void add_containers(struct agent *agent, struct buffer *out)
{
  buffer_format(out, ",\"containers\":[");
  for (struct container *container = agent->containers; container; container = container->next) {
    char upper[ID_MOST + 64];
    struct statfs space = { 0 };
    snprintf(upper, sizeof upper, "%s/upper", container->folder);
    if (container->has_upper && statfs(upper, &space) < 0)
      space = (struct statfs){ 0 };
    buffer_format(out, "%s{\"id\":", container == agent->containers ? "" : ",");
    json_quote(out, container->id);
    buffer_format(out, ",\"usage\":");
    cgroup_usage(container->cgroup, out);
    buffer_format(out, ",\"layer_bytes\":%" PRIu64 ",\"layer_inodes\":%" PRIu64 "}",
                  (uint64_t)(space.f_blocks - space.f_bfree) * (uint64_t)space.f_bsize,
                  (uint64_t)(space.f_files - space.f_ffree));
  }
  buffer_format(out, "]");
}

static void add_interfaces(struct buffer *out)
{
  cleanup_free char *text = read_file(AT_FDCWD, "/proc/net/dev", 64 * 1024, NULL);
  bool any = false;
  char *rest = text;
  buffer_format(out, ",\"interfaces\":[");
  for (char *line; rest && (line = strsep(&rest, "\n"));) {
    char name[32];
    uint64_t n[11];
    char *colon = strchr(line, ':');
    if (!colon || sscanf(line, " %31[^:]", name) != 1 || strcmp(name, "lo") == 0)
      continue;
    if (sscanf(colon + 1, "%" SCNu64 "%" SCNu64 "%" SCNu64 "%" SCNu64 "%" SCNu64 "%" SCNu64 "%" SCNu64 "%" SCNu64
               "%" SCNu64 "%" SCNu64 "%" SCNu64, n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7, n + 8, n + 9, n + 10) != 11)
      continue;
    buffer_format(out, "%s{\"name\":", any ? "," : "");
    json_quote(out, name);
    buffer_format(out, ",\"rx_bytes\":%" PRIu64 ",\"rx_packets\":%" PRIu64 ",\"rx_errors\":%" PRIu64 ",\"tx_bytes\":%" PRIu64
                  ",\"tx_packets\":%" PRIu64 ",\"tx_errors\":%" PRIu64 "}", n[0], n[1], n[2], n[8], n[9], n[10]);
    any = true;
  }
  buffer_format(out, "]");
}

static void add_volumes(struct agent *agent, struct buffer *out)
{
  bool any = false;
  buffer_format(out, ",\"volumes\":[");
  for (struct volume *volume = agent->volumes; volume; volume = volume->next) {
    char path[128];
    struct statfs space;
    snprintf(path, sizeof path, VOLUMES_FOLDER "/%s", volume->name);
    if (statfs(path, &space) < 0)
      continue;
    buffer_format(out, "%s{\"name\":", any ? "," : "");
    json_quote(out, volume->name);
    buffer_format(out, ",\"capacity\":%" PRIu64 ",\"used\":%" PRIu64 ",\"inodes\":%" PRIu64 ",\"used_inodes\":%" PRIu64 "}",
                  (uint64_t)space.f_blocks * (uint64_t)space.f_bsize,
                  (uint64_t)(space.f_blocks - space.f_bfree) * (uint64_t)space.f_bsize, (uint64_t)space.f_files,
                  (uint64_t)(space.f_files - space.f_ffree));
    any = true;
  }
  buffer_format(out, "]");
}

HANDLER(command_stats)
{
  (void)request, (void)err;
  add_memory(reply);
  buffer_format(reply, ",\"pod\":");
  cgroup_usage("pod", reply);
  add_containers(agent, reply);
  add_interfaces(reply);
  add_volumes(agent, reply);
  return 0;
}
