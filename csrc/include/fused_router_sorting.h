// From hidden states to sorted buffers in one launch: the router's product, top-k, the sort, moe_buf zeroing.
//
//   hidden [M, D'], weight [E', D'], bias [E']   as router_product.h says
//   logits [M, E'] f32                           written; rows below n
//   all others                                   as in fused_topk_moe_sorting.h
//
// All workgroups share the product, each its tiles, and hand over through memory (device/handover.h) to the one that is
// done last, which routes alone by the phases of fused_topk_moe_sorting.h:
//
//   1 product   all workgroups   logits into memory, which the caller asked for or which is allocated for the call
//   2 arrive                     at a ticket; nobody waits for anybody
//   3 zero      all but the last moe_buf: the i-th to arrive takes share i of those of the others, as it would do nothing else
//   4 route     the last         logits are f32 rows in memory, selected and sorted as those of a caller's
//
// So there are no sums between workgroups, one trip through memory, and the whole time of the routing to zero in. One
// workgroup routes all rows, so LDS has to hold them; dispatch asks for few (aiter/routing/dispatch.py).
//
// The ticket is the stream's own, or the record's, as for any hand-over: what may run at the same time shares nothing
// but what it was given to write to.
//
// Where launches overlap, two take less than this one: on an H200 the product alone (router_product_alone.h) and the fused
// launch take 3.34, 3.86, 4.64, 7.07 us for M = 1, 4, 16, 64 of 2880 x 128, this 5.15, 5.78, 6.33, 10.5 (strict clock, bf16, a
// bias, 2026-11-27).
//
// Rejected: logits that are their own flag, posted by relaxed stores into a mailbox of the stream and awaited by the
// workgroup that was the last to start (no fence, no arrival, no second trip): 4.51, 5.42, 5.90, 10.6 instead of 4.82, 5.52,
// 6.04, 10.6 us (H100, 2026-11-26), still more than two launches, for memory of its own and waits. By clock64() of it, M = 1, 6,980
// cycles are 3,260 for the product, 1,450 until all logits are there, and 2,270 for the routing, whose code a compute
// unit runs too seldom to have it at hand.
//
// Kernels are a module of their own: f32 rows alone, but each with the code of the product.
#pragma once

#include "fused_topk_moe_sorting_rules.h"
#include "router_product.h"

namespace aiter {

// Threads of a workgroup: a tile of the product takes about 128 registers of a lane, and so many keys of a row more.
constexpr int kMaxRouterThreads = 512;
__host__ __device__ constexpr int max_router_threads(int max_row_threads, bool by_keys,
                                                     int values) {
  const int most = by_keys && values > 16 ? kMaxRouterThreads / 2 : kMaxRouterThreads;
  return max_row_threads < most ? max_row_threads : most;
}
template <typename Rows>
constexpr int kRouterThreads = max_router_threads(Rows::kMaxThreads, false, 0);
template <int kLanes, int kValues, int kBest>
constexpr int kRouterThreads<KeyRows<kLanes, kValues, kBest>> =
    max_router_threads(KeyRows<kLanes, kValues, kBest>::kMaxThreads, true, kValues);

template <typename Rows, typename Rule>
__device__ __forceinline__ void route_hidden(const FusedFirst& first, const FusedParams& p,
                                             const Rule& rule, const RouterProduct& product,
                                             char* lds_base) {
  wait_for_earlier_launch();
  let_next_launch_begin();
  const int num_local = local_tokens(first.num_local_tokens, first.num_tokens);
  multiply(product, num_local, reinterpret_cast<float*>(lds_base));
  release_to_device();
  __syncthreads();
  // NOTE: kept from before the product, on AMD GPUs all these are more scalar registers than there are.
  const FusedParams& rest = loaded_anew(p, sizeof(FusedFirst));
  const uint32_t num_workgroups = gridDim.x;
  uint32_t* const lds_place = reinterpret_cast<uint32_t*>(lds_base + FusedLds::kInbox);
  if (threadIdx.x == 0) *lds_place = arrive(rest.ticket, num_workgroups);
  __syncthreads();
  const uint32_t place = *lds_place;
  const uint32_t num_others = num_workgroups - 1;
  if (place < num_others || num_others == 0) {
    const uint64_t num_shares = num_others == 0 ? 1 : num_others;
    zero_bytes(rest.sort.moe_buf, num_local * rest.sort.row_bytes,
               static_cast<uint64_t>(place) * blockDim.x + threadIdx.x, num_shares * blockDim.x);
  }
  if (place < num_others) return;
  acquire_from_device();
  route<Rows>(loaded_anew(first, 0), p, rule, 0, lds_base);
}

template <typename Rows>
__global__ void AITER_LAUNCH_BOUNDS(kRouterThreads<Rows>)
    fused_router_sorting_kernel(const void* gating, int64_t row_stride,
                                const int32_t* num_local_tokens, const int32_t* expert_mask,
                                int num_tokens, int num_experts, int topk, int tokens_per_block,
                                int num_threads, uint32_t flags, FusedParams p,
                                RouterProduct product) {
  AITER_DYNAMIC_LDS(lds_base);
  const FusedFirst first{gating,      row_stride, num_local_tokens, expert_mask, num_tokens,
                         num_experts, topk,       tokens_per_block, num_threads, flags};
  route_hidden<Rows>(first, p, NoRule{}, product, lds_base);
}

template <typename Rows>
__global__ void AITER_LAUNCH_BOUNDS(kRouterThreads<Rows>)
    fused_router_sorting_rules_kernel(const void* gating, int64_t row_stride,
                                      const int32_t* num_local_tokens, const int32_t* expert_mask,
                                      int num_tokens, int num_experts, int topk,
                                      int tokens_per_block, int num_threads, uint32_t flags,
                                      FusedParams p, FusedRule rule, RouterProduct product) {
  AITER_DYNAMIC_LDS(lds_base);
  const FusedFirst first{gating,      row_stride, num_local_tokens, expert_mask, num_tokens,
                         num_experts, topk,       tokens_per_block, num_threads, flags};
  route_hidden<Rows>(first, p, rule, product, lds_base);
}

// The kernel for rows of this rule (kernels/fused_router_sorting_rules.cu).
using RouterRulesKernel = void (*)(const void*, int64_t, const int32_t*, const int32_t*, int, int,
                                   int, int, int, uint32_t, FusedParams, FusedRule, RouterProduct);
RouterRulesKernel router_rules_kernel(const RowRule& row);

}  // namespace aiter
