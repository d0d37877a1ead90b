"""What every benchmark shares: engines in this process, facts of the machine, result files."""
