"""Text to tokens to batches: preparing corpora, the files that hold them, and the windows that training reads."""
