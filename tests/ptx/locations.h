// Which line of the kernels' source an instruction comes from, by the .loc directives of "nvcc -lineinfo":
//
//   .loc 2 102 3, function_name $L__info_string12, inlined_at 5 64 7
//
// says file 2, line 102, column 3, in a function that was inlined at file 5, line 64; where that is inlined in turn an
// earlier .loc tells.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "module.h"

namespace fastnorm::ptx {

class Locations {
 public:
  explicit Locations(const Module& module) : files_(module.files) {}

  // numbers: the rest of the directive's line.
  void set(std::string_view numbers) {
    std::vector<std::string_view> words = words_of(numbers);
    const auto place_at = [&](size_t w) {
      Place place{};
      for (size_t k = 0; k < 3 && w + k < words.size(); ++k) {
        place[k] = static_cast<int>(number_of(words[w + k].substr(0, words[w + k].find(','))));
      }
      return place;
    };
    current_ = place_at(0);
    const auto at = std::find(words.begin(), words.end(), "inlined_at");
    outer_[current_] = at == words.end() ? Place{} : place_at(static_cast<size_t>(at - words.begin()) + 1);
  }

  // " (gang.cuh:61)": the innermost line of ours outside of platform.cuh; empty where there is none.
  std::string text() const {
    Place place = current_;
    for (int depth = 0; depth < 50 && place != Place{}; ++depth) {
      const auto file = files_.find(place[0]);
      if (file == files_.end()) break;
      const std::string_view path = file->second, name = path.substr(path.rfind('/') + 1);
      if (path.find("/csrc/") != std::string_view::npos && name != "platform.cuh") {
        return " (" + std::string(name) + ":" + std::to_string(place[1]) + ")";
      }
      const auto outer = outer_.find(place);
      if (outer == outer_.end()) break;
      place = outer->second;
    }
    return "";
  }

 private:
  using Place = std::array<int, 3>;  // file, line, column

  const std::map<int, std::string>& files_;
  std::map<Place, Place> outer_;
  Place current_{};
};

}  // namespace fastnorm::ptx
