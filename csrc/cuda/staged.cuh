// Cross-entropy of a row by a cluster of blocks that holds it in shared memory, for sm_90 and newer: forward, or
// forward and gradient. Every logit is read from device memory once, and is overwritten by its gradient where that is
// asked for.
//
// The clusters are persistent and take rows as they are done with others. In each block
//   groups of warps  have a row each, every groups-th one: they sum, exchange their sums with those of the other
//                    blocks, and write the gradient, while other groups are elsewhere in other rows;
//   one warp         has bulk copies bring rows into a ring of stages, a slice of a row each, some rows ahead.
// They meet at mbarriers alone: nobody waits for all others, and nobody waits for device memory but the copies.
//
// Which rows: tickets, a few rows each, from one counter. The first block of a cluster takes them and tells the others
// by messages, which they answer: without the answer a block that has nothing to exchange, as its rows are ignored,
// falls behind until a message overwrites another.
#pragma once

#include "async.cuh"
#include "general.cuh"
#include "plan.h"
#include "slice.cuh"

namespace accumloss::cuda {

struct StagedShape {
  int stages;  // more than groups, as a group that waits for its row must not hold up another's; at most two for each
  unsigned stage_bytes;
  unsigned header;  // bytes of shared memory before the stages
  int groups;
  int warps;          // of a group
  unsigned* tickets;  // 0 at first
};

constexpr int kNoMoreRows = -1;
constexpr int kIgnoredLabel = -1;
constexpr int64_t kMostRowsOfTicket = 8;
static_assert(kStagedHelpers == kWarp, "plan.h knows another number");

// A row on its way to the groups.
struct StagedRow {
  int64_t in, out;  // elements from the first logit to the row, and of the gradient
  int row;          // or kNoMoreRows, once for each group
  int label;        // or kIgnoredLabel
  float weight;     // of its class
  float reference;
};

// What the first block of a cluster tells the others of a row.
struct alignas(16) StagedMail {
  int row;
  int label;
  float weight;
  float reference;  // the label's logit, where the smoothing's sum is taken relative to it
};

// What a warp tells the group in all blocks.
template <bool kGeneral>
struct StagedSums;
template <>
struct alignas(16) StagedSums<false> {
  float max, sum;
  int target;  // the label's logit by to_ordered(), of the warp that has it
  int beaten;
};
template <>
struct alignas(16) StagedSums<true> {
  float max, sum;
  int target;
  int beaten;
  float weighted, linear;
  float unused[2];
};

// At the start of dynamic shared memory. The sums of the warps and the stages follow.
struct StagedShared {
  // The slice of a row has arrived: of even and odd rows of a group. Not one for each stage: those of another group may
  // not have arrived when a group is done with a later row, and a parity does not tell a phase from the one before the
  // last. Stages are at most two for each group, so that the one before the last is over.
  Mbarrier full[kMaxGroups][2];
  Mbarrier empty[kMaxStages];  // the warps of a group have left it
  Mbarrier summed[kMaxGroups][2];
  Mbarrier mailed[2], answered[2];
  StagedMail mail[2];
  unsigned answer;
  StagedRow rows[kMaxStages];
};
static_assert(sizeof(StagedShared) <= kStagedHeader && kStagedHeader % 16 == 0 &&
                  sizeof(StagedSums<false>) == kStagedSums && sizeof(StagedSums<true>) == kStagedSumsGeneral,
              "plan.h knows other sizes");

template <typename T, bool kGeneral, bool kGrad>
struct StagedBlock {
  const RowArgs<float>& args;
  const StagedShape& shape;
  StagedShared& shared;
  StagedSums<kGeneral>* sums;  // (groups, 2, blocks, warps)
  unsigned char* ring;
  int rank, blocks;
  int shift;  // logarithm of blocks

  __device__ __forceinline__ StagedBlock(const RowArgs<float>& arguments, const StagedShape& staged)
      : args(arguments),
        shape(staged),
        shared(*reinterpret_cast<StagedShared*>(dynamic_shared())),
        sums(reinterpret_cast<StagedSums<kGeneral>*>(dynamic_shared() + kStagedHeader)),
        ring(dynamic_shared() + staged.header),
        rank(cluster_rank()),
        blocks(cluster_size()),
        shift(0) {
    while (1 << shift < blocks) ++shift;
  }

  __device__ __forceinline__ T* stage(int number) const {
    return reinterpret_cast<T*>(ring + static_cast<size_t>(number) * shape.stage_bytes);
  }
  __device__ __forceinline__ const T* row_in(const StagedRow& row) const {
    return static_cast<const T*>(args.inputs.logits.data) + row.in;
  }
  __device__ __forceinline__ Slice<T> slice_of(const StagedRow& row) const {
    return Slice<T>(row_in(row), static_cast<int>(args.inputs.logits.V), rank, shift);
  }
  __device__ __forceinline__ unsigned bytes_of_sums() const {
    return static_cast<unsigned>(sizeof(StagedSums<kGeneral>)) * static_cast<unsigned>(shape.warps * blocks);
  }

  // One thread, before a barrier of the cluster.
  __device__ __forceinline__ void initialise() const {
    for (int s = 0; s < shape.stages; ++s) mbarrier_init(&shared.empty[s], shape.warps);
    for (int half = 0; half < 2; ++half) {
      for (int group = 0; group < shape.groups; ++group) {
        mbarrier_init(&shared.full[group][half], 1);
        mbarrier_init(&shared.summed[group][half], blocks == 1 ? shape.warps : 1);
      }
      mbarrier_init(&shared.mailed[half], 1);
      mbarrier_init(&shared.answered[half], 1);
    }
    mbarrier_init_fence();
    if (blocks == 1) return;
    for (int half = 0; half < 2; ++half) {
      for (int group = 0; group < shape.groups; ++group) mbarrier_expect(&shared.summed[group][half], bytes_of_sums());
      mbarrier_expect(&shared.mailed[half], sizeof(StagedMail));
      mbarrier_expect(&shared.answered[half], sizeof(unsigned) * blocks);
    }
  }

  // Gradients, too. With options this is known at run time alone.
  __device__ __forceinline__ bool writes() const { return kGeneral ? args.writes() : kGrad; }
};

// The warp that brings the rows. ------------------------------------------------------------------------------------

template <typename T, bool kGeneral, bool kGrad>
struct StagedProducer {
  const StagedBlock<T, kGeneral, kGrad>& block;
  int lane;

  // What is to be known of a row to bring it.
  struct Errand {
    StagedRow row;
    const T* from;
    unsigned bytes, before, behind;
  };

  // An ignored row takes a stage too, as its gradient is to be written; nothing is read of it.
  __device__ __forceinline__ Errand errand(const StagedMail& mail) const {
    const LogitsView& logits = block.args.inputs.logits;
    Errand made = {{0, 0, mail.row, mail.label, mail.weight, mail.reference}, nullptr, 0, 0, 0};
    if (mail.row < 0) return made;
    const RowAt at = row_at(logits, mail.row);
    made.row.in = at.b * logits.stride_b + at.t * logits.stride_t;
    if (block.writes()) made.row.out = at.b * block.args.grad_logits.stride_b + at.t * block.args.grad_logits.stride_t;
    if (mail.label < 0) return made;
    const Slice<T> slice = block.slice_of(made.row);
    const int over = slice.offset + slice.count * Slice<T>::kWidth - static_cast<int>(logits.V);
    constexpr int kSize = static_cast<int>(sizeof(T));
    made.from = block.row_in(made.row) + slice.offset;
    made.bytes = slice.bytes();
    made.before = static_cast<unsigned>(slice.offset < 0 ? -slice.offset : 0) * kSize;
    made.behind = static_cast<unsigned>(over > 0 ? over : 0) * kSize;
    return made;
  }

  // Of the number-th row of the cluster.
  struct Place {
    int stage;
    unsigned phase;  // of the stage before, to be over
    Mbarrier* full;
  };
  __device__ __forceinline__ Place place_of(int number) const {
    const int lap = number / block.shape.stages, turn = number / block.shape.groups;
    return {number - lap * block.shape.stages, (lap & 1) ^ 1u,
            &block.shared.full[number - turn * block.shape.groups][turn % 2]};
  }

  // One lane: waits for a stage and has the row copied into it.
  __device__ __forceinline__ void bring(const Errand& errand, const Place& place) const {
    mbarrier_wait(&block.shared.empty[place.stage], place.phase);
    block.shared.rows[place.stage] = errand.row;
    mbarrier_expect(place.full, errand.bytes);
    if (errand.bytes > 0) {
      bulk_load(block.stage(place.stage), errand.from, errand.bytes, errand.before, errand.behind, place.full);
    }
  }

  // One lane of the first block: to every block of the cluster, this one too.
  __device__ __forceinline__ void send(const StagedMail& mail, int number) const {
    const int place = number % 2;
    if (number >= 2) {
      mbarrier_wait(&block.shared.answered[place], (number / 2 - 1) & 1);
      mbarrier_expect(&block.shared.answered[place], sizeof(unsigned) * block.blocks);
    }
    for (int rank = 0; rank < block.blocks; ++rank) {
      cluster_send(&block.shared.mail[place], rank, mail, &block.shared.mailed[place]);
    }
  }

  // One lane of each block.
  __device__ __forceinline__ StagedMail receive(int number) const {
    const int place = number % 2;
    mbarrier_wait(&block.shared.mailed[place], (number / 2) & 1);
    const StagedMail mail = block.shared.mail[place];
    mbarrier_expect(&block.shared.mailed[place], sizeof(StagedMail));
    // Of what was read, so that the answer does not overtake it.
    cluster_send(&block.shared.answer, 0, static_cast<unsigned>(mail.label), &block.shared.answered[place]);
    return mail;
  }

  // Of the lanes that have a row, one after the other, from the first-th row of the cluster on. What each needs is made
  // in all lanes at once. Returns the next number.
  __device__ __forceinline__ int hand_out(const StagedMail& mine, bool has_row, int first) const {
    const unsigned lanes = __ballot_sync(kAllLanes, has_row);
    const int number = first + __popc(lanes & ((1u << lane) - 1));
    const Place place = place_of(number);
    const Errand own = block.blocks == 1 ? errand(mine) : Errand{};
    for (unsigned left = lanes; left != 0; left &= left - 1) {
      if (lane == __ffs(static_cast<int>(left)) - 1) {
        if (block.blocks == 1) {
          bring(own, place);
        } else {
          send(mine, number);
          bring(errand(receive(number)), place);
        }
      }
      __syncwarp(kAllLanes);
    }
    return first + __popc(lanes);
  }

  // A row's label, read by one lane of the first block.
  __device__ __forceinline__ StagedMail look_at(int64_t row) const {
    const CrossEntropyInputs& inputs = block.args.inputs;
    const RowAt at = row_at(inputs.logits, row);
    const int64_t label = row_label(inputs, at);
    if (!is_item(inputs, label)) return {static_cast<int>(row), kIgnoredLabel, 0.0f, 0.0f};
    StagedMail mail = {static_cast<int>(row), static_cast<int>(label), class_weight<float>(inputs, label), 0.0f};
    // Before it is written over: the row is handed out later.
    if (kGeneral) mail.reference = Element<T>::widen(row_start<T>(inputs.logits, at)[label]);
    return mail;
  }

  // Large tickets save trips to the counter, small ones in the end let all clusters end at once.
  static __device__ __forceinline__ int64_t rows_of_ticket(int64_t left, int64_t clusters) {
    const int64_t fair = left / (2 * clusters);
    return fair < 1 ? 1 : fair > kMostRowsOfTicket ? kMostRowsOfTicket : fair;
  }

  __device__ __forceinline__ void run_first() const {
    const int64_t rows = row_count(block.args.inputs.logits);
    const int64_t clusters = gridDim.x / block.blocks;
    const int64_t given = rows_of_ticket(rows, clusters) * clusters;  // the first ones, without the counter
    int64_t size = rows_of_ticket(rows, clusters);
    int64_t begin = blockIdx.x / block.blocks * size;
    int number = 0;
    while (begin < rows) {
      size = size < rows - begin ? size : rows - begin;
      const int64_t next_size = rows_of_ticket(rows - begin - size, clusters);
      // Asked for early, as the answer takes as long as a short row.
      unsigned next = 0;
      if (lane == 0) next = atomicAdd(block.shape.tickets, static_cast<unsigned>(next_size));
      StagedMail mine = {kNoMoreRows, kIgnoredLabel, 0.0f, 0.0f};
      if (lane < size) mine = look_at(begin + lane);
      number = hand_out(mine, lane < size && (block.writes() || mine.label >= 0), number);
      begin = given + __shfl_sync(kAllLanes, next, 0);
      size = next_size;
    }
    const int ends = hand_out({kNoMoreRows, kIgnoredLabel, 0.0f, 0.0f}, lane < block.shape.groups, number);
    if (lane > 0) return;
    // No block leaves before its messages have come.
    for (int last = ends - 2; block.blocks > 1 && last < ends; ++last) {
      mbarrier_wait(&block.shared.answered[last % 2], (last / 2) & 1);
    }
  }

  __device__ __forceinline__ void run_other() const {
    if (lane > 0) return;
    for (int number = 0, ended = 0; ended < block.shape.groups; ++number) {
      const StagedMail mail = receive(number);
      ended += mail.row == kNoMoreRows;
      bring(errand(mail), place_of(number));
    }
  }
};

// The groups. -------------------------------------------------------------------------------------------------------

// The loops over a slice with options: the sums, and the gradient.
template <typename T>
__device__ __forceinline__ RowState<float> reduce_general(const Slice<T>& slice, const T* stage, int thread, int size,
                                                          const RowView<float>& row) {
  RowState<float> state;
#pragma unroll 1
  for (int v = slice.begin + thread; v < slice.end; v += size) {
    row.push_vector(stage + v * Slice<T>::kWidth, slice.class_of(v), static_cast<T*>(nullptr), state);
  }
  if (thread < slice.ends()) {
    const int place = slice.end_at(thread);
    const int64_t j = slice.offset + place;
    float z[1] = {Element<T>::widen(stage[place])};
    row.template prepare<1>(z, j, j == row.label ? 0 : -1, state);
    row.push(z, state);
  }
  return state;
}

template <typename T>
__device__ __forceinline__ void write_general(const Slice<T>& slice, const T* stage, T* out, int thread, int size,
                                              int label, const RowFactor<float>& row, const RowArgs<float>& args) {
  constexpr int kWidth = Slice<T>::kWidth;
  const float* const weight = static_cast<const float*>(args.inputs.weight);
#pragma unroll 1
  for (int v = slice.begin + thread; v < slice.end; v += size) {
    const int j = slice.class_of(v);
    float x[kWidth];
    Element<T>::unpack(load_vector(stage + v * kWidth), x);
    gradient<T, kWidth>(x, j, -1, row, args.transform, weight);
    stream_vector(out + j, Element<T>::pack(x));
  }
  if (thread < slice.ends()) {
    const int j = slice.offset + slice.end_at(thread);
    float x[1] = {Element<T>::widen(stage[slice.end_at(thread)])};
    gradient<T, 1>(x, j, -1, row, args.transform, weight);
    out[j] = Element<T>::narrow(x[0]);
  }
}

// Sums of one thread, or of more. target: the label's logit by to_ordered(), of its owner.
struct Sums {
  RowState<float> state;
  int target = static_cast<int>(0x80000000);
};

// Whether another class of the slice comes before the label in torch.argmax.
template <typename T>
__device__ __forceinline__ bool beats_label(const Slice<T>& slice, const T* stage, int thread, int size, float x_label,
                                            int label) {
  constexpr int kWidth = Slice<T>::kWidth;
  bool beaten = false;
  const auto compare = [&](int place) {
    const float x = Element<T>::widen(stage[place]);
    beaten |= x > x_label || (x == x_label && slice.offset + place < label);
  };
  for (int v = slice.begin + thread; v < slice.end; v += size) {
#pragma unroll 1
    for (int i = 0; i < kWidth; ++i) compare(v * kWidth + i);
  }
  if (thread < slice.ends()) compare(slice.end_at(thread));
  return beaten;
}

template <typename T, bool kGeneral, bool kGrad>
struct StagedGroup {
  const StagedBlock<T, kGeneral, kGrad>& block;
  int group, thread, size;
  int lane, warp;
  int exchanges = 0;

  __device__ __forceinline__ StagedGroup(const StagedBlock<T, kGeneral, kGrad>& of, int number)
      : block(of),
        group(number),
        thread(static_cast<int>(threadIdx.x) - number * of.shape.warps * kWarp),
        size(of.shape.warps * kWarp),
        lane(thread % kWarp),
        warp(thread / kWarp) {}

  // Of each warp, to the group in every block; returns those of all warps in one order. Two sets of places in turn: a
  // warp sends for the exchange after the next when it has read those of the next, so when all have read this one's.
  __device__ __forceinline__ const StagedSums<kGeneral>* exchange(const StagedSums<kGeneral>& mine) {
    const int half = exchanges % 2, phase = (exchanges / 2) & 1;
    ++exchanges;
    const int all = block.blocks * block.shape.warps;
    StagedSums<kGeneral>* const places = block.sums + (group * 2 + half) * all;
    Mbarrier* const summed = &block.shared.summed[group][half];
    StagedSums<kGeneral>* const place = places + block.rank * block.shape.warps + warp;
    if (block.blocks == 1) {
      if (lane == 0) {
        *place = mine;
        mbarrier_arrive(summed);
      }
    } else if (lane < block.blocks) {
      cluster_send(place, lane, mine, summed);
    }
    mbarrier_wait(summed, phase);
    if (block.blocks > 1 && thread == 0) mbarrier_expect(summed, block.bytes_of_sums());
    return places;
  }

  // The sums of `lanes` neighbours, a power of two, the same in each of them.
  static __device__ __forceinline__ Sums merged(const Sums& sums, int lanes) {
    Sums all;
    all.state.max = from_ordered(__reduce_max_sync(kAllLanes, to_ordered(sums.state.max)));
    all.target = __reduce_max_sync(kAllLanes, sums.target);
    const float scale =
        sums.state.max == all.state.max ? 1.0f : exp2_flushed((sums.state.max - all.state.max) * kLog2e);
    all.state.sum = sums.state.sum * scale;
    if (kGeneral) {
      all.state.weighted = sums.state.weighted_about(all.state.max, scale);
      all.state.linear = sums.state.linear;
    }
    for (int step = lanes / 2; step > 0; step /= 2) {
      all.state.sum += __shfl_xor_sync(kAllLanes, all.state.sum, step);
      if (kGeneral) {
        all.state.weighted += __shfl_xor_sync(kAllLanes, all.state.weighted, step);
        all.state.linear += __shfl_xor_sync(kAllLanes, all.state.linear, step);
      }
    }
    return all;
  }

  // Of all threads of the group in all blocks.
  __device__ __forceinline__ Sums exchanged(const Sums& mine) {
    const Sums of_warp = merged(mine, kWarp);
    StagedSums<kGeneral> sent = {};
    sent.max = of_warp.state.max;
    sent.sum = of_warp.state.sum;
    sent.target = of_warp.target;
    if constexpr (kGeneral) {
      sent.weighted = of_warp.state.weighted;
      sent.linear = of_warp.state.linear;
    }
    const StagedSums<kGeneral>* const places = exchange(sent);
    const auto read = [&](int i) {
      const StagedSums<kGeneral> found = places[i];
      Sums sums;
      sums.state.max = found.max;
      sums.state.sum = found.sum;
      sums.target = found.target;
      if constexpr (kGeneral) {
        sums.state.weighted = found.weighted;
        sums.state.linear = found.linear;
      }
      return sums;
    };
    const int all = block.blocks * block.shape.warps;
    Sums sums = read(lane & (all - 1));
    if (all > kWarp) {  // at most twice as many
      const Sums other = read(lane + kWarp);
      sums.state.merge_about_max(other.state);
      sums.target = sums.target > other.target ? sums.target : other.target;
    }
    return merged(sums, all < kWarp ? all : kWarp);
  }

  // Whether in any block a class comes before the label in torch.argmax.
  __device__ __forceinline__ bool is_beaten(bool beaten) {
    StagedSums<kGeneral> sent = {};
    sent.beaten = __any_sync(kAllLanes, beaten);
    const StagedSums<kGeneral>* const places = exchange(sent);
    bool any = false;
    for (int i = lane; i < block.blocks * block.shape.warps; i += kWarp) any |= places[i].beaten != 0;
    return __any_sync(kAllLanes, any);
  }
};

template <typename T, bool kGeneral, bool kGrad>
__device__ __forceinline__ void consume(const StagedBlock<T, kGeneral, kGrad>& block) {
  const RowArgs<float>& args = block.args;
  const CrossEntropyInputs& inputs = args.inputs;
  StagedGroup<T, kGeneral, kGrad> group(block, static_cast<int>(threadIdx.x) / (block.shape.warps * kWarp));
  const FactorView<float, kGeneral> factors(args.factor, inputs, block.writes() ? incoming_gradient(args) : 0.0f);
  const bool is_first = block.rank == 0 && group.thread == 0;
  const int thread = group.thread, size = group.size;
  const auto release = [&](int stage) {
    __syncwarp(kAllLanes);
    if (group.lane == 0) mbarrier_arrive(&block.shared.empty[stage]);
  };

  int number = group.group;  // of the stage
  for (int turn = 0;; ++turn) {
    mbarrier_wait(&block.shared.full[group.group][turn % 2], (turn / 2) & 1);
    const StagedRow row = block.shared.rows[number];
    const int here = number;
    number += block.shape.groups;
    if (number >= block.shape.stages) number -= block.shape.stages;
    if (row.row < 0) return;
    if (row.label < 0) {
      if (block.writes()) {
        T* const out = static_cast<T*>(args.grad_logits.data) + row.out;
        write_zero_slice(block.slice_of(row), out, thread, size);
      }
      release(here);
      continue;
    }

    T* const stage = block.stage(here);
    const Slice<T> slice = block.slice_of(row);
    const int place = row.label - slice.offset;  // of the label, if it is in this block
    const bool is_owner = static_cast<unsigned>(place) < static_cast<unsigned>(slice.count * Slice<T>::kWidth) &&
                          slice.thread_of(place, size) == thread;
    Sums sums;
    if (is_owner) {  // the only one that reads it
      const float x = Element<T>::widen(stage[place]);
      sums.target = to_ordered(x == x ? x : __int_as_float(0x7fc00000));
      stage[place] = Element<T>::narrow(-INFINITY);
      bulk_load_fence();
    }
    if constexpr (kGeneral) {
      const RowView<float> view(args, row.label, args.transform.value(row.reference));
      sums.state = reduce_general(slice, stage, thread, size, view);
    } else {
      sums.state = reduce_slice<false, PlainSum<T>>(slice, stage, thread, size);
    }
    sums = group.exchanged(sums);
    if (!kGeneral && is_large<T>(sums.state.max)) {
      sums.state = reduce_large<false>(slice, stage, thread, size, -1);
      sums = group.exchanged(sums);
    }
    const float x_label = from_ordered(sums.target);
    const float z_label = kGeneral ? args.transform.value(x_label) : x_label;
    bool wins = z_label > sums.state.max;
    if (kGeneral && inputs.options.metrics && z_label == sums.state.max) {  // the same decision in all threads
      wins = !group.is_beaten(beats_label(slice, stage, thread, size, x_label, row.label));
    }
    if (is_first) record_row<kGeneral>(args, row.row, sums.state, z_label, wins);
    if (!block.writes()) {
      release(here);
      continue;
    }
    const RowFactor<float> factor = factors.of(sums.state, z_label, row.weight);
    T* const out = static_cast<T*>(args.grad_logits.data) + row.out;
    if constexpr (kGeneral) {
      write_general(slice, stage, out, thread, size, row.label, factor, args);
    } else {
      write_plain(slice, stage, out, thread, size, factor);
    }
    // Over what its vector has there, which the same thread has written.
    if (is_owner) {
      out[row.label] = Element<T>::narrow(kGeneral ? factor.target * args.transform.slope(x_label) : factor.target);
    }
    release(here);
  }
}

// kStagedMaxThreads: warps are given registers by four, so that 544 threads take as many as 640.
template <typename T, bool kGeneral, bool kGrad>
__global__ void __launch_bounds__(kStagedMaxThreads, 1)
    staged_kernel(const __grid_constant__ RowArgs<typename Element<T>::Acc> args,
                  const __grid_constant__ StagedShape shape) {
  begin_rows(args);
  const StagedBlock<T, kGeneral, kGrad> block(args, shape);
  if (threadIdx.x == 0) block.initialise();
  __syncwarp(kAllLanes);
  if (block.blocks == 1) {
    __syncthreads();
  } else {
    cluster_barrier();  // from here on every block of the cluster has started
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (static_cast<int>(threadIdx.x) < shape.groups * shape.warps * kWarp) {
    consume(block);
  } else {
    const StagedProducer<T, kGeneral, kGrad> producer = {block, lane};
    if (block.rank == 0) {
      producer.run_first();
    } else {
      producer.run_other();
    }
  }
  __syncwarp(kAllLanes);                    // a warp comes as one
  if (block.blocks > 1) cluster_barrier();  // messages may be on their way to whoever is here
}

}  // namespace accumloss::cuda
