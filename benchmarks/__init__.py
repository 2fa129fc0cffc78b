"""What things cost, as ratios: `python -m benchmarks` measures a little of everything."""
