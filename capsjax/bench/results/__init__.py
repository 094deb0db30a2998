"""Results: rows in a file, tables, an HTML page, and the comparison of two files."""
