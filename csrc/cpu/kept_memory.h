// Memory for the large gradients of the CPU ops, kept from one call to the next.
//
// malloc maps a large buffer anew for every call and unmaps it after, so that every gradient is page-faulted into
// existence, which takes several times as long as the loss. Here the block of a gradient that was freed waits for the
// next one: two blocks in a process, the largest, since a head's gradient and the scratch that it is made in are there
// together. What waits is no more than memory_limit.h allows, both blocks together, asked whenever a block is kept.
#pragma once

#include <cstddef>

namespace accumloss {
namespace cpu {

// take_memory and release_memory of Backend. Null where the bytes are few (malloc keeps those by itself), where
// ACCUMLOSS_KEEP_MEMORY=0, or where the system has none.
void* take_memory(size_t bytes, void** handle);
void release_memory(void* data, void* handle);

// Returns the blocks that wait to the system, and their bytes to the caller.
size_t release_kept_memory();

}  // namespace cpu
}  // namespace accumloss
