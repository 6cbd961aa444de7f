// Which of the compiled instruction sets this process runs; ACCUMLOSS_CPU_CAPABILITY forces one.
#pragma once

namespace accumloss {
namespace cpu {

const char* instruction_set_name();

}  // namespace cpu
}  // namespace accumloss
