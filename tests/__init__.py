"""Tests of vitprune, arranged like the package."""
