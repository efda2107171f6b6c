"""The network: loading it, its output layer, adapters, the forward pass to losses, and weights out."""
