/*
 * The first process of a Docker pod: it keeps the pod's namespaces alive and does nothing else.
 *
 * Order of work: enter the network namespace whose file is mounted at argv[1] (none for a pod on the host's
 * network), become nobody with no capability in any set and no way back (no_new_privs), then reap orphans, since it
 * is PID 1 where containers share the pod's PID namespace. It leaves on SIGTERM, SIGINT and SIGQUIT.
 *
 * It is built without a C library, so that it is small, static and equal wherever it is built. The exit code names
 * the step that failed (see main); the engine reports it and the dispatcher explains it.
 */
#include <asm/unistd.h>
#include <linux/capability.h>
#include <linux/prctl.h>
#include <linux/sched.h>

#if defined(__x86_64__)
static long call(long n, long a, long b, long c, long d, long e)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	long r;

	__asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
	return r;
}
__asm__(".globl _start\n_start:\n\txor %ebp,%ebp\n\tmov %rsp,%rdi\n\tand $-16,%rsp\n\tcall start_c\n");
#elif defined(__aarch64__)
static long call(long n, long a, long b, long c, long d, long e)
{
	register long x8 __asm__("x8") = n;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;

	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
	return x0;
}
__asm__(".globl _start\n_start:\n\tmov x29,#0\n\tmov x30,#0\n\tmov x0,sp\n\tand sp,x0,#-16\n\tbl start_c\n");
#else
#error "pause.c knows x86_64 and aarch64; add the system call sequence of this machine"
#endif

#define AT_FDCWD_ (-100L)
#define O_RDONLY_CLOEXEC_ 02000000L
#define CHILD_ 17
#define NOBODY_ 65534L
#define LAST_CAP_TRIED_ 63L

/* Signals are taken by sigtimedwait's kin, not by handlers: the set is blocked, then read one by one. */
static const unsigned long long signals = (1ULL << (2 - 1)) | (1ULL << (3 - 1)) | (1ULL << (15 - 1)) | (1ULL << (CHILD_ - 1));

static long drop_privileges(void)
{
	struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
	struct __user_cap_data_struct none[2] = {{0, 0, 0}, {0, 0, 0}};
	long cap;

	for (cap = 0; cap <= LAST_CAP_TRIED_; cap++)
		if (call(__NR_prctl, PR_CAPBSET_READ, cap, 0, 0, 0) == 1 &&
		    call(__NR_prctl, PR_CAPBSET_DROP, cap, 0, 0, 0) != 0)
			return 13;
	/* PR_CAP_AMBIENT is unknown to kernels before 4.3, which have no ambient set to clear. */
	call(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	if (call(__NR_setgroups, 0, 0, 0, 0, 0) != 0)
		return 14;
	if (call(__NR_setresgid, NOBODY_, NOBODY_, NOBODY_, 0, 0) != 0)
		return 15;
	if (call(__NR_setresuid, NOBODY_, NOBODY_, NOBODY_, 0, 0) != 0)
		return 16;
	if (call(__NR_capset, (long)&head, (long)none, 0, 0, 0) != 0)
		return 17;
	if (call(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
		return 18;
	return 0;
}

static long run(const char *netns)
{
	long failed, fd, got;

	if (call(__NR_rt_sigprocmask, 0 /* SIG_BLOCK */, (long)&signals, 0, 8, 0) != 0)
		return 10;
	if (netns) {
		fd = call(__NR_openat, AT_FDCWD_, (long)netns, O_RDONLY_CLOEXEC_, 0, 0);
		if (fd < 0)
			return 11;
		if (call(__NR_setns, fd, CLONE_NEWNET, 0, 0, 0) != 0)
			return 12;
		call(__NR_close, fd, 0, 0, 0, 0);
	}
	failed = drop_privileges();
	if (failed)
		return failed;
	for (;;) {
		got = call(__NR_rt_sigtimedwait, (long)&signals, 0, 0, 8, 0);
		if (got == CHILD_) {
			while (call(__NR_wait4, -1, 0, 1 /* WNOHANG */, 0, 0) > 0)
				;
		} else if (got > 0) {
			return 0;
		}
	}
}

/* stack: argc, argv[0], argv[1], ... as the kernel laid it out. */
__attribute__((used, noreturn)) static void start_c(long *stack)
{
	const char **argv = (const char **)(stack + 1);

	call(__NR_exit_group, run(stack[0] > 1 ? argv[1] : 0), 0, 0, 0, 0);
	for (;;)
		;
}
