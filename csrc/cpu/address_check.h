// What AddressSanitizer has to be told about the execution layer; nothing in an ordinary build.
//
//   fibers   a switch of stacks is announced, and a stack is clean before a lane starts on it: the
//            lanes before it never returned, so their frames still look alive to the sanitizer
//   LDS      what lies behind the bytes that a launch asked for is poisoned, as if not allocated
#pragma once

#include <pthread.h>

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define AITER_ADDRESS_CHECK 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define AITER_ADDRESS_CHECK 1
#endif
#endif

#if defined(AITER_ADDRESS_CHECK)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace hip_cpu::address_check {

struct Stack {
  const void* bottom = nullptr;
  size_t size = 0;
};

#if defined(AITER_ADDRESS_CHECK)

constexpr size_t kStackFactor = 4;  // frames with red zones are that much larger

inline Stack thread_stack() {
  pthread_attr_t attributes;
  void* bottom = nullptr;
  size_t size = 0;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &bottom, &size);
    pthread_attr_destroy(&attributes);
  }
  return {bottom, size};
}

inline void before_switch(void** fake_stack, const Stack& to) {
  __sanitizer_start_switch_fiber(fake_stack, to.bottom, to.size);
}
inline void after_switch(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
inline void forbid(const void* begin, size_t size) { __asan_poison_memory_region(begin, size); }
inline void allow(const void* begin, size_t size) { __asan_unpoison_memory_region(begin, size); }

#else

constexpr size_t kStackFactor = 1;

inline Stack thread_stack() { return {}; }
inline void before_switch(void**, const Stack&) {}
inline void after_switch(void*) {}
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}

#endif

}  // namespace hip_cpu::address_check
