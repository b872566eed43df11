"""What a team plays and reckons with: the cost model, the simulator and the demo."""
