"""How attention over a packed batch is computed."""
