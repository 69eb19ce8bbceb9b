#pragma once

#include <cstddef>

namespace tardkd::cpu {

// Memory for a large result, kept for the next one when it is given back. The first touch of fresh memory takes four
// times as long as to write it again, and much longer where other work has left physical memory in pieces; a training
// step asks for the same gradients every time. No more is kept than was in use at one time.
class Block {
 public:
  explicit Block(size_t bytes);  // uninitialised; throws std::bad_alloc
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_;
  size_t bytes_, capacity_;
};

// Gives back what is kept, and says how many bytes that were.
size_t empty_cache();

}  // namespace tardkd::cpu
