// Softmax and sigmoid pieces of the classification term, numerically stable.
#pragma once

#include <cmath>

#include "common.h"

namespace tardkd {

// log(1 + exp(x))
template <class A>
TARDKD_HD A softplus(A x) {
  return (x > A(0) ? x : A(0)) + log1p(exp(x > A(0) ? -x : x));
}

template <class A>
TARDKD_HD A sigmoid(A x) {
  return A(1) / (A(1) + exp(-x));
}

// KL of two Bernoulli distributions given by their logits: t from the teacher, s from the student. The form for the
// outcome the teacher thinks the less likely: what is small stays accurate.
template <class A>
TARDKD_HD A binary_kl(A t, A s) {
  if (t > A(0)) {
    t = -t;
    s = -s;
  }
  return softplus(s) - softplus(t) + sigmoid(t) * (t - s);
}

// One class of KL(teacher || student) from log-probabilities. A class the teacher gives no mass adds nothing,
// whatever the student's log-probability is.
template <class A>
TARDKD_HD A kl_term(A teacher_probability, A teacher_log, A student_log) {
  return teacher_probability > A(0) ? teacher_probability * (teacher_log - student_log) : A(0);
}

}  // namespace tardkd
