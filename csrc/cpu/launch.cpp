// The launchers on CPU. Rows are shared out to threads in tasks whose size depends on V alone, and each task's sums are
// added in order, so neither the number of threads nor their timing changes a bit. Few long rows are split along V.
#if defined(__x86_64__)
#include <cpuid.h>
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../backend.h"
#include "../row.h"
#include "instruction_set.h"
#include "kept_memory.h"
#include "labels.h"
#include "rows/table.h"
#include "tasks.h"

namespace accumloss {
namespace cpu {
namespace {

constexpr int64_t kTaskElements = 32768;      // of logits in one task, at least
constexpr int64_t kShortTaskElements = 8192;  // of the logits of short rows
constexpr int64_t kShortRowElements = 64;     // as many take the time that a short row takes whatever its length
constexpr int64_t kStreamedBytes = int64_t(32) << 20;  // of a gradient, at least
constexpr int64_t kTasks = 256;                        // at most, or one for each row
constexpr int64_t kSplitElements = 16 * kBlock;        // of one row, where rows are split
constexpr int64_t kSplitRows = 8;                      // at most so many rows that count are split

// Selection --------------------------------------------------------------------------------------------------------

#if defined(ACCUMLOSS_X86_ISAS)
// __builtin_cpu_supports("f16c") does not compile with clang 14.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

const InstructionSet& select_instruction_set() {
  std::vector<const InstructionSet*> supported = {&portable()};
#if defined(ACCUMLOSS_X86_ISAS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) supported.push_back(&avx2());
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    supported.push_back(&avx512());
#endif
  const char* wanted = std::getenv("ACCUMLOSS_CPU_CAPABILITY");
  if (wanted == nullptr || wanted[std::strspn(wanted, " \t")] == '\0') return *supported.back();
  std::string names;
  for (const InstructionSet* set : supported) {
    if (std::strcmp(set->name, wanted) == 0) return *set;
    names += std::string(names.empty() ? "" : ", ") + set->name;
  }
  throw std::runtime_error("ACCUMLOSS_CPU_CAPABILITY: expected one of " + names + " on this machine, got " + wanted);
}

const InstructionSet& instruction_set() {
  static const InstructionSet& set = select_instruction_set();
  return set;
}

// Views ------------------------------------------------------------------------------------------------------------

char* row_data(const LogitsView& view, int64_t row) {
  const RowIndex at = row_index(view, row);
  return static_cast<char*>(view.data) + (at.b * view.stride_b + at.t * view.stride_t) * element_size(view.dtype);
}

// Any element of a float or double array.
double element(const void* data, Dtype dtype, int64_t i) {
  return dtype == Dtype::kFloat64 ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
}
void set_element(void* data, Dtype dtype, int64_t i, double value) {
  if (dtype == Dtype::kFloat64)
    static_cast<double*>(data)[i] = value;
  else
    static_cast<float*>(data)[i] = static_cast<float>(value);
}

// One call's inputs and what every row needs of them.
struct Rows {
  const CrossEntropyInputs& inputs;
  const RowKernels& kernels;
  Labels labels;
  int64_t N, V;
  double weight_sum;

  explicit Rows(const CrossEntropyInputs& inputs)
      : inputs(inputs),
        kernels(instruction_set().kernels[static_cast<int>(inputs.logits.dtype)]),
        labels(inputs),
        N(inputs.logits.B * inputs.logits.T),
        V(inputs.logits.V),
        weight_sum(inputs.weight_sum != nullptr ? *inputs.weight_sum : static_cast<double>(vocab_size())) {}

  int64_t vocab_size() const { return inputs.options.vocab_size; }
  bool is_shard() const { return V != vocab_size(); }
  // Of labels relative to the first class: all lie in [0, V) where the logits have the whole vocabulary.
  bool has(int64_t y) const { return y >= 0 && y < V; }

  double weight(int64_t label) const {
    return inputs.weight != nullptr ? element(inputs.weight, inputs.logits.dtype, label) : 1.0;
  }

  double target_logit(int64_t row, int64_t y) const {
    return kernels.transform_one(row_data(inputs.logits, row) + y * element_size(inputs.logits.dtype), inputs.options);
  }
  RowSegment segment(int64_t row, int64_t y, int64_t begin, int64_t end, double target_logit) const {
    return {row_data(inputs.logits, row), inputs.weight, begin, end, y, row_reference(target_logit)};
  }
  // Takes state.weighted to entropy_reference().
  void refer_entropy(RowState<double>& state, int64_t row, int64_t y, double target_logit) const {
    if (!inputs.options.metrics || !is_far_below(target_logit, state.max)) return;
    // the sums again, relative to the largest logit; rare: the label's class is masked
    RowSegment whole = segment(row, y, 0, V, target_logit);
    whole.reference = entropy_reference(target_logit, state.max);
    RowState<double> again;
    kernels.push(whole, inputs.options, &again, nullptr, nullptr);
    state.weighted = again.weighted;
  }
  RowResult result(RowState<double> state, int64_t row, int64_t y, double target_logit) const {
    refer_entropy(state, row, y, target_logit);
    return row_result(state, target_logit, weight(y), weight_sum, V, inputs.options);
  }
  // origin: z_y, or of the first class where another shard has the label
  ShardRow shard_result(RowState<double> state, int64_t row, int64_t y, double origin) const {
    refer_entropy(state, row, y, origin);
    const double of_shard = inputs.shard_weight_sum != nullptr ? *inputs.shard_weight_sum : static_cast<double>(V);
    ShardRow found = shard_row(state, has(y), origin, has(y) ? weight(y) : 0, of_shard, inputs.options);
    if (!inputs.options.metrics) return found;
    const char* const x = row_data(inputs.logits, row);
    if (!has(y))
      found.best = kernels.max_logit(x, V);
    else if (origin > state.max || (origin == state.max && kernels.label_is_argmax(x, V, y)))
      found.best = kernels.transform_one(x + y * element_size(inputs.logits.dtype), LossOptions());
    else
      found.best = kNaN;
    return found;
  }
  bool is_correct(double others_max, double nll, int64_t row, int64_t y, double target_logit) const {
    if (nll != nll || target_logit < others_max) return false;
    return target_logit > others_max || kernels.label_is_argmax(row_data(inputs.logits, row), V, y);
  }
  // torch.argmax of the row, others_max the largest z but the label's: a search, and only where the label does not
  // lead.
  int64_t argmax(double others_max, double nll, int64_t row, int64_t y, double target_logit) const {
    const bool is_nan = nll != nll;
    if (target_logit > others_max && !is_nan) return y;
    const char* const x = row_data(inputs.logits, row);
    const bool is_identity = inputs.options.softcap == 0 && inputs.options.logit_scale == 1;
    // z is as large in several classes as a cap makes it; of NaN and +inf the former is torch's largest
    const double largest = is_nan ? kInfinity : is_identity ? others_max : kernels.max_logit(x, V);
    const int64_t first = kernels.first_not_below(x, 0, V, largest);
    if (!is_nan) return first;
    int64_t j = first;
    while (j < V && kernels.transform_one(x + j * element_size(inputs.logits.dtype), LossOptions()) == kInfinity)
      j = kernels.first_not_below(x, j + 1, V, largest);
    return j < V ? j : first < V ? first : kernels.first_not_below(x, 0, V, -kInfinity);
  }
  RowGrad<double> gradient(double lse, double nll, int64_t y, double grad) const {
    return RowGrad<double>(lse, nll, weight(y), weight_sum, vocab_size(), grad, inputs.options);
  }

  // Whether short_rows serves: short rows without gaps, no option that it leaves out.
  bool is_short() const {
    const LossOptions& options = inputs.options;
    const LogitsView& logits = inputs.logits;
    return kernels.short_rows != nullptr && V <= kMedium && !is_shard() && logits.stride_t == V &&
           (logits.B == 1 || logits.stride_b == logits.T * V) && options.label_smoothing == 0 && options.z_loss == 0 &&
           options.softcap == 0 && options.logit_scale == 1;
  }
};

// The rows that count, and the others, in tasks: what counts is shared out in equal parts wherever it lies. All labels
// are compared when they are listed.
class RowLists {
 public:
  explicit RowLists(const Rows& rows) : rows_(rows) {
    int64_t labels[kGroup];
    for (int64_t begin = 0; begin < rows.N; begin += kGroup) {
      const int64_t count = std::min(rows.N - begin, kGroup);
      rows.labels.copy(begin, count, labels);
      for (int64_t r = 0; r < count; ++r) {
        if (rows.labels.is_ignored(labels[r]))
          ignored_.push_back(begin + r);
        else
          counted_.push_back({begin + r, labels[r] - rows.inputs.options.class_offset});
      }
    }
  }

  struct Counted {
    int64_t row, label;  // relative to the first class
  };
  const Counted& counted(int64_t i) const { return counted_[i]; }
  const std::vector<int64_t>& ignored() const { return ignored_; }
  // Whether the threads share each row that counts. Else each row is one thread's.
  bool is_split() const { return num_counted() <= kSplitRows && rows_.V > 2 * kSplitElements; }

  int64_t num_tasks() const { return is_split() ? 1 : Parts(num_counted(), rows_.V).count(); }
  // visit(begin, end, index, local) for consecutive ranges of the rows that count; where they are split, for all of
  // them on the calling thread. local: see run_tasks.
  template <typename MakeLocal, typename Visit>
  void for_each_task(const MakeLocal& make_local, const Visit& visit) const {
    if (is_split()) return visit(int64_t{0}, num_counted(), int64_t{0}, make_local());
    const Parts parts(num_counted(), rows_.V);
    run_tasks(parts.count(), num_counted() * rows_.V, make_local,
              [&](int64_t i, const auto& local) { visit(parts.begin(i), parts.end(i), i, local); });
  }
  // The same, and ignore(begin, end) for ranges of those that do not count.
  template <typename MakeLocal, typename Visit, typename Ignore>
  void for_each_task(const MakeLocal& make_local, const Visit& visit, const Ignore& ignore) const {
    const Parts others(num_ignored(), rows_.V);
    if (is_split()) {
      run_tasks(others.count(), num_ignored() * rows_.V, no_local,
                [&](int64_t i, Nothing) { ignore(others.begin(i), others.end(i)); });
      return for_each_task(make_local, visit);
    }
    const Parts parts(num_counted(), rows_.V);
    run_tasks(parts.count() + others.count(), rows_.N * rows_.V, make_local, [&](int64_t i, const auto& local) {
      if (i < parts.count())
        visit(parts.begin(i), parts.end(i), i, local);
      else
        ignore(others.begin(i - parts.count()), others.end(i - parts.count()));
    });
  }
  // work(segment, index) for the whole row, or on the threads for the segments that it is split into.
  template <typename Work>
  void for_each_segment(int64_t i, double target_logit, const Work& work) const {
    if (!is_split()) return work(segment(i, target_logit), int64_t{0});
    run_tasks(num_segments(), rows_.V, no_local, [&](int64_t part, Nothing) {
      const int64_t begin = part * kSplitElements, end = std::min(begin + kSplitElements, rows_.V);
      work(rows_.segment(counted_[i].row, counted_[i].label, begin, end, target_logit), part);
    });
  }
  // push of RowKernels for the whole row.
  RowState<double> push(int64_t i, double target_logit, void* exps, void* references) const {
    RowState<double> state;
    std::vector<RowState<double>> parts(is_split() ? static_cast<size_t>(num_segments()) : 0);
    for_each_segment(i, target_logit, [&](RowSegment segment, int64_t part) {
      count_from_block(segment);
      rows_.kernels.push(segment, rows_.inputs.options, parts.empty() ? &state : &parts[part], exps, references);
    });
    for (const RowState<double>& part : parts) state.merge(part);
    return state;
  }

  // z_y, and a fetch of the next row's
  double target_logit(int64_t i) const {
    if (i + 1 < num_counted()) __builtin_prefetch(data(i + 1) + counted_[i + 1].label * size());
    return rows_.target_logit(counted_[i].row, counted_[i].label);
  }

 private:
  // So many rows in parts of at least kTaskElements, and at most kTasks of them.
  class Parts {
   public:
    Parts(int64_t rows, int64_t V)
        : rows_(rows), rows_each_(std::max(std::max(rows * V / kTasks, kTaskElements) / V, int64_t{1})) {}
    int64_t count() const { return (rows_ + rows_each_ - 1) / rows_each_; }
    int64_t begin(int64_t i) const { return i * rows_each_; }
    int64_t end(int64_t i) const { return std::min((i + 1) * rows_each_, rows_); }

   private:
    int64_t rows_, rows_each_;
  };

  int64_t num_counted() const { return static_cast<int64_t>(counted_.size()); }
  int64_t num_ignored() const { return static_cast<int64_t>(ignored_.size()); }
  int64_t num_segments() const { return (rows_.V + kSplitElements - 1) / kSplitElements; }
  // Counts the classes of a shard from the block of the whole row that it begins in, so that sums have its blocks.
  void count_from_block(RowSegment& segment) const {
    const LossOptions& options = rows_.inputs.options;
    const int64_t before = options.class_offset % kAligned;
    if (before == 0 || !is_plain(options)) return;
    segment.x = static_cast<const char*>(segment.x) - before * size();
    segment.begin += before;
    segment.end += before;
    segment.target += before;
    segment.turn = (segment.turn + before + kLanes - 1) / kLanes * kLanes;
  }
  int64_t size() const { return element_size(rows_.inputs.logits.dtype); }
  const char* data(int64_t i) const { return row_data(rows_.inputs.logits, counted_[i].row); }
  // A whole row. What it fetches ahead are rows that count.
  RowSegment segment(int64_t i, double target_logit) const {
    RowSegment segment = rows_.segment(counted_[i].row, counted_[i].label, 0, rows_.V, target_logit);
    const int64_t bytes = rows_.V * size(), last = (kPrefetchBytes + bytes - 1) / bytes;
    segment.turn = ((last * bytes - kPrefetchBytes) / size() + kLanes - 1) / kLanes * kLanes;
    segment.ahead_before = ahead(i, last - 1);
    segment.ahead_after = ahead(i, last);
    return segment;
  }
  // How far from a byte of row i lies what comes kPrefetchBytes after it when the rows that count are strung together,
  // where that is in row i + rows.
  int64_t ahead(int64_t i, int64_t rows) const {
    if (i + rows >= num_counted()) return 0;
    return data(i + rows) - data(i) + kPrefetchBytes - rows * rows_.V * size();
  }

  const Rows& rows_;
  std::vector<Counted> counted_;
  std::vector<int64_t> ignored_;
};

struct Sums {
  double loss = 0, weight = 0, entropy = 0;
  int64_t items = 0, correct = 0;

  void add(const Sums& other) {
    loss += other.loss;
    weight += other.weight;
    entropy += other.entropy;
    items += other.items;
    correct += other.correct;
  }
  void write(const CrossEntropySums& sums, Dtype dtype) const {
    if (sums.totals != nullptr) {
      const double found[] = {loss, static_cast<double>(items), weight, static_cast<double>(correct), entropy};
      for (int i = 0; i < 5; ++i) sums.totals[i] += found[i];
      return;
    }
    set_element(sums.loss_sum, dtype, 0, loss);
    set_element(sums.total_weight, dtype, 0, weight);
    set_element(sums.entropy_sum, dtype, 0, entropy);
    *sums.num_items = items;
    *sums.num_correct = correct;
  }
};

Sums ordered_sum(const std::vector<Sums>& parts) {
  Sums total;
  for (const Sums& part : parts) total.add(part);
  return total;
}

Sums sums_of_row(const Rows& rows, const RowState<double>& state, const RowResult& result, int64_t row, int64_t y,
                 double target_logit) {
  Sums sums;
  sums.loss = result.loss;
  sums.weight = rows.weight(y);
  sums.items = 1;
  if (rows.inputs.options.metrics) {
    sums.entropy = result.entropy;
    sums.correct = rows.is_correct(state.max, result.nll, row, y, target_logit);
  }
  return sums;
}

// Scratch for the exponentials of one row and the reference of each of its blocks.
struct Exponentials {
  static constexpr std::align_val_t kLine{64};  // a vector that lies across two lines is stored twice
  struct Delete {
    void operator()(char* memory) const { ::operator delete(memory, kLine); }
  };
  std::unique_ptr<char, Delete> memory;
  void* exps;
  void* references;

  Exponentials(int64_t V, Dtype dtype) {
    const int64_t size = dtype == Dtype::kFloat64 ? 8 : 4;
    const int64_t room = num_blocks(V) * kBlock;  // whole blocks: the kernels write whole vectors
    memory.reset(static_cast<char*>(::operator new(static_cast<size_t>((room + num_blocks(V)) * size), kLine)));
    exps = memory.get();
    references = memory.get() + room * size;
  }
};

// Where push leaves the exponentials of a row: its gradient's own place where they fit into it, else scratch. Metrics
// may ask for the logits again, so that their place will not do.
void* exps_of(const Rows& rows, const Exponentials& scratch, const LogitsView& grad_logits, int64_t row, bool streams) {
  const LossOptions& options = rows.inputs.options;
  const bool fits = grad_logits.dtype == Dtype::kFloat32 || grad_logits.dtype == Dtype::kFloat64;
  char* const grad = row_data(grad_logits, row);
  const bool logits_stay = !options.metrics || grad != row_data(rows.inputs.logits, row);
  return fits && is_plain(options) && logits_stay && !streams ? grad : scratch.exps;
}

// Whether rows of a gradient may go past the caches, which it is too large to stay in: lines that are written whole are
// not read then.
bool streams_rows(const LogitsView& grad) {
  return grad.B * grad.T * grad.V * element_size(grad.dtype) >= kStreamedBytes;
}
// Whether the gradient of rows that count does so too. In place its lines are in the cache.
bool streams_gradient(const Rows& rows, const LogitsView& grad) {
  return streams_rows(grad) && grad.data != rows.inputs.logits.data;
}

// Orders what this thread streamed before what it does next.
void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

void zero_row(const LogitsView& grad, int64_t row, bool streams) {
  char* const data = row_data(grad, row);
  const int64_t bytes = grad.V * element_size(grad.dtype);
  int64_t streamed = 0, before = bytes;
#if defined(__x86_64__)
  if (streams) {
    before = std::min(static_cast<int64_t>(-reinterpret_cast<uintptr_t>(data) % 64), bytes);
    streamed = (bytes - before) / 64 * 64;
    for (char* to = data + before; to < data + before + streamed; to += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_setzero_si128());
  }
#endif
  std::memset(data, 0, static_cast<size_t>(before));
  std::memset(data + before + streamed, 0, static_cast<size_t>(bytes - before - streamed));
}
void zero_rows(const RowLists& lists, int64_t begin, int64_t end, const LogitsView& grad) {
  const bool streams = streams_rows(grad);
  for (int64_t i = begin; i < end; ++i) zero_row(grad, lists.ignored()[i], streams);
  if (streams) finish_streaming();
}

// Short rows, in groups: whichever of sums, (lse, nll) and grad_logits is not null. The backward is a forward here too.
void run_short(const Rows& rows, const CrossEntropySums* sums, double* lse, void* nll, double grad,
               const LogitsView* grad_logits) {
  const int64_t elements = std::max(rows.N * rows.V / kTasks, kShortTaskElements);
  const int64_t rows_per_task = std::max(elements / rows.V / kGroup, int64_t{1}) * kGroup;
  const Dtype dtype = rows.inputs.logits.dtype;
  const bool metrics = rows.inputs.options.metrics && sums != nullptr;
  const bool in_place = grad_logits != nullptr && grad_logits->data == rows.inputs.logits.data;
  if (in_place) rows.labels.check();
  const int64_t num_tasks = (rows.N + rows_per_task - 1) / rows_per_task;
  std::vector<Sums> parts(static_cast<size_t>(num_tasks));
  run_tasks(num_tasks, rows.N * (rows.V + kShortRowElements), no_local, [&](int64_t i, Nothing) {
    ShortRows group;
    Sums part;
    group.V = rows.V;
    group.weight = static_cast<const float*>(rows.inputs.weight);
    group.ignore_index = rows.inputs.options.ignore_index;
    group.grad = grad;
    const int64_t end = std::min((i + 1) * rows_per_task, rows.N);
    for (int64_t begin = i * rows_per_task; begin < end; begin += kGroup) {
      group.count = std::min(end - begin, kGroup);
      group.has_next = begin + 2 * kGroup <= end;
      group.x = row_data(rows.inputs.logits, begin);
      rows.labels.copy(begin, group.count, group.labels);
      rows.kernels.short_rows(group, metrics, grad_logits != nullptr ? row_data(*grad_logits, begin) : nullptr);
      for (int64_t r = 0; lse != nullptr && r < group.count; ++r) {
        lse[begin + r] = group.lse[r];
        set_element(nll, dtype, begin + r, group.nll[r]);
      }
      part.add({group.loss_sum, group.weight_sum, group.entropy_sum, group.num_items, group.num_correct});
    }
    parts[i] = part;
  });
  if (sums != nullptr) ordered_sum(parts).write(*sums, dtype);
}

// Launchers --------------------------------------------------------------------------------------------------------

void forward(const CrossEntropyInputs& inputs, const CrossEntropySums& sums, double* lse, void* nll) {
  const Rows rows(inputs);
  const Dtype dtype = inputs.logits.dtype;
  if (rows.is_short()) return run_short(rows, &sums, lse, nll, 0, nullptr);
  const RowLists lists(rows);
  for (const int64_t row : lists.ignored()) {
    lse[row] = 0;
    set_element(nll, dtype, row, 0);
  }
  std::vector<Sums> parts(static_cast<size_t>(lists.num_tasks()));
  lists.for_each_task(no_local, [&](int64_t begin, int64_t end, int64_t task, Nothing) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = lists.counted(i).row, y = lists.counted(i).label;
      const double target_logit = lists.target_logit(i);
      const RowState<double> state = lists.push(i, target_logit, nullptr, nullptr);
      const RowResult result = rows.result(state, row, y, target_logit);
      lse[row] = result.lse;
      set_element(nll, dtype, row, result.nll);
      parts[task].add(sums_of_row(rows, state, result, row, y, target_logit));
    }
  });
  ordered_sum(parts).write(sums, dtype);
}

void forward_shard(const CrossEntropyInputs& inputs, double* columns) {
  const Rows rows(inputs);
  const ShardColumns to = {columns, rows.N};
  const RowLists lists(rows);
  for (const int64_t row : lists.ignored()) to.write(row, ShardRow{}, inputs.options);
  lists.for_each_task(no_local, [&](int64_t begin, int64_t end, int64_t, Nothing) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = lists.counted(i).row, y = lists.counted(i).label;
      const double origin = rows.has(y) ? lists.target_logit(i) : rows.target_logit(row, 0);
      const RowState<double> state = lists.push(i, origin, nullptr, nullptr);
      to.write(row, rows.shard_result(state, row, y, origin), inputs.options);
    }
  });
}

void forward_tokens(const CrossEntropyInputs& inputs, const TokenRows& to) {
  const Rows rows(inputs);
  const Dtype dtype = inputs.logits.dtype;
  const bool metrics = inputs.options.metrics;
  const RowLists lists(rows);
  const auto write = [&](int64_t row, const RowResult& result, int64_t argmax) {
    set_element(to.loss, dtype, row, result.loss);
    set_element(to.nll, dtype, row, result.nll);
    to.lse[row] = result.lse;
    if (!metrics) return;
    set_element(to.entropy, dtype, row, result.entropy);
    to.argmax[row] = argmax;
  };
  for (const int64_t row : lists.ignored()) write(row, RowResult{}, -1);
  lists.for_each_task(no_local, [&](int64_t begin, int64_t end, int64_t, Nothing) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = lists.counted(i).row, y = lists.counted(i).label;
      const double target_logit = lists.target_logit(i);
      const RowState<double> state = lists.push(i, target_logit, nullptr, nullptr);
      const RowResult result = rows.result(state, row, y, target_logit);
      write(row, result, metrics ? rows.argmax(state.max, result.nll, row, y, target_logit) : 0);
    }
  });
}

// gradient_of(row, y): the RowGrad of a row that counts, or null where it is zero whatever the logits are.
template <typename GradientOf>
void write_gradients(const Rows& rows, const LogitsView& grad_logits, const GradientOf& gradient_of) {
  const RowLists lists(rows);
  const bool streams = streams_gradient(rows, grad_logits);
  lists.for_each_task(
      no_local,
      [&](int64_t begin, int64_t end, int64_t, Nothing) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = lists.counted(i).row;
          const std::optional<RowGrad<double>> gradient = gradient_of(row, lists.counted(i).label);
          if (!gradient.has_value()) {
            zero_row(grad_logits, row, streams);
            continue;
          }
          lists.for_each_segment(i, 0, [&](const RowSegment& segment, int64_t) {
            rows.kernels.write_grad(segment, rows.inputs.options, *gradient, streams, row_data(grad_logits, row));
            if (streams && lists.is_split()) finish_streaming();
          });
        }
        if (streams) finish_streaming();
      },
      [&](int64_t begin, int64_t end) { zero_rows(lists, begin, end, grad_logits); });
}

void backward(const CrossEntropyInputs& inputs, const double* lse, const void* nll, const void* grad_loss_sum,
              const LogitsView& grad_logits) {
  const Rows rows(inputs);
  const Dtype dtype = inputs.logits.dtype;
  const double grad = element(grad_loss_sum, dtype, 0);
  if (rows.is_short() && grad_logits.stride_t == rows.V)
    return run_short(rows, nullptr, nullptr, nullptr, grad, &grad_logits);
  write_gradients(rows, grad_logits, [&](int64_t row, int64_t y) {
    return std::make_optional(rows.gradient(lse[row], element(nll, dtype, row), y, grad));
  });
}

void backward_tokens(const CrossEntropyInputs& inputs, const double* lse, const void* nll, const void* entropy,
                     const TokenGrads& grads, const LogitsView& grad_logits) {
  const Rows rows(inputs);
  const Dtype dtype = inputs.logits.dtype;
  const auto of = [](const double* grad, int64_t row) { return grad != nullptr ? grad[row] : 0.0; };
  write_gradients(rows, grad_logits, [&](int64_t row, int64_t y) -> std::optional<RowGrad<double>> {
    const double loss = of(grads.loss, row), of_nll = of(grads.nll, row), of_lse = of(grads.lse, row),
                 of_entropy = of(grads.entropy, row);
    if (loss == 0 && of_nll == 0 && of_lse == 0 && of_entropy == 0) return std::nullopt;
    RowGrad<double> gradient = rows.gradient(lse[row], element(nll, dtype, row), y, loss);
    gradient.add(element(nll, dtype, row), of_entropy != 0 ? element(entropy, dtype, row) : 0.0, of_nll, of_lse,
                 of_entropy);
    return gradient;
  });
}

void forward_with_grad(const CrossEntropyInputs& inputs, const CrossEntropySums& sums, const void* grad_loss_sum,
                       const LogitsView& grad_logits) {
  const Rows rows(inputs);
  const Dtype dtype = inputs.logits.dtype;
  const double grad = element(grad_loss_sum, dtype, 0);
  if (rows.is_short() && grad_logits.stride_t == rows.V)
    return run_short(rows, &sums, nullptr, nullptr, grad, &grad_logits);
  const RowLists lists(rows);
  const bool streams = streams_gradient(rows, grad_logits);
  std::vector<Sums> parts(static_cast<size_t>(lists.num_tasks()));
  lists.for_each_task([&] { return Exponentials(rows.V, dtype); },
                      [&](int64_t begin, int64_t end, int64_t task, const Exponentials& scratch) {
                        for (int64_t i = begin; i < end; ++i) {
                          const int64_t row = lists.counted(i).row, y = lists.counted(i).label;
                          const double target_logit = lists.target_logit(i);
                          void* const exps = exps_of(rows, scratch, grad_logits, row, streams);
                          const RowState<double> state = lists.push(i, target_logit, exps, scratch.references);
                          const RowResult result = rows.result(state, row, y, target_logit);
                          parts[task].add(sums_of_row(rows, state, result, row, y, target_logit));
                          const RowGrad<double> gradient = rows.gradient(result.lse, result.nll, y, grad);
                          lists.for_each_segment(i, target_logit, [&](const RowSegment& segment, int64_t) {
                            rows.kernels.write_grad_from_exps(segment, inputs.options, gradient, exps,
                                                              scratch.references, streams, row_data(grad_logits, row));
                            if (streams && lists.is_split()) finish_streaming();
                          });
                        }
                        if (streams) finish_streaming();
                      },
                      [&](int64_t begin, int64_t end) { zero_rows(lists, begin, end, grad_logits); });
  ordered_sum(parts).write(sums, dtype);
}

// Rows of two tensors ------------------------------------------------------------------------------------------------

// lse of what push_pair found, NaN where it is no distribution.
double lse_of(const RowState<double>& state) {
  return state.max - state.max == 0 ? state.max + std::log(state.sum) : kNaN;
}

// sum_j t_j (log t_j - log s_j)
double divergence_of(const PairSums& found) {
  const RowState<double>&teacher = found.teacher, &student = found.student;
  if (!(teacher.max - teacher.max == 0 && student.max - student.max == 0)) return kNaN;
  return found.weighted / teacher.sum - (std::log(teacher.sum) - std::log(student.sum));
}

// write(row) for each row that counts, ignore(row) for each other.
template <typename Write, typename Ignore>
void for_each_row(const RowLists& lists, const Write& write, const Ignore& ignore) {
  lists.for_each_task(
      no_local,
      [&](int64_t begin, int64_t end, int64_t, Nothing) {
        for (int64_t i = begin; i < end; ++i) write(lists.counted(i).row);
        finish_streaming();
      },
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ignore(lists.ignored()[i]);
        finish_streaming();
      });
}

// A call's teacher beside its student.
struct Pair {
  const DistillationInputs& inputs;
  Rows student;

  explicit Pair(const DistillationInputs& inputs) : inputs(inputs), student(inputs.student) {}
  PairRow row(int64_t row, double lse, double teacher_lse) const {
    return {
        row_data(inputs.student.logits, row), row_data(inputs.teacher, row), student.V, lse, teacher_lse, inputs.beta};
  }
};

void forward_distillation(const DistillationInputs& inputs, const DistillationRows& to) {
  const Pair pair(inputs);
  const RowLists lists(pair.student);
  const Dtype dtype = inputs.student.logits.dtype;
  const RowKernels& kernels = pair.student.kernels;
  const LossOptions& options = inputs.student.options;
  const double beta = inputs.beta;
  for_each_row(
      lists,
      [&](int64_t row) {
        const void *student = row_data(inputs.student.logits, row), *teacher = row_data(inputs.teacher, row);
        if (beta == 1) std::swap(student, teacher);  // KL(s | t): the student weighs
        PairSums found;
        kernels.push_pair(student, teacher, pair.student.V, options.logit_scale, &found);
        to.lse[row] = lse_of(beta == 1 ? found.teacher : found.student);
        to.teacher_lse[row] = lse_of(beta == 1 ? found.student : found.teacher);
        to.of_student[row] = to.of_teacher[row] = 0;
        if (beta == 0)
          set_element(to.loss, dtype, row, to.of_teacher[row] = divergence_of(found));
        else if (beta == 1)
          set_element(to.loss, dtype, row, to.of_student[row] = divergence_of(found));
        else {
          kernels.push_divergence(pair.row(row, to.lse[row], to.teacher_lse[row]), options, &to.of_student[row],
                                  &to.of_teacher[row]);
          set_element(to.loss, dtype, row, beta * to.of_teacher[row] + (1 - beta) * to.of_student[row]);
        }
      },
      [&](int64_t row) {
        to.lse[row] = to.teacher_lse[row] = to.of_student[row] = to.of_teacher[row] = 0;
        set_element(to.loss, dtype, row, 0);
      });
}

void backward_distillation(const DistillationInputs& inputs, const DistillationRows& found, const double* grad_loss,
                           const LogitsView& grad_logits) {
  const Pair pair(inputs);
  const RowLists lists(pair.student);
  const bool streams = streams_gradient(pair.student, grad_logits);
  for_each_row(
      lists,
      [&](int64_t row) {
        if (grad_loss[row] == 0) return zero_row(grad_logits, row, streams);
        PairRow of_row = pair.row(row, found.lse[row], found.teacher_lse[row]);
        of_row.divergence = found.of_student[row];
        pair.student.kernels.write_divergence_grad(of_row, inputs.student.options, grad_loss[row], streams,
                                                   row_data(grad_logits, row));
      },
      [&](int64_t row) { zero_row(grad_logits, row, streams); });
}

// visit(row) for every row.
template <typename Visit>
void for_all_rows(int64_t N, int64_t V, const Visit& visit) {
  const int64_t rows_each = std::max(std::max(N * V / kTasks, kTaskElements) / V, int64_t{1});
  run_tasks((N + rows_each - 1) / rows_each, N * V, no_local, [&](int64_t i, Nothing) {
    for (int64_t row = i * rows_each; row < std::min((i + 1) * rows_each, N); ++row) visit(row);
    finish_streaming();
  });
}

void forward_targets(const TargetInputs& inputs, const TargetRows& to) {
  const Rows rows(inputs.logits);
  const LossOptions& options = inputs.logits.options;
  const Dtype dtype = inputs.logits.logits.dtype;
  LossOptions of_row = options;  // of lse and nll alone
  of_row.label_smoothing = 0;
  for_all_rows(rows.N, rows.V, [&](int64_t row) {
    // What the loss is of a class that has nearly all of the target would be lost in lse - z of it
    const char* const targets = row_data(inputs.targets, row);
    const char* const x = row_data(inputs.logits.logits, row);
    int64_t y;
    RowResult result;
    double surprise;  // of the other classes
    if (is_plain(options) && inputs.logits.weight == nullptr) {
      PairSums sums;
      rows.kernels.push_plain_targets(x, targets, rows.V, &sums);
      y = sums.label;
      result = row_result(sums.student, rows.target_logit(row, y), 1.0, 0.0, rows.V, of_row);
      surprise = sums.total * (result.lse - row_reference(sums.student.max)) + sums.weighted;
      to.of_label[row] = rows.kernels.transform_one(targets + y * element_size(inputs.targets.dtype), LossOptions());
      to.total[row] = sums.total + to.of_label[row];
    } else {
      const int64_t found = rows.kernels.first_not_below(targets, 0, rows.V, rows.kernels.max_logit(targets, rows.V));
      y = found < rows.V ? found : 0;
      const double target_logit = rows.target_logit(row, y);
      RowState<double> state;
      rows.kernels.push(rows.segment(row, y, 0, rows.V, target_logit), of_row, &state, nullptr, nullptr);
      result = row_result(state, target_logit, 1.0, 0.0, rows.V, of_row);
      const TargetRow at = {x, targets, inputs.logits.weight, rows.V, y, result.lse, result.nll};
      rows.kernels.push_targets(at, options, &surprise, &to.total[row], &to.of_label[row]);
    }
    double loss = surprise + (to.of_label[row] == 0 ? 0.0 : to.of_label[row] * result.nll);
    if (options.z_loss > 0) loss += options.z_loss * result.lse * result.lse;
    set_element(to.loss, dtype, row, result.nll != result.nll ? kNaN : loss);
    set_element(to.nll, dtype, row, result.nll);
    to.lse[row] = result.lse;
    to.label[row] = y;
  });
}

void backward_targets(const TargetInputs& inputs, const TargetRows& found, const double* grad_loss,
                      const LogitsView& grad_logits) {
  const Rows rows(inputs.logits);
  const Dtype dtype = inputs.logits.logits.dtype;
  const bool streams = streams_gradient(rows, grad_logits);
  for_all_rows(rows.N, rows.V, [&](int64_t row) {
    if (grad_loss[row] == 0) return zero_row(grad_logits, row, streams);
    const TargetRow at = {row_data(inputs.logits.logits, row),
                          row_data(inputs.targets, row),
                          inputs.logits.weight,
                          rows.V,
                          found.label[row],
                          found.lse[row],
                          element(found.nll, dtype, row),
                          found.total[row],
                          found.of_label[row]};
    rows.kernels.write_targets_grad(at, inputs.logits.options, grad_loss[row], streams, row_data(grad_logits, row));
  });
}

void scale(const LogitsView& values, const void* factor) {
  const double f = element(factor, values.dtype, 0);
  if (f == 1.0) return;
  const RowKernels& kernels = instruction_set().kernels[static_cast<int>(values.dtype)];
  const int64_t n = values.B * values.T * values.V;  // contiguous
  run_tasks((n + kTaskElements - 1) / kTaskElements, n, no_local, [&](int64_t i, Nothing) {
    const int64_t begin = i * kTaskElements;
    char* data = static_cast<char*>(values.data) + begin * element_size(values.dtype);
    kernels.scale(data, n - begin < kTaskElements ? n - begin : kTaskElements, f);
  });
}

}  // namespace

const char* instruction_set_name() { return instruction_set().name; }

}  // namespace cpu

const Backend& cpu_backend() {
  static constexpr Backend backend = {cpu::forward,
                                      cpu::backward,
                                      cpu::forward_with_grad,
                                      cpu::forward_shard,
                                      cpu::scale,
                                      cpu::take_memory,
                                      cpu::release_memory,
                                      cpu::forward_tokens,
                                      cpu::backward_tokens,
                                      cpu::forward_distillation,
                                      cpu::backward_distillation,
                                      cpu::forward_targets,
                                      cpu::backward_targets};
  return backend;
}

}  // namespace accumloss
