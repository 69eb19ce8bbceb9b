// Work that is dealt out by the pixels of maps: a block is a tile of one map and a group of channels.
#pragma once

#include "maps.cuh"

namespace tardkd::cuda {

struct TileSize {
  int32_t width, height;
};

// Columns and rows of tiles of a map, and groups of its channels.
struct TileCounts {
  int32_t columns, rows, groups;

  __host__ __device__ __forceinline__ TileCounts(const FeatureMap& map, const TileSize& size, int32_t group_channels)
      : columns((map.width + size.width - 1) / size.width),
        rows((map.height + size.height - 1) / size.height),
        groups((map.channels + group_channels - 1) / group_channels) {}
};

// Which blocks work on which level. Within a level the channel group of a block changes fastest, then the column, the
// row and the image.
struct TileGrid {
  int64_t first_block[kMaxLevels + 1];  // of each level; behind the last one the number of all blocks
};

// `size_of` tells the size of the tiles of a map.
template <class SizeOf>
TileGrid tile_grid(const PyramidView& pyramid, int32_t group_channels, const SizeOf& size_of) {
  TileGrid grid{};
  for (int32_t level = 0; level < pyramid.levels; ++level) {
    const MapView& view = pyramid.level[level];
    const TileCounts tiles(view.map, size_of(view), group_channels);
    grid.first_block[level + 1] =
        grid.first_block[level] + int64_t(tiles.columns) * tiles.rows * pyramid.images * tiles.groups;
  }
  return grid;
}

struct Tile {
  int32_t level, image, y, x, channel;
  int32_t width, height;
};

// The tile of this block, by the sizes that the grid was made for.
template <class SizeOf>
__device__ __forceinline__ Tile tile_of(const TileGrid& grid, const PyramidView& pyramid, int32_t group_channels,
                                        const SizeOf& size_of) {
  Tile tile;
  tile.level = 0;
  while (int64_t(blockIdx.x) >= grid.first_block[tile.level + 1]) ++tile.level;
  const MapView& view = pyramid.level[tile.level];
  const TileSize size = size_of(view);
  const TileCounts tiles(view.map, size, group_channels);
  int32_t rest = int32_t(blockIdx.x - grid.first_block[tile.level]);
  tile.channel = rest % tiles.groups * group_channels;
  rest /= tiles.groups;
  tile.x = rest % tiles.columns * size.width;
  rest /= tiles.columns;
  tile.y = rest % tiles.rows * size.height;
  tile.image = rest / tiles.rows;
  tile.width = size.width;
  tile.height = size.height;
  return tile;
}

}  // namespace tardkd::cuda
