"""Planning predicts what a training step will cost, before it is run."""
