"""Studies: analyses of captured vectors and of traces of runs."""
