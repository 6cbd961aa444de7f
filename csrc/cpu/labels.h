// The labels of a call, compared before anything is indexed by them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>

#include "../backend.h"

namespace accumloss {
namespace cpu {

struct RowIndex {
  int64_t b, t;
};
inline RowIndex row_index(const LogitsView& view, int64_t row) {
  if (view.B == 1) return {0, row};
  const int64_t b = row / view.T;
  return {b, row - b * view.T};
}

class Labels {
 public:
  explicit Labels(const CrossEntropyInputs& inputs)
      : labels_(inputs.labels),
        logits_(inputs.logits),
        shift_(inputs.options.shift),
        ignore_index_(inputs.options.ignore_index),
        vocab_size_(inputs.options.vocab_size) {}

  bool is_ignored(int64_t label) const { return label == ignore_index_; }

  // y = the labels of rows [begin, begin + count), each a class of the vocabulary or ignore_index. What indexes by a
  // label takes it from here: what lies in the tensor may be another one by now.
  void copy(int64_t begin, int64_t count, int64_t* y) const {
    labels_.is_int32 ? copy_as<int32_t>(begin, count, y) : copy_as<int64_t>(begin, count, y);
    uint64_t bad = 0;
    for (int64_t i = 0; i < count; ++i) bad |= misfit(y[i]);
    if (bad >> 63 == 0) return;
    check();  // names the first of all rows
    for (int64_t i = 0; i < count; ++i)
      if (misfit(y[i]) >> 63 != 0) refuse(begin + i, y[i]);
  }

  // All of them, before anything is written over the logits.
  void check() const {
    if (labels_.is_int32 ? all_fit<int32_t>() : all_fit<int64_t>()) return;
    for (int64_t row = 0; row < logits_.B * logits_.T; ++row) {
      const int64_t y = label(row);
      if (misfit(y) >> 63 != 0) refuse(row, y);
    }
  }

 private:
  // The label of a row, or ignore_index.
  int64_t label(int64_t row) const {
    const RowIndex at = row_index(logits_, row);
    const int64_t t = at.t + shift_;
    if (t >= logits_.T) return ignore_index_;
    const int64_t offset = at.b * labels_.stride_b + t * labels_.stride_t;
    return labels_.is_int32 ? static_cast<const int32_t*>(labels_.data)[offset]
                            : static_cast<const int64_t*>(labels_.data)[offset];
  }

  template <typename Label>
  void copy_as(int64_t begin, int64_t count, int64_t* y) const {
    const int64_t T = logits_.T, stride = labels_.stride_t, shift = shift_,
                  ignored = ignore_index_;  // y might be any of them
    RowIndex at = row_index(logits_, begin);
    for (int64_t i = 0; i < count; at = {at.b + 1, 0}) {
      const int64_t end = std::min(i + T - at.t, count);
      const int64_t last = std::min(std::max(i + T - shift - at.t, i), end);  // that has a label
      const Label* of_b = static_cast<const Label*>(labels_.data) + at.b * labels_.stride_b;
      int64_t t = at.t + shift;
      for (; i < last; ++i, ++t) y[i] = of_b[t * stride];
      for (; i < end; ++i) y[i] = ignored;
    }
  }

  // A number whose highest bit says that a label is neither a class nor ignored, in operations that every machine has
  // for vectors.
  uint64_t misfit(int64_t label) const {
    const uint64_t y = static_cast<uint64_t>(label), last = static_cast<uint64_t>(vocab_size_) - 1,
                   difference = y ^ static_cast<uint64_t>(ignore_index_);
    return (y | (last - y)) & (difference | (0 - difference));
  }

  template <typename Label>
  bool all_fit() const {
    uint64_t bad = 0;  // its highest bit
    const int64_t n = logits_.T - shift_;
    for (int64_t b = 0; b < logits_.B; ++b) {
      const Label* from = static_cast<const Label*>(labels_.data) + b * labels_.stride_b + shift_ * labels_.stride_t;
      if (labels_.stride_t == 1) {
        for (int64_t t = 0; t < n; ++t) bad |= misfit(from[t]);
      } else {
        for (int64_t t = 0; t < n; ++t) bad |= misfit(from[t * labels_.stride_t]);
      }
    }
    return bad >> 63 == 0;
  }

  [[noreturn]] void refuse(int64_t row, int64_t label) const {
    std::ostringstream message;
    message << "cross_entropy: expected labels in [0, " << vocab_size_ << ") or ignore_index " << ignore_index_
            << ", got " << label << " for row " << row << " of " << logits_.B * logits_.T
            << "; check vocab_size and the value that pads the labels";
    throw std::out_of_range(message.str());
  }

  const LabelsView labels_;
  const LogitsView logits_;
  const int64_t shift_, ignore_index_, vocab_size_;
};

}  // namespace cpu
}  // namespace accumloss
