"""Where tensors are on this disk, and the shards cut from them."""
