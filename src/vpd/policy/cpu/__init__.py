"""How the network computes and keeps its layers on a processor."""
