"""Counting the tokens of prompts: with tiktoken here, or by asking a tokenizer over HTTP; what cannot be counted is estimated."""
