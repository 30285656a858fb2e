// The checked launcher of expert_load.
#include <limits>

#include "expert_load.h"
#include "tensor_view.h"

namespace aiter {

void expert_load(const TensorView& topk_ids, const TensorView& load, void* stream) {
  constexpr int64_t kMaxExperts = 12 * 1024;  // counters that fit in 48 KiB of LDS
  check_rank(topk_ids, 2);
  check_dtype(topk_ids, {DType::i32});
  check_contiguous(topk_ids);
  check_range("topk_ids elements", topk_ids.numel(), 0, std::numeric_limits<int32_t>::max());
  check_rank(load, 1);
  check_dtype(load, {DType::i32});
  check_contiguous(load);
  check_range("load elements", load.numel(), 1, kMaxExperts);
  check_same_device({&topk_ids, &load});
  check_no_overlap({&load}, {&topk_ids});

  const DeviceGuard guard(topk_ids.device_index);
  const ExpertLoadParams params{static_cast<const int32_t*>(topk_ids.data),
                                static_cast<uint32_t>(topk_ids.numel()),
                                static_cast<int>(load.numel()), static_cast<int32_t*>(load.data)};
  launch(expert_load_kernel, device_limits(topk_ids.device_index),
         {1, kExpertLoadThreads, sizeof(uint32_t) * params.num_experts},
         static_cast<hipStream_t>(stream), params);
}

}  // namespace aiter
