"""What holds for all tests."""

from hypothesis import settings

# How long an example takes says something of the machine, and a test that fails for it says nothing of us.
settings.register_profile("kalium", deadline=None)
settings.load_profile("kalium")
