#include "kept_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "memory_limit.h"

namespace accumloss {
namespace cpu {
namespace {

constexpr size_t kLeast = size_t(1) << 20;

struct Block {
  void* data;
  size_t bytes;
};

constexpr int kMost = 2;  // a gradient, and the scratch that it was made in

std::mutex mutex;
Block* waiting[kMost] = {};  // never destroyed: gradients may be freed after the static objects

bool is_enabled() {
  static const bool enabled = [] {
    const char* wanted = std::getenv("ACCUMLOSS_KEEP_MEMORY");
    return wanted == nullptr || std::strcmp(wanted, "0") != 0;
  }();
  return enabled;
}

// bytes at the start of a huge page, made of such where the system has them on request: fewer pages to fault in, and
// fewer addresses to miss after that. Null where there is no memory.
void* map(size_t bytes) {
  constexpr size_t kHugePage = size_t(2) << 20;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), size = (bytes + page - 1) / page * page;
  const auto map_any = [](size_t size) {
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return data == MAP_FAILED ? nullptr : data;
  };
#if defined(MADV_HUGEPAGE)
  if (size >= 2 * kHugePage) {
    char* const data = static_cast<char*>(map_any(size + kHugePage));
    if (data == nullptr) return nullptr;
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(data) % kHugePage) % kHugePage;
    if (before != 0) munmap(data, before);
    munmap(data + before + size, kHugePage - before);
    madvise(data + before, size, MADV_HUGEPAGE);
    return data + before;
  }
#endif
  return map_any(size);
}

void unmap(Block* block) {
  if (block == nullptr) return;
  munmap(block->data, block->bytes);
  delete block;
}

// Takes the smallest block that holds so many bytes out of those that wait; where none does, the largest.
Block* take_waiting(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  Block** best = nullptr;
  for (Block*& block : waiting) {
    if (block == nullptr) continue;
    if (best == nullptr) {
      best = &block;
      continue;
    }
    const bool fits = block->bytes >= bytes, best_fits = (*best)->bytes >= bytes;
    if (fits ? !best_fits || block->bytes < (*best)->bytes : !best_fits && block->bytes > (*best)->bytes) best = &block;
  }
  if (best == nullptr) return nullptr;
  Block* taken = *best;
  *best = nullptr;
  return taken;
}

size_t bytes_of(const Block* block) { return block == nullptr ? 0 : block->bytes; }

size_t bytes_waiting() {
  const std::lock_guard<std::mutex> lock(mutex);
  size_t bytes = 0;
  for (const Block* block : waiting) bytes += bytes_of(block);
  return bytes;
}

// Lets a block wait: of all that do, the largest that come to no more than most bytes together. The others come back.
std::array<Block*, kMost + 1> let_wait(Block* block, size_t most) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::array<Block*, kMost + 1> all;
  std::copy(std::begin(waiting), std::end(waiting), all.begin());
  all[kMost] = block;
  std::sort(all.begin(), all.end(), [](const Block* a, const Block* b) { return bytes_of(a) > bytes_of(b); });
  std::fill(std::begin(waiting), std::end(waiting), nullptr);
  int kept = 0;
  for (Block*& candidate : all) {
    if (candidate == nullptr || kept == kMost || candidate->bytes > most) continue;
    most -= candidate->bytes;
    waiting[kept++] = candidate;
    candidate = nullptr;
  }
  return all;
}

}  // namespace

void* take_memory(size_t bytes, void** handle) {
  if (bytes < kLeast || !is_enabled()) return nullptr;
  Block* block = take_waiting(bytes);
  if (block == nullptr || block->bytes < bytes) {
    unmap(block);
    void* data = map(bytes);
    if (data == nullptr) return nullptr;
    block = new Block{data, bytes};
  }
  *handle = block;
  return block->data;
}

void release_memory(void*, void* handle) {
  Block* released = static_cast<Block*>(handle);
  const size_t most = most_kept(bytes_waiting() + released->bytes);  // not under the mutex: it reads files
  for (Block* block : let_wait(released, most)) unmap(block);
}

size_t release_kept_memory() {
  size_t bytes = 0;
  while (Block* block = take_waiting(0)) {
    bytes += block->bytes;
    unmap(block);
  }
  return bytes;
}

}  // namespace cpu
}  // namespace accumloss
