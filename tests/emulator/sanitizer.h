// Messages to the sanitizers: the running stack, the order of events, memory that is not to be touched. Empty
// functions where there is no sanitizer. build.py defines FASTNORM_SANITIZE_THREAD and FASTNORM_SANITIZE_ADDRESS, since
// emulator.cpp is not instrumented for threads itself: the scheduler's own memory is none of the kernels' business.
#pragma once

#include <cstddef>

#if defined(FASTNORM_SANITIZE_THREAD)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_write_range(void* address, unsigned long size);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#if defined(FASTNORM_SANITIZE_ADDRESS)
extern "C" {
void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* saved, const void** bottom, size_t* size);
void __asan_poison_memory_region(const volatile void* address, size_t size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
#endif

namespace fastnorm::emulator {

// ---- ThreadSanitizer: every fiber is a thread to it, and only the barriers order them ----

#if defined(FASTNORM_SANITIZE_THREAD)
constexpr bool kThreadSanitizer = true;
inline void* tsan_current() { return __tsan_get_current_fiber(); }
inline void* tsan_create() { return __tsan_create_fiber(0); }
inline void tsan_destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void tsan_switch(void* fiber) {
  constexpr unsigned kOrdersNothing = 1;
  __tsan_switch_to_fiber(fiber, kOrdersNothing);
}
inline void release(void* token) { __tsan_release(token); }
inline void acquire(void* token) { __tsan_acquire(token); }
inline void note_overwritten(void* address, size_t bytes) { __tsan_write_range(address, bytes); }
#else
constexpr bool kThreadSanitizer = false;
inline void* tsan_current() { return nullptr; }
inline void* tsan_create() { return nullptr; }
inline void tsan_destroy(void*) {}
inline void tsan_switch(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
inline void note_overwritten(void*, size_t) {}
#endif

// While one of these lives, ThreadSanitizer sees nothing, not even memset and its kin.
struct Unseen {
#if defined(FASTNORM_SANITIZE_THREAD)
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// ---- AddressSanitizer ----

#if defined(FASTNORM_SANITIZE_ADDRESS)
constexpr bool kAddressSanitizer = true;
inline void poison(const void* address, size_t bytes) { __asan_poison_memory_region(address, bytes); }
inline void unpoison(const void* address, size_t bytes) { __asan_unpoison_memory_region(address, bytes); }
inline void start_switch(void** save, const void* bottom, size_t size) {
  __sanitizer_start_switch_fiber(save, bottom, size);
}
inline void finish_switch(void* saved, const void** from_bottom, size_t* from_size) {
  __sanitizer_finish_switch_fiber(saved, from_bottom, from_size);
}
#else
constexpr bool kAddressSanitizer = false;
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
#endif

constexpr bool kSanitizer = kThreadSanitizer || kAddressSanitizer;

}  // namespace fastnorm::emulator
