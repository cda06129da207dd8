"""Post-training: chats as training data, packed into sequences."""
