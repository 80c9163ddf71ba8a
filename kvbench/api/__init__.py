"""What `kvbench.run`, `kvbench.sweep` and `kvbench.index` do, for Python and for the command line alike."""
