// Which of the compiled instruction sets this machine runs.
#pragma once

namespace lance {

enum class Capability { generic, avx2, avx512 };

// Asked of the processor once; LANCE_CPU_CAPABILITY=generic or avx2 lowers it.
Capability capability();

}  // namespace lance
