#include "kept_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <mutex>

namespace accumloss {
namespace cpu {
namespace {

constexpr size_t kLeast = size_t(1) << 20;

struct Block {
  void* data;
  size_t bytes;
};

std::mutex mutex;
Block* waiting = nullptr;  // never destroyed: gradients may be freed after the static objects

bool is_enabled() {
  static const bool enabled = [] {
    const char* wanted = std::getenv("ACCUMLOSS_KEEP_MEMORY");
    return wanted == nullptr || std::strcmp(wanted, "0") != 0;
  }();
  return enabled;
}

size_t most_kept() {
  static const size_t most =
      static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE)) / 8;
  return most;
}

Block* exchange_waiting(Block* block) {
  const std::lock_guard<std::mutex> lock(mutex);
  Block* before = waiting;
  waiting = block;
  return before;
}

void unmap(Block* block) {
  if (block == nullptr) return;
  munmap(block->data, block->bytes);
  delete block;
}

}  // namespace

void* take_memory(size_t bytes, void** handle) {
  if (bytes < kLeast || !is_enabled()) return nullptr;
  Block* block = exchange_waiting(nullptr);
  if (block == nullptr || block->bytes < bytes) {
    unmap(block);
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    block = new Block{data, bytes};
  }
  *handle = block;
  return block->data;
}

void release_memory(void*, void* handle) {
  Block* block = static_cast<Block*>(handle);
  if (block->bytes > most_kept()) return unmap(block);
  Block* other = exchange_waiting(block);
  if (other != nullptr && other->bytes > block->bytes) other = exchange_waiting(other);
  unmap(other);
}

size_t release_kept_memory() {
  Block* block = exchange_waiting(nullptr);
  const size_t bytes = block != nullptr ? block->bytes : 0;
  unmap(block);
  return bytes;
}

}  // namespace cpu
}  // namespace accumloss
