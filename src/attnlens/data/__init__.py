"""Data: generators and corpora become Arrow folders with known hashes; one Lightning data module serves them all."""
