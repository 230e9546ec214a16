"""Another attention operator in a model that was trained with exact attention: what that costs, layer by layer."""
