"""Problems small enough to be computed exactly, and what the papers claim held against them."""
