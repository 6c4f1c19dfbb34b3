/* Who a process is, and what it may do: users, capabilities, limits, seccomp. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define GROUPS_MOST 1024

static const char *const CAPABILITIES[] = {
  "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
  "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
  "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
  "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
  "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
  "CHECKPOINT_RESTORE",
};

static const struct {
  const char *name;
  int number;
} LIMITS[] = {
  { "AS", RLIMIT_AS }, { "CORE", RLIMIT_CORE }, { "CPU", RLIMIT_CPU }, { "DATA", RLIMIT_DATA }, { "FSIZE", RLIMIT_FSIZE },
  { "LOCKS", RLIMIT_LOCKS }, { "MEMLOCK", RLIMIT_MEMLOCK }, { "MSGQUEUE", RLIMIT_MSGQUEUE }, { "NICE", RLIMIT_NICE },
  { "NOFILE", RLIMIT_NOFILE }, { "NPROC", RLIMIT_NPROC }, { "RSS", RLIMIT_RSS }, { "RTPRIO", RLIMIT_RTPRIO },
  { "RTTIME", RLIMIT_RTTIME }, { "SIGPENDING", RLIMIT_SIGPENDING }, { "STACK", RLIMIT_STACK },
};

int rlimits_set(const struct json *process, struct err *err)
{
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = 1024; /* the agent's own limit is not the container's */
  if (setrlimit(RLIMIT_NOFILE, &files) < 0)
    return err_errno(err, errno, "cannot set the limit of open files");
  for (const struct json *item = json_list(process, "rlimits"); item; item = item->next) {
    const char *type = json_string(item, "type", "");
    struct rlimit limit = { (rlim_t)json_number(item, "soft", 0), (rlim_t)json_number(item, "hard", 0) };
    int number = -1;
    if (strncmp(type, "RLIMIT_", 7) == 0)
      for (size_t i = 0; i < sizeof LIMITS / sizeof *LIMITS; i++)
        if (strcmp(LIMITS[i].name, type + 7) == 0)
          number = LIMITS[i].number;
    if (number < 0)
      return err_set(err, ERR_INVALID, "there is no limit %.40s", type);
    if (setrlimit((__rlimit_resource_t)number, &limit) < 0)
      return err_errno(err, errno, "cannot set the limit %s", type);
  }
  return 0;
}

static int read_set(const struct json *capabilities, const char *key, uint64_t *set, struct err *err)
{
  *set = 0;
  for (const struct json *item = json_list(capabilities, key); item; item = item->next) {
    const char *name = item->type == JSON_STRING ? item->string : "";
    int number = -1;
    if (strncmp(name, "CAP_", 4) == 0)
      name += 4;
    for (size_t i = 0; i < sizeof CAPABILITIES / sizeof *CAPABILITIES; i++)
      if (strcmp(CAPABILITIES[i], name) == 0)
        number = (int)i;
    if (number < 0)
      return err_set(err, ERR_INVALID, "there is no capability %.40s", name);
    /* Asked of the kernel, not read from a file that a container could have put in the way. */
    if (prctl(PR_CAPBSET_READ, number) < 0)
      continue;
    *set |= 1ull << number;
  }
  return 0;
}

static int set_capabilities(uint64_t effective, uint64_t permitted, uint64_t inheritable, struct err *err)
{
  struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
  struct __user_cap_data_struct data[2];
  for (int i = 0; i < 2; i++)
    data[i] = (struct __user_cap_data_struct){ (uint32_t)(effective >> 32 * i), (uint32_t)(permitted >> 32 * i),
                                               (uint32_t)(inheritable >> 32 * i) };
  if (syscall(SYS_capset, &header, data) < 0)
    return err_errno(err, errno, "cannot set the capabilities");
  return 0;
}

/* What we may have now; less than everything where the agent itself is confined, as in a test. */
static uint64_t own_capabilities(void)
{
  struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
  struct __user_cap_data_struct data[2] = { 0 };
  syscall(SYS_capget, &header, data);
  return data[0].permitted | (uint64_t)data[1].permitted << 32;
}

static int set_ids(const struct json *user, struct err *err)
{
  gid_t groups[GROUPS_MOST], gid = (gid_t)json_number(user, "gid", 0);
  uid_t uid = (uid_t)json_number(user, "uid", 0);
  size_t count = 0;
  for (const struct json *item = json_list(user, "additionalGids"); item; item = item->next) {
    if (count == GROUPS_MOST || item->type != JSON_NUMBER)
      return err_set(err, ERR_INVALID, "there are too many groups");
    groups[count++] = (gid_t)item->number;
  }
  if (setgroups(count, groups) < 0 || setresgid(gid, gid, gid) < 0)
    return err_errno(err, errno, "cannot set the groups");
  if (prctl(PR_SET_KEEPCAPS, 1) < 0 || setresuid(uid, uid, uid) < 0 || prctl(PR_SET_KEEPCAPS, 0) < 0)
    return err_errno(err, errno, "cannot become the user %u", uid);
  umask((mode_t)json_number(user, "umask", 022));
  return 0;
}

static int load_filter(const struct child *child, struct err *err)
{
  if (!child->seccomp_size)
    return 0;
  if (child->seccomp_size % sizeof(struct sock_filter) || child->seccomp_size / sizeof(struct sock_filter) > BPF_MAXINSNS)
    return err_set(err, ERR_INVALID, "the seccomp filter is no filter");
  struct sock_fprog program = { .len = (unsigned short)(child->seccomp_size / sizeof(struct sock_filter)),
                                .filter = (struct sock_filter *)(uintptr_t)child->seccomp };
  if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) < 0)
    return err_errno(err, errno, "the kernel refused the seccomp filter");
  return 0;
}

int credentials_set(const struct child *child, struct err *err)
{
  static const char *const KEYS[] = { "bounding", "permitted", "inheritable", "effective", "ambient" };
  enum { BOUNDING, PERMITTED, INHERITABLE, EFFECTIVE, AMBIENT };
  const struct json *capabilities = json_get(child->process, "capabilities");
  bool no_new = json_bool(child->process, "noNewPrivileges", false);
  uint64_t sets[5];
  for (int i = 0; i < 5; i++)
    if (read_set(capabilities, KEYS[i], &sets[i], err) < 0)
      return -1;
  if (child->join_user >= 0 && setns(child->join_user, CLONE_NEWUSER) < 0)
    return err_errno(err, errno, "cannot enter the pod's user namespace");
  for (int i = 0; i < 64 && prctl(PR_CAPBSET_READ, i) >= 0; i++)
    if (!(sets[BOUNDING] >> i & 1) && prctl(PR_CAPBSET_DROP, i) < 0)
      return err_errno(err, errno, "cannot drop the capability %d", i);
  if (set_ids(json_get(child->process, "user"), err) < 0)
    return -1;
  /* A filter without no_new_privs needs a capability that the process will not have: load it before. */
  uint64_t own = own_capabilities();
  if (!no_new && (set_capabilities(own, own, sets[INHERITABLE], err) < 0 || load_filter(child, err) < 0))
    return -1;
  if (set_capabilities(sets[EFFECTIVE], sets[PERMITTED], sets[INHERITABLE], err) < 0)
    return -1;
  prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
  for (int i = 0; i < 64; i++)
    if (sets[AMBIENT] >> i & 1 && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, i, 0, 0) < 0)
      return err_errno(err, errno, "cannot raise the ambient capability %d", i);
  if (no_new && (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || load_filter(child, err) < 0))
    return err->kind ? -1 : err_errno(err, errno, "cannot forbid new privileges");
  return 0;
}
