"""An index with a past, where tests want one."""

from histories import history  # noqa: F401 (a fixture)
