"""Executes compiled programs in NumPy: one thread a rank, collectives as meetings of threads."""
