"""Monitoring shows a run while it goes on, and notices what goes wrong: metrics, progress, warnings, measurements."""
