"""Stub for tools that require a setup.py; the metadata is in pyproject.toml."""

from setuptools import setup

setup()
