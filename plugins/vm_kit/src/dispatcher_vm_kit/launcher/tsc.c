/*
 * Prints how fast the time stamp counter runs, in kHz.
 *
 * A guest under software emulation sees the host's counter, has no other clock to measure it with, and hangs when
 * its guess fails; so it is told. Two readings, each the tightest of many brackets around the monotonic clock.
 */
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#if !defined(__x86_64__)
#error "only x86_64 has a time stamp counter of this kind"
#endif

static uint64_t counter(void)
{
	uint32_t low, high;

	__asm__ volatile("lfence\n\trdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

static void read_both(uint64_t *ticks, uint64_t *nanoseconds)
{
	uint64_t best = UINT64_MAX;
	struct timespec now;
	int i;

	for (i = 0; i < 200; i++) {
		uint64_t before = counter(), after;

		clock_gettime(CLOCK_MONOTONIC_RAW, &now);
		after = counter();
		if (after - before < best) {
			best = after - before;
			*ticks = before + best / 2;
			*nanoseconds = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
		}
	}
}

int main(void)
{
	const struct timespec pause = {.tv_sec = 0, .tv_nsec = 100000000};
	uint64_t first_ticks = 0, first_time = 0, last_ticks = 0, last_time = 0;

	read_both(&first_ticks, &first_time);
	nanosleep(&pause, NULL);
	read_both(&last_ticks, &last_time);
	printf("%llu\n", (unsigned long long)((last_ticks - first_ticks) * 1000000u / (last_time - first_time)));
	return 0;
}
