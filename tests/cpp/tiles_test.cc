// Tiles against the bytes of the rows that they hold.
#include <gtest/gtest.h>

#include <cstdint>
#include <random>

#include "matmul/tiles.h"
#include "matrices.h"
#include "refusal.h"
#include "tiled.h"

namespace mrgptq {
namespace {

using testing::expect_refused, testing::Layout, testing::layouts, testing::Matrix, testing::thread_counts, testing::Tiled;

Matrix<std::uint8_t> random_bytes(Index rows, Index cols, unsigned seed) {
    Matrix<std::uint8_t> bytes(rows, cols);
    std::mt19937 generator(seed);
    for (Index r = 0; r < rows; ++r)
        for (Index c = 0; c < cols; ++c) bytes(r, c) = static_cast<std::uint8_t>(generator());
    return bytes;
}

// Byte `byte` of a row as tiles hold it; 0 behind the last.
std::uint32_t byte_of(const Matrix<std::uint8_t>& rows, Index row, Index byte) { return row < rows.view().rows && byte < rows.view().cols ? rows(row, byte) : 0u; }

void expect_tiles_of(const Matrix<std::uint8_t>& rows, const Matrix<std::uint32_t>& tiles) {
    for (Index tile = 0; tile < tiles.view().rows; ++tile)
        for (Index word = 0; word < tiles.view().cols / 32; ++word)
            for (Index r = 0; r < 32; ++r) {
                std::uint32_t expected = 0;
                for (Index byte = 0; byte < 4; ++byte) expected |= byte_of(rows, 32 * tile + r, 4 * word + byte) << (8 * byte);
                ASSERT_EQ(tiles(tile, 32 * word + r), expected) << "tile " << tile << ", word " << word << ", row " << r;
            }
}

TEST(Tiles, HoldWordsOfRowsAndGiveThemBack) {
    for (const Index rows : {1, 31, 32, 33, 100})
        for (const Index cols : {16, 48, 64, 112, 528, 2080}) {
            const Matrix<std::uint8_t> codes = random_bytes(rows, cols / 2, 1), scales = random_bytes(rows, cols / 16, 2);
            for (const Layout layout : layouts)
                for (const int threads : thread_counts) {
                    const Matrix<std::uint8_t> own_codes(codes, layout, 0x77), own_scales(scales, layout, 0x77);
                    const Tiled tiled({"nvfp4", own_codes.view(), own_scales.view(), 3}, layout, threads);
                    expect_tiles_of(codes, tiled.codes);
                    expect_tiles_of(scales, tiled.scales);
                    EXPECT_TRUE(tiled.codes.padding_untouched() && tiled.scales.padding_untouched());
                    Matrix<std::uint8_t> codes_again(rows, cols / 2, layout, 0x77), scales_again(rows, cols / 16, layout, 0x77);
                    read_tiles(tiled.view(), codes_again.view(), scales_again.view(), threads);
                    EXPECT_TRUE(codes_again == codes && scales_again == scales);
                    EXPECT_TRUE(codes_again.padding_untouched() && scales_again.padding_untouched());
                }
        }
}

TEST(Tiles, Refuse) {
    const Matrix<std::uint8_t> codes = random_bytes(40, 32, 1), scales = random_bytes(40, 2, 2);
    const PackedMatrix matrix{"mxfp4", codes.view(), scales.view()};
    Matrix<std::uint32_t> code_tiles(2, 8 * 32), scale_tiles(2, 32), one_tile(1, 8 * 32);
    const char* const unfit = "tiles of codes and scales do not fit a matrix of 40 rows and 64 columns";
    expect_refused(unfit, [&] { make_tiles(matrix, one_tile.view(), scale_tiles.view(), 1); });
    expect_refused(unfit, [&] { make_tiles(matrix, code_tiles.view(), code_tiles.view(), 1); });
    expect_refused("scales do not have one entry for each group", [&] { make_tiles({"nvfp4", codes.view(), scales.view()}, code_tiles.view(), scale_tiles.view(), 1); });
    make_tiles(matrix, code_tiles.view(), scale_tiles.view(), 1);
    Matrix<std::uint8_t> fewer_codes(8, 32), fewer_scales(8, 2);
    expect_refused("tiles of codes and scales do not fit a matrix of 8 rows", [&] { read_tiles({"mxfp4", 40, code_tiles.view(), scale_tiles.view()}, fewer_codes.view(), fewer_scales.view(), 1); });
    expect_refused("tiles of codes and scales do not fit a matrix of 65 rows", [&] { read_tiles({"mxfp4", 65, code_tiles.view(), scale_tiles.view()}, fewer_codes.view(), fewer_scales.view(), 1); });
}

}  // namespace
}  // namespace mrgptq
