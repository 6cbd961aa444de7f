// Which kernel serves a call: the one table. No CUDA header: accumloss.plan() shows the table on any machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../backend.h"

namespace accumloss::cuda {

enum class Pass { kForward, kBackward, kForwardWithGrad };

enum class Kernel {
  kPacked,      // 8 lanes a row
  kWarp,        // a warp a row
  kHeld,        // a block a row, which waits in shared memory for its gradient
  kStaged,      // persistent clusters of blocks; bulk copies bring the next rows while one is reduced
  kBlock,       // a block a row, visited twice: for any row
  kPartlyHeld,  // held as far as there is room; the rest visited twice
};
constexpr const char* kKernelNames[] = {"packed", "warp", "held", "staged", "block", "partly_held"};
constexpr int kKernels = 6;

struct Plan {
  Kernel kernel;
  int threads;               // of a block
  int cluster;               // blocks that share a row
  int stages;                // rows on chip or on their way, per cluster; staged only
  int64_t stage_bytes;       // of one block
  int64_t shared_bytes;      // of one block
  double bytes_per_element;  // of device memory, read and written
  int groups = 1;            // of threads, each with a row of its own; packed, warp and staged
  int64_t header_bytes = 0;  // of shared_bytes, before the stages; staged only
  int64_t resident = 0;      // clusters (of one block: blocks) that the device runs at once; 0: not known
};

// What the plan depends on.
struct PlanRequest {
  int64_t V;
  Dtype dtype;
  Pass pass;
  int capability;        // 10 * major + minor
  bool aligned;          // each row of the gradient lies against 16 bytes as its logits do
  bool staged;           // the kernels for sm_90 and newer are built in, run on the device, and find room for a cluster
  bool general = false;  // transform, smoothing or metrics; or a type or size that has no other kernels
};

// What one block may have at most. The CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
constexpr int64_t max_shared_bytes(int capability) {
  constexpr int64_t kKiB = 1024;
  switch (capability) {
    case 75:
      return 64 * kKiB;
    case 80:
    case 87:
      return 163 * kKiB;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 * kKiB;
    default:
      return capability >= 90 ? 227 * kKiB : 48 * kKiB;
  }
}

// Multiprocessors as NVIDIA's whitepapers give them, and how they lie in GPCs, within one of which a cluster lives: an
// assumption, as it differs from chip to chip. Only what accumloss.plan() shows where the GPU is not there.
struct Gpu {
  const char* name;
  int capability;
  int multiprocessors;
  int gpcs[8];  // multiprocessors of each, where there are clusters
};
constexpr Gpu kGpus[] = {
    {"T4", 75, 40, {}},
    {"A100", 80, 108, {}},
    {"RTX 4090", 89, 128, {}},
    {"H100", 90, 132, {18, 18, 16, 16, 16, 16, 16, 16}},
    {"H200", 90, 132, {18, 18, 16, 16, 16, 16, 16, 16}},
    {"B200", 100, 148, {20, 20, 18, 18, 18, 18, 18, 18}},
    {"RTX 5090", 120, 170, {}},
};

// Threads of a multiprocessor. As above.
constexpr int max_threads(int capability) {
  return capability == 75 ? 1024 : capability == 80 || (capability >= 90 && capability < 120) ? 2048 : 1536;
}

// What a block takes of a multiprocessor's shared memory: the device keeps 1 KiB of each, which sm_75 does not.
constexpr int64_t shared_bytes_kept(int capability) { return capability == 75 ? 0 : 1024; }

// A multiprocessor's share of the L2: A100, RTX 4090 and RTX 5090, which of their capability have the least, and others
// that have little. Rows of sm_90 and sm_100 are on chip.
constexpr int64_t cache_of_multiprocessor(int capability) {
  constexpr int64_t kKiB = 1024;
  return capability == 80                                             ? 379 * kKiB
         : capability == 89 || capability == 120 || capability == 121 ? 576 * kKiB
                                                                      : 64 * kKiB;
}

// A row of the tile kernels is in registers: so much of it in each of its lanes.
constexpr int64_t kTileElements = 32;
constexpr int kFewestLanes = 4;
constexpr int64_t kPackedClasses = 16 * kTileElements;
constexpr int64_t kWarpClasses = 32 * kTileElements;
constexpr int kTileThreads = 256;
constexpr int kTileRows = 4;  // of a group of lanes, one after the other
constexpr int kMaxThreads = 512;
constexpr int kMaxCluster = 8;
constexpr int kMaxGroups = 8;
constexpr int kMaxStages = 9;  // a row for each group, and one on its way
constexpr int kStagedMaxThreads = 640;
constexpr int64_t kStagedTarget = 65536;            // bytes on chip for which rows get more stages than that
constexpr int64_t kStagedSharedBytes = 227 * 1024;  // of a block, on the devices that the stages are counted for
constexpr int64_t kBlockHeader = 2048;              // BlockGroup::kSharedBytes
constexpr int64_t kHeldHeader = 1024;               // where it merges no doubles
constexpr int64_t kStagedHeader = 768;              // StagedShared
constexpr int64_t kStagedSums = 16;                 // StagedSums, of a warp
constexpr int64_t kStagedSumsGeneral = 32;
constexpr int kStagedHelpers = 32;  // threads of the warp that brings rows
constexpr int64_t kStageAlignment = 128;
constexpr int64_t kVector = 16;

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Of a block that has a row: four rounds of 16 elements for each thread. Fewer warps do less once a row, and more rows
// fill the waits.
inline int block_threads(int64_t elements) {
  int threads = 128;
  while (threads < kMaxThreads && elements >= 4 * threads * 16) threads *= 2;
  return threads;
}

// How the threads of a staged block share rows: small groups at small rows, as a group does the same once a row however
// many warps it has, and waits as long; few at long ones, of which few are on chip.
struct Groups {
  int count, threads;
};
constexpr Groups staged_groups(int64_t bytes) {
  return bytes <= 1024    ? Groups{8, 32}
         : bytes <= 4096  ? Groups{8, 64}
         : bytes <= 32768 ? Groups{4, 128}
                          : Groups{2, 256};
}

// The staged plan with that many blocks in a cluster; shared_bytes says whether it fits. A slice is rounded out to 16
// bytes at both ends of the row.
inline Plan staged_plan(const PlanRequest& request, int cluster) {
  const int64_t size = element_size(request.dtype);
  const int64_t vectors = round_up(request.V * size + 16 - size, 16) / 16;
  const int64_t slice = (vectors + cluster - 1) / cluster * 16;
  const Groups groups = staged_groups(request.V * size / cluster);
  Plan plan = {Kernel::kStaged, groups.count * groups.threads + kStagedHelpers, cluster, 0, 0, 0, 0, groups.count, 0};
  plan.stage_bytes = round_up(slice, kStageAlignment);
  const int most = std::min(kMaxStages, 2 * groups.count);
  plan.stages =
      static_cast<int>(std::min<int64_t>(most, std::max<int64_t>(groups.count + 1, kStagedTarget / plan.stage_bytes)));
  const int64_t sums = 2 * cluster * (groups.count * groups.threads / 32);  // each warp's, twice
  plan.header_bytes = kStagedHeader + sums * (request.general ? kStagedSumsGeneral : kStagedSums);
  plan.header_bytes = round_up(plan.header_bytes, kStageAlignment);
  plan.shared_bytes = plan.header_bytes + plan.stages * plan.stage_bytes;
  return plan;
}

inline bool fits(const PlanRequest& request, const Plan& plan) {
  const bool is_double = request.dtype == Dtype::kFloat64;
  const bool room = plan.shared_bytes <= max_shared_bytes(request.capability);
  switch (plan.kernel) {
    case Kernel::kPacked:
      return request.V <= kPackedClasses;
    case Kernel::kWarp:
      return request.V <= kWarpClasses;
    case Kernel::kHeld:
      return request.pass == Pass::kForwardWithGrad && !is_double && request.aligned && room;
    case Kernel::kStaged:
      return request.pass != Pass::kBackward && !is_double && request.aligned && room && request.staged &&
             request.capability >= 90 && max_shared_bytes(request.capability) >= kStagedSharedBytes;
    case Kernel::kBlock:
      return true;
    case Kernel::kPartlyHeld:
      return request.pass == Pass::kForwardWithGrad && !is_double && request.aligned && !request.general && room &&
             plan.shared_bytes > kHeldHeader;
  }
  return false;
}

// Rows of the block kernel that a multiprocessor has at once: two, or one, so that its second visit finds it in the L2.
constexpr int block_rows(const PlanRequest& request) {
  const int64_t bytes = request.V * element_size(request.dtype), cache = cache_of_multiprocessor(request.capability);
  return request.pass == Pass::kForwardWithGrad && 2 * bytes > cache && bytes <= cache ? 1 : 2;
}
constexpr bool finds_row_again(const PlanRequest& request) {
  return block_rows(request) * request.V * element_size(request.dtype) <= cache_of_multiprocessor(request.capability);
}

// Of a block that holds a row: some rows of a multiprocessor share 512 threads, as the groups of a staged block do.
constexpr int held_threads(int64_t bytes) { return bytes <= 20480 ? 128 : bytes <= 81920 ? 256 : kMaxThreads; }
constexpr int kHeldParts = 8;  // 7 batches of copies are on their way while the first is waited for

// What a partly held row is held in: passes of four vectors of each thread.
constexpr int64_t pass_bytes(int threads) { return 4 * kVector * threads; }
// Whether the L2 has what is not held of so many rows of a multiprocessor when they are visited again.
constexpr bool finds_rest_again(const PlanRequest& request, const Plan& plan, int rows) {
  const int64_t rest = request.V * element_size(request.dtype) - (plan.shared_bytes - kHeldHeader);
  return rows * rest <= cache_of_multiprocessor(request.capability);
}

// Of a multiprocessor that has so many blocks, each with a row. passes: that are held; 0: as many as there is room for.
inline Plan partly_held_plan(const PlanRequest& request, int blocks, int64_t passes = 0) {
  const int64_t kept = shared_bytes_kept(request.capability), bytes = request.V * element_size(request.dtype);
  const int64_t room = (max_shared_bytes(request.capability) + kept) / blocks - kept - kHeldHeader;
  int threads = std::min(held_threads(bytes), kMaxThreads / blocks);
  if (room < 2 * pass_bytes(threads)) threads /= 2;  // whose passes fill the room better
  if (passes == 0) passes = std::min<int64_t>(kHeldParts, room / pass_bytes(threads));
  Plan plan = {Kernel::kPartlyHeld, threads, 1, 0, 0, 0, 0};
  plan.shared_bytes = kHeldHeader + passes * pass_bytes(threads);
  plan.bytes_per_element = element_size(request.dtype) * (finds_rest_again(request, plan, blocks) ? 2.0 : 3.0);
  return plan;
}

// The plan of a kernel for a call. number: of a staged plan, the blocks of a cluster; of a partly held one, the passes
// that are held; 0: the smallest that fits, the most that fit.
inline Plan plan_of(const PlanRequest& request, Kernel kernel, int number = 0) {
  const int64_t size = element_size(request.dtype);
  if (kernel == Kernel::kPartlyHeld) return partly_held_plan(request, 1, number);
  Plan plan = {kernel, kTileThreads, 1, 0, 0, 0, 0};
  if (kernel == Kernel::kStaged) {
    plan = staged_plan(request, number > 0 ? number : 1);
    while (number == 0 && !fits(request, plan) && plan.cluster < kMaxCluster) {
      plan = staged_plan(request, 2 * plan.cluster);
    }
  } else if (kernel == Kernel::kHeld) {
    // The row rounded out to 16 bytes at both ends.
    plan.shared_bytes = kHeldHeader + round_up(request.V * size + kVector - size, kVector);
    plan.threads = request.general ? block_threads(request.V) : held_threads(request.V * size);
  } else if (kernel == Kernel::kBlock) {
    plan.threads = block_threads(request.V);
    plan.shared_bytes = kBlockHeader;
    if (block_rows(request) == 1) {
      plan.shared_bytes = (max_shared_bytes(request.capability) + shared_bytes_kept(request.capability)) / 2;
    }
  } else {
    int lanes = kernel == Kernel::kWarp ? 32 : kFewestLanes;
    while (lanes < 32 && lanes * kTileElements < request.V) lanes *= 2;
    plan.groups = kTileThreads / lanes;
  }
  const int visits = request.pass == Pass::kForward ? 1 : 2;
  // A row of the block kernel is too long to be found in a cache at its second visit; those of a warp are not.
  const bool again = kernel == Kernel::kBlock && request.pass == Pass::kForwardWithGrad && !finds_row_again(request);
  plan.bytes_per_element = static_cast<double>(size * (visits + (again ? 1 : 0)));
  return plan;
}

// | row                     | sm_75 to 89, sm_120                           | sm_90, sm_100               |
// |-------------------------|-----------------------------------------------|-----------------------------|
// | V <= 512                | packed                                        | packed                      |
// | V <= 1024               | warp                                          | warp                        |
// | on chip                 | held, with gradient: <= 63, 162, 98 KiB; two  | staged, cluster 1, 2, 4, 8  |
// |                         | partly held where only one were on chip       |                             |
// | two, or one, in the L2  | block; partly held                            | block; partly held          |
// | else                    | block                                         | block                       |
// float64, and a gradient that lies differently against 16 bytes: block above V = 1024. Where the device has no room
// for a cluster: as on sm_80.
inline Plan table(const PlanRequest& request) {
  if (request.V <= kPackedClasses) return plan_of(request, Kernel::kPacked);
  if (request.V <= kWarpClasses) return plan_of(request, Kernel::kWarp);
  const Plan staged = plan_of(request, Kernel::kStaged);
  if (fits(request, staged)) return staged;
  const Plan held = plan_of(request, Kernel::kHeld);
  // Two rows at once: nothing of the one stands still while the other is between its loops. Half of the L2 is ample.
  const Plan two = partly_held_plan(request, 2);
  const bool alone = 2 * (held.shared_bytes + shared_bytes_kept(request.capability)) >
                     max_shared_bytes(request.capability) + shared_bytes_kept(request.capability);
  if (fits(request, two) && fits(request, held) && alone && finds_rest_again(request, two, 4)) return two;
  if (fits(request, held)) return held;
  const Plan block = plan_of(request, Kernel::kBlock), one = plan_of(request, Kernel::kPartlyHeld);
  const bool serves = fits(request, one) && finds_rest_again(request, one, 1);
  // The L2 of an A100 is two partitions, and may have room for less: the less is asked of it the better.
  const bool two_in_cache = block_rows(request) == 2 && finds_row_again(request) && request.capability != 80;
  return serves && !two_in_cache ? one : block;
}

// Clusters of a plan that such a GPU runs at once, at most.
inline int64_t resident_on(const Gpu& gpu, const Plan& plan, Pass pass) {
  // What __launch_bounds__ allows, or what ptxas takes where that is more than it takes: docs/internals/cuda-model.md.
  const bool is_tile = plan.kernel == Kernel::kPacked || plan.kernel == Kernel::kWarp;
  const bool is_held = plan.kernel == Kernel::kHeld || plan.kernel == Kernel::kPartlyHeld;
  const bool is_wide = is_held && (gpu.capability < 80 || gpu.capability >= 90);
  const int registers = plan.kernel == Kernel::kBlock || (is_tile && pass == Pass::kForward) ? 64 : is_wide ? 128 : 96;
  const int64_t kept = shared_bytes_kept(gpu.capability);
  int64_t blocks = (max_shared_bytes(gpu.capability) + kept) / std::max<int64_t>(plan.shared_bytes + kept, 1);
  blocks = std::min<int64_t>(blocks, max_threads(gpu.capability) / plan.threads);
  blocks = std::min<int64_t>(blocks, 65536 / (registers * plan.threads));
  if (plan.cluster == 1) return blocks * gpu.multiprocessors;
  int64_t clusters = 0;
  for (const int multiprocessors : gpu.gpcs) clusters += multiprocessors * blocks / plan.cluster;
  return clusters;
}

// table(), or what ACCUMLOSS_CUDA_PLAN asks for: a kernel's name, for staged with ":cluster" after it, for partly_held
// with ":passes". A pass without such a kernel (backward has neither held nor staged), options that it has not, and a
// gradient that is not aligned take the block kernel; a row that does not fit is an error.
inline Plan choose_plan(const PlanRequest& request) {
  const char* const forced = std::getenv("ACCUMLOSS_CUDA_PLAN");
  if (forced == nullptr || *forced == 0) return table(request);
  const std::string text = forced;
  const std::string name = text.substr(0, text.find(':'));
  const std::string after = name.size() < text.size() ? text.substr(name.size() + 1) : "";
  for (int i = 0; i < kKernels; ++i) {
    const Kernel kernel = static_cast<Kernel>(i);
    if (name != kKernelNames[i]) continue;
    const bool is_number = after.size() == 1 && after[0] >= '1' && after[0] <= '8';
    const bool is_cluster = after == "1" || after == "2" || after == "4" || after == "8";
    const bool is_known = kernel == Kernel::kStaged ? is_cluster : kernel == Kernel::kPartlyHeld && is_number;
    if (!after.empty() && !is_known) break;
    PlanRequest in_gradient = request;
    in_gradient.pass = Pass::kForwardWithGrad;
    in_gradient.aligned = true;
    in_gradient.general = in_gradient.general && kernel != Kernel::kPartlyHeld;
    const int number = after.empty() ? 0 : after[0] - '0';
    const Plan plan = plan_of(request, kernel, number);
    if (fits(request, plan)) return plan;
    if (fits(in_gradient, plan_of(in_gradient, kernel, number))) return plan_of(request, Kernel::kBlock);
    throw std::runtime_error("ACCUMLOSS_CUDA_PLAN: expected a kernel that can serve V = " + std::to_string(request.V) +
                             " in this dtype on this device, got " + text);
  }
  throw std::runtime_error(
      "ACCUMLOSS_CUDA_PLAN: expected packed, warp, held, block, partly_held or partly_held:1 to :8, staged or "
      "staged:1, :2, :4, "
      ":8, got " +
      text);
}

// The plan of a call without options on a device of this machine, with what the device says of it. Defined where
// ACCUMLOSS_WITH_CUDA is.
Plan device_plan(int32_t device_index, int64_t V, Dtype dtype, Pass pass, bool aligned);

}  // namespace accumloss::cuda
