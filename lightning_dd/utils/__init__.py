"""Small tools with no knowledge of the project: errors, files, seeds."""
