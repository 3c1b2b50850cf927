"""The table of an evaluation: architectures x seeds on distilled sets."""
