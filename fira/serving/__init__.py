"""OpenAI-compatible server with continuous batching."""
