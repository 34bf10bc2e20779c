"""Stores and indexes with a past, where tests want them."""

from histories import history, local  # noqa: F401 (fixtures)
