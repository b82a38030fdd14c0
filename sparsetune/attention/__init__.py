"""How one attention call runs: thresholds, block maps, dense steps, token orders, backends, interception."""
