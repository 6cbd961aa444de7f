// How much memory may wait idle: what the machine has, and what the control groups of the process leave.
#pragma once

#include <cstddef>
#include <string>

namespace accumloss {
namespace cpu {

// An eighth of the machine's memory, or of (limit - use) of the tightest of the process's control groups and their
// ancestors, version 1 or 2, where that is less; 0 where a limit is known and the use is not. Where no less than wanted
// is left it may say fewer bytes than are left, but no fewer than wanted. The files are read anew in every call.
size_t most_kept(size_t wanted) noexcept;

// The folder whose /proc/self and whose mounts most_kept reads, "" for those of the system. For tests.
void read_limits_below(const std::string& folder);

}  // namespace cpu
}  // namespace accumloss
