"""Which credit assignment learns a tool task of several steps from a sparse reward: a measured comparison."""
