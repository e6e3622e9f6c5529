// What GPTQ needs to know of H before it sees a weight: the visiting order, the damping that made H factorisable, the factor.
//
// With R = H + λI in reversed visiting order and R = L Lᵀ, the column visited at reversed position p feeds back
//     t_p = w_p + Σ_{k > p} (L[k,p] / L[p,p]) (w - q)_k        and adds  L[p,p]² (t_p - q_p)²  to the damped loss.
// One factorisation, no inverse (arXiv 2507.18553); the codes are those of the textbook form, see reference.py.
#pragma once

#include <string_view>
#include <vector>

#include "base/buffer.h"
#include "base/matrix_view.h"
#include "gptq/eigen.h"
#include "gptq/second_moment.h"

namespace mrgptq {

// natural: left to right. activation: by descending diagonal of H. group: whole groups by the descending sum of their diagonals, columns inside a group likewise.
enum class Order { natural, activation, group };
Order order_named(std::string_view name);

// Of the products in the factor, and of errors and feedback in the solver. float64 gives the codes of reference.py; float32 may part from it where a value lies within rounding of a tie.
enum class Precision { float32, float64 };
Precision precision_named(std::string_view name);

class Factor {
public:
    // h (cols, cols): symmetric, finite, both triangles equal. `damping` >= 0 is relative to the mean of the live diagonal. `group_size` divides cols; only Order::group asks for it.
    //
    // The diagonal may be negative by rounding: a rotation of inputs whose columns sum to zero (after a LayerNorm) has a column that is zero but for cancellation. Damping mends that, or the
    // factorisation fails and the ladder below is climbed.
    //
    // A column whose diagonal is zero is dead: no input ever reached it, so it is cut out of H and its weights are rounded plainly. Where a scale is chosen by loss it counts like a column
    // that damping alone reaches, dead_weight(). If the factorisation fails, damping rises tenfold (from 0.01 where it was 0) up to 1; if all fail, usable() is false and the caller rounds
    // plainly.
    //
    // H is brought to a diagonal from one to four by powers of two while it is factorised, so that no product leaves float32's range. Where float32 would blur a pivot, the products are float64.
    Factor(MatrixView<const double> h, Order order, double damping, Index group_size = 1, Precision precision = Precision::float64, int threads = 0);

    // The same where H lies: from there on its memory is the factor's, as long as that lives. Nothing else of its size is needed. Rows are best `row_stride` apart.
    static Factor in_place(MatrixView<double> h, Order order, double damping, Index group_size = 1, Precision precision = Precision::float64, int threads = 0) {
        return Factor({}, h, order, damping, group_size, precision, threads);
    }
    // Columns a power of two apart would share one set of the caches: a cache line lies between them.
    static constexpr Index row_stride(Index cols) noexcept { return cols + static_cast<Index>(cache_line / sizeof(double)); }

    Index cols() const noexcept { return static_cast<Index>(order_.size()); }
    const std::vector<Index>& order() const noexcept { return order_; }   // order()[0] is visited first
    double damping() const noexcept { return damping_; }                  // the one that worked, or the last tried
    Index dead_columns() const noexcept { return dead_columns_; }
    bool usable() const noexcept { return usable_; }
    Order kind() const noexcept { return kind_; }
    double lambda() const noexcept { return lambda_; }             // damping times the mean of the live diagonal
    double dead_weight() const noexcept { return dead_weight_; }  // max(damping asked, 0.01) times that mean; 1 where every column is dead

    // Column of the weight that stands at a reversed position.
    Index column(Index position) const noexcept { return columns_[static_cast<std::size_t>(position)]; }

    // By reversed position. Strictly below the diagonal L[k,p] / L[p,p], on it ones, strictly above it R itself, which saves a matrix: whoever wants both has both.
    Strided<double> unit() const noexcept { return {room_.data, cols(), cols(), Eigen::OuterStride<>(room_.row_stride)}; }
    const Eigen::VectorXd& pivots() const noexcept { return pivots_; }      // L[p,p]²
    const Eigen::VectorXd& diagonal() const noexcept { return diagonal_; }  // R[p,p]

    // H by reversed position, dead columns zero throughout.
    SecondMoment second_moment() const noexcept { return {room_, undamped_.data(), columns_.data()}; }

private:
    Factor(Buffer<double> own, MatrixView<double> h, Order order, double damping, Index group_size, Precision precision, int threads);

    void set_order(Index group_size);
    void sort_columns(int threads);
    template <class Real>
    bool factorize_columns(double least_pivot, int threads);

    std::vector<Index> order_, columns_;  // the latter by position
    double damping_ = 0;
    Index dead_columns_ = 0;
    bool usable_ = false;
    Order kind_;
    double lambda_ = 0, dead_weight_ = 1;
    Buffer<double> own_;       // the memory, where it is not another's
    MatrixView<double> room_;  // its rows are the factor's columns
    Eigen::VectorXd undamped_, pivots_, diagonal_;
};

}  // namespace mrgptq
