/*
 * The first process of a test's guest: loads modules, then runs each line that comes over the agent's port in a shell.
 *
 * The answer to a line is its output, then "\n.END code\n". "ping" is answered with "pong" without a shell. A host that
 * goes away is waited for.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void load(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) != 0)
		fprintf(stderr, "init: %s: %s\n", path, strerror(errno));
	if (fd >= 0)
		close(fd);
}

static int find_port(void)
{
	DIR *folder = opendir("/sys/class/virtio-ports");
	struct dirent *entry;
	char path[300], name[64];
	int fd = -1, length;

	while (folder && fd < 0 && (entry = readdir(folder))) {
		snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		length = (int)read(fd, name, sizeof name);
		close(fd);
		fd = -1;
		if (length > 16 && !strncmp(name, "dispatcher.agent", 16)) {
			snprintf(path, sizeof path, "/dev/%s", entry->d_name);
			fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
		}
	}
	if (folder)
		closedir(folder);
	return fd;
}

static void say(int port, const char *text, int length)
{
	while (length > 0) {
		int sent = (int)write(port, text, (size_t)length);

		if (sent < 0) {
			struct pollfd ready = {port, POLLOUT, 0};

			if (errno != EAGAIN)
				return;
			poll(&ready, 1, 200);
			continue;
		}
		text += sent;
		length -= sent;
	}
}

static void run(int port, const char *line)
{
	char chunk[4096];
	int ends[2], status = 0, length;
	pid_t child;

	if (pipe2(ends, O_CLOEXEC) != 0)
		return;
	child = fork();
	if (child == 0) {
		dup2(ends[1], 1);
		dup2(ends[1], 2);
		dup2(open("/dev/null", O_RDONLY), 0);
		execl("/bin/busybox", "sh", "-c", line, (char *)0);
		_exit(127);
	}
	close(ends[1]);
	while ((length = (int)read(ends[0], chunk, sizeof chunk)) > 0)
		say(port, chunk, length);
	close(ends[0]);
	waitpid(child, &status, 0);
	length = snprintf(chunk, sizeof chunk, "\n.END %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
	say(port, chunk, length);
}

int main(void)
{
	static char buffer[65536];
	char line[256], *end;
	int port, console, have = 0, length;
	FILE *modules;

	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/mnt", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	console = open("/dev/console", O_RDWR);
	for (length = 0; length < 3; length++)
		dup2(console, length);
	setenv("PATH", "/bin", 1);
	modules = fopen("/modules", "r");
	while (modules && fgets(line, sizeof line, modules)) {
		line[strcspn(line, "\n")] = '\0';
		load(line);
	}
	while ((port = find_port()) < 0)
		usleep(2000);
	fprintf(stderr, "init: the guest is up\n");
	for (;;) {
		struct pollfd ready = {port, POLLIN, 0};

		poll(&ready, 1, -1);
		length = (int)read(port, buffer + have, sizeof buffer - 1 - (size_t)have);
		if (length <= 0) { /* nobody is connected */
			usleep(5000);
			continue;
		}
		have += length;
		buffer[have] = '\0';
		while ((end = strchr(buffer, '\n'))) {
			*end = '\0';
			if (!strcmp(buffer, "ping"))
				say(port, "pong\n", 5);
			else
				run(port, buffer);
			length = (int)(end + 1 - buffer);
			memmove(buffer, end + 1, (size_t)(have - length) + 1);
			have -= length;
		}
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}
