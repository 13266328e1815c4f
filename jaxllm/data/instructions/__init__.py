"""Sets of instructions: files of many shapes read, cleaned, told apart from their duplicates, split and mixed."""
