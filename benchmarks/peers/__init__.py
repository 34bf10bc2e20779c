"""Nearest-neighbour libraries to compare with, each in a process and an environment of its own.

This file imports nothing: the workers run where only NumPy and the one library are installed.
"""
