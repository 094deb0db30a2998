"""What a compiled program consists of and costs, read from its text."""
