// The quadratic forms that reports measure errors by, summed in an order that no number of threads changes.
//
// Products are in Real, what they add up to in float64. For float32 everything is brought to the size of 1 by powers of two first, so it loses digits but no range.
#pragma once

#include <optional>
#include <vector>

#include "codecs/codec.h"
#include "gptq/second_moment.h"

namespace mrgptq {

// tr(E H Eᵀ) for E (rows, cols) float32 and H (cols, cols).
template <class Real>
double quadratic_form(MatrixView<const float> e, const SecondMoment& h, int threads);

// tr(W H Wᵀ), and behind it tr(E H Eᵀ) of E = W - Q, rounded to float32, for each Q: with what is packed of H for all of them.
template <class Real>
std::vector<double> quadratic_forms(MatrixView<const float> w, const std::vector<PackedMatrix>& q, const SecondMoment& h, int threads);

// tr(A E H Eᵀ), E = W - Q where there is a Q and W otherwise, A (rows, rows).
template <class Real>
double coupled_form(MatrixView<const float> w, const std::optional<PackedMatrix>& q, const SecondMoment& a, const SecondMoment& h, int threads);

}  // namespace mrgptq
