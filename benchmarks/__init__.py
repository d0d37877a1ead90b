"""One module per question. Each prints one JSON object as its last line and keeps it in
``benchmarks/results/``. Speed is a ratio of sides that alternate in one run."""
