/* The table of commands: what the host may ask, and who answers. */
#include "agent.h"

#include <sys/sysinfo.h>
#include <sys/utsname.h>

HANDLER(command_ping)
{
  (void)agent, (void)request, (void)reply, (void)err;
  return 0;
}

static const struct command {
  const char *name;
  int (*run)(struct agent *, const struct request *, struct buffer *, struct err *);
} COMMANDS[] = {
  { "ping", command_ping },
  { "setup", command_setup },
  { "files", command_files },
  { "read_file", command_read_file },
  { "remove_files", command_remove_files },
  { "mount", command_mount },
  { "unmount", command_unmount },
  { "online", command_online },
  { "release_memory", command_release_memory },
  { "power_off", command_power_off },
  { "stats", command_stats },
  { "update", command_update },
  { "create", command_create },
  { "start", command_start },
  { "containers", command_containers },
  { "signal", command_signal },
  { "resize", command_resize },
  { "delete", command_delete },
  { "trim", command_trim },
  { "output", command_output },
  { "attach", command_attach },
  { "exec", command_exec },
  { "connect", command_connect },
};

static int run(struct agent *agent, const struct request *request, struct buffer *reply, struct err *err)
{
  const char *name = json_string(request->body, "command", "");
  for (size_t i = 0; i < sizeof COMMANDS / sizeof *COMMANDS; i++)
    if (strcmp(COMMANDS[i].name, name) == 0)
      return COMMANDS[i].run(agent, request, reply, err);
  return err_set(err, ERR_UNSUPPORTED, "this agent knows no command \"%.50s\"", name);
}

void command_run(struct agent *agent, uint32_t id, const char *data, size_t size)
{
  struct err err = { 0 };
  struct json_doc doc = { 0 };
  struct buffer reply = { 0 };
  int done = -1;
  uint32_t length = size >= 4 ? get_u32(data) : 0;
  buffer_add(&reply, "{", 1);
  if (size < 4 || length > size - 4)
    err_set(&err, ERR_INVALID, "the request is shorter than it says");
  else if (json_parse(&doc, data + 4, length, &err) == 0) {
    struct request request = {
      .id = id, .body = doc.root, .text = data + 4, .text_size = length, .blob = data + 4 + length, .blob_size = size - 4 - length };
    done = run(agent, &request, &reply, &err);
  }
  buffer_add(&reply, "}", 1);
  if (done < 0)
    link_reply_error(agent, id, &err);
  else if (done == 0)
    link_reply(agent, id, &reply);
  buffer_free(&reply);
  json_free(&doc);
}

void hello_body(struct agent *agent, struct buffer *out)
{
  struct utsname name;
  uname(&name);
  cleanup_free char *boot = read_file(-1, "/proc/sys/kernel/random/boot_id", 64, NULL);
  if (boot)
    boot[strcspn(boot, "\n")] = 0;
  buffer_format(out, "{\"version\":\"%s\",\"kernel\":", AGENT_VERSION);
  json_quote(out, name.release);
  buffer_format(out, ",\"boot_id\":");
  json_quote(out, boot ? boot : "");
  buffer_format(out, ",\"cpus\":%ld,\"memory\":%llu,\"features\":[", sysconf(_SC_NPROCESSORS_ONLN),
                (unsigned long long)sysconf(_SC_PHYS_PAGES) * (unsigned long long)sysconf(_SC_PAGESIZE));
  static const char *const NAMES[] = { "cpu", "memory", "pids", "io", "cpuset", "hugetlb" };
  bool any = false;
  for (int i = 0; i < 6; i++)
    if (agent->controllers & 1u << i) {
      buffer_format(out, "%s\"%s\"", any ? "," : "", NAMES[i]);
      any = true;
    }
  buffer_format(out, "]}");
}
