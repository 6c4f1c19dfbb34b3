/* Which devices a container may use: a program of the kernel's cgroup device hook, made from OCI rules. */
#include "agent.h"

#include <errno.h>
#include <linux/bpf.h>
#include <sys/syscall.h>

#define RULES_MOST 128
#define INSNS_MOST (16 + RULES_MOST * 12)

struct rule {
  bool allow;
  char type; /* a, b, c */
  int64_t major, minor; /* -1: any */
  unsigned access;      /* BPF_DEVCG_ACC_* */
};

struct program {
  struct bpf_insn insns[INSNS_MOST];
  int count;
};

static void emit(struct program *program, uint8_t code, uint8_t to, uint8_t from, int16_t offset, int32_t value)
{
  program->insns[program->count++] =
      (struct bpf_insn){ .code = code, .dst_reg = to, .src_reg = from, .off = offset, .imm = value };
}

/* Registers: 2 type, 3 access, 4 major, 5 minor. Rules are tried from the last to the first: the last one wins. */
static void emit_begin(struct program *program)
{
  emit(program, BPF_LDX | BPF_MEM | BPF_W, 2, 1, 0, 0); /* access << 16 | type */
  emit(program, BPF_ALU64 | BPF_MOV | BPF_X, 3, 2, 0, 0);
  emit(program, BPF_ALU | BPF_AND | BPF_K, 2, 0, 0, 0xffff);
  emit(program, BPF_ALU | BPF_RSH | BPF_K, 3, 0, 0, 16);
  emit(program, BPF_LDX | BPF_MEM | BPF_W, 4, 1, 4, 0);
  emit(program, BPF_LDX | BPF_MEM | BPF_W, 5, 1, 8, 0);
}

static void emit_rule(struct program *program, const struct rule *rule)
{
  int jumps[4], count = 0;
  if (rule->type != 'a') {
    jumps[count++] = program->count;
    emit(program, BPF_JMP | BPF_JNE | BPF_K, 2, 0, 0, rule->type == 'b' ? BPF_DEVCG_DEV_BLOCK : BPF_DEVCG_DEV_CHAR);
  }
  if (rule->access != 7) {
    /* Allowing: everything that is asked for must be in the rule. Denying: anything. */
    emit(program, BPF_ALU | BPF_MOV | BPF_X, 6, 3, 0, 0);
    emit(program, BPF_ALU | BPF_AND | BPF_K, 6, 0, 0, rule->allow ? (int32_t)(~rule->access & 7) : (int32_t)rule->access);
    jumps[count++] = program->count;
    emit(program, BPF_JMP | (rule->allow ? BPF_JNE : BPF_JEQ) | BPF_K, 6, 0, 0, 0);
  }
  if (rule->major >= 0) {
    jumps[count++] = program->count;
    emit(program, BPF_JMP | BPF_JNE | BPF_K, 4, 0, 0, (int32_t)rule->major);
  }
  if (rule->minor >= 0) {
    jumps[count++] = program->count;
    emit(program, BPF_JMP | BPF_JNE | BPF_K, 5, 0, 0, (int32_t)rule->minor);
  }
  emit(program, BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, rule->allow);
  emit(program, BPF_JMP | BPF_EXIT, 0, 0, 0, 0);
  for (int i = 0; i < count; i++)
    program->insns[jumps[i]].off = (int16_t)(program->count - jumps[i] - 1);
}

static unsigned access_of(const char *letters)
{
  unsigned access = 0;
  for (; *letters; letters++)
    access |= *letters == 'r' ? BPF_DEVCG_ACC_READ : *letters == 'w' ? BPF_DEVCG_ACC_WRITE : BPF_DEVCG_ACC_MKNOD;
  return access;
}

static int collect(struct rule *rules, const struct json *linux, struct err *err)
{
  static const struct rule ALWAYS[] = {
    { true, 'c', -1, -1, BPF_DEVCG_ACC_MKNOD }, { true, 'b', -1, -1, BPF_DEVCG_ACC_MKNOD }, /* a node alone is no use */
    { true, 'c', 1, 3, 7 }, { true, 'c', 1, 5, 7 }, { true, 'c', 1, 7, 7 }, { true, 'c', 1, 8, 7 },
    { true, 'c', 1, 9, 7 }, { true, 'c', 5, 0, 7 }, { true, 'c', 5, 1, 7 }, { true, 'c', 5, 2, 7 },
    { true, 'c', 136, -1, 7 },
  };
  const int always = sizeof ALWAYS / sizeof *ALWAYS;
  int count = 0;
  for (const struct json *item = json_list(json_get(linux, "resources"), "devices"); item; item = item->next) {
    if (count == RULES_MOST - always)
      return err_set(err, ERR_INVALID, "there are too many device rules");
    const char *type = json_string(item, "type", "a");
    rules[count++] = (struct rule){ json_bool(item, "allow", false), *type ? *type : 'a', json_number(item, "major", -1),
                                    json_number(item, "minor", -1), access_of(json_string(item, "access", "rwm")) };
  }
  memcpy(rules + count, ALWAYS, sizeof ALWAYS); /* behind a rule that denies everything */
  count += always;
  for (const struct json *item = json_list(linux, "devices"); item; item = item->next) {
    char name[32];
    unsigned major, minor;
    const char *serial = json_string(item, "serial", NULL);
    if (count == RULES_MOST)
      return err_set(err, ERR_INVALID, "there are too many devices");
    if (serial && !disk_find(serial, name, &major, &minor))
      return err_set(err, ERR_NOT_FOUND, "there is no disk with the serial number %.40s", serial);
    if (serial)
      rules[count++] = (struct rule){ true, 'b', major, minor, access_of(json_string(item, "access", "rwm")) };
  }
  return count;
}

int devices_allow(int cgroup, const struct json *linux, struct err *err)
{
  struct rule rules[RULES_MOST];
  struct program program = { .count = 0 };
  int count = collect(rules, linux, err);
  if (count < 0)
    return -1;
  emit_begin(&program);
  bool final = false; /* the kernel refuses what can never be reached */
  while (!final && count-- > 0) {
    const struct rule *rule = &rules[count];
    emit_rule(&program, rule);
    final = rule->type == 'a' && rule->access == 7 && rule->major < 0 && rule->minor < 0;
  }
  if (!final) {
    emit(&program, BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, 0);
    emit(&program, BPF_JMP | BPF_EXIT, 0, 0, 0, 0);
  }

  union bpf_attr load = { .prog_type = BPF_PROG_TYPE_CGROUP_DEVICE, .insns = (uint64_t)(uintptr_t)program.insns,
                          .insn_cnt = (uint32_t)program.count, .license = (uint64_t)(uintptr_t)"Apache-2.0" };
  cleanup_fd int fd = (int)syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof load);
  if (fd < 0)
    return err_errno(err, errno, "the kernel refused the device rules");
  union bpf_attr attach = { .target_fd = (uint32_t)cgroup, .attach_bpf_fd = (uint32_t)fd,
                            .attach_type = BPF_CGROUP_DEVICE, .attach_flags = BPF_F_ALLOW_MULTI };
  if (syscall(SYS_bpf, BPF_PROG_ATTACH, &attach, sizeof attach) < 0)
    return err_errno(err, errno, "cannot attach the device rules");
  return 0;
}
