"""Which format each layer gets under a budget: sensitivities, costs, the exact solution, and what it is in a spec."""
