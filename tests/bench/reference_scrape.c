// SPDX-License-Identifier: Apache-2.0
// The plain C program that the agent is compared with: finds every vCPU's statistics fd once, then a round duplicates,
// reads and closes each, and prints two series a vCPU into memory. Prints the number of vCPUs and how long finding took,
// then of each round how long it took and how much CPU time, all in milliseconds.
#define _GNU_SOURCE
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <linux/kvm.h>

#define STATS "anon_inode:kvm-vcpu-stats:"

struct vcpu {
	int pid, fd, vcpu_id;
};

static struct vcpu *vcpus;
static size_t count, room;

static double read_ms(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void add(int pid, int fd, int vcpu_id)
{
	if (count == room) {
		room = room ? room * 2 : 1024;
		vcpus = realloc(vcpus, room * sizeof(*vcpus));
		if (!vcpus)
			exit(1);
	}
	vcpus[count++] = (struct vcpu){ pid, fd, vcpu_id };
}

static void find_in_process(int pid)
{
	char path[64], link[128];
	struct dirent *entry;
	DIR *fds;

	snprintf(path, sizeof(path), "/proc/%d/fd", pid);
	fds = opendir(path);
	if (!fds)
		return;
	while ((entry = readdir(fds))) {
		ssize_t n = readlinkat(dirfd(fds), entry->d_name, link, sizeof(link) - 1);

		if (n <= 0)
			continue;
		link[n] = 0;
		if (!strncmp(link, STATS, strlen(STATS)))
			add(pid, atoi(entry->d_name), atoi(link + strlen(STATS)));
	}
	closedir(fds);
}

static void find_all(void)
{
	struct dirent *entry;
	DIR *proc = opendir("/proc");

	while (proc && (entry = readdir(proc)))
		if (atoi(entry->d_name) > 0 && atoi(entry->d_name) != getpid())
			find_in_process(atoi(entry->d_name));
	closedir(proc);
}

// Where the two counters stand, from the descriptors of one file.
static void find_offsets(int fd, off_t *notify, off_t *exits)
{
	struct kvm_stats_header header;
	struct kvm_stats_desc *desc;

	if (pread(fd, &header, sizeof(header), 0) != sizeof(header))
		return;
	desc = malloc(sizeof(*desc) + header.name_size);
	for (unsigned int i = 0; i < header.num_desc; i++) {
		size_t size = sizeof(*desc) + header.name_size;

		if (pread(fd, desc, size, header.desc_offset + i * size) != (ssize_t)size)
			break;
		if (!strcmp(desc->name, "notify_window_exits"))
			*notify = header.data_offset + desc->offset;
		if (!strcmp(desc->name, "exits"))
			*exits = header.data_offset + desc->offset;
	}
	free(desc);
}

static size_t scrape(char *out)
{
	static off_t notify, exits;
	char block[4096];
	int pid = -1, pidfd = -1;
	size_t used = 0;

	for (size_t i = 0; i < count; i++) {
		struct vcpu *v = &vcpus[i];
		ssize_t length;
		off_t low;
		int fd;

		if (v->pid != pid) {
			if (pidfd >= 0)
				close(pidfd);
			pid = v->pid;
			pidfd = syscall(SYS_pidfd_open, pid, 0);
		}
		fd = syscall(SYS_pidfd_getfd, pidfd, v->fd, 0);
		if (fd < 0)
			continue; // a VM of somebody else's, which has ended since
		if (!notify)
			find_offsets(fd, &notify, &exits);
		low = notify < exits ? notify : exits;
		length = pread(fd, block, llabs(notify - exits) + 8, low);
		close(fd);
		if (length < 16)
			continue; // the fd holds another file by now
		used += sprintf(out + used, "kvm_vcpu_notify_window_exits_total{vcpu=\"%d\",vm=\"vmm-%d\"} %llu\n",
				v->vcpu_id, pid, *(unsigned long long *)(block + notify - low));
		used += sprintf(out + used, "kvm_vcpu_exits_total{vcpu=\"%d\",vm=\"vmm-%d\"} %llu\n", v->vcpu_id,
				pid, *(unsigned long long *)(block + exits - low));
	}
	if (pidfd >= 0)
		close(pidfd);
	return used;
}

int main(int argc, char **argv)
{
	double started = read_ms(CLOCK_MONOTONIC), cpu_before;
	char *out;

	find_all();
	printf("%zu %.3f\n", count, read_ms(CLOCK_MONOTONIC) - started);
	out = malloc(count * 256 + 1);
	for (int round = 0; round < (argc > 1 ? atoi(argv[1]) : 5); round++) {
		started = read_ms(CLOCK_MONOTONIC);
		cpu_before = read_ms(CLOCK_PROCESS_CPUTIME_ID);
		scrape(out);
		printf("%.3f %.3f\n", read_ms(CLOCK_MONOTONIC) - started,
		       read_ms(CLOCK_PROCESS_CPUTIME_ID) - cpu_before);
	}
	free(out);
	return 0;
}
