"""Helpers without a field of their own: text, files, checks, devices, warnings."""
