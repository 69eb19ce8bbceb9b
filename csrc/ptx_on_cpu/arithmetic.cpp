#include "arithmetic.h"

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <type_traits>
#include <utility>

#include "../core/half.h"
#include "launch.h"

namespace ptx_on_cpu {
namespace {

// ---- functions of one lane's operands ------------------------------------------------------------------------------

template <class T>
using Integer = std::enable_if_t<std::is_integral_v<T>, T>;
template <class T>
using Float = std::enable_if_t<std::is_floating_point_v<T>, T>;

// An integer with as many bits again.
template <class T, class Half = Integer<T>>
using Twice = std::conditional_t<
    sizeof(Half) == 2, std::conditional_t<std::is_signed_v<Half>, int32_t, uint32_t>,
    std::conditional_t<sizeof(Half) == 4, std::conditional_t<std::is_signed_v<Half>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<Half>, __int128, unsigned __int128>>>;

// A function of the operands, which are of type T, where Result<T> exists.
#define TARDKD_FUNCTION(name, Result, operands, result) \
  struct name {                                         \
    template <class T>                                  \
    Result<T> operator() operands const {               \
      return result;                                    \
    }                                                   \
  };

template <class T>
using Any = T;
template <class T>
using Word = std::enable_if_t<std::is_same_v<T, uint32_t>, T>;
template <class T>
using Single = std::enable_if_t<std::is_same_v<T, float>, T>;

template <class T>
T flushed(T x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(T(0), x) : x;
}
// The hardware's for double has 20 bits of the mantissa; what uses it refines them.
template <class T>
T rough_reciprocal(T a) {
  const T exact = 1 / flushed(a);
  if (sizeof(T) == 4 || !std::isfinite(exact)) return flushed(exact);
  return flushed(value<T>(bits(exact) & 0xffffffff00000000u));
}
// Of a number and NaN the number; of two zeros -0 is the lesser.
template <class T>
bool is_less(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return a == b ? std::signbit(a) && !std::signbit(b) : a < b;
  return a < b;
}
template <class T>
T division(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return a / b;
  return b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? T(0 - a) : T(a / b);
}
template <class T>
T product_and_sum(T a, T b, T c) {
  if constexpr (std::is_floating_point_v<T>) return std::fma(a, b, c);
  return T(a * b + c);
}
inline uint32_t reversed(uint32_t a) {
  for (int width : {1, 2, 4}) {
    const uint32_t low = width == 1 ? 0x55555555u : width == 2 ? 0x33333333u : 0x0f0f0f0fu;
    a = (a & low) << width | (a >> width & low);
  }
  return __builtin_bswap32(a);
}
template <class T>
T insertion(T a, T b, T at, T length) {
  const uint64_t first = bits(at) & 0xff, ones = bits(length) & 0xff;
  const uint64_t field = first < 64 ? (ones < 64 ? (uint64_t(1) << ones) - 1 : ~uint64_t(0)) << first : 0;
  return T((bits(b) & ~field) | (first < 64 ? bits(a) << first & field : 0));
}

TARDKD_FUNCTION(Same, Any, (T a), a)
TARDKD_FUNCTION(Choice, Any, (T a, T b, T predicate), bits(predicate) & 1 ? a : b)
TARDKD_FUNCTION(Quotient, Any, (T a, T b), division(a, b))
TARDKD_FUNCTION(Rest, Integer, (T a, T b), b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b))
TARDKD_FUNCTION(High, Integer, (T a, T b), T((Twice<T>(a) * Twice<T>(b)) >> (8 * sizeof(T))))
TARDKD_FUNCTION(WideProduct, Twice, (T a, T b), Twice<T>(a) * Twice<T>(b))
TARDKD_FUNCTION(ProductAndSum, Any, (T a, T b, T c), product_and_sum(a, b, c))
TARDKD_FUNCTION(Insertion, Integer, (T a, T b, T at, T length), insertion(a, b, at, length))
TARDKD_FUNCTION(Least, Any, (T a, T b), a != a || is_less(b, a) ? b : a)
TARDKD_FUNCTION(Most, Any, (T a, T b), a != a || is_less(a, b) ? b : a)
TARDKD_FUNCTION(Left, Integer, (T a, T by), uint64_t(by) >= 8 * sizeof(T) ? T(0) : T(a << by))
TARDKD_FUNCTION(Right, Integer, (T a, T by), uint64_t(by) >= 8 * sizeof(T) ? T(a < 0 ? -1 : 0) : T(a >> by))
TARDKD_FUNCTION(Magnitude, Any, (T a), std::is_floating_point_v<T> ? T(std::fabs(a)) : T(a < 0 ? 0 - a : a))
TARDKD_FUNCTION(Root, Float, (T a), std::sqrt(a))
TARDKD_FUNCTION(Reciprocal, Float, (T a), 1 / a)
TARDKD_FUNCTION(RoughReciprocal, Float, (T a), rough_reciprocal(a))
TARDKD_FUNCTION(PowerOfTwo, Single, (T a), flushed(T(std::exp2(double(flushed(a))))))
TARDKD_FUNCTION(Population, Integer, (T a), T(__builtin_popcountll(std::make_unsigned_t<T>(a))))
TARDKD_FUNCTION(Reversed, Word, (T a), reversed(a))
TARDKD_FUNCTION(LeadingZeros, Word, (T a), a ? T(__builtin_clz(a)) : T(32))
TARDKD_FUNCTION(ShiftToTop, Word, (T a), a ? T(__builtin_clz(a)) : ~T(0))

// ---- the same for every lane ---------------------------------------------------------------------------------------

template <class F, class T, class Result, size_t... k>
void compute(Launch& launch, const Instruction& i, uint32_t mask) {
  uint64_t* to = launch.write(i.to[0]);
  const uint64_t* const of[] = {launch.read(i.of[k])...};
  for_lanes(mask, [&](int lane) { to[lane] = bits(Result(F()(value<T>(of[k][lane])...))); });
}

template <class T>
void compare(Launch& launch, const Instruction& i, uint32_t mask) {
  uint64_t* to = launch.write(i.to[0]);
  const uint64_t *left = launch.read(i.of[0]), *right = launch.read(i.of[1]);
  for_lanes(mask, [&](int lane) {
    const T a = value<T>(left[lane]), b = value<T>(right[lane]);
    to[lane] = i.mode >> (a < b ? 3 : a == b ? 2 : a > b ? 1 : 0) & 1;
  });
}

// make(T()) for the type in C++.
template <class Make>
Action for_type(const Type& type, Make make) {
  const bool is_signed = type.kind == 's';
  if (type.is_float()) return type.bytes == 4 ? make(float()) : type.bytes == 8 ? make(double()) : nullptr;
  if (type.bytes == 1) return make(uint8_t());
  if (type.bytes == 2) return is_signed ? make(int16_t()) : make(uint16_t());
  if (type.bytes == 4) return is_signed ? make(int32_t()) : make(uint32_t());
  return is_signed ? make(int64_t()) : make(uint64_t());
}

template <class F>
Action of(const Type& type) {
  return for_type(type, [](auto example) -> Action {
    using T = decltype(example);
    if constexpr (std::is_invocable_v<F, T>)
      return compute<F, T, T, 0>;
    else if constexpr (std::is_invocable_v<F, T, T>)
      return compute<F, T, T, 0, 1>;
    else if constexpr (std::is_invocable_v<F, T, T, T>)
      return compute<F, T, T, 0, 1, 2>;
    else if constexpr (std::is_invocable_v<F, T, T, T, T>)
      return compute<F, T, T, 0, 1, 2, 3>;
    else
      return nullptr;
  });
}

Action wide_product(const Type& type) {
  return for_type(type, [](auto example) -> Action {
    using T = decltype(example);
    if constexpr (std::is_integral_v<T> && (sizeof(T) == 2 || sizeof(T) == 4))
      return compute<WideProduct, T, Twice<T>, 0, 1>;
    else
      return nullptr;
  });
}

// ---- moves and conversions -----------------------------------------------------------------------------------------

// Another space's address for the same place.
void change_space(Launch& launch, const Instruction& i, uint32_t mask) {
  uint64_t* to = launch.write(i.to[0]);
  const uint64_t* of = launch.read(i.of[0]);
  for_lanes(mask, [&](int lane) { to[lane] = of[lane] + uint64_t(i.offset); });
}

// Several registers as one, and one as several.
void pack(Launch& launch, const Instruction& i, uint32_t mask) {
  const size_t width = size_t(8 * i.type.bytes) / i.of.size();
  uint64_t* to = launch.write(i.to[0]);
  for_lanes(mask, [&](int lane) {
    uint64_t all = 0;
    for (size_t k = i.of.size(); k-- > 0;)
      all = all << width | (launch.read(i.of[k])[lane] & ((uint64_t(1) << width) - 1));
    to[lane] = all;
  });
}
void unpack(Launch& launch, const Instruction& i, uint32_t mask) {
  const size_t width = size_t(8 * i.type.bytes) / i.to.size();
  const uint64_t* of = launch.read(i.of[0]);
  for_lanes(mask, [&](int lane) {
    const uint64_t all = of[lane];
    for (size_t k = 0; k < i.to.size(); ++k)
      if (i.to[k] != kNoRegister) launch.write(i.to[k])[lane] = all >> (width * k) & ((uint64_t(1) << width) - 1);
  });
}

uint64_t whole(const Type& type, uint64_t stored) {
  const int unused = 64 - 8 * type.bytes;
  return type.kind == 's' ? uint64_t(int64_t(stored << unused) >> unused) : stored << unused >> unused;
}

// What does not fit is cut off; a register wider than the type holds its sign too.
void convert_integer(Launch& launch, const Instruction& i, uint32_t mask) {
  uint64_t* to = launch.write(i.to[0]);
  const uint64_t* of = launch.read(i.of[0]);
  for_lanes(mask, [&](int lane) { to[lane] = whole(i.type, whole(i.from, of[lane])); });
}

template <class Number>
Number number(const Type& type, uint64_t stored) {
  if (type.kind == 'h') return tardkd::to_float(tardkd::bfloat16{uint16_t(stored)});
  if (type.kind == 'f' && type.bytes == 2) return tardkd::to_float(tardkd::float16{uint16_t(stored)});
  if (type.kind == 'f') return type.bytes == 4 ? Number(value<float>(stored)) : Number(value<double>(stored));
  return type.kind == 's' ? Number(int64_t(whole(type, stored))) : Number(whole(type, stored));
}

template <class Number>
uint64_t stored_float(const Type& type, Number x) {
  if (type.kind == 'h') return x != x ? 0x7fff : tardkd::to_bfloat16(float(x)).bits;
  if (type.bytes == 2) return tardkd::to_float16(float(x)).bits;
  return type.bytes == 4 ? bits(float(x)) : bits(double(x));
}

// Out of range is the nearest there is. NaN is zero, but for 64 bits the highest bit alone.
template <class Number>
uint64_t stored_integer(const Type& type, Number x) {
  const bool is_signed = type.kind == 's';
  const Number above = std::ldexp(Number(1), 8 * type.bytes - is_signed), least = is_signed ? -above : 0;
  if (x != x) return type.bytes == 8 ? uint64_t(1) << 63 : 0;
  if (x >= above) return ~uint64_t(0) >> (64 - 8 * type.bytes + is_signed);
  return is_signed ? uint64_t(int64_t(std::max(x, least))) : uint64_t(std::max(x, least));
}

enum Rounding { kNone, kNearest, kToZero, kDown, kUp };
const std::map<std::string, Rounding> kRoundings = {{"rn", kNearest}, {"rni", kNearest}, {"rz", kToZero},
                                                    {"rzi", kToZero}, {"rm", kDown},     {"rmi", kDown},
                                                    {"rp", kUp},      {"rpi", kUp}};

template <class Number>
Number rounded(Number x, int mode) {
  return mode == kNearest  ? std::nearbyint(x)
         : mode == kToZero ? std::trunc(x)
         : mode == kDown   ? std::floor(x)
         : mode == kUp     ? std::ceil(x)
                           : x;
}

// From or to a float; a Number holds every one of either type.
template <class Number>
void convert(Launch& launch, const Instruction& i, uint32_t mask) {
  const bool rounds = i.from.is_float() && (!i.type.is_float() || i.type.bytes == i.from.bytes);
  uint64_t* to = launch.write(i.to[0]);
  const uint64_t* of = launch.read(i.of[0]);
  for_lanes(mask, [&](int lane) {
    Number x = number<Number>(i.from, of[lane]);
    if (rounds) x = rounded(x, i.mode);
    if (i.saturates) x = x != x ? 0 : std::min(std::max(x, Number(0)), Number(1));
    to[lane] = i.type.is_float() ? stored_float(i.type, x) : stored_integer(i.type, x);
  });
}

bool set_conversion(Instruction& i, const std::vector<std::string>& opcode) {
  i.type = parse_type(opcode[opcode.size() - 2]);
  i.from = parse_type(opcode.back());
  const bool is_long = (!i.type.is_float() && i.type.bytes == 8) || (!i.from.is_float() && i.from.bytes == 8);
  i.action = is_long ? convert<long double> : convert<double>;
  if (!i.type.is_float() && !i.from.is_float()) i.action = convert_integer;
  for (size_t k = 1; k + 2 < opcode.size(); ++k) {
    const auto rounding = kRoundings.find(opcode[k]);
    if (rounding != kRoundings.end())
      i.mode = rounding->second;
    else if (opcode[k] == "sat" && i.type.is_float())
      i.saturates = true;
    else
      return false;
  }
  const bool narrows = i.type.is_float() && i.from.is_float() && i.type.bytes < i.from.bytes;
  return i.type && i.from && (!narrows || i.mode == kNearest);
}

// ---- by opcode -----------------------------------------------------------------------------------------------------

const std::map<std::string, Action (*)(const Type&)> kActions = {{"add", of<std::plus<>>},
                                                                 {"add.rn", of<std::plus<>>},
                                                                 {"sub", of<std::minus<>>},
                                                                 {"sub.rn", of<std::minus<>>},
                                                                 {"mul", of<std::multiplies<>>},
                                                                 {"mul.rn", of<std::multiplies<>>},
                                                                 {"mul.lo", of<std::multiplies<>>},
                                                                 {"mul.hi", of<High>},
                                                                 {"mul.wide", wide_product},
                                                                 {"mad.lo", of<ProductAndSum>},
                                                                 {"fma.rn", of<ProductAndSum>},
                                                                 {"div", of<Quotient>},
                                                                 {"div.rn", of<Quotient>},
                                                                 {"rem", of<Rest>},
                                                                 {"min", of<Least>},
                                                                 {"max", of<Most>},
                                                                 {"neg", of<std::negate<>>},
                                                                 {"abs", of<Magnitude>},
                                                                 {"and", of<std::bit_and<>>},
                                                                 {"or", of<std::bit_or<>>},
                                                                 {"xor", of<std::bit_xor<>>},
                                                                 {"not", of<std::bit_not<>>},
                                                                 {"shl", of<Left>},
                                                                 {"shr", of<Right>},
                                                                 {"sqrt.rn", of<Root>},
                                                                 {"rcp.rn", of<Reciprocal>},
                                                                 {"rcp.approx.ftz", of<RoughReciprocal>},
                                                                 {"ex2.approx.ftz", of<PowerOfTwo>},
                                                                 {"popc", of<Population>},
                                                                 {"brev", of<Reversed>},
                                                                 {"clz", of<LeadingZeros>},
                                                                 {"bfind.shiftamt", of<ShiftToTop>},
                                                                 {"bfi", of<Insertion>},
                                                                 {"mov", of<Same>},
                                                                 {"selp", of<Choice>}};

// Whether a comparison is true of: less, equal, greater, not a number.
const std::map<std::string, int> kRelations = {
    {"lt", 0b1000},  {"le", 0b1100},  {"gt", 0b0010},  {"ge", 0b0110},  {"eq", 0b0100},  {"ne", 0b1010},
    {"ltu", 0b1001}, {"leu", 0b1101}, {"gtu", 0b0011}, {"geu", 0b0111}, {"equ", 0b0101}, {"neu", 0b1011},
    {"lo", 0b1000},  {"ls", 0b1100},  {"hi", 0b0010},  {"hs", 0b0110},  {"num", 0b1110}, {"nan", 0b0001}};

const std::map<std::string, int> kOtherRoundings = {{"rz", FE_TOWARDZERO}, {"rm", FE_DOWNWARD}, {"rp", FE_UPWARD}};

void run_rounded(Launch& launch, const Instruction& i, uint32_t mask) {
  std::fesetround(i.mode);
  i.rounded(launch, i, mask);
  std::fesetround(FE_TONEAREST);
}

bool set_change_of_space(Instruction& i, const std::vector<std::string>& opcode) {
  const bool from_generic = opcode[1] == "to";
  const auto space = kSpaces.find(opcode[from_generic ? 2 : 1]);
  if (space == kSpaces.end()) return false;
  const int64_t window = int64_t(std::find(std::begin(kWindows), std::end(kWindows), space->second) - kWindows)
                         << kWindowShift;
  i.offset = from_generic ? -window : window;
  i.action = change_space;
  return true;
}

}  // namespace

bool set_arithmetic(Instruction& i, const std::vector<std::string>& opcode) {
  if (opcode[0] == "cvt") return set_conversion(i, opcode);
  if (opcode[0] == "cvta") return set_change_of_space(i, opcode);
  if (opcode[0] == "mov" && i.to.size() > 1) i.action = unpack;
  if (opcode[0] == "mov" && i.of.size() > 1) i.action = pack;
  if (i.action) return true;
  if (opcode[0] == "setp" && opcode.size() == 3 && kRelations.count(opcode[1])) {
    i.mode = kRelations.at(opcode[1]);
    i.action = for_type(i.type, [](auto example) -> Action { return compare<decltype(example)>; });
    return i.action != nullptr;
  }
  std::string name = opcode[0];
  for (size_t k = 1; k + 1 < opcode.size(); ++k) {
    const auto rounding = kOtherRoundings.find(opcode[k]);
    if (rounding != kOtherRoundings.end()) i.mode = rounding->second;
    name += "." + (rounding == kOtherRoundings.end() ? opcode[k] : "rn");
  }
  const auto make = kActions.find(name);
  if (make == kActions.end()) return false;
  i.action = make->second(i.type);
  if (i.action && i.mode) i.rounded = std::exchange(i.action, run_rounded);
  return i.action != nullptr;
}

}  // namespace ptx_on_cpu
