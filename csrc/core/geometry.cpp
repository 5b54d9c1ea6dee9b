#include "geometry.h"

namespace fastnorm {

std::string to_string(const Geometry& g) {
  return std::string(name_of(g.kind)) + "(N=" + std::to_string(g.N) + ", C=" + std::to_string(g.C) +
         ", S=" + std::to_string(g.S) + ", G=" + std::to_string(g.G) +
         (g.channels_last ? ", channels_last" : ", planar") + "): " + std::to_string(g.sets()) + " sets of " +
         std::to_string(g.set_size());
}

}  // namespace fastnorm
