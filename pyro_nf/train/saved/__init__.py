"""What a fit leaves in files: its state, and marks of what it was given."""
