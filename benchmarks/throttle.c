/* A slow disk for the process it is preloaded into: reads end no sooner than it delivers.
 *
 * The disk delivers `rate` bytes a second, and may have read `window` bytes ahead of what was
 * asked for, as the kernel's readahead does. Every read of the process is counted, whoever asks
 * (SQLite, the C library, llama.cpp, Python); mapped files are not. See throttle.py.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static double rate, window, ready; /* bytes a second (0: no limit), bytes, seconds */
static unsigned long long counted;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

void throttle_set(double new_rate, double new_window) {
  pthread_mutex_lock(&lock);
  rate = new_rate;
  window = new_window;
  ready = 0;
  counted = 0;
  pthread_mutex_unlock(&lock);
}

unsigned long long throttle_counted(void) { return counted; }

static void charge(double began, ssize_t n) {
  double wait = 0;
  if (n <= 0 || rate <= 0) return;
  pthread_mutex_lock(&lock);
  counted += n;
  if (ready < began - window / rate) ready = began - window / rate;
  ready += n / rate;
  wait = ready - now();
  pthread_mutex_unlock(&lock);
  /* Shorter waits take longer than they say; they add up until one is worth it. */
  if (wait > 2e-4) {
    struct timespec t = {(time_t)wait, (long)((wait - (time_t)wait) * 1e9)};
    nanosleep(&t, NULL);
  }
}

#define REAL(type, name, ...) \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name);

ssize_t read(int fd, void *to, size_t n) {
  REAL(ssize_t, "read", int, void *, size_t)
  double began = now();
  ssize_t got = real(fd, to, n);
  charge(began, got);
  return got;
}

ssize_t pread64(int fd, void *to, size_t n, off64_t at) {
  REAL(ssize_t, "pread64", int, void *, size_t, off64_t)
  double began = now();
  ssize_t got = real(fd, to, n, at);
  charge(began, got);
  return got;
}

ssize_t pread(int fd, void *to, size_t n, off_t at) { return pread64(fd, to, n, at); }

size_t fread(void *to, size_t size, size_t n, FILE *file) {
  REAL(size_t, "fread", void *, size_t, size_t, FILE *)
  double began = now();
  size_t got = real(to, size, n, file);
  charge(began, (ssize_t)(got * size));
  return got;
}
