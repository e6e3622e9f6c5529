// Targets for the inputs that a layer will see, once the layers before it are quantised, instead of those it was trained on.
#pragma once

#include "gptq/factor.h"
#include "rotations/rotation.h"

namespace mrgptq {

// target = weight + strength * (W (cross - H) + stream) (H + λI)⁻¹ in the factor's basis, where cross = Xᵀ X̃ / tokens and H = X̃ᵀ X̃ / tokens is the factor's: the weights that answer the inputs X̃, which the
// layer will see, most nearly as `weight` answers X. stream = Dᵀ X̃ / tokens, where D is by how much what the answers are added to falls short of the original's: the weights make up for
// that too; without rows: for nothing. All (rows, cols) or (cols, cols). Dead columns keep their weights. The rotation brings `weight` and `stream` into the factor's basis, in which cross is.
void shift_to_inputs(MatrixView<const float> weight, MatrixView<const double> cross, MatrixView<const float> stream, const Factor& factor, double strength, MatrixView<float> target, int threads,
                     const Rotation& rotation = {});

}  // namespace mrgptq
