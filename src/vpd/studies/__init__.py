"""Several settings by several seeds: running them, and setting them side by side."""
