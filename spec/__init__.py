"""The decode core: one tree, one step, one loop. It knows neither drafters nor training."""
