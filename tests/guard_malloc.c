// Preloaded: while guard_malloc(1), aligned memory ends at a page that must not be touched, as exactly as its alignment
// allows; the bytes between are looked at when it is freed, and are before it too. One thread.
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

extern void __libc_free(void* memory);
extern void* __libc_memalign(size_t alignment, size_t size);

enum { kBlocks = 4096, kPage = 4096, kFill = 0xa5 };
static struct {
  unsigned char *map, *memory;
  size_t bytes, size;
} blocks[kBlocks];
static int is_on, count;

int guard_malloc(int on) {
  is_on = on;
  return count;  // of what was guarded so far
}

static void* allocate(size_t alignment, size_t size) {
  if (!is_on || size == 0) return __libc_memalign(alignment, size);
  int i = 0;
  while (i < kBlocks && blocks[i].map != NULL) ++i;
  if (i == kBlocks) abort();
  const size_t pages = (size + alignment + kPage - 1) / kPage * kPage;
  unsigned char* map = mmap(NULL, pages + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED || mprotect(map + kPage, pages, PROT_READ | PROT_WRITE) != 0) return NULL;
  unsigned char* memory = (unsigned char*)(((uintptr_t)map + kPage + pages - size) / alignment * alignment);
  memset(map + kPage, kFill, pages);
  blocks[i].map = map;
  blocks[i].memory = memory;
  blocks[i].bytes = pages + 2 * kPage;
  blocks[i].size = size;
  ++count;
  return memory;
}

int posix_memalign(void** out, size_t alignment, size_t size) {
  *out = allocate(alignment, size);
  return *out == NULL ? ENOMEM : 0;
}
void* aligned_alloc(size_t alignment, size_t size) { return allocate(alignment, size); }
void* memalign(size_t alignment, size_t size) { return allocate(alignment, size); }

void free(void* memory) {
  for (int i = 0; count > 0 && i < kBlocks; ++i) {
    if (blocks[i].map == NULL || blocks[i].memory != memory) continue;
    const unsigned char* end = blocks[i].map + blocks[i].bytes - kPage;
    for (const unsigned char* at = blocks[i].map + kPage; at < end; ++at) {
      if (at == blocks[i].memory) at += blocks[i].size;
      if (at < end && *at != kFill) {
        static const char message[] = "guard_malloc: bytes beside an allocation were written\n";
        if (write(2, message, sizeof message - 1) < 0) abort();
        abort();
      }
    }
    munmap(blocks[i].map, blocks[i].bytes);
    blocks[i].map = NULL;
    return;
  }
  __libc_free(memory);
}
