// The quadratic forms that reports measure errors by, summed in an order that no number of threads changes.
//
// Products are in Real, what they add up to in float64. For float32 everything is brought to the size of 1 by powers of two first, so it loses digits but no range.
#pragma once

#include <optional>
#include <vector>

#include "codecs/codec.h"
#include "gptq/second_moment.h"

namespace mrgptq {

// tr(W H Wᵀ) for W (rows, cols) float32 and H (cols, cols), and behind it tr(E H Eᵀ) of E = W - Q, rounded to float32, for each Q: with what is packed of H for all of them. W is read through the rotation, here and below.
template <class Real>
std::vector<double> quadratic_forms(MatrixView<const float> w, const std::vector<PackedMatrix>& q, const SecondMoment& h, int threads, const Rotation& rotation = {});

// tr(A E H Eᵀ), E = W - Q where there is a Q and W otherwise, A (rows, rows).
template <class Real>
double coupled_form(MatrixView<const float> w, const std::optional<PackedMatrix>& q, const SecondMoment& a, const SecondMoment& h, int threads, const Rotation& rotation = {});

// tr(W D Wᵀ) of a diagonal D, (1, cols), all in float64.
double diagonal_form(MatrixView<const float> w, MatrixView<const double> d, int threads, const Rotation& rotation = {});

}  // namespace mrgptq
