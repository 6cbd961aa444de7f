#include "cuda_runtime.h"
#include "fiber.h"

namespace accumloss {
constexpr size_t kSharedBytes = 232448;  // the most that a block of any device gets
constexpr size_t kGuardBytes = 4096;
alignas(128) unsigned char smem[kSharedBytes + kGuardBytes];
}  // namespace accumloss

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned char kPoison = 0xff;  // NaN as float, double, half and bfloat16
constexpr unsigned char kGuard = 0xa5;

enum class State { kReady, kAtBarrier, kAtCollective, kDone };

struct Fiber {
  Stack stack;
  std::unique_ptr<char[]> memory;
  uint3 index;
  State state;
  Site site;
  int predicate;
  Collective kind;
  unsigned mask;
  int source_lane;
  int bytes;
  unsigned char value[8];
};

std::mt19937_64 order(0);
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> ready[32];  // of each warp
std::vector<int> warps;         // those with a ready fiber. The next one is drawn, or,
bool by_warp;                   // in half of the blocks, the first in
std::vector<int> warp_order;    // this order: some warps then run far ahead of the others
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
Stack scheduler;
std::string error;
int threads, at_barrier, barrier_result;

std::string describe(const Site& site) {
  const char* const slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) + " " + site.what;
}

void leave() { switch_stack(running->stack, scheduler); }

// Ends the launch: the scheduler does not come back to a fiber after an error.
void fail(const std::string& message) {
  if (error.empty()) error = message;
  if (running) leave();
}

std::string where(const Fiber& fiber) {
  return describe(fiber.site) + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(fiber.index.x) +
         ")";
}

void entry() {
  (*body)();
  running->state = State::kDone;
  leave();
}

void release(Fiber& fiber) {
  fiber.state = State::kReady;
  ready[fiber.index.x / 32].push_back(&fiber);
}

void start(Fiber& fiber) {
  start_stack(fiber.stack, fiber.memory.get(), kStackBytes, entry);
  release(fiber);
}

void complete_collective(int warp) {
  const Fiber& here = *running;
  Fiber* lanes[32] = {};
  for (int i = 0; i < 32 && warp * 32 + i < threads; ++i) {
    Fiber* const fiber = fibers[warp * 32 + i].get();
    if (!(here.mask >> i & 1)) continue;
    if (fiber->state != State::kAtCollective || fiber->mask != here.mask) return;  // not all there yet
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
    release(*lanes[i]);
  }
}

// Of a warp with ready fibers: any, or the first of warp_order. Null: none is ready.
Fiber* next_fiber() {
  warps.clear();
  for (const int warp : warp_order) {
    if (!ready[warp].empty()) warps.push_back(warp);
  }
  if (warps.empty()) return nullptr;
  std::vector<Fiber*>& from = ready[by_warp ? warps[0] : warps[order() % warps.size()]];
  std::swap(from[order() % from.size()], from.back());
  Fiber* const fiber = from.back();
  from.pop_back();
  return fiber;
}

void run_block(unsigned block_number, size_t shared_bytes) {
  blockIdx = {block_number, 0, 0};
  at_barrier = 0;
  std::memset(accumloss::smem, kPoison, shared_bytes);
  std::memset(accumloss::smem + shared_bytes, kGuard, accumloss::kGuardBytes);
  by_warp = order() % 2;
  warp_order.resize((threads + 31) / 32);
  std::iota(warp_order.begin(), warp_order.end(), 0);
  std::shuffle(warp_order.begin(), warp_order.end(), order);
  for (auto& fibers_of_warp : ready) fibers_of_warp.clear();
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.index = {static_cast<unsigned>(i), 0, 0};
    fiber.site = {"", 0, "start"};
    start(fiber);
  }
  while ((running = next_fiber())) {
    threadIdx = running->index;
    switch_stack(scheduler, running->stack);
    running = nullptr;
    if (!error.empty()) return;
  }
  std::map<std::string, std::vector<unsigned>> waiting;
  int done = 0;
  for (int i = 0; i < threads; ++i) {
    if (fibers[i]->state == State::kDone)
      ++done;
    else
      waiting[describe(fibers[i]->site)].push_back(fibers[i]->index.x);
  }
  if (!waiting.empty()) {
    error = "deadlock in block " + std::to_string(block_number) + ": " + std::to_string(done) + " threads have left";
    for (const auto& [site, who] : waiting) {
      error += "; " + std::to_string(who.size()) + " wait at " + site + " (thread " + std::to_string(who[0]) + ", ...)";
    }
    return;
  }
  for (size_t i = 0; i < accumloss::kGuardBytes; ++i) {
    if (accumloss::smem[shared_bytes + i] != kGuard) {
      error = "block " + std::to_string(block_number) + " wrote past its " + std::to_string(shared_bytes) +
              " bytes of shared memory";
      return;
    }
  }
}

}  // namespace

int lane() { return static_cast<int>(running->index.x % 32); }
void seed(uint64_t value) { order.seed(value); }

int barrier(Site site, int predicate) {
  Fiber& self = *running;
  self.site = site;
  self.predicate = predicate;
  self.state = State::kAtBarrier;
  if (++at_barrier == threads) {
    at_barrier = 0;
    barrier_result = 0;
    for (int i = 0; i < threads; ++i) {
      if (fibers[i]->site.line != site.line || std::strcmp(fibers[i]->site.file, site.file) != 0) {
        fail("threads of one block wait at different barriers: " + where(self) + " and " + where(*fibers[i]));
      }
      barrier_result |= fibers[i]->predicate != 0;
    }
    for (int i = 0; i < threads; ++i) {
      fibers[i]->predicate = barrier_result;
      release(*fibers[i]);
    }
  }
  leave();
  return self.predicate;
}

void collective(Site site, Collective kind, unsigned mask, void* value, int bytes, int source_lane) {
  Fiber& self = *running;
  self.site = site;
  self.kind = kind;
  self.mask = mask;
  self.bytes = bytes;
  self.source_lane = source_lane;
  std::memset(self.value, 0, sizeof(self.value));
  std::memcpy(self.value, value, bytes);
  if (!(mask >> lane() & 1)) fail(where(self) + ": the mask leaves out the calling lane");
  self.state = State::kAtCollective;
  complete_collective(static_cast<int>(self.index.x / 32));
  leave();
  std::memcpy(value, self.value, bytes);
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  threads = static_cast<int>(blockDim.x);
  error.clear();
  if (blockDim.y != 1 || blockDim.z != 1 || gridDim.y != 1 || gridDim.z != 1 || threads < 1 || threads > 1024 ||
      gridDim.x < 1 || config.dynamicSmemBytes > 48 * 1024) {
    return cudaErrorInvalidConfiguration;
  }
  body = &thread;
  while (static_cast<int>(fibers.size()) < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->memory.reset(new char[kStackBytes]);
  }
  std::vector<unsigned> blocks(gridDim.x);
  for (unsigned i = 0; i < gridDim.x; ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), order);
  for (const unsigned number : blocks) {
    run_block(number, config.dynamicSmemBytes);
    if (!error.empty()) throw std::runtime_error("emulator: " + error);
  }
  return cudaSuccess;
}

}  // namespace emulator

extern "C" {

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "error";
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  *pointer = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

// What -fsanitize=alignment calls: a load or store at an address that the type does not allow.
struct AlignmentSite {
  const char* file;
  uint32_t line, column;
};
void __ubsan_handle_type_mismatch_v1(const AlignmentSite* site, uintptr_t) {
  emulator::fail(emulator::describe({site->file, static_cast<int>(site->line), "misaligned access"}));
}

}  // extern "C"
