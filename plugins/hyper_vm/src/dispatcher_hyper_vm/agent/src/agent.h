/* The agent: process 1 of a guest. One thread, one loop, one struct agent. */
#ifndef AGENT_H
#define AGENT_H

#include "base.h"
#include "frame.h"
#include "json.h"
#include "output.h"

#include <sys/epoll.h>
#include <sys/types.h>

#define AGENT_VERSION "1"
#define AGENT_FILES 32768 /* descriptors that the agent may have */
#define NAME_MOST 64
#define ID_MOST 128
#define DISK_WAIT_NS (30ull * 1000000000)
#define QUEUE_MOST (128 * 1024) /* bytes on their way to the host, beyond which streams have to wait */

#define POD_FOLDER "/run/pod"
#define FILES_FOLDER POD_FOLDER "/files"
#define VOLUMES_FOLDER POD_FOLDER "/vol"
#define SHARE_FOLDER POD_FOLDER "/share"
#define SHM_FOLDER POD_FOLDER "/shm"
#define CONTAINERS_FOLDER "/run/c"
#define CGROUP_FOLDER "/sys/fs/cgroup"

struct agent;

/* A file descriptor in the loop. */
struct watch {
  int fd;
  uint32_t events; /* 0: not in the loop now */
  void (*ready)(struct agent *agent, struct watch *watch, uint32_t events);
};

void watch_add(struct agent *agent, struct watch *watch, uint32_t events);
void watch_change(struct agent *agent, struct watch *watch, uint32_t events);
void watch_close(struct agent *agent, struct watch *watch); /* also closes the descriptor; idempotent */

struct container;
struct stream;

/* One output of a process that the agent reads. */
struct source {
  struct watch watch; /* fd -1: at its end */
  struct process *process;
  enum frame_source kind;
  bool paused;
};

/* A process that we have started in a container: its first one, or an executed command. */
struct process {
  pid_t pid;
  struct watch in;    /* its standard input, or its terminal; fd -1 when closed */
  int terminal;       /* the master of its terminal, or -1 */
  struct source out[2];
  struct container *container;
  struct stream *stream; /* of an executed command; NULL when the host has let go of it */
  struct watch sync;     /* to it, while it is not executed; fd -1 afterwards */
  uint32_t request;      /* that waits for it, or 0 */
  bool is_first, exited, drained;
  int code;
  char cgroup[ID_MOST + 64]; /* below CGROUP_FOLDER */
  struct process *next;      /* executed commands of a container */
};

enum container_status { CREATED, RUNNING, EXITED };

struct container {
  struct container *next;
  char id[ID_MOST];
  enum container_status status;
  struct process first;
  uint64_t started_ns, finished_ns;
  int code;
  bool oom_killed, wants_stdin, stdin_once, has_upper, is_making, is_deleting, start_failed, has_user;
  char message[200];
  struct err failure; /* of its creation, told when nothing of it is left */
  struct output output;
  struct process *commands;
  char *seccomp; /* the filter, for executed commands */
  size_t seccomp_size;
  char folder[ID_MOST + 32]; /* CONTAINERS_FOLDER/ID */
  char cgroup[ID_MOST + 16]; /* pod/ID */
};

enum stream_kind { STREAM_OUTPUT, STREAM_ATTACH, STREAM_EXEC, STREAM_CONNECT };

struct stream {
  struct stream *next;
  uint32_t id;
  enum stream_kind kind;
  struct container *container;
  struct process *process; /* exec */
  struct watch socket;     /* connect */
  bool connecting, wants_stdin;
  uint32_t request; /* that opens a connection */
  int family;
  uint16_t port;
  uint64_t cursor;  /* output and attach: in the container's output */
  uint64_t sent, credit;
  bool ended;
  struct buffer in; /* bytes from the host that the other side has not taken */
  size_t in_start;
  uint64_t received, granted, taken;
  bool in_ending, in_closed;
};

/* Something that takes time. `step` is called again and again: negative is an error, positive means done (it has
 * answered). `stop` frees what belongs to it. */
struct job {
  struct job *next;
  uint32_t request;
  uint64_t deadline_ns;
  const char *what;
  int (*step)(struct agent *agent, struct job *job, struct err *err);
  void (*stop)(struct agent *agent, struct job *job);
  void *state;
  bool done, passive; /* passive: something else wakes the loop */
};

struct link {
  struct watch watch;   /* the port or the connection, -1 while there is none */
  struct watch listener; /* on a host */
  struct frame_parser parser;
  struct buffer queue;
  size_t queue_start;
  struct buffer message; /* a request that is not whole yet */
  uint32_t message_id;
  uint64_t sent, received; /* frames of messages */
  bool synced, edge;
};

struct volume {
  struct volume *next;
  char name[NAME_MOST + 1];
};

struct agent {
  int epoll;
  bool on_host; /* for tests: no kernel of our own */
  bool closing;
  struct watch signals;
  struct link link;
  struct container *containers;
  struct stream *streams;
  struct job *jobs;
  struct volume *volumes;
  int pids;        /* our own pid namespace */
  pid_t holder;    /* the process that holds the pod's namespaces, or 0 */
  int holder_user; /* its user namespace, or -1 */
  bool holder_has_pids, holder_has_user;
  bool prepared; /* setup was done once */
  unsigned controllers; /* bits of enum controller */
  unsigned commands;    /* counts executed commands */
};

/* ------------------------------------------------------------------------------------------------------------ link.c */
int link_open(struct agent *agent, const char *socket_path, struct err *err);
void link_flush(struct agent *agent);
bool link_has_room(const struct agent *agent);
void link_reply(struct agent *agent, uint32_t request, const struct buffer *body);
void link_reply_error(struct agent *agent, uint32_t request, const struct err *err);
void link_event(struct agent *agent, const struct buffer *body);
void link_frame(struct agent *agent, const struct frame *frame);

/* -------------------------------------------------------------------------------------------------------- commands.c */
struct request {
  uint32_t id;
  const struct json *body;
  const char *text; /* of the body, for who needs it longer */
  size_t text_size;
  const char *blob;
  size_t blob_size;
};

void command_run(struct agent *agent, uint32_t id, const char *data, size_t size);
void hello_body(struct agent *agent, struct buffer *out);

/* The handlers. They return 0 when `reply` holds the members of the answer, 1 when they will answer later, and a
 * negative number on an error. */
#define HANDLER(name) int name(struct agent *agent, const struct request *request, struct buffer *reply, struct err *err)
HANDLER(command_setup);
HANDLER(command_files);
HANDLER(command_read_file);
HANDLER(command_remove_files);
HANDLER(command_mount);
HANDLER(command_unmount);
HANDLER(command_online);
HANDLER(command_release_memory);
HANDLER(command_power_off);
HANDLER(command_stats);
HANDLER(command_update);
HANDLER(command_create);
HANDLER(command_start);
HANDLER(command_containers);
HANDLER(command_signal);
HANDLER(command_resize);
HANDLER(command_delete);
HANDLER(command_trim);
HANDLER(command_output);
HANDLER(command_attach);
HANDLER(command_exec);
HANDLER(command_connect);

/* -------------------------------------------------------------------------------------------------------- streams.c */
struct stream *stream_open(struct agent *agent, const struct request *request, enum stream_kind kind, struct err *err);
struct stream *stream_find(struct agent *agent, uint32_t id);
void stream_close(struct agent *agent, struct stream *stream); /* without a word to the host */
void stream_reset(struct agent *agent, struct stream *stream, const char *reason);
void stream_end(struct agent *agent, struct stream *stream, int code); /* code -1: none */
void stream_frame(struct agent *agent, const struct frame *frame);
void streams_close_all(struct agent *agent);
bool streams_pump(struct agent *agent); /* true when something was queued */
void process_in_ready(struct agent *agent, struct watch *watch, uint32_t events);
void source_ready(struct agent *agent, struct watch *watch, uint32_t events);
void process_drain(struct agent *agent, struct process *process);
void process_close(struct agent *agent, struct process *process);

/* ------------------------------------------------------------------------------------------------------ container.c */
struct container *container_find(struct agent *agent, const char *id);
void container_state(const struct container *container, struct buffer *out);
void process_exited(struct agent *agent, struct process *process);
void children_reap(struct agent *agent);
void commands_kill_all(struct agent *agent);
void command_forget(struct agent *agent, struct process *process);

/* ----------------------------------------------------------------------------------------------------------- jobs, main.c */
struct job *job_add(struct agent *agent, uint32_t request, const char *what, uint64_t wait_ns,
                    int (*step)(struct agent *, struct job *, struct err *), void (*stop)(struct agent *, struct job *),
                    void *state);

/* ------------------------------------------------------------------------------------------------------------- boot.c */
int boot(struct agent *agent, const char *root, struct err *err);
int port_find(struct err *err);

/* ------------------------------------------------------------------------------------------------------------ disks.c */
/* The disk with a serial number: its name below /dev, and its numbers. Returns 0 while there is none. */
int disk_find(const char *serial, char name[32], unsigned *major, unsigned *minor);
/* Make a node of it that only the agent can see. Returns 0 while the disk cannot be used yet. */
int disk_node(const char *name, unsigned major, unsigned minor, char path[64], struct err *err);
bool name_is_valid(const char *name);

/* ----------------------------------------------------------------------------------------------------------- cgroup.c */
enum controller { CG_CPU = 1, CG_MEMORY = 2, CG_PIDS = 4, CG_IO = 8, CG_CPUSET = 16, CG_HUGETLB = 32 };

int cgroups_begin(struct agent *agent, struct err *err);
int cgroup_make(const char *path, struct err *err);
/* Apply `linux.resources` of an OCI specification to the cgroup; everything, or nothing. */
int cgroup_limit(struct agent *agent, const char *path, const struct json *resources, struct err *err);
int cgroup_open(const char *path, struct err *err);
void cgroup_kill(const char *path);
bool cgroup_is_empty(const char *path);
int cgroup_remove(const char *path); /* with all below it; negative while it is in use */
uint64_t cgroup_number(const char *path, const char *file, const char *key);
void cgroup_usage(const char *path, struct buffer *out);

/* ---------------------------------------------------------------------------------------------------------- devices.c */
/* Attach a device program to the cgroup, made of the default rules and of `resources.devices`, and of what is in
 * `linux.devices`. */
int devices_allow(int cgroup, const struct json *linux, struct err *err);

/* ---------------------------------------------------------------------------------------------------------- network.c */
int network_setup(struct agent *agent, const struct json *setup, struct err *err);

/* ------------------------------------------------------------------------------------------------------------ child.c */
/* Everything that a new process needs to know. child_run runs in a copy of the agent, and never comes back. */
struct child {
  const struct json *spec;    /* of a container; NULL for an executed command */
  const struct json *process; /* as in an OCI specification */
  const char *rootfs;         /* of a container, below the agent's root */
  const char *seccomp;
  size_t seccomp_size;
  bool terminal;
  int sync;                              /* the socket on which it talks with the agent */
  int in, out, error;                    /* its standard streams; unused with a terminal */
  int join;                              /* an executed command: pidfd of the container's first process */
  int join_user, join_ipc, join_uts;     /* namespaces of the pod, -1 for none */
  bool own_cgroup_ns, has_user;
};

/* What the two say to each other: one byte, and text. */
enum child_word { WORD_TERMINAL = 'T', WORD_READY = 'R', WORD_ERROR = 'E', WORD_NOT_EXECUTED = 'X', WORD_START = 'S' };

_Noreturn void child_run(struct child *child);

/* ----------------------------------------------------------------------------------------------------------- mounts.c */
int mounts_make(const struct child *child, struct err *err); /* ends in the container's root */
int open_in_root(int root, const char *path, int flags);

/* ------------------------------------------------------------------------------------------------------ credentials.c */
int credentials_set(const struct child *child, struct err *err);
int rlimits_set(const struct json *process, struct err *err);

/* ----------------------------------------------------------------------------------------------------------- rootfs.c */
int rootfs_mount(const char *folder, const char *lower, const char *upper, bool is_folder, int user_ns, struct err *err);
int rootfs_unmount(const char *folder); /* negative while it is in use */

#endif
