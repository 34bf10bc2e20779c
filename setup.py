"""A shim for tools that still ask for `setup.py` (Dataflow's `--setup_file`); pyproject.toml holds everything."""

from setuptools import setup

setup()
