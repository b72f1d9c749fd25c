"""Time and throughput."""
