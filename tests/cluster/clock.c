/* Preloaded into a Redis or Valkey server: its wall clock stands at the microseconds in the file FROZEN_CLOCK.
   Scripts, expiry and idle times read the wall clock; its timers use the monotonic one. Valkey adds what
   passed on the monotonic one since it read the wall clock: with FROZEN_TIMERS that stands still, too. */
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *now_us;

static int64_t now(void) {
    if (now_us == NULL) {
        int file = open(getenv("FROZEN_CLOCK"), O_RDONLY);
        void *page = mmap(NULL, sizeof *now_us, PROT_READ, MAP_SHARED, file, 0);
        if (file < 0 || page == MAP_FAILED) abort();
        close(file);
        now_us = page;
    }
    return *now_us;
}

int gettimeofday(struct timeval *restrict value, void *restrict zone) {
    (void)zone;
    *value = (struct timeval){.tv_sec = now() / 1000000, .tv_usec = now() % 1000000};
    return 0;
}

int clock_gettime(clockid_t clock, struct timespec *value) {
    int stands = clock == CLOCK_REALTIME || (clock == CLOCK_MONOTONIC && getenv("FROZEN_TIMERS"));
    if (!stands) return (int)syscall(SYS_clock_gettime, clock, value);
    *value = (struct timespec){.tv_sec = now() / 1000000, .tv_nsec = now() % 1000000 * 1000};
    return 0;
}

time_t time(time_t *value) {
    time_t seconds = now() / 1000000;
    if (value) *value = seconds;
    return seconds;
}
