// Which target this is compiled for, for code that does not ask the preprocessor.
#pragma once

namespace aiter {

#if defined(AITER_TARGET_ROCM)
constexpr const char* kTargetName = "rocm";
constexpr bool kTargetIsGpu = true;
constexpr bool kTargetIsRocm = true;
#elif defined(AITER_TARGET_CUDA)
constexpr const char* kTargetName = "cuda";
constexpr bool kTargetIsGpu = true;
constexpr bool kTargetIsRocm = false;
#elif defined(AITER_TARGET_CPU)
constexpr const char* kTargetName = "cpu";
constexpr bool kTargetIsGpu = false;
constexpr bool kTargetIsRocm = false;
#else
#error "compile with -DAITER_TARGET_ROCM, -DAITER_TARGET_CUDA or -DAITER_TARGET_CPU"
#endif

}  // namespace aiter
