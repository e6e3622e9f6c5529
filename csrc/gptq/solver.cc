#include "gptq/solver.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"
#include "codecs/packing.h"
#include "formats/block_format.h"
#include "gptq/gradients.h"
#include "gptq/outputs.h"
#include "gptq/refine.h"
#include "gptq/rows.h"
#include "gptq/tile.h"
#include "rotations/rotated_rows.h"

namespace mrgptq {
namespace {

// What all tiles of one call share.
template <class Real>
struct Problem {
    float tensor_scale;
    const StepTable table;
    const Factor& factor;
    const SolverOptions& options;
    const Eigen::Matrix<Real, Eigen::Dynamic, 1> pivots;
    const GroupFactors<Real> groups;  // of refinement; empty without
    const std::vector<Index> positions;  // by column of the weight
};

std::vector<Index> positions_of(const Factor& factor) {
    std::vector<Index> positions(static_cast<std::size_t>(factor.cols()));
    for (Index p = 0; p < factor.cols(); ++p) positions[static_cast<std::size_t>(factor.column(p))] = p;
    return positions;
}

// `weight` calls what it is given with a matrix of the rows [first, first + count).
template <class Format, class Real, class Weight>
RowTile<Real> load(const Problem<Real>& problem, Weight&& weight, MatrixView<const std::uint8_t> scales, Index first_row) {
    const Index n = problem.factor.cols(), rows = std::min(lanes, scales.rows - first_row);
    RowTile<Real> tile{first_row, rows, Tile<Real>::Zero(lanes, n), Tile<std::int8_t>::Zero(lanes, n), Tile<std::uint8_t>::Constant(lanes, scales.cols, 1), Tile<float>::Ones(lanes, scales.cols)};
    weight(first_row, rows, [&](auto from) { rows_to_lanes(from, 0, tile.error.data(), [&](Index c) { return problem.positions[static_cast<std::size_t>(c)]; }); });
    for (Index r = 0; r < rows; ++r) {
        for (Index g = 0; g < scales.cols && !problem.options.search_scales; ++g) {
            tile.scales(r, g) = scales.row(first_row + r)[g];
            tile.steps(r, g) = problem.table[tile.scales(r, g)];
        }
    }
    return tile;
}

// The static recursion inside a block: one column after another, in any order. What a column feeds back reaches its sixteen at once, the columns before them by a product.
template <class Format, class Real>
double round_columns(const Problem<Real>& problem, const Strips<Real>& unit, RowTile<Real>& tile, Tile<Real>& feedback, Index begin, Index end) {
    constexpr Index few = 16;
    Lane<double> loss = Lane<double>::Zero();
    for (Index last = end; last > begin; last -= few) {
        const Index first = last - few;
        for (Index p = last - 1; p >= first; --p) {
            const float* step = tile.steps.col(problem.factor.column(p) / Format::group_size).data();
            Real* e = tile.error.col(p).data();
            const Real* f = feedback.col(p - begin).data();
            std::int8_t* halves = tile.halves.col(p).data();
            Lane<Real> residual;
            for (Index r = 0; r < lanes; ++r) {
                const Real t = e[r] + f[r], rounded = round_signed(t / static_cast<Real>(step[r])), q = value_of(step[r], rounded);
                halves[r] = static_cast<std::int8_t>(Real(2) * rounded);
                residual[r] = t - q;
                e[r] -= q;
            }
            loss += problem.factor.pivots()[p] * residual.template cast<double>().square();
            for (Index j = first; j < p; ++j) feedback.col(j - begin) += unit.at(p - begin, j - begin) * tile.error.col(p);
        }
        if (first > begin) unit.multiply(tile.error.col(first).data(), first - begin, few, first - begin, feedback.data());
    }
    return loss.sum();
}

// The searched recursion inside a block: each group tries every storable scale around absmax of what feedback has made of its weights.
template <class Format, class Real>
double search_groups(const Problem<Real>& problem, const Strips<Real>& unit, RowTile<Real>& tile, Tile<Real>& feedback, Index begin, Index end) {
    constexpr Index size = Format::group_size;
    constexpr int below = SearchRange<Format>::below, above = SearchRange<Format>::above;
    Lane<double> loss = Lane<double>::Zero();
    for (Index first = end - size; first >= begin; first -= size) {
        const GroupTile<Real, Format> weight = tile.error.middleCols(first, size);
        const GroupTile<Real, Format> fed = weight + feedback.middleCols(first - begin, size);
        Lane<std::uint8_t> start, best_scales;
        const Lane<Real> largest = fed.cwiseAbs().rowwise().maxCoeff().array();
        for (Index r = 0; r < lanes; ++r) start[r] = best_scales[r] = search_start<Format>(static_cast<float>(largest[r]), problem.options.mx, problem.tensor_scale);

        Lane<Real> least = Lane<Real>::Constant(std::numeric_limits<Real>::infinity());
        GroupTile<Real, Format> rounded, error, best_rounded, best_error;
        for (int offset = -below; offset <= above; ++offset) {
            Lane<std::uint8_t> scales;
            Lane<float> steps;
            for (Index r = 0; r < lanes; ++r) {
                // A group without a value keeps absmax's answer: no scale is better than another.
                scales[r] = largest[r] == 0 ? start[r] : problem.table.moved(start[r], offset);
                steps[r] = problem.table[scales[r]];
            }
            Lane<Real> sum = Lane<Real>::Zero();
            for (Index j = size - 1; j >= 0; --j) {
                Lane<Real> t = fed.col(j).array();
                for (Index i = j + 1; i < size; ++i) t += unit.at(first - begin + i, first - begin + j) * error.col(i).array();
                for (Index r = 0; r < lanes; ++r) {
                    rounded(r, j) = round_signed(t[r] / static_cast<Real>(steps[r]));
                    const Real q = value_of(steps[r], rounded(r, j));
                    error(r, j) = weight(r, j) - q;
                    t[r] -= q;
                }
                sum += problem.pivots[first + j] * t.square();
            }
            // A mask in Real keeps the selects below in one vector width. The first candidate stands until a better one comes, and a sum that is no number gives way to any.
            Lane<Real> better;
            const Real first_one = offset == -below;
            for (Index r = 0; r < lanes; ++r) better[r] = sum[r] < least[r] || least[r] != least[r] ? Real(1) : first_one;
            for (Index r = 0; r < lanes; ++r) {
                least[r] = better[r] > 0 ? sum[r] : least[r];
                best_scales[r] = better[r] > 0 ? scales[r] : best_scales[r];
            }
            for (Index j = 0; j < size; ++j)
                for (Index r = 0; r < lanes; ++r) {
                    best_rounded(r, j) = better[r] > 0 ? rounded(r, j) : best_rounded(r, j);
                    best_error(r, j) = better[r] > 0 ? error(r, j) : best_error(r, j);
                }
        }
        const Index group = problem.factor.column(first) / size;
        tile.scales.col(group) = best_scales.matrix();
        for (Index r = 0; r < lanes; ++r) tile.steps(r, group) = problem.table[best_scales[r]];
        tile.halves.middleCols(first, size) = (Real(2) * best_rounded).template cast<std::int8_t>();
        tile.error.middleCols(first, size) = best_error;
        loss += least.template cast<double>();
        if (first > begin) unit.multiply(best_error.data(), first - begin, size, first - begin, feedback.data());
    }
    return loss.sum();
}

template <class Real>
void check_round(const Tile<Real>& before, const Tile<Real>& after, const Tile<Real>& history, const Factor& factor, Index group_size, int round) {
    const double was = damped_loss(before, factor), is = damped_loss(after, factor), slack = refinement_slack(before, after, history, factor, group_size, round);
    check(is <= was + slack, "a round of refinement raised the damped loss from " + std::to_string(was) + " to " + std::to_string(is) + ", more than rounding explains (" + std::to_string(slack) + ")");
}

// sum += losses, both after the recursion and after each round; where rounds ended early the last loss stands for those left out.
void add_losses(std::vector<double>& sum, const std::vector<double>& losses) {
    if (sum.empty()) {
        sum = losses;
        return;
    }
    if (sum.size() < losses.size()) sum.resize(losses.size(), sum.back());
    for (std::size_t k = 0; k < sum.size(); ++k) sum[k] += losses[std::min(k, losses.size() - 1)];
}

template <class Real>
struct Band {
    std::vector<RowTile<Real>> tiles;
    std::vector<Tile<Real>> sums;  // (lanes, block) a tile: feedback, then gradients and changes
    Strips<Real> strips, own;
    LeftStrips<Real> left;
};

// The recursion over all columns: the losses by tile.
template <class Format, class Real>
std::vector<double> visit_columns(const Problem<Real>& problem, Band<Real>& band) {
    const auto unit = problem.factor.unit();
    const Index n = unit.cols();
    std::vector<double> losses(band.tiles.size(), 0.0);
    for (Index end = n; end > 0; end -= std::min(block, end)) {
        const Index begin = std::max<Index>(end - block, 0), width = end - begin;
        for (auto& sum : band.sums) sum.setZero();
        for (Index k = end; k < n; k += block) {
            const Index depth = std::min(block, n - k);
            band.strips.pack(&unit.coeffRef(k, begin), 1, unit.outerStride(), depth, width);
            band.strips.multiply_tiles(band.tiles.size(), width, [&](std::size_t t) { return band.tiles[t].error.col(k).data(); }, [&](std::size_t t) { return band.sums[t].data(); });
        }
        band.own.pack(&unit.coeffRef(begin, begin), 1, unit.outerStride(), width, width);
        for (std::size_t t = 0; t < band.tiles.size(); ++t) {
            losses[t] += problem.options.search_scales ? search_groups<Format>(problem, band.own, band.tiles[t], band.sums[t], begin, end)
                                                       : round_columns<Format>(problem, band.own, band.tiles[t], band.sums[t], begin, end);
        }
    }
    return losses;
}

// The gradients of a block of columns into the band's sums, in the first round from all errors.
template <class Real>
void first_gradients(const Factor& factor, Band<Real>& band, Gradients<Real>& gradients, Index begin, Index end) {
    for (auto& sum : band.sums) sum.setZero();
    for_moment_pieces(factor, begin, end, band.strips, band.own, [&](const Strips<Real>& piece, Index first) {
        piece.multiply_tiles(band.tiles.size(), end - begin, [&](std::size_t t) { return band.tiles[t].error.col(first).data(); }, [&](std::size_t t) { return band.sums[t].data(); });
    });
    for (std::size_t t = 0; t < band.tiles.size(); ++t) gradients.store(static_cast<Index>(t), begin, end - begin, band.sums[t]);
}

// The same in a later round, from those of the last visit and what has moved since.
template <class Real>
void next_gradients(const Factor& factor, Band<Real>& band, Gradients<Real>& gradients, Index begin, Index end) {
    for_moment_pieces(factor, begin, end, band.left, band.own, [&](const LeftStrips<Real>& piece, Index first) { gradients.follow(piece, first, begin, end - begin); });
    for (std::size_t t = 0; t < band.tiles.size(); ++t) gradients.load(static_cast<Index>(t), begin, end - begin, band.sums[t]);
}

// A round of refinement over the tiles that the last one still moved: how much the loss of each fell, 0 for those that stand.
template <class Format, class Real>
std::vector<double> refine_columns(const Problem<Real>& problem, Band<Real>& band, Gradients<Real>& gradients, int round, const std::vector<bool>& moving) {
    const Index n = problem.factor.cols();
    std::vector<double> falls(band.tiles.size(), 0.0);
    for (Index end = n; end > 0; end -= std::min(block, end)) {
        const Index begin = std::max<Index>(end - block, 0);
        (round == 0 ? first_gradients<Real> : next_gradients<Real>)(problem.factor, band, gradients, begin, end);
        gradients.forget(begin, end);
        for (std::size_t t = 0; t < band.tiles.size(); ++t) {
            if (!moving[t]) continue;
            falls[t] += refine_block<Format>(band.tiles[t], problem.factor, band.own, problem.groups, problem.table, begin, end, band.sums[t]);
            gradients.add(static_cast<Index>(t), begin, end, band.sums[t]);
        }
    }
    return falls;
}

// The losses of each tile of a band: after the recursion and after each of the rounds; a tile that nothing moved in a round is left as it is from then on.
template <class Format, class Real, class Weight>
std::vector<std::vector<double>> solve_band(const Problem<Real>& problem, Weight&& weight, Index first_tile, Index count, MatrixView<std::uint8_t> scales, MatrixView<std::uint8_t> codes) {
    Band<Real> band;
    for (Index t = first_tile; t < first_tile + count; ++t) band.tiles.push_back(load<Format>(problem, weight, MatrixView<const std::uint8_t>(scales), t * lanes));
    band.sums.assign(band.tiles.size(), Tile<Real>(lanes, block));
    std::vector<std::vector<double>> losses;
    for (const double loss : visit_columns<Format>(problem, band)) losses.push_back({loss});
    Gradients<Real> gradients(problem.options.rounds > 0 ? count : 0, problem.factor.cols(), Format::group_size);
    std::vector<bool> moving(band.tiles.size(), true);
    std::vector<Tile<Real>> before, histories;  // of the errors, where rounds are proved
    if (problem.options.prove_rounds)
        for (const auto& tile : band.tiles) histories.push_back(tile.error.cwiseAbs());
    for (int round = 0; round < problem.options.rounds && std::find(moving.begin(), moving.end(), true) != moving.end(); ++round) {
        before.clear();
        if (problem.options.prove_rounds)
            for (const auto& tile : band.tiles) before.push_back(tile.error);
        const std::vector<double> falls = refine_columns<Format>(problem, band, gradients, round, moving);
        for (std::size_t t = 0; t < band.tiles.size(); ++t) {
            moving[t] = moving[t] && falls[t] != 0;
            if (moving[t]) losses[t].push_back(losses[t].back() - falls[t]);
            if (problem.options.prove_rounds && std::isfinite(losses[t].back())) {
                histories[t] += (band.tiles[t].error - before[t]).cwiseAbs();
                check_round(before[t], band.tiles[t].error, histories[t], problem.factor, Format::group_size, round + 1);
            }
        }
    }

    for (const auto& tile : band.tiles) {
        halves_to_rows(tile.halves.data(), codes, tile.first_row, tile.rows, [&](Index c) { return problem.positions[static_cast<std::size_t>(c)]; });
        for (Index r = 0; r < tile.rows; ++r) std::copy_n(tile.scales.row(r).begin(), scales.cols, scales.row(tile.first_row + r));
    }
    return losses;
}

// All rows of a weight, as load() takes it, band by band: the losses summed over their tiles.
template <class Format, class Real, class Weight>
std::vector<double> solve_rows(const Problem<Real>& problem, Weight&& weight, MatrixView<std::uint8_t> scales, MatrixView<std::uint8_t> codes, int threads) {
    const Index tiles = (scales.rows + lanes - 1) / lanes;
    std::vector<std::vector<double>> losses(static_cast<std::size_t>(tiles));
    parallel_for_ranges(tiles, band_size<Real>(tiles, threads), threads, [&](Index first, Index last) {
        auto mine = solve_band<Format>(problem, weight, first, last - first, scales, codes);
        std::move(mine.begin(), mine.end(), losses.begin() + first);
    });
    std::vector<double> sum;
    for (const auto& tile : losses) add_losses(sum, tile);
    return sum;
}

// Rows in blocks, in the order of the outputs' factor: each block's target makes up for the errors of the blocks before it (outputs.h), and is then solved like any other weight.
template <class Format, class Real>
std::vector<double> solve_coupled(const Problem<Real>& problem, MatrixView<const float> weight, const Rotation& rotation, MatrixView<std::uint8_t> scales, const Factor& outputs,
                                  MatrixView<std::uint8_t> codes, int threads) {
    const Index rows = weight.rows, n = weight.cols, height = row_block(rows);
    // By position of the outputs' factor: row 0 is solved last.
    std::vector<float> errors(static_cast<std::size_t>(rows * n));
    const MatrixView<float> error{errors.data(), rows, n, n};
    std::vector<double> sum;
    for (Index end = rows; end > 0; end -= std::min(height, end)) {
        const Index begin = std::max<Index>(end - height, 0), count = end - begin;
        std::vector<Real> targets(static_cast<std::size_t>(count * n));
        const MatrixView<Real> target{targets.data(), count, n, n};
        std::vector<std::uint8_t> block_scales(static_cast<std::size_t>(count * scales.cols)), block_codes(static_cast<std::size_t>(count * codes.cols));
        const MatrixView<std::uint8_t> own_scales{block_scales.data(), count, scales.cols, scales.cols}, own_codes{block_codes.data(), count, codes.cols, codes.cols};
        owed<Real>(outputs, begin, end, error, target, threads);
        for (Index i = 0; i < count; ++i) {
            const Index row = outputs.column(begin + i);
            const RotatedRows own(weight, rotation, row, 1);
            for (Index c = 0; c < n; ++c) target.row(i)[c] += static_cast<Real>(own.row(row)[c]);
            std::copy_n(scales.row(row), scales.cols, own_scales.row(i));
        }
        const auto targets_at = [&](Index first, Index rows_read, auto&& use) { use(MatrixView<const Real>{target.row(first), rows_read, n, n}); };
        add_losses(sum, solve_rows<Format>(problem, targets_at, own_scales, own_codes, threads));
        parallel_for(count, threads, [&](Index i) {
            const Index row = outputs.column(begin + i);
            const RotatedRows own(weight, rotation, row, 1);
            std::copy_n(own_scales.row(i), scales.cols, scales.row(row));
            std::copy_n(own_codes.row(i), codes.cols, codes.row(row));
            std::vector<std::uint8_t> unpacked(static_cast<std::size_t>(n));
            unpack_row(own_codes.row(i), n, unpacked.data());
            for (Index c = 0; c < n; ++c) {
                const float step = problem.table[own_scales.row(i)[c / Format::group_size]];
                error.row(begin + i)[c] = own.row(row)[c] - step * e2m1::decode(unpacked[static_cast<std::size_t>(c)]);
            }
        });
    }
    return sum;
}

template <class Format, class Real>
SolverResult solve_format(MatrixView<const float> weight, const Rotation& rotation, MatrixView<std::uint8_t> scales, float tensor_scale, const Factor& factor, const Factor* outputs, const SolverOptions& options,
                          MatrixView<std::uint8_t> codes, int threads) {
    const Problem<Real> problem{tensor_scale, step_table<Format>(tensor_scale), factor, options, factor.pivots().cast<Real>(), options.rounds > 0 ? group_factors<Real>(factor, Format::group_size) : GroupFactors<Real>{}, positions_of(factor)};
    if (outputs != nullptr) return {solve_coupled<Format>(problem, weight, rotation, scales, *outputs, codes, threads)};
    const auto rows_at = [&](Index first, Index count, auto&& use) { use(RotatedRows(weight, rotation, first, count).view()); };
    return {solve_rows<Format>(problem, rows_at, scales, codes, threads)};
}

}  // namespace

SolverResult solve(std::string_view format, MatrixView<const float> weight, MatrixView<std::uint8_t> scales, float tensor_scale, const Factor& factor, const Factor* outputs,
                   const SolverOptions& options, MatrixView<std::uint8_t> codes, int threads, const Rotation& rotation) {
    if (rotation) rotation.check_columns(weight.cols);
    check(factor.cols() == weight.cols, "the factor has " + std::to_string(factor.cols()) + " columns; weight has " + std::to_string(weight.cols));
    check(factor.usable(), "the factor is not usable: the Hessian could not be factorised at any damping");
    if (outputs != nullptr) {
        check(outputs->cols() == weight.rows, "the outputs' factor has " + std::to_string(outputs->cols()) + " columns; weight has " + std::to_string(weight.rows) + " rows");
        check(outputs->usable(), "the outputs' factor is not usable");
    }
    check(options.rounds >= 0, "rounds is " + std::to_string(options.rounds) + "; it must be 0 or more");
    check((!options.search_scales && options.rounds == 0) || factor.kind() == Order::group, "searched scales and refinement rounds need a factor in group order");
    return with_format(format, [&]<class Format>(Format) {
        check(scales.rows == weight.rows && scales.cols * Format::group_size == weight.cols, "scales do not have one entry for each group of weight");
        check(codes.rows == weight.rows && codes.cols * 2 == weight.cols, "codes do not have half a byte for each weight");
        if (options.precision == Precision::float64) return solve_format<Format, double>(weight, rotation, scales, tensor_scale, factor, outputs, options, codes, threads);
        return solve_format<Format, float>(weight, rotation, scales, tensor_scale, factor, outputs, options, codes, threads);
    });
}

}  // namespace mrgptq
