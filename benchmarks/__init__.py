"""Programs that each print one table, ours beside the named peers, in one run."""
