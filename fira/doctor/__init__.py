"""`fira doctor`: what a machine can do, with a remedy for each problem, and tests of its GPUs."""
