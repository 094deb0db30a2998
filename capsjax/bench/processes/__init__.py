"""How programs are measured: each cell or group of cells in fresh processes."""
