"""Measures programs, each cell or group of cells in fresh processes."""
