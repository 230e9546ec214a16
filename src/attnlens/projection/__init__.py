"""From token vectors to queries, keys and values, through an attention operator, and back."""
