/*
 * Becomes a virtual machine monitor inside the bounds that its plan sets: `launcher PLAN_FD PROGRAM [ARGUMENT...]`.
 *
 * The plan is one fixed record of numbers and descriptor numbers (struct plan, mirrored by launcher.py); no text of a
 * user reaches this program. Order of work, each step needing what the next one takes away: write our pid into the
 * lock file of the machine, so that it can be found whatever happens to the daemon; join the cgroups, so that all
 * later memory is charged there; the network namespace; a mount namespace of our own with next to nothing in it;
 * limits; user and capabilities; close every descriptor that is not on the list; exec.
 *
 * The exit code is 100 + the number of the step that failed (enum step), and one line on stderr says so. A negative
 * oom_score_adj that we may not set is raised to what we have, since nodes without CAP_SYS_RESOURCE exist.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#ifndef PR_CAP_AMBIENT
#define PR_CAP_AMBIENT 47
#define PR_CAP_AMBIENT_RAISE 2
#define PR_CAP_AMBIENT_CLEAR_ALL 4
#endif
#ifndef __NR_open_tree
#define __NR_open_tree 428
#endif
#ifndef __NR_move_mount
#define __NR_move_mount 429
#endif
#ifndef __NR_close_range
#define __NR_close_range 436
#endif
#define OPEN_TREE_CLONE_ 1
#define AT_RECURSIVE_ 0x8000
#define MOVE_MOUNT_F_EMPTY_PATH_ 4

#define PLAN_MAGIC 0x314c5644u /* "DVL1" */
#define MAX_CGROUPS 16
#define MAX_LIMITS 8
#define MAX_GROUPS 4
#define MAX_KEPT 32
#define KEEP_ID 0xffffffffu

enum flag { OWN_MOUNTS = 1, OWN_NET = 2, NO_HUGE_PAGES = 4, NEED_KVM = 8, OWN_SESSION = 16 };

enum step { READ_PLAN = 1, WRITE_PID, JOIN_CGROUP, JOIN_NETNS, MAKE_MOUNTS, SET_LIMITS, SET_USER, CLOSE_FDS, EXEC };

struct limit {
	uint32_t resource;
	uint32_t unused;
	uint64_t soft;
	uint64_t hard;
};

struct plan {
	uint32_t magic;
	uint32_t flags;
	int32_t lock_fd;  /* the machine's lock file: gets our pid; -1 for none */
	int32_t netns_fd; /* -1: stay, or a new one with OWN_NET */
	int32_t root_fd;  /* an empty folder to build the new root on, with OWN_MOUNTS */
	int32_t share_fd; /* the folder that appears as /share, with OWN_MOUNTS; -1 for none */
	uint32_t uid;
	uint32_t gid;
	int32_t oom_score_adj;
	uint32_t cgroup_count;
	uint32_t limit_count;
	uint32_t group_count;
	uint32_t kept_count;
	uint32_t unused;
	uint64_t capabilities; /* kept as ambient ones */
	int32_t cgroup_fds[MAX_CGROUPS]; /* open cgroup.procs files */
	uint32_t groups[MAX_GROUPS];
	int32_t kept[MAX_KEPT];
	struct limit limits[MAX_LIMITS];
};

_Static_assert(sizeof(struct plan) == 464, "launcher.py packs this record");

static void fail(enum step step, const char *what)
{
	dprintf(2, "launcher: step %d: %s: %s\n", (int)step, what, strerror(errno));
	_exit(100 + (int)step);
}

static void read_plan(struct plan *plan, const char *number)
{
	char *end;
	long fd = strtol(number, &end, 10);

	errno = EINVAL;
	if (*end != '\0' || fd < 0 || fd > 1 << 20 || pread((int)fd, plan, sizeof *plan, 0) != (ssize_t)sizeof *plan)
		fail(READ_PLAN, "cannot read the plan");
	errno = EINVAL;
	if (plan->magic != PLAN_MAGIC || plan->cgroup_count > MAX_CGROUPS || plan->limit_count > MAX_LIMITS ||
	    plan->group_count > MAX_GROUPS || plan->kept_count > MAX_KEPT)
		fail(READ_PLAN, "not a plan of this version");
}

static void write_pid(const struct plan *plan)
{
	char text[32];
	int length;

	if (plan->lock_fd < 0)
		return;
	length = snprintf(text, sizeof text, "%ld\n", (long)getpid());
	if (pwrite(plan->lock_fd, text, (size_t)length, 0) != length)
		fail(WRITE_PID, "lock file");
}

static void join_cgroups(const struct plan *plan)
{
	uint32_t i;

	for (i = 0; i < plan->cgroup_count; i++)
		if (write(plan->cgroup_fds[i], "0", 1) != 1)
			fail(JOIN_CGROUP, "cgroup.procs");
}

static void join_netns(const struct plan *plan)
{
	if (plan->netns_fd >= 0) {
		if (setns(plan->netns_fd, CLONE_NEWNET) != 0)
			fail(JOIN_NETNS, "setns");
	} else if (plan->flags & OWN_NET) {
		if (unshare(CLONE_NEWNET) != 0)
			fail(JOIN_NETNS, "unshare");
	}
}


/* Show `source` of the old root at `target` below the new one, read-only; what does not exist is left out. */
static void show(const char *source, const char *target)
{
	struct stat status;
	char link[256];
	ssize_t length;

	if (lstat(source, &status) != 0)
		return;
	if (S_ISLNK(status.st_mode)) {
		length = readlink(source, link, sizeof link - 1);
		if (length < 0)
			fail(MAKE_MOUNTS, source);
		link[length] = '\0';
		if (symlink(link, target) != 0)
			fail(MAKE_MOUNTS, target);
		return;
	}
	if (S_ISDIR(status.st_mode)) {
		if (mkdir(target, 0755) != 0)
			fail(MAKE_MOUNTS, target);
	} else {
		int fd = open(target, O_CREAT | O_WRONLY | O_CLOEXEC | O_NOFOLLOW, 0444);

		if (fd < 0)
			fail(MAKE_MOUNTS, target);
		close(fd);
	}
	if (mount(source, target, NULL, MS_BIND | MS_REC, NULL) != 0)
		fail(MAKE_MOUNTS, target);
	/* Devices keep their meaning; everything else is only read. */
	if (!S_ISCHR(status.st_mode) &&
	    mount(NULL, target, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL) != 0)
		fail(MAKE_MOUNTS, target);
}

static void make_mounts(const struct plan *plan)
{
	int share = -1;

	if (!(plan->flags & OWN_MOUNTS))
		return;
	/* The share is taken along with what is mounted below it, as a tree that still belongs to the old namespace. */
	if (plan->share_fd >= 0) {
		share = (int)syscall(__NR_open_tree, plan->share_fd, "",
				     OPEN_TREE_CLONE_ | AT_RECURSIVE_ | AT_EMPTY_PATH | O_CLOEXEC);
		if (share < 0)
			fail(MAKE_MOUNTS, "open_tree of the share");
	}
	/* A way to the folder that survives the change of namespace: we stand in it. */
	if (fchdir(plan->root_fd) != 0)
		fail(MAKE_MOUNTS, "root folder");
	if (unshare(CLONE_NEWNS) != 0)
		fail(MAKE_MOUNTS, "unshare");
	/* Mounts made on the host arrive here, ours do not arrive there. */
	if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) != 0)
		fail(MAKE_MOUNTS, "slave mounts");
	if (mount("tmpfs", ".", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m,nr_inodes=256") != 0)
		fail(MAKE_MOUNTS, "new root");
	/* "." is still the folder below the mount: step onto the mount itself. The folder's name is fixed. */
	if (chdir("..") != 0 || chdir("root") != 0)
		fail(MAKE_MOUNTS, "new root");

	show("/usr", "usr");
	show("/lib", "lib");
	show("/lib64", "lib64");
	show("/bin", "bin");
	if (mkdir("etc", 0755) != 0 || mkdir("dev", 0755) != 0 || mkdir("proc", 0755) != 0 || mkdir("tmp", 01777) != 0 ||
	    mkdir("share", 0755) != 0)
		fail(MAKE_MOUNTS, "folders");
	if (chmod("tmp", 01777) != 0)
		fail(MAKE_MOUNTS, "tmp");
	show("/etc/ld.so.cache", "etc/ld.so.cache");
	show("/etc/ld.so.conf", "etc/ld.so.conf");
	show("/etc/ld.so.conf.d", "etc/ld.so.conf.d");
	show("/dev/null", "dev/null");
	show("/dev/urandom", "dev/urandom");
	if (plan->flags & NEED_KVM)
		show("/dev/kvm", "dev/kvm");
	if (mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "hidepid=2") != 0 &&
	    mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) != 0)
		fail(MAKE_MOUNTS, "proc");
	if (share >= 0) {
		if (syscall(__NR_move_mount, share, "", AT_FDCWD, "share", MOVE_MOUNT_F_EMPTY_PATH_) != 0)
			fail(MAKE_MOUNTS, "share");
		/* Its top is only read; what the host binds below arrives as mounts with rules of their own. */
		if (mount(NULL, "share", NULL, MS_REC | MS_SLAVE, NULL) != 0 ||
		    mount(NULL, "share", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) != 0)
			fail(MAKE_MOUNTS, "share");
		close(share);
	}
	/* pivot_root refuses a process that stands in a chroot; there the chroot of a process without rights has to do. */
	if (syscall(__NR_pivot_root, ".", ".") == 0) {
		if (umount2(".", MNT_DETACH) != 0)
			fail(MAKE_MOUNTS, "old root");
	} else if (errno != EINVAL || plan->uid == 0 || plan->uid == KEEP_ID) {
		fail(MAKE_MOUNTS, "pivot_root");
	}
	if (chroot(".") != 0 || chdir("/") != 0)
		fail(MAKE_MOUNTS, "chroot");
}

static void set_oom_score(int wanted)
{
	char text[16];
	int fd, length = snprintf(text, sizeof text, "%d", wanted);

	fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		fail(SET_LIMITS, "oom_score_adj");
	/* EACCES: lower than what we have, without CAP_SYS_RESOURCE. What we have stays. */
	if (write(fd, text, (size_t)length) != length && errno != EACCES)
		fail(SET_LIMITS, "oom_score_adj");
	close(fd);
}

static void set_limits(const struct plan *plan)
{
	uint32_t i;

	set_oom_score(plan->oom_score_adj);
	for (i = 0; i < plan->limit_count; i++) {
		struct rlimit now, wanted = {plan->limits[i].soft, plan->limits[i].hard};

		if (getrlimit((int)plan->limits[i].resource, &now) != 0)
			fail(SET_LIMITS, "getrlimit");
		if (now.rlim_max != RLIM_INFINITY && (wanted.rlim_max == RLIM_INFINITY || wanted.rlim_max > now.rlim_max))
			wanted.rlim_max = now.rlim_max; /* may be lowered only */
		if (wanted.rlim_max != RLIM_INFINITY && (wanted.rlim_cur == RLIM_INFINITY || wanted.rlim_cur > wanted.rlim_max))
			wanted.rlim_cur = wanted.rlim_max;
		if (setrlimit((int)plan->limits[i].resource, &wanted) != 0)
			fail(SET_LIMITS, "setrlimit");
	}
	/* A code buffer in huge pages costs 3.6 MB per machine and gains nothing. */
	if ((plan->flags & NO_HUGE_PAGES) && prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0)
		fail(SET_LIMITS, "huge pages");
}

static void set_user(const struct plan *plan)
{
	struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
	struct __user_cap_data_struct sets[2];
	gid_t groups[MAX_GROUPS];
	uint32_t i;
	int cap;

	if (plan->uid == KEEP_ID)
		return;
	for (cap = 0; cap < 64; cap++)
		if (prctl(PR_CAPBSET_READ, cap, 0, 0, 0) == 1 && !(plan->capabilities >> cap & 1) &&
		    prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) != 0)
			fail(SET_USER, "bounding set");
	for (i = 0; i < plan->group_count; i++)
		groups[i] = plan->groups[i];
	if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) != 0 || setgroups(plan->group_count, groups) != 0 ||
	    setresgid(plan->gid, plan->gid, plan->gid) != 0 || setresuid(plan->uid, plan->uid, plan->uid) != 0)
		fail(SET_USER, "user");
	memset(sets, 0, sizeof sets);
	for (i = 0; i < 2; i++) {
		uint32_t half = (uint32_t)(plan->capabilities >> (32 * i));

		sets[i].effective = sets[i].permitted = sets[i].inheritable = half;
	}
	if (syscall(SYS_capset, &head, sets) != 0)
		fail(SET_USER, "capabilities");
	prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	for (cap = 0; cap < 64; cap++)
		if ((plan->capabilities >> cap & 1) && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0) != 0)
			fail(SET_USER, "ambient capabilities");
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
		fail(SET_USER, "no_new_privs");
}

/* Everything above stderr closes on exec, but for the list, which is kept open even if it was opened otherwise. */
static void close_fds(const struct plan *plan)
{
	uint32_t i;
	int fd;

	if (syscall(__NR_close_range, 3u, ~0u, 4u /* CLOSE_RANGE_CLOEXEC */) != 0) {
		/* Kernels before 5.11: the limit of descriptors bounds the walk. */
		long last = sysconf(_SC_OPEN_MAX);

		for (fd = 3; fd < (last > 0 && last < 65536 ? last : 65536); fd++)
			(void)fcntl(fd, F_SETFD, FD_CLOEXEC);
	}
	for (i = 0; i < plan->kept_count; i++)
		if (fcntl(plan->kept[i], F_SETFD, 0) != 0)
			fail(CLOSE_FDS, "kept descriptor");
}

int main(int argc, char **argv)
{
	static char path[] = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
	static char arena[] = "MALLOC_ARENA_MAX=1";
	static char home[] = "TMPDIR=/tmp";
	char *environment[] = {path, arena, home, NULL};
	struct plan plan;
	sigset_t none;

	if (argc < 3) {
		errno = EINVAL;
		fail(READ_PLAN, "usage: launcher PLAN_FD PROGRAM [ARGUMENT...]");
	}
	read_plan(&plan, argv[1]);
	if (plan.flags & OWN_SESSION)
		(void)setsid();
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	umask(022);
	write_pid(&plan);
	join_cgroups(&plan);
	join_netns(&plan);
	make_mounts(&plan);
	set_limits(&plan);
	umask(077);
	close_fds(&plan);
	set_user(&plan);
	execve(argv[2], argv + 2, environment);
	fail(EXEC, argv[2]);
	return 1;
}
