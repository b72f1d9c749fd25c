"""Faults, kills, tampering and concurrent runs."""
