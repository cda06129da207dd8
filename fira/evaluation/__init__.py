"""Evaluation on tasks in JSONL files, with the conventions and the numbers of lm-eval."""
