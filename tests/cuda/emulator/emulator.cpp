#include "../csrc/cuda/async.cuh"
#include "../csrc/cuda/copies.cuh"
#include "cuda_runtime.h"
#include "fiber.h"
#include "thread_sanitizer.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kUnaskedShared = 48 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr unsigned char kPoison = 0xff;  // NaN as float, double, half and bfloat16
constexpr unsigned char kGuard = 0xa5;

enum class State { kReady, kAtBarrier, kAtClusterBarrier, kAtCollective, kAtMbarrier, kDone };

struct Block;

// A copy of 16 bytes that its thread has started and not waited for.
struct VectorCopy {
  Site site;
  unsigned char* shared;
  const void* global;
  int before, behind;
  int batch;
};

struct Fiber {
  Stack stack;
  std::unique_ptr<char[]> memory;
  void* tsan = nullptr;
  Block* block;
  uint3 index;
  int barriers;  // of the block or the cluster, passed so far
  uint64_t* mbarrier;
  State state;
  Site site;
  int predicate;
  Collective kind;
  unsigned mask;
  int source_lane;
  int bytes;
  unsigned char value[8];
  std::vector<VectorCopy> copies;
  int batch;     // of the copies that are started next
  bool fenced;   // since its beginning
  void* atomic;  // the address of its last atomic
};

// A copy, or a message to a block, that is on its way.
struct Copy {
  Site site;
  unsigned char* shared;
  const void* global;  // null: a message
  unsigned bytes;
  unsigned before, behind;  // bytes that are not the row's
  uint64_t* barrier;
  char* token;  // what the issuing thread did before is done before the copy
  unsigned char value[16];
};

// What a copy has brought, and threads have written there before they fenced it.
struct Landed {
  unsigned char* shared;
  std::vector<unsigned char> contents;
};

struct MbarrierState {
  unsigned count, pending;
  int64_t bytes = 0;   // expected and not landed; below 0 where they land before they are expected
  int64_t phases = 0;  // ended
  int initialiser, initialised_at;
  bool fenced = false;
};

struct Block {
  unsigned number;
  int rank;
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* shared;
  std::vector<Fiber*> ready[32];  // of each warp
  int place[32];                  // of each warp in the drawn order of all of the cluster
  int listed[32];                 // of each warp in ready_warps, or -1
  int at_collective[32];          // fibers of each warp
  int at_barrier, done;
  std::map<uint64_t*, MbarrierState> mbarriers;
  std::vector<Copy> copies;
  std::vector<Landed> landed;
  std::vector<Fiber*> threads;
  char barrier_tokens[2], warp_tokens[32];  // of even and odd barriers: a thread is one ahead of another at most
};

std::mt19937_64 order(0);
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<std::unique_ptr<Block>> blocks;       // of the running cluster
std::vector<std::pair<Block*, int>> ready_warps;  // those with a ready fiber. The next one is drawn, or,
bool by_warp;                                     // in half of the clusters, the first in an order: some run far ahead
std::vector<std::pair<Block*, int>> drawn_order;  // of the warps
std::vector<uint64_t> ready_places;               // bits, by the drawn order
bool late;                                        // copies land when nothing else can go on; else at any time
bool at_once;                                     // or as soon as they are under way
// ThreadSanitizer: blocks and stacks of what ran, kept to the end of the launch. Reused, their memory would be races,
// and their barriers would order what blocks do one after the other.
std::vector<std::unique_ptr<Block>> retired;
std::vector<std::unique_ptr<char[]>> retired_stacks;
size_t shared_bytes;
int at_cluster_barrier;
char start_token, end_token, cluster_tokens[2];  // for ThreadSanitizer
void *scheduler_fiber, *copy_fiber;
int64_t copies_landed, most_blocks;
struct Device {
  int index = 0, capability = 90, multiprocessors = 2, clusters = -1, missing = 0;
};
Device current;
std::mutex device_mutex;                                     // the device, what is asked of it, and what it has loaded
std::map<std::pair<int, const void*>, size_t> asked_shared;  // by device and kernel
int64_t asked;
std::atomic<int> error_of_exp{0}, starved_warp{-1};
constexpr int kRandomError = 2;
std::mutex run_mutex;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
Stack scheduler;
std::string error;
int threads, barrier_result;

// In a function of the emulator that a kernel calls: what it allocates is not the CUDA thread's. leave() ends it.
struct Outside {
  Fiber* self = running;
  Outside() { tsan::go_to(scheduler_fiber); }
  ~Outside() { tsan::go_to(self->tsan); }
};

}  // namespace

std::string describe(const Site& site) {
  const char* const slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) + " " + site.what;
}

namespace {
void leave() {
  tsan::go_to(scheduler_fiber);
  switch_stack(running->stack, scheduler);
}

}  // namespace

void fail(const std::string& message) {
  if (error.empty()) error = message;
  if (running) leave();
}

namespace {

std::string where(const Fiber& fiber) {
  return describe(fiber.site) + " (block " + std::to_string(fiber.block->number) + ", thread " +
         std::to_string(fiber.index.x) + ")";
}

void entry() {
  tsan::acquire(&start_token);
  (*body)();
  tsan::release(&end_token);
  if (!running->copies.empty())
    fail(describe(running->copies[0].site) + ": a thread leaves before its copy has landed");
  running->state = State::kDone;
  ++running->block->done;
  leave();
}

// Not memcpy, which ThreadSanitizer would take for an access of the thread.
void copy_value(void* to, const void* from, int bytes) {
  for (int i = 0; i < bytes; ++i) static_cast<volatile char*>(to)[i] = static_cast<const volatile char*>(from)[i];
}

void release(Fiber& fiber) {
  fiber.state = State::kReady;
  Block& block = *fiber.block;
  const int warp = static_cast<int>(fiber.index.x / 32);
  block.ready[warp].push_back(&fiber);
  if (block.listed[warp] >= 0) return;
  block.listed[warp] = static_cast<int>(ready_warps.size());
  ready_warps.push_back({&block, warp});
  ready_places[block.place[warp] / 64] |= uint64_t{1} << block.place[warp] % 64;
}

void unlist(Block& block, int warp) {
  const auto last = ready_warps.back();
  ready_warps[block.listed[warp]] = last;
  last.first->listed[last.second] = block.listed[warp];
  ready_warps.pop_back();
  block.listed[warp] = -1;
  ready_places[block.place[warp] / 64] &= ~(uint64_t{1} << block.place[warp] % 64);
}

void start(Fiber& fiber) {
  start_stack(fiber.stack, fiber.memory.get(), kStackBytes, entry);
  release(fiber);
}

void complete_collective(int warp) {
  const Fiber& here = *running;
  const int lanes_of_warp = std::min(32, threads - warp * 32);
  const unsigned present = here.mask & 0xffffffffu >> (32 - lanes_of_warp);
  if (++here.block->at_collective[warp] < __builtin_popcount(present)) return;  // not all there yet
  Fiber* lanes[32] = {};
  for (int i = 0; i < 32 && warp * 32 + i < threads; ++i) {
    Fiber* const fiber = here.block->threads[warp * 32 + i];
    if (!(here.mask >> i & 1)) continue;
    if (fiber->state != State::kAtCollective || fiber->mask != here.mask) return;
    if (fiber->kind != here.kind || fiber->bytes != here.bytes || fiber->site.line != here.site.line) {
      return fail("divergent warp: lanes of one mask are at " + where(here) + " and at " + where(*fiber));
    }
    lanes[i] = fiber;
  }
  unsigned ballot = 0;
  unsigned char results[32][8];
  for (int i = 0; i < 32; ++i) {
    if (lanes[i] && lanes[i]->value[0]) ballot |= 1u << i;
  }
  for (int i = 0; i < 32; ++i) {
    if (!lanes[i]) {
      if (here.mask >> i & 1)
        return fail(where(here) + ": the mask names lane " + std::to_string(i) + ", which does not exist");
      continue;
    }
    if (here.kind == Collective::kShuffle) {
      const int source = lanes[i]->source_lane;
      if (source < 0 || source >= 32 || !lanes[source]) {
        return fail(where(*lanes[i]) + ": reads lane " + std::to_string(source) + ", which does not take part");
      }
      std::memcpy(results[i], lanes[source]->value, 8);
    } else if (here.kind == Collective::kMax) {
      int largest = std::numeric_limits<int>::min(), other;
      for (const Fiber* const lane : lanes) {
        if (lane) std::memcpy(&other, lane->value, sizeof(other)), largest = std::max(largest, other);
      }
      std::memcpy(results[i], &largest, sizeof(largest));
    } else {
      const unsigned vote = here.kind == Collective::kAny   ? ballot != 0
                            : here.kind == Collective::kAll ? ballot == here.mask
                                                            : ballot;
      std::memcpy(results[i], &vote, sizeof(vote));
    }
  }
  for (int i = 0; i < 32; ++i) {
    if (!lanes[i]) continue;
    std::memcpy(lanes[i]->value, results[i], 8);
    --here.block->at_collective[warp];
    release(*lanes[i]);
  }
}

// Of a warp with ready fibers: any, or the first in the drawn orders. Null: none is ready.
Fiber* next_fiber() {
  if (ready_warps.empty()) return nullptr;
  auto [block, warp] = ready_warps[0];
  if (by_warp) {
    size_t word = 0;
    while (ready_places[word] == 0) ++word;
    std::tie(block, warp) = drawn_order[word * 64 + __builtin_ctzll(ready_places[word])];
  } else {
    std::tie(block, warp) = ready_warps[order() % ready_warps.size()];
  }
  std::vector<Fiber*>& from = block->ready[warp];
  std::swap(from[order() % from.size()], from.back());
  Fiber* const fiber = from.back();
  from.pop_back();
  if (from.empty()) unlist(*block, warp);
  return fiber;
}

// Ends the phase of a barrier that waits for nothing more.
void end_phase(Block& block, uint64_t* address, MbarrierState& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phases;
  barrier.pending = barrier.count;
  for (Fiber* const fiber : block.threads) {
    if (fiber->state == State::kAtMbarrier && fiber->mbarrier == address) release(*fiber);
  }
}

// One of the copies on their way arrives. False: there is none.
bool land() {
  std::vector<Block*> candidates;
  for (const auto& block : blocks) {
    if (!block->copies.empty()) candidates.push_back(block.get());
  }
  if (candidates.empty()) return false;
  Block& block = *candidates[order() % candidates.size()];
  std::swap(block.copies[order() % block.copies.size()], block.copies.back());
  const Copy copy = block.copies.back();
  block.copies.pop_back();
  if (block.done > (copy.global == nullptr ? 0 : threads - 1)) {
    fail(describe(copy.site) + ": arrives at block " + std::to_string(block.number) + ", which threads have left");
    return true;
  }
  tsan::go_to(copy_fiber);
  tsan::acquire(copy.token);
  const unsigned own = copy.bytes - copy.before - copy.behind;
  if (copy.global == nullptr) {
    std::memcpy(copy.shared, copy.value, copy.bytes);
  } else {
    std::memcpy(copy.shared + copy.before, static_cast<const unsigned char*>(copy.global) + copy.before, own);
  }
  tsan::release(copy.barrier);
  tsan::go_to(scheduler_fiber);
  if (copy.global != nullptr) {
    ++copies_landed;
    // Not where ThreadSanitizer would take it for an access of the emulator's.
    if (!tsan::enabled()) block.landed.push_back({copy.shared, {copy.shared, copy.shared + copy.bytes}});
  }
  MbarrierState& barrier = block.mbarriers[copy.barrier];
  barrier.bytes -= copy.bytes;
  end_phase(block, copy.barrier, barrier);
  return true;
}

void start_block(Block& block, unsigned number, int rank) {
  block.number = number;
  block.rank = rank;
  block.at_barrier = block.done = 0;
  block.mbarriers.clear();
  block.copies.clear();
  block.landed.clear();
  block.threads.clear();
  block.memory.reset(new unsigned char[shared_bytes + kGuardBytes + 128]);
  block.shared = block.memory.get() + (128 - reinterpret_cast<uintptr_t>(block.memory.get()) % 128);
  std::memset(block.shared, kPoison, shared_bytes);
  std::memset(block.shared + shared_bytes, kGuard, kGuardBytes - 128);
  for (auto& fibers_of_warp : block.ready) fibers_of_warp.clear();
  std::fill(std::begin(block.listed), std::end(block.listed), -1);
  std::fill(std::begin(block.at_collective), std::end(block.at_collective), 0);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[rank * threads + i];
    fiber.block = &block;
    fiber.index = {static_cast<unsigned>(i), 0, 0};
    fiber.site = {"", 0, "start"};
    fiber.barriers = fiber.batch = 0;
    fiber.copies.clear();
    fiber.fenced = false;
    fiber.atomic = nullptr;
    fiber.tsan = tsan::create();
    if (tsan::enabled()) {
      retired_stacks.push_back(std::move(fiber.memory));
      fiber.memory.reset(new char[kStackBytes]);
    }
    block.threads.push_back(&fiber);
    start(fiber);
  }
}

void describe_deadlock() {
  std::map<std::string, std::vector<Fiber*>> waiting;
  int done = 0;
  for (const auto& block : blocks) {
    for (Fiber* const fiber : block->threads) {
      if (fiber->state == State::kDone)
        ++done;
      else
        waiting[describe(fiber->site)].push_back(fiber);
    }
  }
  if (waiting.empty()) return;
  error = "deadlock in block " + std::to_string(blocks[0]->number) + (blocks.size() > 1 ? " and its cluster: " : ": ") +
          std::to_string(done) + " threads have left";
  for (const auto& [site, who] : waiting) {
    error += "; " + std::to_string(who.size()) + " wait at " + site + " (block " +
             std::to_string(who[0]->block->number) + ", thread " + std::to_string(who[0]->index.x) + ", ...)";
  }
}

void run_cluster(unsigned first_block, unsigned size) {
  by_warp = order() % 2;
  late = order() % 2;
  at_once = starved_warp >= 0;
  if (at_once) by_warp = true, late = false;
  at_cluster_barrier = 0;
  blocks.resize(size);
  std::vector<Block*> block_order;
  for (auto& block : blocks) {
    if (block && tsan::enabled()) retired.push_back(std::move(block));
    if (!block) block = std::make_unique<Block>();
    block_order.push_back(block.get());
  }
  std::shuffle(block_order.begin(), block_order.end(), order);
  drawn_order.clear();
  for (Block* const block : block_order) {
    std::vector<int> warps((threads + 31) / 32);
    std::iota(warps.begin(), warps.end(), 0);
    std::shuffle(warps.begin(), warps.end(), order);
    std::stable_partition(warps.begin(), warps.end(), [](int warp) { return warp != starved_warp; });
    for (const int warp : warps) {
      block->place[warp] = static_cast<int>(drawn_order.size());
      drawn_order.push_back({block, warp});
    }
  }
  ready_warps.clear();
  ready_places.assign((drawn_order.size() + 63) / 64, 0);
  for (unsigned i = 0; i < size; ++i) start_block(*blocks[i], first_block + i, static_cast<int>(i));
  for (;;) {
    while (at_once && error.empty() && land()) {
    }
    if (!late && order() % 8 == 0) land();
    if (!error.empty()) return;
    running = next_fiber();
    if (!running) {
      if (!land()) break;
      continue;
    }
    threadIdx = running->index;
    blockIdx = {running->block->number, 0, 0};
    tsan::go_to(running->tsan);
    switch_stack(scheduler, running->stack);
    running = nullptr;
    if (!error.empty()) return;
  }
  for (const auto& block : blocks) {
    for (Fiber* const fiber : block->threads) tsan::destroy(fiber->tsan);
  }
  describe_deadlock();
  if (!error.empty()) return;
  for (const auto& block : blocks) {
    for (size_t i = 0; i < kGuardBytes - 128; ++i) {
      if (block->shared[shared_bytes + i] != kGuard) {
        error = "block " + std::to_string(block->number) + " wrote past its " + std::to_string(shared_bytes) +
                " bytes of shared memory";
        return;
      }
    }
  }
}

MbarrierState& mbarrier_at(uint64_t* address) {
  Block& block = *running->block;
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) fail(where(*running) + ": no mbarrier was initialised there");
  MbarrierState& barrier = found->second;
  if (static_cast<int>(running->index.x) != barrier.initialiser && running->barriers <= barrier.initialised_at) {
    fail(where(*running) + ": no barrier of the block since the mbarrier was initialised");
  }
  return barrier;
}

// Dynamic shared memory that a block may ask for.
size_t max_shared(int capability) {
  switch (capability) {
    case 75:
      return 65536;
    case 80:
      return 166912;
    case 86:
    case 89:
    case 120:
      return 101376;
    default:
      return 232448;
  }
}

// How many clusters run at once: of blocks of half of the registers each, at most.
int resident(int blocks_of_cluster, size_t bytes) {
  if (current.clusters >= 0) return current.clusters;
  const size_t by_shared = (max_shared(current.capability) + 1024) / (bytes + 1024);
  return current.multiprocessors * static_cast<int>(std::min<size_t>(2, by_shared)) / blocks_of_cluster;
}

bool in_shared(const Block& block, const void* address, size_t bytes) {
  const auto* const start = static_cast<const unsigned char*>(address);
  return start >= block.shared && start + bytes <= block.shared + shared_bytes;
}

}  // namespace

int lane() { return static_cast<int>(running->index.x % 32); }
void seed(uint64_t value) { order.seed(value); }
unsigned char* dynamic_shared() { return running->block->shared; }
int64_t bulk_copies() { return std::exchange(copies_landed, 0); }
int64_t largest_grid() { return std::exchange(most_blocks, 0); }
int cluster_rank() { return running->block->rank; }
int cluster_size() { return static_cast<int>(blocks.size()); }
void device(int capability, int multiprocessors, int clusters, int missing) {
  const std::lock_guard<std::mutex> lock(device_mutex);
  current = {current.index + 1, capability, multiprocessors, clusters, missing};
}
int capability() { return current.capability; }
void exp_error(int kind) { error_of_exp = kind; }
void starve(int warp) { starved_warp = warp; }
float flushed_exp2(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const double mixed = static_cast<double>(bits * 2654435761u) / 2147483648.0 - 1.0;
  const int kind = error_of_exp;
  const double error = kind == kRandomError ? mixed : kind;
  const auto found = static_cast<float>(std::exp2(static_cast<double>(x)) * (1 + error / 4194304.0));
  return found < std::numeric_limits<float>::min() ? 0.0f : found;
}
int64_t questions() {
  const std::lock_guard<std::mutex> lock(device_mutex);
  return std::exchange(asked, 0);
}

void cluster_barrier(Site site) {
  Fiber& self = *running;
  char* const token = &cluster_tokens[self.barriers % 2];
  tsan::release(token);
  const Outside outside;
  self.site = site;
  self.state = State::kAtClusterBarrier;
  if (++at_cluster_barrier == threads * static_cast<int>(blocks.size())) {
    at_cluster_barrier = 0;
    for (const auto& block : blocks) {
      for (Fiber* const fiber : block->threads) {
        if (fiber->site.line != site.line) {
          fail("threads of one cluster wait at different barriers: " + where(self) + " and " + where(*fiber));
        }
      }
    }
    for (const auto& block : blocks) {
      for (Fiber* const fiber : block->threads) {
        ++fiber->barriers;
        release(*fiber);
      }
    }
  }
  leave();
  tsan::acquire(token);
}

void* remote(Site site, void* address, size_t bytes, size_t alignment, int rank) {
  Fiber& self = *running;
  self.site = site;
  const Block& here = *self.block;
  if (rank < 0 || rank >= static_cast<int>(blocks.size())) {
    fail(where(self) + ": block " + std::to_string(rank) + " of a cluster of " + std::to_string(blocks.size()));
  }
  if (!in_shared(here, address, bytes)) fail(where(self) + ": the address is not in the block's shared memory");
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail(where(self) + ": misaligned access");
  Block& other = *blocks[rank];
  if (&other != &here && self.barriers == 0)
    fail(where(self) + ": the other block may not have started: no barrier yet");
  if (&other != &here && other.done > 0) fail(where(self) + ": threads of the other block have left");
  return other.shared + (static_cast<unsigned char*>(address) - here.shared);
}

void mbarrier_init(Site site, uint64_t* address, unsigned arrivals) {
  const Outside outside;
  Fiber& self = *running;
  self.site = site;
  Block& block = *self.block;
  if (!in_shared(block, address, 8) || reinterpret_cast<uintptr_t>(address) % 8 != 0) {
    fail(where(self) + ": an mbarrier is 8 aligned bytes of the block's shared memory");
  }
  if (block.mbarriers.count(address)) fail(where(self) + ": the mbarrier was initialised before");
  const int most = resident(static_cast<int>(blocks.size()), shared_bytes);
  const int launched = static_cast<int>(gridDim.x / blocks.size());
  if (launched > most) {
    fail(where(self) + ": a persistent grid of " + std::to_string(launched) + " clusters, of which " +
         std::to_string(most) + " run at once");
  }
  MbarrierState barrier;
  barrier.count = barrier.pending = arrivals;
  barrier.initialiser = static_cast<int>(self.index.x);
  barrier.initialised_at = self.barriers;
  block.mbarriers[address] = barrier;
}

void mbarrier_init_fence() {
  for (auto& [address, barrier] : running->block->mbarriers) {
    if (barrier.initialiser == static_cast<int>(running->index.x)) barrier.fenced = true;
  }
}

void mbarrier_arrive(Site site, uint64_t* address, unsigned count, unsigned bytes) {
  tsan::release(address);
  const Outside outside;
  Fiber& self = *running;
  self.site = site;
  MbarrierState& barrier = mbarrier_at(address);
  if (barrier.pending < count) fail(where(self) + ": more arrivals than the mbarrier was initialised for");
  if (bytes >= 1u << 20) fail(where(self) + ": an mbarrier counts less than 1 MiB");
  barrier.pending -= count;
  barrier.bytes += bytes;
  end_phase(*self.block, address, barrier);
}

// As the device's: it sees the parity of the phase that runs, and no more. Who asks too late may wait for the next.
void mbarrier_wait(Site site, uint64_t* address, unsigned parity) {
  Fiber& self = *running;
  self.site = site;
  MbarrierState& barrier = mbarrier_at(address);
  if (parity > 1) fail(where(self) + ": a parity is 0 or 1, got " + std::to_string(parity));
  while ((barrier.phases & 1) == parity) {
    self.state = State::kAtMbarrier;
    self.mbarrier = address;
    leave();
    self.site = site;
  }
  tsan::acquire(address);
}

// Of the mbarrier of a copy or a message: that it may be used, in the block that has it.
void check_announced(const Fiber& self, Block& block, uint64_t* address) {
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) fail(where(self) + ": no mbarrier was initialised there");
  if (!found->second.fenced) fail(where(self) + ": the mbarrier's initialisation was not fenced");
}

void bulk_load(Site site, void* shared, const void* global, unsigned bytes, unsigned before, unsigned behind,
               uint64_t* address) {
  char* const token = reinterpret_cast<char*>(address) + 1;
  tsan::release(token);
  const Outside outside;
  Fiber& self = *running;
  self.site = site;
  Block& block = *self.block;
  mbarrier_at(address);
  check_announced(self, block, address);
  auto* const to = static_cast<unsigned char*>(shared);
  if (bytes == 0 || bytes % 16 != 0) fail(where(self) + ": " + std::to_string(bytes) + " bytes, not a multiple of 16");
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail(where(self) + ": an address is no multiple of 16");
  }
  if (before >= 16 || behind >= 16 || before + behind >= bytes) {
    fail(where(self) + ": " + std::to_string(before) + " and " + std::to_string(behind) + " bytes around the row");
  }
  if (!in_shared(block, shared, bytes)) fail(where(self) + ": the copy leaves the block's shared memory");
  for (const auto& [other, state] : block.mbarriers) {
    const auto* const start = reinterpret_cast<const unsigned char*>(other);
    if (start < to + bytes && to < start + 8) fail(where(self) + ": the copy goes over an mbarrier");
  }
  for (const Copy& copy : block.copies) {
    if (copy.shared < to + bytes && to < copy.shared + copy.bytes) {
      fail(where(self) + ": another copy to the same bytes is on its way, from " + describe(copy.site));
    }
  }
  for (size_t i = 0; i < block.landed.size();) {
    const Landed& landed = block.landed[i];
    if (landed.shared + landed.contents.size() <= to || to + bytes <= landed.shared) {
      ++i;
      continue;
    }
    if (std::memcmp(landed.shared, landed.contents.data(), landed.contents.size()) != 0) {
      fail(where(self) + ": threads have written there since the copy before, without a fence.proxy.async behind it");
    }
    std::swap(block.landed[i], block.landed.back());
    block.landed.pop_back();
  }
  // What was there is gone from here on. Not memset, which ThreadSanitizer would take for an access.
  for (unsigned i = 0; i < bytes && !tsan::enabled(); ++i) static_cast<volatile unsigned char*>(to)[i] = kPoison;
  block.copies.push_back({site, to, global, bytes, before, behind, address, token, {}});
}

void bulk_load_fence() {
  for (Landed& landed : running->block->landed) {
    std::memcpy(landed.contents.data(), landed.shared, landed.contents.size());
  }
}

void thread_fence() {
  if (running->atomic != nullptr) tsan::acquire(running->atomic);
  running->fenced = true;
}

void before_atomic(void* address) {
  if (running->fenced) tsan::release(address);
  running->atomic = address;
}

// As the thread's own writes, at a drawn moment before it waits for them, or only then.
void land_copies(Fiber& self, int newest) {
  for (size_t i = 0; i < self.copies.size();) {
    const VectorCopy copy = self.copies[i];
    if (copy.batch > newest && (late || order() % 4 != 0)) {
      ++i;
      continue;
    }
    copy_value(copy.shared + copy.before, static_cast<const unsigned char*>(copy.global) + copy.before,
               16 - copy.before - copy.behind);
    self.copies.erase(self.copies.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void copy_vector(Site site, void* shared, const void* global, int before, int behind) {
  const Outside outside;
  Fiber& self = *running;
  self.site = site;
  auto* const to = static_cast<unsigned char*>(shared);
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail(where(self) + ": an address is no multiple of 16");
  }
  if (before < 0 || behind < 0 || before + behind >= 16) {
    fail(where(self) + ": " + std::to_string(before) + " and " + std::to_string(behind) + " bytes around the row");
  }
  if (!in_shared(*self.block, shared, 16)) fail(where(self) + ": the copy leaves the block's shared memory");
  for (const VectorCopy& copy : self.copies) {
    if (copy.shared == to) fail(where(self) + ": another copy to the same bytes is on its way");
  }
  for (int i = 0; i < 16; ++i) static_cast<volatile unsigned char*>(to)[i] = kPoison;  // what was there is gone
  self.copies.push_back({site, to, global, before, behind, self.batch});
}

void copies_commit() {
  const Outside outside;
  land_copies(*running, -1);
  ++running->batch;
}

void copies_wait(Site site, int pending) {
  const Outside outside;
  running->site = site;
  land_copies(*running, running->batch - 1 - pending);
}

void cluster_send(Site site, void* address, int rank, const void* value, unsigned bytes, uint64_t* barrier) {
  void* const to = remote(site, address, bytes, bytes, rank);
  auto* const there = static_cast<uint64_t*>(remote(site, barrier, 8, 8, rank));
  char* const token = reinterpret_cast<char*>(there) + 2;
  tsan::release(token);
  Copy message = {site, static_cast<unsigned char*>(to), nullptr, bytes, 0, 0, there, token, {}};
  copy_value(message.value, value, static_cast<int>(bytes));
  const Outside outside;
  if (bytes != 4 && bytes != 8 && bytes != 16) fail(where(*running) + ": a message has 4, 8 or 16 bytes");
  check_announced(*running, *blocks[rank], there);
  blocks[rank]->copies.push_back(message);
}

int barrier(Site site, int predicate) {
  Fiber& self = *running;
  self.site = site;
  self.predicate = predicate;
  self.state = State::kAtBarrier;
  Block& block = *self.block;
  char* const token = &block.barrier_tokens[self.barriers % 2];
  tsan::release(token);
  const Outside outside;
  if (++block.at_barrier == threads) {
    block.at_barrier = 0;
    barrier_result = 0;
    for (Fiber* const fiber : block.threads) {
      if (fiber->site.line != site.line || std::strcmp(fiber->site.file, site.file) != 0) {
        fail("threads of one block wait at different barriers: " + where(self) + " and " + where(*fiber));
      }
      barrier_result |= fiber->predicate != 0;
    }
    for (Fiber* const fiber : block.threads) {
      fiber->predicate = barrier_result;
      ++fiber->barriers;
      release(*fiber);
    }
  }
  leave();
  tsan::acquire(token);
  return self.predicate;
}

void collective(Site site, Collective kind, unsigned mask, void* value, int bytes, int source_lane) {
  Fiber& self = *running;
  self.site = site;
  self.kind = kind;
  self.mask = mask;
  self.bytes = bytes;
  self.source_lane = source_lane;
  copy_value(self.value, value, bytes);
  if (!(mask >> lane() & 1)) fail(where(self) + ": the mask leaves out the calling lane");
  char* const token = &self.block->warp_tokens[self.index.x / 32];
  if (kind == Collective::kSync) tsan::release(token);
  const Outside outside;
  self.state = State::kAtCollective;
  complete_collective(static_cast<int>(self.index.x / 32));
  leave();
  if (kind == Collective::kSync) tsan::acquire(token);
  copy_value(value, self.value, bytes);
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(run_mutex);
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  threads = static_cast<int>(blockDim.x);
  shared_bytes = config.dynamicSmemBytes;
  error.clear();
  unsigned cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config.attrs[i].val.clusterDim.x;
  }
  size_t allowed = kUnaskedShared;
  {
    const std::lock_guard<std::mutex> device_lock(device_mutex);
    const auto found = asked_shared.find({current.index, kernel});
    if (found != asked_shared.end()) allowed = found->second;
  }
  if (blockDim.y != 1 || blockDim.z != 1 || gridDim.y != 1 || gridDim.z != 1 || threads < 1 || threads > 1024 ||
      gridDim.x < 1 || shared_bytes > allowed || cluster < 1 || cluster > 8 || gridDim.x % cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  body = &thread;
  most_blocks = std::max<int64_t>(most_blocks, gridDim.x);
  while (fibers.size() < threads * static_cast<size_t>(cluster)) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->memory.reset(new char[kStackBytes]);
  }
  std::vector<unsigned> clusters(gridDim.x / cluster);
  std::iota(clusters.begin(), clusters.end(), 0);
  std::shuffle(clusters.begin(), clusters.end(), order);
  scheduler_fiber = tsan::current();
  copy_fiber = tsan::create();
  tsan::release(&start_token);
  tsan::go_to(copy_fiber);
  tsan::acquire(&start_token);
  tsan::go_to(scheduler_fiber);
  for (const unsigned number : clusters) {
    run_cluster(number * cluster, cluster);
    if (!error.empty()) throw std::runtime_error("emulator: " + error);
  }
  tsan::acquire(&end_token);
  retired.clear();
  retired_stacks.clear();
  tsan::destroy(copy_fiber);
  return cudaSuccess;
}

}  // namespace emulator

extern "C" {

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    default:
      return "error";
  }
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  const std::lock_guard<std::mutex> lock(emulator::device_mutex);
  *device = emulator::current.index;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const std::lock_guard<std::mutex> lock(emulator::device_mutex);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulator::current.capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulator::current.capability % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::current.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(emulator::max_shared(emulator::current.capability));
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  const std::lock_guard<std::mutex> lock(emulator::device_mutex);
  ++emulator::asked;
  if (emulator::current.missing != 0) {
    if (emulator::current.missing > 0) --emulator::current.missing;
    return cudaErrorNoKernelImageForDevice;
  }
  *attributes = {};
  return cudaSuccess;
}

// A limit that is lowered may be another host thread's, whose launch is about to follow.
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(emulator::device_mutex);
  const auto bytes = static_cast<size_t>(value);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  if (bytes > emulator::max_shared(emulator::current.capability)) return cudaErrorInvalidValue;
  size_t& before = emulator::asked_shared[{emulator::current.index, kernel}];
  if (bytes < before) {
    throw std::runtime_error("emulator: cudaFuncSetAttribute lowers the shared memory of a kernel from " +
                             std::to_string(before) + " to " + std::to_string(bytes) +
                             " bytes; another host thread may have asked for them");
  }
  before = bytes;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t bytes) {
  const std::lock_guard<std::mutex> lock(emulator::device_mutex);
  ++emulator::asked;
  *blocks = emulator::resident(1, bytes) / emulator::current.multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const std::lock_guard<std::mutex> lock(emulator::device_mutex);
  ++emulator::asked;
  if (config->numAttrs != 1 || config->attrs[0].id != cudaLaunchAttributeClusterDimension) return cudaErrorInvalidValue;
  *clusters = emulator::resident(static_cast<int>(config->attrs[0].val.clusterDim.x), config->dynamicSmemBytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  *pointer = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

}  // extern "C"
