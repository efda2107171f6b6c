"""What a run says of itself while it goes on, and what it notices: metrics, progress, warnings, measurements."""
