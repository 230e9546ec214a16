"""How tokens learn where they are: added to the embeddings, or turned into queries and keys."""
