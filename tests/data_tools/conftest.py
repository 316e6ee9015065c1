"""The shards that the tests of data read."""

from tests.data.conftest import shards

__all__ = ["shards"]
