"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Read when Triton's kernels are first imported: the suite runs them in the interpreter.
os.environ["TRITON_INTERPRET"] = "1"

# A slow machine is no failure. Where a change is judged, the same examples are tried every time;
# everywhere else new ones are, and what they find is kept in .hypothesis.
settings.register_profile(
    "here",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("here")
