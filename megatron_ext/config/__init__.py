"""Layer 1: the configuration tree, its rules, and how it is read. Standard library and tyro only."""
