"""Tasks answered by a language model that was never trained for them."""
