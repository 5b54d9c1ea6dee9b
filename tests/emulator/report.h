// Texts about threads and the lines they wait at.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "machine.h"

namespace fastnorm::emulator {

inline std::string text_of(Wait wait, const Site& site) {
  return std::string(name_of(wait)) + " " + site.file_name() + ":" + std::to_string(site.line());
}
inline std::string text_of(const Thread& thread) {
  return "block " + std::to_string(thread.home->index) + " thread " + std::to_string(thread.index);
}

inline bool same_site(const Site& a, const Site& b) {
  if (std::memcmp(&a, &b, sizeof a) == 0) return true;
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::string(a.file_name()) == b.file_name());
}

// The threads that wait for ever: one line for all neighbouring threads that wait at the same line.
inline std::string deadlock_report(const std::vector<Thread>& threads) {
  constexpr int kLines = 20;
  std::string lines;
  size_t stuck = 0;
  int count = 0;
  for (size_t i = 0; i < threads.size(); ++i) {
    const Thread& first = threads[i];
    if (first.done) continue;
    size_t end = i + 1;
    while (end < threads.size() && !threads[end].done && threads[end].home == first.home &&
           threads[end].wait == first.wait && same_site(threads[end].site, first.site)) {
      ++end;
    }
    stuck += end - i;
    if (count++ < kLines) {
      lines += "\n  " + text_of(first) + (end - i > 1 ? " to " + std::to_string(threads[end - 1].index) : "") + " at " +
               text_of(first.wait, first.site);
    }
    i = end - 1;
  }
  if (count > kLines) lines += "\n  and more";
  return "deadlock: of " + std::to_string(threads.size()) + " threads " + std::to_string(threads.size() - stuck) +
         " have returned and " + std::to_string(stuck) + " wait for ever" + lines;
}

}  // namespace fastnorm::emulator
