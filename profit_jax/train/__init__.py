"""The training step, what it trains, what it measures, and the loop over the plan's phases."""
