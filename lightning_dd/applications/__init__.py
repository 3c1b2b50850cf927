"""What distilled sets are good for: continual learning, and defence against membership inference."""
