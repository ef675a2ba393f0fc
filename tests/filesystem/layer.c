/* A layer between a process and its file system, loaded by LD_PRELOAD: for what lies in LAYER_ROOT it notes what is
   changed (LAYER_LOG), or makes the file system slow, forgetful and faulty (LAYER_DELAY_MS, LAYER_STALE_S,
   LAYER_FAIL: a share of all changes, with LAYER_SEED).

   The log is a line an operation, in the order in which they were done; a write's bytes follow its line:
     open INODE NEW TRUNCATED PATH   write INODE OFFSET LENGTH   sync INODE   syncdir PATH   rename OLD\tNEW
     link OLD\tNEW   unlink PATH   mkdir PATH   rmdir PATH   truncate INODE LENGTH */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define REAL(type, name) ((type)real(#name))
#define MOST_FILES 4096
#define MOST_LISTINGS 512

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *opened[MOST_FILES]; /* path of each open file in the root */
static const char *root;
static int log_file = -1;
static long delay_us;
static double fail_share, stale_seconds;
static unsigned long long state;

static void *real(const char *name) {
  void *found = dlsym(RTLD_NEXT, name);
  if (!found) abort();
  return found;
}

__attribute__((constructor)) static void begin(void) {
  const char *said = getenv("LAYER_LOG");
  root = getenv("LAYER_ROOT");
  if (said) log_file = REAL(int (*)(const char *, int, ...), open64)(said, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  delay_us = 1000 * atol(getenv("LAYER_DELAY_MS") ? getenv("LAYER_DELAY_MS") : "0");
  stale_seconds = atof(getenv("LAYER_STALE_S") ? getenv("LAYER_STALE_S") : "0");
  fail_share = atof(getenv("LAYER_FAIL") ? getenv("LAYER_FAIL") : "0");
  state = 88172645463325252ull ^ (strtoull(getenv("LAYER_SEED") ? getenv("LAYER_SEED") : "1", 0, 10) * 2654435761ull + getpid());
}

/* The absolute path where it lies in the root, else NULL. */
static const char *inside(const char *path, char *whole) {
  if (!root || !path) return NULL;
  if (path[0] == '/') {
    snprintf(whole, PATH_MAX, "%s", path);
  } else {
    char here[PATH_MAX / 2];
    if (!getcwd(here, sizeof here)) return NULL;
    snprintf(whole, PATH_MAX, "%s/%.2000s", here, path);
  }
  size_t length = strlen(root);
  return strncmp(whole, root, length) == 0 && (whole[length] == '/' || !whole[length]) ? whole : NULL;
}

static const char *of_file(int file) { return file >= 0 && file < MOST_FILES ? opened[file] : NULL; }

static unsigned long long next(void) {
  pthread_mutex_lock(&lock);
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  unsigned long long found = state;
  pthread_mutex_unlock(&lock);
  return found >> 8;
}

static void slow(void) {
  int before = errno;
  if (delay_us) usleep(delay_us);
  errno = before;
}

/* 0: goes well. 1: is not done and fails. 2: is done, wholly or by half, and fails all the same. */
static int luck(void) {
  if (fail_share <= 0 || (double)(next() % 1000000) >= 1e6 * fail_share) return 0;
  return 1 + (int)(next() % 2);
}

static int failed(void) {
  static const int errors[] = {EIO, ENOSPC, ESTALE};
  errno = errors[next() % 3];
  return -1;
}

static void note(const void *data, size_t length, const char *format, ...) {
  if (log_file < 0) return;
  int before = errno;
  char line[2 * PATH_MAX + 100];
  va_list values;
  va_start(values, format);
  int size = vsnprintf(line, sizeof line, format, values);
  va_end(values);
  ssize_t (*put)(int, const void *, size_t) = REAL(ssize_t(*)(int, const void *, size_t), write);
  pthread_mutex_lock(&lock);
  if (put(log_file, line, size) != size || (length && put(log_file, data, length) != (ssize_t)length)) abort();
  pthread_mutex_unlock(&lock);
  errno = before;
}

static unsigned long long inode(int file) {
  struct stat about;
  return REAL(int (*)(int, struct stat *), fstat)(file, &about) ? 0 : (unsigned long long)about.st_ino;
}

/* Listings: as they were when this process first asked, for so many seconds, or until it changes the directory. */
struct listing {
  char path[PATH_MAX];
  double at;
  size_t count;
  struct dirent64 *entries;
};
struct shown {
  DIR *real;
  struct listing *listing;
  size_t next;
};
static struct listing listings[MOST_LISTINGS];
static struct shown shown[MOST_LISTINGS];

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void changed(const char *path) {
  const char *end = strrchr(path, '/');
  for (int i = 0; stale_seconds > 0 && i < MOST_LISTINGS; i++)
    if (strlen(listings[i].path) == (size_t)(end - path) && !strncmp(listings[i].path, path, end - path)) listings[i].at = -1e9;
}

DIR *opendir(const char *path) {
  char whole[PATH_MAX];
  DIR *directory = REAL(DIR * (*)(const char *), opendir)(path);
  if (!inside(path, whole)) return directory;
  slow();
  if (!directory || stale_seconds <= 0) return directory;
  struct listing *found = NULL;
  pthread_mutex_lock(&lock);
  for (int i = 0; !found && i < MOST_LISTINGS; i++)
    if (!listings[i].path[0] || !strcmp(listings[i].path, whole)) found = &listings[i];
  if (found && (!found->path[0] || now() - found->at > stale_seconds)) {
    struct dirent64 *(*each)(DIR *) = REAL(struct dirent64 * (*)(DIR *), readdir64), *entry;
    strcpy(found->path, whole);
    found->at = now();
    found->count = 0;
    while ((entry = each(directory))) {
      found->entries = realloc(found->entries, (found->count + 1) * sizeof *entry);
      memcpy(&found->entries[found->count++], entry, entry->d_reclen);
    }
  }
  for (int i = 0; found && i < MOST_LISTINGS; i++)
    if (!shown[i].real) {
      shown[i] = (struct shown){directory, found, 0};
      break;
    }
  pthread_mutex_unlock(&lock);
  return directory;
}

struct dirent64 *readdir64(DIR *directory) {
  for (int i = 0; stale_seconds > 0 && i < MOST_LISTINGS; i++)
    if (shown[i].real == directory) {
      struct listing *from = shown[i].listing;
      return shown[i].next < from->count ? &from->entries[shown[i].next++] : NULL;
    }
  return REAL(struct dirent64 * (*)(DIR *), readdir64)(directory);
}
struct dirent *readdir(DIR *directory) { return (struct dirent *)readdir64(directory); }

int closedir(DIR *directory) {
  for (int i = 0; stale_seconds > 0 && i < MOST_LISTINGS; i++)
    if (shown[i].real == directory) shown[i].real = NULL;
  return REAL(int (*)(DIR *), closedir)(directory);
}

static int opening(const char *name, int at, const char *path, int flags, mode_t mode) {
  char whole[PATH_MAX];
  const char *mine = at == AT_FDCWD || path[0] == '/' ? inside(path, whole) : NULL;
  int may_make = flags & O_CREAT, is_new = mine && may_make && REAL(int (*)(const char *, int), access)(path, F_OK);
  if (mine) slow();
  if (mine && may_make && luck()) return failed();
  int file = !strncmp(name, "openat", 6) ? ((int (*)(int, const char *, int, ...))real(name))(at, path, flags, mode)
                                         : ((int (*)(const char *, int, ...))real(name))(path, flags, mode);
  if (file < 0 || file >= MOST_FILES) return file;
  free(opened[file]);
  opened[file] = mine ? strdup(whole) : NULL;
  if (mine && may_make) changed(whole);
  if (mine && (is_new || flags & O_TRUNC)) note(NULL, 0, "open %llu %d %d %s\n", inode(file), is_new, !!(flags & O_TRUNC), whole);
  return file;
}

#define MODE                                            \
  mode_t mode = 0;                                      \
  if (flags & (O_CREAT | O_TMPFILE)) {                  \
    va_list more;                                       \
    va_start(more, flags), mode = va_arg(more, mode_t); \
    va_end(more);                                       \
  }
int open(const char *path, int flags, ...) { MODE return opening("open", AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opening("open64", AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE return opening("openat", at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE return opening("openat64", at, path, flags, mode); }

int close(int file) {
  if (of_file(file)) free(opened[file]), opened[file] = NULL;
  return REAL(int (*)(int), close)(file);
}

ssize_t write(int file, const void *data, size_t length) {
  ssize_t (*put)(int, const void *, size_t) = REAL(ssize_t(*)(int, const void *, size_t), write);
  if (!of_file(file)) return put(file, data, length);
  int fate = luck();
  if (fate == 1) return failed();
  ssize_t done = put(file, data, fate ? length / 2 : length);
  if (done > 0) {
    long long at = (long long)lseek(file, 0, SEEK_CUR) - done;
    note(data, done, "write %llu %lld %zd\n", inode(file), at, done);
  }
  return fate ? failed() : done;
}

static int syncing(const char *name, int file) {
  struct stat about;
  const char *path = of_file(file);
  int fate = path ? luck() : 0;
  if (path) slow();
  int done = fate == 1 ? 0 : ((int (*)(int))real(name))(file);
  if (path && !done && !fate && !REAL(int (*)(int, struct stat *), fstat)(file, &about)) {
    if (S_ISDIR(about.st_mode)) note(NULL, 0, "syncdir %s\n", path);
    else note(NULL, 0, "sync %llu\n", (unsigned long long)about.st_ino);
  }
  return fate ? failed() : done;
}
int fsync(int file) { return syncing("fsync", file); }
int fdatasync(int file) { return syncing("fdatasync", file); }

int ftruncate64(int file, off64_t length) {
  int done = REAL(int (*)(int, off64_t), ftruncate64)(file, length);
  if (!done && of_file(file)) note(NULL, 0, "truncate %llu %lld\n", inode(file), (long long)length);
  return done;
}
int ftruncate(int file, off_t length) { return ftruncate64(file, length); }

/* A change of names, which may fail before it is done or after. */
#define CHANGE(word, old, fresh, call)                                                                     \
  char a[PATH_MAX], b[PATH_MAX];                                                                           \
  const char *from = inside(old, a), *to = inside(fresh, b);                                               \
  if (!from && !to) return call;                                                                           \
  slow();                                                                                                  \
  int fate = luck();                                                                                       \
  if (fate == 1) return failed();                                                                          \
  int done = call;                                                                                         \
  if (from) changed(a);                                                                                    \
  if (to) changed(b);                                                                                      \
  if (!done) note(NULL, 0, to ? word " %s\t%s\n" : word " %s\n", from ? a : old, to ? b : "");             \
  return done ? done : fate ? failed() : done;

typedef int (*Two)(const char *, const char *);
typedef int (*One)(const char *);
int rename(const char *old, const char *fresh) { CHANGE("rename", old, fresh, REAL(Two, rename)(old, fresh)) }
int link(const char *old, const char *fresh) { CHANGE("link", old, fresh, REAL(Two, link)(old, fresh)) }
int unlink(const char *path) { CHANGE("unlink", path, NULL, REAL(One, unlink)(path)) }
int rmdir(const char *path) { CHANGE("rmdir", path, NULL, REAL(One, rmdir)(path)) }
int mkdir(const char *path, mode_t mode) {
  CHANGE("mkdir", path, NULL, REAL(int (*)(const char *, mode_t), mkdir)(path, mode))
}

/* What is asked of a name takes a round trip, too. */
#define ASK(type, name, parameters, arguments) \
  type name parameters {                       \
    char whole[PATH_MAX];                      \
    if (inside(path, whole)) slow();           \
    return ((type(*) parameters)real(#name)) arguments; \
  }
ASK(int, stat, (const char *path, struct stat *about), (path, about))
ASK(int, stat64, (const char *path, struct stat64 *about), (path, about))
ASK(int, lstat, (const char *path, struct stat *about), (path, about))
ASK(int, lstat64, (const char *path, struct stat64 *about), (path, about))
ASK(int, access, (const char *path, int mode), (path, mode))
ASK(int, chmod, (const char *path, mode_t mode), (path, mode))
