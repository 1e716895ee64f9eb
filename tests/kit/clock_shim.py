"""A C library that turns the clocks of a process while it runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

# Replaces the clocks of the C library. A file holds two numbers of seconds: the offset of the wall clock, and the time
# for which the machine was suspended.
_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static int (*real_clock_gettime)(clockid_t, struct timespec *);
static volatile long *offset_s;

__attribute__((constructor)) static void prepare(void) {
    real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    int file = open(getenv("CLOCK_OFFSET_FILE"), O_RDONLY);
    offset_s = mmap(NULL, 2 * sizeof(long), PROT_READ, MAP_SHARED, file, 0);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = real_clock_gettime(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += offset_s[0];
    if (clock == CLOCK_BOOTTIME) now->tv_sec += offset_s[1];
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (now) *now = precise.tv_sec;
    return precise.tv_sec;
}
"""
COMPILER = shutil.which("gcc") or shutil.which("cc")
NEEDED = "needs a C compiler to turn the clock: apt-get install gcc libc6-dev"


class ClockShim:
    """The library for one process, which has to be started with `environ`.

    :raises AssertionError: without a `COMPILER`.
    """

    def __init__(self, directory: Path) -> None:
        assert COMPILER is not None, NEEDED
        source, library, self._offsets = (directory / name for name in ("shim.c", "shim.so", "offset"))
        source.write_text(_SOURCE)
        subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        self._offsets.write_bytes(bytes(16))
        self.environ = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(self._offsets)}

    def turn(self, offset_s: int, suspended_s: int = 0) -> None:
        """Set the offset of the wall clock, and how long the machine was suspended."""
        with self._offsets.open("r+b") as file:
            file.write(b"".join(seconds.to_bytes(8, sys.byteorder, signed=True) for seconds in (offset_s, suspended_s)))
