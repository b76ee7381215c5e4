"""What several test files use: no test imports from another test file."""
