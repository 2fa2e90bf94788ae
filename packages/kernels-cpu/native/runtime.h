// What the parts of the runtime say to each other; kernels do not need it.
#pragma once

namespace moe {

void set_call_threads(int threads);

}  // namespace moe
