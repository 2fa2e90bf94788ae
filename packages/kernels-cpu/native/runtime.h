// Interfaces between the parts of the runtime; kernels do not need it.
#pragma once

namespace moe {

void set_call_threads(int threads);

}  // namespace moe
