// The fields of a plain struct as a list: what compares, hashes, prints or binds a struct goes over this list and
// cannot forget a field.
#pragma once

#include <concepts>
#include <cstddef>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

namespace fastnorm {

template <class T, class Struct>
concept IsConstOrNot = std::same_as<std::remove_const_t<T>, Struct>;

// Defines fields(s), a tuple of references to all fields of `Struct`, and names_of_fields(), their names. The names
// have to be all there are, in order: the structured binding does not compile with one too few.
#define FASTNORM_FIELDS(Struct, ...)           \
  template <IsConstOrNot<Struct> FastnormSelf> \
  auto fields(FastnormSelf& fastnorm_self) {   \
    auto& [__VA_ARGS__] = fastnorm_self;       \
    return std::tie(__VA_ARGS__);              \
  }                                            \
  constexpr std::string_view names_of_fields(std::type_identity<Struct>) { return #__VA_ARGS__; }

// The name of field i: a part of "a, b, c".
constexpr std::string_view name_of_field(std::string_view names, size_t i) {
  for (; i > 0; --i) names.remove_prefix(names.find(',') + 2);
  return names.substr(0, names.find(','));
}

// Calls use(name, field) for every field, in order.
template <class Struct, class Use>
constexpr void for_each_field(Struct& s, Use use) {
  const std::string_view names = names_of_fields(std::type_identity<std::remove_const_t<Struct>>{});
  std::apply(
      [&](auto&... field) {
        size_t i = 0;
        (use(name_of_field(names, i++), field), ...);
      },
      fields(s));
}

// A tuple without its last element.
template <class... T>
constexpr auto without_last(const std::tuple<T...>& all) {
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return std::tuple<std::tuple_element_t<i, std::tuple<T...>>...>(std::get<i>(all)...);
  }(std::make_index_sequence<sizeof...(T) - 1>{});
}

}  // namespace fastnorm
