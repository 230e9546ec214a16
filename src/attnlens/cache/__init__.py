"""What decoding keeps of the past: policies for the keys and values of exact attention."""
