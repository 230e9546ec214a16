"""Small Transformers whose attention operator is exchangeable."""
