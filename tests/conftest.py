"""Settings that every test shares."""

from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "default",
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
# For tests/plant_bugs.py, which asks only whether a test fails.
settings.register_profile("no_shrinking", settings.get_profile("default"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("default")
