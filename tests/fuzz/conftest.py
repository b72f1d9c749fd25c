"""Hypothesis profiles: few examples of a fixed seed in the test suite, many random ones by `make fuzz`."""

import os

from hypothesis import HealthCheck, settings

CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "suite", max_examples=20, derandomize=True, database=None, deadline=None, suppress_health_check=CHECKS
)
settings.register_profile("long", max_examples=2000, deadline=None, print_blob=True, suppress_health_check=CHECKS)
settings.load_profile(os.environ.get("VITPRUNE_FUZZ", "suite"))
