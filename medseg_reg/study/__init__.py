"""Whether a method really helps: grids of runs, search, statistics, co-adaptation, the report."""
