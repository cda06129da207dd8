"""Decoding: sampling of tokens, and the loop that generates them one by one."""
