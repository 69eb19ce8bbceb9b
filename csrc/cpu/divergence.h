// How far a student's distribution over classes or bins is from its teacher's, and the gradient of that.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/classification.h"

namespace tardkd::cpu {

// Above this temperature the classification term is computed in double precision. The softened probabilities of teacher
// and student are then nearly equal, their logarithms cancel, and T^2 multiplies what rounding leaves of the
// difference.
constexpr double kCoolEnough = 4.0;

// log softmax(z / temperature) of `z`, (columns,), into `log_p`, (columns,), whose type C is that of the computation.
template <class A, class C>
void log_softmax(const A* z, int32_t columns, C temperature, C* log_p) {
  C top = z[0];
  for (int32_t k = 1; k < columns; ++k) top = std::max<C>(top, z[k]);
  C sum = 0;
  for (int32_t k = 0; k < columns; ++k) {
    log_p[k] = (z[k] - top) / temperature;
    sum += std::exp(log_p[k]);
  }
  const C log_sum = std::log(sum);
  for (int32_t k = 0; k < columns; ++k) log_p[k] -= log_sum;
}

// Classification term of one region, T^2 KL(teacher || student), and `slope` times its gradient T (q - p) where `grad`
// is given; all three are (columns,). `teacher` and `student` hold log-probabilities for softmax, logits for sigmoid;
// `temperature` is T; C is the type of the computation.
template <class A, class C>
A classification_term(const C* teacher, const C* student, int32_t columns, Activation activation, C temperature,
                      C slope, A* grad) {
  C sum = 0;
  for (int32_t k = 0; k < columns; ++k) {
    C p, q = 0;
    if (activation == Activation::softmax) {
      p = std::exp(teacher[k]);
      sum += kl_term(p, teacher[k], student[k]);
      if (grad) q = std::exp(student[k]);
    } else {
      const C t = teacher[k] / temperature, s = student[k] / temperature;
      sum += binary_kl(t, s);
      p = sigmoid(t);
      if (grad) q = sigmoid(s);
    }
    if (grad) grad[k] = static_cast<A>(slope * temperature * (q - p));
  }
  return static_cast<A>(temperature * temperature * sum);
}

// The same from logits, (columns,), computed in double.
template <class A>
A exact_classification_term(const A* teacher, const A* student, int32_t columns, Activation activation,
                            double temperature, A slope, A* grad) {
  std::vector<double> t(teacher, teacher + columns), s(student, student + columns);
  if (activation == Activation::softmax) {
    log_softmax(teacher, columns, temperature, t.data());
    log_softmax(student, columns, temperature, s.data());
  }
  return classification_term<A, double>(t.data(), s.data(), columns, activation, temperature, slope, grad);
}

}  // namespace tardkd::cpu
