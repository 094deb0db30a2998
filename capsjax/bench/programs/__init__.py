"""Reads the contents and the cost of a compiled program from its text."""
