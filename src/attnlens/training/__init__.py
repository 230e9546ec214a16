"""Training to a fixed number of steps, resumable to the bit, and the folder of results that a cell leaves."""
