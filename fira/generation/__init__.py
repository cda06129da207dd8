"""Use of a trained model: text, chat, beam search, speculative decoding, and perplexity."""
