"""Puts this folder on the path, so that every room of tests can share the networks of ``nets.py``."""
