// Whose ticket a launch of a hand-over counts in (handover.h).
//
// A launch needs one that no other has that may run at the same time:
//
//   called for a stream       the stream's own, since its launches run one after the other
//   recorded into a graph     a new one, which stays with the record: two graphs that are replayed at the same
//                             time have two, and one is not replayed beside itself
//   cpu                       the calling thread's own
//
// Streams and records are counted for the life of the process; tickets that lie in static memory of the module,
// zero when it is loaded, last for kNumTickets of them, and then it is an error. A launch that a GPU aborts
// takes its context and with that the tickets along; on the CPU forget_arrivals() sets one back.
//
// NOTE: a stream is known by its handle, so one must not be destroyed before its launches are done, as a new stream
// may get the handle; and a thread's stream of its own (per-thread default streams) by the thread's id. Nor may a
// graph be instantiated twice, or be a child of two, and run beside itself: both runs would write the same outputs.
//
// By one translation unit of a module only: the tickets are static.
#pragma once

#include <cstdint>

#include "device/platform.h"

#if !defined(AITER_TARGET_CPU)
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#endif

namespace aiter {

#if defined(AITER_TARGET_CPU)

inline uint32_t* ticket_for(int, hipStream_t) {
  static thread_local uint32_t ticket = 0;
  return &ticket;
}
inline void forget_arrivals(uint32_t* ticket) { *ticket = 0; }

#else

constexpr uint32_t kNumTickets = 1 << 18;
static __device__ uint32_t handover_tickets[kNumTickets];

// Tickets of one device that have been given out.
class Tickets {
 public:
  explicit Tickets(int device) {
    const DeviceGuard guard(device);
    void* address = nullptr;
    check_runtime(hipGetSymbolAddress(&address, HIP_SYMBOL(handover_tickets)),
                  "asking for the tickets of a hand-over");
    first_ = static_cast<uint32_t*>(address);
  }

  uint32_t* of(hipStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (is_recorded(stream)) return next();
    // NOTE: the handle 2 is another stream in each thread of the host.
    const bool is_of_thread = reinterpret_cast<uintptr_t>(stream) == 2;
    const size_t thread =
        is_of_thread ? std::hash<std::thread::id>()(std::this_thread::get_id()) : 0;
    uint32_t*& ticket = by_stream_[{stream, thread}];
    if (ticket == nullptr) ticket = next();
    return ticket;
  }

 private:
  struct Key {
    hipStream_t stream;
    size_t thread;
    bool operator==(const Key& other) const {
      return stream == other.stream && thread == other.thread;
    }
  };
  struct Hash {
    size_t operator()(const Key& key) const {
      return std::hash<void*>()(static_cast<void*>(key.stream)) ^ key.thread;
    }
  };

  static bool is_recorded(hipStream_t stream) {
    hipStreamCaptureStatus status = hipStreamCaptureStatusNone;
    check_runtime(hipStreamIsCapturing(stream, &status), "asking whether a stream is captured");
    return status != hipStreamCaptureStatusNone;
  }

  uint32_t* next() {
    if (used_ == kNumTickets) {
      throw std::runtime_error("hand-over: expected at most " + std::to_string(kNumTickets) +
                               " streams and recorded calls in a process, got one more; pass"
                               " handover_size=1");
    }
    return first_ + used_++;
  }

  std::mutex mutex_;
  std::unordered_map<Key, uint32_t*, Hash> by_stream_;
  uint32_t* first_;
  uint32_t used_ = 0;
};

inline uint32_t* ticket_for(int device, hipStream_t stream) {
  // NOTE: never destroyed, as launches may be made while static objects are.
  static std::mutex mutex;
  static auto& by_device = *new std::unordered_map<int, Tickets*>;
  Tickets* tickets = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    Tickets*& entry = by_device[device];
    if (entry == nullptr) entry = new Tickets(device);
    tickets = entry;
  }
  return tickets->of(stream);
}

// A launch that failed has not started.
inline void forget_arrivals(uint32_t*) {}

#endif

}  // namespace aiter
