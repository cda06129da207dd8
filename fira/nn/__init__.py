"""Layers that the model families share: attention, rotary embedding, norms, dropout, MLP, and RWKV."""
