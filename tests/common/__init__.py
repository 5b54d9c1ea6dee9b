"""What tests and benchmarks share: the table of cases, the comparison with torch.nn, the model of the planner."""
