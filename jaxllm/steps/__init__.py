"""Train steps: a step is a loss and what it trains, one file each."""
