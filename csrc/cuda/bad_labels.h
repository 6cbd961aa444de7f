// Labels outside [0, V), reported by the kernels without a synchronisation.
#pragma once

#include <cstdint>

namespace accumloss {

// True if a kernel that has run since the last call met a label outside [0, V) that is not ignore_index: one such
// (row, label), row counted over (B, T). Reads memory of the host: does not wait for kernels still to run.
bool take_bad_label(int64_t* row, int64_t* label);
// Raises such a label as std::out_of_range, if there is one.
void check_bad_labels();

namespace cuda {

// What the kernels write, as one 16-byte store, in pinned memory of the host that every device sees. row + 1; 0: none.
struct alignas(16) BadLabel {
  int64_t row_plus_one;
  int64_t label;
};

// The record: allocated by the first call, also inside the capture of a CUDA graph, and never freed.
BadLabel* bad_label_record();

}  // namespace cuda
}  // namespace accumloss
