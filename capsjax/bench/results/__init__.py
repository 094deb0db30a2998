"""What was measured: rows in a file, tables, an HTML page, comparison of two files."""
