"""Tools for planning and trials: the cost model, the simulator and the demo."""
